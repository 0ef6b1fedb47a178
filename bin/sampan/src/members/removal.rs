//! Members that leave: before an uninstall, and when a server's Node is deleted.
//!
//! Upstream counterpart: K3s' pkg/etcd/member_controller.go and `RemovePeer`. What stays true: the last member is not
//! removed; none leaves on its own wish while the rest could decide nothing afterwards; one whose Node was deleted is
//! removed sooner or later, also when nobody was there to see the deletion: beside the objects it is written which Node
//! stands for which member. Deliberately different from K3s: no finalizer holds a Node back, and K3s' uninstall leaves
//! the member to the owner.
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use sampan_client::{Event, Informers};
use sampan_store::{Expect, Member, MembersError, Range, Store, Write};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::record::{LOCAL, Record, has_begun};
use super::{end_left_over, join};

/// Below it: which member stands for which Node.
const NODES: &str = "/sampan/members/";
const ANSWER: Duration = Duration::from_secs(5);
const UNHEALTHY_ATTEMPTS: u32 = 20;
const FIRST_DELAY: Duration = Duration::from_secs(2);
const MAX_DELAY: Duration = Duration::from_secs(60);

/// Has this machine's etcd member leave its cluster: what `sampan-uninstall` runs first.
#[derive(clap::Args)]
pub struct Args {
    /// Where everything is kept
    #[arg(long, default_value = "/var/lib/sampan")]
    data_dir: PathBuf,
}

pub fn run(args: &Args) -> Result<()> {
    sampan_telemetry::init("error");
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = args.data_dir.join("server");
    match Record::read(&folder)? {
        Some(record) if has_begun(&folder) => crate::runtime()?.block_on(leave(&folder, &record)),
        _ => Ok(()),
    }
}

/// What the leaving of one member comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// The others go on.
    Good,
    /// It is the only one: the cluster ends with it.
    Last,
    /// It is none.
    Gone,
    /// The members can decide nothing, this neither.
    Undecidable,
    /// So many of the others with a vote live, of those needed.
    Deadly { live: usize, needed: usize },
}

fn quorum(voters: usize) -> usize {
    voters / 2 + 1
}

/// `members` with whether they answer.
fn leaving(members: &[(Member, bool)], own_peer_url: &str) -> Leaving {
    let is_own = |member: &Member| member.peer_urls.iter().any(|url| url == own_peer_url);
    let Some((own, _)) = members.iter().find(|(member, _)| is_own(member)) else { return Leaving::Gone };
    let voters: Vec<&(Member, bool)> = members.iter().filter(|(member, _)| !member.is_learner).collect();
    let live = voters.iter().filter(|(_, answers)| *answers).count();
    let others = voters.iter().filter(|(member, answers)| *answers && !is_own(member)).count();
    if voters.len() == 1 && !own.is_learner {
        return Leaving::Last;
    }
    if live < quorum(voters.len()) {
        return Leaving::Undecidable;
    }
    let needed = if own.is_learner { 0 } else { quorum(voters.len() - 1) };
    if others < needed { Leaving::Deadly { live: others, needed } } else { Leaving::Good }
}

async fn leave(folder: &Path, record: &Record) -> Result<()> {
    let stays = |why: &str| {
        eprintln!(
            "sampan: this server's etcd member could not be removed from its cluster ({why}): `kubectl delete node {}` by \
             another server does it",
            record.name
        );
    };
    let mut endpoints = vec![LOCAL.to_string()];
    endpoints.extend(record.others.iter().cloned());
    let members = join::members_at(folder, &endpoints)?;
    let all = match members.list().await {
        Ok(all) => all,
        Err(error) => {
            stays(&error.to_string());
            return Ok(());
        }
    };
    let probed = all.into_iter().map(|member| async move {
        let asked =
            async { Some(join::members_at(folder, &member.client_urls).ok()?.status().await.is_ok()) };
        let answers = tokio::time::timeout(ANSWER, asked).await.ok().flatten().unwrap_or(false);
        (member, answers)
    });
    let probed = futures::future::join_all(probed).await;
    let peer = record.peer_url();
    match leaving(&probed, &peer) {
        Leaving::Last | Leaving::Gone => return Ok(()),
        Leaving::Undecidable => {
            stays("more than half of the members do not answer");
            return Ok(());
        }
        Leaving::Deadly { live, needed } => bail!(
            "without this server's etcd member the cluster could decide nothing: {live} of the others answer, {needed} are \
             needed. Start those that do not run, or delete their Nodes; nothing was removed"
        ),
        Leaving::Good => {}
    }
    let own = probed.into_iter().find(|(member, _)| member.peer_urls.contains(&peer));
    let Some((own, _)) = own else { return Ok(()) };
    let mut attempts = 0;
    loop {
        match members.remove(own.id).await {
            Ok(()) => break,
            // it wants all to have been connected for five seconds
            Err(error) if error.says("unhealthy cluster") && attempts < UNHEALTHY_ATTEMPTS => {
                attempts += 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(MembersError::Refused { detail, .. }) => {
                bail!("this server's etcd member cannot leave now: {detail}; nothing was removed")
            }
            // the answer may have been lost with the member
            Err(error) => {
                let others = join::members_at(folder, &record.others)?.list().await;
                if others.is_ok_and(|all| all.iter().any(|member| member.id == own.id)) {
                    return Err(error).context("removing this server's etcd member");
                }
                break;
            }
        }
    }
    eprintln!("sampan: this server's etcd member has left its cluster");
    Ok(())
}

/// Ends what runs on a data folder without its server: for `sampan killall`.
pub fn end_member_of(data_dir: &Path) -> Result<()> {
    end_left_over(&data_dir.join("server"))
}

/// Which member stands for a Node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct OfNode {
    member: u64,
    uid: String,
}

/// Writes down that this server's Node stands for its member.
pub async fn register(store: &Store, node: &Node, member: u64) -> Result<()> {
    let (Some(name), Some(uid)) = (&node.metadata.name, &node.metadata.uid) else { return Ok(()) };
    let key = format!("{NODES}{name}");
    let value = serde_json::to_vec(&OfNode { member, uid: uid.clone() })?;
    let (present, _) = store.get(&key, None).await?;
    if present.is_none_or(|present| present.value != value) {
        store.write(Write::put(key, value)).await?;
    }
    Ok(())
}

/// Removes the members whose Nodes were deleted.
pub struct Removals {
    store: Store,
    /// `<data-dir>/server`
    folder: PathBuf,
}

impl Removals {
    pub fn new(store: &Store, folder: &Path) -> Arc<Self> {
        Arc::new(Self { store: store.clone(), folder: folder.to_path_buf() })
    }

    /// For as long as the process lives. `client` is good while this server leads.
    pub fn follow(self: &Arc<Self>, client: kube::Client, informers: &Informers) {
        let (nodes, changed) = (informers.of::<Node>(), Arc::new(Notify::new()));
        let told = changed.clone();
        nodes.on_event(move |event| {
            if matches!(event, Event::Deleted(_)) {
                told.notify_one();
            }
        });
        let this = self.clone();
        sampan_telemetry::supervise("members of deleted nodes", move || {
            let (this, changed, client) = (this.clone(), changed.clone(), client.clone());
            async move {
                let mut delay = FIRST_DELAY;
                loop {
                    match this.pass(&client).await {
                        Ok(()) => {
                            delay = FIRST_DELAY;
                            changed.notified().await;
                        }
                        Err(error) => {
                            tracing::warn!("the etcd member of a deleted node: {error:#}; trying again");
                            tokio::time::sleep(delay).await;
                            delay = (delay * 2).min(MAX_DELAY);
                        }
                    }
                }
            }
        });
    }

    async fn pass(&self, client: &kube::Client) -> Result<()> {
        let nodes = Api::<Node>::all(client.clone());
        for entry in self.store.range(Range::prefix(NODES)).await?.entries {
            let name = entry.key.strip_prefix(NODES).unwrap_or_default();
            let Ok(known) = serde_json::from_slice::<OfNode>(&entry.value) else { continue };
            // through the API, which says no when this server does not lead
            let present = nodes.get_opt(name).await.with_context(|| format!("node {name}"))?;
            if present.is_some_and(|node| node.metadata.uid.as_deref() == Some(&known.uid)) {
                continue;
            }
            self.remove(name, known.member).await?;
            // a server of that name may have come since
            let gone = Write::delete(entry.key.to_string(), Expect::Revision(entry.mod_revision));
            if let Err(error) = self.store.write(gone).await {
                tracing::debug!(%error, "what is known of the member of node {name}");
            }
        }
        Ok(())
    }

    async fn remove(&self, node: &str, id: u64) -> Result<()> {
        let members = join::members_at(&self.folder, &[LOCAL.to_string()])?;
        let all = members.list().await?;
        let Some(member) = all.iter().find(|member| member.id == id) else { return Ok(()) };
        if !member.is_learner && all.iter().filter(|member| !member.is_learner).count() == 1 {
            tracing::warn!(node, "its node was deleted, but it is the last etcd member: it stays");
            return Ok(());
        }
        members.remove(id).await?;
        tracing::info!(
            node,
            member = format!("{id:x}"),
            "the etcd member of a node that was deleted is removed"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_leave() {
        let url = |n: u64| format!("https://10.0.0.{n}:2380");
        // each with whether it answers and whether it is a learner; the first one leaves
        let of = |members: &[(bool, bool)]| {
            let members: Vec<(Member, bool)> = (1..)
                .zip(members)
                .map(|(id, (answers, is_learner))| {
                    let (peer_urls, is_learner) = (vec![url(id)], *is_learner);
                    (Member { id, peer_urls, is_learner, ..Member::default() }, *answers)
                })
                .collect();
            leaving(&members, &url(1))
        };
        let (live, dead, learner) = ((true, false), (false, false), (true, true));
        for (members, want) in [
            (vec![live], Leaving::Last),
            (vec![dead], Leaving::Last),
            (vec![live, learner], Leaving::Last),
            (vec![live, live], Leaving::Good),
            (vec![live, dead], Leaving::Undecidable),
            (vec![live, live, live], Leaving::Good),
            (vec![live, live, dead], Leaving::Deadly { live: 1, needed: 2 }),
            (vec![live, dead, dead], Leaving::Undecidable),
            // it does not run itself, the others do
            (vec![dead, live, live], Leaving::Good),
            (vec![learner, live, dead, live], Leaving::Good),
            (vec![live, live, live, dead], Leaving::Good),
        ] {
            assert_eq!(of(&members), want, "{members:?}");
        }
        assert_eq!(leaving(&[], &url(1)), Leaving::Gone);
    }
}
