//! What the store costs: bytes an idle cluster writes, and (ignored) the throughput of group commit.
#![allow(clippy::unwrap_used, reason = "a test")]
use std::time::Duration;

use sampan_store::{Options, Range, Store, Write};

fn written_bytes() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|l| l.strip_prefix("wchar: ")).unwrap().parse().unwrap()
}

/// A server with its own node: its lease and two leader leases every 10 s, its status every 5 minutes.
#[tokio::test]
async fn idle_writes_stay_small() {
    const MINUTES: u64 = 20;
    let folder = tempfile::tempdir().unwrap();
    let mut options = Options::new(folder.path().join("state.db")).deferred(["/leases/", "/events/"]);
    options.flush_interval = Duration::from_secs(3600);
    let store = Store::open(options).unwrap();
    for n in 0..500 {
        store.write(Write::create(format!("/configmaps/{n:05}"), vec![b'x'; 700])).await.unwrap();
    }
    let before = written_bytes();
    for minute in 0..MINUTES {
        for second in 0..6 {
            for lease in ["node", "scheduler", "controllers"] {
                let value = format!("{minute}:{second}{}", "x".repeat(600));
                store.write(Write::put(format!("/leases/{lease}"), value).deferred()).await.unwrap();
            }
        }
        if minute % 5 == 0 {
            store.write(Write::put("/nodes/a", vec![b'x'; 5000])).await.unwrap();
            store.compact(store.revision() - 90).await.unwrap();
        }
        store.flush().await.unwrap();
    }
    let per_minute = (written_bytes() - before) / MINUTES;
    println!("idle: {per_minute} bytes a minute");
    assert!(per_minute <= 16 << 10, "{per_minute} bytes a minute");
    assert_eq!(store.count("/leases/").await.unwrap(), 3);
}

/// cargo test -p sampan-store --test cost -- --ignored --nocapture
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn throughput() {
    for (writers, bytes) in [(1, 1000), (16, 1000), (128, 1000), (128, 4000)] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let store = Store::open(Options::new(folder.path().join("state.db"))).unwrap();
        let (before, start) = (written_bytes(), tokio::time::Instant::now());
        let each = 2000 / writers;
        let tasks: Vec<_> = (0..writers)
            .map(|w| {
                let store = store.clone();
                tokio::spawn(async move {
                    for n in 0..each {
                        store.write(Write::create(format!("/k/{w}/{n}"), vec![b'x'; bytes])).await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let (puts, took) = (writers * each, start.elapsed());
        let amplified = (written_bytes() - before) / puts as u64;
        let commits = store.stats().commits;
        println!(
            "{writers} writers of {bytes} bytes: {:.0} puts/s, {commits} commits for {puts} puts, {amplified} bytes a put",
            puts as f64 / took.as_secs_f64()
        );
        let start = tokio::time::Instant::now();
        let listed = store.range(Range::prefix("/k/")).await.unwrap().entries.len();
        println!("  listed {listed} in {:?}", start.elapsed());
        let start = tokio::time::Instant::now();
        for w in 0..writers {
            store.get(&format!("/k/{w}/0"), None).await.unwrap();
        }
        println!("  get {:?}", start.elapsed() / writers as u32);
    }
}
