//! The examples on a mixed cluster: amd64, arm64 and arm nodes, their containers foreign programs through binfmt.
//!
//! The images are those of examples/images.py, kept in the target folder for the next run.
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use sampan_tests::{Space, Suite, cases, fetch, has, seconds, wait_for};
use serde_json::Value;

fn main() -> ExitCode {
    Suite::new("architectures", "amd64,arm64,arm")
        .with_registry()
        .together(cases![node_affinity, multi_arch, amd64_only])
        .alone(cases![exporter_on_all_nodes, nowhere_to_run])
        .run()
}

fn project() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map(PathBuf::from).unwrap_or(here)
}

/// Makes the images unless an earlier run did, and puts them into the registry.
fn push_images(s: &Space) -> Result<()> {
    static MADE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = MADE.lock();
    let target = sampan_tests::cluster::target_folder()?.join("tmp/example-images");
    let names = ["web", "web-amd64", "web-arm64"];
    if !names.iter().all(|n| target.join(format!("{n}.tar")).exists()) {
        let mut command = std::process::Command::new("python3");
        command.arg(project().join("examples/images.py")).arg(&target);
        sampan_tests::process::run(&mut command, b"", seconds(120))?
            .ok()
            .context("making the examples' images")?;
    }
    let registry = s.cluster.registry.as_ref().context("the suite has a registry")?;
    names.iter().try_for_each(|name| registry.push_archive(name, &target.join(format!("{name}.tar"))))
}

fn apply(s: &Space, example: &str) -> Result<()> {
    push_images(s)?;
    let manifest = std::fs::read_to_string(project().join("examples").join(example))?;
    s.apply(&manifest).map(drop)
}

fn rolled_out(s: &Space, what: &str) -> Result<()> {
    s.kubectl_within(&["-n", &s.name, "rollout", "status", what, "--timeout=75s"], "", seconds(80))?
        .ok()
        .map(drop)
}

/// (pod, node) of the pods with that `app` label.
fn placed(s: &Space, app: &str) -> Result<Vec<(String, String)>> {
    let pods = s.object(&format!("pods?labelSelector=app%3D{app}"))?;
    let text = |v: &Value| v.as_str().unwrap_or_default().to_string();
    let all = pods["items"].as_array().cloned().unwrap_or_default();
    Ok(all.iter().map(|p| (text(&p["metadata"]["name"]), text(&p["spec"]["nodeName"]))).collect())
}

fn prints(s: &Space, pod: &str) -> Result<String> {
    wait_for(&format!("{pod} to print"), seconds(20), || {
        let log = s.try_k(&["logs", pod])?;
        Ok(if log.out.trim().is_empty() { Err(log.text()) } else { Ok(log.out.trim().to_string()) })
    })
}

fn node_affinity(s: &Space) -> Result<()> {
    apply(s, "node-affinity.yaml")?;
    for name in ["pinned", "selected", "preferred"] {
        rolled_out(s, &format!("deployment/{name}"))?;
        for (pod, node) in placed(s, name)? {
            ensure!(node == "arm64", "{pod} is on {node}");
            ensure!(prints(s, &pod)? == "aarch64", "it runs as what it was built for");
        }
    }
    Ok(())
}

fn multi_arch(s: &Space) -> Result<()> {
    apply(s, "multi-arch.yaml")?;
    rolled_out(s, "deployment/multi-arch")?;
    let placed = placed(s, "multi-arch")?;
    let printed = placed
        .iter()
        .map(|(pod, node)| Ok((node.clone(), prints(s, pod)?)))
        .collect::<Result<BTreeSet<_>>>()?;
    ensure!(printed.len() == 2, "{printed:?}");
    for (node, machine) in &printed {
        let want = match node.as_str() {
            "amd64" => "x86_64",
            "arm64" => "aarch64",
            _ => "armv7l",
        };
        ensure!(machine.starts_with(&want[..want.len().min(5)]), "on {node} it prints {machine}");
    }
    Ok(())
}

fn amd64_only(s: &Space) -> Result<()> {
    apply(s, "amd64-only.yaml")?;
    rolled_out(s, "deployment/amd64-only")?;
    let nodes: BTreeSet<String> = placed(s, "amd64-only")?.into_iter().map(|(_, node)| node).collect();
    ensure!(nodes.iter().eq(["amd64"]), "{nodes:?}");
    Ok(())
}

fn exporter_on_all_nodes(s: &Space) -> Result<()> {
    apply(s, "exporter.yaml")?;
    rolled_out(s, "daemonset/exporter")?;
    let nodes: BTreeSet<String> = placed(s, "exporter")?.into_iter().map(|(_, node)| node).collect();
    ensure!(nodes.iter().eq(["amd64", "arm", "arm64"]), "one on each: {nodes:?}");
    // by NodePort, from outside: in the end every node's pod answers, whichever node is asked
    for ip in ["10.64.0.11", "10.64.0.12", "10.64.0.13"] {
        let mut seen = BTreeSet::new();
        wait_for(&format!("all pods by way of {ip}"), seconds(30), || {
            let fetch = fetch(&format!("http://{ip}:30910/metrics"));
            let ran = s.exec("hub", &fetch.each_ref().map(String::as_str))?;
            seen.extend(["x86_64", "aarch64", "armv"].into_iter().filter(|m| ran.out.contains(m)));
            Ok(if seen.len() == 3 { Ok(()) } else { Err(format!("{seen:?} {}", ran.text())) })
        })?;
    }
    // by name, from a pod
    let pod = placed(s, "exporter")?.first().context("a pod")?.0.clone();
    let service = s.k(&["get", "service", "exporter", "-o", "jsonpath={.spec.clusterIP}"])?;
    wait_for("the service by name", seconds(20), || {
        let name = format!("exporter.{}.svc.cluster.local", s.name);
        let ran = s.try_k(&["exec", &pod, "--", "nslookup", &name])?;
        Ok(if ran.text().contains(&service) { Ok(()) } else { Err(ran.text()) })
    })
}

fn nowhere_to_run(s: &Space) -> Result<()> {
    s.k(&["cordon", "amd64"])?;
    let waits = (|| {
        apply(s, "amd64-only.yaml")?;
        let pod = wait_for("a pod", seconds(20), || {
            Ok(placed(s, "amd64-only")?.into_iter().next().map(|(pod, _)| pod).ok_or("none"))
        })?;
        let event = s.event(&pod, "FailedScheduling", "0/3 nodes are available")?;
        let message = event["message"].as_str().unwrap_or_default();
        has(message, "amd64")?;
        ensure!(placed(s, "amd64-only")?.iter().all(|(_, node)| node.is_empty()), "it waits");
        Ok(())
    })();
    s.k(&["uncordon", "amd64"])?;
    waits?;
    rolled_out(s, "deployment/amd64-only")?;
    // a pod that names its node itself is refused by that node, with a reason
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: forced}\nspec:\n  nodeName: arm64\n  restartPolicy: Never\n  \
               containers: [{name: c, image: 'registry.lab:5000/web-amd64:latest'}]\n";
    s.apply(pod)?;
    wait_for("a refusal that says why", seconds(30), || {
        let events = s.object("events?fieldSelector=involvedObject.name=forced")?.to_string();
        let status = s.object("pods/forced")?["status"].to_string();
        let told = (events.clone() + &status).contains("linux/amd64");
        Ok(if told { Ok(()) } else { Err(events + &status) })
    })
}
