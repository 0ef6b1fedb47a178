//! A node with one pod whose commands are a few words, and the client's side of both protocols.
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Pod;
use sampan_drivers::runtime::*;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

use super::super::spdy::tests::frames;
use super::super::websocket::tests::message;
use super::super::*;
use crate::kubelet::{ContainerRef, LookupError};

/// A runtime whose commands are a few words, and a node with one pod.
#[derive(Default)]
pub struct Fake {
    pub is_running: AtomicBool,
    pub log_path: PathBuf,
    pub subscribers: Mutex<Vec<mpsc::Sender<PodEvent>>>,
}

impl Fake {
    pub async fn tell(&self, pod_uid: &str) {
        let subscribers = self.subscribers.lock().clone();
        for subscriber in subscribers {
            let _ = subscriber.send(PodEvent { pod_uid: pod_uid.to_string() }).await;
        }
    }

    fn at() -> jiff::Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }
}

pub(super) fn none<T>() -> Result<T, RuntimeError> {
    Err(RuntimeError::NotFound { what: "that".into() })
}

#[async_trait]
impl Runtime for Fake {
    fn version(&self) -> String {
        "fake://1".into()
    }
    fn platform(&self) -> Platform {
        Platform { os: "linux".into(), architecture: "amd64".into(), variant: None }
    }
    async fn run_sandbox(&self, _: &SandboxConfig) -> Result<String, RuntimeError> {
        none()
    }
    async fn stop_sandbox(&self, _: &str) -> Result<(), RuntimeError> {
        none()
    }
    async fn remove_sandbox(&self, _: &str) -> Result<(), RuntimeError> {
        none()
    }
    async fn list_sandboxes(&self) -> Result<Vec<Sandbox>, RuntimeError> {
        Ok(vec![Sandbox {
            id: "s".into(),
            namespace: "default".into(),
            name: "p".into(),
            uid: "u".into(),
            attempt: 0,
            state: SandboxState::Ready,
            created_at: Self::at(),
            netns: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
        }])
    }
    async fn create_container(&self, _: &str, _: &ContainerConfig) -> Result<String, RuntimeError> {
        none()
    }
    async fn start_container(&self, _: &str) -> Result<(), RuntimeError> {
        none()
    }
    async fn stop_container(&self, _: &str, _: i64) -> Result<(), RuntimeError> {
        none()
    }
    async fn remove_container(&self, _: &str) -> Result<(), RuntimeError> {
        none()
    }
    async fn list_containers(&self) -> Result<Vec<Container>, RuntimeError> {
        Ok(vec![self.container_status("c").await?])
    }
    async fn container_status(&self, id: &str) -> Result<Container, RuntimeError> {
        let is_running = self.is_running.load(Ordering::SeqCst);
        Ok(Container {
            id: id.into(),
            sandbox_id: "s".into(),
            name: "main".into(),
            attempt: 0,
            image: "i".into(),
            image_id: "i".into(),
            state: if is_running { ContainerState::Running } else { ContainerState::Exited },
            created_at: Self::at(),
            started_at: Some(Self::at()),
            finished_at: None,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            log_path: self.log_path.clone(),
            user: None,
        })
    }
    async fn reopen_container_log(&self, _: &str) -> Result<(), RuntimeError> {
        none()
    }
    async fn update_container_resources(&self, _: &str, _: &Resources) -> Result<(), RuntimeError> {
        none()
    }
    async fn container_stats(&self) -> Result<Vec<ContainerStats>, RuntimeError> {
        Ok(vec![ContainerStats {
            container_id: "c".into(),
            cpu_usage_ns: 1_500_000_000,
            memory_working_set_bytes: 4096,
            memory_rss_bytes: 1024,
            writable_layer_bytes: 7,
        }])
    }
    async fn exec_sync(
        &self,
        _: &str,
        command: &[String],
        _: Duration,
        _: usize,
    ) -> Result<(Vec<u8>, Vec<u8>, i32), RuntimeError> {
        Ok((command.join("|").into(), Vec::new(), 0))
    }
    async fn exec(
        &self,
        _: &str,
        command: &[String],
        mut streams: Streams,
    ) -> Result<ExecResult, RuntimeError> {
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        let mut code = 0;
        match words.as_slice() {
            ["cat"] => {
                let (mut stdin, mut stdout) = (streams.stdin.take().unwrap(), streams.stdout.take().unwrap());
                let _ = tokio::io::copy(&mut stdin, &mut stdout).await;
            }
            ["size"] => {
                let size = streams.resize.as_mut().unwrap().recv().await.unwrap();
                let text = format!("{}x{} {}\n", size.width, size.height, streams.tty);
                streams.stdout.as_mut().unwrap().write_all(text.as_bytes()).await.unwrap();
            }
            ["both", text] => {
                streams.stdout.as_mut().unwrap().write_all(text.as_bytes()).await.unwrap();
                streams.stderr.as_mut().unwrap().write_all(b"err").await.unwrap();
            }
            ["exit", n] => code = n.parse().unwrap(),
            ["hang"] => std::future::pending().await,
            _ => return Ok(ExecResult::Failed("no such file".into())),
        }
        Ok(ExecResult::Exited(code))
    }
    async fn attach(&self, _: &str, mut streams: Streams) -> Result<(), RuntimeError> {
        streams.stdout.as_mut().unwrap().write_all(b"attached").await.unwrap();
        Ok(())
    }
    async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<Box<dyn Stream>, RuntimeError> {
        assert_eq!(sandbox_id, "s");
        if port != 80 {
            return Err(RuntimeError::Failed { message: "connection refused".into() });
        }
        // says who it is, then echoes
        let (ours, mut theirs) = tokio::io::duplex(1024);
        tokio::spawn(async move {
            theirs.write_all(b"hello ").await.unwrap();
            let (mut read, mut write) = tokio::io::split(theirs);
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        });
        Ok(Box::new(ours))
    }
    async fn pull_image(&self, _: &str, _: &[Auth]) -> Result<String, RuntimeError> {
        none()
    }
    async fn image_status(&self, _: &str) -> Result<Option<Image>, RuntimeError> {
        none()
    }
    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError> {
        none()
    }
    async fn remove_image(&self, _: &str) -> Result<(), RuntimeError> {
        none()
    }
    async fn image_fs_bytes(&self) -> Result<u64, RuntimeError> {
        Ok(99)
    }
    fn events(&self) -> mpsc::Receiver<PodEvent> {
        let (sender, receiver) = mpsc::channel(8);
        self.subscribers.lock().push(sender);
        receiver
    }
}

impl Pods for Fake {
    fn node_name(&self) -> String {
        "n".into()
    }
    fn root_dir(&self) -> PathBuf {
        "/".into()
    }
    fn pods(&self) -> Vec<Arc<Pod>> {
        Pods::pod(self, "default", "p").into_iter().collect()
    }
    fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        let pod = json!({"metadata": {"name": "p", "namespace": "default", "uid": "u"}, "spec": {"containers": [
            {"name": "main"}, {"name": "waiting"}]}});
        (namespace == "default" && name == "p").then(|| Arc::new(serde_json::from_value(pod).unwrap()))
    }
    fn sandbox_id(&self, _: &str, _: &str) -> Option<String> {
        Some("s".into())
    }
    fn container(
        &self,
        _: &str,
        pod: &str,
        container: &str,
        previous: bool,
    ) -> Result<ContainerRef, LookupError> {
        let (pod, name) = (pod.to_string(), container.to_string());
        match (container, previous) {
            ("main", false) => Ok(ContainerRef {
                pod_uid: "u".into(),
                id: "c".into(),
                sandbox_id: "s".into(),
                is_running: true,
                log_path: self.log_path.clone(),
                stdin: true,
                stdin_once: false,
                tty: false,
            }),
            ("main", true) => Err(LookupError::NoPrevious { pod, container: name }),
            _ => Err(LookupError::Waiting { pod, container: name, reason: "ContainerCreating".into() }),
        }
    }
    fn configuration(&self) -> Value {
        json!({"kubeletconfig": {}})
    }
}

pub(super) fn api(fake: Fake) -> Api {
    let fake = Arc::new(fake);
    Api::new(fake.clone(), fake)
}

pub(super) fn fake() -> Fake {
    Fake { is_running: true.into(), ..Fake::default() }
}

/// Sends a request; the stream stands after the answer's head.
pub(super) async fn ask(api: &Api, method: &str, path: &str, headers: &[&str]) -> (String, DuplexStream) {
    let (mut client, server) = tokio::io::duplex(64 * 1024);
    tokio::spawn(api.clone().serve(Box::new(server)));
    let request = format!("{method} {path} HTTP/1.1\r\nHost: n\r\n{}\r\n\r\n", headers.join("\r\n"));
    let request = if headers.is_empty() {
        request.replace("\r\n\r\n\r\n", "\r\nConnection: close\r\n\r\n")
    } else {
        request
    };
    client.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.unwrap());
    }
    (String::from_utf8(head).unwrap(), client)
}

pub(super) async fn get(api: &Api, path: &str) -> (String, String) {
    let (head, mut client) = ask(api, "GET", path, &[]).await;
    let mut body = String::new();
    client.read_to_string(&mut body).await.unwrap();
    (head, body)
}

pub(super) async fn open_websocket(api: &Api, path: &str, protocol: &str) -> (String, DuplexStream) {
    let offer = format!("Sec-WebSocket-Protocol: {protocol}");
    let mut headers = vec![
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ];
    if !protocol.is_empty() {
        headers.push(&offer);
    }
    ask(api, "GET", path, &headers).await
}

pub(super) async fn open_spdy(api: &Api, path: &str, protocol: &str) -> (String, DuplexStream) {
    let offer = format!("X-Stream-Protocol-Version: {protocol}");
    ask(api, "POST", path, &["Connection: Upgrade", "Upgrade: SPDY/3.1", &offer]).await
}

/// All messages until the close, joined by channel.
pub(super) async fn channels(client: &mut DuplexStream) -> BTreeMap<u8, String> {
    let mut seen: BTreeMap<u8, String> = BTreeMap::new();
    loop {
        let (code, payload) = message(client).await.unwrap();
        if code == 8 {
            return seen;
        }
        let text = std::str::from_utf8(&payload[1..]).unwrap();
        seen.entry(payload[0]).or_default().push_str(text);
    }
}

/// Everything until the end, joined by stream; and how many streams were accepted.
pub(super) async fn streams(
    client: &mut (impl tokio::io::AsyncRead + Unpin),
) -> (BTreeMap<u32, String>, usize) {
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).await.unwrap();
    let (datas, controls) = frames(&mut Default::default(), &bytes);
    let mut seen: BTreeMap<u32, String> = BTreeMap::new();
    for (id, _, data) in datas {
        seen.entry(id).or_default().push_str(std::str::from_utf8(&data).unwrap());
    }
    let accepted = controls.iter().filter(|c| matches!(c, spdy::Control::SynReply { .. })).count();
    (seen, accepted)
}
