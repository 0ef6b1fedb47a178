//! What a store promises, on each of its backends.
//!
//! Each case begins with an empty store. The cases of `mod etcd` need an `etcd` in the PATH.
#![allow(clippy::unwrap_used, reason = "a test")]
use std::time::Duration;

use bytes::Bytes;
use sampan_store::{
    Class, Entry, Event, Expect, Guard, Options, Range, Store, StoreError, Watch, WatchError, Write,
    WriteError,
};

#[path = "etcd/member.rs"]
#[allow(dead_code, reason = "shared with the tests of etcd alone")]
mod member;

enum Backend {
    Sqlite(tempfile::TempDir),
    Etcd(member::Member),
}

impl Backend {
    async fn open(&self) -> Store {
        match self {
            Backend::Sqlite(folder) => {
                Store::open(Options::new(folder.path().join("state.db")).deferred(["/registry/lease/"]))
                    .unwrap()
            }
            Backend::Etcd(member) => member.connect().await,
        }
    }
}

macro_rules! on_each_backend {
    ($($case:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $case() {
                super::$case(&super::Backend::Sqlite(tempfile::tempdir().unwrap())).await;
            })*
        }
        mod etcd {
            $(#[tokio::test]
            async fn $case() {
                super::$case(&super::Backend::Etcd(super::member::Member::start(&[]))).await;
            })*
        }
    };
}

on_each_backend! {
    guards_and_revisions,
    transactions_are_whole,
    ranges,
    watches_from_now_and_the_future,
    progress_follows_the_consumer,
    plain_keys_are_followed_alone,
    compaction_keeps_the_present,
    a_closed_store_says_so,
}

fn text(entry: &Entry) -> String {
    format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value))
}

async fn list(store: &Store, range: Range) -> String {
    let page = store.range(range).await.unwrap();
    let mut all: Vec<String> = page.entries.iter().map(text).collect();
    assert_eq!(page.more, page.remaining.is_some());
    all.extend(page.remaining.map(|n| format!("+{n}")));
    all.join(" ").replace("/registry", "")
}

fn events(events: &[Event]) -> String {
    let one = |e: &Event| {
        let prev = e.prev.as_ref().map(text).unwrap_or_default();
        format!("{:?} {}={} [{prev}]", e.kind, e.key, String::from_utf8_lossy(&e.value))
    };
    events.iter().map(one).collect::<Vec<_>>().join("; ").replace("/registry", "")
}

async fn take(watch: &mut Watch, n: usize) -> Vec<Event> {
    let mut all = Vec::new();
    while all.len() < n {
        all.extend(soon(watch.next()).await.unwrap());
    }
    all
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.unwrap()
}

async fn guards_and_revisions(backend: &Backend) {
    let store = backend.open().await;
    let key = "/registry/a";
    let write = |expect, value: Option<&'static str>| {
        let value = value.map(Bytes::from);
        store.write(Write { key: key.into(), expect, value, class: Class::Durable })
    };
    assert_eq!((store.revision(), store.latest().await.unwrap()), (1, 1));
    assert_eq!(write(Expect::Absent, Some("1")).await.unwrap(), 2);
    let conflict = write(Expect::Absent, Some("x")).await.unwrap_err();
    assert!(
        matches!(&conflict, WriteError::Conflict { current: Some(e), .. } if text(e) == format!("{key}=1")),
        "{conflict}"
    );
    for wrong in [0, 1] {
        let conflict = write(Expect::Revision(wrong), Some("x")).await;
        assert!(matches!(conflict, Err(WriteError::Conflict { .. })), "{wrong}");
    }
    assert_eq!(write(Expect::Revision(2), Some("2")).await.unwrap(), 3);
    let (entry, revision) = store.get(key, None).await.unwrap();
    let entry = entry.unwrap();
    assert_eq!((entry.create_revision, entry.mod_revision, revision), (2, 3, 3));
    assert!(matches!(write(Expect::Revision(2), None).await, Err(WriteError::Conflict { .. })));
    assert_eq!(write(Expect::Revision(3), None).await.unwrap(), 4);
    assert!(store.get(key, None).await.unwrap().0.is_none());
    for gone in [0, 3] {
        let conflict = write(Expect::Revision(gone), None).await;
        assert!(matches!(conflict, Err(WriteError::Conflict { current: None, .. })), "{gone}");
    }
    assert_eq!(write(Expect::Any, None).await.unwrap(), 4, "deleting nothing takes no revision");
    assert_eq!(write(Expect::Any, Some("3")).await.unwrap(), 5);
    for (at, want) in [(1, None), (2, Some("1")), (3, Some("2")), (4, None), (5, Some("3"))] {
        let (entry, revision) = store.get(key, Some(at)).await.unwrap();
        assert_eq!(entry.map(|e| e.value), want.map(Bytes::from), "at {at}");
        assert_eq!(revision, at);
        let page = store.range(Range::prefix("/registry/").at(at)).await.unwrap();
        assert_eq!(page.entries.first().map(|e| e.value.clone()), want.map(Bytes::from), "at {at}");
        assert_eq!(page.revision, at);
    }
    let future = store.get(key, Some(6)).await;
    assert!(matches!(future, Err(StoreError::FutureRevision { requested: 6, current: 5 })), "{future:?}");
    let future = store.range(Range::prefix("/").at(6)).await;
    assert!(matches!(future, Err(StoreError::FutureRevision { .. })), "{future:?}");
    assert_eq!((store.revision(), store.latest().await.unwrap()), (5, 5));
}

async fn transactions_are_whole(backend: &Backend) {
    let store = backend.open().await;
    store.write(Write::create("/registry/a", "1")).await.unwrap();
    let guard = |expect| vec![Guard { key: "/registry/a".into(), expect }];
    let writes = || vec![Write::create("/registry/b", "1"), Write::put("/sampan/c", "1")];
    let failed = store.write_many(guard(Expect::Absent), writes()).await.unwrap_err();
    assert!(matches!(failed, WriteError::Conflict { key, .. } if key == "/registry/a"));
    assert_eq!(list(&store, Range::prefix("")).await, "/a=1");
    let revisions = store.write_many(guard(Expect::Revision(2)), writes()).await.unwrap();
    assert_eq!(revisions.len(), 2);
    for (key, revision) in ["/registry/b", "/sampan/c"].iter().zip(revisions) {
        assert_eq!(store.get(key, None).await.unwrap().0.unwrap().mod_revision, revision);
    }
    let failed =
        store.write_many(vec![], vec![Write::put("/sampan/d", "1"), Write::create("/registry/b", "2")]).await;
    assert!(matches!(failed, Err(WriteError::Conflict { key, .. }) if key == "/registry/b"));
    assert_eq!(list(&store, Range::prefix("")).await, "/a=1 /b=1 /sampan/c=1");
    let twice =
        store.write_many(vec![], vec![Write::put("/sampan/d", "1"), Write::put("/sampan/d", "2")]).await;
    assert!(matches!(twice, Err(WriteError::Store(StoreError::Invalid { .. }))));
    for size_bytes in [3 << 19, 2 << 20] {
        // just what the file takes is too much for etcd, which counts the whole request
        let big = store.write(Write::put("/registry/big", vec![0; size_bytes])).await;
        let refused = matches!(&big, Err(WriteError::Store(StoreError::TooLarge { key, .. })) if key == "/registry/big");
        assert_eq!(refused, store.is_shared() || size_bytes > 3 << 19, "{size_bytes}: {big:?}");
    }
}

async fn ranges(backend: &Backend) {
    let store = backend.open().await;
    for key in ["/p/b", "/p/a", "/p/ä", "/p/a/x", "/p", "/q/a", "/p/Z"] {
        store.write(Write::create(format!("/registry{key}"), "1")).await.unwrap();
    }
    let at = store.revision();
    store.write(Write::delete("/registry/p/a", Expect::Any)).await.unwrap();
    store.write(Write::put("/registry/p/b", "2")).await.unwrap();
    let p = || Range::prefix("/registry/p/");
    for (range, want) in [
        (p(), "/p/Z=1 /p/a/x=1 /p/b=2 /p/ä=1"),
        (p().at(at), "/p/Z=1 /p/a=1 /p/a/x=1 /p/b=1 /p/ä=1"),
        (p().limit(2), "/p/Z=1 /p/a/x=1 +2"),
        (p().limit(4), "/p/Z=1 /p/a/x=1 /p/b=2 /p/ä=1"),
        (p().limit(2).start_after("/registry/p/Z").at(at), "/p/a=1 /p/a/x=1 +2"),
        (Range { from: Some("/registry/p/b".into()), ..p() }, "/p/b=2 /p/ä=1"),
        (Range { from: Some("/z".into()), ..p() }, ""),
        (Range { from: Some("/a".into()), ..Range::prefix("/registry/q/") }, "/q/a=1"),
        (Range::prefix("/none"), ""),
        (Range::prefix("").limit(2), "/p=1 /p/Z=1 +4"),
        (Range::prefix("").at(2), "/p/b=1"),
    ] {
        assert_eq!(list(&store, range.clone()).await, want, "{range:?}");
    }
    for (prefix, want) in [("/registry/p/", 4), ("", 6), ("/x", 0)] {
        assert_eq!(store.count(prefix).await.unwrap(), want, "{prefix}");
    }
    // more than etcd is asked for at a time, read as of one revision
    let writes: Vec<_> = (0..620)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(
                async move { store.write(Write::create(format!("/registry/many/{n:03}"), "1")).await },
            )
        })
        .collect();
    for write in writes {
        write.await.unwrap().unwrap();
    }
    let page = store.range(Range::prefix("/registry/many/")).await.unwrap();
    assert_eq!((page.entries.len(), page.more, page.revision), (620, false, store.revision()));
    assert!(page.entries.windows(2).all(|w| w[0].key < w[1].key));
}

async fn watches_from_now_and_the_future(backend: &Backend) {
    let store = backend.open().await;
    let mut now = store.watch("/registry/p/", 1).unwrap();
    let mut future = store.watch("/registry/p/", 4).unwrap();
    store.write(Write::create("/registry/p/a", "1")).await.unwrap();
    store.write(Write::create("/registry/x", "1")).await.unwrap();
    store.write(Write::put("/registry/p/a", "2")).await.unwrap();
    store.write(Write::delete("/registry/p/a", Expect::Any)).await.unwrap();
    store.write(Write::create("/registry/p/a", "3")).await.unwrap();
    let tail = "Delete /p/a= [/p/a=2]; Put /p/a=3 []";
    let all = format!("Put /p/a=1 []; Put /p/a=2 [/p/a=1]; {tail}");
    let seen = take(&mut now, 4).await;
    assert_eq!(events(&seen), all);
    assert_eq!(seen.iter().map(|e| e.revision).collect::<Vec<_>>(), [2, 4, 5, 6]);
    assert_eq!(seen.iter().map(|e| e.create_revision).collect::<Vec<_>>(), [2, 2, 2, 6]);
    assert_eq!(events(&take(&mut future, 2).await), tail);
    assert_eq!(events(&take(&mut store.watch("/registry/p/", 1).unwrap(), 4).await), all);
    let mut fresh = store.watch("/registry/p/", 6).unwrap();
    store.write(Write::create("/registry/p/b", "1")).await.unwrap();
    assert_eq!(events(&take(&mut fresh, 1).await), "Put /p/b=1 []");
}

async fn progress_follows_the_consumer(backend: &Backend) {
    let store = backend.open().await;
    let mut watch = store.watch("/registry/p/", 1).unwrap();
    let progress = watch.progress();
    store.write(Write::create("/registry/other", "1")).await.unwrap();
    assert_eq!(progress.delivered(), Some(2), "nothing of it was missed");
    store.write(Write::create("/registry/p/a", "1")).await.unwrap();
    assert!(progress.delivered() < Some(3));
    take(&mut watch, 1).await;
    assert!(progress.delivered() < Some(3), "handed out, not dealt with");
    let reader = tokio::spawn({
        let progress = progress.clone();
        async move { progress.reached(3).await }
    });
    tokio::task::yield_now().await;
    assert!(tokio::time::timeout(Duration::from_millis(20), watch.next()).await.is_err());
    reader.await.unwrap().unwrap();
    assert_eq!(progress.delivered(), Some(3));
    drop(watch);
    assert_eq!(progress.delivered(), None);
}

async fn plain_keys_are_followed_alone(backend: &Backend) {
    let store = backend.open().await;
    let mut objects = store.watch("", 1).unwrap();
    let mut follow = store.follow("/sampan/a");
    assert!(soon(follow.next()).await.unwrap().is_none());
    store.write(Write::put("/sampan/ab", "other")).await.unwrap();
    store.write(Write::put("/sampan/a", "1")).await.unwrap();
    assert_eq!(soon(follow.next()).await.unwrap().map(|e| text(&e)).unwrap(), "/sampan/a=1");
    store.write(Write::put("/registry/p", "1")).await.unwrap();
    store.write(Write::put("/sampan/a", "2")).await.unwrap();
    let last = store.write(Write::put("/sampan/a", "3")).await.unwrap();
    assert_eq!(soon(follow.next()).await.unwrap().map(|e| text(&e)).unwrap(), "/sampan/a=3");
    // who follows objects sees the object, and that there is nothing else for them
    let mut seen = Vec::new();
    let mut through = 0;
    while through < last {
        let batch = soon(objects.next_batch()).await.unwrap();
        assert!(batch.through > through, "a batch that tells nothing");
        through = batch.through;
        seen.extend(batch.events);
    }
    assert_eq!(events(&seen), "Put /p=1 []");
    assert!(tokio::time::timeout(Duration::from_millis(50), objects.next_batch()).await.is_err());
    store.write(Write::delete("/sampan/a", Expect::Any)).await.unwrap();
    assert!(soon(follow.next()).await.unwrap().is_none());
    assert_eq!(soon(objects.next_batch()).await.unwrap().through, last + 1);
}

async fn compaction_keeps_the_present(backend: &Backend) {
    let store = backend.open().await;
    for n in 0..10 {
        store.write(Write::put("/registry/p/a", format!("{n}"))).await.unwrap();
    }
    store.write(Write::create("/registry/p/b", "1")).await.unwrap();
    store.write(Write::delete("/registry/p/b", Expect::Any)).await.unwrap();
    store.write(Write::create("/registry/p/c", "1")).await.unwrap();
    let p = || Range::prefix("/registry/p/");
    assert!(matches!(store.compact(99).await, Err(StoreError::FutureRevision { .. })));
    store.compact(13).await.unwrap();
    store.compact(12).await.unwrap();
    assert_eq!(store.compacted(), 13);
    for at in [2, 12] {
        let got = store.get("/registry/p/a", Some(at)).await;
        assert!(matches!(got, Err(StoreError::Compacted { compacted: 13 })), "{at}: {got:?}");
        assert!(store.watch("/registry/p/", at).is_err());
        let listed = store.range(p().at(at)).await;
        assert!(matches!(listed, Err(StoreError::Compacted { .. })), "{at}: {listed:?}");
    }
    assert_eq!(list(&store, p().at(13)).await, "/p/a=9");
    assert_eq!(list(&store, p()).await, "/p/a=9 /p/c=1");
    let first = take(&mut store.watch("/registry/p/", 13).unwrap(), 1).await;
    assert_eq!(events(&first), "Put /p/c=1 []");
    drop(store);
    let store = backend.open().await;
    assert_eq!(list(&store, p()).await, "/p/a=9 /p/c=1");
    let got = store.get("/registry/p/a", Some(12)).await;
    assert!(matches!(got, Err(StoreError::Compacted { compacted: 13 })), "{got:?}");
}

async fn a_closed_store_says_so(backend: &Backend) {
    let store = backend.open().await;
    store.write(Write::create("/registry/a", "1")).await.unwrap();
    let mut watch = store.watch("", store.revision()).unwrap();
    store.close().await.unwrap();
    assert!(matches!(soon(watch.next()).await, Err(WatchError::Closed)));
    assert!(matches!(store.watch("", 1), Err(StoreError::Closed)));
    let written = store.write(Write::put("/registry/a", "2")).await;
    assert!(matches!(written, Err(WriteError::Store(StoreError::Closed))), "{written:?}");
    let read = store.range(Range::prefix("")).await;
    assert!(matches!(read, Err(StoreError::Closed)), "{read:?}");
    assert!(store.flush().await.is_err() && store.close().await.is_err());
    assert_eq!(list(&backend.open().await, Range::prefix("")).await, "/a=1");
}
