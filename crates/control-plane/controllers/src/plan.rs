//! Plans: nodes brought to a release of Sampan, servers first. Upstream counterpart: rancher's system-upgrade-controller
//! (pkg/upgrade).
//!
//! What stays true: where a node stands in a plan is written on the Node alone, so that the controller can be killed at
//! any instruction; version skew is judged for the whole cluster before a node is begun with, and told in the plan's
//! conditions; when one node fails, no other is begun with until the plan is changed. Deliberate differences: there are no
//! Jobs, a node upgrades itself when it reads the annotations named in `sampan_kinds::upgrade`; a plan is done with a
//! node when the node itself reports the release, not by a label; servers are one at a time.
mod drain;
mod status;
mod window;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use sampan_client::informer::key;
use sampan_client::{Event, Informer, WorkQueue};
use sampan_kinds::upgrade::release::{self, Member, Release};
use sampan_kinds::upgrade::v1::plan::Plan;
use sampan_kinds::upgrade::{
    COMPLETED, CORDONED, FAILED, MESSAGE, PLAN, Program, REQUEST, SERVER_LABEL, SHA256, SINCE, VERSION,
};
use sampan_world::clock;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use self::drain::Drained;
use self::status::{Outcome, Progress};
use self::window::Window;
use crate::Scope;
use crate::controller::{Controller, Descriptor, Key, SyncError, SyncResult, run};
use crate::controller_ref::{is_deleting, name, uid};
use crate::events::EventRecorder;
use crate::expectations::OwnWrites;
use crate::label_selector::{labels_of, matches};
use crate::pod_state;

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "plan-controller",
    service_account: "plan-controller",
    component: "plan-controller",
    build: |scope| run(Arc::new(PlanController::new(&scope))),
};

/// Evictions that a budget held are asked for again, as kubectl does.
const EVICTION_PAUSE: Duration = Duration::from_secs(5);

struct PlanController {
    client: Client,
    events: EventRecorder,
    plans: Informer<Plan>,
    nodes: Informer<Node>,
    pods: Informer<Pod>,
    /// The programs that the server has; asked for when there is a plan.
    programs: Option<crate::context::Programs>,
    watching: std::sync::OnceLock<watch::Receiver<Vec<Program>>>,
    writes: OwnWrites,
    queue: WorkQueue<Key>,
}

fn annotation<'a>(node: &'a Node, name: &str) -> Option<&'a str> {
    node.metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

fn time_of(node: &Node, name: &str) -> Option<Timestamp> {
    annotation(node, name)?.parse().ok()
}

fn version(node: &Node) -> &str {
    let info = node.status.as_ref().and_then(|s| s.node_info.as_ref());
    info.map_or("", |info| info.kubelet_version.as_str())
}

fn is_server(node: &Node) -> bool {
    labels_of(&node.metadata.labels).contains_key(SERVER_LABEL)
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

fn is_cordoned(node: &Node) -> bool {
    node.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false)
}

/// Whether the plan is at work with the node.
fn is_in(node: &Node, plan: &Plan) -> bool {
    annotation(node, PLAN) == Some(name(plan))
}

/// The plan's nodes, servers first.
fn selected(plan: &Plan, nodes: &[Arc<Node>]) -> Vec<Arc<Node>> {
    let opt_out = format!("plan.upgrade.sampan.io/{}", name(plan));
    let mut found: Vec<Arc<Node>> = nodes
        .iter()
        .filter(|node| {
            let labels = labels_of(&node.metadata.labels);
            let wanted = matches(plan.spec.node_selector.as_ref(), labels);
            wanted && labels.get(&opt_out).map(String::as_str) != Some("disabled")
        })
        .cloned()
        .collect();
    found.sort_by_key(|node| (!is_server(node), name(&**node).to_string()));
    found
}

/// Stands for one attempt.
fn request_of(plan: &Plan, target: &str) -> String {
    let generation = plan.metadata.generation.unwrap_or_default();
    crate::template_hash::compute(&json!([uid(plan), generation, target]), None)
}

/// The release that the plan wants, or why that is not known.
fn target(plan: &Plan, programs: &[Program]) -> Result<(String, &'static str), String> {
    if !plan.spec.version.is_empty() {
        return Ok((plan.spec.version.clone(), "Version"));
    }
    let newest = programs.iter().filter_map(|p| Some((p.version.parse::<Release>().ok()?, &p.version))).max();
    match newest {
        Some((_, version)) => Ok((version.clone(), "Programs")),
        None => {
            Err("spec.version is not set, and the server has no programs in its folder `binaries`"
                .to_string())
        }
    }
}

/// Which nodes to begin with now: servers one at a time, the others when no server is left to do.
fn next<'a>(plan: &Plan, target: &str, nodes: &'a [Arc<Node>]) -> Vec<&'a Arc<Node>> {
    let busy = nodes.iter().filter(|node| is_in(node, plan)).count();
    let waiting: Vec<&Arc<Node>> =
        nodes.iter().filter(|node| version(node) != target && !is_in(node, plan)).collect();
    let server_left =
        nodes.iter().any(|node| is_server(node) && (version(node) != target || is_in(node, plan)));
    let slots = match server_left {
        true => 1,
        false => usize::try_from(plan.spec.concurrency.max(1)).unwrap_or(1),
    };
    let fits = |node: &&&Arc<Node>| !server_left || is_server(node);
    // another plan's node is left to it until it is done
    let free = |node: &&&Arc<Node>| annotation(node, PLAN).is_none();
    waiting.iter().filter(fits).filter(free).take(slots.saturating_sub(busy)).copied().collect()
}

/// Why version skew forbids the plan.
fn skew(plan: &Plan, target: &str, all: &[Arc<Node>]) -> Option<String> {
    let wanted: Release = target.parse().ok()?;
    let chosen = selected(plan, all);
    let member = |node: &Arc<Node>| {
        let is_chosen = chosen.iter().any(|c| name(&**c) == name(&**node)) && version(node) != target;
        Some(Member {
            name: name(&**node).to_string(),
            is_server: is_server(node),
            has: version(node).parse().ok()?,
            wants: is_chosen.then(|| wanted.clone()),
        })
    };
    let members: Vec<Member> = all.iter().filter_map(member).collect();
    let refusals = release::refusals(&members);
    (!refusals.is_empty()).then(|| refusals.join("; "))
}

/// Nodes whose program the server does not have.
fn without_program(plan: &Plan, target: &str, nodes: &[Arc<Node>], programs: &[Program]) -> Option<String> {
    let arch = |node: &Node| {
        let info = node.status.as_ref().and_then(|s| s.node_info.as_ref());
        info.map(|info| info.architecture.clone()).unwrap_or_default()
    };
    let has = |arch: &str| {
        let digest = plan.spec.sha256.get(arch);
        programs
            .iter()
            .any(|p| p.arch == arch && p.version == target && digest.is_none_or(|d| *d == p.sha256))
    };
    let lacking = nodes.iter().find(|node| version(node) != target && !has(&arch(node)))?;
    let arch = arch(lacking);
    let pinned = if plan.spec.sha256.contains_key(&arch) { " with the plan's digest" } else { "" };
    let node = name(&**lacking);
    Some(format!(
        "the server has no program of {target} for {arch}{pinned} (node {node}) in its folder `binaries`"
    ))
}

impl PlanController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            plans: scope.informers.of(),
            nodes: scope.informers.of(),
            pods: scope.informers.of(),
            programs: scope.programs.clone(),
            watching: std::sync::OnceLock::new(),
            writes: OwnWrites::default(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.plans.on_event(move |event| {
            me.queue.add(key(&**event.object()));
            // another exclusive plan may have waited for it
            me.wake();
        });
        let me = this.clone();
        this.nodes.on_event(move |event| match event {
            Event::Updated { old, new } if !matters(old, new) => {}
            _ => {
                me.wake();
                // its plan may be gone
                if let Some(plan) = annotation(event.object(), PLAN) {
                    me.queue.add((String::new(), plan.to_string()));
                }
            }
        });
        let me = this.clone();
        this.pods.on_event(move |event| {
            let pod = event.object();
            if let Event::Deleted(_) = event
                && let Some(node) = me.nodes.get("", pod_state::node_name(pod))
                && let Some(plan) = annotation(&node, PLAN)
            {
                me.queue.add((String::new(), plan.to_string()));
            }
        });
        this
    }

    fn wake(&self) {
        self.plans.list().iter().for_each(|plan| self.queue.add(key(&**plan)));
    }

    /// What the server has; from the first call on a change of it wakes the plans.
    fn programs(self: &Arc<Self>) -> Vec<Program> {
        let Some(programs) = &self.programs else { return Vec::new() };
        let receiver = self.watching.get_or_init(|| {
            let receiver = programs();
            let (mut changes, me) = (receiver.clone(), self.clone());
            tokio::spawn(async move {
                while changes.changed().await.is_ok() {
                    me.wake();
                }
            });
            receiver
        });
        receiver.borrow().clone()
    }

    async fn patch(
        &self,
        node: &Node,
        annotations: Map<String, Value>,
        unschedulable: Option<bool>,
    ) -> SyncResult {
        let mut patch = json!({"metadata": {"annotations": annotations}});
        if let Some(unschedulable) = unschedulable {
            patch["spec"] = json!({"unschedulable": unschedulable.then_some(true)});
        }
        let api: Api<Node> = Api::all(self.client.clone());
        let written = api.patch(name(node), &PatchParams::default(), &Patch::Merge(&patch)).await;
        match written {
            Ok(written) => self.writes.wrote(&written),
            Err(error) if crate::api_error::is_not_found(&error) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Takes the plan off the node; what is kept says how it ended.
    async fn let_go(&self, node: &Node, kept: &[(&str, Option<&str>)]) -> SyncResult {
        let mut annotations = Map::new();
        for name in [PLAN, REQUEST, SINCE, CORDONED, VERSION, SHA256, FAILED, MESSAGE] {
            annotations.insert(name.to_string(), Value::Null);
        }
        for (name, value) in kept {
            annotations.insert((*name).to_string(), json!(value));
        }
        let uncordon = annotation(node, CORDONED).map(|_| false);
        self.patch(node, annotations, uncordon).await
    }

    async fn begin(&self, plan: &Plan, node: &Node, request: &str) -> SyncResult {
        let cordon = plan.spec.cordon || plan.spec.drain.is_some();
        let by_us = cordon && !is_cordoned(node);
        let annotations = json!({
            PLAN: name(plan), REQUEST: request, SINCE: clock::now_seconds().to_string(),
            FAILED: null, MESSAGE: null, VERSION: null,
            CORDONED: (by_us || annotation(node, CORDONED).is_some()).then_some("true"),
        });
        let annotations = annotations.as_object().cloned().unwrap_or_default();
        self.patch(node, annotations, by_us.then_some(true)).await
    }

    /// Does with a node what is to be done next. `Err` of the inner result is why it failed.
    async fn step(
        &self,
        plan: &Plan,
        node: &Node,
        target: &str,
        request: &str,
    ) -> Result<Outcome, SyncError> {
        // it takes the annotation off itself, when it will stay with the release
        if version(node) == target && is_ready(node) && annotation(node, VERSION).is_none() {
            let now = clock::now_seconds().to_string();
            self.let_go(node, &[(COMPLETED, Some(&now))]).await?;
            let message = format!("Plan {} brought the node to {target}", name(plan));
            self.events.normal(node, "UpgradeComplete", message);
            return Ok(Outcome::Done);
        }
        if annotation(node, REQUEST) != Some(request) {
            self.begin(plan, node, request).await?;
            return Ok(Outcome::Waits(None));
        }
        if annotation(node, FAILED) == Some(request) {
            if annotation(node, CORDONED).is_some() || annotation(node, VERSION).is_some() {
                let off = [CORDONED, VERSION, SHA256].map(|name| (name.to_string(), Value::Null));
                let uncordon = annotation(node, CORDONED).map(|_| false);
                self.patch(node, off.into_iter().collect(), uncordon).await?;
            }
            let why = annotation(node, MESSAGE).unwrap_or("it does not say why");
            return Ok(Outcome::Failed(why.to_string()));
        }
        let now = clock::now();
        let passed = time_of(node, SINCE).map_or(Duration::ZERO, |since| elapsed(since, now));
        let limit = plan.spec.job_active_deadline_secs.unwrap_or(900).unsigned_abs();
        let left = match limit {
            0 => None,
            limit if passed.as_secs() >= limit => {
                return self.fail(node, request, &format!("not done within {limit} s")).await;
            }
            limit => Some(Duration::from_secs(limit).saturating_sub(passed)),
        };
        if annotation(node, VERSION) == Some(target) {
            return Ok(Outcome::Waits(left));
        }
        if let Some(spec) = &plan.spec.drain {
            let pods: Vec<Arc<Pod>> = self.pods.list();
            let pods: Vec<Arc<Pod>> =
                pods.into_iter().filter(|pod| pod_state::node_name(pod) == name(node)).collect();
            match drain::drain(&self.client, spec, &pods, now).await? {
                Drained::Done => {}
                Drained::Forbidden(why) => {
                    return self.fail(node, request, &format!("cannot be drained: {why}")).await;
                }
                Drained::Left(count) => {
                    let limit = sampan_kinds::upgrade::v1::plan::duration(&spec.timeout);
                    if limit.is_some_and(|limit| passed >= limit) {
                        let why = format!("not drained within {}: {count} pods are left", spec.timeout);
                        return self.fail(node, request, &why).await;
                    }
                    return Ok(Outcome::Waits(Some(left.unwrap_or(EVICTION_PAUSE).min(EVICTION_PAUSE))));
                }
            }
        }
        let arch = node.status.as_ref().and_then(|s| s.node_info.as_ref()).map(|i| i.architecture.as_str());
        let digest = arch.and_then(|arch| plan.spec.sha256.get(arch));
        let annotations = json!({VERSION: target, SHA256: digest});
        self.patch(node, annotations.as_object().cloned().unwrap_or_default(), None).await?;
        self.events.normal(node, "Upgrading", format!("Plan {} asks the node for {target}", name(plan)));
        Ok(Outcome::Waits(left))
    }

    async fn fail(&self, node: &Node, request: &str, why: &str) -> Result<Outcome, SyncError> {
        let annotations = json!({FAILED: request, MESSAGE: why, VERSION: null, SHA256: null, CORDONED: null});
        let uncordon = annotation(node, CORDONED).map(|_| false);
        self.patch(node, annotations.as_object().cloned().unwrap_or_default(), uncordon).await?;
        self.events.warning(node, "UpgradeFailed", why);
        Ok(Outcome::Failed(why.to_string()))
    }

    /// Why no node may be begun with now, and when that is to be looked at again.
    fn hold(
        &self,
        plan: &Plan,
        target: &str,
        nodes: &[Arc<Node>],
        window: Option<&Window>,
    ) -> Option<(Progress, Option<Duration>)> {
        let now = clock::now();
        if let Some(window) = window.filter(|window| !window.contains(now)) {
            return Some((Progress::waits("spec.window is closed"), window.opens_in(now)));
        }
        let other = |node: &Arc<Node>| {
            let theirs = annotation(node, PLAN).filter(|theirs| *theirs != name(plan))?;
            self.plans.get("", theirs).filter(|theirs| theirs.spec.exclusive)
        };
        if plan.spec.exclusive
            && let Some(other) = self.nodes.list().iter().find_map(other)
        {
            return Some((
                Progress::waits(format!("plan {} is at work, which is exclusive, too", name(&*other))),
                None,
            ));
        }
        let delay =
            sampan_kinds::upgrade::v1::plan::duration(&plan.spec.post_complete_delay).unwrap_or_default();
        let done =
            nodes.iter().filter(|node| version(node) == target).filter_map(|node| time_of(node, COMPLETED));
        let left = delay.saturating_sub(done.max().map_or(delay, |at| elapsed(at, now)));
        (!left.is_zero()).then(|| (Progress::waits("spec.postCompleteDelay is not over"), Some(left)))
    }

    /// Brings the plan on. Says how far it is, and when to look again besides when something changes.
    async fn advance(
        &self,
        plan: &Plan,
        target: &str,
        all: &[Arc<Node>],
        programs: &[Program],
    ) -> Result<(Progress, Option<Duration>), SyncError> {
        let request = request_of(plan, target);
        let mut again: Option<Duration> = None;
        let mut sooner =
            |wait: Option<Duration>| again = wait.map_or(again, |w| Some(again.map_or(w, |a| a.min(w))));
        let nodes = selected(plan, all);
        // a node that is no longer selected is let go where it stands
        for node in all.iter().filter(|node| is_in(node, plan)) {
            if !nodes.iter().any(|chosen| name(&**chosen) == name(&**node)) {
                self.let_go(node, &[]).await?;
            }
        }
        let mut progress = Progress::new(&request);
        for node in nodes.iter().filter(|node| is_in(node, plan)) {
            match self.step(plan, node, target, &request).await? {
                Outcome::Done => {}
                Outcome::Waits(wait) => {
                    progress.applying.push(name(&**node).to_string());
                    sooner(wait);
                }
                Outcome::Failed(why) => progress.failed.push((name(&**node).to_string(), why)),
            }
        }
        progress.left = nodes.iter().filter(|node| version(node) != target).count();
        let window = plan.spec.window.as_ref().map(Window::new).transpose();
        progress.invalid = window.as_ref().err().cloned().or_else(|| skew(plan, target, all));
        let begun = next(plan, target, &nodes);
        if !progress.failed.is_empty() || progress.invalid.is_some() || begun.is_empty() {
            return Ok((progress, again));
        }
        if let Some(why) = without_program(plan, target, &nodes, programs) {
            progress.waits_for = Some(why);
            return Ok((progress, again));
        }
        if let Some((held, wait)) = self.hold(plan, target, &nodes, window.ok().flatten().as_ref()) {
            progress.waits_for = held.waits_for;
            sooner(wait);
            return Ok((progress, again));
        }
        for node in begun {
            self.begin(plan, node, &request).await?;
            progress.applying.push(name(&**node).to_string());
        }
        Ok((progress, again))
    }
}

/// What a plan looks at in a node.
fn matters(old: &Node, new: &Node) -> bool {
    let facts = |node: &Node| {
        let annotations = node.metadata.annotations.clone().unwrap_or_default();
        let ours: BTreeMap<String, String> =
            annotations.into_iter().filter(|(name, _)| name.starts_with("upgrade.sampan.io/")).collect();
        (version(node).to_string(), is_ready(node), ours, node.metadata.labels.clone())
    };
    facts(old) != facts(new)
}

fn elapsed(since: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(since)).unwrap_or_default()
}

impl Controller for Arc<PlanController> {
    type Key = Key;
    const WORKERS: usize = 1;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.plans.synced().await;
        self.nodes.synced().await;
        self.pods.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.plans.list().iter().map(|plan| key(&**plan)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let all = self.nodes.list();
        if all.iter().any(|node| !self.writes.observed(&**node)) {
            return Ok(());
        }
        let plan = self.plans.get("", &key.1).filter(|plan| !is_deleting(&**plan));
        let Some(plan) = plan else {
            for node in all.iter().filter(|node| annotation(node, PLAN) == Some(key.1.as_str())) {
                self.let_go(node, &[]).await?;
            }
            return Ok(());
        };
        let programs = self.programs();
        let (progress, target, again) = match target(&plan, &programs) {
            Ok((target, reason)) => {
                let (progress, again) = self.advance(&plan, &target, &all, &programs).await?;
                (progress, Some((target, reason)), again)
            }
            Err(why) => (Progress::unresolved(why), None, None),
        };
        status::write(&self.client, &self.events, &plan, target, &progress).await?;
        if let Some(again) = again {
            self.queue.add_after(key, again.max(Duration::from_secs(1)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "v1.36.2+sampan0.1.0";
    const NEW: &str = "v1.36.2+sampan0.2.0";

    fn plan(spec: Value) -> Plan {
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u", "generation": 1}, "spec": spec}))
            .unwrap()
    }

    fn node(name: &str, version: &str, in_plan: &str) -> Arc<Node> {
        let mut labels = json!({"kubernetes.io/hostname": name});
        if name.starts_with('s') {
            labels[SERVER_LABEL] = json!("true");
        }
        let annotations = if in_plan.is_empty() { json!({}) } else { json!({PLAN: in_plan}) };
        let info = json!({"kubeletVersion": version, "architecture": "arm64", "bootID": "", "containerRuntimeVersion": "",
            "kernelVersion": "", "kubeProxyVersion": "", "machineID": "", "operatingSystem": "", "osImage": "", "systemUUID": ""});
        let object = json!({"metadata": {"name": name, "labels": labels, "annotations": annotations}, "status": {"nodeInfo": info}});
        Arc::new(serde_json::from_value(object).unwrap())
    }

    #[test]
    fn servers_first_then_so_many_at_a_time() {
        let plan = plan(json!({"nodeSelector": {}, "concurrency": 2}));
        for (nodes, want) in [
            (vec![("a", OLD, ""), ("s1", OLD, ""), ("s2", OLD, "")], "s1"),
            (vec![("a", OLD, ""), ("s1", NEW, "p"), ("s2", OLD, "")], ""),
            (vec![("a", OLD, ""), ("s1", NEW, ""), ("s2", OLD, "")], "s2"),
            (vec![("a", OLD, ""), ("s1", NEW, "p")], ""),
            (vec![("a", OLD, ""), ("b", OLD, ""), ("c", OLD, ""), ("s1", NEW, "")], "a b"),
            (vec![("a", OLD, "p"), ("b", OLD, ""), ("c", OLD, "")], "b"),
            (vec![("a", OLD, "other"), ("b", OLD, ""), ("c", OLD, "")], "b c"),
            (vec![("a", NEW, ""), ("b", NEW, "")], ""),
        ] {
            let nodes: Vec<Arc<Node>> = nodes.iter().map(|(n, v, p)| node(n, v, p)).collect();
            let nodes = selected(&plan, &nodes);
            let begun: Vec<&str> = next(&plan, NEW, &nodes).iter().map(|n| name(&***n)).collect();
            assert_eq!(begun.join(" "), want, "{nodes:?}");
        }
    }

    #[test]
    fn nodes_that_are_not_selected_count_for_skew() {
        let agents = plan(
            json!({"nodeSelector": {"matchExpressions": [{"key": SERVER_LABEL, "operator": "DoesNotExist"}]}}),
        );
        let nodes = [node("s1", OLD, ""), node("a", OLD, "")];
        assert_eq!(selected(&agents, &nodes).len(), 1);
        assert!(skew(&agents, NEW, &nodes).unwrap().contains("upgrade the server first"));
        assert_eq!(skew(&agents, OLD, &nodes), None);
        let all = plan(json!({"nodeSelector": {}}));
        assert_eq!(skew(&all, NEW, &nodes), None);
        assert!(skew(&all, OLD, &[node("s1", NEW, "")]).unwrap().contains("cannot go back"));
        assert!(selected(&plan(json!({})), &nodes).is_empty(), "no selector selects nothing");
    }

    #[test]
    fn what_is_wanted_and_whether_the_server_has_it() {
        let program = |arch: &str, version: &str, sha256: &str| Program {
            arch: arch.to_string(),
            version: version.to_string(),
            sha256: sha256.to_string(),
            size_bytes: 1,
        };
        let programs = [program("arm64", OLD, "a"), program("arm64", NEW, "b"), program("amd64", OLD, "c")];
        let newest = plan(json!({"nodeSelector": {}}));
        assert_eq!(target(&newest, &programs).unwrap(), (NEW.to_string(), "Programs"));
        assert!(target(&newest, &[]).is_err());
        assert_eq!(target(&plan(json!({"version": OLD})), &programs).unwrap(), (OLD.to_string(), "Version"));
        let nodes = [node("a", OLD, "")];
        assert_eq!(without_program(&newest, NEW, &nodes, &programs), None);
        assert!(
            without_program(&newest, NEW, &nodes, &programs[..1]).unwrap().contains("for arm64 (node a)")
        );
        let pinned = plan(json!({"nodeSelector": {}, "sha256": {"arm64": "x"}}));
        assert!(without_program(&pinned, NEW, &nodes, &programs).unwrap().contains("with the plan's digest"));
        assert_ne!(request_of(&newest, OLD), request_of(&newest, NEW));
    }
}
