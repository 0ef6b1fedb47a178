//! kubectl's verbs from end to end: what a user types, and what they see.
//!
//! Upstream counterpart: test/cmd and test/e2e/kubectl. The cluster has two nodes, pods are real.
use std::io::{Read, Write};
use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use sampan_tests::image::BOX;
use sampan_tests::{Space, Suite, cases, fetch, has, seconds, wait_for};

fn main() -> ExitCode {
    Suite::new("kubectl", "amd64,amd64")
        .with_images()
        .together(cases![
            about_the_cluster,
            create_and_change,
            apply_and_diff,
            edit_with_an_editor,
            output_formats_and_selectors,
            watch_tells_changes,
            run_logs_exec_and_copy,
            log_options,
            exec_with_a_terminal,
            attach_to_a_process,
            port_forward,
            ephemeral_container,
            rollout,
            expose_and_reach,
            wait_and_events,
        ])
        .alone(cases![cordon_taint_and_drain, tokens_of_nodes])
        .run()
}

/// A deployment of the box that sleeps.
fn deployment(name: &str, replicas: u32, command: &str) -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec:\n  \
         replicas: {replicas}\n  selector: {{matchLabels: {{app: {name}}}}}\n  template:\n    \
         metadata: {{labels: {{app: {name}}}}}\n    spec:\n      terminationGracePeriodSeconds: 1\n      \
         containers: [{{name: c, image: '{BOX}', command: [sh, -c, '{command}']}}]\n"
    )
}

/// `kubectl run` of the box, and a wait until it is ready.
fn run(s: &Space, name: &str, command: &str) -> Result<()> {
    s.k(&["run", name, &format!("--image={BOX}"), "--command", "--", "sh", "-c", command])?;
    s.running(name).map(drop)
}

fn about_the_cluster(s: &Space) -> Result<()> {
    let version = s.k(&["version"])?;
    let of_server = version.lines().find(|l| l.starts_with("Server Version:")).unwrap_or_default();
    has(of_server, "v1.36")?;
    has(&s.k(&["cluster-info"])?, "Kubernetes control plane")?;
    let resources = s.k(&["api-resources"])?;
    for want in ["deployments", "poddisruptionbudgets", "networkpolicies", "endpointslices", "leases"] {
        has(&resources, want)?;
    }
    has(&s.k(&["api-versions"])?, "apps/v1")?;
    has(&s.k(&["explain", "deployment.spec.strategy.rollingUpdate"])?, "maxSurge")?;
    let nodes = s.k(&["get", "nodes", "-o", "wide"])?;
    ensure!(nodes.lines().filter(|l| l.contains(" Ready ")).count() == 2, "two nodes are Ready:\n{nodes}");
    has(&nodes, "v1.36")?;
    has(&s.k(&["describe", "node", "amd64"])?, "kubernetes.io/arch=amd64")?;
    has(&s.k(&["auth", "can-i", "create", "pods"])?, "yes")?;
    if s.cluster.kubectl_minor()? >= 28 {
        has(&s.k(&["auth", "whoami"])?, "system:masters")?;
    }
    Ok(())
}

fn create_and_change(s: &Space) -> Result<()> {
    s.k(&["create", "configmap", "c", "--from-literal=a=b"])?;
    s.k(&["create", "secret", "generic", "s", "--from-literal=password=x"])?;
    s.k(&["create", "deployment", "d", &format!("--image={BOX}"), "--replicas=0"])?;
    s.k(&["create", "job", "j", &format!("--image={BOX}"), "--", "true"])?;
    s.k(&["label", "configmap", "c", "tier=web"])?;
    s.try_k(&["label", "configmap", "c", "tier=other"])?.refused("--overwrite is false")?;
    s.k(&["annotate", "configmap", "c", "note=kept"])?;
    s.k(&["label", "configmap", "c", "tier-"])?;
    s.k(&["patch", "configmap", "c", "--type=merge", "-p", r#"{"data":{"m":"1"}}"#])?;
    s.k(&["patch", "configmap", "c", "--type=json", "-p", r#"[{"op":"add","path":"/data/j","value":"2"}]"#])?;
    s.k(&[
        "patch",
        "deployment",
        "d",
        "-p",
        r#"{"spec":{"template":{"spec":{"containers":[{"name":"box","env":[{"name":"A","value":"1"}]}]}}}}"#,
    ])?;
    let image =
        s.k(&["get", "deployment", "d", "-o", "jsonpath={.spec.template.spec.containers[0].image}"])?;
    ensure!(image == BOX, "a strategic merge keeps what it does not name: {image}");
    let data = s.k(&["get", "configmap", "c", "-o", "jsonpath={.data}"])?;
    ensure!(data == r#"{"a":"b","j":"2","m":"1"}"#, "{data}");
    s.k(&["set", "env", "deployment/d", "B=2"])?;
    s.k(&["set", "resources", "deployment/d", "--limits=cpu=100m,memory=32Mi"])?;
    s.k(&["set", "image", "deployment/d", "box=example.com/other:2"])?;
    has(&s.k(&["get", "deployment", "d", "-o", "yaml"])?, "example.com/other:2")?;
    s.k(&["scale", "deployment", "d", "--replicas=0"])?;
    has(&s.k(&["wait", "--for=condition=complete", "job/j", "--timeout=30s"])?, "condition met")?;
    s.k(&["delete", "configmap,secret", "c", "s", "--ignore-not-found"])?;
    s.try_k(&["get", "configmap", "c"])?.refused("Error from server (NotFound): configmaps \"c\" not found")
}

fn apply_and_diff(s: &Space) -> Result<()> {
    let manifest = deployment("web", 0, "sleep 1000");
    has(&s.apply(&manifest)?, "created")?;
    has(&s.apply(&manifest)?, "unchanged")?;
    let changed = manifest.replace("sleep 1000", "sleep 2000");
    let diff = s.k_with(&["diff", "-f", "-"], &changed)?;
    ensure!(diff.code == 1 && diff.out.contains("sleep 2000"), "diff ends with 1: {}", diff.text());
    ensure!(s.k_with(&["diff", "-f", "-"], &manifest)?.code == 0, "no difference ends with 0");
    has(&s.apply(&changed)?, "configured")?;
    let server_side = ["apply", "--server-side", "--field-manager=other", "-f", "-"];
    s.k_with(&server_side, &manifest)?.refused("conflict with \"kubectl-client-side-apply\"")?;
    has(
        &s.k_with(&[&server_side[..], &["--force-conflicts"]].concat(), &manifest)?.ok()?,
        "serverside-applied",
    )?;
    has(&s.k_with(&["apply", "--dry-run=server", "-f", "-"], &changed)?.ok()?, "dry run")?;
    has(&s.k(&["get", "deployment", "web", "-o", "yaml"])?, "sleep 1000")?;
    let pruned = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c, labels: {set: a}}\ndata: {a: b}\n";
    s.apply(pruned)?;
    let fields = pruned.replace("data: {a: b}", "data: {c: d}");
    s.apply(&fields)?;
    let data = s.k(&["get", "configmap", "c", "-o", "jsonpath={.data}"])?;
    ensure!(data == r#"{"c":"d"}"#, "what the manifest dropped is gone: {data}");
    s.k_with(&["replace", "-f", "-"], pruned)?.ok()?;
    s.k_with(&["delete", "-f", "-"], pruned)?.ok().map(drop)
}

fn edit_with_an_editor(s: &Space) -> Result<()> {
    s.k(&["create", "configmap", "c", "--from-literal=a=before"])?;
    let mut command = s.kubectl_command();
    command.args(["-n", &s.name, "edit", "configmap", "c"]).env("KUBE_EDITOR", "sed -i s/before/after/");
    sampan_tests::process::run(&mut command, b"", seconds(20))?.ok()?;
    has(&s.k(&["get", "configmap", "c", "-o", "yaml"])?, "after")
}

fn output_formats_and_selectors(s: &Space) -> Result<()> {
    for (name, tier) in [("a", "web"), ("b", "db")] {
        s.k(&["create", "configmap", name])?;
        s.k(&["label", "configmap", name, &format!("tier={tier}")])?;
    }
    let names = |args: &[&str]| s.k(&[&["get", "configmaps", "-o", "name"], args].concat());
    ensure!(names(&["-l", "tier=web"])? == "configmap/a\n", "equality");
    ensure!(names(&["-l", "tier in (web,db),tier notin (db)"])? == "configmap/a\n", "sets");
    ensure!(names(&["--field-selector", "metadata.name=b"])? == "configmap/b\n", "fields");
    has(&s.k(&["get", "configmaps", "-L", "tier"])?, "TIER")?;
    has(&s.k(&["get", "configmap", "a", "-o", "wide"])?, "DATA")?;
    has(&s.k(&["get", "configmap", "a", "-o", "json"])?, "\"tier\": \"web\"")?;
    let sorted = s.k(&[
        "get",
        "configmaps",
        "-l",
        "tier",
        "--sort-by=.metadata.labels.tier",
        "--no-headers",
        "-o",
        "custom-columns=N:.metadata.name",
    ])?;
    ensure!(sorted.split_whitespace().eq(["b", "a"]), "{sorted}");
    s.try_k(&["get", "configmaps", "-l", "a==="])?.refused("unable to parse requirement")?;
    s.try_k(&["get", "nonsense"])?.refused("the server doesn't have a resource type \"nonsense\"")?;
    has(&s.k(&["get", "all", "-A"])?, "service/kubernetes")
}

fn watch_tells_changes(s: &Space) -> Result<()> {
    let mut command = s.kubectl_command();
    command.args(["-n", &s.name, "get", "configmaps", "-w", "-o", "name"]);
    let mut watcher = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    std::thread::sleep(seconds(1));
    s.k(&["create", "configmap", "late"])?;
    std::thread::sleep(seconds(1));
    watcher.kill()?;
    let mut told = String::new();
    watcher.stdout.take().context("its output")?.read_to_string(&mut told)?;
    watcher.wait()?;
    has(&told, "configmap/late")
}

fn run_logs_exec_and_copy(s: &Space) -> Result<()> {
    run(s, "p", "echo started; echo to-stderr >&2; sleep 1000")?;
    let logs = wait_for("the log", seconds(5), || {
        let logs = s.k(&["logs", "p"])?;
        Ok(if logs.contains("to-stderr") { Ok(logs) } else { Err(logs) })
    })?;
    has(&logs, "started\n")?;
    ensure!(s.k(&["exec", "p", "--", "echo", "a b"])? == "a b\n", "exec");
    ensure!(s.try_k(&["exec", "p", "--", "sh", "-c", "exit 7"])?.code == 7, "exec's exit code");
    s.try_k(&["exec", "p", "--", "no-such-program"])?.refused("no-such-program")?;
    let echoed = s.k_with(&["exec", "-i", "p", "--", "cat"], "through stdin")?.ok()?;
    ensure!(echoed == "through stdin", "{echoed}");
    let (here, back) = (s.folder().join("here"), s.folder().join("back"));
    let content: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&here, &content)?;
    s.k(&["cp", &here.display().to_string(), "p:/tmp/there"])?;
    s.k(&["cp", "p:/tmp/there", &back.display().to_string()])?;
    ensure!(std::fs::read(&back)? == content, "copied there and back");
    let address = s.k(&["get", "pod", "p", "-o", "jsonpath={.status.podIP}"])?;
    ensure!(address.starts_with("10.42."), "{address}");
    let started = sampan_world::clock::monotonic();
    s.k(&["delete", "pod", "p", "--grace-period=1"])?;
    ensure!(started.elapsed() < seconds(15), "deleted within its grace period");
    s.try_k(&["logs", "p"])?.refused("NotFound")
}

fn log_options(s: &Space) -> Result<()> {
    run(s, "p", "for i in 1 2 3 4 5; do echo line $i; done; sleep 1000")?;
    wait_for("the log", seconds(5), || {
        let logs = s.k(&["logs", "p"])?;
        Ok(if logs.contains("line 5") { Ok(()) } else { Err(logs) })
    })?;
    ensure!(s.k(&["logs", "p", "--tail=2"])? == "line 4\nline 5\n", "--tail");
    ensure!(s.k(&["logs", "p", "--limit-bytes=6"])? == "line 1", "--limit-bytes");
    ensure!(s.k(&["logs", "p", "--since=1h"])?.lines().count() == 5, "--since");
    let stamped = s.k(&["logs", "p", "--timestamps", "--tail=1"])?;
    ensure!(stamped.starts_with("20") && stamped.contains("Z line 5"), "--timestamps: {stamped}");
    ensure!(s.k(&["logs", "-l", "run=p", "--prefix"])?.contains("[pod/p/p] line 1"), "-l");
    // following ends with the container
    let name = "ends";
    s.k(&[
        "run",
        name,
        &format!("--image={BOX}"),
        "--restart=Never",
        "--command",
        "--",
        "sh",
        "-c",
        "echo first; sleep 2; echo last",
    ])?;
    s.pod(name, seconds(30), |pod| {
        let phase = pod["status"]["phase"].as_str()?;
        (phase == "Running" || phase == "Succeeded").then_some(())
    })?;
    let followed = s.kubectl_within(&["-n", &s.name, "logs", "-f", name], "", seconds(20))?.ok()?;
    ensure!(followed == "first\nlast\n", "followed: {followed}");
    s.try_k(&["logs", "p", "-c", "none"])?.refused("container none is not valid for pod p")?;
    s.try_k(&["logs", "p", "--previous"])?
        .refused("previous terminated container \"p\" in pod \"p\" not found")
}

fn exec_with_a_terminal(s: &Space) -> Result<()> {
    run(s, "p", "sleep 1000")?;
    // script(1) gives kubectl the terminal that -t wants
    let line = format!("kubectl -n {} exec -it p -- sh -c 'tty; stty size'", s.name);
    let mut command = std::process::Command::new("script");
    command.args(["-qec", &line, "/dev/null"]);
    for (key, value) in s.kubectl_command().get_envs() {
        command.env(key, value.unwrap_or_default());
    }
    let ran = sampan_tests::process::run(&mut command, b"", seconds(20))?;
    has(&ran.out, "/dev/pts/")
}

fn attach_to_a_process(s: &Space) -> Result<()> {
    let manifest = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec:\n  containers:\n  \
         - {{name: c, image: '{BOX}', stdin: true, command: [sh, -c, 'while read line; do echo got $line; done']}}\n"
    );
    s.apply(&manifest)?;
    s.running("p")?;
    let mut command = s.kubectl_command();
    command.args(["-n", &s.name, "attach", "-i", "p"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    std::thread::sleep(seconds(2));
    stdin.write_all(b"hello\n")?;
    let logged = wait_for("the answer", seconds(10), || {
        let logs = s.k(&["logs", "p"])?;
        Ok(if logs.contains("got hello") { Ok(()) } else { Err(logs) })
    });
    drop(stdin);
    let _ = child.kill();
    let mut told = String::new();
    child.stdout.take().context("its output")?.read_to_string(&mut told)?;
    child.wait()?;
    logged?;
    has(&told, "got hello")
}

fn port_forward(s: &Space) -> Result<()> {
    run(s, "p", "mkdir /www; echo through the tunnel > /www/index.html; exec httpd -f -p 8080 -h /www")?;
    let mut command = s.kubectl_command();
    command.args(["-n", &s.name, "port-forward", "pod/p", ":8080"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut out = std::io::BufReader::new(child.stdout.take().context("its output")?);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut out, &mut line)?;
    let port = line.split("127.0.0.1:").nth(1).and_then(|r| r.split(' ').next()).map(str::to_string);
    let fetch = || -> Result<String> {
        let port: u16 = port.as_deref().context(line.clone())?.parse()?;
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(seconds(10)))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    // twice: each connection is a stream of its own
    let answers = fetch().and_then(|first| Ok((first, fetch()?)));
    let _ = child.kill();
    child.wait()?;
    let (first, second) = answers?;
    has(&first, "through the tunnel")?;
    has(&second, "through the tunnel")
}

fn ephemeral_container(s: &Space) -> Result<()> {
    if s.cluster.kubectl_minor()? < 23 {
        println!("  skipped: this kubectl speaks an older API for ephemeral containers");
        return Ok(());
    }
    run(s, "p", "sleep 1000")?;
    s.k(&[
        "debug",
        "p",
        &format!("--image={BOX}"),
        "-c",
        "debugger",
        "--",
        "sh",
        "-c",
        "echo from the debugger; sleep 100",
    ])?;
    wait_for("the ephemeral container", seconds(20), || {
        let ran = s.try_k(&["logs", "p", "-c", "debugger"])?;
        Ok(if ran.out.contains("from the debugger") { Ok(()) } else { Err(ran.text()) })
    })?;
    let pod = s.object("pods/p")?;
    let state = &pod["status"]["ephemeralContainerStatuses"][0]["state"];
    ensure!(state.get("running").is_some(), "{state}");
    Ok(())
}

fn rollout(s: &Space) -> Result<()> {
    s.apply(&deployment("web", 2, "sleep 1000"))?;
    has(&s.k(&["rollout", "status", "deployment/web", "--timeout=40s"])?, "successfully rolled out")?;
    s.k(&["set", "env", "deployment/web", "VERSION=2"])?;
    s.k(&["rollout", "status", "deployment/web", "--timeout=40s"])?;
    let history = s.k(&["rollout", "history", "deployment/web"])?;
    ensure!(
        history.lines().filter(|l| l.starts_with(|c: char| c.is_ascii_digit())).count() == 2,
        "{history}"
    );
    s.k(&["rollout", "undo", "deployment/web"])?;
    s.k(&["rollout", "status", "deployment/web", "--timeout=40s"])?;
    ensure!(!s.k(&["get", "deployment", "web", "-o", "yaml"])?.contains("VERSION"), "undone");
    s.k(&["rollout", "restart", "deployment/web"])?;
    s.k(&["rollout", "status", "deployment/web", "--timeout=40s"])?;
    s.k(&["scale", "deployment/web", "--replicas=3"])?;
    s.k(&["rollout", "status", "deployment/web", "--timeout=40s"])?;
    let pods = s.k(&["get", "pods", "-l", "app=web", "-o", "wide", "--no-headers"])?;
    has(&pods, "amd64-2")?;
    s.k(&["rollout", "pause", "deployment/web"])?;
    s.k(&["rollout", "resume", "deployment/web"])?;
    s.k(&["delete", "deployment", "web", "--cascade=foreground", "--timeout=30s"])?;
    let left = s.k(&["get", "replicasets,pods", "-l", "app=web", "-o", "name"])?;
    ensure!(left.is_empty(), "foreground deletion takes what belongs to it: {left}");
    Ok(())
}

fn expose_and_reach(s: &Space) -> Result<()> {
    let serve = "mkdir /www; hostname > /www/index.html; exec httpd -f -p 8080 -h /www";
    s.apply(&deployment("web", 2, serve))?;
    s.k(&["rollout", "status", "deployment/web", "--timeout=40s"])?;
    s.k(&["expose", "deployment", "web", "--port=80", "--target-port=8080"])?;
    s.k(&[
        "expose",
        "deployment",
        "web",
        "--name=outside",
        "--type=NodePort",
        "--port=80",
        "--target-port=8080",
    ])?;
    s.k(&[
        "expose",
        "deployment",
        "web",
        "--name=headless",
        "--cluster-ip=None",
        "--port=80",
        "--target-port=8080",
    ])?;
    // in the network of a pod, with the machine's programs
    let client = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: client}}\nspec:\n  volumes: [{{name: h, hostPath: {{path: /}}}}]\n  \
         containers: [{{name: c, image: '{BOX}', volumeMounts: [{{name: h, mountPath: /h, readOnly: true}}]}}]\n"
    );
    s.apply(&client)?;
    s.running("client")?;
    let ask = |url: &str| {
        let fetch = fetch(url);
        let command: Vec<&str> = fetch.iter().map(String::as_str).collect();
        s.try_k(&[&["exec", "client", "--", "chroot", "/h"], &command[..]].concat())
    };
    let ip = s.k(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
    let url = format!("http://{ip}/");
    wait_for("the service by address", seconds(20), || {
        let ran = ask(&url)?;
        Ok(if ran.code == 0 && ran.out.starts_with("web-") { Ok(()) } else { Err(ran.text()) })
    })?;
    // both pods, on both nodes, answer in the end
    let mut hosts = std::collections::BTreeSet::new();
    wait_for("both pods to answer", seconds(30), || {
        hosts.insert(ask(&url)?.out);
        Ok(if hosts.len() == 2 { Ok(()) } else { Err(format!("{hosts:?}")) })
    })?;
    let look_up = |name: &str| {
        let name = format!("{name}.{}.svc.cluster.local", s.name);
        s.try_k(&["exec", "client", "--", "nslookup", &name])
    };
    has(&look_up("web")?.text(), &ip)?;
    let names = look_up("headless")?;
    let all = names.out.matches("10.42.").count() >= 2;
    ensure!(all, "a headless service has the pods' addresses: {}", names.text());
    has(&look_up("none")?.text(), "NXDOMAIN")?;
    let port = s.k(&["get", "service", "outside", "-o", "jsonpath={.spec.ports[0].nodePort}"])?;
    for node in ["10.64.0.11", "10.64.0.12"] {
        wait_for(&format!("the NodePort on {node}"), seconds(15), || {
            let fetch = fetch(&format!("http://{node}:{port}/"));
            let ran = s.exec("hub", &fetch.each_ref().map(String::as_str))?;
            Ok(if ran.out.starts_with("web-") { Ok(()) } else { Err(ran.text()) })
        })?;
    }
    let slices = s.k(&["get", "endpointslices", "-l", "kubernetes.io/service-name=web", "-o", "json"])?;
    has(&slices, "\"ready\": true")?;
    s.k(&["scale", "deployment", "web", "--replicas=0"])?;
    wait_for("nobody to answer", seconds(20), || {
        let ran = ask(&url)?;
        Ok(if ran.code != 0 { Ok(()) } else { Err(ran.out) })
    })
}

fn wait_and_events(s: &Space) -> Result<()> {
    s.k(&["run", "p", &format!("--image={BOX}"), "--command", "--", "sleep", "1000"])?;
    s.k(&["wait", "--for=condition=Ready", "pod/p", "--timeout=30s"])?;
    for (reason, text) in [
        ("Scheduled", "Successfully assigned"),
        ("Pulled", "already present on machine"),
        ("Created", "Container created"),
        ("Started", "Container started"),
    ] {
        s.event("p", reason, text)?;
    }
    if s.cluster.kubectl_minor()? >= 26 {
        has(&s.k(&["events", "--for=pod/p"])?, "Scheduled")?;
    }
    let described = s.k(&["describe", "pod", "p"])?;
    for want in ["Successfully assigned", "QoS Class:", "kube-api-access", "Ready"] {
        has(&described, want)?;
    }
    let waiting = s.try_k(&["wait", "--for=delete", "pod/p", "--timeout=1s"])?;
    waiting.refused("timed out waiting for the condition")?;
    s.k(&["delete", "pod", "p", "--now"])?;
    let gone = s.try_k(&["wait", "--for=delete", "pod/p", "--timeout=20s"])?;
    // before 1.24 what is gone already was an error
    ensure!(gone.code == 0 || gone.text().contains("no matching resources found"), "{}", gone.text());
    Ok(())
}

fn cordon_taint_and_drain(s: &Space) -> Result<()> {
    s.apply(&deployment("web", 2, "sleep 1000"))?;
    s.k(&["rollout", "status", "deployment/web", "--timeout=40s"])?;
    s.k(&["cordon", "amd64-2"])?;
    has(&s.k(&["get", "node", "amd64-2"])?, "SchedulingDisabled")?;
    s.k(&["drain", "amd64-2", "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s"])?;
    wait_for("all to be on the other node", seconds(30), || {
        let pods = s.k(&["get", "pods", "-l", "app=web", "-o", "wide", "--no-headers"])?;
        let good = pods.lines().count() == 2 && !pods.contains("amd64-2") && pods.matches("1/1").count() == 2;
        Ok(if good { Ok(()) } else { Err(pods) })
    })?;
    s.k(&["uncordon", "amd64-2"])?;
    s.k(&["taint", "nodes", "amd64-2", "only=special:NoSchedule"])?;
    let pinned = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec:\n  nodeSelector: {{kubernetes.io/hostname: amd64-2}}\n  \
         containers: [{{name: c, image: '{BOX}'}}]\n"
    );
    s.apply(&pinned)?;
    s.event("p", "FailedScheduling", "0/2 nodes are available: ")?;
    s.event("p", "FailedScheduling", "untolerated taint")?;
    s.k(&["taint", "nodes", "amd64-2", "only:NoSchedule-"])?;
    s.running("p")?;
    s.k(&["taint", "nodes", "amd64-2", "out=now:NoExecute"])?;
    let gone = wait_for("the pod to be evicted", seconds(60), || {
        let ran = s.try_k(&["get", "pod", "p"])?;
        Ok(if ran.code == 0 { Err(ran.out) } else { Ok(()) })
    });
    s.k(&["taint", "nodes", "amd64-2", "out-"])?;
    gone
}

fn tokens_of_nodes(s: &Space) -> Result<()> {
    let token = s.sampan(&["token", "create", "--ttl", "1h", "--description", "for a test"])?.ok()?;
    ensure!(token.starts_with("K10"), "a token carries the hash of the server's authority: {token}");
    let list = s.sampan(&["token", "list"])?.ok()?;
    has(&list, "for a test")?;
    has(&list, "valid")?;
    let id = token.trim().rsplit("::").next().and_then(|t| t.split('.').next()).context("its id")?;
    has(&s.sampan(&["token", "delete", id])?.ok()?, "deleted")?;
    s.sampan(&["token", "delete", id])?.refused("there is no token")
}
