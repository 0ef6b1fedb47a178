//! Puts the parts together and runs them. Upstream counterpart: pkg/scheduler/scheduler.go.
use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::cache::Cache;
use crate::event_handlers;
use crate::event_recorder::{EventRecorder, Records};
use crate::framework::ClusterEvent;
use crate::platforms::PlatformCache;
use crate::plugins::{self, Context};
use crate::preemptor::Preemptor;
use crate::queue::Queue;
use crate::schedule_one::{Cycles, Progress};
use crate::sources::Sources;
use crate::status_writer::StatusWriter;
use crate::writes::{ApiWrites, ClusterWrites};

/// How many bindings may be under way; then the loop waits.
const MAX_BINDING: usize = 128;
/// After so many pods in a row other tasks get their turn.
const YIELD_AFTER: u32 = 16;

/// The default scheduler.
pub struct Scheduler {
    cycles: Arc<Cycles>,
    writes: Arc<dyn ClusterWrites>,
    records: Records,
    platforms: Option<PlatformCache>,
}

impl Scheduler {
    /// A scheduler that writes with `client` and reads from `informers`; without `platforms` no image is looked up.
    pub fn new(
        client: kube::Client,
        informers: sampan_client::Informers,
        platforms: Option<PlatformCache>,
    ) -> Scheduler {
        Self::assemble(Arc::new(ApiWrites::new(client)), Sources::shared(&informers), platforms)
    }

    pub(crate) fn assemble(
        writes: Arc<dyn ClusterWrites>,
        sources: Sources,
        platforms: Option<PlatformCache>,
    ) -> Scheduler {
        let (recorder, records) = EventRecorder::new();
        let cache = Arc::new(Cache::default());
        let statuses = Arc::new(StatusWriter::new(writes.clone()));
        let preemptor =
            Arc::new(Preemptor::new(writes.clone(), recorder.clone(), statuses.clone(), cache.clone()));
        let framework = Arc::new(plugins::framework(&Context {
            sources: sources.clone(),
            cache: cache.clone(),
            writes: writes.clone(),
            preemptor: preemptor.clone(),
            platforms: platforms.clone(),
        }));
        let queue = Arc::new(Queue::new(framework.clone()));
        let failed = Arc::downgrade(&queue);
        preemptor.on_failed(move |uid| {
            if let Some(queue) = failed.upgrade() {
                queue.on_event(&ClusterEvent::Activate { uid });
            }
        });
        let cycles = Arc::new(Cycles { framework, cache, queue, sources, recorder, statuses });
        Scheduler { cycles, writes, records, platforms }
    }

    /// Schedules pods until dropped; starts once the cluster's state is known.
    pub async fn run(self) {
        self.cycles.sources.synced().await;
        self.work().await;
    }

    /// Schedules pods from what the informers hold by now.
    pub(crate) async fn work(self) {
        let Scheduler { cycles, writes, records, platforms } = self;
        event_handlers::register(&cycles.sources, &cycles.cache, &cycles.queue);
        let statuses = cycles.statuses.clone();
        let queue = Arc::downgrade(&cycles.queue);
        if let Some(platforms) = platforms {
            platforms.on_answered(move |image| {
                if let Some(queue) = queue.upgrade() {
                    queue.on_event(&ClusterEvent::PlatformsAnswered { image: image.to_string() });
                }
            });
        }
        tokio::join!(records.write(writes), statuses.run(), schedule_all(cycles));
    }
}

async fn schedule_all(cycles: Arc<Cycles>) {
    let binding = Arc::new(Semaphore::new(MAX_BINDING));
    let mut progress = Progress::default();
    let mut in_a_row = 0;
    loop {
        let Ok(slot) = binding.clone().acquire_owned().await else { return };
        let pod = cycles.queue.pop().await;
        if let Some(placement) = cycles.schedule(&mut progress, pod) {
            let cycles = cycles.clone();
            tokio::spawn(async move {
                cycles.bind(placement).await;
                drop(slot);
            });
        }
        in_a_row += 1;
        if in_a_row % YIELD_AFTER == 0 {
            tokio::task::yield_now().await;
        }
    }
}
