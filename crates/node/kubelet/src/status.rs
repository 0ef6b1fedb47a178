//! A pod's phase and conditions, from its container statuses. Pure.
//!
//! Upstream counterparts: kubelet_pods.go (getPhase, generateAPIPodStatus), pkg/kubelet/status/generate.go.
use k8s_openapi::api::core::v1::{ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use sampan_world::clock;

use crate::plan::{is_sidecar, should_restart};

/// What a status is made from, besides the pod.
pub struct Inputs<'a> {
    pub pod: &'a Pod,
    /// The last status that this kubelet made, or the API's.
    pub old: &'a PodStatus,
    pub init: Vec<ContainerStatus>,
    pub main: Vec<ContainerStatus>,
    pub ephemeral: Vec<ContainerStatus>,
    pub has_sandbox: bool,
    /// All containers are down for good.
    pub is_terminal: bool,
    pub has_started_main: bool,
    /// A container runs or may be about to: the pod does not reach its end before they have.
    pub may_run: bool,
    pub pod_ips: Vec<String>,
    pub host_ips: Vec<String>,
    /// Set where the kubelet ends the pod itself: phase Failed for this reason.
    pub verdict: Option<(String, String)>,
    /// A condition about who ended it.
    pub disruption: Option<PodCondition>,
    pub start_time: Option<Time>,
}

/// Set by whoever ends a pod: the eviction API, a controller, the scheduler or this kubelet.
const DISRUPTION: &str = "DisruptionTarget";

const OWN: [&str; 7] = [
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
    "PodResizePending",
    "PodResizeInProgress",
];

fn find<'a>(statuses: &'a [ContainerStatus], name: &str) -> Option<&'a ContainerStatus> {
    statuses.iter().find(|s| s.name == name)
}

/// The exit code of the container's end, where it ended and does not run now.
fn ended(status: &ContainerStatus) -> Option<i32> {
    let state = status.state.as_ref()?;
    if let Some(terminated) = &state.terminated {
        return Some(terminated.exit_code);
    }
    state.waiting.as_ref()?;
    status.last_state.as_ref()?.terminated.as_ref().map(|t| t.exit_code)
}

fn is_running(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|s| s.running.is_some())
}

fn phase(inputs: &Inputs<'_>) -> &'static str {
    let Some(spec) = &inputs.pod.spec else { return "Pending" };
    let (mut pending_init, mut pending_sidecars, mut init_failed) = (0, 0, 0);
    let (mut unknown, mut running, mut waiting, mut stopped, mut succeeded, mut final_) = (0, 0, 0, 0, 0, 0);
    for container in spec.init_containers.iter().flatten() {
        let status = find(&inputs.init, &container.name);
        if is_sidecar(container) {
            match status {
                Some(s) if is_running(s) => {
                    pending_sidecars += usize::from(s.started != Some(true));
                    running += 1;
                }
                Some(s) if ended(s).is_some() => {}
                Some(_) => {
                    pending_sidecars += 1;
                    waiting += 1;
                }
                None => unknown += 1,
            }
            continue;
        }
        match status.map(|s| (is_running(s), ended(s))) {
            Some((false, Some(0))) => {}
            Some((false, Some(code))) => {
                init_failed += usize::from(!should_restart(spec, container, code));
                pending_init += usize::from(should_restart(spec, container, code));
            }
            _ => pending_init += 1,
        }
    }
    for container in &spec.containers {
        match find(&inputs.main, &container.name) {
            None => unknown += 1,
            Some(s) if is_running(s) => running += 1,
            Some(s) => match ended(s) {
                Some(code) => {
                    stopped += 1;
                    succeeded += usize::from(code == 0);
                    final_ += usize::from(!should_restart(spec, container, code));
                }
                None => waiting += 1,
            },
        }
    }
    if init_failed > 0 {
        return "Failed";
    }
    if inputs.is_terminal && running == 0 && unknown == 0 && stopped > 0 && waiting == 0 {
        return if stopped == succeeded { "Succeeded" } else { "Failed" };
    }
    if pending_init > 0 || pending_sidecars > 0 && !inputs.has_started_main || waiting > 0 {
        return "Pending";
    }
    if unknown > 0 {
        return "Pending";
    }
    // while only sidecars run on, they are about to be stopped
    if running > 0 && !inputs.is_terminal {
        return "Running";
    }
    if stopped == 0 {
        return "Pending";
    }
    if stopped != final_ {
        return "Running";
    }
    if stopped == succeeded { "Succeeded" } else { "Failed" }
}

fn condition(kind: &str, is_true: bool, reason: Option<&str>, message: Option<String>) -> PodCondition {
    PodCondition {
        type_: kind.to_string(),
        status: if is_true { "True" } else { "False" }.to_string(),
        reason: reason.map(str::to_string),
        message,
        ..PodCondition::default()
    }
}

fn names_message(unknown: &[&str], unready: &[&str], word: &str) -> Option<String> {
    let mut parts = Vec::new();
    if !unknown.is_empty() {
        parts.push(format!("containers with unknown status: [{}]", unknown.join(" ")));
    }
    if !unready.is_empty() {
        parts.push(format!("containers with {word} status: [{}]", unready.join(" ")));
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn containers_ready(inputs: &Inputs<'_>, phase: &str, kind: &str) -> PodCondition {
    let spec = inputs.pod.spec.clone().unwrap_or_default();
    let sidecars = spec.init_containers.iter().flatten().filter(|c| is_sidecar(c));
    let (mut unknown, mut unready) = (Vec::new(), Vec::new());
    for container in sidecars.chain(&spec.containers) {
        match find(&inputs.main, &container.name).or_else(|| find(&inputs.init, &container.name)) {
            None => unknown.push(container.name.as_str()),
            Some(status) if !status.ready => unready.push(container.name.as_str()),
            Some(_) => {}
        }
    }
    match phase {
        "Succeeded" if unknown.is_empty() => condition(kind, false, Some("PodCompleted"), None),
        "Failed" => condition(kind, false, Some("PodFailed"), None),
        _ => match names_message(&unknown, &unready, "unready") {
            Some(message) => condition(kind, false, Some("ContainersNotReady"), Some(message)),
            None => condition(kind, true, None, None),
        },
    }
}

fn ready(inputs: &Inputs<'_>, phase: &str) -> PodCondition {
    let containers = containers_ready(inputs, phase, "Ready");
    if containers.status != "True" {
        return containers;
    }
    let current = inputs.pod.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    let mut messages = Vec::new();
    for gate in inputs.pod.spec.iter().flat_map(|s| s.readiness_gates.iter().flatten()) {
        let kind = &gate.condition_type;
        match current.iter().find(|c| c.type_ == *kind) {
            None => messages
                .push(format!("corresponding condition of pod readiness gate {kind:?} does not exist.")),
            Some(c) if c.status != "True" => {
                messages.push(format!(
                    "the status of pod readiness gate {kind:?} is not \"True\", but {}",
                    c.status
                ));
            }
            Some(_) => {}
        }
    }
    match messages.is_empty() {
        true => containers,
        false => condition("Ready", false, Some("ReadinessGatesNotReady"), Some(messages.join(", "))),
    }
}

fn initialized(inputs: &Inputs<'_>, phase: &str) -> PodCondition {
    let kind = "Initialized";
    let spec = inputs.pod.spec.clone().unwrap_or_default();
    let (mut unknown, mut incomplete) = (Vec::new(), Vec::new());
    for container in spec.init_containers.iter().flatten() {
        match find(&inputs.init, &container.name) {
            None => unknown.push(container.name.as_str()),
            Some(s) => {
                let done = if is_sidecar(container) { s.started == Some(true) } else { s.ready };
                if !done {
                    incomplete.push(container.name.as_str());
                }
            }
        }
    }
    if phase == "Succeeded" && unknown.is_empty() {
        return condition(kind, true, Some("PodCompleted"), None);
    }
    if inputs.has_started_main {
        return condition(kind, true, None, None);
    }
    match names_message(&unknown, &incomplete, "incomplete") {
        Some(message) => condition(kind, false, Some("ContainersNotInitialized"), Some(message)),
        None => condition(kind, true, None, None),
    }
}

/// Takes the old transition time where the status is the same.
fn settle(conditions: &mut [PodCondition], old: &PodStatus, generation: Option<i64>, now: &Time) {
    for condition in conditions {
        let before = old.conditions.iter().flatten().find(|c| c.type_ == condition.type_);
        let same = before.filter(|c| c.status == condition.status);
        let since = same.and_then(|c| c.last_transition_time.clone()).unwrap_or_else(|| now.clone());
        condition.last_transition_time = Some(since);
        condition.last_probe_time = None;
        condition.observed_generation = generation;
    }
}

fn is_over(phase: Option<&str>) -> bool {
    matches!(phase, Some("Failed" | "Succeeded"))
}

/// The whole status.
pub fn generate(inputs: Inputs<'_>) -> PodStatus {
    let api = inputs.pod.status.clone().unwrap_or_default();
    let mut phase = phase(&inputs).to_string();
    for terminal in [inputs.old.phase.as_deref(), api.phase.as_deref()] {
        if is_over(terminal) {
            phase = terminal.unwrap_or_default().to_string();
        }
    }
    let mut reason = None;
    let mut message = None;
    if inputs.old.phase.as_deref() == Some(&phase) {
        reason = inputs.old.reason.clone().or(api.reason.clone());
        message = inputs.old.message.clone().or(api.message.clone());
    }
    if let Some((why, text)) = &inputs.verdict
        && !is_over(api.phase.as_deref())
    {
        (phase, reason, message) = ("Failed".to_string(), Some(why.clone()), Some(text.clone()));
    }
    let shown = phase.clone();
    if inputs.may_run && is_over(Some(&phase)) && !is_over(inputs.old.phase.as_deref()) {
        phase = inputs.old.phase.clone().unwrap_or_else(|| "Pending".to_string());
        (reason, message) = (inputs.old.reason.clone(), inputs.old.message.clone());
    }
    let now = Time(clock::now_seconds());
    let mut own = vec![
        condition("PodReadyToStartContainers", inputs.has_sandbox, None, None),
        initialized(&inputs, &shown),
        ready(&inputs, &shown),
        containers_ready(&inputs, &shown, "ContainersReady"),
        condition("PodScheduled", true, None, None),
    ];
    let kept = inputs.old.conditions.iter().flatten().find(|c| c.type_ == DISRUPTION);
    let api_conditions = || api.conditions.iter().flatten();
    // shared with the API server and the controllers: what they say of it stays
    if !api_conditions().any(|c| c.type_ == DISRUPTION) || inputs.disruption.is_some() {
        own.extend(inputs.disruption.clone().or(kept.cloned()));
    }
    settle(&mut own, inputs.old, inputs.pod.metadata.generation, &now);
    let is_own = |c: &PodCondition| OWN.contains(&c.type_.as_str()) || own.iter().any(|o| o.type_ == c.type_);
    let mut conditions: Vec<PodCondition> = api_conditions().filter(|c| !is_own(c)).cloned().collect();
    conditions.extend(own);
    let list = |ips: &[String]| (!ips.is_empty()).then(|| ips.to_vec());
    let some = |statuses: Vec<ContainerStatus>| (!statuses.is_empty()).then_some(statuses);
    PodStatus {
        phase: Some(phase),
        reason: reason.filter(|r| !r.is_empty()),
        message: message.filter(|m| !m.is_empty()),
        conditions: Some(conditions),
        host_ip: inputs.host_ips.first().cloned(),
        host_ips: list(&inputs.host_ips).map(|ips| ips.into_iter().map(|ip| HostIP { ip }).collect()),
        pod_ip: inputs.pod_ips.first().cloned(),
        pod_ips: list(&inputs.pod_ips).map(|ips| ips.into_iter().map(|ip| PodIP { ip }).collect()),
        start_time: inputs.start_time.or(api.start_time),
        qos_class: Some(crate::resources::qos(inputs.pod).to_string()),
        init_container_statuses: some(inputs.init),
        container_statuses: some(inputs.main),
        ephemeral_container_statuses: some(inputs.ephemeral),
        observed_generation: inputs.pod.metadata.generation,
        nominated_node_name: api.nominated_node_name,
        resource_claim_statuses: api.resource_claim_statuses,
        extended_resource_claim_status: api.extended_resource_claim_status,
        ..PodStatus::default()
    }
}

/// A change of status as a strategic merge patch: only what differs, and what a merge would leave is deleted by key.
pub fn patch(uid: &str, old: &PodStatus, new: &PodStatus) -> Option<serde_json::Value> {
    use serde_json::{Map, Value, json};
    let (Ok(Value::Object(old)), Ok(Value::Object(new))) =
        (serde_json::to_value(old), serde_json::to_value(new))
    else {
        return None;
    };
    let mut changed = Map::new();
    for (key, value) in &new {
        if old.get(key) == Some(value) {
            continue;
        }
        let merge_key = match key.as_str() {
            "conditions" => "type",
            "podIPs" | "hostIPs" => "ip",
            _ => {
                changed.insert(key.clone(), value.clone());
                continue;
            }
        };
        let mut items = value.as_array().cloned().unwrap_or_default();
        let before = old.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
        for item in &before {
            if !items.iter().any(|i| i[merge_key] == item[merge_key]) {
                let mut gone = Map::new();
                gone.insert("$patch".into(), json!("delete"));
                gone.insert(merge_key.into(), item[merge_key].clone());
                items.push(Value::Object(gone));
            }
        }
        changed.insert(key.clone(), Value::Array(null_missing(items, &before, merge_key)));
    }
    for key in old.keys().filter(|k| !new.contains_key(*k)) {
        changed.insert(key.clone(), Value::Null);
    }
    (!changed.is_empty()).then(|| json!({"metadata": {"uid": uid}, "status": changed}))
}

/// A merge keeps an item's fields that are no longer set: say that they go.
fn null_missing(
    mut items: Vec<serde_json::Value>,
    before: &[serde_json::Value],
    merge_key: &str,
) -> Vec<serde_json::Value> {
    for item in &mut items {
        let old = before.iter().find(|b| b[merge_key] == item[merge_key]);
        let (Some(old), Some(item)) = (old.and_then(|o| o.as_object()), item.as_object_mut()) else {
            continue;
        };
        if item.contains_key("$patch") {
            continue;
        }
        for key in old.keys() {
            item.entry(key.clone()).or_insert(serde_json::Value::Null);
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn status(name: &str, kind: &str) -> ContainerStatus {
        let (state, last) = match kind {
            "run" => (json!({"running": {}}), json!({})),
            "ok" => (json!({"terminated": {"exitCode": 0}}), json!({})),
            "bad" => (json!({"terminated": {"exitCode": 1}}), json!({})),
            "back" => {
                (json!({"waiting": {"reason": "CrashLoopBackOff"}}), json!({"terminated": {"exitCode": 1}}))
            }
            _ => (json!({"waiting": {}}), json!({})),
        };
        serde_json::from_value(json!({"name": name, "image": "", "imageID": "", "restartCount": 0,
            "ready": kind == "run" && !name.starts_with('i') || name.starts_with('i') && kind == "ok", "started": kind == "run",
            "state": state, "lastState": last}))
        .unwrap()
    }

    fn inputs<'a>(pod: &'a Pod, old: &'a PodStatus, states: &[(&str, &str)]) -> Inputs<'a> {
        let pick = |init: bool| {
            states.iter().filter(|(n, _)| n.starts_with('m') != init).map(|(n, k)| status(n, k)).collect()
        };
        Inputs {
            pod,
            old,
            init: pick(true),
            main: pick(false),
            ephemeral: vec![],
            has_sandbox: true,
            is_terminal: false,
            may_run: false,
            has_started_main: states.iter().any(|(n, k)| n.starts_with('m') && *k == "run"),
            pod_ips: vec![],
            host_ips: vec![],
            verdict: None,
            disruption: None,
            start_time: None,
        }
    }

    fn pod(policy: &str, names: &[&str]) -> Pod {
        let list = |init: bool| -> Vec<Value> {
            names
                .iter()
                .filter(|n| n.starts_with('m') != init)
                .map(|n| json!({"name": n, "restartPolicy": n.starts_with('s').then_some("Always")}))
                .collect()
        };
        serde_json::from_value(json!({"metadata": {"generation": 3},
            "spec": {"restartPolicy": policy, "initContainers": list(true), "containers": list(false)}}))
        .unwrap()
    }

    #[test]
    fn phases() {
        #[rustfmt::skip]
        let cases: Vec<(&str, Vec<(&str, &str)>, &str)> = vec![
            ("Always", vec![("m", "wait")], "Pending"),
            ("Always", vec![("m", "run")], "Running"),
            ("Always", vec![("m1", "run"), ("m2", "wait")], "Pending"),
            ("Always", vec![("m1", "run"), ("m2", "back")], "Running"),
            ("Always", vec![("m", "ok")], "Running"),
            ("Always", vec![("m", "back")], "Running"),
            ("OnFailure", vec![("m", "bad")], "Running"),
            ("OnFailure", vec![("m", "ok")], "Succeeded"),
            ("Never", vec![("m1", "ok"), ("m2", "bad")], "Failed"),
            ("Never", vec![("m1", "ok"), ("m2", "run")], "Running"),
            ("Never", vec![("i1", "bad"), ("m", "wait")], "Failed"),
            ("Always", vec![("i1", "bad"), ("m", "wait")], "Pending"),
            ("Always", vec![("i1", "back"), ("m", "wait")], "Pending"),
            ("Always", vec![("i1", "ok"), ("m", "run")], "Running"),
            ("Always", vec![("s1", "run"), ("m", "run")], "Running"),
            ("Never", vec![("s1", "ok"), ("m", "ok")], "Succeeded"),
        ];
        for (policy, states, want) in cases {
            let names: Vec<&str> = states.iter().map(|(n, _)| *n).collect();
            let (pod, old) = (pod(policy, &names), PodStatus::default());
            assert_eq!(phase(&inputs(&pod, &old, &states)), want, "{policy} {states:?}");
        }
    }

    #[test]
    fn what_others_say_of_a_disruption_stays() {
        let disruption = |reason: &str| -> PodCondition {
            serde_json::from_value(json!({"type": DISRUPTION, "status": "True", "reason": reason})).unwrap()
        };
        let reasons = |status: &PodStatus| -> Vec<String> {
            let all = status.conditions.iter().flatten().filter(|c| c.type_ == DISRUPTION);
            all.filter_map(|c| c.reason.clone()).collect()
        };
        let (mut pod, old) = (pod("Always", &["m"]), PodStatus::default());
        assert!(reasons(&generate(inputs(&pod, &old, &[("m", "run")]))).is_empty());
        pod.status = Some(PodStatus {
            conditions: Some(vec![disruption("EvictionByEvictionAPI")]),
            ..PodStatus::default()
        });
        let told = generate(inputs(&pod, &old, &[("m", "run")]));
        assert_eq!(reasons(&told), ["EvictionByEvictionAPI"]);
        let own = Inputs {
            disruption: Some(disruption("TerminationByKubelet")),
            ..inputs(&pod, &told, &[("m", "bad")])
        };
        let ended = generate(own);
        assert_eq!(reasons(&ended), ["TerminationByKubelet"]);
        pod.status = None;
        assert_eq!(reasons(&generate(inputs(&pod, &ended, &[("m", "bad")]))), ["TerminationByKubelet"]);
    }

    #[test]
    fn conditions_and_transitions() {
        let (pod, mut old) = (pod("Always", &["i1", "m"]), PodStatus::default());
        let first = generate(inputs(&pod, &old, &[("i1", "run"), ("m", "wait")]));
        let get = |s: &PodStatus, kind: &str| {
            s.conditions.iter().flatten().find(|c| c.type_ == kind).cloned().unwrap()
        };
        assert_eq!(
            get(&first, "Initialized").message.as_deref(),
            Some("containers with incomplete status: [i1]")
        );
        assert_eq!(get(&first, "Ready").message.as_deref(), Some("containers with unready status: [m]"));
        assert_eq!(first.observed_generation, Some(3));
        let past = Time(jiff::Timestamp::from_second(5).unwrap());
        old = first;
        old.conditions.iter_mut().flatten().for_each(|c| c.last_transition_time = Some(past.clone()));
        let second = generate(inputs(&pod, &old, &[("i1", "ok"), ("m", "run")]));
        assert_eq!(get(&second, "Ready").status, "True");
        assert_ne!(get(&second, "Ready").last_transition_time, Some(past.clone()));
        assert_eq!(get(&second, "PodScheduled").last_transition_time, Some(past));
        let change = patch("u", &old, &second).unwrap();
        assert_eq!(change["metadata"]["uid"], "u");
        assert_eq!(change["status"]["phase"], "Running");
        let ready =
            change["status"]["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap();
        assert!(
            ready["message"].is_null() && ready.get("message").is_some(),
            "a merge would keep the message"
        );
        assert!(patch("u", &second, &second).is_none());
    }

    #[test]
    fn an_end_waits_for_what_still_runs() {
        let (pod, old) =
            (pod("Always", &["m"]), PodStatus { phase: Some("Running".into()), ..PodStatus::default() });
        let mut late = inputs(&pod, &old, &[("m", "run")]);
        late.verdict = Some(("DeadlineExceeded".into(), "late".into()));
        late.may_run = true;
        let made = generate(late);
        assert_eq!((made.phase.as_deref(), made.reason), (Some("Running"), None));
        let mut over = inputs(&pod, &old, &[("m", "bad")]);
        over.verdict = Some(("DeadlineExceeded".into(), "late".into()));
        let made = generate(over);
        assert_eq!(
            (made.phase.as_deref(), made.reason.as_deref()),
            (Some("Failed"), Some("DeadlineExceeded"))
        );
    }

    #[test]
    fn a_terminal_phase_stays() {
        let (pod, mut old) = (pod("Always", &["m"]), PodStatus::default());
        old.phase = Some("Failed".into());
        assert_eq!(generate(inputs(&pod, &old, &[("m", "run")])).phase.as_deref(), Some("Failed"));
    }
}
