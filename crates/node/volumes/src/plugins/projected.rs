//! projected: several sources in one folder. Upstream counterpart: pkg/volume/projected.
//!
//! clusterTrustBundle and podCertificate sources are refused with a clear error.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Pod, ServiceAccountTokenProjection, Volume, VolumeProjection};

use super::{Plugin, config_map, downward_api, secret};
use crate::atomic_writer::{self, File, Payload};
use crate::{Mounted, SetUp, VolumeError, mounts, ownership};

pub static PLUGIN: Projected = Projected;

pub struct Projected;

/// What is to be written, and when to look again.
pub struct Collected {
    pub payload: Payload,
    pub refresh_after: Option<Duration>,
}

#[async_trait]
impl Plugin for Projected {
    fn name(&self) -> &'static str {
        "projected"
    }

    fn supports(&self, volume: &Volume) -> bool {
        volume.projected.is_some()
    }

    async fn set_up(&self, set_up: &SetUp<'_>) -> Result<Mounted, VolumeError> {
        let source = set_up.volume.projected.clone().unwrap_or_default();
        let mode = source.default_mode.unwrap_or(0o644);
        let mut all = Collected { payload: Payload::new(), refresh_after: None };
        for part in source.sources.iter().flatten() {
            let part = collect(set_up, part, mode).await?;
            all.payload.extend(part.payload);
            all.refresh_after = [all.refresh_after, part.refresh_after].into_iter().flatten().min();
        }
        publish(set_up, &all, true).await
    }
}

async fn collect(set_up: &SetUp<'_>, source: &VolumeProjection, mode: i32) -> Result<Collected, VolumeError> {
    let payload = if let Some(s) = &source.config_map {
        config_map::collect(set_up, &s.name, s.items.as_deref(), mode, s.optional.unwrap_or(false)).await?
    } else if let Some(s) = &source.secret {
        secret::collect(set_up, &s.name, s.items.as_deref(), mode, s.optional.unwrap_or(false)).await?
    } else if let Some(s) = &source.downward_api {
        downward_api::collect(set_up, s.items.as_deref().unwrap_or_default(), mode)?
    } else if let Some(s) = &source.service_account_token {
        return token(set_up, s, mode).await;
    } else if source.cluster_trust_bundle.is_some() {
        return Err(VolumeError::Unsupported { kind: "projected.clusterTrustBundle".to_string() });
    } else if source.pod_certificate.is_some() {
        return Err(VolumeError::Unsupported { kind: "projected.podCertificate".to_string() });
    } else {
        Payload::new()
    };
    Ok(Collected { payload, refresh_after: None })
}

async fn token(
    set_up: &SetUp<'_>,
    source: &ServiceAccountTokenProjection,
    mode: i32,
) -> Result<Collected, VolumeError> {
    let seconds = source.expiration_seconds.unwrap_or(3600);
    let token = set_up.host.objects.token(set_up.pod, source.audience.as_deref(), seconds).await?;
    let owner = one_user(set_up.pod);
    // readable by the one who runs, not by everybody
    let mode = if owner.is_some() || set_up.fs_group().is_some() { 0o600 } else { mode as u32 };
    let file = File { content: token.token.into_bytes(), mode, owner };
    Ok(Collected { payload: [(source.path.clone(), file)].into(), refresh_after: Some(token.refresh_after) })
}

/// The user that all containers of the pod run as, where it is one.
fn one_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|s| s.run_as_user);
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut users = containers.map(|c| c.security_context.as_ref().and_then(|s| s.run_as_user).or(of_pod));
    let first = users.next()??;
    users.all(|u| u == Some(first)).then(|| u32::try_from(first).ok())?
}

/// Writes the files, in memory where `is_secret` and the node may.
pub async fn publish(set_up: &SetUp<'_>, files: &Collected, is_secret: bool) -> Result<Mounted, VolumeError> {
    let dir = &set_up.dir;
    let fail = |what: &str| VolumeError::io(format!("{what} {}", dir.display()));
    if !dir.exists() {
        fs::create_dir_all(dir).map_err(fail("making"))?;
    }
    if is_secret && set_up.host.memory_backed && !mounts::is_mount_point(dir).map_err(fail("looking at"))? {
        mounts::tmpfs(dir, None).map_err(fail("mounting a memory file system at"))?;
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).map_err(fail("setting the mode of"))?;
    let group = set_up.fs_group();
    atomic_writer::write(dir, &files.payload, |set| ownership::set(set, group, true))
        .map_err(fail("writing"))?;
    if group.is_some() && !ownership::is_set(dir, group) {
        ownership::set(dir, group, true).map_err(fail("giving the group"))?;
    }
    Ok(Mounted { host_path: dir.clone(), refresh_after: files.refresh_after })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::{ConfigMap, Secret};
    use parking_lot::{Mutex, RwLock};
    use serde_json::json;

    use crate::{FetchError, PodObjects, Token, VolumeHost};

    #[derive(Default)]
    struct Fake {
        config: Mutex<BTreeMap<String, ConfigMap>>,
    }

    #[async_trait::async_trait]
    impl PodObjects for Fake {
        async fn config_map(&self, _: &str, name: &str) -> Result<Arc<ConfigMap>, FetchError> {
            let found = self.config.lock().get(name).cloned().map(Arc::new);
            found.ok_or(FetchError::NotFound { kind: "configmap", name: name.into() })
        }
        async fn secret(&self, _: &str, name: &str) -> Result<Arc<Secret>, FetchError> {
            Err(FetchError::NotFound { kind: "secret", name: name.into() })
        }
        async fn token(&self, _: &super::Pod, audience: Option<&str>, _: i64) -> Result<Token, FetchError> {
            let token = format!("token for {}", audience.unwrap_or_default());
            Ok(Token { token, refresh_after: std::time::Duration::from_secs(60) })
        }
    }

    #[tokio::test]
    async fn a_pods_volumes_follow_their_objects() {
        let dir = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let host = VolumeHost {
            root: dir.path().into(),
            objects: fake.clone(),
            memory_backed: false,
            allocatable: RwLock::default(),
        };
        let pod: super::Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u1", "labels": {"a": "b"}},
            "spec": {"containers": [], "volumes": [
                {"name": "all", "projected": {"sources": [
                    {"configMap": {"name": "c"}}, {"secret": {"name": "s", "optional": true}},
                    {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
                    {"serviceAccountToken": {"path": "token", "audience": "x"}}]}},
                {"name": "scratch", "emptyDir": {}}]}
        }))
        .unwrap();
        let errors = host.set_up(&pod).await.unwrap_err();
        assert_eq!((errors.len(), errors[0].1.to_string()), (1, "configmap \"c\" not found".to_string()));
        let config = |v: &str| serde_json::from_value::<ConfigMap>(json!({"data": {"key": v}})).unwrap();
        for text in ["one", "two"] {
            fake.config.lock().insert("c".into(), config(text));
            let volumes = host.set_up(&pod).await.unwrap();
            let path = volumes.path("all").unwrap();
            let read = |name: &str| std::fs::read_to_string(path.join(name)).unwrap();
            assert_eq!(
                (read("key"), read("token"), read("labels")),
                (text.into(), "token for x".into(), "a=\"b\"".into())
            );
            assert_eq!(volumes.refresh_after().map(|d| d.as_secs()), Some(60));
            assert!(volumes.path("scratch").unwrap().is_dir());
        }
        assert_eq!(host.pods_on_disk(), ["u1"]);
        host.tear_down("u1").await.unwrap();
        assert!(host.pods_on_disk().is_empty());
        assert!(host.tear_down("../x").await.is_err());
    }
}
