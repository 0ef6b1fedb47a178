//! A deployment's status and conditions. Upstream counterpart: pkg/controller/deployment/progress.go.
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use sampan_world::clock;

use super::ReplicaSets;
use super::arithmetic::{max_unavailable, replicas, sizes};

pub fn has_deadline(deployment: &Deployment) -> bool {
    deployment.spec.as_ref().and_then(|s| s.progress_deadline_seconds).is_some_and(|s| s != i32::MAX)
}

pub fn condition<'a>(status: &'a DeploymentStatus, kind: &str) -> Option<&'a DeploymentCondition> {
    status.conditions.as_ref()?.iter().find(|c| c.type_ == kind)
}

pub fn new_condition(
    kind: &str,
    status: &str,
    reason: &str,
    message: impl Into<String>,
) -> DeploymentCondition {
    let now = Time(clock::now_seconds());
    DeploymentCondition {
        type_: kind.into(),
        status: status.into(),
        last_update_time: Some(now.clone()),
        last_transition_time: Some(now),
        reason: Some(reason.into()),
        message: Some(message.into()),
    }
}

/// Puts a condition in, unless one of the same status and reason is there; keeps the time of the last change of status.
pub fn set_condition(status: &mut DeploymentStatus, mut new: DeploymentCondition) {
    if let Some(current) = condition(status, &new.type_) {
        if current.status == new.status && current.reason == new.reason {
            return;
        }
        if current.status == new.status {
            new.last_transition_time = current.last_transition_time.clone();
        }
    }
    remove_condition(status, &new.type_);
    status.conditions.get_or_insert_with(Vec::new).push(new);
}

fn remove_condition(status: &mut DeploymentStatus, kind: &str) {
    if let Some(conditions) = status.conditions.as_mut() {
        conditions.retain(|c| c.type_ != kind);
    }
}

/// Equal but for zeros and empty lists that the API leaves out.
pub fn same(a: &DeploymentStatus, b: &DeploymentStatus) -> bool {
    let key = |s: &DeploymentStatus| {
        let n = |v: Option<i32>| v.unwrap_or(0);
        (
            (s.observed_generation.unwrap_or(0), n(s.replicas), n(s.updated_replicas), n(s.ready_replicas)),
            (n(s.available_replicas), n(s.unavailable_replicas), s.terminating_replicas, s.collision_count),
            s.conditions.clone().unwrap_or_default(),
        )
    };
    key(a) == key(b)
}

fn total<'a>(sets: impl Iterator<Item = &'a ReplicaSet>, of: impl Fn(&'a ReplicaSet) -> i32) -> i32 {
    sets.map(of).sum()
}

/// Unknown as long as a replica set that was synced does not tell.
fn terminating<'a>(sets: impl Iterator<Item = &'a ReplicaSet>) -> Option<i32> {
    let mut sum = 0;
    for set in sets {
        let status = set.status.as_ref();
        match status.and_then(|s| s.terminating_replicas) {
            Some(n) => sum += n,
            None if status.and_then(|s| s.observed_generation).unwrap_or(0) == 0 => {}
            None => return None,
        }
    }
    Some(sum)
}

pub fn calculate_status(deployment: &Deployment, sets: &ReplicaSets) -> DeploymentStatus {
    let some = |n: i32| (n != 0).then_some(n);
    let of = |set: &ReplicaSet, f: fn(&k8s_openapi::api::apps::v1::ReplicaSetStatus) -> Option<i32>| {
        set.status.as_ref().and_then(f).unwrap_or(0)
    };
    let available = total(sets.all(), |s| of(s, |s| s.available_replicas));
    let mut status = DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: some(total(sets.all(), |s| of(s, |s| Some(s.replicas)))),
        updated_replicas: some(total(sets.new.iter(), |s| of(s, |s| Some(s.replicas)))),
        ready_replicas: some(total(sets.all(), |s| of(s, |s| s.ready_replicas))),
        available_replicas: some(available),
        unavailable_replicas: some((sizes(sets.all()) - available).max(0)),
        terminating_replicas: terminating(sets.all()),
        collision_count: deployment.status.as_ref().and_then(|s| s.collision_count),
        conditions: deployment.status.as_ref().and_then(|s| s.conditions.clone()),
    };
    let enough = available >= replicas(deployment) - max_unavailable(deployment);
    let condition = if enough {
        new_condition("Available", "True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
    } else {
        let message = "Deployment does not have minimum availability.";
        new_condition("Available", "False", "MinimumReplicasUnavailable", message)
    };
    set_condition(&mut status, condition);
    status
}

/// All wanted replicas are updated and available, and no old ones are left.
pub fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = replicas(deployment);
    [status.updated_replicas, status.replicas, status.available_replicas]
        .iter()
        .all(|n| n.unwrap_or(0) == wanted)
        && status.observed_generation >= deployment.metadata.generation
}

fn is_progressing(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let n = |v: Option<i32>| v.unwrap_or(0);
    let old_left = |s: &DeploymentStatus| n(s.replicas) - n(s.updated_replicas);
    n(new.updated_replicas) > n(old.updated_replicas)
        || old_left(new) < old_left(old)
        || n(new.ready_replicas) > n(old.ready_replicas)
        || n(new.available_replicas) > n(old.available_replicas)
}

fn deadline(deployment: &Deployment) -> i64 {
    deployment.spec.as_ref().and_then(|s| s.progress_deadline_seconds).unwrap_or(600).into()
}

fn is_timed_out(deployment: &Deployment, status: &DeploymentStatus, now: Timestamp) -> bool {
    let Some(progressing) = condition(status, "Progressing") else { return false };
    match progressing.reason.as_deref() {
        Some("NewReplicaSetAvailable") => false,
        Some("ProgressDeadlineExceeded") => true,
        _ => {
            let from = progressing.last_update_time.as_ref().map(|t| t.0).unwrap_or(Timestamp::UNIX_EPOCH);
            now.duration_since(from).as_millis() > i128::from(deadline(deployment)) * 1000
        }
    }
}

/// The status of a rollout, with its Progressing and ReplicaFailure conditions.
pub fn rollout_status(deployment: &Deployment, sets: &ReplicaSets, now: Timestamp) -> DeploymentStatus {
    let mut status = calculate_status(deployment, sets);
    let before = deployment.status.clone().unwrap_or_default();
    let current = condition(&before, "Progressing");
    if !has_deadline(deployment) {
        remove_condition(&mut status, "Progressing");
    }
    let settled = status.replicas == status.updated_replicas
        && current.is_some_and(|c| c.reason.as_deref() == Some("NewReplicaSetAvailable"));
    if has_deadline(deployment) && !settled {
        let who = match &sets.new {
            Some(set) => format!("ReplicaSet \"{}\"", set.metadata.name.as_deref().unwrap_or_default()),
            None => format!("Deployment \"{}\"", deployment.metadata.name.as_deref().unwrap_or_default()),
        };
        if is_complete(deployment, &status) {
            let message = format!("{who} has successfully progressed.");
            set_condition(
                &mut status,
                new_condition("Progressing", "True", "NewReplicaSetAvailable", message),
            );
        } else if is_progressing(&before, &status) {
            let mut new =
                new_condition("Progressing", "True", "ReplicaSetUpdated", format!("{who} is progressing."));
            if let Some(current) = current.filter(|c| c.status == "True") {
                new.last_transition_time = current.last_transition_time.clone();
            }
            // even with the same reason the time of the last update moves
            remove_condition(&mut status, "Progressing");
            set_condition(&mut status, new);
        } else if is_timed_out(deployment, &status, now) {
            let message = format!("{who} has timed out progressing.");
            set_condition(
                &mut status,
                new_condition("Progressing", "False", "ProgressDeadlineExceeded", message),
            );
        }
    }
    match replica_failure(sets) {
        Some(failure) => set_condition(&mut status, failure),
        None => remove_condition(&mut status, "ReplicaFailure"),
    }
    status
}

/// The failure of the new replica set, else of an old one.
fn replica_failure(sets: &ReplicaSets) -> Option<DeploymentCondition> {
    let conditions = sets
        .new
        .iter()
        .chain(&sets.old)
        .flat_map(|s| s.status.iter().flat_map(|s| s.conditions.iter().flatten()));
    conditions.into_iter().find(|c| c.type_ == "ReplicaFailure").map(|c| DeploymentCondition {
        type_: "ReplicaFailure".into(),
        status: c.status.clone(),
        last_update_time: c.last_transition_time.clone(),
        last_transition_time: c.last_transition_time.clone(),
        reason: c.reason.clone(),
        message: c.message.clone(),
    })
}

/// When to look again whether the rollout is stuck; zero for at once.
pub fn next_check(deployment: &Deployment, status: &DeploymentStatus, now: Timestamp) -> Option<Duration> {
    let current = condition(deployment.status.as_ref()?, "Progressing")?;
    let timed_out = current.reason.as_deref() == Some("ProgressDeadlineExceeded");
    if !has_deadline(deployment) || is_complete(deployment, status) || timed_out {
        return None;
    }
    let updated = current.last_update_time.as_ref()?.0;
    let left = deadline(deployment) * 1000 - now.duration_since(updated).as_millis() as i64;
    if left < 1000 {
        return Some(Duration::ZERO);
    }
    Some(Duration::from_millis(left.unsigned_abs() + 1000))
}

/// The condition that a pause or its end calls for.
pub fn paused_condition(deployment: &Deployment) -> Option<DeploymentCondition> {
    if !has_deadline(deployment) {
        return None;
    }
    let current = deployment.status.as_ref().and_then(|s| condition(s, "Progressing"));
    let reason = current.and_then(|c| c.reason.as_deref());
    let paused = deployment.spec.as_ref().and_then(|s| s.paused) == Some(true);
    match (paused, reason) {
        (_, Some("ProgressDeadlineExceeded")) | (true, Some("DeploymentPaused")) => None,
        (true, _) => {
            Some(new_condition("Progressing", "Unknown", "DeploymentPaused", "Deployment is paused"))
        }
        (false, Some("DeploymentPaused")) => {
            Some(new_condition("Progressing", "Unknown", "DeploymentResumed", "Deployment is resumed"))
        }
        (false, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::arithmetic::tests::{deployment, set};
    use super::*;
    use serde_json::json;

    #[test]
    fn a_rollout_progresses_completes_and_times_out() {
        let mut d = deployment(2, json!(1), json!(0));
        d.spec.as_mut().unwrap().progress_deadline_seconds = Some(10);
        let sets = |available| ReplicaSets { new: Some(set("new", 2, available)), old: Vec::new() };
        let now = clock::now_seconds();
        let reason = |s: &DeploymentStatus| {
            condition(s, "Progressing").and_then(|c| c.reason.clone()).unwrap_or_default()
        };
        let status = rollout_status(&d, &sets(1), now);
        assert_eq!(reason(&status), "ReplicaSetUpdated");
        assert_eq!(condition(&status, "Available").unwrap().status, "False");
        d.status = Some(status.clone());
        assert!(same(&rollout_status(&d, &sets(1), now), &status), "nothing changed, nothing is written");
        assert!(next_check(&d, &status, now).unwrap() > Duration::from_secs(9));
        let late = now + Duration::from_secs(12);
        assert_eq!(reason(&rollout_status(&d, &sets(1), late)), "ProgressDeadlineExceeded");
        let done = rollout_status(&d, &sets(2), late);
        assert_eq!(reason(&done), "NewReplicaSetAvailable");
        d.status = Some(done.clone());
        assert_eq!(next_check(&d, &done, late), None);
    }
}
