//! A node's PID 1: makes the namespaces' mounts, then only reaps.
#![allow(unsafe_code)] // fork-time namespace changes: each block says why it is sound
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};

use crate::LabError;

/// What every node has of its own on top of the machine's.
const OWN: &[&str] = &["etc", "var"];
/// What a bare node has besides, as owners install programs and keep homes.
const BARE: &[&str] = &["usr/local", "root", "home"];

/// `lab-spawn NAME FOLDER [bare]`: unshares, starts `lab-init` as PID 1 of the new namespaces, waits until it is ready and
/// prints its pid.
pub fn spawn(args: &[String]) -> Result<i32, LabError> {
    unshare(
        CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWPID,
    )
    .map_err(|e| LabError::failed("cannot make a node's namespaces (are you root?)", e))?;
    let exe = std::env::current_exe().map_err(LabError::os("finding this program"))?;
    let log = args.get(1).map(|folder| Path::new(folder).join("init.log"));
    let stderr = match log {
        Some(path) => fs::File::create(&path).map_err(LabError::file(path))?.into(),
        None => Stdio::null(),
    };
    let mut child = Command::new(exe)
        .arg("lab-init")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .map_err(LabError::os("starting a node's init"))?;
    let mut answer = String::new();
    if let Some(out) = child.stdout.as_mut() {
        out.read_to_string(&mut answer).map_err(LabError::os("reading from a node's init"))?;
    }
    if answer.trim() != "ready" {
        let _ = child.wait();
        return Err(LabError::failed("a node's init did not start", "see init.log in the node's folder"));
    }
    println!("{}", child.id());
    Ok(0)
}

/// `lab-init NAME FOLDER [bare]`: PID 1.
pub fn run(args: &[String]) -> Result<i32, LabError> {
    let [name, folder, bare @ ..] = args else {
        return Err(LabError::failed("lab-init", "needs NAME and FOLDER"));
    };
    if std::process::id() != 1 {
        return Err(LabError::failed("lab-init", "is started by `sampan lab up` only, as PID 1 of a node"));
    }
    prepare(name, Path::new(folder), !bare.is_empty())?;
    let mut out = std::io::stdout();
    out.write_all(b"ready\n")
        .and_then(|()| out.flush())
        .map_err(LabError::os("telling that init is ready"))?;
    // whoever started us reads to the end: give the pipe's last end back
    let null = fs::File::open("/dev/null").map_err(LabError::file("/dev/null"))?;
    // SAFETY: both descriptors are open; dup2 replaces stdout by /dev/null, and nothing prints afterwards.
    unsafe { libc::dup2(null.as_raw_fd(), 1) };
    reap();
    Ok(0)
}

/// Waits for children until SIGTERM or SIGINT.
fn reap() {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        signals.add(signal);
    }
    if signals.thread_block().is_err() {
        return;
    }
    loop {
        while let Ok(status) = nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG)) {
            if status == nix::sys::wait::WaitStatus::StillAlive {
                break;
            }
        }
        match signals.wait() {
            Ok(Signal::SIGTERM | Signal::SIGINT) => return,
            _ => continue,
        }
    }
}

fn prepare(name: &str, folder: &Path, bare: bool) -> Result<(), LabError> {
    nix::unistd::sethostname(name).map_err(|e| LabError::failed("sethostname", e))?;
    make(None, "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    // pods may ask for shared propagation inside the node
    let binary = keep(&std::env::current_exe().map_err(LabError::os("finding this program"))?)?;
    // the folder may lie below one of these, and the layers of an overlay cannot be on another one: past the mounts
    let (_held, folder) = keep(folder)?;
    let own = |sub: &str| keep(&folder.join(sub));
    let (data, tmp) = (own("data")?, own("tmp")?);
    // /etc and /var are the machine's with the node's own changes on top
    let more: &[&str] = if bare { BARE } else { &[] };
    for part in more.iter().chain(OWN) {
        let folded = part.replace('/', "-");
        let (upper, work) = (folder.join(&folded), folder.join(format!("{folded}-work")));
        for path in [&upper, &work] {
            fs::create_dir_all(path).map_err(LabError::file(path))?;
        }
        let options = format!(
            "lowerdir=/{part},upperdir={},workdir={},xino=off,index=off",
            upper.display(),
            work.display()
        );
        mount(
            Some("overlay"),
            format!("/{part}").as_str(),
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .map_err(|e| LabError::failed(format!("mounting the node's /{part}"), e))?;
    }
    bind(&data, Path::new("/var/lib/sampan"))?;
    bind(&tmp, Path::new("/tmp"))?;
    fresh("tmpfs", "/run", "mode=755,size=256m")?;
    bind_file(&binary, Path::new("/run/sampan/bin/sampan"))?;
    umount2("/proc", MntFlags::MNT_DETACH).ok();
    fresh("proc", "/proc", "")?;
    // sysfs of the new network namespace, with the cgroup hierarchies moved over
    let cgroup = keep(Path::new("/sys/fs/cgroup"))?;
    fresh("sysfs", "/sys", "")?;
    mount(Some(&cgroup.1), "/sys/fs/cgroup", None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(|e| LabError::failed("mounting /sys/fs/cgroup", e))?;
    make(None, "/", None, MsFlags::MS_REC | MsFlags::MS_SHARED)?;
    let hosts = format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {name}\n");
    for (path, text) in [
        ("/etc/hostname", format!("{name}\n")),
        ("/etc/hosts", hosts),
        ("/etc/resolv.conf", "# a lab leads nowhere outside\n".to_string()),
        ("/etc/machine-id", format!("{}\n", sampan_world::random::uuid().replace('-', ""))),
    ] {
        // in place of a link (resolv.conf often is one), in the node's own layer
        let _ = fs::remove_file(path);
        fs::write(path, text).map_err(LabError::file(path))?;
    }
    Ok(())
}

/// A folder or file kept reachable while mounts above it change: an open handle and the path that leads to it.
fn keep(path: &Path) -> Result<(fs::File, PathBuf), LabError> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .map_err(LabError::file(path))?;
    let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Ok((file, link))
}

fn bind(kept: &(fs::File, PathBuf), target: &Path) -> Result<(), LabError> {
    fs::create_dir_all(target).map_err(LabError::file(target))?;
    mount(Some(&kept.1), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|e| LabError::failed(format!("mounting {}", target.display()), e))
}

fn bind_file(kept: &(fs::File, PathBuf), target: &Path) -> Result<(), LabError> {
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder).map_err(LabError::file(folder))?;
    }
    fs::write(target, b"").map_err(LabError::file(target))?;
    mount(Some(&kept.1), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|e| LabError::failed(format!("mounting {}", target.display()), e))
}

fn fresh(kind: &str, target: &str, options: &str) -> Result<(), LabError> {
    make(Some(kind), target, Some(options), MsFlags::empty())
}

fn make(kind: Option<&str>, target: &str, options: Option<&str>, flags: MsFlags) -> Result<(), LabError> {
    mount(kind, target, kind, flags, options.filter(|o| !o.is_empty()))
        .map_err(|e| LabError::failed(format!("mounting {target}"), e))
}
