//! Makes sure of a container's image, as its pull policy says.
//!
//! Upstream counterparts: pkg/kubelet/images/image_manager.go, pkg/credentialprovider. Events and messages are upstream's.
use base64::Engine;
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use kube::ResourceExt;
use sampan_drivers::runtime::{Auth, Image, ImageError, RuntimeError};
use sampan_world::clock;
use serde_json::Value;

use crate::node_services::NodeServices;
use crate::recorder::{Kind, NORMAL, WARNING, container_reference};

/// Why a container waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub reason: String,
    pub message: String,
}

impl Waiting {
    pub fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_string(), message: message.into() }
    }
}

/// The image, pulled where the policy wants that.
pub async fn ensure(
    node: &NodeServices,
    pod: &Pod,
    kind: Kind,
    container: &Container,
) -> Result<Image, Waiting> {
    let name = container.image.as_deref().unwrap_or_default();
    let record = |event, reason: &str, message: String| {
        node.recorder.record(container_reference(pod, kind, &container.name), event, reason, message);
    };
    let policy = container.image_pull_policy.as_deref().unwrap_or("IfNotPresent");
    let present = match node.runtime.image_status(name).await {
        Ok(present) => present,
        Err(RuntimeError::Image { source: ImageError::InvalidName(error), .. }) => {
            let message = format!(
                "Failed to apply default image tag {name:?}: couldn't parse image name {name:?}: {error}"
            );
            record(WARNING, "InspectFailed", message.clone());
            record(WARNING, "Failed", "Error: InvalidImageName".to_string());
            return Err(Waiting::new("InvalidImageName", message));
        }
        Err(error) => {
            let message = format!("Failed to inspect image {name:?}: {error}");
            record(WARNING, "InspectFailed", message.clone());
            return Err(Waiting::new("ImageInspectError", message));
        }
    };
    match (present, policy) {
        (Some(image), "IfNotPresent" | "Never") => {
            let message =
                format!("Container image {name:?} already present on machine and can be accessed by the pod");
            record(NORMAL, "Pulled", message);
            return Ok(image);
        }
        (None, "Never") => {
            let message = format!("Container image {name:?} is not present with pull policy of Never");
            record(WARNING, "ErrImageNeverPull", message.clone());
            record(WARNING, "Failed", "Error: ErrImageNeverPull".to_string());
            return Err(Waiting::new("ErrImageNeverPull", message));
        }
        _ => {}
    }
    record(NORMAL, "Pulling", format!("Pulling image {name:?}"));
    let asked = clock::monotonic();
    let auth = credentials(node, pod, name).await;
    let permit = node.pulls.acquire().await;
    let began = clock::monotonic();
    let pulled = node.runtime.pull_image(name, &auth).await;
    drop(permit);
    let error = match pulled {
        Ok(_) => match node.runtime.image_status(name).await {
            Ok(Some(image)) => {
                let (took, all) = (began.elapsed(), asked.elapsed());
                let message = format!(
                    "Successfully pulled image {name:?} in {} ({} including waiting). Image size: {} bytes.",
                    go_duration(took),
                    go_duration(all),
                    image.size_bytes
                );
                record(NORMAL, "Pulled", message);
                return Ok(image);
            }
            Ok(None) => "the image is gone again right after it was pulled".to_string(),
            Err(error) => error.to_string(),
        },
        Err(error) => error.to_string(),
    };
    record(WARNING, "Failed", format!("Failed to pull image {name:?}: {error}"));
    record(WARNING, "Failed", "Error: ErrImagePull".to_string());
    Err(Waiting::new("ErrImagePull", error))
}

/// A duration as Go prints it, to milliseconds.
pub fn go_duration(duration: std::time::Duration) -> String {
    let ms = duration.as_millis();
    match (ms / 60_000, ms % 60_000) {
        (0, ms) if ms < 1000 => format!("{ms}ms"),
        (0, ms) => format!("{}s", trim(ms)),
        (minutes, ms) if minutes < 60 => format!("{minutes}m{}s", trim(ms)),
        (minutes, ms) => format!("{}h{}m{}s", minutes / 60, minutes % 60, trim(ms)),
    }
}

fn trim(ms: u128) -> String {
    let text = format!("{}.{:03}", ms / 1000, ms % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

async fn credentials(node: &NodeServices, pod: &Pod, image: &str) -> Vec<Auth> {
    let names = pod.spec.iter().flat_map(|s| s.image_pull_secrets.iter().flatten());
    let mut found = Vec::new();
    for name in names.map(|r| r.name.as_str()).filter(|n| !n.is_empty()) {
        match node.volumes.objects.secret(&pod.namespace().unwrap_or_default(), name).await {
            Ok(secret) => found.extend(from_secret(&secret, image)),
            Err(error) => node.recorder.pod(
                pod,
                WARNING,
                "FailedToRetrieveImagePullSecret",
                format!("Unable to retrieve some image pull secrets ({name}); attempting to pull the image may not succeed: {error}"),
            ),
        }
    }
    // the most specific first
    found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    found.into_iter().map(|(_, auth)| auth).collect()
}

/// The credentials of a secret that fit an image, with how much of its name they fit.
pub fn from_secret(secret: &Secret, image: &str) -> Vec<(usize, Auth)> {
    let data = secret.data.iter().flatten();
    let mut found = Vec::new();
    for (key, bytes) in data {
        let Ok(value) = serde_json::from_slice::<Value>(&bytes.0) else { continue };
        let auths = match key.as_str() {
            ".dockerconfigjson" => value.get("auths").cloned().unwrap_or_default(),
            ".dockercfg" => value,
            _ => continue,
        };
        for (registry, entry) in auths.as_object().into_iter().flatten() {
            if let Some(length) = fits(registry, image) {
                found.push((length, auth(entry)));
            }
        }
    }
    found
}

fn auth(entry: &Value) -> Auth {
    let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
    let mut auth = Auth {
        username: text("username"),
        password: text("password"),
        identity_token: text("identitytoken"),
        registry_token: text("registrytoken"),
    };
    let encoded = text("auth");
    let decoded = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).ok();
    if auth.username.is_empty()
        && let Some(decoded) = decoded.and_then(|d| String::from_utf8(d).ok())
        && let Some((username, password)) = decoded.split_once(':')
    {
        auth.username = username.to_string();
        auth.password = password.to_string();
    }
    auth
}

/// How long the part of the image's name is that a registry entry names; `None` where it is another's.
fn fits(registry: &str, image: &str) -> Option<usize> {
    let full = full_name(image);
    let entry = registry.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let entry = entry.strip_suffix("/v1").or(entry.strip_suffix("/v2")).unwrap_or(entry);
    let entry = if entry == "docker.io" { "index.docker.io" } else { entry };
    let (entry_host, entry_path) = entry.split_once('/').unwrap_or((entry, ""));
    let (host, path) = full.split_once('/')?;
    let (entry_parts, parts): (Vec<&str>, Vec<&str>) =
        (entry_host.split('.').collect(), host.split('.').collect());
    let same_host = entry_parts.len() == parts.len()
        && entry_parts.iter().zip(&parts).all(|(e, p)| *e == "*" || e == p || glob(e, p));
    (same_host && path.starts_with(entry_path)).then_some(entry.len())
}

fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        Some((before, after)) => {
            text.len() >= before.len() + after.len() && text.starts_with(before) && text.ends_with(after)
        }
        None => false,
    }
}

fn full_name(image: &str) -> String {
    match image.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => {
            let host = if host == "docker.io" { "index.docker.io" } else { host };
            format!("{host}/{rest}")
        }
        Some(_) => format!("index.docker.io/{image}"),
        None => format!("index.docker.io/library/{image}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn registries_fit_images() {
        let cases = [
            ("https://index.docker.io/v1/", "nginx", true),
            ("docker.io", "library/nginx:1", true),
            ("ghcr.io", "ghcr.io/a/b:1", true),
            ("ghcr.io/a", "ghcr.io/a/b", true),
            ("ghcr.io/x", "ghcr.io/a/b", false),
            ("*.example.com", "r.example.com/a", true),
            ("*.example.com", "example.com/a", false),
            ("r.example.com:5000", "r.example.com:5000/a", true),
            ("ghcr.io", "nginx", false),
        ];
        for (registry, image, want) in cases {
            assert_eq!(fits(registry, image).is_some(), want, "{registry} {image}");
        }
    }

    #[test]
    fn secrets_hold_credentials() {
        let config =
            serde_json::json!({"auths": {"ghcr.io": {"auth": "dTpwOjE="}, "other.io": {"username": "x"}}});
        let secret: Secret = serde_json::from_value(serde_json::json!({"data": {".dockerconfigjson":
            base64::engine::general_purpose::STANDARD.encode(config.to_string())}}))
        .unwrap();
        let found = from_secret(&secret, "ghcr.io/a/b");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].1.username.as_str(), found[0].1.password.as_str()), ("u", "p:1"));
    }

    #[test]
    fn durations_read_as_gos() {
        for (ms, want) in [(5, "5ms"), (1500, "1.5s"), (60_000, "1m0s"), (3_723_004, "1h2m3.004s")] {
            assert_eq!(go_duration(Duration::from_millis(ms)), want);
        }
    }
}
