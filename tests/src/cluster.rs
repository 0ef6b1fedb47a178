//! A cluster in the lab, and what a case may do with it: kubectl, raw requests, kube-rs, commands in nodes.
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http::{HeaderMap, Request};
use kube::client::Body;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::process::{Ran, run};
use crate::registry::Registry;
use crate::{image, wait_for};

/// How long a command may take unless it says otherwise.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

#[derive(Default)]
pub struct Setup {
    pub suite: &'static str,
    pub nodes: String,
    pub server_args: Vec<String>,
    pub box_image: bool,
    pub registry: bool,
    pub etcd: bool,
    pub wait_for_nodes: bool,
}

/// A lab that runs. It ends with [`Cluster::down`], which may be called from any thread, also twice.
pub struct Cluster {
    pub sampan: PathBuf,
    name: String,
    folder: TempDir,
    root: PathBuf,
    kubeconfig: PathBuf,
    client: kube::Client,
    runtime: Option<Runtime>,
    pub registry: Option<Registry>,
    ended: AtomicBool,
}

/// An answer of the API.
#[derive(Debug)]
pub struct Answer {
    pub code: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// Must be a `Status` with this code, this reason and `want` in its message.
    pub fn is(&self, code: u16, reason: &str, want: &str) -> Result<()> {
        let status = self.json();
        let (got, message) = (status["reason"].as_str().unwrap_or_default(), &status["message"]);
        let message = message.as_str().unwrap_or_default();
        if self.code != code || got != reason || !message.contains(want) {
            let body = String::from_utf8_lossy(&self.body[..self.body.len().min(1000)]);
            bail!("expected {code} {reason} {want:?}, got {} {body}", self.code);
        }
        // the body must say the same as the response
        if status["kind"] != "Status" || status["code"] != code || status["status"] != "Failure" {
            bail!("not the Status of a failure: {status}");
        }
        Ok(())
    }

    pub fn ok(self) -> Result<Value> {
        match self.code {
            200..=299 => Ok(self.json()),
            _ => bail!("{} {}", self.code, String::from_utf8_lossy(&self.body)),
        }
    }
}

impl Cluster {
    pub fn up(setup: &Setup) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("these tests make namespaces, mounts and cgroups: run them as root");
        }
        let built = binary()?;
        let root = lab_root()?;
        let folder = tempfile::Builder::new().prefix("sampan-test-").tempdir_in(&root)?;
        let sampan = folder.path().join("sampan");
        // a rebuild while tests run must not swap it; an inode of its own costs nothing
        if std::fs::hard_link(&built, &sampan).is_err() {
            std::fs::copy(&built, &sampan).with_context(|| format!("copying {}", built.display()))?;
        }
        sweep(&sampan, &root);
        let name = format!("{}-{}", setup.suite, std::process::id());
        let mut command = lab(&sampan, &root, &name, "up");
        command.args(["--nodes", &setup.nodes]);
        if setup.box_image {
            let images = folder.path().join("images");
            std::fs::create_dir(&images)?;
            image::box_image()?.write_archive(&images.join("box.tar"))?;
            command.arg("--images").arg(images);
        }
        let registries = folder.path().join("registries.yaml");
        let mut args = setup.server_args.clone();
        if setup.registry {
            std::fs::write(&registries, Registry::mirrors())?;
            args.push(format!("--private-registry={}", registries.display()));
            command.arg(format!("--agent-arg=--private-registry={}", registries.display()));
        }
        command.args(args.iter().map(|a| format!("--server-arg={a}")));
        command.args(["--wait", if setup.wait_for_nodes { "60" } else { "0" }]);
        let upped = run(&mut command, b"", Duration::from_secs(90))?;
        if upped.code != 0 {
            let logs = logs(&root, &name);
            let _ = run(&mut lab(&sampan, &root, &name, "down"), b"", COMMAND_LIMIT);
            bail!("the lab did not start: {}{logs}", upped.text());
        }
        let in_hub = |command: &[&str]| {
            run(lab(&sampan, &root, &name, "exec").args(["hub", "--"]).args(command), b"", COMMAND_LIMIT)
        };
        // the server waits for it
        let etcd = if setup.etcd { crate::etcd::start(in_hub) } else { Ok(()) };
        match etcd.and_then(|()| Self::connect(&sampan, &root, &name, folder)) {
            Ok(mut cluster) => {
                if setup.registry {
                    cluster.registry = Some(Registry::start(cluster.hub_pid()?)?);
                }
                Ok(cluster)
            }
            Err(error) => {
                let logs = logs(&root, &name);
                let _ = run(&mut lab(&sampan, &root, &name, "down"), b"", COMMAND_LIMIT);
                Err(error.context(logs))
            }
        }
    }

    fn connect(sampan: &Path, root: &Path, name: &str, folder: TempDir) -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let text = wait_for("the server's kubeconfig", Duration::from_secs(20), || {
            let ran = run(&mut lab(sampan, root, name, "kubeconfig"), b"", COMMAND_LIMIT)?;
            Ok(if ran.code == 0 { Ok(ran.out) } else { Err(ran.err) })
        })?;
        let kubeconfig = folder.path().join("kubeconfig");
        std::fs::write(&kubeconfig, &text)?;
        let client = runtime.block_on(client(&text, |_| {}))?;
        let cluster = Self {
            sampan: sampan.to_path_buf(),
            name: name.to_string(),
            root: root.to_path_buf(),
            kubeconfig,
            client,
            runtime: Some(runtime),
            folder,
            registry: None,
            ended: AtomicBool::new(false),
        };
        cluster.wait_until_served()?;
        Ok(cluster)
    }

    pub fn wait_until_served(&self) -> Result<()> {
        wait_for("the API", Duration::from_secs(30), || {
            let answer = self.get("/readyz")?;
            Ok(if answer.code == 200 { Ok(()) } else { Err(answer.code) })
        })
    }

    /// Ends the lab.
    pub fn down(&self) {
        if self.ended.swap(true, Ordering::SeqCst) {
            return;
        }
        if std::env::var_os("SAMPAN_TEST_KEEP").is_some() {
            println!("kept: SAMPAN_LAB_ROOT={} lab {}", self.root.display(), self.name);
            return;
        }
        match run(&mut lab(&self.sampan, &self.root, &self.name, "down"), b"", COMMAND_LIMIT) {
            Ok(ran) if ran.code == 0 => {}
            Ok(ran) => println!("lab down: {}", ran.text()),
            Err(error) => println!("lab down: {error:#}"),
        }
        // an exit by signal drops nothing
        let _ = std::fs::remove_dir_all(self.folder.path());
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn runtime(&self) -> Result<&Runtime> {
        self.runtime.as_ref().context("the cluster is gone")
    }

    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = &self.runtime {
            runtime.spawn(work);
        }
    }

    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        Ok(self.runtime()?.block_on(work))
    }

    /// kube-rs, as administrator.
    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// kube-rs with other credentials than the administrator's.
    pub fn client_as(&self, change: impl FnOnce(&mut AuthInfo)) -> Result<kube::Client> {
        let text = std::fs::read_to_string(&self.kubeconfig)?;
        self.block_on(client(&text, change))?
    }

    /// kubectl as administrator.
    pub fn kubectl(&self, args: &[&str], input: &str) -> Result<Ran> {
        self.kubectl_within(args, input, COMMAND_LIMIT)
    }

    pub fn kubectl_within(&self, args: &[&str], input: &str, limit: Duration) -> Result<Ran> {
        run(self.kubectl_command().args(args), input.as_bytes(), limit)
    }

    pub fn kubectl_command(&self) -> Command {
        let mut command = Command::new(std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into()));
        command.env("KUBECONFIG", &self.kubeconfig).env("HOME", self.folder());
        command
    }

    /// The minor version of the kubectl in use: Debian 12's own is 20, and lacks commands that came later.
    pub fn kubectl_minor(&self) -> Result<u32> {
        let told = self.kubectl(&["version", "--client", "-o", "json"], "")?.ok()?;
        let told: Value = serde_json::from_str(&told)?;
        let minor = told["clientVersion"]["minor"].as_str().unwrap_or_default();
        minor.trim_end_matches('+').parse().with_context(|| format!("the minor version {minor:?}"))
    }

    /// `sampan lab VERB --name … ARGS`.
    pub fn lab(&self, verb: &str, args: &[&str]) -> Result<Ran> {
        run(lab(&self.sampan, &self.root, &self.name, verb).args(args), b"", COMMAND_LIMIT)
    }

    /// A command in a node, or in `hub`.
    pub fn exec(&self, node: &str, command: &[&str]) -> Result<Ran> {
        run(
            lab(&self.sampan, &self.root, &self.name, "exec").args([node, "--"]).args(command),
            b"",
            COMMAND_LIMIT,
        )
    }

    /// `sampan …` against this cluster.
    pub fn sampan(&self, args: &[&str]) -> Result<Ran> {
        let mut command = Command::new(&self.sampan);
        run(command.env("KUBECONFIG", &self.kubeconfig).args(args), b"", COMMAND_LIMIT)
    }

    fn state(&self) -> Result<Value> {
        let path = self.root.join(&self.name).join("lab.json");
        Ok(serde_json::from_slice(&std::fs::read(&path).with_context(|| path.display().to_string())?)?)
    }

    pub fn token(&self) -> Result<String> {
        Ok(self.state()?["token"].as_str().context("lab.json has no token")?.to_string())
    }

    fn hub_pid(&self) -> Result<u64> {
        self.state()?["hub"]["pid"].as_u64().context("lab.json names no hub")
    }

    /// The pid of a node's init, the first of its PID namespace.
    pub fn node_init(&self, node: &str) -> Result<u32> {
        let state = self.state()?;
        let nodes = state["nodes"].as_array().into_iter().flatten();
        let found = nodes.filter(|n| n["name"] == node).find_map(|n| n["init"]["pid"].as_u64());
        Ok(u32::try_from(found.with_context(|| format!("lab.json names no init of {node}"))?)?)
    }

    /// The end of every node's log.
    pub fn node_logs(&self) -> String {
        logs(&self.root, &self.name)
    }

    pub fn get(&self, path: &str) -> Result<Answer> {
        self.send("GET", path, &[], Vec::new())
    }

    pub fn post(&self, path: &str, body: &Value) -> Result<Answer> {
        self.send("POST", path, &[("content-type", "application/json")], body.to_string().into_bytes())
    }

    pub fn put(&self, path: &str, body: &Value) -> Result<Answer> {
        self.send("PUT", path, &[("content-type", "application/json")], body.to_string().into_bytes())
    }

    /// A request just as given, and the answer just as it came.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Result<Answer> {
        self.send_as(&self.client, method, path, headers, body)
    }

    pub fn send_as(
        &self,
        client: &kube::Client,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Result<Answer> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::from(body))?;
        let answer = self.block_on(async {
            let response = client.send(request).await?;
            let (parts, body) = response.into_parts();
            let body = body.collect_bytes().await?.to_vec();
            Ok::<_, kube::Error>(Answer { code: parts.status.as_u16(), headers: parts.headers, body })
        });
        answer?.with_context(|| format!("{method} {path}"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.down();
        if let Some(runtime) = self.runtime.take() {
            // its tasks hold connections that nobody waits for
            runtime.shutdown_background();
        }
    }
}

/// A case's own namespace.
pub struct Space {
    pub cluster: Arc<Cluster>,
    pub name: String,
}

impl std::ops::Deref for Space {
    type Target = Cluster;
    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl Space {
    pub fn new(cluster: Arc<Cluster>, case: &str) -> Result<Self> {
        let name = case.replace('_', "-");
        let body = serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        cluster.post("/api/v1/namespaces", &body)?.ok().context("making the case's namespace")?;
        Ok(Self { cluster, name })
    }

    /// `/api/v1/namespaces/NAME/REST`, or of a group: `apps/v1/deployments`.
    pub fn path(&self, rest: &str) -> String {
        match rest.split_once("/v1/") {
            Some((group, rest)) => format!("/apis/{group}/v1/namespaces/{}/{rest}", self.name),
            None => format!("/api/v1/namespaces/{}/{rest}", self.name),
        }
    }

    /// kubectl in this namespace; it must succeed.
    pub fn k(&self, args: &[&str]) -> Result<String> {
        self.try_k(args)?.ok()
    }

    pub fn try_k(&self, args: &[&str]) -> Result<Ran> {
        self.kubectl(&[&["-n", self.name.as_str()], args].concat(), "")
    }

    /// kubectl with a manifest on stdin.
    pub fn k_with(&self, args: &[&str], manifest: &str) -> Result<Ran> {
        self.kubectl(&[&["-n", self.name.as_str()], args].concat(), manifest)
    }

    pub fn apply(&self, manifest: &str) -> Result<String> {
        self.k_with(&["apply", "-f", "-"], manifest)?.ok()
    }

    /// An object of this namespace as JSON.
    pub fn object(&self, rest: &str) -> Result<Value> {
        self.get(&self.path(rest))?.ok().with_context(|| rest.to_string())
    }

    /// Waits until a pod looks as wanted; tells its status otherwise.
    pub fn pod<T>(&self, name: &str, limit: Duration, want: impl Fn(&Value) -> Option<T>) -> Result<T> {
        wait_for(&format!("pod {name}"), limit, || {
            let pod = self.object(&format!("pods/{name}"))?;
            Ok(want(&pod).ok_or_else(|| pod["status"].to_string()))
        })
    }

    pub fn running(&self, name: &str) -> Result<Value> {
        self.pod(name, crate::seconds(30), |pod| {
            let conditions = pod["status"]["conditions"].as_array()?;
            let ready = conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
            (ready && pod["status"]["phase"] == "Running").then(|| pod.clone())
        })
    }

    /// Waits for an event about `object` with this reason and text.
    pub fn event(&self, object: &str, reason: &str, text: &str) -> Result<Value> {
        wait_for(&format!("event {reason} {text:?} of {object}"), crate::seconds(40), || {
            let path = self.path(&format!("events?fieldSelector=involvedObject.name={object}"));
            let list = self.get(&path)?.ok()?;
            let events = list["items"].as_array().cloned().unwrap_or_default();
            let said =
                |e: &&Value| e["reason"] == reason && e["message"].as_str().is_some_and(|m| m.contains(text));
            let all = || events.iter().map(|e| format!("{}: {}", e["reason"], e["message"]));
            Ok(events.iter().find(said).cloned().ok_or_else(|| all().collect::<Vec<_>>().join("; ")))
        })
    }

    /// What can be seen of the namespace, for a failure's report.
    pub fn tell(&self) -> String {
        let mut text = String::new();
        for args in [["get", "pods", "-o", "wide"], ["get", "events", "-o", "wide"]] {
            if let Ok(ran) = self.try_k(&args) {
                text.push_str(&ran.text());
            }
        }
        text.lines().take(40).map(|l| format!("  | {}\n", l.chars().take(220).collect::<String>())).collect()
    }

    /// Lets go of the namespace; nobody waits for its end.
    pub fn end(&self) {
        let path = format!("/api/v1/namespaces/{}", self.name);
        let _ = self.send("DELETE", &path, &[], Vec::new());
        if let Ok(pods) = self.get(&self.path("pods")).and_then(Answer::ok) {
            for pod in pods["items"].as_array().into_iter().flatten() {
                let name = pod["metadata"]["name"].as_str().unwrap_or_default();
                let path = self.path(&format!("pods/{name}?gracePeriodSeconds=0"));
                let _ = self.send("DELETE", &path, &[], Vec::new());
            }
        }
    }
}

async fn client(kubeconfig: &str, change: impl FnOnce(&mut AuthInfo)) -> Result<kube::Client> {
    let mut kubeconfig = Kubeconfig::from_yaml(kubeconfig)?;
    if let Some(info) = kubeconfig.auth_infos.first_mut().and_then(|a| a.auth_info.as_mut()) {
        change(info);
    }
    let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    // a test sees the first answer, not that of a retry
    config.default_retry = false;
    Ok(kube::Client::try_from(config)?)
}

fn lab(sampan: &Path, root: &Path, name: &str, verb: &str) -> Command {
    let mut command = Command::new(sampan);
    command.env("SAMPAN_LAB_ROOT", root).args(["lab", verb, "--name", name]);
    command
}

fn logs(root: &Path, name: &str) -> String {
    let mut text = String::new();
    let nodes = std::fs::read_dir(root.join(name).join("nodes")).into_iter().flatten().flatten();
    for node in nodes {
        let log = std::fs::read_to_string(node.path().join("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        text.push_str(&format!("\n== the end of {}'s log\n", node.file_name().to_string_lossy()));
        for line in &lines[lines.len().saturating_sub(25)..] {
            text.push_str(&format!("  | {}\n", line.chars().take(300).collect::<String>()));
        }
    }
    text
}

/// The program under test: `SAMPAN_BIN`, or the one built beside this test.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SAMPAN_BIN") {
        return std::fs::canonicalize(&path).with_context(|| format!("SAMPAN_BIN {}", path.display()));
    }
    let exe = std::env::current_exe()?;
    // target/PROFILE/deps/TEST, or target/PROFILE/sampan-bench
    let mut beside = exe.ancestors().skip(1).take(2).map(|folder| folder.join("sampan"));
    match beside.find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => {
            bail!("there is no sampan beside {}: `cargo build` makes it, or set SAMPAN_BIN", exe.display())
        }
    }
}

/// Cargo's target folder, where what is worth keeping between runs goes.
pub fn target_folder() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let found = exe.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists());
    found.map(PathBuf::from).context("this program lies in no target folder of cargo")
}

/// Where labs go: a folder on a file system that can be the upper layer of an overlay.
pub fn lab_root() -> Result<PathBuf> {
    let given = std::env::var_os("SAMPAN_LAB_ROOT").map(PathBuf::from);
    let target = target_folder().ok().map(|p| p.join("tmp"));
    let rest = ["/var/lib", "/var/tmp", "/dev/shm"].map(PathBuf::from);
    let mut tried = Vec::new();
    for base in given.into_iter().chain(target).chain(rest) {
        let root = base.join("sampan-labs");
        let made = std::fs::create_dir_all(&root).and_then(|()| std::fs::metadata(&root));
        let Ok(made) = made else { continue };
        let kind = nix::sys::statfs::statfs(&root).map(|s| s.filesystem_type());
        // nodes see the machine's own /tmp no more, and a folder below it would be lost
        if made.uid() == 0
            && kind.is_ok_and(|k| k != nix::sys::statfs::OVERLAYFS_SUPER_MAGIC)
            && !root.starts_with("/tmp")
        {
            return Ok(std::fs::canonicalize(root)?);
        }
        tried.push(base.display().to_string());
    }
    bail!("no folder for labs: {} are overlays; name another with SAMPAN_LAB_ROOT", tried.join(", "))
}

/// Ends labs of runs that were killed: their names end in a pid that is gone.
fn sweep(sampan: &Path, root: &Path) {
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.rsplit('-').next().and_then(|p| p.parse::<u32>().ok()) else { continue };
        if entry.path().join("lab.json").exists() && !Path::new(&format!("/proc/{pid}")).exists() {
            let _ = run(&mut lab(sampan, root, &name, "down"), b"", COMMAND_LIMIT);
        }
    }
}
