//! Containers: regular, init and ephemeral ones.
//!
//! Upstream counterpart: validateContainers, validateInitContainers, validateEphemeralContainers and
//! validateContainerCommon in pkg/apis/core/validation/validation.go.
use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Container, ContainerPort, EphemeralContainer};

use super::requests::is_sidecar;
use super::{Scope, as_container, env, mounts, one_of, probes, resources, security_context};
use crate::field::{ErrorList, FieldError, Path};
use crate::names;
use crate::object::or_empty;

const PULL_POLICIES: &[&str] = &["Always", "IfNotPresent", "Never"];
const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

pub fn validate_containers(scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    let containers = &scope.spec.containers;
    if containers.is_empty() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    let mut names = BTreeSet::new();
    for (i, container) in containers.iter().enumerate() {
        let at = path.index(i);
        validate_common(container, scope, &at, errors);
        if !names.insert(container.name.as_str()) {
            errors.push(FieldError::duplicate(&at.child("name"), container.name.as_str()));
        }
        probes::validate_all(container, scope, &at, errors);
        validate_restart_policy(container, &at, errors);
    }
    host_port_conflicts(containers.iter().enumerate(), path, errors);
}

pub fn validate_init_containers(scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    let mut names: BTreeSet<&str> = scope.spec.containers.iter().map(|c| c.name.as_str()).collect();
    for (i, container) in scope.spec.init_containers.iter().flatten().enumerate() {
        let at = path.index(i);
        validate_common(container, scope, &at, errors);
        if container.restart_policy.is_none() {
            if container.restart_policy_rules.as_ref().is_some_and(|rules| !rules.is_empty()) {
                let detail = "must specify restartPolicy when restart rules are used";
                errors.push(FieldError::required(&at.child("restartPolicy"), detail));
            }
        } else {
            validate_restart_policy(container, &at, errors);
        }
        if names.contains(container.name.as_str()) {
            errors.push(FieldError::duplicate(&at.child("name"), container.name.as_str()));
        } else if !container.name.is_empty() {
            names.insert(&container.name);
        }
        // Upstream counts these paths from 0 for each init container.
        host_port_conflicts(std::iter::once((0, container)), path, errors);
        if is_sidecar(container) {
            probes::validate_all(container, scope, &at, errors);
        } else {
            forbid_without_sidecar(container, &at, errors);
        }
    }
}

fn forbid_without_sidecar(container: &Container, path: &Path, errors: &mut ErrorList) {
    let set = [
        ("lifecycle", container.lifecycle.is_some()),
        ("livenessProbe", container.liveness_probe.is_some()),
        ("readinessProbe", container.readiness_probe.is_some()),
        ("startupProbe", container.startup_probe.is_some()),
    ];
    for (key, _) in set.iter().filter(|(_, set)| *set) {
        let detail = "may not be set for init containers without restartPolicy=Always";
        errors.push(FieldError::forbidden(&path.child(key), detail));
    }
    for (j, policy) in container.resize_policy.iter().flatten().enumerate() {
        if policy.restart_policy == "RestartContainer" {
            let at = path.child("resizePolicy").index(j).child("restartPolicy");
            let detail = "must not be set to 'RestartContainer' for non-sidecar initContainers";
            errors.push(FieldError::invalid(&at, policy.restart_policy.as_str(), detail));
        }
    }
}

pub fn validate_ephemeral_containers(scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    let spec = scope.spec;
    let others: BTreeSet<&str> = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .map(|c| c.name.as_str())
        .collect();
    let mut names = others.clone();
    for (i, ephemeral) in spec.ephemeral_containers.iter().flatten().enumerate() {
        let at = path.index(i);
        let container = as_container(ephemeral);
        validate_common(&container, scope, &at, errors);
        validate_for_pod(&container, &at, errors);
        if !names.insert(&ephemeral.name) {
            errors.push(FieldError::duplicate(&at.child("name"), ephemeral.name.as_str()));
        }
        let target = or_empty(&ephemeral.target_container_name);
        if !target.is_empty() && !others.contains(target) {
            errors.push(FieldError::not_found(&at.child("targetContainerName"), target));
        }
        forbid_for_ephemeral(ephemeral, &at, errors);
    }
}

fn forbid_for_ephemeral(ephemeral: &EphemeralContainer, path: &Path, errors: &mut ErrorList) {
    let detail = "cannot be set for an Ephemeral Container";
    let resources_set = ephemeral.resources.as_ref().is_some_and(|r| {
        r.limits.as_ref().is_some_and(|l| !l.is_empty())
            || r.requests.as_ref().is_some_and(|l| !l.is_empty())
            || r.claims.as_ref().is_some_and(|c| !c.is_empty())
    });
    let set = [
        ("ports", ephemeral.ports.as_ref().is_some_and(|p| !p.is_empty())),
        ("resources", resources_set),
        ("restartPolicy", ephemeral.restart_policy.is_some()),
        ("restartPolicyRules", ephemeral.restart_policy_rules.as_ref().is_some_and(|r| !r.is_empty())),
        ("livenessProbe", ephemeral.liveness_probe.is_some()),
        ("readinessProbe", ephemeral.readiness_probe.is_some()),
        ("startupProbe", ephemeral.startup_probe.is_some()),
        ("lifecycle", ephemeral.lifecycle.is_some()),
    ];
    for (key, _) in set.iter().filter(|(_, set)| *set) {
        errors.push(FieldError::forbidden(&path.child(key), detail));
    }
    for (j, mount) in ephemeral.volume_mounts.iter().flatten().enumerate() {
        let at = path.child("volumeMounts").index(j);
        for (key, value) in [("subPath", &mount.sub_path), ("subPathExpr", &mount.sub_path_expr)] {
            if !or_empty(value).is_empty() {
                errors.push(FieldError::forbidden(&at.child(key), detail));
            }
        }
    }
}

/// What is checked in a Pod but not in a template.
pub fn validate_for_pod(container: &Container, path: &Path, errors: &mut ErrorList) {
    let image = or_empty(&container.image);
    if image.trim().len() != image.len() {
        let detail = "must not have leading or trailing whitespace";
        errors.push(FieldError::invalid(&path.child("image"), image, detail));
    }
}

fn validate_common(container: &Container, scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    let name_path = path.child("name");
    if container.name.is_empty() {
        errors.push(FieldError::required(&name_path, ""));
    } else {
        let messages = names::dns1123_label(&container.name);
        errors.extend(FieldError::invalid_each(&name_path, &container.name, messages));
    }
    if or_empty(&container.image).is_empty() {
        errors.push(FieldError::required(&path.child("image"), ""));
    }
    let policy = or_empty(&container.termination_message_policy);
    let policies = &["File", "FallbackToLogsOnError"];
    one_of(policy, policies, &path.child("terminationMessagePolicy"), errors);
    validate_ports(container.ports.as_deref().unwrap_or_default(), &path.child("ports"), errors);
    env::validate_env(container, &path.child("env"), errors);
    env::validate_env_from(container, &path.child("envFrom"), errors);
    mounts::validate_mounts(container, scope, &path.child("volumeMounts"), errors);
    mounts::validate_devices(container, scope, &path.child("volumeDevices"), errors);
    one_of(or_empty(&container.image_pull_policy), PULL_POLICIES, &path.child("imagePullPolicy"), errors);
    if let Some(requirements) = &container.resources {
        resources::validate_container(requirements, &scope.claims, &path.child("resources"), errors);
    }
    validate_resize_policy(container, scope, &path.child("resizePolicy"), errors);
    if let Some(context) = &container.security_context {
        let at = path.child("securityContext");
        security_context::validate_container(context, scope.host_users, &at, errors);
    }
}

fn validate_ports(ports: &[ContainerPort], path: &Path, errors: &mut ErrorList) {
    let mut seen = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let at = path.index(i);
        let name = or_empty(&port.name);
        if !name.is_empty() {
            let messages = names::port_name(name);
            if messages.is_empty() && !seen.insert(name) {
                errors.push(FieldError::duplicate(&at.child("name"), name));
            }
            errors.extend(FieldError::invalid_each(&at.child("name"), name, messages));
        }
        if port.container_port == 0 {
            errors.push(FieldError::required(&at.child("containerPort"), ""));
        } else {
            port_number(port.container_port, &at.child("containerPort"), errors);
        }
        if let Some(host_port) = port.host_port.filter(|p| *p != 0) {
            port_number(host_port, &at.child("hostPort"), errors);
        }
        one_of(or_empty(&port.protocol), PROTOCOLS, &at.child("protocol"), errors);
    }
}

/// A port's number in any kind.
pub fn port_number(port: i32, path: &Path, errors: &mut ErrorList) {
    errors.extend(names::port_num(port.into()).into_iter().map(|m| FieldError::invalid(path, port, m)));
}

fn host_port_conflicts<'a>(
    containers: impl Iterator<Item = (usize, &'a Container)>,
    path: &Path,
    errors: &mut ErrorList,
) {
    let mut taken = BTreeSet::new();
    for (i, container) in containers {
        for (j, port) in container.ports.iter().flatten().enumerate() {
            let Some(host_port) = port.host_port.filter(|p| *p != 0) else { continue };
            let key = format!("{}/{}/{host_port}", or_empty(&port.protocol), or_empty(&port.host_ip));
            if !taken.insert(key.clone()) {
                let at = path.index(i).child("ports").index(j).child("hostPort");
                errors.push(FieldError::duplicate(&at, key));
            }
        }
    }
}

fn validate_resize_policy(container: &Container, scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    let mut seen = BTreeSet::new();
    for (i, policy) in container.resize_policy.iter().flatten().enumerate() {
        if !seen.insert(policy.resource_name.as_str()) {
            errors.push(FieldError::duplicate(&path.index(i), policy.resource_name.as_str()));
        }
        one_of(&policy.resource_name, &["cpu", "memory"], path, errors);
        one_of(&policy.restart_policy, &["NotRequired", "RestartContainer"], path, errors);
        if scope.spec.restart_policy.as_deref() == Some("Never") && policy.restart_policy != "NotRequired" {
            let detail = "must be 'NotRequired' when pod `restartPolicy` is 'Never'";
            errors.push(FieldError::invalid(path, policy.restart_policy.as_str(), detail));
        }
    }
}

fn validate_restart_policy(container: &Container, path: &Path, errors: &mut ErrorList) {
    let rules = container.restart_policy_rules.as_deref().unwrap_or_default();
    let policy_path = path.child("restartPolicy");
    match container.restart_policy.as_deref() {
        None if rules.is_empty() => return,
        None => {
            let detail = "must specify restartPolicy when restart rules are used";
            errors.push(FieldError::required(&policy_path, detail));
        }
        Some("Always" | "Never" | "OnFailure") => {}
        Some(other) => {
            errors.push(FieldError::not_supported(&policy_path, other, &["Always", "Never", "OnFailure"]));
        }
    }
    let rules_path = path.child("restartPolicyRules");
    if rules.len() > 20 {
        errors.push(FieldError::too_many(&rules_path, rules.len(), 20));
    }
    for (i, rule) in rules.iter().enumerate() {
        let at = rules_path.index(i);
        let actions = ["Restart", "RestartAllContainers"];
        if !actions.contains(&rule.action.as_str()) {
            errors.push(FieldError::not_supported(&at.child("action"), rule.action.as_str(), &actions));
        }
        let Some(codes) = &rule.exit_codes else {
            errors.push(FieldError::required(&at.child("exitCodes"), "must be specified"));
            continue;
        };
        let codes_path = at.child("exitCodes");
        if !["In", "NotIn"].contains(&codes.operator.as_str()) {
            let at = codes_path.child("operator");
            errors.push(FieldError::not_supported(&at, codes.operator.as_str(), &["In", "NotIn"]));
        }
        let count = codes.values.as_ref().map_or(0, Vec::len);
        if count > 255 {
            errors.push(FieldError::too_many(&codes_path.child("values"), count, 255));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::check;

    #[test]
    fn container_rules() {
        let one = |extra: Value| {
            let mut container = json!({"name": "a", "image": "i"});
            extra.as_object().unwrap().iter().for_each(|(k, v)| container[k] = v.clone());
            json!({"containers": [container]})
        };
        let cases: Vec<(Value, &str)> = vec![
            (one(json!({"name": ""})), "spec.containers[0].name: Required value"),
            (
                one(json!({"name": "A_"})),
                "spec.containers[0].name: Invalid value: \"A_\": a lowercase RFC 1123 label",
            ),
            (one(json!({"image": ""})), "spec.containers[0].image: Required value"),
            (
                one(json!({"imagePullPolicy": "x"})),
                "spec.containers[0].imagePullPolicy: Unsupported value: \"x\"",
            ),
            (
                one(json!({"ports": [{"containerPort": 0}]})),
                "spec.containers[0].ports[0].containerPort: Required value",
            ),
            (
                one(json!({"ports": [{"containerPort": 70000}]})),
                "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
            ),
            (
                one(
                    json!({"ports": [{"containerPort": 1, "hostPort": 2}, {"containerPort": 3, "hostPort": 2}]}),
                ),
                "spec.containers[0].ports[1].hostPort: Duplicate value: \"TCP//2\"",
            ),
            (
                one(json!({"ports": [{"containerPort": 1, "name": "a"}, {"containerPort": 3, "name": "a"}]})),
                "spec.containers[0].ports[1].name: Duplicate value: \"a\"",
            ),
            (
                one(json!({"restartPolicy": "x"})),
                "spec.containers[0].restartPolicy: Unsupported value: \"x\": supported values: \"Always\", \"Never\", \"OnFailure\"",
            ),
            (
                json!({"initContainers": [{"name": "a", "image": "i"}]}),
                "spec.initContainers[0].name: Duplicate value: \"a\"",
            ),
            (
                json!({"initContainers": [{"name": "b", "image": "i", "livenessProbe": {"exec": {"command": ["x"]}}}]}),
                "spec.initContainers[0].livenessProbe: Forbidden: may not be set for init containers without restartPolicy=Always",
            ),
            (
                json!({"ephemeralContainers": [{"name": "b", "image": "i", "targetContainerName": "x"}]}),
                "spec.ephemeralContainers[0].targetContainerName: Not found: \"x\"",
            ),
            (
                json!({"ephemeralContainers": [{"name": "b", "image": "i", "ports": [{"containerPort": 1}]}]}),
                "spec.ephemeralContainers[0].ports: Forbidden: cannot be set for an Ephemeral Container",
            ),
        ];
        for (patch, want) in cases {
            let got = check(patch.clone(), true);
            assert!(got.len() == 1 && got[0].starts_with(want), "{patch}: {got:?}");
        }
    }
}
