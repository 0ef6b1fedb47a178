//! `sampan join`: an agent, or another server, on a machine, joined to a server. Upstream counterpart: k3sup's cmd/join.go.
//!
//! Another server gets what all have in common from the first: datastore, its TLS files, token, and the flags that must be
//! equal; or, where the servers run an etcd together, the first one's URL instead of the datastore. Deliberate difference:
//! k3sup has servers join by embedded etcd only.
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use sampan_fleet::service::Role;
use sampan_fleet::{Ask, Host, words};
use serde_yaml_ng::Value;

use super::access::{Access, Target, ask};
use super::datastore::{Common, DatastoreFlags, Entrance, servers_token};
use super::install::ServerFlags;
use super::node::{self, Setup, Wanted};
use super::{Usage, tell};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    access: Access,
    #[command(flatten)]
    joined: JoinedServer,
    #[command(flatten)]
    setup: Setup,
    /// Join as another server, which shares the first one's datastore, or runs an etcd member as that does
    #[arg(long)]
    server: bool,
    /// The servers run etcd members, which is not looked up at the first one when --node-token is given; with --server
    /// only
    #[arg(long)]
    cluster: bool,
    #[command(flatten)]
    datastore: DatastoreFlags,
    /// Leave out what servers bring besides Kubernetes itself; with --server only
    #[arg(long)]
    no_extras: bool,
    /// More names for the API's certificate; with --server only
    #[arg(long, value_delimiter = ',')]
    tls_san: Vec<String>,
    /// Install nothing, only say what would be done
    #[arg(long)]
    skip_install: bool,
    /// Arguments for `sampan agent` (or `sampan server`), in quotes
    #[arg(
        long,
        visible_alias = "agent-args",
        alias = "k3s-extra-args",
        allow_hyphen_values = true,
        default_value = ""
    )]
    extra_args: String,
}

/// The server that is joined.
#[derive(clap::Args)]
#[command(next_help_heading = "Server to join")]
pub struct JoinedServer {
    /// IP address of the server
    #[arg(long)]
    server_ip: Option<IpAddr>,
    /// Host name of the server, instead of --server-ip
    #[arg(long)]
    server_host: Option<String>,
    /// URL that the node reaches the server at (default: https://SERVER:6443)
    #[arg(long)]
    server_url: Option<String>,
    /// User on the server (default: --user)
    #[arg(long)]
    server_user: Option<String>,
    /// SSH port of the server (default: --ssh-port)
    #[arg(long)]
    server_ssh_port: Option<u16>,
    /// Private key for the server (default: --ssh-key)
    #[arg(long)]
    server_ssh_key: Option<PathBuf>,
    /// Fingerprint of the server's host key
    #[arg(long)]
    server_host_key: Option<String>,
    /// Where the server keeps its data
    #[arg(long, default_value = "/var/lib/sampan")]
    server_data_dir: String,
    /// The token, when it is known: the server is not logged in to then (with --server: when --datastore is given, too)
    #[arg(long)]
    node_token: Option<String>,
    /// File with the token
    #[arg(long)]
    node_token_path: Option<PathBuf>,
}

impl JoinedServer {
    fn host(&self) -> Result<String> {
        let named = self.server_host.clone().or_else(|| self.server_ip.map(|ip| ip.to_string()));
        let of_url =
            || self.server_url.as_deref().and_then(|u| crate::join::address_of(u).ok()).map(|(host, _)| host);
        named.or_else(of_url).ok_or_else(|| {
            Usage("name the server to join: --server-ip, --server-host or --server-url".to_string()).into()
        })
    }

    fn url(&self) -> Result<String> {
        match &self.server_url {
            Some(url) => {
                crate::join::address_of(url).map_err(|e| Usage(format!("--server-url: {e:#}")))?;
                Ok(url.clone())
            }
            None => Ok(crate::join::url_of(&self.host()?, 6443)),
        }
    }

    fn known_token(&self) -> Result<Option<String>> {
        let text = match (&self.node_token, &self.node_token_path) {
            (Some(token), _) => token.clone(),
            (None, Some(path)) => {
                std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?
            }
            (None, None) => return Ok(None),
        };
        match text.trim() {
            "" => Err(Usage("the token is empty".to_string()).into()),
            token => Ok(Some(token.to_string())),
        }
    }
}

/// An agent of the server at `url`.
pub fn wanted(url: &str, token: &str, extra_args: &str) -> Result<Wanted> {
    let config = vec![("server".to_string(), Value::from(url)), ("token".to_string(), Value::from(token))];
    let extra_args = words::split(extra_args).map_err(|e| Usage(format!("--extra-args {e}")))?;
    let wanted = Wanted { role: Role::Agent, config, extra_args, files: Vec::new() };
    wanted.check()?;
    Ok(wanted)
}

impl Args {
    fn check(&self) -> Result<()> {
        let for_servers = [
            ("--no-extras", self.no_extras),
            ("--tls-san", !self.tls_san.is_empty()),
            ("--datastore", !self.datastore.given().is_empty()),
            ("--cluster", self.cluster),
        ];
        if let Some((flag, _)) = for_servers.iter().find(|(_, given)| *given && !self.server) {
            return Err(Usage(format!("{flag} can only be used with --server")).into());
        }
        if !self.joined.server_data_dir.starts_with('/') {
            return Err(Usage("--server-data-dir must begin with /".to_string()).into());
        }
        Ok(())
    }

    /// The server that is there, logged in to.
    async fn first_server(&self, ask: &Arc<dyn Ask>) -> Result<Host> {
        let mut access = self.access.clone();
        access.user = self.joined.server_user.clone().unwrap_or(access.user);
        access.ssh_port = self.joined.server_ssh_port.unwrap_or(access.ssh_port);
        access.ssh_key = self.joined.server_ssh_key.clone().or(access.ssh_key);
        access.host_key.clone_from(&self.joined.server_host_key);
        access.way(&self.joined.host()?)?.reach(ask).await
    }

    async fn agent_wanted(&self, ask: &Arc<dyn Ask>) -> Result<Wanted> {
        let url = self.joined.url()?;
        wanted(&url, "token", &self.extra_args)?;
        tell(&self.target.host(), &format!("joins {url}"));
        let token = match self.joined.known_token()? {
            Some(token) => token,
            None => {
                let server = self.first_server(ask).await?;
                let path = format!("{}/server/node-token", self.joined.server_data_dir.trim_end_matches('/'));
                if self.setup.print_command {
                    eprintln!("{}: cat {path}", server.name);
                }
                let text = node::read_root(&server, &path).await;
                let text = text.context(
                    "the token of the server (is it installed? --server-data-dir names another folder)",
                )?;
                text.trim().to_string()
            }
        };
        wanted(&url, &token, &self.extra_args)
    }

    /// What the servers have in common: as given, else as the first one has it.
    async fn common(&self, ask: &Arc<dyn Ask>) -> Result<Common> {
        let token = self.joined.known_token()?.map(|token| servers_token(&token)).transpose()?;
        let (named, host) = (self.joined.server_url.clone(), self.joined.host()?);
        let url = |port| named.unwrap_or_else(|| crate::join::url_of(&host, port));
        let entrance = match self.datastore.read()? {
            Some(datastore) => Some(Entrance::Datastore(datastore)),
            None if self.cluster => Some(Entrance::Members(self.joined.url()?)),
            None => None,
        };
        Ok(match (entrance, token) {
            (Some(entrance), Some(token)) => Common { entrance, token, equal: Vec::new() },
            (entrance, token) => {
                let first = Common::of_server(&self.first_server(ask).await?, url).await?;
                Common {
                    entrance: entrance.unwrap_or(first.entrance),
                    token: token.unwrap_or(first.token),
                    equal: first.equal,
                }
            }
        })
    }

    fn server_wanted(&self, common: &Common) -> Result<Wanted> {
        let flags = ServerFlags {
            tls_san: self.tls_san.clone(),
            no_extras: self.no_extras,
            extra_args: self.extra_args.clone(),
            ..ServerFlags::default()
        };
        let mut wanted = flags.wanted(&self.target.host())?;
        common.put(&mut wanted);
        wanted.check()?;
        Ok(wanted)
    }
}

pub async fn run(args: &Args) -> Result<()> {
    args.setup.note_k3s_flags();
    args.check()?;
    let (server_host, host) = (args.joined.host()?, args.target.host());
    let way = args.access.way(&host)?;
    let ask = ask();
    let wanted = match args.server {
        true => {
            tell(&host, &format!("joins {server_host} as another server"));
            args.server_wanted(&args.common(&ask).await?)?
        }
        false => args.agent_wanted(&ask).await?,
    };
    if args.skip_install {
        tell(&host, "nothing is installed, as --skip-install says");
        return Ok(());
    }
    let prepared = node::prepare(&way, &wanted, &args.setup, &ask).await?;
    let new_binary = node::send(&prepared, &args.setup, true).await?;
    node::settle(&prepared, &wanted, &args.setup, new_binary).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::parse;

    #[test]
    fn k3sups_lines_work() {
        let args = parse::<Args>(
            "--user pi --ip 10.0.0.6 --server-ip 10.0.0.5 --server-user me --server-ssh-port 2222",
        );
        assert_eq!(args.joined.url().unwrap(), "https://10.0.0.5:6443");
        let args = parse::<Args>(
            "--host a --server-host b --node-token T --k3s-extra-args '--node-taint k=v:NoExecute'",
        );
        assert_eq!(args.joined.known_token().unwrap().as_deref(), Some("T"));
        let wanted = wanted(&args.joined.url().unwrap(), "T", &args.extra_args).unwrap();
        assert_eq!(wanted.config[0].1, Value::from("https://b:6443"));
        let args = parse::<Args>("--ip 10.0.0.6 --server-url https://[fd00::1]:7443");
        assert_eq!(args.joined.host().unwrap(), "fd00::1");
        let args = parse::<Args>(
            "--user pi --ip 10.0.0.6 --server --server-ip 10.0.0.5 --server-data-dir /d --tls-san x",
        );
        assert!(args.server && args.tls_san == ["x"]);
        assert!(parse::<Args>("--ip 10.0.0.6").joined.host().is_err());
        assert!(parse::<Args>("--server-url http://x").joined.url().is_err());
        assert!(super::wanted("https://b:6443", "T", "--tls-san x").is_err());
        for (line, want) in [
            ("--tls-san x", "--tls-san can only be used with --server"),
            ("--no-extras", "--no-extras can only"),
            ("--cluster", "--cluster can only"),
            ("--datastore http://e:2379", "--datastore can only"),
        ] {
            let args = parse::<Args>(&format!("--ip 10.0.0.6 --server-ip 10.0.0.5 {line}"));
            assert!(args.check().unwrap_err().to_string().contains(want), "{line}");
        }
    }

    #[test]
    fn another_server() {
        let line = "--host new --server --server-host old --tls-san x --datastore https://e:2379 --extra-args '--debug'";
        let args: Args = parse(line);
        args.check().unwrap();
        let datastore = args.datastore.read().unwrap().unwrap();
        let equal = vec![("cluster-cidr".to_string(), Value::from("10.9.0.0/16"))];
        let entrance = Entrance::Datastore(datastore);
        let common = Common { entrance, token: "T".into(), equal };
        let wanted = args.server_wanted(&common).unwrap();
        assert!(!wanted.runs_etcd());
        let config: serde_yaml_ng::Mapping = wanted.config.into_iter().map(|(k, v)| (k.into(), v)).collect();
        let want =
            "tls-san: [new, x]\ntoken: T\ncluster-cidr: 10.9.0.0/16\ndatastore-endpoint: https://e:2379";
        assert_eq!(Value::Mapping(config), serde_yaml_ng::from_str::<Value>(want).unwrap());
        assert_eq!((wanted.role, wanted.extra_args), (Role::Server, vec!["--debug".to_string()]));
        let entrance = Entrance::Members("https://old:6443".to_string());
        let wanted = args.server_wanted(&Common { entrance, ..common }).unwrap();
        assert_eq!(wanted.config.last().unwrap(), &("server".to_string(), Value::from("https://old:6443")));
        assert!(wanted.runs_etcd());
    }
}
