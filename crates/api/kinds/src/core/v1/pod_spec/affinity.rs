//! Node affinity, pod affinity and node selectors.
//!
//! Upstream counterpart: validateAffinity, ValidateNodeSelector and validatePodAffinityTerm in validation.go.
use k8s_openapi::api::core::v1::{
    Affinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PodAffinityTerm,
    WeightedPodAffinityTerm,
};

use super::topology_spread::validate_match_label_keys;
use crate::field::{ErrorList, FieldError, Path};
use crate::meta::{validate_label_name, validate_label_selector};
use crate::names;

const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";
const BAD_OPERATOR: &str = "not a valid selector operator";
const WEIGHT: &str = "must be in the range 1-100";

pub fn validate(affinity: Option<&Affinity>, path: &Path, errors: &mut ErrorList) {
    let Some(affinity) = affinity else { return };
    if let Some(node) = &affinity.node_affinity {
        let at = path.child("nodeAffinity");
        if let Some(selector) = &node.required_during_scheduling_ignored_during_execution {
            validate_node_selector(selector, &at.child(REQUIRED), errors);
        }
        let preferred = node.preferred_during_scheduling_ignored_during_execution.iter().flatten();
        for (i, term) in preferred.enumerate() {
            let at = at.child(PREFERRED).index(i);
            validate_weight(term.weight, &at, errors);
            validate_term(&term.preference, true, &at.child("preference"), errors);
        }
    }
    if let Some(pod) = &affinity.pod_affinity {
        validate_pod_terms(
            pod.required_during_scheduling_ignored_during_execution.as_deref().unwrap_or_default(),
            pod.preferred_during_scheduling_ignored_during_execution.as_deref().unwrap_or_default(),
            &path.child("podAffinity"),
            errors,
        );
    }
    if let Some(pod) = &affinity.pod_anti_affinity {
        validate_pod_terms(
            pod.required_during_scheduling_ignored_during_execution.as_deref().unwrap_or_default(),
            pod.preferred_during_scheduling_ignored_during_execution.as_deref().unwrap_or_default(),
            &path.child("podAntiAffinity"),
            errors,
        );
    }
}

fn validate_weight(weight: i32, path: &Path, errors: &mut ErrorList) {
    if !(1..=100).contains(&weight) {
        errors.push(FieldError::invalid(&path.child("weight"), weight, WEIGHT));
    }
}

/// A node selector of any kind: at least one term.
pub fn validate_node_selector(selector: &NodeSelector, path: &Path, errors: &mut ErrorList) {
    let at = path.child("nodeSelectorTerms");
    if selector.node_selector_terms.is_empty() {
        errors.push(FieldError::required(&at, "must have at least one node selector term"));
    }
    for (i, term) in selector.node_selector_terms.iter().enumerate() {
        validate_term(term, false, &at.index(i), errors);
    }
}

/// Preferred terms may hold values that are no label values; they match nothing.
fn validate_term(term: &NodeSelectorTerm, any_value: bool, path: &Path, errors: &mut ErrorList) {
    for (i, requirement) in term.match_expressions.iter().flatten().enumerate() {
        validate_expression(requirement, any_value, &path.child("matchExpressions").index(i), errors);
    }
    for (i, requirement) in term.match_fields.iter().flatten().enumerate() {
        validate_field(requirement, &path.child("matchFields").index(i), errors);
    }
}

fn validate_expression(
    requirement: &NodeSelectorRequirement,
    any_value: bool,
    path: &Path,
    errors: &mut ErrorList,
) {
    let values = requirement.values.as_deref().unwrap_or_default();
    let at = path.child("values");
    match requirement.operator.as_str() {
        "In" | "NotIn" if values.is_empty() => {
            errors.push(FieldError::required(&at, "must be specified when `operator` is 'In' or 'NotIn'"));
        }
        "Exists" | "DoesNotExist" if !values.is_empty() => {
            let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
            errors.push(FieldError::forbidden(&at, detail));
        }
        "Gt" | "Lt" if values.len() != 1 => {
            let detail = "must be specified single value when `operator` is 'Lt' or 'Gt'";
            errors.push(FieldError::required(&at, detail));
        }
        "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
        other => errors.push(FieldError::invalid(&path.child("operator"), other, BAD_OPERATOR)),
    }
    errors.extend(validate_label_name(&requirement.key, &path.child("key")));
    for (i, value) in values.iter().enumerate().filter(|_| !any_value) {
        errors.extend(FieldError::invalid_each(&at.index(i), value, names::label_value(value)));
    }
}

fn validate_field(requirement: &NodeSelectorRequirement, path: &Path, errors: &mut ErrorList) {
    let values = requirement.values.as_deref().unwrap_or_default();
    match requirement.operator.as_str() {
        "In" | "NotIn" => {
            if values.len() != 1 {
                let detail =
                    "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
                errors.push(FieldError::required(&path.child("values"), detail));
            }
        }
        other => errors.push(FieldError::invalid(&path.child("operator"), other, BAD_OPERATOR)),
    }
    if requirement.key != "metadata.name" {
        let detail = "not a valid field selector key";
        errors.push(FieldError::invalid(&path.child("key"), requirement.key.as_str(), detail));
        return;
    }
    for (i, value) in values.iter().enumerate() {
        let at = path.child("values").index(i);
        errors.extend(FieldError::invalid_each(&at, value, names::dns1123_subdomain(value)));
    }
}

fn validate_pod_terms(
    required: &[PodAffinityTerm],
    preferred: &[WeightedPodAffinityTerm],
    path: &Path,
    errors: &mut ErrorList,
) {
    for (i, term) in required.iter().enumerate() {
        validate_pod_term(term, &path.child(REQUIRED).index(i), errors);
    }
    for (i, term) in preferred.iter().enumerate() {
        let at = path.child(PREFERRED).index(i);
        validate_weight(term.weight, &at, errors);
        validate_pod_term(&term.pod_affinity_term, &at.child("podAffinityTerm"), errors);
    }
}

fn validate_pod_term(term: &PodAffinityTerm, path: &Path, errors: &mut ErrorList) {
    errors.extend(validate_label_selector(term.label_selector.as_ref(), &path.child("labelSelector")));
    errors
        .extend(validate_label_selector(term.namespace_selector.as_ref(), &path.child("namespaceSelector")));
    for name in term.namespaces.iter().flatten() {
        errors.extend(FieldError::invalid_each(&path.child("namespace"), name, names::dns1123_label(name)));
    }
    let keys = term.match_label_keys.as_deref().unwrap_or_default();
    let mismatch = term.mismatch_label_keys.as_deref().unwrap_or_default();
    validate_match_label_keys(path, keys, mismatch, term.label_selector.as_ref(), errors);
    let at = path.child("topologyKey");
    if term.topology_key.is_empty() {
        errors.push(FieldError::required(&at, "can not be empty"));
    }
    errors.extend(validate_label_name(&term.topology_key, &at));
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::check;

    #[test]
    fn affinity_rules() {
        let node = |terms: Value| json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}});
        let at =
            "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms";
        let pod = "spec.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0]";
        let cases: Vec<(Value, String)> = vec![
            (node(json!([])), format!("{at}: Required value: must have at least one node selector term")),
            (node(json!([{"matchExpressions": [{"key": "a", "operator": "In"}]}])), format!("{at}[0].matchExpressions[0].values: Required value: must be specified when `operator` is 'In' or 'NotIn'")),
            (node(json!([{"matchExpressions": [{"key": "a", "operator": "x"}]}])), format!("{at}[0].matchExpressions[0].operator: Invalid value: \"x\": not a valid selector operator")),
            (node(json!([{"matchFields": [{"key": "a", "operator": "In", "values": ["x"]}]}])), format!("{at}[0].matchFields[0].key: Invalid value: \"a\": not a valid field selector key")),
            (json!({"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": ""}]}}}), format!("{pod}.topologyKey: Required value: can not be empty")),
            (json!({"topologySpreadConstraints": [{"maxSkew": 0, "topologyKey": "a", "whenUnsatisfiable": "DoNotSchedule"}]}), "spec.topologySpreadConstraints[0].maxSkew: Invalid value: 0: must be greater than zero".to_string()),
            (json!({"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "a", "whenUnsatisfiable": "x"}]}), "spec.topologySpreadConstraints[0].whenUnsatisfiable: Unsupported value: \"x\": supported values: \"DoNotSchedule\", \"ScheduleAnyway\"".to_string()),
            (json!({"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]}), "spec.tolerations[0].operator: Invalid value: \"x\": value must be empty when `operator` is 'Exists'".to_string()),
            (json!({"tolerations": [{"operator": "Equal"}]}), "spec.tolerations[0].operator: Invalid value: \"Equal\": operator must be Exists when `key` is empty".to_string()),
            (json!({"dnsPolicy": "None"}), "spec.dnsConfig: Required value: must provide `dnsConfig` when `dnsPolicy` is None".to_string()),
            (json!({"dnsConfig": {"nameservers": ["x"]}}), "spec.dnsConfig.nameservers[0]: Invalid value: \"x\": must be a valid IP address".to_string()),
            (json!({"hostAliases": [{"ip": "1.2.3.4", "hostnames": ["A"]}]}), "spec.hostAliases[0].hostnames[0]: Invalid value: \"A\"".to_string()),
        ];
        for (patch, want) in cases {
            let got = check(patch.clone(), true);
            assert!(got.first().is_some_and(|got| got.starts_with(&want)), "{patch}: {got:?}");
        }
    }
}
