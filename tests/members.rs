//! Three servers that run etcd together: begun, joined, killed, left, joined again, reset.
//!
//! Upstream counterpart: K3s' tests/e2e/validatecluster and tests/docker/etcd. The lab's first node begins the cluster; the
//! other nodes' agents are ended and servers started in their place.
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sampan_tests::image::BOX;
use sampan_tests::process::Ran;
use sampan_tests::{Cluster, Space, Suite, cases, has, members, seconds, wait_for};
use sampan_world::clock;
use serde_json::{Value, json};

const SAMPAN: &str = "/run/sampan/bin/sampan";
const FIRST: &str = "amd64";
const SECOND: &str = "amd64-2";
const THIRD: &str = "amd64-3";
const ALL: [&str; 3] = [FIRST, SECOND, THIRD];

fn main() -> ExitCode {
    Suite::new("members", "amd64,amd64,amd64")
        .with_images()
        .server_arg("--cluster-init")
        .alone(cases![
            who_may_not_join,
            two_servers_join,
            a_certificate_is_renewed,
            etcd_is_started_again,
            a_server_that_dies_comes_back,
            a_member_leaves_with_its_node,
            it_joins_again,
            one_is_left_and_goes_on_alone,
        ])
        .limit_s(400)
        .run()
}

/// kubectl in a server's node, by its own API.
fn kubectl(s: &Cluster, node: &str, args: &[&str]) -> Result<Ran> {
    s.exec(node, &[&["kubectl", "--kubeconfig", "/etc/sampan/sampan.yaml"], args].concat())
}

fn told(s: &Cluster, node: &str, args: &[&str]) -> Result<String> {
    Ok(kubectl(s, node, args)?.ok()?.trim().to_string())
}

/// A script in a node; what it prints.
fn shell(s: &Cluster, node: &str, script: &str) -> Result<String> {
    s.exec(node, &["sh", "-c", script])?.ok()
}

fn ready(s: &Cluster, node: &str) -> Result<()> {
    let ready = wait_for(&format!("the server {node}"), seconds(60), || {
        let ran = kubectl(s, node, &["get", "--raw", "/readyz"])?;
        Ok(if ran.out.trim() == "ok" { Ok(()) } else { Err(ran.text()) })
    });
    ready.with_context(|| shell(s, node, "tail -n 30 /var/log/server.log").unwrap_or_default())
}

/// Starts a server in a node. Agents' configuration names the first one already.
fn begin_server(s: &Cluster, node: &str) -> Result<()> {
    let script = format!(
        "grep -v '^tls-san:\\|^write-kube' /etc/sampan/config.yaml >/etc/sampan/server.yaml\n\
         echo 'tls-san: [127.0.0.1, localhost]' >>/etc/sampan/server.yaml\n\
         setsid {SAMPAN} server --config /etc/sampan/server.yaml </dev/null >>/var/log/server.log 2>&1 &\n"
    );
    shell(s, node, &script).map(drop)
}

fn start_server(s: &Cluster, node: &str) -> Result<()> {
    begin_server(s, node)?;
    ready(s, node)
}

const SERVER_PID: &str = "pgrep -o -f '^/run/sampan/bin/sampan server'";
const ETCD_PID: &str = "pgrep -o -f '^[^ ]*etcd --data-dir=/var/lib/sampan/server/db/etcd'";

fn end_server(s: &Cluster, node: &str, signal: &str) -> Result<()> {
    shell(s, node, &format!("kill -{signal} $({SERVER_PID})"))?;
    wait_for(&format!("the end of the server {node}"), seconds(30), || {
        let ran = s.exec(node, &["sh", "-c", SERVER_PID])?;
        Ok(if ran.code == 0 { Err(ran.out) } else { Ok(()) })
    })
}

fn voters(s: &Cluster, through: &str, want: &[&str]) -> Result<()> {
    wait_for(&format!("the members {want:?}"), seconds(60), || {
        let ran = s.exec(through, &["sh", "-c", members::LIST])?;
        let seen = members::voters(&ran.out);
        let is_so = seen.as_ref().is_ok_and(|(names, learners)| names == want && *learners == 0);
        Ok(if is_so { Ok(()) } else { Err(format!("{seen:?} {}", ran.text())) })
    })
}

fn apply(s: &Cluster, through: &str, object: &Value) -> Result<()> {
    let script = format!(
        "cat <<'END' | kubectl --kubeconfig /etc/sampan/sampan.yaml apply -f - 2>&1\n{object}\nEND\n"
    );
    let applied = || {
        let ran = s.exec(through, &["sh", "-c", &script])?;
        Ok(if ran.code == 0 { Ok(()) } else { Err(ran.text()) })
    };
    wait_for("an object to be taken", seconds(30), applied)
}

/// Makes a Deployment through a server and waits until its pod runs on that server's node.
fn deploys(s: &Space, through: &str, name: &str, limit: Duration) -> Result<()> {
    let object = json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": name, "namespace": s.name},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": name}}, "template": {
            "metadata": {"labels": {"app": name}},
            "spec": {"terminationGracePeriodSeconds": 1, "nodeSelector": {"kubernetes.io/hostname": through},
                "containers": [{"name": "c", "image": BOX}]}}}});
    apply(s, through, &object)?;
    wait_for(&format!("the pod of {name}"), limit, || {
        let path = "jsonpath={.status.readyReplicas}";
        let ran = kubectl(s, through, &["-n", &s.name, "get", "deployment", name, "-o", path])?;
        Ok(if ran.out.trim() == "1" { Ok(()) } else { Err(ran.text()) })
    })
}

/// Of the processes that etcd is, in a node.
fn etcd_pid(s: &Cluster, node: &str) -> Result<String> {
    Ok(shell(s, node, ETCD_PID)?.trim().to_string())
}

fn who_may_not_join(s: &Space) -> Result<()> {
    voters(s, FIRST, &[FIRST])?;
    let roles = told(s, FIRST, &["get", "node", FIRST, "--no-headers"])?;
    has(&roles, "control-plane,etcd")?;
    let (token, first) = (s.token()?, "https://10.64.0.11:6443");
    let refused = |args: &[&str], want: &str| -> Result<()> {
        let common = ["timeout", "40", SAMPAN, "server", "--config", "/dev/null", "--disable-agent"];
        let place =
            ["--data-dir", "/tmp/other", "--node-name", "x", "--node-ip", "10.64.0.13", "-o", "/tmp/k"];
        let ran = s.exec(THIRD, &[&common[..], &place[..], args].concat())?;
        ensure!(ran.code == 1, "{args:?}: {} {}", ran.code, ran.text());
        has(&ran.text(), want)
    };
    let join = |token: &'static str| vec!["--server", first, "--token", token];
    refused(&join("wrong"), "does not know the token")?;
    refused(&join("abcdef.0123456789abcdef"), "lets agents join, not servers")?;
    refused(&["--server", first], "needs --token")?;
    let good = ["--server", first, "--token", &token];
    refused(&[&good[..], &["--etcd", "/nowhere/etcd"]].concat(), "package `etcd-server`")?;
    refused(
        &[&good[..], &["--cluster-cidr", "10.99.0.0/16"]].concat(),
        "--cluster-cidr is 10.99.0.0/16 here",
    )?;
    refused(&[&good[..], &["--node-name", FIRST]].concat(), "a member is called amd64 already")?;
    refused(&[&good[..], &["--cluster-init"]].concat(), "give one of them")?;
    refused(&["--cluster-reset"], "is for a server that is a member")?;
    voters(s, FIRST, &[FIRST])?;
    // nobody without a certificate speaks to etcd
    let ran = s.exec(THIRD, &["curl", "-ksS", "https://10.64.0.11:2379/health"])?;
    ensure!(ran.code != 0, "{}", ran.text());
    // somebody else has its port
    let occupy = "import socket, time; s = socket.create_server(('127.0.0.1', 2379)); time.sleep(60)";
    let script = format!(
        "setsid python3 -c \"{occupy}\" </dev/null >/dev/null 2>&1 & echo $! >/tmp/occupied\n\
         for i in $(seq 50); do grep -q ':094B 00000000:0000 0A' /proc/net/tcp && exit 0; sleep 0.1; done; exit 1"
    );
    shell(s, THIRD, &script)?;
    refused(&["--cluster-init", "--data-dir", "/tmp/occupied-port"], "address already in use")?;
    shell(s, THIRD, "kill $(cat /tmp/occupied); rm -rf /tmp/occupied*")?;
    // a cluster in SQLite can be neither joined nor turned into one
    let script = format!(
        "setsid {SAMPAN} server --config /dev/null --disable-agent --data-dir /tmp/sqlite --node-name y --node-ip 10.64.0.13 \
         --https-listen-port 7001 --token {token} -o /tmp/ksqlite </dev/null >/tmp/sqlite.log 2>&1 & echo $! >/tmp/sqlite.pid"
    );
    shell(s, THIRD, &script)?;
    let sqlite = ["--server", "https://10.64.0.13:7001", "--token", &token];
    refused(&sqlite, "keeps its cluster in SQLite, which no other server can join")?;
    shell(s, THIRD, "kill $(cat /tmp/sqlite.pid); rm -rf /tmp/other")?;
    wait_for("the end of that server", seconds(20), || {
        let ran = s.exec(THIRD, &["sh", "-c", "kill -0 $(cat /tmp/sqlite.pid)"])?;
        Ok(if ran.code == 0 { Err("it runs") } else { Ok(()) })
    })?;
    refused(&["--cluster-init", "--data-dir", "/tmp/sqlite"], "holds a cluster already, and --cluster-init")?;
    shell(s, THIRD, "rm -rf /tmp/other /tmp/sqlite").map(drop)
}

fn two_servers_join(s: &Space) -> Result<()> {
    for node in [SECOND, THIRD] {
        s.lab("stop", &[node])?.ok()?;
    }
    // at once: etcd takes one in after the other
    let start = clock::monotonic();
    for node in [SECOND, THIRD] {
        begin_server(s, node)?;
    }
    for node in [SECOND, THIRD] {
        ready(s, node)?;
        println!("  {node} has joined and serves after {:.1} s", start.elapsed().as_secs_f32());
    }
    for node in ALL {
        voters(s, node, &ALL)?;
    }
    for path in [
        "tls/server-ca.crt",
        "tls/server-ca.key",
        "tls/service-account.key",
        "tls/etcd/server-ca.key",
        "node-token",
    ] {
        let sum = |node| shell(s, node, &format!("sha256sum </var/lib/sampan/server/{path}"));
        let first = sum(FIRST)?;
        ensure!(sum(SECOND)? == first && sum(THIRD)? == first, "{path}");
    }
    for (from, to) in [(FIRST, SECOND), (SECOND, THIRD), (THIRD, FIRST)] {
        told(s, from, &["-n", &s.name, "create", "configmap", &format!("of-{from}")])?;
        told(s, to, &["-n", &s.name, "get", "configmap", &format!("of-{from}")])?;
    }
    wait_for("three servers' endpoints", seconds(30), || {
        let path = "jsonpath={.subsets[*].addresses[*].ip}";
        let seen = told(s, SECOND, &["get", "endpoints", "kubernetes", "-o", path])?;
        let is_so = seen.split(' ').count() == 3;
        Ok(if is_so { Ok(()) } else { Err(seen) })
    })?;
    deploys(s, THIRD, "through-the-third", seconds(40))
}

/// etcd takes it up with the next connection.
fn a_certificate_is_renewed(s: &Space) -> Result<()> {
    let file = "/var/lib/sampan/server/tls/etcd/member.crt";
    let (before, pid) = (shell(s, SECOND, &format!("cat {file}"))?, etcd_pid(s, SECOND)?);
    let said = s.exec(SECOND, &[SAMPAN, "certificate", "rotate", "--service", "etcd"])?.ok()?;
    has(&said, "etcd: renewed")?;
    let served = "openssl s_client -connect 127.0.0.1:2379 </dev/null 2>/dev/null | openssl x509";
    let after = shell(s, SECOND, served)?;
    ensure!(!before.contains(after.trim()), "the one before is served");
    has(&shell(s, SECOND, &format!("cat {file}"))?, after.trim())?;
    ensure!(etcd_pid(s, SECOND)? == pid, "without a restart");
    voters(s, SECOND, &ALL)
}

fn etcd_is_started_again(s: &Space) -> Result<()> {
    let before = etcd_pid(s, SECOND)?;
    shell(s, SECOND, &format!("kill -9 {before}"))?;
    wait_for("another etcd", seconds(20), || {
        let now = etcd_pid(s, SECOND).unwrap_or_default();
        Ok(if !now.is_empty() && now != before { Ok(()) } else { Err(now) })
    })?;
    ready(s, SECOND)?;
    has(&shell(s, SECOND, "grep 'etcd ended' /var/log/server.log")?, "starting it again")
}

fn a_server_that_dies_comes_back(s: &Space) -> Result<()> {
    // the one that leads the controllers, with its etcd
    let path = "jsonpath={.spec.holderIdentity}";
    let holder = told(s, FIRST, &["-n", "kube-system", "get", "lease", "kube-scheduler", "-o", path])?;
    let leader = ALL.into_iter().find(|node| holder.starts_with(&format!("{node}_"))).context(holder)?;
    let others: Vec<&str> = ALL.into_iter().filter(|node| *node != leader).collect();
    let start = clock::monotonic();
    shell(s, leader, &format!("kill -9 $({SERVER_PID}) $({ETCD_PID})"))?;
    deploys(s, others[0], "after-a-death", seconds(90))?;
    println!("  a leader with its etcd killed to a new pod Ready: {:.1} s", start.elapsed().as_secs_f32());
    start_server(s, leader)?;
    voters(s, leader, &ALL)?;
    // its server only: what is left of it is ended by the next one
    let before = etcd_pid(s, others[1])?;
    end_server(s, others[1], "KILL")?;
    ensure!(etcd_pid(s, others[1])? == before, "etcd goes on without its server");
    start_server(s, others[1])?;
    ensure!(etcd_pid(s, others[1])? != before, "another etcd");
    // and an end in order leaves nothing
    end_server(s, others[1], "TERM")?;
    ensure!(etcd_pid(s, others[1]).is_err(), "etcd ends with its server");
    start_server(s, others[1])
}

fn a_member_leaves_with_its_node(s: &Space) -> Result<()> {
    told(s, FIRST, &["delete", "node", THIRD])?;
    voters(s, FIRST, &[FIRST, SECOND])?;
    wait_for("the end of its server", seconds(40), || {
        let ran = s.exec(THIRD, &["sh", "-c", SERVER_PID])?;
        Ok(if ran.code == 0 { Err(ran.out) } else { Ok(()) })
    })?;
    has(
        &shell(s, THIRD, "tail -n 5 /var/log/server.log")?,
        "this server's etcd was removed from the cluster",
    )?;
    deploys(s, SECOND, "two-are-left", seconds(40))
}

fn it_joins_again(s: &Space) -> Result<()> {
    // with what it has it is refused; a folder without etcd's data needs a server to join
    shell(s, THIRD, "rm -rf /var/lib/sampan/server/db")?;
    let command = ["timeout", "40", SAMPAN, "server", "--config", "/dev/null", "--node-name", THIRD];
    let ran = s.exec(THIRD, &command)?;
    ensure!(ran.code == 1, "{}", ran.text());
    has(&ran.text(), "give --server https://ANOTHER-SERVER:6443")?;
    // broken off while it joins: the member that never began is taken up
    begin_server(s, THIRD)?;
    std::thread::sleep(Duration::from_millis(700));
    let _ = s.exec(THIRD, &["sh", "-c", &format!("kill -9 $({SERVER_PID}) $({ETCD_PID})")])?;
    start_server(s, THIRD)?;
    voters(s, THIRD, &ALL)?;
    deploys(s, THIRD, "three-again", seconds(40))
}

fn one_is_left_and_goes_on_alone(s: &Space) -> Result<()> {
    told(s, FIRST, &["-n", &s.name, "create", "configmap", "stays"])?;
    for node in [SECOND, THIRD] {
        shell(s, node, &format!("kill -9 $({SERVER_PID}) $({ETCD_PID})"))?;
    }
    let reset = [SAMPAN, "server", "--cluster-reset"];
    let ran = s.exec(FIRST, &reset)?;
    ensure!(ran.code == 1, "{}", ran.text());
    has(&ran.text(), "--cluster-reset needs the server stopped")?;
    end_server(s, FIRST, "TERM")?;
    has(&s.exec(FIRST, &reset)?.ok()?, "start it again without --cluster-reset")?;
    start_server(s, FIRST)?;
    voters(s, FIRST, &[FIRST])?;
    told(s, FIRST, &["-n", &s.name, "get", "configmap", "stays"])?;
    shell(s, SECOND, "rm -rf /var/lib/sampan/server/db")?;
    start_server(s, SECOND)?;
    voters(s, FIRST, &[FIRST, SECOND])?;
    told(s, SECOND, &["-n", &s.name, "get", "configmap", "stays"])?;
    // one of two that leaves does so in order
    let left = s.exec(SECOND, &[SAMPAN, "leave"])?;
    has(&left.text(), "has left its cluster")?;
    voters(s, FIRST, &[FIRST])?;
    deploys(s, FIRST, "alone", seconds(60))
}
