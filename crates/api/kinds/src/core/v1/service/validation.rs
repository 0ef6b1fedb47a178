//! Validation of Services.
//!
//! Upstream counterpart: validateService and ValidateServiceClusterIPsRelatedFields in validation.go.
use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{LoadBalancerStatus, ServicePort, ServiceSpec};
use serde_json::Value;

use super::super::pod_spec::{containers::port_number, one_of, probes::validate_port};
use super::{externally_accessible, is_headless, needs_health_check};
use crate::field::{ErrorList, FieldError, Path};
use crate::ip::{is_dual_stack, parse_ip, validate_cidr, validate_endpoint_ip, validate_ip};
use crate::meta::{validate_label_name, validate_labels};
use crate::names;
use crate::object::{metadata, or_empty, read, text};

const ONLY_LOAD_BALANCER: &str = "may only be used when `type` is 'LoadBalancer'";
const SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
const UNCHANGED: &str = "may not change once set";

fn spec_of(object: &Value) -> Result<ServiceSpec, FieldError> {
    read(object.get("spec"), &Path::new("spec"))
}

pub(super) fn validate(object: &Value, old: Option<&Value>) -> ErrorList {
    let stored = old.map(spec_of).transpose();
    match (spec_of(object), stored) {
        (Ok(spec), Ok(stored)) => validate_spec(object, &spec, old, stored.as_ref()),
        (Err(error), _) | (_, Err(error)) => vec![error],
    }
}

/// What is wrong with the addresses that a client has asked for, before any are allocated (upstream's
/// ValidateServiceClusterIPsRelatedFields).
pub fn validate_addresses(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    match spec_of(object) {
        Ok(spec) if or_empty(&spec.type_) != "ExternalName" => {
            cluster_ips(&spec, is_headless(object), None, &Path::new("spec"), &mut errors);
        }
        Ok(_) => {}
        Err(error) => errors.push(error),
    }
    errors
}

fn validate_spec(
    object: &Value,
    spec: &ServiceSpec,
    old: Option<&Value>,
    stored: Option<&ServiceSpec>,
) -> ErrorList {
    let mut errors = ErrorList::new();
    let path = Path::new("spec");
    let kind = or_empty(&spec.type_);
    let (headless, ports) = (is_headless(object), spec.ports.as_deref().unwrap_or_default());
    annotations(object, &mut errors);
    if ports.is_empty() && !headless && kind != "ExternalName" {
        errors.push(FieldError::required(&path.child("ports"), ""));
    }
    if headless && (kind == "LoadBalancer" || kind == "NodePort") {
        let detail = format!("may not be set to 'None' for {kind} services");
        errors.push(FieldError::invalid(&path.child("clusterIPs").index(0), "None", detail));
    }
    if kind == "ExternalName" {
        external_name(spec, &path, &mut errors);
    }
    let mut taken = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        validate_service_port(port, ports.len() > 1, &mut taken, &path.child("ports").index(i), &mut errors);
    }
    errors.extend(validate_labels(spec.selector.as_ref(), &path.child("selector")));
    session_affinity(spec, &path, &mut errors);
    if kind != "ExternalName" {
        cluster_ips(spec, headless, stored, &path, &mut errors);
    }
    let known = stored.and_then(|s| s.external_ips.as_deref()).unwrap_or_default();
    for (i, ip) in spec.external_ips.iter().flatten().enumerate() {
        let at = path.child("externalIPs").index(i);
        let own = validate_ip(&at, ip, known);
        errors.extend(if own.is_empty() { validate_endpoint_ip(ip, &at) } else { own });
    }
    let kinds = &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    one_of(kind, kinds, &path.child("type"), &mut errors);
    duplicate_ports(ports, kind, &path.child("ports"), &mut errors);
    load_balancer(object, spec, old, stored, &mut errors);
    traffic(object, spec, &path, &mut errors);
    errors
}

fn annotations(object: &Value, errors: &mut ErrorList) {
    let meta = metadata(object);
    let get = |key: &str| meta.annotations.as_ref().and_then(|a| a.get(key));
    let (hints, mode) = ("service.kubernetes.io/topology-aware-hints", "service.kubernetes.io/topology-mode");
    if let (Some(old), Some(new)) = (get(hints), get(mode))
        && old != new
    {
        let detail = format!("must match annotations[{hints}] when both are specified");
        let at = Path::new("metadata").child("annotations").key(mode);
        errors.push(FieldError::invalid(&at, new.as_str(), detail));
    }
}

fn external_name(spec: &ServiceSpec, path: &Path, errors: &mut ErrorList) {
    let set = [
        ("clusterIPs", spec.cluster_ips.as_ref().is_some_and(|v| !v.is_empty())),
        ("ipFamilies", spec.ip_families.as_ref().is_some_and(|v| !v.is_empty())),
        ("ipFamilyPolicy", spec.ip_family_policy.is_some()),
    ];
    for (key, _) in set.iter().filter(|(_, set)| *set) {
        errors.push(FieldError::forbidden(&path.child(key), "may not be set for ExternalName services"));
    }
    let name = or_empty(&spec.external_name);
    let name = name.strip_suffix('.').unwrap_or(name);
    let at = path.child("externalName");
    if name.is_empty() {
        errors.push(FieldError::required(&at, ""));
    } else {
        errors.extend(FieldError::invalid_each(&at, name, names::dns1123_subdomain(name)));
    }
}

fn validate_service_port<'a>(
    port: &'a ServicePort,
    require_name: bool,
    taken: &mut BTreeSet<&'a str>,
    path: &Path,
    errors: &mut ErrorList,
) {
    let name = or_empty(&port.name);
    let at = path.child("name");
    if name.is_empty() {
        if require_name {
            errors.push(FieldError::required(&at, ""));
        }
    } else {
        errors.extend(FieldError::invalid_each(&at, name, names::dns1123_label(name)));
        if !taken.insert(name) {
            errors.push(FieldError::duplicate(&at, name));
        }
    }
    port_number(port.port, &path.child("port"), errors);
    one_of(or_empty(&port.protocol), &["SCTP", "TCP", "UDP"], &path.child("protocol"), errors);
    let target = port.target_port.clone().unwrap_or_default();
    validate_port(&target, &path.child("targetPort"), errors);
    if let Some(protocol) = &port.app_protocol {
        errors.extend(validate_label_name(protocol, &path.child("appProtocol")));
    }
}

fn duplicate_ports(ports: &[ServicePort], kind: &str, path: &Path, errors: &mut ErrorList) {
    let node_port = |port: &ServicePort| port.node_port.filter(|p| *p != 0);
    for (i, _) in ports.iter().enumerate().filter(|(_, p)| kind == "ClusterIP" && node_port(p).is_some()) {
        let detail = "may not be used when `type` is 'ClusterIP'";
        errors.push(FieldError::forbidden(&path.index(i).child("nodePort"), detail));
    }
    let mut seen = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let Some(number) = node_port(port) else { continue };
        if !seen.insert((or_empty(&port.protocol), number)) {
            errors.push(FieldError::duplicate(&path.index(i).child("nodePort"), number));
        }
    }
    let mut seen = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        if !seen.insert((or_empty(&port.protocol), port.port)) {
            let key = serde_json::json!({"port": port.port, "protocol": or_empty(&port.protocol)});
            errors.push(FieldError::duplicate(&path.index(i), key));
        }
    }
}

fn session_affinity(spec: &ServiceSpec, path: &Path, errors: &mut ErrorList) {
    let affinity = or_empty(&spec.session_affinity);
    one_of(affinity, &["ClientIP", "None"], &path.child("sessionAffinity"), errors);
    let at = path.child("sessionAffinityConfig");
    let config = spec.session_affinity_config.as_ref();
    if affinity == "None" && config.is_some() {
        errors.push(FieldError::forbidden(&at, "must not be set when session affinity is None"));
    }
    if affinity != "ClientIP" {
        return;
    }
    let client = config.and_then(|c| c.client_ip.as_ref());
    let missing = match (config, client) {
        (None, _) => at,
        (_, None) => at.child("clientIP"),
        (_, Some(client)) => {
            let at = at.child("clientIP").child("timeoutSeconds");
            match client.timeout_seconds {
                None => at,
                Some(seconds) => {
                    if !(1..=86400).contains(&seconds) {
                        let detail = "must be greater than 0 and less than 86400";
                        errors.push(FieldError::invalid(&at, seconds, detail));
                    }
                    return;
                }
            }
        }
    };
    errors.push(FieldError::required(&missing, "when session affinity type is ClientIP"));
}

fn cluster_ips(
    spec: &ServiceSpec,
    headless: bool,
    stored: Option<&ServiceSpec>,
    path: &Path,
    errors: &mut ErrorList,
) {
    let at = path.child("clusterIPs");
    let ips = spec.cluster_ips.as_deref().unwrap_or_default();
    match (or_empty(&spec.cluster_ip), ips.first()) {
        ("", Some(_)) => {
            let detail = "must be empty when `clusterIP` is not specified";
            errors.push(FieldError::invalid(&at, ips.to_vec(), detail));
        }
        ("", None) => {}
        (_, None) => errors.push(FieldError::required(&at, "")),
        (ip, Some(first)) if first != ip => {
            errors.push(FieldError::invalid(&at, ips.to_vec(), "first value must match `clusterIP`"));
        }
        _ => {}
    }
    let families = spec.ip_families.as_deref().unwrap_or_default();
    for (i, family) in families.iter().enumerate() {
        let at = path.child("ipFamilies").index(i);
        if !["IPv4", "IPv6"].contains(&family.as_str()) {
            errors.push(FieldError::not_supported(&at, family.as_str(), &["IPv4", "IPv6"]));
        }
        if families[..i].contains(family) {
            errors.push(FieldError::duplicate(&at, family.as_str()));
        }
    }
    let policies = ["PreferDualStack", "RequireDualStack", "SingleStack"];
    if let Some(policy) = spec.ip_family_policy.as_deref().filter(|p| !policies.contains(p)) {
        errors.push(FieldError::not_supported(&path.child("ipFamilyPolicy"), policy, &policies));
    }
    let known = stored.and_then(|s| s.cluster_ips.as_deref()).unwrap_or_default();
    let before = errors.len();
    for (i, ip) in ips.iter().enumerate() {
        if i == 0 && ip == "None" {
            if ips.len() > 1 {
                errors.push(FieldError::invalid(
                    &at,
                    ips.to_vec(),
                    "'None' must be the first and only value",
                ));
            }
            continue;
        }
        errors.extend(validate_ip(&at.index(i), ip, known));
    }
    let invalid = errors.len() > before;
    if ips.len() > 2 {
        errors.push(FieldError::invalid(&at, ips.to_vec(), "may only hold up to 2 values"));
    }
    if invalid {
        return;
    }
    if ips.len() > 1 && !is_dual_stack(ips.iter().map(String::as_str)) {
        let detail = "may specify no more than one IP for each IP family";
        errors.push(FieldError::invalid(&at, ips.to_vec(), detail));
    }
    for (i, (ip, family)) in ips.iter().zip(families).enumerate().filter(|_| !headless) {
        let is_v6 = parse_ip(ip).is_some_and(|ip| ip.is_ipv6());
        if (family == "IPv4" && is_v6) || (family == "IPv6" && !is_v6) {
            let detail = format!("expected an {family} value as indicated by `ipFamilies[{i}]`");
            errors.push(FieldError::invalid(&at.index(i), ip.as_str(), detail));
        }
    }
}

fn load_balancer(
    object: &Value,
    spec: &ServiceSpec,
    old: Option<&Value>,
    stored: Option<&ServiceSpec>,
    errors: &mut ErrorList,
) {
    let path = Path::new("spec");
    let is_load_balancer = or_empty(&spec.type_) == "LoadBalancer";
    let ranges = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
    let annotation = metadata(object).annotations.and_then(|mut a| a.remove(SOURCE_RANGES));
    if !ranges.is_empty() {
        let at = path.child("LoadBalancerSourceRanges");
        if !is_load_balancer {
            errors.push(FieldError::forbidden(&at, ONLY_LOAD_BALANCER));
        }
        let known: Vec<String> = stored
            .and_then(|s| s.load_balancer_source_ranges.as_ref())
            .into_iter()
            .flatten()
            .map(|r| r.trim().to_string())
            .collect();
        for (i, range) in ranges.iter().enumerate() {
            errors.extend(validate_cidr(&at.index(i), range.trim(), &known));
        }
    } else if let Some(value) = annotation {
        let at = Path::new("metadata").child("annotations").key(SOURCE_RANGES);
        if !is_load_balancer {
            errors.push(FieldError::forbidden(&at, ONLY_LOAD_BALANCER));
        }
        let before = old.and_then(|o| metadata(o).annotations).and_then(|mut a| a.remove(SOURCE_RANGES));
        if before.as_ref() != Some(&value) && !value.trim().is_empty() {
            value.split(',').for_each(|range| errors.extend(validate_cidr(&at, range.trim(), &[])));
        }
    }
    match (spec.allocate_load_balancer_node_ports, is_load_balancer) {
        (Some(_), false) => {
            errors.push(FieldError::forbidden(
                &path.child("allocateLoadBalancerNodePorts"),
                ONLY_LOAD_BALANCER,
            ));
        }
        (None, true) => errors.push(FieldError::required(&Path::new("allocateLoadBalancerNodePorts"), "")),
        _ => {}
    }
    if let Some(class) = &spec.load_balancer_class {
        let at = path.child("loadBalancerClass");
        if is_load_balancer {
            errors.extend(validate_label_name(class, &at));
        } else {
            errors.push(FieldError::forbidden(&at, ONLY_LOAD_BALANCER));
        }
    }
}

fn traffic(object: &Value, spec: &ServiceSpec, path: &Path, errors: &mut ErrorList) {
    let policy = or_empty(&spec.external_traffic_policy);
    let at = path.child("externalTrafficPolicy");
    if externally_accessible(object) {
        one_of(policy, &["Cluster", "Local"], &at, errors);
    } else if !policy.is_empty() {
        errors.push(FieldError::invalid(&at, policy, "may only be set for externally-accessible services"));
    }
    let at = path.child("healthCheckNodePort");
    match (needs_health_check(object), spec.health_check_node_port.unwrap_or_default()) {
        (false, 0) => {}
        (false, port) => {
            let detail =
                "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
            errors.push(FieldError::invalid(&at, port, detail));
        }
        (true, 0) => errors.push(FieldError::required(&at, "")),
        (true, port) => port_number(port, &at, errors),
    }
    let at = path.child("internalTrafficPolicy");
    match spec.internal_traffic_policy.as_deref() {
        None if ["NodePort", "LoadBalancer", "ClusterIP"].contains(&or_empty(&spec.type_)) => {
            errors.push(FieldError::required(&at, ""));
        }
        Some(policy) if !["Cluster", "Local"].contains(&policy) => {
            errors.push(FieldError::not_supported(&at, policy, &["Cluster", "Local"]));
        }
        _ => {}
    }
    let distributions = ["PreferClose", "PreferSameZone", "PreferSameNode"];
    if let Some(value) = spec.traffic_distribution.as_deref().filter(|d| !distributions.contains(d)) {
        let at = path.child("trafficDistribution");
        errors.push(FieldError::not_supported_as_listed(&at, value, &distributions));
    }
}

pub(super) fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let (spec, stored) = match (spec_of(new), spec_of(old)) {
        (Ok(spec), Ok(stored)) => (spec, stored),
        (Err(error), _) | (_, Err(error)) => return vec![error],
    };
    let mut errors = ErrorList::new();
    let path = Path::new("spec");
    let external = [&spec, &stored].iter().any(|s| or_empty(&s.type_) == "ExternalName");
    if !external {
        let (headless, was_headless) = (is_headless(new), is_headless(old));
        let single = spec.ip_family_policy.as_deref() == Some("SingleStack");
        if !(headless && was_headless) {
            let (new, old) = (&spec.cluster_ips, &stored.cluster_ips);
            let list = List { key: "clusterIPs", address: "clusterIP", index_each: true };
            list.check(new, old, single, &spec, &path, &mut errors);
        }
        if !headless && !was_headless {
            let (new, old) = (&spec.ip_families, &stored.ip_families);
            let list = List { key: "ipFamilies", address: "ipFamily", index_each: false };
            list.check(new, old, single, &spec, &path, &mut errors);
        }
    }
    let both_load_balancers = [&spec, &stored].iter().all(|s| or_empty(&s.type_) == "LoadBalancer");
    if both_load_balancers && spec.load_balancer_class != stored.load_balancer_class {
        let at = path.child("loadBalancerClass");
        errors.push(FieldError::invalid(&at, spec.load_balancer_class.clone(), UNCHANGED));
    }
    if needs_health_check(old)
        && needs_health_check(new)
        && spec.health_check_node_port != stored.health_check_node_port
    {
        errors.push(FieldError::forbidden(&path.child("healthCheckNodePort"), "field is immutable"));
    }
    errors.extend(validate_spec(new, &spec, Some(old), Some(&stored)));
    errors
}

/// A list whose first value stays and whose second may come and go.
struct List {
    key: &'static str,
    address: &'static str,
    index_each: bool,
}

impl List {
    fn check(
        &self,
        new: &Option<Vec<String>>,
        old: &Option<Vec<String>>,
        single: bool,
        spec: &ServiceSpec,
        path: &Path,
        errors: &mut ErrorList,
    ) {
        let (new, old) = (new.as_deref().unwrap_or_default(), old.as_deref().unwrap_or_default());
        let at = path.child(self.key);
        if new.len() == old.len() {
            for (i, _) in new.iter().zip(old).enumerate().filter(|(_, (new, old))| new != old) {
                let at = at.index(if self.index_each { i } else { 0 });
                errors.push(FieldError::invalid(&at, new.to_vec(), UNCHANGED));
            }
            return;
        }
        if let (Some(first), Some(before)) = (new.first(), old.first())
            && first != before
        {
            errors.push(FieldError::invalid(&at.index(0), new.to_vec(), UNCHANGED));
        }
        if old.len() > new.len() {
            if spec.cluster_ips.as_ref().is_none_or(Vec::is_empty) {
                let detail = format!("primary {} can not be unset", self.address);
                errors.push(FieldError::invalid(&at.index(0), new.to_vec(), detail));
            }
            if new.len() == 1 && !single {
                let detail =
                    format!("must be set to 'SingleStack' when releasing the secondary {}", self.address);
                let policy = spec.ip_family_policy.clone();
                errors.push(FieldError::invalid(&path.child("ipFamilyPolicy"), policy, detail));
            }
        }
    }
}

pub(super) fn validate_status(new: &Value, old: &Value) -> ErrorList {
    let path = Path::new("status").child("loadBalancer");
    let of = |object: &Value| read::<LoadBalancerStatus>(object.pointer("/status/loadBalancer"), &path);
    let (status, stored) = match (of(new), of(old)) {
        (Ok(status), Ok(stored)) => (status, stored),
        (Err(error), _) | (_, Err(error)) => return vec![error],
    };
    let at = path.child("ingress");
    let ingress = status.ingress.unwrap_or_default();
    if text(new, "/spec/type") != "LoadBalancer" {
        if ingress.is_empty() {
            return ErrorList::new();
        }
        return vec![FieldError::forbidden(&at, "may only be used when `spec.type` is 'LoadBalancer'")];
    }
    let known: Vec<String> = stored.ingress.into_iter().flatten().filter_map(|i| i.ip).collect();
    let mut errors = ErrorList::new();
    for (i, one) in ingress.iter().enumerate() {
        let at = at.index(i);
        let (ip, host) = (or_empty(&one.ip), or_empty(&one.hostname));
        let mode_path = at.child("ipMode");
        if !ip.is_empty() {
            errors.extend(validate_ip(&at.child("ip"), ip, &known));
        }
        match (one.ip_mode.as_deref(), ip.is_empty()) {
            (None, false) => {
                errors.push(FieldError::required(&mode_path, "must be specified when `ip` is set"));
            }
            (Some(_), true) => {
                errors.push(FieldError::forbidden(&mode_path, "may not be specified when `ip` is not set"));
            }
            (Some(mode), false) if !["Proxy", "VIP"].contains(&mode) => {
                errors.push(FieldError::not_supported(&mode_path, mode, &["Proxy", "VIP"]));
            }
            _ => {}
        }
        if !host.is_empty() {
            let at = at.child("hostname");
            errors.extend(FieldError::invalid_each(&at, host, names::dns1123_subdomain(host)));
            if parse_ip(host).is_some() {
                errors.push(FieldError::invalid(&at, host, "must be a DNS name, not an IP address"));
            }
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(patch: Value) -> Value {
        let mut service =
            json!({"spec": {"ports": [{"port": 80}], "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"]}});
        patch.as_object().unwrap().iter().for_each(|(k, v)| service["spec"][k] = v.clone());
        (super::super::KIND.defaults)(&mut service);
        service
    }

    #[test]
    fn create_and_update() {
        let cases = [
            (json!({}), None),
            (json!({"ports": []}), Some("spec.ports: Required value")),
            (
                json!({"type": "x"}),
                Some(
                    "spec.type: Unsupported value: \"x\": supported values: \"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
                ),
            ),
            (json!({"ports": [{"port": 80}, {"port": 81}]}), Some("spec.ports[0].name: Required value")),
            (
                json!({"ports": [{"port": 80, "nodePort": 30000}]}),
                Some("spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'"),
            ),
            (
                json!({"clusterIPs": ["10.0.0.2"]}),
                Some("spec.clusterIPs: Invalid value: [\"10.0.0.2\"]: first value must match `clusterIP`"),
            ),
            (json!({"sessionAffinity": "x"}), Some("spec.sessionAffinity: Unsupported value: \"x\"")),
            (
                json!({"externalIPs": ["127.0.0.1"], "externalTrafficPolicy": "Cluster"}),
                Some("spec.externalIPs[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range"),
            ),
            (
                json!({"loadBalancerClass": "a/b"}),
                Some("spec.loadBalancerClass: Forbidden: may only be used"),
            ),
            (
                json!({"type": "NodePort", "clusterIP": "None", "clusterIPs": ["None"]}),
                Some(
                    "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services",
                ),
            ),
        ];
        for (patch, want) in cases {
            let got: Vec<String> =
                validate(&service(patch.clone()), None).iter().map(ToString::to_string).collect();
            match want {
                None => assert!(got.is_empty(), "{got:?}"),
                Some(want) => assert!(got.first().is_some_and(|g| g.starts_with(want)), "{patch} {got:?}"),
            }
        }
        let (old, new) =
            (service(json!({})), service(json!({"clusterIP": "10.0.0.2", "clusterIPs": ["10.0.0.2"]})));
        let got: Vec<String> = validate_update(&new, &old).iter().map(ToString::to_string).collect();
        assert_eq!(got, ["spec.clusterIPs[0]: Invalid value: [\"10.0.0.2\"]: may not change once set"]);
    }
}
