//! Certificates that are renewed, replaced and expire while the cluster works, and tokens that change.
//!
//! Upstream counterpart: what K3s tests in tests/docker/cacerts, snapshotrestore's token cases and e2e rotateca. What is
//! checked is what an owner would see: nothing restarts, watches and logs go on, nodes stay Ready.
use std::process::{Child, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sampan_tests::cluster::Setup;
use sampan_tests::image::BOX;
use sampan_tests::process::Ran;
use sampan_tests::{Cluster, Space, Suite, cases, has, seconds, wait_for};
use serde_json::{Value, json};

const SAMPAN: &str = "/run/sampan/bin/sampan";
const DAY: i64 = 86_400;

fn main() -> ExitCode {
    Suite::new("certificates", "amd64,amd64")
        .with_images()
        .alone(cases![
            check_tells_how_certificates_stand,
            rotate_needs_no_restart,
            a_new_name_at_a_restart,
            the_token_changes,
            another_authority_signs,
            a_board_from_the_drawer,
            renewed_while_watches_and_logs_go_on,
        ])
        .limit_s(400)
        .run()
}

fn sampan(s: &Cluster, node: &str, args: &[&str]) -> Result<Ran> {
    s.exec(node, &[&[SAMPAN], args].concat())
}

/// What `sampan certificate check` tells of one service of a node.
fn told(s: &Cluster, node: &str, service: &str) -> Result<Value> {
    let ran = sampan(s, node, &["certificate", "check", "-o", "json", "--service", service])?.ok()?;
    let all: Value = serde_json::from_str(&ran)?;
    Ok(all["Certificates"][0].clone())
}

fn expiry(s: &Cluster, node: &str, service: &str) -> Result<String> {
    Ok(told(s, node, service)?["ExpiryTime"].as_str().context("an expiry")?.to_string())
}

fn file(s: &Cluster, node: &str, path: &str) -> Result<String> {
    s.exec(node, &["cat", path])?.ok()
}

const AGENT: &str = "/var/lib/sampan/agent/client-kubelet.crt";
const SERVING: &str = "/var/lib/sampan/server/tls/serving-apiserver.crt";
const NODE_TOKEN: &str = "/var/lib/sampan/server/node-token";

fn pid_of(s: &Cluster, node: &str) -> Result<String> {
    let found = s.exec(node, &["pgrep", "-o", "-f", &format!("^{SAMPAN} (server|agent)")])?.ok()?;
    Ok(found.trim().to_string())
}

/// A command that goes on, and what it has printed.
struct Following {
    child: Child,
    path: std::path::PathBuf,
}

impl Following {
    fn kubectl(s: &Cluster, namespace: &str, name: &str, args: &[&str]) -> Result<Self> {
        let path = s.folder().join(name);
        let file = std::fs::File::create(&path)?;
        let mut command = s.kubectl_command();
        command.args(["-n", namespace]).args(args).stdin(Stdio::null());
        let child = command.stdout(file.try_clone()?).stderr(file).spawn()?;
        Ok(Self { child, path })
    }

    fn said(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.path)?)
    }

    /// Waits until it says so; it must not have ended.
    fn says(&mut self, want: &str) -> Result<()> {
        wait_for(&format!("{} to say {want}", self.path.display()), seconds(10), || {
            let said = self.said()?;
            Ok(if said.contains(want) { Ok(()) } else { Err(said) })
        })?;
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}: {}", self.path.display(), self.said()?),
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ticking(node: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ticks"}, "spec": {
        "nodeName": node, "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": BOX,
            "command": ["sh", "-c", "i=0; while true; do i=$((i+1)); echo tick $i.; sleep 0.5; done"]}]}})
}

/// The ticks come without a gap, up to now.
fn no_gap(log: &mut Following) -> Result<()> {
    let last = |log: &Following| -> Result<u32> {
        let said = log.said()?;
        let all: Vec<u32> =
            said.lines().filter_map(|l| l.strip_prefix("tick ")?.strip_suffix('.')?.parse().ok()).collect();
        ensure!(all.windows(2).all(|w| w[1] == w[0] + 1), "{said}");
        all.last().copied().context("no tick")
    };
    let now = last(log)?;
    log.says(&format!("tick {}.", now + 3))
}

fn stays_ready(s: &Cluster, kubeconfig: Option<&str>) -> Result<()> {
    let mut command = s.kubectl_command();
    if let Some(path) = kubeconfig {
        command.env("KUBECONFIG", path);
    }
    let conditions =
        "{range .items[*]}{.status.conditions[?(@.type==\"Ready\")].status}{\" \"}{end}".to_string();
    let ran = sampan_tests::process::run(
        command.args(["get", "nodes", "-o", &format!("jsonpath={conditions}")]),
        b"",
        seconds(15),
    )?;
    let said = ran.ok()?;
    ensure!(said.trim() == "True True", "{said}");
    Ok(())
}

fn wait_ready(s: &Cluster) -> Result<()> {
    wait_for("all nodes to be Ready", seconds(40), || Ok(stays_ready(s, None).map_err(|e| format!("{e:#}"))))
}

fn check_tells_how_certificates_stand(s: &Space) -> Result<()> {
    let table = sampan(s, "amd64", &["certificate", "check", "--output", "table"])?.ok()?;
    for want in ["FILENAME", "server-ca.crt", "serving-apiserver.crt", "client-admin.crt", "ClientAuth", "OK"]
    {
        has(&table, want)?;
    }
    let text = sampan(s, "amd64-2", &["certificate", "check"])?.ok()?;
    has(&text, "client-kubelet.crt: certificate system:node:amd64-2 (ClientAuth) is ok, expires at 20")?;
    let of_agent = told(s, "amd64-2", "kubelet")?;
    ensure!(of_agent["DaysLeft"].as_i64().is_some_and(|days| (363..=365).contains(&days)), "{of_agent}");
    let of_authority = told(s, "amd64", "certificate-authority")?;
    ensure!(of_authority["DaysLeft"].as_i64() > Some(3640), "{of_authority}");
    sampan(s, "amd64", &["certificate", "check", "--service", "scheduler"])?.refused("inside the server")?;
    sampan(s, "amd64", &["certificate", "check", "--service", "nonsense"])?.refused("expected one of")?;
    sampan(s, "amd64", &["certificate", "check", "--data-dir", "/nowhere"])?.refused("--data-dir")?;
    // as this command will see them some day
    for (days, want, fails) in [(250, "WARNING", false), (370, "EXPIRED", true)] {
        s.exec("amd64", &["sh", "-c", &format!("echo {} > /tmp/later", days * DAY)])?.ok()?;
        let later =
            s.exec("amd64", &["env", "SAMPAN_CLOCK_OFFSET_FILE=/tmp/later", SAMPAN, "certificate", "check"])?;
        ensure!((later.code != 0) == fails, "{}", later.text());
        has(&later.text(), want)?;
    }
    Ok(())
}

fn rotate_needs_no_restart(s: &Space) -> Result<()> {
    s.post(&s.path("pods"), &ticking("amd64-2"))?.ok()?;
    s.running("ticks")?;
    let mut log = Following::kubectl(s, &s.name, "rotate.log", &["logs", "-f", "ticks"])?;
    log.says("tick 3.")?;
    let mut watch = Following::kubectl(s, &s.name, "rotate.watch", &["get", "cm", "-w", "-o", "name"])?;
    watch.says("configmap/kube-root-ca.crt")?;
    let pids = (pid_of(s, "amd64")?, pid_of(s, "amd64-2")?);
    let before = (file(s, "amd64", SERVING)?, file(s, "amd64-2", AGENT)?);
    let kubeconfig = file(s, "amd64", "/etc/sampan/sampan.yaml")?;

    let one = sampan(s, "amd64", &["certificate", "rotate", "--service", "admin"])?.ok()?;
    ensure!(one.contains("admin: renewed, expires 20") && !one.contains("api-server"), "{one}");
    ensure!(file(s, "amd64", "/etc/sampan/sampan.yaml")? != kubeconfig, "the kubeconfig is written anew");
    let all = sampan(s, "amd64", &["certificate", "rotate"])?.ok()?;
    has(&all, "api-server: renewed")?;
    has(&sampan(s, "amd64-2", &["certificate", "rotate"])?.ok()?, "kubelet: renewed")?;
    sampan(s, "amd64", &["certificate", "rotate", "--service", "certificate-authority"])?
        .refused("rotate-ca")?;

    ensure!(before.0 != file(s, "amd64", SERVING)? && before.1 != file(s, "amd64-2", AGENT)?, "new ones");
    // what is served now is what is in the file
    let served = s.exec(
        "hub",
        &["sh", "-c", "echo | openssl s_client -connect 10.64.0.11:6443 2>/dev/null | openssl x509"],
    )?;
    if served.code == 0 {
        ensure!(file(s, "amd64", SERVING)?.starts_with(served.out.trim()), "{}", served.out);
    }
    ensure!(pids == (pid_of(s, "amd64")?, pid_of(s, "amd64-2")?), "nothing was restarted");
    no_gap(&mut log)?;
    s.k(&["create", "configmap", "after"])?;
    watch.says("configmap/after")?;
    ensure!(s.k(&["exec", "ticks", "--", "echo", "fine"])? == "fine\n", "exec");
    stays_ready(s, None)?;
    // a stopped one does it when it starts
    s.lab("stop", &["amd64-2"])?.ok()?;
    let asked = sampan(s, "amd64-2", &["certificate", "rotate"])?.ok()?;
    has(&asked, "will be renewed when sampan starts")?;
    let before = file(s, "amd64-2", AGENT)?;
    s.lab("start", &["amd64-2"])?.ok()?;
    wait_for("the renewal after the start", seconds(15), || {
        let now = file(s, "amd64-2", AGENT)?;
        Ok(if now != before { Ok(()) } else { Err("the same") })
    })?;
    wait_ready(s)?;
    let events = s.get("/api/v1/namespaces/default/events")?.ok()?.to_string();
    has(&events, "CertificateRenewed")
}

fn a_new_name_at_a_restart(s: &Space) -> Result<()> {
    let before = file(s, "amd64", SERVING)?;
    let config = "/etc/sampan/config.yaml";
    s.exec("amd64", &["sed", "-i", "s/^tls-san: .127/tls-san: [other.example, 127/", config])?.ok()?;
    s.lab("stop", &["amd64"])?.ok()?;
    s.lab("start", &["amd64"])?.ok()?;
    s.wait_until_served()?;
    ensure!(file(s, "amd64", SERVING)? != before, "a certificate with the new name");
    s.exec("amd64", &["sed", "-i", "s/other.example, //", config])?.ok()?;
    wait_ready(s)
}

/// Joins from the hub, and no more: the node cannot start, since its registries.yaml is none.
fn join(s: &Cluster, token: &str, node: &str) -> Result<Ran> {
    let folder = format!("/tmp/{node}");
    let url = "https://10.64.0.11:6443";
    let args = ["agent", "--config", "/dev/null", "--server", url, "--token", token, "--node-name", node];
    let rest = ["--node-ip", "10.64.0.1", "--data-dir", &folder, "--private-registry", SAMPAN];
    s.exec("hub", &[&["timeout", "20", SAMPAN], &args[..], &rest[..]].concat())
}

fn joined(s: &Cluster, node: &str, ran: Ran) -> Result<()> {
    let certificate = format!("/tmp/{node}/agent/client-kubelet.crt");
    let text = ran.text();
    file(s, "hub", &certificate).with_context(|| text.clone())?;
    // it got as far as the start
    ran.refused(&format!("reading {SAMPAN}")).with_context(|| text)
}

fn the_token_changes(s: &Space) -> Result<()> {
    let old = file(s, "amd64", NODE_TOKEN)?.trim().to_string();
    let secret = s.token()?;
    sampan(s, "amd64", &["token", "rotate", "--token", "wrong", "--new-token", "x"])?
        .refused("not the present token")?;
    sampan(s, "amd64", &["token", "rotate", "--new-token", "abcdef.0123456789abcdef"])?
        .refused("sampan token create")?;
    sampan(s, "amd64-2", &["token", "rotate"])?.refused("changed on the server")?;
    sampan(s, "amd64", &["token", "rotate", "--token", &old, "--new-token", "fresh-secret"])?.ok()?;
    let new = file(s, "amd64", NODE_TOKEN)?.trim().to_string();
    ensure!(new.ends_with("::server:fresh-secret"), "{new}");
    let refused = join(s, &old, "late")?;
    has(&refused.text(), "`sampan token rotate`")?;
    refused.refused("refused to let node late join: Unauthorized")?;
    joined(s, "later", join(s, &new, "later")?)?;
    // who has joined needs no token, also after a restart; its configuration still has the old one
    s.lab("stop", &["amd64-2"])?.ok()?;
    s.lab("start", &["amd64-2"])?.ok()?;
    wait_ready_of(s, "amd64-2")?;
    // the server's own configuration has it too, and says so
    s.lab("stop", &["amd64"])?.ok()?;
    s.lab("start", &["amd64"])?.ok()?;
    wait_for("the server's refusal", seconds(15), || {
        let log = s.lab("logs", &["amd64"])?.out;
        Ok(if log.contains("--token differs from the one in") { Ok(()) } else { Err(log.len()) })
    })?;
    // stopped, it works too
    let back = sampan(s, "amd64", &["token", "rotate", "--new-token", &secret])?;
    back.ok()?;
    ensure!(file(s, "amd64", NODE_TOKEN)?.trim() == old, "as before");
    s.lab("start", &["amd64"])?.ok()?;
    s.wait_until_served()?;
    wait_ready(s)
}

fn wait_ready_of(s: &Cluster, node: &str) -> Result<()> {
    wait_for(&format!("{node} to be Ready"), seconds(40), || {
        let found = s.get(&format!("/api/v1/nodes/{node}"))?.ok()?;
        let conditions = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let ready = conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
        Ok(if ready { Ok(()) } else { Err(found["status"]["conditions"].to_string()) })
    })
}

fn another_authority_signs(s: &Space) -> Result<()> {
    s.post(&s.path("pods"), &ticking("amd64-2"))?.ok()?;
    s.running("ticks")?;
    let service_account = "/var/run/secrets/kubernetes.io/serviceaccount/token";
    // the server was restarted a moment ago: the node's tunnel may not be back
    let token = wait_for("exec", seconds(20), || {
        let ran = s.try_k(&["exec", "ticks", "--", "cat", service_account])?;
        Ok(if ran.code == 0 { Ok(ran.out) } else { Err(ran.text()) })
    })?;
    let mut log = Following::kubectl(s, &s.name, "authority.log", &["logs", "-f", "ticks"])?;
    let mut watch = Following::kubectl(s, &s.name, "authority.watch", &["get", "cm", "-w", "-o", "name"])?;
    watch.says("configmap/kube-root-ca.crt")?;
    let (old_token, pid) = (file(s, "amd64", NODE_TOKEN)?.trim().to_string(), pid_of(s, "amd64")?);
    let old_agent = file(s, "amd64-2", AGENT)?;

    // what would cut nodes off is refused, and says why
    s.exec("amd64", &["mkdir", "-p", "/tmp/ca"])?.ok()?;
    sampan(s, "amd64", &["certificate", "rotate-ca", "--path", "/tmp/ca"])?.refused("holds neither")?;
    let other = sampan_pki::Authority::load_or_create(&s.folder().join("other"))?;
    drop(other);
    for name in ["server-ca.crt", "server-ca.key"] {
        let text = std::fs::read_to_string(s.folder().join("other").join(name))?;
        s.exec("amd64", &["sh", "-c", &format!("cat > /tmp/ca/{name} <<'E'\n{text}E")])?.ok()?;
    }
    let refused = sampan(s, "amd64", &["certificate", "rotate-ca", "--path", "/tmp/ca"])?;
    refused.refused("who trusts the present authority would not trust the new one")?;
    sampan(s, "amd64-2", &["certificate", "rotate-ca"])?.refused("run this on a server")?;
    ensure!(file(s, "amd64-2", AGENT)? == old_agent, "nothing happened yet");

    let said = sampan(s, "amd64", &["certificate", "rotate-ca"])?.ok()?;
    has(&said, "nodes that are connected follow by themselves")?;
    let hash = said.split("the hash ").nth(1).and_then(|t| t.lines().next()).context("a hash")?.to_string();
    wait_for("the node to follow", seconds(15), || {
        let bundle = file(s, "amd64-2", "/var/lib/sampan/agent/server-ca.crt")?;
        let count = bundle.matches("BEGIN").count();
        Ok(if count == 3 && file(s, "amd64-2", AGENT)? != old_agent { Ok(()) } else { Err(count) })
    })?;
    let published = s.object("configmaps/kube-root-ca.crt")?["data"]["ca.crt"].to_string();
    ensure!(published.matches("BEGIN").count() == 3, "{published}");
    ensure!(pid == pid_of(s, "amd64")?, "the same process");
    no_gap(&mut log)?;
    s.k(&["create", "configmap", "after"])?;
    watch.says("configmap/after")?;
    stays_ready(s, None).context("with the old kubeconfig")?;
    let fresh = s.lab("kubeconfig", &[])?.ok()?;
    let path = s.folder().join("fresh");
    std::fs::write(&path, fresh)?;
    stays_ready(s, path.to_str()).context("with the new kubeconfig")?;
    // tokens of the old key are known, new ones have another key
    let review = |token: &str| -> Result<Value> {
        let body = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
        Ok(s.post("/apis/authentication.k8s.io/v1/tokenreviews", &body)?.ok()?["status"].clone())
    };
    ensure!(review(token.trim())?["authenticated"] == true, "{}", review(token.trim())?);
    let new = s.k(&["create", "token", "default"])?;
    ensure!(review(new.trim())?["authenticated"] == true, "{}", review(new.trim())?);
    ensure!(new.split('.').next() != token.split('.').next(), "another key");
    ensure!(s.get("/openid/v1/jwks")?.ok()?["keys"].as_array().map(Vec::len) == Some(2), "both keys");
    // both the old token and the new one join
    joined(s, "by-old", join(s, &old_token, "by-old")?)?;
    let node_token = file(s, "amd64", NODE_TOKEN)?;
    has(&node_token, &hash)?;
    joined(s, "by-new", join(s, node_token.trim(), "by-new")?)?;
    // and it is the same after a restart of both
    for node in ["amd64", "amd64-2"] {
        s.lab("stop", &[node])?.ok()?;
    }
    for node in ["amd64", "amd64-2"] {
        s.lab("start", &[node])?.ok()?;
    }
    s.wait_until_served()?;
    wait_ready(s)?;
    wait_for("exec through the new connection", seconds(20), || {
        let ran = s.try_k(&["exec", "ticks", "--", "echo", "fine"])?;
        Ok(if ran.out == "fine\n" { Ok(()) } else { Err(ran.text()) })
    })?;
    s.k(&["delete", "pod", "ticks", "--wait", "--timeout=20s"]).map(drop)
}

fn a_board_from_the_drawer(s: &Space) -> Result<()> {
    let before = file(s, "amd64-2", AGENT)?;
    s.lab("stop", &["amd64-2"])?.ok()?;
    for node in ["amd64", "amd64-2"] {
        s.lab("clock", &[node, &(400 * DAY).to_string()])?.ok()?;
    }
    let later = (|| {
        // the server never stopped: its certificates are renewed by the first who comes
        wait_for("the serving certificate of the other year", seconds(10), || {
            // a connection of its own: the handshake finds it due
            let _ = s.kubectl(&["get", "--raw", "/readyz"], "")?;
            let told = sampan(s, "amd64", &["certificate", "check"])?;
            Ok(if told.code == 0 { Ok(()) } else { Err(told.text()) })
        })?;
        wait_for("the old kubeconfig to be refused", seconds(15), || {
            let code = s.get("/api/v1/nodes")?.code;
            Ok(if code == 401 { Ok(()) } else { Err(code) })
        })?;
        sampan(s, "amd64-2", &["certificate", "check"])?.refused("expired: ")?;
        s.lab("start", &["amd64-2"])?.ok()?;
        wait_for("the node's new certificate", seconds(20), || {
            let now = file(s, "amd64-2", AGENT)?;
            Ok(if now != before { Ok(()) } else { Err(s.node_logs()) })
        })?;
        let path = s.folder().join("later");
        std::fs::write(&path, s.lab("kubeconfig", &[])?.ok()?)?;
        wait_for("all nodes to be Ready, a year later", seconds(40), || {
            Ok(stays_ready(s, path.to_str()).map_err(|e| format!("{e:#}")))
        })
    })();
    for node in ["amd64", "amd64-2"] {
        s.lab("clock", &[node, "0"])?.ok()?;
    }
    later?;
    wait_ready(s)
}

fn renewed_while_watches_and_logs_go_on(_: &Space) -> Result<()> {
    const LIFE: u64 = 24;
    let short = Cluster::up(&Setup {
        suite: "certificates-short",
        nodes: "amd64,amd64".to_string(),
        server_args: vec![format!("--certificate-lifetime={LIFE}s")],
        box_image: true,
        wait_for_nodes: true,
        ..Setup::default()
    })?;
    let result = live_through(&short, LIFE);
    let logs = short.node_logs();
    short.down();
    result.map_err(|error| error.context(logs))
}

fn live_through(s: &Cluster, life: u64) -> Result<()> {
    let old = s.folder().join("kubeconfig");
    let fresh = s.folder().join("fresh");
    let kubectl = |args: &[&str]| -> Result<Ran> {
        std::fs::write(&fresh, s.lab("kubeconfig", &[])?.ok()?)?;
        sampan_tests::process::run(s.kubectl_command().env("KUBECONFIG", &fresh).args(args), b"", seconds(15))
    };
    // everything that follows began with the first certificates
    s.post("/api/v1/namespaces/default/pods", &ticking("amd64-2"))?.ok()?;
    let mut watch = Following::kubectl(s, "default", "short.watch", &["get", "cm", "-w", "-o", "name"])?;
    wait_for("the log", seconds(15), || {
        let ran = s.kubectl(&["logs", "ticks"], "")?;
        Ok(if ran.out.contains("tick 1.") { Ok(()) } else { Err(ran.text()) })
    })?;
    let mut log = Following::kubectl(s, "default", "short.log", &["logs", "-f", "ticks"])?;
    let mut nodes = Following::kubectl(
        s,
        "",
        "short.nodes",
        &[
            "get",
            "nodes",
            "-w",
            "--no-headers",
            "-o",
            "custom-columns=N:.metadata.name,R:.status.conditions[?(@.type==\"Ready\")].status",
        ],
    )?;
    let pids = (pid_of(s, "amd64")?, pid_of(s, "amd64-2")?);
    let all = || -> Result<[String; 3]> {
        Ok([
            expiry(s, "amd64", "api-server")?,
            expiry(s, "amd64", "admin")?,
            expiry(s, "amd64-2", "kubelet")?,
        ])
    };
    let mut seen: Vec<Vec<String>> = all()?.into_iter().map(|first| vec![first]).collect();
    let started = sampan_world::clock::monotonic();
    // two lives and more: what was there at the beginning has expired twice over
    while started.elapsed() < seconds(2 * life + 6) {
        std::thread::sleep(seconds(3));
        let now = all()?;
        for (seen, now) in seen.iter_mut().zip(&now) {
            if seen.last() != Some(now) {
                seen.push(now.clone());
            }
        }
        let told = sampan(s, "amd64-2", &["certificate", "check"])?;
        ensure!(told.code == 0, "{}", told.text());
    }
    ensure!(seen.iter().all(|seen| seen.len() >= 3), "all were renewed, again and again: {seen:?}");
    ensure!(pids == (pid_of(s, "amd64")?, pid_of(s, "amd64-2")?), "nothing was restarted");
    no_gap(&mut log)?;
    kubectl(&["create", "configmap", "after"])?.ok()?;
    watch.says("configmap/after")?;
    ensure!(kubectl(&["exec", "ticks", "--", "echo", "fine"])?.ok()? == "fine\n", "exec");
    nodes.says("amd64-2")?;
    let said = nodes.said()?;
    ensure!(!said.contains("False") && !said.contains("Unknown"), "a node was not Ready: {said}");
    let old = sampan_tests::process::run(
        s.kubectl_command().env("KUBECONFIG", &old).args(["get", "nodes"]),
        b"",
        seconds(15),
    )?;
    ensure!(old.code != 0, "the first kubeconfig has expired: {}", old.text());
    Ok(())
}
