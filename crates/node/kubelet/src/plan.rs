//! What has to be done next for a pod's containers, from what there is. Pure.
//!
//! Upstream counterparts: kuberuntime_manager.go (computePodActions), kuberuntime_container.go
//! (computeInitContainerActions), pkg/api/v1/pod/util.go (ContainerShouldRestart).
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container as Spec, Pod, PodSpec};
use sampan_drivers::runtime::{Container, ContainerState};

use crate::container_config::{self, from_ephemeral};
use crate::recorder::Kind;

/// A pod's containers by name, the newest first.
#[derive(Clone, Debug, Default)]
pub struct Records(BTreeMap<String, Vec<Container>>);

impl Records {
    pub fn newest(&self, name: &str) -> Option<&Container> {
        self.0.get(name)?.first()
    }

    pub fn previous(&self, name: &str) -> Option<&Container> {
        self.0.get(name)?.get(1)
    }

    pub fn put(&mut self, container: Container) {
        let list = self.0.entry(container.name.clone()).or_default();
        list.retain(|c| c.id != container.id);
        list.push(container);
        list.sort_by_key(|c| std::cmp::Reverse((c.attempt, c.created_at)));
    }

    pub fn remove(&mut self, id: &str) {
        self.0.values_mut().for_each(|list| list.retain(|c| c.id != id));
    }

    pub fn get(&self, id: &str) -> Option<&Container> {
        self.all().find(|c| c.id == id)
    }

    pub fn all(&self) -> impl Iterator<Item = &Container> {
        self.0.values().flatten()
    }

    pub fn running(&self) -> impl Iterator<Item = &Container> {
        self.all().filter(|c| is_running(c))
    }

    /// All but the two newest of each name.
    pub fn outlived(&self) -> Vec<String> {
        self.0.values().flat_map(|list| list.iter().skip(2)).map(|c| c.id.clone()).collect()
    }
}

pub fn is_running(container: &Container) -> bool {
    container.state == ContainerState::Running
}

pub fn is_exited(container: &Container) -> bool {
    matches!(container.state, ContainerState::Exited | ContainerState::Unknown)
}

pub fn is_sidecar(container: &Spec) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Whether a container that exited with `code` runs again.
pub fn should_restart(spec: &PodSpec, container: &Spec, code: i32) -> bool {
    for rule in container.restart_policy_rules.iter().flatten() {
        if let Some(codes) = &rule.exit_codes {
            let is_in = codes.values.iter().flatten().any(|c| *c == code);
            if is_in == (codes.operator == "In") {
                return rule.action == "Restart" || rule.action == "RestartAllContainers";
            }
        }
    }
    let policy = container.restart_policy.as_deref().or(spec.restart_policy.as_deref()).unwrap_or("Always");
    match policy {
        "Always" => true,
        "OnFailure" => code != 0,
        _ => false,
    }
}

/// A container to stop, to be started again by its policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kill {
    pub id: String,
    pub name: String,
    pub kind: Kind,
    pub message: String,
    /// Which probe's grace period counts.
    pub probe: Option<Probe>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Probe {
    Startup,
    Liveness,
    Readiness,
}

#[derive(Debug, Default)]
pub struct Plan {
    /// To be started once back-off allows, in this order.
    pub start: Vec<(Kind, Spec)>,
    pub kill: Vec<Kill>,
    /// Nothing will run again: the pod is over.
    pub is_finished: bool,
}

/// What is known besides the containers themselves.
pub struct Facts<'a> {
    pub pod: &'a Pod,
    pub records: &'a Records,
    /// Containers (by id) that are through their startup probe and postStart hook.
    pub started: &'a dyn Fn(&Container) -> bool,
    /// Containers (by id) that a probe condemned.
    pub condemned: &'a BTreeMap<String, Probe>,
    /// Containers (by id) that the kubelet stopped in order to run them again.
    pub restarting: &'a BTreeSet<String>,
}

impl Facts<'_> {
    fn spec(&self) -> Option<&PodSpec> {
        self.pod.spec.as_ref()
    }

    /// Why a running container must be replaced, where it must.
    fn kill(&self, kind: Kind, spec: &Spec, record: &Container) -> Option<Kill> {
        let mut probe = None;
        let message = match self.condemned.get(&record.id) {
            Some(which @ Probe::Liveness) => {
                probe = Some(*which);
                format!("Container {} failed liveness probe", spec.name)
            }
            Some(which) => {
                probe = Some(*which);
                format!("Container {} failed startup probe", spec.name)
            }
            None => match record.annotations.get(container_config::HASH) {
                Some(hash) if *hash != container_config::hash(spec) && kind != Kind::Ephemeral => {
                    format!("Container {} definition changed", spec.name)
                }
                _ => return None,
            },
        };
        let restarts = self.spec().is_some_and(|s| {
            is_sidecar(spec) || s.restart_policy.as_deref() != Some("Never") || should_restart(s, spec, 137)
        });
        let message = if restarts { format!("{message}, will be restarted") } else { message };
        Some(Kill { id: record.id.clone(), name: spec.name.clone(), kind, message, probe })
    }

    fn restarts(&self, spec: &Spec, record: &Container) -> bool {
        let Some(pod) = self.spec() else { return false };
        let asked = self.restarting.contains(&record.id) && pod.restart_policy.as_deref() != Some("Never");
        asked || should_restart(pod, spec, record.exit_code)
    }

    /// The next steps.
    pub fn plan(&self) -> Plan {
        let mut plan = Plan::default();
        let Some(spec) = self.spec() else { return plan };
        let initialized = spec.containers.iter().any(|c| self.records.newest(&c.name).is_some());
        if !self.plan_init(spec, initialized, &mut plan) {
            self.plan_ephemeral(spec, &mut plan);
            return plan;
        }
        let mut over = 0;
        for container in &spec.containers {
            match self.records.newest(&container.name) {
                None => plan.start.push((Kind::Main, container.clone())),
                Some(record) if is_exited(record) => {
                    if self.restarts(container, record) {
                        plan.start.push((Kind::Main, container.clone()));
                    } else {
                        over += 1;
                    }
                }
                Some(record) if is_running(record) => {
                    plan.kill.extend(self.kill(Kind::Main, container, record))
                }
                Some(_) => {}
            }
        }
        plan.is_finished = over == spec.containers.len();
        if plan.is_finished {
            plan.start.clear();
        } else {
            self.plan_ephemeral(spec, &mut plan);
        }
        plan
    }

    /// Returns whether the main containers may run.
    fn plan_init(&self, spec: &PodSpec, initialized: bool, plan: &mut Plan) -> bool {
        let init = spec.init_containers.as_deref().unwrap_or_default();
        for (i, container) in init.iter().enumerate() {
            let later = init[i + 1..].iter().any(|c| self.records.newest(&c.name).is_some());
            let record = self.records.newest(&container.name);
            if is_sidecar(container) {
                match record {
                    Some(record) if is_running(record) => {
                        let kill = self.kill(Kind::Init, container, record);
                        let goes_on = kill.is_none() && (self.started)(record);
                        plan.kill.extend(kill);
                        if !goes_on && !initialized && !later {
                            return false;
                        }
                    }
                    Some(record) if !is_exited(record) => {
                        if !initialized && !later {
                            return false;
                        }
                    }
                    _ => {
                        plan.start.push((Kind::Init, container.clone()));
                        if !initialized && !later {
                            return false;
                        }
                    }
                }
                continue;
            }
            if initialized || later && record.is_none() {
                continue;
            }
            match record {
                Some(record) if is_exited(record) && record.exit_code == 0 => {}
                Some(record) if is_exited(record) => {
                    if self.restarts(container, record) {
                        plan.start.push((Kind::Init, container.clone()));
                    } else {
                        plan.is_finished = true;
                        plan.start.clear();
                    }
                    return false;
                }
                Some(_) => return false,
                None => {
                    plan.start.push((Kind::Init, container.clone()));
                    return false;
                }
            }
        }
        true
    }

    fn plan_ephemeral(&self, spec: &PodSpec, plan: &mut Plan) {
        for container in spec.ephemeral_containers.iter().flatten() {
            if self.records.newest(&container.name).is_none() {
                plan.start.push((Kind::Ephemeral, from_ephemeral(container)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use serde_json::{Value, json};

    pub fn record(name: &str, state: ContainerState, code: i32) -> Container {
        Container {
            id: name.into(),
            sandbox_id: "s".into(),
            name: name.into(),
            attempt: 0,
            image: String::new(),
            image_id: String::new(),
            state,
            created_at: Timestamp::UNIX_EPOCH,
            started_at: None,
            finished_at: None,
            exit_code: code,
            reason: String::new(),
            message: String::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            log_path: "l".into(),
            user: None,
        }
    }

    #[test]
    fn init_containers_sidecars_and_restart_policies() {
        use ContainerState::{Exited, Running};
        let init = |names: &[&str]| -> Value {
            names
                .iter()
                .map(|n| json!({"name": n, "restartPolicy": n.starts_with('s').then_some("Always")}))
                .collect()
        };
        // policy, init containers, records, want: start, kill, finished
        #[rustfmt::skip]
        let cases: Vec<(&str, Vec<&str>, Vec<Container>, Vec<&str>, bool)> = vec![
            ("Always", vec![], vec![], vec!["m"], false),
            ("Always", vec!["i1", "i2"], vec![], vec!["i1"], false),
            ("Always", vec!["i1", "i2"], vec![record("i1", Exited, 0)], vec!["i2"], false),
            ("Always", vec!["i1"], vec![record("i1", Running, 0)], vec![], false),
            ("Always", vec!["i1"], vec![record("i1", Exited, 1)], vec!["i1"], false),
            ("Never", vec!["i1"], vec![record("i1", Exited, 1)], vec![], true),
            ("Never", vec!["i1"], vec![record("i1", Exited, 0)], vec!["m"], false),
            ("Never", vec!["s1"], vec![], vec!["s1"], false),
            ("Never", vec!["s1"], vec![record("s1", Running, 0)], vec!["m"], false),
            ("Never", vec!["s1"], vec![record("s1", Exited, 1), record("m", Running, 0)], vec!["s1"], false),
            ("Always", vec![], vec![record("m", Exited, 0)], vec!["m"], false),
            ("OnFailure", vec![], vec![record("m", Exited, 0)], vec![], true),
            ("OnFailure", vec![], vec![record("m", Exited, 2)], vec!["m"], false),
            ("Never", vec![], vec![record("m", Exited, 2)], vec![], true),
            ("Never", vec!["s1"], vec![record("s1", Running, 0), record("m", Exited, 0)], vec![], true),
        ];
        for (policy, inits, records, start, finished) in cases {
            let pod: Pod = serde_json::from_value(json!({"spec": {"restartPolicy": policy,
                "initContainers": init(&inits), "containers": [{"name": "m"}]}}))
            .unwrap();
            let mut all = Records::default();
            records.clone().into_iter().for_each(|r| all.put(r));
            let facts = Facts {
                pod: &pod,
                records: &all,
                started: &|_| true,
                condemned: &BTreeMap::new(),
                restarting: &BTreeSet::new(),
            };
            let plan = facts.plan();
            let names: Vec<&str> = plan.start.iter().map(|(_, c)| c.name.as_str()).collect();
            let what = format!(
                "{policy} {inits:?} {:?}",
                records.iter().map(|r| (&r.name, r.state)).collect::<Vec<_>>()
            );
            assert_eq!((names, plan.is_finished), (start, finished), "{what}");
        }
    }

    #[test]
    fn condemned_containers_are_killed_and_restarted() {
        let pod: Pod = serde_json::from_value(json!({"spec": {"containers": [{"name": "m"}]}})).unwrap();
        let mut records = Records::default();
        records.put(record("m", ContainerState::Running, 0));
        let condemned = [("m".to_string(), Probe::Liveness)].into();
        let facts = Facts {
            pod: &pod,
            records: &records,
            started: &|_| true,
            condemned: &condemned,
            restarting: &BTreeSet::new(),
        };
        assert_eq!(facts.plan().kill[0].message, "Container m failed liveness probe, will be restarted");
    }
}
