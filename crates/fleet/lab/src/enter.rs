//! `lab-enter PID FLAGS -- COMMAND…`: runs a command inside a node's namespaces, as nsenter does.
//!
//! It must be single-threaded (setns refuses a mount namespace otherwise), so it is a process of its own. A PID
//! namespace is entered by children only, hence the extra process in between.
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

use crate::LabError;

/// `lab-enter PID wait|detach:LOGFILE -- COMMAND…`
pub fn run(args: &[String]) -> Result<i32, LabError> {
    let (Some(pid), Some(mode), Some(command)) = (args.first(), args.get(1), args.get(3..)) else {
        return Err(LabError::failed("lab-enter", "needs PID, a mode and a command"));
    };
    let Some(program) = command.first() else { return Err(LabError::failed("lab-enter", "needs a command")) };
    let log = match mode.strip_prefix("detach:") {
        Some(path) => {
            Some(File::options().create(true).append(true).open(path).map_err(LabError::file(path))?)
        }
        None => None,
    };
    let open = |ns: &str| {
        let path = format!("/proc/{pid}/ns/{ns}");
        File::open(&path).map_err(LabError::file(path))
    };
    let namespaces = [
        (open("uts")?, CloneFlags::CLONE_NEWUTS),
        (open("ipc")?, CloneFlags::CLONE_NEWIPC),
        (open("net")?, CloneFlags::CLONE_NEWNET),
        (open("pid")?, CloneFlags::CLONE_NEWPID),
        (open("mnt")?, CloneFlags::CLONE_NEWNS),
    ];
    for (file, flag) in &namespaces {
        setns(file.as_fd(), *flag)
            .map_err(|e| LabError::failed(format!("entering the node of PID {pid}"), e))?;
    }
    let _ = std::env::set_current_dir("/");
    let mut child = Command::new(program);
    child.args(&command[1..]).env("SAMPAN_CLOCK_OFFSET_FILE", "/etc/sampan/clock-offset-seconds");
    let Some(log) = log else {
        let status = child.status().map_err(LabError::os(format!("running {program}")))?;
        return Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
    };
    let stdout = log.try_clone().map_err(LabError::os("the log file"))?;
    let child = child
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(log)
        .process_group(0)
        .spawn()
        .map_err(LabError::os(format!("running {program}")))?;
    println!("{}", child.id());
    Ok(0)
}
