//! The informers that the scheduler reads. Upstream counterpart: the informer factory handed to scheduler.New.
use k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{
    Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, ReplicationController, Service,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::storage::v1::StorageClass;
use sampan_client::{Informer, Informers};

#[derive(Clone)]
pub struct Sources {
    pub pods: Informer<Pod>,
    pub nodes: Informer<Node>,
    pub namespaces: Informer<Namespace>,
    pub services: Informer<Service>,
    pub replication_controllers: Informer<ReplicationController>,
    pub replica_sets: Informer<ReplicaSet>,
    pub stateful_sets: Informer<StatefulSet>,
    pub budgets: Informer<PodDisruptionBudget>,
    pub claims: Informer<PersistentVolumeClaim>,
    pub volumes: Informer<PersistentVolume>,
    pub classes: Informer<StorageClass>,
}

impl Sources {
    pub fn shared(informers: &Informers) -> Self {
        Self {
            pods: informers.of(),
            nodes: informers.of(),
            namespaces: informers.of(),
            services: informers.of(),
            replication_controllers: informers.of(),
            replica_sets: informers.of(),
            stateful_sets: informers.of(),
            budgets: informers.of(),
            claims: informers.of(),
            volumes: informers.of(),
            classes: informers.of(),
        }
    }

    /// Informers that follow nothing, for tests to fill.
    pub fn detached() -> Self {
        Self {
            pods: Informer::detached(),
            nodes: Informer::detached(),
            namespaces: Informer::detached(),
            services: Informer::detached(),
            replication_controllers: Informer::detached(),
            replica_sets: Informer::detached(),
            stateful_sets: Informer::detached(),
            budgets: Informer::detached(),
            claims: Informer::detached(),
            volumes: Informer::detached(),
            classes: Informer::detached(),
        }
    }

    /// Waits until all that placing a pod depends on is known.
    pub async fn synced(&self) {
        tokio::join!(
            self.pods.synced(),
            self.nodes.synced(),
            self.namespaces.synced(),
            self.services.synced(),
            self.replication_controllers.synced(),
            self.replica_sets.synced(),
            self.stateful_sets.synced(),
            self.budgets.synced(),
            self.claims.synced(),
            self.volumes.synced(),
            self.classes.synced(),
        );
    }
}
