//! What a machine is: one script that asks, and what it answered.
//!
//! Upstream counterpart: the start of K3s' install.sh (setup_verify_arch, verify_system). The script is POSIX sh for dash
//! and BusyBox and needs no root; what it cannot find out stays unknown, which is no fault.
use std::collections::BTreeSet;

/// Prints `key=value` lines.
pub const PROBE: &str = r#"
say() { printf '%s=%s\n' "$1" "$2"; }
first() { for f in "$@"; do [ -e "$f" ] && { echo "$f"; return; }; done; }
free() { d=$1; while [ ! -d "$d" ]; do d=$(dirname "$d"); done; df -Pk "$d" 2>/dev/null | awk 'NR==2 {print $4}'; }
say system "$(uname -s)"; say machine "$(uname -m)"; say kernel "$(uname -r)"; say name "$(uname -n)"
say uid "$(id -u)"; say time "$(date +%s)"
say memory "$(awk '/^MemTotal:/ {print $2}' /proc/meminfo)"
say data_free "$(free /var/lib/sampan)"; say bin_free "$(free /usr/local/bin)"
if [ -d /run/systemd/system ]; then say init systemd
elif command -v openrc-run >/dev/null 2>&1 && [ -d /run/openrc ]; then say init openrc
else say init sysv; fi
say controllers "$(cat /sys/fs/cgroup/cgroup.controllers 2>/dev/null)"
say enabled "$(awk '$4 == 1 {printf "%s ", $1}' /proc/cgroups 2>/dev/null)"
say model "$(tr -d '\000' </proc/device-tree/model 2>/dev/null)"
say cmdline "$(first /boot/firmware/cmdline.txt /boot/cmdline.txt)"
k=$(uname -r)
has() {
  grep -qw "$1" /proc/filesystems 2>/dev/null || [ -d "/sys/module/$1" ] ||
  grep -q "/$1\.ko" "/lib/modules/$k/modules.builtin" "/lib/modules/$k/modules.dep" 2>/dev/null ||
  { [ -r /proc/config.gz ] && gzip -dc /proc/config.gz 2>/dev/null | grep -q "^$2=[ym]"; } ||
  grep -q "^$2=[ym]" "/boot/config-$k" 2>/dev/null
}
knows=no; [ -r "/lib/modules/$k/modules.dep" ] || [ -r /proc/config.gz ] || [ -r "/boot/config-$k" ] && knows=yes
for f in overlay:CONFIG_OVERLAY_FS nf_tables:CONFIG_NF_TABLES veth:CONFIG_VETH vxlan:CONFIG_VXLAN; do
  if has "${f%%:*}" "${f#*:}"; then say feature "${f%%:*}"; elif [ $knows = yes ]; then say lacks "${f%%:*}"; fi
done
cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk '$4 == "0A" {n = split($2, a, ":"); print "listens=" a[n]}' | sort -u
for s in sampan sampan-agent; do
  if [ -e /etc/systemd/system/$s.service ] || [ -e /etc/init.d/$s ]; then say service $s; fi
done
for other in /usr/local/bin/k3s /usr/bin/kubelet /snap/bin/microk8s; do [ -e $other ] && say other $other; done
command -v sha256sum >/dev/null 2>&1 && say tool sha256sum
say etcd "$(PATH=$PATH:/usr/local/bin:/usr/bin; command -v etcd || command -v sampan-etcd)"
true
"#;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    pub system: Option<String>,
    /// `uname -m`.
    pub machine: Option<String>,
    pub kernel: Option<String>,
    pub name: Option<String>,
    pub uid: Option<u32>,
    pub time_s: Option<i64>,
    pub memory_kb: Option<u64>,
    pub data_free_kb: Option<u64>,
    pub bin_free_kb: Option<u64>,
    pub init: Init,
    /// Controllers of cgroup v2, and those that the kernel has enabled at all.
    pub controllers: BTreeSet<String>,
    pub enabled: BTreeSet<String>,
    /// The board, where the firmware tells.
    pub model: Option<String>,
    /// A Raspberry Pi's kernel command line.
    pub cmdline_path: Option<String>,
    pub features: BTreeSet<String>,
    pub lacks: BTreeSet<String>,
    pub listens: BTreeSet<u16>,
    /// Our services that are installed.
    pub services: BTreeSet<String>,
    pub others: Vec<String>,
    pub tools: BTreeSet<String>,
    /// Where the program `etcd` is, its own or the one that we sent.
    pub etcd: Option<String>,
}

/// What starts services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    Systemd,
    OpenRc,
    /// Scripts in /etc/init.d, or nothing that we know.
    #[default]
    Sysv,
}

/// Kubernetes' words for what `uname -m` says, or a sentence why not.
pub fn architecture(machine: &str) -> Result<&'static str, String> {
    match machine {
        "x86_64" | "amd64" => Ok("amd64"),
        "aarch64" | "arm64" => Ok("arm64"),
        m if m.starts_with("armv7") || m.starts_with("armv8") => Ok("arm"),
        m if m.starts_with("armv6") || m.starts_with("armv5") => Err(format!(
            "{m} is not supported: sampan needs ARMv7 or later (a Raspberry Pi Zero or 1 is ARMv6; a Pi 2, 3, 4, 5 or Zero 2 works)"
        )),
        "i386" | "i486" | "i586" | "i686" => {
            Err(format!("{machine} is not supported: sampan needs a 64-bit x86 system"))
        }
        other => Err(format!("{other} is not supported: sampan runs on x86_64, aarch64 and armv7l")),
    }
}

impl Facts {
    pub fn parse(text: &str) -> Self {
        let mut facts = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once('=') else { continue };
            let value = value.trim();
            if !value.is_empty() {
                facts.learn(key, value);
            }
        }
        facts
    }

    fn learn(&mut self, key: &str, value: &str) {
        let words = || value.split_whitespace().map(String::from).collect::<BTreeSet<_>>();
        let text = || Some(value.to_string());
        match key {
            "system" => self.system = text(),
            "machine" => self.machine = text(),
            "kernel" => self.kernel = text(),
            "name" => self.name = text(),
            "uid" => self.uid = value.parse().ok(),
            "time" => self.time_s = value.parse().ok(),
            "memory" => self.memory_kb = value.parse().ok(),
            "data_free" => self.data_free_kb = value.parse().ok(),
            "bin_free" => self.bin_free_kb = value.parse().ok(),
            "init" => {
                self.init = match value {
                    "systemd" => Init::Systemd,
                    "openrc" => Init::OpenRc,
                    _ => Init::Sysv,
                }
            }
            "controllers" => self.controllers = words(),
            "enabled" => self.enabled = words(),
            "model" => self.model = text(),
            "cmdline" => self.cmdline_path = text(),
            "feature" => drop(self.features.insert(value.to_string())),
            "lacks" => drop(self.lacks.insert(value.to_string())),
            "listens" => self.listens.extend(u16::from_str_radix(value, 16)),
            "service" => drop(self.services.insert(value.to_string())),
            "other" => self.others.push(value.to_string()),
            "etcd" => self.etcd = text(),
            "tool" => drop(self.tools.insert(value.to_string())),
            _ => {}
        }
    }

    pub fn architecture(&self) -> Result<&'static str, String> {
        if let Some(system) = self.system.as_deref().filter(|s| *s != "Linux") {
            return Err(format!("{system} is not supported: sampan runs on Linux"));
        }
        match &self.machine {
            Some(machine) => architecture(machine),
            None => Err("it does not tell its architecture (uname -m)".to_string()),
        }
    }

    /// One line for the owner.
    pub fn summary(&self) -> String {
        let memory = self.memory_kb.map(|kb| format!("{} MB", kb / 1024));
        let parts = [self.model.clone(), self.machine.clone(), self.kernel.clone(), memory];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures() {
        for (machine, want) in
            [("x86_64", "amd64"), ("aarch64", "arm64"), ("armv7l", "arm"), ("armv8l", "arm")]
        {
            assert_eq!(architecture(machine), Ok(want));
        }
        for (machine, want) in [("armv6l", "ARMv6"), ("i686", "64-bit"), ("riscv64", "riscv64 is not")] {
            assert!(architecture(machine).unwrap_err().contains(want), "{machine}");
        }
        let bsd = Facts::parse("system=FreeBSD\nmachine=amd64\n");
        assert!(bsd.architecture().unwrap_err().contains("FreeBSD"));
    }

    #[test]
    fn answers() {
        let facts = Facts::parse(
            "system=Linux\nmachine=aarch64\nuid=1000\ntime=1763780000\nmemory=948204\ninit=openrc\ncontrollers=cpu pids\n\
             enabled=cpu pids \nmodel=Raspberry Pi 3\ncmdline=/boot/cmdline.txt\nlistens=192B\nlistens=0016\nfeature=overlay\n\
             lacks=nf_tables\nservice=sampan-agent\nnoise\ndata_free=\netcd=/usr/bin/etcd\n",
        );
        assert_eq!(facts.architecture(), Ok("arm64"));
        assert_eq!(facts.init, Init::OpenRc);
        assert_eq!(facts.listens, BTreeSet::from([22, 6443]));
        assert!(!facts.controllers.contains("memory") && facts.lacks.contains("nf_tables"));
        assert_eq!((facts.data_free_kb, facts.uid), (None, Some(1000)));
        assert_eq!(facts.etcd.as_deref(), Some("/usr/bin/etcd"));
        assert_eq!(facts.summary(), "Raspberry Pi 3, aarch64, 925 MB");
    }
}
