//! `sampan killall`: ends all pods of this machine and takes away what they used: what `sampan-killall` runs.
//!
//! Upstream counterpart: K3s' k3s-killall.sh. What stays true: only what is ours is touched (shims of this data folder
//! and what runs below them, mounts below it, interfaces and tables with our names); doing it again is no fault.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sampan_netlink::nft::Batch;
use sampan_netlink::route::LOOPBACK;
use sampan_netlink::{Socket, message::Message};

#[derive(clap::Args)]
pub struct Args {
    /// Where everything is kept
    #[arg(long, default_value = "/var/lib/sampan")]
    data_dir: PathBuf,
    /// Seconds that pods have to end by themselves after SIGTERM
    #[arg(long, default_value_t = 0)]
    grace_seconds: u32,
}

/// How the names of our tunnels and tables start.
const PREFIX: &str = "sampan";

pub fn run(args: &Args) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("it must be run as root");
    }
    ask_pods(&args.data_dir, Duration::from_secs(args.grace_seconds.into()));
    // ends with its server, unless that was killed
    crate::members::removal::end_member_of(&args.data_dir)?;
    let groups = end_pods(&args.data_dir)?;
    unmount(&args.data_dir)?;
    remove_network(&args.data_dir);
    for group in groups {
        remove_group(&group);
    }
    remove_classes(&cgroup_root());
    Ok(())
}

/// Below which groups this machine's pods were, as its configuration says.
fn cgroup_root() -> String {
    let text = fs::read_to_string("/etc/sampan/config.yaml").unwrap_or_default();
    let config: serde_yaml_ng::Value = serde_yaml_ng::from_str(&text).unwrap_or_default();
    config.get("cgroup-root").and_then(|root| root.as_str()).unwrap_or_default().to_string()
}

/// The empty groups of all pods, of their classes and of shims, in every hierarchy; those in use stay.
fn remove_classes(root: &str) {
    let base = PathBuf::from("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(&base).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([base.clone()]) {
        let all = hierarchy.join(root).join("kubepods");
        let shims = hierarchy.join(root).join("sampan-shims");
        for group in [all.join("burstable"), all.join("besteffort"), all, shims] {
            let _ = fs::remove_dir(group);
        }
    }
}

struct Process {
    parent: i32,
    is_shim: bool,
}

/// All processes, from /proc.
fn processes(data_dir: &Path) -> BTreeMap<i32, Process> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // the command's name may hold blanks and parentheses
        let after = stat.rfind(')').and_then(|end| stat.get(end + 2..)).unwrap_or_default();
        let Some(parent) = after.split(' ').nth(1).and_then(|p| p.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        found.insert(pid, Process { parent, is_shim: is_shim(&line, data_dir) });
    }
    found
}

/// `sampan shim FOLDER` with a folder of this data folder.
fn is_shim(line: &[u8], data_dir: &Path) -> bool {
    let words: Vec<&str> = line.split(|b| *b == 0).filter_map(|w| std::str::from_utf8(w).ok()).collect();
    words.get(1) == Some(&"shim")
        && words.get(2).is_some_and(|folder| Path::new(folder).starts_with(data_dir))
}

/// Shims of this data folder and all that runs below them: pid, and whether it is a shim.
fn ours(data_dir: &Path) -> Vec<(i32, bool)> {
    let all = processes(data_dir);
    let of_shim = |mut pid: i32| {
        // a chain of parents is no longer than there are processes
        for _ in 0..all.len() {
            match all.get(&pid) {
                Some(process) if process.is_shim => return true,
                Some(process) if process.parent > 0 => pid = process.parent,
                _ => return false,
            }
        }
        false
    };
    all.iter().filter(|(pid, _)| of_shim(**pid)).map(|(pid, process)| (*pid, process.is_shim)).collect()
}

/// Asks containers to end, and waits for those that do.
fn ask_pods(data_dir: &Path, grace: Duration) {
    const PAUSE: Duration = Duration::from_millis(100);
    let containers = || ours(data_dir).into_iter().filter(|(_, is_shim)| !is_shim).map(|(pid, _)| pid);
    if grace.is_zero() {
        return;
    }
    for pid in containers() {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let start = sampan_world::clock::monotonic();
    while start.elapsed() < grace && containers().next().is_some() {
        std::thread::sleep(PAUSE);
    }
}

/// Kills shims and all below them, until none is left; returns the pods' control groups.
fn end_pods(data_dir: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut groups = BTreeSet::new();
    for _ in 0..100 {
        let ours: Vec<i32> = ours(data_dir).into_iter().map(|(pid, _)| pid).collect();
        for pid in &ours {
            groups.extend(groups_of(*pid));
        }
        // what was left behind by its parent is still in its pod's group
        let strays: Vec<i32> = groups.iter().flat_map(|group| members(group)).collect();
        if ours.is_empty() && strays.is_empty() {
            return Ok(groups);
        }
        for pid in ours.iter().chain(&strays) {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("some processes of pods do not end; try again")
}

/// The groups of a pod's process that are pods' groups, in every hierarchy.
fn groups_of(pid: i32) -> Vec<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let of_line = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (root, rest) = path.split_once("/kubepods")?;
        let pod = rest.split('/').find(|part| part.starts_with("pod"))?;
        let end = rest.find(pod)? + pod.len();
        let own = format!("{root}/kubepods{}", &rest[..end]);
        let base = Path::new("/sys/fs/cgroup");
        let hierarchy = controllers.trim_start_matches("name=");
        let roots = [base.join(hierarchy), base.join("unified"), base.to_path_buf()];
        roots.into_iter().map(|r| r.join(own.trim_start_matches('/'))).find(|p| p.is_dir())
    };
    text.lines().filter_map(of_line).collect()
}

fn members(group: &Path) -> Vec<i32> {
    let mut found: Vec<i32> = fs::read_to_string(group.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|l| l.parse().ok())
        .collect();
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.extend(members(&entry.path()));
        }
    }
    found
}

/// A pod's group, those below it, and those above it that are then empty, up to `kubepods`.
fn remove_group(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_group(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
    let mut above = group.parent();
    while let Some(path) = above.filter(|p| p.to_string_lossy().contains("/kubepods")) {
        if fs::remove_dir(path).is_err() {
            break;
        }
        above = path.parent();
    }
}

/// Everything that is mounted below the agent's folder, the deepest first.
fn unmount(data_dir: &Path) -> Result<()> {
    let agent = data_dir.join("agent");
    for _ in 0..20 {
        let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mut below: Vec<PathBuf> =
            text.lines().filter_map(mount_point).filter(|p| p.starts_with(&agent)).collect();
        if below.is_empty() {
            return Ok(());
        }
        below.sort();
        for path in below.iter().rev() {
            let _ = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    bail!("there are still file systems mounted below {}", agent.display())
}

/// The second field, with blanks written as `\040`.
fn mount_point(line: &str) -> Option<PathBuf> {
    let field = line.split(' ').nth(1)?;
    let mut out = String::new();
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let code = after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                out.push(char::from(code));
                rest = &after[3..];
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    Some(PathBuf::from(out + rest))
}

/// Interfaces, tables, and the DNS address. A kernel that refuses one has none.
fn remove_network(data_dir: &Path) {
    let told = |what: &str, error: &sampan_netlink::Error| eprintln!("sampan: {what}: {error}");
    match Socket::route() {
        Ok(mut socket) => {
            for link in socket.links().unwrap_or_default() {
                let ours = link.name.starts_with(PREFIX) || is_pods_link(&link.name);
                if ours
                    && let Err(error) = socket.delete_link(link.index)
                    && !error.is_missing()
                {
                    told(&link.name, &error);
                }
            }
            for route in socket.routes().unwrap_or_default() {
                let _ = socket.delete_route(&route);
            }
            remove_dns_address(&mut socket, data_dir);
        }
        Err(error) => told("netlink", &error),
    }
    for table in tables() {
        let mut batch = Batch::new(&table);
        batch.delete_table();
        if let Err(error) = batch.commit()
            && !error.is_missing()
        {
            told(&table, &error);
        }
    }
}

/// `spn` and eleven hexadecimal digits.
fn is_pods_link(name: &str) -> bool {
    name.strip_prefix("spn")
        .is_some_and(|rest| rest.len() == 11 && rest.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn remove_dns_address(socket: &mut Socket, data_dir: &Path) {
    let text = fs::read_to_string(data_dir.join("agent/cluster.json")).unwrap_or_default();
    let known: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let known: Option<std::net::IpAddr> = known["clusterDns"].as_str().and_then(|ip| ip.parse().ok());
    for (link, ip) in socket.addresses().unwrap_or_default() {
        // on the loopback interface stand only its own address and the one that we put there
        let ours = known == Some(ip) || (known.is_none() && is_service_address(ip));
        if link == LOOPBACK && ours {
            let _ = socket.delete_address(link, ip, if ip.is_ipv4() { 32 } else { 128 });
        }
    }
}

/// The usual address of the cluster's DNS.
fn is_service_address(ip: std::net::IpAddr) -> bool {
    matches!(ip, std::net::IpAddr::V4(v4) if v4.octets() == [10, 43, 0, 10])
}

/// Our tables, of the family that we use (IPv4) and by name.
fn tables() -> Vec<String> {
    const GETTABLE: u16 = (10 << 8) | 1;
    const NAME: u16 = 1;
    let Ok(mut socket) = Socket::netfilter() else { return Vec::new() };
    let message = Message::new(GETTABLE, 0, &[2, 0, 0, 0]);
    let names = socket.dump("listing tables", &message, |received| {
        let name = sampan_netlink::message::attribute(received.payload.get(4..)?, NAME)?;
        let name = std::str::from_utf8(name).ok()?.trim_end_matches('\0').to_string();
        name.starts_with(PREFIX).then_some(name)
    });
    names.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ours() {
        let data = Path::new("/var/lib/sampan");
        let shim =
            |folder: &str| is_shim(format!("/usr/local/bin/sampan\0shim\0{folder}\0").as_bytes(), data);
        assert!(shim("/var/lib/sampan/agent/runtime/sandboxes/x"));
        assert!(!shim("/var/lib/other/agent/runtime/sandboxes/x") && !shim("/var/lib/sampan2/x"));
        assert!(!is_shim(b"sh\0-c\0shim\0", data) && !is_shim(b"", data));
        assert_eq!(mount_point(r"tmpfs /a\040b/c tmpfs rw 0 0"), Some("/a b/c".into()));
        assert_eq!(mount_point("x"), None);
        assert!(is_pods_link("spn0123456789a") && !is_pods_link("spn0") && !is_pods_link("spnet-customer"));
    }
}
