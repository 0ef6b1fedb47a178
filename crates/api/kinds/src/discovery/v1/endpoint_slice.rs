//! EndpointSlice.
//!
//! Upstream counterpart: pkg/registry/discovery/endpointslice, pkg/apis/discovery/validation.
use std::collections::BTreeSet;

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointHints, EndpointPort};
use serde_json::Value;

use crate::apps::v1::workload::immutable;
use crate::field::{ErrorList, FieldError, Path};
use crate::ip::{ip_warnings, parse_ip, validate_canonical_ip, validate_endpoint_ip, validate_ip};
use crate::kind::{Column, Kind, Rest};
use crate::meta::{validate_label_name, validate_labels};
use crate::names;
use crate::object::{
    bump_generation, default_absent, integer, items, items_mut, or_empty, read, remove, same, same_in,
    set_generation, text,
};
use crate::table;

const ADDRESS_TYPES: &[&str] = &["FQDN", "IPv4", "IPv6"];
const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
const ENDPOINTS_MAX: usize = 1000;
const PORTS_MAX: usize = 20_000;
const ADDRESSES_MAX: usize = 100;
const TOPOLOGY_MAX: usize = 16;
const HINTS_MAX: usize = 8;
/// Where versions before v1 kept the node's name.
const HOSTNAME_LABEL: &str = "kubernetes.io/hostname";

fn validate(object: &Value, old: Option<&Value>) -> ErrorList {
    let mut errors = ErrorList::new();
    let kind = text(object, "/addressType");
    if kind.is_empty() {
        errors.push(FieldError::required(&Path::new("addressType"), ""));
    } else if !ADDRESS_TYPES.contains(&kind) {
        errors.push(FieldError::not_supported(&Path::new("addressType"), kind, ADDRESS_TYPES));
    }
    validate_ports(object, &Path::new("ports"), &mut errors);
    let mut wrong = ErrorList::new();
    validate_endpoints(object, kind, &Path::new("endpoints"), &mut wrong);
    // What an older release accepted stays, as long as it isn't touched.
    if !wrong.is_empty() && !old.is_some_and(|old| same_in(object, old, "/endpoints")) {
        errors.extend(wrong);
    }
    errors
}

fn validate_ports(object: &Value, path: &Path, errors: &mut ErrorList) {
    let ports = items(object, "/ports");
    if ports.len() > PORTS_MAX {
        return errors.push(FieldError::too_many(path, ports.len(), PORTS_MAX));
    }
    let mut seen = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let at = path.index(i);
        let port: EndpointPort = match read(Some(port), &at) {
            Ok(port) => port,
            Err(error) => return errors.push(error),
        };
        let name = or_empty(&port.name);
        if !name.is_empty() {
            errors.extend(FieldError::invalid_each(&at.child("name"), name, names::dns1123_label(name)));
        }
        if !seen.insert(name.to_string()) {
            errors.push(FieldError::duplicate(&at.child("name"), name));
        }
        match port.protocol.as_deref() {
            None => errors.push(FieldError::required(&at.child("protocol"), "")),
            Some(protocol) if !PROTOCOLS.contains(&protocol) => {
                errors.push(FieldError::not_supported(&at.child("protocol"), protocol, PROTOCOLS));
            }
            Some(_) => {}
        }
        if let Some(protocol) = &port.app_protocol {
            errors.extend(validate_label_name(protocol, &at.child("appProtocol")));
        }
    }
}

fn validate_endpoints(object: &Value, kind: &str, path: &Path, errors: &mut ErrorList) {
    let endpoints = items(object, "/endpoints");
    if endpoints.len() > ENDPOINTS_MAX {
        return errors.push(FieldError::too_many(path, endpoints.len(), ENDPOINTS_MAX));
    }
    for (i, endpoint) in endpoints.iter().enumerate() {
        let at = path.index(i);
        let endpoint: Endpoint = match read(Some(endpoint), &at) {
            Ok(endpoint) => endpoint,
            Err(error) => return errors.push(error),
        };
        validate_addresses(&endpoint.addresses, kind, &at.child("addresses"), errors);
        if let Some(node) = &endpoint.node_name {
            errors.extend(FieldError::invalid_each(
                &at.child("nodeName"),
                node,
                names::dns1123_subdomain(node),
            ));
        }
        let topology = endpoint.deprecated_topology.as_ref();
        let topology_at = at.child("deprecatedTopology");
        if let Some(count) = topology.map(|t| t.len()).filter(|count| *count > TOPOLOGY_MAX) {
            errors.push(FieldError::too_many(&topology_at, count, TOPOLOGY_MAX));
        }
        errors.extend(validate_labels(topology, &topology_at));
        if let Some(host) = &endpoint.hostname {
            errors.extend(FieldError::invalid_each(&at.child("hostname"), host, names::dns1123_label(host)));
        }
        if let Some(hints) = &endpoint.hints {
            validate_hints(hints, &at.child("hints"), errors);
        }
    }
}

fn validate_addresses(addresses: &[String], kind: &str, path: &Path, errors: &mut ErrorList) {
    if addresses.is_empty() {
        errors.push(FieldError::required(path, "must contain at least 1 address"));
    } else if addresses.len() > ADDRESSES_MAX {
        errors.push(FieldError::too_many(path, addresses.len(), ADDRESSES_MAX));
    }
    for (i, address) in addresses.iter().enumerate() {
        let at = path.index(i);
        let wrong = match kind {
            "IPv4" => validate_ip(&at, address, &[]),
            "IPv6" => validate_canonical_ip(&at, address),
            "FQDN" => validate_fqdn(address, &at),
            _ => continue,
        };
        if kind == "FQDN" || !wrong.is_empty() {
            errors.extend(wrong);
            continue;
        }
        if parse_ip(address).is_some_and(|ip| ip.is_ipv4() != (kind == "IPv4")) {
            let article = format!("must be an {kind} address");
            errors.push(FieldError::invalid(path, address.as_str(), article));
        }
        errors.extend(validate_endpoint_ip(address, &at));
    }
}

/// A domain's whole name: two labels at least.
fn validate_fqdn(name: &str, path: &Path) -> ErrorList {
    if name.is_empty() {
        return vec![FieldError::required(path, "")];
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    let messages = names::dns1123_subdomain(name);
    if !messages.is_empty() {
        return vec![FieldError::invalid(path, name, messages.join(","))];
    }
    if !name.contains('.') {
        let detail = "should be a domain with at least two segments separated by dots";
        return vec![FieldError::invalid(path, name, detail)];
    }
    let wrong = name.split('.').find_map(|label| {
        let messages = names::dns1123_label(label);
        (!messages.is_empty()).then(|| FieldError::invalid(path, label, messages.join(",")))
    });
    wrong.into_iter().collect()
}

/// What is wrong with a text.
type Check = fn(&str) -> Vec<String>;

fn validate_hints(hints: &EndpointHints, path: &Path, errors: &mut ErrorList) {
    let zones: Vec<&str> = hints.for_zones.iter().flatten().map(|z| z.name.as_str()).collect();
    let nodes: Vec<&str> = hints.for_nodes.iter().flatten().map(|n| n.name.as_str()).collect();
    let zone: Check = names::label_value;
    let checks = [("forZones", zones, zone), ("forNodes", nodes, names::dns1123_subdomain)];
    for (key, values, check) in checks {
        let at = path.child(key);
        if values.len() > HINTS_MAX {
            return errors.push(FieldError::too_many(&at, values.len(), HINTS_MAX));
        }
        let mut seen = BTreeSet::new();
        for (i, value) in values.into_iter().enumerate() {
            let at = at.index(i).child("name");
            if !seen.insert(value) {
                errors.push(FieldError::duplicate(&at, value));
            }
            errors.extend(FieldError::invalid_each(&at, value, check(value)));
        }
    }
}

/// v1 has no topology to write; a node's name that only stood there moves to its own field.
fn drop_topology(new: &mut Value, old: Option<&Value>) {
    if old.is_some_and(|old| same_in(new, old, "/endpoints")) {
        return;
    }
    let node = |endpoint: &Value| {
        let topology = endpoint.get("deprecatedTopology")?;
        topology.get(HOSTNAME_LABEL)?.as_str().filter(|n| !n.is_empty()).map(str::to_string)
    };
    let known: BTreeSet<String> =
        old.map(|old| items(old, "/endpoints").iter().filter_map(node).collect()).unwrap_or_default();
    for endpoint in items_mut(new, "/endpoints") {
        if let Some(node) =
            node(endpoint).filter(|n| known.contains(n) && names::dns1123_subdomain(n).is_empty())
        {
            default_absent(endpoint, "nodeName", node);
        }
        remove(endpoint, "deprecatedTopology");
    }
}

fn warnings(new: &Value, old: Option<&Value>) -> Vec<String> {
    let mut out = Vec::new();
    if old.is_none() && text(new, "/addressType") == "FQDN" {
        out.push("spec.addressType: FQDN endpoints are deprecated".to_string());
    }
    let labels = new.pointer("/metadata/labels");
    let manager =
        labels.and_then(|l| l.get("endpointslice.kubernetes.io/managed-by")).and_then(Value::as_str);
    let ours = ["endpointslice-controller.k8s.io", "endpointslicemirroring-controller.k8s.io"];
    if manager.is_some_and(|m| ours.contains(&m)) {
        return out;
    }
    for (i, endpoint) in items(new, "/endpoints").iter().enumerate() {
        for (j, address) in items(endpoint, "/addresses").iter().enumerate() {
            let at = Path::new("endpoints").index(i).child("addresses").index(j);
            out.extend(ip_warnings(&at, address.as_str().unwrap_or_default()));
        }
    }
    out
}

/// The first three, and how many more there are.
fn some(all: &[String]) -> String {
    match all.len() {
        0 => "<unset>".to_string(),
        1..=3 => all.join(","),
        more => format!("{} + {} more...", all[..3].join(","), more - 3),
    }
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let port = |port: &Value| match port.get("port").and_then(Value::as_i64) {
        Some(_) => integer(port, "/port").to_string(),
        None => port.get("name").and_then(Value::as_str).unwrap_or("*").to_string(),
    };
    let ports: Vec<String> = items(object, "/ports").iter().map(port).collect();
    let addresses = items(object, "/endpoints").iter().flat_map(|e| items(e, "/addresses"));
    let addresses: Vec<String> = addresses.filter_map(Value::as_str).map(str::to_string).collect();
    vec![
        table::name(object),
        text(object, "/addressType").into(),
        some(&ports).into(),
        some(&addresses).into(),
        table::age(object, now),
    ]
}

pub const KIND: Kind = Kind {
    defaults: |object| {
        for port in items_mut(object, "/ports") {
            default_absent(port, "name", "");
            default_absent(port, "protocol", "TCP");
        }
    },
    rest: Rest {
        prepare_create: |object| {
            set_generation(object, 1);
            drop_topology(object, None);
        },
        prepare_update: |new, old| {
            let part = |key: &str| same(new.get(key), old.get(key));
            let changed = !["addressType", "endpoints", "ports"].iter().all(|key| part(key))
                || !same_in(new, old, "/metadata/labels");
            bump_generation(new, old, changed);
            drop_topology(new, Some(old));
        },
        validate: |object| validate(object, None),
        validate_update: |new, old| {
            let mut errors = validate(new, Some(old));
            immutable(new, old, "/addressType", &Path::new("addressType"), &mut errors);
            errors
        },
        warnings,
    },
    columns: &[
        Column::NAME,
        Column::string("AddressType", "What kind of addresses it holds."),
        Column::string("Ports", "The ports of each endpoint."),
        Column::string("Endpoints", "The addresses of the endpoints."),
        Column::AGE,
    ],
    row,
    ..Kind::plain("discovery.k8s.io", "v1", "EndpointSlice")
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules() {
        let slice = |kind: &str, addresses: Value| json!({"addressType": kind, "endpoints": [{"addresses": addresses}]});
        let cases: Vec<(Value, &[&str])> = vec![
            (slice("IPv4", json!(["10.0.0.1"])), &[]),
            (slice("IPv6", json!(["fd00::1"])), &[]),
            (slice("FQDN", json!(["a.example"])), &[]),
            (
                slice("IPv4", json!(["fd00::1"])),
                &["endpoints[0].addresses: Invalid value: \"fd00::1\": must be an IPv4 address"],
            ),
            (
                slice("IPv4", json!([])),
                &["endpoints[0].addresses: Required value: must contain at least 1 address"],
            ),
            (
                slice("FQDN", json!(["host"])),
                &[
                    "endpoints[0].addresses[0]: Invalid value: \"host\": should be a domain with at least two segments separated by dots",
                ],
            ),
            (
                json!({"addressType": "IPv4", "ports": [{"port": 1}, {"port": 2}]}),
                &["ports[1].name: Duplicate value: \"\""],
            ),
        ];
        for (mut object, want) in cases {
            (KIND.defaults)(&mut object);
            let errors = validate(&object, None);
            assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), want, "{object}");
        }
        let old = slice("IPv4", json!(["127.0.0.1"]));
        assert_eq!((KIND.rest.validate_update)(&old, &old), Vec::new());
    }

    #[test]
    fn cells_name_three() {
        let object = json!({"endpoints": [{"addresses": ["a", "b"]}, {"addresses": ["c", "d"]}]});
        let cells = row(&object, jiff::Timestamp::UNIX_EPOCH);
        assert_eq!((&cells[2], &cells[3]), (&json!("<unset>"), &json!("a,b,c + 1 more...")));
    }
}
