//! Deletes finished Jobs when their ttlSecondsAfterFinished is over. Upstream counterpart:
//! pkg/controller/ttlafterfinished.
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Client};
use sampan_client::informer::key;
use sampan_client::{Informer, WorkQueue};
use sampan_world::clock;

use crate::controller::{Controller, Descriptor, Key, SyncResult, run};
use crate::controller_ref::{is_deleting, uid};
use crate::{Scope, api_error};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "ttl-after-finished-controller",
    service_account: "ttl-after-finished-controller",
    component: "ttl-after-finished-controller",
    build: |scope| run(TtlAfterFinishedController::new(&scope)),
};

struct TtlAfterFinishedController {
    client: Client,
    jobs: Informer<Job>,
    queue: WorkQueue<Key>,
}

impl TtlAfterFinishedController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            jobs: scope.informers.of(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.jobs.on_event(move |event| {
            if left(event.object(), clock::now()).is_some() {
                me.queue.add(key(&**event.object()));
            }
        });
        this
    }
}

/// How long the Job may stay; `None` when it may stay for good or is not finished.
fn left(job: &Job, now: Timestamp) -> Option<Duration> {
    let ttl = job.spec.as_ref()?.ttl_seconds_after_finished?;
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    let ended = |c: &&k8s_openapi::api::batch::v1::JobCondition| {
        c.status == "True" && matches!(c.type_.as_str(), "Complete" | "Failed")
    };
    let finished = conditions.iter().find(ended)?.last_transition_time.as_ref()?.0;
    if is_deleting(job) {
        return None;
    }
    let left = i64::from(ttl) * 1000 - now.duration_since(finished).as_millis() as i64;
    Some(Duration::from_millis(left.max(0).unsigned_abs()))
}

impl Controller for TtlAfterFinishedController {
    type Key = Key;
    const WORKERS: usize = 1;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.jobs.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.jobs.list().iter().map(|j| key(&**j)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(job) = self.jobs.get(&key.0, &key.1) else { return Ok(()) };
        match left(&job, clock::now()) {
            None => return Ok(()),
            Some(left) if !left.is_zero() => {
                self.queue.add_after(key, left);
                return Ok(());
            }
            Some(_) => {}
        }
        // live: the time to live may have been raised meanwhile
        let api: Api<Job> = Api::namespaced(self.client.clone(), &key.0);
        let Some(fresh) = api.get_opt(&key.1).await? else { return Ok(()) };
        if uid(&fresh) != uid(&*job) || left(&fresh, clock::now()).is_none_or(|left| !left.is_zero()) {
            self.queue.add_after(key, Duration::from_millis(100));
            return Ok(());
        }
        let exactly = Preconditions { uid: fresh.metadata.uid.clone(), resource_version: None };
        let params = DeleteParams::foreground().preconditions(exactly);
        api_error::found(api.delete(&key.1, &params).await)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left() {
        let job: Job = serde_json::from_value(serde_json::json!({
            "spec": {"template": {}, "ttlSecondsAfterFinished": 10},
            "status": {"conditions": [{"type": "Complete", "status": "True",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
        }))
        .unwrap();
        let at = |s: &str| left(&job, s.parse().unwrap());
        assert_eq!(at("2026-01-01T00:00:04Z"), Some(Duration::from_secs(6)));
        assert_eq!(at("2026-01-01T00:01:00Z"), Some(Duration::ZERO));
        let running = Job { status: None, ..job.clone() };
        assert_eq!(left(&running, clock::now()), None);
    }
}
