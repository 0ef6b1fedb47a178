//! Counting ended pods exactly once: a pod keeps a finalizer until its UID is in the Job's status, and its UID stays
//! there until the finalizer is gone. Upstream counterpart: pkg/controller/job/job_controller.go
//! (trackJobStatusAndRemoveFinalizers).
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use k8s_openapi::api::batch::v1::{Job, JobCondition, JobStatus, UncountedTerminatedPods};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use sampan_world::clock;
use serde_json::json;

use super::JobController;
use super::decision::{End, FINALIZER, Situation, has_finalizer, index_of, is_failed, is_indexed};
use super::failure_policy::Verdict;
use super::indexes;
use crate::api_error;
use crate::controller::SyncError;
use crate::controller_ref::{is_deleting, name, namespace, uid};
use crate::pod_state;

/// The most UIDs that one pass puts into the status.
const MAX_UNCOUNTED: usize = 500;

/// Pods to release, and the lists for the status.
pub struct Tracking {
    pub release: Vec<Arc<Pod>>,
    pub uncounted: UncountedTerminatedPods,
    /// More than fit into one pass.
    pub more: bool,
}

/// Lists what has to be counted and released. A failed pod of an index stays until its replacement carries its count.
pub fn plan(s: &Situation<'_>, pods: &[Arc<Pod>], released: &HashSet<String>, end: Option<&End>) -> Tracking {
    let mut uncounted =
        s.job.status.as_ref().and_then(|s| s.uncounted_terminated_pods.clone()).unwrap_or_default();
    let (mut succeeded, mut failed) =
        (uncounted.succeeded.take().unwrap_or_default(), uncounted.failed.take().unwrap_or_default());
    let failing = end.is_some_and(|e| !e.succeeded);
    let indexed = is_indexed(s.spec);
    let completions = s.spec.completions.unwrap_or(0);
    let mut tracking = Tracking { release: Vec::new(), uncounted, more: false };
    for pod in pods.iter().filter(|p| has_finalizer(p) && !released.contains(uid(&***p))) {
        if succeeded.len() + failed.len() >= MAX_UNCOUNTED {
            tracking.more = true;
            break;
        }
        let pod_failed = is_failed(s.spec, pod);
        let pod_succeeded = pod_state::phase(pod) == "Succeeded";
        let ends_with_job = end.is_some() && is_deleting(&**pod);
        if !pod_failed && !pod_succeeded && !ends_with_job && !is_deleting(s.job) {
            continue;
        }
        if pod_failed && end.is_none() && !is_deleting(s.job) && awaits_replacement(s, pod) {
            continue;
        }
        let own = uid(&**pod).to_string();
        let in_range = !indexed || index_of(pod).is_some_and(|i| i < completions);
        if pod_succeeded {
            // an indexed Job counts indexes, not pods
            if !indexed && !succeeded.contains(&own) {
                succeeded.push(own);
            }
        } else if (pod_failed || failing) && in_range && !failed.contains(&own) {
            let ignored = s.new_failed.iter().any(|(p, v)| uid(&**p) == own && *v == Verdict::Ignore);
            if !ignored {
                failed.push(own);
            }
        }
        tracking.release.push(pod.clone());
    }
    tracking.uncounted = UncountedTerminatedPods {
        succeeded: (!succeeded.is_empty()).then_some(succeeded),
        failed: (!failed.is_empty()).then_some(failed),
    };
    tracking
}

/// Whether the pod is what tells how often its index failed.
fn awaits_replacement(s: &Situation<'_>, pod: &Pod) -> bool {
    if s.spec.backoff_limit_per_index.is_none() {
        return false;
    }
    let Some(index) = index_of(pod) else { return false };
    let settled = s.succeeded_indexes.contains(&index) || s.failed_indexes.contains(&index);
    let replaced = s.active.iter().any(|p| index_of(p) == Some(index));
    let out_of_range = index >= s.spec.completions.unwrap_or(0);
    !settled && !replaced && !out_of_range
}

/// Puts a condition in; tells whether that changed anything.
pub fn set_condition(status: &mut JobStatus, kind: &str, state: &str, reason: &str, message: &str) -> bool {
    let now = Some(clock::now_seconds().into());
    let conditions = status.conditions.get_or_insert_with(Vec::new);
    let new = JobCondition {
        type_: kind.into(),
        status: state.into(),
        last_probe_time: now.clone(),
        last_transition_time: now,
        reason: Some(reason.into()),
        message: Some(message.into()),
    };
    match conditions.iter_mut().find(|c| c.type_ == kind) {
        Some(old) if old.status == state && old.reason == new.reason && old.message == new.message => false,
        Some(old) => {
            let since = (old.status == state).then(|| old.last_transition_time.clone()).flatten();
            *old = new;
            if since.is_some() {
                old.last_transition_time = since;
            }
            true
        }
        None => {
            conditions.push(new);
            true
        }
    }
}

/// Moves UIDs whose pods hold no finalizer any more into the counts.
fn count_released(status: &mut JobStatus, still_held: &HashSet<String>) {
    let Some(mut uncounted) = status.uncounted_terminated_pods.take() else { return };
    let settle = |list: &mut Option<Vec<String>>, count: &mut Option<i32>| {
        let held: Vec<String> = list.take().unwrap_or_default();
        let before = held.len();
        let held: Vec<String> = held.into_iter().filter(|u| still_held.contains(u)).collect();
        let settled = (before - held.len()) as i32;
        *count = Some(count.unwrap_or(0) + settled).filter(|n| *n != 0);
        *list = (!held.is_empty()).then_some(held);
    };
    settle(&mut uncounted.succeeded, &mut status.succeeded);
    settle(&mut uncounted.failed, &mut status.failed);
    status.uncounted_terminated_pods = Some(uncounted);
}

fn is_settled(status: &JobStatus) -> bool {
    let uncounted = status.uncounted_terminated_pods.as_ref();
    uncounted.is_none_or(|u| {
        u.succeeded.as_ref().is_none_or(Vec::is_empty) && u.failed.as_ref().is_none_or(Vec::is_empty)
    })
}

fn indexes_text(set: &BTreeSet<i32>) -> Option<String> {
    (!set.is_empty()).then(|| indexes::format(set))
}

impl JobController {
    /// Writes the status, releases ended pods, counts them, and ends the Job when all are counted.
    pub(super) async fn track(
        &self,
        s: &Situation<'_>,
        pods: &[Arc<Pod>],
        mut status: JobStatus,
        end: Option<End>,
    ) -> Result<bool, SyncError> {
        let key = sampan_client::informer::key(s.job);
        let released = self.released(&key);
        let tracking = plan(s, pods, &released, end.as_ref());
        if is_indexed(s.spec) {
            status.completed_indexes = indexes_text(&s.succeeded_indexes);
            status.succeeded = Some(s.succeeded_indexes.len() as i32).filter(|n| *n != 0);
            if s.spec.backoff_limit_per_index.is_some() {
                status.failed_indexes = Some(indexes::format(&s.failed_indexes));
            }
        }
        status.uncounted_terminated_pods = Some(tracking.uncounted.clone());
        if let Some(end) = &end {
            let kind = if end.succeeded { "SuccessCriteriaMet" } else { "FailureTarget" };
            set_condition(&mut status, kind, "True", &end.reason, &end.message);
        }
        // those released by an earlier pass that did not get to count them
        let mut held: HashSet<String> =
            pods.iter().filter(|p| has_finalizer(p)).map(|p| uid(&**p).to_string()).collect();
        held.retain(|u| !released.contains(u));
        count_released(&mut status, &held);
        let mut job = self.write_status(s.job.clone(), status.clone()).await?;
        let mut failed = None;
        for pod in &tracking.release {
            match self.release(&key, pod).await {
                Ok(()) => drop(held.remove(uid(&**pod))),
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        status = job.status.clone().unwrap_or_default();
        count_released(&mut status, &held);
        let mut ended = None;
        if let Some(end) =
            end.filter(|_| is_settled(&status) && !tracking.more && s.active.is_empty() && s.terminating == 0)
        {
            finish(&mut status, &end);
            ended = Some(end);
        }
        job = self.write_status(job, status).await?;
        if let Some(end) = ended {
            self.tell_end(&job, &end);
        }
        if let Some(e) = failed {
            return Err(e.into());
        }
        Ok(tracking.more)
    }

    async fn write_status(&self, job: Job, status: JobStatus) -> Result<Job, SyncError> {
        if job.status.as_ref() == Some(&status) {
            return Ok(job);
        }
        let api: Api<Job> = Api::namespaced(self.client.clone(), namespace(&job));
        let name = name(&job).to_string();
        let changed = Job { status: Some(status), ..job };
        let written = api.replace_status(&name, &PostParams::default(), &changed).await?;
        self.writes.wrote(&written);
        Ok(written)
    }

    /// Removes the tracking finalizer from a pod, and remembers that until the informer has seen it.
    pub(super) async fn release(&self, job: &crate::controller::Key, pod: &Pod) -> Result<(), kube::Error> {
        if !has_finalizer(pod) {
            return Ok(());
        }
        self.remember_released(job, uid(pod));
        let patch =
            json!({"metadata": {"uid": uid(pod), "$deleteFromPrimitiveList/finalizers": [FINALIZER]}});
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace(pod));
        let patched = api.patch(name(pod), &PatchParams::default(), &Patch::Strategic(&patch)).await;
        match patched {
            Err(e)
                if api_error::is_not_found(&e) || api_error::is_conflict(&e) || api_error::is_invalid(&e) =>
            {
                // it is gone, or another one of that name is there
                Ok(())
            }
            Err(e) => {
                self.forget_released(job, uid(pod));
                Err(e)
            }
            Ok(_) => Ok(()),
        }
    }

    fn tell_end(&self, job: &Job, end: &End) {
        match end.succeeded {
            true => self.events.normal(job, "Completed", "Job completed"),
            false => self.events.warning(job, &end.reason, end.message.clone()),
        }
    }
}

fn finish(status: &mut JobStatus, end: &End) {
    let kind = if end.succeeded { "Complete" } else { "Failed" };
    set_condition(status, kind, "True", &end.reason, &end.message);
    if end.succeeded {
        status.completion_time = Some(clock::now_seconds().into());
    }
    status.active = None;
    status.ready = Some(0);
    status.terminating = Some(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_are_counted_when_their_finalizer_is_gone() {
        let mut status: JobStatus = serde_json::from_value(json!({
            "succeeded": 1, "uncountedTerminatedPods": {"succeeded": ["a", "b"], "failed": ["c"]},
        }))
        .unwrap();
        count_released(&mut status, &["b".to_string()].into());
        assert_eq!((status.succeeded, status.failed), (Some(2), Some(1)));
        assert!(!is_settled(&status));
        count_released(&mut status, &HashSet::new());
        assert_eq!(status.succeeded, Some(3));
        assert!(is_settled(&status));
    }
}
