//! What objects cost a namespace: the amounts that a ResourceQuota counts, and which quotas are about an object.
//!
//! Upstream counterparts: pkg/quota/v1/evaluator/core, k8s.io/apiserver/pkg/quota/v1/generic. Admission charges by it
//! before a write and the quota controller counts by it afterwards, so both must use this and nothing else. Left out:
//! device classes (`*.deviceclass.resource.k8s.io/…`), whose claims cost one object each.
use k8s_openapi::api::core::v1::PodSpec;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

use crate::core::v1::pod_spec::requests::{compute_qos, pod_limits, pod_requests};
use crate::object::{entries, items, text};
use crate::quantity::{Amount, ResourceList, parse};

const OF_STORAGE_CLASS: &str = ".storageclass.storage.k8s.io/";
const STORAGE_CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";
const POD_RESOURCES: [&str; 11] = [
    "cpu",
    "memory",
    "ephemeral-storage",
    "requests.cpu",
    "requests.memory",
    "requests.ephemeral-storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
    "pods",
    "count/pods",
];
const CLAIM_RESOURCES: [&str; 2] = ["persistentvolumeclaims", "requests.storage"];
/// Kinds that have been counted under their plain names since before there was `count/`.
const PLAIN_COUNTS: [&str; 4] = ["configmaps", "replicationcontrollers", "resourcequotas", "secrets"];
/// What a quota on cpu or memory makes every container ask for.
const REQUIRED: [&str; 6] =
    ["cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"];

/// `count/deployments.apps`: what a quota calls the number of such objects.
pub fn count_name(group: &str, resource: &str) -> String {
    let dot = if group.is_empty() { "" } else { "." };
    format!("count/{resource}{dot}{group}")
}

/// Whether objects of the resource can cost anything of what a quota calls `name`.
pub fn is_about(name: &str, group: &str, resource: &str) -> bool {
    if name == count_name(group, resource) {
        return true;
    }
    match (group, resource) {
        ("", "pods") => {
            let prefixed = name.starts_with("hugepages-") || name.starts_with("requests.hugepages-");
            POD_RESOURCES.contains(&name) || prefixed || (is_extended(name) && name.starts_with("requests."))
        }
        ("", "services") => {
            matches!(name, "services" | "services.nodeports" | "services.loadbalancers")
        }
        ("", "persistentvolumeclaims") => {
            let of_class = name.split_once(OF_STORAGE_CLASS).map(|(_, resource)| resource);
            CLAIM_RESOURCES.contains(&of_class.unwrap_or(name))
        }
        ("", resource) => PLAIN_COUNTS.contains(&resource) && name == resource,
        _ => false,
    }
}

/// Whether it is not one of Kubernetes' own resources.
fn is_extended(name: &str) -> bool {
    name.contains('/') && !name.contains("kubernetes.io/") && !name.starts_with("count/")
}

/// What the object costs. `now` ends the cost of pods that should be gone by then.
pub fn usage(group: &str, resource: &str, object: &Value, now: jiff::Timestamp) -> ResourceList {
    let mut usage = ResourceList::from([(count_name(group, resource), Amount::ONE)]);
    match (group, resource) {
        ("", "pods") => pod_usage(object, now, &mut usage),
        ("", "services") => service_usage(object, &mut usage),
        ("", "persistentvolumeclaims") => claim_usage(object, &mut usage),
        ("", resource) if PLAIN_COUNTS.contains(&resource) => {
            usage.insert(resource.to_string(), Amount::ONE);
        }
        _ => {}
    }
    usage
}

fn pod_usage(pod: &Value, now: jiff::Timestamp, usage: &mut ResourceList) {
    if has_ended(pod, now) {
        return;
    }
    let spec = spec_of(pod);
    usage.extend(compute_usage(pod_requests(&spec), pod_limits(&spec)));
}

fn spec_of(pod: &Value) -> PodSpec {
    pod.get("spec").cloned().and_then(|spec| serde_json::from_value(spec).ok()).unwrap_or_default()
}

/// Finished pods, and those that are past their time, cost nothing but their place in the store.
fn has_ended(pod: &Value, now: jiff::Timestamp) -> bool {
    if matches!(text(pod, "/status/phase"), "Failed" | "Succeeded") {
        return true;
    }
    let deleted = text(pod, "/metadata/deletionTimestamp").parse::<jiff::Timestamp>();
    let grace = pod.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64);
    match (deleted, grace) {
        (Ok(deleted), Some(grace)) => {
            deleted.saturating_add(jiff::SignedDuration::from_secs(grace)).is_ok_and(|end| now > end)
        }
        _ => false,
    }
}

fn compute_usage(requests: ResourceList, limits: ResourceList) -> ResourceList {
    let mut usage = ResourceList::from([("pods".to_string(), Amount::ONE)]);
    for (name, amount) in requests {
        let plain = matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage");
        let counted = plain || name.starts_with("hugepages-");
        if counted || is_extended(&name) {
            usage.insert(format!("requests.{name}"), amount);
        }
        if counted {
            usage.insert(name, amount);
        }
    }
    for (name, amount) in limits {
        if matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage") {
            usage.insert(format!("limits.{name}"), amount);
        }
    }
    usage
}

fn service_usage(service: &Value, usage: &mut ResourceList) {
    let ports = items(service, "/spec/ports");
    let kind = text(service, "/spec/type");
    let allocates = service.pointer("/spec/allocateLoadBalancerNodePorts") != Some(&Value::Bool(false));
    let node_ports = match kind {
        "NodePort" => ports.len(),
        "LoadBalancer" if allocates => ports.len(),
        "LoadBalancer" => {
            ports.iter().filter(|p| p.get("nodePort").and_then(Value::as_i64).unwrap_or(0) != 0).count()
        }
        _ => 0,
    };
    usage.insert("services".to_string(), Amount::ONE);
    usage.insert("services.nodeports".to_string(), Amount::units(node_ports as i64));
    usage.insert("services.loadbalancers".to_string(), Amount::units(i64::from(kind == "LoadBalancer")));
}

fn claim_usage(claim: &Value, usage: &mut ResourceList) {
    let annotated =
        claim.pointer("/metadata/annotations").and_then(|a| a.get(STORAGE_CLASS_ANNOTATION)?.as_str());
    let class = annotated.unwrap_or_else(|| text(claim, "/spec/storageClassName"));
    let amount = |pointer: &str| {
        let (amount, _) = parse(claim.pointer(pointer)?.as_str()?)?;
        Some(Amount::units(amount.value()))
    };
    let mut costs = vec![(CLAIM_RESOURCES[0], Amount::ONE)];
    if let Some(requested) = amount("/spec/resources/requests/storage") {
        let allocated = amount("/status/allocatedResources/storage").unwrap_or_default();
        costs.push((CLAIM_RESOURCES[1], requested.max(allocated)));
    }
    for (name, amount) in costs {
        usage.insert(name.to_string(), amount);
        if !class.is_empty() {
            usage.insert(format!("{class}{OF_STORAGE_CLASS}{name}"), amount);
        }
    }
}

/// What containers fail to ask for though the quota counts it: `limits.cpu for: a,b; memory for: b`.
pub fn missing_requests(pod: &Value, counted: &[String]) -> Option<String> {
    let spec = spec_of(pod);
    let set = |resources: &k8s_openapi::api::core::v1::ResourceRequirements| {
        [&resources.requests, &resources.limits]
            .iter()
            .any(|list| list.as_ref().is_some_and(|l| !l.is_empty()))
    };
    if spec.resources.as_ref().is_some_and(set) {
        return None;
    }
    let mut missing: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let resources = container.resources.as_ref();
        let has = |list: Option<&BTreeMap<String, _>>, name: &str| list.is_some_and(|l| l.contains_key(name));
        for name in REQUIRED.iter().filter(|name| counted.iter().any(|c| c == *name)) {
            let there = match name.strip_prefix("limits.") {
                Some(name) => has(resources.and_then(|r| r.limits.as_ref()), name),
                None => {
                    let name = name.strip_prefix("requests.").unwrap_or(name);
                    has(resources.and_then(|r| r.requests.as_ref()), name)
                }
            };
            if !there {
                missing.entry(name).or_default().insert(&container.name);
            }
        }
    }
    let parts: Vec<String> = missing
        .into_iter()
        .map(|(name, containers)| {
            format!("{name} for: {}", containers.into_iter().collect::<Vec<_>>().join(","))
        })
        .collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// Whether all of the quota's scopes include the object.
pub fn in_scope(quota: &Value, group: &str, resource: &str, object: &Value) -> bool {
    let plain = items(quota, "/spec/scopes").iter().filter_map(Value::as_str);
    plain.into_iter().all(|scope| matches_scope(scope, "Exists", &[], group, resource, object))
        && items(quota, "/spec/scopeSelector/matchExpressions").iter().all(|selector| {
            let values: Vec<&str> = items(selector, "/values").iter().filter_map(Value::as_str).collect();
            let (scope, operator) = (text(selector, "/scopeName"), text(selector, "/operator"));
            matches_scope(scope, operator, &values, group, resource, object)
        })
}

fn matches_scope(
    scope: &str,
    operator: &str,
    values: &[&str],
    group: &str,
    resource: &str,
    object: &Value,
) -> bool {
    match (group, resource, scope) {
        ("", "pods", "Terminating") => is_terminating(object),
        ("", "pods", "NotTerminating") => !is_terminating(object),
        ("", "pods", "BestEffort") => is_best_effort(object),
        ("", "pods", "NotBestEffort") => !is_best_effort(object),
        ("", "pods", "PriorityClass") => {
            let class = text(object, "/spec/priorityClassName");
            let classes: Vec<&str> = Some(class).filter(|class| !class.is_empty()).into_iter().collect();
            selects(operator, values, &classes)
        }
        ("", "pods", "CrossNamespacePodAffinity") => has_cross_namespace_affinity(object),
        ("", "persistentvolumeclaims", "VolumeAttributesClass") => {
            let classes = [
                "/spec/volumeAttributesClassName",
                "/status/currentVolumeAttributesClassName",
                "/status/modifyVolumeStatus/targetVolumeAttributesClassName",
            ];
            let classes: Vec<&str> =
                classes.iter().map(|at| text(object, at)).filter(|class| !class.is_empty()).collect();
            selects(operator, values, &classes)
        }
        _ => false,
    }
}

/// Whether one of the object's classes is selected, or none where none is wanted.
fn selects(operator: &str, values: &[&str], classes: &[&str]) -> bool {
    match operator {
        "In" => classes.iter().any(|class| values.contains(class)),
        "NotIn" => classes.is_empty() || classes.iter().any(|class| !values.contains(class)),
        "DoesNotExist" => classes.is_empty(),
        _ => !classes.is_empty(),
    }
}

/// Whether the pod ends by itself, which is what quotas call terminating.
pub fn is_terminating(pod: &Value) -> bool {
    pod.pointer("/spec/activeDeadlineSeconds").and_then(Value::as_i64).is_some_and(|seconds| seconds >= 0)
}

fn is_best_effort(pod: &Value) -> bool {
    match text(pod, "/status/qosClass") {
        "" => compute_qos(&spec_of(pod)) == "BestEffort",
        class => class == "BestEffort",
    }
}

fn has_cross_namespace_affinity(pod: &Value) -> bool {
    let crosses = |term: &Value| {
        !items(term, "/namespaces").is_empty() || term.get("namespaceSelector").is_some_and(|s| !s.is_null())
    };
    ["podAffinity", "podAntiAffinity"].iter().any(|kind| {
        let at = |list: &str| format!("/spec/affinity/{kind}/{list}DuringSchedulingIgnoredDuringExecution");
        items(pod, &at("required")).iter().any(crosses)
            || items(pod, &at("preferred")).iter().filter_map(|t| t.get("podAffinityTerm")).any(crosses)
    })
}

/// The names that the quota has a limit for in effect and that the resource's objects can cost.
pub fn counted(quota: &Value, group: &str, resource: &str) -> Vec<String> {
    let hard = entries(quota, "/status/hard").map(|(name, _)| name.clone());
    hard.filter(|name| is_about(name, group, resource)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantity::{Format, canonical};
    use serde_json::json;

    fn shown(usage: &ResourceList) -> Vec<String> {
        usage.iter().map(|(k, v)| format!("{k}={}", canonical(*v, Format::DecimalSi))).collect()
    }

    #[test]
    fn objects_cost_what_upstream_says() {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let pod = json!({"spec": {"containers": [{"name": "c", "resources": {
            "requests": {"cpu": "500m", "example.com/dongle": "2"}, "limits": {"cpu": "1"}}}]}});
        let service = json!({"spec": {"type": "LoadBalancer", "ports": [{"port": 1}, {"port": 2}]}});
        let claim =
            json!({"spec": {"storageClassName": "gold", "resources": {"requests": {"storage": "1500m"}}}});
        let cases = [
            (
                "pods",
                &pod,
                "count/pods=1 cpu=500m limits.cpu=1 pods=1 requests.cpu=500m requests.example.com/dongle=2",
            ),
            (
                "services",
                &service,
                "count/services=1 services=1 services.loadbalancers=1 services.nodeports=2",
            ),
            (
                "persistentvolumeclaims",
                &claim,
                "count/persistentvolumeclaims=1 gold.storageclass.storage.k8s.io/persistentvolumeclaims=1 \
                 gold.storageclass.storage.k8s.io/requests.storage=2 persistentvolumeclaims=1 requests.storage=2",
            ),
            ("secrets", &json!({}), "count/secrets=1 secrets=1"),
        ];
        for (resource, object, want) in cases {
            let usage = usage("", resource, object, now);
            assert_eq!(shown(&usage).join(" "), want);
            assert!(usage.keys().all(|name| is_about(name, "", resource)), "{resource}");
        }
        assert_eq!(shown(&usage("apps", "replicasets", &json!({}), now)), ["count/replicasets.apps=1"]);
        let mut done = pod.clone();
        done["status"]["phase"] = "Succeeded".into();
        assert_eq!(shown(&usage("", "pods", &done, now)), ["count/pods=1"]);
        let counted = ["cpu", "limits.memory", "pods"].map(String::from);
        assert_eq!(missing_requests(&pod, &counted).as_deref(), Some("limits.memory for: c"));
    }

    #[test]
    fn scopes_choose_pods() {
        let pod =
            json!({"spec": {"priorityClassName": "high", "activeDeadlineSeconds": 5, "containers": []}});
        let cases = [
            (json!({"scopes": ["Terminating"]}), true),
            (json!({"scopes": ["Terminating", "NotBestEffort"]}), false),
            (json!({"scopes": ["BestEffort"]}), true),
            (json!({}), true),
            (
                json!({"scopeSelector": {"matchExpressions": [
                    {"scopeName": "PriorityClass", "operator": "In", "values": ["high"]}]}}),
                true,
            ),
            (
                json!({"scopeSelector": {"matchExpressions": [
                    {"scopeName": "PriorityClass", "operator": "NotIn", "values": ["high"]}]}}),
                false,
            ),
        ];
        for (spec, want) in cases {
            assert_eq!(in_scope(&json!({"spec": spec}), "", "pods", &pod), want, "{spec}");
        }
        assert!(!in_scope(&json!({"spec": {"scopes": ["Terminating"]}}), "", "secrets", &json!({})));
    }
}
