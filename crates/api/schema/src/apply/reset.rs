//! What a strategy puts back whatever a client sends, so that nobody owns it through that endpoint.
//!
//! Upstream: structured-merge-diff/v6/fieldpath (Filter, SetMatcher), as rest.ResetFieldsStrategy and
//! rest.ResetFieldsFilterStrategy use them.
use super::set::{FieldSet, PathElement};

/// The fields that an endpoint resets.
#[derive(Debug, Clone)]
pub enum Reset {
    /// These, with everything below them.
    Fields(FieldSet),
    /// Everything but what lies at or below one of these patterns; `*` stands for any step.
    AllBut(&'static [&'static [&'static str]]),
}

impl Reset {
    /// Of paths written with dots.
    pub fn fields<'a>(paths: impl IntoIterator<Item = &'a str>) -> Self {
        Self::Fields(FieldSet::of_paths(paths))
    }

    /// Takes what is reset out of the set.
    pub(crate) fn apply(&self, set: &mut FieldSet) {
        match self {
            Self::Fields(fields) => set.subtract_recursive(fields),
            Self::AllBut(patterns) => keep(set, patterns),
        }
    }
}

/// Keeps what a pattern, or the way to what a pattern names, covers.
fn keep(set: &mut FieldSet, patterns: &[&[&str]]) {
    set.nodes.retain_mut(|node| {
        let below: Vec<&[&str]> = patterns
            .iter()
            .filter_map(|pattern| pattern.split_first())
            .filter(|(first, _)| **first == "*" || is_field(&node.element, first))
            .map(|(_, rest)| rest)
            .collect();
        if below.is_empty() {
            return false;
        }
        if !below.iter().any(|rest| rest.is_empty()) {
            keep(&mut node.children, &below);
        }
        node.member || !node.children.is_empty()
    });
}

fn is_field(element: &PathElement, name: &str) -> bool {
    matches!(element, PathElement::Field(field) if **field == *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left() {
        let all =
            ["metadata.labels.a", "spec.containers.c.image", "spec.containers.c.resources.limits", "status"];
        let cases: [(Reset, &[&str]); 3] = [
            (Reset::fields(["status"]), &all[..3]),
            (Reset::fields(["spec", "metadata.labels"]), &["status"]),
            (Reset::AllBut(&[&["spec", "containers", "*", "resources"]]), &all[2..3]),
        ];
        for (reset, left) in cases {
            let mut set = FieldSet::of_paths(all);
            reset.apply(&mut set);
            assert_eq!(set, FieldSet::of_paths(left.iter().copied()), "{reset:?}");
        }
    }
}
