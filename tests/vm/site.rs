//! Where the virtual machines stand: a bare lab whose bridge they hang on, and the program that makes them a cluster.
//!
//! The program under test runs on this machine, in the hub's network namespace, and knows all machines by SSH only.
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use sampan_tests::process::{Ran, run};
use sampan_tests::{cluster, seconds, wait_for};
use serde_json::Value;

use crate::machine::{Hardware, Machine, in_hub};
use crate::rootfs::{Recipe, Rootfs};

pub const AMD64: Recipe = Recipe {
    arch: "amd64",
    suite: "bookworm",
    kernel: "linux-image-amd64",
    host: "vm-amd64",
    ip: "10.64.0.41",
    user: "debian",
    password: None,
    has_firmware: false,
};
pub const ARM64: Recipe = Recipe {
    arch: "arm64",
    suite: "trixie",
    kernel: "linux-image-cloud-arm64",
    host: "vm-arm64",
    ip: "10.64.0.42",
    user: "pi",
    password: Some("raspberry"),
    has_firmware: true,
};
/// A lab node: no systemd, cgroup v1 where this machine has that.
pub const NODE: &str = "amd64";
pub const NODE_IP: &str = "10.64.0.11";
/// To a login under emulation, with others at work on this machine.
const LOGIN_LIMIT_S: u64 = 420;

pub struct Site {
    sampan: PathBuf,
    root: PathBuf,
    lab: String,
    hub_pid: u64,
    folder: tempfile::TempDir,
    amd64: Rootfs,
    arm64: Rootfs,
    machines: Mutex<Vec<(&'static str, Machine)>>,
}

impl Drop for Site {
    fn drop(&mut self) {
        self.end();
    }
}

impl Site {
    /// With both machines, or the amd64 one alone.
    pub fn up(both: bool) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "virtual machines' wires need root");
        let target = cluster::target_folder()?;
        let images = target.join("vm");
        let amd64 = AMD64.rootfs(&images)?;
        let arm64 = if both { ARM64.rootfs(&images)? } else { amd64.clone() };
        let root = cluster::lab_root()?;
        let folder = tempfile::Builder::new().prefix("sampan-vm-").tempdir_in(&root)?;
        let sampan = folder.path().join("bin/sampan-amd64");
        std::fs::create_dir(folder.path().join("bin"))?;
        std::fs::copy(cluster::binary()?, &sampan)?;
        if both {
            let given = std::env::var_os("SAMPAN_BIN_ARM64").map(PathBuf::from);
            let foreign = given.unwrap_or_else(|| target.join("dist/sampan-arm64"));
            std::fs::copy(&foreign, folder.path().join("bin/sampan-arm64")).with_context(|| {
                format!("{} (`cargo xtask release --only arm64` makes it)", foreign.display())
            })?;
        }
        let lab = format!("vm-{}", std::process::id());
        lab_command(&sampan, &root, &lab, &["up", "--bare", "--nodes", NODE], 90)?.ok()?;
        let mut site =
            Self { sampan, root, lab, hub_pid: 0, folder, amd64, arm64, machines: Mutex::default() };
        let state = std::fs::read(site.root.join(&site.lab).join("lab.json"))?;
        let state: Value = serde_json::from_slice(&state)?;
        site.hub_pid = state["hub"]["pid"].as_u64().context("lab.json names no hub")?;
        site.prepare()?;
        // a Raspberry Pi's firmware turns the memory controller off
        let pi = Hardware { memory_mb: 512, number: 42, firmware_words: "cgroup_disable=memory" };
        let cloud = Hardware { memory_mb: 1024, number: 41, firmware_words: "" };
        for (recipe, rootfs, hardware) in [(&AMD64, &site.amd64, &cloud), (&ARM64, &site.arm64, &pi)]
            .into_iter()
            .take(if both { 2 } else { 1 })
        {
            let machine = Machine::start(recipe, rootfs, hardware, site.hub_pid, site.folder.path())?;
            site.machines().push((recipe.host, machine));
        }
        Ok(site)
    }

    fn prepare(&self) -> Result<()> {
        for (rootfs, arch) in [(&self.amd64, AMD64.arch), (&self.arm64, ARM64.arch)] {
            let path = self.file(&format!("key-{arch}"));
            std::fs::copy(rootfs.key(), &path)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        }
        std::fs::create_dir(self.file("home"))?;
        std::fs::write(self.file("pi-password"), "raspberry\n")?;
        // the lab's node has this machine's own OpenSSH
        let key =
            run(Command::new("ssh-keygen").arg("-yf").arg(self.file("key-amd64")), b"", seconds(10))?.ok()?;
        let users = self.root.join(&self.lab).join("nodes").join(NODE).join("etc/ssh/users");
        std::fs::create_dir_all(&users)?;
        std::fs::write(users.join("root"), key)?;
        let script = "set -e; mkdir -p /run/sshd; rm -f /etc/ssh/ssh_host_* /etc/ssh/sshd_config.d/*\n\
             ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key; chmod 755 /etc/ssh/users; chmod 644 /etc/ssh/users/*\n\
             printf 'AuthorizedKeysFile /etc/ssh/users/%%u\\nPasswordAuthentication no\\nUsePAM no\\n' >/etc/ssh/sshd_config; /usr/sbin/sshd";
        self.lab(&["exec", NODE, "--", "sh", "-c", script], 30)?.ok().map(drop)
    }

    fn lab(&self, args: &[&str], limit_s: u64) -> Result<Ran> {
        lab_command(&self.sampan, &self.root, &self.lab, args, limit_s)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn program(&self) -> &Path {
        &self.sampan
    }

    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        Ok(std::fs::write(self.file(name), text)?)
    }

    pub fn rootfs(&self, recipe: &Recipe) -> &Rootfs {
        if recipe.arch == AMD64.arch { &self.amd64 } else { &self.arm64 }
    }

    pub fn machines(&self) -> std::sync::MutexGuard<'_, Vec<(&'static str, Machine)>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn with_machine<T>(&self, recipe: &Recipe, work: impl FnOnce(&Machine) -> T) -> Result<T> {
        let machines = self.machines();
        let found = machines.iter().find(|(name, _)| *name == recipe.host).context(recipe.host)?;
        Ok(work(&found.1))
    }

    /// A program in the hub's network, in the folder of this run.
    pub fn hub(&self, words: &[&str], input: &[u8], limit_s: u64) -> Result<Ran> {
        let mut command = in_hub(self.hub_pid, words);
        command.current_dir(self.folder.path()).env("HOME", self.file("home"));
        command.env("KUBECONFIG", self.file("kubeconfig"));
        for name in ["SSH_AUTH_SOCK", "SAMPAN_SSH_PASSWORD", "SAMPAN_SUDO_PASSWORD"] {
            command.env_remove(name);
        }
        run(&mut command, input, seconds(limit_s))
    }

    /// `sampan LINE`, without a terminal.
    pub fn sampan(&self, line: &str, limit_s: u64) -> Result<Ran> {
        let program = self.sampan.display().to_string();
        let mut words = vec!["setsid", "-w", program.as_str()];
        words.extend(line.split_whitespace());
        self.hub(&words, b"", limit_s)
    }

    pub fn kubectl(&self, line: &str) -> Result<String> {
        self.try_kubectl(line)?.ok()
    }

    pub fn try_kubectl(&self, line: &str) -> Result<Ran> {
        let mut words = vec!["kubectl"];
        words.extend(line.split_whitespace());
        self.hub(&words, b"", 90)
    }

    /// `kubectl exec POD -- sh -c SCRIPT`.
    pub fn in_pod(&self, pod: &str, script: &str) -> Result<Ran> {
        self.hub(&["kubectl", "exec", pod, "--", "sh", "-c", script], b"", 60)
    }

    pub fn apply(&self, manifest: &str) -> Result<()> {
        self.hub(&["kubectl", "apply", "-f", "-"], manifest.as_bytes(), 60)?.ok().map(drop)
    }

    /// How a machine is logged in to.
    pub fn way(recipe: &Recipe) -> String {
        let secret = match recipe.password {
            Some(_) => "--ssh-password-file pi-password",
            None => "--ssh-key key-amd64",
        };
        format!("--ip {} --user {} {secret} --accept-new-host-keys", recipe.ip, recipe.user)
    }

    /// A script on a machine, as root, by `sampan exec`.
    pub fn on(&self, recipe: &Recipe, script: &str) -> Result<Ran> {
        let program = self.sampan.display().to_string();
        let way = Self::way(recipe);
        let mut words = vec!["setsid", "-w", program.as_str(), "exec"];
        words.extend(way.split_whitespace());
        words.extend(["--as-root", "--", script]);
        self.hub(&words, b"", 90)
    }

    /// Debian's OpenSSH client, into the machine with a key.
    pub fn ssh(&self, recipe: &Recipe, command: &str, input: &[u8]) -> Result<Ran> {
        let at = format!("{}@{}", recipe.user, recipe.ip);
        let key = format!("key-{}", recipe.arch);
        let mut words = vec!["ssh", "-q", "-i", &key];
        for option in ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"] {
            words.extend(["-o", option]);
        }
        words.extend([at.as_str(), command]);
        self.hub(&words, input, 120)
    }

    /// Waits until somebody can log in, on another boot than `before`; returns the boot's id.
    pub fn wait_for_login(&self, recipe: &Recipe, before: &str) -> Result<String> {
        let seen = wait_for(&format!("a login at {}", recipe.host), seconds(LOGIN_LIMIT_S), || {
            std::thread::sleep(seconds(1));
            let ran = self.on(recipe, "cat /proc/sys/kernel/random/boot_id")?;
            Ok(match ran.code {
                0 if ran.out.trim() != before => Ok(ran.out.trim().to_string()),
                _ => Err(ran.text()),
            })
        });
        seen.or_else(|error| bail!("{error:#}\n{}", self.with_machine(recipe, |m| m.console(25))?))
    }

    /// What there is to know when something went wrong.
    pub fn tell(&self) -> String {
        let mut told = String::new();
        let units = [(&AMD64, "sampan"), (&ARM64, "sampan-agent")];
        for (recipe, unit) in units.into_iter().take(self.machines().len()) {
            if let Ok(ran) = self.on(recipe, &format!("journalctl -u {unit} -o cat --no-pager -n 40")) {
                told += &format!("-- log of {}\n{}\n", recipe.host, ran.text());
            }
        }
        for (_, machine) in self.machines().iter() {
            told += &machine.console(12);
            told.push('\n');
        }
        for what in ["nodes,pods -A -o wide", "events --sort-by=.lastTimestamp"] {
            if let Ok(ran) = self.try_kubectl(&format!("get {what}")) {
                let text = ran.text();
                let lines: Vec<&str> = text.lines().collect();
                told += &lines[lines.len().saturating_sub(12)..].join("\n");
                told.push('\n');
            }
        }
        told
    }

    /// Ends machines and lab; again is no fault.
    pub fn end(&self) {
        if std::env::var_os("SAMPAN_TEST_KEEP").is_some() {
            println!("kept until a key is pressed: {}, lab {}", self.folder.path().display(), self.lab);
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        for (_, mut machine) in std::mem::take(&mut *self.machines()) {
            machine.end();
        }
        match self.lab(&["down"], 60) {
            Ok(ran) if ran.code == 0 || ran.text().contains("there is no lab") => {}
            Ok(ran) => println!("lab down: {}", ran.text()),
            Err(error) => println!("lab down: {error:#}"),
        }
        // an exit by signal drops nothing
        let _ = std::fs::remove_dir_all(self.folder.path());
    }
}

fn lab_command(sampan: &Path, root: &Path, name: &str, args: &[&str], limit_s: u64) -> Result<Ran> {
    let (verb, rest) = args.split_first().context("a verb")?;
    let mut command = Command::new(sampan);
    command.env("SAMPAN_LAB_ROOT", root).args(["lab", verb, "--name", name]).args(rest);
    run(&mut command, b"", seconds(limit_s))
}
