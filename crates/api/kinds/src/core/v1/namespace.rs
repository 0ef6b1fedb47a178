//! Namespace.
//!
//! Upstream counterpart: pkg/registry/core/namespace/strategy.go.
use serde_json::{Value, json};

use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, NameRule, Rest};
use crate::meta::{validate_finalizer_standard, validate_label_name};
use crate::object::{child, default_zero, items, keep, text};
use crate::table;

fn defaults(object: &mut Value) {
    let name = text(object, "/metadata/name").to_string();
    if !name.is_empty() {
        child(child(object, "metadata"), "labels")["kubernetes.io/metadata.name"] = name.into();
    }
    default_zero(child(object, "status"), "phase", "Active");
}

fn prepare_create(object: &mut Value) {
    object["status"] = json!({"phase": "Active"});
    if !items(object, "/spec/finalizers").iter().any(|f| f == "kubernetes") {
        let mut finalizers = items(object, "/spec/finalizers").to_vec();
        finalizers.push("kubernetes".into());
        child(object, "spec")["finalizers"] = finalizers.into();
    }
}

fn prepare_update(new: &mut Value, old: &Value) {
    let stored = old.get("spec").cloned().unwrap_or_default();
    keep(child(new, "spec"), &stored, "finalizers");
    keep(new, old, "status");
}

fn finalizers(object: &Value, indexed: bool) -> ErrorList {
    let path = Path::new("spec").child("finalizers");
    let mut errors = ErrorList::new();
    for (i, finalizer) in items(object, "/spec/finalizers").iter().filter_map(Value::as_str).enumerate() {
        let at = if indexed { path.index(i) } else { path.clone() };
        errors.extend(validate_label_name(finalizer, &at));
        errors.extend(validate_finalizer_standard(finalizer, &at));
    }
    errors
}

fn validate_status(new: &Value, _: &Value) -> ErrorList {
    let deleted = new.pointer("/metadata/deletionTimestamp").is_some_and(|t| !t.is_null());
    let phase = text(new, "/status/phase");
    let (want, detail) = match deleted {
        false => ("Active", "may only be 'Active' if `deletionTimestamp` is empty"),
        true => ("Terminating", "may only be 'Terminating' if `deletionTimestamp` is not empty"),
    };
    match phase == want {
        true => ErrorList::new(),
        false => vec![FieldError::invalid(&Path::new("status").child("Phase"), phase, detail)],
    }
}

/// The rules of the `finalize` subresource.
pub const FINALIZE: Rest = Rest {
    prepare_update: |new, old| keep(new, old, "status"),
    validate_update: |new, _| finalizers(new, true),
    ..Rest::ANY
};

pub const KIND: Kind = Kind {
    name_rule: NameRule::DnsLabel,
    defaults,
    rest: Rest {
        prepare_create,
        prepare_update,
        validate: |object| finalizers(object, false),
        validate_update: |new, _| finalizers(new, false),
        ..Rest::ANY
    },
    status: Some(Rest {
        prepare_update: |new, old| keep(new, old, "spec"),
        validate_update: validate_status,
        ..Rest::ANY
    }),
    subresources: &[("finalize", FINALIZE)],
    columns: &[Column::NAME, Column::string("Status", "The status of the namespace"), Column::AGE],
    row: |object, now| {
        vec![table::name(object), text(object, "/status/phase").into(), table::age(object, now)]
    },
    selectable: |object| vec![("status.phase", text(object, "/status/phase").to_string())],
    ..Kind::plain("", "v1", "Namespace")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn create() {
        let mut namespace = json!({"metadata": {"name": "a"}, "spec": {"finalizers": ["x"]}});
        defaults(&mut namespace);
        prepare_create(&mut namespace);
        assert_eq!(namespace["metadata"]["labels"]["kubernetes.io/metadata.name"], "a");
        assert_eq!(namespace["spec"]["finalizers"], json!(["x", "kubernetes"]));
        assert_eq!(
            (KIND.rest.validate)(&namespace)[0].to_string(),
            "spec.finalizers: Invalid value: \"x\": name is neither a standard finalizer name nor is it fully qualified"
        );
        namespace["status"]["phase"] = "Terminating".into();
        assert_eq!(validate_status(&namespace, &namespace).len(), 1);
    }
}
