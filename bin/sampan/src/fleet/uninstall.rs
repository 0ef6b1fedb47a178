//! `sampan uninstall`: machines as they were. Upstream counterpart: running k3s-uninstall.sh. A server that runs a member
//! of its cluster's etcd has it leave first; where the others could not go on without it, nothing is removed.
use anyhow::Result;
use sampan_fleet::install;
use sampan_fleet::service::{CONFIG, Role};

use super::access::{Machines, Way, ask};
use super::datastore::is_member;
use super::node::{self, Wanted};
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
            let shares = "grep -q '^datastore-endpoint:' \"$1\" 2>/dev/null && echo yes; true";
            let shares = host.root("reading the configuration", shares, &[CONFIG]).await?.contains("yes");
            let is_member = match node::look(&host, &Wanted::nothing_new(Role::Server)).await {
                Ok(effective) => is_member(&host, &effective.data_dir).await?,
                Err(_) => false,
            };
            let removed = install::uninstall(&host, &args.bin_dir).await?;
            Ok::<_, anyhow::Error>((removed, shares, is_member))
        };
        match done.await {
            Ok((true, _, true)) => tell(
                &way.name,
                "sampan is removed, with all that it kept here and its member of the cluster's etcd (unless that can decide \
                 nothing any more); this machine's Node is left to the other servers",
            ),
            Ok((true, true, _)) => tell(
                &way.name,
                "sampan is removed, with all that it kept here; the cluster in the datastore, with this machine's Node, \
                 is left as it is",
            ),
            Ok((true, false, _)) => tell(&way.name, "sampan is removed, with all that it kept"),
            Ok((false, ..)) => tell(&way.name, "sampan is not installed"),
            Err(error) => {
                eprintln!("sampan: {error:#}");
                failed = Some(error);
            }
        }
    }
    failed.map_or(Ok(()), Err)
}
