//! Binds a pod through its `binding` subresource. Upstream counterpart: pkg/scheduler/framework/plugins/defaultbinder.
use std::sync::Arc;

use async_trait::async_trait;

use crate::framework::{Bind, Plugin, PodInfo, Verdict};
use crate::plugins::Descriptor;
use crate::writes::ClusterWrites;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "DefaultBinder",
    weight: 0,
    new: |cx| Box::new(DefaultBinder { writes: cx.writes.clone() }),
};

struct DefaultBinder {
    writes: Arc<dyn ClusterWrites>,
}

impl Plugin for DefaultBinder {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn as_bind(&self) -> Option<&dyn Bind> {
        Some(self)
    }
}

#[async_trait]
impl Bind for DefaultBinder {
    async fn bind(&self, pod: &PodInfo, node: &str) -> Verdict {
        match self.writes.bind(pod, node).await {
            Ok(()) => Verdict::Success,
            Err(error) => Verdict::Error(format!("running Bind plugin \"DefaultBinder\": {error}")),
        }
    }
}
