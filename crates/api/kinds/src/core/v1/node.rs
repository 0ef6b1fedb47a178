//! Node.
//!
//! Upstream counterpart: pkg/registry/core/node/strategy.go, ValidateNode and ValidateNodeUpdate in validation.go.
use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Taint;
use serde_json::{Value, json};

use super::pod_spec::{resources::validate_quantity, tolerations::validate_effect};
use crate::field::{ErrorList, FieldError, Path};
use crate::ip::{cidr_warnings, is_dual_stack, validate_cidr};
use crate::kind::{Column, Kind, Rest};
use crate::meta::validate_label_name;
use crate::names;
use crate::object::{count, entries, items, keep, or_empty, read, remove, text, truth};
use crate::quantity::round_up_to_milli;
use crate::table;

fn defaults(object: &mut Value) {
    if count(object, "/status/capacity") > 0
        && object.pointer("/status/allocatable").is_none_or(Value::is_null)
    {
        object["status"]["allocatable"] = object["status"]["capacity"].clone();
    }
    round_up_to_milli(object.pointer_mut("/status/capacity"));
    round_up_to_milli(object.pointer_mut("/status/allocatable"));
    // podCIDR is the older name of the first of podCIDRs; both are always shown.
    let (one, first) =
        (text(object, "/spec/podCIDR").to_string(), text(object, "/spec/podCIDRs/0").to_string());
    if first.is_empty() && !one.is_empty() {
        object["spec"]["podCIDRs"] = json!([one]);
    } else if !first.is_empty() && one != first {
        object["spec"]["podCIDR"] = first.into();
    }
}

fn validate_taints(object: &Value, errors: &mut ErrorList) {
    let path = Path::new("metadata").child("taints");
    let taints: Vec<Taint> = match read(object.pointer("/spec/taints").or(Some(&json!([]))), &path) {
        Ok(taints) => taints,
        Err(error) => return errors.push(error),
    };
    let mut seen = BTreeSet::new();
    for (i, taint) in taints.iter().enumerate() {
        let at = path.index(i);
        errors.extend(validate_label_name(&taint.key, &at.child("key")));
        let value = or_empty(&taint.value);
        let messages = names::label_value(value);
        if !messages.is_empty() {
            errors.push(FieldError::invalid(&at.child("value"), value, messages.join(";")));
        }
        validate_effect(&taint.effect, false, &at.child("effect"), errors);
        if !seen.insert((&taint.effect, &taint.key)) {
            let value = serde_json::to_value(taint).unwrap_or_default();
            let detail = "taints must be unique by key and effect pair";
            errors.push(FieldError::duplicate(&at, value).with_detail(detail));
        }
    }
}

fn validate_resources(object: &Value, errors: &mut ErrorList) {
    for list in ["capacity", "allocatable"] {
        for (name, value) in entries(object, &format!("/status/{list}")) {
            let at = Path::new("status").child(list).child(name);
            let quantity = k8s_openapi::apimachinery::pkg::api::resource::Quantity(
                value.as_str().unwrap_or_default().to_string(),
            );
            validate_quantity(name, &quantity, &at, errors);
        }
    }
}

fn validate(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    validate_taints(object, &mut errors);
    validate_resources(object, &mut errors);
    let path = Path::new("spec").child("podCIDRs");
    let cidrs: Vec<&str> = items(object, "/spec/podCIDRs").iter().filter_map(Value::as_str).collect();
    for (i, cidr) in cidrs.iter().enumerate() {
        errors.extend(validate_cidr(&path.index(i), cidr, &[]));
    }
    let addresses = cidrs.iter().map(|c| c.split('/').next().unwrap_or_default());
    if cidrs.len() > 1 && (cidrs.len() > 2 || !is_dual_stack(addresses)) {
        let detail = "may specify no more than one CIDR for each IP family";
        errors.push(FieldError::invalid(&path, cidrs, detail));
    }
    errors
}

fn validate_changes(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    validate_resources(new, &mut errors);
    let addresses = items(new, "/status/addresses");
    for (i, address) in addresses.iter().enumerate().filter(|(i, a)| addresses[..*i].contains(a)) {
        let at = Path::new("status").child("addresses").index(i);
        errors.push(FieldError::duplicate(&at, address.clone()));
    }
    let path = Path::new("spec");
    let (cidrs, stored) = (items(new, "/spec/podCIDRs"), items(old, "/spec/podCIDRs"));
    if !stored.is_empty() && cidrs != stored {
        let detail = "node updates may not change podCIDR except from \"\" to valid";
        errors.push(FieldError::forbidden(&path.child("podCIDRs"), detail));
    }
    let provider = text(old, "/spec/providerID");
    if !provider.is_empty() && provider != text(new, "/spec/providerID") {
        let detail = "node updates may not change providerID except from \"\" to valid";
        errors.push(FieldError::forbidden(&path.child("providerID"), detail));
    }
    validate_taints(new, &mut errors);
    if text(new, "/spec/externalID") != text(old, "/spec/externalID") {
        errors.push(FieldError::forbidden(&path.child("externalID"), "may not be updated"));
    }
    errors
}

fn drop_config_source(object: &mut Value) {
    if let Some(spec) = object.get_mut("spec") {
        remove(spec, "configSource");
    }
}

fn warnings(new: &Value, _: Option<&Value>) -> Vec<String> {
    let mut out = Vec::new();
    if new.pointer("/spec/configSource").is_some_and(|c| !c.is_null()) {
        out.push("spec.configSource: the feature is removed".to_string());
    }
    if !text(new, "/spec/externalID").is_empty() {
        out.push("spec.externalID: this field is deprecated, and is unused by Kubernetes".to_string());
    }
    let path = Path::new("spec").child("podCIDRs");
    for (i, cidr) in items(new, "/spec/podCIDRs").iter().filter_map(Value::as_str).enumerate() {
        out.extend(cidr_warnings(&path.index(i), cidr));
    }
    out
}

fn roles(node: &Value) -> String {
    let mut roles = BTreeSet::new();
    for (key, value) in entries(node, "/metadata/labels") {
        if let Some(role) = key.strip_prefix("node-role.kubernetes.io/") {
            roles.insert(role);
        } else if key == "kubernetes.io/role" {
            roles.insert(value.as_str().unwrap_or_default());
        }
    }
    roles.into_iter().filter(|role| !role.is_empty()).collect::<Vec<_>>().join(",")
}

fn row(node: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let ready = items(node, "/status/conditions").iter().rfind(|c| text(c, "/type") == "Ready");
    let mut status = match ready.map(|c| text(c, "/status")) {
        Some("True") => "Ready".to_string(),
        Some(_) => "NotReady".to_string(),
        None => "Unknown".to_string(),
    };
    if truth(node, "/spec/unschedulable") {
        status.push_str(",SchedulingDisabled");
    }
    let address = |kind: &str| {
        let found = items(node, "/status/addresses").iter().find(|a| text(a, "/type") == kind);
        table::or_none(found.map_or("", |a| text(a, "/address")))
    };
    let info = |key: &str| match text(node, &format!("/status/nodeInfo/{key}")) {
        "" => "<unknown>".to_string(),
        value => value.to_string(),
    };
    let kernel = match text(node, "/status/nodeInfo/architecture") {
        "" => info("kernelVersion"),
        architecture => format!("{} ({architecture})", info("kernelVersion")),
    };
    vec![
        table::name(node),
        status.into(),
        table::or_none(&roles(node)),
        table::age(node, now),
        text(node, "/status/nodeInfo/kubeletVersion").into(),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage").into(),
        kernel.into(),
        info("containerRuntimeVersion").into(),
    ]
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| {
            drop_config_source(object);
            if let Some(status) = object.get_mut("status") {
                remove(status, "config");
            }
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            drop_config_source(new);
        },
        validate,
        validate_update: |new, old| {
            let mut errors = validate(new);
            errors.extend(validate_changes(new, old));
            errors
        },
        warnings,
    },
    status: Some(Rest {
        prepare_update: |new, old| keep(new, old, "spec"),
        validate_update: validate_changes,
        ..Rest::ANY
    }),
    columns: &[
        Column::NAME,
        Column::string("Status", "The status of the node"),
        Column::string("Roles", "The roles of the node"),
        Column::AGE,
        Column::string("Version", "The kubelet's version."),
        Column::string("Internal-IP", "The node's address inside the cluster.").wide(),
        Column::string("External-IP", "The node's address outside.").wide(),
        Column::string("OS-Image", "The operating system that the node runs.").wide(),
        Column::string("Kernel-Version", "The kernel that the node runs.").wide(),
        Column::string("Container-Runtime", "The container runtime that the node runs.").wide(),
    ],
    row,
    selectable: |object| vec![("spec.unschedulable", truth(object, "/spec/unschedulable").to_string())],
    ..Kind::plain("", "v1", "Node")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_and_row() {
        let taints = json!({"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}, {"key": "a", "effect": "NoSchedule"}]}});
        assert!(validate(&taints)[0].to_string().ends_with("taints must be unique by key and effect pair"));
        let mut old = json!({"spec": {"podCIDR": "10.0.0.0/24"}});
        defaults(&mut old);
        assert_eq!(old["spec"]["podCIDRs"], json!(["10.0.0.0/24"]));
        let got = validate_changes(&json!({"spec": {}}), &old);
        assert_eq!(
            got[0].to_string(),
            "spec.podCIDRs: Forbidden: node updates may not change podCIDR except from \"\" to valid"
        );
        let node = json!({"metadata": {"name": "n", "labels": {"node-role.kubernetes.io/control-plane": ""}},
            "spec": {"unschedulable": true}, "status": {"conditions": [{"type": "Ready", "status": "True"}],
            "nodeInfo": {"kernelVersion": "6", "architecture": "arm"}}});
        let row = row(&node, "2024-01-01T00:00:00Z".parse().unwrap());
        assert_eq!(row[1], "Ready,SchedulingDisabled");
        assert_eq!(row[2], "control-plane");
        assert_eq!(row[8], "6 (arm)");
    }
}
