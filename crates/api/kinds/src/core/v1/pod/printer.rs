//! A pod's row in tables, above all its status word.
//!
//! Upstream counterpart: printPod in pkg/printers/internalversion/printers.go.
use jiff::Timestamp;
use serde_json::Value;

use crate::kind::Column;
use crate::object::{count, integer, items, text, truth};
use crate::table;

pub(super) const COLUMNS: &[Column] = &[
    Column::NAME,
    Column::string("Ready", "The aggregate readiness state of this pod for accepting traffic."),
    Column::string("Status", "The aggregate status of the containers in this pod."),
    Column::string(
        "Restarts",
        "The number of times the containers in this pod have been restarted and when the last container in this pod has \
         restarted.",
    ),
    Column::AGE,
    Column::string("IP", "The pod's address.").wide(),
    Column::string("Node", "The node that the pod is bound to.").wide(),
    Column::string("Nominated Node", "The node on which room is being made for the pod.").wide(),
    Column::string("Readiness Gates", "How many of the pod's readiness gates are true.").wide(),
];

#[derive(Default)]
struct Restarts {
    count: i64,
    last: Option<Timestamp>,
}

impl Restarts {
    fn add(&mut self, status: &Value) {
        self.count += integer(status, "/restartCount");
        let finished = text(status, "/lastState/terminated/finishedAt").parse::<Timestamp>().ok();
        self.last = self.last.max(finished);
    }
}

/// The reason a container ended for, or how.
fn ended(terminated: &Value) -> String {
    match (text(terminated, "/reason"), integer(terminated, "/signal")) {
        ("", 0) => format!("ExitCode:{}", integer(terminated, "/exitCode")),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_string(),
    }
}

fn condition_true(pod: &Value, kind: &str) -> bool {
    items(pod, "/status/conditions").iter().any(|c| text(c, "/type") == kind && text(c, "/status") == "True")
}

pub(super) fn row(pod: &Value, now: Timestamp) -> Vec<Value> {
    let sidecar = |name: &str| {
        let mut init = items(pod, "/spec/initContainers").iter();
        init.any(|c| text(c, "/name") == name && text(c, "/restartPolicy") == "Always")
    };
    let sidecars =
        items(pod, "/spec/initContainers").iter().filter(|c| text(c, "/restartPolicy") == "Always").count();
    let total = count(pod, "/spec/containers") + sidecars;
    let phase = text(pod, "/status/phase");
    let mut reason = match text(pod, "/status/reason") {
        "" => phase.to_string(),
        reason => reason.to_string(),
    };
    if items(pod, "/status/conditions")
        .iter()
        .any(|c| text(c, "/type") == "PodScheduled" && text(c, "/reason") == "SchedulingGated")
    {
        reason = "SchedulingGated".to_string();
    }
    let (mut restarts, mut sidecar_restarts, mut ready) = (Restarts::default(), Restarts::default(), 0);
    let mut initializing = false;
    for (i, status) in items(pod, "/status/initContainerStatuses").iter().enumerate() {
        restarts.add(status);
        let is_sidecar = sidecar(text(status, "/name"));
        if is_sidecar {
            sidecar_restarts.add(status);
        }
        let terminated = status.pointer("/state/terminated").filter(|t| !t.is_null());
        let waiting = text(status, "/state/waiting/reason");
        if terminated.is_some_and(|t| integer(t, "/exitCode") == 0) {
            continue;
        }
        if is_sidecar && truth(status, "/started") {
            ready += usize::from(truth(status, "/ready"));
            continue;
        }
        reason = match terminated {
            Some(terminated) => format!("Init:{}", ended(terminated)),
            None if !waiting.is_empty() && waiting != "PodInitializing" => format!("Init:{waiting}"),
            None => format!("Init:{i}/{}", count(pod, "/spec/initContainers")),
        };
        initializing = true;
        break;
    }
    if !initializing || condition_true(pod, "Initialized") {
        restarts = sidecar_restarts;
        reason = running_reason(pod, reason, &mut restarts, &mut ready);
    }
    if pod.pointer("/metadata/deletionTimestamp").is_some_and(|t| !t.is_null()) {
        if text(pod, "/status/reason") == "NodeLost" {
            reason = "Unknown".to_string();
        } else if !["Failed", "Succeeded"].contains(&phase) {
            reason = "Terminating".to_string();
        }
    }
    let restarts_text = match restarts.last {
        Some(last) if restarts.count != 0 => {
            format!("{} ({} ago)", restarts.count, table::human_duration(now.duration_since(last).as_secs()))
        }
        _ => restarts.count.to_string(),
    };
    let ip = text(pod, "/status/podIPs/0/ip");
    vec![
        table::name(pod),
        format!("{ready}/{total}").into(),
        reason.into(),
        restarts_text.into(),
        table::age(pod, now),
        table::or_none(if ip.is_empty() { text(pod, "/status/podIP") } else { ip }),
        table::or_none(text(pod, "/spec/nodeName")),
        table::or_none(text(pod, "/status/nominatedNodeName")),
        readiness_gates(pod),
    ]
}

fn running_reason(pod: &Value, mut reason: String, restarts: &mut Restarts, ready: &mut usize) -> String {
    let (mut running, mut error) = (false, String::new());
    for status in items(pod, "/status/containerStatuses").iter().rev() {
        restarts.add(status);
        let waiting = text(status, "/state/waiting/reason");
        if !waiting.is_empty() {
            reason = waiting.to_string();
        } else if let Some(terminated) = status.pointer("/state/terminated").filter(|t| !t.is_null()) {
            reason = ended(terminated);
            if integer(terminated, "/exitCode") != 0 {
                error.clone_from(&reason);
            }
        } else if truth(status, "/ready") && status.pointer("/state/running").is_some_and(|r| !r.is_null()) {
            running = true;
            *ready += 1;
        }
    }
    if reason != "Completed" {
        return reason;
    }
    if running && condition_true(pod, "Ready") {
        "Running".to_string()
    } else if !error.is_empty() {
        error
    } else if running {
        "NotReady".to_string()
    } else {
        reason
    }
}

fn readiness_gates(pod: &Value) -> Value {
    let gates = items(pod, "/spec/readinessGates");
    if gates.is_empty() {
        return "<none>".into();
    }
    let passed = gates.iter().filter(|gate| condition_true(pod, text(gate, "/conditionType"))).count();
    format!("{passed}/{}", gates.len()).into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn status_words() {
        let running = json!({"name": "c", "ready": true, "state": {"running": {}}});
        let waiting =
            |reason: &str| json!({"name": "c", "restartCount": 3, "state": {"waiting": {"reason": reason}}});
        let ended = |code: i32, reason: &str| json!({"name": "c", "state": {"terminated": {"exitCode": code, "reason": reason}}});
        let pod = |init: Value, main: Value, meta: Value, phase: &str| {
            json!({"metadata": meta, "spec": {"containers": [{"name": "c"}], "initContainers": [{"name": "i"}]},
                "status": {"phase": phase, "initContainerStatuses": init, "containerStatuses": main}})
        };
        let cases = [
            (pod(json!([]), json!([running]), json!({}), "Running"), "1/1", "Running"),
            (
                pod(json!([]), json!([waiting("CrashLoopBackOff")]), json!({}), "Running"),
                "0/1",
                "CrashLoopBackOff",
            ),
            (pod(json!([]), json!([ended(0, "Completed")]), json!({}), "Succeeded"), "0/1", "Completed"),
            (pod(json!([]), json!([ended(1, "Error")]), json!({}), "Failed"), "0/1", "Error"),
            (pod(json!([]), json!([ended(137, "")]), json!({}), "Failed"), "0/1", "ExitCode:137"),
            (
                pod(
                    json!([{"name": "i", "state": {"running": {}}}]),
                    json!([waiting("PodInitializing")]),
                    json!({}),
                    "Pending",
                ),
                "0/1",
                "Init:0/1",
            ),
            (
                pod(
                    json!([{"name": "i", "state": {"terminated": {"exitCode": 2, "reason": "Error"}}}]),
                    json!([]),
                    json!({}),
                    "Pending",
                ),
                "0/1",
                "Init:Error",
            ),
            (
                pod(
                    json!([]),
                    json!([running]),
                    json!({"deletionTimestamp": "2024-01-01T00:00:00Z"}),
                    "Running",
                ),
                "1/1",
                "Terminating",
            ),
        ];
        let now = "2024-01-01T00:00:00Z".parse().unwrap();
        for (pod, ready, status) in cases {
            let row = row(&pod, now);
            assert_eq!(row.len(), COLUMNS.len());
            assert_eq!((row[1].as_str().unwrap(), row[2].as_str().unwrap()), (ready, status), "{pod}");
        }
    }
}
