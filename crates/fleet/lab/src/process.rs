//! A process that is known again by pid and start time, so that a reused pid is never killed for another.
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    /// Field 22 of /proc/PID/stat, in clock ticks since boot.
    pub started: u64,
}

impl Process {
    /// The process that has `pid` now.
    pub fn find(pid: i32) -> Option<Self> {
        start_time(pid).map(|started| Self { pid, started })
    }

    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Sends a signal; a process that is gone is no error.
    pub fn signal(&self, signal: Signal) -> Result<(), Errno> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Waits until it is gone, at most `limit`; says whether it is.
    pub fn wait_gone(&self, limit: Duration) -> bool {
        let step = Duration::from_millis(10);
        let mut waited = Duration::ZERO;
        while self.is_alive() {
            if waited >= limit {
                return false;
            }
            std::thread::sleep(step);
            waited += step;
        }
        true
    }

    /// SIGTERM, then SIGKILL after `grace`.
    pub fn end(&self, grace: Duration) -> Result<(), Errno> {
        self.signal(Signal::SIGTERM)?;
        if !self.wait_gone(grace) {
            self.signal(Signal::SIGKILL)?;
            self.wait_gone(Duration::from_secs(10));
        }
        Ok(())
    }
}

/// `None` for a process that is gone, or a zombie with all its threads.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the command's name may hold blanks and parentheses
    let mut fields = stat.get(stat.rfind(')')? + 2..)?.split(' ');
    match fields.next()? {
        // a killed process's first thread may be a zombie while others still hold its files and locks
        "Z" | "X" if threads(pid) <= 1 => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

fn threads(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_time_too() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::find(child.id() as i32).unwrap();
        assert!(process.is_alive());
        assert!(
            !Process { started: process.started + 1, ..process.clone() }.is_alive(),
            "another with the same pid"
        );
        process.signal(Signal::SIGKILL).unwrap();
        assert!(process.wait_gone(Duration::from_secs(5)), "a zombie counts as gone");
        child.wait().unwrap();
    }
}
