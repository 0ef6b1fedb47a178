//! From a pod's creation to its being Running, as a watch tells it.
use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, PostParams, WatchEvent, WatchParams};
use sampan_tests::image::BOX;
use serde_json::json;

/// One pod, or one burst, takes no longer.
const LIMIT: Duration = Duration::from_secs(60);

pub struct Pods {
    api: Api<Pod>,
    node: String,
}

impl Pods {
    pub fn new(client: kube::Client, node: &str) -> Self {
        Self { api: Api::namespaced(client, "default"), node: node.to_string() }
    }

    fn pod(&self, name: &str) -> Result<Pod> {
        Ok(serde_json::from_value(
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
            "nodeSelector": {"kubernetes.io/hostname": self.node}, "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": BOX, "command": ["sleep", "100000"]}]}}),
        )?)
    }

    /// Milliseconds from the create request to the news that all of them run.
    async fn start(&self, names: &[String]) -> Result<f64> {
        let params = WatchParams::default().timeout(60);
        let list = self.api.list(&kube::api::ListParams::default().limit(1)).await?;
        let from = list.metadata.resource_version.context("a list has a version")?;
        let events = self.api.watch(&params, &from).await?;
        let start = sampan_world::clock::monotonic();
        let create = async {
            let pods = names.iter().map(|n| self.pod(n)).collect::<Result<Vec<_>>>()?;
            let (params, api) = (PostParams::default(), &self.api);
            let all = pods.iter().map(|pod| api.create(&params, pod));
            futures::future::try_join_all(all).await?;
            Ok::<(), anyhow::Error>(())
        };
        let seen = wait_running(events.boxed(), names);
        match tokio::time::timeout(LIMIT, async { tokio::try_join!(create, seen) }).await {
            Ok(done) => done?,
            Err(_) => bail!("{} pods are not Running after {} s", names.len(), LIMIT.as_secs()),
        };
        Ok(start.elapsed().as_secs_f64() * 1000.0)
    }

    pub async fn end(&self, names: &[String]) -> Result<()> {
        let params = DeleteParams::default().grace_period(0);
        for name in names {
            self.api.delete(name, &params).await?;
        }
        Ok(())
    }

    /// The median of `count` pods, one after the other.
    pub async fn one_at_a_time(&self, count: usize) -> Result<f64> {
        let mut times = Vec::new();
        for number in 0..count {
            let name = [format!("single-{number}")];
            times.push(self.start(&name).await?);
            self.end(&name).await?;
            // the next one must not wait for this one's end
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().context("at least one pod")
    }

    /// All at once; they stay.
    pub async fn burst(&self, count: usize) -> Result<(f64, Vec<String>)> {
        let names: Vec<String> = (0..count).map(|n| format!("burst-{n}")).collect();
        Ok((self.start(&names).await?, names))
    }
}

async fn wait_running(
    mut events: impl Stream<Item = kube::Result<WatchEvent<Pod>>> + Unpin,
    names: &[String],
) -> Result<()> {
    let mut left: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    while !left.is_empty() {
        let event = events.next().await.context("the watch ended")??;
        if let WatchEvent::Added(pod) | WatchEvent::Modified(pod) = event {
            let runs = pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running");
            if let (true, Some(name)) = (runs, &pod.metadata.name) {
                left.remove(name.as_str());
            }
        }
    }
    Ok(())
}
