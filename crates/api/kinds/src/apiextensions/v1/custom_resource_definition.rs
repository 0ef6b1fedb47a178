//! CustomResourceDefinition.
//!
//! Upstream counterpart: k8s.io/apiextensions-apiserver/pkg/registry/customresourcedefinition and
//! pkg/apis/apiextensions/{v1,validation}. Left out: whether schemas are structural, their defaults and expressions,
//! printer columns, selectable fields, and the API approval annotation.
use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::apps::v1::workload::immutable;
use crate::default_table;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Kind, Rest};
use crate::names;
use crate::object::{
    bump_generation, child, count, default_absent, default_zero, items, keep, same_in, set_generation, text,
    truth,
};

fn defaults(object: &mut Value) {
    let storage = storage_version(object);
    let spec = child(object, "spec");
    let kind = text(spec, "/names/kind").to_string();
    if !kind.is_empty() {
        let names = child(spec, "names");
        default_zero(names, "singular", kind.to_lowercase());
        default_zero(names, "listKind", format!("{kind}List"));
    }
    if spec.get("conversion").is_none_or(Value::is_null) {
        spec["conversion"] = json!({"strategy": "None"});
    }
    if let Some(service) = spec.pointer_mut("/conversion/webhook/clientConfig/service") {
        default_absent(service, "port", 443);
    }
    if let Some(storage) = storage.filter(|_| count(object, "/status/storedVersions") == 0) {
        child(object, "status")["storedVersions"] = json!([storage]);
    }
}

fn storage_version(object: &Value) -> Option<String> {
    let version = items(object, "/spec/versions").iter().find(|v| truth(v, "/storage"))?;
    Some(text(version, "/name").to_string())
}

/// The storage version is one of those that objects may be stored in.
fn note_stored_version(object: &mut Value) {
    let Some(storage) = storage_version(object) else { return };
    let mut stored = items(object, "/status/storedVersions").to_vec();
    if !stored.iter().any(|v| *v == storage) {
        stored.push(storage.into());
        child(object, "status")["storedVersions"] = stored.into();
    }
}

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let (group, plural) = (text(object, "/spec/group"), text(object, "/spec/names/plural"));
    let name = text(object, "/metadata/name");
    if name != format!("{plural}.{group}") {
        let at = Path::new("metadata").child("name");
        errors.push(FieldError::invalid(&at, name, "must be spec.names.plural+\".\"+spec.group"));
    }
    let at = path.child("group");
    match group {
        "" => errors.push(FieldError::required(&at, "")),
        _ => {
            let messages = names::dns1123_subdomain(group);
            if messages.is_empty() && !group.contains('.') {
                let detail = "should be a domain with at least one dot";
                errors.push(FieldError::invalid(&at, group, detail));
            }
            errors.extend(FieldError::invalid_each(&at, group, messages));
        }
    }
    let scope = text(object, "/spec/scope");
    if !["Cluster", "Namespaced"].contains(&scope) {
        let at = path.child("scope");
        match scope {
            "" => errors.push(FieldError::required(&at, "")),
            _ => errors.push(FieldError::not_supported(&at, scope, &["Cluster", "Namespaced"])),
        }
    }
    validate_names(object, &path.child("names"), &mut errors);
    validate_versions(object, &path.child("versions"), &mut errors);
    if truth(object, "/spec/preserveUnknownFields") {
        let detail = "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in \
                      spec.versions[*].schema instead";
        errors.push(FieldError::invalid(&path.child("preserveUnknownFields"), true, detail));
    }
    let conversion = text(object, "/spec/conversion/strategy");
    if !["None", "Webhook"].contains(&conversion) {
        let at = path.child("conversion").child("strategy");
        errors.push(FieldError::not_supported(&at, conversion, &["None", "Webhook"]));
    }
    errors
}

fn validate_names(object: &Value, path: &Path, errors: &mut ErrorList) {
    for (key, lower) in [("plural", true), ("singular", true), ("kind", false), ("listKind", false)] {
        let (at, value) = (path.child(key), text(object, &format!("/spec/names/{key}")));
        if value.is_empty() {
            errors.push(FieldError::required(&at, ""));
            continue;
        }
        let messages = names::dns1035_label(&value.to_lowercase());
        if !messages.is_empty() {
            let detail = match lower {
                true => messages.join(","),
                false => format!("may have mixed case, but should otherwise match: {}", messages.join(",")),
            };
            errors.push(FieldError::invalid(&at, value, detail));
        } else if lower && value != value.to_lowercase() {
            errors.push(FieldError::invalid(&at, value, names::dns1035_label(value).join(",")));
        }
    }
    for key in ["shortNames", "categories"] {
        let values = items(object, &format!("/spec/names/{key}"));
        for (i, value) in values.iter().filter_map(Value::as_str).enumerate() {
            let messages = names::dns1035_label(value);
            if !messages.is_empty() {
                errors.push(FieldError::invalid(&path.child(key).index(i), value, messages.join(",")));
            }
        }
    }
    let kind = text(object, "/spec/names/kind");
    if !kind.is_empty() && kind == text(object, "/spec/names/listKind") {
        let detail = "kind and listKind may not be the same";
        errors.push(FieldError::invalid(&path.child("listKind"), kind, detail));
    }
}

fn validate_versions(object: &Value, path: &Path, errors: &mut ErrorList) {
    let (versions, mut seen) = (items(object, "/spec/versions"), BTreeSet::new());
    let (mut stored, mut unique) = (0, true);
    for (i, version) in versions.iter().enumerate() {
        let (at, name) = (path.index(i), text(version, "/name"));
        stored += usize::from(truth(version, "/storage"));
        unique &= seen.insert(name);
        let messages = names::dns1035_label(name);
        if !messages.is_empty() {
            errors.push(FieldError::invalid(&at.child("name"), name, messages.join(",")));
        }
        let schema = version.pointer("/schema/openAPIV3Schema").filter(|s| !s.is_null());
        let at = at.child("schema").child("openAPIV3Schema");
        match schema {
            None => errors.push(FieldError::required(&at, "schemas are required")),
            Some(schema) if text(schema, "/type").is_empty() => {
                errors.push(FieldError::required(&at.child("type"), "must not be empty at the root"));
            }
            Some(schema) if text(schema, "/type") != "object" => {
                let detail = "must be object at the root";
                errors.push(FieldError::invalid(&at.child("type"), text(schema, "/type"), detail));
            }
            Some(_) => {}
        }
    }
    if !unique {
        let detail = "must contain unique version names";
        errors.push(FieldError::invalid(path, versions.to_vec(), detail));
    }
    if stored != 1 {
        let detail = "must have exactly one version marked as storage version";
        errors.push(FieldError::invalid(path, versions.to_vec(), detail));
    }
    validate_stored_versions(object, &seen, errors);
}

fn validate_stored_versions(object: &Value, versions: &BTreeSet<&str>, errors: &mut ErrorList) {
    let at = Path::new("status").child("storedVersions");
    let stored = items(object, "/status/storedVersions");
    if stored.is_empty() {
        let detail = "must have at least one stored version";
        errors.push(FieldError::invalid(&at, stored.to_vec(), detail));
        return;
    }
    for (i, version) in stored.iter().filter_map(Value::as_str).enumerate() {
        if !versions.contains(version) {
            let detail = format!(
                "missing from spec.versions; {version} was previously a storage version, and must remain in \
                 spec.versions until a storage migration ensures no data remains persisted in {version} and removes \
                 {version} from status.storedVersions"
            );
            errors.push(FieldError::invalid(&at.index(i), version, detail));
        }
    }
}

fn is_established(object: &Value) -> bool {
    let conditions = items(object, "/status/conditions").iter();
    conditions.into_iter().any(|c| text(c, "/type") == "Established" && text(c, "/status") == "True")
}

fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let mut errors = validate(new);
    let path = Path::new("spec");
    immutable(new, old, "/spec/group", &path.child("group"), &mut errors);
    immutable(new, old, "/spec/names/plural", &path.child("names").child("plural"), &mut errors);
    if is_established(old) {
        immutable(new, old, "/spec/scope", &path.child("scope"), &mut errors);
        immutable(new, old, "/spec/names/kind", &path.child("names").child("kind"), &mut errors);
    }
    errors
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({});
            set_generation(object, 1);
            note_stored_version(object);
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            bump_generation(new, old, !same_in(new, old, "/spec"));
            note_stored_version(new);
        },
        validate,
        validate_update,
        ..Rest::ANY
    },
    status: Some(Rest {
        prepare_update: |new, old| {
            // Only the status changes here; upstream keeps metadata but for managed fields too.
            keep(new, old, "spec");
            let empty = json!({});
            for key in ["labels", "annotations", "finalizers", "ownerReferences"] {
                keep(child(new, "metadata"), old.get("metadata").unwrap_or(&empty), key);
            }
        },
        ..Rest::ANY
    }),
    unconditional_update: false,
    columns: default_table::COLUMNS,
    row: default_table::row,
    ..Kind::plain("apiextensions.k8s.io", "v1", "CustomResourceDefinition")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        let mut crd = json!({
            "metadata": {"name": "foos.example.com"},
            "spec": {
                "group": "example.com", "scope": "Namespaced", "names": {"plural": "foos", "kind": "Foo"},
                "versions": [{"name": "v1", "served": true, "storage": true,
                    "schema": {"openAPIV3Schema": {"type": "object"}}}]
            }
        });
        defaults(&mut crd);
        (KIND.rest.prepare_create)(&mut crd);
        assert_eq!(validate(&crd), Vec::new());
        assert_eq!(crd["spec"]["names"]["listKind"], "FooList");
        assert_eq!(crd["status"]["storedVersions"], json!(["v1"]));
        let mut renamed = crd.clone();
        renamed["spec"]["versions"][0]["name"] = "v2".into();
        (KIND.rest.prepare_update)(&mut renamed, &crd);
        let errors: Vec<String> = validate_update(&renamed, &crd).iter().map(ToString::to_string).collect();
        assert_eq!(errors.len(), 1);
        assert!(
            errors[0]
                .starts_with("status.storedVersions[0]: Invalid value: \"v1\": missing from spec.versions")
        );
        crd["metadata"]["name"] = "x".into();
        crd["spec"]["versions"][0]["storage"] = false.into();
        let errors: Vec<String> = validate(&crd).iter().map(ToString::to_string).collect();
        assert_eq!(errors.len(), 2, "{errors:?}");
    }
}
