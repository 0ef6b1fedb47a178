//! Label and node selectors, parsed once a pod. Upstream counterparts: apimachinery pkg/labels,
//! component-helpers/scheduling/corev1/nodeaffinity.
//!
//! A selector that cannot be parsed matches nothing.
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, PodSpec, PreferredSchedulingTerm,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

pub type Labels = BTreeMap<String, String>;

static NO_LABELS: Labels = Labels::new();

/// The labels of an object's metadata.
pub fn labels_of(labels: &Option<Labels>) -> &Labels {
    labels.as_ref().unwrap_or(&NO_LABELS)
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
    Greater(String, i64),
    Less(String, i64),
    Never,
}

impl Requirement {
    fn matches(&self, labels: &Labels) -> bool {
        let number = |key: &str| labels.get(key).and_then(|v| v.parse::<i64>().ok());
        match self {
            Self::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Self::NotIn(key, values) => labels.get(key).is_none_or(|v| !values.contains(v)),
            Self::Exists(key) => labels.contains_key(key),
            Self::DoesNotExist(key) => !labels.contains_key(key),
            Self::Greater(key, than) => number(key).is_some_and(|v| v > *than),
            Self::Less(key, than) => number(key).is_some_and(|v| v < *than),
            Self::Never => false,
        }
    }

    fn parse(key: &str, operator: &str, values: &[String]) -> Self {
        let bound = || values.first().filter(|_| values.len() == 1).and_then(|v| v.parse().ok());
        let key = key.to_string();
        match operator {
            "In" => Self::In(key, values.to_vec()),
            "NotIn" => Self::NotIn(key, values.to_vec()),
            "Exists" => Self::Exists(key),
            "DoesNotExist" => Self::DoesNotExist(key),
            "Gt" => bound().map_or(Self::Never, |b| Self::Greater(key, b)),
            "Lt" => bound().map_or(Self::Never, |b| Self::Less(key, b)),
            _ => Self::Never,
        }
    }
}

/// A conjunction of requirements; the empty one selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

impl Selector {
    pub fn nothing() -> Self {
        Self(vec![Requirement::Never])
    }

    /// From the API; an absent one selects nothing.
    pub fn of(selector: Option<&LabelSelector>) -> Self {
        let Some(selector) = selector else { return Self::nothing() };
        let mut parsed = Self::of_labels(labels_of(&selector.match_labels));
        for e in selector.match_expressions.iter().flatten() {
            let values = e.values.as_deref().unwrap_or_default();
            parsed.0.push(Requirement::parse(&e.key, &e.operator, values));
        }
        parsed
    }

    /// All of these labels.
    pub fn of_labels(labels: &Labels) -> Self {
        Self(labels.iter().map(|(k, v)| Requirement::In(k.clone(), vec![v.clone()])).collect())
    }

    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Selects everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|r| r.matches(labels))
    }
}

#[derive(Clone, Debug)]
struct NodeTerm {
    labels: Vec<Requirement>,
    /// (wanted or not, node name)
    names: Vec<(bool, String)>,
    valid: bool,
}

impl NodeTerm {
    /// `None` for an empty term, which matches no node.
    fn of(term: &NodeSelectorTerm) -> Option<Self> {
        let expressions = term.match_expressions.as_deref().unwrap_or_default();
        let fields = term.match_fields.as_deref().unwrap_or_default();
        if expressions.is_empty() && fields.is_empty() {
            return None;
        }
        let parse = |e: &NodeSelectorRequirement| {
            Requirement::parse(&e.key, &e.operator, e.values.as_deref().unwrap_or_default())
        };
        let labels: Vec<Requirement> = expressions.iter().map(parse).collect();
        let mut valid = !labels.contains(&Requirement::Never);
        let mut names = Vec::new();
        for field in fields {
            match (field.key.as_str(), field.operator.as_str(), field.values.as_deref()) {
                ("metadata.name", "In", Some([name])) => names.push((true, name.clone())),
                ("metadata.name", "NotIn", Some([name])) => names.push((false, name.clone())),
                _ => valid = false,
            }
        }
        Some(Self { labels, names, valid })
    }

    fn matches(&self, name: &str, labels: &Labels) -> bool {
        self.valid
            && self.labels.iter().all(|r| r.matches(labels))
            && self.names.iter().all(|(wanted, n)| (n == name) == *wanted)
    }
}

/// A pod's `nodeSelector` and required node affinity.
#[derive(Clone, Debug, Default)]
pub struct RequiredNodeAffinity {
    selector: Selector,
    /// Alternatives; `None` without required affinity.
    terms: Option<Vec<NodeTerm>>,
}

impl RequiredNodeAffinity {
    pub fn of(spec: &PodSpec) -> Self {
        let required = spec
            .affinity
            .as_ref()
            .and_then(|a| a.node_affinity.as_ref())
            .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
        Self {
            selector: Selector::of_labels(labels_of(&spec.node_selector)),
            terms: required.map(|r| r.node_selector_terms.iter().filter_map(NodeTerm::of).collect()),
        }
    }

    /// Nothing is required.
    pub fn is_empty(&self) -> bool {
        self.selector.is_empty() && self.terms.is_none()
    }

    pub fn matches(&self, node: &Node) -> bool {
        let labels = labels_of(&node.metadata.labels);
        let name = node.metadata.name.as_deref().unwrap_or_default();
        self.selector.matches(labels)
            && self.terms.as_ref().is_none_or(|terms| terms.iter().any(|t| t.matches(name, labels)))
    }
}

/// One required alternative alone, as in a PersistentVolume's node affinity.
pub fn any_term_matches(terms: &[NodeSelectorTerm], node: &Node) -> bool {
    let labels = labels_of(&node.metadata.labels);
    let name = node.metadata.name.as_deref().unwrap_or_default();
    terms.iter().filter_map(NodeTerm::of).any(|t| t.matches(name, labels))
}

/// Preferred node affinity: (weight, term).
#[derive(Clone, Debug, Default)]
pub struct PreferredNodeAffinity(Vec<(i64, NodeTerm)>);

impl PreferredNodeAffinity {
    pub fn of(terms: &[PreferredSchedulingTerm]) -> Self {
        let parse = |t: &PreferredSchedulingTerm| Some((i64::from(t.weight), NodeTerm::of(&t.preference)?));
        Self(terms.iter().filter_map(parse).filter(|(weight, _)| *weight != 0).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn score(&self, node: &Node) -> i64 {
        let labels = labels_of(&node.metadata.labels);
        let name = node.metadata.name.as_deref().unwrap_or_default();
        self.0.iter().filter(|(_, term)| term.matches(name, labels)).map(|(weight, _)| weight).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn node_affinity_is_upstreams() {
        let node: Node = serde_json::from_value(
            json!({"metadata": {"name": "n", "labels": {"arch": "arm64", "cores": "4"}}}),
        )
        .unwrap();
        let required = |terms: Value| {
            json!({"containers": [], "affinity": {"nodeAffinity":
            {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}})
        };
        let expression = |key: &str, operator: &str, values: Value| {
            required(json!([{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]))
        };
        for (spec, wanted) in [
            (json!({"containers": []}), true),
            (json!({"containers": [], "nodeSelector": {"arch": "arm64"}}), true),
            (json!({"containers": [], "nodeSelector": {"arch": "amd64"}}), false),
            (expression("arch", "In", json!(["arm64", "arm"])), true),
            (expression("arch", "NotIn", json!(["arm64"])), false),
            (expression("gpu", "NotIn", json!(["x"])), true),
            (expression("gpu", "DoesNotExist", json!([])), true),
            (expression("cores", "Gt", json!(["3"])), true),
            (expression("cores", "Lt", json!(["4"])), false),
            (expression("cores", "Gt", json!(["a"])), false),
            (required(json!([])), false),
            (required(json!([{}])), false),
            (
                required(
                    json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]}]),
                ),
                true,
            ),
            (
                required(
                    json!([{"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["n"]}]}]),
                ),
                false,
            ),
        ] {
            let text = spec.to_string();
            let spec: PodSpec = serde_json::from_value(spec).unwrap();
            assert_eq!(RequiredNodeAffinity::of(&spec).matches(&node), wanted, "{text}");
        }
    }
}
