//! What RoleBinding and ClusterRoleBinding have in common.
//!
//! Upstream counterpart: ValidateRoleBinding and ValidateClusterRoleBinding in pkg/apis/rbac/validation.
use serde_json::Value;

use super::GROUP;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::Column;
use crate::names;
use crate::object::{child, default_zero, items, items_mut, same_in, text};
use crate::table;

pub fn defaults(object: &mut Value) {
    default_zero(child(object, "roleRef"), "apiGroup", GROUP);
    for subject in items_mut(object, "/subjects") {
        if ["User", "Group"].contains(&text(subject, "/kind")) {
            default_zero(subject, "apiGroup", GROUP);
        }
    }
}

/// All that is wrong with a binding, which may refer to those kinds of roles.
pub fn validate(object: &Value, kinds: &[&str], namespaced: bool) -> ErrorList {
    let mut errors = ErrorList::new();
    let path = Path::new("roleRef");
    let (group, kind, name) =
        (text(object, "/roleRef/apiGroup"), text(object, "/roleRef/kind"), text(object, "/roleRef/name"));
    if group != GROUP {
        errors.push(FieldError::not_supported(&path.child("apiGroup"), group, &[GROUP]));
    }
    if !kinds.contains(&kind) {
        errors.push(FieldError::not_supported(&path.child("kind"), kind, kinds));
    }
    if name.is_empty() {
        errors.push(FieldError::required(&path.child("name"), ""));
    } else {
        errors.extend(FieldError::invalid_each(&path.child("name"), name, names::path_segment(name, false)));
    }
    for (i, subject) in items(object, "/subjects").iter().enumerate() {
        validate_subject(subject, namespaced, &Path::new("subjects").index(i), &mut errors);
    }
    errors
}

fn validate_subject(subject: &Value, namespaced: bool, path: &Path, errors: &mut ErrorList) {
    let (name, group) = (text(subject, "/name"), text(subject, "/apiGroup"));
    if name.is_empty() {
        errors.push(FieldError::required(&path.child("name"), ""));
    }
    match text(subject, "/kind") {
        "ServiceAccount" => {
            if !name.is_empty() {
                let messages = names::dns1123_subdomain(name);
                errors.extend(FieldError::invalid_each(&path.child("name"), name, messages));
            }
            if !group.is_empty() {
                errors.push(FieldError::not_supported(&path.child("apiGroup"), group, &[""]));
            }
            if !namespaced && text(subject, "/namespace").is_empty() {
                errors.push(FieldError::required(&path.child("namespace"), ""));
            }
        }
        "User" | "Group" => {
            if group != GROUP {
                errors.push(FieldError::not_supported(&path.child("apiGroup"), group, &[GROUP]));
            }
        }
        kind => {
            let kinds = ["ServiceAccount", "User", "Group"];
            errors.push(FieldError::not_supported(&path.child("kind"), kind, &kinds));
        }
    }
}

/// The role that is bound can't be exchanged for another.
pub fn validate_same_role(new: &Value, old: &Value, errors: &mut ErrorList) {
    if !same_in(new, old, "/roleRef") {
        let role = new.get("roleRef").cloned().unwrap_or_default();
        errors.push(FieldError::invalid(&Path::new("roleRef"), role, "cannot change roleRef"));
    }
}

pub const COLUMNS: &[Column] = &[
    Column::NAME,
    Column::string("Role", "The role that the subjects get."),
    Column::AGE,
    Column::string("Users", "Users in the binding").wide(),
    Column::string("Groups", "Groups in the binding").wide(),
    Column::string("ServiceAccounts", "ServiceAccounts in the binding").wide(),
];

pub fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let subjects = |kind: &str| -> Value {
        let of_kind = items(object, "/subjects").iter().filter(|s| text(s, "/kind") == kind);
        let shown: Vec<String> = of_kind
            .map(|s| match kind {
                "ServiceAccount" => format!("{}/{}", text(s, "/namespace"), text(s, "/name")),
                _ => text(s, "/name").to_string(),
            })
            .collect();
        shown.join(", ").into()
    };
    vec![
        table::name(object),
        format!("{}/{}", text(object, "/roleRef/kind"), text(object, "/roleRef/name")).into(),
        table::age(object, now),
        subjects("User"),
        subjects("Group"),
        subjects("ServiceAccount"),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules() {
        let binding = |subject: Value| {
            let mut object = json!({"roleRef": {"kind": "ClusterRole", "name": "r"}, "subjects": [subject]});
            defaults(&mut object);
            validate(&object, &["ClusterRole"], false).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(binding(json!({"kind": "User", "name": "a"})), Vec::<String>::new());
        assert_eq!(
            binding(json!({"kind": "ServiceAccount", "name": "a", "namespace": "n"})),
            Vec::<String>::new()
        );
        assert_eq!(
            binding(json!({"kind": "ServiceAccount", "name": "a"})),
            ["subjects[0].namespace: Required value"]
        );
        assert_eq!(
            binding(json!({"kind": "User", "name": "", "apiGroup": "x"})),
            [
                "subjects[0].name: Required value",
                "subjects[0].apiGroup: Unsupported value: \"x\": supported values: \"rbac.authorization.k8s.io\"",
            ]
        );
        let mut errors = ErrorList::new();
        let (a, b) = (json!({"roleRef": {"name": "a"}}), json!({"roleRef": {"name": "b"}}));
        validate_same_role(&a, &b, &mut errors);
        assert_eq!(errors[0].to_string(), "roleRef: Invalid value: {\"name\":\"a\"}: cannot change roleRef");
    }
}
