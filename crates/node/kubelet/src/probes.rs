//! Probes of running containers: one task each, with upstream's timing and thresholds.
//!
//! Upstream counterparts: pkg/kubelet/prober, pkg/probe. A task reports a result when it has crossed its threshold, and
//! ends where no further probing makes sense (a container that failed its liveness, one that has started).
pub mod grpc;
pub mod http;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, Probe as Spec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sampan_world::clock;
use tokio::task::AbortHandle;

use crate::expansion;
use crate::node_services::NodeServices;
use crate::plan::Probe;
use crate::recorder::{Kind, WARNING, container_reference};

const OUTPUT_BYTES: usize = 10 * 1024;
const RETRIES: usize = 3;

/// What one probe said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Success,
    /// Counts as success and is told.
    Warning(String),
    Failure(String),
    /// The probe itself could not be made; it counts for nothing.
    Unknown(String),
}

/// A container that is probed.
#[derive(Clone)]
pub struct Target {
    pub node: Arc<NodeServices>,
    pub pod: Arc<Pod>,
    pub kind: Kind,
    pub container: Container,
    pub id: String,
    pub ip: Option<IpAddr>,
    pub started_at: Timestamp,
    pub probe: Probe,
}

impl Probe {
    pub fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }

    pub fn spec(self, container: &Container) -> Option<&Spec> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
        }
    }
}

/// A port by number, or by its name in the container.
pub fn port(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|p| p.name.as_deref() == Some(name));
            named.map(|p| p.container_port).or_else(|| name.parse().ok())
        }
    };
    number
        .and_then(|n| u16::try_from(n).ok())
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("invalid port number: {port:?}"))
}

/// Starts probing; `report` gets each result beyond its threshold.
pub fn spawn(target: Target, report: impl Fn(bool) + Send + 'static) -> AbortHandle {
    tokio::spawn(async move { follow(target, report).await }).abort_handle()
}

async fn follow(target: Target, report: impl Fn(bool)) {
    let Some(spec) = target.probe.spec(&target.container).cloned() else { return };
    let number = |value: Option<i32>, default: u64| {
        value.and_then(|v| u64::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default)
    };
    let initial = Duration::from_secs(u64::try_from(spec.initial_delay_seconds.unwrap_or(0)).unwrap_or(0));
    let since = Duration::try_from(clock::now().duration_since(target.started_at)).unwrap_or_default();
    tokio::time::sleep(initial.saturating_sub(since)).await;
    let period = Duration::from_secs(number(spec.period_seconds, 10));
    let (failures, successes) = (number(spec.failure_threshold, 3), number(spec.success_threshold, 1));
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut last, mut run) = (None, 0);
    loop {
        ticks.tick().await;
        let Some(success) = once(&target, &spec).await else { continue };
        run = if last == Some(success) { run + 1 } else { 1 };
        last = Some(success);
        if run < if success { successes } else { failures } {
            continue;
        }
        report(success);
        if target.probe == Probe::Startup || target.probe == Probe::Liveness && !success {
            return;
        }
    }
}

/// One probe with its event; `None` where it counts for nothing.
async fn once(target: &Target, spec: &Spec) -> Option<bool> {
    let mut outcome = run(target, spec).await;
    for _ in 1..RETRIES {
        if !matches!(outcome, Outcome::Unknown(_)) {
            break;
        }
        outcome = run(target, spec).await;
    }
    let record = |reason: &str, message: String| {
        let object = container_reference(&target.pod, target.kind, &target.container.name);
        target.node.recorder.record(object, WARNING, reason, message);
    };
    let name = target.probe.name();
    match outcome {
        Outcome::Success => Some(true),
        Outcome::Warning(text) => {
            record("ProbeWarning", format!("{name} probe warning: {text}"));
            Some(true)
        }
        Outcome::Failure(text) => {
            record("Unhealthy", format!("{name} probe failed: {text}"));
            Some(false)
        }
        Outcome::Unknown(text) => {
            record("Unhealthy", format!("{name} probe errored and resulted in unknown state: {text}"));
            None
        }
    }
}

async fn run(target: &Target, spec: &Spec) -> Outcome {
    let timeout =
        Duration::from_secs(spec.timeout_seconds.and_then(|t| u64::try_from(t).ok()).unwrap_or(1).max(1));
    let container = &target.container;
    if let Some(action) = &spec.exec {
        return exec(target, action.command.as_deref().unwrap_or_default(), timeout).await;
    }
    if let Some(action) = &spec.http_get {
        return match http::Request::new(action, container, target.ip, "kube-probe/1.36") {
            Ok(request) => http::probe(&request, timeout).await,
            Err(error) => Outcome::Unknown(error),
        };
    }
    if let Some(action) = &spec.tcp_socket {
        let port = match port(&action.port, container) {
            Ok(port) => port,
            Err(error) => return Outcome::Unknown(error),
        };
        let host = action.host.clone().filter(|h| !h.is_empty()).or(target.ip.map(|ip| ip.to_string()));
        let host = host.unwrap_or_default();
        return match http::connect(&host, port, timeout).await {
            Ok(_) => Outcome::Success,
            Err(error) => Outcome::Failure(error),
        };
    }
    if let Some(action) = &spec.grpc {
        let host = target.ip.map(|ip| ip.to_string()).unwrap_or_default();
        let port = u16::try_from(action.port).unwrap_or(0);
        return grpc::probe(&host, port, action.service.as_deref().unwrap_or_default(), timeout).await;
    }
    Outcome::Unknown("missing probe handler".to_string())
}

async fn exec(target: &Target, command: &[String], timeout: Duration) -> Outcome {
    // only what is written in the spec: a probe knows no other variables
    let plain: Vec<(String, String)> = target
        .container
        .env
        .iter()
        .flatten()
        .filter_map(|e| e.value.clone().map(|v| (e.name.clone(), v)))
        .collect();
    let command: Vec<String> = command.iter().map(|c| expansion::expand_env(c, &plain)).collect();
    let timed_out = || {
        let shown = command.iter().map(|c| format!("{c:?}")).collect::<Vec<_>>().join(" ");
        Outcome::Failure(format!("command timed out: {shown} timed out after {}s", timeout.as_secs()))
    };
    let result = target.node.runtime.exec_sync(&target.id, &command, timeout, OUTPUT_BYTES);
    // the runtime keeps the time itself; this bound is for one that does not
    match tokio::time::timeout(timeout + Duration::from_secs(2), result).await {
        Err(_) => timed_out(),
        Ok(Ok((_, _, 0))) => Outcome::Success,
        Ok(Ok((out, err, _))) => {
            let text = [out, err].concat();
            Outcome::Failure(String::from_utf8_lossy(&text[..text.len().min(OUTPUT_BYTES)]).into_owned())
        }
        Ok(Err(error)) => {
            let text = error.to_string();
            if text.contains("timed out") || text.contains("timeout") {
                timed_out()
            } else {
                Outcome::Unknown(text)
            }
        }
    }
}
