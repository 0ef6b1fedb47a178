//! Waiting until nodes are Ready. Upstream counterpart: k3sup's cmd/ready.go, which runs kubectl.
//!
//! The API is asked through the machine's own SSH connection where there is one, so nothing but port 22 needs to be
//! reachable from here; where the machine forwards no ports, at its address.
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::config::{KubeConfigOptions, Kubeconfig};

use crate::connection::{Connection, Forwarded};
use crate::install;
use crate::machine::{Host, Machine};
use crate::service::Service;

/// Nothing is no fault: the file comes with the first start.
const READ: &str = "[ ! -r \"$1\" ] || cat \"$1\"";
const PAUSE: Duration = Duration::from_millis(300);
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    #[error("the kubeconfig: {0}")]
    Kubeconfig(String),
    #[error("{host}: node {node} is not Ready after {seconds} s: {last}{log}")]
    NotReady { host: String, node: String, seconds: u64, last: String, log: String },
    #[error("{host}: the service keeps ending: {last}{log}")]
    Ends { host: String, last: String, log: String },
    #[error("{host}: leading a port there: {source}")]
    Forward { host: String, source: std::io::Error },
}

/// A client of the cluster, by way of a machine. It works as long as the value lives.
pub struct Cluster {
    pub client: kube::Client,
    _forwarded: Option<Forwarded>,
}

impl Cluster {
    /// From the text of a kubeconfig that is right on `host`.
    pub async fn by_way_of(host: &Host, kubeconfig: &str) -> Result<Self, ReadyError> {
        let connection = match &host.machine {
            Machine::Remote(connection) => Some(connection),
            Machine::Local => None,
        };
        Self::connect(&host.name, connection, kubeconfig, None).await
    }

    /// From a kubeconfig on this machine.
    pub async fn direct(kubeconfig: &str, context: Option<&str>) -> Result<Self, ReadyError> {
        Self::connect("", None, kubeconfig, context).await
    }

    async fn connect(
        host: &str,
        connection: Option<&Arc<Connection>>,
        kubeconfig: &str,
        context: Option<&str>,
    ) -> Result<Self, ReadyError> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let bad = |e: &dyn std::fmt::Display| ReadyError::Kubeconfig(e.to_string());
        let kubeconfig = Kubeconfig::from_yaml(kubeconfig).map_err(|e| bad(&e))?;
        let options =
            KubeConfigOptions { context: context.map(String::from), ..KubeConfigOptions::default() };
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await;
        let mut config = config.map_err(|e| bad(&e))?;
        config.connect_timeout = Some(REQUEST_LIMIT);
        config.read_timeout = Some(REQUEST_LIMIT);
        config.default_retry = false;
        let mut forwarded = None;
        if let Some(connection) = connection {
            let url = &config.cluster_url;
            let (name, port) = (url.host().unwrap_or_default().to_string(), url.port_u16().unwrap_or(6443));
            let target = name.trim_matches(['[', ']']).to_string();
            let led = connection.forward(&target, port).await;
            let led = led.map_err(|source| ReadyError::Forward { host: host.to_string(), source })?;
            let moved = format!("https://127.0.0.1:{}", led.port);
            config.cluster_url = moved.parse().map_err(|e| bad(&e))?;
            // the certificate is for the server's own name, not for the way there
            config.tls_server_name = Some(target);
            forwarded = Some(led);
        }
        let client = kube::Client::try_from(config).map_err(|e| bad(&e))?;
        Ok(Self { client, _forwarded: forwarded })
    }

    /// Every node's name, with why it is not Ready when it is not.
    pub async fn nodes(&self) -> Result<Vec<(String, Result<(), String>)>, kube::Error> {
        let nodes = Api::<Node>::all(self.client.clone());
        let list = nodes.list(&kube::api::ListParams::default()).await?;
        Ok(list.items.iter().map(|n| (n.metadata.name.clone().unwrap_or_default(), is_ready(n))).collect())
    }

    pub async fn node(&self, name: &str) -> Result<Option<Node>, kube::Error> {
        Api::<Node>::all(self.client.clone()).get_opt(name).await
    }
}

/// `Err` says why not.
pub fn is_ready(node: &Node) -> Result<(), String> {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    match conditions.iter().find(|c| c.type_ == "Ready") {
        Some(ready) if ready.status == "True" => Ok(()),
        Some(ready) => Err(ready.message.clone().unwrap_or_else(|| format!("Ready is {}", ready.status))),
        None => Err("it has not told its state yet".to_string()),
    }
}

/// How to look at what is waited for.
pub struct Wait<'a> {
    pub host: &'a Host,
    /// Where the kubeconfig lies there that may read the node.
    pub kubeconfig_path: &'a str,
    pub node: &'a str,
    pub limit: Duration,
    /// Only a later report counts: this one was there before the service was started.
    pub after: Option<jiff::Timestamp>,
    /// Its log is looked at now and then.
    pub service: &'a Service,
    pub tell: &'a (dyn Fn(&str) + Send + Sync),
}

/// Waits until the node says that it is Ready, telling each new reason why it is not.
pub async fn wait(wait: &Wait<'_>) -> Result<(), ReadyError> {
    let start = sampan_world::clock::monotonic();
    let (mut last, mut cluster): (String, Option<Cluster>) = (String::new(), None);
    let mut looked = start;
    loop {
        let seen = look(wait, &mut cluster).await;
        let why = match seen {
            Ok(()) => return Ok(()),
            Err(why) => why,
        };
        if why != last {
            (wait.tell)(&why);
            last = why;
        }
        if start.elapsed() > wait.limit {
            let (host, node) = (wait.host.name.clone(), wait.node.to_string());
            let log = shown(&install::log(wait.host, wait.service).await);
            return Err(ReadyError::NotReady { host, node, seconds: wait.limit.as_secs(), last, log });
        }
        if looked.elapsed() > Duration::from_secs(4) {
            looked = sampan_world::clock::monotonic();
            let lines = install::log(wait.host, wait.service).await;
            if let Some(end) = lines.iter().rev().find(|l| is_final(l)) {
                let (host, last) = (wait.host.name.clone(), end.trim().to_string());
                return Err(ReadyError::Ends { host, last, log: shown(&lines) });
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// A word in the log after which waiting is in vain.
fn is_final(line: &str) -> bool {
    line.contains("refused to let node")
        || line.contains("is not the server that the token was made for")
        || line.starts_with("error: ")
}

fn shown(lines: &[String]) -> String {
    let from = lines.len().saturating_sub(8);
    lines[from..].iter().map(|l| format!("\n  | {l}")).collect()
}

async fn look(wait: &Wait<'_>, cluster: &mut Option<Cluster>) -> Result<(), String> {
    if cluster.is_none() {
        let text = wait.host.root("reading the kubeconfig", READ, &[wait.kubeconfig_path]).await;
        let text = text.map_err(|e| e.to_string())?;
        if text.trim().is_empty() {
            return Err("starting".to_string());
        }
        *cluster = Some(Cluster::by_way_of(wait.host, &text).await.map_err(|e| e.to_string())?);
    }
    let Some(known) = cluster.as_ref() else { return Err("starting".to_string()) };
    match tokio::time::timeout(REQUEST_LIMIT, known.node(wait.node)).await {
        Ok(Ok(Some(node))) => is_ready(&node).and_then(|()| is_fresh(&node, wait.after)),
        Ok(Ok(None)) => Err("the node has not registered yet".to_string()),
        Ok(Err(error)) => {
            // the file may be of an earlier cluster
            *cluster = None;
            Err(short(&error))
        }
        Err(_) => Err("the API does not answer yet".to_string()),
    }
}

fn heard(node: &Node) -> Option<jiff::Timestamp> {
    let conditions = node.status.as_ref()?.conditions.as_deref()?;
    conditions.iter().find(|c| c.type_ == "Ready")?.last_heartbeat_time.as_ref().map(|time| time.0)
}

fn is_fresh(node: &Node, after: Option<jiff::Timestamp>) -> Result<(), String> {
    match (after, heard(node)) {
        (Some(after), Some(heard)) if heard <= after => Err("starting".to_string()),
        _ => Ok(()),
    }
}

/// When the node was last heard of, if it is a member already and the API answers.
pub async fn last_heard(host: &Host, kubeconfig_path: &str, node: &str) -> Option<jiff::Timestamp> {
    let text = host.root("reading the kubeconfig", READ, &[kubeconfig_path]).await.ok()?;
    let cluster = Cluster::by_way_of(host, &text).await.ok()?;
    let found = tokio::time::timeout(REQUEST_LIMIT, cluster.node(node)).await.ok()?.ok()??;
    heard(&found)
}

fn short(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("the API says: {}", status.message),
        _ => "the API does not answer yet".to_string(),
    }
}
