//! Whether this machine runs programs of a platform: itself, or through a registered emulator.
//!
//! Upstream counterparts: BuildKit's `util/archutil`, the kernel's binfmt_misc. Handlers are matched as the kernel does,
//! by magic and mask against the head of a program of that machine. What stays true: it is known before anything is run.
use std::fs;
use std::path::Path;

use sampan_image::{Platform, platform};

const HANDLERS: &str = "/proc/sys/fs/binfmt_misc";

/// The platform of this machine.
pub fn machine_platform() -> Platform {
    let architecture = match std::env::consts::ARCH {
        "x86" => "386",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    };
    platform::normalise(&Platform { os: "linux".into(), architecture: architecture.into(), variant: None })
}

/// (class, machine) in the head of a program; both bytes orders that Linux has are little but for s390x.
fn machine(architecture: &str) -> Option<(u8, u16)> {
    Some(match architecture {
        "amd64" => (2, 62),
        "386" => (1, 3),
        "arm64" => (2, 183),
        "arm" => (1, 40),
        "riscv64" => (2, 243),
        "ppc64le" => (2, 21),
        "s390x" => (2, 22),
        "mips64le" => (2, 8),
        "mipsle" => (1, 8),
        "loong64" => (2, 258),
        _ => return None,
    })
}

/// The first bytes of a program for a machine.
fn head(architecture: &str) -> Option<Vec<u8>> {
    let (class, number) = machine(architecture)?;
    let big = architecture == "s390x";
    let mut head = vec![0x7f, b'E', b'L', b'F', class, if big { 2 } else { 1 }, 1];
    head.resize(16, 0);
    for field in [2, number] {
        head.extend(if big { field.to_be_bytes() } else { field.to_le_bytes() });
    }
    head.resize(64, 0);
    Some(head)
}

/// Native programs: also those of the older half of a 64-bit machine.
fn is_native(wanted: &str, machine: &str) -> bool {
    wanted == machine || matches!((machine, wanted), ("amd64", "386") | ("arm64", "arm"))
}

/// Why programs of that platform can't run here.
pub fn runnable(wanted: &Platform) -> Result<(), String> {
    let (machine, wanted) = (machine_platform(), platform::normalise(wanted));
    if wanted.os != "linux" {
        return Err(format!("{} programs do not run on Linux", platform::format(&wanted)));
    }
    if is_native(&wanted.architecture, &machine.architecture) {
        return Ok(());
    }
    let Ok(status) = fs::read_to_string(Path::new(HANDLERS).join("status")) else {
        // loaded but not to be seen from here, as in a container: the step will tell
        let loaded = fs::read_to_string("/proc/filesystems").is_ok_and(|f| f.contains("binfmt_misc"));
        return if loaded { Ok(()) } else { told(&machine, &wanted, emulated(&wanted.architecture, &[])) };
    };
    if status.trim() == "disabled" {
        return Err(format!("binfmt_misc is disabled; enable it with: echo 1 > {HANDLERS}/status"));
    }
    let handlers: Vec<String> = fs::read_dir(HANDLERS)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| fs::read_to_string(e.path()).ok())
        .collect();
    told(&machine, &wanted, emulated(&wanted.architecture, &handlers))
}

fn told(machine: &Platform, wanted: &Platform, found: Result<(), String>) -> Result<(), String> {
    found.map_err(|why| {
        format!(
            "this {} machine can't run {} programs: {why}",
            platform::format(machine),
            platform::format(wanted)
        )
    })
}

/// Whether one of the handlers, as the kernel shows them, takes programs of that machine.
fn emulated(architecture: &str, handlers: &[String]) -> Result<(), String> {
    let Some(head) = head(architecture) else {
        return Err(format!("{architecture} is no known architecture"));
    };
    let mut without_flag = None;
    for handler in handlers {
        let field = |name: &str| handler.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("").trim();
        let offset: usize = field("offset ").parse().unwrap_or(0);
        let (magic, mask) = (bytes(field("magic ")), bytes(field("mask ")));
        if !handler.starts_with("enabled") || magic.is_empty() {
            continue;
        }
        let fits = magic.iter().enumerate().all(|(at, byte)| {
            let mask = mask.get(at).copied().unwrap_or(0xff);
            head.get(offset + at).is_some_and(|b| b & mask == byte & mask)
        });
        if !fits {
            continue;
        }
        if field("flags:").contains('F') {
            return Ok(());
        }
        without_flag = Some(field("interpreter ").to_string());
    }
    Err(match without_flag {
        Some(emulator) => format!(
            "its emulator {emulator} is registered without the flag F, so it is not found inside of images; register it \
             again, with Debian's qemu-user-binfmt or `docker run --privileged --rm tonistiigi/binfmt --install all`"
        ),
        None => "no emulator is registered; install one, with `apt install qemu-user-binfmt` (qemu-user-static on \
                 older systems), or build with --on-cluster on a node of that platform"
            .into(),
    })
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).filter_map(|i| u8::from_str_radix(hex.get(i * 2..i * 2 + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emulators_are_recognised() {
        let arm64 = "enabled\ninterpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P\nflags: PF\noffset 0\n\
            magic 7f454c460201010000000000000000000200b700\nmask ffffffffffffff00fffffffffffffffffeffffff\n";
        let off = arm64.replace("enabled", "disabled");
        let unfixed = arm64.replace("flags: PF", "flags: P");
        let java = "enabled\ninterpreter /usr/bin/jexec\nflags: \noffset 0\nmagic 504b0304\n";
        let all = |handlers: &[&str]| handlers.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(emulated("arm64", &all(&[java, arm64])), Ok(()));
        for (architecture, handlers, why) in [
            ("arm", all(&[arm64]), "no emulator"),
            ("arm64", all(&[&off, java]), "no emulator"),
            ("arm64", all(&[&unfixed]), "flag F"),
            ("pdp11", all(&[]), "no known architecture"),
        ] {
            let error = emulated(architecture, &handlers).unwrap_err();
            assert!(error.contains(why), "{architecture}: {error}");
        }
        assert!(runnable(&machine_platform()).is_ok());
        assert!(is_native("386", "amd64") && is_native("arm", "arm64") && !is_native("amd64", "arm64"));
    }
}
