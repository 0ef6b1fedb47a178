//! `kill -9`, hundreds of times.
//!
//! A child writes durable and deferred keys and says on a pipe what was acknowledged and what a watch showed.
//! The parent kills it at a random moment, opens a copy of what lies on the disk and checks: no acknowledged
//! durable write is lost, no revision is given twice or goes back, and the watch stream is the log. The next child goes
//! on with the same file.
#![allow(clippy::unwrap_used, reason = "a test")]
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sampan_store::{EventKind, Expect, Options, Range, Store, Write};
use sampan_world::random;

const FILE: &str = "SAMPAN_STORE_TEST_FILE";
const COMPACT: &str = "SAMPAN_STORE_TEST_COMPACT";
const TASKS: u64 = 6;
const KEYS: u64 = 4;

fn options(path: &Path, compact_after_revisions: u64) -> Options {
    let mut options = Options::new(path).deferred(["/lease/"]);
    options.compact_after_revisions = compact_after_revisions;
    options.flush_interval = Duration::from_millis(3);
    options
}

/// One write(2) a line, so that a killed child leaves whole lines.
fn say(line: String) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Some(path) = std::env::var_os(FILE) else { return };
    let compact = std::env::var(COMPACT).unwrap().parse().unwrap();
    let store = Store::open(options(Path::new(&path), compact)).unwrap();
    say(format!("@open {}", store.revision()));
    let mut watch = store.watch("/p/", store.revision()).unwrap();
    tokio::spawn(async move {
        while let Ok(events) = watch.next().await {
            for e in events {
                let value =
                    if e.kind == EventKind::Delete { "-".into() } else { String::from_utf8_lossy(&e.value) };
                say(format!("@seen {} {} {value}", e.revision, e.key));
            }
        }
    });
    let tasks: Vec<_> = (0..TASKS).map(|task| tokio::spawn(write(store.clone(), task))).collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// Writes keys of its own for ever; a value is the number of the write.
async fn write(store: Store, task: u64) {
    let deferred = task % 3 == 2;
    let prefix = if deferred { "/lease/" } else { "/p/" };
    for number in store.revision().. {
        let key = format!("{prefix}{task}/{}", random::below(KEYS));
        let current = store.get(&key, None).await.unwrap().0;
        let expect = current.as_ref().map_or(Expect::Absent, |e| Expect::Revision(e.mod_revision));
        let value = format!("{number}{}", " ".repeat(random::below(2000) as usize));
        let gone = current.is_some() && random::below(8) == 0;
        let mut write =
            if gone { Write::delete(&key, expect) } else { Write { expect, ..Write::put(&key, value) } };
        if deferred {
            write = write.deferred();
        }
        let revision = store.write(write).await.unwrap();
        say(format!("@acked {revision} {key} {}", if gone { "-".to_owned() } else { number.to_string() }));
        if deferred {
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
    }
}

#[derive(Default)]
struct Witness {
    /// The newest revision anyone has seen.
    newest: u64,
    /// The last acknowledged state of each durable key.
    acked: BTreeMap<String, (u64, String)>,
    acks: usize,
    seen: usize,
}

impl Witness {
    /// Runs a child for a while, kills it, and returns what its watch saw.
    fn run(&mut self, path: &Path, compact: u64) -> Vec<(u64, String, String)> {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture"])
            .env(FILE, path)
            .env(COMPACT, compact.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (opened, open) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            // The harness's own words may stand before the first.
            let lines = out.lines().map_while(Result::ok);
            let said = lines.filter_map(|l| l.find('@').map(|i| l[i..].to_owned()));
            said.inspect(|_| opened.send(()).unwrap_or(())).collect::<Vec<_>>()
        });
        // Most die while they write, some while they open the file.
        if random::below(8) > 0 {
            open.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        std::thread::sleep(Duration::from_micros(random::below(20_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        let (before, mut seen) = (self.newest, Vec::new());
        let mut given = std::collections::BTreeSet::new();
        for line in reader.join().unwrap() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let revision: u64 = words[1].parse().unwrap();
            match words[0] {
                "@open" => assert!(revision >= before, "revision {revision} after {before}"),
                "@seen" => seen.push((revision, words[2].to_owned(), words[3].to_owned())),
                _ => {
                    assert!(revision > before, "revision {revision} was given before {before}");
                    assert!(given.insert(revision), "revision {revision} was given twice");
                    self.acks += 1;
                    if words[2].starts_with("/p/") {
                        self.acked.insert(words[2].to_owned(), (revision, words[3].to_owned()));
                    }
                }
            }
            self.newest = self.newest.max(revision);
        }
        assert!(seen.windows(2).all(|w| w[0].0 < w[1].0), "the watch went back");
        self.seen += seen.len();
        seen
    }

    async fn check(&mut self, path: &Path, compact: u64, seen: Vec<(u64, String, String)>) {
        let copy = tempfile::tempdir().unwrap();
        let copied = copy.path().join("state.db");
        for suffix in ["", "-wal"] {
            let name = |p: &Path| format!("{}{suffix}", p.display());
            // A child killed before it began leaves no WAL.
            if Path::new(&name(path)).exists() {
                std::fs::copy(name(path), name(&copied)).unwrap();
            }
        }
        let store = Store::open(options(&copied, compact)).unwrap();
        assert!(store.revision() >= self.newest, "{} < {}", store.revision(), self.newest);
        let page = store.range(Range::prefix("/p/")).await.unwrap();
        let state: BTreeMap<String, (u64, String)> = page
            .entries
            .iter()
            .map(|e| {
                (e.key.to_string(), (e.mod_revision, String::from_utf8_lossy(&e.value).trim().to_owned()))
            })
            .collect();
        // The log from the oldest revision there is, through a watch.
        let from = store.compacted();
        let mut history: BTreeMap<u64, (String, String)> = BTreeMap::new();
        let mut replayed: BTreeMap<String, u64> = BTreeMap::new();
        for e in store.range(Range::prefix("/p/").at(from)).await.unwrap().entries {
            replayed.insert(e.key.to_string(), e.mod_revision);
        }
        let mut watch = store.watch("/p/", from).unwrap();
        let progress = watch.progress();
        while progress.delivered().unwrap() < store.revision() {
            let Ok(events) = tokio::time::timeout(Duration::from_millis(50), watch.next()).await else {
                continue;
            };
            for e in events.unwrap() {
                let key = e.key.to_string();
                let prev = e.prev.as_ref().map(|p| p.mod_revision);
                assert_eq!(prev, replayed.get(&key).copied(), "{key} at {}", e.revision);
                let value = if e.kind == EventKind::Delete {
                    replayed.remove(&key);
                    "-".to_owned()
                } else {
                    replayed.insert(key.clone(), e.revision);
                    String::from_utf8_lossy(&e.value).trim().to_owned()
                };
                assert!(history.last_key_value().is_none_or(|(r, _)| *r < e.revision));
                history.insert(e.revision, (key, value));
            }
        }
        let now: BTreeMap<String, u64> = state.iter().map(|(k, (r, _))| (k.clone(), *r)).collect();
        assert_eq!(replayed, now, "the log does not lead to the state");
        for (revision, key, value) in seen.into_iter().filter(|s| s.0 > from) {
            assert_eq!(history.get(&revision), Some(&(key, value)), "a watch saw what the log doesn't have");
        }
        for (key, (revision, value)) in &self.acked {
            let later = history.iter().any(|(r, (k, _))| r > revision && k == key);
            match state.get(key) {
                Some((r, v)) if r == revision => assert_eq!(v, value),
                Some((r, _)) => assert!(r > revision, "{key}: {revision} was acknowledged, {r} is there"),
                None => assert!(value == "-" || later || from > *revision, "{key}: {revision} is lost"),
            }
            if value == "-" {
                assert!(state.get(key).is_none_or(|(r, _)| r > revision), "{key} is back");
            }
        }
        for e in store.range(Range::prefix("/lease/")).await.unwrap().entries {
            assert!(e.mod_revision <= store.revision() && e.create_revision <= e.mod_revision);
        }
        // What the crash let through unacknowledged counts from now on.
        for (revision, (key, value)) in history {
            let known = self.acked.entry(key).or_default();
            if known.0 < revision {
                *known = (revision, value);
            }
        }
    }
}

#[tokio::test]
async fn nothing_acknowledged_is_lost() {
    if std::env::var_os(FILE).is_some() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // With the whole history, then with compaction running all the time.
    for (name, compact, kills) in [("whole.db", u64::MAX, 120), ("compacted.db", 30, 130)] {
        let path = folder.path().join(name);
        let mut witness = Witness::default();
        for _ in 0..kills {
            let seen = witness.run(&path, compact);
            witness.check(&path, compact, seen).await;
        }
        println!("{name}: {} acknowledged, {} seen, revision {}", witness.acks, witness.seen, witness.newest);
        assert!(witness.acks > 2 * kills && witness.seen > kills, "the children hardly wrote");
    }
}
