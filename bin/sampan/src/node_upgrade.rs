//! A node that replaces its own program, when an annotation of its Node asks for another release.
//!
//! Upstream counterpart: the jobs of rancher's system-upgrade-controller with k3s-upgrade's script, which copies a program
//! over the running one and kills it. Here the process tries the new program before it takes its place:
//!
//! 1. the program is fetched from the server over the node's own connection, its SHA-256 compared, and started once;
//! 2. it is put beside the service's program as `.sampan.next`, and this process, in order and with its pods left alone,
//!    executes it in its own stead: the process id stays, so that the service notices nothing;
//! 3. the new process waits until its Node is Ready with the new release. Then it renames itself over the service's
//!    program, which stays as `sampan.previous`; before that, whoever starts the service starts the old one.
//!
//! What stays true: the service's path names a program that works at any instruction; going back is not done, it happens,
//! when the new process ends however it does. One that hangs is ended by the kernel: an alarm is set before it is
//! executed, which execution leaves and only the success of step 3 takes back. What did not succeed is not tried again
//! for the same request. Pods run on in their shims all the while.
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use http::Request;
use http_body_util::{BodyExt, Limited};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use sampan_client::{Informer, Informers};
use sampan_kinds::upgrade::release::{self, Release};
use sampan_kinds::upgrade::{FAILED, MESSAGE, Program, REQUEST, SHA256, VERSION};
use sampan_world::files::write_atomic;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, watch};

use crate::programs;

/// So long may a new program take until its node is Ready; then the old one comes back.
const TRIAL_S: u32 = 120;
/// The kernel ends a new program that did not even see to that.
const ALARM_S: u32 = TRIAL_S + 30;
const VERSION_LIMIT: Duration = Duration::from_secs(30);
/// Without a byte for so long, the server is asked again.
const STALLED: Duration = Duration::from_secs(60);
const MAX_LIST_BYTES: usize = 1 << 20;
/// Requests that are under way, and the like, are given so long before the process is replaced.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Where everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Paths {
    /// What the service starts.
    program: PathBuf,
    /// What is tried.
    next: PathBuf,
    previous: PathBuf,
    /// What is being fetched or put in its place.
    part: PathBuf,
    state: PathBuf,
}

impl Paths {
    /// From the program that runs, be it the service's or one that is tried.
    fn of(exe: &Path, data_dir: &Path) -> Result<Self> {
        let folder = exe.parent().context("this program is in no folder")?;
        let name = exe.file_name().context("this program has no name")?.to_string_lossy();
        let name = name.strip_prefix('.').and_then(|n| n.strip_suffix(".next")).unwrap_or(&name).to_string();
        Ok(Self {
            program: folder.join(&name),
            next: folder.join(format!(".{name}.next")),
            previous: folder.join(format!("{name}.previous")),
            part: folder.join(format!(".{name}.part")),
            state: data_dir.join("agent/upgrade.json"),
        })
    }
}

/// How the last upgrade stands; kept on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    request: String,
    version: String,
    phase: Phase,
    message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// The new program was, or was about to be, executed.
    Trying,
    Done,
    Failed,
}

impl State {
    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    fn write(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        write_atomic(path, &serde_json::to_vec(self)?, 0o600)
            .with_context(|| format!("writing {}", path.display()))
    }

    fn ended(mut self, phase: Phase, message: impl Into<String>) -> Self {
        self.phase = phase;
        self.message = message.into();
        self
    }
}

/// What a start finds: the state that is true now, and whether this program is on trial.
fn take_up(state: Option<State>, is_next: bool, own: &str) -> (Option<State>, bool) {
    match state {
        Some(state) if state.phase == Phase::Trying && is_next => (Some(state), true),
        // it took its place, but did not come to writing that
        Some(state) if state.phase == Phase::Trying && state.version == own => {
            (Some(state.ended(Phase::Done, "")), false)
        }
        Some(state) if state.phase == Phase::Trying => {
            let why = format!("{} ended before its node was Ready; {own} runs again", state.version);
            (Some(state.ended(Phase::Failed, why)), false)
        }
        other => (other, false),
    }
}

/// This process's upgrades.
struct Upgrades {
    paths: Paths,
    state: parking_lot::Mutex<Option<State>>,
    is_trial: bool,
    started: Timestamp,
    /// What is executed when this process has put its things in order.
    successor: watch::Sender<Option<PathBuf>>,
}

/// There is one process to replace.
static UPGRADES: OnceLock<Arc<Upgrades>> = OnceLock::new();

/// Runs a long-lived subcommand, and after it the program that is to take its place.
pub fn run<F: Future<Output = Result<()>>>(data_dir: &Path, serve: F) -> Result<()> {
    let upgrades = begin(data_dir)?;
    let runtime = crate::runtime()?;
    let done = runtime.block_on(serve);
    runtime.shutdown_timeout(LAST_WORDS);
    let successor = upgrades.successor.borrow().clone();
    match successor {
        // also when the end was not in order: the successor looks after what it finds, as after a crash
        Some(program) => {
            if let Err(error) = done {
                tracing::warn!("ending: {error:#}");
            }
            Err(replace(&program))
        }
        None => done,
    }
}

fn begin(data_dir: &Path) -> Result<Arc<Upgrades>> {
    let exe = std::env::current_exe().context("finding this program")?;
    let paths = Paths::of(&exe, data_dir)?;
    let before = State::read(&paths.state);
    let (state, is_trial) = take_up(before.clone(), exe == paths.next, release::own());
    if let Some(state) = state.as_ref().filter(|state| before.as_ref() != Some(state)) {
        tracing::info!("upgrade to {}: {:?} {}", state.version, state.phase, state.message);
        state.write(&paths.state)?;
    }
    if is_trial {
        nix::unistd::alarm::set(ALARM_S);
        tracing::info!(version = release::own(), "this program is on trial until its node is Ready");
    } else {
        // none of its own: from a predecessor whose trial went well
        nix::unistd::alarm::cancel();
        let _ = std::fs::remove_file(&paths.next);
    }
    let upgrades = Arc::new(Upgrades {
        paths,
        state: parking_lot::Mutex::new(state),
        is_trial,
        started: sampan_world::clock::now_seconds(),
        successor: watch::Sender::new(None),
    });
    Ok(UPGRADES.get_or_init(|| upgrades).clone())
}

/// Executes the program in this process's stead; returns only why that failed.
pub fn replace(program: &Path) -> anyhow::Error {
    let mut words = std::env::args_os();
    let mut command = std::process::Command::new(program);
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    let error = command.args(words).exec();
    anyhow::Error::new(error).context(format!("executing {}", program.display()))
}

/// The path of the service's program: what shims are started from.
pub fn program() -> Result<PathBuf> {
    match UPGRADES.get() {
        Some(upgrades) => Ok(upgrades.paths.program.clone()),
        None => std::env::current_exe().context("finding this program"),
    }
}

/// Waits until this process is to be replaced.
pub async fn requested() {
    let Some(upgrades) = UPGRADES.get() else { return std::future::pending().await };
    let mut successor = upgrades.successor.subscribe();
    if successor.wait_for(Option::is_some).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// What the Node asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    request: String,
    version: String,
    sha256: Option<String>,
}

fn wanted(node: &Node) -> Option<Wanted> {
    let annotation = |name: &str| node.metadata.annotations.as_ref()?.get(name).cloned();
    Some(Wanted { request: annotation(REQUEST)?, version: annotation(VERSION)?, sha256: annotation(SHA256) })
}

/// Whether the Node is Ready with our release, said by this process.
fn is_confirmed(node: &Node, own: &str, started: Timestamp) -> bool {
    let Some(status) = &node.status else { return false };
    let ready = status.conditions.iter().flatten().find(|c| c.type_ == "Ready" && c.status == "True");
    let heard = ready.and_then(|c| c.last_heartbeat_time.as_ref()).is_some_and(|t| t.0 >= started);
    heard && status.node_info.as_ref().is_some_and(|info| info.kubelet_version == own)
}

/// Follows the node's own object for as long as the process lives.
pub fn follow(name: &str, client: &kube::Client, informers: &Informers) {
    let Some(upgrades) = UPGRADES.get().cloned() else { return };
    let nodes: Informer<Node> = informers.selected(&format!("metadata.name={name}"));
    let changed = Arc::new(Notify::new());
    let told = changed.clone();
    nodes.on_event(move |_| told.notify_one());
    let (name, client) = (name.to_string(), client.clone());
    sampan_telemetry::supervise("upgrades", move || {
        let (upgrades, nodes, name) = (upgrades.clone(), nodes.clone(), name.clone());
        let (client, changed) = (client.clone(), changed.clone());
        async move { upgrades.follow(&name, &client, &nodes, &changed).await }
    });
}

impl Upgrades {
    async fn follow(&self, name: &str, client: &kube::Client, nodes: &Informer<Node>, changed: &Notify) {
        let on_trial = self.is_trial && self.state.lock().as_ref().is_some_and(|s| s.phase == Phase::Trying);
        if on_trial && !self.try_out(name, nodes, changed).await {
            return std::future::pending().await;
        }
        loop {
            if let Some(node) = nodes.get("", name)
                && let Err(error) = self.heed(name, client, &node).await
            {
                tracing::warn!("upgrade: {error:#}");
                // the API did not take what we had to say
                tokio::time::sleep(Duration::from_secs(5)).await;
                continue;
            }
            if self.successor.borrow().is_some() {
                // nothing is left to do but to be replaced
                return std::future::pending().await;
            }
            changed.notified().await;
        }
    }

    /// Waits until the node is Ready, and takes the place of the service's program; else gives way to it.
    async fn try_out(&self, name: &str, nodes: &Informer<Node>, changed: &Notify) -> bool {
        let confirmed = async {
            while !nodes.get("", name).is_some_and(|node| is_confirmed(&node, release::own(), self.started)) {
                changed.notified().await;
            }
        };
        let limit = Duration::from_secs(u64::from(TRIAL_S));
        let done = match tokio::time::timeout(limit, confirmed).await {
            Ok(()) => self.take_place(),
            Err(_) => Err(anyhow::anyhow!("its node was not Ready within {TRIAL_S} s")),
        };
        let Err(error) = done else { return true };
        let state = self.state.lock().take();
        if let Some(state) = state {
            let why = format!("{} was given up: {error:#}; the version before runs again", state.version);
            tracing::warn!("{why}");
            let _ = state.ended(Phase::Failed, why).write(&self.paths.state);
        }
        self.successor.send_replace(Some(self.paths.program.clone()));
        false
    }

    fn take_place(&self) -> Result<()> {
        let Paths { program, next, previous, part, state } = &self.paths;
        let doing = |what: &str| format!("{what} {}", program.display());
        let _ = std::fs::remove_file(part);
        std::fs::hard_link(program, part).with_context(|| doing("keeping"))?;
        std::fs::rename(part, previous).with_context(|| doing("keeping"))?;
        std::fs::rename(next, program).with_context(|| doing("replacing"))?;
        sync_folder(program)?;
        nix::unistd::alarm::cancel();
        tracing::info!(version = release::own(), "this program has taken its place");
        let mut kept = self.state.lock();
        *kept = kept.take().map(|state| state.ended(Phase::Done, ""));
        kept.iter().try_for_each(|kept| kept.write(state))
    }

    /// Does what the node's annotations ask for, once.
    async fn heed(&self, name: &str, client: &kube::Client, node: &Node) -> Result<()> {
        let Some(wanted) = wanted(node) else { return Ok(()) };
        if wanted.version == release::own() {
            return annotate(client, name, json!({VERSION: null, SHA256: null, FAILED: null, MESSAGE: null}))
                .await;
        }
        let known = self.state.lock().clone().filter(|state| state.request == wanted.request);
        let failed = match known {
            Some(state) if state.phase == Phase::Failed => Some(state),
            _ => self.prepare(client, &wanted).await?,
        };
        let Some(failed) = failed else { return Ok(()) };
        annotate(
            client,
            name,
            json!({FAILED: failed.request, MESSAGE: failed.message, VERSION: null, SHA256: null}),
        )
        .await
    }

    /// Gets the new program ready and has this process end for it. `Some` is why it will not be.
    async fn prepare(&self, client: &kube::Client, wanted: &Wanted) -> Result<Option<State>> {
        let state = State {
            request: wanted.request.clone(),
            version: wanted.version.clone(),
            phase: Phase::Trying,
            message: String::new(),
        };
        tracing::info!(version = wanted.version, "upgrading");
        let ready = async {
            self.may_be_replaced()?;
            fetch(client, wanted, &self.paths.part).await?;
            try_version(&self.paths.part, &wanted.version).await
        };
        if let Err(error) = ready.await {
            tracing::warn!("upgrade to {}: {error:#}", wanted.version);
            let _ = std::fs::remove_file(&self.paths.part);
            let failed = state.ended(Phase::Failed, format!("{error:#}"));
            failed.write(&self.paths.state)?;
            *self.state.lock() = Some(failed.clone());
            return Ok(Some(failed));
        }
        std::fs::rename(&self.paths.part, &self.paths.next)?;
        sync_folder(&self.paths.next)?;
        state.write(&self.paths.state)?;
        *self.state.lock() = Some(state);
        nix::unistd::alarm::set(ALARM_S);
        self.successor.send_replace(Some(self.paths.next.clone()));
        Ok(None)
    }

    /// A program that others run, too, is not ours to replace.
    fn may_be_replaced(&self) -> Result<()> {
        let program = &self.paths.program;
        ensure!(
            !program.starts_with("/run/sampan/bin"),
            "{} is shared by all nodes of a lab; only an installed program can be replaced",
            program.display()
        );
        Ok(())
    }
}

async fn annotate(client: &kube::Client, name: &str, annotations: Value) -> Result<()> {
    let api = kube::Api::<Node>::all(client.clone());
    let patch = json!({"metadata": {"annotations": annotations}});
    api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    Ok(())
}

fn sync_folder(file: &Path) -> Result<()> {
    let folder = file.parent().context("no folder")?;
    Ok(std::fs::File::open(folder)?.sync_all()?)
}

/// Fetches the wanted program for this machine from the server and verifies it.
async fn fetch(client: &kube::Client, wanted: &Wanted, into: &Path) -> Result<()> {
    let get = |path: String| Request::get(path).body(kube::client::Body::empty());
    let response =
        client.send(get(programs::PATH.to_string())?).await.context("asking the server for programs")?;
    ensure!(
        response.status().is_success(),
        "the server answers {} when asked for programs",
        response.status()
    );
    let list = Limited::new(response.into_body(), MAX_LIST_BYTES).collect().await;
    let list = list.map_err(|e| anyhow::anyhow!("the server's list of programs: {e}"))?.to_bytes();
    let list: Vec<Program> = serde_json::from_slice(&list).context("the server's list of programs")?;
    let arch = sampan_fleet::binary::own_architecture();
    let fits = |p: &&Program| {
        p.arch == arch
            && p.version == wanted.version
            && wanted.sha256.as_ref().is_none_or(|sum| *sum == p.sha256)
    };
    let program = list.iter().find(fits).with_context(|| {
        let digest = wanted.sha256.as_ref().map(|sum| format!(" with the SHA-256 {sum}")).unwrap_or_default();
        format!("the server has no program of {} for {arch}{digest}", wanted.version)
    })?;
    let mut file =
        tokio::fs::File::create(into).await.with_context(|| format!("writing {}", into.display()))?;
    let response = client.send(get(format!("{}/{}", programs::PATH, program.sha256))?).await?;
    ensure!(
        response.status().is_success(),
        "the server answers {} when asked for the program",
        response.status()
    );
    let mut body = response.into_body();
    let (mut hash, mut size_bytes) = (Sha256::new(), 0_u64);
    loop {
        let frame = tokio::time::timeout(STALLED, body.frame()).await.context("the server sends no more")?;
        let Some(frame) = frame else { break };
        let Ok(data) = frame.context("receiving the program")?.into_data() else { continue };
        size_bytes += data.len() as u64;
        ensure!(size_bytes <= program.size_bytes, "more arrives than the server said");
        hash.update(&data);
        file.write_all(&data).await.with_context(|| format!("writing {}", into.display()))?;
    }
    file.flush().await?;
    file.set_permissions(std::fs::Permissions::from_mode(0o755)).await?;
    file.sync_all().await.with_context(|| format!("writing {}", into.display()))?;
    let got: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    ensure!(
        got == program.sha256,
        "what arrived is not what was asked for (SHA-256 {got}, not {})",
        program.sha256
    );
    Ok(())
}

/// The program must start here, and be what it is said to be.
async fn try_version(program: &Path, version: &str) -> Result<()> {
    let mut command = tokio::process::Command::new(program);
    let ran = command.arg("--version").kill_on_drop(true).output();
    let ran =
        tokio::time::timeout(VERSION_LIMIT, ran).await.context("the new program does not start in time")?;
    let ran = ran.context("the new program does not start")?;
    let said = String::from_utf8_lossy(&ran.stdout).trim().to_string();
    if !ran.status.success() {
        let said = String::from_utf8_lossy(&ran.stderr).trim().to_string();
        bail!("the new program does not start: {} {said}", ran.status);
    }
    ensure!(
        Release::of_version_line(&said).is_some_and(|found| version.parse::<Release>() == Ok(found)),
        "the new program says that it is {said:?}, not {version}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_service_and_of_a_trial_are_the_same() {
        let of = |exe: &str| Paths::of(Path::new(exe), Path::new("/data")).unwrap();
        let paths = of("/usr/local/bin/sampan");
        assert_eq!(paths.next, Path::new("/usr/local/bin/.sampan.next"));
        assert_eq!(paths.part, Path::new("/usr/local/bin/.sampan.part"));
        assert_eq!(of("/usr/local/bin/.sampan.next"), paths);
    }

    /// Whatever instruction the last process ended at.
    #[test]
    fn what_a_start_finds() {
        let state =
            |phase| State { request: "r".into(), version: "new".into(), phase, message: String::new() };
        for (before, is_next, own, want, trial) in [
            (None, false, "old", None, false),
            (Some(Phase::Trying), true, "new", Some(Phase::Trying), true),
            (Some(Phase::Trying), false, "old", Some(Phase::Failed), false),
            (Some(Phase::Trying), false, "new", Some(Phase::Done), false),
            (Some(Phase::Failed), false, "old", Some(Phase::Failed), false),
            (Some(Phase::Done), false, "new", Some(Phase::Done), false),
            // started by hand
            (Some(Phase::Done), true, "new", Some(Phase::Done), false),
        ] {
            let (found, is_trial) = take_up(before.map(state), is_next, own);
            assert_eq!((found.map(|s| s.phase), is_trial), (want, trial), "{before:?} {is_next} {own}");
        }
    }

    #[test]
    fn ready_counts_when_this_process_says_it() {
        let node = |version: &str, ready: &str, heard: &str| -> Node {
            let info = json!({"kubeletVersion": version, "architecture": "", "bootID": "", "containerRuntimeVersion": "",
                "kernelVersion": "", "kubeProxyVersion": "", "machineID": "", "operatingSystem": "", "osImage": "", "systemUUID": ""});
            let condition = json!({"type": "Ready", "status": ready, "lastHeartbeatTime": heard});
            serde_json::from_value(
                json!({"metadata": {}, "status": {"nodeInfo": info, "conditions": [condition]}}),
            )
            .unwrap()
        };
        let started = "2026-01-01T00:00:10Z".parse().unwrap();
        for (node, want) in [
            (node("new", "True", "2026-01-01T00:00:10Z"), true),
            (node("new", "True", "2026-01-01T00:00:09Z"), false),
            (node("old", "True", "2026-01-01T00:00:11Z"), false),
            (node("new", "False", "2026-01-01T00:00:11Z"), false),
        ] {
            assert_eq!(is_confirmed(&node, "new", started), want, "{node:?}");
        }
    }

    #[test]
    fn taking_the_place_keeps_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::of(&folder.path().join("sampan"), folder.path()).unwrap();
        std::fs::write(&paths.program, "old").unwrap();
        std::fs::write(&paths.next, "new").unwrap();
        let state =
            State { request: "r".into(), version: "v".into(), phase: Phase::Trying, message: String::new() };
        let upgrades = Upgrades {
            paths: paths.clone(),
            state: parking_lot::Mutex::new(Some(state)),
            is_trial: true,
            started: Timestamp::UNIX_EPOCH,
            successor: watch::Sender::new(None),
        };
        upgrades.take_place().unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!((read(&paths.program).as_str(), read(&paths.previous).as_str()), ("new", "old"));
        assert!(!paths.next.exists() && !paths.part.exists());
        assert_eq!(State::read(&paths.state).map(|s| s.phase), Some(Phase::Done));
    }

    /// The kernel's alarm outlives the execution of another program, and ends it.
    #[test]
    fn an_alarm_ends_a_program_that_hangs() {
        use std::os::unix::process::ExitStatusExt;
        // this test's own program, run again
        if std::env::var_os("SAMPAN_TEST_ALARM").is_some() {
            nix::unistd::alarm::set(1);
            panic!("{}", std::process::Command::new("sleep").arg("60").exec());
        }
        let exe = std::env::current_exe().unwrap();
        let mut command = std::process::Command::new(exe);
        command
            .env("SAMPAN_TEST_ALARM", "1")
            .args(["--exact", "node_upgrade::tests::an_alarm_ends_a_program_that_hangs"]);
        let status = command.stdout(std::process::Stdio::null()).status().unwrap();
        assert_eq!(status.signal(), Some(nix::sys::signal::Signal::SIGALRM as i32), "{status}");
    }
}
