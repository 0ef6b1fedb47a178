//! Removes the victims of a preemption. Upstream counterpart: pkg/scheduler/framework/preemption/executor.go.
//!
//! It works beside the scheduling loop; a pod that has a preemption under way does not start another.
use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use sampan_world::clock;
use serde_json::json;

use crate::cache::Cache;
use crate::event_recorder::{EventRecorder, NORMAL};
use crate::framework::PodInfo;
use crate::status_writer::{StatusWriter, condition};
use crate::writes::{ClusterWrites, WriteError};

pub struct Preemptor {
    writes: Arc<dyn ClusterWrites>,
    recorder: EventRecorder,
    statuses: Arc<StatusWriter>,
    cache: Arc<Cache>,
    preempting: Mutex<HashSet<Arc<str>>>,
    /// Called with the UID of a pod whose preemption failed.
    failed: OnceLock<Box<dyn Fn(Arc<str>) + Send + Sync>>,
}

impl Preemptor {
    pub fn new(
        writes: Arc<dyn ClusterWrites>,
        recorder: EventRecorder,
        statuses: Arc<StatusWriter>,
        cache: Arc<Cache>,
    ) -> Self {
        Self { writes, recorder, statuses, cache, preempting: Mutex::default(), failed: OnceLock::new() }
    }

    pub fn on_failed(&self, call: impl Fn(Arc<str>) + Send + Sync + 'static) {
        let _ = self.failed.set(Box::new(call));
    }

    pub fn is_preempting(&self, uid: &str) -> bool {
        self.preempting.lock().contains(uid)
    }

    /// Starts to remove `victims` from `node` for `pod`.
    pub fn evict(self: &Arc<Self>, pod: &Arc<PodInfo>, node: &str, victims: &[Arc<PodInfo>]) {
        // pods of lower priority that were promised the node must look for another
        for other in self.cache.nominated_to(node).iter().filter(|o| o.priority < pod.priority) {
            self.cache.nominate(other, "");
            self.statuses.write(other, None, Some(String::new()));
        }
        let victims: Vec<Arc<PodInfo>> = victims.iter().filter(|v| !v.terminating).cloned().collect();
        if victims.is_empty() {
            return;
        }
        self.preempting.lock().insert(pod.uid.clone());
        let (this, pod, node) = (self.clone(), pod.clone(), node.to_string());
        tokio::spawn(async move {
            let mut failed = false;
            for victim in &victims {
                if let Err(error) = this.evict_one(&pod, &node, victim).await {
                    tracing::warn!(pod = %pod.name, victim = %victim.name, %error, "cannot preempt");
                    failed = true;
                    break;
                }
            }
            this.preempting.lock().remove(&pod.uid);
            if let Some(call) = this.failed.get().filter(|_| failed) {
                call(pod.uid.clone());
            }
        });
    }

    async fn evict_one(&self, pod: &PodInfo, node: &str, victim: &PodInfo) -> Result<(), WriteError> {
        let scheduler = pod.spec().scheduler_name.as_deref().unwrap_or(crate::SCHEDULER_NAME);
        let message = format!("{scheduler}: preempting to accommodate a higher priority pod");
        let condition = condition(
            victim,
            "DisruptionTarget",
            "True",
            "PreemptionByScheduler",
            &message,
            clock::now_seconds(),
        );
        let marked = self.writes.patch_status(victim, json!({"conditions": [condition]})).await;
        let deleted = match marked {
            Ok(()) => self.writes.delete_pod(victim).await,
            Err(error) => Err(error),
        };
        match deleted {
            Ok(()) => {
                let note = format!("Preempted by pod {} on node {node}", pod.uid);
                self.recorder.record(victim, NORMAL, "Preempted", "Preempting", note);
                Ok(())
            }
            Err(WriteError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
