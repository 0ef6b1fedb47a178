//! What the table should hold, from services and their endpoints. Upstream counterpart: pkg/proxy/nftables/proxier.go.
//!
//! A map leads from (address, protocol, port) to the chain of that port of the service; a chain picks an endpoint with
//! one rule, by a random number through a map of its own. So the number of rules that a packet meets does not grow with
//! the number of services or endpoints. Affinity to the client is a map that the rules fill: client to endpoint.
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sampan_netlink::Cidr;
use sampan_netlink::nft::{Expression, Part, Register, Set, Value, Values, Verdict, key, matches};

use crate::ServicesConfig;
use crate::endpoints::{Endpoints, Target};
use crate::table::{CLUSTER_IPS, HAIRPIN, MARK, NO_ENDPOINTS, NO_NODE_PORTS, NODE_PORTS, REJECT, SERVICES};

const UDP: u8 = 17;
const TARGET: &[Part] = &[Part::Ipv4, Part::Port];
/// Most clients that one service remembers at a time.
const MAX_CLIENTS: u32 = 65_536;
const DEFAULT_AFFINITY_SECONDS: i32 = 10_800;

pub type Rule = Vec<Expression>;
/// Where clients send to: an address, or every address of the node.
pub type Frontend = (Option<Ipv4Addr>, u16);

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    pub chains: BTreeMap<String, Vec<Rule>>,
    /// Sets that only one service's chains use.
    pub sets: BTreeMap<String, Set>,
    pub elements: BTreeMap<(&'static str, Vec<u8>), Option<Value>>,
    /// UDP has no connections that end: what is tracked must be forgotten when its endpoint goes.
    pub udp: BTreeMap<Frontend, BTreeSet<Target>>,
}

/// The services of `services` that this node serves, with their endpoints.
pub fn desired<'a>(
    config: &ServicesConfig,
    services: impl Iterator<Item = &'a Service>,
    slices_of: impl Fn(&Service) -> Vec<std::sync::Arc<EndpointSlice>>,
) -> Desired {
    let mut desired = Desired::default();
    let pods: Option<Cidr> = config.cluster_cidr.split(',').find_map(|c| c.parse().ok());
    for service in services.filter(|s| is_ours(s)) {
        let Some(spec) = &service.spec else { continue };
        let slices = slices_of(service);
        for ip in cluster_ips(service).filter(|ip| IpAddr::V4(*ip) != config.cluster_dns) {
            desired.elements.insert((CLUSTER_IPS, ip.octets().to_vec()), None);
        }
        for port in spec.ports.iter().flatten() {
            let endpoints = Endpoints::of(slices.iter().map(|s| &**s), port, &config.node_name);
            if let Some(mut one) = OnePort::new(config, service, port, endpoints, pods) {
                one.put(&mut desired);
            }
        }
    }
    desired
}

fn is_ours(service: &Service) -> bool {
    let other_proxy = "service.kubernetes.io/service-proxy-name";
    let labels = service.metadata.labels.as_ref();
    labels.is_none_or(|l| !l.contains_key(other_proxy)) && cluster_ips(service).next().is_some()
}

fn cluster_ips(service: &Service) -> impl Iterator<Item = Ipv4Addr> {
    let spec = service.spec.as_ref();
    let is_address = spec.is_some_and(|s| s.type_.as_deref() != Some("ExternalName"));
    let all = spec.map(|s| match &s.cluster_ips {
        Some(ips) if !ips.is_empty() => ips.clone(),
        _ => s.cluster_ip.clone().into_iter().collect(),
    });
    all.filter(|_| is_address).into_iter().flatten().filter_map(|ip| ip.parse().ok())
}

struct OnePort<'a> {
    config: &'a ServicesConfig,
    service: &'a Service,
    name: String,
    protocol: u8,
    port: u16,
    node_port: Option<u16>,
    endpoints: Endpoints,
    pods: Option<Cidr>,
    affinity: Option<u32>,
}

impl<'a> OnePort<'a> {
    fn new(
        config: &'a ServicesConfig,
        service: &'a Service,
        port: &ServicePort,
        endpoints: Endpoints,
        pods: Option<Cidr>,
    ) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        let protocol_name = port.protocol.as_deref().unwrap_or("TCP");
        let protocol = match protocol_name {
            "TCP" => 6,
            "UDP" => UDP,
            "SCTP" => 132,
            _ => return None,
        };
        let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
        let service_name = service.metadata.name.as_deref().unwrap_or_default();
        let seconds = || {
            let client = spec.session_affinity_config.as_ref()?.client_ip.as_ref()?;
            client.timeout_seconds
        };
        let affinity = (spec.session_affinity.as_deref() == Some("ClientIP"))
            .then(|| u32::try_from(seconds().unwrap_or(DEFAULT_AFFINITY_SECONDS)).unwrap_or(1).max(1));
        Some(Self {
            config,
            service,
            name: format!("{namespace}/{service_name}/{}/{}", protocol_name.to_lowercase(), port.port),
            protocol,
            port: u16::try_from(port.port).ok()?,
            node_port: port.node_port.and_then(|p| u16::try_from(p).ok()).filter(|p| *p > 0),
            endpoints,
            pods,
            affinity,
        })
    }

    fn put(&mut self, desired: &mut Desired) {
        let spec = self.service.spec.clone().unwrap_or_default();
        for ip in &self.endpoints.here {
            desired.elements.insert((HAIRPIN, key::ip_ip(*ip, *ip)), None);
        }
        let internal_local = spec.internal_traffic_policy.as_deref() == Some("Local");
        let external_local = spec.external_traffic_policy.as_deref() == Some("Local");
        let inside = if internal_local { &self.endpoints.local } else { &self.endpoints.cluster }.clone();
        let cluster_ips: Vec<Ipv4Addr> =
            cluster_ips(self.service).filter(|ip| IpAddr::V4(*ip) != self.config.cluster_dns).collect();
        if !inside.is_empty() {
            let mut rules = self.mark_unless_from_pods();
            rules.extend(self.balance(desired, &inside));
            desired.chains.insert(format!("{}/internal", self.name), rules);
        }
        for ip in cluster_ips {
            self.lead(desired, Some(ip), &inside, "internal");
        }
        let mut outside: Vec<Ipv4Addr> =
            spec.external_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect();
        let balancers = self.balancer_ips();
        if outside.is_empty() && balancers.is_empty() && self.node_port.is_none() {
            return;
        }
        let reached = if external_local { &self.endpoints.local } else { &self.endpoints.cluster }.clone();
        if !self.endpoints.cluster.is_empty() {
            let rules = self.external(desired, external_local, &reached);
            desired.chains.insert(format!("{}/external", self.name), rules);
        }
        let ranges = spec.load_balancer_source_ranges.unwrap_or_default();
        if ranges.is_empty() {
            outside.extend(&balancers);
        } else if !self.endpoints.cluster.is_empty() {
            desired.chains.insert(format!("{}/firewall", self.name), self.firewall(&ranges));
            balancers.iter().for_each(|ip| self.lead(desired, Some(*ip), &reached, "firewall"));
        }
        outside.iter().for_each(|ip| self.lead(desired, Some(*ip), &reached, "external"));
        if self.node_port.is_some() {
            self.lead(desired, None, &reached, "external");
        }
    }

    fn balancer_ips(&self) -> Vec<Ipv4Addr> {
        let status = self.service.status.as_ref().and_then(|s| s.load_balancer.as_ref());
        let ingress = status.and_then(|b| b.ingress.as_ref()).into_iter().flatten();
        // mode Proxy: the load balancer answers itself, also to the cluster's own traffic
        let ours = ingress.filter(|i| i.ip_mode.as_deref() != Some("Proxy"));
        ours.filter_map(|i| i.ip.as_ref()?.parse().ok()).collect()
    }

    /// Leads a frontend to the chain, and to the verdict where it leads to no endpoint.
    fn lead(&self, desired: &mut Desired, ip: Option<Ipv4Addr>, targets: &BTreeSet<Target>, chain: &str) {
        let port = if ip.is_some() { self.port } else { self.node_port.unwrap_or_default() };
        let (map, no_map, key) = match ip {
            Some(ip) => (SERVICES, NO_ENDPOINTS, key::ip_protocol_port(ip, self.protocol, port)),
            None => (NODE_PORTS, NO_NODE_PORTS, key::protocol_port(self.protocol, port)),
        };
        let chain = format!("{}/{chain}", self.name);
        if desired.chains.contains_key(&chain) {
            let verdict = Value::Verdict(Verdict::Goto(chain));
            desired.elements.insert((map, key.clone()), Some(verdict));
        }
        if targets.is_empty() {
            // refused where there is nothing at all; another node may have what this one lacks
            let nothing = self.endpoints.cluster.is_empty();
            let verdict = if nothing { Verdict::Goto(REJECT.to_string()) } else { Verdict::Drop };
            desired.elements.insert((no_map, key), Some(Value::Verdict(verdict)));
        }
        if self.protocol == UDP {
            desired.udp.entry((ip, port)).or_default().extend(targets);
        }
    }

    fn mark_unless_from_pods(&self) -> Vec<Rule> {
        let Some(pods) = self.pods else { return Vec::new() };
        let mut rule = matches::source(pods, false);
        rule.extend(matches::set_mark(MARK, true));
        vec![rule]
    }

    /// What comes from outside: masqueraded, so that answers come back this way; with policy Local it is not, and only
    /// pods and this node reach endpoints elsewhere.
    fn external(&self, desired: &mut Desired, only_local: bool, reached: &BTreeSet<Target>) -> Vec<Rule> {
        let everywhere = format!("{}/everywhere", self.name);
        if !only_local {
            let mut rules = vec![matches::set_mark(MARK, true)];
            rules.extend(self.balance(desired, reached));
            return rules;
        }
        let all = self.balance(desired, &self.endpoints.cluster.clone());
        desired.chains.insert(everywhere.clone(), all);
        let goto = Expression::Verdict(Verdict::Goto(everywhere));
        let mut rules = Vec::new();
        if let Some(pods) = self.pods {
            let mut from_pods = matches::source(pods, true);
            from_pods.push(goto.clone());
            rules.push(from_pods);
        }
        let mut from_node = matches::local(true);
        from_node.extend(matches::set_mark(MARK, true));
        from_node.push(goto);
        rules.push(from_node);
        if !reached.is_empty() {
            rules.extend(self.balance(desired, reached));
        }
        rules
    }

    /// Lets only those ranges in.
    fn firewall(&self, ranges: &[String]) -> Vec<Rule> {
        let goto = Expression::Verdict(Verdict::Goto(format!("{}/external", self.name)));
        let allowed = ranges.iter().filter_map(|r| r.trim().parse::<Cidr>().ok());
        let mut rules: Vec<Rule> = allowed
            .map(|range| {
                let mut rule = matches::source(range, true);
                rule.push(goto.clone());
                rule
            })
            .collect();
        rules.push(vec![Expression::Verdict(Verdict::Drop)]);
        rules
    }

    /// The rules that pick one of the endpoints.
    fn balance(&self, desired: &mut Desired, targets: &BTreeSet<Target>) -> Vec<Rule> {
        let [client, number, target, target_port] = [0, 8, 4, 5].map(Register);
        let dnat = Expression::Dnat { address: target, port: target_port };
        let values = targets.iter().map(|(ip, port)| key::ip_port(*ip, *port));
        let numbered =
            (0u32..).zip(values.clone()).map(|(n, v)| (n.to_ne_bytes().to_vec(), Some(Value::Bytes(v))));
        let mut pick = vec![
            Expression::Random {
                below: u32::try_from(targets.len()).unwrap_or(u32::MAX).max(1),
                into: number,
            },
            Expression::FromOwnMap {
                map: Set::map("", &[Part::Number], Values::Of(TARGET)),
                elements: numbered.collect(),
                key: number,
                into: target,
            },
        ];
        let Some(seconds) = self.affinity else {
            pick.push(dnat);
            return vec![pick];
        };
        let map = format!("{}/clients", self.name);
        let clients = Set {
            dynamic: Some((seconds, MAX_CLIENTS)),
            ..Set::map(&map, &[Part::Ipv4], Values::Of(TARGET))
        };
        desired.sets.insert(map.clone(), clients);
        let remember = Expression::Remember { map: map.clone(), key: client, value: target, seconds };
        // an endpoint that a client was led to before and that is gone now does not match: another is picked
        let again = vec![
            Expression::SourceIp(client),
            Expression::FromMap { map, key: client, into: target },
            Expression::InOwnSet {
                set: Set::new("", TARGET),
                elements: values.map(|v| (v, None)).collect(),
                key: target,
            },
            remember.clone(),
            dnat.clone(),
        ];
        pick.extend([Expression::SourceIp(client), remember, dnat]);
        vec![again, pick]
    }
}
