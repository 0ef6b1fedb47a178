//! Which endpoints a port of a service leads to. Upstream counterparts: pkg/proxy/topology.go, endpointslicecache.go.
//!
//! Ready ones; where there are none, those that still serve while they end. "Local" ones are on this node.
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use k8s_openapi::api::core::v1::ServicePort;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

pub type Target = (Ipv4Addr, u16);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    pub cluster: BTreeSet<Target>,
    pub local: BTreeSet<Target>,
    /// On this node, whatever their state.
    pub here: BTreeSet<Ipv4Addr>,
}

pub const SERVICE_NAME: &str = "kubernetes.io/service-name";

struct Found {
    target: Target,
    is_ready: bool,
    serves_at_its_end: bool,
    is_here: bool,
}

impl Endpoints {
    /// Those of `port` in the service's slices.
    pub fn of<'a>(
        slices: impl Iterator<Item = &'a EndpointSlice>,
        port: &ServicePort,
        node_name: &str,
    ) -> Self {
        let mut found = Vec::new();
        for slice in slices.filter(|s| s.address_type == "IPv4") {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let name = port.name.as_deref().unwrap_or_default();
            let matching = slice.ports.iter().flatten().filter(|p| {
                p.name.as_deref().unwrap_or_default() == name
                    && p.protocol.as_deref().unwrap_or("TCP") == protocol
            });
            for number in matching.filter_map(|p| u16::try_from(p.port?).ok()) {
                found.extend(slice.endpoints.iter().flatten().filter_map(|e| read(e, number, node_name)));
            }
        }
        let pick = |here: bool| -> BTreeSet<Target> {
            let of = |wanted: fn(&Found) -> bool| {
                found
                    .iter()
                    .filter(|f| (!here || f.is_here) && wanted(f))
                    .map(|f| f.target)
                    .collect::<BTreeSet<_>>()
            };
            let ready = of(|f| f.is_ready);
            if ready.is_empty() { of(|f| f.serves_at_its_end) } else { ready }
        };
        let here = found.iter().filter(|f| f.is_here).map(|f| f.target.0).collect();
        Self { cluster: pick(false), local: pick(true), here }
    }
}

fn read(endpoint: &Endpoint, port: u16, node_name: &str) -> Option<Found> {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let is_ready = conditions.ready.unwrap_or(true);
    Some(Found {
        target: (endpoint.addresses.first()?.parse().ok()?, port),
        is_ready,
        serves_at_its_end: conditions.serving.unwrap_or(is_ready) && conditions.terminating.unwrap_or(false),
        is_here: endpoint.node_name.as_deref() == Some(node_name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::discovery::v1::{EndpointConditions, EndpointPort};

    fn slice(endpoints: &[(&str, bool, bool, &str)]) -> EndpointSlice {
        let endpoints = endpoints.iter().map(|(ip, ready, terminating, node)| Endpoint {
            addresses: vec![(*ip).to_string()],
            conditions: Some(EndpointConditions {
                ready: Some(*ready),
                serving: Some(*ready || *terminating),
                terminating: Some(*terminating),
            }),
            node_name: Some((*node).to_string()),
            ..Endpoint::default()
        });
        EndpointSlice {
            address_type: "IPv4".to_string(),
            endpoints: Some(endpoints.collect()),
            ports: Some(vec![EndpointPort { port: Some(8080), ..EndpointPort::default() }]),
            ..EndpointSlice::default()
        }
    }

    #[test]
    fn ready_ones_else_those_that_end() {
        let port = ServicePort { port: 80, ..ServicePort::default() };
        let of = |slice: EndpointSlice| Endpoints::of([slice].iter(), &port, "n1");
        let one: BTreeSet<Target> = [(Ipv4Addr::new(10, 0, 0, 1), 8080)].into();
        let two: BTreeSet<Target> = [(Ipv4Addr::new(10, 0, 0, 2), 8080)].into();
        let mixed = of(slice(&[("10.0.0.1", true, false, "n2"), ("10.0.0.2", false, true, "n1")]));
        assert_eq!((mixed.cluster, mixed.local), (one, two.clone()));
        let ending = of(slice(&[("10.0.0.1", false, false, "n1"), ("10.0.0.2", false, true, "n2")]));
        assert_eq!((ending.cluster, ending.local), (two, BTreeSet::new()));
        let other = ServicePort { name: Some("x".into()), ..port.clone() };
        assert_eq!(
            Endpoints::of([slice(&[("10.0.0.1", true, false, "n1")])].iter(), &other, "n1"),
            Endpoints::default()
        );
    }
}
