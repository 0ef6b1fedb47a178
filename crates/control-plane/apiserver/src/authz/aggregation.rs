//! Cluster roles that take their rules from others. Upstream counterpart: pkg/controller/clusterroleaggregation.
use std::collections::BTreeMap;

use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};

use crate::selector::LabelSelector;

/// The rules that `role` should have, given all cluster roles; `None` when it takes none from others or has them.
pub fn aggregate<'a>(
    role: &ClusterRole,
    all: impl Iterator<Item = &'a ClusterRole>,
) -> Option<Vec<PolicyRule>> {
    if !super::escalation::takes_from_others(role) {
        return None;
    }
    let by_name: BTreeMap<&str, &ClusterRole> =
        all.filter_map(|r| r.metadata.name.as_deref().map(|name| (name, r))).collect();
    let selectors = role.aggregation_rule.as_ref().and_then(|r| r.cluster_role_selectors.as_deref());
    let mut rules: Vec<PolicyRule> = Vec::new();
    for selector in selectors.unwrap_or_default() {
        let selector = serde_json::to_value(selector).ok().and_then(|s| LabelSelector::from_object(&s));
        let Some(selector) = selector else { continue };
        for (name, other) in &by_name {
            let labels = other.metadata.labels.as_ref();
            let chosen = selector.matches(|key| labels.and_then(|l| l.get(key)).map(String::as_str));
            if !chosen || role.metadata.name.as_deref() == Some(*name) {
                continue;
            }
            for rule in other.rules.as_deref().unwrap_or_default() {
                if !rules.contains(rule) {
                    rules.push(rule.clone());
                }
            }
        }
    }
    (rules != role.rules.as_deref().unwrap_or_default()).then_some(rules)
}

#[cfg(test)]
mod tests {
    use super::super::rbac::tests::{cluster_role, rule};
    use super::*;
    use serde_json::json;

    #[test]
    fn takes_each_rule_once_in_the_order_of_names() {
        let labelled = |name: &str, rules| {
            let mut role = cluster_role(name, rules);
            role.metadata.labels = Some([("to".to_string(), "true".to_string())].into());
            role
        };
        let (get, list) = (rule(&["get"], &[""], &["pods"], &[]), rule(&["list"], &[""], &["pods"], &[]));
        let others = [
            labelled("b", vec![get.clone(), list.clone()]),
            labelled("a", vec![list.clone()]),
            cluster_role("c", vec![rule(&["delete"], &[""], &["pods"], &[])]),
        ];
        let mut role = labelled("all", Vec::new());
        role.aggregation_rule =
            serde_json::from_value(json!({"clusterRoleSelectors": [{"matchLabels": {"to": "true"}}]}))
                .unwrap();
        let rules = aggregate(&role, others.iter().chain([&role])).unwrap();
        assert_eq!(rules, [list, get]);
        role.rules = Some(rules);
        assert_eq!(aggregate(&role, others.iter()), None);
        assert_eq!(aggregate(&others[0], others.iter()), None);
    }
}
