//! Whether this node takes a pod that was bound to it.
//!
//! Upstream counterparts: pkg/kubelet/lifecycle/predicate.go, kubelet.go (rejectPod), pkg/kubelet/sysctl. `ImagePlatform`
//! is ours: an image that is not built for this node's platform can never run, and that is said at once.
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, NodeSelectorTerm, Pod};
use kube::ResourceExt;
use sampan_kinds::core::v1::pod_spec::requests;
use sampan_kinds::quantity::{Amount, ResourceList};

use crate::node_services::NodeServices;
use crate::{resources, security};

/// Why a pod is refused: goes into its status and an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: String,
    pub message: String,
}

fn refuse(reason: &str, message: impl Into<String>) -> Refusal {
    Refusal { reason: reason.to_string(), message: message.into() }
}

/// Lets the pod in and counts it, or says why not. A pod that is in already stays in.
pub fn admit(services: &NodeServices, pod: &Arc<Pod>) -> Result<(), Refusal> {
    let uid = pod.uid().unwrap_or_default();
    let mut admitted = services.admitted.lock();
    if let Some(known) = admitted.get_mut(&uid) {
        *known = pod.clone();
        return Ok(());
    }
    let others: Vec<&Arc<Pod>> = admitted.values().collect();
    let allocatable = services.volumes.allocatable.read();
    let node = services.this_node();
    check(pod, node.as_deref(), &others, &|name| resources::amount(Some(&allocatable), name), services)?;
    admitted.insert(uid, pod.clone());
    Ok(())
}

fn check(
    pod: &Pod,
    node: Option<&Node>,
    others: &[&Arc<Pod>],
    allocatable: &dyn Fn(&str) -> Option<Amount>,
    services: &NodeServices,
) -> Result<(), Refusal> {
    let Some(spec) = &pod.spec else { return Err(refuse("UnexpectedAdmissionError", "the pod has no spec")) };
    if let Some(message) = security::check_sysctls(pod, &services.config.allowed_unsafe_sysctls) {
        return Err(refuse("SysctlForbidden", message));
    }
    if spec.os.as_ref().is_some_and(|os| os.name != "linux") {
        return Err(refuse("PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS"));
    }
    if spec.host_users == Some(false) {
        return Err(refuse(
            "UnexpectedAdmissionError",
            "user namespaces (hostUsers: false) are not supported by this node yet",
        ));
    }
    fits(pod, others, allocatable)?;
    if let Some(node) = node
        && !matches_node(pod, node)
    {
        return Err(refuse(
            "NodeAffinity",
            "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector",
        ));
    }
    let taken = |p: &Pod| -> Vec<(i32, String)> {
        let containers = p.spec.iter().flat_map(|s| s.containers.iter());
        containers
            .flat_map(|c| c.ports.iter().flatten())
            .filter_map(|p| {
                p.host_port.filter(|h| *h > 0).map(|h| (h, p.protocol.clone().unwrap_or("TCP".into())))
            })
            .collect()
    };
    let wanted = taken(pod);
    if wanted.iter().any(|port| others.iter().any(|o| taken(o).contains(port) && overlap(pod, o, port))) {
        return Err(refuse(
            "NodePorts",
            "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports",
        ));
    }
    Ok(())
}

/// Whether both pods want that port on an address in common.
fn overlap(a: &Pod, b: &Pod, port: &(i32, String)) -> bool {
    let addresses = |p: &Pod| -> Vec<String> {
        let containers = p.spec.iter().flat_map(|s| s.containers.iter());
        containers
            .flat_map(|c| c.ports.iter().flatten())
            .filter(|p| p.host_port == Some(port.0) && p.protocol.as_deref().unwrap_or("TCP") == port.1)
            .map(|p| p.host_ip.clone().filter(|ip| ip != "0.0.0.0" && ip != "::").unwrap_or_default())
            .collect()
    };
    let (a, b) = (addresses(a), addresses(b));
    a.iter().any(|x| b.iter().any(|y| x.is_empty() || y.is_empty() || x == y))
}

fn fits(
    pod: &Pod,
    others: &[&Arc<Pod>],
    allocatable: &dyn Fn(&str) -> Option<Amount>,
) -> Result<(), Refusal> {
    let of = |p: &Pod| p.spec.as_ref().map(requests::pod_requests).unwrap_or_default();
    let mut used = ResourceList::new();
    for other in others {
        for (name, amount) in of(other) {
            let sum = used.entry(name).or_default();
            *sum = sum.plus(amount);
        }
    }
    let lack = |name: &str, reason: String, requested: i64, used: i64, capacity: i64| {
        refuse(
            &reason,
            format!(
                "Node didn't have enough resource: {name}, requested: {requested}, used: {used}, capacity: {capacity}"
            ),
        )
    };
    if let Some(pods) = allocatable("pods") {
        let count = i64::try_from(others.len()).unwrap_or(i64::MAX);
        if count + 1 > pods.value() {
            return Err(lack("pods", "OutOfpods".to_string(), 1, count, pods.value()));
        }
    }
    for (name, wanted) in of(pod) {
        // what the node does not know at all is the cluster's business
        let Some(there) = allocatable(&name) else { continue };
        let taken = used.get(&name).copied().unwrap_or_default();
        if wanted > Amount::ZERO && taken.plus(wanted) > there {
            let number = |a: Amount| if name == "cpu" { a.milli_value() } else { a.value() };
            return Err(lack(&name, format!("OutOf{name}"), number(wanted), number(taken), number(there)));
        }
    }
    Ok(())
}

fn matches_node(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let labels = node.metadata.labels.clone().unwrap_or_default();
    if spec.node_selector.iter().flatten().any(|(k, v)| labels.get(k) != Some(v)) {
        return false;
    }
    let affinity = spec.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
    let Some(required) =
        affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref())
    else {
        return true;
    };
    required.node_selector_terms.iter().any(|term| matches_term(term, node, &labels))
}

fn matches_term(
    term: &NodeSelectorTerm,
    node: &Node,
    labels: &std::collections::BTreeMap<String, String>,
) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let holds = |operator: &str, value: Option<&String>, values: &[String]| match operator {
        "In" => value.is_some_and(|v| values.contains(v)),
        "NotIn" => value.is_none_or(|v| !values.contains(v)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" | "Lt" => {
            let (value, bound) =
                (value.and_then(|v| v.parse::<i64>().ok()), values.first().and_then(|v| v.parse().ok()));
            match (value, bound) {
                (Some(value), Some(bound)) => {
                    if operator == "Gt" {
                        value > bound
                    } else {
                        value < bound
                    }
                }
                _ => false,
            }
        }
        _ => false,
    };
    let name = node.name_any();
    expressions
        .iter()
        .all(|e| holds(&e.operator, labels.get(&e.key), e.values.as_deref().unwrap_or_default()))
        && fields.iter().all(|f| {
            f.key == "metadata.name"
                && holds(&f.operator, Some(&name), f.values.as_deref().unwrap_or_default())
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn resources_must_fit() {
        let pod = |cpu: &str| -> Arc<Pod> {
            Arc::new(
                serde_json::from_value(json!({"spec": {"containers": [
                    {"name": "c", "resources": {"requests": {"cpu": cpu, "example.com/x": "1"}}}]}}))
                .unwrap(),
            )
        };
        let allocatable = |name: &str| match name {
            "cpu" => Some(Amount::units(2)),
            "pods" => Some(Amount::units(2)),
            _ => None,
        };
        let (one, big) = (pod("1"), pod("1500m"));
        assert!(fits(&one, &[&one], &allocatable).is_ok());
        let refusal = fits(&big, &[&one], &allocatable).unwrap_err();
        assert_eq!(refusal.reason, "OutOfcpu");
        assert_eq!(
            refusal.message,
            "Node didn't have enough resource: cpu, requested: 1500, used: 1000, capacity: 2000"
        );
        assert_eq!(fits(&pod("0"), &[&one, &one], &allocatable).unwrap_err().reason, "OutOfpods");
    }

    #[test]
    fn selectors_and_affinity() {
        let node: Node =
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"a": "5"}}})).unwrap();
        let term = |key: &str, operator: &str, values: &[&str]| {
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms":
                [{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]}}}})
        };
        let cases = [
            (json!({}), true),
            (json!({"nodeSelector": {"a": "5"}}), true),
            (json!({"nodeSelector": {"a": "6"}}), false),
            (term("a", "In", &["4", "5"]), true),
            (term("a", "NotIn", &["5"]), false),
            (term("b", "NotIn", &["5"]), true),
            (term("a", "Gt", &["4"]), true),
            (term("a", "Lt", &["4"]), false),
            (term("b", "Exists", &[]), false),
        ];
        for (mut spec, want) in cases {
            spec["containers"] = json!([]);
            let pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
            assert_eq!(matches_node(&pod, &node), want, "{pod:?}");
        }
    }
}
