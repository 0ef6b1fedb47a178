//! NetworkPolicy.
//!
//! Upstream counterpart: pkg/registry/networking/networkpolicy, ValidateNetworkPolicySpec in pkg/apis/networking.
use serde_json::{Value, json};

use crate::field::{ErrorList, FieldError, Path};
use crate::ip::{cidr_warnings, masked, parse_cidr, validate_cidr};
use crate::kind::{Column, Kind, Rest};
use crate::label_selector::cell;
use crate::meta::validate_label_selector;
use crate::names;
use crate::object::{
    bump_generation, child, count, default_absent, items, items_mut, read, same_in, set_generation, text,
};
use crate::table;

/// The two directions: a rule's list, and what it calls its peers.
const DIRECTIONS: [(&str, &str); 2] = [("ingress", "from"), ("egress", "to")];
const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    if count(spec, "/policyTypes") == 0 {
        let both = count(spec, "/egress") > 0;
        spec["policyTypes"] = if both { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
    }
    for (list, _) in DIRECTIONS {
        for rule in items_mut(spec, &format!("/{list}")) {
            items_mut(rule, "/ports").iter_mut().for_each(|port| default_absent(port, "protocol", "TCP"));
        }
    }
}

/// Every peer with its path.
fn peers(object: &Value) -> Vec<(Path, &Value)> {
    let mut found = Vec::new();
    for (list, key) in DIRECTIONS {
        for (i, rule) in items(object, &format!("/spec/{list}")).iter().enumerate() {
            let at = Path::new("spec").child(list).index(i).child(key);
            let peers = items(rule, &format!("/{key}")).iter().enumerate();
            found.extend(peers.map(|(j, peer)| (at.index(j), peer)));
        }
    }
    found
}

/// Every CIDR of a peer with its path.
fn cidrs(peer: &Value, path: &Path) -> Vec<(Path, String)> {
    let at = path.child("ipBlock");
    let mut found = vec![(at.child("cidr"), text(peer, "/ipBlock/cidr").to_string())];
    let except = items(peer, "/ipBlock/except").iter().filter_map(Value::as_str).enumerate();
    found.extend(except.map(|(i, cidr)| (at.child("except").index(i), cidr.to_string())));
    found.retain(|(_, cidr)| !cidr.is_empty());
    found
}

fn validate_selector(selector: Option<&Value>, path: &Path, errors: &mut ErrorList) {
    match read(selector, path) {
        Ok(selector) => errors.extend(validate_label_selector(Some(&selector), path)),
        Err(error) => errors.push(error),
    }
}

fn validate(object: &Value, old: Option<&Value>) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let stored: Vec<String> = old
        .map(|old| peers(old).iter().flat_map(|(at, peer)| cidrs(peer, at)).map(|(_, cidr)| cidr).collect())
        .unwrap_or_default();
    validate_selector(object.pointer("/spec/podSelector"), &path.child("podSelector"), &mut errors);
    for (list, _) in DIRECTIONS {
        for (i, rule) in items(object, &format!("/spec/{list}")).iter().enumerate() {
            for (j, port) in items(rule, "/ports").iter().enumerate() {
                let at = path.child(list).index(i).child("ports").index(j);
                validate_port(port, &at, &mut errors);
            }
        }
    }
    peers(object).iter().for_each(|(at, peer)| validate_peer(peer, &stored, at, &mut errors));
    let (at, types) = (path.child("policyTypes"), items(object, "/spec/policyTypes"));
    if types.len() > 2 {
        errors.push(FieldError::invalid(&at, types.to_vec(), "may not specify more than two policyTypes"));
        return errors;
    }
    for (i, kind) in types.iter().filter_map(Value::as_str).enumerate() {
        if !["Ingress", "Egress"].contains(&kind) {
            errors.push(FieldError::not_supported(&at.index(i), kind, &["Ingress", "Egress"]));
        }
    }
    errors
}

fn validate_port(port: &Value, path: &Path, errors: &mut ErrorList) {
    let protocol = port.get("protocol").and_then(Value::as_str);
    if let Some(protocol) = protocol.filter(|p| !PROTOCOLS.contains(p)) {
        errors.push(FieldError::not_supported(&path.child("protocol"), protocol, PROTOCOLS));
    }
    let (at, end_at) = (path.child("port"), path.child("endPort"));
    let end = port.get("endPort").and_then(Value::as_i64);
    let mut refuse_end = |detail: &str| {
        if let Some(end) = end {
            errors.push(FieldError::invalid(&end_at, end, detail));
        }
    };
    match port.get("port") {
        Some(Value::Number(number)) => {
            let number = number.as_i64().unwrap_or_default();
            if end.is_some_and(|end| end < number) {
                let detail = "must be greater than or equal to `port`";
                errors.push(FieldError::invalid(&end_at, number, detail));
            }
            for (at, number) in [(&at, Some(number)), (&end_at, end)] {
                for message in number.map(names::port_num).unwrap_or_default() {
                    errors.push(FieldError::invalid(at, number.unwrap_or_default(), message));
                }
            }
        }
        Some(Value::String(name)) => {
            refuse_end("may not be specified when `port` is non-numeric");
            errors.extend(FieldError::invalid_each(&at, name, names::port_name(name)));
        }
        _ => refuse_end("may not be specified when `port` is not specified"),
    }
}

fn validate_peer(peer: &Value, stored: &[String], path: &Path, errors: &mut ErrorList) {
    let has = |key: &str| peer.get(key).is_some_and(|v| !v.is_null());
    let selectors: Vec<&str> =
        ["podSelector", "namespaceSelector"].into_iter().filter(|key| has(key)).collect();
    selectors.iter().for_each(|key| validate_selector(peer.get(key), &path.child(key), errors));
    match (has("ipBlock"), selectors.is_empty()) {
        (false, true) => errors.push(FieldError::required(path, "must specify a peer")),
        (true, empty) => {
            validate_ip_block(peer, stored, path, errors);
            if !empty {
                errors.push(FieldError::forbidden(path, "may not specify both ipBlock and another peer"));
            }
        }
        (false, false) => {}
    }
}

fn validate_ip_block(peer: &Value, stored: &[String], path: &Path, errors: &mut ErrorList) {
    let whole = text(peer, "/ipBlock/cidr");
    if whole.is_empty() {
        return errors.push(FieldError::required(&path.child("ipBlock").child("cidr"), ""));
    }
    for (i, (at, cidr)) in cidrs(peer, path).into_iter().enumerate() {
        errors.extend(validate_cidr(&at, &cidr, stored));
        let (Some((address, bits)), Some((inner, inner_bits))) = (parse_cidr(whole), parse_cidr(&cidr))
        else {
            continue;
        };
        let inside = address.is_ipv4() == inner.is_ipv4()
            && inner_bits > bits
            && masked(inner, bits) == masked(address, bits);
        if i > 0 && !inside {
            errors.push(FieldError::invalid(&at, cidr, "must be a strict subset of `cidr`"));
        }
    }
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| set_generation(object, 1),
        prepare_update: |new, old| bump_generation(new, old, !same_in(new, old, "/spec")),
        validate: |object| validate(object, None),
        validate_update: |new, old| validate(new, Some(old)),
        warnings: |new, _| {
            let all = peers(new).into_iter().flat_map(|(at, peer)| cidrs(peer, &at));
            all.flat_map(|(at, cidr)| cidr_warnings(&at, &cidr)).collect()
        },
    },
    columns: &[Column::NAME, Column::string("Pod-Selector", "Which pods it is for."), Column::AGE],
    row: |object, now| {
        let selector = object.pointer("/spec/podSelector");
        vec![table::name(object), cell(selector), table::age(object, now)]
    },
    ..Kind::plain("networking.k8s.io", "v1", "NetworkPolicy")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        let texts = |spec: Value| -> Vec<String> {
            let mut object = json!({"spec": spec});
            defaults(&mut object);
            validate(&object, None).iter().map(ToString::to_string).collect()
        };
        let ok = json!({"podSelector": {}, "egress": [{"ports": [{"port": 1, "endPort": 2}],
            "to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]}]});
        assert_eq!(texts(ok), Vec::<String>::new());
        assert_eq!(
            texts(json!({"ingress": [{"ports": [{"port": "http", "endPort": 2}],
                "from": [{}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}, "podSelector": {}}]}]})),
            [
                "spec.ingress[0].ports[0].endPort: Invalid value: 2: may not be specified when `port` is non-numeric",
                "spec.ingress[0].from[0]: Required value: must specify a peer",
                "spec.ingress[0].from[1].ipBlock.except[0]: Invalid value: \"11.0.0.0/16\": must be a strict subset of `cidr`",
                "spec.ingress[0].from[1]: Forbidden: may not specify both ipBlock and another peer",
            ]
        );
    }
}
