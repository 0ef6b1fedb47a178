//! The shim's children: a container's first process, execs, and the holder of a shared PID namespace.
//!
//! A child tells the shim over a socket what became of it: the terminal's master, who it runs as, or an error. The
//! socket closes by exec, which is the news that the program runs.
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};

use super::process::{self, Stdio};
use super::rootfs;
use crate::protocol;
use crate::spec::{ContainerSpec, ProcessSpec};
use crate::sys;

/// What a child has to say.
#[derive(Serialize, Deserialize)]
pub enum Word {
    /// The terminal's master is attached.
    Terminal,
    User {
        uid: u32,
        gid: u32,
        groups: Vec<u32>,
    },
    Failed {
        message: String,
    },
}

fn io(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |e| format!("{what}: {e}")
}

/// A container's first process. Returns only when it could not become its program.
pub fn run_container(folder: &Path, spec: &ContainerSpec, stdio: Option<Stdio>, parent: &UnixStream) {
    let Err(message) = container(folder, spec, stdio, parent);
    let _ = protocol::send_all(parent, &Word::Failed { message }, &[]);
}

fn container(
    folder: &Path,
    spec: &ContainerSpec,
    stdio: Option<Stdio>,
    parent: &UnixStream,
) -> Result<Infallible, String> {
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64).map_err(io("death signal"))?;
    let _ = nix::unistd::setsid();
    let prepared = process::prepare(&spec.process)?;
    process::join_cgroups(&spec.process)?;
    let mut flags = CloneFlags::CLONE_NEWNS;
    if spec.cgroup_namespace {
        flags |= CloneFlags::CLONE_NEWCGROUP;
    }
    unshare(flags).map_err(|e| format!("making namespaces: {}", e.desc()))?;
    rootfs::enter(spec, folder)?;
    let user = process::resolve_user(&spec.process)?;
    let stdio = match stdio {
        Some(stdio) => stdio,
        None => terminal(parent)?,
    };
    tell_user(parent, &user)?;
    process::become_program(&spec.process, prepared, &user, stdio)
}

fn terminal(parent: &UnixStream) -> Result<Stdio, String> {
    let (master, slave) = process::open_terminal()?;
    protocol::send_all(parent, &Word::Terminal, &[master.as_fd()])
        .map_err(io("handing over the terminal"))?;
    process::terminal_stdio(&slave).map_err(io("taking the terminal"))
}

fn tell_user(parent: &UnixStream, user: &super::user::User) -> Result<(), String> {
    let word = Word::User { uid: user.uid, gid: user.gid, groups: user.groups.clone() };
    protocol::send_all(parent, &word, &[]).map_err(io("telling the user"))
}

/// A process in a container that runs. The PID namespace is joined already: it takes effect by fork.
pub fn run_exec(
    namespaces: &[(OwnedFd, CloneFlags)],
    spec: &ProcessSpec,
    stdio: Option<Stdio>,
    parent: &UnixStream,
) {
    let Err(message) = exec(namespaces, spec, stdio, parent);
    let _ = protocol::send_all(parent, &Word::Failed { message }, &[]);
}

fn exec(
    namespaces: &[(OwnedFd, CloneFlags)],
    spec: &ProcessSpec,
    stdio: Option<Stdio>,
    parent: &UnixStream,
) -> Result<Infallible, String> {
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64).map_err(io("death signal"))?;
    let _ = nix::unistd::setsid();
    let prepared = process::prepare(spec)?;
    process::join_cgroups(spec)?;
    for (fd, kind) in namespaces {
        setns(fd, *kind).map_err(|e| format!("entering the container's namespaces: {}", e.desc()))?;
    }
    let user = process::resolve_user(spec)?;
    let stdio = match stdio {
        Some(stdio) => stdio,
        None => terminal(parent)?,
    };
    process::become_program(spec, prepared, &user, stdio)
}

/// PID 1 of a pod whose containers share their processes: reaps, and ends with the shim.
pub fn hold_pid_namespace() -> ! {
    use nix::sys::wait::{WaitStatus, wait};
    let _ = sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64);
    let _ = nix::unistd::setsid();
    sys::default_signals();
    let mut set = nix::sys::signal::SigSet::empty();
    set.add(nix::sys::signal::SIGCHLD);
    let _ = set.thread_block();
    loop {
        // Without children wait returns at once; then a signal is waited for.
        if !matches!(wait(), Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..))) {
            let _ = set.wait();
        }
    }
}

/// Network, sysctls, host name and shared memory of the pod, in the shim's own namespaces.
pub fn make_pod(spec: &crate::spec::ShimSpec) -> Result<(), String> {
    let mut flags = CloneFlags::empty();
    if !spec.host_network {
        flags |= CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS;
    }
    if !spec.host_ipc {
        flags |= CloneFlags::CLONE_NEWIPC;
    }
    unshare(flags).map_err(|e| format!("making namespaces: {}", e.desc()))?;
    if !spec.host_network {
        nix::unistd::sethostname(&spec.hostname).map_err(|e| format!("host name: {}", e.desc()))?;
        sys::loopback_up().map_err(io("starting the loopback"))?;
    }
    for (name, value) in &spec.sysctls {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        let mut file = File::options().write(true).open(&path).map_err(io(&format!("sysctl {name}")))?;
        file.write_all(value.as_bytes()).map_err(io(&format!("sysctl {name}")))?;
    }
    if let Some(shm) = &spec.shm {
        use nix::mount::{MsFlags, mount};
        fs::create_dir_all(shm).map_err(io("shared memory"))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
        mount(Some("shm"), shm, Some("tmpfs"), flags, Some("mode=1777,size=65536k"))
            .map_err(|e| format!("shared memory: {}", e.desc()))?;
    }
    Ok(())
}
