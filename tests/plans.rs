//! Nodes that upgrade themselves because a Plan says so, and go back when they must.
//!
//! Other releases are the program under test with its version's digits changed.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use sampan_tests::boards::{self, Boards, Step};
use sampan_tests::{has, seconds, wait_for};
use sha2::{Digest, Sha256};

const NODES: [(&str, &str); 2] = [("amd64", "10.64.0.11"), ("amd64-2", "10.64.0.12")];
const HOSTS: &str = "[{hostname: amd64, ip: 10.64.0.11}, {hostname: amd64-2, ip: 10.64.0.12}]";

const STEPS: &[Step] = &[
    ("a_cluster", a_cluster),
    ("a_plan_is_checked", a_plan_is_checked),
    ("it_waits_for_programs", it_waits_for_programs),
    ("skew_is_told_before", skew_is_told_before),
    ("upgrade_with_pods_running", upgrade_with_pods_running),
    ("a_program_that_ends", a_program_that_ends),
    ("a_program_that_is_none", a_program_that_is_none),
    ("drained_for_an_upgrade", drained_for_an_upgrade),
];

fn main() -> ExitCode {
    boards::run("plans", &NODES, STEPS)
}

fn release(program: &str) -> String {
    format!("v1.36.2+sampan{program}")
}

/// Where the server finds programs for its nodes.
fn binaries(lab: &Boards) -> PathBuf {
    lab.node_folder("amd64").join("data/server/binaries")
}

/// A release's bundle in that folder, as it would be copied there.
fn give_bundle(lab: &Boards, name: &str, program: &[u8]) -> Result<()> {
    let digest: String = Sha256::digest(program).iter().map(|b| format!("{b:02x}")).collect();
    let sums = format!("{digest}  sampan-amd64\n");
    let path = binaries(lab).join(name);
    let mut bundle = tar::Builder::new(std::fs::File::create(path)?);
    for (name, bytes) in [("SHA256SUMS", sums.as_bytes()), ("sampan-amd64", program)] {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o755);
        bundle.append_data(&mut header, name, bytes)?;
    }
    bundle.into_inner()?;
    Ok(())
}

fn apply(lab: &Boards, name: &str, spec: &str) -> Result<()> {
    let plan =
        format!("apiVersion: upgrade.sampan.io/v1\nkind: Plan\nmetadata: {{name: {name}}}\nspec: {spec}\n");
    lab.write("plan.yaml", &plan)?;
    lab.kubectl("apply -f /tmp/plan.yaml").map(drop)
}

/// `STATUS REASON MESSAGE` of a plan's condition.
fn condition(lab: &Boards, plan: &str, kind: &str) -> Result<String> {
    let path = format!(
        "{{range .status.conditions[?(@.type=='{kind}')]}}{{.status}} {{.reason}} {{.message}}{{end}}"
    );
    lab.kubectl(&format!("get plan {plan} -o \"jsonpath={path}\""))
}

fn until(lab: &Boards, plan: &str, kind: &str, want: &str, limit_s: u64) -> Result<String> {
    let wanted = || -> Result<Result<String, String>> {
        let found = condition(lab, plan, kind)?;
        Ok(if found.contains(want) { Ok(found) } else { Err(found) })
    };
    wait_for(&format!("{kind} of plan {plan} with {want:?}"), seconds(limit_s), wanted).map_err(|error| {
        let more = lab.kubectl("get nodes,plans -o wide").unwrap_or_default();
        let logs =
            ["amd64", "amd64-2"].map(|node| lab.on(node, "tail -n 25 /var/log/sampan.log").map(|r| r.out));
        error.context(format!("{more}\n{}", logs.into_iter().flatten().collect::<Vec<_>>().join("\n--\n")))
    })
}

fn versions(lab: &Boards) -> Result<String> {
    lab.kubectl("get nodes -o jsonpath={.items[*].status.nodeInfo.kubeletVersion}")
}

/// The process that the init script's loop started.
fn process(lab: &Boards, node: &str) -> Result<String> {
    let script = "for s in sampan sampan-agent; do [ ! -s /run/$s.pid ] || cat /proc/$(cat /run/$s.pid)/task/*/children; done";
    Ok(lab.on(node, script)?.ok()?.trim().to_string())
}

fn a_cluster(lab: &Boards) -> Result<()> {
    for (node, _) in NODES {
        let images = lab.node_folder(node).join("data/agent/images");
        std::fs::create_dir_all(&images)?;
        sampan_tests::image::box_image()?.write_archive(&images.join("box.tar"))?;
    }
    lab.write("hosts.yaml", HOSTS)?;
    lab.sampan_within("apply hosts.yaml --ssh-key plain --accept-new-host-keys", 150)?.ok()?;
    let image = sampan_tests::image::BOX;
    for (node, _) in NODES {
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: stays-{node}}}\nspec:\n  nodeName: {node}\n  containers:\n  \
             - {{name: c, image: '{image}', command: [sleep, '3000']}}\n"
        );
        lab.write("pod.yaml", &pod)?;
        lab.kubectl("apply -f /tmp/pod.yaml")?;
    }
    lab.kubectl("wait --for=condition=Ready pod --all --timeout=60s").map(drop)
}

fn a_plan_is_checked(lab: &Boards) -> Result<()> {
    let refused = |spec: &str, want: &str| -> Result<()> {
        let error = apply(lab, "bad", spec).err().context("it was taken")?;
        has(&format!("{error:#}"), want)
    };
    refused("{version: '0.2.0', nodeSelector: {}}", "spec.version: Invalid value")?;
    refused("{}", "spec.nodeSelector: Required value")?;
    refused("{nodeSelector: {}, channel: x}", "unknown field \"spec.channel\"")?;
    has(&lab.kubectl("explain plan.spec.drain.force")?, "no controller will make anew")?;
    has(&lab.kubectl("api-resources --api-group=upgrade.sampan.io")?, "plans")
}

/// Nothing is begun with while the server does not have what is wanted.
fn it_waits_for_programs(lab: &Boards) -> Result<()> {
    apply(lab, "next", &format!("{{nodeSelector: {{}}, version: {}}}", release("0.2.0")))?;
    until(
        lab,
        "next",
        "Complete",
        "False Waiting the server has no program of v1.36.2+sampan0.2.0 for amd64",
        20,
    )?;
    let table = lab.kubectl("get plan next")?;
    has(&table, "COMPLETE")?;
    lab.kubectl("delete plan next")?;
    // without a version it is the newest that the server has, which is its own
    apply(lab, "newest", "{nodeSelector: {}}")?;
    until(lab, "newest", "Complete", "True Complete", 30)?;
    let latest = lab.kubectl("get plan newest -o jsonpath={.status.latestVersion}")?;
    ensure!(latest == release(env!("CARGO_PKG_VERSION")), "{latest}");
    lab.kubectl("delete plan newest").map(drop)
}

fn skew_is_told_before(lab: &Boards) -> Result<()> {
    let agents = "{matchExpressions: [{key: node-role.kubernetes.io/control-plane, operator: DoesNotExist}]}";
    apply(lab, "agents", &format!("{{nodeSelector: {agents}, version: {}}}", release("0.2.0")))?;
    let told = until(lab, "agents", "Validated", "upgrade the server first", 20)?;
    has(&told, "node amd64-2 must not be newer than its server")?;
    apply(lab, "agents", &format!("{{nodeSelector: {{}}, version: {}}}", release("0.0.9")))?;
    until(lab, "agents", "Validated", "cannot go back to 0.0.9", 20)?;
    lab.kubectl("delete plan agents")?;
    ensure!(!versions(lab)?.contains("0.2.0"), "{}", versions(lab)?);
    Ok(())
}

/// Server, then agent; in place, in the same processes, with the same containers.
fn upgrade_with_pods_running(lab: &Boards) -> Result<()> {
    let containers =
        || lab.kubectl("get pods -o jsonpath={.items[*].status.containerStatuses[*].containerID}");
    let (before, processes) = (containers()?, [process(lab, "amd64")?, process(lab, "amd64-2")?]);
    apply(lab, "next", &format!("{{nodeSelector: {{}}, version: {}}}", release("0.2.0")))?;
    until(lab, "next", "Complete", "Waiting", 20)?;
    give_bundle(lab, "sampan-bundle.tar", &lab.as_release("0.2.0", &[])?)?;
    let start = sampan_world::clock::monotonic();
    until(lab, "next", "Complete", "True Complete", 120)?;
    println!("  server and agent upgraded by a plan: {:.1} s", start.elapsed().as_secs_f32());
    ensure!(versions(lab)? == format!("{0} {0}", release("0.2.0")), "{}", versions(lab)?);
    for (node, before) in ["amd64", "amd64-2"].into_iter().zip(&processes) {
        let after = process(lab, node)?;
        ensure!(after == *before, "{node}: process {before} became {after}");
        let files = lab.on(node, "ls -A /usr/local/bin; /usr/local/bin/sampan --version; /usr/local/bin/sampan.previous --version")?.ok()?;
        has(&files, "sampan 0.2.0 (Kubernetes")?;
        has(&files, "sampan 0.1.0 (Kubernetes")?;
        ensure!(!files.contains(".next") && !files.contains(".part"), "{node}: {files}");
        let left = lab.kubectl(&format!("get node {node} -o jsonpath={{.metadata.annotations}}"))?;
        ensure!(
            !left.contains("upgrade.sampan.io/plan") && left.contains("upgrade.sampan.io/completed"),
            "{left}"
        );
    }
    ensure!(before == containers()?, "{before} became {}", containers()?);
    lab.kubectl("wait --for=condition=Ready pod --all --timeout=30s")?;
    let pod = lab.kubectl("exec stays-amd64-2 -- echo alive")?;
    has(&pod, "alive")?;
    has(&lab.kubectl("get events --field-selector involvedObject.kind=Plan")?, "All selected nodes have")
}

/// It starts and says its version, but its agent cannot find its configuration: the one before runs again by itself.
fn a_program_that_ends(lab: &Boards) -> Result<()> {
    let broken = lab.as_release("0.3.0", &[("/etc/sampan/config.yaml", "/etc/sampan/config.yamX")])?;
    give_bundle(lab, "sampan-0.3.0.tar", &broken)?;
    let selector = "{matchLabels: {kubernetes.io/hostname: amd64-2}}";
    // the server must not be older
    apply(lab, "broken", &format!("{{nodeSelector: {selector}, version: {}}}", release("0.3.0")))?;
    until(lab, "broken", "Validated", "upgrade the server first", 20)?;
    lab.kubectl("delete plan broken")?;
    let selector = "{matchLabels: {kubernetes.io/hostname: amd64}}";
    let server = lab.as_release("0.3.0", &[])?;
    std::fs::remove_file(binaries(lab).join("sampan-0.3.0.tar"))?;
    give_bundle(lab, "sampan-0.3.0.tar", &server)?;
    apply(lab, "server", &format!("{{nodeSelector: {selector}, version: {}}}", release("0.3.0")))?;
    until(lab, "server", "Complete", "True Complete", 120)?;
    std::fs::remove_file(binaries(lab).join("sampan-0.3.0.tar"))?;
    give_bundle(lab, "sampan-0.3.1.tar", &broken)?;
    let selector = "{matchLabels: {kubernetes.io/hostname: amd64-2}}";
    apply(lab, "broken", &format!("{{nodeSelector: {selector}, version: {}}}", release("0.3.0")))?;
    until(lab, "broken", "LatestResolved", "True", 20)?;
    let start = sampan_world::clock::monotonic();
    let told = until(lab, "broken", "Complete", "False NodeFailed", 90)?;
    println!("  a program that ends at once, back to the one before: {:.1} s", start.elapsed().as_secs_f32());
    has(
        &told,
        "node amd64-2: v1.36.2+sampan0.3.0 ended before its node was Ready; v1.36.2+sampan0.2.0 runs again",
    )?;
    lab.kubectl("wait --for=condition=Ready node amd64-2 --timeout=30s")?;
    has(&lab.on("amd64-2", "/usr/local/bin/sampan --version")?.ok()?, "sampan 0.2.0")?;
    // once is enough
    lab.on("amd64-2", "/etc/init.d/sampan-agent restart")?.ok()?;
    lab.kubectl("wait --for=condition=Ready node amd64-2 --timeout=30s")?;
    has(&condition(lab, "broken", "Complete")?, "NodeFailed")?;
    lab.kubectl("delete plan broken server").map(drop)
}

/// A digest that the plan names is the only right one.
fn a_program_that_is_none(lab: &Boards) -> Result<()> {
    let spec = format!(
        "{{nodeSelector: {{}}, version: {}, sha256: {{amd64: {}}}}}",
        release("0.3.0"),
        "ab".repeat(32)
    );
    apply(lab, "pinned", &spec)?;
    until(lab, "pinned", "Complete", "for amd64 with the plan's digest", 20)?;
    lab.kubectl("delete plan pinned").map(drop)
}

/// Pods that nothing would make again hold the plan; with force they go, and the node is schedulable after it.
fn drained_for_an_upgrade(lab: &Boards) -> Result<()> {
    std::fs::remove_file(binaries(lab).join("sampan-0.3.1.tar"))?;
    give_bundle(lab, "sampan-0.3.0.tar", &lab.as_release("0.3.0", &[])?)?;
    let spec = |drain: &str| format!("{{nodeSelector: {{}}, version: {}, drain: {drain}}}", release("0.3.0"));
    apply(lab, "drained", &spec("{}"))?;
    let told = until(lab, "drained", "Complete", "False NodeFailed", 30)?;
    has(&told, "cannot be drained: pod default/stays-amd64-2 has no controller")?;
    let node = "get node amd64-2 -o jsonpath={.spec.unschedulable}";
    ensure!(lab.kubectl(node)?.is_empty(), "it is schedulable again");
    apply(lab, "drained", &spec("{force: true, gracePeriod: 1}"))?;
    until(lab, "drained", "Complete", "True Complete", 90)?;
    ensure!(versions(lab)? == format!("{0} {0}", release("0.3.0")), "{}", versions(lab)?);
    ensure!(lab.kubectl(node)?.is_empty(), "it is schedulable again");
    let pods = lab.kubectl("get pods -o name")?;
    ensure!(pods.contains("stays-amd64") && !pods.contains("stays-amd64-2"), "{pods}");
    Ok(())
}
