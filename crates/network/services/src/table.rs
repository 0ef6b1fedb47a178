//! The table `ip sampan` in the kernel: made whole once, then changed by what differs, each time in one transaction.
//!
//! What stays true: a connection meets either the old state or the new one; a client's affinity outlives changes of other
//! endpoints. When a change is refused (someone flushed the ruleset), the table is made anew.
use std::net::Ipv4Addr;

use sampan_netlink::nft::{
    Batch, ChainKind, Element, Expression, Hook, HookPoint, Part, Register, Set, Value, Values, Verdict,
    matches,
};
use sampan_netlink::{Cidr, Error, Socket};

use crate::desired::Desired;

const TABLE: &str = "sampan";
pub const SERVICES: &str = "service-ips";
pub const NODE_PORTS: &str = "service-nodeports";
pub const NO_ENDPOINTS: &str = "no-endpoint-services";
pub const NO_NODE_PORTS: &str = "no-endpoint-nodeports";
pub const CLUSTER_IPS: &str = "cluster-ips";
pub const HAIRPIN: &str = "hairpin-connections";
pub const REJECT: &str = "reject";
/// The bit of a packet's mark that asks for masquerading; kube-proxy's.
pub const MARK: u32 = 0x4000;

const ADDRESS_KEY: &[Part] = &[Part::Ipv4, Part::Protocol, Part::Port];
const PORT_KEY: &[Part] = &[Part::Protocol, Part::Port];
const LOOPBACK: Cidr = cidr(127, 8);

const fn cidr(first: u8, bits: u8) -> Cidr {
    Cidr::new(Ipv4Addr::new(first, 0, 0, 0), bits)
}

fn and(mut matching: Vec<Expression>, then: Expression) -> Vec<Expression> {
    matching.push(then);
    matching
}

fn jump(chain: &str) -> Expression {
    Expression::Verdict(Verdict::Jump(chain.to_string()))
}

/// Makes the table as it is without any services.
fn skeleton(batch: &mut Batch, pods: Option<Cidr>) {
    batch.replace_table();
    let hook = |kind, at, priority| Some(Hook { kind, at, priority });
    for chain in ["services", "no-endpoints", "unknown-ports", REJECT] {
        batch.add_chain(chain, None);
    }
    batch.add_chain("nat-prerouting", hook(ChainKind::Nat, HookPoint::Prerouting, -100));
    batch.add_chain("nat-output", hook(ChainKind::Nat, HookPoint::Output, -100));
    batch.add_chain("nat-postrouting", hook(ChainKind::Nat, HookPoint::Postrouting, 100));
    batch.add_chain("filter-input", hook(ChainKind::Filter, HookPoint::Input, 0));
    batch.add_chain("filter-forward", hook(ChainKind::Filter, HookPoint::Forward, 0));
    batch.add_chain("filter-output", hook(ChainKind::Filter, HookPoint::Output, 0));
    for (map, key) in [
        (SERVICES, ADDRESS_KEY),
        (NODE_PORTS, PORT_KEY),
        (NO_ENDPOINTS, ADDRESS_KEY),
        (NO_NODE_PORTS, PORT_KEY),
    ] {
        batch.add_set(&Set::map(map, key, Values::Verdicts));
    }
    batch
        .add_set(&Set::new(CLUSTER_IPS, &[Part::Ipv4]))
        .add_set(&Set::new(HAIRPIN, &[Part::Ipv4, Part::Ipv4]));

    let [ip, protocol, port] = [0, 1, 2].map(Register);
    let load =
        [Expression::DestinationIp(ip), Expression::Protocol(protocol), Expression::DestinationPort(port)];
    for (chain, by_address, by_port) in
        [("services", SERVICES, NODE_PORTS), ("no-endpoints", NO_ENDPOINTS, NO_NODE_PORTS)]
    {
        let verdict = Expression::VerdictFrom { map: by_address.to_string(), key: ip };
        batch.add_rule(chain, &[&load[..], &[verdict]].concat());
        let mut to_node = matches::local(false);
        to_node.extend(matches::destination(LOOPBACK, false));
        to_node.extend_from_slice(&load[1..]);
        batch.add_rule(
            chain,
            &and(to_node, Expression::VerdictFrom { map: by_port.to_string(), key: protocol }),
        );
    }
    batch.add_rule("nat-prerouting", &[jump("services")]).add_rule("nat-output", &[jump("services")]);
    for chain in ["filter-input", "filter-forward", "filter-output"] {
        batch.add_rule(chain, &and(matches::new_connection(), jump("no-endpoints")));
    }
    // a port that the service does not have: refused rather than sent to the world
    let in_cluster_ips = Expression::InSet { set: CLUSTER_IPS.to_string(), key: ip, inverted: false };
    batch.add_rule("unknown-ports", &[Expression::DestinationIp(ip), in_cluster_ips, Expression::Reject]);
    for chain in ["filter-forward", "filter-output"] {
        batch.add_rule(chain, &and(matches::new_connection(), jump("unknown-ports")));
    }
    batch.add_rule(REJECT, &[Expression::Reject]);

    // the mark is taken off, or the packet around this one in a tunnel would be masqueraded too
    let marked = [matches::mark(MARK), matches::set_mark(MARK, false)].concat();
    batch.add_rule("nat-postrouting", &and(marked, Expression::Masquerade));
    let to_itself = vec![
        Expression::SourceIp(Register(0)),
        Expression::DestinationIp(Register(1)),
        Expression::InSet { set: HAIRPIN.to_string(), key: Register(0), inverted: false },
    ];
    batch.add_rule("nat-postrouting", &and(to_itself, Expression::Masquerade));
    if let Some(pods) = pods {
        let multicast = cidr(224, 4);
        let mut leaving = matches::source(pods, true);
        leaving.extend(matches::destination(pods, false));
        leaving.extend(matches::destination(multicast, false));
        batch.add_rule("nat-postrouting", &and(leaving, Expression::Masquerade));
    }
}

/// The table, and what was last put into it.
pub struct Table {
    pods: Option<Cidr>,
    current: Option<Desired>,
}

impl Table {
    pub fn new(pods: Option<Cidr>) -> Self {
        Self { pods, current: None }
    }

    /// Makes the kernel's table what is desired.
    pub fn apply(&mut self, desired: Desired) -> Result<(), Error> {
        if let Some(current) = &self.current {
            if *current == desired {
                return Ok(());
            }
            if let Err(error) = difference(current, &desired).commit() {
                tracing::warn!(%error, "the table of services was changed by someone else; making it anew");
                self.current = None;
            }
        }
        if self.current.is_none() {
            let mut batch = Batch::new(TABLE);
            skeleton(&mut batch, self.pods);
            put_difference(&mut batch, &Desired::default(), &desired);
            batch.commit()?;
        }
        let before = self.current.replace(desired).unwrap_or_default();
        if let Some(now) = &self.current {
            forget_stale_udp(&before, now)?;
        }
        Ok(())
    }
}

fn difference(old: &Desired, new: &Desired) -> Batch {
    let mut batch = Batch::new(TABLE);
    put_difference(&mut batch, old, new);
    batch
}

/// First what others name, then what names it; the other way round for what goes.
fn put_difference(batch: &mut Batch, old: &Desired, new: &Desired) {
    for name in new.chains.keys().filter(|n| !old.chains.contains_key(*n)) {
        batch.add_chain(name, None);
    }
    let stays = |name: &str, set: &Set| old.sets.get(name).is_some_and(|o| o == set);
    let replaced: Vec<&String> =
        new.sets.iter().filter(|(n, s)| old.sets.contains_key(*n) && !stays(n, s)).map(|(n, _)| n).collect();
    // a set of another shape must first lose the rules that use it
    for name in &replaced {
        let service = name.trim_end_matches("/clients");
        for chain in old.chains.keys().filter(|c| c.starts_with(service)) {
            batch.flush_chain(chain);
        }
        batch.delete_set(name);
    }
    for (name, set) in new.sets.iter().filter(|(n, s)| !stays(n, s)) {
        batch.add_set(&Set { name: name.clone(), ..set.clone() });
    }
    for (name, rules) in &new.chains {
        let lost = replaced.iter().any(|r| name.starts_with(r.trim_end_matches("/clients")));
        match old.chains.get(name) {
            Some(before) if before == rules && !lost => continue,
            Some(_) if !lost => {
                batch.flush_chain(name);
            }
            _ => {}
        }
        for rule in rules {
            batch.add_rule(name, rule);
        }
    }
    put_elements(batch, old, new);
    for name in old.chains.keys().filter(|n| !new.chains.contains_key(*n)) {
        batch.flush_chain(name);
    }
    for name in old.chains.keys().filter(|n| !new.chains.contains_key(*n)) {
        batch.delete_chain(name);
    }
    for name in old.sets.keys().filter(|n| !new.sets.contains_key(*n)) {
        batch.delete_set(name);
    }
}

fn put_elements(batch: &mut Batch, old: &Desired, new: &Desired) {
    let of = |from: &Desired, other: &Desired, set: &str| -> Vec<Element> {
        let differs = from.elements.iter().filter(|((s, _), _)| *s == set);
        let differs = differs.filter(|(k, v)| other.elements.get(*k) != Some(*v));
        differs.map(|((_, key), value): (_, &Option<Value>)| (key.clone(), value.clone())).collect()
    };
    for set in [SERVICES, NODE_PORTS, NO_ENDPOINTS, NO_NODE_PORTS, CLUSTER_IPS, HAIRPIN] {
        batch.delete_elements(set, &of(old, new, set)).add_elements(set, &of(new, old, set));
    }
}

/// Forgets the UDP flows to endpoints that are gone, and those that went nowhere before there was an endpoint.
fn forget_stale_udp(before: &Desired, now: &Desired) -> Result<(), Error> {
    let changed = |frontend: &(Option<Ipv4Addr>, u16)| {
        let (old, new) = (before.udp.get(frontend), now.udp.get(frontend));
        match (old, new) {
            (Some(old), Some(new)) => !old.is_subset(new) || (old.is_empty() && !new.is_empty()),
            (None, Some(new)) => !new.is_empty(),
            (Some(old), None) => !old.is_empty(),
            (None, None) => false,
        }
    };
    if !before.udp.keys().chain(now.udp.keys()).any(changed) {
        return Ok(());
    }
    let mut socket = Socket::netfilter()?;
    let stale = socket.flows(|flow| {
        let frontends = [(Some(flow.to.0), flow.to.1), (None, flow.to.1)];
        let Some(frontend) =
            frontends.iter().find(|f| before.udp.contains_key(*f) || now.udp.contains_key(*f))
        else {
            return false;
        };
        let right = now.udp.get(frontend).is_some_and(|targets| targets.contains(&flow.from));
        let was_ours = before.udp.get(frontend).is_some_and(|targets| targets.contains(&flow.from));
        let is_vip = frontend.0.is_some();
        flow.protocol == 17 && changed(frontend) && !right && (is_vip || was_ours || flow.from == flow.to)
    })?;
    stale.iter().try_for_each(|flow| socket.forget(flow))
}
