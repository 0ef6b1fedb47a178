//! HorizontalPodAutoscaler.
//!
//! Upstream counterpart: pkg/registry/autoscaling/horizontalpodautoscaler, pkg/apis/autoscaling/{v2,validation}.
use serde_json::{Value, json};

use crate::apps::v1::workload::nonnegative_keys;
use crate::core::v1::pod_spec::resources::validate_container_resource_name;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::validate_label_selector;
use crate::names;
use crate::object::{child, count, default_absent, integer, items, keep, read, same_in, text};
use crate::quantity::{Amount, canonical, parse};
use crate::table;

const METRIC_TYPES: [(&str, &str); 5] = [
    ("Object", "object"),
    ("External", "external"),
    ("Pods", "pods"),
    ("Resource", "resource"),
    ("ContainerResource", "containerResource"),
];
const WINDOW_MAX_SECONDS: i64 = 3600;
const PERIOD_MAX_SECONDS: i64 = 1800;

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    default_absent(spec, "minReplicas", 1);
    if count(spec, "/metrics") == 0 {
        spec["metrics"] = json!([{
            "type": "Resource",
            "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}
        }]);
    }
    let Some(behavior) = spec.get_mut("behavior").filter(|b| b.is_object()) else { return };
    let percent = json!({"type": "Percent", "value": 100, "periodSeconds": 15});
    let up = child(behavior, "scaleUp");
    default_absent(up, "stabilizationWindowSeconds", 0);
    default_absent(up, "selectPolicy", "Max");
    let pods = json!({"type": "Pods", "value": 4, "periodSeconds": 15});
    default_absent(up, "policies", vec![pods, percent.clone()]);
    let down = child(behavior, "scaleDown");
    default_absent(down, "selectPolicy", "Max");
    default_absent(down, "policies", vec![percent]);
}

/// A text that has to be there and fit into a path.
fn required_segment(value: &str, path: &Path, empty: &str, errors: &mut ErrorList) {
    match value {
        "" => errors.push(FieldError::required(path, empty)),
        _ => errors.extend(FieldError::invalid_each(path, value, names::path_segment(value, false))),
    }
}

fn api_version_error(version: &str, core_allowed: bool) -> Option<String> {
    match version.matches('/').count() {
        0 if !core_allowed => Some("apiVersion must specify API group".to_string()),
        0 => None,
        1 if version.starts_with('/') && !core_allowed => {
            Some("apiVersion must specify API group".to_string())
        }
        1 => None,
        _ => Some(format!("unexpected GroupVersion string: {version}")),
    }
}

/// A reference to an object of whatever version. `version`: `None` leaves it unchecked, else whether the core group
/// is allowed.
fn validate_reference(reference: &Value, version: Option<bool>, path: &Path, errors: &mut ErrorList) {
    for key in ["kind", "name"] {
        required_segment(text(reference, &format!("/{key}")), &path.child(key), "", errors);
    }
    let api_version = text(reference, "/apiVersion");
    if let Some(error) = version.and_then(|core_allowed| api_version_error(api_version, core_allowed)) {
        errors.push(FieldError::invalid(&path.child("apiVersion"), api_version, error));
    }
}

fn validate(object: &Value, old: Option<&Value>) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let least = object.pointer("/spec/minReplicas").and_then(Value::as_i64);
    let most = integer(object, "/spec/maxReplicas");
    let had_zero = old.is_some_and(|o| o.pointer("/spec/minReplicas").and_then(Value::as_i64) == Some(0));
    let bound = i64::from(!had_zero);
    if let Some(least) = least.filter(|least| *least < bound) {
        let detail = format!("must be greater than or equal to {bound}");
        errors.push(FieldError::invalid(&path.child("minReplicas"), least, detail));
    }
    let at = path.child("maxReplicas");
    if most == 0 {
        errors.push(FieldError::required(&at, "must be set and greater than 0"));
    } else if most < 0 {
        errors.push(FieldError::invalid(&at, most, "must be greater than or equal to 1"));
    }
    if least.is_some_and(|least| most < least) {
        let detail = "must be greater than or equal to `minReplicas`";
        errors.push(FieldError::invalid(&at, most, detail));
    }
    let target = object.pointer("/spec/scaleTargetRef").cloned().unwrap_or_default();
    let kept = old.is_some_and(|old| {
        ["apiVersion", "kind"].iter().all(|key| same_in(object, old, &format!("/spec/scaleTargetRef/{key}")))
    });
    let version = (!kept).then(|| text(&target, "/kind") == "ReplicationController");
    validate_reference(&target, version, &path.child("scaleTargetRef"), &mut errors);
    let bad_before = old.is_some_and(|old| {
        let references =
            items(old, "/spec/metrics").iter().filter_map(|m| m.pointer("/object/describedObject"));
        references.into_iter().any(|r| api_version_error(text(r, "/apiVersion"), true).is_some())
    });
    let metrics = items(object, "/spec/metrics");
    for (i, metric) in metrics.iter().enumerate() {
        validate_metric(metric, !bad_before, &path.child("metrics").index(i), &mut errors);
    }
    let scales_from_zero = |m: &Value| ["Object", "External"].contains(&text(m, "/type"));
    if least == Some(0) && !metrics.iter().any(scales_from_zero) {
        let detail =
            "must specify at least one Object or External metric to support scaling to zero replicas";
        errors.push(FieldError::forbidden(&path.child("metrics"), detail));
    }
    for key in ["scaleUp", "scaleDown"] {
        if let Some(rules) = object.pointer(&format!("/spec/behavior/{key}")).filter(|r| !r.is_null()) {
            validate_rules(rules, &path.child("behavior").child(key), &mut errors);
        }
    }
    errors
}

fn validate_rules(rules: &Value, path: &Path, errors: &mut ErrorList) {
    let window = integer(rules, "/stabilizationWindowSeconds");
    let at = path.child("stabilizationWindowSeconds");
    if window < 0 {
        errors.push(FieldError::invalid(&at, window, "must be greater than or equal to zero"));
    }
    if window > WINDOW_MAX_SECONDS {
        let detail = format!("must be less than or equal to {WINDOW_MAX_SECONDS}");
        errors.push(FieldError::invalid(&at, window, detail));
    }
    let select = rules.get("selectPolicy").and_then(Value::as_str);
    if let Some(policy) = select.filter(|p| !["Max", "Min", "Disabled"].contains(p)) {
        let at = path.child("selectPolicy");
        errors.push(FieldError::not_supported(&at, policy, &["Max", "Min", "Disabled"]));
    }
    let (at, policies) = (path.child("policies"), items(rules, "/policies"));
    if policies.is_empty() {
        errors.push(FieldError::required(&at, "must specify at least one Policy"));
    }
    for (i, policy) in policies.iter().enumerate() {
        let at = at.index(i);
        let (kind, value, period) =
            (text(policy, "/type"), integer(policy, "/value"), integer(policy, "/periodSeconds"));
        if !["Pods", "Percent"].contains(&kind) {
            errors.push(FieldError::not_supported(&at.child("type"), kind, &["Pods", "Percent"]));
        }
        for (key, number) in [("value", value), ("periodSeconds", period)] {
            if number <= 0 {
                errors.push(FieldError::invalid(&at.child(key), number, "must be greater than zero"));
            }
        }
        if period > PERIOD_MAX_SECONDS {
            let detail = format!("must be less than or equal to {PERIOD_MAX_SECONDS}");
            errors.push(FieldError::invalid(&at.child("periodSeconds"), period, detail));
        }
    }
    let tolerance = text(rules, "/tolerance");
    if parse(tolerance).is_some_and(|(amount, _)| amount < Amount::ZERO) {
        let detail = crate::meta::IS_NEGATIVE;
        errors.push(FieldError::invalid(&path.child("tolerance"), tolerance, detail));
    }
}

fn validate_metric(metric: &Value, check_version: bool, path: &Path, errors: &mut ErrorList) {
    let kind = text(metric, "/type");
    let supported = METRIC_TYPES.map(|(kind, _)| kind);
    if kind.is_empty() {
        errors.push(FieldError::required(&path.child("type"), "must specify a metric source type"));
    }
    if !supported.contains(&kind) {
        errors.push(FieldError::not_supported(&path.child("type"), kind, &supported));
    }
    let has = |key: &str| metric.get(key).is_some_and(|m| !m.is_null());
    let present: Vec<&str> = METRIC_TYPES.iter().map(|(_, key)| *key).filter(|key| has(key)).collect();
    if let Some(first) = present.first() {
        validate_source(first, &metric[*first], check_version, &path.child(first), errors);
    }
    let expected = METRIC_TYPES.iter().find(|(name, _)| *name == kind).map(|(_, key)| *key);
    if let Some(expected) = expected.filter(|key| !present.contains(key)) {
        let detail = "must populate information for the given metric source";
        errors.push(FieldError::required(&path.child(expected), detail));
    }
    if present.len() != 1 {
        for other in present.iter().filter(|key| Some(**key) != expected) {
            let detail = "must populate the given metric source only";
            errors.push(FieldError::forbidden(&path.child(other), detail));
        }
    }
}

fn validate_source(kind: &str, source: &Value, check_version: bool, path: &Path, errors: &mut ErrorList) {
    let target = path.child("target");
    let has = |key: &str| source.pointer(&format!("/target/{key}")).is_some_and(|v| !v.is_null());
    match kind {
        "object" => {
            let reference = source.get("describedObject").cloned().unwrap_or_default();
            validate_reference(
                &reference,
                check_version.then_some(true),
                &path.child("describedObject"),
                errors,
            );
            validate_identifier(source, &path.child("metric"), errors);
        }
        "external" | "pods" => validate_identifier(source, &path.child("metric"), errors),
        _ => validate_resource(kind, source, path, errors),
    }
    validate_target(source, &target, errors);
    let mut require = |key: &str, detail: &str| errors.push(FieldError::required(&target.child(key), detail));
    match kind {
        "object" if !has("value") && !has("averageValue") => {
            require("averageValue", "must set either a target value or averageValue");
        }
        "external" if !has("value") && !has("averageValue") => {
            require("averageValue", "must set either a target value for metric or a per-pod target");
        }
        "external" if has("value") && has("averageValue") => {
            let detail = "may not set both a target value for metric and a per-pod target";
            errors.push(FieldError::forbidden(&target.child("value"), detail));
        }
        "pods" if !has("averageValue") => {
            require("averageValue", "must specify a positive target averageValue");
        }
        "resource" | "containerResource" if !has("averageUtilization") && !has("averageValue") => {
            require("averageUtilization", "must set either a target raw value or a target utilization");
        }
        "resource" | "containerResource" if has("averageUtilization") && has("averageValue") => {
            let detail = "may not set both a target raw value and a target utilization";
            errors.push(FieldError::forbidden(&target.child("averageValue"), detail));
        }
        _ => {}
    }
}

fn validate_resource(kind: &str, source: &Value, path: &Path, errors: &mut ErrorList) {
    let (name, container) = (text(source, "/name"), text(source, "/container"));
    if name.is_empty() {
        errors.push(FieldError::required(&path.child("name"), "must specify a resource name"));
    } else if kind == "containerResource" {
        validate_container_resource_name(name, &path.child("name"), errors);
    }
    if kind == "containerResource" {
        let at = path.child("container");
        match container {
            "" => errors.push(FieldError::required(&at, "must specify a container")),
            _ => errors.extend(FieldError::invalid_each(&at, container, names::dns1123_label(container))),
        }
    }
}

fn validate_identifier(source: &Value, path: &Path, errors: &mut ErrorList) {
    let name = text(source, "/metric/name");
    required_segment(name, &path.child("name"), "must specify a metric name", errors);
    if let Some(selector) = source.pointer("/metric/selector") {
        match read(Some(selector), &path.child("selector")) {
            Ok(selector) => errors.extend(validate_label_selector(Some(&selector), &path.child("selector"))),
            Err(error) => errors.push(error),
        }
    }
}

fn validate_target(source: &Value, path: &Path, errors: &mut ErrorList) {
    let kind = text(source, "/target/type");
    if kind.is_empty() {
        errors.push(FieldError::required(&path.child("type"), "must specify a metric target type"));
    }
    if !["Utilization", "Value", "AverageValue"].contains(&kind) {
        let detail = "must be either Utilization, Value, or AverageValue";
        errors.push(FieldError::invalid(&path.child("type"), kind, detail));
    }
    for key in ["value", "averageValue"] {
        let amount = text(source, &format!("/target/{key}"));
        if parse(amount).is_some_and(|(amount, _)| amount <= Amount::ZERO) {
            errors.push(FieldError::invalid(&path.child(key), amount, "must be positive"));
        }
    }
    let percent = source.pointer("/target/averageUtilization").and_then(Value::as_i64);
    if let Some(percent) = percent.filter(|p| *p < 1) {
        errors.push(FieldError::invalid(
            &path.child("averageUtilization"),
            percent,
            "must be greater than 0",
        ));
    }
}

/// What one metric is and should be: `cpu: 10%/80%`.
fn metric_cell(spec: &Value, status: Option<&Value>) -> String {
    let kind = text(spec, "/type");
    let Some((_, key)) = METRIC_TYPES.iter().find(|(name, _)| *name == kind) else {
        return "<unknown type>".to_string();
    };
    let part = |object: &Value, pointer: &str| -> Option<String> {
        match object.pointer(pointer)? {
            Value::String(amount) => parse(amount).map(|(amount, format)| canonical(amount, format)),
            Value::Number(percent) => Some(format!("{percent}%")),
            _ => None,
        }
    };
    let target = |name: &str| part(spec, &format!("/{key}/target/{name}"));
    let current = |name: &str| {
        let found = status.and_then(|status| part(status, &format!("/{key}/current/{name}")));
        found.unwrap_or_else(|| "<unknown>".to_string())
    };
    let resource = kind == "Resource" || kind == "ContainerResource";
    let shown = match (target("averageValue"), resource) {
        (Some(wanted), true) => format!("{}/{wanted}", current("averageValue")),
        (Some(wanted), false) if kind == "Pods" => format!("{}/{wanted}", current("averageValue")),
        (Some(wanted), false) => format!("{}/{wanted} (avg)", current("averageValue")),
        (None, true) => {
            let wanted = target("averageUtilization").unwrap_or_else(|| "<auto>".to_string());
            format!("{}/{wanted}", current("averageUtilization"))
        }
        (None, false) => {
            format!("{}/{}", current("value"), target("value").unwrap_or_else(|| "0".to_string()))
        }
    };
    match resource {
        true => format!("{}: {shown}", text(spec, &format!("/{key}/name"))),
        false => shown,
    }
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let (specs, statuses) = (items(object, "/spec/metrics"), items(object, "/status/currentMetrics"));
    let cells: Vec<String> =
        specs.iter().enumerate().map(|(i, spec)| metric_cell(spec, statuses.get(i))).collect();
    let targets = match cells.len() {
        0 => "<none>".to_string(),
        1 | 2 => cells.join(", "),
        more => format!("{} + {} more...", cells[..2].join(", "), more - 2),
    };
    let reference = ["kind", "name"].map(|key| text(object, &format!("/spec/scaleTargetRef/{key}")));
    let least = object.pointer("/spec/minReplicas").and_then(Value::as_i64);
    vec![
        table::name(object),
        reference.join("/").into(),
        targets.into(),
        least.map_or_else(|| "<unset>".to_string(), |least| least.to_string()).into(),
        integer(object, "/spec/maxReplicas").into(),
        integer(object, "/status/currentReplicas").into(),
        table::age(object, now),
    ]
}

fn validate_status(new: &Value, _: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let keys = ["currentReplicas", "desiredReplicas"];
    nonnegative_keys(new, "/status", &Path::new("status"), &keys, &mut errors);
    errors
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| object["status"] = json!({"desiredReplicas": 0}),
        prepare_update: |new, old| keep(new, old, "status"),
        validate: |object| validate(object, None),
        validate_update: |new, old| validate(new, Some(old)),
        ..Rest::ANY
    },
    status: Some(Rest {
        prepare_update: |new, old| keep(new, old, "spec"),
        validate_update: validate_status,
        ..Rest::ANY
    }),
    columns: &[
        Column::NAME,
        Column::string("Reference", "What is scaled."),
        Column::string("Targets", "What the metrics are, and what they should be."),
        Column::string("MinPods", "The least number of replicas."),
        Column::string("MaxPods", "The greatest number of replicas."),
        Column::string("Replicas", "How many replicas there are."),
        Column::AGE,
    ],
    row,
    ..Kind::plain("autoscaling", "v2", "HorizontalPodAutoscaler")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_and_cells() {
        let autoscaler = |patch: Value| {
            let mut object = json!({"spec": {
                "maxReplicas": 3, "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "d"}
            }});
            for (key, value) in patch.as_object().unwrap() {
                object["spec"][key] = value.clone();
            }
            defaults(&mut object);
            object
        };
        let cases: Vec<(Value, &[&str])> = vec![
            (json!({"behavior": {}}), &[]),
            (
                json!({"maxReplicas": 0}),
                &[
                    "spec.maxReplicas: Required value: must be set and greater than 0",
                    "spec.maxReplicas: Invalid value: 0: must be greater than or equal to `minReplicas`",
                ],
            ),
            (
                json!({"scaleTargetRef": {"apiVersion": "v1", "kind": "Pod", "name": "p"}}),
                &["spec.scaleTargetRef.apiVersion: Invalid value: \"v1\": apiVersion must specify API group"],
            ),
            (
                json!({"metrics": [{"type": "Pods"}]}),
                &[
                    "spec.metrics[0].pods: Required value: must populate information for the given metric source",
                ],
            ),
            (
                json!({"behavior": {"scaleUp": {"policies": [{"type": "Pods", "value": 0, "periodSeconds": 1801}]}}}),
                &[
                    "spec.behavior.scaleUp.policies[0].value: Invalid value: 0: must be greater than zero",
                    "spec.behavior.scaleUp.policies[0].periodSeconds: Invalid value: 1801: must be less than or equal to 1800",
                ],
            ),
        ];
        for (patch, want) in cases {
            let errors = validate(&autoscaler(patch.clone()), None);
            assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), want, "{patch}");
        }
        let mut object = autoscaler(json!({}));
        object["status"] = json!({"currentMetrics": [{"type": "Resource", "resource": {"current": {"averageUtilization": 7}}}]});
        let cells = row(&object, jiff::Timestamp::UNIX_EPOCH);
        assert_eq!(cells[1..4], [json!("Deployment/d"), json!("cpu: 7%/80%"), json!("1")]);
    }
}
