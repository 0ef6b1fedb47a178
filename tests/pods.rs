//! Pods: how containers start, fail, are probed, limited and ended, as kubelet does it.
//!
//! Upstream counterpart: test/e2e/common/node.
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use sampan_tests::image::BOX;
use sampan_tests::{Space, Suite, cases, has, seconds, wait_for};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::new("pods", "amd64")
        .with_images()
        .together(cases![
            command_not_found,
            not_a_program_of_this_machine,
            exit_codes_and_messages,
            restarts_with_back_off,
            previous_log,
            out_of_memory,
            cpu_and_pids_are_limited,
            probes,
            startup_probe,
            init_containers,
            environment,
            volumes_follow_their_objects,
            shared_volume,
            missing_config_map,
            hooks_and_termination,
            security_context,
            host_namespaces,
            job_with_deadline,
            pod_on_no_node,
            owner_gone,
        ])
        .run()
}

fn pod(name: &str, container: Value) -> Value {
    let mut container = container;
    for (key, value) in [("name", json!("c")), ("image", json!(BOX))] {
        if container.get(key).is_none() {
            container[key] = value;
        }
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]}})
}

fn sh(command: &str) -> Value {
    json!({"command": ["sh", "-c", command]})
}

fn create(s: &Space, pod: &Value) -> Result<()> {
    s.post(&s.path("pods"), pod)?.ok().map(drop)
}

/// Creates it and waits until it has come to its end.
fn finish(s: &Space, mut pod: Value) -> Result<Value> {
    pod["spec"]["restartPolicy"] = json!("Never");
    create(s, &pod)?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default().to_string();
    s.pod(&name, seconds(40), |pod| {
        let phase = pod["status"]["phase"].as_str()?;
        (phase == "Succeeded" || phase == "Failed").then(|| pod.clone())
    })
}

fn terminated(pod: &Value) -> &Value {
    &pod["status"]["containerStatuses"][0]["state"]["terminated"]
}

fn log(s: &Space, name: &str) -> Result<String> {
    s.k(&["logs", name])
}

fn command_not_found(s: &Space) -> Result<()> {
    create(s, &pod("p", json!({"command": ["/no/such/program"]})))?;
    s.event("p", "Failed", "/no/such/program")?;
    s.event("p", "Failed", "no such file or directory")?;
    let state = s.pod("p", seconds(20), |pod| {
        let status = &pod["status"]["containerStatuses"][0];
        let last = [&status["state"]["terminated"], &status["lastState"]["terminated"]];
        last.into_iter().find(|t| t["exitCode"] == 128).cloned()
    })?;
    ensure!(state["reason"] == "StartError", "{state}");
    s.pod("p", seconds(30), |pod| {
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"];
        (waiting == "RunContainerError" || waiting == "CrashLoopBackOff").then_some(())
    })
}

fn not_a_program_of_this_machine(s: &Space) -> Result<()> {
    create(s, &pod("p", json!({"command": ["/bin/foreign"]})))?;
    s.event("p", "Failed", "exec format error").map(drop)
}

fn exit_codes_and_messages(s: &Space) -> Result<()> {
    let done = finish(s, pod("good", sh("exit 0")))?;
    ensure!(
        done["status"]["phase"] == "Succeeded" && terminated(&done)["reason"] == "Completed",
        "{}",
        done["status"]
    );
    let mut message = sh("echo the reason > /dev/termination-log; exit 3");
    message["terminationMessagePolicy"] = json!("File");
    let failed = finish(s, pod("bad", message))?;
    ensure!(failed["status"]["phase"] == "Failed", "{}", failed["status"]);
    let state = terminated(&failed);
    ensure!(
        state["exitCode"] == 3 && state["reason"] == "Error" && state["message"] == "the reason\n",
        "{state}"
    );
    let mut from_log = sh("echo last words; exit 4");
    from_log["terminationMessagePolicy"] = json!("FallbackToLogsOnError");
    let failed = finish(s, pod("words", from_log))?;
    ensure!(terminated(&failed)["message"] == "last words\n", "{}", terminated(&failed));
    Ok(())
}

fn restarts_with_back_off(s: &Space) -> Result<()> {
    create(s, &pod("p", sh("exit 1")))?;
    s.pod("p", seconds(60), |pod| {
        let status = &pod["status"]["containerStatuses"][0];
        let waits = status["state"]["waiting"]["reason"] == "CrashLoopBackOff";
        let text = status["state"]["waiting"]["message"].as_str().unwrap_or_default();
        let told = text.starts_with("back-off ") && text.contains("restarting failed container=c pod=p_");
        (waits && told && status["restartCount"].as_u64() >= Some(1)).then_some(())
    })?;
    s.event("p", "BackOff", "Back-off restarting failed container c in pod p_").map(drop)
}

fn previous_log(s: &Space) -> Result<()> {
    create(s, &pod("p", sh("test -e /tmp/x; echo run of $HOSTNAME; date +%s%N; sleep 1; exit 1")))?;
    s.pod("p", seconds(30), |pod| {
        (pod["status"]["containerStatuses"][0]["restartCount"].as_u64() >= Some(1)).then_some(())
    })?;
    has(&s.k(&["logs", "p", "--previous"])?, "run of p")
}

fn out_of_memory(s: &Space) -> Result<()> {
    let mut hungry = sh("x=a; while true; do x=$x$x; done");
    hungry["resources"] = json!({"limits": {"memory": "16Mi"}});
    let done = finish(s, pod("p", hungry))?;
    let state = terminated(&done);
    ensure!(state["reason"] == "OOMKilled" && state["exitCode"] == 137, "{state}");
    Ok(())
}

fn cpu_and_pids_are_limited(s: &Space) -> Result<()> {
    let mut limited =
        sh("cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null; sleep 1000");
    limited["resources"] = json!({"limits": {"cpu": "250m", "memory": "32Mi"}, "requests": {"cpu": "100m"}});
    create(s, &pod("p", limited))?;
    let made = s.running("p")?;
    ensure!(made["status"]["qosClass"] == "Burstable", "{}", made["status"]["qosClass"]);
    has(&log(s, "p")?, "25000")?;
    let mut best = pod("b", json!({}));
    best["spec"]["containers"][0]["resources"] = json!({"limits": {"cpu": "1000000"}});
    create(s, &best)?;
    s.event("b", "FailedScheduling", "Insufficient cpu").map(drop)
}

fn probes(s: &Space) -> Result<()> {
    let serve = "mkdir /www; echo ok > /www/healthy; touch /tmp/ready; exec httpd -f -p 8080 -h /www";
    let mut probed = sh(serve);
    probed["readinessProbe"] =
        json!({"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1, "failureThreshold": 1});
    probed["livenessProbe"] =
        json!({"httpGet": {"path": "/healthy", "port": 8080}, "periodSeconds": 1, "failureThreshold": 2});
    create(s, &pod("p", probed))?;
    s.running("p")?;
    s.k(&["exec", "p", "--", "rm", "/tmp/ready"])?;
    s.pod("p", seconds(15), |pod| (pod["status"]["containerStatuses"][0]["ready"] == false).then_some(()))?;
    s.event("p", "Unhealthy", "Readiness probe failed")?;
    s.k(&["exec", "p", "--", "rm", "/www/healthy"])?;
    s.event("p", "Unhealthy", "Liveness probe failed: HTTP probe failed with statuscode: 404")?;
    s.event("p", "Killing", "Container c failed liveness probe, will be restarted")?;
    s.pod("p", seconds(20), |pod| {
        let status = &pod["status"]["containerStatuses"][0];
        (status["restartCount"] == 1 && status["ready"] == true).then_some(())
    })?;
    let mut tcp = sh("sleep 1000");
    tcp["readinessProbe"] = json!({"tcpSocket": {"port": 1}, "periodSeconds": 1, "failureThreshold": 1});
    create(s, &pod("closed", tcp))?;
    s.event("closed", "Unhealthy", "connection refused")?;
    ensure!(s.object("pods/closed")?["status"]["containerStatuses"][0]["ready"] == false, "never ready");
    Ok(())
}

fn startup_probe(s: &Space) -> Result<()> {
    let mut slow = sh("sleep 3; touch /tmp/up; sleep 1000");
    slow["startupProbe"] =
        json!({"exec": {"command": ["test", "-e", "/tmp/up"]}, "periodSeconds": 1, "failureThreshold": 30});
    slow["livenessProbe"] =
        json!({"exec": {"command": ["test", "-e", "/tmp/up"]}, "periodSeconds": 1, "failureThreshold": 1});
    create(s, &pod("p", slow))?;
    let ready = s.running("p")?;
    let status = &ready["status"]["containerStatuses"][0];
    ensure!(status["started"] == true && status["restartCount"] == 0, "liveness waits for startup: {status}");
    Ok(())
}

fn init_containers(s: &Space) -> Result<()> {
    let mut p = pod("p", sh("cat /shared/a /shared/b; sleep 1000"));
    let mount = json!([{"name": "shared", "mountPath": "/shared"}]);
    let init = |name: &str, command: &str| json!({"name": name, "image": BOX, "command": ["sh", "-c", command], "volumeMounts": mount});
    p["spec"]["volumes"] = json!([{"name": "shared", "emptyDir": {}}]);
    p["spec"]["initContainers"] =
        json!([init("a", "echo one > /shared/a"), init("b", "test -e /shared/a && echo two > /shared/b")]);
    p["spec"]["containers"][0]["volumeMounts"] = mount.clone();
    create(s, &p)?;
    let ready = s.running("p")?;
    ensure!(
        ready["status"]["initContainerStatuses"][1]["state"]["terminated"]["reason"] == "Completed",
        "{}",
        ready["status"]
    );
    has(&log(s, "p")?, "one\ntwo\n")?;
    let mut fails = pod("f", sh("true"));
    fails["spec"]["initContainers"] = json!([init("bad", "exit 1")]);
    fails["spec"]["volumes"] = json!([{"name": "shared", "emptyDir": {}}]);
    let done = finish(s, fails)?;
    ensure!(done["status"]["phase"] == "Failed", "{}", done["status"]);
    ensure!(
        done["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "PodInitializing",
        "{}",
        done["status"]
    );
    Ok(())
}

fn environment(s: &Space) -> Result<()> {
    s.k(&["create", "configmap", "c", "--from-literal=one=1", "--from-literal=two=2"])?;
    s.k(&["create", "secret", "generic", "s", "--from-literal=word=secret"])?;
    let mut p = sh("env; id; cat /etc/hosts /etc/resolv.conf");
    p["envFrom"] = json!([{"prefix": "FROM_", "configMapRef": {"name": "c"}}]);
    p["env"] = json!([
        {"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "s", "key": "word"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
        {"name": "BOTH", "value": "$(WORD)-$(NODE) $(NONE) $$(WORD)"},
    ]);
    p["resources"] = json!({"limits": {"cpu": "250m"}});
    finish(s, pod("p", p))?;
    let told = log(s, "p")?;
    for want in [
        "FROM_one=1\n",
        "WORD=secret\n",
        "NODE=amd64\n",
        "IP=10.42.",
        "CPU=250\n",
        "BOTH=secret-amd64 $(NONE) $(WORD)\n",
        "KUBERNETES_SERVICE_HOST=10.43.0.1\n",
        "HOSTNAME=p\n",
        "uid=0",
        "10.43.0.10",
        "svc.cluster.local",
    ] {
        has(&told, want)?;
    }
    Ok(())
}

fn volumes_follow_their_objects(s: &Space) -> Result<()> {
    s.k(&["create", "configmap", "c", "--from-literal=key=before"])?;
    let mut p = pod("p", sh("sleep 1000"));
    p["metadata"]["labels"] = json!({"l": "v"});
    p["spec"]["containers"][0]["volumeMounts"] =
        json!([{"name": "all", "mountPath": "/all"}, {"name": "c", "mountPath": "/c"}]);
    p["spec"]["volumes"] = json!([
        {"name": "c", "configMap": {"name": "c"}},
        {"name": "all", "projected": {"sources": [
            {"configMap": {"name": "c", "items": [{"key": "key", "path": "deep/er"}]}},
            {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
        ]}},
    ]);
    create(s, &p)?;
    s.running("p")?;
    let cat = |path: &str| s.k(&["exec", "p", "--", "cat", path]);
    ensure!(cat("/c/key")? == "before" && cat("/all/deep/er")? == "before", "both volumes");
    has(&cat("/all/labels")?, "l=\"v\"")?;
    ensure!(cat("/all/token")?.split('.').count() == 3, "a token");
    ensure!(
        cat("/var/run/secrets/kubernetes.io/serviceaccount/namespace")? == s.name,
        "the account's own volume"
    );
    s.k(&["patch", "configmap", "c", "-p", r#"{"data":{"key":"after"}}"#])?;
    wait_for("the volume to follow", seconds(90), || {
        let now = cat("/c/key")?;
        Ok(if now == "after" { Ok(()) } else { Err(now) })
    })?;
    s.try_k(&["exec", "p", "--", "touch", "/c/x"])?.refused("Read-only file system")
}

fn shared_volume(s: &Space) -> Result<()> {
    let mut p =
        pod("p", sh("while ! test -s /d/x; do sleep 0.2; done; cat /d/x; df /m | tail -1; sleep 1000"));
    p["spec"]["volumes"] = json!([{"name": "d", "emptyDir": {}}, {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": "h", "hostPath": {"path": "/etc/hostname", "type": "File"}}]);
    let mounts = json!([{"name": "d", "mountPath": "/d"}, {"name": "m", "mountPath": "/m"}]);
    p["spec"]["containers"][0]["volumeMounts"] = mounts.clone();
    let mut second = sh("cat /h > /d/x; sleep 1000");
    second["name"] = json!("second");
    second["image"] = json!(BOX);
    second["volumeMounts"] =
        json!([{"name": "d", "mountPath": "/d"}, {"name": "h", "mountPath": "/h", "readOnly": true}]);
    if let Some(all) = p["spec"]["containers"].as_array_mut() {
        all.push(second);
    }
    create(s, &p)?;
    s.running("p")?;
    wait_for("the other's file", seconds(10), || {
        let text = s.k(&["logs", "p", "-c", "c"])?;
        Ok(if text.contains("amd64\n") && text.contains("tmpfs") { Ok(()) } else { Err(text) })
    })?;
    let mut missing = pod("missing", sh("true"));
    missing["spec"]["volumes"] =
        json!([{"name": "h", "hostPath": {"path": "/no/such", "type": "Directory"}}]);
    missing["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "h", "mountPath": "/h"}]);
    create(s, &missing)?;
    s.event("missing", "FailedMount", "hostPath type check failed: /no/such is not a directory").map(drop)
}

fn missing_config_map(s: &Space) -> Result<()> {
    let mut p = sh("echo $A; sleep 1000");
    p["env"] = json!([{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "later", "key": "a"}}}]);
    create(s, &pod("p", p))?;
    s.pod("p", seconds(20), |pod| {
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        let told = waiting["message"].as_str().is_some_and(|m| m.contains("configmap \"later\" not found"));
        (waiting["reason"] == "CreateContainerConfigError" && told).then_some(())
    })?;
    let mut mounted = pod("m", sh("true"));
    mounted["spec"]["volumes"] = json!([{"name": "v", "configMap": {"name": "never"}}]);
    mounted["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    create(s, &mounted)?;
    s.event("m", "FailedMount", "configmap \"never\" not found")?;
    // it starts by itself once it can
    s.k(&["create", "configmap", "later", "--from-literal=a=here"])?;
    s.running("p").map(drop)
}

fn hooks_and_termination(s: &Space) -> Result<()> {
    let mut p = pod("p", sh("trap 'echo got TERM; exit 0' TERM; while true; do sleep 0.1; done"));
    p["spec"]["terminationGracePeriodSeconds"] = json!(60);
    p["spec"]["containers"][0]["lifecycle"] = json!({
        "postStart": {"exec": {"command": ["sh", "-c", "echo hook > /tmp/hook"]}},
        "preStop": {"exec": {"command": ["sh", "-c", "echo stopping > /proc/1/fd/1"]}},
    });
    create(s, &p)?;
    s.running("p")?;
    ensure!(s.k(&["exec", "p", "--", "cat", "/tmp/hook"])? == "hook\n", "postStart ran");
    let mut command = s.kubectl_command();
    command.args(["-n", &s.name, "logs", "-f", "p"]);
    let follower = std::thread::spawn(move || sampan_tests::process::run(&mut command, b"", seconds(30)));
    std::thread::sleep(seconds(1));
    let began = sampan_world::clock::monotonic();
    s.k(&["delete", "pod", "p"])?;
    ensure!(
        began.elapsed() < seconds(40),
        "it ends when its process does, not when the grace period is over"
    );
    let told = follower.join().map_err(|_| anyhow::anyhow!("the follower died"))??.text();
    has(&told, "stopping\n")?;
    has(&told, "got TERM\n")
}

fn security_context(s: &Space) -> Result<()> {
    let mut p = sh(
        "id -u; id -g; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; touch /x; echo touched $?; mount -t tmpfs x /tmp; echo mounted $?",
    );
    p["securityContext"] = json!({"runAsUser": 65534, "runAsGroup": 65534, "readOnlyRootFilesystem": true,
        "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}});
    finish(s, pod("p", p))?;
    let told = log(s, "p")?;
    for want in [
        "65534\n65534\n",
        "CapEff:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "touched 1",
        "mounted 1",
    ] {
        has(&told, want)?;
    }
    let mut root = sh("true");
    root["securityContext"] = json!({"runAsNonRoot": true});
    create(s, &pod("root", root))?;
    s.event("root", "Failed", "container has runAsNonRoot and image will run as root").map(drop)
}

fn host_namespaces(s: &Space) -> Result<()> {
    let mut p = pod("p", sh("hostname; ip -o addr; sleep 1000"));
    p["spec"]["hostNetwork"] = json!(true);
    create(s, &p)?;
    let ready = s.running("p")?;
    ensure!(
        ready["status"]["podIP"] == "10.64.0.11" && ready["status"]["hostIP"] == "10.64.0.11",
        "{}",
        ready["status"]
    );
    has(&log(s, "p")?, "10.64.0.11")?;
    let mut shared = pod("shared", sh("sleep 1000"));
    shared["spec"]["shareProcessNamespace"] = json!(true);
    shared["spec"]["containers"][0]["name"] = json!("a");
    create(s, &shared)?;
    s.running("shared")?;
    let first = s.k(&["exec", "shared", "--", "cat", "/proc/1/cmdline"])?;
    ensure!(!first.contains("sleep"), "a PID 1 of its own: {first}");
    Ok(())
}

fn job_with_deadline(s: &Space) -> Result<()> {
    let job = |name: &str, extra: Value, command: &str| {
        let mut job = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {
            "template": {"spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
                "containers": [{"name": "c", "image": BOX, "command": ["sh", "-c", command]}]}}}});
        for (key, value) in extra.as_object().into_iter().flatten() {
            job["spec"][key] = value.clone();
        }
        s.post(&s.path("batch/v1/jobs"), &job)?.ok()
    };
    job("three", json!({"completions": 3, "parallelism": 2}), "true")?;
    job("fails", json!({"backoffLimit": 0}), "exit 1")?;
    job("late", json!({"activeDeadlineSeconds": 2}), "sleep 1000")?;
    let condition = |name: &str, kind: &str, reason: &str| {
        wait_for(&format!("job {name} to be {kind}"), seconds(40), || {
            let job = s.object(&format!("batch/v1/jobs/{name}"))?;
            let all = job["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let found = all.iter().any(|c| {
                c["type"] == kind && c["status"] == "True" && (reason.is_empty() || c["reason"] == reason)
            });
            Ok(if found { Ok(job) } else { Err(job["status"].to_string()) })
        })
    };
    ensure!(condition("three", "Complete", "")?["status"]["succeeded"] == 3, "all completions");
    condition("fails", "Failed", "BackoffLimitExceeded")?;
    condition("late", "Failed", "DeadlineExceeded").map(drop)
}

fn pod_on_no_node(s: &Space) -> Result<()> {
    let mut nowhere = pod("nowhere", sh("true"));
    nowhere["spec"]["nodeSelector"] = json!({"no": "such"});
    create(s, &nowhere)?;
    s.event(
        "nowhere",
        "FailedScheduling",
        "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector",
    )?;
    // the condition follows the event, by a moment
    s.pod("nowhere", seconds(10), |pod| {
        let condition =
            pod["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == "PodScheduled")?;
        (condition["reason"] == "Unschedulable").then_some(())
    })?;
    // it goes when the node fits after all
    s.k(&["label", "node", "amd64", "no=such"])?;
    let began = s.pod("nowhere", seconds(20), |pod| pod["spec"]["nodeName"].as_str().map(|_| ()));
    s.k(&["label", "node", "amd64", "no-"])?;
    began
}

fn owner_gone(s: &Space) -> Result<()> {
    let owner = s
        .post(
            &s.path("configmaps"),
            &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner"}}),
        )?
        .ok()?;
    let mut owned = pod("owned", sh("sleep 1000"));
    owned["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["metadata"]["uid"]}]);
    create(s, &owned)?;
    s.running("owned")?;
    s.k(&["delete", "configmap", "owner"])?;
    wait_for("the garbage collector", seconds(30), || {
        let left = s.get(&s.path("pods/owned"))?;
        Ok(if left.code == 404 { Ok(()) } else { Err(left.json()["metadata"].to_string()) })
    })
    .context("what an object owned goes with it")
}
