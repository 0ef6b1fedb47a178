//! What a Job's podFailurePolicy and successPolicy say. Upstream counterpart: pkg/controller/job/pod_failure_policy.go,
//! success_policy.go.
use std::collections::BTreeSet;

use k8s_openapi::api::batch::v1::{Job, PodFailurePolicyRule};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use super::indexes;
use crate::controller_ref::{name, namespace};
use crate::pod_state;

/// The verdict over one failed pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Count,
    Ignore,
    FailIndex,
    FailJob(String),
}

pub fn judge(job: &Job, pod: &Pod) -> Verdict {
    let rules = job.spec.as_ref().and_then(|s| s.pod_failure_policy.as_ref()).map(|p| p.rules.as_slice());
    for (i, rule) in rules.unwrap_or_default().iter().enumerate() {
        let Some(why) = matching(rule, pod) else { continue };
        return match rule.action.as_str() {
            "Ignore" => Verdict::Ignore,
            "FailIndex" => Verdict::FailIndex,
            "FailJob" => Verdict::FailJob(format!("{why} matching FailJob rule at index {i}")),
            _ => Verdict::Count,
        };
    }
    Verdict::Count
}

/// How the rule matches, as a sentence's beginning.
fn matching(rule: &PodFailurePolicyRule, pod: &Pod) -> Option<String> {
    if let Some(codes) = &rule.on_exit_codes {
        let status = pod.status.as_ref()?;
        let statuses = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
        let exit = |c: &ContainerStatus| c.state.as_ref()?.terminated.as_ref().map(|t| t.exit_code);
        for container in statuses {
            if codes.container_name.as_ref().is_some_and(|n| *n != container.name) {
                continue;
            }
            let Some(code) = exit(container).filter(|c| *c != 0) else { continue };
            let listed = codes.values.contains(&code);
            if (codes.operator == "In") == listed {
                let what = format!("Container {} for pod {}/{}", container.name, namespace(pod), name(pod));
                return Some(format!("{what} failed with exit code {code}"));
            }
        }
        return None;
    }
    let patterns = rule.on_pod_conditions.as_deref().unwrap_or_default();
    let hit = |p: &&k8s_openapi::api::batch::v1::PodFailurePolicyOnPodConditionsPattern| {
        let status = p.status.as_deref().unwrap_or("True");
        pod_state::condition(pod, &p.type_).is_some_and(|c| c.status == status)
    };
    let pattern = patterns.iter().find(hit)?;
    Some(format!("Pod {}/{} has condition {}", namespace(pod), name(pod), pattern.type_))
}

/// The rule of the successPolicy that the succeeded indexes meet, as a message.
pub fn success(job: &Job, succeeded: &BTreeSet<i32>) -> Option<String> {
    let spec = job.spec.as_ref()?;
    let completions = spec.completions?;
    let rules = &spec.success_policy.as_ref()?.rules;
    let met = |rule: &k8s_openapi::api::batch::v1::SuccessPolicyRule| {
        let wanted = rule.succeeded_indexes.as_deref().map(|text| indexes::parse(text, completions));
        let count = match &wanted {
            Some(wanted) => wanted.intersection(succeeded).count(),
            None => succeeded.len(),
        };
        match (rule.succeeded_count, wanted) {
            (Some(needed), _) => count as i64 >= i64::from(needed),
            (None, Some(wanted)) => count == wanted.len(),
            (None, None) => false,
        }
    };
    rules.iter().position(met).map(|i| format!("Matched rules at index {i}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rules_are_tried_in_order() {
        let job: Job =
            serde_json::from_value(json!({"spec": {"template": {}, "podFailurePolicy": {"rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": {"containerName": "c", "operator": "In", "values": [3]}},
            {"action": "FailIndex", "onExitCodes": {"operator": "NotIn", "values": [1]}}]}}}))
            .unwrap();
        let pod = |code: i32, disrupted: bool| -> Pod {
            let status = if disrupted { "True" } else { "False" };
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns"}, "status": {
                "conditions": [{"type": "DisruptionTarget", "status": status}],
                "containerStatuses": [{"name": "c", "ready": false, "restartCount": 0, "image": "", "imageID": "",
                    "state": {"terminated": {"exitCode": code}}}]}}))
            .unwrap()
        };
        assert_eq!(judge(&job, &pod(3, true)), Verdict::Ignore);
        let message = "Container c for pod ns/p failed with exit code 3 matching FailJob rule at index 1";
        assert_eq!(judge(&job, &pod(3, false)), Verdict::FailJob(message.into()));
        assert_eq!(judge(&job, &pod(1, false)), Verdict::Count);
        assert_eq!(judge(&job, &pod(9, false)), Verdict::FailIndex);
    }

    #[test]
    fn success_needs_indexes_and_count() {
        let job = |rule: serde_json::Value| -> Job {
            serde_json::from_value(json!({"spec": {"template": {}, "completions": 10,
                "successPolicy": {"rules": [rule]}}}))
            .unwrap()
        };
        let done = [0, 2].into();
        assert!(success(&job(json!({"succeededIndexes": "0,2"})), &done).is_some());
        assert!(success(&job(json!({"succeededIndexes": "0-2"})), &done).is_none());
        assert!(success(&job(json!({"succeededIndexes": "0-2", "succeededCount": 2})), &done).is_some());
        assert!(success(&job(json!({"succeededCount": 3})), &done).is_none());
    }
}
