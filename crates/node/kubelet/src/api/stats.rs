//! `/stats/summary`, `/metrics` and `/metrics/resource`: what pods and the node use.
//!
//! Upstream counterparts: pkg/kubelet/server/stats, pkg/kubelet/metrics/collectors/resource_metrics.go. What is not
//! measured is left out rather than made up: network, swap, pressure, and a container's log files.
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::fs;
use std::path::Path;

use jiff::Timestamp;
use parking_lot::Mutex;
use sampan_drivers::Runtime;
use sampan_drivers::runtime::{Container, ContainerState, ContainerStats, RuntimeError, Sandbox};
use sampan_world::clock;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::pods::Pods;

const NANOS: f64 = 1e9;
/// USER_HZ, which Linux never changes.
const TICKS_PER_SECOND: f64 = 100.0;
/// Rates over less than this say little.
const RATE_SECONDS_MIN: f64 = 1.0;

/// What was used when the rates were last asked for.
#[derive(Default)]
pub struct Rates(Mutex<HashMap<String, Sample>>);

#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    used_ns: u64,
    rate: Option<u64>,
}

impl Rates {
    /// Nanoseconds of CPU per second since the last call; `None` the first time.
    fn rates(&self, used_ns: &HashMap<String, u64>) -> HashMap<String, u64> {
        let (mut samples, now) = (self.0.lock(), clock::monotonic());
        samples.retain(|id, _| used_ns.contains_key(id));
        for (id, used_ns) in used_ns {
            let first = Sample { at: now, used_ns: *used_ns, rate: None };
            let sample = samples.entry(id.clone()).or_insert(first);
            let seconds = (now - sample.at).as_secs_f64();
            if seconds >= RATE_SECONDS_MIN {
                let rate = used_ns.saturating_sub(sample.used_ns) as f64 / seconds;
                *sample = Sample { at: now, used_ns: *used_ns, rate: Some(rate as u64) };
            }
        }
        samples.iter().filter_map(|(id, sample)| Some((id.clone(), sample.rate?))).collect()
    }
}

/// What a node as a whole uses: its cgroup's where it is one, else the machine's.
#[derive(Clone, Debug, Default, PartialEq)]
struct NodeUse {
    cpu_ns: Option<u64>,
    working_set_bytes: Option<u64>,
    rss_bytes: Option<u64>,
    available_bytes: Option<u64>,
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    line?.parse().ok()
}

impl NodeUse {
    fn read(cgroup: &Path, proc: &Path) -> Self {
        let cgroup = |name: &str| fs::read_to_string(cgroup.join(name)).unwrap_or_default();
        let kibibytes = |text: &str, name: &str| field(text, name).map(|n| n * 1024);
        let (cpu, memory, stat) = (cgroup("cpu.stat"), cgroup("memory.current"), cgroup("memory.stat"));
        let machine = fs::read_to_string(proc.join("meminfo")).unwrap_or_default();
        let total = kibibytes(&machine, "MemTotal:");
        let (used, inactive) = match memory.trim().parse::<u64>() {
            Ok(used) => (Some(used), field(&stat, "inactive_file ")),
            Err(_) => (
                total.zip(kibibytes(&machine, "MemFree:")).map(|(total, free)| total.saturating_sub(free)),
                kibibytes(&machine, "Inactive(file):"),
            ),
        };
        let working_set_bytes = used.map(|used| used.saturating_sub(inactive.unwrap_or_default()));
        let limit = cgroup("memory.max").trim().parse().ok().or(total);
        Self {
            cpu_ns: field(&cpu, "usage_usec ").map(|us| us * 1000),
            working_set_bytes,
            rss_bytes: field(&stat, "anon ").or_else(|| kibibytes(&machine, "AnonPages:")),
            available_bytes: limit.zip(working_set_bytes).map(|(limit, used)| limit.saturating_sub(used)),
        }
    }
}

struct ContainerUse {
    container: Container,
    stats: ContainerStats,
}

/// What all that runs uses.
struct Usage {
    node: NodeUse,
    pods: Vec<(Sandbox, Vec<ContainerUse>)>,
}

async fn usage(runtime: &dyn Runtime) -> Result<Usage, RuntimeError> {
    let stats = runtime.container_stats().await?;
    let mut stats: HashMap<String, ContainerStats> =
        stats.into_iter().map(|stats| (stats.container_id.clone(), stats)).collect();
    let mut pods: BTreeMap<String, (Sandbox, Vec<ContainerUse>)> =
        runtime.list_sandboxes().await?.into_iter().map(|s| (s.id.clone(), (s, Vec::new()))).collect();
    for container in runtime.list_containers().await? {
        if container.state == ContainerState::Running
            && let Some((_, containers)) = pods.get_mut(&container.sandbox_id)
            && let Some(stats) = stats.remove(&container.id)
        {
            containers.push(ContainerUse { container, stats });
        }
    }
    let node = NodeUse::read(Path::new("/sys/fs/cgroup"), Path::new("/proc"));
    let mut pods: Vec<_> = pods.into_values().filter(|(_, containers)| !containers.is_empty()).collect();
    pods.sort_by(|(a, _), (b, _)| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    Ok(Usage { node, pods })
}

fn without_nulls(value: &mut Value) {
    if let Value::Object(map) = value {
        map.values_mut().for_each(without_nulls);
        map.retain(|_, value| !value.is_null());
    }
}

/// A file system's numbers; `used_bytes` where only a part of it is meant.
fn file_system(path: &Path, used_bytes: Option<u64>, now: &str) -> Value {
    let Ok(fs) = rustix::fs::statvfs(path) else { return Value::Null };
    json!({
        "time": now,
        "availableBytes": fs.f_bavail * fs.f_frsize,
        "capacityBytes": fs.f_blocks * fs.f_frsize,
        "usedBytes": used_bytes.unwrap_or((fs.f_blocks.saturating_sub(fs.f_bfree)) * fs.f_frsize),
        "inodesFree": fs.f_ffree,
        "inodes": fs.f_files,
        "inodesUsed": fs.f_files.saturating_sub(fs.f_ffree),
    })
}

fn stamp(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The Summary object.
pub async fn summary(
    pods: &dyn Pods,
    runtime: &dyn Runtime,
    rates: &Rates,
    only_cpu_and_memory: bool,
) -> Result<Value, RuntimeError> {
    let (usage, now, root) = (usage(runtime).await?, stamp(clock::now()), pods.root_dir());
    let all = usage.pods.iter().flat_map(|(_, containers)| containers);
    let mut used_ns: HashMap<String, u64> =
        all.map(|c| (c.container.id.clone(), c.stats.cpu_usage_ns)).collect();
    used_ns.extend(usage.node.cpu_ns.map(|ns| (String::new(), ns)));
    let rates = rates.rates(&used_ns);
    let image_bytes = if only_cpu_and_memory { None } else { runtime.image_fs_bytes().await.ok() };
    let pods_stats = usage.pods.iter().map(|(sandbox, containers)| {
        let sum = |of: fn(&ContainerStats) -> u64| containers.iter().map(|c| of(&c.stats)).sum::<u64>();
        let ids: Vec<_> = containers.iter().filter_map(|c| rates.get(&c.container.id)).collect();
        let rate = (ids.len() == containers.len()).then(|| ids.into_iter().sum::<u64>());
        json!({
            "podRef": {"name": sandbox.name, "namespace": sandbox.namespace, "uid": sandbox.uid},
            "startTime": stamp(sandbox.created_at),
            "containers": containers.iter().map(|c| json!({
                "name": c.container.name,
                "startTime": stamp(c.container.started_at.unwrap_or(c.container.created_at)),
                "cpu": {
                    "time": now,
                    "usageNanoCores": rates.get(&c.container.id),
                    "usageCoreNanoSeconds": c.stats.cpu_usage_ns,
                },
                "memory": {
                    "time": now,
                    "workingSetBytes": c.stats.memory_working_set_bytes,
                    "rssBytes": c.stats.memory_rss_bytes,
                },
                "rootfs": if only_cpu_and_memory {
                    Value::Null
                } else {
                    file_system(&root, Some(c.stats.writable_layer_bytes), &now)
                },
            })).collect::<Vec<_>>(),
            "cpu": {"time": now, "usageNanoCores": rate, "usageCoreNanoSeconds": sum(|s| s.cpu_usage_ns)},
            "memory": {
                "time": now,
                "workingSetBytes": sum(|s| s.memory_working_set_bytes),
                "rssBytes": sum(|s| s.memory_rss_bytes),
            },
        })
    });
    let mut pods_stats: Vec<Value> = pods_stats.collect();
    for pod in &mut pods_stats {
        without_nulls(pod);
        pod["containers"].as_array_mut().into_iter().flatten().for_each(without_nulls);
    }
    let mut node = json!({
        "nodeName": pods.node_name(),
        "startTime": boot_time().map(stamp).unwrap_or_else(|| now.clone()),
        "cpu": {"time": now, "usageNanoCores": rates.get(""), "usageCoreNanoSeconds": usage.node.cpu_ns},
        "memory": {
            "time": now,
            "availableBytes": usage.node.available_bytes,
            "workingSetBytes": usage.node.working_set_bytes,
            "rssBytes": usage.node.rss_bytes,
        },
        "fs": if only_cpu_and_memory { Value::Null } else { file_system(&root, None, &now) },
        "runtime": image_bytes.map(|bytes| json!({"imageFs": file_system(&root, Some(bytes), &now)})),
    });
    without_nulls(&mut node);
    Ok(json!({"node": node, "pods": pods_stats}))
}

fn boot_time() -> Option<Timestamp> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    Timestamp::from_second(field(&stat, "btime ")? as i64).ok()
}

/// Metrics in Prometheus' text form.
#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: f64, at_ms: Option<i64>) {
        let quoted: Vec<String> = labels
            .iter()
            .map(|(label, text)| {
                format!(
                    "{label}=\"{}\"",
                    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
                )
            })
            .collect();
        let labels = if quoted.is_empty() { String::new() } else { format!("{{{}}}", quoted.join(",")) };
        let at = at_ms.map(|ms| format!(" {ms}")).unwrap_or_default();
        let _ = writeln!(self.0, "{name}{labels} {value}{at}");
    }
}

/// `/metrics/resource`.
pub async fn resource_metrics(runtime: &dyn Runtime) -> String {
    let (mut text, usage, now) = (Text::default(), usage(runtime).await, clock::now());
    let at = Some(now.as_millisecond());
    if let Ok(usage) = &usage {
        type Of = fn(&ContainerUse) -> Option<f64>;
        let start: Of = |c| Some(c.container.started_at?.as_millisecond() as f64 / 1000.0);
        let cpu: Of = |c| Some(c.stats.cpu_usage_ns as f64 / NANOS);
        let memory: Of = |c| Some(c.stats.memory_working_set_bytes as f64);
        let container_metrics = [
            (
                "container_cpu_usage_seconds_total",
                "counter",
                "Cumulative cpu time consumed by the container in core-seconds",
                cpu,
                at,
            ),
            (
                "container_memory_working_set_bytes",
                "gauge",
                "Current working set of the container in bytes",
                memory,
                at,
            ),
            (
                "container_start_time_seconds",
                "gauge",
                "Start time of the container since unix epoch in seconds",
                start,
                None,
            ),
        ];
        for (name, kind, help, of, at) in container_metrics {
            text.head(name, kind, &format!("[STABLE] {help}"));
            for (sandbox, containers) in &usage.pods {
                for container in containers {
                    let labels = [
                        ("container", container.container.name.as_str()),
                        ("namespace", &sandbox.namespace),
                        ("pod", &sandbox.name),
                    ];
                    if let Some(value) = of(container) {
                        text.value(name, &labels, value, at);
                    }
                }
            }
        }
        let node = [
            (
                "node_cpu_usage_seconds_total",
                "counter",
                "Cumulative cpu time consumed by the node in core-seconds",
                usage.node.cpu_ns.map(|ns| ns as f64 / NANOS),
            ),
            (
                "node_memory_working_set_bytes",
                "gauge",
                "Current working set of the node in bytes",
                usage.node.working_set_bytes.map(|b| b as f64),
            ),
        ];
        for (name, kind, help, value) in node {
            text.head(name, kind, &format!("[STABLE] {help}"));
            value.into_iter().for_each(|value| text.value(name, &[], value, at));
        }
        let pod_metrics = [
            (
                "pod_cpu_usage_seconds_total",
                "counter",
                "Cumulative cpu time consumed by the pod in core-seconds",
                cpu,
            ),
            ("pod_memory_working_set_bytes", "gauge", "Current working set of the pod in bytes", memory),
        ];
        for (name, kind, help, of) in pod_metrics {
            text.head(name, kind, &format!("[STABLE] {help}"));
            for (sandbox, containers) in &usage.pods {
                let labels = [("namespace", sandbox.namespace.as_str()), ("pod", &sandbox.name)];
                text.value(name, &labels, containers.iter().filter_map(of).sum(), at);
            }
        }
    }
    let name = "resource_scrape_error";
    text.head(name, "gauge", "[STABLE] 1 if there was an error while getting container metrics, 0 otherwise");
    text.value(name, &[], if usage.is_err() { 1.0 } else { 0.0 }, None);
    text.0
}

/// `/metrics`: the kubelet's own.
pub async fn metrics(pods: &dyn Pods, runtime: &dyn Runtime) -> String {
    let mut text = Text::default();
    let containers = runtime.list_containers().await.unwrap_or_default();
    let count = |state| containers.iter().filter(|c| c.state == state).count() as f64;
    text.head("kubelet_node_name", "gauge", "[ALPHA] The node's name. The count is always 1.");
    text.value("kubelet_node_name", &[("node", &pods.node_name())], 1.0, None);
    let name = "kubelet_running_containers";
    text.head(name, "gauge", "[ALPHA] Number of containers currently running");
    for (label, state) in [
        ("created", ContainerState::Created),
        ("exited", ContainerState::Exited),
        ("running", ContainerState::Running),
    ] {
        text.value(name, &[("container_state", label)], count(state), None);
    }
    let sandboxes = runtime.list_sandboxes().await.unwrap_or_default();
    let ready = sandboxes.iter().filter(|s| s.state == sampan_drivers::runtime::SandboxState::Ready).count();
    text.head("kubelet_running_pods", "gauge", "[ALPHA] Number of pods that have a running pod sandbox");
    text.value("kubelet_running_pods", &[], ready as f64, None);
    text.head(
        "kubelet_desired_pods",
        "gauge",
        "[ALPHA] The number of pods the kubelet is being instructed to run",
    );
    text.value("kubelet_desired_pods", &[], pods.pods().len() as f64, None);
    process(&mut text);
    text.0
}

fn process(text: &mut Text) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    for (name, help, line) in [
        ("process_virtual_memory_bytes", "Virtual memory size in bytes.", "VmSize:"),
        ("process_resident_memory_bytes", "Resident memory size in bytes.", "VmRSS:"),
    ] {
        if let Some(kibibytes) = field(&status, line) {
            text.head(name, "gauge", help);
            text.value(name, &[], kibibytes as f64 * 1024.0, None);
        }
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        text.head("process_open_fds", "gauge", "Number of open file descriptors.");
        text.value("process_open_fds", &[], open.count() as f64, None);
    }
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // counted from after the name, which may hold spaces: the times in user and kernel mode
    let after = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    let ticks: Option<u64> = after.map(|n| n.parse::<u64>().ok()).sum();
    if let Some(ticks) = ticks {
        let name = "process_cpu_seconds_total";
        text.head(name, "counter", "Total user and system CPU time spent in seconds.");
        text.value(name, &[], ticks as f64 / TICKS_PER_SECOND, None);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_nodes_use_is_its_cgroups_or_the_machines() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("meminfo", "MemTotal: 1000 kB\nMemFree: 400 kB\nAnonPages: 10 kB\nInactive(file): 100 kB\n");
        write("cpu.stat", "usage_usec 5\nuser_usec 3\n");
        let machine = NodeUse::read(folder.path(), folder.path());
        let expected = NodeUse {
            cpu_ns: Some(5000),
            working_set_bytes: Some(500 * 1024),
            rss_bytes: Some(10 * 1024),
            available_bytes: Some(500 * 1024),
        };
        assert_eq!(machine, expected);
        write("memory.current", "9000\n");
        write("memory.stat", "anon 3000\ninactive_file 1000\n");
        write("memory.max", "10000\n");
        let node = NodeUse::read(folder.path(), folder.path());
        assert_eq!(
            (node.working_set_bytes, node.rss_bytes, node.available_bytes),
            (Some(8000), Some(3000), Some(2000))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn rates_need_two_looks() {
        let (rates, used) = (Rates::default(), |ns| HashMap::from([("a".to_string(), ns)]));
        assert!(rates.rates(&used(1000)).is_empty());
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(rates.rates(&used(5000))["a"], 2000);
        assert_eq!(rates.rates(&used(6000))["a"], 2000);
        assert!(rates.rates(&HashMap::new()).is_empty());
    }
}
