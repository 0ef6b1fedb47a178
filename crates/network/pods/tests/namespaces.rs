//! Two nodes and their pods, each a network namespace of its own on this machine. Needs root.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeAddress};
use sampan_client::Informer;
use sampan_drivers::network::{HostPort, NetworkError, PodNetwork};
use sampan_netlink::Socket;
use sampan_netlink::route::{LOOPBACK, Veth};
use sampan_pods::{PodNet, PodNetConfig};

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

    /// Serves connections until the test ends: each gets the client's address.
    fn serve(&self, port: u16) {
        let listener = self.run(move || TcpListener::bind(("0.0.0.0", port)).unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut stream = stream;
                let peer = stream.peer_addr().unwrap().ip();
                let _ = stream.write_all(peer.to_string().as_bytes());
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

fn node(name: &str, ip: &str, range: Option<&str>) -> Node {
    let mut node = Node::default();
    node.metadata.name = Some(name.to_string());
    node.metadata.resource_version = Some(format!("{name}{range:?}"));
    node.spec.get_or_insert_default().pod_cidr = range.map(String::from);
    let address = NodeAddress { type_: "InternalIP".into(), address: ip.into() };
    node.status.get_or_insert_default().addresses = Some(vec![address]);
    node
}

/// The pod network of a node, on a runtime whose threads are all in the node's namespace.
struct Agent {
    runtime: tokio::runtime::Runtime,
    pods: std::sync::Arc<PodNet>,
    nodes: Informer<Node>,
}

impl Agent {
    fn start(
        namespace: &Namespace,
        name: &'static str,
        node_ip: IpAddr,
        state: PathBuf,
        nodes: Vec<Node>,
    ) -> Self {
        namespace.run(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let informer = Informer::detached();
            nodes.into_iter().for_each(|n| informer.put(n));
            informer.complete();
            let config = PodNetConfig {
                node_name: name.to_string(),
                node_ip,
                state_dir: state,
                cluster_cidr: "10.42.0.0/16".to_string(),
            };
            let pods = PodNet::with_nodes(config, informer.clone());
            Self { runtime, pods, nodes: informer }
        })
    }

    fn attach(&self, uid: &str, pod: &Namespace, ports: &[HostPort]) -> IpAddr {
        self.try_attach(uid, pod, ports).unwrap()[0]
    }

    fn try_attach(
        &self,
        uid: &str,
        pod: &Namespace,
        ports: &[HostPort],
    ) -> Result<Vec<IpAddr>, NetworkError> {
        let (uid, path, ports) = (uid.to_string(), pod.path.clone(), ports.to_vec());
        self.run(|pods| async move { pods.attach(&uid, &path, &ports).await })
    }

    /// On the runtime's own thread: what that starts is in the node's namespace too.
    fn run<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        &self,
        work: impl FnOnce(std::sync::Arc<PodNet>) -> F,
    ) -> T {
        let task = self.runtime.spawn(work(self.pods.clone()));
        self.runtime.block_on(task).unwrap()
    }
}

#[test]
fn pods_of_a_node_reach_each_other_and_host_ports_lead_to_them() {
    let (host, outside, a, b) = (Namespace::new(), Namespace::new(), Namespace::new(), Namespace::new());
    join(&host, "wire1", ip("192.168.7.1"), &outside, ip("192.168.7.2"));
    let folder = tempfile::tempdir().unwrap();
    let nodes = vec![node("n1", "192.168.7.1", Some("10.42.0.0/24"))];
    let agent = Agent::start(&host, "n1", ip("192.168.7.1"), folder.path().into(), nodes.clone());
    let first = agent.attach("a", &a, &[]);
    assert_eq!(first, ip("10.42.0.2"));
    let port =
        |host_ip, host_port| HostPort { host_ip, host_port, container_port: 80, protocol: "TCP".into() };
    let ports = [port(None, 8080), port(Some(ip("127.0.0.1")), 8081)];
    let start = sampan_world::clock::monotonic();
    let second = agent.attach("b", &b, &ports);
    println!("attached in {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_millis(100));
    assert_eq!(agent.attach("b", &b, &ports), second, "safe to repeat");
    b.serve(80);
    a.serve(80);
    assert_eq!(a.ask(second, 80).unwrap(), first.to_string());
    assert_eq!(b.ask(first, 80).unwrap(), second.to_string());
    assert_eq!(host.ask(second, 80).unwrap(), "192.168.7.1");
    assert_eq!(outside.ask(ip("192.168.7.1"), 8080).unwrap(), "192.168.7.2");
    assert_eq!(host.ask(ip("192.168.7.1"), 8080).unwrap(), "192.168.7.1");
    assert_eq!(host.ask(ip("127.0.0.1"), 8081).unwrap(), "192.168.7.1");
    assert!(outside.ask(ip("192.168.7.1"), 8081).is_err(), "only of 127.0.0.1");
    assert!(b.ask(ip("192.168.7.1"), 8080).is_ok(), "a pod reaches itself through the node");

    // a new agent knows them, and frees what is gone
    drop(agent);
    let agent = Agent::start(&host, "n1", ip("192.168.7.1"), folder.path().into(), vec![]);
    assert_eq!(agent.attach("b", &b, &ports), second);
    assert_eq!(outside.ask(ip("192.168.7.1"), 8080).unwrap(), "192.168.7.2");
    agent.run(|pods| async move { pods.retain(&["a".to_string()]).await }).unwrap();
    assert!(outside.ask(ip("192.168.7.1"), 8080).is_err());
    assert!(a.ask(second, 80).is_err());
    let c = Namespace::new();
    assert_eq!(agent.attach("c", &c, &[]), ip("10.42.0.4"));
    agent.run(|pods| async move { pods.detach("a").await }).unwrap();
    agent.run(|pods| async move { pods.detach("a").await }).unwrap();
    let links = host.run(|| Socket::route().unwrap().links().unwrap());
    assert_eq!(links.iter().filter(|l| l.name.starts_with("spn")).count(), 1);
}

#[test]
fn routes_that_others_take_away_come_back() {
    let (host, peer, pod) = (Namespace::new(), Namespace::new(), Namespace::new());
    join(&host, "wire1", ip("192.168.7.1"), &peer, ip("192.168.7.2"));
    let folder = tempfile::tempdir().unwrap();
    let nodes = vec![
        node("n1", "192.168.7.1", Some("10.42.0.0/24")),
        node("n2", "192.168.7.2", Some("10.42.1.0/24")),
    ];
    let agent = Agent::start(&host, "n1", ip("192.168.7.1"), folder.path().into(), nodes);
    let routes = || host.run(|| Socket::route().unwrap().routes().unwrap());
    let all = |count: usize| {
        (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            routes().len() == count
        })
    };
    agent.run(|pods| async move { drop(tokio::spawn(async move { pods.run().await })) });
    let address = agent.attach("a", &pod, &[]);
    pod.serve(80);
    assert!(all(3), "the pod's, this node's and the other node's: {:?}", routes());
    for _ in 0..2 {
        host.run(|| {
            let mut socket = Socket::route().unwrap();
            socket.routes().unwrap().iter().for_each(|r| socket.delete_route(r).unwrap());
        });
        assert!(all(3), "{:?}", routes());
        assert_eq!(host.ask(address, 80).unwrap(), "192.168.7.1");
    }
}

#[test]
fn a_pod_waits_for_the_nodes_range() {
    let (host, pod) = (Namespace::new(), Namespace::new());
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(&host, "n1", ip("192.168.7.1"), folder.path().into(), vec![]);
    let nodes = agent.nodes.clone();
    agent.runtime.spawn(async move {
        tokio::time::sleep(Duration::from_millis(50)).await;
        nodes.put(node("n1", "192.168.7.1", Some("10.42.5.0/30")));
    });
    // of four addresses only two are between the first and the last, and one of those is the node's
    assert_eq!(agent.attach("a", &pod, &[]), ip("10.42.5.2"));
    let full = agent.try_attach("b", &pod, &[]).unwrap_err();
    assert!(matches!(full, NetworkError::Exhausted { .. }), "{full}");
}

/// Two nodes with a pod each; the pods talk to each other.
fn across(first: Namespace, first_ip: &str, second: Namespace, second_ip: &str) -> Namespace {
    let (a, b) = (Namespace::new(), Namespace::new());
    let folder = tempfile::tempdir().unwrap();
    let nodes = vec![node("n1", first_ip, Some("10.42.0.0/24")), node("n2", second_ip, Some("10.42.1.0/24"))];
    let one = Agent::start(&first, "n1", ip(first_ip), folder.path().join("1"), nodes.clone());
    let two = Agent::start(&second, "n2", ip(second_ip), folder.path().join("2"), nodes);
    let (a_ip, b_ip) = (one.attach("a", &a, &[]), two.attach("b", &b, &[]));
    for agent in [&one, &two] {
        let pods = agent.pods.clone();
        agent.runtime.spawn(async move { pods.run().await });
        agent.nodes.clone().put(node("n3", "203.0.113.1", None));
    }
    // `run` waits for the first list, which a detached informer never has
    std::thread::sleep(Duration::from_millis(10));
    for agent in [&one, &two] {
        agent.run(|pods| async move { pods.synchronise().await }).unwrap();
    }
    b.serve(80);
    a.serve(80);
    assert_eq!(a.ask(b_ip, 80).unwrap(), a_ip.to_string());
    assert_eq!(b.ask(a_ip, 80).unwrap(), b_ip.to_string());
    assert!(first.ask(b_ip, 80).is_ok(), "from the node itself");
    // an address without a pod is told to be unreachable, at once
    let start = sampan_world::clock::monotonic();
    assert!(a.ask(ip("10.42.1.77"), 80).is_err());
    assert!(start.elapsed() < Duration::from_secs(2));
    two.nodes.remove(&(String::new(), "n1".to_string()));
    two.run(|pods| async move { pods.synchronise().await }).unwrap();
    assert!(b.ask(a_ip, 80).is_err(), "the route is gone with the node");
    second
}

#[test]
fn nodes_on_one_link_are_gateways() {
    let (first, second) = (Namespace::new(), Namespace::new());
    join(&first, "wire2", ip("192.168.8.1"), &second, ip("192.168.8.2"));
    let second = across(first, "192.168.8.1", second, "192.168.8.2");
    second.run(|| assert_eq!(Socket::route().unwrap().link("sampan.1").unwrap(), None));
}

#[test]
fn nodes_behind_a_router_are_reached_through_vxlan() {
    let (first, second, router) = (Namespace::new(), Namespace::new(), Namespace::new());
    join(&first, "wire3", ip("192.168.9.1"), &router, ip("192.168.9.254"));
    join(&second, "wire4", ip("192.168.10.1"), &router, ip("192.168.10.254"));
    router.run(|| {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    });
    for (namespace, via, name) in [(&first, "192.168.9.254", "wire3"), (&second, "192.168.10.254", "wire4")] {
        // the administrator's routes are not ours: they bear no mark, and are left alone
        namespace.run(move || {
            let mut socket = Socket::route().unwrap();
            let link = socket.link(name).unwrap().unwrap().index;
            socket.set_default_route(ip(via), link).unwrap();
        });
    }
    across(first, "192.168.9.1", second, "192.168.10.1");
}
