//! The kubelet as a whole, against a runtime and an API server in memory.
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use sampan_client::Informer;
use sampan_volumes::ObjectWatches;
use serde_json::{Value, json};

use super::fakes::{FakeApi, FakeNetwork, FakeRuntime};
use super::{Kubelet, LookupError};
use crate::KubeletConfig;

struct Bench {
    kubelet: Kubelet,
    runtime: Arc<FakeRuntime>,
    network: Arc<FakeNetwork>,
    api: Arc<FakeApi>,
    pods: Informer<Pod>,
    _dir: tempfile::TempDir,
    version: u64,
}

impl Bench {
    fn with(runtime: Arc<FakeRuntime>) -> Self {
        Self::made(runtime, |_| {}, Informer::detached())
    }

    fn made(runtime: Arc<FakeRuntime>, more: impl FnOnce(&mut KubeletConfig), node: Informer<Node>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = KubeletConfig::new("n1", dir.path().into());
        config.node_ips = vec!["192.168.0.5".parse().unwrap()];
        config.memory_backed_secrets = false;
        config.back_off_initial = Duration::from_millis(300);
        config.eviction_memory_bytes = 0;
        config.eviction_disk_percent = 0;
        config.image_gc_high_percent = 101;
        more(&mut config);
        let (api, pods, network) =
            (Arc::new(FakeApi::default()), Informer::detached(), Arc::<FakeNetwork>::default());
        let client = api.client(pods.clone());
        let watches = ObjectWatches::new(client.clone());
        let informers = (pods.clone(), node, Informer::detached());
        let kubelet = Kubelet::assemble(config, client, informers, watches, runtime.clone(), network.clone());
        let running = kubelet.clone();
        tokio::spawn(async move { running.run().await });
        Self { kubelet, runtime, network, api, pods, _dir: dir, version: 1 }
    }

    fn new() -> Self {
        Self::with(Arc::default())
    }

    fn put(&mut self, name: &str, spec: &Value, more: &Value) {
        self.version += 1;
        let mut object = json!({"metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"),
            "resourceVersion": self.version.to_string(), "generation": 1}, "spec": spec});
        for (key, value) in more.as_object().into_iter().flatten() {
            object["metadata"][key] = value.clone();
        }
        self.pods.put(serde_json::from_value(object).unwrap());
    }

    async fn until(&self, what: &str, check: impl Fn(&Self) -> bool) {
        for _ in 0..500 {
            if check(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!(
            "never: {what}\nstatuses: {:#?}\nevents: {:#?}",
            self.api.statuses.lock(),
            self.api.events.lock()
        );
    }

    async fn phase(&self, name: &str, phase: &str) {
        self.until(&format!("{name} {phase}"), |b| b.api.status(name)["phase"] == phase).await;
    }

    fn waiting(&self, name: &str) -> Value {
        self.api.status(name)["containerStatuses"][0]["state"]["waiting"]["reason"].clone()
    }
}

fn one(more: &Value) -> Value {
    let mut container = json!({"name": "c", "image": "busybox", "imagePullPolicy": "Always",
        "terminationMessagePath": "/dev/termination-log"});
    for (key, value) in more.as_object().into_iter().flatten() {
        container[key] = value.clone();
    }
    json!({"nodeName": "n1", "restartPolicy": "Always", "terminationGracePeriodSeconds": 7, "containers": [container]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_runs_and_is_deleted() {
    let mut bench = Bench::new();
    let env = json!([{"name": "A", "value": "1"}, {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]);
    let spec = one(&json!({"command": ["sh", "$(A)"], "env": env}));
    bench.put("p", &spec, &json!({}));
    bench.phase("p", "Running").await;
    let status = bench.api.status("p");
    assert_eq!((&status["podIP"], &status["hostIP"]), (&json!("10.0.0.9"), &json!("192.168.0.5")));
    assert_eq!(status["qosClass"], "BestEffort");
    let container = &status["containerStatuses"][0];
    assert_eq!((&container["ready"], &container["started"]), (&json!(true), &json!(true)));
    assert!(container["containerID"].as_str().unwrap().starts_with("sampan://"));
    let config = bench.runtime.configs.lock()["c"].clone();
    assert_eq!(config.command, ["sh", "1"]);
    assert!(config.env.contains(&("IP".to_string(), "10.0.0.9".to_string())), "{:?}", config.env);
    let paths: Vec<&str> = config.mounts.iter().map(|m| m.container_path.as_str()).collect();
    assert_eq!(paths, ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/dev/termination-log"]);
    let found = bench.kubelet.container("ns", "p", None, "c", false).unwrap();
    assert!(found.is_running && found.log_path.ends_with("ns_p_uid-p/c/0.log"), "{found:?}");
    assert!(matches!(
        bench.kubelet.container("ns", "p", None, "x", false),
        Err(LookupError::NoContainer { .. })
    ));
    for reason in ["Pulling", "Pulled", "Created", "Started"] {
        bench.until(reason, |b| b.api.reasons().contains(&reason.to_string())).await;
    }
    std::fs::write(&config.mounts[3].host_path, "bye").unwrap();
    let gone = json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 3});
    bench.put("p", &spec, &gone);
    bench.until("deleted", |b| *b.api.deleted.lock() == ["p"]).await;
    assert_eq!(*bench.runtime.stops.lock(), [("c".to_string(), 3)]);
    let last = bench.api.status("p");
    assert_eq!(last["phase"], "Failed");
    let terminated = &last["containerStatuses"][0]["state"]["terminated"];
    assert_eq!((&terminated["exitCode"], &terminated["message"]), (&json!(143), &json!("bye")));
    bench.until("cleaned", |b| b.runtime.sandboxes.lock().is_empty() && b.kubelet.pods().is_empty()).await;
    assert!(bench.network.attached.lock().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_end_and_crashes_back_off() {
    let mut bench = Bench::new();
    let mut job = one(&json!({}));
    job["restartPolicy"] = json!("Never");
    bench.put("job", &job, &json!({}));
    bench.phase("job", "Running").await;
    bench.runtime.exit("c", 0);
    bench.phase("job", "Succeeded").await;
    let status = bench.api.status("job");
    let ready =
        status["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap().clone();
    assert_eq!((&ready["status"], &ready["reason"]), (&json!("False"), &json!("PodCompleted")));
    bench.until("sandbox stopped", |b| b.network.attached.lock().is_empty()).await;

    bench.runtime.exits.lock().insert("bad".into(), 5);
    bench.put("crash", &one(&json!({"name": "bad"})), &json!({}));
    bench.until("back-off", |b| b.waiting("crash") == "CrashLoopBackOff").await;
    bench
        .until("restarts", |b| {
            let status = &b.api.status("crash")["containerStatuses"][0];
            status["restartCount"].as_i64() >= Some(2) && status["lastState"]["terminated"]["exitCode"] == 5
        })
        .await;
    assert_eq!(bench.api.status("crash")["phase"], "Running");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn init_containers_run_in_order_and_images_can_fail() {
    let mut bench = Bench::new();
    let mut spec = one(&json!({}));
    let init = |name: &str| json!({"name": name, "image": "busybox"});
    spec["initContainers"] = json!([init("i1"), init("i2")]);
    bench.put("p", &spec, &json!({}));
    bench.until("i1", |b| b.runtime.running() == ["i1"]).await;
    bench.until("waiting", |b| b.waiting("p") == "PodInitializing").await;
    bench.runtime.exit("i1", 0);
    bench.until("i2", |b| b.runtime.running() == ["i2"]).await;
    bench.runtime.exit("i2", 0);
    bench.phase("p", "Running").await;
    assert_eq!(bench.runtime.running(), ["c"]);

    bench.runtime.images.lock().insert("none".into(), Err("no such image".into()));
    bench.put("pull", &one(&json!({"image": "none"})), &json!({}));
    bench.until("error", |b| b.waiting("pull") == "ErrImagePull").await;
    bench.put("never", &one(&json!({"image": "absent", "imagePullPolicy": "Never"})), &json!({}));
    bench.until("never", |b| b.waiting("never") == "ErrImageNeverPull").await;
    let non_root = json!({"securityContext": {"runAsNonRoot": true}});
    bench.put("root", &one(&non_root), &json!({}));
    bench.until("config error", |b| b.waiting("root") == "CreateContainerConfigError").await;
    bench.runtime.images.lock().insert("none".into(), Ok(()));
    bench.phase("pull", "Running").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_run_here_is_refused() {
    let mut bench = Bench::new();
    let mut spec = one(&json!({}));
    spec["securityContext"] = json!({"sysctls": [{"name": "kernel.msgmax", "value": "1"}]});
    bench.put("sysctl", &spec, &json!({}));
    bench.phase("sysctl", "Failed").await;
    assert_eq!(bench.api.status("sysctl")["reason"], "SysctlForbidden");
    bench.put("big", &one(&json!({"resources": {"requests": {"cpu": "9999"}}})), &json!({}));
    bench.phase("big", "Failed").await;
    assert_eq!(bench.api.status("big")["reason"], "OutOfcpu");
    let text = "image x: no image for linux/arm64; it is built for linux/amd64";
    bench.runtime.images.lock().insert("x".into(), Err(text.into()));
    bench.put("foreign", &one(&json!({"image": "x"})), &json!({}));
    bench.phase("foreign", "Failed").await;
    assert_eq!(bench.api.status("foreign")["reason"], "ImagePlatform");
    let mut late = one(&json!({}));
    late["activeDeadlineSeconds"] = json!(1);
    bench.put("late", &late, &json!({}));
    bench.phase("late", "Failed").await;
    assert_eq!(bench.api.status("late")["reason"], "DeadlineExceeded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_make_ready_and_restart() {
    let mut bench = Bench::new();
    *bench.runtime.exec_code.lock() = 1;
    let exec = |threshold: i32| json!({"exec": {"command": ["x"]}, "periodSeconds": 1, "failureThreshold": threshold, "successThreshold": 1});
    bench.put("ready", &one(&json!({"readinessProbe": exec(1)})), &json!({}));
    bench.phase("ready", "Running").await;
    bench.until("unhealthy", |b| b.api.reasons().contains(&"Unhealthy".to_string())).await;
    assert_eq!(bench.api.status("ready")["containerStatuses"][0]["ready"], false);
    *bench.runtime.exec_code.lock() = 0;
    bench.until("ready", |b| b.api.status("ready")["containerStatuses"][0]["ready"] == true).await;
    *bench.runtime.exec_code.lock() = 1;
    bench.put("live", &one(&json!({"name": "l", "livenessProbe": exec(1)})), &json!({}));
    bench
        .until("restarted", |b| {
            b.api.status("live")["containerStatuses"][0]["restartCount"].as_i64() >= Some(1)
        })
        .await;
    let killing = "Container l failed liveness probe, will be restarted";
    bench.until("said so", |b| b.api.events.lock().iter().any(|(_, m)| m == killing)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_agent_takes_over_and_cleans_up() {
    let mut first = Bench::new();
    first.put("p", &one(&json!({})), &json!({}));
    first.put("gone", &one(&json!({"name": "orphan"})), &json!({}));
    first.phase("p", "Running").await;
    first.phase("gone", "Running").await;
    let runtime = first.runtime.clone();
    let mut second = Bench::with(runtime.clone());
    second.put("p", &one(&json!({})), &json!({}));
    second.phase("p", "Running").await;
    assert_eq!(
        runtime.containers.lock().values().filter(|c| c.name == "c").count(),
        1,
        "nothing was made anew"
    );
    // a fake informer never syncs: the cleanup is what a synced one does
    second.kubelet.0.clean_orphans().await;
    assert_eq!(runtime.running(), ["c"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_is_taken_over_is_probed_at_its_address() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 512]).await;
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").await;
        }
    });
    let probe = json!({"httpGet": {"port": port}, "periodSeconds": 1});
    let spec = one(&json!({"readinessProbe": probe}));
    let mut first = Bench::new();
    *first.network.slow.lock() = Some("127.0.0.1".parse().unwrap());
    first.put("p", &spec, &json!({}));
    first.phase("p", "Running").await;
    first.until("ready", |b| b.api.status("p")["containerStatuses"][0]["ready"] == true).await;
    let mut second = Bench::with(first.runtime.clone());
    *second.network.slow.lock() = Some("127.0.0.1".parse().unwrap());
    second.put("p", &spec, &json!({}));
    second.until("ready", |b| b.api.status("p")["containerStatuses"][0]["ready"] == true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_wait_for_their_objects() {
    let mut bench = Bench::new();
    let mut spec = one(&json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
    spec["volumes"] = json!([{"name": "v", "configMap": {"name": "cm"}}]);
    bench.put("p", &spec, &json!({}));
    let text = "MountVolume.SetUp failed for volume \"v\" : configmap \"cm\" not found";
    bench.until("told", |b| b.api.events.lock().iter().any(|(_, m)| m == text)).await;
    assert_eq!(bench.waiting("p"), "ContainerCreating");
    let object =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cm"}, "data": {"k": "v"}});
    bench.api.objects.lock().insert("/api/v1/namespaces/ns/configmaps/cm".into(), object);
    bench.phase("p", "Running").await;
    let config = bench.runtime.configs.lock()["c"].clone();
    let mount = config.mounts.iter().find(|m| m.container_path == "/v").unwrap();
    assert_eq!(std::fs::read_to_string(mount.host_path.join("k")).unwrap(), "v");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_static_pod_runs_is_mirrored_and_ends_with_its_file() {
    let manifests = tempfile::tempdir().unwrap();
    let file = manifests.path().join("web.yaml");
    let text = |image: &str| {
        let container = format!("{{name: c, image: {image}, imagePullPolicy: Always}}");
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: web, namespace: ns}}, spec: {{containers: [{container}]}}}}"
        )
    };
    std::fs::write(&file, text("one")).unwrap();
    std::fs::write(manifests.path().join("bad.yaml"), "{").unwrap();
    let node = Informer::detached();
    let bench = Bench::made(
        Arc::default(),
        |config| config.manifests_dir = Some(manifests.path().into()),
        node.clone(),
    );
    // without a server, nor a node
    bench.until("running", |b| !b.runtime.containers.lock().is_empty()).await;
    bench
        .until("the bad file is named", |b| {
            b.api
                .events
                .lock()
                .iter()
                .any(|(reason, text)| reason == "InvalidStaticPod" && text.contains("bad.yaml"))
        })
        .await;
    assert!(bench.api.status("web-n1").is_null(), "there is no mirror to tell");
    node.put(serde_json::from_value(json!({"metadata": {"name": "n1", "uid": "node-uid"}})).unwrap());
    let mirror = |b: &Bench| b.pods.get("ns", "web-n1");
    bench.until("mirrored", |b| mirror(b).is_some()).await;
    bench.phase("web-n1", "Running").await;
    let first = mirror(&bench).unwrap();
    let owner = &first.metadata.owner_references.as_ref().unwrap()[0];
    assert_eq!((owner.kind.as_str(), owner.uid.as_str()), ("Node", "node-uid"));
    let annotations = first.metadata.annotations.clone().unwrap();
    assert_eq!(annotations["kubernetes.io/config.mirror"], annotations["kubernetes.io/config.hash"]);
    // somebody deletes the mirror: it is made anew, and the pod runs on
    let mut going = (*first).clone();
    going.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
    going.metadata.resource_version = Some("999999".into());
    bench.pods.put(going);
    bench.until("deleted", |b| *b.api.deleted.lock() == ["web-n1"]).await;
    bench.until("made anew", |b| mirror(b).is_some_and(|m| m.metadata.uid != first.metadata.uid)).await;
    assert!(bench.runtime.stops.lock().is_empty());
    // another content is another pod, started when the first has ended
    std::fs::write(&file, text("two")).unwrap();
    bench.until("the first ends", |b| b.runtime.stops.lock().len() == 1).await;
    bench
        .until("the second runs", |b| {
            b.runtime.configs.lock().values().any(|config| config.image == "two")
                && b.kubelet.pods().len() == 1
        })
        .await;
    bench
        .until("its mirror", |b| {
            mirror(b).is_some_and(|m| m.metadata.annotations.clone().unwrap_or_default() != annotations)
        })
        .await;
    std::fs::remove_file(&file).unwrap();
    bench
        .until("all gone", |b| {
            b.kubelet.pods().is_empty() && mirror(b).is_none() && b.runtime.sandboxes.lock().is_empty()
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_container_is_never_told_as_not_ready() {
    let mut bench = Bench::new();
    bench.put("p", &one(&json!({})), &json!({}));
    bench.phase("p", "Running").await;
    let ready = |b: &Bench| b.api.status("p")["containerStatuses"][0]["ready"].clone();
    bench.api.history.lock().clear();
    bench.put("p", &one(&json!({"image": "other"})), &json!({"generation": 2}));
    bench.until("restarted", |b| b.api.status("p")["containerStatuses"][0]["restartCount"] == 1).await;
    assert_eq!(ready(&bench), true);
    for patch in bench.api.history.lock().iter() {
        let told = &patch["status"]["containerStatuses"][0]["ready"];
        assert!(told.is_null() || told == true, "{patch}");
    }
}
