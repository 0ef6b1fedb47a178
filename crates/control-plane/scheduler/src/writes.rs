//! What the scheduler writes to the cluster. Upstream counterparts: util.PatchPodStatus, util.DeletePod in
//! pkg/scheduler/util and the default binder's call.
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Binding, Event, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Status};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client};
use serde_json::Value;

use crate::framework::PodInfo;

#[derive(Clone, Debug, thiserror::Error)]
pub enum WriteError {
    #[error("{key} not found")]
    NotFound { key: String },
    #[error("{message}")]
    Refused { key: String, message: String },
}

/// The scheduler's writes, so that tests can stand in for the API.
#[async_trait]
pub trait ClusterWrites: Send + Sync {
    async fn bind(&self, pod: &PodInfo, node: &str) -> Result<(), WriteError>;
    /// Merges `status` (strategically) into the pod's status, if it still is that pod.
    async fn patch_status(&self, pod: &PodInfo, status: Value) -> Result<(), WriteError>;
    async fn delete_pod(&self, pod: &PodInfo) -> Result<(), WriteError>;
    async fn create_event(&self, event: &Event) -> Result<(), WriteError>;
    async fn patch_event(&self, namespace: &str, name: &str, patch: Value) -> Result<(), WriteError>;
}

/// Writes through a `kube::Client`.
pub struct ApiWrites {
    client: Client,
}

impl ApiWrites {
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    fn pods(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }
}

fn failed(key: String, error: kube::Error) -> WriteError {
    match error {
        kube::Error::Api(status) if status.code == 404 => WriteError::NotFound { key },
        kube::Error::Api(status) => WriteError::Refused { key, message: status.message },
        error => WriteError::Refused { key, message: error.to_string() },
    }
}

fn key(pod: &PodInfo) -> String {
    format!("pods \"{}/{}\"", pod.namespace, pod.name)
}

#[async_trait]
impl ClusterWrites for ApiWrites {
    async fn bind(&self, pod: &PodInfo, node: &str) -> Result<(), WriteError> {
        let binding = Binding {
            metadata: ObjectMeta {
                name: Some(pod.name.clone()),
                namespace: Some(pod.namespace.clone()),
                uid: Some(pod.uid.to_string()),
                ..ObjectMeta::default()
            },
            target: ObjectReference {
                kind: Some("Node".to_string()),
                name: Some(node.to_string()),
                ..ObjectReference::default()
            },
        };
        let pods = self.pods(&pod.namespace);
        let done = pods
            .create_subresource::<_, Status>("binding", &pod.name, &PostParams::default(), &binding)
            .await;
        done.map(|_| ()).map_err(|e| failed(key(pod), e))
    }

    async fn patch_status(&self, pod: &PodInfo, status: Value) -> Result<(), WriteError> {
        let patch = serde_json::json!({"metadata": {"uid": &*pod.uid}, "status": status});
        let pods = self.pods(&pod.namespace);
        let done = pods.patch_status(&pod.name, &PatchParams::default(), &Patch::Strategic(patch)).await;
        done.map(|_| ()).map_err(|e| failed(key(pod), e))
    }

    async fn delete_pod(&self, pod: &PodInfo) -> Result<(), WriteError> {
        let uid = Some(pod.uid.to_string());
        let preconditions = Some(Preconditions { uid, resource_version: None });
        let params = DeleteParams { preconditions, ..DeleteParams::default() };
        self.pods(&pod.namespace)
            .delete(&pod.name, &params)
            .await
            .map(|_| ())
            .map_err(|e| failed(key(pod), e))
    }

    async fn create_event(&self, event: &Event) -> Result<(), WriteError> {
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        let done = api.create(&PostParams::default(), event).await;
        done.map(|_| ()).map_err(|e| failed(format!("event in {namespace}"), e))
    }

    async fn patch_event(&self, namespace: &str, name: &str, patch: Value) -> Result<(), WriteError> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let done = api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        done.map(|_| ()).map_err(|e| failed(format!("event {namespace}/{name}"), e))
    }
}
