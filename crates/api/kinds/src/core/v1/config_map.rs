//! ConfigMap.
//!
//! Upstream counterpart: pkg/registry/core/configmap, ValidateConfigMap in validation.go. Deliberately different:
//! `data` is not defaulted to {}, since an empty map and none are the same on the wire.
use serde_json::Value;

use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::names;
use crate::object::{count, entries, same_in, truth};
use crate::table;

/// What a ConfigMap or Secret may hold altogether.
pub const MAX_SIZE_BYTES: usize = 1024 * 1024;

fn validate(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let mut size_bytes = 0;
    for field in ["data", "binaryData"] {
        let path = Path::new(field);
        for (key, value) in entries(object, &format!("/{field}")) {
            errors.extend(FieldError::invalid_each(&path.key(key), key, names::config_map_key(key)));
            let value = value.as_str().unwrap_or_default();
            if field == "data" {
                if object.get("binaryData").is_some_and(|b| b.get(key).is_some()) {
                    let detail = "duplicate of key present in binaryData";
                    errors.push(FieldError::invalid(&path.key(key), key.as_str(), detail));
                }
                size_bytes += value.len();
            } else {
                size_bytes += decoded_len(value);
            }
        }
    }
    if size_bytes > MAX_SIZE_BYTES {
        errors.push(FieldError::too_long(&Path::new(""), MAX_SIZE_BYTES));
    }
    errors
}

/// How many bytes base64 text stands for.
pub(super) fn decoded_len(base64: &str) -> usize {
    base64.trim_end_matches('=').len() * 3 / 4
}

/// The rules of `immutable: true`, which Secret shares.
pub(super) fn validate_immutable(new: &Value, old: &Value, fields: &[&str], errors: &mut ErrorList) {
    if !truth(old, "/immutable") {
        return;
    }
    let detail = "field is immutable when `immutable` is set";
    if !truth(new, "/immutable") {
        errors.push(FieldError::forbidden(&Path::new("immutable"), detail));
    }
    for field in fields.iter().filter(|field| !same_in(new, old, &format!("/{field}"))) {
        errors.push(FieldError::forbidden(&Path::new(field), detail));
    }
}

pub const KIND: Kind = Kind {
    rest: Rest {
        validate,
        validate_update: |new, old| {
            let mut errors = ErrorList::new();
            validate_immutable(new, old, &["data", "binaryData"], &mut errors);
            errors.extend(validate(new));
            errors
        },
        ..Rest::ANY
    },
    columns: &[Column::NAME, Column::string("Data", "How many keys there are."), Column::AGE],
    row: |object, now| {
        let keys = count(object, "/data") + count(object, "/binaryData");
        vec![table::name(object), keys.into(), table::age(object, now)]
    },
    ..Kind::plain("", "v1", "ConfigMap")
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules() {
        let texts = |errors: ErrorList| -> Vec<String> { errors.iter().map(ToString::to_string).collect() };
        assert_eq!(texts(validate(&json!({"data": {"a": "x"}}))), Vec::<String>::new());
        assert!(
            texts(validate(&json!({"data": {"a b": ""}})))[0]
                .starts_with("data[a b]: Invalid value: \"a b\": a valid config key")
        );
        let big = json!({"data": {"a": "x".repeat(MAX_SIZE_BYTES + 1)}});
        assert_eq!(texts(validate(&big)), ["[]: Too long: may not be more than 1048576 bytes"]);
        let old = json!({"immutable": true, "data": {"a": "1"}});
        let got = texts((KIND.rest.validate_update)(&json!({"immutable": true, "data": {"a": "2"}}), &old));
        assert_eq!(got, ["data: Forbidden: field is immutable when `immutable` is set"]);
    }
}
