//! The `etcd` program: found, started as a child of this process, listened to, started again, ended.
//!
//! Upstream counterpart: K3s' pkg/executor/etcd.go, which has etcd within its own process. What stays true: there is one
//! for a data folder; it ends with its server, and one that a killed server left behind is ended before the next begins;
//! one that ends by itself is started again, with back-off, unless the cluster has removed it. Only flags that etcd 3.4,
//! 3.5 and 3.6 all have are used; what is wished and not needed goes by environment variables, which a version that does
//! not know them leaves alone.
use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sampan_world::{clock, files};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::watch;
use tokio::time::Instant;

use super::certificate::Files;
use super::record::{self, CLIENT_PORT, Record};

const NAME: &str = "etcd";
const PID: &str = "db/etcd.pid";
/// It hands over what it leads, and closes its files.
const ENDING: Duration = Duration::from_secs(10);
const LAST_WORDS: Duration = Duration::from_secs(2);
const FIRST_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_secs(30);
/// The same words are told again after this.
const SILENCE: Duration = Duration::from_secs(600);
const MAX_KNOWN_WORDS: usize = 64;
const MAX_WORDS_CHARS: usize = 400;
/// Warnings that warn of nothing: that it has begun as it should.
const USUAL: [&str; 3] =
    [" I | ", "simple token is not cryptographically signed", "established TCP streaming connection"];
const REMOVED: &str = "permanently removed from the cluster";
/// Slow cards write slowly: K3s' times.
const HEARTBEAT_MS: u32 = 500;
const ELECTION_MS: u32 = 5000;
/// etcd keeps so many entries of its log in memory, and 5000 more, before it writes a snapshot: its default of 100000 came
/// to hundreds of megabytes.
const SNAPSHOT_COUNT: u32 = 10_000;
/// Beyond this no writes are taken. Where addresses are of 32 bits, the file must fit in between all else.
const QUOTA_BYTES: u64 = if cfg!(target_pointer_width = "32") { 512 << 20 } else { 2 << 30 };

/// What a start without data of its own is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Initial {
    /// The first member of a new cluster, with a name that tells it from others.
    New(String),
    /// `NAME=URL` of all members, with commas.
    Existing(String),
    /// There is data.
    Again,
    /// There is data, and what it says of other members is to be forgotten.
    Alone,
}

/// Finds the program: what the flag names, else in the PATH.
pub fn find(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = given {
        return match is_program(path) {
            true => Ok(path.to_path_buf()),
            false => bail!("--etcd {}: there is no program there; {ADVICE}", path.display()),
        };
    }
    // what starts services at boot does not always look everywhere
    let (path, usual) =
        (std::env::var_os("PATH").unwrap_or_default(), OsStr::new("/usr/local/bin:/usr/bin:/bin"));
    let folders = std::env::split_paths(&path).chain(std::env::split_paths(usual));
    let found = folders.map(|folder| folder.join(NAME)).find(|path| is_program(path));
    found.with_context(|| format!("there is no program `{NAME}` in the PATH; {ADVICE}"))
}

const ADVICE: &str = "servers that share a cluster run etcd 3.4 or later: install Debian's package `etcd-server` (and \
                      disable its service), Alpine's `etcd`, or name another with --etcd";

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Refuses a program that is too old.
pub async fn check_version(program: &Path) -> Result<()> {
    let output = Command::new(program).arg("--version").env_clear().envs(environment(false)).output().await;
    let output = output.with_context(|| format!("starting {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let Some((major, minor)) = version(&text) else {
        bail!("{} does not say that it is etcd: {}", program.display(), text.trim());
    };
    match (major, minor) >= (3, 4) {
        true => Ok(()),
        false => bail!("{} is etcd {major}.{minor}; 3.4 or later is needed", program.display()),
    }
}

fn version(text: &str) -> Option<(u32, u32)> {
    let line = text.lines().find_map(|line| line.strip_prefix("etcd Version: "))?;
    let mut parts = line.trim().split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// How the program is to be started, as often as that is needed.
#[derive(Clone)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<String>,
    folder: PathBuf,
    is_debugged: bool,
}

impl Program {
    /// For `<data-dir>/server`.
    pub fn new(path: PathBuf, folder: &Path, record: &Record, initial: &Initial, is_debugged: bool) -> Self {
        let arguments = arguments(folder, record, initial);
        Self { path, arguments, folder: folder.to_path_buf(), is_debugged }
    }

    /// Starts it, and keeps it.
    pub fn keep(self) -> Running {
        let (ending, state) = (watch::Sender::new(false), watch::Sender::new(State::default()));
        let (is_ending, told) = (ending.subscribe(), state.subscribe());
        let task = tokio::spawn(async move { keep(&self, is_ending, &state).await });
        Running { ending, state: told, task }
    }

    fn spawn(&self) -> Result<Child> {
        let child = Command::new(&self.path)
            .args(&self.arguments)
            .env_clear()
            .envs(environment(self.is_debugged))
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // a terminal's Ctrl-C is for the server, which then ends it in order
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", self.path.display()))?;
        if let Some(pid) = child.id() {
            let path = self.folder.join(PID);
            files::write_atomic(&path, pid.to_string().as_bytes(), 0o600)
                .with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(child)
    }
}

fn arguments(folder: &Path, record: &Record, initial: &Initial) -> Vec<String> {
    let tls = Files::of(folder);
    let shown = |path: PathBuf| path.display().to_string();
    let (client, peer) = (record.client_url(), record.peer_url());
    let own = format!("https://127.0.0.1:{CLIENT_PORT}");
    let listen = if client == own { own } else { format!("{own},{client}") };
    let mut pairs = vec![
        ("data-dir", shown(record::data(folder))),
        ("name", record.name.clone()),
        ("listen-client-urls", listen),
        ("advertise-client-urls", client),
        ("listen-peer-urls", peer.clone()),
        ("initial-advertise-peer-urls", peer.clone()),
        ("client-cert-auth", "true".to_string()),
        ("trusted-ca-file", shown(tls.authority())),
        ("cert-file", shown(tls.certificate())),
        ("key-file", shown(tls.key())),
        ("peer-client-cert-auth", "true".to_string()),
        ("peer-trusted-ca-file", shown(tls.authority())),
        ("peer-cert-file", shown(tls.certificate())),
        ("peer-key-file", shown(tls.key())),
        ("heartbeat-interval", HEARTBEAT_MS.to_string()),
        ("election-timeout", ELECTION_MS.to_string()),
        ("quota-backend-bytes", QUOTA_BYTES.to_string()),
    ];
    let itself = format!("{}={peer}", record.name);
    let (state, all) = match initial {
        Initial::New(token) => {
            pairs.push(("initial-cluster-token", token.clone()));
            ("new", itself)
        }
        Initial::Existing(all) => ("existing", all.clone()),
        Initial::Again | Initial::Alone => ("existing", itself),
    };
    pairs.push(("initial-cluster-state", state.to_string()));
    pairs.push(("initial-cluster", all));
    if *initial == Initial::Alone {
        pairs.push(("force-new-cluster", "true".to_string()));
    }
    pairs.into_iter().map(|(name, value)| format!("--{name}={value}")).collect()
}

fn environment(is_debugged: bool) -> Vec<(&'static str, String)> {
    let of_parent = ["PATH", "HOME", "TMPDIR", "GOGC", "GOMEMLIMIT", "GODEBUG"];
    let kept = of_parent.into_iter().filter_map(|name| Some((name, std::env::var(name).ok()?)));
    let mut all: Vec<(&str, String)> = kept.collect();
    // of three idle members each has 44 MB so, and 53 MB with Go's default of 100
    if all.iter().all(|(name, _)| *name != "GOGC") {
        all.push(("GOGC", "50".to_string()));
    }
    let level = if is_debugged { "info" } else { "warn" };
    for (name, value) in [
        ("ETCD_LOGGER", "zap"),
        ("ETCD_LOG_OUTPUTS", "stderr"),
        ("ETCD_LOG_LEVEL", level),
        // each of them takes 64 MB of the disk
        ("ETCD_MAX_WALS", "2"),
        ("ETCD_MAX_SNAPSHOTS", "2"),
        // one that comes back does not make the others vote anew; 3.5 does so by itself
        ("ETCD_PRE_VOTE", "true"),
    ] {
        all.push((name, value.to_string()));
    }
    all.push(("ETCD_SNAPSHOT_COUNT", SNAPSHOT_COUNT.to_string()));
    // 3.4 wants to be told where it was less tested
    match std::env::consts::ARCH {
        "aarch64" => all.push(("ETCD_UNSUPPORTED_ARCH", "arm64".to_string())),
        "arm" => all.push(("ETCD_UNSUPPORTED_ARCH", "arm".to_string())),
        _ => {}
    }
    all
}

/// How the program fares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// How often it has ended by itself.
    pub ends: u32,
    /// What it said last, when it had something to say.
    pub words: String,
    /// The cluster has removed this member; it is not started again.
    pub is_removed: bool,
}

/// The program, kept running.
pub struct Running {
    ending: watch::Sender<bool>,
    pub state: watch::Receiver<State>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    /// Waits until the cluster has removed this member.
    pub async fn removed(&self) {
        let mut state = self.state.clone();
        if state.wait_for(|state| state.is_removed).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until it has ended so often.
    pub async fn ended(&self, times: u32) -> State {
        let mut state = self.state.clone();
        match state.wait_for(|state| state.is_removed || state.ends >= times).await {
            Ok(state) => state.clone(),
            Err(_) => State::default(),
        }
    }

    /// Ends it in order.
    pub async fn end(self) {
        self.ending.send_replace(true);
        let _ = self.task.await;
    }
}

async fn keep(program: &Program, mut ending: watch::Receiver<bool>, state: &watch::Sender<State>) {
    let mut delay = FIRST_DELAY;
    loop {
        let began = clock::monotonic();
        let (why, said) = match program.spawn() {
            Err(error) => (format!("{error:#}"), Said::default()),
            Ok(mut child) => {
                let log = child.stderr.take().map(|stderr| tokio::spawn(listen(stderr)));
                let ended = tokio::select! {
                    ended = child.wait() => Some(ended),
                    _ = ending.wait_for(|ends| *ends) => None,
                };
                let Some(ended) = ended else {
                    end(&mut child).await;
                    let _ = std::fs::remove_file(program.folder.join(PID));
                    return;
                };
                let said = match log {
                    // what it started might hold the pipe open
                    Some(log) => match tokio::time::timeout(LAST_WORDS, log).await {
                        Ok(said) => said.unwrap_or_default(),
                        Err(_) => Said::default(),
                    },
                    None => Said::default(),
                };
                (shown(ended), said)
            }
        };
        let _ = std::fs::remove_file(program.folder.join(PID));
        state.send_modify(|state| {
            state.ends += 1;
            state.words = if said.words.is_empty() { why.clone() } else { said.words.clone() };
            state.is_removed = said.is_removed;
        });
        if said.is_removed {
            tracing::error!("this server's etcd was removed from the cluster");
            return;
        }
        if began.elapsed() > MAX_DELAY * 2 {
            delay = FIRST_DELAY;
        }
        tracing::error!(said = said.words, "etcd ended ({why}); starting it again in {} s", delay.as_secs());
        tokio::select! {
            () = tokio::time::sleep(delay) => delay = (delay * 2).min(MAX_DELAY),
            _ = ending.wait_for(|ends| *ends) => return,
        }
    }
}

fn shown(ended: std::io::Result<ExitStatus>) -> String {
    ended.map_or_else(|error| error.to_string(), |status| status.to_string())
}

async fn end(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if tokio::time::timeout(ENDING, child.wait()).await.is_err() {
        tracing::warn!("etcd does not end by itself within {} s: it is killed", ENDING.as_secs());
        let _ = child.kill().await;
    }
}

/// What the program has said until its end.
#[derive(Default)]
struct Said {
    words: String,
    is_removed: bool,
}

/// Brings its log into ours; what it repeats, from time to time.
async fn listen(stderr: ChildStderr) -> Said {
    let mut said = Said::default();
    let mut known: HashMap<String, Instant> = HashMap::new();
    let mut lines = BufReader::new(stderr).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        let Some((level, words)) = line_of(&String::from_utf8_lossy(&line)) else { continue };
        said.is_removed |= words.contains(REMOVED);
        if level == tracing::Level::DEBUG {
            tracing::debug!("etcd: {words}");
            continue;
        }
        said.words.clone_from(&words);
        let now = clock::monotonic();
        known.retain(|_, at| now.saturating_duration_since(*at) < SILENCE);
        // the numbers within differ each time
        let key: String = words.chars().filter(|c| !c.is_ascii_digit()).take(60).collect();
        if known.contains_key(&key) || known.len() >= MAX_KNOWN_WORDS {
            tracing::debug!("etcd: {words}");
            continue;
        }
        known.insert(key, now);
        match level {
            tracing::Level::ERROR => tracing::error!("etcd: {words}"),
            _ => tracing::warn!("etcd: {words}"),
        }
    }
    said
}

/// Level and words of a line, which is JSON once its logger has begun.
fn line_of(line: &str) -> Option<(tracing::Level, String)> {
    let line = line.trim();
    if line.is_empty() {
        return None;
    }
    let is_usual = USUAL.iter().any(|words| line.contains(words));
    let at_most = |level| if is_usual { tracing::Level::DEBUG } else { level };
    let Ok(serde_json::Value::Object(fields)) = serde_json::from_str(line) else {
        return Some((at_most(tracing::Level::WARN), line.chars().take(MAX_WORDS_CHARS).collect()));
    };
    let text = |name: &str| fields.get(name).and_then(serde_json::Value::as_str).unwrap_or_default();
    let level = match text("level") {
        "warn" => at_most(tracing::Level::WARN),
        "debug" | "info" => tracing::Level::DEBUG,
        _ => tracing::Level::ERROR,
    };
    let mut words = text("msg").to_string();
    for (name, value) in &fields {
        if !matches!(name.as_str(), "level" | "ts" | "caller" | "msg" | "stacktrace" | "logger") {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_string);
            words.push_str(&format!(" {name}={value}"));
        }
    }
    Some((level, words.chars().take(MAX_WORDS_CHARS).collect()))
}

/// The one that an earlier server left in that `<data-dir>/server`.
pub fn left_over(folder: &Path) -> Option<i32> {
    let pid: i32 = std::fs::read_to_string(folder.join(PID)).ok()?.trim().parse().ok()?;
    let wanted = format!("--data-dir={}", record::data(folder).display());
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let is_named = line.split(|b| *b == 0).any(|word| word == wanted.as_bytes());
    // a process that has ended and waits for its parent has none
    let runs = std::fs::read_link(format!("/proc/{pid}/exe")).is_ok();
    (is_named && runs).then_some(pid)
}

/// Ends what an earlier server left; blocks.
pub fn end_left_over(folder: &Path) -> Result<()> {
    const STEP: Duration = Duration::from_millis(50);
    let Some(pid) = left_over(folder) else { return Ok(()) };
    tracing::info!(pid, "an etcd that an earlier server left is ended");
    let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    for step in 0..400 {
        std::thread::sleep(STEP);
        if left_over(folder).is_none() {
            let _ = std::fs::remove_file(folder.join(PID));
            return Ok(());
        }
        if step == 200 {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    bail!("the etcd that an earlier server left (process {pid}) does not end")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record { name: "a".to_string(), address: "10.0.0.1".parse().unwrap(), others: Vec::new() }
    }

    #[test]
    fn flags() {
        let of = |initial| arguments(Path::new("/d/server"), &record(), &initial).join(" ");
        let new = of(Initial::New("t".to_string()));
        for want in [
            "--data-dir=/d/server/db/etcd ",
            "--listen-client-urls=https://127.0.0.1:2379,https://10.0.0.1:2379 ",
            "--advertise-client-urls=https://10.0.0.1:2379 ",
            "--peer-cert-file=/d/server/tls/etcd/member.crt ",
            "--initial-cluster-token=t --initial-cluster-state=new --initial-cluster=a=https://10.0.0.1:2380",
        ] {
            assert!(new.contains(want), "{want} in {new}");
        }
        let all = "a=https://10.0.0.1:2380,b=https://10.0.0.2:2380";
        let joined = of(Initial::Existing(all.to_string()));
        assert!(joined.ends_with(&format!("--initial-cluster-state=existing --initial-cluster={all}")));
        assert!(!joined.contains("force-new-cluster"));
        assert!(of(Initial::Alone).ends_with("--force-new-cluster=true"));
        let near = Record { address: "127.0.0.1".parse().unwrap(), ..record() };
        let near = arguments(Path::new("/d"), &near, &Initial::Again).join(" ");
        assert!(near.contains("--listen-client-urls=https://127.0.0.1:2379 "), "{near}");
    }

    #[test]
    fn lines() {
        use tracing::Level;
        let json = r#"{"level":"warn","ts":"2026","caller":"x.go:1","msg":"slow","took":"1s","n":3}"#;
        for (line, want) in [
            (json, Some((Level::WARN, "slow n=3 took=1s"))),
            (r#"{"level":"fatal","msg":"gone"}"#, Some((Level::ERROR, "gone"))),
            (r#"{"level":"info","msg":"fine"}"#, Some((Level::DEBUG, "fine"))),
            (
                "2026-11-22 14:21:28.0 I | pkg/flags: x",
                Some((Level::DEBUG, "2026-11-22 14:21:28.0 I | pkg/flags: x")),
            ),
            ("panic: oh", Some((Level::WARN, "panic: oh"))),
            ("  ", None),
        ] {
            assert_eq!(line_of(line), want.map(|(level, words)| (level, words.to_string())), "{line}");
        }
        assert_eq!(version("etcd Version: 3.4.23\nGit SHA: x\n"), Some((3, 4)));
        assert_eq!(version("etcd Version: 3.10.0-rc.1"), Some((3, 10)));
        assert_eq!(version("usage"), None);
    }

    /// A program that stands for etcd: says something and sleeps, or ends.
    fn program(folder: &Path, script: &str) -> Program {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.join("program");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir_all(folder.join("db")).unwrap();
        Program::new(path, folder, &record(), &Initial::Again, false)
    }

    async fn pid(folder: &Path) -> i32 {
        for _ in 0..200 {
            if let Some(pid) = left_over(folder) {
                return pid;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("it was not started");
    }

    #[tokio::test]
    async fn runs_until_it_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let running = program(folder.path(), "sleep 5 2>/dev/null & wait").keep();
        let first = pid(folder.path()).await;
        kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
        assert_eq!(running.ended(1).await.words, "signal: 9 (SIGKILL)");
        let second = pid(folder.path()).await;
        assert_ne!(first, second, "it was started again");
        running.end().await;
        assert!(left_over(folder.path()).is_none() && !folder.path().join(PID).exists());
        // what somebody else does with that number is left alone
        std::fs::write(folder.path().join(PID), std::process::id().to_string()).unwrap();
        assert!(left_over(folder.path()).is_none());
    }

    #[tokio::test]
    async fn a_member_that_was_removed_is_not_started_again() {
        let folder = tempfile::tempdir().unwrap();
        let line =
            format!(r#"{{"level":"warn","msg":"server error","error":"the member has been {REMOVED}"}}"#);
        let running = program(folder.path(), &format!("echo '{line}' >&2; exit 0")).keep();
        running.removed().await;
        assert_eq!(running.ended(1).await.ends, 1);
        running.end().await;
    }

    #[test]
    fn the_program_is_found() {
        let error = find(Some(Path::new("/nowhere/etcd"))).unwrap_err().to_string();
        assert!(error.contains("--etcd /nowhere/etcd") && error.contains("etcd-server"), "{error}");
        assert_eq!(find(Some(Path::new("/bin/sh"))).unwrap(), Path::new("/bin/sh"));
    }
}
