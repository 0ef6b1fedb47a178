//! HorizontalPodAutoscaler as v1 has it; it is stored, and its writes are checked, as v2.
//!
//! Upstream counterpart: pkg/apis/autoscaling/v1.
use serde_json::Value;

use crate::autoscaling::v2::horizontal_pod_autoscaler as v2;
use crate::kind::{Kind, Rest};
use crate::object::{child, default_absent, integer, keep, text};
use crate::table;

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let percent =
        |pointer: &str| object.pointer(pointer).and_then(Value::as_i64).map(|percent| format!("{percent}%"));
    let targets = percent("/spec/targetCPUUtilizationPercentage").map(|target| {
        let current = percent("/status/currentCPUUtilizationPercentage");
        format!("cpu: {}/{target}", current.unwrap_or_else(|| "<unknown>".to_string()))
    });
    let reference = ["kind", "name"].map(|key| text(object, &format!("/spec/scaleTargetRef/{key}")));
    let least = object.pointer("/spec/minReplicas").and_then(Value::as_i64);
    vec![
        table::name(object),
        reference.join("/").into(),
        targets.unwrap_or_else(|| "<none>".to_string()).into(),
        least.map_or_else(|| "<unset>".to_string(), |least| least.to_string()).into(),
        integer(object, "/spec/maxReplicas").into(),
        integer(object, "/status/currentReplicas").into(),
        table::age(object, now),
    ]
}

pub const KIND: Kind = Kind {
    defaults: |object| default_absent(child(object, "spec"), "minReplicas", 1),
    status: Some(Rest { prepare_update: |new, old| keep(new, old, "spec"), ..Rest::ANY }),
    columns: v2::KIND.columns,
    row,
    ..Kind::plain("autoscaling", "v1", "HorizontalPodAutoscaler")
};
