//! Binding: a pod's place. It is never stored; the API server writes the pod.
//!
//! Upstream counterpart: ValidatePodBinding in validation.go.
use serde_json::Value;

use crate::field::{ErrorList, FieldError, Path};
use crate::object::text;

/// All that is wrong with a Binding.
pub fn validate(binding: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let (kind, path) = (text(binding, "/target/kind"), Path::new("target"));
    if !kind.is_empty() && kind != "Node" {
        errors.push(FieldError::not_supported(&path.child("kind"), kind, &["Node", "<empty>"]));
    }
    if text(binding, "/target/name").is_empty() {
        errors.push(FieldError::required(&path.child("name"), ""));
    }
    errors
}

#[cfg(test)]
mod tests {
    #[test]
    fn targets() {
        let errors = super::validate(&serde_json::json!({"target": {"kind": "Pod"}}));
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "target.kind: Unsupported value: \"Pod\": supported values: \"<empty>\", \"Node\"",
                "target.name: Required value"
            ]
        );
    }
}
