//! Conversion among the versions of one stored resource.
//!
//! Upstream counterparts: pkg/apis/events/v1/conversion (generated), pkg/apis/autoscaling/v1/conversion.go. Each
//! resource has one stored version; only those with several served ones appear here.
use sampan_schema::ResourceFact;
use serde_json::{Map, Value};

use crate::storage::Storage;

/// From a served version to the stored one, and back.
#[derive(Clone, Copy)]
pub struct Conversion {
    pub to_storage: fn(Value) -> Value,
    pub from_storage: fn(Value) -> Value,
    /// Writes through the served version are checked by its own rules, not by the stored version's.
    pub own_rules: bool,
}

/// Where a resource's objects are stored, and how they get there.
pub fn storage_of(fact: &ResourceFact) -> (Storage, Option<Conversion>) {
    match (fact.group, fact.version, fact.name) {
        ("events.k8s.io", "v1", "events") => (
            Storage::new("", "v1", "events", "Event", true),
            Some(Conversion { to_storage: event_to_core, from_storage: event_from_core, own_rules: true }),
        ),
        ("autoscaling", "v1", "horizontalpodautoscalers") => (
            Storage::new("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", true),
            Some(Conversion {
                to_storage: autoscaler_to_v2,
                from_storage: autoscaler_from_v2,
                own_rules: false,
            }),
        ),
        _ => (Storage::new(fact.group, fact.version, fact.name, fact.kind, fact.namespaced), None),
    }
}

/// The names of an event's fields: events.k8s.io/v1, core/v1.
const EVENT_FIELDS: [(&str, &str); 7] = [
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

fn event_to_core(object: Value) -> Value {
    rename(object, |name| EVENT_FIELDS.iter().find(|(new, _)| *new == name).map(|(_, core)| *core))
}

fn event_from_core(object: Value) -> Value {
    rename(object, |name| EVENT_FIELDS.iter().find(|(_, core)| *core == name).map(|(new, _)| *new))
}

fn rename(object: Value, to: impl Fn(&str) -> Option<&'static str>) -> Value {
    let Value::Object(fields) = object else { return object };
    fields.into_iter().map(|(name, value)| (to(&name).map_or(name, str::to_string), value)).collect()
}

/// What v1 has no fields for lies in these annotations, as JSON.
const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";
const CURRENT_METRICS: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";

fn autoscaler_to_v2(mut object: Value) -> Value {
    let mut metrics = Vec::new();
    if let Some(percent) = take(&mut object, "spec", "targetCPUUtilizationPercentage") {
        metrics.push(cpu_metric("target", "averageUtilization", percent, true));
    }
    if let Some(Value::Array(others)) = take_annotation(&mut object, METRICS) {
        metrics.extend(others);
    }
    let mut current = Vec::new();
    if let Some(percent) = take(&mut object, "status", "currentCPUUtilizationPercentage") {
        current.push(cpu_metric("current", "averageUtilization", percent, false));
    }
    if let Some(Value::Array(others)) = take_annotation(&mut object, CURRENT_METRICS) {
        current.extend(others);
    }
    let behavior = take_annotation(&mut object, BEHAVIOR);
    let conditions = take_annotation(&mut object, CONDITIONS);
    put(&mut object, "spec", "metrics", (!metrics.is_empty()).then_some(Value::Array(metrics)));
    put(&mut object, "spec", "behavior", behavior);
    put(&mut object, "status", "currentMetrics", (!current.is_empty()).then_some(Value::Array(current)));
    put(&mut object, "status", "conditions", conditions);
    object
}

fn autoscaler_from_v2(mut object: Value) -> Value {
    let (percent, others) = split_cpu(take(&mut object, "spec", "metrics"), "target");
    put(&mut object, "spec", "targetCPUUtilizationPercentage", percent);
    put_annotation(&mut object, METRICS, others);
    let (percent, others) = split_cpu(take(&mut object, "status", "currentMetrics"), "current");
    put(&mut object, "status", "currentCPUUtilizationPercentage", percent);
    put_annotation(&mut object, CURRENT_METRICS, others);
    let behavior = take(&mut object, "spec", "behavior");
    put_annotation(&mut object, BEHAVIOR, behavior);
    let conditions = take(&mut object, "status", "conditions");
    put_annotation(&mut object, CONDITIONS, conditions);
    object
}

fn cpu_metric(part: &str, field: &str, percent: Value, target: bool) -> Value {
    let mut value = Map::new();
    if target {
        value.insert("type".into(), "Utilization".into());
    }
    value.insert(field.into(), percent);
    serde_json::json!({"type": "Resource", "resource": {"name": "cpu", part: value}})
}

/// The CPU utilization among the metrics, and the others.
fn split_cpu(metrics: Option<Value>, part: &str) -> (Option<Value>, Option<Value>) {
    let Some(Value::Array(metrics)) = metrics else { return (None, None) };
    let mut percent = None;
    let mut others = Vec::new();
    for metric in metrics {
        let utilization = metric.pointer(&format!("/resource/{part}/averageUtilization")).cloned();
        let is_cpu = metric.pointer("/resource/name").and_then(Value::as_str) == Some("cpu");
        match utilization {
            Some(value) if is_cpu && percent.is_none() => percent = Some(value),
            _ => others.push(metric),
        }
    }
    (percent, (!others.is_empty()).then_some(Value::Array(others)))
}

fn take(object: &mut Value, part: &str, field: &str) -> Option<Value> {
    object.get_mut(part)?.as_object_mut()?.remove(field)
}

fn put(object: &mut Value, part: &str, field: &str, value: Option<Value>) {
    if let Some(value) = value {
        object[part][field] = value;
    }
}

fn take_annotation(object: &mut Value, name: &str) -> Option<Value> {
    let text = object.pointer_mut("/metadata/annotations")?.as_object_mut()?.remove(name)?;
    serde_json::from_str(text.as_str()?).ok()
}

fn put_annotation(object: &mut Value, name: &str, value: Option<Value>) {
    if let Some(value) = value {
        object["metadata"]["annotations"][name] = value.to_string().into();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_ways_is_the_same() {
        let event =
            json!({"metadata": {"name": "e"}, "regarding": {"name": "p"}, "note": "n", "reason": "r"});
        let core = event_to_core(event.clone());
        assert_eq!(core["involvedObject"]["name"], "p");
        assert_eq!(core["message"], "n");
        assert_eq!(event_from_core(core), event);

        let hpa = json!({"metadata": {"name": "h", "annotations": {}},
            "spec": {"maxReplicas": 3, "targetCPUUtilizationPercentage": 80}, "status": {"currentReplicas": 1}});
        let v2 = autoscaler_to_v2(hpa.clone());
        assert_eq!(v2.pointer("/spec/metrics/0/resource/target/averageUtilization"), Some(&json!(80)));
        assert_eq!(autoscaler_from_v2(v2), hpa);
    }
}
