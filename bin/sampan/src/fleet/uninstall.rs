//! `sampan uninstall`: machines as they were. Upstream counterpart: running k3s-uninstall.sh.
use std::path::PathBuf;

use anyhow::Result;
use sampan_fleet::install;

use super::access::{Access, Target, ask, ways};
use super::tell;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    access: Access,
    /// List of hosts (JSON or YAML), instead of --ip; the last of it is done first
    #[arg(long)]
    hosts: Option<PathBuf>,
    /// On this machine, without SSH
    #[arg(long)]
    local: bool,
    /// Folder that the program was put into
    #[arg(long, default_value = "/usr/local/bin")]
    bin_dir: String,
}

pub async fn run(args: &Args) -> Result<()> {
    let ask = ask();
    let mut failed = None;
    // agents stand after their server in a list
    for way in ways(&args.access, &args.target, args.hosts.as_deref(), args.local)?.iter().rev() {
        let done = async {
            let host = way.reach(&ask).await?;
            Ok::<bool, anyhow::Error>(install::uninstall(&host, &args.bin_dir).await?)
        };
        match done.await {
            Ok(true) => tell(&way.name, "sampan is removed, with all that it kept"),
            Ok(false) => tell(&way.name, "sampan is not installed"),
            Err(error) => {
                eprintln!("sampan: {error:#}");
                failed = Some(error);
            }
        }
    }
    failed.map_or(Ok(()), Err)
}
