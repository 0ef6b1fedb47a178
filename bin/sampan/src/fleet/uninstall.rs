//! `sampan uninstall`: machines as they were. Upstream counterpart: running k3s-uninstall.sh.
use anyhow::Result;
use sampan_fleet::install;

use super::access::{Machines, Way, ask};
use super::tell;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    machines: Machines,
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
    let ways = if args.local { vec![Way::local()] } else { args.machines.ways()? };
    // agents stand after their server in a list
    for way in ways.iter().rev() {
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
