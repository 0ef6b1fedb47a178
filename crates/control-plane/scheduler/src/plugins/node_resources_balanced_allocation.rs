//! Nodes whose CPU and memory would be used evenly are better.
//! Upstream counterpart: balanced_allocation.go in pkg/scheduler/framework/plugins/noderesources.
use std::sync::Arc;

use crate::framework::{
    Cycle, CycleState, MAX_NODE_SCORE, NodeInfo, Plugin, PodInfo, PreScore, Score, Verdict,
};
use crate::plugins::Descriptor;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "NodeResourcesBalancedAllocation",
    weight: 1,
    new: |_| Box::new(NodeResourcesBalancedAllocation),
};

struct NodeResourcesBalancedAllocation;

impl Plugin for NodeResourcesBalancedAllocation {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn as_pre_score(&self) -> Option<&dyn PreScore> {
        Some(self)
    }
    fn as_score(&self) -> Option<&dyn Score> {
        Some(self)
    }
}

impl PreScore for NodeResourcesBalancedAllocation {
    fn pre_score(&self, _: &Cycle<'_>, _: &mut CycleState, pod: &PodInfo, _: &[Arc<NodeInfo>]) -> Verdict {
        let nothing = pod.requests.milli_cpu == 0 && pod.requests.memory_bytes == 0;
        if nothing { Verdict::Skip } else { Verdict::Success }
    }
}

/// 100 less the deviation of the fractions in per cent.
fn balance(used: [i64; 2], all: [i64; 2]) -> i64 {
    let fraction = |i: usize| (all[i] != 0).then(|| (used[i] as f64 / all[i] as f64).min(1.0));
    let deviation = match (fraction(0), fraction(1)) {
        (Some(a), Some(b)) => ((a - b) / 2.0).abs(),
        _ => 0.0,
    };
    ((1.0 - deviation) * MAX_NODE_SCORE as f64) as i64
}

impl Score for NodeResourcesBalancedAllocation {
    fn score(&self, _state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> i64 {
        let all = [node.allocatable.milli_cpu, node.allocatable.memory_bytes];
        let used = [node.requested.milli_cpu, node.requested.memory_bytes];
        let with = [used[0] + pod.requests.milli_cpu, used[1] + pod.requests.memory_bytes];
        let half = MAX_NODE_SCORE / 2;
        half + (half + balance(with, all) - balance(used, all)) / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_use_is_better() {
        assert_eq!(balance([0, 0], [10, 10]), 100);
        assert_eq!(balance([10, 0], [10, 10]), 50);
        assert_eq!(balance([5, 10], [10, 20]), 100);
        assert_eq!(balance([5, 0], [10, 0]), 100);
    }
}
