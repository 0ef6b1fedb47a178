//! Writes pods' `PodScheduled` condition and nominated node. Upstream counterpart: updatePod in
//! pkg/scheduler/schedule_one.go.
//!
//! One task writes; of several writes for one pod only the last is made, so what waits is bounded by the number of
//! pods that have no node.
use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::Mutex;
use sampan_world::clock;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::framework::PodInfo;
use crate::writes::{ClusterWrites, WriteError};

struct Change {
    pod: Arc<PodInfo>,
    /// (reason, message) of `PodScheduled: False`
    condition: Option<(&'static str, String)>,
    nominated: Option<String>,
}

pub struct StatusWriter {
    pending: Mutex<BTreeMap<Arc<str>, Change>>,
    wake: Notify,
    writes: Arc<dyn ClusterWrites>,
}

/// A pod condition as a patch holds it.
pub fn condition(
    pod: &PodInfo,
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    changed: Timestamp,
) -> Value {
    let changed = Time(changed);
    let mut condition = json!({"type": kind, "status": status, "reason": reason, "message": message,
        "lastProbeTime": null, "lastTransitionTime": changed});
    if let Some(generation) = pod.pod.metadata.generation.filter(|g| *g > 0) {
        condition["observedGeneration"] = generation.into();
    }
    condition
}

impl StatusWriter {
    pub fn new(writes: Arc<dyn ClusterWrites>) -> Self {
        Self { pending: Mutex::default(), wake: Notify::new(), writes }
    }

    /// Notes what to write; later notes for the same pod replace earlier ones.
    pub fn write(
        &self,
        pod: &Arc<PodInfo>,
        condition: Option<(&'static str, String)>,
        nominated: Option<String>,
    ) {
        let mut pending = self.pending.lock();
        let (mut condition, mut nominated) = (condition, nominated);
        if let Some(earlier) = pending.remove(&pod.uid) {
            condition = condition.or(earlier.condition);
            nominated = nominated.or(earlier.nominated);
        }
        pending.insert(pod.uid.clone(), Change { pod: pod.clone(), condition, nominated });
        self.wake.notify_one();
    }

    /// Writes until dropped.
    pub async fn run(&self) {
        loop {
            let next = self.pending.lock().pop_first();
            let Some((_, change)) = next else {
                self.wake.notified().await;
                continue;
            };
            let Some(status) = patch(&change) else { continue };
            match self.writes.patch_status(&change.pod, status).await {
                Ok(()) | Err(WriteError::NotFound { .. }) => {}
                Err(error) => tracing::warn!(pod = %change.pod.name, %error, "cannot update a pod's status"),
            }
        }
    }
}

/// The patch; `None` where the pod says all that already.
fn patch(change: &Change) -> Option<Value> {
    let mut status = json!({});
    if let Some(nominated) = &change.nominated
        && nominated != change.pod.nominated_node_name()
    {
        status["nominatedNodeName"] =
            if nominated.is_empty() { Value::Null } else { nominated.as_str().into() };
    }
    if let Some((reason, message)) = &change.condition {
        let conditions = change.pod.pod.status.as_ref().and_then(|s| s.conditions.as_ref());
        let old = conditions.into_iter().flatten().find(|c| c.type_ == "PodScheduled");
        let same = |c: &k8s_openapi::api::core::v1::PodCondition| {
            c.status == "False"
                && c.reason.as_deref() == Some(*reason)
                && c.message.as_deref() == Some(message)
        };
        if !old.is_some_and(same) {
            let unchanged = old.filter(|c| c.status == "False").and_then(|c| c.last_transition_time.as_ref());
            let changed = unchanged.map_or_else(clock::now_seconds, |t| t.0);
            let condition = condition(&change.pod, "PodScheduled", "False", reason, message, changed);
            status["conditions"] = json!([condition]);
        }
    }
    (status != json!({})).then_some(status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod;

    #[test]
    fn only_changes_are_written() {
        let said = json!({"status": {"conditions": [{"type": "PodScheduled", "status": "False",
            "reason": "Unschedulable", "message": "no"}], "nominatedNodeName": "n"}});
        for (message, nominated, wanted) in [
            ("no", None, None),
            ("no", Some("n"), None),
            ("no", Some(""), Some(json!({"nominatedNodeName": null}))),
            ("no", Some("m"), Some(json!({"nominatedNodeName": "m"}))),
        ] {
            let change = Change {
                pod: pod("p", said.clone()),
                condition: Some(("Unschedulable", message.to_string())),
                nominated: nominated.map(str::to_string),
            };
            assert_eq!(patch(&change), wanted);
        }
        let change = Change {
            pod: pod("p", said),
            condition: Some(("Unschedulable", "other".into())),
            nominated: None,
        };
        assert_eq!(patch(&change).unwrap()["conditions"][0]["message"], "other");
    }
}
