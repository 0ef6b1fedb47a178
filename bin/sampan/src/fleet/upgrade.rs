//! `sampan upgrade`: machines brought to another version one by one, servers first, and back when a node does not come up.
//!
//! Upstream counterpart: system-upgrade-controller's plans for K3s, from outside. What stays true: nothing is changed
//! before all machines were looked at and Kubernetes' version skew rules hold for the whole cluster, for machines
//! besides those that are named, too; one machine at a time, the next only when the last is Ready; pods keep running, as
//! the service alone is started anew.
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use sampan_fleet::binary::Binary;
use sampan_fleet::ready::Cluster;
use sampan_fleet::service::{Role, Service};
use sampan_fleet::{Host, install, ready};
use sampan_kinds::upgrade::release::{self, Member, Release};

use super::access::{Machines, Way, ask};
use super::effective::Effective;
use super::node::{self, Setup, Wanted};
use super::{Unfit, tell};

const SERVER_LABEL: &str = "node-role.kubernetes.io/control-plane";
const API_LIMIT: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    machines: Machines,
    #[command(flatten)]
    setup: Setup,
    /// Change nothing, only say what would be done and whether it may be
    #[arg(long)]
    dry_run: bool,
}

/// A machine that is to be upgraded.
struct Machine {
    way: Way,
    wanted: Wanted,
    node: String,
    has: Option<Release>,
    binary: Binary,
    /// What runs there is what would be sent.
    is_current: bool,
}

pub async fn run(args: &Args) -> Result<()> {
    let ask = ask();
    let (mut machines, mut cluster) = (Vec::new(), None);
    for way in args.machines.ways()? {
        let host = way.reach(&ask).await?;
        let (machine, effective) = look_at(way, &host, &args.setup).await?;
        if cluster.is_none() {
            cluster = releases(&host, machine.wanted.role, &effective).await;
        }
        machines.push(machine);
    }
    machines.sort_by_key(|machine| machine.wanted.role == Role::Agent);
    if cluster.is_none() {
        eprintln!("warning: the cluster does not answer; only these machines' versions are compared");
    }
    judge(&machines, cluster.unwrap_or_default(), &args.setup)?;
    if args.dry_run {
        for machine in &machines {
            let what = if machine.is_current { "has it already" } else { "would be upgraded" };
            tell(&machine.way.name, &format!("{what}: {}", shown(machine.binary.release.as_deref())));
        }
        return Ok(());
    }
    for machine in machines {
        let prepared = node::prepare(&machine.way, &machine.wanted, &args.setup, &ask).await?;
        let effective = node::look(&prepared.host, &machine.wanted).await?;
        if node::send(&prepared, &args.setup, true).await? {
            start_or_go_back(&prepared.host, &machine.wanted, &effective, &args.setup).await?;
        }
    }
    Ok(())
}

fn shown(release: Option<&str>) -> String {
    let known = release.and_then(|text| text.parse::<Release>().ok());
    known.map_or_else(|| "a version that it does not say".to_string(), |release| release.to_string())
}

async fn look_at(way: Way, host: &Host, setup: &Setup) -> Result<(Machine, Effective)> {
    let services = &host.facts.services;
    let role = match (services.contains("sampan"), services.contains("sampan-agent")) {
        (true, _) => Role::Server,
        (false, true) => Role::Agent,
        (false, false) => {
            return Err(Unfit(format!("{}: sampan is not installed there", host.name)).into());
        }
    };
    let found = host.root("asking its version", "\"$1\"/sampan --version", &[&setup.bin_dir]).await?;
    tell(&way.name, &format!("has {}", found.trim()));
    let wanted = Wanted { extra_args: node::running_args(host, role).await?, ..Wanted::nothing_new(role) };
    let effective = node::look(host, &wanted).await?;
    let binary = node::binary_for(host, setup).await?;
    let there = install::installed_digest(host, &setup.bin_dir).await?;
    let machine = Machine {
        node: node::name_of(host, &effective),
        has: Release::of_version_line(&found),
        is_current: there.as_deref() == Some(binary.digest.as_str()),
        way,
        wanted,
        binary,
    };
    Ok((machine, effective))
}

/// All nodes of the cluster as its API knows them; `None` where it does not answer.
async fn releases(host: &Host, role: Role, effective: &Effective) -> Option<Vec<Member>> {
    let text = node::read_root(host, &node::kubeconfig_path(role, effective)).await.ok()?;
    let cluster = Cluster::by_way_of(host, &text).await.ok()?;
    let nodes = kube::Api::<Node>::all(cluster.client.clone());
    let list = tokio::time::timeout(API_LIMIT, nodes.list(&ListParams::default())).await.ok()?.ok()?;
    let member = |node: Node| {
        let version = node.status.and_then(|s| s.node_info).map(|i| i.kubelet_version)?;
        let is_server = node.metadata.labels.is_some_and(|labels| labels.contains_key(SERVER_LABEL));
        Some(Member { name: node.metadata.name?, is_server, has: version.parse().ok()?, wants: None })
    };
    Some(list.items.into_iter().filter_map(member).collect())
}

/// Refuses what Kubernetes' version skew policy forbids.
fn judge(machines: &[Machine], mut members: Vec<Member>, setup: &Setup) -> Result<()> {
    for machine in machines {
        let wants = machine.binary.release.as_deref().and_then(|text| text.parse::<Release>().ok());
        let Some(wants) = wants else {
            let path = machine.binary.path.display();
            eprintln!("warning: {path} does not say which release it is: version skew is not checked");
            continue;
        };
        let is_server = machine.wanted.role == Role::Server;
        let at = members.iter().position(|m| m.name == machine.node && m.is_server == is_server);
        match (at, &machine.has) {
            (Some(at), has) => {
                members[at].wants = Some(wants);
                if let Some(has) = has {
                    members[at].has = has.clone();
                }
            }
            (None, Some(has)) => {
                let name = machine.node.clone();
                members.push(Member { name, is_server, has: has.clone(), wants: Some(wants) });
            }
            (None, None) => {}
        }
    }
    let refusals = release::refusals(&members);
    let ignored = setup.ignore_preflight.iter().any(|i| i == "skew" || i == "all");
    for refusal in &refusals {
        eprintln!("{}: {refusal} [skew]", if ignored { "warning" } else { "error" });
    }
    match refusals.into_iter().next() {
        Some(first) if !ignored => Err(Unfit(format!("{first}; nothing was changed")).into()),
        _ => Ok(()),
    }
}

/// Starts the new program; the one before, when the node does not become Ready with it.
async fn start_or_go_back(host: &Host, wanted: &Wanted, effective: &Effective, setup: &Setup) -> Result<()> {
    let service = Service {
        role: wanted.role,
        bin_dir: setup.bin_dir.clone(),
        data_dir: effective.data_dir.clone(),
        args: wanted.extra_args.clone(),
    };
    let (path, name) = (node::kubeconfig_path(wanted.role, effective), node::name_of(host, effective));
    let heard = ready::last_heard(host, &path, &name).await;
    let seconds = setup.wait.max(1);
    let started = async |seconds: u64| -> Result<()> {
        install::start(host, &service, true).await?;
        match effective.runs_node {
            true => node::wait(host, &service, effective, seconds, heard).await,
            false => api_answers(host, &path, seconds).await,
        }
    };
    let Err(error) = started(seconds).await else { return Ok(()) };
    tell(&host.name, &format!("{error:#}"));
    tell(&host.name, "going back to the version before");
    install::previous_binary(host, &setup.bin_dir).await?;
    started(seconds.max(60)).await.context("after going back")?;
    Err(error.context(format!(
        "{}: node {name} did not become Ready with this version; the one before runs again, and later machines were left alone",
        host.name
    )))
}

/// Waits for a server that runs no node.
async fn api_answers(host: &Host, kubeconfig_path: &str, seconds: u64) -> Result<()> {
    let start = sampan_world::clock::monotonic();
    loop {
        let asked = async {
            let text = node::read_root(host, kubeconfig_path).await?;
            let cluster = Cluster::by_way_of(host, &text).await?;
            Ok::<_, anyhow::Error>(cluster.client.apiserver_version().await?)
        };
        match tokio::time::timeout(API_LIMIT, asked).await {
            Ok(Ok(version)) => {
                tell(&host.name, &format!("the API answers, version {}", version.git_version));
                return Ok(());
            }
            Ok(Err(error)) if start.elapsed().as_secs() > seconds => return Err(error),
            Err(_) if start.elapsed().as_secs() > seconds => {
                bail!("{}: the API does not answer after {seconds} s", host.name)
            }
            _ => tokio::time::sleep(Duration::from_millis(500)).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::parse;

    /// Nodes that are not named count, too, and flags of the machines stand where they did.
    #[test]
    fn skew_is_told_before() {
        let machine = |node: &str, role: Role, has: &str, binary: &str| Machine {
            way: Way::local(),
            wanted: Wanted::nothing_new(role),
            node: node.to_string(),
            has: Release::of_version_line(has),
            binary: Binary {
                path: "/b".into(),
                offset: 0,
                size_bytes: 0,
                arch: "arm".to_string(),
                digest: String::new(),
                release: Some(binary.to_string()),
            },
            is_current: false,
        };
        let server = Member {
            name: "s".to_string(),
            is_server: true,
            has: "v1.36.2+sampan0.1.0".parse().unwrap(),
            wants: None,
        };
        let old = "sampan 0.1.0 (Kubernetes v1.36)";
        let args: Args = parse("--ip 10.0.0.9 --hosts h.yaml --dry-run");
        let agent = || machine("a", Role::Agent, old, "v1.36.2+sampan0.2.0");
        let refused = judge(&[agent()], vec![server.clone()], &args.setup).unwrap_err();
        assert!(
            refused.is::<Unfit>() && refused.to_string().contains("upgrade the server first"),
            "{refused}"
        );
        let both = [machine("s", Role::Server, old, "v1.36.2+sampan0.2.0"), agent()];
        judge(&both, vec![server.clone()], &args.setup).unwrap();
        judge(&both, Vec::new(), &args.setup).unwrap();
        let ignoring: Args = parse("--ignore-preflight skew");
        judge(&[agent()], vec![server], &ignoring.setup).unwrap();
    }
}
