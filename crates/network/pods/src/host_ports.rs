//! Ports of the node that lead to pods (`hostPort`). Upstream counterpart: CNI's portmap plugin.
//!
//! One table of its own, `sampan-hostports`, with a map from port to pod; a pod coming or going changes elements only.
//! The node's 127.0.0.1 works too, which takes `route_localnet` on the pods' wires; so what a pod sends to 127.0.0.0/8
//! is dropped as it comes in, or pods could reach what listens on the node's loopback only.
use std::net::Ipv4Addr;

use sampan_netlink::nft::{
    Batch, ChainKind, Element, Expression, Hook, HookPoint, Part, Register, Set, Value, Values, Verdict, key,
    matches,
};
use sampan_netlink::{Cidr, Error};

use crate::addresses::Place;
use crate::wire;

const TABLE: &str = "sampan-hostports";
const ANY: &str = "ports";
const BOUND: &str = "bound-ports";
const HAIRPIN: &str = "hairpin";
const TARGET: &[Part] = &[Part::Ipv4, Part::Port];
const DNAT_PRIORITY: i32 = -100;
const SNAT_PRIORITY: i32 = 100;
/// After connection tracking, before destinations are translated.
const GUARD_PRIORITY: i32 = -150;

fn rule(mut matching: Vec<Expression>, then: Expression) -> Vec<Expression> {
    matching.push(then);
    matching
}

/// Makes the table, with the ports of those pods.
pub fn install<'a>(places: impl Iterator<Item = &'a Place>) -> Result<(), Error> {
    let mut batch = Batch::new(TABLE);
    batch.replace_table();
    let nat = |at, priority| Some(Hook { kind: ChainKind::Nat, at, priority });
    batch.add_chain("lookup", None);
    batch.add_chain("prerouting", nat(HookPoint::Prerouting, DNAT_PRIORITY));
    batch.add_chain("output", nat(HookPoint::Output, DNAT_PRIORITY));
    batch.add_chain("postrouting", nat(HookPoint::Postrouting, SNAT_PRIORITY));
    let guard = Hook { kind: ChainKind::Filter, at: HookPoint::Prerouting, priority: GUARD_PRIORITY };
    batch.add_chain("guard", Some(guard));
    batch.add_set(&Set::map(ANY, &[Part::Protocol, Part::Port], Values::Of(TARGET)));
    batch.add_set(&Set::map(BOUND, &[Part::Ipv4, Part::Protocol, Part::Port], Values::Of(TARGET)));
    batch.add_set(&Set::new(HAIRPIN, &[Part::Ipv4, Part::Ipv4]));

    let [ip, protocol, port, target, target_port] = [0, 1, 2, 4, 5].map(Register);
    let load =
        [Expression::DestinationIp(ip), Expression::Protocol(protocol), Expression::DestinationPort(port)];
    let dnat = Expression::Dnat { address: target, port: target_port };
    for (map, from) in [(BOUND, ip), (ANY, protocol)] {
        let find = Expression::FromMap { map: map.to_string(), key: from, into: target };
        batch.add_rule("lookup", &[&load[..], &[find, dnat.clone()]].concat());
    }
    let jump = Expression::Verdict(Verdict::Jump("lookup".to_string()));
    for chain in ["prerouting", "output"] {
        batch.add_rule(chain, &rule(matches::local(false), jump.clone()));
    }
    let loopback = Cidr::new(Ipv4Addr::LOCALHOST, 8);
    let mut from_loopback = matches::source(loopback, true);
    from_loopback.extend(matches::interface_prefix(Expression::OutputName, wire::PREFIX));
    batch.add_rule("postrouting", &rule(from_loopback, Expression::Masquerade));
    let to_itself = vec![
        Expression::SourceIp(Register(0)),
        Expression::DestinationIp(Register(1)),
        Expression::InSet { set: HAIRPIN.to_string(), key: Register(0), inverted: false },
    ];
    batch.add_rule("postrouting", &rule(to_itself, Expression::Masquerade));
    let mut spoofed = matches::interface_prefix(Expression::InputName, wire::PREFIX);
    spoofed.extend(matches::destination(loopback, true));
    batch.add_rule("guard", &rule(spoofed, Expression::Verdict(Verdict::Drop)));
    for place in places {
        put(&mut batch, place);
    }
    batch.commit()
}

/// (of the first map, of the second, of the set)
fn elements(place: &Place) -> [(&'static str, Vec<Element>); 3] {
    let (mut any, mut bound) = (Vec::new(), Vec::new());
    for port in &place.ports {
        let to = Some(Value::Bytes(key::ip_port(place.ip, port.container_port)));
        match port.host_ip {
            Some(ip) => bound.push((key::ip_protocol_port(ip, port.protocol, port.host_port), to)),
            None => any.push((key::protocol_port(port.protocol, port.host_port), to)),
        }
    }
    let hairpin = if place.ports.is_empty() { vec![] } else { vec![(key::ip_ip(place.ip, place.ip), None)] };
    [(ANY, any), (BOUND, bound), (HAIRPIN, hairpin)]
}

fn put(batch: &mut Batch, place: &Place) {
    for (set, elements) in elements(place) {
        batch.add_elements(set, &elements);
    }
}

/// Leads the pod's ports to it.
pub fn open(place: &Place) -> Result<(), Error> {
    let mut batch = Batch::new(TABLE);
    put(&mut batch, place);
    batch.commit()
}

/// Ends that; also when some of them were never opened.
pub fn close(place: &Place) -> Result<(), Error> {
    for (set, elements) in elements(place) {
        for element in elements {
            let mut batch = Batch::new(TABLE);
            batch.delete_elements(set, &[element]);
            match batch.commit() {
                Err(error) if !error.is_missing() => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}
