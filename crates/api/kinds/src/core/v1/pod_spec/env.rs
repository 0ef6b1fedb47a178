//! Environment variables and where their values come from.
//!
//! Upstream counterpart: ValidateEnv, ValidateEnvFrom and their selectors in pkg/apis/core/validation/validation.go.
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, EnvVar, FileKeySelector, ObjectFieldSelector, PodSpec, ResourceFieldSelector, Volume,
};

use super::visit_containers;
use super::volumes::path_no_backsteps;
use crate::field::{ErrorList, FieldError, Path};
use crate::meta::validate_label_name;
use crate::names;
use crate::object::or_empty;
use crate::quantity;

/// Fields of the pod that an environment variable may show.
const ENV_FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
/// Fields of the pod that a file may show.
pub const VOLUME_FIELDS: &[&str] =
    &["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
const RESOURCES: &[&str] = &[
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];
const SIZE_DIVISORS: &[&str] =
    &["1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"];

pub fn validate_env(container: &Container, path: &Path, errors: &mut ErrorList) {
    for (i, variable) in container.env.iter().flatten().enumerate() {
        let at = path.index(i);
        if variable.name.is_empty() {
            errors.push(FieldError::required(&at.child("name"), ""));
        } else {
            let messages = names::env_var_name(&variable.name);
            errors.extend(FieldError::invalid_each(&at.child("name"), &variable.name, messages));
        }
        validate_value_from(variable, &at.child("valueFrom"), errors);
    }
}

fn validate_value_from(variable: &EnvVar, path: &Path, errors: &mut ErrorList) {
    let Some(from) = &variable.value_from else { return };
    let mut sources = 0;
    if let Some(field) = &from.field_ref {
        sources += 1;
        validate_field_ref(field, ENV_FIELDS, &path.child("fieldRef"), errors);
    }
    if let Some(resource) = &from.resource_field_ref {
        sources += 1;
        validate_resource_field_ref(resource, false, &path.child("resourceFieldRef"), errors);
    }
    if let Some(key) = &from.config_map_key_ref {
        sources += 1;
        validate_key_ref(&key.name, &key.key, &path.child("configMapKeyRef"), errors);
    }
    if let Some(key) = &from.secret_key_ref {
        sources += 1;
        validate_key_ref(&key.name, &key.key, &path.child("secretKeyRef"), errors);
    }
    if let Some(key) = &from.file_key_ref {
        sources += 1;
        validate_file_key_ref(key, &path.child("fileKeyRef"), errors);
    }
    if sources == 0 {
        let detail = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or \
                      `fileKeyRef`";
        errors.push(FieldError::invalid(path, "", detail));
    } else if !or_empty(&variable.value).is_empty() {
        errors.push(FieldError::invalid(path, "", "may not be specified when `value` is not empty"));
    } else if sources > 1 {
        errors.push(FieldError::invalid(path, "", "may not have more than one field specified at a time"));
    }
}

/// Splits `metadata.labels['app']` into path and key.
pub fn split_subscript(field_path: &str) -> Option<(&str, &str)> {
    field_path.strip_suffix("']")?.split_once("['").filter(|(path, _)| !path.is_empty())
}

pub fn validate_field_ref(
    field: &ObjectFieldSelector,
    allowed: &[&str],
    path: &Path,
    errors: &mut ErrorList,
) {
    let (version, label) = (or_empty(&field.api_version), field.field_path.as_str());
    if version.is_empty() {
        errors.push(FieldError::required(&path.child("apiVersion"), ""));
        return;
    }
    let at = path.child("fieldPath");
    if label.is_empty() {
        errors.push(FieldError::required(&at, ""));
        return;
    }
    let refused =
        |reason: String| FieldError::invalid(&at, label, format!("error converting fieldPath: {reason}"));
    if version != "v1" {
        errors.push(refused(format!("unsupported pod version: {version}")));
        return;
    }
    if let Some((base, key)) = split_subscript(label) {
        match base {
            "metadata.annotations" => errors.extend(validate_label_name(&key.to_lowercase(), path)),
            "metadata.labels" => errors.extend(validate_label_name(key, path)),
            _ => errors.push(refused(format!("field label does not support subscript: {label}"))),
        }
        return;
    }
    let shown = if label == "spec.host" { "spec.nodeName" } else { label };
    let known = ENV_FIELDS.contains(&shown)
        || VOLUME_FIELDS.contains(&shown)
        || ["spec.restartPolicy", "spec.schedulerName", "status.phase"].contains(&shown);
    if !known {
        errors.push(refused(format!("field label not supported: {label}")));
    } else if !allowed.contains(&shown) {
        errors.push(FieldError::not_supported(&at, shown, allowed));
    }
}

pub fn validate_resource_field_ref(
    field: &ResourceFieldSelector,
    is_volume: bool,
    path: &Path,
    errors: &mut ErrorList,
) {
    let resource = field.resource.as_str();
    let huge_pages = resource.starts_with("limits.hugepages-") || resource.starts_with("requests.hugepages-");
    if is_volume && or_empty(&field.container_name).is_empty() {
        errors.push(FieldError::required(&path.child("containerName"), ""));
    } else if resource.is_empty() {
        errors.push(FieldError::required(&path.child("resource"), ""));
    } else if !RESOURCES.contains(&resource) && !huge_pages {
        errors.push(FieldError::not_supported(&path.child("resource"), resource, RESOURCES));
    }
    let divisor = field.divisor.as_ref().map(quantity::text).unwrap_or_default();
    if divisor.is_empty() || divisor == "0" {
        return;
    }
    let (allowed, what): (&[&str], &str) = match resource.split_once('.').map_or("", |(_, name)| name) {
        "cpu" => (&["1m", "1"], "cpu"),
        "memory" => (SIZE_DIVISORS, "memory"),
        "ephemeral-storage" => (SIZE_DIVISORS, "local ephemeral storage"),
        _ if huge_pages => (SIZE_DIVISORS, "hugepages"),
        _ => return,
    };
    if !allowed.contains(&divisor.as_str()) {
        let list = match what {
            "cpu" => "1m and 1".to_string(),
            _ => SIZE_DIVISORS.join(", "),
        };
        let detail = format!("only divisor's values {list} are supported with the {what} resource");
        errors.push(FieldError::invalid(&path.child("divisor"), resource, detail));
    }
}

fn validate_key_ref(name: &str, key: &str, path: &Path, errors: &mut ErrorList) {
    errors.extend(FieldError::invalid_each(&path.child("name"), name, names::dns1123_subdomain(name)));
    if key.is_empty() {
        errors.push(FieldError::required(&path.child("key"), ""));
    } else {
        errors.extend(FieldError::invalid_each(&path.child("key"), key, names::config_map_key(key)));
    }
}

fn validate_file_key_ref(key: &FileKeySelector, path: &Path, errors: &mut ErrorList) {
    if key.key.is_empty() {
        errors.push(FieldError::required(&path.child("key"), ""));
    } else {
        errors.extend(FieldError::invalid_each(&path.child("key"), &key.key, names::env_var_name(&key.key)));
    }
    if key.volume_name.is_empty() {
        errors.push(FieldError::required(&path.child("volumeName"), ""));
    } else {
        let messages = names::dns1123_label(&key.volume_name);
        errors.extend(FieldError::invalid_each(&path.child("volumeName"), &key.volume_name, messages));
    }
    if key.path.is_empty() {
        errors.push(FieldError::required(&path.child("path"), ""));
    } else {
        path_no_backsteps(&key.path, &path.child("path"), errors);
    }
}

pub fn validate_env_from(container: &Container, path: &Path, errors: &mut ErrorList) {
    for (i, source) in container.env_from.iter().flatten().enumerate() {
        let at = path.index(i);
        let prefix = or_empty(&source.prefix);
        if !prefix.is_empty() {
            errors.extend(FieldError::invalid_each(&at.child("prefix"), prefix, names::env_var_name(prefix)));
        }
        let references = [
            ("configMapRef", source.config_map_ref.as_ref().map(|r| r.name.as_str())),
            ("secretRef", source.secret_ref.as_ref().map(|r| r.name.as_str())),
        ];
        for (key, name) in references.iter().filter_map(|(key, name)| name.map(|name| (key, name))) {
            let at = at.child(key).child("name");
            if name.is_empty() {
                errors.push(FieldError::required(&at, ""));
            } else {
                let messages = names::object_name(crate::kind::NameRule::DnsSubdomain, name, true);
                errors.extend(FieldError::invalid_each(&at, name, messages));
            }
        }
        match references.iter().filter(|(_, name)| name.is_some()).count() {
            0 => {
                let detail = "must specify one of: `configMapRef` or `secretRef`";
                errors.push(FieldError::invalid(path, "", detail));
            }
            1 => {}
            _ => {
                let detail = "may not have more than one field specified at a time";
                errors.push(FieldError::invalid(path, "", detail));
            }
        }
    }
}

/// A file that gives a variable its value has to lie in an emptyDir.
pub fn validate_file_key_volumes(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let volumes: BTreeMap<&str, &Volume> =
        spec.volumes.iter().flatten().map(|v| (v.name.as_str(), v)).collect();
    visit_containers(spec, path, |container, at| {
        for (i, variable) in container.env.iter().flatten().enumerate() {
            let Some(key) = variable.value_from.as_ref().and_then(|f| f.file_key_ref.as_ref()) else {
                continue;
            };
            let at = at.child("env").index(i).child("valueFrom").child("fileKeyRef").child("volumeName");
            match volumes.get(key.volume_name.as_str()) {
                None => errors.push(FieldError::not_found(&at, key.volume_name.as_str())),
                Some(volume) if volume.empty_dir.is_none() => {
                    let detail = "referenced volume must be of type emptyDir";
                    errors.push(FieldError::invalid(&at, key.volume_name.as_str(), detail));
                }
                Some(_) => {}
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::check;

    #[test]
    fn variables() {
        let env = |variable: Value| json!({"containers": [{"name": "a", "image": "i", "env": [variable]}]});
        let from = |source: Value| env(json!({"name": "N", "valueFrom": source}));
        let at = "spec.containers[0].env[0]";
        let cases: Vec<(Value, String)> = vec![
            (env(json!({"name": ""})), format!("{at}.name: Required value")),
            (
                env(json!({"name": "a=b"})),
                format!(
                    "{at}.name: Invalid value: \"a=b\": a valid environment variable name must consist only of printable"
                ),
            ),
            (
                from(json!({})),
                format!(
                    "{at}.valueFrom: Invalid value: \"\": must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`"
                ),
            ),
            (
                from(json!({"fieldRef": {"fieldPath": "metadata.whoops"}})),
                format!(
                    "{at}.valueFrom.fieldRef.fieldPath: Invalid value: \"metadata.whoops\": error converting fieldPath: field label not supported: metadata.whoops"
                ),
            ),
            (
                from(json!({"fieldRef": {"fieldPath": "status.phase"}})),
                format!(
                    "{at}.valueFrom.fieldRef.fieldPath: Unsupported value: \"status.phase\": supported values: \"metadata.name\","
                ),
            ),
            (
                from(json!({"resourceFieldRef": {"resource": "x"}})),
                format!("{at}.valueFrom.resourceFieldRef.resource: Unsupported value: \"x\""),
            ),
            (
                from(json!({"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1Mi"}})),
                format!(
                    "{at}.valueFrom.resourceFieldRef.divisor: Invalid value: \"limits.cpu\": only divisor's values 1m and 1 are supported with the cpu resource"
                ),
            ),
            (
                from(json!({"secretKeyRef": {"name": "s", "key": ""}})),
                format!("{at}.valueFrom.secretKeyRef.key: Required value"),
            ),
            (
                from(json!({"fileKeyRef": {"volumeName": "v", "key": "k", "path": "p"}})),
                format!("{at}.valueFrom.fileKeyRef.volumeName: Not found: \"v\""),
            ),
        ];
        for (patch, want) in cases {
            let got = check(patch.clone(), true);
            assert!(got.len() == 1 && got[0].starts_with(&want), "{patch}: {got:?}");
        }
        for good in ["metadata.labels['a']", "metadata.annotations['A/B']", "spec.nodeName", "status.podIPs"]
        {
            let got = check(from(json!({"fieldRef": {"fieldPath": good}})), true);
            assert!(got.is_empty() || good.contains('A'), "{got:?}");
        }
    }
}
