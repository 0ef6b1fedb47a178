//! The shim: one small process a pod, which holds its namespaces and is the parent of its containers.
//!
//! Upstream counterparts: containerd-shim-runc-v2 and the pause process, in one. What stays true: it is single-threaded
//! (it forks), never exits by itself but when told to, and needs no agent: logs and exit files go on without one.
//! When the shim dies its children are killed by the kernel (PDEATHSIG), and the agent kills what is left in the pod's
//! groups; the sandbox is then not ready. Deliberate difference: no libcontainer:
//! without a C library its cgroup v2 part controls no devices, and its execs get neither filter nor user by themselves.
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, poll};

use crate::protocol::{self, Receiver};
use crate::spec::{Exit, Reply, Request, ShimSpec, Started};
use crate::sys;

mod child;
pub(crate) mod log;
mod process;
mod rootfs;
mod run;
mod step;
mod user;

use log::{Log, Pending};

pub use rootfs::plain_overlay_options;
pub use step::{Ended, Step, StepMount, remove_step_groups, step_main};

const CLIENTS_MAX: usize = 64;

pub(crate) fn readonly_recursively(fd: &OwnedFd) -> std::io::Result<()> {
    sys::mount_setattr_readonly(fd.as_fd())
}

/// `sampan shim <folder>`: called before anything starts a thread.
pub fn shim_main(args: &[String]) -> ExitCode {
    let Some(folder) = args.first().map(PathBuf::from) else {
        eprintln!("shim: no folder given");
        return ExitCode::from(2);
    };
    match start(&folder) {
        Ok(Some(mut shim)) => {
            shim.serve();
            ExitCode::SUCCESS
        }
        Ok(None) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

/// The first process waits until the second is ready, then leaves: the shim is nobody's child but init's.
fn start(folder: &Path) -> Result<Option<Shim>, String> {
    let text = |e: std::io::Error| e.to_string();
    let (parent_end, child_end) = UnixStream::pair().map_err(text)?;
    match sys::fork().map_err(text)? {
        Some(_) => {
            drop(child_end);
            let mut said = String::new();
            std::io::Read::read_to_string(&mut &parent_end, &mut said).map_err(text)?;
            if said == "ready" {
                Ok(None)
            } else {
                Err(if said.is_empty() { "the shim died".into() } else { said })
            }
        }
        None => {
            drop(parent_end);
            // An agent that gave up waiting kills the first process; nothing may stay behind then.
            let _ = sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64);
            let made = Shim::make(folder);
            let _ = sys::prctl(libc::PR_SET_PDEATHSIG, 0);
            let said = match &made {
                Ok(_) => "ready".to_string(),
                Err(e) => e.clone(),
            };
            let _ = std::io::Write::write_all(&mut &child_end, said.as_bytes());
            // Not only closed: the holder of a shared PID namespace has it too.
            let _ = child_end.shutdown(std::net::Shutdown::Both);
            made.map(Some)
        }
    }
}

/// A stream of a container that is being read.
struct Output {
    fd: OwnedFd,
    name: &'static str,
    pending: Pending,
}

struct Attached {
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

struct Running {
    id: String,
    pid: i32,
    outputs: Vec<Output>,
    log: Option<Log>,
    log_path: PathBuf,
    attached: Vec<Attached>,
    /// The way to its standard input: a pipe, or the terminal's master.
    input: Option<OwnedFd>,
    terminal: bool,
    own_pid_namespace: bool,
    oom_file: Option<PathBuf>,
    cgroup_procs: Vec<PathBuf>,
    /// Set while it isn't known whether the program runs.
    starting: Option<Starting>,
    started: Option<Started>,
    ended: Option<i32>,
}

/// A child that has not become its program yet.
struct Starting {
    socket: UnixStream,
    words: Receiver,
    client: Option<u64>,
    failed: Option<String>,
    user: (u32, u32, Vec<u32>),
    terminal: Option<OwnedFd>,
}

struct Exec {
    pid: i32,
    client: u64,
    kill_on_close: bool,
    starting: Option<Starting>,
    ended: Option<i32>,
}

struct Client {
    key: u64,
    socket: UnixStream,
    receiver: Receiver,
    watching: bool,
}

struct Shim {
    folder: PathBuf,
    spec: ShimSpec,
    signals: SignalFd,
    listener: UnixListener,
    own_pids: OwnedFd,
    /// The process that holds a shared PID namespace.
    holder: Option<(i32, OwnedFd)>,
    clients: Vec<Client>,
    next_key: u64,
    containers: Vec<Running>,
    execs: Vec<Exec>,
    stopping: bool,
}

/// What a descriptor in the poll set is.
enum Source {
    Signals,
    Listener,
    Client(u64),
    Output(usize, usize),
    Container(usize),
    Exec(usize),
}

impl Shim {
    fn make(folder: &Path) -> Result<Shim, String> {
        let io = |what: &str, e: std::io::Error| format!("{what}: {e}");
        let bytes = fs::read(folder.join("shim.json")).map_err(|e| io("shim.json", e))?;
        let spec: ShimSpec = serde_json::from_slice(&bytes).map_err(|e| format!("shim.json: {e}"))?;
        let _ = nix::unistd::setsid();
        let _ = std::env::set_current_dir("/");
        sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1).map_err(|e| io("subreaper", e))?;
        let _ = fs::write("/proc/self/oom_score_adj", "-998");
        for file in &spec.cgroup_procs {
            let _ = fs::write(file, "0");
        }
        let own_pids = fs::File::open("/proc/self/ns/pid").map_err(|e| io("own PID namespace", e))?.into();
        child::make_pod(&spec)?;
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block().map_err(|e| format!("signals: {}", e.desc()))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&mask, flags).map_err(|e| format!("signals: {}", e.desc()))?;
        let mut shim = Shim {
            listener: listen(folder)?,
            folder: folder.to_path_buf(),
            spec,
            signals,
            own_pids,
            holder: None,
            clients: Vec::new(),
            next_key: 0,
            containers: Vec::new(),
            execs: Vec::new(),
            stopping: false,
        };
        if shim.spec.shared_pid {
            shim.hold_pids()?;
        }
        let pid = std::process::id().to_string();
        sampan_world::files::write_atomic(&folder.join("shim.pid"), pid.as_bytes(), 0o600)
            .map_err(|e| io("shim.pid", e))?;
        Ok(shim)
    }

    fn serve(&mut self) {
        let mut buffer = vec![0; log::LINE_MAX_BYTES];
        while !self.stopping {
            for (source, flags) in self.wait() {
                match source {
                    Source::Signals => {
                        while let Ok(Some(_)) = self.signals.read_signal() {}
                        self.reap();
                    }
                    Source::Listener => self.accept(),
                    Source::Client(key) => self.hear(key),
                    Source::Output(container, output) => self.read_output(container, output, &mut buffer),
                    Source::Container(index) => self.hear_container(index),
                    Source::Exec(index) => self.hear_exec(index),
                }
                let _ = flags;
            }
            self.settle();
        }
        self.end();
    }

    /// Sleeps until something is ready.
    fn wait(&self) -> Vec<(Source, PollFlags)> {
        let mut sources = vec![Source::Signals, Source::Listener];
        let mut fds: Vec<PollFd<'_>> =
            vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        for client in &self.clients {
            sources.push(Source::Client(client.key));
            fds.push(PollFd::new(&client.socket, PollFlags::IN));
        }
        for (c, container) in self.containers.iter().enumerate() {
            for (o, output) in container.outputs.iter().enumerate() {
                sources.push(Source::Output(c, o));
                fds.push(PollFd::new(&output.fd, PollFlags::IN));
            }
            if let Some(starting) = &container.starting {
                sources.push(Source::Container(c));
                fds.push(PollFd::new(&starting.socket, PollFlags::IN));
            }
        }
        for (e, exec) in self.execs.iter().enumerate() {
            if let Some(starting) = &exec.starting {
                sources.push(Source::Exec(e));
                fds.push(PollFd::new(&starting.socket, PollFlags::IN));
            }
        }
        if poll(&mut fds, None).is_err() {
            return Vec::new();
        }
        let flags: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        sources.into_iter().zip(flags).filter(|(_, f)| !f.is_empty()).collect()
    }

    fn accept(&mut self) {
        if let Ok((socket, _)) = self.listener.accept() {
            if self.clients.len() >= CLIENTS_MAX {
                return;
            }
            self.next_key += 1;
            let receiver = Receiver::default();
            self.clients.push(Client { key: self.next_key, socket, receiver, watching: false });
        }
    }

    fn hear(&mut self, key: u64) {
        let Some(client) = self.clients.iter_mut().find(|c| c.key == key) else { return };
        let open = matches!(client.receiver.fill(client.socket.as_fd()), Ok(true));
        match client.receiver.take::<Request>() {
            Ok(Some((request, fds))) => self.answer(key, request, fds),
            Ok(None) if open => {}
            _ => self.hang_up(key),
        }
    }

    fn hang_up(&mut self, key: u64) {
        self.clients.retain(|c| c.key != key);
        for exec in self.execs.iter().filter(|e| e.client == key && e.kill_on_close && e.ended.is_none()) {
            let _ = kill(Pid::from_raw(exec.pid), Signal::SIGKILL);
        }
    }

    fn reply(&mut self, key: u64, reply: &Reply, fds: &[BorrowedFd<'_>]) {
        if let Some(client) = self.clients.iter().find(|c| c.key == key)
            && protocol::send_all(&client.socket, reply, fds).is_err()
        {
            self.hang_up(key);
        }
    }

    fn fail(&mut self, key: u64, message: impl Into<String>) {
        self.reply(key, &Reply::Error { message: message.into() }, &[]);
    }

    fn answer(&mut self, key: u64, request: Request, fds: Vec<OwnedFd>) {
        let done = match request {
            Request::Watch => {
                if let Some(client) = self.clients.iter_mut().find(|c| c.key == key) {
                    client.watching = true;
                    // A watcher that doesn't read must not hold up the pod.
                    let _ = client.socket.set_write_timeout(Some(std::time::Duration::from_secs(1)));
                }
                Ok(())
            }
            Request::Start { id } => match self.start_container(&id, key) {
                Ok(()) => return,
                Err(message) => Err(message),
            },
            Request::Exec { id, process, kill_on_close } => {
                match self.start_exec(&id, &process, fds, key, kill_on_close) {
                    Ok(()) => return,
                    Err(message) => Err(message),
                }
            }
            Request::Kill { id, signal } => self.signal(&id, signal),
            Request::Attach { id } => match self.attach(&id, fds, key) {
                Ok(()) => return,
                Err(message) => Err(message),
            },
            Request::Reopen { id } => self.with(&id, |c| {
                let path = c.log_path.clone();
                match c.log.as_mut() {
                    Some(log) => log.reopen(&path).map_err(|e| format!("{}: {e}", path.display())),
                    None => Ok(()),
                }
            }),
            Request::CloseStdin { id } => self.with(&id, |c| {
                if !c.terminal {
                    c.input = None;
                }
                Ok(())
            }),
            Request::Stop => {
                self.stopping = true;
                self.kill_all();
                Ok(())
            }
        };
        match done {
            Ok(()) => self.reply(key, &Reply::Ok, &[]),
            Err(message) => self.fail(key, message),
        }
    }

    fn with(&mut self, id: &str, act: impl FnOnce(&mut Running) -> Result<(), String>) -> Result<(), String> {
        match self.containers.iter_mut().find(|c| c.id == id) {
            Some(container) => act(container),
            None => Err(format!("container {id} is not running")),
        }
    }

    fn signal(&mut self, id: &str, signal: i32) -> Result<(), String> {
        self.with(id, |c| {
            if c.ended.is_some() {
                return Ok(());
            }
            let signal = Signal::try_from(signal).map_err(|_| format!("signal {signal} is unknown"))?;
            kill(Pid::from_raw(c.pid), signal).map_err(|e| e.desc().to_string())
        })
    }

    fn attach(&mut self, id: &str, fds: Vec<OwnedFd>, key: u64) -> Result<(), String> {
        let container = self
            .containers
            .iter_mut()
            .find(|c| c.id == id)
            .ok_or(format!("container {id} is not running"))?;
        let mut fds = fds.into_iter();
        let (stdout, stderr) = (fds.next(), fds.next());
        for fd in [&stdout, &stderr].into_iter().flatten() {
            let _ = rustix::io::ioctl_fionbio(fd, true);
        }
        container.attached.push(Attached { stdout, stderr });
        let input = container.input.as_ref().and_then(|i| i.try_clone().ok());
        let fds: Vec<BorrowedFd<'_>> = input.iter().map(AsFd::as_fd).collect();
        self.reply(key, &Reply::Ok, &fds);
        Ok(())
    }

    /// Collects dead children, whoever's they were.
    fn reap(&mut self) {
        loop {
            let (pid, code, signal) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), code, 0),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    (pid.as_raw(), 128 + signal as i32, signal as i32)
                }
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            let _ = signal;
            if let Some(container) = self.containers.iter_mut().find(|c| c.pid == pid && c.ended.is_none()) {
                container.ended = Some(code);
                if !container.own_pid_namespace {
                    crate::cgroups::kill_processes(&container.cgroup_procs);
                }
            } else if let Some(exec) = self.execs.iter_mut().find(|e| e.pid == pid && e.ended.is_none()) {
                exec.ended = Some(code);
            }
        }
    }

    /// Brings what has ended to its end: containers once their output is read, execs once known to have run.
    fn settle(&mut self) {
        let mut at = 0;
        while at < self.execs.len() {
            if self.execs[at].ended.is_some() && self.execs[at].starting.is_none() {
                let exec = self.execs.swap_remove(at);
                self.reply(exec.client, &Reply::Exited { code: exec.ended.unwrap_or(-1) }, &[]);
            } else {
                at += 1;
            }
        }
        let mut at = 0;
        while at < self.containers.len() {
            let container = &self.containers[at];
            if container.ended.is_some() && container.starting.is_none() {
                let container = self.containers.swap_remove(at);
                self.bury(container);
            } else {
                at += 1;
            }
        }
    }

    fn bury(&mut self, mut container: Running) {
        // What was written before the end is in the pipes already.
        let mut buffer = vec![0; log::LINE_MAX_BYTES];
        for output in &container.outputs {
            let _ = rustix::io::ioctl_fionbio(&output.fd, true);
        }
        while !container.outputs.is_empty() {
            run::read_stream(&mut container, 0, &mut buffer, true);
        }
        let code = container.ended.unwrap_or(-1);
        // As containerd has it: once the kernel has killed for memory in the group, whichever process it was, that is
        // why the container ended, whatever its first process said afterwards.
        let reason = match code {
            _ if container.oom_file.as_deref().is_some_and(run::was_out_of_memory) => "OOMKilled",
            0 => "Completed",
            _ => "Error",
        };
        let exit = Exit { code, at_ns: run::now_ns(), reason: reason.into(), message: String::new() };
        self.write_exit(&container.id, &exit);
    }

    fn write_exit(&mut self, id: &str, exit: &Exit) {
        run::write_file(&self.folder.join("containers").join(id).join("exit.json"), exit);
        self.announce(id);
    }

    fn announce(&mut self, id: &str) {
        let watching: Vec<u64> = self.clients.iter().filter(|c| c.watching).map(|c| c.key).collect();
        for key in watching {
            self.reply(key, &Reply::Event { id: id.to_string() }, &[]);
        }
    }

    fn kill_all(&mut self) {
        for container in &self.containers {
            let _ = kill(Pid::from_raw(container.pid), Signal::SIGKILL);
        }
        for exec in &self.execs {
            let _ = kill(Pid::from_raw(exec.pid), Signal::SIGKILL);
        }
    }

    /// After `Stop`: waits for the killed, writes their exits, lets the mounts go.
    fn end(&mut self) {
        for index in 0..self.containers.len() {
            let container = &mut self.containers[index];
            container.starting = None;
            if container.ended.is_none() {
                let status = waitpid(Pid::from_raw(container.pid), None);
                container.ended = Some(match status {
                    Ok(WaitStatus::Exited(_, code)) => code,
                    _ => 137,
                });
                if !container.own_pid_namespace {
                    crate::cgroups::kill_processes(&container.cgroup_procs);
                }
            }
        }
        self.settle();
        if let Some((pid, _)) = self.holder.take() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            let _ = waitpid(Pid::from_raw(pid), None);
        }
        if let Some(shm) = &self.spec.shm {
            let _ = nix::mount::umount2(shm, nix::mount::MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_file(self.folder.join("shim.sock"));
    }
}

fn listen(folder: &Path) -> Result<UnixListener, String> {
    let opened: OwnedFd = fs::File::open(folder).map_err(|e| e.to_string())?.into();
    let path = protocol::socket_path(&opened);
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(|e| format!("control socket: {e}"))?;
    listener.set_nonblocking(true).map_err(|e| e.to_string())?;
    debug_assert!(listener.as_raw_fd() > 2);
    Ok(listener)
}
