//! Matching labels. Upstream counterpart: apimachinery labels and meta/v1 helpers.
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector, SelectorExt};

pub type Labels = BTreeMap<String, String>;

static NO_LABELS: Labels = Labels::new();

/// The labels of an object's metadata.
pub fn labels_of(labels: &Option<Labels>) -> &Labels {
    labels.as_ref().unwrap_or(&NO_LABELS)
}

/// The selector; `None` when it is not valid, as nothing may be selected then.
pub fn selector(selector: &LabelSelector) -> Option<Selector> {
    Selector::try_from(selector.clone()).ok()
}

/// Whether an API label selector matches; an absent one matches nothing, an empty one everything.
pub fn matches(wanted: Option<&LabelSelector>, labels: &Labels) -> bool {
    wanted.and_then(selector).is_some_and(|s| s.matches(labels))
}

/// Whether all of `wanted` are among `labels`.
pub fn contains_all(wanted: &Labels, labels: &Labels) -> bool {
    wanted.iter().all(|(k, v)| labels.get(k) == Some(v))
}

pub fn is_empty(selector: &LabelSelector) -> bool {
    selector.match_labels.as_ref().is_none_or(BTreeMap::is_empty)
        && selector.match_expressions.as_ref().is_none_or(Vec::is_empty)
}
