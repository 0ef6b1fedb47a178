//! One program run to its end in a container of its own, without an agent: a build's RUN.
//!
//! Upstream counterparts: BuildKit's runc executor, `runc run`. It is a program like the shim (single-threaded, since it
//! forks) and makes its container with the shim's parts, so what a pod's container may not do, this may not either.
//! What stays true: every mount is made in a mount namespace that ends with it, and it dies with the thread that started
//! it; a build that is killed leaves no process and no mount. Deliberate difference: a machine where no control group can
//! be made runs the program all the same, but without the right to make device nodes, as nothing would restrict them.
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use sampan_drivers::runtime::RuntimeError;
use serde::{Deserialize, Serialize};

use super::child::{self, Word};
use super::process::Stdio;
use crate::cgroups::{self, Cgroups};
use crate::protocol::Receiver;
use crate::spec::{ContainerSpec, MountSpec, PidMode, ProcessSpec, UserSpec};
use crate::{capabilities, seccomp, sys};

const SPEC: &str = "step.json";
const ENDED: &str = "ended.json";
const MKNOD: &str = "MKNOD";

/// What is run, and what it sees.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// Has `upper` and `work`, which the caller makes; what the program writes is in `upper` afterwards.
    pub folder: PathBuf,
    pub layers_folder: PathBuf,
    /// Names below `layers_folder` or absolute paths, topmost first.
    pub layers: Vec<String>,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    /// `[name|uid][:group|gid]`, looked up in what the layers hold.
    pub user: String,
    pub mounts: Vec<StepMount>,
    /// The machine's network, or none.
    pub host_network: bool,
    pub hostname: String,
    /// Where control groups of steps begin, and this step's own below.
    pub cgroup_root: String,
    pub group: String,
}

#[derive(Clone, Debug)]
pub struct StepMount {
    pub source: PathBuf,
    pub target: String,
    pub readonly: bool,
}

/// How a step ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub code: i32,
    /// Why the program could not be started.
    pub error: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Spec {
    container: ContainerSpec,
    host_network: bool,
    hostname: String,
}

fn failed(what: &str, error: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::Failed { message: format!("{what}: {error}") }
}

impl Step {
    /// Writes what the step's process reads and makes its control group. The sentence, if any, is a warning.
    pub fn prepare(&self) -> Result<Option<String>, RuntimeError> {
        for name in ["rootfs", "shm"] {
            fs::create_dir_all(self.folder.join(name)).map_err(|e| failed("making a step's folder", e))?;
        }
        let groups = Cgroups::detect(&self.cgroup_root);
        let grouped = groups
            .create(&self.group)
            .and_then(|()| groups.restrict_devices(&self.group, &cgroups::standard_devices()));
        let (drop, warning): (&[&str], _) = match &grouped {
            Ok(()) => (&[], None),
            Err(e) => (&[MKNOD], Some(format!("no control group for steps ({e}): they can't make devices"))),
        };
        let drop: Vec<String> = drop.iter().map(ToString::to_string).collect();
        let capabilities = capabilities::set(false, &[], &drop).map_err(|e| failed("capabilities", e))?;
        let procs = if grouped.is_ok() { groups.procs_files(&self.group) } else { Vec::new() };
        let spec = Spec {
            container: self.container(&groups, capabilities, procs)?,
            host_network: self.host_network,
            hostname: self.hostname.clone(),
        };
        let bytes = serde_json::to_vec(&spec).map_err(|e| failed(SPEC, e))?;
        // environments may hold secrets
        sampan_world::files::write_atomic(&self.folder.join(SPEC), &bytes, 0o600)
            .map_err(|e| failed(SPEC, e))?;
        Ok(warning)
    }

    fn container(
        &self,
        groups: &Cgroups,
        capabilities: u64,
        cgroup_procs: Vec<PathBuf>,
    ) -> Result<ContainerSpec, RuntimeError> {
        let machine = std::env::consts::ARCH;
        let wrong = |e: seccomp::SeccompError| failed("seccomp", e);
        let profile = seccomp::default_profile(machine, capabilities);
        let program = seccomp::assemble(&profile, &seccomp::abis(machine).map_err(wrong)?).map_err(wrong)?;
        let filter = self.folder.join("seccomp.bpf");
        let bytes: Vec<u8> = program.iter().flat_map(|i| i.to_le_bytes()).collect();
        fs::write(&filter, bytes).map_err(|e| failed("writing a seccomp filter", e))?;
        let in_group = !cgroup_procs.is_empty();
        let mounts = self.mounts.iter().map(|m| MountSpec {
            source: m.source.clone(),
            target: m.target.clone(),
            readonly: m.readonly,
            recursive_readonly: false,
            propagation: "private".into(),
        });
        Ok(ContainerSpec {
            process: ProcessSpec {
                args: self.args.clone(),
                env: self.env.clone(),
                cwd: self.cwd.clone(),
                user: UserSpec { image: self.user.clone(), ..UserSpec::default() },
                capabilities,
                seccomp: Some(filter),
                cgroup_procs: cgroup_procs.clone(),
                ..ProcessSpec::default()
            },
            layers_folder: self.layers_folder.clone(),
            layers: self.layers.clone(),
            plain_upper: true,
            mounts: mounts.collect(),
            masked_paths: true,
            shm: self.folder.join("shm"),
            pid: PidMode::Container,
            cgroup_namespace: in_group && groups.is_v2(),
            cgroup_v1: if in_group { groups.v1_folders(&self.group) } else { Vec::new() },
            cgroup_procs,
            ..ContainerSpec::default()
        })
    }

    /// The process that runs the step; it dies with the thread that starts it. `exe` calls [`step_main`].
    pub fn command(&self, exe: &Path) -> Command {
        let mut command = Command::new(exe);
        command.arg("step").arg(&self.folder).arg(std::process::id().to_string());
        command
    }

    /// How it ended, once its process has.
    pub fn ended(&self) -> Result<Ended, RuntimeError> {
        let bytes = fs::read(self.folder.join(ENDED))
            .map_err(|_| failed("the step's process was killed", "it left no word of how it went"))?;
        serde_json::from_slice(&bytes).map_err(|e| failed(ENDED, e))
    }

    /// Kills what is left of it and removes its control group.
    pub fn remove_group(&self) {
        remove_step_groups(&self.cgroup_root, &self.group);
    }
}

/// Kills and removes a group of steps with all below it.
pub fn remove_step_groups(root: &str, group: &str) {
    let groups = Cgroups::detect(root);
    groups.kill(group);
    groups.remove(group);
    // the root itself, when no other step has a group below it
    for (_, folder) in groups.folders("") {
        let _ = fs::remove_dir(folder);
    }
}

/// `sampan step <folder> <parent's pid>`: called before anything starts a thread.
pub fn step_main(args: &[String]) -> ExitCode {
    let [folder, parent] = args else {
        eprintln!("step: a folder and a process id are needed");
        return ExitCode::from(2);
    };
    let folder = Path::new(folder);
    let ended = run(folder, parent).unwrap_or_else(|message| Ended { code: 125, error: Some(message) });
    let written = serde_json::to_vec(&ended).map_err(std::io::Error::from).and_then(|bytes| {
        let mut file = File::create(folder.join(ENDED))?;
        file.write_all(&bytes)
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(folder: &Path, parent: &str) -> Result<Ended, String> {
    let io = |what: &'static str| move |e: std::io::Error| format!("{what}: {e}");
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64).map_err(io("death signal"))?;
    if nix::unistd::getppid().to_string() != parent {
        return Err("the build is gone".into());
    }
    let bytes = fs::read(folder.join(SPEC)).map_err(io(SPEC))?;
    let spec: Spec = serde_json::from_slice(&bytes).map_err(|e| format!("{SPEC}: {e}"))?;
    enter_namespaces(&spec, folder)?;
    let clone = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(io("standard streams"));
    let stdio = Stdio {
        stdin: File::open("/dev/null").map_err(io("/dev/null"))?.into(),
        stdout: clone(std::io::stdout().as_fd())?,
        stderr: clone(std::io::stderr().as_fd())?,
    };
    let (ours, theirs) = UnixStream::pair().map_err(io("a pair of sockets"))?;
    let Some(pid) = sys::fork().map_err(io("fork"))? else {
        drop(ours);
        child::run_container(folder, &spec.container, Some(stdio), &theirs);
        std::process::exit(127);
    };
    drop((theirs, stdio));
    let error = listen(&ours);
    let code = loop {
        match waitpid(Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, code)) => break code,
            Ok(WaitStatus::Signaled(_, signal, _)) => break 128 + signal as i32,
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(format!("waiting for the program: {}", e.desc())),
        }
    };
    Ok(Ended { code, error })
}

fn enter_namespaces(spec: &Spec, folder: &Path) -> Result<(), String> {
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWPID;
    if !spec.host_network {
        flags |= CloneFlags::CLONE_NEWNET;
    }
    unshare(flags).map_err(|e| format!("making namespaces: {}", e.desc()))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .map_err(|e| format!("leaving the machine's mounts: {}", e.desc()))?;
    nix::unistd::sethostname(&spec.hostname).map_err(|e| format!("host name: {}", e.desc()))?;
    if !spec.host_network {
        sys::loopback_up().map_err(|e| format!("starting the loopback: {e}"))?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    mount(Some("shm"), &folder.join("shm"), Some("tmpfs"), flags, Some("mode=1777,size=65536k"))
        .map_err(|e| format!("shared memory: {}", e.desc()))
}

/// Waits until the program runs, or is known not to: then why.
fn listen(socket: &UnixStream) -> Option<String> {
    let (mut words, mut error) = (Receiver::default(), None);
    loop {
        let open = match words.fill(socket.as_fd()) {
            Ok(more) => more,
            Err(e) => e.kind() == std::io::ErrorKind::Interrupted,
        };
        while let Ok(Some((word, _))) = words.take::<Word>() {
            if let Word::Failed { message } = word {
                error = Some(message);
            }
        }
        if !open {
            return error;
        }
    }
}
