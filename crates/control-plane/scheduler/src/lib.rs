//! The scheduler: decides which node each pod runs on.
use std::sync::Arc;

pub use platforms::{ImageQuery, Platforms};

mod platforms;

/// The default scheduler.
pub struct Scheduler {
    client: kube::Client,
    informers: sampan_client::Informers,
    platforms: Option<Arc<dyn Platforms>>,
}

impl Scheduler {
    pub fn new(
        client: kube::Client,
        informers: sampan_client::Informers,
        platforms: Option<Arc<dyn Platforms>>,
    ) -> Self {
        Self { client, informers, platforms }
    }

    /// Schedules pods until dropped.
    pub async fn run(self) {
        let _kept = (self.client, self.informers, self.platforms);
        std::future::pending::<()>().await;
    }
}
