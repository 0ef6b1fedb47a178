//! Keeps static pods and their mirrors: the folder's pods run, and the API shows each of them.
//!
//! Upstream counterparts: kubelet.go (tryReconcileMirrorPods, HandlePodCleanups), pkg/kubelet/pod/mirror_client.go. What
//! stays true: pods of the folder start without the server; a mirror that is deleted, is being deleted or shows another
//! content is made anew; a mirror goes once its pod has ended here; a changed file's new pod starts after the old ended.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Inner;
use crate::recorder::WARNING;
use crate::static_pods::{self, HASH, Key, MIRROR};

const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What the folder says.
#[derive(Default)]
pub(super) struct Statics {
    pub pods: Mutex<BTreeMap<Key, Arc<Pod>>>,
    /// The messages that were told already.
    told: Mutex<Vec<String>>,
    pub changed: Notify,
}

impl Inner {
    /// Reads the folder, and starts and ends pods accordingly.
    pub(super) fn read_static_pods(self: &Arc<Self>) {
        let config = &self.services.config;
        let Some(folder) = &config.manifests_dir else { return };
        let found = static_pods::read_folder(folder, &config.node_name);
        let errors: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
        let mut told = self.statics.told.lock();
        for error in errors.iter().filter(|e| !told.contains(e)) {
            tracing::error!(error, "a static pod's file cannot be used");
            self.services.recorder.node(WARNING, "InvalidStaticPod", error.clone());
        }
        *told = errors;
        drop(told);
        *self.statics.pods.lock() = found.pods;
        self.run_static_pods();
        self.statics.changed.notify_one();
    }

    /// Ends those that the folder no longer has, then starts those whose place is free.
    fn run_static_pods(self: &Arc<Self>) {
        let wanted = self.statics.pods.lock().clone();
        let mut busy = Vec::new();
        for (uid, entry) in self.workers.lock().iter().filter(|(_, e)| e.is_static) {
            let key = (entry.namespace.clone(), entry.name.clone());
            if wanted.get(&key).and_then(|p| p.uid()).as_ref() == Some(uid) {
                continue;
            }
            entry.inbox.gone();
            busy.push(key);
        }
        for (_, pod) in wanted.into_iter().filter(|(key, _)| !busy.contains(key)) {
            self.update(&pod);
        }
    }

    /// Returns whether everything is as it should be.
    async fn reconcile_mirrors(self: &Arc<Self>) -> bool {
        self.run_static_pods();
        let wanted = self.statics.pods.lock().clone();
        let ending: Vec<Key> = {
            let workers = self.workers.lock();
            let entries = workers.values().filter(|e| e.is_static);
            entries.map(|e| (e.namespace.clone(), e.name.clone())).collect()
        };
        let client = &self.services.client;
        let mut is_settled = true;
        for mirror in self.pods.list().into_iter().filter(|p| static_pods::is_mirror(p)) {
            let key = (mirror.namespace().unwrap_or_default(), mirror.name_any());
            let is_right = match wanted.get(&key) {
                Some(pod) => is_mirror_of(&mirror, pod),
                // shown until it has ended here
                None => ending.contains(&key),
            };
            if !is_right && let Err(error) = delete(client, &mirror).await {
                tracing::warn!(pod = key.1, %error, "deleting a mirror pod, will retry");
                is_settled = false;
            }
        }
        for (key, pod) in &wanted {
            let mirror = self.pods.get(&key.0, &key.1).filter(|m| is_mirror_of(m, pod));
            let uid = pod.uid().unwrap_or_default();
            if let Some(mirror) = mirror {
                self.with(&uid, |inbox| inbox.mirror(Some(mirror)));
                continue;
            }
            self.with(&uid, |inbox| inbox.mirror(None));
            let Some(owner) = self.services.this_node().and_then(|n| n.uid()) else {
                is_settled = false;
                continue;
            };
            if let Err(error) = create(client, pod, &self.services.config.node_name, owner).await {
                tracing::debug!(pod = key.1, %error, "making a mirror pod, will retry");
                is_settled = false;
            }
        }
        is_settled
    }

    /// Follows the folder and the API for ever.
    pub(super) async fn keep_static_pods(self: &Arc<Self>) {
        let Some(folder) = self.services.config.manifests_dir.clone() else { return };
        let inner = Arc::downgrade(self);
        tokio::spawn(static_pods::follow(folder, move || {
            inner.upgrade().iter().for_each(Inner::read_static_pods);
        }));
        let mut wait = RETRY_FIRST;
        loop {
            if self.reconcile_mirrors().await {
                wait = RETRY_FIRST;
                self.statics.changed.notified().await;
            } else {
                let was_told = tokio::time::timeout(wait, self.statics.changed.notified()).await.is_ok();
                wait = if was_told { RETRY_FIRST } else { (wait * 2).min(RETRY_MAX) };
            }
        }
    }
}

fn is_mirror_of(mirror: &Pod, pod: &Pod) -> bool {
    mirror.metadata.deletion_timestamp.is_none()
        && static_pods::is_mirror(mirror)
        && mirror.annotations().get(MIRROR) == pod.annotations().get(HASH)
}

async fn create(client: &Client, pod: &Pod, node: &str, node_uid: String) -> Result<(), kube::Error> {
    let mut mirror = pod.clone();
    let hash = pod.annotations().get(HASH).cloned().unwrap_or_default();
    mirror.annotations_mut().insert(MIRROR.to_string(), hash.clone());
    mirror.metadata.uid = None;
    mirror.metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: node.to_string(),
        uid: node_uid,
        controller: Some(true),
        block_owner_deletion: None,
    }]);
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    match api.create(&PostParams::default(), &mirror).await {
        // ours, of which we have not heard yet
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let there = api.get(&pod.name_any()).await?;
            let is_ours = there.annotations().get(MIRROR) == Some(&hash);
            if is_ours { Ok(()) } else { Err(kube::Error::Api(status)) }
        }
        answer => answer.map(drop),
    }
}

async fn delete(client: &Client, mirror: &Pod) -> Result<(), kube::Error> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &mirror.namespace().unwrap_or_default());
    let parameters = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid: mirror.uid(), resource_version: None }),
        ..DeleteParams::default()
    };
    match api.delete(&mirror.name_any(), &parameters).await {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        answer => answer.map(drop),
    }
}
