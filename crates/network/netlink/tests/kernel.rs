//! What is sent is what this machine's kernel takes: each test in a network namespace of its own. Needs root.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr};

use sampan_netlink::nft::{
    Batch, ChainKind, Expression, Hook, HookPoint, Part, Register, Set, Value, Values, Verdict, key, matches,
};
use sampan_netlink::route::{LOOPBACK, Neighbour, Route, Vxlan};
use sampan_netlink::{Cidr, Socket};

/// Runs `work` on a thread with a network namespace of its own.
fn alone(work: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        work();
    })
    .join()
    .unwrap();
}

#[test]
fn links_addresses_routes_and_neighbours() {
    alone(|| {
        let mut socket = Socket::route().unwrap();
        socket.set_up(LOOPBACK).unwrap();
        let ip = IpAddr::from([10, 9, 0, 1]);
        socket.add_address(LOOPBACK, ip, 32).unwrap();
        socket.add_address(LOOPBACK, ip, 32).unwrap();
        assert!(socket.addresses().unwrap().contains(&(LOOPBACK, ip)));
        let vxlan = Vxlan {
            name: "sampan.1",
            mac: [2, 0, 0, 0, 0, 1],
            vni: 1,
            port: 8472,
            local: Ipv4Addr::new(10, 9, 0, 1),
            underlay: LOOPBACK,
            mtu: 1450,
        };
        socket.add_vxlan(&vxlan).unwrap();
        let link = socket.link("sampan.1").unwrap().unwrap();
        assert!(link.is_up && link.mtu == 1450 && link.mac == Some(vxlan.mac), "{link:?}");
        assert_eq!(socket.link("nothing").unwrap(), None);
        let via = IpAddr::from([10, 42, 1, 0]);
        let route = Route { to: via, prefix_bits: 24, via: Some(via), link: link.index, source: None };
        socket.set_route(&route).unwrap();
        socket.set_route(&route).unwrap();
        assert_eq!(socket.routes().unwrap(), [route]);
        let nowhere = Route::nowhere(Cidr::new([10, 42, 0, 0].into(), 24));
        socket.set_route(&nowhere).unwrap();
        assert_eq!(socket.routes().unwrap().len(), 2);
        assert!(socket.routes().unwrap().contains(&nowhere));
        socket.delete_route(&nowhere).unwrap();
        assert_eq!(socket.routes().unwrap(), [route]);
        let mut neighbours = vec![
            Neighbour { link: link.index, ip: via, mac: [2, 0, 0, 0, 0, 2], forwarding: false },
            Neighbour {
                link: link.index,
                ip: [10, 9, 0, 2].into(),
                mac: [2, 0, 0, 0, 0, 2],
                forwarding: true,
            },
        ];
        for neighbour in &neighbours {
            socket.set_neighbour(neighbour).unwrap();
        }
        let mut found = socket.neighbours(link.index).unwrap();
        found.sort();
        neighbours.sort();
        assert_eq!(found, neighbours);
        for neighbour in &neighbours {
            socket.delete_neighbour(neighbour).unwrap();
        }
        assert_eq!(socket.neighbours(link.index).unwrap(), []);
        socket.delete_route(&route).unwrap();
        socket.delete_route(&route).unwrap();
        socket.delete_link(link.index).unwrap();
        assert_eq!(socket.link("sampan.1").unwrap(), None);
        assert_eq!(socket.route_to([192, 0, 2, 1].into()).unwrap(), None);
    });
}

#[test]
fn every_expression_is_taken() {
    alone(|| {
        let r = Register;
        let nat = |at, priority| Some(Hook { kind: ChainKind::Nat, at, priority });
        let filter = |at| Some(Hook { kind: ChainKind::Filter, at, priority: 0 });
        let mut batch = Batch::new("t");
        batch.replace_table();
        batch
            .add_chain("pre", nat(HookPoint::Prerouting, -100))
            .add_chain("post", nat(HookPoint::Postrouting, 100));
        batch.add_chain("in", filter(HookPoint::Input)).add_chain("svc", None).add_chain("no", None);
        let services = Set::map("services", &[Part::Ipv4, Part::Protocol, Part::Port], Values::Verdicts);
        let endpoint: &[Part] = &[Part::Ipv4, Part::Port];
        let clients =
            Set { dynamic: Some((60, 1000)), ..Set::map("clients", &[Part::Ipv4], Values::Of(endpoint)) };
        batch.add_set(&services).add_set(&clients).add_set(&Set::new("hairpin", &[Part::Ipv4, Part::Ipv4]));
        let look = [
            Expression::DestinationIp(r(0)),
            Expression::Protocol(r(1)),
            Expression::DestinationPort(r(2)),
            Expression::VerdictFrom { map: "services".into(), key: r(0) },
        ];
        batch.add_rule("pre", &look);
        let pod = Ipv4Addr::new(10, 42, 0, 2);
        let elements: Vec<_> = (0..2u32)
            .map(|n| (n.to_ne_bytes().to_vec(), Some(Value::Bytes(key::ip_port(pod, 8080 + n as u16)))))
            .collect();
        let dnat = Expression::Dnat { address: r(4), port: r(5) };
        let remember = Expression::Remember { map: "clients".into(), key: r(0), value: r(4), seconds: 60 };
        batch.add_rule(
            "svc",
            &[
                Expression::SourceIp(r(0)),
                Expression::FromMap { map: "clients".into(), key: r(0), into: r(4) },
                Expression::InOwnSet {
                    set: Set::new("", endpoint),
                    elements: vec![(key::ip_port(pod, 8080), None)],
                    key: r(4),
                },
                remember.clone(),
                dnat.clone(),
            ],
        );
        batch.add_rule(
            "svc",
            &[
                Expression::Random { below: 2, into: r(8) },
                Expression::FromOwnMap {
                    map: Set::map("", &[Part::Number], Values::Of(endpoint)),
                    elements,
                    key: r(8),
                    into: r(4),
                },
                Expression::SourceIp(r(0)),
                remember,
                dnat,
            ],
        );
        let and = |mut a: Vec<Expression>, b: Expression| {
            a.push(b);
            a
        };
        batch.add_rule("post", &and(matches::mark(0x4000), Expression::Masquerade));
        batch.add_rule(
            "post",
            &and(matches::source(Cidr::new(pod, 16), false), Expression::Verdict(Verdict::Return)),
        );
        batch.add_rule("pre", &matches::set_mark(0x4000, true));
        batch.add_rule("pre", &and(matches::local(false), Expression::Verdict(Verdict::Accept)));
        let spn = matches::interface_prefix(Expression::InputName, "spn");
        batch.add_rule("in", &and(spn, Expression::Verdict(Verdict::Drop)));
        batch
            .add_rule("in", &and(matches::new_connection(), Expression::Verdict(Verdict::Jump("no".into()))));
        batch.add_rule("no", &[Expression::Reject]);
        let many: Vec<_> = (0..1000u16)
            .map(|n| (key::ip_protocol_port(pod, 6, n), Some(Value::Verdict(Verdict::Goto("svc".into())))))
            .collect();
        batch.add_elements("services", &many);
        batch.commit().unwrap();

        let mut batch = Batch::new("t");
        batch.delete_elements("services", &many[..10]);
        batch
            .flush_chain("svc")
            .delete_elements("services", &many[10..])
            .delete_chain("svc")
            .delete_set("clients");
        batch.commit().unwrap();

        let mut batch = Batch::new("t");
        batch.add_chain("fresh", None).delete_chain("not there");
        assert!(batch.commit().unwrap_err().is_missing());
        let mut batch = Batch::new("t");
        batch.delete_chain("fresh");
        assert!(batch.commit().is_err(), "nothing of the refused batch happened");
        let mut batch = Batch::new("t");
        batch.delete_table();
        batch.commit().unwrap();
    });
}

#[test]
fn tracked_connections_are_found_and_forgotten() {
    alone(|| {
        Socket::route().unwrap().set_up(LOOPBACK).unwrap();
        // a rule that looks at the state makes the kernel track connections
        let mut batch = Batch::new("t");
        batch.add_table();
        let hook = Hook { kind: ChainKind::Filter, at: HookPoint::Output, priority: 0 };
        batch.add_chain("out", Some(hook)).add_rule("out", &matches::new_connection());
        batch.commit().unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"x", "127.0.0.1:5353").unwrap();
        let mut netfilter = Socket::netfilter().unwrap();
        let found = netfilter.flows(|f| f.protocol == 17 && f.to.1 == 5353).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].to, found[0].from);
        netfilter.forget(&found[0]).unwrap();
        netfilter.forget(&found[0]).unwrap();
        assert_eq!(netfilter.flows(|f| f.protocol == 17).unwrap(), []);
    });
}
