//! LimitRanger: gives containers the namespace's default resources, and holds pods and claims to its limits.
//! Upstream counterpart: plugin/pkg/admission/limitranger.
//!
//! Deliberately different: limit ranges come from the informer only. Upstream lists them from the store where it knows
//! none, which would be one more read for every pod in every namespace without any.
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{LimitRange, LimitRangeItem, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use sampan_client::Informer;
use sampan_kinds::core::v1::pod_spec::requests::{pod_limits, pod_requests};
use sampan_kinds::quantity::{Amount, ResourceList, parse};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::pod::items;
use crate::{Context, Operation, Plugin, Rejection, Request};

const ANNOTATION: &str = "kubernetes.io/limit-ranger";

struct LimitRanger {
    limit_ranges: Informer<LimitRange>,
}

pub fn new(context: &Context) -> Box<dyn Plugin> {
    Box::new(LimitRanger { limit_ranges: context.informers.of() })
}

#[async_trait]
impl Plugin for LimitRanger {
    fn name(&self) -> &'static str {
        "LimitRanger"
    }

    fn handles(&self, operation: Operation, resource: &str, subresource: &str) -> bool {
        matches!(
            (operation, resource, subresource),
            (Operation::Create, "pods" | "persistentvolumeclaims", "")
                | (Operation::Update, "persistentvolumeclaims", "")
                | (Operation::Update, "pods", "resize")
        )
    }

    async fn admit(
        &self,
        request: &Request<'_>,
        object: &mut Value,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        if request.is_for("", "pods") {
            for limits in self.limits(request.namespace) {
                default_pod(object, &limits);
            }
        }
        Ok(())
    }

    async fn validate(
        &self,
        request: &Request<'_>,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<(), Rejection> {
        let Some(object) = object.filter(|_| request.group.is_empty()) else { return Ok(()) };
        // what is being deleted may still lose its finalizers
        if old.is_some_and(|old| !old["metadata"]["deletionTimestamp"].is_null()) {
            return Ok(());
        }
        for limits in self.limits(request.namespace) {
            let wrong = match request.resource {
                "pods" => wrong_in_pod(object, &limits),
                _ => wrong_in_claim(object, &limits),
            };
            match wrong.as_slice() {
                [] => {}
                [one] => return Err(Rejection::forbidden(one)),
                several => return Err(Rejection::forbidden(format!("[{}]", several.join(", ")))),
            }
        }
        Ok(())
    }
}

impl LimitRanger {
    fn limits(&self, namespace: &str) -> Vec<Vec<LimitRangeItem>> {
        let ranges: Vec<Arc<LimitRange>> = self.limit_ranges.list_in(namespace);
        ranges.iter().filter_map(|range| Some(range.spec.as_ref()?.limits.clone())).collect()
    }
}

fn default_pod(pod: &mut Value, limits: &[LimitRangeItem]) {
    let (mut requests, mut maxima) = (BTreeMap::new(), BTreeMap::new());
    for item in limits.iter().filter(|item| item.type_ == "Container") {
        requests.extend(item.default_request.iter().flatten());
        maxima.extend(item.default.iter().flatten());
    }
    let mut notes: Vec<String> = Vec::new();
    for (list, what) in [("containers", "container"), ("initContainers", "init container")] {
        for container in pod["spec"].get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let name = container["name"].as_str().unwrap_or_default().to_string();
            let limited = fill(container, "limits", &maxima);
            let requested = fill(container, "requests", &requests);
            for (set, word) in [(requested, "request"), (limited, "limit")] {
                if !set.is_empty() {
                    notes.push(format!("{} {word} for {what} {name}", set.join(", ")));
                }
            }
        }
    }
    if notes.is_empty() {
        return;
    }
    let annotations = &mut pod["metadata"]["annotations"];
    if !annotations.is_object() {
        *annotations = json!({});
    }
    annotations[ANNOTATION] = json!(format!("LimitRanger plugin set: {}", notes.join("; ")));
}

/// Sets what is missing; the names of what was set, sorted.
fn fill(container: &mut Value, list: &str, defaults: &BTreeMap<&String, &Quantity>) -> Vec<String> {
    let present = &container["resources"][list];
    let missing: Vec<_> = defaults.iter().filter(|(name, _)| present.get(name.as_str()).is_none()).collect();
    let names = missing.iter().map(|(name, _)| (**name).clone()).collect();
    for (name, quantity) in missing {
        container["resources"][list][name.as_str()] = json!(quantity.0);
    }
    // indexing makes what is missing null
    if let Some(container) = container.as_object_mut() {
        container.retain(|_, value| !value.is_null());
    }
    names
}

fn wrong_in_pod(pod: &Value, limits: &[LimitRangeItem]) -> Vec<String> {
    let mut wrong = Vec::new();
    for item in limits {
        match item.type_.as_str() {
            "Container" => {
                for list in ["containers", "initContainers"] {
                    for container in items(&pod["spec"], list) {
                        let resources = &container["resources"];
                        check(
                            item,
                            &amounts(&resources["requests"]),
                            &amounts(&resources["limits"]),
                            &mut wrong,
                        );
                    }
                }
            }
            "Pod" => {
                let spec: PodSpec = serde_json::from_value(pod["spec"].clone()).unwrap_or_default();
                check(item, &pod_requests(&spec), &pod_limits(&spec), &mut wrong);
            }
            _ => {}
        }
    }
    wrong
}

fn wrong_in_claim(claim: &Value, limits: &[LimitRangeItem]) -> Vec<String> {
    let mut wrong = Vec::new();
    let requests = amounts(&claim["spec"]["resources"]["requests"]);
    for item in limits.iter().filter(|item| item.type_ == "PersistentVolumeClaim") {
        let (kind, nothing) = (item.type_.as_str(), ResourceList::new());
        for (name, bound) in item.min.iter().flatten() {
            wrong.extend(below(kind, name, bound, &requests, &nothing));
        }
        for (name, bound) in item.max.iter().flatten() {
            let words = format!("maximum {name} usage per {kind} is {}", bound.0);
            match requests.get(name) {
                None => wrong.push(format!("{words}.  No request is specified")),
                Some(request) if *request > amount(bound) => {
                    wrong.push(format!("{words}, but request is {}", shown(*request)));
                }
                Some(_) => {}
            }
        }
    }
    wrong
}

fn check(item: &LimitRangeItem, requests: &ResourceList, limits: &ResourceList, wrong: &mut Vec<String>) {
    let kind = item.type_.as_str();
    for (name, bound) in item.min.iter().flatten() {
        wrong.extend(below(kind, name, bound, requests, limits));
    }
    for (name, bound) in item.max.iter().flatten() {
        wrong.extend(above(kind, name, bound, requests, limits));
    }
    for (name, bound) in item.max_limit_request_ratio.iter().flatten() {
        wrong.extend(too_far_apart(kind, name, bound, requests, limits));
    }
}

fn below(
    kind: &str,
    name: &str,
    bound: &Quantity,
    requests: &ResourceList,
    limits: &ResourceList,
) -> Option<String> {
    let words = format!("minimum {name} usage per {kind} is {}", bound.0);
    let least = amount(bound);
    match (requests.get(name), limits.get(name)) {
        (None, _) => Some(format!("{words}.  No request is specified")),
        (Some(request), _) if *request < least => {
            Some(format!("{words}, but request is {}", shown(*request)))
        }
        (_, Some(limit)) if *limit < least => Some(format!("{words}, but limit is {}", shown(*limit))),
        _ => None,
    }
}

fn above(
    kind: &str,
    name: &str,
    bound: &Quantity,
    requests: &ResourceList,
    limits: &ResourceList,
) -> Option<String> {
    let words = format!("maximum {name} usage per {kind} is {}", bound.0);
    let most = amount(bound);
    match (limits.get(name), requests.get(name)) {
        (None, _) => Some(format!("{words}.  No limit is specified")),
        (Some(limit), _) if *limit > most => Some(format!("{words}, but limit is {}", shown(*limit))),
        (_, Some(request)) if *request > most => Some(format!("{words}, but request is {}", shown(*request))),
        _ => None,
    }
}

fn too_far_apart(
    kind: &str,
    name: &str,
    bound: &Quantity,
    requests: &ResourceList,
    limits: &ResourceList,
) -> Option<String> {
    let words = format!("{name} max limit to request ratio per {kind} is {}", bound.0);
    let set = |list: &ResourceList| list.get(name).copied().filter(|a| *a != Amount::ZERO);
    let Some(request) = set(requests) else {
        return Some(format!("{words}, but no request is specified or request is 0"));
    };
    let Some(limit) = set(limits) else {
        return Some(format!("{words}, but no limit is specified or limit is 0"));
    };
    let ratio = limit.milli_value() as f64 / request.milli_value() as f64;
    let most = amount(bound).milli_value() as f64 / 1000.0;
    (ratio > most).then(|| format!("{words}, but provided ratio is {ratio:.6}"))
}

fn amount(quantity: &Quantity) -> Amount {
    parse(&quantity.0).map(|(amount, _)| amount).unwrap_or_default()
}

fn amounts(list: &Value) -> ResourceList {
    let list = list.as_object().into_iter().flatten();
    list.filter_map(|(name, quantity)| Some((name.clone(), parse(quantity.as_str()?)?.0))).collect()
}

/// An amount as messages show it: in binary units where it is a whole number of them.
fn shown(amount: Amount) -> String {
    if !amount.is_whole() {
        return format!("{}m", amount.milli_value());
    }
    let value = amount.value();
    for (suffix, shift) in [("Gi", 30), ("Mi", 20), ("Ki", 10)] {
        if value != 0 && value % (1 << shift) == 0 {
            return format!("{}{suffix}", value >> shift);
        }
    }
    value.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(items: Value) -> Vec<LimitRangeItem> {
        serde_json::from_value(items).unwrap()
    }

    #[test]
    fn fills_in_defaults() {
        let limits = limits(
            json!([{"type": "Container", "default": {"cpu": "1"}, "defaultRequest": {"cpu": "100m", "memory": "1Gi"}}]),
        );
        let mut pod = json!({"metadata": {}, "spec": {"containers": [
            {"name": "a"}, {"name": "b", "resources": {"limits": {"cpu": "2"}, "requests": {"cpu": "2", "memory": "1"}}},
        ]}});
        default_pod(&mut pod, &limits);
        assert_eq!(
            pod["spec"]["containers"][0]["resources"],
            json!({"limits": {"cpu": "1"}, "requests": {"cpu": "100m", "memory": "1Gi"}})
        );
        assert_eq!(pod["spec"]["containers"][1]["resources"]["limits"]["cpu"], "2");
        assert_eq!(
            pod["metadata"]["annotations"][ANNOTATION],
            "LimitRanger plugin set: cpu, memory request for container a; cpu limit for container a"
        );
    }

    #[test]
    fn says_what_is_wrong() {
        let pod = |requests: Value, limits: Value| json!({"spec": {"containers": [{"name": "a", "resources": {"requests": requests, "limits": limits}}]}});
        let cases = [
            (
                json!({"min": {"cpu": "100m"}}),
                pod(json!({}), json!({})),
                "minimum cpu usage per Container is 100m.  No request is specified",
            ),
            (
                json!({"min": {"cpu": "100m"}}),
                pod(json!({"cpu": "50m"}), json!({})),
                "minimum cpu usage per Container is 100m, but request is 50m",
            ),
            (
                json!({"max": {"memory": "1Gi"}}),
                pod(json!({}), json!({"memory": "2Gi"})),
                "maximum memory usage per Container is 1Gi, but limit is 2Gi",
            ),
            (
                json!({"max": {"cpu": "1"}}),
                pod(json!({}), json!({})),
                "maximum cpu usage per Container is 1.  No limit is specified",
            ),
            (
                json!({"maxLimitRequestRatio": {"cpu": "2"}}),
                pod(json!({"cpu": "1"}), json!({"cpu": "4"})),
                "cpu max limit to request ratio per Container is 2, but provided ratio is 4.000000",
            ),
            (json!({"max": {"cpu": "1"}}), pod(json!({"cpu": "1"}), json!({"cpu": "1"})), ""),
        ];
        for (mut item, pod, want) in cases {
            item["type"] = json!("Container");
            assert_eq!(wrong_in_pod(&pod, &limits(json!([item]))).join("|"), want);
        }
        let claim = json!({"spec": {"resources": {"requests": {"storage": "5Gi"}}}});
        let item = json!([{"type": "PersistentVolumeClaim", "max": {"storage": "1Gi"}}]);
        assert_eq!(
            wrong_in_claim(&claim, &limits(item)),
            ["maximum storage usage per PersistentVolumeClaim is 1Gi, but request is 5Gi"]
        );
    }
}
