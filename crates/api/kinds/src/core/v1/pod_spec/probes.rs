//! Probes and lifecycle hooks.
//!
//! Upstream counterpart: validateProbe, validateHandler and validateLifecycle in validation.go. stopSignal is not
//! checked: ContainerStopSignals is off in 1.36, so the field is dropped before.
use k8s_openapi::api::core::v1::{
    Container, ExecAction, GRPCAction, HTTPGetAction, LifecycleHandler, Probe, SleepAction, TCPSocketAction,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::Scope;
use crate::field::{ErrorList, FieldError, Path};
use crate::meta::nonnegative;
use crate::names;
use crate::object::or_empty;

/// A container's hooks and its three probes.
pub fn validate_all(container: &Container, scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    if let Some(lifecycle) = &container.lifecycle {
        let at = path.child("lifecycle");
        for (key, handler) in [("postStart", &lifecycle.post_start), ("preStop", &lifecycle.pre_stop)] {
            if let Some(handler) = handler {
                validate_handler(&Handler::of_hook(handler), scope, &at.child(key), errors);
            }
        }
    }
    let mut once = |key: &str, probe: &Option<Probe>| {
        let Some(probe) = probe else { return };
        let at = path.child(key);
        validate_probe(probe, scope, &at, errors);
        let threshold = probe.success_threshold.unwrap_or_default();
        if key != "readinessProbe" && threshold != 1 {
            errors.push(FieldError::invalid(&at.child("successThreshold"), threshold, "must be 1"));
        }
        if let Some(seconds) = probe.termination_grace_period_seconds.filter(|_| key == "readinessProbe") {
            let detail = "must not be set for readinessProbes";
            errors.push(FieldError::invalid(&at.child("terminationGracePeriodSeconds"), seconds, detail));
        }
    };
    once("livenessProbe", &container.liveness_probe);
    once("readinessProbe", &container.readiness_probe);
    once("startupProbe", &container.startup_probe);
}

fn validate_probe(probe: &Probe, scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    validate_handler(&Handler::of_probe(probe), scope, path, errors);
    for (key, value) in [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("periodSeconds", probe.period_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ] {
        nonnegative(value.unwrap_or_default().into(), &path.child(key), errors);
    }
    if let Some(seconds) = probe.termination_grace_period_seconds.filter(|s| *s <= 0) {
        let at = path.child("terminationGracePeriodSeconds");
        errors.push(FieldError::invalid(&at, seconds, "must be greater than 0"));
    }
}

/// What a probe or a hook does; exactly one is set.
struct Handler<'a> {
    exec: Option<&'a ExecAction>,
    http_get: Option<&'a HTTPGetAction>,
    tcp_socket: Option<&'a TCPSocketAction>,
    grpc: Option<&'a GRPCAction>,
    sleep: Option<&'a SleepAction>,
}

impl<'a> Handler<'a> {
    fn of_probe(probe: &'a Probe) -> Self {
        Self {
            exec: probe.exec.as_ref(),
            http_get: probe.http_get.as_ref(),
            tcp_socket: probe.tcp_socket.as_ref(),
            grpc: probe.grpc.as_ref(),
            sleep: None,
        }
    }
    fn of_hook(hook: &'a LifecycleHandler) -> Self {
        Self {
            exec: hook.exec.as_ref(),
            http_get: hook.http_get.as_ref(),
            tcp_socket: hook.tcp_socket.as_ref(),
            grpc: None,
            sleep: hook.sleep.as_ref(),
        }
    }
}

fn validate_handler(handler: &Handler<'_>, scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    let set = [
        ("exec", handler.exec.is_some()),
        ("httpGet", handler.http_get.is_some()),
        ("tcpSocket", handler.tcp_socket.is_some()),
        ("grpc", handler.grpc.is_some()),
        ("sleep", handler.sleep.is_some()),
    ];
    let mut set = set.iter().filter(|(_, set)| *set).map(|(key, _)| *key);
    let Some(first) = set.next() else {
        errors.push(FieldError::required(path, "must specify a handler type"));
        return;
    };
    let at = path.child(first);
    match (first, handler) {
        ("exec", Handler { exec: Some(exec), .. }) if exec.command.as_ref().is_none_or(Vec::is_empty) => {
            errors.push(FieldError::required(&at.child("command"), ""));
        }
        ("httpGet", Handler { http_get: Some(http), .. }) => validate_http_get(http, &at, errors),
        ("tcpSocket", Handler { tcp_socket: Some(tcp), .. }) => {
            validate_port(&tcp.port, &at.child("port"), errors);
        }
        ("grpc", Handler { grpc: Some(grpc), .. }) => {
            validate_port(&IntOrString::Int(grpc.port), &at.child("port"), errors);
        }
        ("sleep", Handler { sleep: Some(sleep), .. }) => {
            if let Some(period) = scope.grace_period().filter(|p| !(0..=*p).contains(&sleep.seconds)) {
                let detail =
                    format!("must be non-negative and less than terminationGracePeriodSeconds ({period})");
                errors.push(FieldError::invalid(&at, sleep.seconds, detail));
            }
        }
        _ => {}
    }
    for more in set {
        errors.push(FieldError::forbidden(&path.child(more), "may not specify more than 1 handler type"));
    }
}

fn validate_http_get(http: &HTTPGetAction, path: &Path, errors: &mut ErrorList) {
    if or_empty(&http.path).is_empty() {
        errors.push(FieldError::required(&path.child("path"), ""));
    }
    validate_port(&http.port, &path.child("port"), errors);
    let scheme = or_empty(&http.scheme);
    if !["HTTP", "HTTPS"].contains(&scheme) {
        errors.push(FieldError::not_supported(&path.child("scheme"), scheme, &["HTTP", "HTTPS"]));
    }
    for header in http.http_headers.iter().flatten() {
        let messages = names::http_header_name(&header.name);
        errors.extend(FieldError::invalid_each(&path.child("httpHeaders"), &header.name, messages));
    }
}

/// A port's number or name.
pub fn validate_port(port: &IntOrString, path: &Path, errors: &mut ErrorList) {
    match port {
        IntOrString::Int(number) => super::containers::port_number(*number, path, errors),
        IntOrString::String(name) => {
            errors.extend(FieldError::invalid_each(path, name, names::port_name(name)));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::check;

    #[test]
    fn probe_rules() {
        let with = |key: &str, probe: Value| json!({"containers": [{"name": "a", "image": "i", key: probe}]});
        let cases: Vec<(Value, &str)> = vec![
            (
                with("livenessProbe", json!({})),
                "spec.containers[0].livenessProbe: Required value: must specify a handler type",
            ),
            (
                with("livenessProbe", json!({"exec": {}})),
                "spec.containers[0].livenessProbe.exec.command: Required value",
            ),
            (
                with("livenessProbe", json!({"exec": {"command": ["x"]}, "tcpSocket": {"port": 1}})),
                "spec.containers[0].livenessProbe.tcpSocket: Forbidden: may not specify more than 1 handler type",
            ),
            (
                with("livenessProbe", json!({"tcpSocket": {"port": 0}})),
                "spec.containers[0].livenessProbe.tcpSocket.port: Invalid value: 0: must be between 1 and 65535, inclusive",
            ),
            (
                with("startupProbe", json!({"tcpSocket": {"port": "web"}, "successThreshold": 2})),
                "spec.containers[0].startupProbe.successThreshold: Invalid value: 2: must be 1",
            ),
            (
                with("readinessProbe", json!({"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": 3})),
                "spec.containers[0].readinessProbe.terminationGracePeriodSeconds: Invalid value: 3: must not be set for readinessProbes",
            ),
            (
                with("readinessProbe", json!({"tcpSocket": {"port": 1}, "periodSeconds": -1})),
                "spec.containers[0].readinessProbe.periodSeconds: Invalid value: -1: must be greater than or equal to 0",
            ),
            (
                with("lifecycle", json!({"preStop": {"sleep": {"seconds": 31}}})),
                "spec.containers[0].lifecycle.preStop.sleep: Invalid value: 31: must be non-negative and less than terminationGracePeriodSeconds (30)",
            ),
        ];
        for (patch, want) in cases {
            assert_eq!(check(patch.clone(), true), [want], "{patch}");
        }
    }
}
