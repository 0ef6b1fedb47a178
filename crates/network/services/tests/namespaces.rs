//! A node with pods and a machine outside, each a network namespace; services of all sorts between them. Needs root.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sampan_client::Informer;
use sampan_drivers::network::PodNetwork;
use sampan_netlink::Socket;
use sampan_netlink::route::{LOOPBACK, Veth};
use sampan_pods::{PodNet, PodNetConfig};
use sampan_services::{Services, ServicesConfig};
use serde_json::json;

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace, held by a thread that works inside it.
struct Namespace {
    path: PathBuf,
    jobs: mpsc::Sender<Job>,
}

impl Namespace {
    fn new() -> Self {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (ready, path) = mpsc::channel();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let tid = nix::unistd::gettid();
            ready.send(PathBuf::from(format!("/proc/{}/task/{tid}/ns/net", std::process::id()))).unwrap();
            todo.iter().for_each(|job| job());
        });
        let namespace = Self { path: path.recv().unwrap(), jobs };
        namespace.run(|| Socket::route().unwrap().set_up(LOOPBACK).unwrap());
        namespace
    }

    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.jobs.send(Box::new(move || drop(done.send(work())))).unwrap();
        result.recv().expect("the work inside the namespace failed")
    }

    /// Serves connections until the test ends: each gets the server's address and the client's.
    fn serve(&self, port: u16) {
        let listener = self.run(move || TcpListener::bind(("0.0.0.0", port)).unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut stream = stream;
                let (own, peer) = (stream.local_addr().unwrap().ip(), stream.peer_addr().unwrap().ip());
                let _ = stream.write_all(format!("{own} {peer}").as_bytes());
            }
        });
    }

    /// What a server there answers.
    fn ask(&self, ip: IpAddr, port: u16) -> std::io::Result<String> {
        self.run(move || {
            let mut stream = TcpStream::connect_timeout(&(ip, port).into(), Duration::from_secs(3))?;
            stream.set_read_timeout(Some(Duration::from_secs(3)))?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A wire from `a` to `b`, with those addresses (a /24).
fn join(a: &Namespace, name: &'static str, a_ip: IpAddr, b: &Namespace, b_ip: IpAddr) {
    let b_path = b.path.clone();
    a.run(move || {
        let peer = std::fs::File::open(b_path).unwrap();
        let mut socket = Socket::route().unwrap();
        let number = name.as_bytes()[name.len() - 1];
        let veth = Veth {
            name,
            mac: [2, 1, 1, 1, 1, number],
            peer_name: name,
            peer_mac: [2, 1, 1, 1, 2, number],
            peer_namespace: peer.as_fd(),
            mtu: 1500,
        };
        socket.add_veth(&veth).unwrap();
        let link = socket.link(name).unwrap().unwrap().index;
        socket.add_address(link, a_ip, 24).unwrap();
    });
    b.run(move || {
        let mut socket = Socket::route().unwrap();
        let link = socket.link(name).unwrap().unwrap().index;
        socket.set_up(link).unwrap();
        socket.add_address(link, b_ip, 24).unwrap();
    });
}

struct Cluster {
    node: Namespace,
    outside: Namespace,
    pods: Vec<(Namespace, IpAddr)>,
    runtime: tokio::runtime::Runtime,
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
    proxy: Arc<Services>,
    _folder: tempfile::TempDir,
}

impl Cluster {
    /// Three pods, of which the services lead to the first two.
    fn new() -> Self {
        let (node, outside) = (Namespace::new(), Namespace::new());
        join(&node, "wire1", ip("192.168.7.1"), &outside, ip("192.168.7.2"));
        // so that the node has a way to addresses that nothing has
        node.run(|| {
            let mut socket = Socket::route().unwrap();
            let link = socket.link("wire1").unwrap().unwrap().index;
            socket.set_default_route(ip("192.168.7.2"), link).unwrap();
        });
        outside.run(|| {
            let mut socket = Socket::route().unwrap();
            let link = socket.link("wire1").unwrap().unwrap().index;
            socket.set_default_route(ip("192.168.7.1"), link).unwrap();
        });
        let folder = tempfile::tempdir().unwrap();
        let state_dir = folder.path().to_path_buf();
        let (runtime, pod_net, services, slices, proxy) = node.run(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let nodes = Informer::<Node>::detached();
            let n1 = json!({"metadata": {"name": "n1"}, "spec": {"podCIDR": "10.42.0.0/24"}});
            nodes.put(serde_json::from_value(n1).unwrap());
            let (node_name, node_ip) = ("n1".to_string(), ip("192.168.7.1"));
            let cluster_cidr = "10.42.0.0/16".to_string();
            let config = PodNetConfig {
                node_name: node_name.clone(),
                node_ip,
                state_dir,
                cluster_cidr: cluster_cidr.clone(),
            };
            let pod_net = PodNet::with_nodes(config, nodes);
            let config = ServicesConfig { node_name, node_ip, cluster_cidr, cluster_dns: ip("10.43.0.10") };
            let (services, slices) = (Informer::detached(), Informer::detached());
            let proxy = Services::with(config, services.clone(), slices.clone());
            (runtime, pod_net, services, slices, proxy)
        });
        let pods = ["a", "b", "c"].map(|uid| {
            let (namespace, pod_net) = (Namespace::new(), pod_net.clone());
            let path = namespace.path.clone();
            let attached = runtime.spawn(async move { pod_net.attach(uid, &path, &[]).await });
            let address = runtime.block_on(attached).unwrap().unwrap()[0];
            namespace.serve(8080);
            (namespace, address)
        });
        Self { node, outside, pods: pods.into(), runtime, services, slices, proxy, _folder: folder }
    }

    /// A service with that spec that leads to (pod, node) of `to`.
    fn serve(&self, spec: serde_json::Value, to: &[(usize, &str)]) {
        let version = sampan_world::random::suffix(10);
        let protocol = spec["ports"][0]["protocol"].as_str().unwrap_or("TCP").to_string();
        let service = json!({
            "metadata": {"name": "s", "namespace": "d", "resourceVersion": version}, "spec": spec,
        });
        let endpoints: Vec<_> = to
            .iter()
            .map(|(pod, node)| json!({"addresses": [self.pods[*pod].1.to_string()], "nodeName": node}))
            .collect();
        let slice = json!({
            "metadata": {
                "name": "s-1", "namespace": "d", "resourceVersion": version,
                "labels": {"kubernetes.io/service-name": "s"},
            },
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 8080, "protocol": protocol}],
        });
        self.services.put(serde_json::from_value(service).unwrap());
        self.slices.put(serde_json::from_value(slice).unwrap());
        self.apply();
    }

    fn apply(&self) {
        let proxy = self.proxy.clone();
        let task = self.runtime.spawn(async move { proxy.synchronise().await });
        self.runtime.block_on(task).unwrap().unwrap();
    }
}

const VIP: &str = "10.43.0.50";

fn spec(more: serde_json::Value) -> serde_json::Value {
    let mut spec = json!({"clusterIP": VIP, "clusterIPs": [VIP], "ports": [{"port": 80, "protocol": "TCP"}]});
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    spec
}

#[test]
fn services_of_all_sorts() {
    let cluster = Cluster::new();
    let (vip, node_ip) = (ip(VIP), ip("192.168.7.1"));
    let [a, b, c] = [0, 1, 2].map(|n| cluster.pods[n].1.to_string());
    let client = &cluster.pods[2].0;

    cluster.serve(spec(json!({})), &[(0, "n1"), (1, "n1")]);
    let answers: Vec<String> = (0..40).map(|_| client.ask(vip, 80).unwrap()).collect();
    let (from_a, from_b) = (format!("{a} {c}"), format!("{b} {c}"));
    assert!(answers.iter().all(|x| *x == from_a || *x == from_b), "{answers:?}");
    assert!(answers.contains(&from_a) && answers.contains(&from_b), "both get their share");
    assert!(cluster.node.ask(vip, 80).is_ok(), "from the node");
    let refused = client.ask(vip, 81).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "a port that the service has not");

    // a pod that is led to itself
    cluster.serve(spec(json!({})), &[(0, "n1")]);
    assert!(cluster.pods[0].0.ask(vip, 80).unwrap().starts_with(&a));

    // no endpoints
    cluster.serve(spec(json!({})), &[]);
    for from in [client, &cluster.node] {
        let start = sampan_world::clock::monotonic();
        assert_eq!(from.ask(vip, 80).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        assert!(start.elapsed() < Duration::from_secs(1));
    }

    // node ports, external addresses
    let ports = json!([{"port": 80, "nodePort": 30080, "protocol": "TCP"}]);
    let open = json!({"type": "NodePort", "ports": ports, "externalIPs": ["203.0.113.9"]});
    cluster.serve(spec(open.clone()), &[(1, "n1")]);
    let gateway = cluster.outside.ask(node_ip, 30080).unwrap();
    assert!(gateway.starts_with(&b) && !gateway.ends_with("192.168.7.2"), "masqueraded: {gateway}");
    assert!(cluster.outside.ask(ip("203.0.113.9"), 80).unwrap().starts_with(&b));
    assert!(client.ask(node_ip, 30080).is_ok());
    let mut local = open;
    local["externalTrafficPolicy"] = json!("Local");
    cluster.serve(spec(local.clone()), &[(0, "n2"), (1, "n1")]);
    for _ in 0..10 {
        assert_eq!(
            cluster.outside.ask(node_ip, 30080).unwrap(),
            format!("{b} 192.168.7.2"),
            "local, not masqueraded"
        );
    }
    cluster.serve(spec(local), &[(0, "n2")]);
    assert!(cluster.outside.ask(node_ip, 30080).is_err(), "none here");
    assert!(client.ask(node_ip, 30080).is_ok(), "pods reach those elsewhere");
    cluster.serve(spec(json!({"internalTrafficPolicy": "Local"})), &[(0, "n2"), (1, "n1")]);
    for _ in 0..10 {
        assert!(client.ask(vip, 80).unwrap().starts_with(&b));
    }

    // what leaves the pods' network comes from the node
    cluster.outside.serve(8088);
    assert_eq!(client.ask(ip("192.168.7.2"), 8088).unwrap(), "192.168.7.2 192.168.7.1");

    // someone empties the ruleset: the next change makes it anew
    cluster.node.run(|| {
        let mut batch = sampan_netlink::nft::Batch::new("sampan");
        batch.delete_table();
        batch.commit().unwrap();
    });
    cluster.serve(spec(json!({})), &[(0, "n1")]);
    assert!(client.ask(vip, 80).is_ok());
    cluster.services.remove(&("d".to_string(), "s".to_string()));
    cluster.apply();
    assert!(client.ask(vip, 80).is_err());
}

#[test]
fn affinity_holds_while_the_endpoint_lives() {
    let cluster = Cluster::new();
    let client = &cluster.pods[2].0;
    let sticky = json!({
        "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 100}},
    });
    cluster.serve(spec(sticky.clone()), &[(0, "n1"), (1, "n1")]);
    let first = client.ask(ip(VIP), 80).unwrap();
    for _ in 0..15 {
        assert_eq!(client.ask(ip(VIP), 80).unwrap(), first);
    }
    // another endpoint coming changes nothing for this client
    cluster.serve(spec(sticky.clone()), &[(0, "n1"), (1, "n1"), (2, "n1")]);
    assert_eq!(client.ask(ip(VIP), 80).unwrap(), first);
    let other = usize::from(first.starts_with(&cluster.pods[0].1.to_string()));
    cluster.serve(spec(sticky), &[(other, "n1")]);
    assert!(client.ask(ip(VIP), 80).unwrap().starts_with(&cluster.pods[other].1.to_string()));
    let shorter = json!({
        "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}},
    });
    cluster.serve(spec(shorter), &[(0, "n1"), (1, "n1")]);
    assert!(client.ask(ip(VIP), 80).is_ok());
}

#[test]
fn udp_follows_its_endpoints() {
    let cluster = Cluster::new();
    for (namespace, address) in &cluster.pods[..2] {
        let (socket, own) = (namespace.run(|| UdpSocket::bind("0.0.0.0:8080").unwrap()), address.to_string());
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(own.as_bytes(), peer);
            }
        });
    }
    let udp = spec(json!({"ports": [{"port": 53, "protocol": "UDP"}]}));
    let socket = cluster.pods[2].0.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket.connect((VIP, 53)).unwrap();
        socket
    });
    let ask = || {
        socket.send(b"?")?;
        let mut buffer = [0; 64];
        socket.recv(&mut buffer).map(|n| String::from_utf8_lossy(&buffer[..n]).into_owned())
    };
    for (pod, _) in cluster.pods[..2].iter().enumerate() {
        cluster.serve(udp.clone(), &[(pod, "n1")]);
        assert_eq!(
            ask().unwrap(),
            cluster.pods[pod].1.to_string(),
            "one socket, whichever endpoint there is"
        );
    }
}
