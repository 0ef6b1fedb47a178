//! CronJobs: start Jobs on a schedule. Upstream counterpart: pkg/controller/cronjob.
//!
//! What stays true: a Job's name follows from its scheduled time, so that no time is started twice. Deliberate
//! difference: time zones come from the machine's zoneinfo; where that is missing only UTC and Etc/UTC are known, and
//! others are reported as unknown.
pub mod schedule;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::{CronJob, CronJobSpec, CronJobStatus, Job};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use sampan_client::informer::{controller_of, key};
use sampan_client::{Informer, WorkQueue};
use sampan_world::clock;

use self::schedule::Schedule;
use crate::controller::{Controller, Descriptor, Key, SyncError, SyncResult, run};
use crate::controller_ref::{controller_reference, is_deleting, name, namespace, resolve, uid};
use crate::events::EventRecorder;
use crate::expectations::OwnWrites;
use crate::job::decision::is_finished;
use crate::{Scope, api_error, events};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "cronjob-controller",
    service_account: "cronjob-controller",
    component: "cronjob-controller",
    build: |scope| run(CronJobController::new(&scope)),
};

const SCHEDULED_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
/// More missed times than this are reported, and only the last is made up for.
const TOO_MANY_MISSED: usize = 100;
/// Wakes a little late, so that the scheduled second has begun.
const SLACK: Duration = Duration::from_millis(100);

struct CronJobController {
    client: Client,
    events: EventRecorder,
    cron_jobs: Informer<CronJob>,
    jobs: Informer<Job>,
    writes: OwnWrites,
    queue: WorkQueue<Key>,
}

impl CronJobController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            cron_jobs: scope.informers.of(),
            jobs: scope.informers.of(),
            writes: OwnWrites::default(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.cron_jobs.on_event(move |event| me.queue.add(key(&**event.object())));
        let me = this.clone();
        this.jobs.on_event(move |event| {
            let job = event.object();
            let owner = controller_of(&**job).and_then(|r| resolve(&me.cron_jobs, namespace(&**job), r));
            if let Some(owner) = owner {
                me.queue.add(key(&*owner));
            }
        });
        this
    }

    /// Takes finished and missing Jobs from the active list.
    async fn settle_active(
        &self,
        cron: &CronJob,
        status: &mut CronJobStatus,
        jobs: &[Arc<Job>],
    ) -> SyncResult {
        let api: Api<Job> = Api::namespaced(self.client.clone(), namespace(cron));
        let mut active = status.active.take().unwrap_or_default();
        for job in jobs {
            let position = active.iter().position(|r| r.uid.as_deref() == Some(uid(&**job)));
            let finished = finish_kind(job);
            match (position, finished) {
                (None, None) => {
                    // it may be ours and the status write was lost
                    self.events.warning(
                        cron,
                        "UnexpectedJob",
                        format!("Saw a job that the controller did not create or forgot: {}", name(&**job)),
                    );
                }
                (Some(i), Some(kind)) => {
                    active.remove(i);
                    let message = format!("Saw completed job: {}, condition: {kind}", name(&**job));
                    self.events.normal(cron, "SawCompletedJob", message);
                }
                _ => {}
            }
            let ended = job.status.as_ref().and_then(|s| s.completion_time.clone());
            if finished == Some("Complete") && ended > status.last_successful_time {
                status.last_successful_time = ended;
            }
        }
        let mut kept = Vec::new();
        for reference in active {
            if jobs.iter().any(|j| reference.uid.as_deref() == Some(uid(&**j))) {
                kept.push(reference);
                continue;
            }
            let job = reference.name.clone().unwrap_or_default();
            match api.get_opt(&job).await? {
                Some(found) if reference.uid.as_deref() == Some(uid(&found)) => kept.push(reference),
                _ => self.events.normal(cron, "MissingJob", format!("Active job went missing: {job}")),
            }
        }
        status.active = (!kept.is_empty()).then_some(kept);
        Ok(())
    }

    async fn delete_job(&self, cron: &CronJob, job: &str) -> SyncResult {
        let api: Api<Job> = Api::namespaced(self.client.clone(), namespace(cron));
        match api.delete(job, &DeleteParams::background()).await {
            Ok(_) => self.events.normal(cron, "SuccessfulDelete", format!("Deleted job {job}")),
            Err(e) if api_error::is_not_found(&e) => {}
            Err(e) => {
                let message = format!("Deleted job: {}", api_error::message(&e));
                self.events.warning(cron, "FailedDelete", message);
                return Err(e.into());
            }
        }
        Ok(())
    }

    async fn clean_up(&self, cron: &CronJob, spec: &CronJobSpec, jobs: &[Arc<Job>]) -> SyncResult {
        for (kind, limit) in
            [("Complete", spec.successful_jobs_history_limit), ("Failed", spec.failed_jobs_history_limit)]
        {
            let Some(limit) = limit else { continue };
            for job in beyond_limit(jobs, kind, limit) {
                self.delete_job(cron, name(&**job)).await?;
            }
        }
        Ok(())
    }

    /// Starts what is due; returns when to look again.
    async fn start_due(
        &self,
        cron: &CronJob,
        spec: &CronJobSpec,
        status: &mut CronJobStatus,
    ) -> Result<Option<Timestamp>, SyncError> {
        let zone = match zone(spec) {
            Ok(zone) => zone,
            Err(message) => {
                self.events.warning(cron, "UnknownTimeZone", message);
                return Ok(None);
            }
        };
        let schedule = match schedule::parse(&spec.schedule) {
            Ok(schedule) => schedule,
            Err(why) => {
                let message = format!("unparseable schedule: \"{}\" : {why}", spec.schedule);
                self.events.warning(cron, "UnparseableSchedule", message);
                return Ok(None);
            }
        };
        let now = clock::now();
        let next = schedule.next(now, &zone);
        let (due, missed) = due(cron, spec, status, &schedule, &zone, now);
        if missed > TOO_MANY_MISSED {
            let message = "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
            self.events.warning(cron, "TooManyMissedTimes", message);
        }
        let Some(due) = due else { return Ok(next) };
        let deadline = spec.starting_deadline_seconds.map(SignedDuration::from_secs);
        if deadline.is_some_and(|d| due + d < now) {
            self.events.warning(cron, "MissSchedule", format!("Missed scheduled time to start a job: {due}"));
            return Ok(next);
        }
        let active = status.active.clone().unwrap_or_default();
        let job_name = job_name(cron, due);
        if active.iter().any(|r| r.name.as_deref() == Some(&job_name))
            || status.last_schedule_time == Some(Time(due))
        {
            return Ok(next);
        }
        match spec.concurrency_policy.as_deref() {
            Some("Forbid") if !active.is_empty() => {
                let message =
                    "Not starting job because prior execution is running and concurrency policy is Forbid";
                self.events.normal(cron, "JobAlreadyActive", message);
                return Ok(next);
            }
            Some("Replace") => {
                for reference in &active {
                    self.delete_job(cron, reference.name.as_deref().unwrap_or_default()).await?;
                }
                status.active = None;
            }
            _ => {}
        }
        if let Some(job) = self.create_job(cron, &job_for(cron, spec, due, &zone)).await? {
            status.active.get_or_insert_with(Vec::new).push(reference(&job));
            status.last_schedule_time = Some(Time(due));
        }
        Ok(next)
    }

    async fn create_job(&self, cron: &CronJob, job: &Job) -> Result<Option<Job>, SyncError> {
        let api: Api<Job> = Api::namespaced(self.client.clone(), namespace(cron));
        match api.create(&PostParams::default(), job).await {
            Ok(created) => {
                self.events.normal(cron, "SuccessfulCreate", format!("Created job {}", name(&created)));
                Ok(Some(created))
            }
            Err(e) if api_error::is_namespace_terminating(&e) => Ok(None),
            Err(e) if api_error::is_already_exists(&e) => {
                // ours, started just before a restart, unless someone else took the name
                let existing = api.get(name(job)).await?;
                let ours = controller_of(&existing).is_some_and(|r| r.uid == uid(cron));
                Ok(Some(existing).filter(|_| ours))
            }
            Err(e) => {
                let message = format!("Error creating job: {}", api_error::message(&e));
                self.events.warning(cron, "FailedCreate", message);
                Err(e.into())
            }
        }
    }
}

fn reference(job: &Job) -> ObjectReference {
    events::reference(job)
}

fn zone(spec: &CronJobSpec) -> Result<TimeZone, String> {
    match spec.time_zone.as_deref() {
        None | Some("UTC" | "Etc/UTC") => Ok(TimeZone::UTC),
        Some(zone) => TimeZone::get(zone).map_err(|e| format!("invalid timeZone: \"{zone}\": {e}")),
    }
}

/// The kind of the condition that says that a Job is finished.
fn finish_kind(job: &Job) -> Option<&'static str> {
    let status = job.status.as_ref()?;
    ["Complete", "Failed"].into_iter().find(|kind| crate::job::decision::condition_is_true(status, kind))
}

fn beyond_limit<'a>(jobs: &'a [Arc<Job>], kind: &str, limit: i32) -> Vec<&'a Arc<Job>> {
    let mut finished: Vec<&Arc<Job>> = jobs.iter().filter(|j| finish_kind(j) == Some(kind)).collect();
    let started = |j: &Job| j.status.as_ref().and_then(|s| s.start_time.clone());
    finished.sort_by(|a, b| started(a).cmp(&started(b)).then_with(|| name(&***a).cmp(name(&***b))));
    let excess = finished.len().saturating_sub(limit.max(0) as usize);
    finished.truncate(excess);
    finished
}

/// The last time that passed and was not started, and how many passed.
fn due(
    cron: &CronJob,
    spec: &CronJobSpec,
    status: &CronJobStatus,
    schedule: &Schedule,
    zone: &TimeZone,
    now: Timestamp,
) -> (Option<Timestamp>, usize) {
    let created = cron.metadata.creation_timestamp.as_ref().map(|t| t.0);
    let mut earliest = status.last_schedule_time.as_ref().map(|t| t.0).or(created).unwrap_or(now);
    if let Some(deadline) = spec.starting_deadline_seconds {
        earliest = earliest.max(now - SignedDuration::from_secs(deadline.max(0)));
    }
    let (mut last, mut missed) = (None, 0);
    let mut at = earliest;
    while let Some(next) = schedule.next(at, zone).filter(|t| *t <= now) {
        (last, missed, at) = (Some(next), missed + 1, next);
        if missed > TOO_MANY_MISSED {
            // far behind: look for the last one from near the end
            let near = now - SignedDuration::from_hours(24 * 32);
            if near > at {
                at = near;
            }
        }
        if missed > 100_000 {
            break;
        }
    }
    (last, missed)
}

/// The name follows from the scheduled minute.
fn job_name(cron: &CronJob, at: Timestamp) -> String {
    format!("{}-{}", name(cron), at.as_second() / 60)
}

fn job_for(cron: &CronJob, spec: &CronJobSpec, at: Timestamp, zone: &TimeZone) -> Job {
    let template = spec.job_template.metadata.clone().unwrap_or_default();
    let mut annotations = template.annotations.unwrap_or_default();
    let local = at.to_zoned(zone.clone());
    let text = match spec.time_zone {
        Some(_) => {
            jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%S%:z", &local).unwrap_or_else(|_| at.to_string())
        }
        None => at.to_string(),
    };
    annotations.insert(SCHEDULED_AT.into(), text.replace("+00:00", "Z"));
    Job {
        metadata: ObjectMeta {
            name: Some(job_name(cron, at)),
            namespace: Some(namespace(cron).to_string()),
            labels: template.labels.or(Some(BTreeMap::new())).filter(|l| !l.is_empty()),
            annotations: Some(annotations),
            owner_references: Some(vec![controller_reference(cron)]),
            creation_timestamp: Some(Time(at)),
            ..ObjectMeta::default()
        },
        spec: spec.job_template.spec.clone(),
        status: None,
    }
}

impl Controller for CronJobController {
    type Key = Key;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.cron_jobs.synced().await;
        self.jobs.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.cron_jobs.list().iter().map(|c| key(&**c)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(cron) = self.cron_jobs.get(&key.0, &key.1) else {
            self.writes.forget(&key);
            return Ok(());
        };
        if !self.writes.observed(&*cron) {
            return Ok(());
        }
        let spec = &cron.spec;
        let jobs = self.jobs.controlled_by(uid(&*cron));
        let before = cron.status.clone().unwrap_or_default();
        let mut status = before.clone();
        self.settle_active(&cron, &mut status, &jobs).await?;
        let mut next = None;
        let mut started = Ok(());
        if !is_deleting(&*cron) && spec.suspend != Some(true) {
            match self.start_due(&cron, spec, &mut status).await {
                Ok(at) => next = at,
                Err(e) => started = Err(e),
            }
        }
        if status != before {
            let api: Api<CronJob> = Api::namespaced(self.client.clone(), &key.0);
            let changed = CronJob { status: Some(status), ..(*cron).clone() };
            let written = api.replace_status(&key.1, &PostParams::default(), &changed).await?;
            self.writes.wrote(&written);
        }
        started?;
        if jobs.iter().any(|j| is_finished(j)) {
            self.clean_up(&cron, spec, &jobs).await?;
        }
        if let Some(next) = next {
            let wait = next.duration_since(clock::now()).as_millis();
            self.queue.add_after(key, Duration::from_millis(u64::try_from(wait).unwrap_or(0)) + SLACK);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_last_missed_time_is_due() {
        let cron: CronJob = serde_json::from_value(json!({
            "metadata": {"name": "c", "namespace": "ns", "creationTimestamp": "2026-01-01T00:00:30Z"},
            "spec": {"schedule": "* * * * *", "jobTemplate": {}},
        }))
        .unwrap();
        let mut spec = cron.spec.clone();
        let schedule = schedule::parse(&spec.schedule).unwrap();
        let status = CronJobStatus::default();
        let look = |spec: &CronJobSpec, now: &str| {
            due(&cron, spec, &status, &schedule, &TimeZone::UTC, now.parse().unwrap())
        };
        assert_eq!(look(&spec, "2026-01-01T00:00:50Z"), (None, 0));
        assert_eq!(look(&spec, "2026-01-01T00:03:10Z"), (Some("2026-01-01T00:03:00Z".parse().unwrap()), 3));
        let (last, missed) = look(&spec, "2026-06-01T00:00:10Z");
        assert_eq!(last, Some("2026-06-01T00:00:00Z".parse().unwrap()));
        assert!(missed > TOO_MANY_MISSED);
        spec.starting_deadline_seconds = Some(90);
        assert_eq!(look(&spec, "2026-01-01T00:30:10Z").1, 2);
        assert_eq!(job_name(&cron, "2026-01-01T00:03:00Z".parse().unwrap()), "c-29453763");
    }

    #[test]
    fn histories_keep_the_newest() {
        let job = |n: i32| -> Arc<Job> {
            let job = json!({"metadata": {"name": format!("j{n}")}, "status": {
                "startTime": format!("2026-01-0{n}T00:00:00Z"), "conditions": [{"type": "Complete", "status": "True"}]}});
            Arc::new(serde_json::from_value(job).unwrap())
        };
        let jobs = [job(3), job(1), job(2)];
        let old: Vec<_> = beyond_limit(&jobs, "Complete", 1).iter().map(|j| name(&***j)).collect();
        assert_eq!(old, ["j1", "j2"]);
        assert!(beyond_limit(&jobs, "Failed", 0).is_empty());
    }
}
