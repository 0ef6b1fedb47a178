//! Releases of Sampan, and which may meet in one cluster.
//!
//! Upstream counterpart: the version skew policy (kubernetes.io/releases/version-skew-policy). What stays true: a node
//! is never newer than a server, and at most three minor releases older; a server skips no minor release and never goes
//! back, as its store may be of a newer form. Deliberate difference: among equal minor releases our own version counts
//! too, as server and agent are one program.
use std::fmt;
use std::str::FromStr;

use crate::version;

/// How many minor releases a node may be older than its server.
const MINORS_OLDER: u32 = 3;

/// A release, in order of age. The patch release of Kubernetes says nothing of what can meet what and does not count.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// Major and minor release of Kubernetes.
    kubernetes: (u32, u32),
    program: [u32; 3],
    /// False sorts first: a candidate comes before the release.
    is_final: bool,
    candidate: String,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no release: expected one as `kubectl get nodes` shows it, v1.36.2+sampan0.1.0")]
pub struct NoRelease(pub String);

impl FromStr for Release {
    type Err = NoRelease;

    fn from_str(text: &str) -> Result<Self, NoRelease> {
        let wrong = || NoRelease(text.to_string());
        let (kubernetes, program) =
            text.strip_prefix('v').and_then(|t| t.split_once("+sampan")).ok_or_else(wrong)?;
        let [major, minor, _] = numbers(kubernetes).ok_or_else(wrong)?;
        Self::new((major, minor), program).ok_or_else(wrong)
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c] = self.program;
        let dash = if self.is_final { "" } else { "-" };
        write!(f, "{a}.{b}.{c}{dash}{} (Kubernetes {})", self.candidate, self.minor())
    }
}

fn numbers(text: &str) -> Option<[u32; 3]> {
    let parts: Vec<u32> = text.split('.').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    parts.try_into().ok()
}

impl Release {
    fn new(kubernetes: (u32, u32), program: &str) -> Option<Self> {
        let (program, candidate) = program.split_once('-').unwrap_or((program, ""));
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
        let program = numbers(program).filter(|_| candidate.chars().all(fits))?;
        Some(Self { kubernetes, program, is_final: candidate.is_empty(), candidate: candidate.to_string() })
    }

    /// Of what `sampan --version` prints: `sampan 0.1.0 (Kubernetes v1.36)`.
    pub fn of_version_line(line: &str) -> Option<Self> {
        let (program, rest) = line.trim().strip_prefix("sampan ")?.split_once(" (Kubernetes v")?;
        let (major, minor) = rest.split_once(')')?.0.split_once('.')?;
        Self::new((major.parse().ok()?, minor.parse().ok()?), program)
    }

    /// What a node of that release shows as its version, found in the bytes of a program. `bytes` may be a part of it.
    pub fn in_program(bytes: &[u8]) -> Option<String> {
        let mark = version::MARK_START.as_bytes();
        let mut rest = bytes;
        while let Some(at) = memchr::memmem::find(rest, mark) {
            rest = &rest[at + mark.len()..];
            let end = rest.iter().take(100).position(|byte| *byte == b'\n');
            let text = end.and_then(|end| std::str::from_utf8(&rest[..end]).ok());
            if let Some(text) = text.filter(|text| text.parse::<Self>().is_ok()) {
                return Some(text.to_string());
            }
        }
        None
    }

    /// `v1.36`.
    pub fn minor(&self) -> String {
        format!("v{}.{}", self.kubernetes.0, self.kubernetes.1)
    }

    /// By how many minor releases `self` is older than `other`.
    fn minors_older_than(&self, other: &Self) -> u32 {
        match self.kubernetes.0 == other.kubernetes.0 {
            true => other.kubernetes.1.saturating_sub(self.kubernetes.1),
            false if self.kubernetes.0 < other.kubernetes.0 => u32::MAX,
            false => 0,
        }
    }
}

/// What this program shows as its version.
pub fn own() -> &'static str {
    // read, not known beforehand: so the mark stands in the program
    let mark = std::hint::black_box(version::MARK);
    mark.trim_start_matches(version::MARK_START).trim_end()
}

/// A node, and what it is to become.
#[derive(Clone, Debug)]
pub struct Member {
    pub name: String,
    pub is_server: bool,
    pub has: Release,
    /// `None` leaves it as it is.
    pub wants: Option<Release>,
}

/// Why these upgrades must not be made, servers first, then the others; empty when they may.
pub fn refusals(members: &[Member]) -> Vec<String> {
    let mut found = Vec::new();
    let servers = || members.iter().filter(|m| m.is_server);
    for (server, wants) in servers().filter_map(|m| Some((m, m.wants.as_ref()?))) {
        let name = &server.name;
        if *wants < server.has {
            found.push(format!(
                "server {name} has {}: it cannot go back to {wants}, as its store may be of a newer form",
                server.has
            ));
        }
        if server.has.minors_older_than(wants) > 1 {
            found.push(format!(
                "server {name} has {}: a server must not skip minor releases on its way to {wants}",
                server.has
            ));
        }
    }
    let after = || servers().map(|m| (m.wants.as_ref().unwrap_or(&m.has), m));
    let (Some((oldest, oldest_server)), Some((newest, newest_server))) =
        (after().min_by(|a, b| a.0.cmp(b.0)), after().max_by(|a, b| a.0.cmp(b.0)))
    else {
        return found;
    };
    for agent in members.iter().filter(|m| !m.is_server) {
        let name = &agent.name;
        if let Some(wants) = agent.wants.as_ref().filter(|wants| *wants > oldest) {
            found.push(format!(
                "node {name} must not be newer than its server: {wants}, but server {} has {oldest}; upgrade the server first",
                oldest_server.name
            ));
        }
        // servers go first, so the old agent meets the new server; one that is too old already is not made worse
        let met = agent.wants.as_ref().filter(|wants| **wants < agent.has).unwrap_or(&agent.has);
        let anew = agent.wants.is_some() || newest_server.wants.is_some();
        if anew && met.minors_older_than(newest) > MINORS_OLDER {
            found.push(format!(
                "node {name} has {met}: it must not be more than three minor releases older than server {} with {newest}",
                newest_server.name
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(text: &str) -> Release {
        text.parse().unwrap()
    }

    #[test]
    fn releases_are_read_and_ordered() {
        assert!(own().parse::<Release>().is_ok() && own() == version::GIT_VERSION);
        let ordered = [
            "v1.35.9+sampan0.9.0",
            "v1.36.0+sampan0.1.0",
            "v1.36.2+sampan0.2.0-rc.1",
            "v1.36.2+sampan0.2.0",
            "v1.36.1+sampan0.10.0",
        ];
        for pair in ordered.windows(2) {
            assert!(release(pair[0]) < release(pair[1]), "{pair:?}");
        }
        assert_eq!(
            Release::of_version_line("sampan 0.2.0 (Kubernetes v1.36)\n"),
            Some(release("v1.36.2+sampan0.2.0"))
        );
        assert_eq!(release("v1.36.2+sampan0.2.0-rc.1").to_string(), "0.2.0-rc.1 (Kubernetes v1.36)");
        for bad in ["", "0.1.0", "v1.36.2", "v1.36.2+k3s1", "v1.36+sampan0.1.0", "v1.36.2+sampan0.1.0-a b"] {
            assert!(bad.parse::<Release>().is_err(), "{bad}");
        }
    }

    #[test]
    fn found_in_a_program() {
        let bytes = b"\x7fELF sampan-release: sampan-release:v1.37.0+sampan0.3.1\n more";
        assert_eq!(Release::in_program(bytes).as_deref(), Some("v1.37.0+sampan0.3.1"));
        assert_eq!(Release::in_program(b"sampan-release:v1.37.0+sampan0.3"), None);
    }

    #[test]
    fn skew() {
        let member = |name: &str, has: &str, wants: &str| Member {
            name: name.to_string(),
            is_server: name.starts_with('s'),
            has: release(&format!("v1.{has}")),
            wants: (!wants.is_empty()).then(|| release(&format!("v1.{wants}"))),
        };
        let (old, new) = ("36.2+sampan0.1.0", "36.2+sampan0.2.0");
        for (members, want) in [
            (vec![member("s", old, new), member("a", old, new)], ""),
            (vec![member("s", old, old), member("a", old, old)], ""),
            (vec![member("s", new, ""), member("a", new, old)], ""),
            (vec![member("s", new, old)], "cannot go back"),
            (vec![member("s", old, ""), member("a", old, new)], "must not be newer than its server"),
            (
                vec![member("s", old, new), member("s2", old, ""), member("a", old, new)],
                "server s2 has 0.1.0",
            ),
            (vec![member("s", old, "38.0+sampan0.3.0")], "skip minor releases"),
            (vec![member("s", old, "37.0+sampan0.3.0"), member("a", "34.0+sampan0.0.1", "")], ""),
            (
                vec![
                    member("s", old, "37.0+sampan0.3.0"),
                    member("a", "33.0+sampan0.0.1", "37.0+sampan0.3.0"),
                ],
                "more than three minor",
            ),
            (vec![member("s", old, ""), member("a", old, "32.0+sampan0.0.1")], "more than three minor"),
            (vec![member("s", old, ""), member("a", "32.0+sampan0.0.1", "")], ""),
            (vec![member("a", old, new)], ""),
        ] {
            let found = refusals(&members).join("; ");
            match want {
                "" => assert_eq!(found, "", "{members:?}"),
                want => assert!(found.contains(want), "{members:?}: {found}"),
            }
        }
    }
}
