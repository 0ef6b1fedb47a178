//! The life of a cluster over SSH: made of bare machines, changed, upgraded, and made bare machines again.
use std::os::unix::fs::PermissionsExt;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use sampan_tests::boards::{self, Boards, Step};
use sampan_tests::{has, seconds};

const NODES: [(&str, &str); 3] = [("amd64", "10.64.0.11"), ("arm64", "10.64.0.12"), ("arm", "10.64.0.13")];
const SERVER: &str = "10.64.0.11";

const STEPS: &[Step] = &[
    ("plan_and_apply", plan_and_apply),
    ("apply_again_changes_nothing", apply_again_changes_nothing),
    ("what_a_server_gives", what_a_server_gives),
    ("pods_outlive_a_restart", pods_outlive_a_restart),
    ("half_done_is_done_again", half_done_is_done_again),
    ("refused_token", refused_token),
    ("skew_is_told_before", skew_is_told_before),
    ("upgrade_and_back", upgrade_and_back),
    ("nothing_is_left", nothing_is_left),
];

fn main() -> ExitCode {
    boards::run("fleet", &NODES, STEPS)
}

/// A root with a key; a user with a password for login and sudo; one with a locked key, behind the first.
const HOSTS: &str = "\
- {hostname: amd64, ip: 10.64.0.11, ssh-key: plain, node-label: [place=desk]}
- {hostname: arm64, ip: 10.64.0.12, user: pi, ssh-password-file: pi-password}
- {hostname: arm, ip: 10.64.0.13, user: ops, ssh-key: locked, ssh-jump: ops@10.64.0.11, node-taint: slow=yes:NoSchedule}
";
const APPLY: &str = "apply hosts.yaml --accept-new-host-keys --context lab";

fn plan_and_apply(lab: &Boards) -> Result<()> {
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

fn pid_of(lab: &Boards, node: &str, service: &str) -> Result<String> {
    Ok(lab.on(node, &format!("cat /run/{service}.pid"))?.ok()?.trim().to_string())
}

fn apply_again_changes_nothing(lab: &Boards) -> Result<()> {
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

fn what_a_server_gives(lab: &Boards) -> Result<()> {
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
fn pods_outlive_a_restart(lab: &Boards) -> Result<()> {
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

fn half_done_is_done_again(lab: &Boards) -> Result<()> {
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

fn refused_token(lab: &Boards) -> Result<()> {
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

/// An agent newer than its server is refused before anything is sent; so is a server's way back.
fn skew_is_told_before(lab: &Boards) -> Result<()> {
    for (folder, version) in [("newer", "0.2.0"), ("older", "0.0.9")] {
        std::fs::create_dir_all(lab.hub_tmp().join(folder))?;
        std::fs::write(lab.hub_tmp().join(folder).join("sampan-amd64"), lab.as_release(version, &[])?)?;
    }
    let agent = "--ip 10.64.0.12 --user pi --ssh-password-file pi-password";
    let before = lab.traces("arm64")?;
    let words =
        ["node arm64 must not be newer than its server", "upgrade the server first", "nothing was changed"];
    lab.fails(&format!("upgrade {agent} --binary-dir newer"), 6, &words)?;
    lab.fails(&format!("upgrade {agent} --binary-dir newer --dry-run"), 6, &words)?;
    lab.fails(
        "upgrade --hosts hosts.yaml --binary-dir older",
        6,
        &["server amd64 has 0.1.0", "cannot go back to 0.0.9"],
    )?;
    let all = lab.sampan("upgrade --hosts hosts.yaml --binary-dir newer --dry-run")?;
    let told = all.text();
    all.ok()?;
    for (node, _) in NODES {
        has(&told, &format!("{node}: would be upgraded: 0.2.0 (Kubernetes v1.36)"))?;
    }
    let forced =
        lab.sampan(&format!("upgrade {agent} --binary-dir newer --dry-run --ignore-preflight skew"))?;
    has(&forced.text(), "warning: node arm64 must not be newer")?;
    forced.ok()?;
    ensure!(before == lab.traces("arm64")?, "nothing was changed");
    Ok(())
}

fn upgrade_and_back(lab: &Boards) -> Result<()> {
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

fn nothing_is_left(lab: &Boards) -> Result<()> {
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
    again.ok().map(drop)
}
