//! A node emptied of its pods before it is upgraded. Upstream counterpart: kubectl drain (pkg/drain).
//!
//! Level-triggered: each call looks at the pods that there are, asks for the eviction of those that are not being deleted
//! yet, and says how many are left.
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, EvictParams};
use kube::{Api, Client};
use sampan_client::informer::controller_of;
use sampan_kinds::upgrade::v1::plan::DrainSpec;

use crate::api_error;
use crate::controller::SyncError;
use crate::controller_ref::{is_deleting, name, namespace};
use crate::label_selector::{labels_of, matches};
use crate::pod_state;

const MIRROR: &str = "kubernetes.io/config.mirror";
const TOO_MANY_REQUESTS: u16 = 429;

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Stays,
    Goes,
    /// It may not be evicted, so the node cannot be drained.
    Forbids(String),
}

fn judge(spec: &DrainSpec, pod: &Pod, now: Timestamp) -> Verdict {
    let shown = || format!("pod {}/{}", namespace(pod), name(pod));
    let is_mirror = pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(MIRROR));
    let selector = spec.pod_selector.as_ref();
    let unselected = selector.is_some() && !matches(selector, labels_of(&pod.metadata.labels));
    if is_mirror || unselected {
        return Verdict::Stays;
    }
    if let Some(since) = &pod.metadata.deletion_timestamp {
        let limit = i64::from(spec.skip_wait_for_delete_timeout);
        let given_up = limit > 0 && now.duration_since(since.0).as_secs() > limit;
        return if given_up { Verdict::Stays } else { Verdict::Goes };
    }
    if pod_state::is_terminal(pod) {
        return Verdict::Goes;
    }
    match controller_of(pod) {
        Some(owner) if owner.kind == "DaemonSet" => {
            return match spec.ignore_daemon_sets.unwrap_or(true) {
                true => Verdict::Stays,
                false => {
                    Verdict::Forbids(format!("{} is of a DaemonSet (spec.drain.ignoreDaemonSets)", shown()))
                }
            };
        }
        None if !spec.force => {
            let why = format!("{} has no controller that would make it anew (spec.drain.force)", shown());
            return Verdict::Forbids(why);
        }
        _ => {}
    }
    let volumes = pod.spec.as_ref().and_then(|s| s.volumes.as_deref()).unwrap_or_default();
    if !spec.delete_emptydir_data.unwrap_or(true) && volumes.iter().any(|v| v.empty_dir.is_some()) {
        let why = format!("{} has data in an emptyDir (spec.drain.deleteEmptydirData)", shown());
        return Verdict::Forbids(why);
    }
    Verdict::Goes
}

/// How far a node is.
#[derive(Debug, PartialEq, Eq)]
pub enum Drained {
    Done,
    /// So many pods are left; one that a disruption budget holds is asked for again later.
    Left(usize),
    Forbidden(String),
}

/// Asks for the eviction of the node's pods.
pub async fn drain(
    client: &Client,
    spec: &DrainSpec,
    pods: &[Arc<Pod>],
    now: Timestamp,
) -> Result<Drained, SyncError> {
    let mut going = Vec::new();
    for pod in pods {
        match judge(spec, pod, now) {
            Verdict::Stays => {}
            Verdict::Goes => going.push(pod),
            Verdict::Forbids(why) => return Ok(Drained::Forbidden(why)),
        }
    }
    for pod in going.iter().filter(|pod| !is_deleting(&****pod)) {
        let api: Api<Pod> = Api::namespaced(client.clone(), namespace(&***pod));
        let grace_period_seconds = spec.grace_period.and_then(|seconds| u32::try_from(seconds).ok());
        let options = DeleteParams { grace_period_seconds, ..DeleteParams::default() };
        let done = match spec.disable_eviction {
            true => api.delete(name(&***pod), &options).await.map(drop),
            false => {
                let params = EvictParams { delete_options: Some(options), ..EvictParams::default() };
                api.evict(name(&***pod), &params).await.map(drop)
            }
        };
        match done {
            Ok(()) => {}
            Err(error) if api_error::is_not_found(&error) => {}
            Err(kube::Error::Api(status)) if status.code == TOO_MANY_REQUESTS => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(if going.is_empty() { Drained::Done } else { Drained::Left(going.len()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn which_pods_go() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let owner = |kind: &str| json!([{"apiVersion": "apps/v1", "kind": kind, "name": "o", "uid": "u", "controller": true}]);
        let pod = |meta: Value, spec: Value, phase: &str| -> Pod {
            let mut pod = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {"containers": []}, "status": {"phase": phase}});
            pod["metadata"].as_object_mut().unwrap().extend(meta.as_object().unwrap().clone());
            pod["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
            serde_json::from_value(pod).unwrap()
        };
        let owned = || json!({"ownerReferences": owner("ReplicaSet")});
        let deleting = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        let empty_dir = json!({"volumes": [{"name": "v", "emptyDir": {}}]});
        for (spec, pod, want) in [
            (json!({}), pod(owned(), json!({}), "Running"), "goes"),
            (json!({}), pod(json!({}), json!({}), "Running"), "no controller"),
            (json!({"force": true}), pod(json!({}), json!({}), "Running"), "goes"),
            (json!({}), pod(json!({}), json!({}), "Succeeded"), "goes"),
            (json!({}), pod(json!({"annotations": {MIRROR: "x"}}), json!({}), "Running"), "stays"),
            (json!({}), pod(json!({"ownerReferences": owner("DaemonSet")}), json!({}), "Running"), "stays"),
            (
                json!({"ignoreDaemonSets": false}),
                pod(json!({"ownerReferences": owner("DaemonSet")}), json!({}), "Running"),
                "of a DaemonSet",
            ),
            (json!({}), pod(owned(), empty_dir.clone(), "Running"), "goes"),
            (json!({"deleteEmptydirData": false}), pod(owned(), empty_dir, "Running"), "emptyDir"),
            (json!({}), pod(deleting.clone(), json!({}), "Running"), "goes"),
            (json!({"skipWaitForDeleteTimeout": 30}), pod(deleting, json!({}), "Running"), "stays"),
            (
                json!({"podSelector": {"matchLabels": {"a": "b"}}}),
                pod(json!({}), json!({}), "Running"),
                "stays",
            ),
        ] {
            let spec: DrainSpec = serde_json::from_value(spec).unwrap();
            let found = match judge(&spec, &pod, now) {
                Verdict::Stays => "stays".to_string(),
                Verdict::Goes => "goes".to_string(),
                Verdict::Forbids(why) => why,
            };
            assert!(found.contains(want), "{spec:?} {pod:?}: {found}");
        }
    }
}
