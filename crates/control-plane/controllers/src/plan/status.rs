//! What a plan's status says, and the events of its changes.
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use sampan_kinds::upgrade::v1::plan::Plan;
use sampan_world::clock;
use serde_json::json;

use crate::controller::SyncError;
use crate::controller_ref::name;
use crate::events::EventRecorder;

/// How a node stands.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// For itself, for its pods; looked at again after that time at the latest.
    Waits(Option<Duration>),
    Failed(String),
}

/// How far a plan is.
#[derive(Debug, Default)]
pub struct Progress {
    pub request: String,
    pub applying: Vec<String>,
    pub failed: Vec<(String, String)>,
    /// Nodes that do not have the release.
    pub left: usize,
    /// Why the plan cannot be carried out as it is.
    pub invalid: Option<String>,
    pub waits_for: Option<String>,
    unresolved: Option<String>,
}

impl Progress {
    pub fn new(request: &str) -> Self {
        Self { request: request.to_string(), ..Self::default() }
    }

    pub fn waits(why: impl Into<String>) -> Self {
        Self { waits_for: Some(why.into()), ..Self::default() }
    }

    pub fn unresolved(why: String) -> Self {
        Self { unresolved: Some(why), ..Self::default() }
    }

    /// Each condition's type, status, reason and message.
    fn conditions(&self, source: &'static str) -> [(&'static str, bool, &'static str, String); 3] {
        let resolved = match &self.unresolved {
            Some(why) => ("LatestResolved", false, "Error", why.clone()),
            None => ("LatestResolved", true, source, String::new()),
        };
        let validated = match &self.invalid {
            Some(why) => ("Validated", false, "Error", why.clone()),
            None => ("Validated", true, "PlanIsValid", String::new()),
        };
        let complete = match () {
            () if self.unresolved.is_some() || self.invalid.is_some() && self.left > 0 => {
                ("Complete", false, "NotReady", String::new())
            }
            () if !self.failed.is_empty() => {
                let each: Vec<String> =
                    self.failed.iter().map(|(node, why)| format!("node {node}: {why}")).collect();
                ("Complete", false, "NodeFailed", each.join("; "))
            }
            () if let Some(why) = &self.waits_for => ("Complete", false, "Waiting", why.clone()),
            () if self.left > 0 || !self.applying.is_empty() => {
                ("Complete", false, "Upgrading", String::new())
            }
            () => ("Complete", true, "Complete", String::new()),
        };
        [resolved, validated, complete]
    }
}

/// Writes the status where it says something new.
pub async fn write(
    client: &Client,
    events: &EventRecorder,
    plan: &Plan,
    target: Option<(String, &'static str)>,
    progress: &Progress,
) -> Result<(), SyncError> {
    let before = &plan.status;
    let (version, source) = target.unwrap_or((before.latest_version.clone(), "Error"));
    let mut status = before.clone();
    status.conditions = Vec::new();
    for (kind, holds, reason, message) in progress.conditions(source) {
        let old = before.conditions.iter().find(|c| c.type_ == kind);
        let holds = if holds { "True" } else { "False" };
        let since = old.filter(|c| c.status == holds).map(|c| c.last_transition_time.clone());
        if old.is_none_or(|c| (c.status.as_str(), c.reason.as_str(), &c.message) != (holds, reason, &message))
        {
            tell(events, plan, (kind, holds, reason), &message, &version);
        }
        status.conditions.push(Condition {
            type_: kind.to_string(),
            status: holds.to_string(),
            reason: reason.to_string(),
            message,
            observed_generation: plan.metadata.generation,
            last_transition_time: since.unwrap_or_else(|| Time(clock::now_seconds())),
        });
    }
    status.latest_version = version;
    status.latest_hash = progress.request.clone();
    status.applying = progress.applying.clone();
    status.applying.sort();
    status.observed_generation = plan.metadata.generation.unwrap_or_default();
    if status == *before {
        return Ok(());
    }
    let patch = json!({"status": {
        "conditions": status.conditions, "latestVersion": status.latest_version, "latestHash": status.latest_hash,
        "applying": status.applying, "observedGeneration": status.observed_generation,
    }});
    let api: Api<Plan> = Api::all(client.clone());
    match api.patch_status(name(plan), &PatchParams::default(), &Patch::Merge(&patch)).await {
        Err(error) if !crate::api_error::is_not_found(&error) => Err(error.into()),
        _ => Ok(()),
    }
}

fn tell(
    events: &EventRecorder,
    plan: &Plan,
    (kind, status, reason): (&str, &str, &str),
    message: &str,
    version: &str,
) {
    match (kind, status, reason) {
        ("LatestResolved", "True", _) => {
            events.normal(plan, "Resolved", format!("Resolved latest version: {version}"))
        }
        ("LatestResolved", ..) => events.warning(plan, "ResolveFailed", message),
        ("Validated", "True", _) => events.normal(plan, "Validated", "Plan is valid"),
        ("Validated", ..) => events.warning(plan, "ValidateFailed", message),
        ("Complete", "True", _) => {
            events.normal(plan, "Complete", format!("All selected nodes have {version}"));
        }
        ("Complete", _, "NodeFailed") => events.warning(plan, "NodeFailed", message),
        ("Complete", _, "Waiting") => events.normal(plan, "Waiting", message),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_say_what_is_the_matter() {
        let complete = |change: fn(&mut Progress)| {
            let mut progress = Progress::new("r");
            change(&mut progress);
            let [_, _, (_, holds, reason, message)] = progress.conditions("Version");
            format!("{holds} {reason} {message}")
        };
        assert_eq!(complete(|_| {}), "true Complete ");
        assert_eq!(complete(|p| p.left = 1), "false Upgrading ");
        assert_eq!(complete(|p| p.applying.push("a".into())), "false Upgrading ");
        assert_eq!(complete(|p| p.waits_for = Some("x".into())), "false Waiting x");
        assert_eq!(complete(|p| p.failed.push(("a".into(), "no".into()))), "false NodeFailed node a: no");
        assert_eq!(complete(|p| (p.invalid, p.left) = (Some("skew".into()), 1)), "false NotReady ");
    }
}
