//! Whether a pod may be on a node: node name, selectors, affinity, taints. Upstream counterpart:
//! component-helpers scheduling/corev1 and the scheduler's node affinity and taint plugins.
use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Taint, Toleration,
};

use crate::controller_ref::name;
use crate::label_selector::{contains_all, labels_of};

/// Whether `toleration` tolerates `taint`.
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    if !effect.is_empty() && effect != taint.effect || !key.is_empty() && key != taint.key {
        return false;
    }
    let (wanted, value) =
        (toleration.value.as_deref().unwrap_or_default(), taint.value.as_deref().unwrap_or_default());
    match toleration.operator.as_deref().unwrap_or_default() {
        "" | "Equal" => !key.is_empty() && wanted == value,
        "Exists" => true,
        "Lt" => numbers(value, wanted).is_some_and(|(taint, own)| taint < own),
        "Gt" => numbers(value, wanted).is_some_and(|(taint, own)| taint > own),
        _ => false,
    }
}

fn numbers(a: &str, b: &str) -> Option<(i64, i64)> {
    Some((a.parse().ok()?, b.parse().ok()?))
}

/// The first taint of one of `effects` that nothing tolerates.
pub fn untolerated<'a>(node: &'a Node, tolerations: &[Toleration], effects: &[&str]) -> Option<&'a Taint> {
    let taints = node.spec.iter().flat_map(|s| s.taints.iter().flatten());
    let mut relevant = taints.filter(|t| effects.contains(&t.effect.as_str()));
    relevant.find(|taint| !tolerations.iter().any(|t| tolerates(t, taint)))
}

fn requirement_matches(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let number = |f: fn(i64, i64) -> bool| match (value, values) {
        (Some(own), [wanted]) => numbers(own, wanted).is_some_and(|(own, wanted)| f(own, wanted)),
        _ => false,
    };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|v| values.iter().any(|w| w == v)),
        "NotIn" => value.is_none_or(|v| values.iter().all(|w| w != v)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => number(|own, wanted| own > wanted),
        "Lt" => number(|own, wanted| own < wanted),
        _ => false,
    }
}

/// An empty term matches nothing.
fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let labels = labels_of(&node.metadata.labels);
    (!expressions.is_empty() || !fields.is_empty())
        && expressions.iter().all(|r| requirement_matches(r, labels.get(&r.key).map(String::as_str)))
        && fields.iter().all(|r| r.key == "metadata.name" && requirement_matches(r, Some(name(node))))
}

/// The node selector and the required node affinity.
pub fn matches_affinity(spec: &PodSpec, node: &Node) -> bool {
    let selected =
        spec.node_selector.as_ref().is_none_or(|s| contains_all(s, labels_of(&node.metadata.labels)));
    let affinity = spec.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
    let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    selected && required.is_none_or(|r| r.node_selector_terms.iter().any(|t| term_matches(t, node)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn affinity_and_taints() {
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": "n1", "labels": {"arch": "arm64", "cores": "4"}},
            "spec": {"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]},
        }))
        .unwrap();
        let term = |t| {
            let spec = json!({"containers": [], "affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [t]}}}});
            matches_affinity(&serde_json::from_value(spec).unwrap(), &node)
        };
        assert!(term(json!({"matchExpressions": [{"key": "arch", "operator": "In", "values": ["arm64"]}]})));
        assert!(term(json!({"matchExpressions": [{"key": "cores", "operator": "Gt", "values": ["3"]}]})));
        assert!(!term(json!({"matchExpressions": [{"key": "arch", "operator": "DoesNotExist"}]})));
        assert!(term(json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]})));
        assert!(!term(json!({})));
        let toleration = |t: serde_json::Value| vec![serde_json::from_value::<Toleration>(t).unwrap()];
        assert!(untolerated(&node, &[], &["NoSchedule"]).is_some());
        assert!(untolerated(&node, &[], &["NoExecute"]).is_none());
        let ok = toleration(json!({"key": "k", "value": "v", "effect": "NoSchedule"}));
        assert!(untolerated(&node, &ok, &["NoSchedule"]).is_none());
        assert!(untolerated(&node, &toleration(json!({"operator": "Exists"})), &["NoSchedule"]).is_none());
        assert!(
            untolerated(&node, &toleration(json!({"key": "k", "value": "x"})), &["NoSchedule"]).is_some()
        );
    }
}
