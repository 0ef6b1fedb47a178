//! `make bench`: each budget beside what was measured, printed and written as JSON.
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use sampan_tests::Cluster;
use sampan_tests::cluster::{Setup, binary};
use serde_json::{Map, Value, json};

use crate::memory::{processes, sum};
use crate::{api, pods::Pods};

#[derive(clap::Args)]
pub struct Args {
    /// Where the numbers go
    #[arg(long, default_value = "target/bench/budgets.json")]
    out: PathBuf,
    /// Seconds until an idle cluster is taken for settled: after two minutes what the start has deferred is written
    #[arg(long, default_value_t = 135)]
    settle_seconds: u64,
    /// Seconds over which an idle cluster is watched
    #[arg(long, default_value_t = 120)]
    idle_seconds: u64,
    /// Pods started one at a time
    #[arg(long, default_value_t = 15)]
    pods: usize,
    /// Starts from an empty folder
    #[arg(long, default_value_t = 3)]
    starts: usize,
    #[command(flatten)]
    load: api::Load,
}

/// The burst that the budget speaks of.
const BURST: usize = 20;
const MB: f64 = 1e6;

/// A line of the table: key, what it is, the budget, and how the number is shown.
struct Budget {
    key: &'static str,
    what: &'static str,
    budget: Option<f64>,
    unit: &'static str,
    divide_by: f64,
}

const fn budget(
    key: &'static str,
    what: &'static str,
    budget: f64,
    unit: &'static str,
    divide_by: f64,
) -> Budget {
    Budget { key, what, budget: Some(budget), unit, divide_by }
}

const fn rate(key: &'static str, what: &'static str, unit: &'static str, divide_by: f64) -> Budget {
    Budget { key, what, budget: None, unit, divide_by }
}

const TABLE: &[Budget] = &[
    budget("server_idle_rss_bytes", "idle memory, server with its own node (RSS)", 64.0 * MB, "MB", MB),
    budget("agent_idle_rss_bytes", "idle memory, agent (RSS)", 24.0 * MB, "MB", MB),
    budget("pod_rss_bytes", "memory a pod adds besides its own (RSS)", 4.0 * MB, "MB", MB),
    budget("pod_private_bytes", "memory a pod adds besides its own (private)", 0.7 * MB, "MB", MB),
    budget("start_to_ready_ms", "start to node Ready, empty data folder", 1500.0, "ms", 1.0),
    budget("pod_running_ms_median", "pod created to Running, one at a time, median", 150.0, "ms", 1.0),
    budget("burst20_running_ms", "20 pods at once, all Running", 1200.0, "ms", 1.0),
    budget("idle_cpu_percent", "idle CPU, of a core", 0.5, "%", 1.0),
    budget("idle_write_bytes_per_minute", "idle disk writes a minute", 16.0 * 1024.0, "KB", 1024.0),
    budget("binary_bytes", "binary, stripped", 40.0 * MB, "MB", MB),
    rate("create_per_s", "creates a second", "", 1.0),
    rate("list_bytes_per_s", "listed a second", "MB", MB),
    rate("watch_events_per_s", "watch events a second", "", 1.0),
];

pub fn run(args: &Args) -> Result<()> {
    let mut found = Map::new();
    let size = std::fs::metadata(binary()?).context("the binary")?.len();
    found.insert("binary_bytes".into(), json!(size));
    println!("starting from an empty folder, {} times", args.starts);
    found.insert("start_to_ready_ms".into(), json!(start_to_ready_ms(args.starts)?));
    let setup = Setup {
        suite: "bench",
        nodes: "amd64,amd64".to_string(),
        box_image: true,
        wait_for_nodes: true,
        ..Setup::default()
    };
    let cluster = Cluster::up(&setup)?;
    idle(&cluster, args, &mut found)?;
    start_pods(&cluster, args, &mut found)?;
    println!("creating, listing, watching");
    let rates = cluster.block_on(api::measure(cluster.client(), &args.load))??;
    found.insert("create_per_s".into(), json!(rates.create_per_s.round()));
    found.insert("list_bytes_per_s".into(), json!(rates.list_bytes_per_s.round()));
    found.insert("watch_events_per_s".into(), json!(rates.watch_events_per_s.round()));
    cluster.down();
    print_table(&found);
    if let Some(folder) = args.out.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let text = serde_json::to_string_pretty(&Value::Object(found))? + "\n";
    std::fs::write(&args.out, text).with_context(|| format!("writing {}", args.out.display()))?;
    println!("\nwritten to {}", args.out.display());
    Ok(())
}

/// The median, from `sampan lab up` to the node's Ready condition; the lab's own work is in it.
fn start_to_ready_ms(starts: usize) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..starts.max(1) {
        let setup = Setup { suite: "bench-start", nodes: "amd64".to_string(), ..Setup::default() };
        let start = sampan_world::clock::monotonic();
        let cluster = Cluster::up(&setup)?;
        let nodes: Api<Node> = Api::all(cluster.client());
        sampan_tests::wait_for("the node to be Ready", Duration::from_secs(60), || {
            let node = cluster.block_on(nodes.get_opt("amd64"))??;
            let conditions = node.and_then(|n| n.status?.conditions).unwrap_or_default();
            let ready = conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True");
            Ok(if ready { Ok(()) } else { Err("not Ready") })
        })?;
        times.push(start.elapsed().as_secs_f64() * 1000.0);
        cluster.down();
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2].round())
}

fn idle(cluster: &Cluster, args: &Args, found: &mut Map<String, Value>) -> Result<()> {
    println!("idle for {} s", args.settle_seconds + args.idle_seconds);
    std::thread::sleep(Duration::from_secs(args.settle_seconds));
    let (server, agent) = (cluster.node_init("amd64")?, cluster.node_init("amd64-2")?);
    let before = processes(server)?;
    std::thread::sleep(Duration::from_secs(args.idle_seconds));
    let (after, of_agent) = (processes(server)?, processes(agent)?);
    let cpu_ms = sum(&after, |p| p.cpu_ms).saturating_sub(sum(&before, |p| p.cpu_ms));
    let written = sum(&after, |p| p.written_bytes).saturating_sub(sum(&before, |p| p.written_bytes));
    let seconds = args.idle_seconds.max(1) as f64;
    found.insert("server_idle_rss_bytes".into(), json!(sum(&after, |p| p.rss_bytes)));
    found.insert("agent_idle_rss_bytes".into(), json!(sum(&of_agent, |p| p.rss_bytes)));
    found.insert("idle_cpu_percent".into(), json!((cpu_ms as f64 / seconds / 10.0 * 100.0).round() / 100.0));
    found.insert("idle_write_bytes_per_minute".into(), json!((written as f64 * 60.0 / seconds).round()));
    Ok(())
}

fn start_pods(cluster: &Cluster, args: &Args, found: &mut Map<String, Value>) -> Result<()> {
    println!("starting {} pods one at a time, then {BURST} at once", args.pods);
    let pods = Pods::new(cluster.client(), "amd64-2");
    // the account that pods run as comes a moment after the namespace
    sampan_tests::wait_for("the default service account", Duration::from_secs(20), || {
        let answer = cluster.get("/api/v1/namespaces/default/serviceaccounts/default")?;
        Ok(if answer.code == 200 { Ok(()) } else { Err(answer.code) })
    })?;
    let median = cluster.block_on(pods.one_at_a_time(args.pods))??;
    found.insert("pod_running_ms_median".into(), json!(median.round()));
    std::thread::sleep(Duration::from_secs(2));
    let (burst, names) = cluster.block_on(pods.burst(BURST))??;
    found.insert("burst20_running_ms".into(), json!(burst.round()));
    std::thread::sleep(Duration::from_secs(2));
    let mut shims = processes(cluster.node_init("amd64-2")?)?;
    shims.retain(|p| p.is_shim);
    let count = (shims.len() as u64).max(1);
    found.insert("pod_rss_bytes".into(), json!(sum(&shims, |p| p.rss_bytes) / count));
    found.insert("pod_private_bytes".into(), json!(sum(&shims, |p| p.private_bytes) / count));
    cluster.block_on(pods.end(&names))?
}

fn print_table(found: &Map<String, Value>) {
    println!("\n{:<48} {:>12} {:>12}", "what", "budget", "measured");
    for line in TABLE {
        let shown = |number: f64| match number / line.divide_by {
            n if n < 10.0 => format!("{n:.2} {}", line.unit),
            n => format!("{n:.0} {}", line.unit),
        };
        let measured = found.get(line.key).and_then(Value::as_f64);
        let verdict = match (line.budget, measured) {
            (Some(budget), Some(measured)) if measured > budget => "over",
            _ => "",
        };
        let (budget, measured) = (line.budget.map(shown), measured.map(shown));
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_string());
        println!("{:<48} {:>12} {:>12} {verdict}", line.what, or_none(budget), or_none(measured));
    }
}
