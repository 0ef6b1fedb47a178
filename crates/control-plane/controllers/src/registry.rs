//! The list of controllers; they are started in this order.
use std::sync::Arc;

use crate::controller::Descriptor;
use crate::events::EventRecorder;
use crate::{Context, Scope};

macro_rules! registry {
    ($($module:ident),* $(,)?) => {
        /// Every controller there is.
        pub static REGISTRY: &[&Descriptor] = &[$(&crate::$module::DESCRIPTOR),*];
    };
}

registry! {
    namespace,
    service_account,
    root_ca,
    node_ipam,
    node_lifecycle,
    taint_eviction,
    replica_set,
    replication,
    deployment,
    daemon_set,
    stateful_set,
    job,
    cron_job,
    endpoints,
    endpoint_slice,
    endpoint_slice_mirroring,
    garbage_collector,
    pod_gc,
    ttl_after_finished,
    disruption,
    resource_quota,
    cluster_role_aggregation,
    token_cleaner,
    plan,
}

/// Starts every controller, supervised. They run for as long as the runtime does, or until a handle is aborted.
pub fn start(context: Context) -> Vec<tokio::task::JoinHandle<()>> {
    let options = Arc::new(context.options);
    let start_one = |descriptor: &&Descriptor| {
        let client = (context.clients)(descriptor.service_account);
        let scope = Scope {
            events: EventRecorder::start(client.clone(), descriptor.component),
            client,
            informers: context.informers.clone(),
            options: options.clone(),
            image_platforms: context.image_platforms.clone(),
            programs: context.programs.clone(),
        };
        let run = (descriptor.build)(scope);
        sampan_telemetry::supervise(descriptor.name, run)
    };
    REGISTRY.iter().map(start_one).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = super::REGISTRY.iter().map(|d| d.name).collect();
        assert_eq!(names.len(), super::REGISTRY.len());
    }
}
