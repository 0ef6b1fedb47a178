//! The rules that Role and ClusterRole hold.
//!
//! Upstream counterpart: ValidatePolicyRule in pkg/apis/rbac/validation.
use serde_json::Value;

use crate::field::{ErrorList, FieldError, Path};
use crate::object::{count, items};

/// All that is wrong with `rules`. A namespaced role can't allow paths that are no resources.
pub fn validate_rules(object: &Value, namespaced: bool) -> ErrorList {
    let mut errors = ErrorList::new();
    for (i, rule) in items(object, "/rules").iter().enumerate() {
        validate_rule(rule, namespaced, &Path::new("rules").index(i), &mut errors);
    }
    errors
}

fn validate_rule(rule: &Value, namespaced: bool, path: &Path, errors: &mut ErrorList) {
    let has = |key: &str| count(rule, &format!("/{key}")) > 0;
    if !has("verbs") {
        errors.push(FieldError::required(&path.child("verbs"), "verbs must contain at least one value"));
    }
    if has("nonResourceURLs") {
        let (at, urls) = (path.child("nonResourceURLs"), items(rule, "/nonResourceURLs").to_vec());
        if namespaced {
            let detail = "namespaced rules cannot apply to non-resource URLs";
            errors.push(FieldError::invalid(&at, urls.clone(), detail));
        }
        if has("apiGroups") || has("resources") || has("resourceNames") {
            let detail = "rules cannot apply to both regular resources and non-resource URLs";
            errors.push(FieldError::invalid(&at, urls, detail));
        }
        return;
    }
    if !has("apiGroups") {
        let detail = "resource rules must supply at least one api group";
        errors.push(FieldError::required(&path.child("apiGroups"), detail));
    }
    if !has("resources") {
        let detail = "resource rules must supply at least one resource";
        errors.push(FieldError::required(&path.child("resources"), detail));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules() {
        let cases: Vec<(Value, bool, &[&str])> = vec![
            (json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}), true, &[]),
            (json!({"verbs": ["get"], "nonResourceURLs": ["/x"]}), false, &[]),
            (
                json!({"verbs": ["get"], "nonResourceURLs": ["/x"]}),
                true,
                &[
                    "rules[0].nonResourceURLs: Invalid value: [\"/x\"]: namespaced rules cannot apply to non-resource URLs",
                ],
            ),
            (
                json!({}),
                false,
                &[
                    "rules[0].verbs: Required value: verbs must contain at least one value",
                    "rules[0].apiGroups: Required value: resource rules must supply at least one api group",
                    "rules[0].resources: Required value: resource rules must supply at least one resource",
                ],
            ),
        ];
        for (rule, namespaced, want) in cases {
            let errors = validate_rules(&json!({"rules": [rule]}), namespaced);
            assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), want, "{rule}");
        }
    }
}
