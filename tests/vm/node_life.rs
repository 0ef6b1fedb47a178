//! One virtual machine: from nothing to a node, what systemd and cgroup v2 make of it, reboot, power cut, upgrade.
use anyhow::{Context, Result, ensure};
use sampan_tests::image::{Entry, Image, layer};
use sampan_tests::{fetch, has, seconds, wait_for};
use serde_json::{Value, json};

use crate::rootfs::Recipe;
use crate::site::{AMD64, Site};

pub const IMAGE: &str = "sampan.test/small:1";
const APPLETS: &[&str] = &[
    "sh", "cat", "dd", "echo", "grep", "head", "hostname", "httpd", "id", "ls", "mkdir", "mknod", "nc",
    "nslookup", "rm", "sleep", "tail", "test", "touch", "true", "uname", "wget",
];
const PODS_WAIT: &str = "--timeout=120s";

/// Busybox of the machine's architecture.
pub fn small_image(arch: &str, busybox: &std::path::Path) -> Result<Image> {
    let program = std::fs::read(busybox)?;
    let links: Vec<String> = APPLETS.iter().map(|a| format!("bin/{a}")).collect();
    let mut entries: Vec<Entry<'_>> = ["bin/", "etc/", "proc/", "sys/", "dev/", "root/", "tmp/", "www/"]
        .map(|folder| Entry::Folder(folder, 0o755))
        .into();
    entries.push(Entry::File("bin/busybox", 0o755, &program));
    entries.push(Entry::File("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n"));
    entries.extend(links.iter().map(|l| Entry::Link(l, "busybox")));
    Image::of_arch(arch, IMAGE, &layer(&entries)?, json!({"Env": ["PATH=/bin"], "Cmd": ["sleep", "100000"]}))
}

/// What a machine has in all places where an installation could leave something. systemd's own come and go: credentials of
/// its services, cgroups of its mounts (the mounts themselves are listed).
pub fn traces(site: &Site, recipe: &Recipe) -> Result<Vec<String>> {
    let script = r#"
find / -xdev \( -path /tmp -o -path /var/tmp -o -path /var/log/journal -o -path /root -o -path '/home/*' -o -path /var/lib/systemd \
  -o -path /var/cache -o -path /var/log/wtmp -o -path /var/log/btmp -o -path /var/log/lastlog \) -prune -o -print | sort
ip -o link | awk '{print "link", $2}'
ip -o -4 addr | awk '{print "address", $2, $4}'
ip route | sed 's/^/route /'
ip rule | sed 's/^/rule /'
nft list ruleset | sed 's/^/nft /'
awk '$2 !~ "^/run/(user|credentials)" {print "mount", $2}' /proc/mounts
ls -d /sys/fs/cgroup/*/ /run/* | grep -v '^/sys/fs/cgroup/.*[.]mount/$'
systemctl list-units --all --no-legend --plain | awk '/sampan/ {print "unit", $1, $4}'
ps -eo comm | grep -x sampan | sed 's/^/process /'
true"#;
    Ok(site.on(recipe, script)?.ok()?.lines().map(String::from).collect())
}

pub fn a_bare_machine(site: &Site) -> Result<()> {
    let start = sampan_world::clock::monotonic();
    site.wait_for_login(&AMD64, "")?;
    println!("  a login after {:.0} s", start.elapsed().as_secs_f32());
    let told = site.on(&AMD64, "cat /proc/1/comm; stat -fc %T /sys/fs/cgroup; uname -rm; id -un")?.ok()?;
    println!("  {}", told.trim().replace('\n', ", "));
    for want in ["systemd\n", "cgroup2fs\n", "x86_64\n", "root\n"] {
        has(&told, want)?;
    }
    site.write("before-amd64", &traces(site, &AMD64)?.join("\n"))
}

pub fn install(site: &Site) -> Result<()> {
    let line = format!(
        "install {} --binary-dir bin --local-path kubeconfig --context vm --extra-args --kubelet-arg=pod-max-pids=300",
        Site::way(&AMD64)
    );
    let start = sampan_world::clock::monotonic();
    let ran = site.sampan(&line, 300)?;
    let told = ran.text();
    ran.ok()?;
    println!("  a bare machine to a Ready node: {:.1} s", start.elapsed().as_secs_f32());
    has(&told, "node vm-amd64 is Ready")?;
    let unit = site.on(
        &AMD64,
        "systemctl is-enabled sampan; systemctl is-active sampan; systemctl show -p Delegate sampan",
    )?;
    ensure!(unit.out == "enabled\nactive\nDelegate=yes\n", "{}", unit.text());
    let node: Value = serde_json::from_str(&site.kubectl("get node vm-amd64 -o json")?)?;
    let info = &node["status"]["nodeInfo"];
    ensure!(info["osImage"].as_str().is_some_and(|o| o.contains("Debian GNU/Linux 12")), "{info}");
    ensure!(info["architecture"] == "amd64", "{info}");
    // again: nothing changes, nothing is started anew
    let pid = || site.on(&AMD64, "systemctl show -p MainPID --value sampan")?.ok();
    let before = pid()?;
    let again = site.sampan(&line, 120)?;
    has(&again.text(), "sampan runs already")?;
    again.ok()?;
    ensure!(before == pid()?, "it was started anew");
    Ok(())
}

const WEB: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  strategy: {type: Recreate}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {kubernetes.io/arch: amd64, kubernetes.io/hostname: vm-amd64}
      terminationGracePeriodSeconds: 1
      containers:
      - name: c
        image: sampan.test/small:1
        command: [sh, -c, 'hostname >/www/index.html; exec httpd -f -p 8080 -h /www']
        ports: [{containerPort: 8080}]
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 2}
        livenessProbe: {exec: {command: [sh, -c, '! test -e /tmp/sick']}, periodSeconds: 2, failureThreshold: 2, timeoutSeconds: 5}
";

/// The archive goes in through Debian's own OpenSSH client, and is imported on the machine.
fn import(site: &Site) -> Result<()> {
    let archive = site.file("small-amd64.tar");
    small_image(AMD64.arch, &site.rootfs(&AMD64).busybox())?.write_archive(&archive)?;
    let ran = site.ssh(&AMD64, "sudo sampan image import -", &std::fs::read(&archive)?)?;
    ran.ok().context("importing an image")?;
    has(&site.ssh(&AMD64, "sudo sampan image ls", b"")?.ok()?, "sampan.test/small")
}

pub fn web_pod(site: &Site) -> Result<String> {
    Ok(site.kubectl("get pod -l app=web -o jsonpath={.items[0].metadata.name}")?.trim().to_string())
}

fn container_id(site: &Site, pod: &str) -> Result<String> {
    site.kubectl(&format!("get pod {pod} -o jsonpath={{.status.containerStatuses[0].containerID}}"))
}

/// The service answers with its pod's name, by NodePort from another machine and by its cluster address on the node.
pub fn serves(site: &Site, limit_s: u64) -> Result<()> {
    let by_port = fetch(&format!("http://{}:30080/", AMD64.ip));
    let pod = wait_for("the service by NodePort", seconds(limit_s), || {
        let ran = site.hub(&by_port.each_ref().map(String::as_str), b"", 10)?;
        Ok(if ran.out.starts_with("web-") { Ok(ran.out.trim().to_string()) } else { Err(ran.text()) })
    })?;
    let ip = site.kubectl("get service web -o jsonpath={.spec.clusterIP}")?;
    let script = format!(
        "timeout 10 bash -c 'exec 3<>/dev/tcp/{ip}/80; printf \"GET / HTTP/1.0\\r\\n\\r\\n\" >&3; cat <&3'"
    );
    wait_for("the service by its address", seconds(30), || {
        let ran = site.on(&AMD64, &script)?;
        Ok(if ran.out.contains(&pod) { Ok(()) } else { Err(ran.text()) })
    })
}

pub fn pods_and_services(site: &Site) -> Result<()> {
    import(site)?;
    site.apply(WEB)?;
    let start = sampan_world::clock::monotonic();
    site.kubectl(&format!("wait --for=condition=Available deployment/web {PODS_WAIT}"))?;
    println!("  a deployment available after {:.1} s", start.elapsed().as_secs_f32());
    serves(site, 60)?;
    let pod = web_pod(site)?;
    let ip = site.kubectl("get service web -o jsonpath={.spec.clusterIP}")?;
    wait_for("the service's name", seconds(30), || {
        let ran = site.in_pod(&pod, "nslookup web.default.svc.cluster.local")?;
        Ok(if ran.out.contains(&ip) { Ok(()) } else { Err(ran.text()) })
    })?;
    has(&site.in_pod(&pod, "grep ' / ' /proc/mounts")?.ok()?, "overlay")?;
    let said = site.kubectl(&format!("exec {pod} -- uname -m"))?;
    ensure!(said.trim() == "x86_64", "{said}");
    site.apply(&job("says", "echo from the inside", ""))?;
    site.kubectl(&format!("wait --for=condition=Complete job/says {PODS_WAIT}"))?;
    has(&site.kubectl("logs job/says")?, "from the inside")
}

fn job(name: &str, script: &str, resources: &str) -> String {
    format!(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {{name: {name}}}\nspec:\n  backoffLimit: 0\n  template:\n    spec:\n      \
         restartPolicy: Never\n      nodeSelector: {{kubernetes.io/hostname: vm-amd64}}\n      containers:\n      - name: c\n        \
         image: {IMAGE}\n        command: [sh, -c, '{script}']\n        resources: {{{resources}}}\n"
    )
}

const BUSY: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: busy}
spec:
  nodeSelector: {kubernetes.io/hostname: vm-amd64}
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: sampan.test/small:1
    command: [sh, -c, 'while :; do :; done']
    resources: {limits: {cpu: 100m, memory: 48Mi}}
    securityContext: {seccompProfile: {type: RuntimeDefault}}
";
/// What a container sees of its limits, and what the machine has above it.
const LIMITS: &str = "cd /sys/fs/cgroup; cat cpu.max memory.max cpu.weight; grep nr_throttled cpu.stat";

fn busy_is_limited(site: &Site) -> Result<()> {
    let seen = site.in_pod("busy", LIMITS)?.ok()?;
    let lines: Vec<&str> = seen.lines().collect();
    ensure!(lines.starts_with(&["10000 100000", "50331648", "4"]), "{seen}");
    let throttled: u64 =
        lines.last().and_then(|l| l.rsplit(' ').next()).and_then(|n| n.parse().ok()).unwrap_or(0);
    ensure!(throttled > 5, "{seen}");
    Ok(())
}

pub fn limits_of_cgroup_v2(site: &Site) -> Result<()> {
    site.apply(BUSY)?;
    site.kubectl(&format!("wait --for=condition=Ready pod/busy {PODS_WAIT}"))?;
    std::thread::sleep(seconds(3));
    busy_is_limited(site)?;
    // the pod's own group: all its processes together
    let uid = site.kubectl("get pod busy -o jsonpath={.metadata.uid}")?;
    let script = format!(
        "cd /sys/fs/cgroup/kubepods/pod{uid} && cat pids.max cpu.max memory.max; cat ../cgroup.controllers"
    );
    let group = site.on(&AMD64, &script)?.ok()?;
    ensure!(group.starts_with("300\n10000 100000\n50331648\n"), "{group}");
    // more memory than it may have: killed, and the reason told
    let resources = "limits: {memory: 24Mi}";
    site.apply(&job("hog", "dd if=/dev/zero of=/dev/null bs=64M count=1", resources))?;
    site.kubectl(&format!("wait --for=condition=Failed job/hog {PODS_WAIT}"))?;
    let state =
        "get pod -l job-name=hog -o jsonpath={.items[0].status.containerStatuses[0].state.terminated}";
    let state: Value = serde_json::from_str(&site.kubectl(state)?)?;
    ensure!(state["reason"] == "OOMKilled" && state["exitCode"] == 137, "{state}");
    // more processes than it may have
    let fork = "i=0; while test $i -lt 400; do sleep 30 & i=$((i+1)); done; echo all";
    site.apply(&job("forks", fork, ""))?;
    let said = wait_for("the process limit", seconds(120), || {
        let ran = site.try_kubectl("logs job/forks")?;
        Ok(if ran.out.contains("fork") || ran.out.contains("all") { Ok(ran.out) } else { Err(ran.text()) })
    })?;
    has(&said, "fork")?;
    site.kubectl("delete job forks hog says --wait=false").map(drop)
}

pub fn devices_and_seccomp(site: &Site) -> Result<()> {
    let number = site.on(&AMD64, "cat /sys/block/vda/dev")?.ok()?;
    let (major, minor) = number.trim().split_once(':').context("the disk's number")?;
    let pod = web_pod(site)?;
    // the default capabilities have mknod; the device program keeps its use to the harmless ones
    let script = format!(
        "cd /tmp && mknod disk b {major} {minor} && mknod zero c 1 5 && dd if=zero of=/dev/null bs=10 count=1 2>/dev/null && echo zero is read; \
         dd if=disk of=/dev/null bs=512 count=1 && echo DISK IS READ; rm disk zero"
    );
    let ran = site.in_pod(&pod, &script)?;
    has(&ran.text(), "zero is read")?;
    has(&ran.text(), "Operation not permitted")?;
    ensure!(!ran.text().contains("DISK IS READ"), "{}", ran.text());
    has(&site.in_pod("busy", "grep Seccomp: /proc/self/status")?.ok()?, "\t2")?;
    has(&site.in_pod(&pod, "grep Seccomp: /proc/self/status")?.ok()?, "\t0")
}

pub fn probes_and_figures(site: &Site) -> Result<()> {
    let pod = web_pod(site)?;
    site.in_pod(&pod, "touch /tmp/sick")?.ok()?;
    wait_for("the sick container to be started anew", seconds(60), || {
        let count = "get pod -l app=web -o jsonpath={.items[0].status.containerStatuses[0].restartCount}";
        let count = site.kubectl(count)?;
        Ok(if count == "1" { Ok(()) } else { Err(count) })
    })?;
    serves(site, 60)?;
    let summary: Value =
        serde_json::from_str(&site.kubectl("get --raw /api/v1/nodes/vm-amd64/proxy/stats/summary")?)?;
    let memory = &summary["node"]["memory"];
    let (used, free) = (memory["workingSetBytes"].as_u64(), memory["availableBytes"].as_u64());
    let (used, free) = (used.context("workingSetBytes")?, free.context("availableBytes")?);
    // 1024 MB, less what the kernel keeps for itself
    ensure!(used > 60 << 20 && (850 << 20..1024 << 20).contains(&(used + free)), "{memory}");
    let pods = summary["pods"].as_array().context("pods")?;
    let busy = pods.iter().find(|p| p["podRef"]["name"] == "busy").context("busy's figures")?;
    let (cpu, rss) =
        (busy["cpu"]["usageCoreNanoSeconds"].as_u64(), busy["memory"]["workingSetBytes"].as_u64());
    ensure!(cpu > Some(100_000_000) && rss.is_some_and(|b| (4096..48 << 20).contains(&b)), "{busy}");
    Ok(())
}

/// systemd rewrites groups and networkd addresses when they are told to begin anew: nodes and pods stay as they are.
pub fn systemd_goes_its_way(site: &Site) -> Result<()> {
    let pod = web_pod(site)?;
    let before = (container_id(site, &pod)?, container_id(site, "busy")?);
    site.on(
        &AMD64,
        "systemctl daemon-reload && systemctl restart systemd-networkd && systemctl daemon-reexec",
    )?
    .ok()?;
    busy_is_limited(site)?;
    serves(site, 30)?;
    site.on(&AMD64, "systemctl restart sampan")?.ok()?;
    wait_for("the API", seconds(60), || {
        let ran = site.try_kubectl("get --raw /readyz")?;
        Ok(if ran.code == 0 { Ok(()) } else { Err(ran.text()) })
    })?;
    site.kubectl(&format!("wait --for=condition=Ready pod/{pod} pod/busy {PODS_WAIT}"))?;
    ensure!(before == (container_id(site, &pod)?, container_id(site, "busy")?), "the same containers");
    busy_is_limited(site)?;
    serves(site, 30)?;
    site.kubectl("delete pod busy").map(drop)
}

/// The node is Ready, heard of since its boot, and its pod serves.
fn is_back(site: &Site) -> Result<()> {
    let boot = site.on(&AMD64, "cat /proc/sys/kernel/random/boot_id")?.ok()?;
    wait_for("the node after its boot", seconds(120), || {
        let ran = site.try_kubectl("get node vm-amd64 -o json")?;
        let node: Value = serde_json::from_str(&ran.out).unwrap_or_default();
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let ready = conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
        let same = node["status"]["nodeInfo"]["bootID"] == boot.trim();
        Ok(if ready && same { Ok(()) } else { Err(ran.text()) })
    })?;
    serves(site, 120)
}

pub fn reboot(site: &Site) -> Result<()> {
    let (pod, before) = (web_pod(site)?, site.on(&AMD64, "cat /proc/sys/kernel/random/boot_id")?.ok()?);
    let restarts = format!("get pod {pod} -o jsonpath={{.status.containerStatuses[0].restartCount}}");
    let old: u32 = site.kubectl(&restarts)?.parse()?;
    let start = sampan_world::clock::monotonic();
    site.on(&AMD64, "systemctl reboot")?;
    site.wait_for_login(&AMD64, before.trim())?;
    let login = start.elapsed().as_secs_f32();
    is_back(site)?;
    println!(
        "  a reboot: login after {login:.0} s, the pod serves after {:.0} s",
        start.elapsed().as_secs_f32()
    );
    ensure!(web_pod(site)? == pod, "the same pod");
    let new: u32 = site.kubectl(&restarts)?.parse()?;
    ensure!(new == old + 1, "{old} restarts, then {new}");
    let failed = site.on(&AMD64, "systemctl --failed --no-legend --plain")?.ok()?;
    ensure!(!failed.contains("sampan"), "{failed}");
    Ok(())
}

pub fn power_cut(site: &Site) -> Result<()> {
    let before = site.on(&AMD64, "cat /proc/sys/kernel/random/boot_id")?.ok()?;
    site.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: written-last}\ndata: {a: b}\n")?;
    let start = sampan_world::clock::monotonic();
    site.with_machine(&AMD64, crate::machine::Machine::cut_power)?;
    site.wait_for_login(&AMD64, before.trim())?;
    is_back(site)?;
    println!("  a power cut: the pod serves after {:.0} s", start.elapsed().as_secs_f32());
    has(&site.kubectl("get configmap written-last -o jsonpath={.data.a}")?, "b")
}

pub fn upgrade(site: &Site) -> Result<()> {
    let pod = web_pod(site)?;
    let before = container_id(site, &pod)?;
    // another digest, the same program: bytes behind an ELF file's end mean nothing
    let mut bytes = std::fs::read(site.program())?;
    bytes.extend_from_slice(b"next");
    std::fs::create_dir_all(site.file("next"))?;
    std::fs::write(site.file("next/sampan-amd64"), &bytes)?;
    let start = sampan_world::clock::monotonic();
    let ran = site.sampan(&format!("upgrade {} --binary-dir next", Site::way(&AMD64)), 240)?;
    has(&ran.text(), "node vm-amd64 is Ready")?;
    ran.ok()?;
    println!("  upgraded in {:.1} s", start.elapsed().as_secs_f32());
    let want = sampan_tests::image::digest(&bytes);
    let sum = site.on(&AMD64, "sha256sum </proc/$(systemctl show -p MainPID --value sampan)/exe")?.ok()?;
    ensure!(sum.starts_with(&want["sha256:".len()..]), "{sum} runs, not {want}");
    site.kubectl(&format!("wait --for=condition=Ready pod/{pod} {PODS_WAIT}"))?;
    ensure!(before == container_id(site, &pod)?, "the same container");
    serves(site, 30)
}
