//! Control groups v1, hybrid and v2: a container's own group below its pod's.
//!
//! Upstream counterpart: runc's `libcontainer/cgroups`. Only cpu, cpuacct, memory, pids, devices (and v2's tree) are
//! used. What is not there (a controller that isn't mounted or delegated) is left out and logged once: small boards
//! often boot without the memory controller. Groups are made below a root that the node is given.
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use sampan_drivers::runtime::Resources;

mod devices;

const V1_CONTROLLERS: [&str; 5] = ["cpu", "cpuacct", "memory", "pids", "devices"];
const V2_CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// How often a kill is repeated while a group still has processes.
const KILL_ROUNDS: u32 = 50;

#[derive(Clone, Debug, Default)]
pub struct Cgroups {
    v1: BTreeMap<&'static str, PathBuf>,
    v2: Option<PathBuf>,
    root: String,
}

/// A device rule: (kind `c`/`b`/`a`, major, minor, access); -1 stands for any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRule {
    pub kind: char,
    pub major: i64,
    pub minor: i64,
    pub access: String,
}

/// What every container may use: the nodes of its /dev, terminals, and making nodes that it can't open.
pub fn standard_devices() -> Vec<DeviceRule> {
    let rule = |kind, major, minor, access: &str| DeviceRule { kind, major, minor, access: access.into() };
    let mut rules = vec![rule('c', -1, -1, "m"), rule('b', -1, -1, "m")];
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, -1)] {
        rules.push(rule('c', major, minor, "rwm"));
    }
    rules
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu_ns: u64,
    pub memory_working_set_bytes: u64,
    pub memory_rss_bytes: u64,
}

impl Cgroups {
    /// Finds the hierarchies of this machine. `root` is where this node's groups begin: `sampan`.
    pub fn detect(root: &str) -> Cgroups {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Cgroups::from_mountinfo(&mounts, root)
    }

    fn from_mountinfo(mounts: &str, root: &str) -> Cgroups {
        let mut found = Cgroups { root: root.trim_matches('/').to_string(), ..Cgroups::default() };
        for line in mounts.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let Some(point) = left.split(' ').nth(4) else { continue };
            let mut right = right.split(' ');
            let (kind, options) = (right.next().unwrap_or(""), right.nth(1).unwrap_or(""));
            match kind {
                "cgroup" => {
                    for name in V1_CONTROLLERS {
                        if options.split(',').any(|o| o == name) {
                            found.v1.entry(name).or_insert_with(|| point.into());
                        }
                    }
                }
                "cgroup2" => found.v2 = found.v2.or_else(|| Some(point.into())),
                _ => {}
            }
        }
        // Hybrid: the controllers are v1's, and v2's tree has nothing that is needed.
        if !found.v1.is_empty() {
            found.v2 = None;
        }
        found
    }

    pub fn is_v2(&self) -> bool {
        self.v2.is_some()
    }

    /// Below a hierarchy's mount point; never absolute, or joining it would lead out of there.
    fn relative(&self, group: &str) -> String {
        format!("{}/{}", self.root, group.trim_matches('/')).trim_matches('/').to_string()
    }

    pub fn folders(&self, group: &str) -> Vec<(&'static str, PathBuf)> {
        let relative = self.relative(group);
        let v1 = self.v1.iter().map(|(name, point)| (*name, point.join(&relative)));
        v1.chain(self.v2.iter().map(|point| ("", point.join(&relative)))).collect()
    }

    fn folder(&self, controller: &str, group: &str) -> Option<PathBuf> {
        let point = self.v1.get(controller).or(self.v2.as_ref())?;
        Some(point.join(self.relative(group)))
    }

    /// v1: controllers and folders, for the container's /sys/fs/cgroup.
    pub fn v1_folders(&self, group: &str) -> Vec<(String, PathBuf)> {
        self.folders(group)
            .into_iter()
            .filter(|(c, _)| !c.is_empty())
            .map(|(c, p)| (c.to_string(), p))
            .collect()
    }

    pub fn procs_files(&self, group: &str) -> Vec<PathBuf> {
        self.folders(group).into_iter().map(|(_, p)| p.join("cgroup.procs")).collect()
    }

    pub fn oom_file(&self, group: &str) -> Option<PathBuf> {
        let name = if self.is_v2() { "memory.events" } else { "memory.oom_control" };
        Some(self.folder("memory", group)?.join(name))
            .filter(|_| self.is_v2() || self.v1.contains_key("memory"))
    }

    /// Makes the group and its parents.
    pub fn create(&self, group: &str) -> io::Result<()> {
        for (_, folder) in self.folders(group) {
            fs::create_dir_all(&folder)?;
        }
        if let Some(point) = &self.v2 {
            let mut at = point.clone();
            for part in Path::new(&self.relative(group)) {
                for controller in V2_CONTROLLERS {
                    let _ = fs::write(at.join("cgroup.subtree_control"), format!("+{controller}"));
                }
                at.push(part);
            }
        }
        Ok(())
    }

    /// Sets what `resources` says for a container; 0 means not set.
    pub fn limit(&self, group: &str, resources: &Resources) -> io::Result<()> {
        self.write(group, settings(resources, self.is_v2(), true))
    }

    /// The same for a pod's group, or one above pods: short of memory, one of its containers goes, not all of them.
    pub fn limit_pods(&self, group: &str, resources: &Resources) -> io::Result<()> {
        self.write(group, settings(resources, self.is_v2(), false))
    }

    fn write(&self, group: &str, settings: Vec<(&'static str, &'static str, String)>) -> io::Result<()> {
        for (controller, file, value) in settings {
            let Some(folder) = self.folder(controller, group) else { continue };
            let path = folder.join(file);
            if !path.exists() {
                tracing::debug!(group, controller, "no such cgroup controller here");
                continue;
            }
            fs::write(&path, &value).map_err(|e| {
                io::Error::new(e.kind(), format!("writing {value} to {}: {e}", path.display()))
            })?;
        }
        Ok(())
    }

    /// Lets the group use only the devices of `rules`; where that can't be done, says why.
    pub fn restrict_devices(&self, group: &str, rules: &[DeviceRule]) -> io::Result<()> {
        if let Some(point) = &self.v2 {
            let folder = fs::File::open(point.join(self.relative(group)))?;
            return crate::sys::attach_device_program(folder.as_fd(), &devices::program(rules));
        }
        let Some(folder) = self.folder("devices", group) else {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no devices controller"));
        };
        fs::write(folder.join("devices.deny"), "a")?;
        for rule in rules {
            let number = |n: i64| if n < 0 { "*".to_string() } else { n.to_string() };
            let line = format!("{} {}:{} {}", rule.kind, number(rule.major), number(rule.minor), rule.access);
            fs::write(folder.join("devices.allow"), line)?;
        }
        Ok(())
    }

    /// Kills every process of the group and waits until they are gone. Blocking.
    pub fn kill(&self, group: &str) {
        let folders = self.folders(group);
        for (_, folder) in &folders {
            let _ = fs::write(folder.join("cgroup.kill"), "1");
        }
        let files: Vec<PathBuf> = folders.iter().map(|(_, f)| f.join("cgroup.procs")).collect();
        kill_processes(&files);
    }

    /// Removes the group and the groups in it; the processes must be gone.
    pub fn remove(&self, group: &str) {
        for (_, folder) in self.folders(group) {
            remove_tree(&folder);
        }
    }

    pub fn usage(&self, group: &str) -> Usage {
        let read = |controller: &str, file: &str| {
            self.folder(controller, group)
                .and_then(|f| fs::read_to_string(f.join(file)).ok())
                .unwrap_or_default()
        };
        let number = |text: &str| text.trim().parse::<u64>().unwrap_or(0);
        let (cpu_ns, usage, inactive, rss) = if self.is_v2() {
            let stat = read("memory", "memory.stat");
            (
                field(&read("cpu", "cpu.stat"), "usage_usec") * 1000,
                number(&read("memory", "memory.current")),
                field(&stat, "inactive_file"),
                field(&stat, "anon"),
            )
        } else {
            let stat = read("memory", "memory.stat");
            (
                number(&read("cpuacct", "cpuacct.usage")),
                number(&read("memory", "memory.usage_in_bytes")),
                field(&stat, "total_inactive_file"),
                field(&stat, "total_rss"),
            )
        };
        Usage { cpu_ns, memory_working_set_bytes: usage.saturating_sub(inactive), memory_rss_bytes: rss }
    }
}

/// `name value` lines.
pub fn field(text: &str, name: &str) -> u64 {
    let value = |l: &str| l.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

/// SIGKILLs all that `cgroup.procs` files list, until none is left or rounds run out.
pub fn kill_processes(files: &[PathBuf]) {
    for round in 0..KILL_ROUNDS {
        let mut left = false;
        for file in files {
            for pid in fs::read_to_string(file).unwrap_or_default().lines().filter_map(|l| l.parse().ok()) {
                // 0 is a process outside of our PID namespace, which is none of ours.
                if pid > 1 {
                    left = true;
                    let _ =
                        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
                }
            }
        }
        if !left {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(u64::from(round.min(10)) * 2));
    }
}

fn remove_tree(folder: &Path) {
    for child in fs::read_dir(folder).into_iter().flatten().flatten() {
        if child.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&child.path());
        }
    }
    let _ = fs::remove_dir(folder);
}

fn settings(r: &Resources, v2: bool, goes_whole: bool) -> Vec<(&'static str, &'static str, String)> {
    let mut out = Vec::new();
    let mut set = |controller, v1_file, v2_file, v1_value: String, v2_value: String| {
        out.push(if v2 { (controller, v2_file, v2_value) } else { (controller, v1_file, v1_value) });
    };
    if r.cpu_shares > 0 {
        let shares = r.cpu_shares.clamp(2, 262_144);
        let weight = 1 + (shares - 2) * 9999 / 262_142;
        set("cpu", "cpu.shares", "cpu.weight", shares.to_string(), weight.to_string());
    }
    if r.cpu_quota_us != 0 {
        let period = if r.cpu_period_us > 0 { r.cpu_period_us } else { 100_000 };
        if !v2 {
            set("cpu", "cpu.cfs_period_us", "", period.to_string(), String::new());
        }
        let quota = if r.cpu_quota_us < 0 { "max".to_string() } else { r.cpu_quota_us.to_string() };
        set("cpu", "cpu.cfs_quota_us", "cpu.max", r.cpu_quota_us.to_string(), format!("{quota} {period}"));
    }
    if r.memory_limit_bytes != 0 {
        let limit = r.memory_limit_bytes.to_string();
        let max = if r.memory_limit_bytes < 0 { "max".to_string() } else { limit.clone() };
        set("memory", "memory.limit_in_bytes", "memory.max", limit, max);
        if v2 && goes_whole {
            // A container is killed whole, as containerd does it on v2.
            set("memory", "", "memory.oom.group", String::new(), "1".into());
        }
    }
    if r.pids_limit != 0 {
        let limit = if r.pids_limit < 0 { "max".to_string() } else { r.pids_limit.to_string() };
        set("pids", "pids.max", "pids.max", limit.clone(), limit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found() {
        let hybrid = "31 22 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
            32 22 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            33 22 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = Cgroups::from_mountinfo(hybrid, "/lab/n1/");
        assert!(!found.is_v2());
        assert_eq!(
            found.folder("cpuacct", "p/c").unwrap(),
            Path::new("/sys/fs/cgroup/cpu,cpuacct/lab/n1/p/c")
        );
        let v2 = Cgroups::from_mountinfo("30 22 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "s");
        assert_eq!(v2.folder("memory", "p").unwrap(), Path::new("/sys/fs/cgroup/s/p"));
        // a machine's own node has no group above
        let whole = Cgroups::from_mountinfo("30 22 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "");
        assert_eq!(whole.folder("memory", "/p/c").unwrap(), Path::new("/sys/fs/cgroup/p/c"));
    }

    #[test]
    fn limits_are_written_as_each_version_has_them() {
        let r = Resources {
            cpu_period_us: 0,
            cpu_quota_us: 50_000,
            cpu_shares: 1024,
            memory_limit_bytes: 1 << 20,
            pids_limit: -1,
            oom_score_adj: 0,
        };
        let text = |v2| {
            settings(&r, v2, true).iter().map(|(_, f, v)| format!("{f}={v}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            text(false),
            "cpu.shares=1024 cpu.cfs_period_us=100000 cpu.cfs_quota_us=50000 memory.limit_in_bytes=1048576 pids.max=max"
        );
        assert_eq!(
            text(true),
            "cpu.weight=39 cpu.max=50000 100000 memory.max=1048576 memory.oom.group=1 pids.max=max"
        );
        assert!(settings(&r, true, false).iter().all(|(_, file, _)| *file != "memory.oom.group"));
    }
}
