//! The store in a file, table by table. What it has in common with etcd is in `tests/contract.rs`.
use std::time::Duration;

use bytes::Bytes;

use super::*;

struct Bench {
    _folder: tempfile::TempDir,
    options: Options,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = Options::new(folder.path().join("state.db")).deferred(["/lease/", "/event/"]);
        Self { _folder: folder, options }
    }

    fn open(&self) -> Store {
        Store::open(self.options.clone()).unwrap()
    }

    /// Opens what a crash at this moment would leave.
    fn crash(&self) -> (Bench, Store) {
        let after = Bench::new();
        for suffix in ["", "-wal"] {
            let name = |o: &Options| format!("{}{suffix}", o.path.display());
            std::fs::copy(name(&self.options), name(&after.options)).unwrap();
        }
        let store = after.open();
        (after, store)
    }
}

fn text(entry: &Entry) -> String {
    format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value))
}

async fn list(store: &Store, range: Range) -> String {
    let page = store.range(range).await.unwrap();
    let mut all: Vec<String> = page.entries.iter().map(text).collect();
    assert_eq!(page.more, page.remaining.is_some());
    all.extend(page.remaining.map(|n| format!("+{n}")));
    all.join(" ")
}

fn events(events: &[Event]) -> String {
    let one = |e: &Event| {
        let prev = e.prev.as_ref().map(text).unwrap_or_default();
        format!("{:?} {}={} [{prev}]", e.kind, e.key, String::from_utf8_lossy(&e.value))
    };
    events.iter().map(one).collect::<Vec<_>>().join("; ")
}

async fn take(watch: &mut Watch, n: usize) -> Vec<Event> {
    let mut all = Vec::new();
    while all.len() < n {
        all.extend(tokio::time::timeout(Duration::from_secs(20), watch.next()).await.unwrap().unwrap());
    }
    all
}

#[tokio::test]
async fn deferred_writes_are_guarded() {
    let bench = Bench::new();
    let store = bench.open();
    let (key, class) = ("/lease/a", Class::Deferred);
    let write = |expect, value: Option<&'static str>| {
        store.write(Write { key: key.into(), expect, value: value.map(Bytes::from), class })
    };
    assert_eq!(store.revision(), 1);
    assert_eq!(write(Expect::Absent, Some("1")).await.unwrap(), 2);
    let conflict = write(Expect::Absent, Some("x")).await.unwrap_err();
    assert!(
        matches!(&conflict, WriteError::Conflict { current: Some(e), .. } if text(e) == format!("{key}=1")),
        "{conflict}"
    );
    assert!(matches!(write(Expect::Revision(1), Some("x")).await, Err(WriteError::Conflict { .. })));
    assert_eq!(write(Expect::Revision(2), Some("2")).await.unwrap(), 3);
    let (entry, revision) = store.get(key, None).await.unwrap();
    let entry = entry.unwrap();
    assert_eq!((entry.create_revision, entry.mod_revision, revision), (2, 3, 3));
    assert!(matches!(write(Expect::Revision(2), None).await, Err(WriteError::Conflict { .. })));
    assert_eq!(write(Expect::Revision(3), None).await.unwrap(), 4);
    assert!(store.get(key, None).await.unwrap().0.is_none());
    assert!(matches!(
        write(Expect::Revision(3), None).await,
        Err(WriteError::Conflict { current: None, .. })
    ));
    assert_eq!(write(Expect::Any, None).await.unwrap(), 4, "deleting nothing takes no revision");
    assert_eq!(write(Expect::Any, Some("3")).await.unwrap(), 5);
    for (at, want) in [(1, None), (2, Some("1")), (3, Some("2")), (4, None), (5, Some("3"))] {
        let (entry, revision) = store.get(key, Some(at)).await.unwrap();
        assert_eq!(entry.map(|e| e.value), want.map(Bytes::from), "at {at}");
        assert_eq!(revision, at);
        let page = store.range(Range::prefix("/").at(at)).await.unwrap();
        assert_eq!(page.entries.first().map(|e| e.value.clone()), want.map(Bytes::from), "at {at}");
    }
    assert!(matches!(store.get(key, Some(6)).await, Err(StoreError::FutureRevision { .. })));
    assert!(matches!(store.range(Range::prefix("/").at(6)).await, Err(StoreError::FutureRevision { .. })));
}

#[tokio::test]
async fn ranges() {
    let bench = Bench::new();
    let store = bench.open();
    for key in ["/p/b", "/p/a", "/p/ä", "/p/a/x", "/p", "/q/a", "/p/Z", "/event/2", "/event/1", "/event/3"] {
        store.write(Write::create(key, "1").deferred()).await.unwrap();
    }
    let at = store.revision();
    store.flush().await.unwrap();
    store.write(Write::delete("/p/a", Expect::Any)).await.unwrap();
    store.write(Write::put("/p/b", "2")).await.unwrap();
    store.write(Write::delete("/event/2", Expect::Any).deferred()).await.unwrap();
    store.write(Write::create("/event/0", "1").deferred()).await.unwrap();
    for (range, want) in [
        (Range::prefix("/p/"), "/p/Z=1 /p/a/x=1 /p/b=2 /p/ä=1"),
        (Range::prefix("/p/").at(at), "/p/Z=1 /p/a=1 /p/a/x=1 /p/b=1 /p/ä=1"),
        (Range::prefix("/p/").limit(2), "/p/Z=1 /p/a/x=1 +2"),
        (Range::prefix("/p/").limit(4), "/p/Z=1 /p/a/x=1 /p/b=2 /p/ä=1"),
        (Range::prefix("/p/").limit(2).start_after("/p/Z").at(at), "/p/a=1 /p/a/x=1 +2"),
        (Range { from: Some("/p/b".into()), ..Range::prefix("/p/") }, "/p/b=2 /p/ä=1"),
        (Range { from: Some("/a".into()), ..Range::prefix("/q/") }, "/q/a=1"),
        (Range::prefix("/none"), ""),
        (Range::prefix("/event/"), "/event/0=1 /event/1=1 /event/3=1"),
        (Range::prefix("/event/").at(at), "/event/1=1 /event/2=1 /event/3=1"),
        (Range::prefix("/event/").limit(1).start_after("/event/0"), "/event/1=1 +1"),
        (Range::prefix("").limit(2), "/event/0=1 /event/1=1 +7"),
        (Range::prefix("").limit(3).start_after("/event/1"), "/event/3=1 /p=1 /p/Z=1 +4"),
        (Range::prefix("").at(at - 9), "/p/b=1"),
    ] {
        assert_eq!(list(&store, range.clone()).await, want, "{range:?}");
    }
    for (prefix, want) in [("/p/", 4), ("", 9), ("/event/", 3), ("/x", 0)] {
        assert_eq!(store.count(prefix).await.unwrap(), want, "{prefix}");
    }
}

#[tokio::test]
async fn watches_from_past_now_and_future() {
    for ring in [4 << 20, 0] {
        let mut bench = Bench::new();
        // Without memory for history everything comes from the file.
        bench.options.history_bytes = ring;
        let store = bench.open();
        let mut now = store.watch("/p/", 1).unwrap();
        let mut future = store.watch("/p/", 4).unwrap();
        store.write(Write::create("/p/a", "1")).await.unwrap();
        store.write(Write::create("/x", "1")).await.unwrap();
        store.write(Write::put("/p/a", "2")).await.unwrap();
        store.write(Write::delete("/p/a", Expect::Any)).await.unwrap();
        store.write(Write::create("/p/a", "3")).await.unwrap();
        let tail = "Delete /p/a= [/p/a=2]; Put /p/a=3 []";
        let all = format!("Put /p/a=1 []; Put /p/a=2 [/p/a=1]; {tail}");
        let seen = take(&mut now, 4).await;
        assert_eq!(events(&seen), all);
        assert_eq!(seen.iter().map(|e| e.revision).collect::<Vec<_>>(), [2, 4, 5, 6]);
        assert_eq!(seen.iter().map(|e| e.create_revision).collect::<Vec<_>>(), [2, 2, 2, 6]);
        assert_eq!(events(&take(&mut future, 2).await), tail);
        assert_eq!(events(&take(&mut store.watch("/p/", 1).unwrap(), 4).await), all);
        assert_eq!(events(&take(&mut store.watch("/p/", 4).unwrap(), 2).await), tail);
        let mut fresh = store.watch("/p/", 6).unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(20), fresh.next()).await.is_err());
        store.write(Write::put("/p/b", "1")).await.unwrap();
        assert_eq!(events(&take(&mut fresh, 1).await), "Put /p/b=1 []");
    }
}

#[tokio::test]
async fn slow_watches_hold_nobody_up() {
    let mut bench = Bench::new();
    bench.options.history_bytes = 4096;
    let store = bench.open();
    let (mut durable, mut lease) = (store.watch("/p/", 1).unwrap(), store.watch("/lease/", 1).unwrap());
    store.write(Write::put("/lease/a", "1").deferred()).await.unwrap();
    let quiet = store.watch("/event/", 1).unwrap();
    for n in 0..600 {
        store.write(Write::put("/p/a", format!("{n}"))).await.unwrap();
    }
    assert!(store.stats().history_bytes <= 4096);
    let seen = take(&mut durable, 600).await;
    assert!(seen.windows(2).all(|w| w[1].prev.as_ref().unwrap().value == w[0].value));
    assert!(matches!(lease.next().await, Err(WatchError::TooSlow { .. })));
    // Nothing happened under it, so it has not fallen behind.
    let mut quiet = quiet;
    store.write(Write::put("/event/a", "1").deferred()).await.unwrap();
    assert_eq!(events(&take(&mut quiet, 1).await), "Put /event/a=1 []");
}

/// Rows of the log on disk.
fn rows(bench: &Bench) -> i64 {
    crate::sqlite::file::open_reader(&bench.options.path)
        .and_then(|c| c.query_row("SELECT count(*) FROM log", [], |r| r.get(0)))
        .unwrap()
}

#[tokio::test]
async fn few_rows_are_forgotten_but_stay_on_disk_for_a_while() {
    let mut bench = Bench::new();
    bench.options.compact_interval = Duration::from_millis(20);
    let store = bench.open();
    for n in 0..3 {
        store.write(Write::put("/a", format!("{n}"))).await.unwrap();
    }
    let revision = store.revision();
    while store.compacted() < revision {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let old = store.get("/a", Some(revision - 1)).await;
    assert!(matches!(old, Err(StoreError::Compacted { .. })), "{old:?}");
    assert_eq!(rows(&bench), 3);
    for n in 0..100 {
        store.write(Write::put("/a", format!("{n}"))).await.unwrap();
    }
    let deadline = sampan_world::clock::monotonic() + Duration::from_secs(10);
    while rows(&bench) > 64 {
        assert!(sampan_world::clock::monotonic() < deadline, "{} rows are left", rows(&bench));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_file_stays_bounded() {
    let mut bench = Bench::new();
    bench.options.compact_after_revisions = 40;
    let store = bench.open();
    for n in 0..2000_u32 {
        store.write(Write::put(format!("/p/{}", n % 10), vec![0; 8000])).await.unwrap();
    }
    assert!(store.revision() - store.compacted() <= 42);
    store.close().await.unwrap();
    let size = std::fs::metadata(&bench.options.path).unwrap().len();
    assert!(size < 2_000_000, "16 MB went through a file that is now {size} bytes");
}

#[tokio::test]
async fn restarts() {
    let bench = Bench::new();
    let store = bench.open();
    store.write(Write::create("/p/a", "1")).await.unwrap();
    store.write(Write::create("/lease/a", "1")).await.unwrap();
    store.write(Write::put("/lease/a", "2").deferred()).await.unwrap();
    store.write(Write::create("/event/a", "1").deferred()).await.unwrap();
    let revision = store.revision();

    // A crash loses what was deferred, and never gives its revisions again.
    let (_crashed, after) = bench.crash();
    assert!(after.revision() >= revision);
    assert_eq!(list(&after, Range::prefix("")).await, "/lease/a=1 /p/a=1");
    assert!(after.write(Write::put("/p/b", "1")).await.unwrap() > revision);
    for prefix in ["/lease/", "/event/a", ""] {
        let past = after.watch(prefix, revision);
        assert!(matches!(past, Err(StoreError::Compacted { .. })), "{prefix}");
    }
    assert!(matches!(after.get("/lease/a", Some(revision)).await, Err(StoreError::Compacted { .. })));
    assert_eq!(list(&after, Range::prefix("/p/").at(2)).await, "/p/a=1");
    assert_eq!(events(&take(&mut after.watch("/p/", 1).unwrap(), 2).await), "Put /p/a=1 []; Put /p/b=1 []");

    // A clean end keeps all and goes on with the next revision.
    let impatient = Options { lock_wait: Duration::ZERO, ..bench.options.clone() };
    assert!(matches!(Store::open(impatient), Err(StoreError::Locked { .. })));
    // one that is about to end is waited for
    let patient = bench.options.clone();
    let successor = std::thread::spawn(move || Store::open(patient).map(|store| store.revision()));
    std::thread::sleep(Duration::from_millis(60));
    store.close().await.unwrap();
    assert!(matches!(store.write(Write::put("/p/a", "2")).await, Err(WriteError::Store(StoreError::Closed))));
    drop(store);
    assert_eq!(successor.join().unwrap().unwrap(), revision);
    let store = bench.open();
    assert_eq!(store.revision(), revision);
    assert_eq!(list(&store, Range::prefix("")).await, "/event/a=1 /lease/a=2 /p/a=1");
    assert_eq!(store.write(Write::put("/lease/a", "3").deferred()).await.unwrap(), revision + 1);
    let prev = take(&mut store.watch("/lease/", revision).unwrap(), 1).await;
    assert_eq!(events(&prev), "Put /lease/a=3 [/lease/a=2]");
    drop(store);

    // Other prefixes: the keys move.
    let other = Options::new(&bench.options.path).deferred(["/p/"]);
    let store = Store::open(other).unwrap();
    assert_eq!(list(&store, Range::prefix("")).await, "/event/a=1 /lease/a=3 /p/a=1");
}

#[tokio::test]
async fn deferred_writes_reach_the_disk_in_batches() {
    let mut bench = Bench::new();
    bench.options.flush_interval = Duration::from_millis(50);
    let store = bench.open();
    store.write(Write::put("/p/a", "1")).await.unwrap();
    let before = store.stats().commits;
    for n in 0..100 {
        store.write(Write::put("/lease/a", format!("{n}")).deferred()).await.unwrap();
    }
    for _ in 0..200 {
        if store.stats().deferred_keys == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(store.stats().deferred_keys, 0);
    assert!(
        store.stats().commits - before < 50,
        "100 renewals took {} commits",
        store.stats().commits - before
    );
    assert_eq!(list(&bench.crash().1, Range::prefix("/lease/")).await, "/lease/a=99");
    // Elsewhere the deferred class is durable.
    store.write(Write::put("/p/a", "2").deferred()).await.unwrap();
    assert_eq!(list(&bench.crash().1, Range::prefix("/p/")).await, "/p/a=2");
}

#[tokio::test]
async fn damaged_files_say_so() {
    let store = |bytes: &[u8]| {
        let bench = Bench::new();
        std::fs::write(&bench.options.path, bytes).unwrap();
        match Store::open(bench.options.clone()) {
            Err(e @ StoreError::Corrupt { .. }) => e.to_string(),
            Err(e) => panic!("{e}"),
            Ok(_) => panic!("opened"),
        }
    };
    for said in [store(&[b'x'; 5000]), store(&[b"SQLite format 3\0".as_slice(), &[7; 9000]].concat())] {
        assert!(said.contains("state.db") && said.contains("restore it from a backup"), "{said}");
    }
    let bench = Bench::new();
    let foreign = rusqlite::Connection::open(&bench.options.path).unwrap();
    foreign.execute_batch("CREATE TABLE t (a)").unwrap();
    drop(foreign);
    let said = Store::open(bench.options.clone()).err().unwrap().to_string();
    assert!(said.contains("not a store"), "{said}");
}
