//! The last steps of a process of a container, between having its namespaces and being its program.
//!
//! Upstream counterpart: runc's `finalizeNamespace` and `standard_init_linux.go`; the error texts are runc's, which
//! people and tests know. The order matters: CAP_SYS_ADMIN is kept until the seccomp filter is in, so that a filter
//! needs no `noNewPrivileges`, and everything before it may still make calls that the filter forbids.
use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::unistd::{Gid, Uid};

use super::user::{self, User};
use crate::spec::ProcessSpec;
use crate::sys;

const SYS_ADMIN: u64 = 1 << 21;
const SETPCAP: u64 = 1 << 8;
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Standard input, output and error.
pub struct Stdio {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// What must be opened while the host's files are still in sight.
pub struct Prepared {
    filter: Option<Vec<u64>>,
}

pub fn prepare(spec: &ProcessSpec) -> Result<Prepared, String> {
    let filter = match &spec.seccomp {
        None => None,
        Some(path) => {
            let bytes = fs::read(path).map_err(|e| format!("seccomp filter {}: {e}", path.display()))?;
            Some(bytes.chunks_exact(8).filter_map(|c| Some(u64::from_le_bytes(*c.first_chunk()?))).collect())
        }
    };
    // Best effort: without CAP_SYS_RESOURCE a score can't go below where it came from.
    let _ = fs::write("/proc/self/oom_score_adj", spec.oom_score_adj.to_string());
    Ok(Prepared { filter })
}

/// Puts this process into groups, before it loses sight of them.
pub fn join_cgroups(spec: &ProcessSpec) -> Result<(), String> {
    for file in &spec.cgroup_procs {
        fs::write(file, "0").map_err(|e| format!("joining cgroup {}: {e}", file.display()))?;
    }
    Ok(())
}

/// The container's terminal: (master, slave).
pub fn open_terminal() -> Result<(OwnedFd, OwnedFd), String> {
    use rustix::fs::{Mode, OFlags, open};
    let failed = |e: rustix::io::Errno| format!("opening a terminal: {e}");
    let master =
        open("/dev/ptmx", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    rustix::pty::unlockpt(&master).map_err(failed)?;
    let name = rustix::pty::ptsname(&master, Vec::new()).map_err(failed)?;
    let slave = open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed)?;
    Ok((master, slave))
}

pub fn terminal_stdio(slave: &OwnedFd) -> io::Result<Stdio> {
    sys::controlling_terminal(slave.as_fd())?;
    Ok(Stdio { stdin: slave.try_clone()?, stdout: slave.try_clone()?, stderr: slave.try_clone()? })
}

/// Who the process will be, by the files that are in sight now.
pub fn resolve_user(spec: &ProcessSpec) -> Result<User, String> {
    let read =
        |path: &str| fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    user::resolve(&spec.user, &read("/etc/passwd"), &read("/etc/group"))
}

/// Becomes the program, or says why not.
pub fn become_program(
    spec: &ProcessSpec,
    prepared: Prepared,
    user: &User,
    stdio: Stdio,
) -> Result<Infallible, String> {
    let env = environment(spec, user);
    let step = |what: &str, e: io::Error| format!("{what}: {e}");
    for fd in [&stdio.stdin, &stdio.stdout, &stdio.stderr] {
        give_to(fd.as_fd(), user, spec.tty);
    }
    let cwd = if spec.cwd.is_empty() { "/" } else { &spec.cwd };
    // As the container's root, so that a missing folder can be made and a private one entered.
    if !Path::new(cwd).exists() {
        fs::create_dir_all(cwd).map_err(|e| step(&format!("mkdir {cwd}"), e))?;
    }
    std::env::set_current_dir(cwd)
        .map_err(|e| step(&format!("chdir to cwd ({cwd:?}) set in config.json failed"), e))?;
    for (fd, number) in [(&stdio.stdin, 0), (&stdio.stdout, 1), (&stdio.stderr, 2)] {
        sys::dup_to(fd.as_fd(), number).map_err(|e| step("setting up standard streams", e))?;
    }
    sys::close_on_exec_from(3);
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    // ours alone, but inherited
    let _ = rustix::thread::disable_transparent_huge_pages(false);
    drop_privileges(spec, prepared, user)?;
    sys::default_signals();
    let program = look_up(spec, &env)?;
    let c = |s: &String| CString::new(s.as_bytes()).map_err(|_| "a NUL byte in an argument".to_string());
    let args = spec.args.iter().map(c).collect::<Result<Vec<_>, _>>()?;
    let env = env.iter().map(c).collect::<Result<Vec<_>, _>>()?;
    let path = c(&program)?;
    let Err(errno) = nix::unistd::execve(&path, &args, &env);
    Err(exec_error(&program, errno))
}

fn exec_error(program: &str, errno: nix::errno::Errno) -> String {
    let text = match errno {
        nix::errno::Errno::ENOENT => "no such file or directory",
        nix::errno::Errno::EACCES => "permission denied",
        nix::errno::Errno::ENOEXEC => "exec format error",
        other => other.desc(),
    };
    format!("exec {program}: {text}")
}

fn environment(spec: &ProcessSpec, user: &User) -> Vec<String> {
    let mut env: Vec<String> = Vec::with_capacity(spec.env.len() + 2);
    // The last of equals wins, and keeps the place of the first.
    for entry in &spec.env {
        let name = entry.split('=').next().unwrap_or(entry);
        match env.iter_mut().find(|e| e.split('=').next() == Some(name)) {
            Some(old) => *old = entry.clone(),
            None => env.push(entry.clone()),
        }
    }
    let has = |env: &[String], name: &str| env.iter().any(|e| e.starts_with(name));
    if !has(&env, "PATH=") {
        env.push(format!("PATH={DEFAULT_PATH}"));
    }
    if !has(&env, "HOME=") {
        env.push(format!("HOME={}", user.home));
    }
    if spec.tty && !has(&env, "TERM=") {
        env.push("TERM=xterm".into());
    }
    env
}

/// /dev/stdout must open again for a user who isn't root.
fn give_to(fd: BorrowedFd<'_>, user: &User, tty: bool) {
    let Ok(stat) = nix::sys::stat::fstat(fd) else { return };
    if stat.st_uid == user.uid || (stat.st_rdev == nix::sys::stat::makedev(1, 3) && !tty) {
        return;
    }
    let gid = (!tty).then(|| Gid::from_raw(user.gid));
    let _ = nix::unistd::fchown(fd, Some(Uid::from_raw(user.uid)), gid);
}

fn drop_privileges(spec: &ProcessSpec, prepared: Prepared, user: &User) -> Result<(), String> {
    let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    let errno = |e: nix::errno::Errno| io::Error::from(e);
    let wanted = spec.capabilities & own_capabilities();
    for capability in 0..64 {
        if wanted >> capability & 1 == 0 && sys::prctl(libc::PR_CAPBSET_READ, capability).is_ok() {
            let _ = sys::prctl(libc::PR_CAPBSET_DROP, capability);
        }
    }
    let groups: Vec<Gid> = user.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    nix::unistd::setgroups(&groups).map_err(errno).map_err(failed("setgroups"))?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 1).map_err(failed("keeping capabilities"))?;
    let gid = Gid::from_raw(user.gid);
    nix::unistd::setresgid(gid, gid, gid).map_err(errno).map_err(failed("setgid"))?;
    let uid = Uid::from_raw(user.uid);
    nix::unistd::setresuid(uid, uid, uid).map_err(errno).map_err(failed("setuid"))?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0).map_err(failed("keeping capabilities"))?;
    let _ = sys::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64);
    // Changing users clears it; the shim's death must end us.
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64).map_err(failed("death signal"))?;
    if spec.no_new_privileges {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(failed("no_new_privs"))?;
    }
    if let Some(filter) = prepared.filter {
        if !spec.no_new_privileges {
            let all = (wanted | SYS_ADMIN | SETPCAP) & own_capabilities();
            sys::capset(all, all).map_err(failed("capabilities"))?;
        }
        sys::seccomp(&filter).map_err(failed("seccomp filter"))?;
    }
    sys::capset(wanted, wanted).map_err(failed("capabilities"))
}

/// What this process may have at most: a node inside a container lacks some.
fn own_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("CapPrm:"));
    line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok()).unwrap_or(u64::MAX)
}

/// Finds the program in the container's PATH.
fn look_up(spec: &ProcessSpec, env: &[String]) -> Result<String, String> {
    let name = spec.args.first().filter(|n| !n.is_empty()).ok_or("no command specified")?;
    let check = |path: &str| -> Result<(), &'static str> {
        let metadata = fs::metadata(path).map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => "permission denied",
            io::ErrorKind::NotADirectory => "not a directory",
            _ => "no such file or directory",
        })?;
        match (metadata.is_dir(), metadata.permissions().mode() & 0o111) {
            (true, _) => Err("is a directory"),
            (false, 0) => Err("permission denied"),
            _ => Ok(()),
        }
    };
    if name.contains('/') {
        return match check(name) {
            Ok(()) => Ok(name.clone()),
            Err(why @ "no such file or directory") => Err(format!("exec: {name:?}: stat {name}: {why}")),
            Err(why) => Err(format!("exec: {name:?}: {why}")),
        };
    }
    let path = env.iter().find_map(|e| e.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    for folder in path.split(':').filter(|f| !f.is_empty()) {
        let candidate = format!("{}/{name}", folder.trim_end_matches('/'));
        if check(&candidate).is_ok() {
            return Ok(candidate);
        }
    }
    Err(format!("exec: {name:?}: executable file not found in $PATH"))
}
