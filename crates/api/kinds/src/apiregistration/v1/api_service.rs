//! APIService.
//!
//! Upstream counterpart: k8s.io/kube-aggregator/pkg/registry/apiservice and pkg/apis/apiregistration/validation.
use sampan_world::clock;
use serde_json::{Value, json};

use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, NameRule, Rest};
use crate::names;
use crate::object::{child, default_absent, integer, items, keep, text, truth};
use crate::table;

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let (group, version) = (text(object, "/spec/group"), text(object, "/spec/version"));
    let (name, required) = (text(object, "/metadata/name"), format!("{version}.{group}"));
    if name != required {
        let detail = format!("must be `spec.version+\".\"+spec.group`: \"{required}\"");
        errors.push(FieldError::invalid(&Path::new("metadata").child("name"), name, detail));
    }
    if group.is_empty() && version != "v1" {
        let detail = "only v1 may have an empty group and it better be legacy kube";
        errors.push(FieldError::required(&path.child("group"), detail));
    }
    if !group.is_empty() {
        errors.extend(FieldError::invalid_each(&path.child("group"), group, names::dns1123_subdomain(group)));
    }
    errors.extend(FieldError::invalid_each(&path.child("version"), version, names::dns1035_label(version)));
    for (key, most) in [("groupPriorityMinimum", 20_000), ("versionPriority", 1000)] {
        let value = integer(object, &format!("/spec/{key}"));
        if !(1..=most).contains(&value) {
            let detail = format!("must be positive and less than {most}");
            errors.push(FieldError::invalid(&path.child(key), value, detail));
        }
    }
    let bundle_bytes = text(object, "/spec/caBundle").trim_end_matches('=').len() * 3 / 4;
    let insecure = truth(object, "/spec/insecureSkipTLSVerify");
    let at = path.child("insecureSkipTLSVerify");
    let Some(service) = object.pointer("/spec/service").filter(|s| !s.is_null()) else {
        if bundle_bytes > 0 {
            let detail = "local APIServices may not have a caBundle";
            errors.push(FieldError::invalid(
                &path.child("caBundle"),
                format!("{bundle_bytes} bytes"),
                detail,
            ));
        }
        if insecure {
            let detail = "local APIServices may not have insecureSkipTLSVerify";
            errors.push(FieldError::invalid(&at, true, detail));
        }
        return errors;
    };
    let service_at = path.child("service");
    for key in ["namespace", "name"] {
        if text(service, &format!("/{key}")).is_empty() {
            errors.push(FieldError::required(&service_at.child(key), ""));
        }
    }
    let port = integer(service, "/port");
    for message in names::port_num(port) {
        let detail = format!("port is not valid: {message}");
        errors.push(FieldError::invalid(&service_at.child("port"), port, detail));
    }
    if insecure && bundle_bytes > 0 {
        errors.push(FieldError::invalid(&at, true, "may not be true if caBundle is present"));
    }
    errors
}

fn validate_status(new: &Value, _: &Value) -> ErrorList {
    let statuses = ["True", "False", "Unknown"];
    let conditions = items(new, "/status/conditions").iter().map(|c| text(c, "/status")).enumerate();
    let path = Path::new("status").child("conditions");
    let wrong = conditions.filter(|(_, status)| !statuses.contains(status));
    wrong.map(|(i, s)| FieldError::not_supported(&path.index(i).child("status"), s, &statuses)).collect()
}

fn available(object: &Value) -> String {
    let condition = items(object, "/status/conditions").iter().find(|c| text(c, "/type") == "Available");
    match condition.map(|c| (text(c, "/status"), text(c, "/reason"))) {
        None => "Unknown".to_string(),
        Some(("True", _)) => "True".to_string(),
        Some((status, "")) => status.to_string(),
        Some((status, reason)) => format!("{status} ({reason})"),
    }
}

pub const KIND: Kind = Kind {
    name_rule: NameRule::PathSegment,
    defaults: |object| {
        if let Some(service) = object.pointer_mut("/spec/service") {
            default_absent(service, "port", 443);
        }
    },
    rest: Rest {
        prepare_create: |object| {
            let local = object.pointer("/spec/service").is_none_or(Value::is_null);
            object["status"] = match local {
                // What this server answers itself is there at once.
                true => json!({"conditions": [{
                    "type": "Available", "status": "True", "reason": "Local",
                    "message": "Local APIServices are always available",
                    "lastTransitionTime": clock::now_seconds().to_string()
                }]}),
                false => json!({}),
            };
        },
        prepare_update: |new, old| keep(new, old, "status"),
        validate,
        validate_update: |new, _| validate(new),
        ..Rest::ANY
    },
    status: Some(Rest {
        prepare_update: |new, old| {
            keep(new, old, "spec");
            let empty = json!({});
            for key in ["labels", "annotations", "finalizers", "ownerReferences"] {
                keep(child(new, "metadata"), old.get("metadata").unwrap_or(&empty), key);
            }
        },
        validate_update: validate_status,
        ..Rest::ANY
    }),
    unconditional_update: false,
    columns: &[
        Column::NAME,
        Column::string("Service", "The reference to the service that hosts this API endpoint."),
        Column::string("Available", "Whether this service is available."),
        Column::AGE,
    ],
    row: |object, now| {
        let of = |key: &str| text(object, &format!("/spec/service/{key}"));
        let service = match object.pointer("/spec/service").filter(|s| !s.is_null()) {
            Some(_) => format!("{}/{}", of("namespace"), of("name")),
            None => "Local".to_string(),
        };
        vec![table::name(object), service.into(), available(object).into(), table::age(object, now)]
    },
    ..Kind::plain("apiregistration.k8s.io", "v1", "APIService")
};
