//! A container's status, from its records, the last status and why it waits. Pure.
//!
//! Upstream counterpart: kubelet_pods.go (convertToAPIContainerStatuses).
use std::collections::HashMap;

use k8s_openapi::api::core::v1::{
    Container as Spec, ContainerState as State, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, ContainerUser, LinuxContainerUser, VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use sampan_drivers::runtime::{Container, ContainerState, Image};

use crate::plan::Records;
use crate::pull::Waiting;
use crate::recorder::Kind;

/// How container IDs are written in the API.
pub fn public_id(id: &str) -> String {
    format!("sampan://{id}")
}

/// What statuses of one pod's containers are made from.
pub struct Inputs<'a> {
    pub records: &'a Records,
    pub waiting: &'a HashMap<String, Waiting>,
    pub old: &'a [ContainerStatus],
    pub has_init: bool,
    pub messages: &'a HashMap<String, String>,
    pub images: &'a HashMap<String, Image>,
    /// (started, ready) of a running container.
    pub probed: &'a dyn Fn(&Spec, &Container) -> (bool, bool),
    /// The pod ended before it could run this: no waiting forever.
    pub is_terminal: bool,
}

fn whole(time: Option<jiff::Timestamp>) -> Option<Time> {
    // the API has whole seconds
    time.and_then(|t| jiff::Timestamp::from_second(t.as_second()).ok()).map(Time)
}

fn state(record: &Container, messages: &HashMap<String, String>) -> State {
    match record.state {
        ContainerState::Running => State {
            running: Some(ContainerStateRunning {
                started_at: whole(record.started_at.or(Some(record.created_at))),
            }),
            ..State::default()
        },
        ContainerState::Created => {
            State { waiting: Some(ContainerStateWaiting::default()), ..State::default() }
        }
        ContainerState::Exited | ContainerState::Unknown => {
            let message = messages.get(&record.id).unwrap_or(&record.message);
            let is_unknown = record.state == ContainerState::Unknown;
            State {
                terminated: Some(ContainerStateTerminated {
                    container_id: Some(public_id(&record.id)),
                    exit_code: if is_unknown && record.exit_code == 0 { 137 } else { record.exit_code },
                    started_at: whole(record.started_at.or(Some(record.created_at))),
                    finished_at: whole(record.finished_at),
                    reason: Some(match record.reason.as_str() {
                        "" if is_unknown => "ContainerStatusUnknown".to_string(),
                        "" if record.exit_code == 0 => "Completed".to_string(),
                        "" => "Error".to_string(),
                        reason => reason.to_string(),
                    }),
                    message: Some(message.clone()).filter(|m| !m.is_empty()),
                    signal: None,
                }),
                ..State::default()
            }
        }
    }
}

fn waiting(reason: &str, message: Option<String>) -> State {
    State {
        waiting: Some(ContainerStateWaiting { reason: Some(reason.to_string()), message }),
        ..State::default()
    }
}

impl Inputs<'_> {
    pub fn of(&self, kind: Kind, spec: &Spec) -> ContainerStatus {
        let old = self.old.iter().find(|s| s.name == spec.name);
        let mut status = ContainerStatus {
            name: spec.name.clone(),
            image: spec.image.clone().unwrap_or_default(),
            volume_mounts: volume_mounts(spec),
            started: Some(false),
            ..ContainerStatus::default()
        };
        let newest = self.records.newest(&spec.name);
        match newest {
            Some(record) => self.read_record(kind, spec, record, &mut status),
            None => self.without_record(kind, old, &mut status),
        }
        if kind == Kind::Ephemeral {
            status.started = None;
        }
        let is_done =
            kind == Kind::Init && newest.is_some_and(|r| crate::plan::is_exited(r) && r.exit_code == 0);
        let runs = newest.is_some_and(crate::plan::is_running);
        if let Some(why) = self.waiting.get(&spec.name)
            && !runs
            && !is_done
            && !self.is_terminal
        {
            if let Some(State { terminated: Some(terminated), .. }) = status.state.take() {
                status.last_state = Some(State { terminated: Some(terminated), ..State::default() });
            }
            status.state = Some(waiting(&why.reason, Some(why.message.clone()).filter(|m| !m.is_empty())));
        }
        status
    }

    fn read_record(&self, kind: Kind, spec: &Spec, record: &Container, status: &mut ContainerStatus) {
        status.restart_count = i32::try_from(record.attempt).unwrap_or(i32::MAX);
        status.container_id = Some(public_id(&record.id));
        if let Some(image) = self.images.get(&record.image_id) {
            status.image_id = image.repo_digests.first().cloned().unwrap_or_else(|| image.id.clone());
        } else {
            status.image_id = record.image_id.clone();
        }
        if !record.image.is_empty() {
            status.image = record.image.clone();
        }
        status.state = Some(state(record, self.messages));
        let last = self.records.previous(&spec.name).filter(|r| crate::plan::is_exited(r));
        let old = self.old.iter().find(|s| s.name == spec.name);
        status.last_state = match last {
            Some(last) => Some(state(last, self.messages)),
            None if record.attempt > 0 => old.and_then(|o| o.last_state.clone()),
            None => None,
        };
        if record.state == ContainerState::Running {
            let (started, ready) = (self.probed)(spec, record);
            status.started = Some(started);
            // an init container is ready when it is over
            status.ready = ready && (kind != Kind::Init || crate::plan::is_sidecar(spec));
        } else if kind == Kind::Init && crate::plan::is_exited(record) && record.exit_code == 0 {
            status.ready = spec.restart_policy.as_deref() != Some("Always");
        }
        if kind != Kind::Ephemeral {
            status.resources = spec.resources.clone().or_else(|| Some(Default::default()));
            status.allocated_resources = spec.resources.as_ref().and_then(|r| r.requests.clone());
        }
        status.user = record.user.as_ref().map(|(uid, gid, groups)| ContainerUser {
            linux: Some(LinuxContainerUser {
                uid: *uid,
                gid: *gid,
                supplemental_groups: Some(groups.clone()),
            }),
        });
    }

    fn without_record(&self, kind: Kind, old: Option<&ContainerStatus>, status: &mut ContainerStatus) {
        if let Some(old) = old.filter(|o| o.state.as_ref().is_some_and(|s| s.terminated.is_some())) {
            *status = old.clone();
            return;
        }
        let was_running = old.is_some_and(|o| o.state.as_ref().is_some_and(|s| s.running.is_some()));
        if let Some(old) = old {
            status.restart_count = old.restart_count;
            status.last_state = old.last_state.clone();
        }
        let default =
            if self.has_init && kind != Kind::Ephemeral { "PodInitializing" } else { "ContainerCreating" };
        status.state = Some(waiting(default, None));
        if was_running && status.last_state.as_ref().is_none_or(|s| s.terminated.is_none()) {
            status.restart_count += 1;
            status.last_state = Some(State {
                terminated: Some(ContainerStateTerminated {
                    exit_code: 137,
                    reason: Some("ContainerStatusUnknown".into()),
                    message: Some(
                        "The container could not be located when the pod was deleted.  The container used to be Running"
                            .into(),
                    ),
                    ..ContainerStateTerminated::default()
                }),
                ..State::default()
            });
        }
        if self.is_terminal && kind == Kind::Main && was_running {
            status.state = status.last_state.take();
        }
    }
}

fn volume_mounts(spec: &Spec) -> Option<Vec<VolumeMountStatus>> {
    let mounts = spec.volume_mounts.as_ref()?;
    Some(
        mounts
            .iter()
            .map(|mount| VolumeMountStatus {
                name: mount.name.clone(),
                mount_path: mount.mount_path.clone(),
                read_only: mount.read_only.filter(|r| *r),
                recursive_read_only: (mount.read_only == Some(true)).then(|| {
                    let wanted =
                        matches!(mount.recursive_read_only.as_deref(), Some("Enabled" | "IfPossible"));
                    if wanted { "Enabled" } else { "Disabled" }.to_string()
                }),
                volume_status: None,
            })
            .collect(),
    )
}
