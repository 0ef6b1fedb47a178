//! PodSpec: defaults, validation and resources, for Pods and for every kind that holds a pod template.
//!
//! Upstream counterpart: ValidatePodSpec in pkg/apis/core/validation/validation.go, and what it calls, one topic a
//! file. Deliberately different: upstream's tolerance for invalid data that older releases stored is left out, since
//! this release is the first; features that 1.36 has off by default are off.
pub mod affinity;
pub mod annotations;
pub mod containers;
pub mod defaults;
pub mod dns;
pub mod env;
pub mod mounts;
pub mod older_volumes;
pub mod probes;
pub mod projected;
pub mod requests;
pub mod resources;
pub mod security_context;
pub mod tolerations;
pub mod topology_spread;
pub mod volumes;
pub mod warnings;
pub mod windows;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, PodSpec, Volume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use defaults::{defaults, pod_only_defaults};
pub use requests::{compute_qos, pod_limits, pod_qos, pod_requests};

use crate::field::{ErrorList, FieldError, Path};
use crate::meta::{validate_label_name, validate_labels};
use crate::names;
use crate::object::or_empty;

/// What the checks of a spec's parts need to know of the whole.
pub struct Scope<'a> {
    pub spec: &'a PodSpec,
    /// A Pod, not a template.
    pub is_pod: bool,
    /// The volumes that are valid, by name.
    pub volumes: BTreeMap<&'a str, &'a Volume>,
    pub claims: BTreeSet<&'a str>,
    /// The pod runs in the host's user namespace.
    pub host_users: bool,
}

impl Scope<'_> {
    fn grace_period(&self) -> Option<i64> {
        self.spec.termination_grace_period_seconds
    }
    fn os_name(&self) -> &str {
        self.spec.os.as_ref().map_or("", |os| os.name.as_str())
    }
}

/// All that is wrong with a spec. `meta` is the Pod's metadata, `None` for a template.
pub fn validate(spec: &PodSpec, meta: Option<&ObjectMeta>, path: &Path) -> ErrorList {
    let mut errors = ErrorList::new();
    if spec.termination_grace_period_seconds.is_none() {
        errors.push(FieldError::required(&path.child("terminationGracePeriodSeconds"), ""));
    }
    let (valid_volumes, volume_errors) = volumes::validate_volumes(spec, meta, &path.child("volumes"));
    errors.extend(volume_errors);
    let scope = Scope {
        spec,
        is_pod: meta.is_some(),
        volumes: valid_volumes,
        claims: resources::claim_names(spec),
        host_users: spec.host_users != Some(false),
    };
    resources::validate_pod_claims(meta, spec, &path.child("resourceClaims"), &mut errors);
    containers::validate_containers(&scope, &path.child("containers"), &mut errors);
    containers::validate_init_containers(&scope, &path.child("initContainers"), &mut errors);
    containers::validate_ephemeral_containers(&scope, &path.child("ephemeralContainers"), &mut errors);
    resources::validate_pod_resources(&scope, path, &mut errors);
    host_network(&scope, path, &mut errors);
    let restart_policy = spec.restart_policy.as_deref().unwrap_or_default();
    one_of(restart_policy, &["Always", "OnFailure", "Never"], &path.child("restartPolicy"), &mut errors);
    let dns_policies = &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    one_of(or_empty(&spec.dns_policy), dns_policies, &path.child("dnsPolicy"), &mut errors);
    errors.extend(validate_labels(spec.node_selector.as_ref(), &path.child("nodeSelector")));
    security_context::validate_pod(spec, &path.child("securityContext"), &mut errors);
    affinity::validate(spec.affinity.as_ref(), &path.child("affinity"), &mut errors);
    dns::validate(spec, &path.child("dnsConfig"), &mut errors);
    for (i, gate) in spec.readiness_gates.iter().flatten().enumerate() {
        let at = path.child("readinessGates").index(i).child("conditionType");
        errors.extend(validate_label_name(&gate.condition_type, &at));
    }
    scheduling_gates(spec, &path.child("schedulingGates"), &mut errors);
    topology_spread::validate(spec, &path.child("topologySpreadConstraints"), &mut errors);
    windows::validate_host_process(spec, path, &mut errors);
    host_users(spec, path, &mut errors);
    dns::validate_hostname_override(spec, path, &mut errors);
    names_and_numbers(spec, path, &mut errors);
    windows::validate_os(spec, path, &mut errors);
    env::validate_file_key_volumes(spec, path, &mut errors);
    errors
}

/// The checks of single fields that upstream makes last.
fn names_and_numbers(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let mut named = |key: &str, value: &Option<String>, check: fn(&str) -> Vec<String>| {
        let value = or_empty(value);
        if !value.is_empty() {
            errors.extend(FieldError::invalid_each(&path.child(key), value, check(value)));
        }
    };
    named("serviceAccountName", &spec.service_account_name, names::dns1123_subdomain);
    named("nodeName", &spec.node_name, names::dns1123_subdomain);
    if let Some(seconds) = spec.active_deadline_seconds {
        for message in names::in_range(seconds, 1, i64::from(i32::MAX)) {
            errors.push(FieldError::invalid(&path.child("activeDeadlineSeconds"), seconds, message));
        }
    }
    let mut named = |key: &str, value: &Option<String>, check: fn(&str) -> Vec<String>| {
        let value = or_empty(value);
        if !value.is_empty() {
            errors.extend(FieldError::invalid_each(&path.child(key), value, check(value)));
        }
    };
    named("hostname", &spec.hostname, names::dns1123_label);
    named("subdomain", &spec.subdomain, names::dns1123_label);
    tolerations::validate(
        spec.tolerations.as_deref().unwrap_or_default(),
        &path.child("tolerations"),
        errors,
    );
    dns::validate_host_aliases(spec, &path.child("hostAliases"), errors);
    let mut named = |key: &str, value: &Option<String>, check: fn(&str) -> Vec<String>| {
        let value = or_empty(value);
        if !value.is_empty() {
            errors.extend(FieldError::invalid_each(&path.child(key), value, check(value)));
        }
    };
    named("priorityClassName", &spec.priority_class_name, names::dns1123_subdomain);
    if let Some(name) = &spec.runtime_class_name {
        let at = path.child("runtimeClassName");
        errors.extend(FieldError::invalid_each(&at, name, names::dns1123_subdomain(name)));
    }
    if let Some(policy) = &spec.preemption_policy {
        one_of(policy, &["PreemptLowerPriority", "Never"], &path.child("preemptionPolicy"), errors);
    }
    if let Some(overhead) = &spec.overhead {
        resources::validate_overhead(overhead, &path.child("overhead"), errors);
    }
}

/// A required text that has to be one of `supported`.
pub fn one_of(value: &str, supported: &[&str], path: &Path, errors: &mut ErrorList) {
    if value.is_empty() {
        errors.push(FieldError::required(path, ""));
    } else if !supported.contains(&value) {
        errors.push(FieldError::not_supported_as_listed(path, value, supported));
    }
}

fn host_network(scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    if scope.spec.host_network != Some(true) {
        return;
    }
    for (i, container) in scope.spec.containers.iter().enumerate() {
        for (j, port) in container.ports.iter().flatten().enumerate() {
            let host_port = port.host_port.unwrap_or_default();
            if (scope.is_pod || host_port != 0) && host_port != port.container_port {
                let at = path.child("containers").index(i).child("ports").index(j).child("hostPort");
                let detail = "must match `containerPort` when `hostNetwork` is true";
                errors.push(FieldError::invalid(&at, host_port, detail));
            }
        }
    }
}

fn scheduling_gates(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let mut seen = BTreeSet::new();
    for (i, gate) in spec.scheduling_gates.iter().flatten().enumerate() {
        errors.extend(validate_label_name(&gate.name, &path.index(i)));
        if !seen.insert(gate.name.as_str()) {
            errors.push(FieldError::duplicate(&path.index(i), gate.name.as_str()));
        }
    }
}

fn host_users(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    if spec.host_users != Some(false) {
        return;
    }
    let detail = "when `hostUsers` is false";
    let host = [("hostNetwork", spec.host_network), ("HostPID", spec.host_pid), ("HostIPC", spec.host_ipc)];
    for (key, _) in host.iter().filter(|(_, set)| *set == Some(true)) {
        errors.push(FieldError::forbidden(&path.child(key), detail));
    }
    visit_containers(spec, path, |container, at| {
        if container.volume_devices.as_ref().is_some_and(|d| !d.is_empty()) {
            errors.push(FieldError::forbidden(&at.child("volumeDevices"), detail));
        }
    });
}

/// Visits init, regular and ephemeral containers with their paths, in upstream's order.
pub fn visit_containers(spec: &PodSpec, path: &Path, mut visit: impl FnMut(&Container, &Path)) {
    for (i, container) in spec.init_containers.iter().flatten().enumerate() {
        visit(container, &path.child("initContainers").index(i));
    }
    for (i, container) in spec.containers.iter().enumerate() {
        visit(container, &path.child("containers").index(i));
    }
    for (i, container) in spec.ephemeral_containers.iter().flatten().enumerate() {
        visit(&as_container(container), &path.child("ephemeralContainers").index(i));
    }
}

/// An ephemeral container without its target.
pub fn as_container(ephemeral: &EphemeralContainer) -> Container {
    let e = ephemeral.clone();
    Container {
        args: e.args,
        command: e.command,
        env: e.env,
        env_from: e.env_from,
        image: e.image,
        image_pull_policy: e.image_pull_policy,
        lifecycle: e.lifecycle,
        liveness_probe: e.liveness_probe,
        name: e.name,
        ports: e.ports,
        readiness_probe: e.readiness_probe,
        resize_policy: e.resize_policy,
        resources: e.resources,
        restart_policy: e.restart_policy,
        restart_policy_rules: e.restart_policy_rules,
        security_context: e.security_context,
        startup_probe: e.startup_probe,
        stdin: e.stdin,
        stdin_once: e.stdin_once,
        termination_message_path: e.termination_message_path,
        termination_message_policy: e.termination_message_policy,
        tty: e.tty,
        volume_devices: e.volume_devices,
        volume_mounts: e.volume_mounts,
        working_dir: e.working_dir,
    }
}

/// Removes fields of features that 1.36 has off by default, as upstream's DropDisabledPodFields does.
pub fn drop_disabled_fields(spec: &mut serde_json::Value) {
    use crate::object::{items_mut, remove};
    if !spec.is_object() {
        return;
    }
    remove(spec, "schedulingGroup");
    for list in ["/containers", "/initContainers", "/ephemeralContainers"] {
        for lifecycle in items_mut(spec, list).iter_mut().filter_map(|c| c.get_mut("lifecycle")) {
            remove(lifecycle, "stopSignal");
        }
    }
    for source in items_mut(spec, "/volumes").iter_mut().flat_map(|v| items_mut(v, "/projected/sources")) {
        remove(source, "clusterTrustBundle");
        remove(source, "podCertificate");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Validates a defaulted spec made of `patch` laid over a small valid one.
    pub(super) fn check(patch: Value, is_pod: bool) -> Vec<String> {
        let mut spec = json!({"containers": [{"name": "a", "image": "i"}]});
        for (key, value) in patch.as_object().unwrap() {
            spec[key] = value.clone();
        }
        if is_pod {
            pod_only_defaults(&mut spec);
        }
        defaults(&mut spec);
        let spec: PodSpec = serde_json::from_value(spec).unwrap();
        let meta = ObjectMeta { name: Some("p".to_string()), ..ObjectMeta::default() };
        validate(&spec, is_pod.then_some(&meta), &Path::new("spec")).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn whole_spec_rules() {
        let cases: Vec<(Value, &[&str])> = vec![
            (json!({}), &[]),
            (json!({"containers": []}), &["spec.containers: Required value"]),
            (
                json!({"restartPolicy": "x"}),
                &[
                    "spec.restartPolicy: Unsupported value: \"x\": supported values: \"Always\", \"OnFailure\", \"Never\"",
                ],
            ),
            (
                json!({"nodeName": "A"}),
                &["spec.nodeName: Invalid value: \"A\": a lowercase RFC 1123 subdomain must"],
            ),
            (
                json!({"activeDeadlineSeconds": 0}),
                &[
                    "spec.activeDeadlineSeconds: Invalid value: 0: must be between 1 and 2147483647, inclusive",
                ],
            ),
            (
                json!({"schedulingGates": [{"name": "a"}, {"name": "a"}]}),
                &["spec.schedulingGates[1]: Duplicate value: \"a\""],
            ),
            (
                json!({"hostUsers": false, "hostPID": true}),
                &["spec.HostPID: Forbidden: when `hostUsers` is false"],
            ),
            (json!({"preemptionPolicy": "x"}), &["spec.preemptionPolicy: Unsupported value: \"x\""]),
            (
                json!({"overhead": {"cpu": "-1"}}),
                &["spec.overhead.limits[cpu]: Invalid value: \"-1\": must be greater than or equal to 0"],
            ),
        ];
        for (patch, want) in cases {
            let got = check(patch.clone(), true);
            assert_eq!(got.len(), want.len(), "{patch}: {got:?}");
            for (got, want) in got.iter().zip(want) {
                assert!(got.starts_with(want), "{got}");
            }
        }
    }
}
