//! StorageClass.
//!
//! Upstream counterpart: pkg/registry/storage/storageclass, ValidateStorageClass in pkg/apis/storage/validation.
use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::apps::v1::workload::immutable;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::validate_label_name;
use crate::object::{count, default_absent, entries, items, text, truth};
use crate::table;

const PARAMETERS_MAX: usize = 512;
const PARAMETERS_MAX_BYTES: usize = 256 * 1024;
const POLICIES: &[&str] = &["Delete", "Retain"];
const MODES: &[&str] = &["Immediate", "WaitForFirstConsumer"];

/// The name of what provisions volumes.
pub(super) fn validate_provisioner(object: &Value, key: &str, errors: &mut ErrorList) {
    let name = text(object, &format!("/{key}"));
    match name {
        "" => errors.push(FieldError::required(&Path::new(key), "")),
        _ => errors.extend(validate_label_name(&name.to_lowercase(), &Path::new(key))),
    }
}

/// What the provisioner is told.
pub(super) fn validate_parameters(object: &Value, required: bool, errors: &mut ErrorList) {
    let path = Path::new("parameters");
    let found = count(object, "/parameters");
    if found > PARAMETERS_MAX {
        return errors.push(FieldError::too_long(&path, PARAMETERS_MAX));
    }
    let mut size_bytes = 0;
    for (key, value) in entries(object, "/parameters") {
        if key.is_empty() {
            errors.push(FieldError::invalid(&path, "", "field can not be empty."));
        }
        size_bytes += key.len() + value.as_str().map_or(0, str::len);
    }
    if size_bytes > PARAMETERS_MAX_BYTES {
        errors.push(FieldError::too_long(&path, PARAMETERS_MAX_BYTES));
    }
    if required && found == 0 {
        errors.push(FieldError::required(&path, "must contain at least one key/value pair"));
    }
}

/// The values that a topology term allows for each key.
fn validate_term(term: &Value, path: &Path, errors: &mut ErrorList) -> BTreeMap<String, BTreeSet<String>> {
    let mut found = BTreeMap::new();
    for (i, expression) in items(term, "/matchLabelExpressions").iter().enumerate() {
        let (at, key) = (path.child("matchLabelExpressions").index(i), text(expression, "/key"));
        let mut values = BTreeSet::new();
        let listed = items(expression, "/values");
        if listed.is_empty() {
            errors.push(FieldError::required(&at.child("values"), ""));
        }
        for (j, value) in listed.iter().filter_map(Value::as_str).enumerate() {
            if !values.insert(value.to_string()) {
                errors.push(FieldError::duplicate(&at.child("values").index(j), value));
            }
        }
        errors.extend(validate_label_name(key, &at.child("key")));
        if found.insert(key.to_string(), values).is_some() {
            errors.push(FieldError::duplicate(&at.child("key"), key));
        }
    }
    found
}

fn validate(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    validate_provisioner(object, "provisioner", &mut errors);
    validate_parameters(object, false, &mut errors);
    let policy = text(object, "/reclaimPolicy");
    if !policy.is_empty() && !POLICIES.contains(&policy) {
        errors.push(FieldError::not_supported(&Path::new("reclaimPolicy"), policy, POLICIES));
    }
    match object.get("volumeBindingMode").and_then(Value::as_str) {
        None => errors.push(FieldError::required(&Path::new("volumeBindingMode"), "")),
        Some(mode) if !MODES.contains(&mode) => {
            errors.push(FieldError::not_supported(&Path::new("volumeBindingMode"), mode, MODES));
        }
        Some(_) => {}
    }
    let mut seen = Vec::new();
    for (i, term) in items(object, "/allowedTopologies").iter().enumerate() {
        let at = Path::new("allowedTopologies").index(i);
        let term = validate_term(term, &at, &mut errors);
        if seen.contains(&term) {
            errors.push(FieldError::duplicate(&at.child("matchLabelExpressions"), ""));
        }
        seen.push(term);
    }
    errors
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let default = object.pointer("/metadata/annotations").is_some_and(|annotations| {
        ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"]
            .iter()
            .any(|key| annotations.get(key).is_some_and(|v| v == "true"))
    });
    let name = text(object, "/metadata/name");
    let or = |key: &str, default: &'static str| {
        object.get(key).and_then(Value::as_str).unwrap_or(default).to_string()
    };
    vec![
        if default { format!("{name} (default)") } else { name.to_string() }.into(),
        text(object, "/provisioner").into(),
        or("reclaimPolicy", "Delete").into(),
        or("volumeBindingMode", "Immediate").into(),
        truth(object, "/allowVolumeExpansion").into(),
        table::age(object, now),
    ]
}

pub const KIND: Kind = Kind {
    defaults: |object| {
        default_absent(object, "reclaimPolicy", "Delete");
        default_absent(object, "volumeBindingMode", "Immediate");
    },
    rest: Rest {
        validate,
        validate_update: |new, old| {
            let mut errors = ErrorList::new();
            for key in ["parameters", "provisioner", "reclaimPolicy", "volumeBindingMode"] {
                immutable(new, old, &format!("/{key}"), &Path::new(key), &mut errors);
            }
            errors
        },
        ..Rest::ANY
    },
    columns: &[
        Column::NAME,
        Column::string("Provisioner", "What provisions the volumes."),
        Column::string("ReclaimPolicy", "What becomes of volumes that are released."),
        Column::string("VolumeBindingMode", "When volumes are provisioned and bound."),
        Column::string("AllowVolumeExpansion", "Whether volumes can grow."),
        Column::AGE,
    ],
    row,
    ..Kind::plain("storage.k8s.io", "v1", "StorageClass")
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules() {
        let mut class = json!({"provisioner": "a/b"});
        (KIND.defaults)(&mut class);
        assert_eq!(validate(&class), Vec::new());
        let mut other = class.clone();
        other["reclaimPolicy"] = "Recycle".into();
        assert_eq!(
            validate(&other)[0].to_string(),
            "reclaimPolicy: Unsupported value: \"Recycle\": supported values: \"Delete\", \"Retain\""
        );
        let errors = (KIND.rest.validate_update)(&other, &class);
        assert_eq!(errors[0].to_string(), "reclaimPolicy: Invalid value: \"Recycle\": field is immutable");
    }
}
