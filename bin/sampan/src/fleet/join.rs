//! `sampan join`: an agent on a machine, joined to a server. Upstream counterpart: k3sup's cmd/join.go.
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use sampan_fleet::service::Role;
use sampan_fleet::words;
use serde_yaml_ng::Value;

use super::access::{Access, Target, ask};
use super::node::{self, Setup, Wanted};
use super::{Usage, effective, tell};

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
    /// Join as another server
    #[arg(long)]
    server: bool,
    /// Leave out what servers bring besides Kubernetes itself; with --server only
    #[arg(long)]
    no_extras: bool,
    /// More names for the API's certificate; with --server only
    #[arg(long, value_delimiter = ',')]
    tls_san: Vec<String>,
    /// Install nothing, only say what would be done
    #[arg(long)]
    skip_install: bool,
    /// Arguments for `sampan agent`, in quotes
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
    /// The token, when it is known: the server is not logged in to then
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
            None => Ok(url_of(&self.host()?, 6443)),
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

pub fn url_of(host: &str, port: u16) -> String {
    if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") }
}

/// An agent of the server at `url`.
pub fn wanted(url: &str, token: &str, extra_args: &str) -> Result<Wanted> {
    let config = vec![("server".to_string(), Value::from(url)), ("token".to_string(), Value::from(token))];
    let extra_args = words::split(extra_args).map_err(|e| Usage(format!("--extra-args {e}")))?;
    let wanted = Wanted { role: Role::Agent, config, extra_args };
    wanted.check()?;
    Ok(wanted)
}

pub async fn run(args: &Args) -> Result<()> {
    args.setup.note_k3s_flags();
    if args.server {
        // a second server needs a state that is shared
        let able = effective::has_flag(Role::Server, "server");
        let why = match able {
            true => "give a second server by `sampan install --datastore …` with the same --token",
            false => "this version has one server in a cluster",
        };
        return Err(Usage(format!("--server: {why}")).into());
    }
    if args.no_extras || !args.tls_san.is_empty() {
        let flag = if args.no_extras { "--no-extras" } else { "--tls-san" };
        return Err(Usage(format!("{flag} can only be used with --server")).into());
    }
    if !args.joined.server_data_dir.starts_with('/') {
        return Err(Usage("--server-data-dir must begin with /".to_string()).into());
    }
    let (server_host, url) = (args.joined.host()?, args.joined.url()?);
    let host = args.target.host();
    wanted(&url, "token", &args.extra_args)?;
    let way = args.access.way(&host)?;
    let ask = ask();
    tell(&host, &format!("joins {url}"));
    let token = match args.joined.known_token()? {
        Some(token) => token,
        None => {
            let mut access = args.access.clone();
            access.user = args.joined.server_user.clone().unwrap_or(access.user);
            access.ssh_port = args.joined.server_ssh_port.unwrap_or(access.ssh_port);
            access.ssh_key = args.joined.server_ssh_key.clone().or(access.ssh_key);
            access.host_key.clone_from(&args.joined.server_host_key);
            let server = access.way(&server_host)?.reach(&ask).await?;
            let path = format!("{}/server/node-token", args.joined.server_data_dir.trim_end_matches('/'));
            if args.setup.print_command {
                eprintln!("{server_host}: cat {path}");
            }
            let text = node::read_root(&server, &path).await;
            let text = text.context(
                "the token of the server (is it installed? --server-data-dir names another folder)",
            )?;
            text.trim().to_string()
        }
    };
    let wanted = wanted(&url, &token, &args.extra_args)?;
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
        assert_eq!(url_of("fd00::1", 6443), "https://[fd00::1]:6443");
        assert!(parse::<Args>("--ip 10.0.0.6").joined.host().is_err());
        assert!(parse::<Args>("--server-url http://x").joined.url().is_err());
        assert!(super::wanted("https://b:6443", "T", "--tls-san x").is_err());
    }
}
