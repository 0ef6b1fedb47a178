//! Pods wait until their claims are bound, and follow their volumes' node affinity.
//! Upstream counterpart: pkg/scheduler/framework/plugins/volumebinding.
//!
//! Deliberate difference: claims of classes that wait for the first consumer are not bound here; their pods stay
//! unschedulable with a reason that says so.
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};

use crate::framework::selector::any_term_matches;
use crate::framework::{
    ClusterEvent, Cycle, CycleState, Filter, NodeInfo, NodeNames, Plugin, PodInfo, PreFilter, Verdict,
};
use crate::plugins::Descriptor;
use crate::sources::Sources;
use std::sync::Arc;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "VolumeBinding",
    weight: 0,
    new: |cx| Box::new(VolumeBinding { sources: cx.sources.clone() }),
};

const IMMEDIATE: &str = "pod has unbound immediate PersistentVolumeClaims";

struct VolumeBinding {
    sources: Sources,
}

/// The pod's bound volumes; `None` is one that does not exist.
#[derive(Clone)]
struct Volumes(Vec<Option<Arc<PersistentVolume>>>);

/// (claim, whether it is made for the pod)
fn claims(pod: &PodInfo) -> impl Iterator<Item = (String, bool)> {
    pod.spec().volumes.iter().flatten().filter_map(|v| match (&v.persistent_volume_claim, &v.ephemeral) {
        (Some(claim), _) => Some((claim.claim_name.clone(), false)),
        (None, Some(_)) => Some((format!("{}-{}", pod.name, v.name), true)),
        (None, None) => None,
    })
}

impl VolumeBinding {
    /// The claim, or why the pod cannot have it.
    fn claim(
        &self,
        pod: &PodInfo,
        name: &str,
        ephemeral: bool,
    ) -> Result<Arc<PersistentVolumeClaim>, String> {
        let Some(claim) = self.sources.claims.get(&pod.namespace, name) else {
            let waiting = "waiting for ephemeral volume controller to create the persistentvolumeclaim";
            return Err(match ephemeral {
                true => format!("{waiting} \"{name}\""),
                false => format!("persistentvolumeclaim \"{name}\" not found"),
            });
        };
        let phase = claim.status.as_ref().and_then(|s| s.phase.as_deref());
        if phase == Some("Lost") {
            let volume = claim.spec.as_ref().and_then(|s| s.volume_name.as_deref()).unwrap_or_default();
            return Err(format!(
                "persistentvolumeclaim \"{name}\" bound to non-existent persistentvolume \"{volume}\""
            ));
        }
        if claim.metadata.deletion_timestamp.is_some() {
            return Err(format!("persistentvolumeclaim \"{name}\" is being deleted"));
        }
        let owned = || claim.metadata.owner_references.iter().flatten().any(|o| *o.uid == *pod.uid);
        if ephemeral && !owned() {
            return Err(format!(
                "PVC {}/{name} was not created for pod {}/{} (pod is not owner)",
                pod.namespace, pod.namespace, pod.name
            ));
        }
        Ok(claim)
    }

    fn waits_for_consumer(&self, claim: &PersistentVolumeClaim) -> bool {
        let class = claim.spec.as_ref().and_then(|s| s.storage_class_name.as_deref()).unwrap_or_default();
        let class = self.sources.classes.get("", class);
        class.is_some_and(|c| c.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
    }
}

fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    let annotations = claim.metadata.annotations.as_ref();
    let complete = annotations.is_some_and(|a| a.contains_key("pv.kubernetes.io/bind-completed"));
    complete && claim.spec.as_ref().and_then(|s| s.volume_name.as_deref()).is_some_and(|v| !v.is_empty())
}

impl Plugin for VolumeBinding {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, pod: &PodInfo, event: &ClusterEvent) -> bool {
        match event {
            ClusterEvent::StorageChanged { namespace } => namespace.is_empty() || *namespace == pod.namespace,
            ClusterEvent::NodeAdded(_) => true,
            ClusterEvent::NodeUpdated { change, .. } => change.labels,
            _ => false,
        }
    }
    fn as_pre_filter(&self) -> Option<&dyn PreFilter> {
        Some(self)
    }
    fn as_filter(&self) -> Option<&dyn Filter> {
        Some(self)
    }
}

impl PreFilter for VolumeBinding {
    fn pre_filter(
        &self,
        _: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
    ) -> (Verdict, Option<NodeNames>) {
        let (mut volumes, mut delayed, mut immediate) = (Vec::new(), None, false);
        for (name, ephemeral) in claims(pod) {
            let claim = match self.claim(pod, &name, ephemeral) {
                Ok(claim) => claim,
                Err(reason) => return (Verdict::unresolvable(reason), None),
            };
            if is_bound(&claim) {
                let volume = claim.spec.as_ref().and_then(|s| s.volume_name.as_deref()).unwrap_or_default();
                volumes.push(self.sources.volumes.get("", volume));
            } else if self.waits_for_consumer(&claim) {
                delayed = delayed.or(Some(name));
            } else {
                immediate = true;
            }
        }
        if immediate {
            return (Verdict::unresolvable(IMMEDIATE), None);
        }
        if let Some(name) = delayed {
            let reason = format!(
                "persistentvolumeclaim \"{name}\" waits for its first consumer, and this scheduler does not bind volumes"
            );
            return (Verdict::unresolvable(reason), None);
        }
        if volumes.is_empty() {
            return (Verdict::Skip, None);
        }
        state.write(Volumes(volumes));
        (Verdict::Success, None)
    }
}

impl Filter for VolumeBinding {
    fn filter(&self, state: &CycleState, _pod: &PodInfo, node: &NodeInfo) -> Verdict {
        for volume in state.read::<Volumes>().iter().flat_map(|v| &v.0) {
            let Some(volume) = volume else {
                return Verdict::unresolvable(
                    "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)",
                );
            };
            let required = volume.spec.as_ref().and_then(|s| s.node_affinity.as_ref()?.required.as_ref());
            if required.is_some_and(|r| !any_term_matches(&r.node_selector_terms, &node.node)) {
                return Verdict::unresolvable("node(s) didn't match PersistentVolume's node affinity");
            }
        }
        Verdict::Success
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framework::Snapshot;
    use crate::testing::pod;
    use serde_json::{Value, json};

    #[test]
    fn pods_wait_for_their_claims() {
        let sources = Sources::detached();
        let plugin = VolumeBinding { sources: sources.clone() };
        let pod = pod(
            "p",
            json!({"spec": {"containers": [], "volumes": [
            {"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]}}),
        );
        let ask = || {
            let snapshot = Snapshot::default();
            plugin.pre_filter(&Cycle { snapshot: &snapshot }, &mut CycleState::default(), &pod).0
        };
        let put = |claim: Value| sources.claims.put(serde_json::from_value(claim).unwrap());
        assert_eq!(ask(), Verdict::unresolvable("persistentvolumeclaim \"c\" not found"));
        put(json!({"metadata": {"name": "c", "namespace": "ns"}, "spec": {}}));
        assert_eq!(ask(), Verdict::unresolvable(IMMEDIATE));
        put(json!({"metadata": {"name": "c", "namespace": "ns", "resourceVersion": "2",
            "annotations": {"pv.kubernetes.io/bind-completed": "yes"}}, "spec": {"volumeName": "pv"}}));
        assert_eq!(ask(), Verdict::Success);
    }
}
