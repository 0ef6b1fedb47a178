//! What a Job's pods mean and what to do next. Pure. Upstream counterpart: pkg/controller/job/job_controller.go
//! (syncJob, manageJob), indexed_job_utils.go, backoff_utils.go.
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::Pod;

use super::failure_policy::{self, Verdict};
use super::indexes;
use crate::controller_ref::{is_deleting, uid};
use crate::pod_state;

pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
pub const INDEX_FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";
pub const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
const BACK_OFF: Duration = Duration::from_secs(10);
const MAX_BACK_OFF: Duration = Duration::from_secs(600);

/// Why a Job ends: `kind` is FailureTarget or SuccessCriteriaMet first, then Failed or Complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    pub succeeded: bool,
    pub reason: String,
    pub message: String,
}

impl End {
    fn failed(reason: &str, message: &str) -> Self {
        Self { succeeded: false, reason: reason.into(), message: message.into() }
    }
}

/// A Job and its pods, sorted out.
pub struct Situation<'a> {
    pub job: &'a Job,
    pub spec: &'a JobSpec,
    pub active: Vec<Arc<Pod>>,
    pub terminating: i32,
    pub ready: i32,
    /// Succeeded and failed pods that are not in the status' counts yet.
    pub new_succeeded: Vec<Arc<Pod>>,
    pub new_failed: Vec<(Arc<Pod>, Verdict)>,
    pub succeeded: i32,
    pub failed: i32,
    pub succeeded_indexes: BTreeSet<i32>,
    pub failed_indexes: BTreeSet<i32>,
    /// By index: how many failures the next pod of it has behind it.
    pub index_failures: BTreeMap<i32, i32>,
}

pub fn is_indexed(spec: &JobSpec) -> bool {
    spec.completion_mode.as_deref() == Some("Indexed")
}

pub fn has_finalizer(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
}

fn annotation(pod: &Pod, key: &str) -> Option<i32> {
    pod.metadata.annotations.as_ref()?.get(key)?.parse().ok()
}

/// The pod's completion index.
pub fn index_of(pod: &Pod) -> Option<i32> {
    annotation(pod, INDEX).filter(|i| *i >= 0)
}

/// Whether a pod counts as failed: one being deleted does unless only failed pods are replaced.
pub fn is_failed(spec: &JobSpec, pod: &Pod) -> bool {
    match pod_state::phase(pod) {
        "Failed" => true,
        "Succeeded" => false,
        _ => is_deleting(pod) && !replaces_only_failed(spec),
    }
}

pub fn replaces_only_failed(spec: &JobSpec) -> bool {
    spec.pod_replacement_policy.as_deref() == Some("Failed") || spec.pod_failure_policy.is_some()
}

pub fn condition_is_true(status: &JobStatus, kind: &str) -> bool {
    status.conditions.iter().flatten().any(|c| c.type_ == kind && c.status == "True")
}

pub fn is_finished(job: &Job) -> bool {
    job.status.as_ref().is_some_and(|s| condition_is_true(s, "Complete") || condition_is_true(s, "Failed"))
}

impl<'a> Situation<'a> {
    /// `uncounted` are the UIDs that the status lists as not yet counted; `released` pods whose finalizer is gone.
    pub fn new(job: &'a Job, spec: &'a JobSpec, pods: &[Arc<Pod>], released: &HashSet<String>) -> Self {
        let status = job.status.clone().unwrap_or_default();
        let completions = spec.completions.unwrap_or(0);
        let uncounted = status.uncounted_terminated_pods.clone().unwrap_or_default();
        let uncounted_succeeded = uncounted.succeeded.unwrap_or_default();
        let uncounted_failed = uncounted.failed.unwrap_or_default();
        let mut s = Self {
            job,
            spec,
            active: Vec::new(),
            terminating: 0,
            ready: 0,
            new_succeeded: Vec::new(),
            new_failed: Vec::new(),
            succeeded: status.succeeded.unwrap_or(0) + uncounted_succeeded.len() as i32,
            failed: status.failed.unwrap_or(0) + uncounted_failed.len() as i32,
            succeeded_indexes: indexes::parse(
                status.completed_indexes.as_deref().unwrap_or_default(),
                completions,
            ),
            failed_indexes: indexes::parse(status.failed_indexes.as_deref().unwrap_or_default(), completions),
            index_failures: BTreeMap::new(),
        };
        for pod in pods {
            s.terminating += i32::from(pod_state::is_terminating(pod));
            let tracked = has_finalizer(pod) && !released.contains(uid(&**pod));
            let known = |list: &[String]| list.iter().any(|u| u == uid(&**pod));
            if pod_state::is_active(pod) {
                s.ready += i32::from(pod_state::is_ready(pod));
                s.active.push(pod.clone());
            } else if pod_state::phase(pod) == "Succeeded" {
                if tracked && !known(&uncounted_succeeded) {
                    s.new_succeeded.push(pod.clone());
                }
            } else if tracked && is_failed(spec, pod) && !known(&uncounted_failed) {
                let verdict = match pod_state::phase(pod) {
                    "Failed" => failure_policy::judge(job, pod),
                    _ => Verdict::Count,
                };
                s.new_failed.push((pod.clone(), verdict));
            }
        }
        s.count_indexes(pods, completions);
        s.failed += s.new_failed.iter().filter(|(_, v)| *v != Verdict::Ignore).count() as i32;
        s
    }

    fn count_indexes(&mut self, pods: &[Arc<Pod>], completions: i32) {
        if !is_indexed(self.spec) {
            self.succeeded += self.new_succeeded.len() as i32;
            return;
        }
        let done = self.new_succeeded.iter().filter_map(|p| index_of(p)).filter(|i| *i < completions);
        self.succeeded_indexes.extend(done);
        self.succeeded = self.succeeded_indexes.len() as i32;
        let Some(limit) = self.spec.backoff_limit_per_index else { return };
        for pod in pods {
            let Some(index) = index_of(pod).filter(|i| *i < completions) else { continue };
            let before = annotation(pod, INDEX_FAILURES).unwrap_or(0);
            let failed = is_failed(self.spec, pod);
            let verdict = if failed { failure_policy::judge(self.job, pod) } else { Verdict::Ignore };
            let failures = before + i32::from(verdict != Verdict::Ignore);
            let most = self.index_failures.entry(index).or_insert(0);
            *most = (*most).max(failures);
            if failed
                && !self.succeeded_indexes.contains(&index)
                && (failures > limit || verdict == Verdict::FailIndex)
            {
                self.failed_indexes.insert(index);
            }
        }
    }

    /// Why the Job ends now, if it does.
    pub fn end(&self, now: Timestamp) -> Option<End> {
        let status = self.job.status.as_ref();
        let recorded =
            |kind: &str| status?.conditions.as_ref()?.iter().find(|c| c.type_ == kind && c.status == "True");
        let again = |c: &k8s_openapi::api::batch::v1::JobCondition, succeeded| End {
            succeeded,
            reason: c.reason.clone().unwrap_or_default(),
            message: c.message.clone().unwrap_or_default(),
        };
        if let Some(c) = recorded("SuccessCriteriaMet") {
            return Some(again(c, true));
        }
        if let Some(c) = recorded("FailureTarget") {
            return Some(again(c, false));
        }
        for (_, verdict) in &self.new_failed {
            if let Verdict::FailJob(message) = verdict {
                return Some(End::failed("PodFailurePolicy", message));
            }
        }
        let limit = self.spec.backoff_limit.unwrap_or(6);
        if self.failed > limit || self.restarts_exceed(limit) {
            let message = "Job has reached the specified backoff limit";
            return Some(End::failed("BackoffLimitExceeded", message));
        }
        if self.deadline_left(now).is_some_and(|left| left.is_zero()) {
            return Some(End::failed("DeadlineExceeded", "Job was active longer than specified deadline"));
        }
        self.index_end()
    }

    fn index_end(&self) -> Option<End> {
        let completions = self.spec.completions?;
        if !is_indexed(self.spec) {
            return None;
        }
        if self.spec.backoff_limit_per_index.is_some() {
            let failed = self.failed_indexes.len() as i32;
            if self.spec.max_failed_indexes.is_some_and(|max| failed > max) {
                let message = "Job has exceeded the specified maximal number of failed indexes";
                return Some(End::failed("MaxFailedIndexesExceeded", message));
            }
            if failed > 0 && failed + self.succeeded >= completions {
                return Some(End::failed("FailedIndexes", "Job has failed indexes"));
            }
        }
        let message = failure_policy::success(self.job, &self.succeeded_indexes)?;
        Some(End { succeeded: true, reason: "SuccessPolicy".into(), message })
    }

    /// With restartPolicy OnFailure, restarts of containers count against the limit.
    fn restarts_exceed(&self, limit: i32) -> bool {
        let policy = self.spec.template.spec.as_ref().and_then(|s| s.restart_policy.as_deref());
        if policy != Some("OnFailure") {
            return false;
        }
        let restarts = |p: &Pod| {
            let status = p.status.as_ref();
            let all = status
                .into_iter()
                .flat_map(|s| s.container_statuses.iter().chain(&s.init_container_statuses));
            all.flatten().map(|c| c.restart_count).sum::<i32>()
        };
        let running = self.active.iter().filter(|p| matches!(pod_state::phase(p), "Running" | "Pending"));
        let total: i32 = running.map(|p| restarts(p)).sum();
        if limit == 0 { total > 0 } else { total >= limit }
    }

    /// How long the Job may still run.
    pub fn deadline_left(&self, now: Timestamp) -> Option<Duration> {
        let limit = self.spec.active_deadline_seconds?;
        if self.spec.suspend == Some(true) {
            return None;
        }
        let started = self.job.status.as_ref()?.start_time.as_ref()?.0;
        let left = limit * 1000 - now.duration_since(started).as_millis() as i64;
        Some(Duration::from_millis(left.max(0).unsigned_abs()))
    }

    /// Whether all work is done.
    pub fn is_complete(&self) -> bool {
        match self.spec.completions {
            None => self.succeeded > 0 && self.active.is_empty(),
            Some(completions) => self.succeeded >= completions && self.active.is_empty(),
        }
    }

    /// How many pods should be active.
    pub fn wanted_active(&self) -> i32 {
        let parallelism = self.spec.parallelism.unwrap_or(1);
        match self.spec.completions {
            None if self.succeeded > 0 => self.active.len() as i32,
            None => parallelism,
            Some(completions) => {
                let failed =
                    if self.spec.backoff_limit_per_index.is_some() { self.failed_indexes.len() } else { 0 };
                (completions - self.succeeded - failed as i32).clamp(0, parallelism)
            }
        }
    }

    /// Active pods to delete, at least `at_least`: for an indexed Job first those whose index is done, out of range
    /// or taken.
    pub fn surplus(&self, at_least: usize, now: Timestamp) -> Vec<Arc<Pod>> {
        let mut candidates: Vec<Arc<Pod>> = self.active.clone();
        candidates.sort_by(|a, b| pod_state::deletion_order((a, 0), (b, 0), now));
        if !is_indexed(self.spec) {
            candidates.truncate(at_least);
            return candidates;
        }
        let completions = self.spec.completions.unwrap_or(0);
        let mut taken = BTreeSet::new();
        let (mut delete, mut rest) = (Vec::new(), Vec::new());
        // the best pods keep their indexes
        for pod in candidates.into_iter().rev() {
            let usable = |i: &i32| {
                *i < completions && !self.succeeded_indexes.contains(i) && !self.failed_indexes.contains(i)
            };
            match index_of(&pod).filter(usable) {
                Some(index) if taken.insert(index) => rest.push(pod),
                _ => delete.push(pod),
            }
        }
        // of those left, the highest indexes go first
        rest.sort_by_key(|p| index_of(p));
        while delete.len() < at_least {
            let Some(pod) = rest.pop() else { break };
            delete.push(pod);
        }
        delete
    }

    /// The first `count` indexes that have no pod and need one.
    pub fn pending_indexes(&self, count: usize, pods: &[Arc<Pod>]) -> Vec<i32> {
        let mut busy: BTreeSet<i32> = self.active.iter().filter_map(|p| index_of(p)).collect();
        if replaces_only_failed(self.spec) {
            busy.extend(pods.iter().filter(|p| pod_state::is_terminating(p)).filter_map(|p| index_of(p)));
        }
        let skip = |i: &i32| {
            busy.contains(i) || self.succeeded_indexes.contains(i) || self.failed_indexes.contains(i)
        };
        (0..self.spec.completions.unwrap_or(0)).filter(|i| !skip(i)).take(count).collect()
    }
}

/// When a pod ended: the latest end of its containers, else its deletion or its Ready condition's change.
fn finish_time(pod: &Pod) -> Option<Timestamp> {
    let status = pod.status.as_ref()?;
    let containers = status.container_statuses.iter().flatten();
    let ends =
        containers.filter_map(|c| c.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref().map(|t| t.0));
    let ready = pod_state::condition(pod, "Ready").and_then(|c| c.last_transition_time.as_ref()).map(|t| t.0);
    let deleted = pod.metadata.deletion_timestamp.as_ref().map(|t| t.0);
    ends.max().or(deleted).or(ready).or(pod.metadata.creation_timestamp.as_ref().map(|t| t.0))
}

/// How long to wait before the next pod: 10 s, doubled with each failure since the last success, up to 10 minutes.
pub fn back_off_left(pods: &[Arc<Pod>], spec: &JobSpec, index: Option<i32>, now: Timestamp) -> Duration {
    let of_index = |p: &&Arc<Pod>| index.is_none() || index_of(p) == index;
    let ended = |p: &Arc<Pod>| finish_time(p);
    let succeeded =
        pods.iter().filter(of_index).filter(|p| pod_state::phase(p) == "Succeeded").filter_map(ended).max();
    let failures: Vec<Timestamp> = pods
        .iter()
        .filter(of_index)
        .filter(|p| is_failed(spec, p))
        .filter_map(ended)
        .filter(|t| succeeded.is_none_or(|s| *t > s))
        .collect();
    let Some(last) = failures.iter().max() else { return Duration::ZERO };
    let doublings = (failures.len() - 1).min(10) as u32;
    let delay = BACK_OFF.saturating_mul(1 << doublings).min(MAX_BACK_OFF);
    let waited = u64::try_from(now.duration_since(*last).as_millis()).unwrap_or(0);
    delay.saturating_sub(Duration::from_millis(waited))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod_state::test_pod;
    use serde_json::json;

    fn job(spec: serde_json::Value) -> Job {
        let mut job: Job =
            serde_json::from_value(json!({"metadata": {"name": "j", "uid": "j"}, "spec": spec})).unwrap();
        job.spec.as_mut().unwrap().template.spec = Some(Default::default());
        job
    }

    fn pod(name: &str, phase: &str, index: Option<i32>) -> Arc<Pod> {
        let mut pod = test_pod(name, phase, "n", false);
        pod.metadata.finalizers = Some(vec![FINALIZER.into()]);
        pod.metadata.annotations = index.map(|i| [(INDEX.to_string(), i.to_string())].into());
        Arc::new(pod)
    }

    fn now() -> Timestamp {
        "2026-01-01T00:00:05Z".parse().unwrap()
    }

    #[test]
    fn plain_jobs() {
        let job = job(json!({"template": {}, "completions": 3, "parallelism": 2, "backoffLimit": 1}));
        let spec = job.spec.as_ref().unwrap();
        let pods = [pod("a", "Succeeded", None), pod("b", "Running", None), pod("c", "Failed", None)];
        let s = Situation::new(&job, spec, &pods, &HashSet::new());
        assert_eq!((s.succeeded, s.failed, s.active.len(), s.wanted_active()), (1, 1, 1, 2));
        assert_eq!(s.end(now()), None);
        assert_eq!(back_off_left(&pods, spec, None, now()), Duration::ZERO, "a success resets the back-off");
        let failures = [pod("c", "Failed", None), pod("d", "Failed", None)];
        let s = Situation::new(&job, spec, &failures, &HashSet::new());
        assert_eq!(s.end(now()).unwrap().reason, "BackoffLimitExceeded");
        assert_eq!(back_off_left(&failures, spec, None, now()), Duration::from_secs(15));
    }

    #[test]
    fn indexed_jobs() {
        let job =
            job(json!({"template": {}, "completions": 4, "parallelism": 4, "completionMode": "Indexed",
            "backoffLimitPerIndex": 0, "backoffLimit": 100}));
        let spec = job.spec.as_ref().unwrap();
        let pods = [
            pod("a", "Succeeded", Some(0)),
            pod("b", "Failed", Some(1)),
            pod("c", "Running", Some(2)),
            pod("d", "Running", Some(2)),
        ];
        let s = Situation::new(&job, spec, &pods, &HashSet::new());
        assert_eq!(indexes::format(&s.succeeded_indexes), "0");
        assert_eq!(indexes::format(&s.failed_indexes), "1");
        assert_eq!(s.pending_indexes(10, &pods), [3]);
        assert_eq!(s.surplus(0, now()).len(), 1, "the second pod of index 2");
        assert_eq!(s.end(now()), None);
        let last = [
            pod("a", "Succeeded", Some(0)),
            pod("b", "Failed", Some(1)),
            pod("c", "Succeeded", Some(2)),
            pod("d", "Succeeded", Some(3)),
        ];
        let s = Situation::new(&job, spec, &last, &HashSet::new());
        assert_eq!(s.end(now()).unwrap().reason, "FailedIndexes");
    }
}
