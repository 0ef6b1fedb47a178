//! A runtime and an API server in memory, for tests of the kubelet as a whole.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::Pod;
use kube::client::Body;
use parking_lot::Mutex;
use sampan_client::Informer;
use sampan_drivers::network::{HostPort, NetworkError};
use sampan_drivers::runtime::*;
use sampan_drivers::tunnel::Stream;
use sampan_drivers::{PodNetwork, Runtime};
use sampan_world::clock;
use serde_json::{Value, json};
use tokio::sync::mpsc;

pub fn platform() -> Platform {
    Platform { os: "linux".into(), architecture: "arm64".into(), variant: None }
}

#[derive(Default)]
pub struct FakeRuntime {
    pub sandboxes: Mutex<BTreeMap<String, Sandbox>>,
    pub containers: Mutex<BTreeMap<String, Container>>,
    pub configs: Mutex<BTreeMap<String, ContainerConfig>>,
    pub sandbox_configs: Mutex<Vec<SandboxConfig>>,
    pub images: Mutex<BTreeMap<String, Result<(), String>>>,
    pub exec_code: Mutex<i32>,
    /// Containers that exit by themselves at their start, by name.
    pub exits: Mutex<BTreeMap<String, i32>>,
    pub stops: Mutex<Vec<(String, i64)>>,
    sender: Mutex<Option<mpsc::Sender<PodEvent>>>,
    next: AtomicU64,
}

fn missing<T>(what: &str) -> Result<T, RuntimeError> {
    Err(RuntimeError::NotFound { what: what.to_string() })
}

impl FakeRuntime {
    fn id(&self, prefix: &str) -> String {
        format!("{prefix}{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    fn tell(&self, sandbox: &str) {
        let uid = self.sandboxes.lock().get(sandbox).map(|s| s.uid.clone());
        if let (Some(uid), Some(sender)) = (uid, self.sender.lock().as_ref()) {
            let _ = sender.try_send(PodEvent { pod_uid: uid });
        }
    }

    /// Ends the newest container of that name.
    pub fn exit(&self, name: &str, code: i32) {
        let mut containers = self.containers.lock();
        let found = containers.values_mut().filter(|c| c.name == name).max_by_key(|c| c.attempt);
        let Some(container) = found.filter(|c| c.state == ContainerState::Running) else { return };
        container.state = ContainerState::Exited;
        container.exit_code = code;
        container.finished_at = Some(clock::now());
        let sandbox = container.sandbox_id.clone();
        drop(containers);
        self.tell(&sandbox);
    }

    pub fn running(&self) -> Vec<String> {
        let containers = self.containers.lock();
        containers.values().filter(|c| c.state == ContainerState::Running).map(|c| c.name.clone()).collect()
    }
}

#[async_trait]
impl Runtime for FakeRuntime {
    fn version(&self) -> String {
        "sampan://0.1.0".into()
    }
    fn platform(&self) -> Platform {
        platform()
    }
    async fn run_sandbox(&self, config: &SandboxConfig) -> Result<String, RuntimeError> {
        let id = self.id("s");
        self.sandbox_configs.lock().push(config.clone());
        let sandbox = Sandbox {
            id: id.clone(),
            namespace: config.namespace.clone(),
            name: config.name.clone(),
            uid: config.uid.clone(),
            attempt: config.attempt,
            state: SandboxState::Ready,
            created_at: clock::now(),
            netns: Some("/netns".into()),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        };
        self.sandboxes.lock().insert(id.clone(), sandbox);
        Ok(id)
    }
    async fn stop_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        if let Some(sandbox) = self.sandboxes.lock().get_mut(id) {
            sandbox.state = SandboxState::NotReady;
        }
        Ok(())
    }
    async fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        self.sandboxes.lock().remove(id);
        self.containers.lock().retain(|_, c| c.sandbox_id != id);
        Ok(())
    }
    async fn list_sandboxes(&self) -> Result<Vec<Sandbox>, RuntimeError> {
        Ok(self.sandboxes.lock().values().cloned().collect())
    }
    async fn create_container(
        &self,
        sandbox_id: &str,
        config: &ContainerConfig,
    ) -> Result<String, RuntimeError> {
        let id = self.id("c");
        let container = Container {
            id: id.clone(),
            sandbox_id: sandbox_id.to_string(),
            name: config.name.clone(),
            attempt: config.attempt,
            image: config.image.clone(),
            image_id: config.image_id.clone(),
            state: ContainerState::Created,
            created_at: clock::now(),
            started_at: None,
            finished_at: None,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
            log_path: config.log_path.clone(),
            user: None,
        };
        self.containers.lock().insert(id.clone(), container);
        self.configs.lock().insert(config.name.clone(), config.clone());
        Ok(id)
    }
    async fn start_container(&self, id: &str) -> Result<(), RuntimeError> {
        let (name, sandbox) = {
            let mut containers = self.containers.lock();
            let Some(container) = containers.get_mut(id) else { return missing(id) };
            container.state = ContainerState::Running;
            container.started_at = Some(clock::now());
            (container.name.clone(), container.sandbox_id.clone())
        };
        self.tell(&sandbox);
        let code = self.exits.lock().get(&name).copied();
        if let Some(code) = code {
            self.exit(&name, code);
        }
        Ok(())
    }
    async fn stop_container(&self, id: &str, grace_seconds: i64) -> Result<(), RuntimeError> {
        let Some(name) = self.containers.lock().get(id).map(|c| c.name.clone()) else { return missing(id) };
        self.stops.lock().push((name.clone(), grace_seconds));
        self.exit(&name, 143);
        Ok(())
    }
    async fn remove_container(&self, id: &str) -> Result<(), RuntimeError> {
        self.containers.lock().remove(id);
        Ok(())
    }
    async fn list_containers(&self) -> Result<Vec<Container>, RuntimeError> {
        Ok(self.containers.lock().values().cloned().collect())
    }
    async fn container_status(&self, id: &str) -> Result<Container, RuntimeError> {
        self.containers.lock().get(id).cloned().map_or_else(|| missing(id), Ok)
    }
    async fn reopen_container_log(&self, _: &str) -> Result<(), RuntimeError> {
        Ok(())
    }
    async fn update_container_resources(&self, _: &str, _: &Resources) -> Result<(), RuntimeError> {
        Ok(())
    }
    async fn container_stats(&self) -> Result<Vec<ContainerStats>, RuntimeError> {
        Ok(Vec::new())
    }
    async fn exec_sync(
        &self,
        _: &str,
        _: &[String],
        _: Duration,
        _: usize,
    ) -> Result<(Vec<u8>, Vec<u8>, i32), RuntimeError> {
        Ok((b"out".to_vec(), Vec::new(), *self.exec_code.lock()))
    }
    async fn exec(&self, _: &str, _: &[String], _: Streams) -> Result<ExecResult, RuntimeError> {
        Ok(ExecResult::Exited(0))
    }
    async fn attach(&self, _: &str, _: Streams) -> Result<(), RuntimeError> {
        Ok(())
    }
    async fn port_forward(&self, id: &str, _: u16) -> Result<Box<dyn Stream>, RuntimeError> {
        missing(id)
    }
    async fn pull_image(&self, image: &str, _: &[Auth]) -> Result<String, RuntimeError> {
        match self.images.lock().entry(image.to_string()).or_insert(Ok(())) {
            Ok(()) => Ok(format!("sha256:{image}")),
            Err(message) => Err(RuntimeError::Failed { message: message.clone() }),
        }
    }
    async fn image_status(&self, image: &str) -> Result<Option<Image>, RuntimeError> {
        let there = self.images.lock().get(image).is_some_and(Result::is_ok);
        Ok(there.then(|| Image {
            id: format!("sha256:{image}"),
            repo_tags: vec![image.to_string()],
            repo_digests: vec![format!("{image}@sha256:1")],
            size_bytes: 7,
            user: String::new(),
            platform: platform(),
            pinned: false,
        }))
    }
    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError> {
        Ok(Vec::new())
    }
    async fn remove_image(&self, _: &str) -> Result<(), RuntimeError> {
        Ok(())
    }
    async fn image_fs_bytes(&self) -> Result<u64, RuntimeError> {
        Ok(0)
    }
    fn events(&self) -> mpsc::Receiver<PodEvent> {
        let (sender, receiver) = mpsc::channel(256);
        *self.sender.lock() = Some(sender);
        receiver
    }
}

#[derive(Default)]
pub struct FakeNetwork {
    pub attached: Mutex<Vec<String>>,
    /// Answers that address, and takes its time for it.
    pub slow: Mutex<Option<IpAddr>>,
}

#[async_trait]
impl PodNetwork for FakeNetwork {
    async fn attach(&self, uid: &str, _: &Path, _: &[HostPort]) -> Result<Vec<IpAddr>, NetworkError> {
        self.attached.lock().push(uid.to_string());
        let slow = *self.slow.lock();
        if slow.is_some() {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        Ok(vec![slow.unwrap_or(IpAddr::from([10, 0, 0, 9]))])
    }
    async fn detach(&self, uid: &str) -> Result<(), NetworkError> {
        self.attached.lock().retain(|u| u != uid);
        Ok(())
    }
    async fn retain(&self, _: &[String]) -> Result<(), NetworkError> {
        Ok(())
    }
}

/// What pods the API has, and what was written.
#[derive(Default)]
pub struct FakeApi {
    pub statuses: Mutex<BTreeMap<String, Value>>,
    /// The patches of statuses, in order.
    pub history: Mutex<Vec<Value>>,
    pub events: Mutex<Vec<(String, String)>>,
    pub deleted: Mutex<Vec<String>>,
    pub objects: Mutex<BTreeMap<String, Value>>,
    version: AtomicU64,
}

impl FakeApi {
    pub fn status(&self, pod: &str) -> Value {
        self.statuses.lock().get(pod).cloned().unwrap_or_default()
    }

    pub fn reasons(&self) -> Vec<String> {
        self.events.lock().iter().map(|(r, _)| r.clone()).collect()
    }

    fn merge(&self, pod: &str, patch: &Value) {
        let mut statuses = self.statuses.lock();
        let status = statuses.entry(pod.to_string()).or_insert_with(|| json!({}));
        for (key, value) in patch["status"].as_object().into_iter().flatten() {
            match key.as_str() {
                "conditions" => {
                    let mut all = status[key].as_array().cloned().unwrap_or_default();
                    for item in value.as_array().into_iter().flatten() {
                        all.retain(|c| c["type"] != item["type"]);
                        all.push(item.clone());
                    }
                    status[key] = Value::Array(all);
                }
                _ => status[key] = value.clone(),
            }
        }
    }

    async fn answer(&self, request: http::Request<Body>, pods: &Informer<Pod>) -> http::Response<Body> {
        let (parts, body) = request.into_parts();
        let bytes = body.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        let value: Value = serde_json::from_slice(&bytes).unwrap_or(json!({}));
        let path = parts.uri.path().to_string();
        let version = self.version.fetch_add(1, Ordering::Relaxed) + 1000;
        let name = path.trim_end_matches("/status").rsplit('/').next().unwrap_or_default().to_string();
        let mut code = 200;
        let answer = if path.ends_with("/status") && path.contains("/pods/") {
            self.merge(&name, &value);
            self.history.lock().push(value);
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "resourceVersion": version.to_string()}})
        } else if parts.method == http::Method::DELETE {
            self.deleted.lock().push(name.clone());
            pods.remove(&("ns".to_string(), name));
            json!({"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Success"})
        } else if parts.method == http::Method::GET {
            match self.objects.lock().get(&path) {
                Some(object) => object.clone(),
                None => {
                    code = 404;
                    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                        "message": "not found", "reason": "NotFound", "code": 404})
                }
            }
        } else {
            if path.ends_with("/events") {
                let text = |key: &str| value[key].as_str().unwrap_or_default().to_string();
                self.events.lock().push((text("reason"), text("message")));
            }
            let mut value = value;
            value["metadata"]["resourceVersion"] = json!(version.to_string());
            if path.ends_with("/pods") {
                value["metadata"]["uid"] = json!(format!("uid-{version}"));
                pods.put(serde_json::from_value(value.clone()).unwrap());
            }
            value
        };
        let mut response = http::Response::new(Body::from(answer.to_string().into_bytes()));
        *response.status_mut() = http::StatusCode::from_u16(code).unwrap();
        response
    }

    pub fn client(self: &Arc<Self>, pods: Informer<Pod>) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let (api, pods) = (api.clone(), pods.clone());
            async move { Ok::<_, std::convert::Infallible>(api.answer(request, &pods).await) }
        });
        kube::Client::new(service, "default")
    }
}
