//! Endpoints.
//!
//! Upstream counterpart: pkg/registry/core/endpoint, ValidateEndpoints in validation.go.
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset};
use serde_json::Value;

use super::pod_spec::{containers::port_number, one_of};
use crate::field::{ErrorList, FieldError, Path};
use crate::ip::{ip_warnings, validate_endpoint_ip, validate_ip};
use crate::kind::{Column, Kind, Rest};
use crate::meta::validate_label_name;
use crate::names;
use crate::object::{default_zero, integer, items, items_mut, or_empty, read, same_in, text};
use crate::table;

fn validate(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    for (i, subset) in items(object, "/subsets").iter().enumerate() {
        let at = Path::new("subsets").index(i);
        match read::<EndpointSubset>(Some(subset), &at) {
            Ok(subset) => validate_subset(&subset, &at, &mut errors),
            Err(error) => errors.push(error),
        }
    }
    errors
}

fn validate_subset(subset: &EndpointSubset, path: &Path, errors: &mut ErrorList) {
    let ready = subset.addresses.as_deref().unwrap_or_default();
    let not_ready = subset.not_ready_addresses.as_deref().unwrap_or_default();
    if ready.is_empty() && not_ready.is_empty() {
        errors.push(FieldError::required(path, "must specify `addresses` or `notReadyAddresses`"));
    }
    for (key, addresses) in [("addresses", ready), ("notReadyAddresses", not_ready)] {
        for (i, address) in addresses.iter().enumerate() {
            validate_address(address, &path.child(key).index(i), errors);
        }
    }
    let ports = subset.ports.as_deref().unwrap_or_default();
    for (i, port) in ports.iter().enumerate() {
        validate_port(port, ports.len() > 1, &path.child("ports").index(i), errors);
    }
}

fn validate_address(address: &EndpointAddress, path: &Path, errors: &mut ErrorList) {
    let at = path.child("ip");
    errors.extend(validate_ip(&at, &address.ip, &[]));
    let host = or_empty(&address.hostname);
    if !host.is_empty() {
        errors.extend(FieldError::invalid_each(&path.child("hostname"), host, names::dns1123_label(host)));
    }
    if let Some(node) = &address.node_name {
        errors.extend(FieldError::invalid_each(
            &path.child("nodeName"),
            node,
            names::dns1123_subdomain(node),
        ));
    }
    errors.extend(validate_endpoint_ip(&address.ip, &at));
}

fn validate_port(port: &EndpointPort, require_name: bool, path: &Path, errors: &mut ErrorList) {
    let (name, at) = (or_empty(&port.name), path.child("name"));
    if !name.is_empty() {
        errors.extend(FieldError::invalid_each(&at, name, names::dns1123_label(name)));
    } else if require_name {
        errors.push(FieldError::required(&at, ""));
    }
    port_number(port.port, &path.child("port"), errors);
    one_of(or_empty(&port.protocol), &["SCTP", "TCP", "UDP"], &path.child("protocol"), errors);
    if let Some(protocol) = &port.app_protocol {
        errors.extend(validate_label_name(protocol, &path.child("appProtocol")));
    }
}

fn warnings(new: &Value, _: Option<&Value>) -> Vec<String> {
    let mut out = Vec::new();
    for (i, subset) in items(new, "/subsets").iter().enumerate() {
        for key in ["addresses", "notReadyAddresses"] {
            for (j, address) in items(subset, &format!("/{key}")).iter().enumerate() {
                let at = Path::new("subsets").index(i).child(key).index(j).child("ip");
                out.extend(ip_warnings(&at, text(address, "/ip")));
            }
        }
    }
    out
}

/// The first three addresses with their ports, and how many more there are.
fn cell(object: &Value) -> String {
    let (mut shown, mut total) = (Vec::new(), 0);
    for subset in items(object, "/subsets") {
        let ips: Vec<&str> = items(subset, "/addresses").iter().map(|a| text(a, "/ip")).collect();
        let ports = items(subset, "/ports");
        let suffixes: Vec<String> = match ports.is_empty() {
            true => vec![String::new()],
            false => ports.iter().map(|p| format!(":{}", integer(p, "/port"))).collect(),
        };
        for suffix in suffixes {
            total += ips.len();
            for ip in ips.iter().take(3 - shown.len()) {
                let bracketed = ip.contains(':') && !suffix.is_empty();
                shown.push(if bracketed { format!("[{ip}]{suffix}") } else { format!("{ip}{suffix}") });
            }
        }
    }
    match (items(object, "/subsets").is_empty(), total > shown.len()) {
        (true, _) => "<none>".to_string(),
        (_, true) => format!("{} + {} more...", shown.join(","), total - shown.len()),
        (_, false) => shown.join(","),
    }
}

pub const KIND: Kind = Kind {
    defaults: |object| {
        for port in items_mut(object, "/subsets").iter_mut().flat_map(|s| items_mut(s, "/ports")) {
            default_zero(port, "protocol", "TCP");
        }
    },
    rest: Rest {
        validate,
        validate_update: |new, old| {
            if same_in(new, old, "/subsets") { ErrorList::new() } else { validate(new) }
        },
        warnings,
        ..Rest::ANY
    },
    create_on_update: true,
    columns: &[Column::NAME, Column::string("Endpoints", "The addresses behind the service."), Column::AGE],
    row: |object, now| vec![table::name(object), cell(object).into(), table::age(object, now)],
    ..Kind::plain("", "v1", "Endpoints")
};
