//! The whole scheduler over a cluster in memory.
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use sampan_drivers::platform::{ImageQuery, Platforms};
use sampan_drivers::runtime::Platform;
use serde_json::{Value, json};

use crate::Scheduler;
use crate::platforms::PlatformCache;
use crate::testing::{TestCluster, api_pod, node};

/// Knows images by their names: `amd64-only`, `slow`, and all else for every platform.
struct Registry;

#[async_trait]
impl Platforms for Registry {
    async fn lookup(&self, query: &ImageQuery) -> Option<Vec<Platform>> {
        let platform = |a: &str| Platform { os: "linux".into(), architecture: a.into(), variant: None };
        match query.image.as_str() {
            "amd64-only" => Some(vec![platform("amd64")]),
            "slow" => std::future::pending().await,
            _ => None,
        }
    }
}

fn machine(name: &str, arch: &str, cpu: &str) -> k8s_openapi::api::core::v1::Node {
    node(
        name,
        json!({"metadata": {"labels": {"kubernetes.io/arch": arch, "kubernetes.io/hostname": name}},
            "status": {"allocatable": {"cpu": cpu, "memory": "8Gi", "pods": "110"}}}),
    )
}

fn asking(name: &str, cpu: &str, more: Value) -> k8s_openapi::api::core::v1::Pod {
    let mut spec =
        json!({"containers": [{"name": "c", "image": "any", "resources": {"requests": {"cpu": cpu}}}]});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    api_pod(name, json!({"spec": spec}))
}

/// A running scheduler over a cluster with those nodes.
fn start(nodes: &[(&str, &str, &str)]) -> Arc<TestCluster> {
    let cluster = TestCluster::new();
    nodes.iter().for_each(|(name, arch, cpu)| cluster.put_node(machine(name, arch, cpu)));
    let platforms = PlatformCache::new(Arc::new(Registry));
    let scheduler = Scheduler::assemble(cluster.clone(), cluster.sources.clone(), Some(platforms));
    tokio::spawn(scheduler.work());
    cluster
}

async fn settle() {
    tokio::time::sleep(Duration::from_millis(50)).await;
}

#[tokio::test(start_paused = true)]
async fn pods_are_bound_and_told() {
    let cluster = start(&[("n", "amd64", "4")]);
    cluster.put(asking("p", "1", json!({})));
    cluster.put(asking("other", "1", json!({"schedulerName": "mine"})));
    settle().await;
    assert_eq!(cluster.node_of("p").as_deref(), Some("n"));
    assert_eq!(cluster.node_of("other"), None);
    assert_eq!(cluster.notes("Scheduled"), ["Successfully assigned ns/p to n"]);
}

#[tokio::test(start_paused = true)]
async fn pods_that_fit_nowhere_say_why_and_are_helped_by_events() {
    let cluster = start(&[("a", "amd64", "1"), ("b", "amd64", "1")]);
    cluster.put(asking("first", "1", json!({"nodeSelector": {"kubernetes.io/hostname": "a"}})));
    settle().await;
    cluster.put(asking("second", "1", json!({"nodeSelector": {"kubernetes.io/hostname": "a"}})));
    settle().await;
    let wanted = "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match Pod's node affinity/selector. \
         preemption: 0/2 nodes are available: 1 No preemption victims found for incoming pod, \
         1 Preemption is not helpful for scheduling.";
    assert_eq!(cluster.notes("FailedScheduling"), [wanted]);
    let status = serde_json::to_value(cluster.pod("second").status).unwrap();
    let condition = &status["conditions"][0];
    assert_eq!(
        (&condition["type"], &condition["status"], &condition["reason"], &condition["message"]),
        (&json!("PodScheduled"), &json!("False"), &json!("Unschedulable"), &json!(wanted))
    );
    cluster.delete("first");
    settle().await;
    assert_eq!(cluster.node_of("second").as_deref(), Some("a"));
}

#[tokio::test(start_paused = true)]
async fn a_pod_waits_for_the_first_node_and_for_its_gates() {
    let cluster = start(&[]);
    cluster.put(asking("p", "1", json!({"schedulingGates": [{"name": "x"}]})));
    settle().await;
    cluster.put(asking("p", "1", json!({})));
    settle().await;
    assert_eq!(cluster.notes("FailedScheduling"), ["no nodes available to schedule pods"]);
    cluster.put_node(machine("n", "amd64", "2"));
    settle().await;
    assert_eq!(cluster.node_of("p").as_deref(), Some("n"));
}

#[tokio::test(start_paused = true)]
async fn images_go_only_where_they_run() {
    let cluster = start(&[("pi", "arm64", "4"), ("nano", "arm64", "4"), ("zero", "arm", "4")]);
    let image = |name: &str, image: &str| {
        let containers = json!([{"name": "c", "image": image}]);
        api_pod(name, json!({"spec": {"containers": containers}}))
    };
    cluster.put(image("p", "amd64-only"));
    cluster.put(image("anywhere", "any"));
    cluster.put(image("patient", "slow"));
    settle().await;
    assert!(cluster.node_of("anywhere").is_some(), "what is not known is allowed");
    assert_eq!(cluster.node_of("patient"), None, "it waits for the registry");
    let wanted = "0/3 nodes are available: \
         1 node(s) cannot run image amd64-only (built for linux/amd64, not linux/arm/v7: zero), \
         2 node(s) cannot run image amd64-only (built for linux/amd64, not linux/arm64: nano, pi). \
         preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling.";
    assert_eq!(cluster.notes("FailedScheduling"), [wanted]);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(cluster.node_of("patient").is_some(), "but not for long");
    cluster.put_node(machine("vm", "amd64", "4"));
    settle().await;
    assert_eq!(cluster.node_of("p").as_deref(), Some("vm"));
}

#[tokio::test(start_paused = true)]
async fn urgent_pods_preempt_others() {
    let cluster = start(&[("a", "amd64", "2"), ("b", "amd64", "2")]);
    for (name, node, priority) in [("low", "a", 1), ("lower", "b", 0)] {
        let pinned = json!({"nodeSelector": {"kubernetes.io/hostname": node}, "priority": priority});
        cluster.put(asking(name, "2", pinned));
    }
    settle().await;
    cluster.put(asking("polite", "1", json!({"priority": 10, "preemptionPolicy": "Never"})));
    settle().await;
    assert_eq!(cluster.node_of("polite"), None);
    cluster.put(asking("urgent", "2", json!({"priority": 10})));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(cluster.node_of("urgent").as_deref(), Some("b"));
    assert!(cluster.sources.pods.get("ns", "lower").is_none());
    assert!(cluster.node_of("low").is_some());
    assert_eq!(cluster.notes("Preempted"), ["Preempted by pod urgent on node b"]);
    let refused = cluster.notes("FailedScheduling").remove(0);
    assert!(refused.ends_with("preemption: not eligible due to preemptionPolicy=Never."), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_refused_binding_is_tried_again() {
    let cluster = start(&[("n", "amd64", "1")]);
    cluster.refuse.store(true, Ordering::Relaxed);
    cluster.put(asking("p", "1", json!({})));
    settle().await;
    assert_eq!(cluster.notes("FailedScheduling"), ["running Bind plugin \"DefaultBinder\": no"]);
    cluster.refuse.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(cluster.node_of("p").as_deref(), Some("n"));
}

#[tokio::test(start_paused = true)]
async fn replicas_spread_and_ended_pods_leave_room() {
    let cluster = start(&[("a", "amd64", "1"), ("b", "arm64", "1")]);
    let term = json!([{"labelSelector": {"matchLabels": {"app": "x"}}, "topologyKey": "kubernetes.io/arch"}]);
    let affinity = json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": term}});
    for name in ["x1", "x2", "x3"] {
        let mut pod = asking(name, "100m", json!({"affinity": affinity}));
        pod.metadata.labels = Some([("app".to_string(), "x".to_string())].into());
        cluster.put(pod);
    }
    settle().await;
    let mut nodes = [cluster.node_of("x1"), cluster.node_of("x2")];
    nodes.sort();
    assert_eq!(nodes, [Some("a".to_string()), Some("b".to_string())]);
    assert_eq!(cluster.node_of("x3"), None);
    let mut ended = cluster.pod("x1");
    ended.status.get_or_insert_default().phase = Some("Succeeded".to_string());
    cluster.put(ended);
    settle().await;
    assert_eq!(cluster.node_of("x3"), cluster.node_of("x1"));
}

/// Prints pods a second over 1,000 nodes: `cargo test --release -p sampan-scheduler -- --ignored --nocapture bench`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn bench_a_thousand_nodes() {
    const NODES: usize = 1000;
    const PODS: usize = 10_000;
    for replicas in [false, true] {
        let cluster = TestCluster::new();
        if replicas {
            let service =
                json!({"metadata": {"name": "s", "namespace": "ns"}, "spec": {"selector": {"app": "x"}}});
            cluster.sources.services.put(serde_json::from_value(service).unwrap());
        }
        (0..NODES).for_each(|i| cluster.put_node(machine(&format!("n{i}"), "amd64", "8")));
        for i in 0..PODS {
            let mut pod = asking(&format!("p{i}"), "100m", json!({}));
            pod.metadata.labels = Some([("app".to_string(), "x".to_string())].into());
            cluster.put(pod);
        }
        let scheduler = Scheduler::assemble(cluster.clone(), cluster.sources.clone(), None);
        let start = sampan_world::clock::monotonic();
        let running = tokio::spawn(scheduler.work());
        let bound =
            |p: &Arc<k8s_openapi::api::core::v1::Pod>| p.spec.as_ref().is_some_and(|s| s.node_name.is_some());
        while !cluster.sources.pods.list().iter().all(bound) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let seconds = start.elapsed().as_secs_f64();
        running.abort();
        println!(
            "of one service: {replicas}: {:.0} pods/s ({PODS} pods, {NODES} nodes)",
            PODS as f64 / seconds
        );
    }
}
