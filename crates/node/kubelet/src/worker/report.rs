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
use sampan_world::clock;
use tokio::time::Instant;

use super::inbox::StatusError;
use super::{Done, Op, Stage, Worker, version};
use crate::container_status;
use crate::plan::{Probe, is_exited};
use crate::recorder::Kind;
use crate::status;

/// How long a container may take to be replaced before that is told.
const REPLACEMENT: Duration = Duration::from_secs(1);
/// How long the first look at a pod's images may take before it is told that the pod waits.
const FIRST_LOOK: Duration = Duration::from_millis(300);

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
        let is_over = |s: &PodStatus| matches!(s.phase.as_deref(), Some("Succeeded" | "Failed"));
        let api_over = self.pod.status.as_ref().is_some_and(is_over);
        // what ended before this agent started, and what is deleted already, keeps the status it has
        if !(self.is_gone || api_over && self.records.all().next().is_none()) {
            let mut made = self.make_status();
            if self.is_refused {
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

    /// A pod that was never let in says only why, and at once: there is no container to wait for.
    fn refused(&self, made: PodStatus) -> PodStatus {
        let (reason, message) = self.verdict.clone().unzip();
        PodStatus {
            phase: Some("Failed".into()),
            reason,
            message,
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
        if let Some(until) = self.passing_until() {
            self.wake(until);
            return;
        }
        let Some(pod) = self.shown().cloned() else { return };
        let Some(patch) = status::patch(&pod.uid().unwrap_or_default(), &self.written, &self.status) else {
            self.written = self.status.clone();
            return;
        };
        let (node, sent) = (self.node.clone(), self.status.clone());
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

    /// The pod in the API that this status belongs to: for a static pod its mirror.
    fn shown(&self) -> Option<&Arc<Pod>> {
        if self.is_static { self.mirror.as_ref() } else { Some(&self.pod) }
    }

    pub(super) fn take_mirror(&mut self, mirror: Option<Arc<Pod>>) {
        let uid = |pod: &Option<Arc<Pod>>| pod.as_ref().and_then(|p| p.uid());
        let is_another = uid(&mirror) != uid(&self.mirror);
        let seen = mirror.as_ref().map_or(0, |m| version(m));
        // as with any pod: what is newer than our own last write counts
        if is_another || seen > self.written_version && !self.ops.contains(&Op::Status) {
            self.written = mirror.as_ref().and_then(|m| m.status.clone()).unwrap_or_default();
            self.written_version = seen;
        }
        self.mirror = mirror;
    }

    /// While a status is about to pass it is not written: a container that is stopped only to run anew, and a pod that
    /// waits for the first look at its images. Upstream does not see either, as it looks once a second.
    fn passing_until(&self) -> Option<Instant> {
        if self.stage != Stage::Running {
            return None;
        }
        let now = clock::monotonic();
        if self.records.all().next().is_none() {
            let is_looking = self.ops.iter().any(|op| matches!(op, Op::Image(_)));
            return Some(self.began + FIRST_LOOK).filter(|until| is_looking && *until > now);
        }
        let newest = self.restarting.iter().filter_map(|id| self.records.get(id)).filter(|record| {
            is_exited(record)
                && self.records.newest(&record.name).is_some_and(|newest| newest.id == record.id)
                && !self.waiting.contains_key(&record.name)
        });
        let left = newest.filter_map(|record| {
            let age = Duration::try_from(clock::now().duration_since(record.finished_at?)).ok()?;
            REPLACEMENT.checked_sub(age)
        });
        left.max().map(|left| now + left)
    }

    pub(super) fn status_written(&mut self, sent: PodStatus, result: Result<u64, StatusError>) {
        self.ops.remove(&Op::Status);
        match result {
            Ok(own) => {
                let seen = self.shown().map_or(0, |pod| version(pod));
                // somebody else may have written after us, seen while ours was under way
                let theirs = self.shown().filter(|_| seen > own).and_then(|pod| pod.status.clone());
                self.written = theirs.unwrap_or(sent);
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
