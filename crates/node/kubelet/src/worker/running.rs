//! The stage in which a pod's containers are brought up and kept up.
//!
//! Upstream counterpart: kuberuntime_manager.go (SyncPod). Volumes, sandbox and images are made at the same time.
use std::time::Duration;

use k8s_openapi::api::core::v1::Container as Spec;
use kube::ResourceExt;
use sampan_drivers::runtime::{Container, ImageError, RuntimeError, SandboxState};
use sampan_world::clock;

use super::operations::{self, Start};
use super::{Done, Op, Probing, Worker};
use crate::plan::{Facts, Kill, Probe, is_exited, is_running};
use crate::pull::{self, Waiting, go_duration};
use crate::recorder::{Kind, NORMAL, WARNING, container_reference};
use crate::{container_config, probes};

const RETRY: Duration = Duration::from_secs(10);

impl Worker {
    pub(super) fn step_running(&mut self) {
        self.step_volumes();
        let started = |c: &Container| self.is_started(c);
        let facts = Facts {
            pod: &self.pod,
            records: &self.records,
            started: &started,
            condemned: &self.condemned,
            restarting: &self.restarting,
        };
        let plan = facts.plan();
        let starting = self.ops.iter().any(|op| matches!(op, Op::Start(_)));
        if plan.is_finished && !starting {
            self.end();
            return;
        }
        self.step_sandbox();
        for kill in plan.kill {
            self.kill_to_restart(kill);
        }
        let mut held = false;
        for (kind, spec) in plan.start {
            self.step_start(kind, &spec, held);
            // a postStart hook holds back those after it
            held |= kind == Kind::Main && has_post_start(&spec);
        }
        self.step_probes();
        for id in self.records.outlived() {
            self.records.remove(&id);
            let node = self.node.clone();
            tokio::spawn(async move {
                if let Err(error) = node.runtime.remove_container(&id).await {
                    tracing::debug!(%error, "removing an old container");
                }
            });
        }
    }

    pub(super) fn is_started(&self, record: &Container) -> bool {
        if !is_running(record) || self.ops.contains(&Op::Start(record.name.clone())) {
            return false;
        }
        match self.spec_of(&record.name) {
            Some((_, spec)) if spec.startup_probe.is_some() => {
                self.probes.get(&(record.id.clone(), Probe::Startup)).is_some_and(|p| p.result == Some(true))
            }
            _ => true,
        }
    }

    /// The container of that name in the pod's spec.
    pub(super) fn spec_of(&self, name: &str) -> Option<(Kind, Spec)> {
        let spec = self.pod.spec.as_ref()?;
        if let Some(c) = spec.containers.iter().find(|c| c.name == name) {
            return Some((Kind::Main, c.clone()));
        }
        if let Some(c) = spec.init_containers.iter().flatten().find(|c| c.name == name) {
            return Some((Kind::Init, c.clone()));
        }
        let ephemeral = spec.ephemeral_containers.iter().flatten().find(|c| c.name == name)?;
        Some((Kind::Ephemeral, container_config::from_ephemeral(ephemeral)))
    }

    fn step_volumes(&mut self) {
        if let Some(at) = self.refresh_at {
            if at <= clock::monotonic() {
                self.refresh_volumes = true;
                self.refresh_at = None;
            } else {
                self.wake(at);
            }
        }
        let wanted = self.volumes.is_none() || self.refresh_volumes;
        if !wanted || self.ops.contains(&Op::Volumes) {
            return;
        }
        if !self.retry_volumes.is_due() {
            self.retry_volumes.at.into_iter().for_each(|at| self.wake(at));
            return;
        }
        self.refresh_volumes = false;
        let (node, pod) = (self.node.clone(), self.pod.clone());
        self.spawn(Op::Volumes, async move {
            let result = node.volumes.set_up(&pod).await;
            Done::Volumes(result.map_err(|errors| {
                let message = |(name, error): (String, _)| {
                    format!("MountVolume.SetUp failed for volume {name:?} : {error}")
                };
                errors.into_iter().map(message).collect()
            }))
        });
    }

    fn step_sandbox(&mut self) {
        let is_ready = self.sandbox.as_ref().is_some_and(|s| s.state == SandboxState::Ready);
        if is_ready && self.ips.is_some() || self.ops.contains(&Op::Sandbox) {
            return;
        }
        if !self.retry_sandbox.is_due() {
            self.retry_sandbox.at.into_iter().for_each(|at| self.wake(at));
            return;
        }
        let old = self.sandbox.clone().filter(|s| s.state != SandboxState::Ready);
        if old.is_some() {
            let text = "Pod sandbox changed, it will be killed and re-created.";
            self.node.recorder.pod(&self.pod, NORMAL, "SandboxChanged", text);
            self.ips = None;
        }
        let adopted = self.sandbox.clone().filter(|s| s.state == SandboxState::Ready);
        let (node, pod, attempt) = (self.node.clone(), self.pod.clone(), self.attempts);
        if adopted.is_none() {
            self.attempts += 1;
        }
        self.spawn(Op::Sandbox, async move {
            Done::Sandbox(operations::sandbox(&node, &pod, attempt, adopted, old).await)
        });
    }

    fn step_start(&mut self, kind: Kind, spec: &Spec, held: bool) {
        let name = &spec.name;
        if self.ops.contains(&Op::Start(name.clone())) || self.ops.contains(&Op::Image(name.clone())) {
            return;
        }
        if self.is_backing_off(kind, spec) {
            return;
        }
        if let Some(at) = self.retry_containers.get(name).copied()
            && at > clock::monotonic()
        {
            self.wake(at);
            return;
        }
        let Some(image) = self.images.get(name).cloned() else { return self.step_image(kind, spec) };
        let (true, Some(volumes), Some(sandbox), false) =
            (self.has_sandbox(), self.volumes.clone(), self.sandbox.clone(), held)
        else {
            return;
        };
        let record = self.records.newest(name).cloned();
        if let Some(record) = record.as_ref().filter(|r| is_exited(r)) {
            let finished = record.finished_at.unwrap_or(record.created_at);
            let config = &self.node.config;
            let back_off = self.crashes.entry(name.clone()).or_default();
            back_off.advance(finished, config.back_off_initial, config.back_off_max);
        }
        let old = self.status_of(name).map_or(0, |s| s.restart_count);
        let attempt = record.as_ref().map_or(u32::try_from(old).unwrap_or(0), |r| r.attempt + 1);
        self.images.remove(name);
        let start = Start {
            node: self.node.clone(),
            inbox: self.inbox.clone(),
            pod: self.pod.clone(),
            kind,
            spec: spec.clone(),
            attempt,
            image: image.clone(),
            sandbox_id: sandbox.id,
            ips: self.ips.clone().unwrap_or_default(),
            volumes,
            cancel: self.cancel.clone(),
        };
        self.images_by_id.insert(image.id.clone(), image);
        self.spawn(Op::Start(name.clone()), start.run());
    }

    fn is_backing_off(&mut self, kind: Kind, spec: &Spec) -> bool {
        let Some(record) = self.records.newest(&spec.name).filter(|r| is_exited(r)) else { return false };
        let finished = record.finished_at.unwrap_or(record.created_at);
        let Some(back_off) = self.crashes.get(&spec.name) else { return false };
        let max = self.node.config.back_off_max;
        let Some((left, all)) = back_off.waiting(finished, clock::now(), max) else { return false };
        let (name, namespace) = (self.pod.name_any(), self.pod.namespace().unwrap_or_default());
        let shown = format!("{name}_{namespace}({})", self.uid);
        let message =
            format!("back-off {} restarting failed container={} pod={shown}", go_duration(all), spec.name);
        let waiting = Waiting::new("CrashLoopBackOff", message);
        if self.waiting.get(&spec.name) != Some(&waiting) {
            let text = format!("Back-off restarting failed container {} in pod {shown}", spec.name);
            let object = container_reference(&self.pod, kind, &spec.name);
            self.node.recorder.record(object, WARNING, "BackOff", text);
            self.waiting.insert(spec.name.clone(), waiting);
        }
        self.wake(clock::monotonic() + left);
        true
    }

    fn step_image(&mut self, kind: Kind, spec: &Spec) {
        let image = spec.image.clone().unwrap_or_default();
        if let Some((back_off, failed_at, error)) = self.pulls.get(&image)
            && let Some((left, _)) = back_off.waiting(*failed_at, clock::now(), self.node.config.back_off_max)
        {
            let text = format!("Back-off pulling image {image:?}");
            let waiting = Waiting::new("ImagePullBackOff", format!("{text}: ErrImagePull: {error}"));
            if self.waiting.get(&spec.name) != Some(&waiting) {
                let object = container_reference(&self.pod, kind, &spec.name);
                self.node.recorder.record(object.clone(), NORMAL, "BackOff", text);
                self.node.recorder.record(object, WARNING, "Failed", "Error: ImagePullBackOff");
                self.waiting.insert(spec.name.clone(), waiting);
            }
            self.wake(clock::monotonic() + left);
            return;
        }
        let (node, pod, spec) = (self.node.clone(), self.pod.clone(), spec.clone());
        let (name, cancel) = (spec.name.clone(), self.cancel.clone());
        self.spawn(Op::Image(name.clone()), async move {
            let result = tokio::select! {
                result = pull::ensure(&node, &pod, kind, &spec) => result,
                () = cancel.cancelled() => Err(Waiting::new("ErrImagePull", "the pod is ending")),
            };
            Done::Image(name, result)
        });
    }

    fn kill_to_restart(&mut self, kill: Kill) {
        let Some((_, spec)) = self.spec_of(&kill.name) else { return };
        let own = kill.probe.and_then(|p| p.spec(&spec)).and_then(|p| p.termination_grace_period_seconds);
        let of_pod = self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
        let grace = own.or(of_pod).unwrap_or(30);
        self.restarting.insert(kill.id.clone());
        self.stop_probes(&kill.id);
        self.kill(kill.kind, &spec, &kill.id, grace, Some(kill.message));
    }

    /// Probes what runs.
    fn step_probes(&mut self) {
        let running: Vec<Container> = self.records.running().cloned().collect();
        for record in running {
            let Some((kind, spec)) = self.spec_of(&record.name) else { continue };
            let is_started = self.is_started(&record);
            for probe in [Probe::Startup, Probe::Liveness, Probe::Readiness] {
                let key = (record.id.clone(), probe);
                // one that is stopped to be restarted is not asked any more
                let is_wanted = probe.spec(&spec).is_some()
                    && !self.restarting.contains(&record.id)
                    && (probe == Probe::Startup || is_started);
                if !is_wanted || self.probes.get(&key).is_some_and(|p| !p.awaits_sandbox) {
                    continue;
                }
                let before = self.status_of(&record.name);
                let same =
                    before.filter(|s| s.container_id == Some(crate::container_status::public_id(&record.id)));
                let result = match probe {
                    Probe::Startup => same.and_then(|s| s.started).filter(|s| *s),
                    Probe::Readiness => same.map(|s| s.ready).filter(|r| *r),
                    Probe::Liveness => None,
                };
                let is_over = probe == Probe::Startup && result == Some(true);
                // a pod that was taken over: its sandbox is looked at first, and probes ask its address
                if is_over || self.ips.is_none() {
                    self.probes.insert(key, Probing { task: None, result, awaits_sandbox: !is_over });
                    continue;
                }
                let target = probes::Target {
                    node: self.node.clone(),
                    pod: self.pod.clone(),
                    kind,
                    container: spec.clone(),
                    id: record.id.clone(),
                    ip: self.probe_ip(),
                    started_at: record.started_at.unwrap_or(record.created_at),
                    probe,
                };
                let (inbox, id) = (self.inbox.clone(), record.id.clone());
                let task = probes::spawn(target, move |success| inbox.probed(&id, probe, success));
                self.probes.insert(key, Probing { task: Some(task), result, awaits_sandbox: false });
            }
        }
    }

    pub(super) fn probe_ip(&self) -> Option<std::net::IpAddr> {
        match self.pod.spec.as_ref().and_then(|s| s.host_network) {
            Some(true) => self.node.config.host_ip(),
            _ => self.ips.as_ref().and_then(|ips| ips.first().copied()),
        }
    }

    /// Takes in what an operation came to; returns whether to look at the runtime.
    pub(super) fn take_done(&mut self, done: Done) -> bool {
        match done {
            Done::Volumes(result) => self.volumes_done(result),
            Done::Sandbox(result) => self.sandbox_done(result),
            Done::Image(name, result) => self.image_done(name, result),
            Done::Running(container) => {
                self.waiting.remove(&container.name);
                self.retry_containers.remove(&container.name);
                self.records.put(container);
            }
            Done::Start { name, result, container } => {
                self.ops.remove(&Op::Start(name.clone()));
                container.into_iter().for_each(|c| self.records.put(c));
                match result {
                    Ok(()) => drop(self.waiting.remove(&name)),
                    Err(waiting) => {
                        self.retry_containers.insert(name.clone(), clock::monotonic() + RETRY);
                        self.waiting.insert(name, waiting);
                    }
                }
                return true;
            }
            Done::Killed(id) => {
                self.ops.remove(&Op::Kill(id));
                return true;
            }
            Done::Cleaned(result) => self.cleaned(result),
            Done::Status { sent, result } => self.status_written(sent, result),
            Done::Deleted(result) => self.deleted(result),
        }
        false
    }

    fn volumes_done(&mut self, result: Result<sampan_volumes::PodVolumes, Vec<String>>) {
        self.ops.remove(&Op::Volumes);
        match result {
            Ok(volumes) => {
                self.refresh_at = volumes.refresh_after().map(|after| clock::monotonic() + after);
                self.retry_volumes = super::Retry::default();
                self.volumes = Some(volumes);
            }
            Err(messages) => {
                for message in messages {
                    self.node.recorder.pod(&self.pod, WARNING, "FailedMount", message);
                }
                self.refresh_volumes = true;
                self.retry_volumes.fail(Duration::from_millis(500), Duration::from_secs(122));
            }
        }
    }

    fn sandbox_done(
        &mut self,
        result: Result<(sampan_drivers::runtime::Sandbox, Vec<std::net::IpAddr>), String>,
    ) {
        self.ops.remove(&Op::Sandbox);
        match result {
            Ok((sandbox, ips)) => {
                self.retry_sandbox = super::Retry::default();
                self.sandbox = Some(sandbox);
                self.ips = Some(ips);
            }
            Err(error) => {
                let text = format!("Failed to create pod sandbox: {error}");
                self.node.recorder.pod(&self.pod, WARNING, "FailedCreatePodSandBox", text);
                self.retry_sandbox.fail(Duration::from_millis(250), Duration::from_secs(30));
            }
        }
    }

    fn image_done(&mut self, name: String, result: Result<sampan_drivers::runtime::Image, Waiting>) {
        self.ops.remove(&Op::Image(name.clone()));
        let image_name = self.spec_of(&name).and_then(|(_, s)| s.image).unwrap_or_default();
        match result {
            Ok(image) => {
                self.pulls.remove(&image_name);
                self.images_by_id.insert(image.id.clone(), image.clone());
                self.images.insert(name, image);
            }
            Err(waiting) if waiting.reason == "ErrImagePull" => {
                let now = clock::now();
                let config = &self.node.config;
                let entry = self.pulls.entry(image_name).or_insert((Default::default(), now, String::new()));
                entry.0.advance(now, config.back_off_initial, config.back_off_max);
                (entry.1, entry.2) = (now, waiting.message.clone());
                self.check_platform(&waiting);
                // shown for a moment, then it is a back-off
                self.retry_containers.insert(name.clone(), clock::monotonic() + Duration::from_secs(1));
                self.waiting.insert(name, waiting);
            }
            Err(waiting) => {
                self.retry_containers.insert(name.clone(), clock::monotonic() + RETRY);
                self.waiting.insert(name, waiting);
            }
        }
    }

    /// An image that is not built for this node will never be: the pod fails instead of waiting for ever.
    fn check_platform(&mut self, waiting: &Waiting) {
        let platform = self.node.runtime.platform();
        let wanted = match &platform.variant {
            Some(variant) => format!("{}/{}/{variant}", platform.os, platform.architecture),
            None => format!("{}/{}", platform.os, platform.architecture),
        };
        let error = ImageError::NoPlatform { wanted: wanted.clone(), available: String::new() };
        let start = error.to_string();
        let pod_started = self.records.all().next().is_some();
        if waiting.message.contains(start.trim_end()) && !pod_started {
            let message = format!("Pod was rejected: {}", waiting.message);
            self.node.recorder.pod(&self.pod, WARNING, "ImagePlatform", waiting.message.clone());
            self.verdict = Some(("ImagePlatform".to_string(), message));
            self.is_refused = true;
        }
    }
}

pub(super) fn has_post_start(spec: &Spec) -> bool {
    spec.lifecycle.as_ref().is_some_and(|l| l.post_start.is_some())
}

/// Whether the runtime no longer knows what was asked for.
pub(super) fn is_not_found(error: &RuntimeError) -> bool {
    matches!(error, RuntimeError::NotFound { .. })
}
