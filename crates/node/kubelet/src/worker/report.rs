//! A pod's status: made after each step, written where it changed, one write at a time, the newest wins.
//!
//! Upstream counterpart: pkg/kubelet/status/status_manager.go.
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{
    Container as Spec, ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodStatus,
};
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use sampan_drivers::runtime::Container;

use super::inbox::StatusError;
use super::{Done, Op, Stage, Worker, version};
use crate::container_status;
use crate::plan::Probe;
use crate::recorder::Kind;
use crate::status;

impl Worker {
    /// The last status of the container of that name.
    pub(super) fn status_of(&self, name: &str) -> Option<&ContainerStatus> {
        let lists = [
            &self.status.container_statuses,
            &self.status.init_container_statuses,
            &self.status.ephemeral_container_statuses,
        ];
        lists.into_iter().flatten().flatten().find(|s| s.name == name)
    }

    /// (started, ready) of a running container.
    fn readiness(&self, spec: &Spec, record: &Container) -> (bool, bool) {
        let started = match spec.startup_probe {
            Some(_) => self.is_started(record),
            None => true,
        };
        let ready = match spec.readiness_probe {
            Some(_) => self
                .probes
                .get(&(record.id.clone(), Probe::Readiness))
                .is_some_and(|p| p.result == Some(true)),
            None => true,
        };
        (started, started && ready)
    }

    fn make_status(&self) -> PodStatus {
        let spec = self.pod.spec.clone().unwrap_or_default();
        let is_ended = self.stage >= Stage::Ended
            || self.stage == Stage::Ending && self.records.running().next().is_none() && !self.is_starting();
        let probed = |spec: &Spec, record: &Container| self.readiness(spec, record);
        let of = |old: &Option<Vec<ContainerStatus>>, kind: Kind, specs: &[Spec]| -> Vec<ContainerStatus> {
            let inputs = container_status::Inputs {
                records: &self.records,
                waiting: &self.waiting,
                old: old.as_deref().unwrap_or_default(),
                has_init: spec.init_containers.as_ref().is_some_and(|l| !l.is_empty()),
                messages: &self.messages,
                images: &self.images_by_id,
                probed: &probed,
                is_terminal: is_ended,
            };
            specs.iter().map(|c| inputs.of(kind, c)).collect()
        };
        let ephemeral: Vec<Spec> =
            spec.ephemeral_containers.iter().flatten().map(crate::container_config::from_ephemeral).collect();
        let started_main = spec
            .containers
            .iter()
            .any(|c| self.records.newest(&c.name).is_some_and(|r| r.started_at.is_some()));
        let shown = |ips: &[std::net::IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>();
        let host_ips = shown(&self.node.config.host_ips());
        let is_host = spec.host_network == Some(true);
        let pod_ips = match &self.ips {
            _ if is_host => host_ips.clone(),
            Some(ips) => shown(ips),
            None => self.status.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect(),
        };
        let mut made = status::generate(status::Inputs {
            pod: &self.pod,
            old: &self.status,
            init: of(
                &self.status.init_container_statuses,
                Kind::Init,
                spec.init_containers.as_deref().unwrap_or_default(),
            ),
            main: of(&self.status.container_statuses, Kind::Main, &spec.containers),
            ephemeral: of(&self.status.ephemeral_container_statuses, Kind::Ephemeral, &ephemeral),
            has_sandbox: self.has_sandbox() && self.stage < Stage::Ended,
            is_terminal: is_ended,
            has_started_main: started_main,
            may_run: self.records.running().next().is_some() || self.is_starting(),
            pod_ips,
            host_ips,
            verdict: self.verdict.clone(),
            disruption: self.disruption.clone(),
            start_time: self.start_time.clone(),
        });
        if is_ended && self.is_deleting() {
            finish(&mut made);
        }
        made
    }

    fn is_starting(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::Start(_) | Op::Sandbox))
    }

    pub(super) fn report(&mut self) {
        let was_refused =
            self.verdict.is_some() && self.sandbox.is_none() && self.records.all().next().is_none();
        let is_over = |s: &PodStatus| matches!(s.phase.as_deref(), Some("Succeeded" | "Failed"));
        let api_over = self.pod.status.as_ref().is_some_and(is_over);
        // what ended before this agent started, and what is deleted already, keeps the status it has
        if !(self.is_gone || api_over && self.records.all().next().is_none()) {
            let mut made = self.make_status();
            if was_refused {
                made = self.refused(made);
            }
            self.status = made;
        }
        let mut pod = (*self.pod).clone();
        pod.status = Some(self.status.clone());
        {
            let mut snapshot = self.snapshot.write();
            snapshot.pod = Arc::new(pod);
            snapshot.sandbox_id = self.sandbox.as_ref().map(|s| s.id.clone());
            snapshot.records = self.records.clone();
        }
        self.write_status();
    }

    /// A pod that was never let in says only why.
    fn refused(&self, made: PodStatus) -> PodStatus {
        PodStatus {
            phase: made.phase,
            reason: made.reason,
            message: made.message,
            conditions: self.pod.status.as_ref().and_then(|s| s.conditions.clone()),
            qos_class: made.qos_class,
            start_time: made.start_time,
            observed_generation: made.observed_generation,
            ..PodStatus::default()
        }
    }

    fn write_status(&mut self) {
        if self.is_gone || self.written == self.status || self.ops.contains(&Op::Status) {
            return;
        }
        if !self.retry_status.is_due() {
            self.retry_status.at.into_iter().for_each(|at| self.wake(at));
            return;
        }
        let Some(patch) = status::patch(&self.uid, &self.written, &self.status) else {
            self.written = self.status.clone();
            return;
        };
        let (node, pod, sent) = (self.node.clone(), self.pod.clone(), self.status.clone());
        self.spawn(Op::Status, async move {
            let _permit = node.writes.acquire().await;
            let api: Api<Pod> = Api::namespaced(node.client.clone(), &pod.namespace().unwrap_or_default());
            let answer =
                api.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Strategic(patch)).await;
            let result = match answer {
                Ok(pod) => Ok(version(&pod)),
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Err(StatusError::Gone),
                Err(error) => Err(StatusError::Failed(error.to_string())),
            };
            Done::Status { sent, result }
        });
    }

    pub(super) fn status_written(&mut self, sent: PodStatus, result: Result<u64, StatusError>) {
        self.ops.remove(&Op::Status);
        match result {
            Ok(own) => {
                let seen = version(&self.pod);
                // somebody else may have written after us, seen while ours was under way
                self.written = if seen > own { self.pod.status.clone().unwrap_or_default() } else { sent };
                self.written_version = self.written_version.max(own).max(seen);
                self.retry_status = super::Retry::default();
            }
            Err(StatusError::Gone) => {
                // the informer will say so; writing it again would not help
                self.written = sent;
            }
            Err(StatusError::Failed(error)) => {
                tracing::debug!(pod = self.pod.name_any(), error, "status not written, will retry");
                self.retry_status.fail(Duration::from_millis(200), Duration::from_secs(30));
            }
        }
    }
}

/// The last status before the object goes: every container has ended and so has the pod.
fn finish(status: &mut PodStatus) {
    let all = [&mut status.init_container_statuses, &mut status.container_statuses];
    for container in all.into_iter().flatten().flatten() {
        container.ready = false;
        container.started = Some(false);
        let has_ended = container.state.as_ref().is_some_and(|s| s.terminated.is_some());
        if !has_ended {
            let last = container.last_state.as_ref().and_then(|s| s.terminated.clone());
            let terminated = last.unwrap_or_else(|| ContainerStateTerminated {
                reason: Some("ContainerStatusUnknown".into()),
                message: Some("The container could not be located when the pod was terminated".into()),
                exit_code: 137,
                ..ContainerStateTerminated::default()
            });
            container.state =
                Some(ContainerState { terminated: Some(terminated), ..ContainerState::default() });
        }
    }
    if !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        status.phase = Some("Failed".into());
    }
}
