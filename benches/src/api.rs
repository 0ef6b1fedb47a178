//! Throughput of an API server: creates, list bytes and watch events a second.
//!
//! Plain HTTP through kube-rs, raw bodies: what is measured is the server more than the client's decoding.
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use http::Request;
use http_body_util::BodyExt;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

#[derive(Clone, clap::Args)]
pub struct Load {
    /// ConfigMaps to create
    #[arg(long, default_value_t = 2000)]
    pub objects: usize,
    /// Requests at a time
    #[arg(long, default_value_t = 16)]
    pub concurrency: usize,
    /// Seconds of listing
    #[arg(long, default_value_t = 4)]
    pub list_seconds: u64,
    /// Watches at a time
    #[arg(long, default_value_t = 50)]
    pub watchers: usize,
    /// Updates that every watch is told of
    #[arg(long, default_value_t = 400)]
    pub updates: usize,
}

pub struct Throughput {
    pub create_per_s: f64,
    pub list_bytes_per_s: f64,
    pub watch_events_per_s: f64,
}

const NAMESPACE: &str = "sampan-bench";
/// No phase takes longer.
const LIMIT: Duration = Duration::from_secs(60);
/// What an object of the load carries.
const PAYLOAD_BYTES: usize = 700;

pub fn run(kubeconfig: &Path, load: &Load) -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let found = runtime.block_on(async {
        let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        measure(kube::Client::try_from(config)?, load).await
    })?;
    println!("create            {:>10.0} a second", found.create_per_s);
    println!("list              {:>10.1} MB a second", found.list_bytes_per_s / 1e6);
    println!("watch events      {:>10.0} a second", found.watch_events_per_s);
    Ok(())
}

pub async fn measure(client: kube::Client, load: &Load) -> Result<Throughput> {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    send(&client, "POST", "/api/v1/namespaces", Some(&namespace)).await.context("making a namespace")?;
    let found = phases(&client, load).await;
    let gone = send(&client, "DELETE", &format!("/api/v1/namespaces/{NAMESPACE}"), None).await;
    let found = found?;
    gone.context("removing the namespace")?;
    Ok(found)
}

async fn phases(client: &kube::Client, load: &Load) -> Result<Throughput> {
    let create_per_s = bounded("creating", creates(client, load)).await?;
    let list_bytes_per_s = bounded("listing", lists(client, load)).await?;
    let watch_events_per_s = bounded("watching", watches(client, load)).await?;
    Ok(Throughput { create_per_s, list_bytes_per_s, watch_events_per_s })
}

async fn bounded<T>(what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(LIMIT, work).await {
        Ok(result) => result.context(what.to_string()),
        Err(_) => bail!("{what} took longer than {} s", LIMIT.as_secs()),
    }
}

fn collection() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/configmaps")
}

fn object(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"bench": "load"}},
        "data": {"payload": "x".repeat(PAYLOAD_BYTES), "value": value}})
}

async fn response(
    client: &kube::Client,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<http::Response<Body>> {
    let bytes = body.map(|b| b.to_string().into_bytes()).unwrap_or_default();
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    let response = client.send(request.body(Body::from(bytes))?).await?;
    if !response.status().is_success() {
        let status = response.status();
        let body = response.into_body().collect_bytes().await.unwrap_or_default();
        bail!("{method} {path}: {status} {}", String::from_utf8_lossy(&body[..body.len().min(300)]));
    }
    Ok(response)
}

async fn send(client: &kube::Client, method: &str, path: &str, body: Option<&Value>) -> Result<usize> {
    let response = response(client, method, path, body).await?;
    Ok(response.into_body().collect_bytes().await?.len())
}

async fn creates(client: &kube::Client, load: &Load) -> Result<f64> {
    let start = sampan_world::clock::monotonic();
    let path = collection();
    let one = |number: usize| {
        let path = path.clone();
        async move { send(client, "POST", &path, Some(&object(&format!("c{number}"), "0"))).await }
    };
    let mut all = futures::stream::iter(0..load.objects).map(one).buffer_unordered(load.concurrency.max(1));
    while let Some(made) = all.next().await {
        made?;
    }
    Ok(load.objects as f64 / start.elapsed().as_secs_f64())
}

async fn lists(client: &kube::Client, load: &Load) -> Result<f64> {
    let start = sampan_world::clock::monotonic();
    let until = Duration::from_secs(load.list_seconds);
    // two at a time, as two controllers that start
    let lister = || async {
        let mut bytes = 0;
        while start.elapsed() < until {
            bytes += send(client, "GET", &collection(), None).await?;
        }
        Ok::<usize, anyhow::Error>(bytes)
    };
    let (first, second) = tokio::try_join!(lister(), lister())?;
    Ok((first + second) as f64 / start.elapsed().as_secs_f64())
}

async fn watches(client: &kube::Client, load: &Load) -> Result<f64> {
    let list = response(client, "GET", &format!("{}?limit=1", collection()), None).await?;
    let list: Value = serde_json::from_slice(&list.into_body().collect_bytes().await?)?;
    let from = list["metadata"]["resourceVersion"].as_str().context("a list has a version")?.to_string();
    let seen = Arc::new(AtomicUsize::new(0));
    let mut watchers = Vec::new();
    for _ in 0..load.watchers {
        let path = format!("{}?watch=true&resourceVersion={from}&timeoutSeconds=60", collection());
        let mut body = response(client, "GET", &path, None).await?.into_body();
        let (seen, want) = (seen.clone(), load.updates);
        watchers.push(tokio::spawn(async move {
            let mut count = 0;
            while count < want {
                let Some(Ok(frame)) = body.frame().await else { break };
                // an event is a line
                let lines = frame.data_ref().map_or(0, |d| d.iter().filter(|b| **b == b'\n').count());
                count += lines;
                seen.fetch_add(lines, Ordering::Relaxed);
            }
            count
        }));
    }
    let start = sampan_world::clock::monotonic();
    let names = load.objects.max(1);
    let update = |number: usize| async move {
        let name = format!("c{}", number % names);
        send(client, "PUT", &format!("{}/{name}", collection()), Some(&object(&name, &number.to_string())))
            .await
    };
    let mut all =
        futures::stream::iter(1..=load.updates).map(update).buffer_unordered(load.concurrency.max(1));
    while let Some(made) = all.next().await {
        made?;
    }
    for watcher in watchers {
        let count = watcher.await?;
        if count < load.updates {
            bail!("a watch was told {count} of {} changes", load.updates);
        }
    }
    Ok(seen.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64())
}
