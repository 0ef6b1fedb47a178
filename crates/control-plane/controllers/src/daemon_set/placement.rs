//! Which nodes get a daemon pod, and which pods of a node are right. Pure.
//! Upstream counterpart: pkg/controller/daemon/daemon_controller.go (podsShouldBeOnNode, NodeShouldRunDaemonPod), util.
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{
    Affinity, Node, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec,
    Toleration,
};
use sampan_drivers::platform::{self, ImageQuery};
use sampan_drivers::runtime::Platform;

use super::is_updated;
use crate::controller_ref::{is_deleting, name};
use crate::label_selector::labels_of;
use crate::node_fit::{matches_affinity, untolerated};
use crate::{node_lifecycle, pod_state};

/// Whether a daemon pod should be started on a node, and whether one that is there may stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    pub run: bool,
    pub stay: bool,
}

/// Daemon pods tolerate what keeps other pods away from a node in trouble.
pub fn add_tolerations(spec: &mut PodSpec) {
    let mut wanted = vec![
        (node_lifecycle::NOT_READY, "NoExecute"),
        (node_lifecycle::UNREACHABLE, "NoExecute"),
        ("node.kubernetes.io/disk-pressure", "NoSchedule"),
        ("node.kubernetes.io/memory-pressure", "NoSchedule"),
        ("node.kubernetes.io/pid-pressure", "NoSchedule"),
        ("node.kubernetes.io/unschedulable", "NoSchedule"),
    ];
    if spec.host_network == Some(true) {
        wanted.push(("node.kubernetes.io/network-unavailable", "NoSchedule"));
    }
    let tolerations = spec.tolerations.get_or_insert_with(Vec::new);
    for (key, effect) in wanted {
        let toleration = Toleration {
            key: Some(key.into()),
            operator: Some("Exists".into()),
            effect: Some(effect.into()),
            ..Toleration::default()
        };
        if !tolerations.contains(&toleration) {
            tolerations.push(toleration);
        }
    }
}

/// Whether the pod asks for that node, or for none.
fn is_wanted(spec: &PodSpec, node: &Node) -> bool {
    let wanted = spec.node_name.as_deref().unwrap_or_default();
    (wanted.is_empty() || wanted == name(node)) && matches_affinity(spec, node)
}

/// The images whose platforms decide where the set's pods may go: those that are pulled, but for those that a node of
/// each platform holds already.
pub fn images_in_question(namespace: &str, spec: &PodSpec, nodes: &[Arc<Node>]) -> Vec<ImageQuery> {
    let candidates: Vec<(Platform, &Arc<Node>)> = nodes
        .iter()
        .filter(|node| is_wanted(spec, node))
        .filter_map(|node| Some((platform::of_node(labels_of(&node.metadata.labels))?, node)))
        .collect();
    let holds = |node: &Node, image: &str| {
        let mut images = node.status.iter().flat_map(|s| s.images.iter().flatten());
        images.any(|i| i.names.iter().flatten().any(|name| name == image))
    };
    let secrets = spec.image_pull_secrets.iter().flatten();
    let pull_secrets: Vec<String> = secrets.map(|s| s.name.clone()).filter(|n| !n.is_empty()).collect();
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let pulled = containers.filter(|c| c.image_pull_policy.as_deref() != Some("Never"));
    let images: BTreeSet<&String> = pulled.filter_map(|c| c.image.as_ref()).collect();
    let in_question = |image: &&String| {
        let name = platform::reported_name(image);
        !platform::is_everywhere(candidates.iter().map(|(platform, node)| (platform, holds(node, &name))))
    };
    let query = |image: &String| ImageQuery {
        image: image.clone(),
        namespace: namespace.to_string(),
        pull_secrets: pull_secrets.clone(),
    };
    images.into_iter().filter(in_question).map(query).collect()
}

/// `images` are the platforms of each of the pod's images, of those where they are known.
pub fn decide(spec: &PodSpec, node: &Node, images: &[Vec<Platform>]) -> Placement {
    let no = Placement { run: false, stay: false };
    if !is_wanted(spec, node) || !runs_images(node, images) {
        return no;
    }
    let mut spec = spec.clone();
    add_tolerations(&mut spec);
    let tolerations = spec.tolerations.unwrap_or_default();
    if untolerated(node, &tolerations, &["NoSchedule", "NoExecute"]).is_none() {
        return Placement { run: true, stay: true };
    }
    Placement { run: false, stay: untolerated(node, &tolerations, &["NoExecute"]).is_none() }
}

/// Whether the node can run every image, by the scheduler's rule.
fn runs_images(node: &Node, images: &[Vec<Platform>]) -> bool {
    match platform::of_node(labels_of(&node.metadata.labels)) {
        Some(own) => images.iter().all(|built_for| platform::any_runs_on(built_for, &own)),
        None => true,
    }
}

/// The node that a pod is on, or that its affinity pins it to.
pub fn target_node(pod: &Pod) -> Option<&str> {
    let spec = pod.spec.as_ref()?;
    if let Some(node) = spec.node_name.as_deref().filter(|n| !n.is_empty()) {
        return Some(node);
    }
    let required = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = &required.required_during_scheduling_ignored_during_execution.as_ref()?.node_selector_terms;
    let fields = terms.iter().flat_map(|t| t.match_fields.iter().flatten());
    let mut pins = fields.filter(|f| f.key == "metadata.name" && f.operator == "In");
    pins.find_map(|f| f.values.as_ref()?.first().map(String::as_str))
}

/// Makes a pod run only on `node`.
pub fn pin(pod: &mut Pod, node: &str) {
    let pin = NodeSelectorRequirement {
        key: "metadata.name".into(),
        operator: "In".into(),
        values: Some(vec![node.to_string()]),
    };
    let Some(spec) = pod.spec.as_mut() else { return };
    let affinity = spec.affinity.get_or_insert_with(Affinity::default);
    let affinity = affinity.node_affinity.get_or_insert_with(NodeAffinity::default);
    // the template's own terms were checked against the node already
    affinity.required_during_scheduling_ignored_during_execution = Some(NodeSelector {
        node_selector_terms: vec![NodeSelectorTerm {
            match_expressions: None,
            match_fields: Some(vec![pin]),
        }],
    });
}

/// Pods that are on a node first, then the oldest.
pub fn oldest_first(a: &Pod, b: &Pod) -> Ordering {
    let created = |p: &Pod| p.metadata.creation_timestamp.clone();
    let unassigned = |p: &Pod| pod_state::node_name(p).is_empty();
    unassigned(a)
        .cmp(&unassigned(b))
        .then_with(|| created(a).cmp(&created(b)))
        .then_with(|| name(a).cmp(name(b)))
}

/// What to do on one node.
#[derive(Debug, Default)]
pub struct OnNode {
    pub create: bool,
    pub delete: Vec<Arc<Pod>>,
    /// Pods that ended: to be deleted, failed ones with back-off.
    pub finished: Vec<Arc<Pod>>,
}

pub fn allows_surge(set: &DaemonSet) -> bool {
    super::rollout::max_surge(set, 100) > 0
}

/// `pods` are those of the node, the oldest first; `exists` tells whether the node has any at all.
pub fn on_node(
    set: &DaemonSet,
    place: Placement,
    exists: bool,
    pods: &[Arc<Pod>],
    hash: &str,
    now: Timestamp,
) -> OnNode {
    let mut decision = OnNode::default();
    if place.run && !exists {
        decision.create = true;
        return decision;
    }
    let alive = pods.iter().filter(|p| !is_deleting(&***p)).cloned();
    if !place.stay {
        decision.delete = alive.collect();
        return decision;
    }
    let (finished, running): (Vec<_>, Vec<_>) = alive.partition(|p| pod_state::is_terminal(p));
    decision.finished = finished;
    if !allows_surge(set) {
        decision.delete = running.into_iter().skip(1).collect();
        return decision;
    }
    if running.len() <= 1 {
        decision.create = running.is_empty() && place.run;
        return decision;
    }
    let (mut new, mut old) = (None, None);
    for pod in running {
        let slot = if is_updated(set, &pod, hash) { &mut new } else { &mut old };
        match slot {
            None => *slot = Some(pod),
            Some(_) => decision.delete.push(pod),
        }
    }
    let min_ready = set.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0);
    if let (Some(new), Some(old)) = (new, old)
        && (!pod_state::is_ready(&old) || pod_state::is_available(&new, min_ready, now))
    {
        decision.delete.push(old);
    }
    decision
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::pod_state::test_pod;
    use serde_json::json;

    pub(crate) fn daemon_set(rolling: serde_json::Value) -> DaemonSet {
        serde_json::from_value(json!({
            "metadata": {"name": "d", "namespace": "ns", "uid": "d-uid", "generation": 1},
            "spec": {"selector": {"matchLabels": {"app": "a"}},
                "template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": []}},
                "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": rolling}},
        }))
        .unwrap()
    }

    pub(crate) fn daemon_pod(name: &str, node: &str, hash: &str, ready: bool) -> Arc<Pod> {
        let mut pod = test_pod(name, "Running", node, ready);
        pod.metadata.labels.get_or_insert_default().insert("controller-revision-hash".into(), hash.into());
        Arc::new(pod)
    }

    #[test]
    fn nodes_that_fit() {
        let node = |taints: serde_json::Value| -> Node {
            serde_json::from_value(json!({"metadata": {"name": "n", "labels":
                {"kubernetes.io/os": "linux", "kubernetes.io/arch": "arm"}}, "spec": {"taints": taints}}))
            .unwrap()
        };
        let spec = PodSpec::default();
        let place = |n: &Node| decide(&spec, n, &[]);
        let yes = Placement { run: true, stay: true };
        assert_eq!(place(&node(json!([]))), yes);
        let unreachable = json!([{"key": node_lifecycle::UNREACHABLE, "effect": "NoExecute"},
            {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]);
        assert_eq!(place(&node(unreachable)), yes);
        let tainted = json!([{"key": "mine", "effect": "NoSchedule"}]);
        assert_eq!(place(&node(tainted)), Placement { run: false, stay: true });
    }

    #[test]
    fn nodes_run_what_the_scheduler_says_they_run() {
        let node = |arch: &str, variant: Option<&str>| -> Node {
            let mut labels = json!({"kubernetes.io/os": "linux", "kubernetes.io/arch": arch});
            if let Some(variant) = variant {
                labels[platform::ARM_VARIANT_LABEL] = variant.into();
            }
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": labels}})).unwrap()
        };
        let image = |platforms: &str| -> Vec<Platform> {
            let platform = |text: &str| {
                let mut parts = text.split('/').map(str::to_string);
                let (architecture, variant) = (parts.next().unwrap_or_default(), parts.next());
                Platform { os: "linux".into(), architecture, variant }
            };
            platforms.split_whitespace().map(platform).collect()
        };
        for (arch, variant, images, expected) in [
            ("amd64", None, vec![], true),
            ("amd64", None, vec!["amd64 arm64"], true),
            ("arm", None, vec!["amd64"], false),
            ("arm", None, vec!["arm"], true),
            ("arm", None, vec!["arm/v6"], true),
            ("arm", Some("v6"), vec!["arm/v7"], false),
            ("arm64", None, vec!["arm64/v8"], true),
            ("arm64", None, vec!["arm/v7"], true),
            ("arm", None, vec!["arm64"], false),
            ("amd64", None, vec!["386"], false),
            // each image must run, not one platform be common to all
            ("arm", None, vec!["arm/v7", "arm/v6"], true),
            ("arm64", None, vec!["arm64", "arm/v7"], true),
            ("arm64", None, vec!["arm64", "amd64"], false),
        ] {
            let known: Vec<Vec<Platform>> = images.iter().map(|i| image(i)).collect();
            let decided = decide(&PodSpec::default(), &node(arch, variant), &known);
            assert_eq!(
                decided,
                Placement { run: expected, stay: expected },
                "{images:?} on {arch} {variant:?}"
            );
        }
        assert!(decide(&PodSpec::default(), &Node::default(), &[image("arm")]).run);
    }

    #[test]
    fn only_images_that_some_platform_lacks_are_asked_about() {
        let node = |arch: &str, images: &[&str]| -> Arc<Node> {
            let images: Vec<_> = images.iter().map(|i| json!({"names": [i]})).collect();
            let labels = json!({"kubernetes.io/arch": arch});
            let node = json!({"metadata": {"name": arch, "labels": labels}, "status": {"images": images}});
            Arc::new(serde_json::from_value(node).unwrap())
        };
        let (both, one) = ("docker.io/library/both:latest", "docker.io/library/one:1");
        let nodes = [node("amd64", &[both, one]), node("arm64", &[both]), node("amd64", &[])];
        let spec = |selector: serde_json::Value| -> PodSpec {
            serde_json::from_value(json!({
                "initContainers": [{"name": "i", "image": "both"}],
                "containers": [{"name": "a", "image": "one:1"}, {"name": "b", "image": "reg:5000/x"},
                    {"name": "c", "image": "own", "imagePullPolicy": "Never"}],
                "imagePullSecrets": [{"name": "s"}], "nodeSelector": selector}))
            .unwrap()
        };
        for (selector, wanted) in [
            (json!({}), vec!["one:1", "reg:5000/x"]),
            (json!({"kubernetes.io/arch": "amd64"}), vec!["reg:5000/x"]),
            (json!({"kubernetes.io/arch": "riscv64"}), vec![]),
        ] {
            let queries = images_in_question("ns", &spec(selector), &nodes);
            let images: Vec<&str> = queries.iter().map(|q| q.image.as_str()).collect();
            assert_eq!(images, wanted);
            assert!(queries.iter().all(|q| q.namespace == "ns" && q.pull_secrets == ["s"]));
        }
    }

    #[test]
    fn pinned_pods_are_found() {
        let mut pod = Pod { spec: Some(PodSpec::default()), ..Pod::default() };
        pin(&mut pod, "n7");
        assert_eq!(target_node(&pod), Some("n7"));
    }

    #[test]
    fn one_pod_a_node_or_two_with_surge() {
        let yes = Placement { run: true, stay: true };
        let now = "2026-01-02T00:00:00Z".parse().unwrap();
        let (old, new) = (daemon_pod("old", "n", "h1", true), daemon_pod("new", "n", "h2", true));
        let plain = daemon_set(json!({"maxUnavailable": 1}));
        assert!(on_node(&plain, yes, false, &[], "h2", now).create);
        let both = [old.clone(), new.clone()];
        assert_eq!(name(&*on_node(&plain, yes, true, &both, "h2", now).delete[0]), "new");
        let surge = daemon_set(json!({"maxUnavailable": 0, "maxSurge": 1}));
        assert_eq!(name(&*on_node(&surge, yes, true, &both, "h2", now).delete[0]), "old");
        let unready = [old, daemon_pod("new", "n", "h2", false)];
        assert!(on_node(&surge, yes, true, &unready, "h2", now).delete.is_empty());
        let away = Placement { run: false, stay: false };
        assert_eq!(on_node(&plain, away, true, &[new], "h2", now).delete.len(), 1);
    }
}
