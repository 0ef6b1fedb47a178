//! What only a store on etcd has to do: several of them at once, members that die, history that goes.
//!
//! Needs an `etcd` in the PATH (Debian's package: etcd-server).
#![allow(clippy::unwrap_used, reason = "a test")]
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sampan_pki::Authority;
use sampan_store::{Etcd, EventKind, Expect, Range, Store, StoreError, Watch, WatchError, Write, WriteError};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use member::Member;

#[path = "etcd/member.rs"]
mod member;

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(30), future).await.unwrap()
}

/// Everything a watch sees up to and with a revision.
async fn seen(watch: &mut Watch, last: u64) -> Vec<(u64, String)> {
    let mut seen = Vec::new();
    loop {
        let batch = soon(watch.next_batch()).await.unwrap();
        let told = batch.events.into_iter().map(|e| match e.kind {
            EventKind::Put => (e.revision, format!("{}={}", e.key, String::from_utf8_lossy(&e.value))),
            EventKind::Delete => (e.revision, format!("{} gone", e.key)),
        });
        seen.extend(told);
        if batch.through >= last {
            return seen;
        }
    }
}

/// A way to a member that can be closed and opened again.
struct Gate {
    port: u16,
    /// Bytes from the member do not come through.
    mute: Arc<AtomicBool>,
    to: u16,
    task: Option<JoinHandle<()>>,
}

impl Gate {
    async fn to(member: &Member) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut gate = Self {
            port: listener.local_addr().unwrap().port(),
            mute: Arc::default(),
            to: member.port,
            task: None,
        };
        gate.serve(listener);
        gate
    }

    fn serve(&mut self, listener: TcpListener) {
        let (to, mute) = (self.to, self.mute.clone());
        self.task = Some(tokio::spawn(async move {
            // dropped with the task, and with them what is open
            let mut open = tokio::task::JoinSet::new();
            loop {
                let Ok((near, _)) = listener.accept().await else { return };
                let mute = mute.clone();
                open.spawn(async move {
                    let Ok(far) = TcpStream::connect(("127.0.0.1", to)).await else { return };
                    let ((mut from_near, mut to_near), (mut from_far, mut to_far)) =
                        (near.into_split(), far.into_split());
                    let back = async {
                        let mut buffer = vec![0; 65536];
                        while let Ok(n @ 1..) =
                            tokio::io::AsyncReadExt::read(&mut from_far, &mut buffer).await
                        {
                            if !mute.load(Ordering::SeqCst)
                                && tokio::io::AsyncWriteExt::write_all(&mut to_near, &buffer[..n])
                                    .await
                                    .is_err()
                            {
                                return;
                            }
                        }
                    };
                    tokio::select! {
                        _ = tokio::io::copy(&mut from_near, &mut to_far) => {}
                        () = back => {}
                    }
                });
            }
        }));
    }

    async fn close(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            drop(task.await);
        }
    }

    async fn open(&mut self) {
        self.serve(TcpListener::bind(("127.0.0.1", self.port)).await.unwrap());
    }

    fn etcd(&self) -> Etcd {
        Etcd::new([format!("http://127.0.0.1:{}", self.port)])
    }
}

#[tokio::test]
async fn two_servers_see_each_others_writes_in_order() {
    let member = Member::start(&[]);
    let stores = [member.connect().await, member.connect().await];
    assert!(stores[0].is_shared());
    let mut watches = stores.each_ref().map(|s| s.watch("", 1).unwrap());
    let writers = stores.clone().into_iter().enumerate().map(|(n, store)| {
        tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for round in 0..60 {
                // each its own key, and one that both want
                let own = format!("/registry/own/{n}");
                let revision = store.write(Write::put(own.as_str(), format!("{round}"))).await.unwrap();
                acknowledged.push((revision, format!("{own}={round}")));
                let (current, _) = store.get("/registry/both", None).await.unwrap();
                let expect = current.map_or(Expect::Absent, |e| Expect::Revision(e.mod_revision));
                let value = format!("{n}.{round}");
                let write = Write { expect, ..Write::put("/registry/both", value.clone()) };
                match store.write(write).await {
                    Ok(revision) => acknowledged.push((revision, format!("/registry/both={value}"))),
                    Err(WriteError::Conflict { current: Some(_), .. }) => {}
                    Err(e) => panic!("{e}"),
                }
            }
            acknowledged
        })
    });
    let mut acknowledged = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        acknowledged.extend(writer.await.unwrap());
    }
    acknowledged.sort();
    assert!(acknowledged.len() > 120, "{}", acknowledged.len());
    let last = stores[0].latest().await.unwrap();
    for watch in &mut watches {
        assert_eq!(seen(watch, last).await, acknowledged);
    }
    // what one has an answer for, the other reads, and its watch comes that far without any object's change
    let plain = stores[0].write(Write::put("/sampan/counter", "1")).await.unwrap();
    assert_eq!(stores[1].latest().await.unwrap(), plain);
    assert_eq!(soon(watches[1].next_batch()).await.unwrap().through, plain);
    assert_eq!(stores[1].revision(), plain);
    let mut followed = stores[1].follow("/sampan/counter");
    assert_eq!(soon(followed.next()).await.unwrap().unwrap().value, "1");
    stores[0].write(Write::put("/sampan/counter", "2")).await.unwrap();
    assert_eq!(soon(followed.next()).await.unwrap().unwrap().value, "2");
    connections(&member, 4).await;
    drop((stores, followed));
    connections(&member, 0).await;
}

/// Waits until so many connections to the member are left.
async fn connections(member: &Member, want: usize) {
    let open = || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        // local address, remote address, state: 01 is "established"
        let here = format!(" 0100007F:{:04X} ", member.port);
        table.lines().filter(|l| l.contains(&here) && l.split_whitespace().nth(3) == Some("01")).count()
    };
    for _ in 0..200 {
        // etcd has one with itself, for its JSON gateway; each is there from both ends
        if open() == 2 * (want + 1) {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
    panic!("{} ends of connections, not {}", open(), 2 * (want + 1));
}

/// Writes until told to stop, whatever fails, and returns what was acknowledged.
fn write_on(store: Store, stop: Arc<AtomicBool>) -> JoinHandle<BTreeMap<u64, String>> {
    tokio::spawn(async move {
        let mut acknowledged = BTreeMap::new();
        for number in 0.. {
            if stop.load(Ordering::SeqCst) {
                break;
            }
            let written = store.write(Write::put("/registry/a", number.to_string())).await;
            match written {
                Ok(revision) => drop(acknowledged.insert(revision, format!("/registry/a={number}"))),
                Err(WriteError::Store(StoreError::Unreachable { .. } | StoreError::Unanswered { .. })) => {
                    sleep(Duration::from_millis(20)).await
                }
                Err(e) => panic!("{e}"),
            }
        }
        acknowledged
    })
}

/// Nothing lost, nothing twice, nothing out of order; what was not acknowledged may have happened.
fn check_seen(seen: &[(u64, String)], acknowledged: &BTreeMap<u64, String>) {
    assert!(seen.windows(2).all(|w| w[0].0 < w[1].0), "out of order or twice");
    let seen: BTreeMap<u64, String> = seen.iter().cloned().collect();
    for (revision, change) in acknowledged {
        assert_eq!(seen.get(revision), Some(change));
    }
    let values: std::collections::BTreeSet<&String> = seen.values().collect();
    assert_eq!(values.len(), seen.len(), "a write was done twice");
}

#[tokio::test]
async fn a_member_that_is_killed_comes_back() {
    let mut member = Member::start(&[]);
    let store = member.connect().await;
    let mut watch = store.watch("", 1).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = write_on(store.clone(), stop.clone());
    for _ in 0..2 {
        sleep(Duration::from_millis(300)).await;
        member.kill();
        let down = store.get("/registry/a", None).await;
        assert!(
            matches!(&down, Err(StoreError::Unreachable { .. } | StoreError::Unanswered { .. })),
            "{down:?}"
        );
        member.run();
        // the store comes back by itself
        let back = async {
            while store.latest().await.is_err() {
                sleep(Duration::from_millis(50)).await;
            }
        };
        soon(back).await;
    }
    sleep(Duration::from_millis(300)).await;
    stop.store(true, Ordering::SeqCst);
    let acknowledged = writer.await.unwrap();
    let last = store.latest().await.unwrap();
    let seen = seen(&mut watch, last).await;
    println!("{} acknowledged, {} seen", acknowledged.len(), seen.len());
    assert!(acknowledged.len() > 30);
    check_seen(&seen, &acknowledged);
}

#[tokio::test]
async fn another_member_takes_over() {
    let mut members = Member::cluster(3, "http", &[]);
    let endpoints: Vec<String> = members.iter().map(Member::endpoint).collect();
    let store = Store::connect(Etcd::new(endpoints)).await.unwrap();
    let mut watch = store.watch("", store.revision()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = write_on(store.clone(), stop.clone());
    for member in &mut members {
        sleep(Duration::from_millis(300)).await;
        member.kill();
        // two of three go on
        let before = store.stats().commits;
        let goes_on = async {
            while store.stats().commits < before + 20 {
                sleep(Duration::from_millis(20)).await;
            }
        };
        soon(goes_on).await;
        member.run();
        sleep(Duration::from_secs(1)).await;
    }
    stop.store(true, Ordering::SeqCst);
    let acknowledged = writer.await.unwrap();
    let last = store.latest().await.unwrap();
    check_seen(&seen(&mut watch, last).await, &acknowledged);
}

#[tokio::test]
async fn a_watch_whose_next_change_is_gone_ends() {
    let member = Member::start(&[]);
    let direct = member.connect().await;
    let mut gate = Gate::to(&member).await;
    let store = Store::connect(gate.etcd()).await.unwrap();
    let write = |n: u32| direct.write(Write::put("/registry/a", n.to_string()));
    write(0).await.unwrap();
    let mut watch = store.watch("", 1).unwrap();
    assert_eq!(seen(&mut watch, 2).await.len(), 1);
    let mut followed = store.follow("/sampan/a");
    assert!(soon(followed.next()).await.unwrap().is_none());

    // cut off for a while, the watch goes on where it was
    gate.close().await;
    for n in 1..=5 {
        write(n).await.unwrap();
    }
    gate.open().await;
    let values: Vec<String> = seen(&mut watch, 7).await.into_iter().map(|(_, v)| v).collect();
    assert_eq!(values, (1..=5).map(|n| format!("/registry/a={n}")).collect::<Vec<_>>());

    // what was compacted meanwhile cannot be told
    gate.close().await;
    for n in 6..=9 {
        write(n).await.unwrap();
    }
    direct.write(Write::put("/sampan/a", "x")).await.unwrap();
    let latest = direct.latest().await.unwrap();
    direct.compact(latest).await.unwrap();
    gate.open().await;
    let ended = soon(watch.next()).await;
    assert!(matches!(ended, Err(WatchError::Compacted { compacted: 12 })), "{ended:?}");
    assert_eq!(store.revision(), latest);
    assert!(matches!(store.watch("", 7), Err(StoreError::Compacted { compacted: 12 })));
    assert_eq!(soon(followed.next()).await.unwrap().unwrap().value, "x");
    let mut again = store.watch("", latest).unwrap();
    write(10).await.unwrap();
    assert_eq!(seen(&mut again, latest + 1).await, [(latest + 1, "/registry/a=10".to_owned())]);
    // the watch that ended has left no connection: each store has one for requests and one for its watch
    connections(&member, 4).await;
}

#[tokio::test]
async fn somebody_elses_transaction_is_listed_anew() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let member = Member::start(&[]);
    let store = member.connect().await;
    store.write(Write::create("/registry/a", "1")).await.unwrap();
    store.write(Write::create("/registry/b", "1")).await.unwrap();
    let mut watch = store.watch("", 3).unwrap();
    // etcdctl del --prefix /registry/, by etcd's JSON gateway: two objects in one revision
    let body = r#"{"key":"L3JlZ2lzdHJ5Lw==","range_end":"L3JlZ2lzdHJ5MA=="}"#;
    let request = format!(
        "POST /v3/kv/deleterange HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut http = TcpStream::connect(("127.0.0.1", member.port)).await.unwrap();
    http.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    http.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains(r#""deleted":"2""#), "{answer}");
    let ended = soon(watch.next()).await;
    assert!(matches!(ended, Err(WatchError::Compacted { compacted: 4 })), "{ended:?}");
    assert_eq!((store.count("/registry/").await.unwrap(), store.revision()), (0, 4));
}

#[tokio::test]
async fn an_etcd_that_went_back_is_listed_anew() {
    let mut member = Member::start(&[]);
    let store = member.connect().await;
    for n in 0..5 {
        store.write(Write::put("/registry/a", n.to_string())).await.unwrap();
    }
    let mut watch = store.watch("", store.revision()).unwrap();
    member.kill();
    member.wipe();
    member.run();
    let ended = soon(watch.next()).await;
    assert!(matches!(ended, Err(WatchError::Compacted { .. })), "{ended:?}");
    assert_eq!(store.revision(), 1);
    let mut watch = store.watch("", 1).unwrap();
    let revision = store.write(Write::create("/registry/a", "new")).await.unwrap();
    assert_eq!(seen(&mut watch, revision).await, [(2, "/registry/a=new".to_owned())]);
}

#[tokio::test]
async fn a_write_without_an_answer_is_not_sent_again() {
    let member = Member::start(&[]);
    let mut gate = Gate::to(&member).await;
    let store = Store::connect(gate.etcd()).await.unwrap();
    store.write(Write::create("/registry/a", "0")).await.unwrap();
    gate.mute.store(true, Ordering::SeqCst);
    let write = tokio::spawn({
        let store = store.clone();
        async move { store.write(Write::put("/registry/a", "1")).await }
    });
    let direct = member.connect().await;
    let arrived = async {
        while direct.get("/registry/a", None).await.unwrap().0.unwrap().value != "1" {
            sleep(Duration::from_millis(10)).await;
        }
    };
    soon(arrived).await;
    gate.close().await;
    gate.mute.store(false, Ordering::SeqCst);
    gate.open().await;
    let answer = soon(write).await.unwrap();
    assert!(matches!(&answer, Err(WriteError::Store(StoreError::Unanswered { .. }))), "{answer:?}");
    let (entry, _) = store.get("/registry/a", None).await.unwrap();
    assert_eq!(entry.unwrap().mod_revision, 3, "it was written once");
    // a read in the same place is just asked again
    gate.mute.store(true, Ordering::SeqCst);
    let read = tokio::spawn({
        let store = store.clone();
        async move { store.count("/registry/").await }
    });
    sleep(Duration::from_millis(100)).await;
    gate.close().await;
    gate.mute.store(false, Ordering::SeqCst);
    gate.open().await;
    assert!(matches!(soon(read).await.unwrap(), Ok(1) | Err(StoreError::Unreachable { .. })));
}

#[tokio::test]
async fn servers_compact_in_turns_and_then_are_silent() {
    let member = Member::start(&[]);
    let etcd = || Etcd { compact_interval: Duration::from_millis(400), ..member.etcd() };
    let stores = [Store::connect(etcd()).await.unwrap(), Store::connect(etcd()).await.unwrap()];
    let compacted = async {
        for n in 0.. {
            stores[0].write(Write::put("/registry/a", n.to_string())).await.unwrap();
            if stores.iter().all(|s| s.compacted() > 5) {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    soon(compacted).await;
    let old = stores[1].range(Range::prefix("/registry/").at(3)).await;
    assert!(matches!(old, Err(StoreError::Compacted { .. })), "{old:?}");
    sleep(Duration::from_millis(1500)).await;
    let before = stores[0].latest().await.unwrap();
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(stores[0].latest().await.unwrap(), before, "nothing happened, and something was written");
}

#[tokio::test]
async fn an_etcd_that_is_not_there_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let etcd = Etcd {
        connect_wait: Duration::from_millis(700),
        ..Etcd::new([format!("http://127.0.0.1:{port},http://127.0.0.1:1")])
    };
    let said = Store::connect(etcd).await.err().unwrap().to_string();
    assert!(said.contains(&format!("http://127.0.0.1:{port}: Connection refused")), "{said}");
    assert!(said.contains("http://127.0.0.1:1: ") && said.contains("check that it runs"), "{said}");
    // one that comes late is waited for
    let mut member = Member::start(&[]);
    member.kill();
    let store = tokio::spawn(Store::connect(member.etcd()));
    sleep(Duration::from_millis(700)).await;
    member.run();
    soon(store).await.unwrap().unwrap();
}

#[tokio::test]
async fn an_etcd_without_room_says_what_to_do() {
    let member = Member::start(&["--quota-backend-bytes", "2000000"]);
    let store = member.connect().await;
    let mut kept = 0;
    let error = loop {
        match store.write(Write::put(format!("/registry/{kept}"), vec![7; 100_000])).await {
            Ok(_) => kept += 1,
            Err(e) => break e,
        }
        assert!(kept < 100);
    };
    assert!(matches!(error, WriteError::Store(StoreError::Full { .. })), "{error}");
    assert!(error.to_string().contains("etcdctl defrag"), "{error}");
    // etcd does the write that goes over the limit, and says all the same that there was no room
    let count = store.count("/registry/").await.unwrap();
    assert!((kept..=kept + 1).contains(&count), "{kept} written, {count} there");
}

#[tokio::test]
async fn certificates_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let authority = Authority::load_or_create(folder.path()).unwrap();
    std::fs::write(path("authority.pem"), authority.certificate_pem()).unwrap();
    authority.server("etcd", &["127.0.0.1".to_owned()]).unwrap().save(&folder.path().join("server")).unwrap();
    authority.client("sampan", &[]).unwrap().save(&folder.path().join("client")).unwrap();
    let member = Member::start_tls(&[
        "--client-cert-auth",
        "--trusted-ca-file",
        &path("authority.pem"),
        "--cert-file",
        &path("server.crt"),
        "--key-file",
        &path("server.key"),
    ]);
    let etcd = Etcd {
        ca_file: Some(path("authority.pem").into()),
        cert_file: Some(path("client.crt").into()),
        key_file: Some(path("client.key").into()),
        ..member.etcd()
    };
    let store = Store::connect(etcd.clone()).await.unwrap();
    let mut watch = store.watch("", 1).unwrap();
    let revision = store.write(Write::create("/registry/a", "1")).await.unwrap();
    assert_eq!(seen(&mut watch, revision).await.len(), 1);
    for (wrong, want) in [
        (Etcd { cert_file: None, key_file: None, ..etcd.clone() }, "cannot be reached"),
        (Etcd { ca_file: None, ..etcd.clone() }, "UnknownIssuer"),
        (Etcd::new([member.endpoint().replace("https", "http")]), "cannot be reached"),
    ] {
        let wrong = Etcd { connect_wait: Duration::ZERO, ..wrong };
        let said = Store::connect(wrong).await.err().unwrap().to_string();
        assert!(said.contains(want), "{said}");
    }
}
