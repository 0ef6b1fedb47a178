//! A Raspberry Pi's kernel command line: the words that enable the memory control group.
//!
//! Raspberry Pi OS boots with the memory controller off (`cgroup_disable=memory` from the firmware), so every guide to
//! Kubernetes on a Pi starts with editing this file. It is one line; the last word about a controller wins.

/// What the kernel needs to be told.
const WORDS: [&str; 2] = ["cgroup_memory=1", "cgroup_enable=memory"];

/// The command line with the controller enabled; `None` when it is already.
pub fn with_memory_controller(cmdline: &str) -> Option<String> {
    let line = cmdline.lines().find(|l| !l.trim().is_empty()).unwrap_or_default();
    let words: Vec<&str> = line.split_whitespace().collect();
    let undone = |word: &&str| matches!(*word, "cgroup_disable=memory" | "cgroup_memory=0");
    if WORDS.iter().all(|want| words.contains(want)) && !words.iter().any(undone) {
        return None;
    }
    let mut kept: Vec<&str> = words.into_iter().filter(|w| !undone(w)).collect();
    kept.extend(WORDS.iter().filter(|want| !line.split_whitespace().any(|w| w == **want)));
    Some(kept.join(" ") + "\n")
}

/// Whether the file looks like a kernel command line at all: an empty or binary one is left alone.
pub fn is_cmdline(text: &str) -> bool {
    let lines = text.lines().filter(|l| !l.trim().is_empty()).count();
    lines == 1 && text.contains("root=") && !text.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        let pi = "console=serial0,115200 root=PARTUUID=1-02 rootwait";
        for (before, want) in [
            (format!("{pi}\n"), Some(format!("{pi} cgroup_memory=1 cgroup_enable=memory\n"))),
            (
                format!("{pi} cgroup_enable=memory"),
                Some(format!("{pi} cgroup_enable=memory cgroup_memory=1\n")),
            ),
            (format!("{pi} cgroup_memory=1 cgroup_enable=memory\n"), None),
            (
                format!("{pi} cgroup_disable=memory"),
                Some(format!("{pi} cgroup_memory=1 cgroup_enable=memory\n")),
            ),
        ] {
            assert_eq!(with_memory_controller(&before), want, "{before}");
        }
        assert!(is_cmdline(pi) && !is_cmdline("") && !is_cmdline("a\nb root=x\n"));
    }
}
