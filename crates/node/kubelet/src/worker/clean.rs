//! The stages in which a pod is stopped, cleaned up after, and deleted.
//!
//! Upstream counterparts: kubelet.go (SyncTerminatingPod, SyncTerminatedPod), kuberuntime_termination_order.go,
//! status_manager.go (the delete with grace 0). The API's object goes last: after its final status.
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container as Spec, Pod};
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt};
use sampan_drivers::runtime::Container;

use super::operations::Stop;
use super::{Done, Op, Stage, Worker};
use crate::plan::is_sidecar;
use crate::recorder::{Kind, WARNING};

impl Worker {
    fn grace_seconds(&self) -> i64 {
        let own = self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
        let own = own.unwrap_or(30);
        if let Some(grace) = self.evict_grace {
            return grace;
        }
        if self.pod.metadata.deletion_timestamp.is_some() {
            return self.pod.metadata.deletion_grace_period_seconds.unwrap_or(own);
        }
        own
    }

    pub(super) fn kill(
        &mut self,
        kind: Kind,
        spec: &Spec,
        id: &str,
        grace_seconds: i64,
        message: Option<String>,
    ) {
        let stop = Stop {
            node: self.node.clone(),
            pod: self.pod.clone(),
            kind,
            spec: spec.clone(),
            id: id.to_string(),
            ip: self.probe_ip(),
            grace_seconds,
            message,
        };
        self.spawn(Op::Kill(id.to_string()), stop.run());
    }

    pub(super) fn step_ending(&mut self) {
        let grace = self.grace_seconds();
        let running: Vec<Container> = self.records.running().cloned().collect();
        // a shorter grace period counts from now on, for what is being stopped as well
        if self.grace_given.is_some_and(|given| grace < given) {
            for container in &running {
                if self.ops.contains(&Op::Kill(container.id.clone())) {
                    let (node, id) = (self.node.clone(), container.id.clone());
                    tokio::spawn(async move { node.runtime.stop_container(&id, grace).await.map_err(drop) });
                }
            }
        }
        self.grace_given = Some(self.grace_given.map_or(grace, |given| given.min(grace)));
        for probing in self.probes.iter_mut().filter(|((_, p), _)| *p != crate::plan::Probe::Readiness) {
            probing.1.task.take().into_iter().for_each(|t| t.abort());
        }
        let (mut sidecars, mut others) = (Vec::new(), Vec::new());
        for container in running {
            match self.spec_of(&container.name) {
                Some((Kind::Init, spec)) if is_sidecar(&spec) => sidecars.push((container, spec)),
                Some((kind, spec)) => others.push((container, kind, spec)),
                None => others.push((
                    container.clone(),
                    Kind::Main,
                    Spec { name: container.name, ..Spec::default() },
                )),
            }
        }
        let (none_running, no_others) = (sidecars.is_empty() && others.is_empty(), others.is_empty());
        for (container, kind, spec) in others {
            self.kill(kind, &spec, &container.id, grace, None);
        }
        if no_others {
            self.stop_last_sidecar(sidecars, grace);
        }
        let is_busy = |op: &Op| matches!(op, Op::Start(_) | Op::Sandbox | Op::Volumes | Op::Kill(_));
        if none_running && !self.ops.iter().any(is_busy) {
            self.clean();
        }
    }

    /// Sidecars go in the reverse order of their start, within what is left of the grace period.
    fn stop_last_sidecar(&mut self, sidecars: Vec<(Container, Spec)>, grace: i64) {
        let order: Vec<String> = self
            .pod
            .spec
            .iter()
            .flat_map(|s| s.init_containers.iter().flatten())
            .map(|c| c.name.clone())
            .collect();
        let place = |name: &str| order.iter().position(|n| n == name);
        let Some((container, spec)) = sidecars.into_iter().max_by_key(|(c, _)| place(&c.name)) else {
            return;
        };
        let spent = self.ending_since.map_or(0, |since| since.elapsed().as_secs());
        let left = (grace - i64::try_from(spent).unwrap_or(0)).max(grace.min(2));
        self.kill(Kind::Init, &spec, &container.id, left, None);
    }

    fn clean(&mut self) {
        if !self.retry_clean.is_due() {
            self.retry_clean.at.into_iter().for_each(|at| self.wake(at));
            return;
        }
        let (node, uid, sandbox) = (self.node.clone(), self.uid.clone(), self.sandbox.clone());
        self.spawn(Op::Clean, async move {
            let result = async {
                if let Some(sandbox) = sandbox {
                    node.runtime.stop_sandbox(&sandbox.id).await.map_err(|e| e.to_string())?;
                }
                node.network.detach(&uid).await.map_err(|e| e.to_string())?;
                node.volumes.tear_down(&uid).await.map_err(|e| e.to_string())
            };
            Done::Cleaned(result.await)
        });
    }

    pub(super) fn cleaned(&mut self, result: Result<(), String>) {
        self.ops.remove(&Op::Clean);
        match result {
            Ok(()) => {
                self.stage = Stage::Ended;
                self.volumes = None;
                self.leave();
                if let Some(watches) = &self.node.watches {
                    watches.unregister(&self.uid);
                }
            }
            Err(error) => {
                let text = format!("error killing pod: {error}");
                self.node.recorder.pod(&self.pod, WARNING, "FailedKillPod", text);
                self.retry_clean.fail(Duration::from_secs(1), Duration::from_secs(60));
            }
        }
    }

    /// Nothing is left to do but to wait for the deletion, and then to make it so.
    pub(super) fn step_ended(&mut self) {
        if !self.is_deleting() || self.ops.contains(&Op::Status) || self.ops.contains(&Op::Delete) {
            return;
        }
        if !self.is_gone && self.written != self.status {
            return;
        }
        if !self.retry_clean.is_due() {
            self.retry_clean.at.into_iter().for_each(|at| self.wake(at));
            return;
        }
        let (node, pod, is_gone) = (self.node.clone(), self.pod.clone(), self.is_gone);
        let sandboxes: Vec<String> = self.sandbox.iter().map(|s| s.id.clone()).collect();
        let containers: Vec<String> = self.records.all().map(|c| c.id.clone()).collect();
        self.spawn(Op::Delete, async move {
            if !is_gone && let Err(error) = delete(&node.client, &pod).await {
                return Done::Deleted(Err(error));
            }
            for id in containers {
                if let Err(error) = node.runtime.remove_container(&id).await {
                    tracing::debug!(%error, "removing a container");
                }
            }
            for id in sandboxes {
                if let Err(error) = node.runtime.remove_sandbox(&id).await {
                    return Done::Deleted(Err(error.to_string()));
                }
            }
            let (namespace, uid) = (pod.namespace().unwrap_or_default(), pod.uid().unwrap_or_default());
            let logs = node.config.pod_log_dir(&namespace, &pod.name_any(), &uid);
            if let Err(error) = std::fs::remove_dir_all(&logs)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(%error, "removing a pod's logs");
            }
            Done::Deleted(Ok(()))
        });
    }

    pub(super) fn deleted(&mut self, result: Result<(), String>) {
        self.ops.remove(&Op::Delete);
        match result {
            Ok(()) => self.stage = Stage::Gone,
            Err(error) => {
                tracing::warn!(pod = self.pod.name_any(), error, "deleting the pod, will retry");
                self.retry_clean.fail(Duration::from_millis(500), Duration::from_secs(30));
                self.retry_clean.at.into_iter().for_each(|at| self.wake(at));
            }
        }
    }
}

async fn delete(client: &kube::Client, pod: &Pod) -> Result<(), String> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let parameters = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid: pod.uid(), resource_version: None }),
        ..DeleteParams::default()
    };
    match api.delete(&pod.name_any(), &parameters).await {
        Ok(_) => Ok(()),
        // gone, or another of that name
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}
