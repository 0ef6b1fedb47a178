//! Questions asked over real sockets, in a network namespace of their own. Needs root.
use super::*;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use serde_json::{Value, json};

use wire::{A, AAAA, Answer, CNAME, Data, PTR, SRV};

const DNS: &str = "10.43.0.10:53";

/// An API server with those objects that never changes.
fn informers(services: Value, slices: Value) -> Informers {
    let serve = move |request: Request<kube::client::Body>| {
        let path = request.uri().path().to_string();
        let items = if path.ends_with("/services") { &services } else { &slices };
        let mut body = String::new();
        if request.uri().query().is_some_and(|q| q.contains("sendInitialEvents=true")) {
            for object in items.as_array().into_iter().flatten() {
                body += &format!("{}\n", json!({"type": "ADDED", "object": object}));
            }
            let meta = json!({"resourceVersion": "1", "annotations": {"k8s.io/initial-events-end": "true"}});
            body += &format!("{}\n", json!({"type": "BOOKMARK", "object": {"metadata": meta}}));
        }
        async move { Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from(body)))) }
    };
    Informers::new(kube::Client::new(tower::service_fn(serve), "default"))
}

fn cluster() -> Informers {
    let endpoint = |ip: &str, host: Option<&str>, ready: bool| json!({"addresses": [ip], "hostname": host, "conditions": {"ready": ready}});
    let services = json!([
        {"metadata": {"name": "web", "namespace": "d"},
         "spec": {"clusterIP": "10.43.0.50", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}},
        {"metadata": {"name": "db", "namespace": "d"}, "spec": {"clusterIP": "None", "ports": [{"name": "sql", "port": 5432}]}},
        {"metadata": {"name": "empty", "namespace": "d"}, "spec": {"clusterIP": "None"}},
        {"metadata": {"name": "out", "namespace": "d"},
         "spec": {"type": "ExternalName", "externalName": "example.org"}},
        {"metadata": {"name": "in", "namespace": "d"},
         "spec": {"type": "ExternalName", "externalName": "web.d.svc.cluster.local"}},
    ]);
    let slices = json!([
        {"metadata": {"name": "db-1", "namespace": "d", "labels": {"kubernetes.io/service-name": "db"}},
         "addressType": "IPv4", "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}],
         "endpoints": [endpoint("10.42.0.5", Some("db-0"), true), endpoint("10.42.0.6", None, true),
                       endpoint("10.42.0.7", None, false)]},
    ]);
    informers(services, slices)
}

/// A resolver that knows one address for every name, and counts.
async fn resolver(asked: Arc<std::sync::atomic::AtomicUsize>) {
    let socket = UdpSocket::bind("127.0.0.2:53").await.unwrap();
    let mut buffer = [0; 512];
    while let Ok((count, peer)) = socket.recv_from(&mut buffer).await {
        asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let query = Query::read(&buffer[..count]).ok().unwrap();
        let answers =
            vec![Answer { name: query.name.clone(), ttl: 60, data: Data::Address([192, 0, 2, 1].into()) }];
        let _ = socket.send_to(&Reply { answers, ..Reply::default() }.write(&query, 512), peer).await;
    }
}

async fn ask(name: &str, kind: u16) -> (u8, Vec<u8>) {
    let mut buffer = vec![0; 4096];
    for _ in 0..50 {
        let socket = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        // the address may not be there yet
        let _ = socket.send_to(&wire::question(77, &wire::labels(name), kind), DNS).await;
        let got = timeout(Duration::from_millis(500), socket.recv(&mut buffer)).await;
        if let Ok(Ok(count)) = got {
            buffer.truncate(count);
            assert_eq!(buffer[..2], 77u16.to_be_bytes());
            return (buffer[3] & 0xf, buffer);
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("no answer for {name}");
}

/// (code, addresses and names)
async fn names(name: &str, kind: u16) -> (u8, Vec<String>) {
    let (code, bytes) = ask(name, kind).await;
    let shown = wire::chased(&bytes).into_iter().map(|a| match a.data {
        Data::Address(ip) => ip.to_string(),
        Data::Name(_, name) => name.join("."),
        other => format!("{other:?}"),
    });
    let mut shown: Vec<String> = shown.collect();
    shown.sort();
    (code, shown)
}

async fn check(asked: Arc<std::sync::atomic::AtomicUsize>) {
    let table: &[(&str, u16, u8, &[&str])] = &[
        ("web.d.svc.cluster.local", A, 0, &["10.43.0.50"]),
        ("WEB.d.SVC.cluster.local", A, 0, &["10.43.0.50"]),
        ("web.d.svc.cluster.local", AAAA, 0, &[]),
        ("none.d.svc.cluster.local", A, 3, &[]),
        ("web.other.svc.cluster.local", A, 3, &[]),
        ("db.d.svc.cluster.local", A, 0, &["10.42.0.5", "10.42.0.6"]),
        ("db-0.db.d.svc.cluster.local", A, 0, &["10.42.0.5"]),
        ("10-42-0-6.db.d.svc.cluster.local", A, 0, &["10.42.0.6"]),
        ("10-42-0-7.db.d.svc.cluster.local", A, 3, &[]),
        ("empty.d.svc.cluster.local", A, 3, &[]),
        ("10-42-0-9.d.pod.cluster.local", A, 0, &["10.42.0.9"]),
        ("d.svc.cluster.local", A, 0, &[]),
        ("nothing.svc.cluster.local", A, 3, &[]),
        ("out.d.svc.cluster.local", CNAME, 0, &["example.org"]),
        ("out.d.svc.cluster.local", A, 0, &["192.0.2.1", "example.org"]),
        ("in.d.svc.cluster.local", A, 0, &["10.43.0.50", "web.d.svc.cluster.local"]),
        ("example.net", A, 0, &["192.0.2.1"]),
    ];
    for (name, kind, code, expected) in table {
        assert_eq!(
            names(name, *kind).await,
            (*code, expected.iter().map(|e| e.to_string()).collect()),
            "{name}"
        );
    }
    let srv = |bytes: &[u8]| wire::records(bytes).filter(|r| r.kind == SRV).count();
    assert_eq!(srv(&ask("_http._tcp.web.d.svc.cluster.local", SRV).await.1), 1);
    assert_eq!(srv(&ask("_sql._tcp.db.d.svc.cluster.local", SRV).await.1), 2);
    assert_eq!(ask("_http._udp.web.d.svc.cluster.local", SRV).await.0, 3);
    let (_, reverse) = ask("50.0.43.10.in-addr.arpa", PTR).await;
    assert!(String::from_utf8_lossy(&reverse).contains("web\u{1}d\u{3}svc"), "{reverse:?}");
    let (_, reverse) = ask("5.0.42.10.in-addr.arpa", PTR).await;
    assert!(String::from_utf8_lossy(&reverse).contains("db-0\u{2}db"), "{reverse:?}");

    let before = asked.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(names("EXAMPLE.net", A).await.1, ["192.0.2.1"]);
    assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), before, "from the cache");

    let mut stream = TcpStream::connect(DNS).await.unwrap();
    for _ in 0..2 {
        let question = wire::question(5, &wire::labels("web.d.svc.cluster.local"), A);
        stream.write_all(&[&(question.len() as u16).to_be_bytes()[..], &question].concat()).await.unwrap();
        let mut answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(wire::chased(&answer)[0].data, Data::Address([10, 43, 0, 50].into()));
    }
}

#[test]
fn answers_as_the_specification_says() {
    let inside = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        Socket::route().unwrap().set_up(LOOPBACK).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let resolv_conf = folder.path().join("resolv.conf");
        std::fs::write(&resolv_conf, "search x\nnameserver 10.43.0.10\nnameserver 127.0.0.2\n").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let config = DnsConfig {
                cluster_dns: "10.43.0.10".parse().unwrap(),
                listen: vec![],
                domain: "cluster.local".to_string(),
                resolv_conf,
            };
            let informers = cluster();
            let dns = Dns::new(config, &informers);
            informers.of::<Service>().synced().await;
            informers.of::<EndpointSlice>().synced().await;
            let asked = Arc::default();
            tokio::spawn(resolver(Arc::clone(&asked)));
            tokio::spawn(async move { dns.run().await });
            check(asked).await;
        });
    };
    std::thread::spawn(inside).join().unwrap();
}
