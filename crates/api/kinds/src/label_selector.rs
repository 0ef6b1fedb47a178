//! Label selectors: whether they match labels, and how they are written.
//!
//! Upstream counterpart: LabelSelectorAsSelector and FormatLabelSelector in k8s.io/apimachinery/pkg/apis/meta/v1. What
//! stays true: no selector matches nothing, an empty one everything. Whether a selector is well-formed is
//! [`crate::meta::validate_label_selector`]'s to say.
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use serde_json::Value;

use crate::field::Path;
use crate::meta::validate_label_selector;
use crate::object::read;

/// True where the selector could be turned into requirements.
pub fn is_valid(selector: Option<&LabelSelector>) -> bool {
    validate_label_selector(selector, &Path::default()).is_empty()
}

/// True where there is a selector without any requirement.
pub fn is_empty(selector: &LabelSelector) -> bool {
    selector.match_labels.as_ref().is_none_or(BTreeMap::is_empty)
        && selector.match_expressions.as_ref().is_none_or(Vec::is_empty)
}

/// Whether the selector selects those labels.
pub fn matches(selector: Option<&LabelSelector>, labels: &BTreeMap<String, String>) -> bool {
    selector.is_some_and(|selector| {
        selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value))
            && selector.match_expressions.iter().flatten().all(|r| requirement_matches(r, labels))
    })
}

fn requirement_matches(requirement: &LabelSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let value = labels.get(&requirement.key);
    let listed = || value.is_some_and(|v| requirement.values.iter().flatten().any(|wanted| wanted == v));
    match requirement.operator.as_str() {
        "In" => listed(),
        "NotIn" => !listed(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        _ => false,
    }
}

/// A selector as tables show it: `a=b,c in (d,e),!f`.
pub fn cell(selector: Option<&Value>) -> Value {
    let Some(value) = selector.filter(|s| !s.is_null()) else { return "<none>".into() };
    let Ok(selector) = read::<LabelSelector>(Some(value), &Path::default()) else { return "<error>".into() };
    if !is_valid(Some(&selector)) {
        return "<error>".into();
    }
    let mut parts: Vec<(String, String)> =
        selector.match_labels.into_iter().flatten().map(|(k, v)| (k.clone(), format!("{k}={v}"))).collect();
    for requirement in selector.match_expressions.into_iter().flatten() {
        let (key, values) = (requirement.key, requirement.values.unwrap_or_default());
        let values: Vec<String> = values.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
        let text = match requirement.operator.as_str() {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.clone(),
        };
        parts.push((key, text));
    }
    parts.sort_by(|a, b| a.0.cmp(&b.0));
    let parts: Vec<String> = parts.into_iter().map(|(_, text)| text).collect();
    crate::table::or_none(&parts.join(","))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn matching_and_writing() {
        let labels = BTreeMap::from([("a".to_string(), "1".to_string())]);
        let cases = [
            (json!({}), true, "<none>"),
            (json!({"matchLabels": {"a": "1"}}), true, "a=1"),
            (json!({"matchLabels": {"a": "2"}}), false, "a=2"),
            (
                json!({"matchExpressions": [{"key": "a", "operator": "In", "values": ["2", "1"]}]}),
                true,
                "a in (1,2)",
            ),
            (
                json!({"matchExpressions": [{"key": "b", "operator": "NotIn", "values": ["2"]}]}),
                true,
                "b notin (2)",
            ),
            (json!({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}), false, "!a"),
            (json!({"matchExpressions": [{"key": "a", "operator": "x"}]}), false, "<error>"),
        ];
        for (selector, want, text) in cases {
            let parsed: LabelSelector = serde_json::from_value(selector.clone()).unwrap();
            assert_eq!(matches(Some(&parsed), &labels), want, "{selector}");
            assert_eq!(cell(Some(&selector)), text, "{selector}");
        }
        assert!(!matches(None, &labels));
    }
}
