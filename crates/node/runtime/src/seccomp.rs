//! Seccomp profiles compiled to BPF, without libseccomp.
//!
//! Upstream counterparts: containerd's `contrib/seccomp` and moby's default profile (the lists in default.txt and the
//! rules in [`default_rules`]); OCI's JSON for `Localhost` profiles. What stays true: a filter is compiled for the
//! architecture of this program and those its kernel also runs (i386 and x32 on amd64, arm on arm64); other
//! architectures' calls kill. On a node of a foreign architecture the filter meets the emulator's own calls.
use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

mod assemble;
pub use assemble::assemble;

const DEFAULT: &str = include_str!("seccomp/default.txt");
const SYSCALLS: &str = include_str!("seccomp/syscalls.txt");

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("seccomp profile {path}: {message}")]
    Profile { path: String, message: String },
    #[error("seccomp is not supported on this architecture")]
    Architecture,
    #[error("seccomp filter: {0}")]
    TooLong(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Allow,
    Errno(u16),
    Kill,
    KillThread,
    Trap,
    Log,
}

impl Action {
    fn value(self) -> u32 {
        match self {
            Action::Allow => 0x7fff_0000,
            Action::Errno(n) => 0x0005_0000 | u32::from(n),
            Action::Kill => 0x8000_0000,
            Action::KillThread => 0,
            Action::Trap => 0x0003_0000,
            Action::Log => 0x7ffc_0000,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    Ne,
    Lt,
    Le,
    Eq,
    Ge,
    Gt,
    /// `argument & mask == value`
    Masked(u64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    pub argument: u8,
    pub compare: Compare,
    pub value: u64,
}

/// Calls with these names get `action` where all conditions hold.
#[derive(Clone, Debug)]
pub struct Rule {
    pub names: Vec<String>,
    pub action: Action,
    pub conditions: Vec<Condition>,
}

#[derive(Clone, Debug)]
pub struct Profile {
    pub default: Action,
    pub rules: Vec<Rule>,
}

/// One calling convention that the kernel offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abi {
    pub name: &'static str,
    pub audit: u32,
    /// Column of syscalls.txt.
    column: usize,
    /// x32 shares amd64's audit value and sets this bit.
    pub bit: u32,
}

const AMD64: Abi = Abi { name: "amd64", audit: 0xc000_003e, column: 1, bit: 0 };
const X86: Abi = Abi { name: "x86", audit: 0x4000_0003, column: 2, bit: 0 };
const X32: Abi = Abi { name: "x32", audit: 0xc000_003e, column: 3, bit: 0x4000_0000 };
const ARM64: Abi = Abi { name: "arm64", audit: 0xc000_00b7, column: 4, bit: 0 };
const ARM: Abi = Abi { name: "arm", audit: 0x4000_0028, column: 5, bit: 0 };

/// The conventions of a machine, its own first.
pub fn abis(architecture: &str) -> Result<Vec<Abi>, SeccompError> {
    match architecture {
        "x86_64" => Ok(vec![AMD64, X86, X32]),
        "aarch64" => Ok(vec![ARM64, ARM]),
        "arm" => Ok(vec![ARM]),
        "x86" => Ok(vec![X86]),
        _ => Err(SeccompError::Architecture),
    }
}

/// Name to number, for one convention.
fn numbers(abi: Abi) -> BTreeMap<&'static str, u32> {
    let row = |line: &'static str| {
        let mut columns = line.split(' ');
        let name = columns.next()?;
        Some((name, columns.nth(abi.column - 1)?.parse().ok()?))
    };
    SYSCALLS.lines().filter(|l| !l.starts_with('#')).filter_map(row).collect()
}

/// The default profile for a process with `capabilities`.
pub fn default_profile(architecture: &str, capabilities: u64) -> Profile {
    let has = |name: &str| crate::capabilities::number(name).is_some_and(|n| capabilities >> n & 1 == 1);
    let machine: &[&str] = match architecture {
        "x86_64" => &["amd64", "x32", "x86"],
        "aarch64" => &["arm64", "arm"],
        "arm" => &["arm"],
        _ => &["x86"],
    };
    let mut names = Vec::new();
    let mut wanted = true;
    for line in DEFAULT.lines().filter(|l| !l.starts_with('#')) {
        match line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            Some("always") => wanted = true,
            Some(condition) => {
                let mut words = condition.split(' ');
                let kind = words.next();
                wanted = words.any(|w| if kind == Some("cap") { has(w) } else { machine.contains(&w) });
            }
            None if wanted => names.extend(line.split(' ').map(String::from)),
            None => {}
        }
    }
    let mut rules = vec![Rule { names, action: Action::Allow, conditions: Vec::new() }];
    rules.extend(default_rules(has("CAP_SYS_ADMIN")));
    Profile { default: Action::Errno(libc::EPERM as u16), rules }
}

/// The default profile's rules about arguments.
fn default_rules(admin: bool) -> Vec<Rule> {
    let rule = |name: &str, action, compare, value| Rule {
        names: vec![name.to_string()],
        action,
        conditions: vec![Condition { argument: 0, compare, value }],
    };
    // The kernel's crypto sockets (38) and VM sockets (40) reach beyond the container.
    let mut rules = vec![
        rule("socket", Action::Allow, Compare::Lt, 38),
        rule("socket", Action::Allow, Compare::Eq, 39),
        rule("socket", Action::Allow, Compare::Gt, 40),
    ];
    for persona in [0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff] {
        rules.push(rule("personality", Action::Allow, Compare::Eq, persona));
    }
    if !admin {
        // No new namespaces; clone3 hides its flags in memory, so programs are told to use clone.
        rules.push(rule("clone", Action::Allow, Compare::Masked(0x7e02_0000), 0));
        let names = vec!["clone3".to_string()];
        rules.push(Rule { names, action: Action::Errno(libc::ENOSYS as u16), conditions: Vec::new() });
    }
    rules
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireProfile {
    default_action: String,
    default_errno_ret: Option<u16>,
    #[serde(default)]
    syscalls: Vec<WireRule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireRule {
    names: Vec<String>,
    action: String,
    errno_ret: Option<u16>,
    #[serde(default)]
    args: Vec<WireCondition>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireCondition {
    index: u8,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// A `Localhost` profile.
pub fn read_profile(path: &Path) -> Result<Profile, SeccompError> {
    let failed = |message: String| SeccompError::Profile { path: path.display().to_string(), message };
    let bytes = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
    let wire: WireProfile = serde_json::from_slice(&bytes).map_err(|e| failed(e.to_string()))?;
    let action = |name: &str, errno: Option<u16>| match name {
        "SCMP_ACT_ALLOW" => Ok(Action::Allow),
        "SCMP_ACT_ERRNO" => Ok(Action::Errno(errno.unwrap_or(libc::EPERM as u16))),
        "SCMP_ACT_KILL_PROCESS" => Ok(Action::Kill),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Ok(Action::KillThread),
        "SCMP_ACT_TRAP" => Ok(Action::Trap),
        "SCMP_ACT_LOG" => Ok(Action::Log),
        other => Err(failed(format!("action {other} is not supported"))),
    };
    let mut rules = Vec::new();
    for rule in wire.syscalls {
        let mut conditions = Vec::new();
        for c in &rule.args {
            let (compare, value) = match c.op.as_str() {
                "SCMP_CMP_NE" => (Compare::Ne, c.value),
                "SCMP_CMP_LT" => (Compare::Lt, c.value),
                "SCMP_CMP_LE" => (Compare::Le, c.value),
                "SCMP_CMP_EQ" => (Compare::Eq, c.value),
                "SCMP_CMP_GE" => (Compare::Ge, c.value),
                "SCMP_CMP_GT" => (Compare::Gt, c.value),
                "SCMP_CMP_MASKED_EQ" => (Compare::Masked(c.value), c.value_two),
                other => return Err(failed(format!("comparison {other} is not supported"))),
            };
            if c.index > 5 {
                return Err(failed(format!("argument {} does not exist", c.index)));
            }
            conditions.push(Condition { argument: c.index, compare, value });
        }
        rules.push(Rule { names: rule.names, action: action(&rule.action, rule.errno_ret)?, conditions });
    }
    Ok(Profile { default: action(&wire.default_action, wire.default_errno_ret)?, rules })
}

#[cfg(test)]
mod tests;
