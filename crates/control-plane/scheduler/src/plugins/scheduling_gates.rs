//! Keeps pods with scheduling gates out of the queue.
//! Upstream counterpart: pkg/scheduler/framework/plugins/schedulinggates. The `SchedulingGated` condition is set by the
//! API server when the pod is created.
use crate::framework::{ClusterEvent, Plugin, PodInfo, PreEnqueue, Verdict};
use crate::plugins::Descriptor;

pub const DESCRIPTOR: Descriptor =
    Descriptor { name: "SchedulingGates", weight: 0, new: |_| Box::new(SchedulingGates) };

struct SchedulingGates;

impl Plugin for SchedulingGates {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, pod: &PodInfo, event: &ClusterEvent) -> bool {
        matches!(event, ClusterEvent::PodUpdated { new, change, .. } if change.gates_gone && new.uid == pod.uid)
    }
    fn as_pre_enqueue(&self) -> Option<&dyn PreEnqueue> {
        Some(self)
    }
}

impl PreEnqueue for SchedulingGates {
    fn pre_enqueue(&self, pod: &PodInfo) -> Verdict {
        let gates: Vec<&str> =
            pod.spec().scheduling_gates.iter().flatten().map(|g| g.name.as_str()).collect();
        if gates.is_empty() {
            return Verdict::Success;
        }
        Verdict::unresolvable(format!("waiting for scheduling gates: [{}]", gates.join(" ")))
    }
}
