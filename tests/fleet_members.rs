//! Servers that run etcd together, over SSH: made, one of them removed and joined again, all removed.
//!
//! Upstream counterpart: k3sup's `install --cluster` and `join --server`. The third machine has no etcd of its own.
use std::process::ExitCode;

use anyhow::{Result, ensure};
use sampan_tests::boards::{self, Boards, Step};
use sampan_tests::{etcd, has, members, seconds, wait_for};

const NODES: [(&str, &str); 3] =
    [("amd64", "10.64.0.11"), ("amd64-2", "10.64.0.12"), ("amd64-3", "10.64.0.13")];

const STEPS: &[Step] = &[
    ("a_machine_without_etcd_is_refused", a_machine_without_etcd_is_refused),
    ("three_servers", three_servers),
    ("apply_again_changes_nothing", apply_again_changes_nothing),
    ("none_leaves_that_is_needed", none_leaves_that_is_needed),
    ("a_server_leaves_and_joins", a_server_leaves_and_joins),
    ("nothing_is_left", nothing_is_left),
];

fn main() -> ExitCode {
    boards::run("fleet_members", &NODES, STEPS)
}

const HOSTS: &str = "\
- {hostname: amd64, ip: 10.64.0.11, ssh-key: plain}
- {hostname: amd64-2, ip: 10.64.0.12, ssh-key: plain}
- {hostname: amd64-3, ip: 10.64.0.13, ssh-key: plain}
";
const APPLY: &str = "apply hosts.yaml --accept-new-host-keys --servers 3 --cluster";

fn voters(lab: &Boards, through: &str, want: &[&str]) -> Result<()> {
    wait_for(&format!("the members {want:?}"), seconds(40), || {
        let ran = lab.on(through, members::LIST)?;
        let seen = members::voters(&ran.out);
        let is_so = seen.as_ref().is_ok_and(|(names, learners)| names == want && *learners == 0);
        Ok(if is_so { Ok(()) } else { Err(format!("{seen:?} {}", ran.text())) })
    })
}

fn a_machine_without_etcd_is_refused(lab: &Boards) -> Result<()> {
    lab.write("hosts.yaml", HOSTS)?;
    let hide =
        "for f in $(command -v etcd); do mount --bind /dev/null $(readlink -f $f); done; ! command -v etcd";
    lab.on("amd64-3", hide)?.ok()?;
    lab.fails(
        APPLY,
        6,
        &["amd64-3: error: there is no program `etcd`", "etcd-server", "nothing was installed on any"],
    )?;
    for (node, _) in NODES {
        let traces = lab.traces(node)?;
        ensure!(!traces.iter().any(|line| line.contains("/usr/local/bin/sampan")), "{traces:?}");
    }
    let plan = lab.sampan("plan hosts.yaml --servers 3 --cluster")?.ok()?;
    has(&plan, "sampan install --host 10.64.0.11")?;
    has(&plan, "--server \\\n  --cluster")
}

fn three_servers(lab: &Boards) -> Result<()> {
    let with = lab.hub_tmp().join("with");
    std::fs::create_dir_all(&with)?;
    let own =
        lab.lab(&["exec", "hub", "--", "sh", "-c", &format!("command -v {}", etcd::program())], 20)?.ok()?;
    std::fs::copy(std::fs::canonicalize(own.trim())?, with.join("etcd-amd64"))?;
    let ran = lab.sampan_within(&format!("{APPLY} --binary-dir with"), 180)?;
    let told = ran.text();
    ran.ok()?;
    for want in ["amd64-3: etcd is sent and verified", "node amd64-2 is Ready", "3 nodes are set up"] {
        has(&told, want)?;
    }
    ensure!(!told.contains("amd64-2: etcd is sent"), "{told}");
    has(&lab.on("amd64-3", "cat /etc/sampan/config.yaml")?.ok()?, "etcd: /usr/local/bin/sampan-etcd")?;
    for (node, ip) in NODES {
        voters(lab, node, &["amd64", "amd64-2", "amd64-3"])?;
        let nodes = lab.kubectl(&format!("--server https://{ip}:6443 get nodes --no-headers"))?;
        ensure!(nodes.matches("control-plane,etcd").count() == 3, "{nodes}");
    }
    // one token, which nobody chose
    let token = |node| lab.on(node, "cat /var/lib/sampan/server/token")?.ok();
    ensure!(token("amd64")? == token("amd64-3")?);
    Ok(())
}

fn apply_again_changes_nothing(lab: &Boards) -> Result<()> {
    let ran = lab.sampan_within(APPLY, 90)?;
    let told = ran.text();
    ran.ok()?;
    NODES.iter().try_for_each(|(node, _)| has(&told, &format!("{node}: sampan runs already")))
}

/// With one of three gone, each of the others is needed.
fn none_leaves_that_is_needed(lab: &Boards) -> Result<()> {
    lab.on("amd64", "/etc/init.d/sampan stop")?.ok()?;
    let words = ["without this server's etcd member the cluster could decide nothing"];
    lab.fails("uninstall --ip 10.64.0.12 --ssh-key plain", 1, &words)?;
    lab.on("amd64", "/etc/init.d/sampan start")?.ok()?;
    voters(lab, "amd64", &["amd64", "amd64-2", "amd64-3"])
}

fn a_server_leaves_and_joins(lab: &Boards) -> Result<()> {
    let way = "--ip 10.64.0.12 --ssh-key plain";
    let ran = lab.sampan_within(&format!("uninstall {way}"), 90)?;
    has(&ran.text(), "its member of the cluster's etcd")?;
    ran.ok()?;
    voters(lab, "amd64", &["amd64", "amd64-3"])?;
    let line = format!("join {way} --server --server-ip 10.64.0.11 --server-ssh-key plain");
    let ran = lab.sampan_within(&line, 120)?;
    has(&ran.text(), "node amd64-2 is Ready")?;
    ran.ok()?;
    has(&lab.on("amd64-2", "cat /etc/sampan/config.yaml")?.ok()?, "server: https://10.64.0.11:6443")?;
    voters(lab, "amd64-2", &["amd64", "amd64-2", "amd64-3"])
}

fn nothing_is_left(lab: &Boards) -> Result<()> {
    // the first of the list goes last, with the cluster
    let ran = lab.sampan_within("uninstall --hosts hosts.yaml", 150)?;
    ran.ok()?;
    for (node, _) in NODES {
        let traces = lab.traces(node)?;
        let ours = |line: &&String| {
            line.contains("sampan") && line.as_str() != "/var/lib/sampan"
                || line.contains("/pods")
                || line.contains("spn")
        };
        let left: Vec<&String> = traces.iter().filter(ours).collect();
        ensure!(left.is_empty(), "left on {node}: {left:?}");
        let etcd = lab.on(node, "pgrep -af '^[^ ]*etcd --data-dir=/var/lib/sampan'; true")?.ok()?;
        ensure!(etcd.is_empty(), "{etcd}");
    }
    Ok(())
}
