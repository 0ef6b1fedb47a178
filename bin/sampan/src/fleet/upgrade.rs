//! `sampan upgrade`: machines brought to this version one by one, servers first, and back when a node does not come up.
//!
//! Upstream counterpart: system-upgrade-controller's plans for K3s, without a controller. What stays true: one machine at
//! a time, the next only when the last is Ready; pods keep running, as the service alone is started anew. Kubernetes'
//! skew rule (a node is never newer than its server) follows from the order within a list; of a single agent it is the
//! owner's to keep.
use std::path::PathBuf;

use anyhow::{Context, Result};
use sampan_fleet::service::{Role, Service};
use sampan_fleet::{Host, install, ready, words};

use super::access::{Access, Target, ask, ways};
use super::node::{self, Setup, Wanted};
use super::{Unfit, tell};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    access: Access,
    /// List of hosts (JSON or YAML), instead of --ip
    #[arg(long)]
    hosts: Option<PathBuf>,
    #[command(flatten)]
    setup: Setup,
}

pub async fn run(args: &Args) -> Result<()> {
    let ask = ask();
    let mut machines = Vec::new();
    for way in ways(&args.access, &args.target, args.hosts.as_deref(), false)? {
        let host = way.reach(&ask).await?;
        let role =
            match (host.facts.services.contains("sampan"), host.facts.services.contains("sampan-agent")) {
                (true, _) => Role::Server,
                (false, true) => Role::Agent,
                (false, false) => {
                    return Err(Unfit(format!("{}: sampan is not installed there", host.name)).into());
                }
            };
        let found =
            host.root("asking its version", "\"$1\"/sampan --version", &[&args.setup.bin_dir]).await?;
        tell(&way.name, &format!("has {}", found.trim()));
        let wanted = Wanted { role, config: Vec::new(), extra_args: running_args(&host, role).await? };
        machines.push((way, wanted));
    }
    machines.sort_by_key(|(_, wanted)| wanted.role == Role::Agent);
    for (way, wanted) in machines {
        let prepared = node::prepare(&way, &wanted, &args.setup, &ask).await?;
        let effective = node::look(&prepared.host, &wanted).await?;
        if node::send(&prepared, &args.setup, true).await? {
            start_or_go_back(&prepared.host, &wanted, &effective, &args.setup).await?;
        }
    }
    Ok(())
}

/// Starts the new program; the one before, when the node does not become Ready with it.
async fn start_or_go_back(
    host: &Host,
    wanted: &Wanted,
    effective: &super::effective::Effective,
    setup: &Setup,
) -> Result<()> {
    let service = Service {
        role: wanted.role,
        bin_dir: setup.bin_dir.clone(),
        data_dir: effective.data_dir.clone(),
        args: wanted.extra_args.clone(),
    };
    let (path, name) = (node::kubeconfig_path(wanted.role, effective), node::name_of(host, effective));
    let heard = ready::last_heard(host, &path, &name).await;
    install::start(host, &service, true).await?;
    if !effective.runs_node {
        return Ok(());
    }
    let seconds = setup.wait.max(1);
    let Err(error) = node::wait(host, &service, effective, seconds, heard).await else { return Ok(()) };
    tell(&host.name, &format!("{error:#}"));
    tell(&host.name, "going back to the version before");
    install::previous_binary(host, &setup.bin_dir).await?;
    install::start(host, &service, true).await?;
    node::wait(host, &service, effective, seconds.max(60), heard).await.context("after going back")?;
    Err(error.context(format!(
        "{}: node {name} did not become Ready with this version; the one before runs again, and later machines were left alone",
        host.name
    )))
}

/// The arguments of the service as it is.
async fn running_args(host: &Host, role: Role) -> Result<Vec<String>> {
    let service = Service { role, bin_dir: String::new(), data_dir: String::new(), args: Vec::new() };
    let text = node::read_root(host, &service.path(host.facts.init)).await?;
    Ok(args_of(&text, role))
}

/// What stands behind the subcommand in a service's file, whichever init it is for.
fn args_of(text: &str, role: Role) -> Vec<String> {
    let of_line = |line: &str| {
        if let Some(line) = line.strip_prefix("ExecStart=") {
            let words = words::split(line).ok()?;
            return Some(words.iter().map(|w| w.replace("%%", "%").replace("$$", "$")).collect::<Vec<_>>());
        }
        if let Some(line) = line.strip_prefix("command_args=") {
            // one word that is evaluated once more
            return words::split(words::split(line).ok()?.first()?).ok();
        }
        words::split(line.strip_prefix("\"$PROGRAM\"")?.strip_suffix('&')?).ok()
    };
    let all = text.lines().map(str::trim).filter_map(of_line).next_back().unwrap_or_default();
    all.into_iter().skip_while(|w| w != role.verb()).skip(1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampan_fleet::facts::Init;

    #[test]
    fn a_services_arguments_are_found_again() {
        let args = ["--node-label=a=it's 5 % $x", "--data-dir", "/mnt/a b"].map(String::from).to_vec();
        for (init, args) in [Init::Systemd, Init::OpenRc, Init::Sysv]
            .into_iter()
            .flat_map(|i| [(i, args.clone()), (i, Vec::new())])
        {
            let service = Service {
                role: Role::Agent,
                bin_dir: "/usr/local/bin".to_string(),
                data_dir: "/mnt/a b".to_string(),
                args: args.clone(),
            };
            let file = service.files(init).pop().unwrap();
            assert_eq!(args_of(&file.text, Role::Agent), args, "{}", file.text);
        }
    }
}
