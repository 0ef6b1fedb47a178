//! Topology spread constraints, and the label keys they share with pod affinity.
//!
//! Upstream counterpart: validateTopologySpreadConstraints and ValidateMatchLabelKeysAndMismatchLabelKeys.
use k8s_openapi::api::core::v1::PodSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::field::{ErrorList, FieldError, Path};
use crate::meta::{validate_label_name, validate_label_selector};

const POSITIVE: &str = "must be greater than zero";

pub fn validate(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let constraints = spec.topology_spread_constraints.as_deref().unwrap_or_default();
    for (i, constraint) in constraints.iter().enumerate() {
        let at = path.index(i);
        if constraint.max_skew <= 0 {
            errors.push(FieldError::invalid(&at.child("maxSkew"), constraint.max_skew, POSITIVE));
        }
        if constraint.topology_key.is_empty() {
            errors.push(FieldError::required(&at.child("topologyKey"), "can not be empty"));
        }
        let action = constraint.when_unsatisfiable.as_str();
        let actions = ["DoNotSchedule", "ScheduleAnyway"];
        if !actions.contains(&action) {
            errors.push(FieldError::not_supported(&at.child("whenUnsatisfiable"), action, &actions));
        }
        let repeats = |other: &&k8s_openapi::api::core::v1::TopologySpreadConstraint| {
            other.topology_key == constraint.topology_key && other.when_unsatisfiable == action
        };
        if constraints[i + 1..].iter().find(repeats).is_some() {
            let pair = format!("{{{}, {action}}}", constraint.topology_key);
            errors.push(FieldError::duplicate(&at.child("{topologyKey, whenUnsatisfiable}"), pair));
        }
        if let Some(domains) = constraint.min_domains {
            let at = at.child("minDomains");
            if domains <= 0 {
                errors.push(FieldError::invalid(&at, domains, POSITIVE));
            }
            if action != "DoNotSchedule" {
                let detail =
                    format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {action}");
                errors.push(FieldError::invalid(&at, domains, detail));
            }
        }
        for (key, policy) in [
            ("nodeAffinityPolicy", &constraint.node_affinity_policy),
            ("nodeTaintsPolicy", &constraint.node_taints_policy),
        ] {
            if let Some(policy) = policy.as_deref().filter(|p| !["Honor", "Ignore"].contains(p)) {
                errors.push(FieldError::not_supported(&at.child(key), policy, &["Honor", "Ignore"]));
            }
        }
        let keys = constraint.match_label_keys.as_deref().unwrap_or_default();
        validate_match_label_keys(&at, keys, &[], constraint.label_selector.as_ref(), errors);
        errors
            .extend(validate_label_selector(constraint.label_selector.as_ref(), &at.child("labelSelector")));
    }
}

pub fn validate_match_label_keys(
    path: &Path,
    keys: &[String],
    mismatch: &[String],
    selector: Option<&LabelSelector>,
    errors: &mut ErrorList,
) {
    for (name, keys) in [("matchLabelKeys", keys), ("mismatchLabelKeys", mismatch)] {
        let at = path.child(name);
        if !keys.is_empty() && selector.is_none() {
            errors.push(FieldError::forbidden(&at, "must not be specified when labelSelector is not set"));
            continue;
        }
        for (i, key) in keys.iter().enumerate() {
            errors.extend(validate_label_name(key, &at.index(i)));
        }
    }
    if let Some(selector) = selector {
        let mut seen: Vec<&str> = selector.match_labels.iter().flatten().map(|(k, _)| k.as_str()).collect();
        for expression in selector.match_expressions.iter().flatten() {
            // The key of its own that the server merged in is the first; another one is the user's.
            if let Some(i) = keys.iter().position(|k| *k == expression.key)
                && seen.contains(&expression.key.as_str())
            {
                let detail = "exists in both matchLabelKeys and labelSelector";
                errors.push(FieldError::invalid(&path.index(i), expression.key.as_str(), detail));
            }
            seen.push(&expression.key);
        }
    }
    for (i, key) in keys.iter().enumerate().filter(|(_, key)| mismatch.contains(key)) {
        let detail = "exists in both matchLabelKeys and mismatchLabelKeys";
        errors.push(FieldError::invalid(&path.child("matchLabelKeys").index(i), key.as_str(), detail));
    }
}
