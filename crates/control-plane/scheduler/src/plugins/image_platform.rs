//! A pod goes only to nodes that all its images are built for. Upstream counterpart: none.
//!
//! Before a pod enters the queue, the registries of its images are asked (init and ephemeral containers' too), at most
//! two seconds long and without holding up other pods; what is not known is allowed. Nothing is asked for images that
//! are never pulled, nor for those that nodes of every platform in the cluster hold already.
use std::collections::BTreeSet;
use std::sync::Arc;

use sampan_drivers::platform::{self, ImageQuery};
use sampan_drivers::runtime::Platform;

use crate::cache::Cache;
use crate::framework::{
    ClusterEvent, Cycle, CycleState, Filter, NodeInfo, NodeNames, Plugin, PodInfo, PreEnqueue, PreFilter,
    Verdict,
};
use crate::platforms::{Known, PlatformCache};
use crate::plugins::Descriptor;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "ImagePlatform",
    weight: 0,
    new: |cx| Box::new(ImagePlatform { platforms: cx.platforms.clone(), cache: cx.cache.clone() }),
};

/// How many nodes a sentence names.
const NAMED_NODES: usize = 5;

struct ImagePlatform {
    platforms: Option<PlatformCache>,
    cache: Arc<Cache>,
}

/// The node platforms that cannot run the pod, each with the sentence that says why.
#[derive(Clone)]
struct Refused(Vec<(Arc<Platform>, String)>);

fn queries(pod: &PodInfo) -> BTreeSet<ImageQuery> {
    let secrets = pod.spec().image_pull_secrets.iter().flatten();
    let pull_secrets: Vec<String> = secrets.map(|s| s.name.clone()).filter(|n| !n.is_empty()).collect();
    let pulled = pod.images().filter(|(_, policy)| *policy != Some("Never"));
    let query = |(image, _): (&str, Option<&str>)| ImageQuery {
        image: image.to_string(),
        namespace: pod.namespace.clone(),
        pull_secrets: pull_secrets.clone(),
    };
    pulled.map(query).collect()
}

fn names(nodes: &[String]) -> String {
    let named = nodes.iter().take(NAMED_NODES).map(String::as_str).collect::<Vec<_>>().join(", ");
    match nodes.len().saturating_sub(NAMED_NODES) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

fn sentence(image: &str, built_for: &[Platform], node: &Platform, nodes: &[String]) -> String {
    let built_for = platform::list(built_for);
    format!("node(s) cannot run image {image} (built for {built_for}, not {node}: {})", names(nodes))
}

impl Plugin for ImagePlatform {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, pod: &PodInfo, event: &ClusterEvent) -> bool {
        match event {
            ClusterEvent::PlatformsAnswered { image } => pod.images().any(|(i, _)| i == image),
            ClusterEvent::NodeAdded(_) => true,
            ClusterEvent::NodeUpdated { change, .. } => change.labels,
            ClusterEvent::PodUpdated { old, new, .. } => new.uid == pod.uid && !old.images().eq(new.images()),
            _ => false,
        }
    }
    fn as_pre_enqueue(&self) -> Option<&dyn PreEnqueue> {
        Some(self)
    }
    fn as_pre_filter(&self) -> Option<&dyn PreFilter> {
        Some(self)
    }
    fn as_filter(&self) -> Option<&dyn Filter> {
        Some(self)
    }
}

impl PreEnqueue for ImagePlatform {
    fn pre_enqueue(&self, pod: &PodInfo) -> Verdict {
        let Some(platforms) = &self.platforms else { return Verdict::Success };
        let asked = |q: &ImageQuery| !self.cache.image_is_everywhere(&platform::reported_name(&q.image));
        // all are asked, not only up to the first that is not known
        let waiting: Vec<ImageQuery> =
            queries(pod).into_iter().filter(asked).filter(|q| platforms.ask(q) == Known::Waiting).collect();
        match waiting.first() {
            Some(query) => {
                Verdict::unresolvable(format!("waiting for the platforms of image {}", query.image))
            }
            None => Verdict::Success,
        }
    }
}

impl PreFilter for ImagePlatform {
    fn pre_filter(
        &self,
        cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
    ) -> (Verdict, Option<NodeNames>) {
        let Some(platforms) = &self.platforms else { return (Verdict::Skip, None) };
        let mut refused: Vec<(Arc<Platform>, String)> = Vec::new();
        for query in queries(pod) {
            let Known::Platforms(built_for) = platforms.known(&query) else { continue };
            for (node, nodes) in &cx.snapshot.platforms {
                if !platform::any_runs_on(&built_for, node) && !refused.iter().any(|(p, _)| p == node) {
                    refused.push((node.clone(), sentence(&query.image, &built_for, node, nodes)));
                }
            }
        }
        if refused.is_empty() {
            return (Verdict::Skip, None);
        }
        state.write(Refused(refused));
        (Verdict::Success, None)
    }
}

impl Filter for ImagePlatform {
    fn filter(&self, state: &CycleState, _pod: &PodInfo, node: &NodeInfo) -> Verdict {
        let (Some(Refused(refused)), Some(platform)) = (state.read(), &node.platform) else {
            return Verdict::Success;
        };
        match refused.iter().find(|(p, _)| p == platform) {
            Some((_, sentence)) => Verdict::unresolvable(sentence.clone()),
            None => Verdict::Success,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod;
    use serde_json::json;

    #[test]
    fn the_sentence_names_platforms_and_nodes() {
        let amd64 = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
        let arm = Platform { os: "linux".into(), architecture: "arm".into(), variant: Some("v7".into()) };
        let nodes: Vec<String> = (0..7).map(|i| format!("pi-{i}")).collect();
        assert_eq!(
            sentence("registry.lab:5000/x", &[amd64], &arm, &nodes),
            "node(s) cannot run image registry.lab:5000/x \
             (built for linux/amd64, not linux/arm/v7: pi-0, pi-1, pi-2, pi-3, pi-4 and 2 more)"
        );
    }

    #[test]
    fn all_containers_that_pull_are_asked_about() {
        let pod = pod(
            "p",
            json!({"spec": {
                "initContainers": [{"name": "i", "image": "init"}],
                "containers": [{"name": "c", "image": "main"}, {"name": "d", "image": "local", "imagePullPolicy": "Never"}],
                "ephemeralContainers": [{"name": "e", "image": "debug"}],
                "imagePullSecrets": [{"name": "s"}]}}),
        );
        let queries = queries(&pod);
        let images: Vec<&str> = queries.iter().map(|q| q.image.as_str()).collect();
        assert_eq!(images, ["debug", "init", "main"]);
        assert!(queries.iter().all(|q| q.pull_secrets == ["s"] && q.namespace == "ns"));
    }
}
