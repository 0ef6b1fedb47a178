//! The `status` subresource of a pod.
//!
//! Upstream counterpart: ValidatePodStatusUpdate in validation.go and podStatusStrategy. Left out: the status of
//! dynamic resource claims and allocated resources.
use k8s_openapi::api::core::v1::{Container, ContainerStatus, PodSpec, PodStatus};
use serde_json::Value;

use super::super::pod_spec::annotations;
use crate::field::{ErrorList, FieldError, Path};
use crate::ip::{ip_warnings, is_dual_stack, validate_ip};
use crate::meta::{FIELD_IMMUTABLE, validate_label_name};
use crate::names;
use crate::object::{integer, items, items_mut, metadata, or_empty, read, text};

/// A writer that doesn't know of observedGeneration leaves it as it was.
pub(super) fn preserve_observed_generation(new: &mut Value, old: &Value) {
    let before = integer(old, "/status/observedGeneration");
    if integer(new, "/status/observedGeneration") == 0 && before != 0 {
        new["status"]["observedGeneration"] = before.into();
    }
    for condition in items_mut(new, "/status/conditions") {
        let kind = text(condition, "/type");
        let stored = items(old, "/status/conditions").iter().find(|c| text(c, "/type") == kind);
        let before = stored.map_or(0, |c| integer(c, "/observedGeneration"));
        if integer(condition, "/observedGeneration") == 0 && before != 0 {
            condition["observedGeneration"] = before.into();
        }
    }
}

pub(super) fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let path = Path::new("status");
    let parts = read::<PodStatus>(new.get("status"), &path).and_then(|n| {
        let o = read::<PodStatus>(old.get("status"), &path)?;
        Ok((n, o, read::<PodSpec>(old.get("spec"), &Path::new("spec"))?))
    });
    let (status, stored, spec) = match parts {
        Ok(parts) => parts,
        Err(error) => return vec![error],
    };
    let mut errors = ErrorList::new();
    let at = Path::new("metadata").child("annotations");
    let (new_meta, old_meta) = (metadata(new), metadata(old));
    annotations::validate_update(
        new_meta.annotations.as_ref(),
        old_meta.annotations.as_ref(),
        &at,
        &mut errors,
    );
    annotations::validate(new_meta.annotations.as_ref(), &spec, &at, &mut errors);
    for (i, condition) in status.conditions.iter().flatten().enumerate() {
        if !["PodScheduled", "Ready", "Initialized"].contains(&condition.type_.as_str()) {
            let at = path.child("conditions").index(i).child("Type");
            errors.extend(validate_label_name(&condition.type_, &at));
        }
    }
    nominated_node(&status, &stored, &spec, &path.child("nominatedNodeName"), &mut errors);
    if let Some(generation) = status.observed_generation.filter(|g| *g < 0) {
        let detail = "must be a non-negative integer";
        errors.push(FieldError::invalid(&path.child("observedGeneration"), generation, detail));
    }
    if or_empty(&status.qos_class) != or_empty(&stored.qos_class) {
        let at = path.child("qosClass");
        errors.push(FieldError::invalid(&at, or_empty(&status.qos_class), FIELD_IMMUTABLE));
    }
    let none = Vec::new();
    let init = spec.init_containers.as_ref().unwrap_or(&none);
    for (key, new, old, containers) in [
        ("containerStatuses", &status.container_statuses, &stored.container_statuses, Some(&spec.containers)),
        (
            "initContainerStatuses",
            &status.init_container_statuses,
            &stored.init_container_statuses,
            Some(init),
        ),
        (
            "ephemeralContainerStatuses",
            &status.ephemeral_container_statuses,
            &stored.ephemeral_container_statuses,
            None,
        ),
    ] {
        let (new, old) = (new.as_deref().unwrap_or_default(), old.as_deref().unwrap_or_default());
        transitions(new, old, &spec, containers, &path.child(key), &mut errors);
    }
    addresses(&status, &stored, &path, &mut errors);
    errors
}

fn nominated_node(new: &PodStatus, old: &PodStatus, spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let name = or_empty(&new.nominated_node_name);
    if name.is_empty() || name == or_empty(&old.nominated_node_name) {
        return;
    }
    errors.extend(FieldError::invalid_each(path, name, names::dns1123_subdomain(name)));
    if !or_empty(&spec.node_name).is_empty() {
        let detail = "may not be set on pods that are already bound to a node";
        errors.push(FieldError::forbidden(path, detail));
    }
}

/// A container that has ended for good stays ended. Ephemeral ones (`containers` is `None`) always have.
fn transitions(
    new: &[ContainerStatus],
    old: &[ContainerStatus],
    spec: &PodSpec,
    containers: Option<&Vec<Container>>,
    path: &Path,
    errors: &mut ErrorList,
) {
    let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let restarts_all = all
        .flat_map(|c| c.restart_policy_rules.iter().flatten())
        .any(|rule| rule.action == "RestartAllContainers");
    if containers.is_some() && restarts_all {
        return;
    }
    let ended = |status: &ContainerStatus| {
        status.state.as_ref().and_then(|s| s.terminated.as_ref()).map(|t| t.exit_code)
    };
    for (i, stored) in old.iter().enumerate() {
        let Some(exit_code) = ended(stored) else { continue };
        let revived = new.iter().any(|s| s.name == stored.name && ended(s).is_none());
        let container = containers.and_then(|c| c.iter().find(|c| c.name == stored.name));
        if revived && !container.is_some_and(|c| should_restart(c, spec, exit_code)) {
            let detail = "may not be transitioned to non-terminated state";
            errors.push(FieldError::forbidden(&path.index(i).child("state"), detail));
        }
    }
}

/// Whether a container starts again after it ended so: its rules, its own policy, the pod's.
pub fn should_restart(container: &Container, spec: &PodSpec, exit_code: i32) -> bool {
    let by = |policy: &str| match policy {
        "OnFailure" => exit_code != 0,
        "Never" => false,
        _ => true,
    };
    let Some(own) = container.restart_policy.as_deref() else {
        return by(spec.restart_policy.as_deref().unwrap_or("Always"));
    };
    let matched = container.restart_policy_rules.iter().flatten().any(|rule| {
        rule.exit_codes.as_ref().is_some_and(|codes| {
            let listed = codes.values.iter().flatten().any(|code| *code == exit_code);
            if codes.operator == "In" { listed } else { !listed }
        })
    });
    matched || by(own)
}

fn addresses(new: &PodStatus, old: &PodStatus, path: &Path, errors: &mut ErrorList) {
    let pod_ips =
        |s: &PodStatus| -> Vec<String> { s.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect() };
    let host_ips =
        |s: &PodStatus| -> Vec<String> { s.host_ips.iter().flatten().map(|ip| ip.ip.clone()).collect() };
    let hosts = host_ips(new);
    if let Some(first) = hosts.first().filter(|first| or_empty(&new.host_ip) != **first) {
        let at = path.child("hostIPs").index(0).child("ip");
        errors.push(FieldError::invalid(&at, first.as_str(), "must be equal to `hostIP`"));
    }
    for (key, ips, stored) in [("podIPs", pod_ips(new), pod_ips(old)), ("hostIPs", hosts, host_ips(old))] {
        let at = path.child(key);
        for (i, ip) in ips.iter().enumerate() {
            errors.extend(validate_ip(&at.index(i), ip, &stored));
        }
        if ips.len() > 1 && (ips.len() > 2 || !is_dual_stack(ips.iter().map(String::as_str))) {
            let detail = "may specify no more than one IP for each IP family";
            errors.push(FieldError::invalid(&at, ips, detail));
        }
    }
}

pub(super) fn warnings(new: &Value, _: Option<&Value>) -> Vec<String> {
    let path = Path::new("status");
    ["podIPs", "hostIPs"]
        .iter()
        .flat_map(|key| {
            let at = path.child(key);
            items(new, &format!("/status/{key}"))
                .iter()
                .enumerate()
                .filter_map(move |(i, ip)| ip_warnings(&at.index(i).child("ip"), text(ip, "/ip")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ended_containers_stay_ended() {
        let pod = |policy: &str, state: Value| {
            json!({"spec": {"restartPolicy": policy, "containers": [{"name": "c"}]},
                "status": {"containerStatuses": [{"name": "c", "state": state}]}})
        };
        let (ended, running) = (json!({"terminated": {"exitCode": 1}}), json!({"running": {}}));
        for (policy, want) in [("Always", 0), ("OnFailure", 0), ("Never", 1)] {
            let errors = validate_update(&pod(policy, running.clone()), &pod(policy, ended.clone()));
            assert_eq!(errors.len(), want, "{policy} {errors:?}");
        }
    }
}
