//! Nodes that hold a pod's images already are better, the more the larger these are.
//! Upstream counterpart: pkg/scheduler/framework/plugins/imagelocality.
use std::sync::Arc;

use sampan_drivers::platform;

use crate::framework::{
    Cycle, CycleState, MAX_NODE_SCORE, NodeInfo, Plugin, PodInfo, PreScore, Score, Verdict,
};
use crate::plugins::Descriptor;

pub const DESCRIPTOR: Descriptor =
    Descriptor { name: "ImageLocality", weight: 1, new: |_| Box::new(ImageLocality) };

const MB: i64 = 1024 * 1024;
/// Smaller sums count as nothing.
const MIN_BYTES: i64 = 23 * MB;
/// A container's image counts no more than this.
const MAX_CONTAINER_BYTES: i64 = 1000 * MB;

struct ImageLocality;

#[derive(Clone)]
struct Wanted {
    /// Each image that some node holds, and which part of the nodes does.
    images: Vec<(String, f64)>,
    containers: i64,
}

impl Plugin for ImageLocality {
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

impl PreScore for ImageLocality {
    fn pre_score(
        &self,
        cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
        _: &[Arc<NodeInfo>],
    ) -> Verdict {
        let spec = pod.spec();
        let init = spec.init_containers.as_deref().unwrap_or_default();
        let of_containers = init.iter().chain(&spec.containers).filter_map(|c| c.image.as_deref());
        let volumes = spec.volumes.iter().flatten().filter_map(|v| v.image.as_ref()?.reference.as_deref());
        let part = |name: &str| {
            let name = platform::reported_name(name);
            let nodes = *cx.snapshot.image_nodes.get(&name)?;
            Some((name, nodes as f64 / cx.snapshot.nodes.len() as f64))
        };
        let images: Vec<(String, f64)> = of_containers.chain(volumes).filter_map(part).collect();
        if images.is_empty() {
            // every node would get 0
            return Verdict::Skip;
        }
        state.write(Wanted { images, containers: (init.len() + spec.containers.len()) as i64 });
        Verdict::Success
    }
}

impl Score for ImageLocality {
    fn score(&self, state: &CycleState, _pod: &PodInfo, node: &NodeInfo) -> i64 {
        let Some(wanted) = state.read::<Wanted>() else { return 0 };
        let size = |(name, part): &(String, f64)| Some((*node.images.get(name)? as f64 * part) as i64);
        let sum: i64 = wanted.images.iter().filter_map(size).sum();
        let max = MAX_CONTAINER_BYTES * wanted.containers;
        MAX_NODE_SCORE * (sum.clamp(MIN_BYTES, max.max(MIN_BYTES)) - MIN_BYTES) / (max - MIN_BYTES).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framework::Snapshot;
    use crate::testing::{node_info, pod};
    use serde_json::json;

    #[test]
    fn large_images_attract_and_rare_ones_less() {
        let image =
            json!({"status": {"images": [{"names": ["docker.io/x/y:latest"], "sizeBytes": 523 * MB}]}});
        let with = Arc::new(node_info("a", image));
        let without = Arc::new(node_info("b", json!({})));
        let mut snapshot = Snapshot::default();
        snapshot.rebuild([with.clone(), without.clone()].into_iter());
        snapshot.image_nodes = Arc::new([("docker.io/x/y:latest".to_string(), 1)].into());
        let pod = pod("p", json!({"spec": {"containers": [{"name": "c", "image": "x/y"}]}}));
        let mut state = CycleState::default();
        let verdict = ImageLocality.pre_score(&Cycle { snapshot: &snapshot }, &mut state, &pod, &[]);
        assert!(verdict.is_success());
        // half of the nodes have it: (261.5 - 23) / (1000 - 23)
        assert_eq!(ImageLocality.score(&state, &pod, &with), 24);
        assert_eq!(ImageLocality.score(&state, &pod, &without), 0);
    }
}
