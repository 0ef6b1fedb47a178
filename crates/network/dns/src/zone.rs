//! The cluster's names, from Services and EndpointSlices. Upstream counterpart: the "Kubernetes DNS-Based Service
//! Discovery" specification 1.1, as CoreDNS' kubernetes plugin answers it (with `pods insecure`).
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use sampan_client::Informer;

use crate::wire::{self, Answer, Data, Reply};

const TTL: u32 = 30;
/// Of what changes as pods come and go, and of "no such name".
const SHORT_TTL: u32 = 5;
const SERVICE_NAME: &str = "kubernetes.io/service-name";

pub struct Zone {
    domain: Vec<String>,
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
}

/// What the cluster knows of a name.
pub enum Found {
    /// Not the cluster's: others know.
    Elsewhere,
    Reply(Reply),
    /// An alias of that name, which others may know.
    Alias {
        alias: Answer,
        target: Vec<String>,
    },
}

/// The records of a name, before the question's type picks some. `None`: there is no such name.
type Records = Option<Vec<Answer>>;

impl Zone {
    pub fn new(domain: &str, services: Informer<Service>, slices: Informer<EndpointSlice>) -> Self {
        Self { domain: wire::labels(domain), services, slices }
    }

    pub fn find(&self, name: &[String], kind: u16) -> Found {
        if let Some(ip) = reverse(name) {
            let Some(target) = self.name_of(ip) else { return Found::Elsewhere };
            let data = Data::Name(wire::PTR, target);
            return Found::Reply(
                self.pick(kind, Some(vec![Answer { name: name.to_vec(), ttl: SHORT_TTL, data }])),
            );
        }
        let Some(own) = name.strip_suffix(&self.domain[..]).filter(|_| !self.domain.is_empty()) else {
            return Found::Elsewhere;
        };
        let labels: Vec<&str> = own.iter().map(String::as_str).collect();
        let records = self.records(name, &labels);
        let is_complete = self.services.has_synced() && self.slices.has_synced();
        if records.is_none() && !is_complete {
            // it may well be there
            return Found::Reply(Reply::failure(wire::SERVER_FAILURE));
        }
        if let Some([alias]) = records.as_deref()
            && let Data::Name(wire::CNAME, target) = &alias.data
            && kind != wire::CNAME
            && kind != wire::ANY
        {
            return Found::Alias { alias: alias.clone(), target: target.clone() };
        }
        Found::Reply(self.pick(kind, records))
    }

    /// The records that the question asks for; else what says that there are none.
    fn pick(&self, kind: u16, records: Records) -> Reply {
        let code = if records.is_none() { wire::NAME_ERROR } else { wire::NO_ERROR };
        let mut answers = records.unwrap_or_default();
        answers.retain(|a| kind == wire::ANY || a.kind() == kind);
        if answers.len() > 1 {
            let first = sampan_world::random::below(answers.len() as u64) as usize;
            answers.rotate_left(first);
        }
        let mut authorities = Vec::new();
        if answers.is_empty() {
            let data = Data::Authority { zone: self.domain.clone() };
            authorities.push(Answer { name: self.domain.clone(), ttl: SHORT_TTL, data });
        }
        let mut additional = Vec::new();
        for answer in &answers {
            let Data::Service { target, .. } = &answer.data else { continue };
            let Some(own) = target.strip_suffix(&self.domain[..]) else { continue };
            let labels: Vec<&str> = own.iter().map(String::as_str).collect();
            let found = self.records(target, &labels).unwrap_or_default();
            additional.extend(found.into_iter().filter(|a| matches!(a.data, Data::Address(_))));
        }
        additional.dedup();
        Reply { code, authoritative: true, answers, authorities, additional }
    }

    fn records(&self, name: &[String], labels: &[&str]) -> Records {
        let one = |ttl, data| Some(vec![Answer { name: name.to_vec(), ttl, data }]);
        let exists = |there: bool| there.then(Vec::new);
        let has_namespace = |ns: &str| !self.services.list_in(ns).is_empty();
        match labels {
            [] => {
                let ns =
                    ["ns", "dns"].map(String::from).into_iter().chain(self.domain.iter().cloned()).collect();
                Some(vec![
                    Answer {
                        name: name.to_vec(),
                        ttl: SHORT_TTL,
                        data: Data::Authority { zone: self.domain.clone() },
                    },
                    Answer { name: name.to_vec(), ttl: TTL, data: Data::Name(wire::NS, ns) },
                ])
            }
            ["dns-version"] => one(TTL, Data::Text("1.1.0".to_string())),
            ["svc" | "pod"] => exists(true),
            [ns, "svc" | "pod"] => exists(has_namespace(ns)),
            [address, ns, "pod"] => {
                let ip = undashed(address).filter(|_| has_namespace(ns))?;
                one(SHORT_TTL, Data::Address(ip))
            }
            [service, ns, "svc"] => self.of_service(name, &*self.service(ns, service)?),
            [protocol @ ("_tcp" | "_udp" | "_sctp"), service, ns, "svc"] => {
                let service = self.service(ns, service)?;
                exists(
                    service
                        .spec
                        .iter()
                        .flat_map(|s| s.ports.iter().flatten())
                        .any(|p| is_protocol(p.protocol.as_deref(), protocol)),
                )
            }
            [host, service, ns, "svc"] => {
                let service = self.service(ns, service).filter(|s| is_headless(s))?;
                let found = self
                    .endpoints(&service)
                    .into_iter()
                    .filter(|(_, e, _)| host_of(e).as_deref() == Some(*host));
                let found: Vec<Answer> = found
                    .filter_map(|(_, _, ip)| {
                        Some(Answer { name: name.to_vec(), ttl: SHORT_TTL, data: Data::Address(ip?) })
                    })
                    .collect();
                (!found.is_empty()).then_some(found)
            }
            [port, protocol, service, ns, "svc"] => {
                let port = port.strip_prefix('_')?;
                self.of_port(name, &*self.service(ns, service)?, port, protocol)
            }
            _ => None,
        }
    }

    fn service(&self, namespace: &str, name: &str) -> Option<Arc<Service>> {
        self.services.get(namespace, name)
    }

    fn of_service(&self, name: &[String], service: &Service) -> Records {
        let spec = service.spec.as_ref()?;
        let answer = |ttl, data| Answer { name: name.to_vec(), ttl, data };
        if spec.type_.as_deref() == Some("ExternalName") {
            let target = wire::labels(spec.external_name.as_deref()?);
            return Some(vec![answer(SHORT_TTL, Data::Name(wire::CNAME, target))]);
        }
        if is_headless(service) {
            let mut ips: Vec<IpAddr> =
                self.endpoints(service).into_iter().filter_map(|(_, _, ip)| ip).collect();
            ips.sort();
            ips.dedup();
            // upstream: a headless service without ready endpoints has no name
            return (!ips.is_empty())
                .then(|| ips.into_iter().map(|ip| answer(SHORT_TTL, Data::Address(ip))).collect());
        }
        Some(cluster_ips(service).into_iter().map(|ip| answer(TTL, Data::Address(ip))).collect())
    }

    fn of_port(&self, name: &[String], service: &Service, port: &str, protocol: &str) -> Records {
        let spec = service.spec.as_ref()?;
        let wanted = |p_name: Option<&str>, p_protocol: Option<&str>| {
            p_name.unwrap_or_default().eq_ignore_ascii_case(port) && is_protocol(p_protocol, protocol)
        };
        let own = self.name_of_service(service);
        if !is_headless(service) {
            let of = |p: &ServicePort| {
                let data = Data::Service { port: u16::try_from(p.port).ok()?, target: own.clone() };
                wanted(p.name.as_deref(), p.protocol.as_deref()).then(|| Answer {
                    name: name.to_vec(),
                    ttl: TTL,
                    data,
                })
            };
            let found: Vec<Answer> = spec.ports.iter().flatten().filter_map(of).collect();
            return (!found.is_empty()).then_some(found);
        }
        let mut found = Vec::new();
        for (slice, endpoint, _) in self.endpoints(service) {
            let Some(host) = host_of(&endpoint) else { continue };
            let target: Vec<String> = std::iter::once(host).chain(own.iter().cloned()).collect();
            for p in slice.ports.iter().flatten().filter(|p| wanted(p.name.as_deref(), p.protocol.as_deref()))
            {
                let Some(port) = p.port.and_then(|p| u16::try_from(p).ok()) else { continue };
                let data = Data::Service { port, target: target.clone() };
                found.push(Answer { name: name.to_vec(), ttl: SHORT_TTL, data });
            }
        }
        found.dedup();
        (!found.is_empty()).then_some(found)
    }

    fn name_of_service(&self, service: &Service) -> Vec<String> {
        let meta = &service.metadata;
        let own = [
            meta.name.clone().unwrap_or_default(),
            meta.namespace.clone().unwrap_or_default(),
            "svc".to_string(),
        ];
        own.into_iter().chain(self.domain.iter().cloned()).collect()
    }

    /// The ready endpoints of a service: (slice, endpoint, address).
    fn endpoints(&self, service: &Service) -> Vec<(Arc<EndpointSlice>, Endpoint, Option<IpAddr>)> {
        let meta = &service.metadata;
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        let all = service.spec.as_ref().is_some_and(|s| s.publish_not_ready_addresses == Some(true));
        let is_of = |slice: &EndpointSlice| {
            slice.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_NAME)) == meta.name.as_ref()
                && slice.address_type != "FQDN"
        };
        let slices = self.slices.list_in(namespace).into_iter().filter(|s| is_of(s));
        let ready = |e: &Endpoint| all || e.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
        slices
            .flat_map(|slice| {
                let endpoints: Vec<Endpoint> =
                    slice.endpoints.iter().flatten().filter(|e| ready(e)).cloned().collect();
                endpoints.into_iter().map(move |e| {
                    let ip = e.addresses.first().and_then(|a| a.parse().ok());
                    (slice.clone(), e, ip)
                })
            })
            .collect()
    }

    /// The name of a service's address, or of an endpoint of a headless one.
    fn name_of(&self, ip: IpAddr) -> Option<Vec<String>> {
        let services = self.services.list();
        if let Some(service) = services.iter().find(|s| cluster_ips(s).contains(&ip)) {
            return Some(self.name_of_service(service));
        }
        services.iter().filter(|s| is_headless(s)).find_map(|service| {
            let endpoints = self.endpoints(service);
            let (_, endpoint, _) = endpoints.into_iter().find(|(_, _, found)| *found == Some(ip))?;
            Some(host_of(&endpoint).into_iter().chain(self.name_of_service(service)).collect())
        })
    }
}

fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|s| s.cluster_ip.as_deref() == Some("None"))
}

fn cluster_ips(service: &Service) -> Vec<IpAddr> {
    let Some(spec) = &service.spec else { return Vec::new() };
    match &spec.cluster_ips {
        Some(ips) if !ips.is_empty() => ips.iter().filter_map(|ip| ip.parse().ok()).collect(),
        _ => spec.cluster_ip.iter().filter_map(|ip| ip.parse().ok()).collect(),
    }
}

fn is_protocol(protocol: Option<&str>, label: &str) -> bool {
    label.strip_prefix('_').is_some_and(|l| l.eq_ignore_ascii_case(protocol.unwrap_or("TCP")))
}

/// An endpoint's own label: its host name, or its address with dashes.
fn host_of(endpoint: &Endpoint) -> Option<String> {
    match endpoint.hostname.as_deref() {
        Some(host) if !host.is_empty() => Some(host.to_string()),
        _ => endpoint.addresses.first().map(|a| a.replace(['.', ':'], "-")),
    }
}

fn undashed(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse::<std::net::Ipv4Addr>().ok().map(IpAddr::V4);
    v4.or_else(|| label.replace('-', ":").parse::<std::net::Ipv6Addr>().ok().map(IpAddr::V6))
}

/// The address that a name below in-addr.arpa or ip6.arpa stands for.
fn reverse(name: &[String]) -> Option<IpAddr> {
    let [labels @ .., family, arpa] = name else { return None };
    match (family.as_str(), arpa.as_str(), labels.len()) {
        ("in-addr", "arpa", 4) => {
            let octets: Vec<u8> = labels.iter().rev().filter_map(|l| l.parse().ok()).collect();
            <[u8; 4]>::try_from(octets).ok().map(IpAddr::from)
        }
        ("ip6", "arpa", 32) => {
            let digits = labels.iter().rev().map(|l| u8::from_str_radix(l, 16).ok().filter(|d| *d < 16));
            let digits: Vec<u8> = digits.collect::<Option<_>>()?;
            let octets: Vec<u8> = digits.chunks(2).map(|d| d[0] << 4 | d[1]).collect();
            <[u8; 16]>::try_from(octets).ok().map(IpAddr::from)
        }
        _ => None,
    }
}
