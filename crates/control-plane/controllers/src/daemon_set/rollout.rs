//! A DaemonSet's history and rolling update. Upstream counterpart: pkg/controller/daemon/update.go.
use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::Api;
use kube::api::PostParams;
use kube::core::SelectorExt;

use super::placement::Placement;
use super::{DaemonSetController, NodePods, is_updated, selector};
use crate::controller::{SyncError, SyncResult};
use crate::controller_ref::{self, is_deleting, name, namespace, owned_and_orphans, uid};
use crate::int_or_percent::scaled;
use crate::label_selector::labels_of;
use crate::pod_state;
use crate::revision_history::{self, Created, REVISION_HASH_LABEL};

/// The current revision's hash, and the old revisions.
pub struct History {
    pub hash: String,
    old: Vec<Arc<ControllerRevision>>,
}

/// Two revisions are the same when their templates are, whatever the order of keys.
fn hash_of(revision: &ControllerRevision) -> String {
    let label = labels_of(&revision.metadata.labels).get(REVISION_HASH_LABEL);
    label.cloned().unwrap_or_else(|| name(revision).to_string())
}

impl DaemonSetController {
    /// Finds or makes the revision of the current template.
    pub(super) async fn history(&self, set: &DaemonSet) -> Result<History, SyncError> {
        let Some(selector) = selector(set) else {
            return Err(SyncError::failed("the selector is not valid"));
        };
        let candidates = owned_and_orphans(&self.revisions, namespace(set), uid(set));
        let matches = |r: &ControllerRevision| selector.matches(labels_of(&r.metadata.labels));
        let claimed = controller_ref::claim(&self.client, set, candidates, None, matches).await?;
        let template = set.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default();
        let data = revision_history::template_patch(&template);
        let (mut same, old): (Vec<_>, Vec<_>) =
            claimed.into_iter().partition(|r| revision_history::data_of(r) == Some(&data));
        let next = old.iter().map(|r| r.revision).max().unwrap_or(0) + 1;
        same.sort_by_key(|r| r.revision);
        if let Some(current) = same.pop() {
            if current.revision < next {
                revision_history::renumber(&self.client, &current, next).await?;
            }
            return Ok(History { hash: hash_of(&current), old });
        }
        let labels = labels_of(&template.metadata.and_then(|m| m.labels)).clone();
        let collisions = set.status.as_ref().and_then(|s| s.collision_count).unwrap_or(0);
        let new = revision_history::new_revision(set, labels, REVISION_HASH_LABEL, data, next, collisions);
        match revision_history::create(&self.client, set, &new).await? {
            Created::Revision(current) => Ok(History { hash: hash_of(&current), old }),
            Created::Collision => {
                let api: Api<DaemonSet> = Api::namespaced(self.client.clone(), namespace(set));
                let mut fresh = api.get(name(set)).await?;
                fresh.status.get_or_insert_with(DaemonSetStatus::default).collision_count =
                    Some(collisions + 1);
                api.replace_status(name(set), &PostParams::default(), &fresh).await?;
                Err(SyncError::failed(format!("the name {} is taken, collisionCount was raised", name(&new))))
            }
        }
    }

    /// Deletes old revisions beyond the limit that no pod has.
    pub(super) async fn clean_up_history(
        &self,
        set: &DaemonSet,
        history: &History,
        pods: &NodePods,
    ) -> SyncResult {
        let limit = set.spec.as_ref().and_then(|s| s.revision_history_limit).unwrap_or(10);
        if history.old.len() <= limit.max(0) as usize {
            return Ok(());
        }
        let live = |r: &ControllerRevision| {
            let hash = hash_of(r);
            let mut pods = pods.values().flatten();
            pods.any(|p| labels_of(&p.metadata.labels).get(REVISION_HASH_LABEL) == Some(&hash))
        };
        revision_history::truncate(&self.client, history.old.clone(), limit, live).await
    }
}

fn rolling(
    set: &DaemonSet,
    f: fn(&k8s_openapi::api::apps::v1::RollingUpdateDaemonSet) -> Option<&IntOrString>,
) -> Option<&IntOrString> {
    let strategy = set.spec.as_ref()?.update_strategy.as_ref()?;
    (strategy.type_.as_deref() != Some("OnDelete"))
        .then(|| strategy.rolling_update.as_ref().and_then(f))
        .flatten()
}

pub fn max_surge(set: &DaemonSet, desired: i32) -> i32 {
    rolling(set, |r| r.max_surge.as_ref()).and_then(|s| scaled(s, desired, true)).unwrap_or(0)
}

fn max_unavailable(set: &DaemonSet, desired: i32) -> i32 {
    let unavailable =
        rolling(set, |r| r.max_unavailable.as_ref()).map_or(Some(1), |u| scaled(u, desired, true));
    match unavailable.unwrap_or(1) {
        // nothing would ever be updated
        0 if max_surge(set, desired) == 0 => 1,
        n => n,
    }
}

/// The updated and the outdated pod of a node; `None` when there are too many of one sort.
fn new_and_old<'a>(
    set: &DaemonSet,
    pods: &'a [Arc<Pod>],
    hash: &str,
) -> Option<(Option<&'a Arc<Pod>>, Option<&'a Arc<Pod>>)> {
    let (mut new, mut old) = (None, None);
    for pod in pods.iter().filter(|p| !is_deleting(&***p)) {
        let slot = if is_updated(set, pod, hash) { &mut new } else { &mut old };
        if slot.replace(pod).is_some() {
            return None;
        }
    }
    Some((new, old))
}

/// The nodes to start new pods on and the old pods to delete, one step of a rolling update.
pub fn plan(
    set: &DaemonSet,
    places: &BTreeMap<String, Placement>,
    by_node: &NodePods,
    hash: &str,
    now: Timestamp,
) -> (Vec<String>, Vec<Arc<Pod>>) {
    let desired = places.values().filter(|p| p.run).count() as i32;
    match max_surge(set, desired) {
        0 => (Vec::new(), plan_in_place(set, by_node, hash, max_unavailable(set, desired), now)),
        surge => plan_surge(set, places, by_node, hash, (surge, desired), now),
    }
}

fn min_ready(set: &DaemonSet) -> i32 {
    set.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0)
}

fn plan_in_place(
    set: &DaemonSet,
    by_node: &NodePods,
    hash: &str,
    most: i32,
    now: Timestamp,
) -> Vec<Arc<Pod>> {
    let available = |p: &Pod| pod_state::is_available(p, min_ready(set), now);
    let mut unavailable = 0;
    let (mut delete, mut candidates) = (Vec::new(), Vec::new());
    for pods in by_node.values() {
        match new_and_old(set, pods, hash) {
            None | Some((None, None)) | Some((Some(_), Some(_))) => unavailable += 1,
            Some((Some(new), None)) => unavailable += i32::from(!available(new)),
            Some((None, Some(old))) if !available(old) => {
                delete.push(old.clone());
                unavailable += 1;
            }
            Some((None, Some(old))) => candidates.push(old.clone()),
        }
    }
    delete.extend(candidates.into_iter().take((most - unavailable).max(0) as usize));
    delete
}

fn plan_surge(
    set: &DaemonSet,
    places: &BTreeMap<String, Placement>,
    by_node: &NodePods,
    hash: &str,
    (most, desired): (i32, i32),
    now: Timestamp,
) -> (Vec<String>, Vec<Arc<Pod>>) {
    let available = |p: &Pod| pod_state::is_available(p, min_ready(set), now);
    let (mut surging, mut available_nodes) = (0, 0);
    let (mut create, mut candidates) = (Vec::new(), Vec::new());
    let (mut delete, mut misplaced) = (Vec::new(), Vec::new());
    for (node, pods) in by_node {
        let Some((new, old)) = new_and_old(set, pods, hash) else {
            surging += 1;
            continue;
        };
        available_nodes += i32::from(old.or(new).is_some_and(|p| available(p)));
        let runs = places.get(node).is_some_and(|p| p.run);
        match (new, old) {
            (_, None) => {}
            (None, Some(old)) if !available(old) && !runs => delete.push(old.clone()),
            (None, Some(old)) if !available(old) => {
                tracing::trace!(pod = name(&**old), "outdated and unavailable");
                create.push(node.clone());
            }
            (None, Some(old)) if !runs => misplaced.push(old.clone()),
            (None, Some(_)) => candidates.push(node.clone()),
            (Some(new), Some(_)) if !available(new) => surging += 1,
            (Some(_), Some(old)) => delete.push(old.clone()),
        }
    }
    delete.extend(misplaced.into_iter().take((available_nodes - desired).max(0) as usize));
    create.extend(candidates.into_iter().take((most - surging).max(0) as usize));
    (create, delete)
}

#[cfg(test)]
mod tests {
    use super::super::placement::tests::{daemon_pod, daemon_set};
    use super::*;
    use serde_json::json;

    fn state(pods: &[(&str, &str, bool)]) -> (BTreeMap<String, Placement>, NodePods) {
        let places =
            pods.iter().map(|(n, ..)| ((*n).to_string(), Placement { run: true, stay: true })).collect();
        let pods =
            pods.iter().map(|(n, hash, ready)| ((*n).to_string(), vec![daemon_pod(n, n, hash, *ready)]));
        (places, pods.collect())
    }

    #[test]
    fn in_place_updates_stay_within_max_unavailable() {
        let now = "2026-01-02T00:00:00Z".parse().unwrap();
        let set = daemon_set(json!({"maxUnavailable": 1}));
        let names = |pods: &[(&str, &str, bool)]| {
            let (places, by_node) = state(pods);
            let (create, delete) = plan(&set, &places, &by_node, "new", now);
            assert!(create.is_empty());
            delete.iter().map(|p| name(&**p).to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(&[("a", "old", true), ("b", "old", true)]), ["a"]);
        assert_eq!(names(&[("a", "new", false), ("b", "old", true)]), Vec::<String>::new());
        assert_eq!(names(&[("a", "new", true), ("b", "old", true)]), ["b"]);
        assert_eq!(names(&[("a", "old", false), ("b", "old", true)]), ["a"], "one that is down may go");
    }

    #[test]
    fn surge_creates_before_it_deletes() {
        let now = "2026-01-02T00:00:00Z".parse().unwrap();
        let set = daemon_set(json!({"maxUnavailable": 0, "maxSurge": 1}));
        let (places, mut by_node) = state(&[("a", "old", true), ("b", "old", true)]);
        let (create, delete) = plan(&set, &places, &by_node, "new", now);
        assert_eq!((create.as_slice(), delete.len()), (["a".to_string()].as_slice(), 0));
        by_node.get_mut("a").unwrap().push(daemon_pod("a2", "a", "new", false));
        assert_eq!(plan(&set, &places, &by_node, "new", now).0.len(), 0, "the surge is used up");
        by_node.get_mut("a").unwrap()[1] = daemon_pod("a2", "a", "new", true);
        let (create, delete) = plan(&set, &places, &by_node, "new", now);
        assert_eq!((create.len(), name(&*delete[0])), (1, "a"));
    }
}
