//! Clusters over SSH: bare lab nodes with Debian's own OpenSSH server, made a cluster, upgraded and made bare again.
//!
//! The program under test runs in the lab's hub and knows the nodes by SSH only. The cases are steps: first what must
//! fail and leave no trace, then a cluster, then its end. The lab goes down after the last step, whatever happened.
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use sampan_tests::process::{Ran, run};
use sampan_tests::{cluster, has, seconds};

const NODES: [(&str, &str); 3] = [("amd64", "10.64.0.11"), ("arm64", "10.64.0.12"), ("arm", "10.64.0.13")];
const SERVER: &str = "10.64.0.11";
const PROGRAM: &str = "/run/sampan/bin/sampan";

type Step = fn(&Lab) -> Result<()>;

const STEPS: &[(&str, Step)] = &[
    ("wrong_password", wrong_password),
    ("refused_key", refused_key),
    ("unknown_and_changed_host_key", unknown_and_changed_host_key),
    ("ways_to_log_in", ways_to_log_in),
    ("questions_at_a_terminal", questions_at_a_terminal),
    ("no_sudo", no_sudo),
    ("unsupported_machine", unsupported_machine),
    ("clock_off_by_a_year", clock_off_by_a_year),
    ("full_disk", full_disk),
    ("bad_lists", bad_lists),
    ("plan_and_apply", plan_and_apply),
    ("apply_again_changes_nothing", apply_again_changes_nothing),
    ("what_a_server_gives", what_a_server_gives),
    ("pods_outlive_a_restart", pods_outlive_a_restart),
    ("half_done_is_done_again", half_done_is_done_again),
    ("refused_token", refused_token),
    ("upgrade_and_back", upgrade_and_back),
    ("nothing_is_left", nothing_is_left),
];

fn main() -> ExitCode {
    if std::env::args().any(|a| a == "--list") {
        STEPS.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted =
        |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()) || f == "fleet");
    let steps: Vec<_> = STEPS.iter().filter(|(name, _)| wanted(name)).collect();
    println!("\nrunning {} tests of suite fleet", steps.len());
    if steps.is_empty() {
        return ExitCode::SUCCESS;
    }
    let lab = match Lab::up() {
        Ok(lab) => lab,
        Err(error) => {
            println!("\nsuite fleet cannot start: {error:#}");
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
    println!("\ntest result: {verdict}. {} passed; {failed} failed; suite fleet\n", steps.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A bare lab with sshd in every node; it goes down with this.
struct Lab {
    sampan: PathBuf,
    root: PathBuf,
    name: String,
    folder: tempfile::TempDir,
}

impl Drop for Lab {
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

impl Lab {
    fn up() -> Result<Self> {
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
        let lab = Self { sampan, root, name: format!("fleet-{}", std::process::id()), folder };
        let nodes = NODES.map(|(name, _)| name).join(",");
        lab.lab(&["up", "--bare", "--nodes", &nodes], 90)?.ok()?;
        lab.make_keys()?;
        for (node, _) in NODES {
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

    fn lab(&self, args: &[&str], limit_s: u64) -> Result<Ran> {
        let (verb, rest) = args.split_first().context("a verb")?;
        let mut command = Command::new(&self.sampan);
        command.env("SAMPAN_LAB_ROOT", &self.root).args(["lab", verb, "--name", &self.name]).args(rest);
        run(&mut command, b"", seconds(limit_s))
    }

    /// `/tmp` of the hub, where the program runs.
    fn hub_tmp(&self) -> PathBuf {
        self.root.join(&self.name).join("hub/tmp")
    }

    fn node_folder(&self, node: &str) -> PathBuf {
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
            run(&mut keygen, b"", seconds(20))?.ok()?;
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
    fn sampan_within(&self, line: &str, limit_s: u64) -> Result<Ran> {
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
        run(&mut command, b"", seconds(limit_s))
    }

    fn sampan(&self, line: &str) -> Result<Ran> {
        self.sampan_within(line, 60)
    }

    /// It must fail with this exit code and these words.
    fn fails(&self, line: &str, code: i32, words: &[&str]) -> Result<()> {
        let ran = self.sampan(line)?;
        ensure!(ran.code == code, "{line}\nended with {}, not {code}:\n{}", ran.code, ran.text());
        words.iter().try_for_each(|want| has(&ran.text(), want)).with_context(|| line.to_string())
    }

    /// A script in a node, as root, not by SSH.
    fn on(&self, node: &str, script: &str) -> Result<Ran> {
        self.lab(&["exec", node, "--", "sh", "-c", script], 60)
    }

    fn kubectl(&self, args: &str) -> Result<String> {
        let line = format!("KUBECONFIG=/tmp/kubeconfig HOME=/tmp/home kubectl {args}");
        self.on("hub", &line)?.ok()
    }

    /// What a node has in the places where an installation writes.
    fn traces(&self, node: &str) -> Result<Vec<String>> {
        let script = "find /usr/local/bin /etc/init.d /etc/systemd/system /etc/rc2.d /var/lib/sampan /var/log/pods /var/log/containers \
                      /var/log/sampan.log* /run/sampan* 2>/dev/null | grep -v '^/run/sampan/bin' | grep -v '^/run/sampan$' | sort; \
                      ip -o link | grep -o 'spn[0-9a-f]*\\|sampan[.0-9]*'; \
                      for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^/usr/local/bin/sampan' && echo process $p; done; true";
        Ok(self.on(node, script)?.ok()?.lines().map(String::from).collect())
    }

    /// Runs what must fail, and sees to it that the node is as before.
    fn leaves_no_trace(&self, node: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.traces(node)?;
        work()?;
        let after = self.traces(node)?;
        let new: Vec<&String> = after.iter().filter(|line| !before.contains(line)).collect();
        ensure!(new.is_empty(), "left on {node}: {new:?}");
        Ok(())
    }

    /// A program of this name before all others of the node, for as long as `work` lasts.
    fn with_fake(&self, node: &str, name: &str, body: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let path = format!("/usr/local/bin/{name}");
        let script = format!("printf '#!/bin/sh\\n%s\\n' '{body}' >{path}; chmod 755 {path}");
        self.on(node, &script)?.ok()?;
        let done = work();
        self.on(node, &format!("rm -f {path}"))?.ok()?;
        done
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        Ok(std::fs::write(self.hub_tmp().join(name), text)?)
    }
}

fn wrong_password(lab: &Lab) -> Result<()> {
    lab.leaves_no_trace("amd64", || {
        let line = format!(
            "install --ip {SERVER} --user pi --ssh-password-file wrong-password --accept-new-host-keys"
        );
        lab.fails(
            &line,
            4,
            &["pi@10.64.0.11 lets nobody in with the password", "it takes publickey and password"],
        )?;
        let none = format!("install --ip {SERVER} --user pi");
        lab.fails(&none, 4, &["no key and no password"])
    })
}

fn refused_key(lab: &Lab) -> Result<()> {
    lab.leaves_no_trace("amd64", || {
        let line = format!("install --ip {SERVER} --ssh-key stranger --accept-new-host-keys");
        lab.fails(&line, 4, &["root@10.64.0.11 lets nobody in with the key stranger"])?;
        lab.fails(
            &format!("install --ip {SERVER} --ssh-key plain.pub"),
            4,
            &["is a public key; name the private one"],
        )?;
        lab.fails(&format!("install --ip {SERVER} --ssh-key nowhere"), 4, &["nowhere"])?;
        lab.fails("install --ip 10.64.0.99 --ssh-key plain", 3, &["cannot reach root@10.64.0.99"])?;
        lab.fails(
            &format!("install --ip {SERVER} --ssh-port 2222 --ssh-key plain"),
            3,
            &["Connection refused"],
        )
    })
}

fn unknown_and_changed_host_key(lab: &Lab) -> Result<()> {
    let fingerprint = |kind: &str| -> Result<String> {
        let script = format!("ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub | cut -d' ' -f2");
        Ok(lab.on("arm64", &script)?.ok()?.trim().to_string())
    };
    let right = fingerprint("ed25519")?;
    let exec = |flags: &str| format!("exec --ip 10.64.0.12 --ssh-key plain {flags} -- echo in");
    lab.fails(&exec("--known-hosts none"), 5, &["is not known", &right, "--accept-new-host-keys"])?;
    lab.fails(&exec("--known-hosts none --host-key SHA256:AAAA"), 5, &["not SHA256:AAAA as given"])?;
    has(&lab.sampan(&exec(&format!("--known-hosts none --host-key {right}")))?.ok()?, "in")?;
    ensure!(!lab.hub_tmp().join("none").exists(), "a fingerprint that was given is not remembered");
    // at first sight remembered, then known without a word; also where the name is hashed
    has(&lab.sampan(&exec("--known-hosts seen --accept-new-host-keys"))?.ok()?, "in")?;
    has(&lab.sampan(&exec("--known-hosts seen"))?.ok()?, "in")?;
    lab.on("hub", "cd /tmp && ssh-keygen -q -H -f seen")?.ok()?;
    has(&std::fs::read_to_string(lab.hub_tmp().join("seen"))?, "|1|")?;
    has(&lab.sampan(&exec("--known-hosts seen"))?.ok()?, "in")?;
    // only its other key is known: that one is asked for
    let other = lab.on("arm64", "cut -d' ' -f1,2 /etc/ssh/ssh_host_ecdsa_key.pub")?.ok()?;
    lab.write("by-ecdsa", &format!("# hosts\n10.64.0.12 {other}"))?;
    has(&lab.sampan(&exec("--known-hosts by-ecdsa"))?.ok()?, "in")?;
    // changed: refused whatever was allowed, with the line to look at
    let stranger = std::fs::read_to_string(lab.hub_tmp().join("stranger.pub"))?;
    lab.write("changed", &format!("# hosts\n\n10.64.0.12 {stranger}"))?;
    let words = ["HAS CHANGED", &right, "changed, line 3", "ssh-keygen -f changed -R '10.64.0.12'"];
    lab.fails(&exec("--known-hosts changed --accept-new-host-keys"), 5, &words)
}

fn ways_to_log_in(lab: &Lab) -> Result<()> {
    let exec = |flags: &str| format!("exec --ip 10.64.0.13 --accept-new-host-keys {flags} -- id -un");
    for (flags, user) in [
        ("--user ops --ssh-key rsa", "ops"),
        ("--user ops --ssh-key ecdsa", "ops"),
        ("--user ops --ssh-key locked", "ops"),
        ("--user pi --ssh-password-file pi-password", "pi"),
        ("--user pi --ssh-password-file pi-password --ssh-port 2200", "pi"),
        ("--user ops --ssh-key locked --ssh-jump root@10.64.0.99", ""),
    ] {
        let ran = lab.sampan(&exec(flags))?;
        match user {
            "" => ensure!(ran.code == 3, "{flags}: {}", ran.text()),
            user => has(&ran.ok()?, user).context(flags)?,
        }
    }
    let wrong = "--user pi --ssh-password-file wrong-password --ssh-port 2200";
    lab.fails(&exec(wrong), 4, &["lets nobody in with the password", "keyboard-interactive"])?;
    // keys of an agent, and a locked key that the agent holds, without anybody who knows the passphrase
    let start = "cd /tmp && ssh-agent -a /tmp/agent >agent.env && . ./agent.env >/dev/null && \
                 printf '#!/bin/sh\necho open sesame\n' >askpass && chmod 755 askpass && \
                 SSH_ASKPASS=/tmp/askpass SSH_ASKPASS_REQUIRE=force ssh-add -q locked </dev/null";
    lab.on("hub", start)?.ok()?;
    for flags in ["--user ops", "--user ops --ssh-key locked"] {
        let line = format!(
            "cd /tmp && env -u SAMPAN_SSH_KEY_PASSPHRASE HOME=/tmp/home SSH_AUTH_SOCK=/tmp/agent setsid -w {PROGRAM} {}",
            exec(flags)
        );
        has(&lab.on("hub", &line)?.ok()?, "ops").context(flags)?;
    }
    Ok(())
}

/// At a terminal: is the host's key right, which passphrase, which password; nothing of it is shown.
fn questions_at_a_terminal(lab: &Lab) -> Result<()> {
    let ask = |answers: &str, line: &str| {
        let inner = format!("cd /tmp && env HOME=/tmp/home {PROGRAM} {line} --known-hosts asked -- id -un");
        lab.on("hub", &format!("({answers}; sleep 2) | script -qec \"{inner}\" /dev/null"))
    };
    let answer = |text: &str| format!("sleep 1.5; echo '{text}'");
    let no = ask(&answer("no"), "exec --ip 10.64.0.13 --ssh-key plain")?;
    has(&no.text(), "you did not accept the host key")?;
    ensure!(no.code == 5, "{} {}", no.code, no.text());
    let yes = ask(
        &format!("{}; {}", answer("yes"), answer("open sesame")),
        "exec --ip 10.64.0.13 --user ops --ssh-key locked",
    )?;
    let text = yes.text();
    for want in ["The host key of 10.64.0.13 (port 22) is not known", "Passphrase of locked: ", "ops\r\n"] {
        has(&text, want)?;
    }
    let password = ask(&answer("raspberry"), "exec --ip 10.64.0.13 --user pi --as-root")?;
    let text = password.text();
    has(&text, "Password of pi@10.64.0.13: ")?;
    has(&text, "root\r\n")?;
    ensure!(!text.contains("raspberry"), "{text}");
    Ok(())
}

fn no_sudo(lab: &Lab) -> Result<()> {
    lab.leaves_no_trace("amd64", || {
        let mallory = format!("install --ip {SERVER} --user mallory --ssh-password-file mallory-password");
        lab.fails(&mallory, 7, &["needs root, and this user may not use sudo"])?;
        let wrong = format!(
            "install --ip {SERVER} --user pi --ssh-password-file pi-password --sudo-password-file wrong-password"
        );
        lab.fails(&wrong, 7, &["sudo does not take the password"])?;
        let never = format!("install --ip {SERVER} --user pi --ssh-password-file pi-password --sudo=false");
        lab.fails(&never, 7, &["the user is not root"])
    })
}

fn unsupported_machine(lab: &Lab) -> Result<()> {
    lab.with_fake("amd64", "uname", "[ \"$1\" = -m ] && echo armv6l || /usr/bin/uname \"$@\"", || {
        lab.leaves_no_trace("amd64", || {
            lab.fails(
                &format!("install --ip {SERVER} --ssh-key plain"),
                6,
                &["armv6l is not supported", "ARMv7"],
            )
        })
    })?;
    lab.with_fake("amd64", "uname", "[ \"$1\" = -m ] && echo aarch64 || /usr/bin/uname \"$@\"", || {
        lab.leaves_no_trace("amd64", || {
            let line = format!("install --ip {SERVER} --ssh-key plain");
            lab.fails(&line, 6, &["there is no sampan for arm64 to send", "sampan-arm64"])
        })
    })
}

fn clock_off_by_a_year(lab: &Lab) -> Result<()> {
    let fake = "[ \"$1\" = +%s ] && echo $(($(/usr/bin/date +%s) - 31560000)) || /usr/bin/date \"$@\"";
    lab.with_fake("amd64", "date", fake, || {
        lab.leaves_no_trace("amd64", || {
            let line = format!("install --ip {SERVER} --ssh-key plain");
            lab.fails(&line, 6, &["its clock is 365 days behind ours", "date -s @"])
        })
    })
}

fn full_disk(lab: &Lab) -> Result<()> {
    lab.on("amd64", "mount -t tmpfs -o size=4m none /usr/local/bin")?.ok()?;
    let refused = lab.leaves_no_trace("amd64", || {
        let line = format!("install --ip {SERVER} --ssh-key plain");
        lab.fails(&line, 6, &["the disk is full", "for the program"])?;
        // told, tried all the same, and cleaned up
        lab.fails(&format!("{line} --ignore-preflight disk"), 9, &["there is no space left"])
    });
    lab.on("amd64", "umount /usr/local/bin")?.ok()?;
    refused
}

fn bad_lists(lab: &Lab) -> Result<()> {
    for (text, words) in [
        ("hosts: [", "is no list of hosts"),
        ("[{ip: 10.64.0.11, usr: pi}]", "host 1: unknown field `usr`"),
        ("[{hostname: x, role: agent}]", "no host of the list is a server"),
        ("[{ip: 10.64.0.11, extra-args: --no-such}]", "--no-such"),
    ] {
        lab.write("bad.yaml", text)?;
        lab.fails("apply bad.yaml", 2, &[words])?;
    }
    // one machine that is not fit keeps all others as they are
    lab.write(
        "mixed.yaml",
        &format!("[{{ip: {SERVER}, ssh-key: plain}}, {{ip: 10.64.0.12, ssh-key: stranger}}]"),
    )?;
    lab.leaves_no_trace("amd64", || {
        let words = ["1 of 2 machines are not fit; nothing was installed", "root@10.64.0.12 lets nobody in"];
        lab.fails("apply mixed.yaml --accept-new-host-keys", 4, &words)
    })
}

/// A root with a key; a user with a password for login and sudo; one with a locked key, behind the first.
const HOSTS: &str = "\
- {hostname: amd64, ip: 10.64.0.11, ssh-key: plain, node-label: [place=desk]}
- {hostname: arm64, ip: 10.64.0.12, user: pi, ssh-password-file: pi-password}
- {hostname: arm, ip: 10.64.0.13, user: ops, ssh-key: locked, ssh-jump: ops@10.64.0.11, node-taint: slow=yes:NoSchedule}
";
const APPLY: &str = "apply hosts.yaml --accept-new-host-keys --context lab";

fn plan_and_apply(lab: &Lab) -> Result<()> {
    let images = lab.node_folder("amd64").join("data/agent/images");
    std::fs::create_dir_all(&images)?;
    sampan_tests::image::box_image()?.write_archive(&images.join("box.tar"))?;
    lab.write("hosts.yaml", HOSTS)?;
    let plan = lab.sampan("plan hosts.yaml --context lab")?.ok()?;
    has(&plan, "sampan install --host 10.64.0.11")?;
    has(&plan, "--ssh-jump ops@10.64.0.11")?;
    let start = sampan_world::clock::monotonic();
    let ran = lab.sampan_within(APPLY, 150)?;
    let took = start.elapsed();
    let told = ran.text();
    ran.ok()?;
    println!("  three bare machines to a Ready cluster: {:.1} s", took.as_secs_f32());
    has(&told, "node arm is Ready")?;
    ensure!(took < seconds(60), "it took {:.1} s:\n{told}", took.as_secs_f32());
    let nodes = lab.kubectl("--context lab get nodes -L kubernetes.io/arch,place --no-headers")?;
    for (node, _) in NODES {
        let line = nodes.lines().find(|l| l.starts_with(&format!("{node} "))).context(nodes.clone())?;
        ensure!(line.contains(" Ready ") && line.contains("v1.36"), "{line}");
        ensure!(line.split_whitespace().any(|w| w == node), "its architecture: {line}");
    }
    has(&nodes, "desk")?;
    has(&lab.kubectl("get node arm -o jsonpath={.spec.taints[0].key}")?, "slow")?;
    let mode = std::fs::metadata(lab.hub_tmp().join("kubeconfig"))?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "{mode:o}");
    let ready =
        lab.sampan("ready --kubeconfig /tmp/kubeconfig --context lab --attempts 10 --pause 500ms")?.ok()?;
    has(&ready, "All 3 node(s) are ready")?;
    // secrets stand on no command line and in no file that others read
    let seen =
        lab.on("arm64", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; ls -l /etc/sampan/config.yaml")?.ok()?;
    ensure!(!seen.contains("raspberry") && !seen.contains("K10"), "{seen}");
    has(&seen, "-rw------- 1 root root")
}

fn pid_of(lab: &Lab, node: &str, service: &str) -> Result<String> {
    Ok(lab.on(node, &format!("cat /run/{service}.pid"))?.ok()?.trim().to_string())
}

fn apply_again_changes_nothing(lab: &Lab) -> Result<()> {
    let before = (pid_of(lab, "amd64", "sampan")?, pid_of(lab, "arm64", "sampan-agent")?);
    let ran = lab.sampan(APPLY)?;
    let told = ran.text();
    ran.ok()?;
    has(&told, "amd64: the program is there already")?;
    has(&told, "arm64: sampan-agent runs already")?;
    let after = (pid_of(lab, "amd64", "sampan")?, pid_of(lab, "arm64", "sampan-agent")?);
    ensure!(before == after, "{before:?} {after:?}\n{told}");
    // an agent's machine takes no server, nor one that listens there already
    let line = "install --ip 10.64.0.12 --user pi --ssh-password-file pi-password";
    lab.fails(line, 6, &["it is an agent already"])
}

fn what_a_server_gives(lab: &Lab) -> Result<()> {
    let way = format!("--ip {SERVER} --user ops --ssh-key locked");
    let token = lab.sampan(&format!("node-token {way}"))?.ok()?;
    ensure!(token.starts_with("K10") && token.trim().lines().count() == 1, "{token}");
    lab.write("merged", "apiVersion: v1\nkind: Config\ncurrent-context: old\ncontexts: [{name: old, context: {cluster: c, user: u}}]\n")?;
    lab.sampan(&format!("get-config {way} --local-path merged --merge --context new"))?.ok()?;
    let merged = std::fs::read_to_string(lab.hub_tmp().join("merged"))?;
    for want in ["current-context: old", "name: new", "server: https://10.64.0.11:6443"] {
        has(&merged, want)?;
    }
    let got = lab.on("hub", "KUBECONFIG=/tmp/merged kubectl --context new get nodes -o name")?.ok()?;
    ensure!(got.lines().count() == 3, "{got}");
    let ran = lab.sampan("exec --hosts hosts.yaml --as-root -- 'id -u; hostname; exit 3'")?;
    ensure!(ran.code == 3, "{} {}", ran.code, ran.text());
    for (node, _) in NODES {
        has(&ran.out, &format!("{node}: 0\n"))?;
        has(&ran.out, &format!("{node}: {node}\n"))?;
    }
    Ok(())
}

/// A pod of the server's own node, which runs until the end of all.
fn pods_outlive_a_restart(lab: &Lab) -> Result<()> {
    let image = sampan_tests::image::BOX;
    let pod = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: stays}}\nspec:\n  nodeName: amd64\n  containers:\n  \
         - {{name: c, image: '{image}', command: [sleep, '1000']}}\n"
    );
    lab.write("pod.yaml", &pod)?;
    lab.kubectl("apply -f /tmp/pod.yaml")?;
    lab.kubectl("wait --for=condition=Ready pod/stays --timeout=30s")?;
    let id = || lab.kubectl("get pod stays -o jsonpath={.status.containerStatuses[0].containerID}");
    let (before, pid) = (id()?, pid_of(lab, "amd64", "sampan")?);
    let line = format!(
        "install --ip {SERVER} --ssh-key plain --local-path again --extra-args '--node-label=place=desk --debug'"
    );
    let ran = lab.sampan_within(&line, 90)?;
    has(&ran.text(), "node amd64 is Ready")?;
    ran.ok()?;
    ensure!(pid != pid_of(lab, "amd64", "sampan")?, "it was started anew");
    lab.kubectl("wait --for=condition=Ready pod/stays --timeout=30s")?;
    ensure!(before == id()?, "the same container");
    ensure!(lab.traces("amd64")?.iter().any(|t| t.starts_with("spn")), "its interface is there");
    Ok(())
}

fn half_done_is_done_again(lab: &Lab) -> Result<()> {
    // as if the last run had died in the middle: an old piece, no service, no program
    let broken = "/etc/init.d/sampan-agent stop; rm -f /etc/init.d/sampan-agent /usr/local/bin/sampan; echo half >/usr/local/bin/.sampan.part";
    lab.on("arm64", broken)?.ok()?;
    let line = format!(
        "join --ip 10.64.0.12 --user pi --ssh-password-file pi-password --server-ip {SERVER} --server-user ops --server-ssh-port 22"
    );
    // the named key is for the server, the password for the node
    let ran = lab.sampan_within(&format!("{line} --server-ssh-key locked"), 90)?;
    let told = ran.text();
    ran.ok()?;
    has(&told, "node arm64 is Ready")?;
    let left = lab.on("arm64", "ls -A /usr/local/bin")?.ok()?;
    ensure!(!left.contains(".sampan.part"), "{left}");
    Ok(())
}

fn refused_token(lab: &Lab) -> Result<()> {
    let own = lab.on("arm", "cat /etc/sampan/config.yaml")?.ok()?;
    let line = format!(
        "join --ip 10.64.0.13 --user ops --ssh-key locked --server-ip {SERVER} --node-token abcdef.0123456789abcdef --wait 60"
    );
    // it is a member already: a machine that forgot its membership has to show the token
    lab.on("arm", "/etc/init.d/sampan-agent stop; rm -f /var/lib/sampan/agent/client-kubelet*")?.ok()?;
    let refused = lab.fails(&line, 8, &["refused to let node arm join"]);
    let back = format!("cat >/etc/sampan/config.yaml <<'END'\n{own}END\n/etc/init.d/sampan-agent restart");
    lab.on("arm", &back)?.ok()?;
    refused
}

fn upgrade_and_back(lab: &Lab) -> Result<()> {
    let next = lab.hub_tmp().join("next");
    std::fs::create_dir_all(&next)?;
    // another digest, the same program: bytes behind an ELF file's end mean nothing
    let mut bytes = std::fs::read(&lab.sampan)?;
    bytes.extend_from_slice(b"next");
    std::fs::write(next.join("sampan-amd64"), &bytes)?;
    drop(bytes);
    let way = "--ip 10.64.0.12 --user pi --ssh-password-file pi-password";
    let sum = |name: &str| -> Result<String> {
        let said = lab.on("arm64", &format!("sha256sum /usr/local/bin/{name}"))?.ok()?;
        Ok(said.split(' ').next().unwrap_or_default().to_string())
    };
    let first = sum("sampan")?;
    let ran = lab.sampan_within(&format!("upgrade {way} --binary-dir next"), 90)?;
    let told = ran.text();
    ran.ok()?;
    has(&told, "node arm64 is Ready")?;
    let second = sum("sampan")?;
    ensure!(first != second && sum("sampan.previous")? == first, "{told}");
    // a program that starts but is no node: the one before comes back by itself
    std::fs::copy("/bin/true", next.join("sampan-amd64"))?;
    let ran = lab.sampan_within(&format!("upgrade {way} --binary-dir next --wait 8"), 120)?;
    ensure!(ran.code == 8, "{} {}", ran.code, ran.text());
    has(&ran.text(), "going back to the version before")?;
    has(&ran.text(), "the one before runs again")?;
    ensure!(sum("sampan")? == second, "{}", ran.text());
    let ready = lab.sampan("ready --kubeconfig /tmp/kubeconfig --context lab --attempts 40 --pause 500ms")?;
    ready.ok().map(drop)
}

fn nothing_is_left(lab: &Lab) -> Result<()> {
    let ran = lab.sampan_within("uninstall --hosts hosts.yaml", 120)?;
    let told = ran.text();
    ran.ok()?;
    has(&told, "amd64: sampan is removed")?;
    for (node, _) in NODES {
        let traces = lab.traces(node)?;
        let left: Vec<&String> = traces
            .iter()
            .filter(|l| {
                l.contains("sampan") && l.as_str() != "/var/lib/sampan"
                    || l.contains("/pods")
                    || l.contains("spn")
            })
            .collect();
        ensure!(left.is_empty(), "left on {node}: {left:?}");
        let group = format!("sampan-lab/{}/{node}", lab.name);
        let kernel = format!(
            "nft list tables 2>/dev/null | grep sampan; ip -o addr show lo | grep '10\\.43\\.'; ip route | grep '10\\.42\\.'; \
             find /sys/fs/cgroup -path '*{group}/*' -type d 2>/dev/null | grep pod; true"
        );
        let kernel = lab.on(node, &kernel)?.ok()?;
        ensure!(kernel.trim().is_empty(), "left in the kernel of {node}: {kernel}");
        ensure!(
            lab.on(node, "[ -e /etc/sampan ] && ls -A /etc/sampan")?.out.trim().is_empty(),
            "/etc/sampan on {node}"
        );
    }
    let again = lab.sampan("uninstall --hosts hosts.yaml")?;
    has(&again.text(), "arm: sampan is not installed")?;
    ensure!(lab.folder.path().exists(), "the lab's folder");
    again.ok().map(drop)
}
