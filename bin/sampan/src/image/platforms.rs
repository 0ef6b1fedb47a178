//! `sampan image platforms`: which nodes of the cluster can run an image, and why others cannot.
//!
//! Upstream counterpart: none. The image's platforms are asked of its registry; nodes say theirs in labels, by the rule
//! that scheduling has (arm versions included), else in their status. What keeps pods away for other reasons is told as
//! well.
use std::path::PathBuf;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::ListParams;
use sampan_image::{Platform, Reference, platform};
use serde_json::json;

use super::registry::{Access, advice};

#[derive(clap::Args)]
pub struct Platforms {
    /// The cluster to ask
    #[arg(long, env = "KUBECONFIG", default_value = "/etc/sampan/sampan.yaml")]
    kubeconfig: PathBuf,
    #[command(flatten)]
    access: Access,
    /// Print JSON
    #[arg(short, long, value_parser = ["json"])]
    output: Option<String>,
    #[arg(value_name = "IMAGE")]
    image: String,
}

/// What is said of a node.
struct Verdict {
    node: String,
    platform: String,
    runs: bool,
    has: bool,
    why: Vec<String>,
}

pub async fn run(args: Platforms) -> Result<()> {
    let name = Reference::parse(&args.image)?;
    let text = std::fs::read_to_string(&args.kubeconfig)
        .with_context(|| format!("reading {} (--kubeconfig names another)", args.kubeconfig.display()))?;
    let client = crate::node::client_of_kubeconfig(&text).await?;
    let nodes = Api::<Node>::all(client).list(&ListParams::default()).await.context("listing the nodes")?;
    let built = args.access.client()?.platforms(&name, &[]).await;
    let built = built.map_err(advice).with_context(|| name.to_string())?;
    let mut verdicts: Vec<Verdict> = nodes.items.iter().map(|n| verdict(n, &name, &built)).collect();
    verdicts.sort_by(|a, b| a.node.cmp(&b.node));
    if args.output.is_some() {
        let nodes: Vec<_> = verdicts
            .iter()
            .map(|v| {
                json!({"node": v.node, "platform": v.platform, "runs": v.runs, "has": v.has,
                    "reasons": v.why})
            })
            .collect();
        let platforms: Vec<String> = built.iter().map(platform::format).collect();
        let all = json!({"image": name.to_string(), "platforms": platforms, "nodes": nodes});
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!("{name} is built for {}", platform::list(&built));
    let word = |yes: bool| if yes { "yes" } else { "no" }.to_string();
    let rows = verdicts
        .iter()
        .map(|v| vec![v.node.clone(), v.platform.clone(), word(v.runs), word(v.has), v.why.join("; ")]);
    super::table(&["NODE", "PLATFORM", "RUNS IT", "HAS IT", "WHY"], rows.collect());
    Ok(())
}

fn verdict(node: &Node, name: &Reference, built: &[Platform]) -> Verdict {
    let labels = node.metadata.labels.clone().unwrap_or_default();
    let info = node.status.as_ref().and_then(|s| s.node_info.as_ref());
    let reported = || {
        let (os, architecture) = info.map(|i| (i.operating_system.clone(), i.architecture.clone()))?;
        Some(platform::normalise(&Platform { os, architecture, variant: None }))
    };
    // without either every image is allowed, as in scheduling
    let machine = sampan_drivers::platform::of_node(&labels).or_else(reported);
    let mut why = Vec::new();
    let unfit = machine.as_ref().filter(|m| platform::choose(m, built).is_none());
    let mut runs = unfit.is_none();
    why.extend(unfit.map(|m| format!("there is no build for {m}")));
    let ready = node.status.iter().flat_map(|s| s.conditions.iter().flatten()).find(|c| c.type_ == "Ready");
    if ready.is_none_or(|c| c.status != "True") {
        runs = false;
        let message = ready.and_then(|c| c.message.clone()).filter(|m| !m.is_empty());
        why.push(format!("the node is not ready{}", message.map(|m| format!(": {m}")).unwrap_or_default()));
    }
    let spec = node.spec.as_ref();
    if spec.and_then(|s| s.unschedulable) == Some(true) {
        runs = false;
        why.push("the node is cordoned".to_string());
    }
    for taint in spec.iter().flat_map(|s| s.taints.iter().flatten()) {
        let ours = taint.key.starts_with("node.kubernetes.io/");
        if !ours && taint.effect != "PreferNoSchedule" {
            let value = taint.value.as_ref().map(|v| format!("={v}")).unwrap_or_default();
            why.push(format!("only pods that tolerate {}{value}:{}", taint.key, taint.effect));
        }
    }
    let images = node.status.iter().flat_map(|s| s.images.iter().flatten());
    let full = sampan_drivers::platform::reported_name(&name.to_string());
    let has = images.flat_map(|i| i.names.iter().flatten()).any(|n| *n == full);
    let platform = machine.map_or("unknown".to_string(), |m| m.to_string());
    Verdict { node: node.metadata.name.clone().unwrap_or_default(), platform, runs, has, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_judged() {
        let name = Reference::parse("r.example/x:1").unwrap();
        let built = [platform::parse("linux/arm64").unwrap(), platform::parse("linux/arm/v7").unwrap()];
        let node = |arch: &str, ready: &str, spec: serde_json::Value| -> Node {
            serde_json::from_value(json!({
                "metadata": {"name": "n", "labels": {"kubernetes.io/os": "linux", "kubernetes.io/arch": arch}},
                "spec": spec,
                "status": {"conditions": [{"type": "Ready", "status": ready, "message": "kubelet stopped"}],
                    "images": [{"names": ["r.example/x:1"]}]},
            }))
            .unwrap()
        };
        for (arch, ready, spec, runs, why) in [
            ("arm64", "True", json!({}), true, ""),
            ("arm", "True", json!({}), true, ""),
            ("amd64", "True", json!({}), false, "there is no build for linux/amd64"),
            ("arm64", "False", json!({}), false, "the node is not ready: kubelet stopped"),
            ("arm64", "True", json!({"unschedulable": true}), false, "the node is cordoned"),
            (
                "arm64",
                "True",
                json!({"taints": [{"key": "gpu", "value": "y", "effect": "NoSchedule"}]}),
                true,
                "only pods that tolerate gpu=y:NoSchedule",
            ),
        ] {
            let got = verdict(&node(arch, ready, spec), &name, &built);
            assert_eq!((got.runs, got.why.join("; ").as_str(), got.has), (runs, why, true), "{arch} {ready}");
        }
        let mut old = node("arm", "True", json!({}));
        let labels = old.metadata.labels.as_mut().unwrap();
        labels.insert("sampan.io/arm-variant".into(), "v6".into());
        let got = verdict(&old, &name, &built);
        assert_eq!(
            (got.runs, got.why.as_slice()),
            (false, &["there is no build for linux/arm/v6".to_string()][..])
        );
    }
}
