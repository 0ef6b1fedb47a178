//! Capability names, and the set a container gets.
//!
//! Upstream counterpart: containerd's default set (Docker's) with the pod's `add` and `drop` over it.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

pub const ALL: u64 = (1 << NAMES.len()) - 1;

/// `CAP_SYS_ADMIN` or `SYS_ADMIN`, in any case.
pub fn number(name: &str) -> Option<u32> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES.iter().position(|n| *n == bare).map(|n| n as u32)
}

/// The set for a container; an unknown name is an error, as it is upstream.
pub fn set(privileged: bool, add: &[String], drop: &[String]) -> Result<u64, String> {
    let is_all = |name: &&String| name.eq_ignore_ascii_case("ALL");
    let bits = |names: &[String]| -> Result<u64, String> {
        let mut bits = 0;
        for name in names.iter().filter(|n| !is_all(n)) {
            bits |= 1 << number(name).ok_or_else(|| format!("unknown capability {name:?}"))?;
        }
        Ok(bits)
    };
    if privileged {
        return Ok(ALL);
    }
    let mut set = DEFAULT.iter().filter_map(|n| number(n)).fold(0, |bits, n| bits | 1 << n);
    if add.iter().any(|n| is_all(&n)) {
        set = ALL;
    }
    if drop.iter().any(|n| is_all(&n)) {
        set = 0;
    }
    Ok((set | bits(add)?) & !bits(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_follow_add_and_drop() {
        let strings = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        for (add, drop, wanted) in [
            (vec![], vec![], 0xa804_25fb),
            (vec![], vec!["ALL"], 0),
            (vec!["NET_BIND_SERVICE"], vec!["all"], 1 << 10),
            (vec!["ALL"], vec!["CAP_SYS_ADMIN"], ALL & !(1 << 21)),
            (vec!["net_admin"], vec!["KILL"], (0xa804_25fb | 1 << 12) & !(1 << 5)),
        ] {
            assert_eq!(set(false, &strings(&add), &strings(&drop)), Ok(wanted), "{add:?} {drop:?}");
        }
        assert_eq!(set(true, &[], &strings(&["ALL"])), Ok(ALL));
        assert!(set(false, &strings(&["FLY"]), &[]).is_err());
    }
}
