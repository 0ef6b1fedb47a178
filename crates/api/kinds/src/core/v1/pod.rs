//! Pod.
//!
//! Upstream counterpart: pkg/registry/core/pod/strategy.go, ValidatePodCreate in validation.go. What stays true: a
//! pod's generation grows with every change of its spec (PodObservedGenerationTracking).
mod printer;
mod status;
mod subresources;
mod update;

use k8s_openapi::api::core::v1::PodSpec;
use serde_json::{Value, json};

pub use subresources::{EPHEMERAL_CONTAINERS, RESIZE};

use super::pod_spec::{self, Scope, annotations, containers, volumes, warnings};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Kind, Rest};
use crate::names;
use crate::object::{
    bump_generation, child, items, items_mut, keep, metadata, read, remove, same, set_generation, text, truth,
};

fn defaults(object: &mut Value) {
    if let Some(spec) = object.get_mut("spec") {
        pod_spec::pod_only_defaults(spec);
        pod_spec::defaults(spec);
    }
    let ip = text(object, "/status/podIP").to_string();
    if !ip.is_empty() && text(object, "/status/podIPs/0/ip") != ip {
        object["status"]["podIPs"] = json!([{"ip": ip}]);
    }
}

fn prepare_create(object: &mut Value) {
    if let Some(spec) = object.get_mut("spec") {
        pod_spec::drop_disabled_fields(spec);
    }
    set_generation(object, 1);
    let spec: PodSpec = read(object.get("spec"), &Path::new("spec")).unwrap_or_default();
    object["status"] = json!({"phase": "Pending", "qosClass": pod_spec::compute_qos(&spec)});
    if !items(object, "/spec/schedulingGates").is_empty() {
        object["status"]["conditions"] = json!([{
            "type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates",
        }]);
    }
    merge_label_keys(object);
}

/// matchLabelKeys and mismatchLabelKeys become expressions of the selector beside them, once, on create.
fn merge_label_keys(object: &mut Value) {
    let labels = object.pointer("/metadata/labels").cloned().unwrap_or_default();
    let merge = |term: &mut Value, keys: &str, operator: &str| {
        let expressions: Vec<Value> = items(term, keys)
            .iter()
            .filter_map(Value::as_str)
            .filter_map(|key| {
                labels.get(key).map(|v| json!({"key": key, "operator": operator, "values": [v]}))
            })
            .collect();
        if expressions.is_empty() || !term.get("labelSelector").is_some_and(Value::is_object) {
            return;
        }
        let list = &mut term["labelSelector"]["matchExpressions"];
        match list.as_array_mut() {
            Some(list) => list.extend(expressions),
            None => *list = expressions.into(),
        }
    };
    for affinity in ["podAffinity", "podAntiAffinity"] {
        let base = format!("/spec/affinity/{affinity}");
        let preferred = format!("{base}/preferredDuringSchedulingIgnoredDuringExecution");
        for term in items_mut(object, &preferred).iter_mut().filter_map(|t| t.get_mut("podAffinityTerm")) {
            merge(term, "/matchLabelKeys", "In");
            merge(term, "/mismatchLabelKeys", "NotIn");
        }
        for term in items_mut(object, &format!("{base}/requiredDuringSchedulingIgnoredDuringExecution")) {
            merge(term, "/matchLabelKeys", "In");
            merge(term, "/mismatchLabelKeys", "NotIn");
        }
    }
    for constraint in items_mut(object, "/spec/topologySpreadConstraints") {
        merge(constraint, "/matchLabelKeys", "In");
    }
}

fn prepare_update(new: &mut Value, old: &Value) {
    if let Some(spec) = new.get_mut("spec") {
        pod_spec::drop_disabled_fields(spec);
    }
    keep(new, old, "status");
    bump(new, old);
}

/// Sets the generation: one more where the spec changed.
fn bump(new: &mut Value, old: &Value) {
    let changed = !same(new.get("spec"), old.get("spec"));
    bump_generation(new, old, changed);
}

/// What create and update have in common.
fn validate_spec(object: &Value) -> (PodSpec, ErrorList) {
    let path = Path::new("spec");
    let spec: PodSpec = match read(object.get("spec"), &path) {
        Ok(spec) => spec,
        Err(error) => return (PodSpec::default(), vec![error]),
    };
    let meta = metadata(object);
    let mut errors = ErrorList::new();
    let at = Path::new("metadata").child("annotations");
    annotations::validate(meta.annotations.as_ref(), &spec, &at, &mut errors);
    errors.extend(pod_spec::validate(&spec, Some(&meta), &path));
    let scope = Scope {
        spec: &spec,
        is_pod: true,
        volumes: Default::default(),
        claims: Default::default(),
        host_users: true,
    };
    volumes::validate_tokens_have_account(&scope, &path, &mut errors);
    for (i, container) in spec.containers.iter().enumerate() {
        containers::validate_for_pod(container, &path.child("containers").index(i), &mut errors);
    }
    for (i, container) in spec.init_containers.iter().flatten().enumerate() {
        containers::validate_for_pod(container, &path.child("initContainers").index(i), &mut errors);
    }
    (spec, errors)
}

fn validate(object: &Value) -> ErrorList {
    let (spec, mut errors) = validate_spec(object);
    let path = Path::new("spec");
    if spec.ephemeral_containers.as_ref().is_some_and(|c| !c.is_empty()) {
        errors.push(FieldError::forbidden(&path.child("ephemeralContainers"), "cannot be set on create"));
    }
    let gated = spec.scheduling_gates.as_ref().is_some_and(|g| !g.is_empty());
    if gated && spec.node_name.as_ref().is_some_and(|n| !n.is_empty()) {
        let detail = "cannot be set until all schedulingGates have been cleared";
        errors.push(FieldError::forbidden(&path.child("nodeName"), detail));
    }
    let meta = metadata(object);
    annotations::validate_match(meta.annotations.as_ref(), &spec, &path, &mut errors);
    errors
}

fn warn(new: &Value, old: Option<&Value>) -> Vec<String> {
    if old.is_some() {
        return Vec::new();
    }
    let mut out = Vec::new();
    let messages = names::dns1123_label(text(new, "/metadata/name"));
    if !messages.is_empty() {
        out.push(format!(
            "metadata.name: this is used in the Pod's hostname, which can result in surprising behavior; a DNS label is \
             recommended: [{}]",
            messages.join(" ")
        ));
    }
    if let Ok(spec) = read::<PodSpec>(new.get("spec"), &Path::new("spec")) {
        out.extend(warnings::warnings(&spec, &metadata(new), &Path::new("")));
    }
    out
}

/// Metadata that a write to a subresource may not touch.
fn keep_metadata(new: &mut Value, old: &Value, keys: &[&str]) {
    let stored = old.get("metadata").cloned().unwrap_or_default();
    let meta = child(new, "metadata");
    keys.iter().for_each(|key| keep(meta, &stored, key));
}

fn selectable(object: &Value) -> Vec<(&'static str, String)> {
    let pod_ip = match text(object, "/status/podIPs/0/ip") {
        "" => text(object, "/status/podIP"),
        ip => ip,
    };
    vec![
        ("spec.nodeName", text(object, "/spec/nodeName").to_string()),
        ("spec.restartPolicy", text(object, "/spec/restartPolicy").to_string()),
        ("spec.schedulerName", text(object, "/spec/schedulerName").to_string()),
        ("spec.serviceAccountName", text(object, "/spec/serviceAccountName").to_string()),
        ("spec.hostNetwork", truth(object, "/spec/hostNetwork").to_string()),
        ("status.phase", text(object, "/status/phase").to_string()),
        ("status.podIP", pod_ip.to_string()),
        // Known, but never set: upstream converts the label and forgets the value.
        ("status.podIPs", String::new()),
        ("status.nominatedNodeName", text(object, "/status/nominatedNodeName").to_string()),
    ]
}

/// What becomes of `gracePeriodSeconds` when a pod is deleted: 0 where it never ran or has ended.
pub fn deletion_grace_period_seconds(pod: &Value, requested: Option<i64>) -> i64 {
    let own = || pod.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    let ended = ["Failed", "Succeeded"].contains(&text(pod, "/status/phase"));
    if text(pod, "/spec/nodeName").is_empty() || ended {
        return 0;
    }
    match requested.unwrap_or_else(own) {
        negative if negative < 0 => 1,
        seconds => seconds,
    }
}

fn prepare_status(new: &mut Value, old: &Value) {
    keep(new, old, "spec");
    keep_metadata(new, old, &["deletionTimestamp", "ownerReferences", "generation"]);
    let status = child(new, "status");
    if text(status, "/qosClass").is_empty()
        && let Some(class) = old.pointer("/status/qosClass")
    {
        status["qosClass"] = class.clone();
    }
    status::preserve_observed_generation(new, old);
    if new.get("status").is_some_and(|s| s.as_object().is_some_and(serde_json::Map::is_empty)) {
        remove(new, "status");
    }
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create,
        prepare_update,
        validate,
        validate_update: update::validate_update,
        warnings: warn,
    },
    status: Some(Rest {
        prepare_update: prepare_status,
        validate_update: status::validate_update,
        warnings: status::warnings,
        ..Rest::ANY
    }),
    subresources: &[("ephemeralcontainers", EPHEMERAL_CONTAINERS), ("resize", RESIZE)],
    graceful: true,
    columns: printer::COLUMNS,
    row: printer::row,
    selectable,
    ..Kind::plain("", "v1", "Pod")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn create_sets_status_and_merges_label_keys() {
        let mut pod = json!({"metadata": {"name": "a", "labels": {"app": "x"}}, "status": {"phase": "Running"},
            "spec": {"containers": [{"name": "c", "image": "i"}], "schedulingGates": [{"name": "g"}],
                "topologySpreadConstraints": [{"matchLabelKeys": ["app"], "labelSelector": {}}]}});
        prepare_create(&mut pod);
        assert_eq!(pod["status"]["phase"], "Pending");
        assert_eq!(pod["status"]["qosClass"], "BestEffort");
        assert_eq!(pod["status"]["conditions"][0]["reason"], "SchedulingGated");
        assert_eq!(pod["metadata"]["generation"], 1);
        assert_eq!(
            pod["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchExpressions"],
            json!([{"key": "app", "operator": "In", "values": ["x"]}])
        );
    }

    #[test]
    fn create_refuses() {
        let mut pod = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n",
            "containers": [{"name": "c", "image": " i"}], "schedulingGates": [{"name": "g"}]}});
        defaults(&mut pod);
        let errors: Vec<String> = validate(&pod).iter().map(ToString::to_string).collect();
        assert_eq!(
            errors,
            [
                "spec.containers[0].image: Invalid value: \" i\": must not have leading or trailing whitespace",
                "spec.nodeName: Forbidden: cannot be set until all schedulingGates have been cleared",
            ]
        );
    }

    #[test]
    fn grace_periods() {
        let pod = json!({"spec": {"nodeName": "n", "terminationGracePeriodSeconds": 30}, "status": {"phase": "Running"}});
        for (requested, want) in [(None, 30), (Some(0), 0), (Some(-5), 1), (Some(7), 7)] {
            assert_eq!(deletion_grace_period_seconds(&pod, requested), want);
        }
        assert_eq!(deletion_grace_period_seconds(&json!({"spec": {}}), Some(9)), 0);
    }
}
