//! Starting containers and execs, and reading what they say.
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use serde::Serialize;

use super::child::{self, Word};
use super::log::Log;
use super::process::Stdio;
use super::{Attached, Exec, Output, Running, Shim, Starting};
use crate::protocol::Receiver;
use crate::spec::{ContainerSpec, Exit, PidMode, ProcessSpec, Reply, Started};
use crate::sys;

pub(super) fn now_ns() -> i64 {
    i64::try_from(sampan_world::clock::now().as_nanosecond()).unwrap_or(0)
}

/// Whole or not at all; not synced, since after a power loss the container is gone whatever the file says.
pub(super) fn write_file<T: Serialize>(path: &Path, value: &T) {
    let temporary = path.with_extension("new");
    if let Ok(bytes) = serde_json::to_vec(value)
        && fs::write(&temporary, bytes).is_ok()
    {
        let _ = fs::rename(&temporary, path);
    }
}

pub(super) fn was_out_of_memory(file: &Path) -> bool {
    crate::cgroups::field(&fs::read_to_string(file).unwrap_or_default(), "oom_kill") > 0
}

fn pipe() -> Result<(OwnedFd, OwnedFd), String> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|e| format!("pipe: {e}"))
}

fn null() -> Result<OwnedFd, String> {
    let file = File::options().read(true).write(true).open("/dev/null");
    Ok(file.map_err(|e| format!("/dev/null: {e}"))?.into())
}

impl Shim {
    pub(super) fn hold_pids(&mut self) -> Result<(), String> {
        unshare(CloneFlags::CLONE_NEWPID).map_err(|e| format!("PID namespace: {}", e.desc()))?;
        let forked = sys::fork().map_err(|e| e.to_string())?;
        let Some(pid) = forked else { child::hold_pid_namespace() };
        self.own_pids_again()?;
        let namespace =
            File::open(format!("/proc/{pid}/ns/pid")).map_err(|e| format!("PID namespace: {e}"))?;
        self.holder = Some((pid, namespace.into()));
        Ok(())
    }

    /// Children belong to the shim's own PID namespace again.
    fn own_pids_again(&self) -> Result<(), String> {
        setns(&self.own_pids, CloneFlags::CLONE_NEWPID).map_err(|e| format!("PID namespace: {}", e.desc()))
    }

    pub(super) fn start_container(&mut self, id: &str, client: u64) -> Result<(), String> {
        if self.containers.iter().any(|c| c.id == id) {
            return Err(format!("container {id} is running already"));
        }
        let folder = self.folder.join("containers").join(id);
        let bytes = fs::read(folder.join("spec.json")).map_err(|e| format!("spec.json: {e}"))?;
        let spec: ContainerSpec = serde_json::from_slice(&bytes).map_err(|e| format!("spec.json: {e}"))?;
        drop(bytes);
        let log = Log::open(&spec.log_path).map_err(|e| format!("log {}: {e}", spec.log_path.display()))?;
        let (mut outputs, mut stdio, mut input) = (Vec::new(), None, None);
        if !spec.process.tty {
            let (out, stdout) = pipe()?;
            let (err, stderr) = pipe()?;
            let stdin = if spec.stdin {
                let (read, write) = pipe()?;
                input = Some(write);
                read
            } else {
                null()?
            };
            for (fd, name) in [(out, "stdout"), (err, "stderr")] {
                rustix::io::ioctl_fionbio(&fd, true).map_err(|e| e.to_string())?;
                outputs.push(Output { fd, name, pending: Default::default() });
            }
            stdio = Some(Stdio { stdin, stdout, stderr });
        }
        let (ours, theirs) = UnixStream::pair().map_err(|e| e.to_string())?;
        match (spec.pid, &self.holder) {
            (PidMode::Container, _) => unshare(CloneFlags::CLONE_NEWPID),
            (PidMode::Pod, Some((_, namespace))) => setns(namespace, CloneFlags::CLONE_NEWPID),
            _ => Ok(()),
        }
        .map_err(|e| format!("PID namespace: {}", e.desc()))?;
        let forked = sys::fork().map_err(|e| format!("fork: {e}"));
        if let Ok(None) = forked {
            drop(ours);
            child::run_container(&folder, &spec, stdio, &theirs);
            std::process::exit(127);
        }
        self.own_pids_again()?;
        let Some(pid) = forked? else { return Ok(()) };
        self.containers.push(Running {
            id: id.to_string(),
            pid,
            outputs,
            log: Some(log),
            log_path: spec.log_path,
            attached: Vec::new(),
            input,
            terminal: spec.process.tty,
            own_pid_namespace: spec.pid == PidMode::Container,
            oom_file: spec.oom_file,
            cgroup_procs: spec.cgroup_procs,
            starting: Some(starting(ours, client)),
            started: None,
            ended: None,
        });
        Ok(())
    }

    pub(super) fn start_exec(
        &mut self,
        id: &str,
        process: &ProcessSpec,
        fds: Vec<OwnedFd>,
        client: u64,
        kill_on_close: bool,
    ) -> Result<(), String> {
        let container =
            self.containers.iter().find(|c| c.id == id && c.started.is_some() && c.ended.is_none());
        let pid = container.ok_or(format!("container {id} is not running"))?.pid;
        let mut namespaces = Vec::new();
        for (name, kind) in [("cgroup", CloneFlags::CLONE_NEWCGROUP), ("mnt", CloneFlags::CLONE_NEWNS)] {
            let path = format!("/proc/{pid}/ns/{name}");
            match File::open(&path) {
                Ok(file) => namespaces.push((OwnedFd::from(file), kind)),
                Err(_) if name == "cgroup" => {}
                Err(e) => return Err(format!("{path}: {e}")),
            }
        }
        let stdio = match <[OwnedFd; 3]>::try_from(fds) {
            Ok([stdin, stdout, stderr]) => Some(Stdio { stdin, stdout, stderr }),
            Err(_) if process.tty => None,
            Err(_) => return Err("exec without its three streams".into()),
        };
        let (ours, theirs) = UnixStream::pair().map_err(|e| e.to_string())?;
        let pids = File::open(format!("/proc/{pid}/ns/pid")).map_err(|e| format!("PID namespace: {e}"))?;
        setns(pids, CloneFlags::CLONE_NEWPID).map_err(|e| format!("PID namespace: {}", e.desc()))?;
        let forked = sys::fork().map_err(|e| format!("fork: {e}"));
        if let Ok(None) = forked {
            drop(ours);
            child::run_exec(&namespaces, process, stdio, &theirs);
            std::process::exit(127);
        }
        self.own_pids_again()?;
        if let Some(pid) = forked? {
            let starting = Some(starting(ours, client));
            self.execs.push(Exec { pid, client, kill_on_close, starting, ended: None });
        }
        Ok(())
    }

    pub(super) fn hear_container(&mut self, index: usize) {
        let Some(container) = self.containers.get_mut(index) else { return };
        let Some(starting) = container.starting.as_mut() else { return };
        if listen(starting) {
            return;
        }
        let Some(mut starting) = container.starting.take() else { return };
        if let Some(master) = starting.terminal.take() {
            let _ = rustix::io::ioctl_fionbio(&master, true);
            container.input = master.try_clone().ok();
            container.outputs.push(Output { fd: master, name: "stdout", pending: Default::default() });
        }
        let (id, pid) = (container.id.clone(), container.pid);
        let folder = self.folder.join("containers").join(&id);
        let client = starting.client.unwrap_or(0);
        if let Some(message) = starting.failed {
            // It never was its program: there is no exit of it, only why not.
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
            self.containers.remove(index);
            let message =
                format!("unable to start container process: error during container init: {message}");
            let exit =
                Exit { code: 128, at_ns: now_ns(), reason: "StartError".into(), message: message.clone() };
            self.write_exit(&id, &exit);
            return self.fail(client, message);
        }
        let (uid, gid, groups) = starting.user;
        let started = Started { pid, at_ns: now_ns(), uid, gid, groups };
        write_file(&folder.join("started.json"), &started);
        container.started = Some(started);
        self.reply(client, &Reply::Started { pid }, &[]);
        self.announce(&id);
        sampan_world::memory::unmap_idle_code();
    }

    pub(super) fn hear_exec(&mut self, index: usize) {
        let Some(exec) = self.execs.get_mut(index) else { return };
        let Some(starting) = exec.starting.as_mut() else { return };
        if listen(starting) {
            return;
        }
        let Some(starting) = exec.starting.take() else { return };
        let (client, pid) = (exec.client, exec.pid);
        if let Some(message) = starting.failed {
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
            self.execs.remove(index);
            return self.fail(client, format!("unable to start container process: {message}"));
        }
        let fds: Vec<BorrowedFd<'_>> = starting.terminal.iter().map(AsFd::as_fd).collect();
        self.reply(client, &Reply::Started { pid }, &fds);
    }

    pub(super) fn read_output(&mut self, container: usize, output: usize, buffer: &mut [u8]) {
        if let Some(container) = self.containers.get_mut(container)
            && output < container.outputs.len()
        {
            read_stream(container, output, buffer, false);
        }
    }
}

fn starting(socket: UnixStream, client: u64) -> Starting {
    let _ = socket.set_nonblocking(true);
    Starting {
        socket,
        words: Receiver::default(),
        client: Some(client),
        failed: None,
        user: Default::default(),
        terminal: None,
    }
}

/// Hears a child; `false` once it has said all: it is its program now, or failed.
fn listen(starting: &mut Starting) -> bool {
    let open = match starting.words.fill(starting.socket.as_fd()) {
        Ok(more) => more,
        Err(e) => e.kind() == std::io::ErrorKind::WouldBlock,
    };
    while let Ok(Some((word, fds))) = starting.words.take::<Word>() {
        match word {
            Word::Terminal => starting.terminal = fds.into_iter().next(),
            Word::User { uid, gid, groups } => starting.user = (uid, gid, groups),
            Word::Failed { message } => starting.failed = Some(message),
        }
    }
    open
}

/// Reads a stream once: to the log and to whoever is attached. A stream that has ended goes.
pub(super) fn read_stream(container: &mut Running, index: usize, buffer: &mut [u8], last: bool) {
    let Some(output) = container.outputs.get_mut(index) else { return };
    match rustix::io::read(&output.fd, &mut *buffer) {
        Ok(n) if n > 0 => {
            if let Some(log) = &mut container.log {
                log.take(output.name, &mut output.pending, &buffer[..n]);
            }
            let stdout = output.name == "stdout";
            container.attached.retain_mut(|a| pass_on(a, stdout, &buffer[..n]));
        }
        Err(Errno::INTR) => {}
        Err(Errno::AGAIN) if !last => {}
        // End of file, or a terminal's EIO.
        _ => {
            if let Some(log) = &mut container.log {
                log.end(output.name, &mut output.pending);
            }
            container.outputs.remove(index);
        }
    }
}

/// `false` when the client is gone, or so far behind that its pipe is full: the container isn't held up for it.
fn pass_on(attached: &mut Attached, stdout: bool, bytes: &[u8]) -> bool {
    let Some(fd) = (if stdout { &attached.stdout } else { &attached.stderr }) else { return true };
    let mut sent = 0;
    while sent < bytes.len() {
        match rustix::io::write(fd, &bytes[sent..]) {
            Ok(n) => sent += n,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    true
}
