//! Faults: the server and agents killed at work, a node cut off, a clock that jumps, joiners that must not join.
//!
//! Upstream counterpart: test/e2e/apps/disruption.go, test/e2e/node, and what k3s tests around its agents.
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};
use sampan_tests::image::BOX;
use sampan_tests::{Cluster, Space, Suite, cases, has, seconds, wait_for};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::new("faults", "amd64,amd64")
        .with_images()
        .together(cases![join_with_wrong_credentials])
        .alone(cases![
            server_killed_under_write_load,
            agent_killed_while_pods_run,
            server_away_while_pods_run,
            manifests_folder,
            clock_jumps,
            node_cut_off_and_back,
        ])
        .limit_s(300)
        .run()
}

fn pod_on(node: &str, name: &str, command: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
        "nodeName": node, "terminationGracePeriodSeconds": 1,
        "tolerations": [{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 2},
            {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 2}],
        "containers": [{"name": "c", "image": BOX, "command": ["sh", "-c", command]}]}})
}

fn ready_condition(s: &Space, node: &str) -> Result<Value> {
    let node = s.get(&format!("/api/v1/nodes/{node}"))?.ok()?;
    let all = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
    all.into_iter().find(|c| c["type"] == "Ready").context("a Ready condition")
}

fn wait_ready(s: &Space, node: &str) -> Result<()> {
    wait_for(&format!("{node} to be Ready"), seconds(40), || {
        let ready = ready_condition(s, node)?;
        Ok(if ready["status"] == "True" { Ok(()) } else { Err(ready) })
    })
}

fn join_with_wrong_credentials(s: &Space) -> Result<()> {
    let join = |token: &str, node: &str| {
        let folder = format!("/tmp/{node}");
        s.exec(
            "hub",
            &[
                "timeout",
                "20",
                "/run/sampan/bin/sampan",
                "agent",
                "--config",
                "/dev/null",
                "--server",
                "https://10.64.0.11:6443",
                "--token",
                token,
                "--node-name",
                node,
                "--node-ip",
                "10.64.0.1",
                "--data-dir",
                &folder,
            ],
        )
    };
    join("wrong-secret", "wrong-token")?.refused("refused to let node wrong-token join: Unauthorized")?;
    let other = format!("K10{}::server:{}", "0".repeat(64), s.token()?);
    join(&other, "wrong-authority")?.refused("its certificate authority differs")?;
    join("K10zz::", "malformed")?.refused("--token")?;
    join("abcdef.0123456789abcdef", "unknown-token")?.refused("Unauthorized")?;
    // a name belongs to the machine that used it first
    join(&s.token()?, "amd64-2")?.refused("refused to let node amd64-2 join")?;
    for node in ["wrong-token", "wrong-authority", "malformed", "unknown-token"] {
        s.get(&format!("/api/v1/nodes/{node}"))?.is(404, "NotFound", node)?;
    }
    Ok(())
}

/// What writers were told: name, and revision after its last acknowledged write with the value written.
type Acknowledged = Arc<Mutex<Vec<(String, u64, u64)>>>;

/// Creates and updates until told to stop; a write whose answer did not come is not counted.
fn writer(cluster: &Cluster, namespace: &str, number: usize, stop: &AtomicBool, acknowledged: &Acknowledged) {
    let base = format!("/api/v1/namespaces/{namespace}/configmaps");
    let mut count = 0_u64;
    while !stop.load(Ordering::Relaxed) && count < 20_000 {
        count += 1;
        let name = format!("w{number}-{}", count / 3);
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"v": count.to_string()}});
        let written = match count % 3 {
            0 => cluster.post(&base, &object),
            _ => cluster.put(&format!("{base}/{name}"), &object),
        };
        match written.and_then(sampan_tests::Answer::ok) {
            Ok(answer) => {
                let revision = answer["metadata"]["resourceVersion"].as_str().and_then(|r| r.parse().ok());
                if let (Some(revision), Ok(mut all)) = (revision, acknowledged.lock()) {
                    all.push((name, revision, count));
                }
            }
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(20)),
        }
    }
}

fn server_killed_under_write_load(s: &Space) -> Result<()> {
    let acknowledged = Acknowledged::default();
    let stop = Arc::new(AtomicBool::new(false));
    let before = s
        .post(
            &s.path("configmaps"),
            &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "first"}}),
        )?
        .ok()?;
    let writers: Vec<_> = (0..4)
        .map(|number| {
            let (cluster, name) = (s.cluster.clone(), s.name.clone());
            let (stop, acknowledged) = (stop.clone(), acknowledged.clone());
            std::thread::spawn(move || writer(&cluster, &name, number, &stop, &acknowledged))
        })
        .collect();
    let kills = (0..4).try_for_each(|round: u64| {
        std::thread::sleep(std::time::Duration::from_millis(700 + 170 * round));
        s.lab("stop", &["amd64", "--kill"])?.ok()?;
        s.lab("start", &["amd64"])?.ok()?;
        s.wait_until_served()
    });
    stop.store(true, Ordering::Relaxed);
    writers.into_iter().try_for_each(|w| w.join().map_err(|_| anyhow::anyhow!("a writer died")))?;
    kills?;
    let all = acknowledged.lock().map(|a| a.clone()).unwrap_or_default();
    ensure!(all.len() > 100, "only {} writes were acknowledged: no load", all.len());
    // no revision was given twice, and none before what came first
    let revisions: BTreeSet<u64> = all.iter().map(|(_, revision, _)| *revision).collect();
    ensure!(revisions.len() == all.len(), "{} revisions for {} writes", revisions.len(), all.len());
    let first: u64 = before["metadata"]["resourceVersion"].as_str().unwrap_or_default().parse()?;
    ensure!(revisions.first() > Some(&first), "a revision went back");
    let list = s.object("configmaps")?;
    let newest: u64 = list["metadata"]["resourceVersion"].as_str().unwrap_or_default().parse()?;
    ensure!(
        Some(&newest) >= revisions.last(),
        "the list is at {newest}, a write was told {:?}",
        revisions.last()
    );
    let found: std::collections::BTreeMap<&str, &Value> = list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|item| Some((item["metadata"]["name"].as_str()?, item)))
        .collect();
    for (name, revision, value) in &all {
        let Some(item) = found.get(name.as_str()) else {
            bail!("{name}, acknowledged at {revision}, is lost")
        };
        let now: u64 = item["data"]["v"].as_str().unwrap_or_default().parse()?;
        // an unacknowledged write may have come after, an older one may not be back
        ensure!(now >= *value, "{name} is back at {now}, {value} was acknowledged at {revision}");
    }
    wait_ready(s, "amd64")?;
    wait_ready(s, "amd64-2")
}

/// What lies in <data>/server/manifests is applied, applied again and pruned, also what changed while the server was gone.
fn manifests_folder(s: &Space) -> Result<()> {
    const FOLDER: &str = "/var/lib/sampan/server/manifests";
    let put = |file: &str, maps: &[(&str, &str)]| {
        let one = |(name, value): &(&str, &str)| {
            format!(
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: {}}}\ndata: {{v: {value}}}\n---\n",
                s.name
            )
        };
        let text: String = maps.iter().map(one).collect();
        s.exec("amd64", &["sh", "-c", &format!("cat > {FOLDER}/{file} <<'E'\n{text}E")])?.ok()
    };
    let is = |name: &str, want: Option<&str>| {
        wait_for(&format!("{name} to be {want:?}"), seconds(20), || {
            let answer = s.get(&s.path(&format!("configmaps/{name}")))?;
            let value = answer.json()["data"]["v"].as_str().map(str::to_string);
            let found = (answer.code == 200).then_some(value).flatten();
            Ok(if found.as_deref() == want { Ok(()) } else { Err(format!("{found:?}")) })
        })
    };
    s.exec("amd64", &["sh", "-c", &format!("echo 'kind: [' > {FOLDER}/broken.yaml")])?.ok()?;
    put("two.yaml", &[("one", "a"), ("other", "a")])?;
    is("one", Some("a"))?;
    is("other", Some("a"))?;
    put("two.yaml", &[("one", "b")])?;
    is("one", Some("b"))?;
    is("other", None)?;
    put("three.yaml", &[("third", "a")])?;
    is("third", Some("a"))?;
    s.lab("stop", &["amd64", "--kill"])?.ok()?;
    s.exec("amd64", &["rm", &format!("{FOLDER}/two.yaml"), &format!("{FOLDER}/broken.yaml")])?.ok()?;
    put("three.yaml", &[("third", "b")])?;
    s.lab("start", &["amd64"])?.ok()?;
    s.wait_until_served()?;
    is("one", None)?;
    is("third", Some("b"))?;
    s.exec("amd64", &["rm", &format!("{FOLDER}/three.yaml")])?.ok()?;
    is("third", None)
}

fn agent_killed_while_pods_run(s: &Space) -> Result<()> {
    let command = "echo started; i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.5; done";
    s.post(&s.path("pods"), &pod_on("amd64-2", "stays", command))?.ok()?;
    s.post(&s.path("pods"), &pod_on("amd64-2", "ends", "sleep 8; exit 5"))?.ok()?;
    let before = s.running("stays")?;
    s.running("ends")?;
    let id = |pod: &Value| pod["status"]["containerStatuses"][0]["containerID"].clone();
    s.lab("stop", &["amd64-2", "--kill"])?.ok()?;
    // one ends while nobody watches
    std::thread::sleep(seconds(9));
    s.lab("start", &["amd64-2"])?.ok()?;
    wait_ready(s, "amd64-2")?;
    // its exit was kept, and it was started again, once
    s.pod("ends", seconds(40), |pod| {
        let status = &pod["status"]["containerStatuses"][0];
        let last = [&status["lastState"]["terminated"], &status["state"]["terminated"]];
        last.into_iter().any(|t| t["exitCode"] == 5).then_some(())
    })?;
    let after = s.running("stays")?;
    ensure!(id(&after) == id(&before), "the same container: {} then {}", id(&before), id(&after));
    ensure!(after["status"]["containerStatuses"][0]["restartCount"] == 0, "{}", after["status"]);
    // its log has no gap, and exec works again
    let log = wait_for("the log through the new connection", seconds(10), || {
        let ran = s.try_k(&["logs", "stays"])?;
        Ok(if ran.code == 0 { Ok(ran.out) } else { Err(ran.text()) })
    })?;
    let ticks: Vec<u32> = log.lines().filter_map(|l| l.strip_prefix("tick ")?.parse().ok()).collect();
    ensure!(ticks.len() > 18 && ticks.windows(2).all(|w| w[1] == w[0] + 1), "{log}");
    ensure!(s.k(&["exec", "stays", "--", "echo", "again"])? == "again\n", "exec");
    s.k(&["delete", "pod", "stays", "--wait", "--timeout=20s"]).map(drop)
}

fn server_away_while_pods_run(s: &Space) -> Result<()> {
    s.post(&s.path("pods"), &pod_on("amd64-2", "restarts", "sleep 3; exit 1"))?.ok()?;
    s.post(&s.path("pods"), &pod_on("amd64", "on-the-server", "sleep 1000"))?.ok()?;
    s.running("restarts")?;
    let before = s.running("on-the-server")?;
    s.lab("stop", &["amd64"])?.ok()?;
    let refused = s.kubectl_within(&["get", "nodes", "--request-timeout=3s"], "", seconds(15))?;
    ensure!(refused.code != 0, "nobody answers");
    // the node goes on by itself: its pod ends and is started again
    std::thread::sleep(seconds(6));
    s.lab("start", &["amd64"])?.ok()?;
    s.wait_until_served()?;
    s.pod("restarts", seconds(40), |pod| {
        (pod["status"]["containerStatuses"][0]["restartCount"].as_u64() >= Some(1)).then_some(())
    })?;
    let after = s.running("on-the-server")?;
    let id = |pod: &Value| pod["status"]["containerStatuses"][0]["containerID"].clone();
    ensure!(id(&before) == id(&after), "the server's own pods stay too");
    // and the server reaches the node again
    wait_for("exec through the new connection", seconds(30), || {
        let ran = s.try_k(&["exec", "restarts", "--", "true"])?;
        Ok(if ran.code == 0 { Ok(()) } else { Err(ran.text()) })
    })
}

fn clock_jumps(s: &Space) -> Result<()> {
    let token = s.sampan(&["token", "create", "--ttl", "1h"])?.ok()?.trim().to_string();
    s.post(&s.path("pods"), &pod_on("amd64-2", "p", "sleep 1000"))?.ok()?;
    let before = s.running("p")?;
    let made = |s: &Space, name: &str| -> Result<Value> {
        let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}});
        Ok(s.post(&s.path("configmaps"), &body)?.ok()?["metadata"].clone())
    };
    let revision =
        |v: &Value| v["resourceVersion"].as_str().and_then(|r| r.parse::<u64>().ok()).unwrap_or_default();
    let now = made(s, "now")?;
    for node in ["amd64", "amd64-2"] {
        s.lab("clock", &[node, "7200"])?.ok()?;
    }
    let jumped = (|| {
        let later = made(s, "later")?;
        let stamps = (now["creationTimestamp"].as_str(), later["creationTimestamp"].as_str());
        ensure!(stamps.0 < stamps.1 && revision(&now) < revision(&later), "{now} {later}");
        // what has expired by the new clock is refused
        let joined = s.exec(
            "hub",
            &[
                "timeout",
                "20",
                "/run/sampan/bin/sampan",
                "agent",
                "--config",
                "/dev/null",
                "--server",
                "https://10.64.0.11:6443",
                "--token",
                &token,
                "--node-name",
                "late",
                "--node-ip",
                "10.64.0.1",
                "--data-dir",
                "/tmp/late",
            ],
        )?;
        joined.refused("Unauthorized")?;
        has(&s.sampan(&["token", "list"])?.ok()?, "TOKEN")?;
        for node in ["amd64", "amd64-2"] {
            s.lab("clock", &[node, "-7200"])?.ok()?;
        }
        let back = made(s, "back")?;
        ensure!(revision(&later) < revision(&back), "revisions go on when the clock goes back");
        // nothing was evicted, nodes are heard of all the time
        std::thread::sleep(seconds(5));
        for node in ["amd64", "amd64-2"] {
            ensure!(ready_condition(s, node)?["status"] == "True", "{node}");
        }
        let after = s.running("p")?;
        ensure!(after["metadata"]["uid"] == before["metadata"]["uid"], "the same pod");
        ensure!(s.k(&["exec", "p", "--", "echo", "fine"])? == "fine\n", "exec");
        Ok(())
    })();
    for node in ["amd64", "amd64-2"] {
        s.lab("clock", &[node, "0"])?.ok()?;
    }
    jumped
}

fn node_cut_off_and_back(s: &Space) -> Result<()> {
    s.post(&s.path("pods"), &pod_on("amd64-2", "evicted", "sleep 1000"))?.ok()?;
    let mut daemon = pod_on("amd64-2", "tolerant", "sleep 1000");
    daemon["spec"]["tolerations"] = json!([{"operator": "Exists"}]);
    s.post(&s.path("pods"), &daemon)?.ok()?;
    s.running("evicted")?;
    let before = s.running("tolerant")?;
    s.lab("cut", &["amd64-2"])?.ok()?;
    let cut = (|| {
        wait_for("the node's silence to be noticed", seconds(75), || {
            let ready = ready_condition(s, "amd64-2")?;
            Ok(if ready["status"] == "Unknown" && ready["reason"] == "NodeStatusUnknown" {
                Ok(())
            } else {
                Err(ready)
            })
        })?;
        let message = ready_condition(s, "amd64-2")?["message"].to_string();
        has(&message, "Kubelet stopped posting node status.")?;
        wait_for("the taint", seconds(10), || {
            let node = s.get("/api/v1/nodes/amd64-2")?.ok()?;
            let taints = node["spec"]["taints"].to_string();
            let good = taints.contains("node.kubernetes.io/unreachable") && taints.contains("NoExecute");
            Ok(if good { Ok(()) } else { Err(taints) })
        })?;
        // deleted for good only once the node is back to confirm it
        s.pod("evicted", seconds(30), |pod| pod["metadata"]["deletionTimestamp"].as_str().map(|_| ()))?;
        s.pod("tolerant", seconds(10), |pod| {
            let conditions = pod["status"]["conditions"].as_array()?;
            conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "False").then_some(())
        })?;
        ensure!(s.object("pods/tolerant")?["metadata"].get("deletionTimestamp").is_none(), "tolerated");
        s.try_k(&["exec", "tolerant", "--request-timeout=5s", "--", "true"])?.refused("")
    })();
    s.lab("heal", &["amd64-2"])?.ok()?;
    cut?;
    wait_ready(s, "amd64-2")?;
    wait_for("the evicted pod to be gone", seconds(30), || {
        let left = s.get(&s.path("pods/evicted"))?;
        Ok(if left.code == 404 { Ok(()) } else { Err(left.json()["metadata"].to_string()) })
    })?;
    let after = s.running("tolerant")?;
    ensure!(
        after["status"]["containerStatuses"][0]["containerID"]
            == before["status"]["containerStatuses"][0]["containerID"],
        "it ran on"
    );
    wait_for("exec through the healed wire", seconds(40), || {
        let ran = s.try_k(&["exec", "tolerant", "--", "true"])?;
        Ok(if ran.code == 0 { Ok(()) } else { Err(ran.text()) })
    })?;
    let node = s.get("/api/v1/nodes/amd64-2")?.ok()?;
    ensure!(!node["spec"]["taints"].to_string().contains("unreachable"), "{}", node["spec"]["taints"]);
    Ok(())
}
