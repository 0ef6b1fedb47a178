//! `sampan get-config` and `node-token`: what a server has to give. Upstream counterparts: k3sup's cmd/get-config.go and
//! cmd/node-token.go.
use anyhow::{Result, bail};
use sampan_fleet::service::Role;

use super::access::{Access, Target, Way, ask};
use super::install::{self, KubeconfigOut};
use super::node::{self, Wanted};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    access: Access,
    /// From this machine, without SSH
    #[arg(long)]
    local: bool,
    #[command(flatten)]
    out: KubeconfigOut,
    /// Print the commands that are run
    #[arg(long)]
    print_command: bool,
}

pub async fn run(args: &Args) -> Result<()> {
    let host = args.target.host();
    let way = if args.local { Way::local() } else { args.access.way(&host)? };
    let reached = way.reach(&ask()).await?;
    let nothing = Wanted::nothing_new(Role::Server);
    let path = node::look(&reached, &nothing).await?.kubeconfig;
    install::fetch(&reached, &path, &host, &args.out, args.print_command).await
}

#[derive(clap::Args)]
pub struct TokenArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    access: Access,
    /// From this machine, without SSH
    #[arg(long)]
    local: bool,
    /// Print the command that is run
    #[arg(long)]
    print_command: bool,
    /// Where the server keeps its data
    #[arg(long, default_value = "/var/lib/sampan")]
    server_data_dir: String,
}

pub async fn run_token(args: &TokenArgs) -> Result<()> {
    let way = if args.local { Way::local() } else { args.access.way(&args.target.host())? };
    let path = format!("{}/server/node-token", args.server_data_dir.trim_end_matches('/'));
    if args.print_command {
        eprintln!("{}: cat {path}", way.name);
    }
    let token = node::read_root(&way.reach(&ask()).await?, &path).await?;
    if token.trim().is_empty() {
        bail!("{path} is empty");
    }
    println!("{}", token.trim());
    Ok(())
}
