//! Several servers on one etcd over SSH: made, joined, killed and upgraded, with agents that turn to whichever lives.
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use sampan_tests::boards::{self, Boards, Step};
use sampan_tests::etcd::{self, TLS_ENDPOINT as ENDPOINT};
use sampan_tests::image::BOX;
use sampan_tests::{has, seconds, wait_for};

const NODES: [(&str, &str); 3] =
    [("amd64", "10.64.0.11"), ("amd64-2", "10.64.0.12"), ("amd64-3", "10.64.0.13")];
const SERVERS: [&str; 2] = ["10.64.0.11", "10.64.0.12"];

const STEPS: &[Step] = &[
    ("several_servers_need_a_datastore", several_servers_need_a_datastore),
    ("two_servers_and_an_agent", two_servers_and_an_agent),
    ("either_server_reaches_all_nodes", either_server_reaches_all_nodes),
    ("apply_again_changes_nothing", apply_again_changes_nothing),
    ("one_server_dies", one_server_dies),
    ("an_agent_starts_without_its_server", an_agent_starts_without_its_server),
    ("it_comes_back", it_comes_back),
    ("upgrade_servers_first", upgrade_servers_first),
    ("a_server_leaves_and_joins", a_server_leaves_and_joins),
    ("nothing_is_left", nothing_is_left),
];

fn main() -> ExitCode {
    boards::run("fleet_servers", &NODES, STEPS)
}

const HOSTS: &str = "\
- {hostname: amd64, ip: 10.64.0.11, ssh-key: plain}
- {hostname: amd64-2, ip: 10.64.0.12, ssh-key: plain}
- {hostname: amd64-3, ip: 10.64.0.13, ssh-key: plain}
";
const APPLY: &str = "apply hosts.yaml --accept-new-host-keys --servers 2";
/// What etcd wants is in files here; the machines are given theirs.
const FILES: &str =
    "--datastore-cafile etcd-ca.crt --datastore-certfile etcd-client.crt --datastore-keyfile etcd-client.key";

fn several_servers_need_a_datastore(lab: &Boards) -> Result<()> {
    lab.write("hosts.yaml", HOSTS)?;
    let words = ["--datastore http://HOST:2379", "--token"];
    lab.fails(APPLY, 2, &words)?;
    lab.fails("plan hosts.yaml --servers 2", 2, &words)?;
    lab.fails("install --ip 10.64.0.11 --ssh-key plain --datastore http://e:2379", 2, &words[1..])?;
    let plan = lab.sampan(&format!("plan hosts.yaml --servers 2 --datastore {ENDPOINT} --token x"))?.ok()?;
    has(&plan, "--server \\\n")?;
    has(&plan, &format!("--datastore {ENDPOINT}"))
}

/// kubectl by way of one of the servers.
fn by(lab: &Boards, server: &str, args: &str) -> Result<String> {
    lab.kubectl(&format!("--server https://{server}:6443 --request-timeout=15s {args}"))
}

fn run_pod(lab: &Boards, server: &str, node: &str, name: &str) -> Result<()> {
    let pod = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  nodeName: {node}\n  terminationGracePeriodSeconds: 1\n  \
         containers:\n  - {{name: c, image: '{BOX}', command: [sh, -c, 'echo words of {name}; sleep 1000']}}\n"
    );
    lab.write("pod.yaml", &pod)?;
    // what is waited for is the service account, in the beginning
    let made = || anyhow::Ok(by(lab, server, "apply -f /tmp/pod.yaml"));
    wait_for(&format!("pod {name} to be made"), seconds(60), made)?;
    by(lab, server, &format!("wait --for=condition=Ready pod/{name} --timeout=60s")).map(drop)
}

/// Logs and exec, asked again while tunnels are being made.
fn reaches(lab: &Boards, server: &str, name: &str) -> Result<()> {
    wait_for(&format!("{server} to reach pod {name}"), seconds(45), || {
        let log = by(lab, server, &format!("logs {name}"))?;
        let said = by(lab, server, &format!("exec {name} -- echo hello"))?;
        Ok(match log.contains(&format!("words of {name}")) && said.contains("hello") {
            true => Ok(()),
            false => Err(format!("{log}{said}")),
        })
    })
}

fn endpoints(lab: &Boards, server: &str, want: &str) -> Result<()> {
    wait_for("the endpoints of the servers", seconds(60), || {
        let slices = "get endpointslices -n default -l kubernetes.io/service-name=kubernetes -o jsonpath={.items[*].endpoints[*].addresses[0]}";
        let said = by(lab, server, slices)?;
        let mut found: Vec<&str> = said.split_whitespace().collect();
        found.sort_unstable();
        let found = found.join(" ");
        Ok(if found == want { Ok(()) } else { Err(found) })
    })
}

fn give_image(lab: &Boards, node: &str) -> Result<()> {
    let images = lab.node_folder(node).join("data/agent/images");
    std::fs::create_dir_all(&images)?;
    sampan_tests::image::box_image()?.write_archive(&images.join("box.tar"))
}

fn two_servers_and_an_agent(lab: &Boards) -> Result<()> {
    let in_hub = |command: &[&str]| lab.lab(&[&["exec", "hub", "--"][..], command].concat(), 60);
    etcd::start_tls(in_hub, &lab.hub_tmp())?;
    for (node, _) in NODES {
        give_image(lab, node)?;
    }
    let ran = lab.sampan_within(&format!("{APPLY} --datastore {ENDPOINT} {FILES}"), 180)?;
    let told = ran.text();
    ran.ok()?;
    for (node, _) in NODES {
        has(&told, &format!("node {node} is Ready"))?;
    }
    for server in SERVERS {
        endpoints(lab, server, &SERVERS.join(" "))?;
        wait_for("the nodes", seconds(20), || {
            let nodes = by(lab, server, "get nodes --no-headers")?;
            let ready = nodes.lines().filter(|line| line.contains(" Ready ")).count();
            let control_planes = nodes.lines().filter(|line| line.contains("control-plane")).count();
            Ok(if (ready, control_planes) == (3, 2) { Ok(()) } else { Err(nodes) })
        })?;
    }
    // one token and one authority, whoever made them
    for path in ["token", "tls/server-ca.crt"] {
        let read = |node: &str| lab.on(node, &format!("cat /var/lib/sampan/server/{path}"))?.ok();
        let (one, other) = (read("amd64")?, read("amd64-2")?);
        ensure!(one == other, "{path}: {one} {other}");
    }
    Ok(())
}

fn either_server_reaches_all_nodes(lab: &Boards) -> Result<()> {
    for (node, _) in NODES {
        run_pod(lab, SERVERS[0], node, &format!("on-{node}"))?;
        for server in SERVERS {
            reaches(lab, server, &format!("on-{node}"))?;
        }
    }
    // the API's service leads to both, from a node that is none
    let ask = "import ssl, urllib.request as u; print(u.urlopen('https://10.43.0.1/version', timeout=5, context=ssl._create_unverified_context()).status)";
    for _ in 0..6 {
        let said = lab.on("amd64-3", &format!("python3 -c \"{ask}\""))?.ok()?;
        ensure!(said.trim() == "200", "{said}");
    }
    Ok(())
}

fn apply_again_changes_nothing(lab: &Boards) -> Result<()> {
    let ran = lab.sampan_within(&format!("{APPLY} --datastore {ENDPOINT} {FILES}"), 90)?;
    let told = ran.text();
    ran.ok()?;
    for line in
        ["amd64: sampan runs already", "amd64-2: sampan runs already", "amd64-3: sampan-agent runs already"]
    {
        has(&told, line)?;
    }
    Ok(())
}

/// As if its power was off: neither the program nor what starts it again says goodbye.
fn kill_first(lab: &Boards) -> Result<()> {
    let kill = "kill -9 $(cat /run/sampan.pid); for p in /proc/[0-9]*; do \
                tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^/usr/local/bin/sampan server' && kill -9 ${p#/proc/}; done; true";
    lab.on("amd64", kill)?.ok().map(drop)
}

fn one_server_dies(lab: &Boards) -> Result<()> {
    kill_first(lab)?;
    let other = SERVERS[1];
    // at once: it holds a tunnel to every node
    reaches(lab, other, "on-amd64-3")?;
    reaches(lab, other, "on-amd64-2")?;
    // the agent turns to it, and it schedules and controls
    run_pod(lab, other, "amd64-3", "later")?;
    reaches(lab, other, "later")?;
    // nobody knows yet that the dead server's node is gone: the scheduler would choose it, too
    by(lab, other, "cordon amd64")?;
    by(lab, other, &format!("create deployment d --image={BOX} --replicas=1 -- sleep 1000"))?;
    wait_for("a deployment by the server that is left", seconds(90), || {
        let count = by(lab, other, "get deployment d -o jsonpath={.status.readyReplicas}")?;
        Ok(if count == "1" { Ok(()) } else { Err(count) })
    })?;
    endpoints(lab, other, other)
}

/// The list of servers outlives the agent, and the server that it was told of.
fn an_agent_starts_without_its_server(lab: &Boards) -> Result<()> {
    has(&lab.on("amd64-3", "cat /etc/sampan/config.yaml")?.ok()?, "server: https://10.64.0.11:6443")?;
    lab.on("amd64-3", "/etc/init.d/sampan-agent restart")?.ok()?;
    run_pod(lab, SERVERS[1], "amd64-3", "after-restart")?;
    reaches(lab, SERVERS[1], "after-restart")?;
    wait_for("the kubeconfig to name the server that lives", seconds(10), || {
        let text = lab.on("amd64-3", "cat /var/lib/sampan/agent/kubelet.kubeconfig")?.ok()?;
        Ok(if text.contains("https://10.64.0.12:6443") { Ok(()) } else { Err(text) })
    })
}

fn it_comes_back(lab: &Boards) -> Result<()> {
    lab.on("amd64", "rm -f /run/sampan.pid; /etc/init.d/sampan start")?.ok()?;
    wait_for("the first server's API", seconds(60), || anyhow::Ok(by(lab, SERVERS[0], "get nodes")))?;
    endpoints(lab, SERVERS[0], &SERVERS.join(" "))?;
    by(lab, SERVERS[0], "uncordon amd64")?;
    for name in ["on-amd64", "on-amd64-2", "after-restart"] {
        reaches(lab, SERVERS[0], name)?;
    }
    // its node is reached by way of the other, too
    reaches(lab, SERVERS[1], "on-amd64")
}

fn upgrade_servers_first(lab: &Boards) -> Result<()> {
    let next = lab.hub_tmp().join("next");
    std::fs::create_dir_all(&next)?;
    // another digest, the same program: bytes behind an ELF file's end mean nothing
    let mut bytes = std::fs::read(&lab.sampan)?;
    bytes.extend_from_slice(b"next");
    std::fs::write(next.join("sampan-amd64"), &bytes)?;
    drop(bytes);
    let reversed: String = HOSTS.lines().rev().map(|line| format!("{line}\n")).collect();
    lab.write("reversed.yaml", &reversed)?;
    let ran = lab.sampan_within("upgrade --hosts reversed.yaml --binary-dir next", 180)?;
    let told = ran.text();
    ran.ok()?;
    let at = |node: &str| told.find(&format!("node {node} is Ready")).with_context(|| told.clone());
    let (one, other, agent) = (at("amd64")?, at("amd64-2")?, at("amd64-3")?);
    ensure!(one < agent && other < agent, "{told}");
    reaches(lab, SERVERS[0], "on-amd64-3")
}

fn a_server_leaves_and_joins(lab: &Boards) -> Result<()> {
    let way = "--ip 10.64.0.12 --ssh-key plain";
    let ran = lab.sampan_within(&format!("uninstall {way}"), 90)?;
    has(&ran.text(), "the cluster in the datastore")?;
    ran.ok()?;
    endpoints(lab, SERVERS[0], SERVERS[0])?;
    wait_for("the agent to hear of it", seconds(15), || {
        let kept = lab.on("amd64-3", "cat /var/lib/sampan/agent/servers.json")?.ok()?;
        Ok(if kept.contains(r#""live":["https://10.64.0.11:6443"]"#) { Ok(()) } else { Err(kept) })
    })?;
    give_image(lab, "amd64-2")?;
    let line =
        format!("join {way} --server --server-ip {} --server-ssh-key plain --binary-dir next", SERVERS[0]);
    let ran = lab.sampan_within(&line, 120)?;
    has(&ran.text(), "node amd64-2 is Ready")?;
    ran.ok()?;
    endpoints(lab, SERVERS[0], &SERVERS.join(" "))?;
    reaches(lab, SERVERS[1], "on-amd64-3")?;
    let config = lab.on("amd64-2", "cat /etc/sampan/config.yaml")?.ok()?;
    has(&config, &format!("datastore-endpoint: {ENDPOINT}"))
}

fn nothing_is_left(lab: &Boards) -> Result<()> {
    let ran = lab.sampan_within("uninstall --hosts hosts.yaml", 150)?;
    let told = ran.text();
    ran.ok()?;
    has(&told, "amd64-3: sampan is removed, with all that it kept\n")?;
    for (node, _) in NODES {
        let traces = lab.traces(node)?;
        let ours = |line: &&String| {
            line.contains("sampan") && line.as_str() != "/var/lib/sampan"
                || line.contains("/pods")
                || line.contains("spn")
        };
        let left: Vec<&String> = traces.iter().filter(ours).collect();
        ensure!(left.is_empty(), "left on {node}: {left:?}");
    }
    Ok(())
}
