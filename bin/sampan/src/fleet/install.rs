//! `sampan install`: a server on a machine, and its kubeconfig here. Upstream counterpart: k3sup's cmd/install.go.
use std::path::{Path, PathBuf};

use anyhow::Result;
use sampan_fleet::service::Role;
use sampan_fleet::{Host, kubeconfig, words};
use serde_yaml_ng::Value;

use super::access::{self, Access, Target, Way, ask};
use super::datastore::DatastoreFlags;
use super::node::{self, Setup, Wanted};
use super::{Usage, effective};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub access: Access,
    /// Install on this machine, without SSH
    #[arg(long)]
    pub local: bool,
    #[command(flatten)]
    pub out: KubeconfigOut,
    #[command(flatten)]
    pub server: ServerFlags,
    #[command(flatten)]
    pub setup: Setup,
    /// Install nothing, only fetch the kubeconfig
    #[arg(long)]
    pub skip_install: bool,
}

/// Where the kubeconfig goes.
#[derive(Clone, clap::Args)]
#[command(next_help_heading = "Kubeconfig")]
pub struct KubeconfigOut {
    /// File that the kubeconfig is saved to
    #[arg(long, default_value = "kubeconfig")]
    pub local_path: PathBuf,
    /// Name of the kubeconfig's context, cluster and user
    #[arg(long, default_value = "default")]
    pub context: String,
    /// Merge it into that file when there is one
    #[arg(long, default_value_t = false, num_args = 0..=1, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set)]
    pub merge: bool,
}

/// What the server is to be.
#[derive(Clone, Default, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct ServerFlags {
    /// More names or addresses for the API's certificate, separated by commas
    #[arg(long, value_delimiter = ',')]
    pub tls_san: Vec<String>,
    /// Secret that nodes join with (default: the server makes one up)
    #[arg(long)]
    pub token: Option<String>,
    /// Begin a cluster that other servers can join, by etcd members that the servers run themselves
    #[arg(long)]
    pub cluster: bool,
    #[command(flatten)]
    pub datastore: DatastoreFlags,
    /// Leave out what the server brings besides Kubernetes itself (load balancer, ingress)
    #[arg(long)]
    pub no_extras: bool,
    /// Arguments for `sampan server`, in quotes
    #[arg(
        long,
        visible_alias = "server-args",
        alias = "k3s-extra-args",
        allow_hyphen_values = true,
        default_value = ""
    )]
    pub extra_args: String,
    /// Accepted for k3sup's scripts
    #[arg(long, hide = true)]
    pub ipsec: bool,
}

impl ServerFlags {
    /// What these flags come to on a server that is reached as `host`.
    pub fn wanted(&self, host: &str) -> Result<Wanted> {
        let lacking = |flag: &str, why: &str| Usage(format!("{flag}: {why}"));
        let mut names = vec![Value::from(host)];
        names.extend(self.tls_san.iter().filter(|n| !n.is_empty()).map(|n| Value::from(n.as_str())));
        let mut config = vec![("tls-san".to_string(), Value::Sequence(names))];
        let datastore = self.datastore.read()?;
        if datastore.is_some() && self.token.is_none() {
            return Err(lacking("--datastore", "needs --token, the same for all servers").into());
        }
        // who gives both has what several servers need
        if self.cluster && datastore.is_none() {
            config.push(("cluster-init".to_string(), true.into()));
        }
        if let Some(token) = &self.token {
            config.push(("token".to_string(), token.as_str().into()));
        }
        if self.ipsec {
            return Err(lacking("--ipsec", "nodes' traffic is not encrypted by IPsec here").into());
        }
        if self.no_extras && effective::has_flag(Role::Server, "disable") {
            config.push(("disable".to_string(), Value::Sequence(vec!["servicelb".into(), "traefik".into()])));
        }
        let extra_args = words::split(&self.extra_args).map_err(|e| Usage(format!("--extra-args {e}")))?;
        let mut wanted = Wanted { role: Role::Server, config, extra_args, files: Vec::new() };
        if let Some(datastore) = datastore {
            datastore.put(&mut wanted);
        }
        wanted.check()?;
        Ok(wanted)
    }
}

pub async fn run(args: &Args) -> Result<()> {
    args.setup.note_k3s_flags();
    let host = args.target.host();
    let wanted = args.server.wanted(&host)?;
    let way = if args.local { Way::local() } else { args.access.way(&host)? };
    let ask = ask();
    if args.skip_install {
        let reached = way.reach(&ask).await?;
        let path = node::look(&reached, &wanted).await?.kubeconfig;
        return fetch(&reached, &path, &host, &args.out, args.setup.print_command).await;
    }
    let prepared = node::prepare(&way, &wanted, &args.setup, &ask).await?;
    let new_binary = node::send(&prepared, &args.setup, true).await?;
    let settled = node::settle(&prepared, &wanted, &args.setup, new_binary).await?;
    let print = args.setup.print_command;
    fetch(&prepared.host, &settled.effective.kubeconfig, &host, &args.out, print).await
}

/// Fetches the server's kubeconfig for use from here.
pub async fn fetch(host: &Host, path: &str, address: &str, out: &KubeconfigOut, print: bool) -> Result<()> {
    if print {
        eprintln!("{}: cat {path}", host.name);
    }
    let text = node::read_root(host, path).await?;
    let text = kubeconfig::rewrite(&text, address, &out.context)?;
    let local = access::expand(&out.local_path);
    kubeconfig::save(&local, &text, out.merge)?;
    let shown = std::path::absolute(&local).unwrap_or_else(|_| local.clone());
    told(&shown, &out.context, out.merge);
    Ok(())
}

fn told(path: &Path, context: &str, merged: bool) {
    let verb = if merged { "Merged into" } else { "Saved to" };
    println!("{verb} {}\n\n# Try it:\nexport KUBECONFIG={0}", path.display());
    println!("kubectl config use-context {context}\nkubectl get node -o wide");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::parse;

    #[test]
    fn k3sups_lines_work() {
        let args = parse::<Args>(
            "--ip 10.0.0.5 --user pi --local-path $HOME/k --context prod --merge --sudo --k3s-channel stable",
        );
        assert_eq!(
            (args.target.host().as_str(), args.out.context.as_str(), args.out.merge),
            ("10.0.0.5", "prod", true)
        );
        let args = parse::<Args>(
            "--host pi.lan --tls-san a,b --k3s-extra-args '--data-dir /mnt/ssd --node-label x=y'",
        );
        let wanted = args.server.wanted(&args.target.host()).unwrap();
        assert_eq!(wanted.extra_args, ["--data-dir", "/mnt/ssd", "--node-label", "x=y"]);
        assert_eq!(serde_yaml_ng::to_string(&wanted.config[0].1).unwrap(), "- pi.lan\n- a\n- b\n");
        let args = parse::<Args>("--ip 10.0.0.5 --datastore http://10.0.0.9:2379 --token T --cluster");
        let wanted = args.server.wanted(&args.target.host()).unwrap();
        let keys: Vec<&str> = wanted.config.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["tls-san", "token", "datastore-endpoint"]);
        let args = parse::<Args>("--ip 10.0.0.5 --cluster");
        let wanted = args.server.wanted(&args.target.host()).unwrap();
        assert_eq!(wanted.config[1..], [("cluster-init".to_string(), Value::Bool(true))]);
        assert!(wanted.runs_etcd());
        assert!(parse::<Args>("--skip-install --ssh-port 2222 --print-command --no-extras").skip_install);
    }

    #[test]
    fn flags_that_do_not_fit() {
        for (line, want) in [
            ("--datastore http://e:2379", "--token"),
            ("--datastore mysql://x --token t", "expected the etcd's http://HOST:2379"),
            ("--datastore-cafile /x --token t", "goes with --datastore"),
            ("--extra-args '--no-such-flag'", "--no-such-flag"),
            ("--server-args \"'\"", "not closed"),
            ("--ipsec", "--ipsec"),
        ] {
            let error = parse::<Args>(line).server.wanted("h").map(|_| ()).unwrap_err();
            assert!(error.is::<Usage>() && error.to_string().contains(want), "{line}: {error}");
        }
    }
}
