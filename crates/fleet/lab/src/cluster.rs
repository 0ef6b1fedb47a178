//! Labs as a whole: up, down, stop, start, cut, heal, exec.
use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::process::Process;
use crate::state::{LabState, NodeState, make_folder, root};
use crate::{LabError, net};

/// What `up` makes.
#[derive(Clone, Debug)]
pub struct Up {
    pub name: String,
    /// Architectures; the first node is the server.
    pub nodes: Vec<String>,
    /// 0 picks a free one.
    pub api_port: u16,
    /// OCI archives that every node imports when it starts.
    pub images: Option<PathBuf>,
    /// A docker-registry in the lab at `registry.lab:5000`.
    pub registry: bool,
    /// Machines without an agent, for installing one: the lab starts nothing in them and gives them no token.
    pub bare: bool,
    pub server_args: Vec<String>,
    pub agent_args: Vec<String>,
}

/// A lab that exists.
pub struct Lab {
    pub state: LabState,
}

const AGENT: &str = "/run/sampan/bin/sampan";
/// Where the lab's own registry listens, in the hub.
const REGISTRY_PORT: u16 = 5000;

impl Lab {
    pub fn open(name: &str) -> Result<Self, LabError> {
        Ok(Self { state: LabState::load(name)? })
    }

    /// Makes a lab and starts its agents; does not wait until nodes are Ready. On failure nothing is left.
    pub fn up(up: &Up) -> Result<Self, LabError> {
        let folder = root().join(&up.name);
        if folder.join("lab.json").exists() {
            return Err(LabError::Exists(up.name.clone()));
        }
        for arch in &up.nodes {
            check_emulation(arch)?;
        }
        make_folder(&folder)?;
        let token =
            format!("{}{}", sampan_world::random::uuid(), sampan_world::random::uuid()).replace('-', "");
        let state = LabState {
            name: up.name.clone(),
            nodes: name_nodes(&up.nodes),
            hub: None,
            registry: None,
            forward: None,
            api_port: up.api_port,
            token,
            bare: up.bare,
            server_args: up.server_args.clone(),
            agent_args: up.agent_args.clone(),
        };
        state.save()?;
        let mut lab = Self { state };
        match lab.build(up) {
            Ok(()) => Ok(lab),
            Err(error) => {
                let _ = lab.down();
                Err(error)
            }
        }
    }

    fn build(&mut self, up: &Up) -> Result<(), LabError> {
        let hub_folder = self.state.folder().join("hub");
        let hub = self.spawn_init("hub", &hub_folder)?;
        self.state.hub = Some(hub.clone());
        self.state.save()?;
        net::make_hub(hub.pid)?;
        if up.registry {
            self.start_registry(&hub_folder)?;
        }
        for number in 0..self.state.nodes.len() {
            let name = self.state.nodes[number].name.clone();
            let folder = self.state.node_folder(&name);
            let init = self.spawn_init(&name, &folder)?;
            self.state.nodes[number].init = Some(init.clone());
            self.state.save()?;
            net::wire(hub.pid, init.pid, number)?;
            if let Some(images) = &up.images {
                share_images(images, &folder.join("data/agent/images"))?;
            }
            self.write_config(number, up.registry)?;
            if !up.bare {
                self.start(&name)?;
            }
        }
        self.start_forwarder(hub.pid)
    }

    fn spawn_init(&self, name: &str, folder: &Path) -> Result<Process, LabError> {
        for sub in ["data", "tmp", "etc", "var"] {
            make_folder(&folder.join(sub))?;
        }
        use std::os::unix::fs::PermissionsExt;
        let tmp = folder.join("tmp");
        fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)).map_err(LabError::file(tmp))?;
        let folder = folder.display().to_string();
        let mut command = this_program()?;
        command.args(["lab-spawn", name, &folder]).args(self.state.bare.then_some("bare"));
        started(&mut command, "starting a node")
    }

    fn start_registry(&mut self, hub_folder: &Path) -> Result<(), LabError> {
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: /var/lib/sampan/registry}}\n  \
             delete: {{enabled: true}}\nhttp: {{addr: '{}:{REGISTRY_PORT}'}}\n",
            net::HUB
        );
        let path = hub_folder.join("etc/registry.yaml");
        fs::write(&path, config).map_err(LabError::file(path))?;
        let log = hub_folder.join("registry.log");
        let command = ["docker-registry", "serve", "/etc/registry.yaml"].map(String::from);
        self.state.registry = Some(self.enter_hub_detached(&log, &command)?);
        self.state.save()
    }

    fn enter_hub_detached(&self, log: &Path, command: &[String]) -> Result<Process, LabError> {
        let Some(hub) = &self.state.hub else {
            return Err(LabError::failed("the lab's hub", "does not run"));
        };
        detached(hub.pid, log, command)
    }

    fn start_forwarder(&mut self, hub: i32) -> Result<(), LabError> {
        let address = format!("{}:6443", self.state.nodes[0].ip);
        let log = self.state.folder().join("forward.log");
        let mut child = this_program()?
            .args(["lab-forward", &self.state.api_port.to_string(), &hub.to_string(), &address])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // it outlives this command, so it must not hold its stderr
            .stderr(fs::File::create(&log).map_err(LabError::file(log.clone()))?)
            .process_group(0)
            .spawn()
            .map_err(LabError::os("starting the forwarder"))?;
        self.state.forward = i32::try_from(child.id()).ok().and_then(Process::find);
        self.state.save()?;
        let port = child.stdout.take().map(read_line).unwrap_or_default();
        self.state.api_port = port
            .trim()
            .parse()
            .map_err(|_| LabError::failed("the forwarder", "did not start (see above)"))?;
        self.state.save()
    }

    /// The node's /etc/sampan/config.yaml, as an owner would write it.
    fn write_config(&self, number: usize, registry: bool) -> Result<(), LabError> {
        let node = &self.state.nodes[number];
        let folder = self.state.node_folder(&node.name).join("etc/sampan");
        make_folder(&folder)?;
        let mut config = format!(
            "node-name: {}\nnode-ip: {}\ncgroup-root: {}\nplatform: {}\n",
            node.name,
            node.ip,
            self.state.cgroup(&node.name),
            platform(&node.arch),
        );
        // all nodes share the machine's disk: one that is rather full is no reason to evict pods or images here
        config.push_str(
            "kubelet-arg: [image-gc-high-threshold=100, 'eviction-hard=memory.available<100Mi,nodefs.available<1%']\n",
        );
        if !self.state.bare {
            config.push_str(&format!("token: {}\n", self.state.token));
        }
        if self.state.bare {
            // whoever installs says what the node is to be
        } else if number == 0 {
            config.push_str("tls-san: [127.0.0.1, localhost]\nwrite-kubeconfig-mode: '600'\n");
        } else {
            config.push_str(&format!("server: https://{}:6443\n", self.state.nodes[0].ip));
        }
        // there from the start: a file made later below a mounted overlay may stay unseen
        let offset = folder.join("clock-offset-seconds");
        fs::write(&offset, "0\n").map_err(LabError::file(offset))?;
        let path = folder.join("config.yaml");
        fs::write(&path, config).map_err(LabError::file(path))?;
        if registry {
            let hub = net::HUB;
            let text = format!(
                "mirrors:\n  registry.lab:{REGISTRY_PORT}:\n    endpoint: ['http://{hub}:{REGISTRY_PORT}']\n"
            );
            let path = folder.join("registries.yaml");
            fs::write(&path, text).map_err(LabError::file(path))?;
        }
        Ok(())
    }

    fn number(&self, node: &str) -> Result<usize, LabError> {
        self.state.node(node)?;
        Ok(self.state.nodes.iter().position(|n| n.name == node).unwrap_or_default())
    }

    fn init_pid(&self, node: &str) -> Result<i32, LabError> {
        let init = match node {
            "hub" => self.state.hub.as_ref(),
            _ => self.state.node(node)?.init.as_ref(),
        };
        match init {
            Some(init) if init.is_alive() => Ok(init.pid),
            _ => Err(LabError::failed(
                format!("node {node}"),
                "its namespaces are gone; end the lab and start it anew",
            )),
        }
    }

    /// Starts the agent (on the first node, the server) unless it runs.
    pub fn start(&mut self, node: &str) -> Result<(), LabError> {
        let number = self.number(node)?;
        if self.state.bare {
            return Err(LabError::failed(
                format!("starting node {node}"),
                "a bare lab has no agents of its own",
            ));
        }
        if self.state.nodes[number].agent.as_ref().is_some_and(Process::is_alive) {
            return Ok(());
        }
        let (role, extra) = match number {
            0 => ("server", &self.state.server_args),
            _ => ("agent", &self.state.agent_args),
        };
        let mut command = vec![AGENT.to_string(), role.to_string()];
        command.extend(extra.iter().cloned());
        let log = self.state.node_folder(node).join("agent.log");
        self.state.nodes[number].agent = Some(detached(self.init_pid(node)?, &log, &command)?);
        self.state.save()
    }

    /// Ends the agent, gently or with SIGKILL; containers run on.
    pub fn stop(&mut self, node: &str, kill: bool) -> Result<(), LabError> {
        let number = self.number(node)?;
        if let Some(agent) = self.state.nodes[number].agent.take() {
            let ended = match kill {
                true => agent.signal(Signal::SIGKILL).map(|()| {
                    agent.wait_gone(Duration::from_secs(10));
                }),
                false => agent.end(Duration::from_secs(30)),
            };
            ended.map_err(|e| LabError::failed(format!("stopping node {node}"), e))?;
        }
        self.state.save()
    }

    /// Takes the node off the network, or puts it back.
    pub fn set_wire(&self, node: &str, connected: bool) -> Result<(), LabError> {
        let number = self.number(node)?;
        net::set_wire(self.init_pid("hub")?, number, connected)
    }

    /// Makes the node's wall clock differ by `seconds` from the machine's.
    pub fn set_clock(&self, node: &str, seconds: i64) -> Result<(), LabError> {
        self.number(node)?;
        let path = self.state.node_folder(node).join("etc/sampan/clock-offset-seconds");
        fs::write(&path, format!("{seconds}\n")).map_err(LabError::file(path))
    }

    /// Runs a command in the node (or in `hub`) with this process's own stdio; returns its exit code.
    pub fn exec(&self, node: &str, command: &[String]) -> Result<i32, LabError> {
        let pid = self.init_pid(node)?.to_string();
        let status = this_program()?
            .args(["lab-enter", &pid, "wait", "--"])
            .args(command)
            .status()
            .map_err(LabError::os("entering the node"))?;
        Ok(status.code().unwrap_or(1))
    }

    /// The server's kubeconfig with the forwarder's address; `None` until the server has written it.
    pub fn kubeconfig(&self) -> Option<String> {
        let path = self.state.node_folder(&self.state.nodes.first()?.name).join("etc/sampan/sampan.yaml");
        let text = fs::read_to_string(path).ok()?;
        let lines = text.lines().map(|line| match line.trim_start().strip_prefix("server: ") {
            Some(_) => {
                let indent = &line[..line.len() - line.trim_start().len()];
                format!("{indent}server: https://127.0.0.1:{}", self.state.api_port)
            }
            None => line.to_string(),
        });
        Some(lines.collect::<Vec<_>>().join("\n") + "\n")
    }

    pub fn log_path(&self, node: &str) -> Result<PathBuf, LabError> {
        self.number(node)?;
        Ok(self.state.node_folder(node).join("agent.log"))
    }

    /// Ends everything and removes all of it. Safe to repeat.
    pub fn down(&mut self) -> Result<(), LabError> {
        let processes: Vec<Process> = [&self.state.forward, &self.state.registry]
            .into_iter()
            .cloned()
            .chain(self.state.nodes.iter().flat_map(|n| [n.agent.clone(), n.init.clone()]))
            .chain([self.state.hub.clone()])
            .flatten()
            .collect();
        for process in &processes {
            process.signal(Signal::SIGKILL).map_err(|e| LabError::failed("ending the lab's processes", e))?;
        }
        for process in &processes {
            if !process.wait_gone(Duration::from_secs(20)) {
                return Err(LabError::failed(format!("process {}", process.pid), "does not end; try again"));
            }
        }
        remove_cgroups(&format!("sampan-lab/{}", self.state.name));
        let folder = self.state.folder();
        fs::remove_dir_all(&folder).map_err(LabError::file(folder))
    }
}

fn this_program() -> Result<Command, LabError> {
    Ok(Command::new(std::env::current_exe().map_err(LabError::os("finding this program"))?))
}

/// Runs a starter that prints the pid of what it started.
fn started(command: &mut Command, what: &str) -> Result<Process, LabError> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .output()
        .map_err(LabError::os(what))?;
    let pid = String::from_utf8_lossy(&output.stdout).trim().parse().ok();
    pid.and_then(Process::find)
        .ok_or_else(|| LabError::failed(what, String::from_utf8_lossy(&output.stderr).trim().to_string()))
}

fn detached(pid: i32, log: &Path, command: &[String]) -> Result<Process, LabError> {
    let mode = format!("detach:{}", log.display());
    // the pid that lab-enter prints is that of its own PID namespace, which is this one
    started(
        this_program()?.args(["lab-enter", &pid.to_string(), &mode, "--"]).args(command),
        "starting in a node",
    )
}

fn read_line(mut out: impl Read) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while let Ok(1) = out.read(&mut byte) {
        if byte[0] == b'\n' || line.len() > 64 {
            break;
        }
        line.push(byte[0]);
    }
    String::from_utf8_lossy(&line).into_owned()
}

/// `amd64, amd64, arm` become `amd64`, `amd64-2`, `arm`.
fn name_nodes(archs: &[String]) -> Vec<NodeState> {
    let name = |number: usize, arch: &String| match archs[..number].iter().filter(|a| *a == arch).count() {
        0 => arch.clone(),
        earlier => format!("{arch}-{}", earlier + 1),
    };
    let node = |(number, arch): (usize, &String)| NodeState {
        name: name(number, arch),
        arch: arch.clone(),
        ip: net::node_ip(number).to_string(),
        init: None,
        agent: None,
    };
    archs.iter().enumerate().map(node).collect()
}

fn platform(arch: &str) -> String {
    match arch {
        "arm" => "linux/arm/v7".to_string(),
        other => format!("linux/{other}"),
    }
}

/// A foreign architecture needs binfmt with an interpreter that was loaded at registration (flag F).
fn check_emulation(arch: &str) -> Result<(), LabError> {
    let (own, interpreter) = match arch {
        "amd64" => ("x86_64", "qemu-x86_64"),
        "arm64" => ("aarch64", "qemu-aarch64"),
        "arm" => ("arm", "qemu-arm"),
        other => return Err(LabError::UnknownArchitecture(other.to_string())),
    };
    if std::env::consts::ARCH == own {
        return Ok(());
    }
    let path = format!("/proc/sys/fs/binfmt_misc/{interpreter}");
    let no = |why: &str| LabError::NoEmulation(arch.to_string(), why.to_string());
    let text = fs::read_to_string(&path).map_err(|_| {
        no("there is no binfmt entry for them; on Debian install qemu-user-static and binfmt-support")
    })?;
    match text.lines().any(|l| l.starts_with("flags:") && l.contains('F')) {
        true => Ok(()),
        false => Err(no("their binfmt entry lacks the flag F, so containers would not find the interpreter")),
    }
}

/// Links the archives into the node's folder, or copies them where links do not work.
fn share_images(from: &Path, to: &Path) -> Result<(), LabError> {
    make_folder(to)?;
    for entry in fs::read_dir(from).map_err(LabError::file(from))?.flatten() {
        let target = to.join(entry.file_name());
        if fs::hard_link(entry.path(), &target).is_err() {
            fs::copy(entry.path(), &target).map_err(LabError::file(target))?;
        }
    }
    Ok(())
}

/// Removes a group and those below it from every hierarchy; what still holds a process stays.
fn remove_cgroups(group: &str) {
    let base = Path::new("/sys/fs/cgroup");
    let mut roots = vec![base.to_path_buf()];
    roots.extend(fs::read_dir(base).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir()));
    for root in roots {
        remove_tree(&root.join(group));
        // the folder that all labs share goes with the last
        let _ = fs::remove_dir(root.join("sampan-lab"));
    }
}

fn remove_tree(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_named_after_their_architecture() {
        let archs = ["amd64", "arm", "amd64", "amd64"].map(String::from);
        let nodes = name_nodes(&archs);
        let names: Vec<&str> = nodes.iter().map(|n| n.name.as_str()).collect();
        assert_eq!(names, ["amd64", "arm", "amd64-2", "amd64-3"]);
        assert_eq!(nodes[2].ip, "10.64.0.13");
        assert!(matches!(check_emulation("sparc"), Err(LabError::UnknownArchitecture(_))));
    }
}
