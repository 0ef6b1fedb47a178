//! A pod with everything that plugins would otherwise compute again for each node.
//! Upstream counterpart: `PodInfo` in pkg/scheduler/framework/types.go.
use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodAffinityTerm, PodSpec, WeightedPodAffinityTerm};

use super::resources::non_zero_requests;
use super::selector::{Labels, labels_of};
use super::{Resources, Selector};

/// A required or preferred rule about other pods.
#[derive(Clone, Debug)]
pub struct AffinityTerm {
    pub namespaces: BTreeSet<String>,
    pub namespace_selector: Selector,
    pub selector: Selector,
    pub topology_key: String,
    /// 0 for required terms.
    pub weight: i64,
}

impl AffinityTerm {
    fn of(term: &PodAffinityTerm, namespace: &str, weight: i32) -> Self {
        let mut namespaces: BTreeSet<String> = term.namespaces.iter().flatten().cloned().collect();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.insert(namespace.to_string());
        }
        Self {
            namespaces,
            namespace_selector: Selector::of(term.namespace_selector.as_ref()),
            selector: Selector::of(term.label_selector.as_ref()),
            topology_key: term.topology_key.clone(),
            weight: i64::from(weight),
        }
    }

    /// Whether a pod of those labels is meant, in a namespace of those labels.
    pub fn matches(&self, namespace: &str, labels: &Labels, namespace_labels: &Labels) -> bool {
        (self.namespaces.contains(namespace) || self.namespace_selector.matches(namespace_labels))
            && self.selector.matches(labels)
    }
}

/// A port of the node that a pod takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    pub ip: String,
    pub protocol: String,
    pub port: i32,
}

impl HostPort {
    pub fn conflicts(&self, other: &Self) -> bool {
        const ANY: &str = "0.0.0.0";
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip == other.ip || self.ip == ANY || other.ip == ANY)
    }
}

#[derive(Clone, Debug)]
pub struct PodInfo {
    pub pod: Arc<Pod>,
    pub uid: Arc<str>,
    pub namespace: String,
    pub name: String,
    pub priority: i32,
    pub requests: Resources,
    /// CPU (milli) and memory (bytes) as scoring sees them.
    pub non_zero: (i64, i64),
    pub ports: Vec<HostPort>,
    pub required_affinity: Vec<AffinityTerm>,
    pub required_anti_affinity: Vec<AffinityTerm>,
    pub preferred_affinity: Vec<AffinityTerm>,
    pub preferred_anti_affinity: Vec<AffinityTerm>,
    /// Names one set of namespace and labels: pods of one controller share it.
    pub label_set: u128,
    /// Being deleted.
    pub terminating: bool,
}

static NO_SPEC: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);

impl PodInfo {
    pub fn new(pod: Arc<Pod>) -> Arc<Self> {
        let spec = pod.spec.as_ref().unwrap_or(&NO_SPEC);
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let affinity = spec.affinity.as_ref();
        let (with, anti) = (
            affinity.and_then(|a| a.pod_affinity.as_ref()),
            affinity.and_then(|a| a.pod_anti_affinity.as_ref()),
        );
        let required = |terms: Option<&Vec<PodAffinityTerm>>| -> Vec<AffinityTerm> {
            terms.into_iter().flatten().map(|t| AffinityTerm::of(t, &namespace, 0)).collect()
        };
        let preferred = |terms: Option<&Vec<WeightedPodAffinityTerm>>| -> Vec<AffinityTerm> {
            let parse =
                |t: &WeightedPodAffinityTerm| AffinityTerm::of(&t.pod_affinity_term, &namespace, t.weight);
            terms.into_iter().flatten().map(parse).collect()
        };
        Arc::new(Self {
            uid: pod.metadata.uid.as_deref().unwrap_or_default().into(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            priority: spec.priority.unwrap_or(0),
            requests: Resources::of_pod(spec),
            non_zero: non_zero_requests(spec),
            ports: host_ports(spec),
            required_affinity: required(
                with.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref()),
            ),
            required_anti_affinity: required(
                anti.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref()),
            ),
            preferred_affinity: preferred(
                with.and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref()),
            ),
            preferred_anti_affinity: preferred(
                anti.and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref()),
            ),
            label_set: label_set(&namespace, labels_of(&pod.metadata.labels)),
            terminating: pod.metadata.deletion_timestamp.is_some(),
            namespace,
            pod,
        })
    }

    pub fn spec(&self) -> &PodSpec {
        self.pod.spec.as_ref().unwrap_or(&NO_SPEC)
    }

    pub fn labels(&self) -> &Labels {
        labels_of(&self.pod.metadata.labels)
    }

    /// The node it is bound to, or "".
    pub fn node_name(&self) -> &str {
        self.spec().node_name.as_deref().unwrap_or_default()
    }

    /// The node that preemption has chosen, as the API knows it, or "".
    pub fn nominated_node_name(&self) -> &str {
        let status = self.pod.status.as_ref();
        status.and_then(|s| s.nominated_node_name.as_deref()).unwrap_or_default()
    }

    pub fn has_affinity(&self) -> bool {
        !self.required_affinity.is_empty()
            || !self.required_anti_affinity.is_empty()
            || !self.preferred_affinity.is_empty()
            || !self.preferred_anti_affinity.is_empty()
    }

    /// When it was started on its node; now for one that was not.
    pub fn start_time(&self) -> Timestamp {
        let started = self.pod.status.as_ref().and_then(|s| s.start_time.as_ref());
        started.map_or_else(sampan_world::clock::now, |t| t.0)
    }

    /// Images of all its containers: init and ephemeral ones too.
    pub fn images(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        let spec = self.spec();
        let plain = spec.init_containers.iter().flatten().chain(&spec.containers);
        let plain = plain.map(|c| (c.image.as_deref(), c.image_pull_policy.as_deref()));
        let ephemeral = spec.ephemeral_containers.iter().flatten();
        let ephemeral = ephemeral.map(|c| (c.image.as_deref(), c.image_pull_policy.as_deref()));
        plain.chain(ephemeral).filter_map(|(image, policy)| Some((image.filter(|i| !i.is_empty())?, policy)))
    }
}

fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    let sidecars =
        spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
    let taken = ports.filter_map(|p| {
        let port = p.host_port.filter(|p| *p > 0)?;
        let ip = p.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".to_string());
        Some(HostPort { ip, protocol: p.protocol.clone().unwrap_or_else(|| "TCP".to_string()), port })
    });
    taken.collect()
}

/// 128 bits, so that two sets never share one by chance.
fn label_set(namespace: &str, labels: &Labels) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, namespace, labels).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(1) << 64 | half(2)
}
