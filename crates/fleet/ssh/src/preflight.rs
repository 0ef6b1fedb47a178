//! Preflight: whether a machine can be a node, told before anything is changed on it.
//!
//! Upstream counterparts: kubeadm's cmd/kubeadm/app/preflight/checks.go, `k3s check-config`. All pure: facts in,
//! findings out. A finding is a sentence that says what to do.
use crate::facts::Facts;

/// What a node needs at least; pods need more.
const MIN_MEMORY_KB: u64 = 200 * 1024;
const GOOD_MEMORY_KB: u64 = 450 * 1024;
const MIN_DATA_KB: u64 = 200 * 1024;
/// Besides the binary itself.
const SPARE_BIN_KB: u64 = 8 * 1024;
/// Certificates and leases bear no more.
pub const MAX_CLOCK_OFFSET_S: i64 = 300;
const WARN_CLOCK_OFFSET_S: i64 = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    Warning,
    Error,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What `--ignore-preflight` names.
    pub check: &'static str,
    pub severity: Severity,
    pub message: String,
}

/// What is to be done with the machine.
#[derive(Clone, Debug, Default)]
pub struct Purpose {
    /// TCP ports that the node will listen on.
    pub ports: Vec<u16>,
    /// The node runs an etcd member, and nobody brings the program.
    pub needs_etcd: bool,
    /// Bytes to be written to the folder of binaries; 0 when it is there already.
    pub binary_bytes: u64,
    /// `sampan` or `sampan-agent`.
    pub service: String,
    /// Our clock.
    pub now_s: i64,
    /// How long asking took: the answer may be so much older.
    pub asked_for_s: i64,
    pub ignored: Vec<String>,
}

#[derive(Clone, Debug, Default)]
pub struct Findings(pub Vec<Finding>);

impl Findings {
    fn error(&mut self, check: &'static str, message: impl Into<String>) {
        self.0.push(Finding { check, severity: Severity::Error, message: message.into() });
    }

    fn warn(&mut self, check: &'static str, message: impl Into<String>) {
        self.0.push(Finding { check, severity: Severity::Warning, message: message.into() });
    }

    pub fn errors(&self) -> impl Iterator<Item = &Finding> {
        self.0.iter().filter(|f| f.severity == Severity::Error)
    }

    pub fn has(&self, check: &str) -> bool {
        self.errors().any(|f| f.check == check)
    }
}

/// The names that `--ignore-preflight` takes.
pub const CHECKS: &[&str] = &[
    "architecture",
    "clock",
    "memory",
    "disk",
    "cgroups",
    "kernel",
    "ports",
    "role",
    "etcd",
    "other-kubernetes",
];

pub fn check(facts: &Facts, purpose: &Purpose) -> Findings {
    let mut found = Findings::default();
    if let Err(why) = facts.architecture() {
        found.error("architecture", why);
    }
    check_clock(facts, purpose, &mut found);
    check_sizes(facts, purpose, &mut found);
    check_cgroups(facts, &mut found);
    check_kernel(facts, &mut found);
    let other = facts.services.iter().find(|s| **s != purpose.service);
    if let Some(other) = other.filter(|_| !purpose.service.is_empty()) {
        let is = if other == "sampan" { "a server" } else { "an agent" };
        found.error("role", format!("it is {is} already; `sampan uninstall` makes it free"));
    }
    // a server that runs holds its own port
    if facts.services.is_empty() {
        for port in purpose.ports.iter().filter(|p| facts.listens.contains(p)) {
            let advice = match port {
                2379 | 2380 => {
                    " (an etcd that came with its package? `systemctl disable --now etcd` ends it)"
                }
                _ => "",
            };
            found.error("ports", format!("something listens on port {port} already{advice}"));
        }
    }
    if purpose.needs_etcd && facts.etcd.is_none() {
        found.error(
            "etcd",
            "there is no program `etcd`, which a server of a cluster of several runs: install it (Debian's package \
             etcd-server, Alpine's etcd), or lay etcd-amd64, etcd-arm64 or etcd-arm into the folder that --binary-dir names",
        );
    }
    for other in &facts.others {
        found.warn(
            "other-kubernetes",
            format!("there is {other}: two Kubernetes nodes on one machine get in each other's way"),
        );
    }
    for finding in &mut found.0 {
        if purpose.ignored.iter().any(|i| i == finding.check || i == "all") {
            finding.severity = Severity::Warning;
        }
    }
    found
}

fn check_clock(facts: &Facts, purpose: &Purpose, found: &mut Findings) {
    let Some(theirs) = facts.time_s else { return };
    // positive: theirs is ahead
    let ahead = theirs - purpose.now_s;
    let off = if ahead < 0 { (-ahead - purpose.asked_for_s).max(0) } else { ahead };
    let told = format!(
        "its clock is {} {} ours: certificates would be refused. Set it (timedatectl set-ntp true, or `date -s @{}` as root)",
        duration(off),
        if ahead < 0 { "behind" } else { "ahead of" },
        purpose.now_s
    );
    if off > MAX_CLOCK_OFFSET_S {
        found.error("clock", told);
    } else if off > WARN_CLOCK_OFFSET_S {
        found.warn("clock", told);
    }
}

/// In the largest fitting unit.
fn duration(seconds: i64) -> String {
    match seconds {
        0..=119 => format!("{seconds} seconds"),
        120..=7199 => format!("{} minutes", seconds / 60),
        7200..=172_799 => format!("{} hours", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

fn check_sizes(facts: &Facts, purpose: &Purpose, found: &mut Findings) {
    match facts.memory_kb {
        Some(kb) if kb < MIN_MEMORY_KB => {
            found.error("memory", format!("it has {} MB of memory; a node needs 200 MB at least", kb / 1024));
        }
        Some(kb) if kb < GOOD_MEMORY_KB => {
            found.warn(
                "memory",
                format!("it has {} MB of memory: enough for the node and small pods", kb / 1024),
            );
        }
        _ => {}
    }
    if let Some(kb) = facts.data_free_kb.filter(|kb| *kb < MIN_DATA_KB) {
        found.error(
            "disk",
            format!(
                "the disk is full: {} MB free for /var/lib/sampan, at least 200 MB are needed",
                kb / 1024
            ),
        );
    }
    let needed_kb = purpose.binary_bytes.div_ceil(1024) + SPARE_BIN_KB;
    if let Some(kb) = facts.bin_free_kb.filter(|kb| purpose.binary_bytes > 0 && *kb < needed_kb) {
        let text = format!(
            "the disk is full: {} MB free for the program, {} MB are needed",
            kb / 1024,
            needed_kb / 1024
        );
        found.error("disk", text);
    }
}

fn check_cgroups(facts: &Facts, found: &mut Findings) {
    let there = |name: &str| facts.controllers.contains(name) || facts.enabled.contains(name);
    if facts.controllers.is_empty() && facts.enabled.is_empty() {
        found.error("cgroups", "the kernel has no control groups (no /proc/cgroups, no /sys/fs/cgroup)");
        return;
    }
    if !there("memory") {
        let how = match &facts.cmdline_path {
            Some(path) => {
                format!("add `cgroup_memory=1 cgroup_enable=memory` to {path} and reboot (--yes does both)")
            }
            None => "boot the kernel with cgroup_enable=memory".to_string(),
        };
        found.error("cgroups", format!("the memory control group is off: {how}"));
    }
    for name in ["cpu", "pids"] {
        if !there(name) {
            found.error("cgroups", format!("the kernel lacks the {name} control group"));
        }
    }
}

fn check_kernel(facts: &Facts, found: &mut Findings) {
    for (name, config, why) in [
        ("overlay", "CONFIG_OVERLAY_FS", "containers' file systems"),
        ("nf_tables", "CONFIG_NF_TABLES", "services"),
        ("veth", "CONFIG_VETH", "the pod network"),
    ] {
        if facts.lacks.contains(name) {
            let text = format!(
                "the kernel lacks {name} ({config}), which {why} need; on Debian and Ubuntu install linux-modules-extra"
            );
            found.error("kernel", text);
        } else if !facts.features.contains(name) {
            found.warn("kernel", format!("could not find out whether the kernel has {name} ({config})"));
        }
    }
    if facts.lacks.contains("vxlan") {
        found.warn("kernel", "the kernel lacks vxlan (CONFIG_VXLAN): nodes must share one link");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "system=Linux\nmachine=aarch64\ntime=1000000\nmemory=1000000\ndata_free=9000000\nbin_free=9000000\n\
        controllers=cpu memory pids\nfeature=overlay\nfeature=nf_tables\nfeature=veth\nlistens=0016\n";

    fn purpose() -> Purpose {
        Purpose {
            ports: vec![6443],
            binary_bytes: 40 << 20,
            service: "sampan".to_string(),
            now_s: 1_000_000,
            ..Purpose::default()
        }
    }

    #[test]
    fn one_fault_at_a_time() {
        assert_eq!(check(&Facts::parse(GOOD), &purpose()).0, []);
        for (line, check_name, want) in [
            ("machine=armv6l", "architecture", "armv6l is not supported"),
            ("time=32536000", "clock", "365 days ahead of"),
            ("time=1", "clock", "11 days behind"),
            ("memory=120000", "memory", "117 MB"),
            ("data_free=1000", "disk", "the disk is full"),
            ("bin_free=10000", "disk", "48 MB are needed"),
            ("controllers=cpu pids", "cgroups", "memory control group is off"),
            ("lacks=nf_tables", "kernel", "CONFIG_NF_TABLES"),
            ("listens=192B", "ports", "port 6443"),
            ("service=sampan-agent", "role", "an agent already"),
        ] {
            let facts = Facts::parse(&format!("{GOOD}{line}\n"));
            let found = check(&facts, &purpose());
            let errors: Vec<&Finding> = found.errors().collect();
            assert!(errors.len() == 1 && errors[0].check == check_name, "{line}: {found:?}");
            assert!(errors[0].message.contains(want), "{line}: {}", errors[0].message);
            assert!(CHECKS.contains(&check_name));
            let ignored = check(&facts, &Purpose { ignored: vec![check_name.to_string()], ..purpose() });
            assert_eq!(ignored.errors().count(), 0, "{line}");
        }
    }

    #[test]
    fn servers_of_several_need_etcd() {
        let purpose = Purpose { ports: vec![6443, 2379, 2380], needs_etcd: true, ..purpose() };
        let found = check(&Facts::parse(GOOD), &purpose);
        assert!(found.has("etcd") && found.errors().count() == 1, "{found:?}");
        assert!(found.0[0].message.contains("etcd-server") && CHECKS.contains(&"etcd"));
        let facts = Facts::parse(&format!("{GOOD}etcd=/usr/bin/etcd\nlistens=094B\n"));
        let found = check(&facts, &purpose);
        assert!(
            found.has("ports") && found.0[0].message.contains("systemctl disable --now etcd"),
            "{found:?}"
        );
    }

    #[test]
    fn no_fault() {
        // installed before: its own port and service are right
        let again = Facts::parse(&format!("{GOOD}listens=192B\nservice=sampan\n"));
        assert_eq!(check(&again, &purpose()).errors().count(), 0);
        // a slow answer is not a clock that is behind
        let slow = Purpose { now_s: 1_000_010, asked_for_s: 10, ..purpose() };
        assert_eq!(check(&Facts::parse(GOOD), &slow).0, []);
        // a Raspberry Pi is told where to look
        let pi = Facts::parse(&format!("{GOOD}controllers=cpu pids\ncmdline=/boot/firmware/cmdline.txt\n"));
        let found = check(&pi, &purpose());
        assert!(found.has("cgroups") && found.0[0].message.contains("/boot/firmware/cmdline.txt"));
    }
}
