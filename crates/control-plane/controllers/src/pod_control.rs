//! Creating and deleting a controller's pods, with the events that tell of it.
//! Upstream counterpart: pkg/controller/controller_utils.go (RealPodControl, slowStartBatch).
use std::future::Future;

use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};

use crate::api_error;
use crate::controller_ref::{Namespaced, controller_reference, name, namespace};
use crate::events::EventRecorder;

/// How many pods are created first; each batch that succeeds doubles the next.
pub const SLOW_START_INITIAL_BATCH: usize = 1;
/// The most pods that one sync creates or deletes.
pub const BURST_REPLICAS: usize = 500;

#[derive(Clone)]
pub struct PodControl {
    pub client: Client,
    pub events: EventRecorder,
}

impl PodControl {
    pub fn new(scope: &crate::Scope) -> Self {
        Self { client: scope.client.clone(), events: scope.events.clone() }
    }

    /// Creates `pod` for `owner`.
    pub async fn create<O: Namespaced>(&self, owner: &O, pod: &Pod) -> Result<Pod, kube::Error> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace(owner));
        match api.create(&PostParams::default(), pod).await {
            Ok(created) => {
                self.events.normal(owner, "SuccessfulCreate", format!("Created pod: {}", name(&created)));
                Ok(created)
            }
            Err(e) => {
                // when the namespace goes away there is nobody to tell
                if !api_error::is_namespace_terminating(&e) {
                    let message = format!("Error creating: {}", api_error::message(&e));
                    self.events.warning(owner, "FailedCreate", message);
                }
                Err(e)
            }
        }
    }

    /// Deletes a pod of `owner`. A pod that is gone already is `NotFound`, without an event.
    pub async fn delete<O: Namespaced>(&self, owner: &O, pod: &str) -> Result<(), kube::Error> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace(owner));
        match api.delete(pod, &DeleteParams::default()).await {
            Ok(_) => {
                self.events.normal(owner, "SuccessfulDelete", format!("Deleted pod: {pod}"));
                Ok(())
            }
            Err(e) => {
                if !api_error::is_not_found(&e) {
                    self.events.warning(
                        owner,
                        "FailedDelete",
                        format!("Error deleting: {}", api_error::message(&e)),
                    );
                }
                Err(e)
            }
        }
    }
}

/// The pod that `template` describes, owned by `owner`, with a generated name.
pub fn pod_from_template<O: Namespaced>(owner: &O, template: &PodTemplateSpec) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            namespace: Some(namespace(owner).to_string()),
            generate_name: Some(format!("{}-", name(owner))),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![controller_reference(owner)]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// Calls `create(i)` for `i` in `0..count` in batches of 1, 2, 4…, each batch at once, and stops after the batch in
/// which one fails. Returns how many succeeded and the first failure.
pub async fn slow_start_batch<F, Fut, E>(count: usize, initial: usize, create: F) -> (usize, Option<E>)
where
    F: Fn(usize) -> Fut,
    Fut: Future<Output = Result<(), E>>,
{
    let (mut done, mut succeeded, mut batch) = (0, 0, initial.min(count));
    while batch > 0 {
        let results = futures::future::join_all((done..done + batch).map(&create)).await;
        done += batch;
        let mut failed = None;
        for result in results {
            match result {
                Ok(()) => succeeded += 1,
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        if failed.is_some() {
            return (succeeded, failed);
        }
        batch = (batch * 2).min(count - done);
    }
    (succeeded, None)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn batches_double_and_stop_at_a_failure() {
        let calls = AtomicUsize::new(0);
        let fail_third = |i| {
            calls.fetch_add(1, Ordering::SeqCst);
            async move { if i == 2 { Err("no") } else { Ok(()) } }
        };
        let (succeeded, failed) = super::slow_start_batch(10, 1, fail_third).await;
        assert_eq!((succeeded, failed), (2, Some("no")));
        assert_eq!(calls.load(Ordering::SeqCst), 3, "0, then 1 and 2");
        let (succeeded, failed) = super::slow_start_batch(10, 1, |_| async { Ok::<(), ()>(()) }).await;
        assert_eq!((succeeded, failed), (10, None));
    }
}
