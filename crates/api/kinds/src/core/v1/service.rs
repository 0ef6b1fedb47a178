//! Service. Addresses and ports are allocated by the API server before these rules run, as upstream does.
//!
//! Upstream counterpart: pkg/registry/core/service/strategy.go, pkg/api/service/warnings.go, defaults.go.
pub mod validation;

use serde_json::{Value, json};

use crate::field::{Path, go_quote};
use crate::ip::{cidr_warnings, ip_warnings};
use crate::kind::{Column, Kind, NameRule, Rest};
use crate::object::{
    child, count, default_absent, default_zero, integer, is_unset, items, items_mut, keep, remove, same_in,
    text,
};
use crate::table;

/// Reached from outside the cluster: LoadBalancer, NodePort, or with externalIPs.
pub fn externally_accessible(service: &Value) -> bool {
    match text(service, "/spec/type") {
        "LoadBalancer" | "NodePort" => true,
        "ClusterIP" => count(service, "/spec/externalIPs") > 0,
        _ => false,
    }
}

/// A LoadBalancer that keeps traffic local has a health check port.
pub fn needs_health_check(service: &Value) -> bool {
    text(service, "/spec/type") == "LoadBalancer" && text(service, "/spec/externalTrafficPolicy") == "Local"
}

/// `clusterIPs: [None]`.
pub fn is_headless(service: &Value) -> bool {
    matches!(items(service, "/spec/clusterIPs"), [only] if only == "None")
}

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    default_zero(spec, "sessionAffinity", "None");
    match text(spec, "/sessionAffinity") {
        "None" => drop(remove(spec, "sessionAffinityConfig")),
        "ClientIP"
            if spec.pointer("/sessionAffinityConfig/clientIP/timeoutSeconds").is_none_or(Value::is_null) =>
        {
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 10800}});
        }
        _ => {}
    }
    default_zero(spec, "type", "ClusterIP");
    for port in items_mut(spec, "/ports") {
        default_zero(port, "protocol", "TCP");
        let number = port.get("port").cloned().unwrap_or_else(|| 0.into());
        default_zero(port, "targetPort", number);
    }
    let accessible = externally_accessible(object);
    let spec = child(object, "spec");
    if accessible {
        default_zero(spec, "externalTrafficPolicy", "Cluster");
    }
    if ["NodePort", "LoadBalancer", "ClusterIP"].contains(&text(spec, "/type")) {
        default_absent(spec, "internalTrafficPolicy", "Cluster");
    } else {
        // A name has no traffic here.
        remove(spec, "internalTrafficPolicy");
    }
    if text(spec, "/type") == "LoadBalancer" {
        default_absent(spec, "allocateLoadBalancerNodePorts", true);
        for ingress in items_mut(object, "/status/loadBalancer/ingress") {
            if !text(ingress, "/ip").is_empty() {
                default_absent(ingress, "ipMode", "VIP");
            }
        }
    }
}

fn prepare_update(new: &mut Value, old: &Value) {
    keep(new, old, "status");
    drop_type_dependent_fields(new, old);
    if new.get("status").is_none() {
        new["status"] = json!({"loadBalancer": {}});
    }
}

/// Fields that a change of type has made meaningless go, unless the client changed them too.
fn drop_type_dependent_fields(new: &mut Value, old: &Value) {
    let kind = |service: &Value| text(service, "/spec/type").to_string();
    let (new_type, old_type) = (kind(new), kind(old));
    let mut gone = Vec::new();
    if old_type != "ExternalName" && new_type == "ExternalName" {
        if same_in(new, old, "/spec/clusterIP") && same_in(new, old, "/spec/clusterIPs") {
            gone.extend(["clusterIP", "clusterIPs"]);
        }
        gone.extend(
            ["ipFamilies", "ipFamilyPolicy"].iter().filter(|k| same_in(new, old, &format!("/spec/{k}"))),
        );
    }
    let node_ports = |service: &Value| -> Vec<i64> {
        items(service, "/spec/ports").iter().map(|p| integer(p, "/nodePort")).filter(|p| *p != 0).collect()
    };
    let needs_node_port = |kind: &str| kind == "NodePort" || kind == "LoadBalancer";
    let stored_ports = node_ports(old);
    if needs_node_port(&old_type)
        && !needs_node_port(&new_type)
        && node_ports(new).iter().all(|p| stored_ports.contains(p))
    {
        for port in items_mut(new, "/spec/ports") {
            remove(port, "nodePort");
        }
    }
    let mut unless_changed = |was: bool, is: bool, key: &'static str, new: &Value| {
        if was && !is && same_in(new, old, &format!("/spec/{key}")) {
            gone.push(key);
        }
    };
    unless_changed(needs_health_check(old), needs_health_check(new), "healthCheckNodePort", new);
    let (was, is) = (old_type == "LoadBalancer", new_type == "LoadBalancer");
    unless_changed(was, is, "allocateLoadBalancerNodePorts", new);
    unless_changed(was, is, "loadBalancerClass", new);
    unless_changed(externally_accessible(old), externally_accessible(new), "externalTrafficPolicy", new);
    let spec = child(new, "spec");
    gone.iter().for_each(|key| drop(remove(spec, key)));
    if !is && !is_unset(new.get("status")) {
        new["status"]["loadBalancer"] = json!({});
    }
}

fn warnings(new: &Value, _: Option<&Value>) -> Vec<String> {
    let path = Path::new("spec");
    let mut out = Vec::new();
    let hints = "service.kubernetes.io/topology-aware-hints";
    if new.pointer("/metadata/annotations").is_some_and(|a| a.get(hints).is_some()) {
        out.push(format!(
            "annotation {hints} is deprecated, please use service.kubernetes.io/topology-mode instead"
        ));
    }
    let kind = text(new, "/spec/type");
    let headless = kind == "ClusterIP" && text(new, "/spec/clusterIP") == "None";
    let lists = |key: &str| {
        let at = path.child(key);
        items(new, &format!("/spec/{key}"))
            .iter()
            .filter_map(Value::as_str)
            .enumerate()
            .map(move |(i, v)| (at.index(i), v))
    };
    if !["", "None"].contains(&text(new, "/spec/clusterIP")) {
        out.extend(lists("clusterIPs").filter_map(|(at, ip)| ip_warnings(&at, ip)));
    }
    let external = count(new, "/spec/externalIPs") > 0;
    if headless {
        if !text(new, "/spec/loadBalancerIP").is_empty() {
            out.push("spec.loadBalancerIP is ignored for headless services".to_string());
        }
        if external {
            out.push("spec.externalIPs is ignored for headless services".to_string());
        }
        if text(new, "/spec/sessionAffinity") != "None" {
            out.push("spec.SessionAffinity is ignored for headless services".to_string());
        }
    }
    out.extend(lists("externalIPs").filter_map(|(at, ip)| ip_warnings(&at, ip)));
    if external && !headless && kind != "ExternalName" {
        out.push(
            "spec.externalIPs is deprecated and may no longer be implemented in some clusters".to_string(),
        );
    }
    out.extend(ip_warnings(&path.child("loadBalancerIP"), text(new, "/spec/loadBalancerIP")));
    out.extend(lists("loadBalancerSourceRanges").flat_map(|(at, cidr)| cidr_warnings(&at, cidr)));
    if kind == "ExternalName" && external {
        out.push("spec.externalIPs is ignored when spec.type is \"ExternalName\"".to_string());
    }
    if kind != "ExternalName" && !text(new, "/spec/externalName").is_empty() {
        out.push("spec.externalName is ignored when spec.type is not \"ExternalName\"".to_string());
    }
    if text(new, "/spec/trafficDistribution") == "PreferClose" {
        let (old, better) = (go_quote("PreferClose"), go_quote("PreferSameZone"));
        out.push(format!("spec.trafficDistribution: {old} is deprecated; use {better}"));
    }
    out
}

fn external_ip(service: &Value) -> String {
    let mut ips: Vec<&str> = items(service, "/spec/externalIPs").iter().filter_map(Value::as_str).collect();
    match text(service, "/spec/type") {
        "ExternalName" => return text(service, "/spec/externalName").to_string(),
        "LoadBalancer" => {
            let mut ingress: Vec<&str> = items(service, "/status/loadBalancer/ingress")
                .iter()
                .map(|i| if text(i, "/ip").is_empty() { text(i, "/hostname") } else { text(i, "/ip") })
                .filter(|i| !i.is_empty())
                .collect();
            ingress.sort_unstable();
            ingress.dedup();
            if ingress.is_empty() && ips.is_empty() {
                return "<pending>".to_string();
            }
            ingress.append(&mut ips);
            return ingress.join(",");
        }
        _ => {}
    }
    if ips.is_empty() { "<none>".to_string() } else { ips.join(",") }
}

fn row(service: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let port = |port: &Value| {
        let (number, protocol) = (integer(port, "/port"), text(port, "/protocol"));
        match integer(port, "/nodePort") {
            0 => format!("{number}/{protocol}"),
            node_port => format!("{number}:{node_port}/{protocol}"),
        }
    };
    let ports: Vec<String> = items(service, "/spec/ports").iter().map(port).collect();
    vec![
        table::name(service),
        text(service, "/spec/type").into(),
        table::or_none(text(service, "/spec/clusterIPs/0")),
        external_ip(service).into(),
        table::or_none(&ports.join(",")),
        table::age(service, now),
        table::labels(service.pointer("/spec/selector")),
    ]
}

pub const KIND: Kind = Kind {
    name_rule: NameRule::DnsLabel,
    defaults,
    rest: Rest {
        prepare_create: |object| object["status"] = json!({"loadBalancer": {}}),
        prepare_update,
        validate: |object| validation::validate(object, None),
        validate_update: validation::validate_update,
        warnings,
    },
    status: Some(Rest {
        prepare_update: |new, old| keep(new, old, "spec"),
        validate_update: validation::validate_status,
        warnings: |new, _| {
            let at = Path::new("status").child("loadBalancer").child("ingress");
            let ingress = items(new, "/status/loadBalancer/ingress").iter().enumerate();
            ingress.filter_map(|(i, v)| ip_warnings(&at.index(i), text(v, "/ip"))).collect()
        },
        ..Rest::ANY
    }),
    create_on_update: true,
    columns: &[
        Column::NAME,
        Column::string("Type", "How the service is exposed."),
        Column::string("Cluster-IP", "The service's address inside the cluster."),
        Column::string("External-IP", "Addresses at which the service is reached from outside."),
        Column::string("Port(s)", "The ports that the service offers."),
        Column::AGE,
        Column::string("Selector", "The labels of the pods behind the service.").wide(),
    ],
    row,
    selectable: |object| {
        vec![
            ("spec.clusterIP", text(object, "/spec/clusterIP").to_string()),
            ("spec.type", text(object, "/spec/type").to_string()),
        ]
    },
    ..Kind::plain("", "v1", "Service")
};
