//! The scheduler's plugins: one file each, one line each in the list below. Their order there is their order at run
//! time, and is upstream's (pkg/scheduler/apis/config/v1/default_plugins.go) but for ImagePlatform, which upstream does
//! not have: it comes first, so that its reason is the one shown.
use std::sync::Arc;

use crate::cache::Cache;
use crate::framework::{Framework, Plugin};
use crate::platforms::PlatformCache;
use crate::preemptor::Preemptor;
use crate::sources::Sources;
use crate::writes::ClusterWrites;

/// What plugins are made from.
pub struct Context {
    pub sources: Sources,
    pub cache: Arc<Cache>,
    pub writes: Arc<dyn ClusterWrites>,
    pub preemptor: Arc<Preemptor>,
    /// Absent where nobody can ask registries.
    pub platforms: Option<PlatformCache>,
}

/// A plugin as the registry knows it.
pub struct Descriptor {
    pub name: &'static str,
    /// What its scores are multiplied with; 0 for plugins that give none.
    pub weight: i64,
    pub new: fn(&Context) -> Box<dyn Plugin>,
}

macro_rules! registry {
    ($($module:ident),* $(,)?) => {
        $(pub mod $module;)*
        /// Every plugin, in order.
        pub static REGISTRY: &[&Descriptor] = &[$(&$module::DESCRIPTOR),*];
    };
}

registry! {
    scheduling_gates,
    image_platform,
    node_unschedulable,
    node_name,
    taint_toleration,
    node_affinity,
    node_ports,
    node_resources_fit,
    volume_binding,
    pod_topology_spread,
    inter_pod_affinity,
    default_preemption,
    node_resources_balanced_allocation,
    image_locality,
    default_binder,
}

/// The framework with all plugins.
pub fn framework(context: &Context) -> Framework {
    Framework::new(REGISTRY.iter().map(|d| ((d.new)(context), d.weight)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_weights_upstreams() {
        let names: BTreeSet<&str> = REGISTRY.iter().map(|d| d.name).collect();
        assert_eq!(names.len(), REGISTRY.len());
        let weights: Vec<String> =
            REGISTRY.iter().filter(|d| d.weight > 0).map(|d| format!("{}={}", d.name, d.weight)).collect();
        assert_eq!(
            weights,
            [
                "TaintToleration=3",
                "NodeAffinity=2",
                "NodeResourcesFit=1",
                "PodTopologySpread=2",
                "InterPodAffinity=2",
                "NodeResourcesBalancedAllocation=1",
                "ImageLocality=1"
            ]
        );
        let context = crate::testing::context();
        for descriptor in REGISTRY {
            assert_eq!((descriptor.new)(&context).name(), descriptor.name);
        }
    }
}
