//! What the machine is and has. Upstream counterparts: cadvisor/machine, pkg/kubelet/nodestatus/setters.go.
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub machine_id: String,
    pub system_uuid: String,
    pub boot_id: String,
    pub kernel: String,
    pub os_image: String,
}

fn line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_string()
}

pub fn facts() -> Facts {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let pretty = release.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).unwrap_or("Linux");
    let machine_id = line("/etc/machine-id");
    let uuid = line("/sys/class/dmi/id/product_uuid");
    Facts {
        system_uuid: if uuid.is_empty() { machine_id.clone() } else { uuid.to_lowercase() },
        machine_id,
        boot_id: line("/proc/sys/kernel/random/boot_id"),
        kernel: line("/proc/sys/kernel/osrelease"),
        os_image: pretty.trim_matches('"').to_string(),
    }
}

/// A line of /proc/meminfo, in bytes.
pub fn meminfo_bytes(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// (all, free) bytes of the file system at `path` or at the nearest folder above it that exists.
pub fn filesystem_bytes(path: &Path) -> Option<(u64, u64)> {
    let stat = path.ancestors().find_map(|p| rustix::fs::statvfs(p).ok())?;
    Some((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
}

/// cpu, memory, ephemeral-storage.
pub fn capacity(root: &Path) -> BTreeMap<String, Quantity> {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory_kib = meminfo_bytes("MemTotal").unwrap_or(0) / 1024;
    let disk_kib = filesystem_bytes(root).map_or(0, |(all, _)| all / 1024);
    [
        ("cpu".to_string(), Quantity(cpus.to_string())),
        ("memory".to_string(), Quantity(format!("{memory_kib}Ki"))),
        ("ephemeral-storage".to_string(), Quantity(format!("{disk_kib}Ki"))),
    ]
    .into()
}
