//! Boards to install on: bare lab nodes with Debian's own OpenSSH server, and suites of steps over them.
//!
//! The program under test runs in the lab's hub and knows the nodes by SSH only. The cases are steps that follow one
//! another, and the lab goes down after the last one, whatever happened.
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};

use crate::process::{Ran, run as run_command};
use crate::{cluster, has, seconds};

/// Where the program stands in the hub.
pub const PROGRAM: &str = "/run/sampan/bin/sampan";

pub type Step = (&'static str, fn(&Boards) -> Result<()>);

/// Runs a suite. A node's name starts with its architecture; addresses are those that the lab gives.
pub fn run(suite: &str, nodes: &[(&str, &str)], all: &[Step]) -> ExitCode {
    if std::env::args().any(|a| a == "--list") {
        all.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted =
        |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()) || f == suite);
    let steps: Vec<_> = all.iter().filter(|(name, _)| wanted(name)).collect();
    println!("\nrunning {} tests of suite {suite}", steps.len());
    if steps.is_empty() {
        return ExitCode::SUCCESS;
    }
    let lab = match Boards::up(suite, nodes) {
        Ok(lab) => lab,
        Err(error) => {
            println!("\nsuite {suite} cannot start: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let mut failed = 0;
    for (name, step) in &steps {
        let start = sampan_world::clock::monotonic();
        let result = step(&lab);
        let took = start.elapsed().as_secs_f32();
        match result {
            Ok(()) => println!("test {name} ... ok ({took:.1} s)"),
            Err(error) => {
                failed += 1;
                println!("test {name} ... FAILED ({took:.1} s)\n{error:#}");
            }
        }
    }
    drop(lab);
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {verdict}. {} passed; {failed} failed; suite {suite}\n", steps.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A bare lab with sshd in every node; it goes down with this.
pub struct Boards {
    pub sampan: PathBuf,
    root: PathBuf,
    pub name: String,
    /// Names and addresses.
    pub nodes: Vec<(String, String)>,
    _folder: tempfile::TempDir,
}

impl Drop for Boards {
    fn drop(&mut self) {
        if std::env::var_os("SAMPAN_TEST_KEEP").is_some() {
            println!("kept: SAMPAN_LAB_ROOT={} lab {}", self.root.display(), self.name);
            return;
        }
        match self.lab(&["down"], 60) {
            Ok(ran) if ran.code == 0 => {}
            Ok(ran) => println!("lab down: {}", ran.text()),
            Err(error) => println!("lab down: {error:#}"),
        }
    }
}

/// What a fresh board has: sshd with its own keys, and users who may more or less.
const BOARD: &str = r#"
set -e
mkdir -p /run/sshd /etc/ssh/users
rm -f /etc/ssh/ssh_host_* /etc/ssh/sshd_config.d/*
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
ssh-keygen -q -t ecdsa -N '' -f /etc/ssh/ssh_host_ecdsa_key
for user in pi ops mallory; do useradd -m -s /bin/sh $user; done
usermod -p '*' ops
echo 'pi:raspberry' | chpasswd
echo 'mallory:mallory' | chpasswd
printf 'pi ALL=(ALL:ALL) ALL\nops ALL=(ALL) NOPASSWD: ALL\n' >/etc/sudoers.d/board
chmod 440 /etc/sudoers.d/board
cat >/etc/ssh/sshd_config <<'END'
PermitRootLogin prohibit-password
PasswordAuthentication yes
AuthorizedKeysFile /etc/ssh/users/%u
UsePAM no
Subsystem sftp internal-sftp
END
chmod 755 /etc/ssh/users
chmod 644 /etc/ssh/users/*
/usr/sbin/sshd
# another that asks by keyboard-interactive only, through PAM
/usr/sbin/sshd -p 2200 -o UsePAM=yes -o PasswordAuthentication=no -o KbdInteractiveAuthentication=yes -o PubkeyAuthentication=no
"#;

impl Boards {
    fn up(suite: &str, nodes: &[(&str, &str)]) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("these tests make namespaces, mounts and cgroups: run them as root");
        }
        for (program, package) in [("/usr/sbin/sshd", "openssh-server"), ("/usr/bin/sudo", "sudo")] {
            ensure!(Path::new(program).exists(), "there is no {program}: install {package}");
        }
        let root = cluster::lab_root()?;
        let folder = tempfile::Builder::new().prefix("sampan-test-").tempdir_in(&root)?;
        let sampan = folder.path().join("sampan");
        let built = cluster::binary()?;
        if std::fs::hard_link(&built, &sampan).is_err() {
            std::fs::copy(&built, &sampan)?;
        }
        let name = format!("{suite}-{}", std::process::id());
        let architectures: Vec<&str> =
            nodes.iter().map(|(name, _)| name.split('-').next().unwrap_or(name)).collect();
        let nodes = nodes.iter().map(|(name, ip)| ((*name).to_string(), (*ip).to_string())).collect();
        let lab = Self { sampan, root, name, nodes, _folder: folder };
        lab.lab(&["up", "--bare", "--nodes", &architectures.join(",")], 90)?.ok()?;
        lab.make_keys()?;
        for (node, _) in &lab.nodes {
            let users = lab.node_folder(node).join("etc/ssh/users");
            std::fs::create_dir_all(&users)?;
            for (user, keys) in [("root", &["plain"][..]), ("ops", &["locked", "rsa", "ecdsa"])] {
                let public = |key: &&str| std::fs::read_to_string(lab.hub_tmp().join(format!("{key}.pub")));
                let lines: std::io::Result<String> = keys.iter().map(public).collect();
                std::fs::write(users.join(user), lines?)?;
            }
            lab.on(node, BOARD)?.ok().with_context(|| format!("setting up {node}"))?;
        }
        Ok(lab)
    }

    /// `sampan lab VERB` of this lab.
    pub fn lab(&self, args: &[&str], limit_s: u64) -> Result<Ran> {
        let (verb, rest) = args.split_first().context("a verb")?;
        let mut command = Command::new(&self.sampan);
        command.env("SAMPAN_LAB_ROOT", &self.root).args(["lab", verb, "--name", &self.name]).args(rest);
        run_command(&mut command, b"", seconds(limit_s))
    }

    /// `/tmp` of the hub, where the program runs.
    pub fn hub_tmp(&self) -> PathBuf {
        self.root.join(&self.name).join("hub/tmp")
    }

    /// A node's own files, from outside.
    pub fn node_folder(&self, node: &str) -> PathBuf {
        self.root.join(&self.name).join("nodes").join(node)
    }

    fn make_keys(&self) -> Result<()> {
        for (name, kind, phrase) in [
            ("plain", "ed25519", ""),
            ("locked", "ed25519", "open sesame"),
            ("stranger", "ed25519", ""),
            ("rsa", "rsa", ""),
            ("ecdsa", "ecdsa", ""),
        ] {
            let path = self.hub_tmp().join(name);
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", kind, "-a", "4", "-N", phrase, "-f"]).arg(&path);
            run_command(&mut keygen, b"", seconds(20))?.ok()?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        }
        for (name, text) in [
            ("pi-password", "raspberry\n"),
            ("wrong-password", "strawberry\n"),
            ("mallory-password", "mallory\n"),
        ] {
            std::fs::write(self.hub_tmp().join(name), text)?;
        }
        Ok(())
    }

    /// `sampan ARGS` in the hub, without a terminal, an agent or a home with keys.
    pub fn sampan_within(&self, line: &str, limit_s: u64) -> Result<Ran> {
        let home = self.hub_tmp().join("home");
        std::fs::create_dir_all(&home)?;
        let mut command = Command::new(&self.sampan);
        command.env("SAMPAN_LAB_ROOT", &self.root).args(["lab", "exec", "--name", &self.name, "hub", "--"]);
        command.args([
            "setsid",
            "-w",
            "env",
            "-u",
            "SSH_AUTH_SOCK",
            "HOME=/tmp/home",
            "SAMPAN_SSH_KEY_PASSPHRASE=open sesame",
        ]);
        command.args(["sh", "-c", &format!("cd /tmp && exec {PROGRAM} {line}")]);
        run_command(&mut command, b"", seconds(limit_s))
    }

    /// The same within a minute.
    pub fn sampan(&self, line: &str) -> Result<Ran> {
        self.sampan_within(line, 60)
    }

    /// It must fail with this exit code and these words.
    pub fn fails(&self, line: &str, code: i32, words: &[&str]) -> Result<()> {
        let ran = self.sampan(line)?;
        ensure!(ran.code == code, "{line}\nended with {}, not {code}:\n{}", ran.code, ran.text());
        words.iter().try_for_each(|want| has(&ran.text(), want)).with_context(|| line.to_string())
    }

    /// A script in a node, as root, not by SSH.
    pub fn on(&self, node: &str, script: &str) -> Result<Ran> {
        self.lab(&["exec", node, "--", "sh", "-c", script], 60)
    }

    /// In the hub, with the kubeconfig that `install` or `apply` saved.
    pub fn kubectl(&self, args: &str) -> Result<String> {
        let line = format!("KUBECONFIG=/tmp/kubeconfig HOME=/tmp/home kubectl {args}");
        self.on("hub", &line)?.ok()
    }

    /// What a node has in the places where an installation writes.
    pub fn traces(&self, node: &str) -> Result<Vec<String>> {
        let script = "find /usr/local/bin /etc/init.d /etc/systemd/system /etc/rc2.d /var/lib/sampan /var/log/pods /var/log/containers \
                      /var/log/sampan.log* /run/sampan* 2>/dev/null | grep -v '^/run/sampan/bin' | grep -v '^/run/sampan$' | sort; \
                      ip -o link | grep -o 'spn[0-9a-f]*\\|sampan[.0-9]*'; \
                      for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^/usr/local/bin/sampan' && echo process $p; done; true";
        Ok(self.on(node, script)?.ok()?.lines().map(String::from).collect())
    }

    /// Runs what must fail, and sees to it that the node is as before.
    pub fn leaves_no_trace(&self, node: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.traces(node)?;
        work()?;
        let after = self.traces(node)?;
        let new: Vec<&String> = after.iter().filter(|line| !before.contains(line)).collect();
        ensure!(new.is_empty(), "left on {node}: {new:?}");
        Ok(())
    }

    /// A program of this name before all others of the node, for as long as `work` lasts.
    pub fn with_fake(
        &self,
        node: &str,
        name: &str,
        body: &str,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let path = format!("/usr/local/bin/{name}");
        let script = format!("printf '#!/bin/sh\\n%s\\n' '{body}' >{path}; chmod 755 {path}");
        self.on(node, &script)?.ok()?;
        let done = work();
        self.on(node, &format!("rm -f {path}"))?.ok()?;
        done
    }

    /// The program under test as another release, `0.2.0` for one, with more of its texts changed.
    pub fn as_release(&self, version: &str, changes: &[(&str, &str)]) -> Result<Vec<u8>> {
        let own = env!("CARGO_PKG_VERSION");
        let mut bytes = std::fs::read(&self.sampan)?;
        let mut all = vec![
            (format!("+sampan{own}"), format!("+sampan{version}")),
            (format!("{own} (Kubernetes"), format!("{version} (Kubernetes")),
        ];
        all.extend(changes.iter().map(|(from, to)| ((*from).to_string(), (*to).to_string())));
        for (from, to) in &all {
            ensure!(from.len() == to.len(), "{from:?} and {to:?} differ in length");
            let places: Vec<usize> = memchr::memmem::find_iter(&bytes, from).collect();
            ensure!(!places.is_empty(), "{from:?} is not in the program");
            for at in places {
                bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            }
        }
        Ok(bytes)
    }

    /// A file in the hub's `/tmp`.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        Ok(std::fs::write(self.hub_tmp().join(name), text)?)
    }
}
