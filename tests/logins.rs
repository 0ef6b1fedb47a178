//! Machines reached over SSH, and what must fail there and leave no trace: logins, host keys, sudo, preflight.
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use sampan_tests::boards::{self, Boards, PROGRAM, Step};
use sampan_tests::has;

const NODES: [(&str, &str); 3] = [("amd64", "10.64.0.11"), ("arm64", "10.64.0.12"), ("arm", "10.64.0.13")];
const SERVER: &str = "10.64.0.11";

const STEPS: &[Step] = &[
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
];

fn main() -> ExitCode {
    boards::run("logins", &NODES, STEPS)
}

fn wrong_password(lab: &Boards) -> Result<()> {
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

fn refused_key(lab: &Boards) -> Result<()> {
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

fn unknown_and_changed_host_key(lab: &Boards) -> Result<()> {
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

fn ways_to_log_in(lab: &Boards) -> Result<()> {
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
fn questions_at_a_terminal(lab: &Boards) -> Result<()> {
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

fn no_sudo(lab: &Boards) -> Result<()> {
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

fn unsupported_machine(lab: &Boards) -> Result<()> {
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

fn clock_off_by_a_year(lab: &Boards) -> Result<()> {
    let fake = "[ \"$1\" = +%s ] && echo $(($(/usr/bin/date +%s) - 31560000)) || /usr/bin/date \"$@\"";
    lab.with_fake("amd64", "date", fake, || {
        lab.leaves_no_trace("amd64", || {
            let line = format!("install --ip {SERVER} --ssh-key plain");
            lab.fails(&line, 6, &["its clock is 365 days behind ours", "date -s @"])
        })
    })
}

fn full_disk(lab: &Boards) -> Result<()> {
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

fn bad_lists(lab: &Boards) -> Result<()> {
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
