//! Addresses and node ports of services.
//!
//! Upstream counterparts: pkg/registry/core/service/{ipallocator,portallocator,storage/alloc.go}. Deliberately
//! different: there is no state besides the services themselves. One service at a time is given what it needs, by
//! looking at what all others have; a deleted service gives back by being gone. Where several servers share a store, a
//! key that each such write changes says whether another server gave something away since this one looked: then the
//! choice is made again.
use std::collections::HashSet;
use std::net::IpAddr;

use sampan_kinds::{FieldError, Path};
use sampan_store::{Class, Expect, Write};
use sampan_world::random;
use serde_json::{Value, json};
use tokio::sync::OwnedMutexGuard;

use crate::cache::store_failed;
use crate::call::Call;
use crate::config::Cidr;
use crate::status::{Result, Status};
use crate::write::text;

/// The key that servers with a shared store change with each allocation; its value means nothing.
pub const TURN_KEY: &str = "/sampan/service-allocation";

/// Held until the service is stored, so that nobody is given the same.
pub struct Allocation {
    _turn: OwnedMutexGuard<()>,
    /// What must be so still when the service is stored, where other servers allocate too.
    expect: Option<Expect>,
}

impl Allocation {
    /// What has to be written together with the service; a conflict of it says that the choice is outdated.
    pub fn turn(&self) -> Option<Write> {
        let value = Some(bytes::Bytes::from_static(b"{}"));
        self.expect.map(|expect| Write { key: TURN_KEY.to_string(), expect, value, class: Class::Durable })
    }
}

/// What other services have.
#[derive(Default)]
struct Taken {
    addresses: HashSet<IpAddr>,
    /// Port and protocol.
    node_ports: HashSet<(u16, String)>,
}

fn is_service(call: &Call) -> bool {
    call.resource.storage.resource == "services" && call.resource.storage.group.is_empty()
}

pub async fn before_create(call: &Call, service: &mut Value) -> Result<Option<Allocation>> {
    if !is_service(call) {
        return Ok(None);
    }
    normalize(service, None);
    check_addresses(call, service)?;
    let (mut allocation, taken) = taken(call, "").await?;
    allocate(call, service, None, &taken)?;
    if !claims(service, None) {
        allocation.expect = None;
    }
    Ok(Some(allocation))
}

pub async fn before_update(call: &Call, service: &mut Value, old: &Value) -> Result<Option<Allocation>> {
    if !is_service(call) {
        return Ok(None);
    }
    normalize(service, Some(old));
    keep_what_is_not_said(service, old);
    let (mut allocation, taken) = taken(call, text(old, "/metadata/uid")).await?;
    allocate(call, service, Some(old), &taken)?;
    if !claims(service, Some(old)) {
        allocation.expect = None;
    }
    Ok(Some(allocation))
}

/// Whether the service has something that it had not before.
fn claims(service: &Value, old: Option<&Value>) -> bool {
    let has = |service: &Value| {
        let mut node_ports: HashSet<(u16, String)> =
            ports(service).filter_map(|port| Some((node_port(port)?, protocol(port)))).collect();
        node_ports.extend(health_check_port(service).map(|port| (port, "TCP".to_string())));
        (addresses(service).into_iter().collect::<HashSet<IpAddr>>(), node_ports)
    };
    let (addresses, node_ports) = has(service);
    let (old_addresses, old_ports) = old.map(has).unwrap_or_default();
    !addresses.is_subset(&old_addresses) || !node_ports.is_subset(&old_ports)
}

/// `clusterIP` and `clusterIPs` mean the same; who has said only one of them has said both (upstream's
/// NormalizeClusterIPs).
fn normalize(service: &mut Value, old: Option<&Value>) {
    let list = |service: &Value| {
        service.pointer("/spec/clusterIPs").and_then(Value::as_array).cloned().unwrap_or_default()
    };
    let single = text(service, "/spec/clusterIP").to_string();
    let stated = list(service);
    let plural = match old {
        None if !single.is_empty() && stated.is_empty() => Some(vec![single.into()]),
        None => None,
        Some(old) => {
            let (old_single, old_list) = (text(old, "/spec/clusterIP"), list(old));
            match single == old_single {
                true if stated.is_empty() && !old_list.is_empty() => Some(old_list),
                false if stated == old_list && single.is_empty() => Some(Vec::new()),
                false if stated == old_list => Some(vec![single.into()]),
                _ => None,
            }
        }
    };
    if let Some(plural) = plural
        && let Some(spec) = service.get_mut("spec").and_then(Value::as_object_mut)
    {
        match plural.is_empty() {
            true => drop(spec.remove("clusterIPs")),
            false => drop(spec.insert("clusterIPs".into(), plural.into())),
        }
    }
}

fn check_addresses(call: &Call, service: &Value) -> Result<()> {
    let errors = sampan_kinds::core::v1::service::validation::validate_addresses(service);
    match errors.is_empty() {
        true => Ok(()),
        false => Err(call.invalid(text(service, "/metadata/name"), &errors)),
    }
}

/// Takes the turn and looks at what all services but `except` have.
async fn taken(call: &Call, except: &str) -> Result<(Allocation, Taken)> {
    let turn = call.server.service_lock.clone().lock_owned().await;
    let store = &call.server.config.store;
    // read before the services: they may be newer than this, never older
    let expect = match store.is_shared() {
        false => None,
        true => {
            let (entry, _) = store.get(TURN_KEY, None).await.map_err(store_failed)?;
            Some(entry.map_or(Expect::Absent, |entry| Expect::Revision(entry.mod_revision)))
        }
    };
    let cache = call.cache().await?;
    call.server.caches.catch_up().await?;
    let mut taken = Taken::default();
    cache.visit("", |object| {
        let Ok(service) = object.value(&call.resource.storage) else { return };
        if text(&service, "/metadata/uid") == except && !except.is_empty() {
            return;
        }
        taken.addresses.extend(addresses(&service));
        taken.node_ports.extend(ports(&service).filter_map(|port| Some((node_port(port)?, protocol(port)))));
        taken.node_ports.extend(health_check_port(&service).map(|port| (port, "TCP".to_string())));
    });
    Ok((Allocation { _turn: turn, expect }, taken))
}

fn addresses(service: &Value) -> Vec<IpAddr> {
    let list = service.pointer("/spec/clusterIPs").and_then(Value::as_array).cloned().unwrap_or_default();
    let single = service.pointer("/spec/clusterIP").cloned();
    list.iter().chain(single.iter()).filter_map(|ip| ip.as_str()?.parse().ok()).collect()
}

fn ports(service: &Value) -> impl Iterator<Item = &Value> {
    service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten()
}

fn node_port(port: &Value) -> Option<u16> {
    port.get("nodePort")
        .and_then(Value::as_u64)
        .and_then(|port| u16::try_from(port).ok())
        .filter(|port| *port > 0)
}

fn protocol(port: &Value) -> String {
    port.get("protocol").and_then(Value::as_str).unwrap_or("TCP").to_string()
}

fn health_check_port(service: &Value) -> Option<u16> {
    let port = service.pointer("/spec/healthCheckNodePort").and_then(Value::as_u64)?;
    u16::try_from(port).ok().filter(|port| *port > 0)
}

/// Updates that leave out what was allocated keep it (upstream's patchAllocatedValues).
fn keep_what_is_not_said(service: &mut Value, old: &Value) {
    let has_ip =
        |service: &Value| matches!(text(service, "/spec/type"), "ClusterIP" | "NodePort" | "LoadBalancer");
    let has_ports = |service: &Value| matches!(text(service, "/spec/type"), "NodePort" | "LoadBalancer");
    if has_ip(old) && has_ip(service) {
        for (field, pointer) in [("clusterIP", "/spec/clusterIP"), ("clusterIPs", "/spec/clusterIPs")] {
            let unset = service.pointer(pointer).is_none_or(|value| {
                value.as_str() == Some("") || value.is_null() || value.as_array().is_some_and(Vec::is_empty)
            });
            if unset && let Some(value) = old.pointer(pointer) {
                service["spec"][field] = value.clone();
            }
        }
        for field in ["ipFamilies", "ipFamilyPolicy"] {
            if service.pointer(&format!("/spec/{field}")).is_none()
                && let Some(value) = old.pointer(&format!("/spec/{field}"))
            {
                service["spec"][field] = value.clone();
            }
        }
    }
    if has_ports(old) && has_ports(service) {
        let key = |port: &Value| (port.get("port").cloned(), protocol(port));
        let known: Vec<_> = ports(old).filter_map(|port| Some((key(port), node_port(port)?))).collect();
        let mut used: HashSet<(u16, String)> =
            ports(service).filter_map(|port| Some((node_port(port)?, protocol(port)))).collect();
        let new = service.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
        for port in new.into_iter().flatten().filter(|port| node_port(port).is_none()) {
            let same = known.iter().find(|(known, _)| *known == key(port));
            if let Some((_, number)) = same
                && used.insert((*number, protocol(port)))
            {
                port["nodePort"] = (*number).into();
            }
        }
    }
}

fn invalid(call: &Call, service: &Value, error: FieldError) -> Status {
    call.invalid(text(service, "/metadata/name"), &vec![error])
}

fn allocate(call: &Call, service: &mut Value, old: Option<&Value>, taken: &Taken) -> Result<()> {
    let kind = text(service, "/spec/type").to_string();
    if kind == "ExternalName" {
        if old.is_some_and(|old| text(old, "/spec/type") != "ExternalName") {
            release_addresses(service);
        }
        return Ok(());
    }
    allocate_addresses(call, service, taken)?;
    let lb_ports =
        service.pointer("/spec/allocateLoadBalancerNodePorts").and_then(Value::as_bool).unwrap_or(true);
    let all = kind == "NodePort" || (kind == "LoadBalancer" && lb_ports);
    if kind == "ClusterIP" {
        // Coming from NodePort, ports that the client has merely kept are given back.
        let before: HashSet<u16> = old.into_iter().flat_map(ports).filter_map(node_port).collect();
        let new = service.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
        for port in new.into_iter().flatten() {
            if node_port(port).is_some_and(|number| before.contains(&number))
                && let Some(port) = port.as_object_mut()
            {
                port.remove("nodePort");
            }
        }
    }
    allocate_ports(call, service, all, taken)?;
    allocate_health_check_port(call, service, taken)
}

fn release_addresses(service: &mut Value) {
    if let Some(spec) = service.get_mut("spec").and_then(Value::as_object_mut) {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "healthCheckNodePort"] {
            spec.remove(field);
        }
        for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            drop(port.as_object_mut().and_then(|port| port.remove("nodePort")));
        }
    }
}

fn family(cidr: &Cidr) -> &'static str {
    if cidr.address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// The families that the service is to have, by its policy and what the cluster has.
fn families(call: &Call, service: &Value) -> Result<Vec<&'static str>> {
    let cluster: Vec<&'static str> = call.server.config.service_cidrs.iter().map(family).collect();
    let stated = service.pointer("/spec/ipFamilies").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut families: Vec<&'static str> = Vec::new();
    for (at, wanted) in stated.iter().enumerate() {
        match cluster.iter().find(|family| wanted == *family) {
            Some(family) => families.push(family),
            None => {
                let path = Path::new("spec").child("ipFamilies").index(at);
                let error = FieldError::invalid(&path, wanted.clone(), "not configured on this cluster");
                return Err(invalid(call, service, error));
            }
        }
    }
    let listed = service.pointer("/spec/clusterIPs").and_then(Value::as_array).into_iter().flatten();
    if families.is_empty() {
        for ip in listed.filter_map(|ip| ip.as_str()?.parse::<IpAddr>().ok()) {
            families.push(if ip.is_ipv4() { "IPv4" } else { "IPv6" });
        }
    }
    if families.is_empty() {
        families.extend(cluster.first());
    }
    let policy = text(service, "/spec/ipFamilyPolicy");
    match policy {
        "RequireDualStack" if cluster.len() < 2 => {
            let path = Path::new("spec").child("ipFamilyPolicy");
            let detail = "this cluster is not configured for dual-stack services";
            Err(invalid(call, service, FieldError::invalid(&path, policy, detail)))
        }
        "RequireDualStack" | "PreferDualStack" => {
            families.extend(cluster.iter().filter(|family| !families.contains(family)).collect::<Vec<_>>());
            Ok(families)
        }
        _ => Ok(families),
    }
}

fn allocate_addresses(call: &Call, service: &mut Value, taken: &Taken) -> Result<()> {
    let families = families(call, service)?;
    let headless = text(service, "/spec/clusterIP") == "None";
    let policy = match text(service, "/spec/ipFamilyPolicy") {
        "" if families.len() > 1 => "RequireDualStack".to_string(),
        "" => "SingleStack".to_string(),
        stated => stated.to_string(),
    };
    let has_selector =
        service.pointer("/spec/selector").is_some_and(|s| s.as_object().is_some_and(|s| !s.is_empty()));
    if headless {
        service["spec"]["clusterIPs"] = json!(["None"]);
        // Without a selector nobody knows the endpoints' families: both may come.
        let both = !has_selector && service.pointer("/spec/ipFamilies").is_none() && policy == "SingleStack";
        let stated = !text(service, "/spec/ipFamilyPolicy").is_empty();
        service["spec"]["ipFamilyPolicy"] = if both && !stated && call.server.config.service_cidrs.len() > 1 {
            "RequireDualStack".into()
        } else {
            policy.into()
        };
        service["spec"]["ipFamilies"] = families.into();
        return Ok(());
    }
    let single = text(service, "/spec/clusterIP").to_string();
    let mut stated: Vec<String> = service
        .pointer("/spec/clusterIPs")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|ip| ip.as_str().map(str::to_string))
        .collect();
    if stated.is_empty() && !single.is_empty() {
        stated.push(single);
    }
    stated.truncate(families.len());
    let mut given: Vec<String> = Vec::new();
    for (at, family_name) in families.iter().enumerate() {
        let cidr = call.server.config.service_cidrs.iter().find(|cidr| family(cidr) == *family_name);
        let Some(cidr) = cidr else { continue };
        let path = Path::new("spec").child("clusterIPs");
        let address = match stated.get(at).filter(|ip| !ip.is_empty()) {
            Some(wanted) => {
                let all = || stated.iter().map(|ip| Value::from(ip.as_str())).collect::<Vec<_>>();
                let fail = |why: String| invalid(call, service, FieldError::invalid(&path, all(), why));
                let ip: IpAddr = wanted.parse().map_err(|_| fail("must be a valid IP address".into()))?;
                if !cidr.contains(ip) {
                    return Err(fail(format!(
                        "failed to allocate IP {wanted}: the provided IP ({wanted}) is not in the valid range. The \
                         range of valid IPs is {}/{}",
                        cidr.address, cidr.prefix
                    )));
                }
                if taken.addresses.contains(&ip) {
                    return Err(fail(format!(
                        "failed to allocate IP {wanted}: provided IP is already allocated"
                    )));
                }
                ip
            }
            None => free_address(cidr, taken).ok_or_else(|| {
                let why = "failed to allocate a serviceIP: range is full";
                Status::internal(why)
            })?,
        };
        given.push(address.to_string());
    }
    service["spec"]["clusterIP"] = given.first().cloned().unwrap_or_default().into();
    service["spec"]["clusterIPs"] = given.into();
    service["spec"]["ipFamilies"] = families.into();
    service["spec"]["ipFamilyPolicy"] = policy.into();
    Ok(())
}

/// A free address: from the range's upper part as long as there is one, since people choose from the lower one.
fn free_address(cidr: &Cidr, taken: &Taken) -> Option<IpAddr> {
    let size = cidr.span().1;
    // The network's own address and, in IPv4, the broadcast address are nobody's.
    let last = if cidr.address.is_ipv4() { size.saturating_sub(1) } else { size };
    let band = lower_band(size);
    let pick = |low: u128, high: u128| {
        let count = high.checked_sub(low).filter(|count| *count > 0)?;
        let start = u128::from(random::u64()) % count;
        (0..count).map(|at| cidr.nth(low + (start + at) % count)).find(|ip| !taken.addresses.contains(ip))
    };
    pick(band.max(1), last).or_else(|| pick(1, band.max(1)))
}

/// Upstream's band for static addresses: min(max(16, size / 16), 256), none in small ranges.
fn lower_band(size: u128) -> u128 {
    let usable = size.saturating_sub(2);
    if usable <= 16 { 0 } else { (usable / 16).clamp(16, 256) + 1 }
}

fn allocate_ports(call: &Call, service: &mut Value, all: bool, taken: &Taken) -> Result<()> {
    let mut own: HashSet<(u16, String)> = HashSet::new();
    let count = ports(service).count();
    for at in 0..count {
        let Some(port) = service.pointer(&format!("/spec/ports/{at}")) else { continue };
        let (number, protocol) = (node_port(port), protocol(port));
        let path = Path::new("spec").child("ports").index(at).child("nodePort");
        if let Some(number) = number {
            let range = &call.server.config.node_ports;
            let why = if !range.contains(&number) {
                let (low, high) = (range.start(), range.end());
                Some(format!(
                    "provided port is not in the valid range. The range of valid ports is {low}-{high}"
                ))
            } else if taken.node_ports.contains(&(number, protocol.clone()))
                || own.contains(&(number, protocol.clone()))
            {
                Some("provided port is already allocated".to_string())
            } else {
                None
            };
            if let Some(why) = why {
                return Err(invalid(call, service, FieldError::invalid(&path, number, why)));
            }
            own.insert((number, protocol));
        }
    }
    if !all {
        return Ok(());
    }
    for at in 0..count {
        let Some(port) = service.pointer(&format!("/spec/ports/{at}")) else { continue };
        if node_port(port).is_some() {
            continue;
        }
        let protocol = protocol(port);
        // The same port over another protocol gets the same number where that is free.
        let wanted = port.get("port").cloned();
        let twin = ports(service)
            .filter(|other| other.get("port").cloned() == wanted)
            .filter_map(node_port)
            .find(|number| {
                let key = (*number, protocol.clone());
                !taken.node_ports.contains(&key) && !own.contains(&key)
            });
        let number = twin.or_else(|| free_port(call, &protocol, taken, &own));
        let number =
            number.ok_or_else(|| Status::internal("failed to allocate a nodePort: range is full"))?;
        service["spec"]["ports"][at]["nodePort"] = number.into();
        own.insert((number, protocol));
    }
    Ok(())
}

fn free_port(call: &Call, protocol: &str, taken: &Taken, own: &HashSet<(u16, String)>) -> Option<u16> {
    let (low, high) = (*call.server.config.node_ports.start(), *call.server.config.node_ports.end());
    let count = u32::from(high.saturating_sub(low)) + 1;
    // Upstream keeps the lower numbers for those who choose themselves.
    let band = if count <= 16 { 0 } else { (count / 32).clamp(16, 128) };
    let start = random::below(u64::from(count - band)) as u32;
    (0..count).map(|at| low + ((band + (start + at) % count) % count) as u16).find(|number| {
        let key = (*number, protocol.to_string());
        !taken.node_ports.contains(&key) && !own.contains(&key)
    })
}

/// `externalTrafficPolicy: Local` load balancers have a port that tells whether a node has endpoints.
fn allocate_health_check_port(call: &Call, service: &mut Value, taken: &Taken) -> Result<()> {
    let needed = text(service, "/spec/type") == "LoadBalancer"
        && text(service, "/spec/externalTrafficPolicy") == "Local";
    // One that is there without need is validation's to refuse.
    if !needed {
        return Ok(());
    }
    if health_check_port(service).is_some() {
        return Ok(());
    }
    let own = ports(service).filter_map(|port| Some((node_port(port)?, protocol(port)))).collect();
    let port = free_port(call, "TCP", taken, &own);
    let port =
        port.ok_or_else(|| Status::internal("failed to allocate a HealthCheck NodePort: range is full"))?;
    service["spec"]["healthCheckNodePort"] = port.into();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_field_speaks_for_both() {
        let service = |single: &str, list: Value| json!({"spec": {"clusterIP": single, "clusterIPs": list}});
        let old = service("a", json!(["a"]));
        let cases = [
            (None, service("a", json!([])), json!(["a"])),
            (None, service("a", json!(["b"])), json!(["b"])),
            (None, service("", json!(["b"])), json!(["b"])),
            (Some(&old), service("a", json!([])), json!(["a"])),
            (Some(&old), service("b", json!(["a"])), json!(["b"])),
            (Some(&old), service("", json!(["a"])), Value::Null),
            (Some(&old), service("b", json!(["c"])), json!(["c"])),
        ];
        for (old, mut new, want) in cases {
            let shown = new.to_string();
            normalize(&mut new, old);
            assert_eq!(new["spec"].get("clusterIPs").cloned().unwrap_or_default(), want, "{shown}");
        }
    }

    #[test]
    fn only_what_is_new_needs_a_turn() {
        let service = |ip: &str, port: u16| json!({"spec": {"clusterIP": ip, "ports": [{"nodePort": port}]}});
        assert!(claims(&service("10.43.0.9", 0), None) && !claims(&service("None", 0), None));
        assert!(claims(&service("None", 30000), None));
        let old = service("10.43.0.9", 30000);
        assert!(!claims(&old, Some(&old)) && !claims(&service("10.43.0.9", 0), Some(&old)));
        assert!(claims(&service("10.43.0.9", 30001), Some(&old)));
        assert!(claims(&service("10.43.0.8", 30000), Some(&old)));
    }

    #[test]
    fn addresses_come_from_the_upper_band_until_it_is_full() {
        let cidr = Cidr::parse("10.0.0.0/24").unwrap();
        let mut taken = Taken::default();
        for _ in 0..(254 - 17 + 1) {
            let ip = free_address(&cidr, &taken).unwrap();
            let IpAddr::V4(v4) = ip else { unreachable!() };
            assert!(v4.octets()[3] >= 17, "{ip}");
            assert!(taken.addresses.insert(ip));
        }
        let low = free_address(&cidr, &taken).unwrap();
        assert!(cidr.contains(low) && !taken.addresses.contains(&low));
    }
}
