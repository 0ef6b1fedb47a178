//! postStart and preStop. Upstream counterpart: pkg/kubelet/lifecycle/handlers.go.
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, LifecycleHandler};

use crate::node_services::NodeServices;
use crate::probes::http;

const OUTPUT_BYTES: usize = 16 * 1024;

/// Runs a hook within `limit`.
pub async fn run(
    node: &NodeServices,
    container: &Container,
    id: &str,
    ip: Option<IpAddr>,
    handler: &LifecycleHandler,
    limit: Duration,
) -> Result<(), String> {
    if let Some(action) = &handler.exec {
        let command = action.command.clone().unwrap_or_default();
        let result =
            node.runtime.exec_sync(id, &command, limit, OUTPUT_BYTES).await.map_err(|e| e.to_string())?;
        return match result {
            (_, _, 0) => Ok(()),
            (out, err, code) => Err(format!(
                "Exec lifecycle hook ({command:?}) for Container {:?} failed - error: command exited with {code}, message: {:?}",
                container.name,
                String::from_utf8_lossy(&[out, err].concat())
            )),
        };
    }
    if let Some(action) = &handler.http_get {
        let request = http::Request::new(action, container, ip, "kube-lifecycle/1.36")?;
        let done = match http::get(&request, limit).await {
            // upstream: a server that speaks plain HTTP where HTTPS was asked for is asked again so
            Err(error) if request.is_https && error.contains("corrupt message") => {
                http::get(&http::Request { is_https: false, ..request }, limit).await
            }
            other => other,
        };
        return match done {
            Ok((200..=399, _)) => Ok(()),
            Ok((status, _)) => Err(format!("HTTP hook failed with statuscode: {status}")),
            Err(error) => Err(error),
        };
    }
    if let Some(action) = &handler.sleep {
        let asked = Duration::from_secs(u64::try_from(action.seconds).unwrap_or(0));
        tokio::time::sleep(asked.min(limit)).await;
        return if asked <= limit {
            Ok(())
        } else {
            Err("container terminated before sleep hook finished".to_string())
        };
    }
    Err("Invalid handler: only exec, httpGet and sleep are hooks".to_string())
}
