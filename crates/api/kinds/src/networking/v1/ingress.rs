//! Ingress.
//!
//! Upstream counterpart: pkg/registry/networking/ingress, validateIngress in pkg/apis/networking/validation. Service
//! names may be any label, which 1.36 allows by default.
use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::field::{ErrorList, FieldError, Path};
use crate::ip::{ip_warnings, parse_ip, validate_ip};
use crate::kind::{Column, Kind, Rest};
use crate::names;
use crate::object::{bump_generation, count, integer, items, keep, same_in, set_generation, text};
use crate::table;

const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";
const PATH_TYPES: &[&str] = &["Exact", "ImplementationSpecific", "Prefix"];

/// What a stored Ingress has wrong already, so that an update need not set it right.
#[derive(Clone, Copy, Default)]
struct Tolerated {
    secret_name: bool,
    wildcard_rule: bool,
}

fn tolerated(old: &Value) -> Tolerated {
    let secret = |tls: &Value| {
        let name = text(tls, "/secretName");
        !name.is_empty() && !names::dns1123_subdomain(name).is_empty()
    };
    let wildcard = |rule: &Value| {
        let mut errors = ErrorList::new();
        validate_paths(rule, &Path::default(), &mut errors);
        text(rule, "/host").contains('*') && !errors.is_empty()
    };
    Tolerated {
        secret_name: items(old, "/spec/tls").iter().any(secret),
        wildcard_rule: items(old, "/spec/rules").iter().any(wildcard),
    }
}

fn host(host: &str, path: &Path, errors: &mut ErrorList) {
    let messages = match host.contains('*') {
        true => names::wildcard_dns1123_subdomain(host),
        false => names::dns1123_subdomain(host),
    };
    errors.extend(FieldError::invalid_each(path, host, messages));
}

fn validate(object: &Value, tolerated: Tolerated) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let backend = object.pointer("/spec/defaultBackend").filter(|b| !b.is_null());
    let rules = items(object, "/spec/rules");
    if rules.is_empty() && backend.is_none() {
        let detail = "either `defaultBackend` or `rules` must be specified";
        errors.push(FieldError::invalid(&path, Value::Null, detail));
    }
    if let Some(backend) = backend {
        validate_backend(backend, &path.child("defaultBackend"), &mut errors);
    }
    for (i, rule) in rules.iter().enumerate() {
        let (at, name) = (path.child("rules").index(i), text(rule, "/host"));
        if !name.is_empty() {
            if parse_ip(name).is_some() {
                let detail = "must be a DNS name, not an IP address";
                errors.push(FieldError::invalid(&at.child("host"), name, detail));
            }
            host(name, &at.child("host"), &mut errors);
        }
        if !(name.contains('*') && tolerated.wildcard_rule) {
            validate_paths(rule, &at, &mut errors);
        }
    }
    for (i, tls) in items(object, "/spec/tls").iter().enumerate() {
        let at = path.child("tls").index(i);
        for (j, name) in items(tls, "/hosts").iter().filter_map(Value::as_str).enumerate() {
            host(name, &at.child("hosts").index(j), &mut errors);
        }
        let secret = text(tls, "/secretName");
        if !secret.is_empty() && !tolerated.secret_name {
            let messages = names::dns1123_subdomain(secret);
            errors.extend(FieldError::invalid_each(&at.child("secretName"), secret, messages));
        }
    }
    if let Some(class) = object.pointer("/spec/ingressClassName").and_then(Value::as_str) {
        let at = path.child("ingressClassName");
        errors.extend(FieldError::invalid_each(&at, class, names::dns1123_subdomain(class)));
    }
    errors
}

fn validate_create(object: &Value) -> ErrorList {
    let mut errors = validate(object, Tolerated::default());
    let annotation = object.pointer("/metadata/annotations").and_then(|a| a.get(CLASS_ANNOTATION)?.as_str());
    let class = object.pointer("/spec/ingressClassName").and_then(Value::as_str);
    if let (Some(annotation), Some(class)) = (annotation, class)
        && annotation != class
    {
        let at = Path::new("annotations").child(CLASS_ANNOTATION);
        let detail = "must match `ingressClassName` when both are specified";
        errors.push(FieldError::invalid(&at, annotation, detail));
    }
    errors
}

fn validate_paths(rule: &Value, path: &Path, errors: &mut ErrorList) {
    if rule.get("http").is_none_or(Value::is_null) {
        return;
    }
    let at = path.child("http").child("paths");
    let paths = items(rule, "/http/paths");
    if paths.is_empty() {
        errors.push(FieldError::required(&at, ""));
    }
    for (i, entry) in paths.iter().enumerate() {
        validate_path(entry, &at.index(i), errors);
    }
}

fn validate_path(entry: &Value, path: &Path, errors: &mut ErrorList) {
    let (at, value) = (path.child("path"), text(entry, "/path"));
    let Some(kind) = entry.get("pathType").and_then(Value::as_str) else {
        return errors.push(FieldError::required(&path.child("pathType"), "pathType must be specified"));
    };
    let mut refuse = |detail: String| errors.push(FieldError::invalid(&at, value, detail));
    match kind {
        "Exact" | "Prefix" => {
            if !value.starts_with('/') {
                refuse("must be an absolute path".to_string());
            }
            for part in ["//", "/./", "/../", "%2f", "%2F"].iter().filter(|part| value.contains(**part)) {
                refuse(format!("must not contain '{part}'"));
            }
            for end in ["/..", "/."].iter().filter(|end| value.ends_with(**end)) {
                refuse(format!("cannot end with '{end}'"));
            }
        }
        "ImplementationSpecific" => {
            if !value.is_empty() && !value.starts_with('/') {
                refuse("must be an absolute path".to_string());
            }
        }
        other => errors.push(FieldError::not_supported(&path.child("pathType"), other, PATH_TYPES)),
    }
    let empty = json!({});
    validate_backend(entry.get("backend").unwrap_or(&empty), &path.child("backend"), errors);
}

fn validate_backend(backend: &Value, path: &Path, errors: &mut ErrorList) {
    let part = |key: &str| backend.get(key).filter(|v| !v.is_null());
    match (part("resource"), part("service")) {
        (Some(_), Some(_)) => {
            errors.push(FieldError::invalid(path, "", "cannot set both resource and service backends"));
        }
        (Some(resource), None) => validate_typed_reference(resource, &path.child("resource"), errors),
        (None, Some(service)) => {
            let (at, name) = (path.child("service"), text(service, "/name"));
            match name {
                "" => errors.push(FieldError::required(&at.child("name"), "")),
                _ => {
                    let messages = names::dns1123_label(name);
                    errors.extend(FieldError::invalid_each(&at.child("name"), name, messages));
                }
            }
            let (at, port) = (at.child("port"), text(service, "/port/name"));
            match (port.is_empty(), integer(service, "/port/number")) {
                (true, 0) => errors.push(FieldError::required(path, "port name or number is required")),
                (true, number) => {
                    for message in names::port_num(number) {
                        errors.push(FieldError::invalid(&at.child("number"), number, message));
                    }
                }
                (false, 0) => {
                    errors.extend(FieldError::invalid_each(&at.child("name"), port, names::port_name(port)));
                }
                (false, _) => {
                    errors.push(FieldError::invalid(path, "", "cannot set both port name & port number"));
                }
            }
        }
        (None, None) => {
            errors.push(FieldError::invalid(path, "", "resource or service backend is required"));
        }
    }
}

/// A reference to an object of any kind in the same namespace.
pub fn validate_typed_reference(reference: &Value, path: &Path, errors: &mut ErrorList) {
    if let Some(group) = reference.get("apiGroup").and_then(Value::as_str) {
        let messages = names::dns1123_subdomain(group);
        errors.extend(FieldError::invalid_each(&path.child("apiGroup"), group, messages));
    }
    for key in ["kind", "name"] {
        let value = text(reference, &format!("/{key}"));
        match value {
            "" => errors.push(FieldError::required(&path.child(key), "")),
            _ => {
                let messages = names::path_segment(value, false);
                errors.extend(FieldError::invalid_each(&path.child(key), value, messages));
            }
        }
    }
}

fn addresses(object: &Value, key: &str) -> Vec<String> {
    let entries = items(object, "/status/loadBalancer/ingress").iter();
    entries.map(|entry| text(entry, &format!("/{key}")).to_string()).collect()
}

fn validate_status(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let path = Path::new("status").child("loadBalancer").child("ingress");
    let stored = addresses(old, "ip");
    for (i, ip) in addresses(new, "ip").iter().enumerate().filter(|(_, ip)| !ip.is_empty()) {
        errors.extend(validate_ip(&path.index(i).child("ip"), ip, &stored));
    }
    for (i, name) in addresses(new, "hostname").iter().enumerate().filter(|(_, name)| !name.is_empty()) {
        let at = path.index(i).child("hostname");
        errors.extend(FieldError::invalid_each(&at, name, names::dns1123_subdomain(name)));
        if parse_ip(name).is_some() {
            let detail = "must be a DNS name, not an IP address";
            errors.push(FieldError::invalid(&at, name.as_str(), detail));
        }
    }
    errors
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let rules = items(object, "/spec/rules");
    let named: Vec<&str> = rules.iter().map(|r| text(r, "/host")).filter(|h| !h.is_empty()).collect();
    let hosts = match named.len() {
        0 => "*".to_string(),
        1..=3 => named.join(","),
        _ => format!("{} + {} more...", named[..3].join(","), rules.len() - 3),
    };
    let balancers: BTreeSet<&str> = items(object, "/status/loadBalancer/ingress")
        .iter()
        .map(|entry| match text(entry, "/ip") {
            "" => text(entry, "/hostname"),
            ip => ip,
        })
        .filter(|address| !address.is_empty())
        .collect();
    let balancers: Vec<&str> = balancers.into_iter().collect();
    vec![
        table::name(object),
        table::or_none(text(object, "/spec/ingressClassName")),
        hosts.into(),
        balancers.join(",").into(),
        if count(object, "/spec/tls") > 0 { "80, 443" } else { "80" }.into(),
        table::age(object, now),
    ]
}

pub const KIND: Kind = Kind {
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({"loadBalancer": {}});
            set_generation(object, 1);
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            bump_generation(new, old, !same_in(new, old, "/spec"));
        },
        validate: validate_create,
        validate_update: |new, old| validate(new, tolerated(old)),
        warnings: |new, old| {
            let annotated =
                new.pointer("/metadata/annotations").is_some_and(|a| a.get(CLASS_ANNOTATION).is_some());
            let classless = new.pointer("/spec/ingressClassName").is_none_or(Value::is_null);
            let warning = format!(
                "annotation \"{CLASS_ANNOTATION}\" is deprecated, please use 'spec.ingressClassName' instead"
            );
            if old.is_none() && annotated && classless { vec![warning] } else { Vec::new() }
        },
    },
    status: Some(Rest {
        prepare_update: |new, old| keep(new, old, "spec"),
        validate_update: validate_status,
        warnings: |new, _| {
            let path = Path::new("status").child("loadBalancer").child("ingress");
            let ips = addresses(new, "ip");
            ips.iter().enumerate().filter_map(|(i, ip)| ip_warnings(&path.index(i), ip)).collect()
        },
        ..Rest::ANY
    }),
    columns: &[
        Column::NAME,
        Column::string(
            "Class",
            "The name of the IngressClass resource that should be used for additional configuration",
        ),
        Column::string("Hosts", "Hosts that incoming requests are matched against before the ingress rule"),
        Column::string("Address", "Address is a list containing ingress points for the load-balancer"),
        Column::string("Ports", "Ports of TLS configurations that open"),
        Column::AGE,
    ],
    row,
    ..Kind::plain("networking.k8s.io", "v1", "Ingress")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        let texts = |spec: Value| -> Vec<String> {
            validate_create(&json!({"spec": spec})).iter().map(ToString::to_string).collect()
        };
        let service = json!({"service": {"name": "s", "port": {"number": 80}}});
        let path = |kind: &str, path: &str| {
            let entry = json!({"pathType": kind, "path": path, "backend": service});
            json!({"rules": [{"host": "*.a.example", "http": {"paths": [entry]}}]})
        };
        assert_eq!(texts(path("Prefix", "/a")), Vec::<String>::new());
        assert_eq!(
            texts(path("Exact", "/a//..")),
            [
                "spec.rules[0].http.paths[0].path: Invalid value: \"/a//..\": must not contain '//'",
                "spec.rules[0].http.paths[0].path: Invalid value: \"/a//..\": cannot end with '/..'",
            ]
        );
        assert_eq!(
            texts(json!({"defaultBackend": {"service": {"name": "s"}}, "rules": [{"host": "10.0.0.1"}]})),
            [
                "spec.defaultBackend: Required value: port name or number is required",
                "spec.rules[0].host: Invalid value: \"10.0.0.1\": must be a DNS name, not an IP address",
            ]
        );
    }
}
