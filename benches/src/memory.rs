//! What a node's processes use, read from /proc: memory, processor time, bytes written.
//!
//! A node's own processes are those in the PID namespace of its init (the lab's own tool, not counted). Containers are
//! in namespaces below and are the pods' own.
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// One process of a node.
#[derive(Clone, Debug)]
pub struct Process {
    pub is_shim: bool,
    pub rss_bytes: u64,
    pub private_bytes: u64,
    pub cpu_ms: u64,
    pub written_bytes: u64,
}

/// All that belongs to the node whose init has this pid.
pub fn processes(init: u32) -> Result<Vec<Process>> {
    let namespace = fs::read_link(format!("/proc/{init}/ns/pid_for_children"))
        .or_else(|_| fs::read_link(format!("/proc/{init}/ns/pid")))
        .with_context(|| format!("the node's init {init}"))?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let of_node = fs::read_link(entry.path().join("ns/pid")).is_ok_and(|ns| ns == namespace);
        if pid != init && of_node {
            // one that ends meanwhile is not there
            found.extend(read(&entry.path()));
        }
    }
    Ok(found)
}

fn read(folder: &Path) -> Option<Process> {
    let command = fs::read(folder.join("cmdline")).ok()?;
    let is_shim = command.split(|b| *b == 0).nth(1) == Some(b"shim");
    let rollup = fs::read_to_string(folder.join("smaps_rollup")).ok()?;
    let kilobytes = |name: &str| -> u64 {
        let line = rollup.lines().find(|l| l.starts_with(name));
        line.and_then(|l| l.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
    };
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 2..)?.split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
    let io = fs::read_to_string(folder.join("io")).unwrap_or_default();
    let written = io.lines().find_map(|l| l.strip_prefix("write_bytes: ")?.parse().ok()).unwrap_or(0);
    Some(Process {
        is_shim,
        rss_bytes: kilobytes("Rss:") * 1024,
        private_bytes: (kilobytes("Private_Clean:") + kilobytes("Private_Dirty:")) * 1024,
        // user and system time, in hundredths of a second on all of Linux
        cpu_ms: (ticks(11) + ticks(12)) * 10,
        written_bytes: written,
    })
}

pub fn sum(processes: &[Process], of: impl Fn(&Process) -> u64) -> u64 {
    processes.iter().map(of).sum()
}
