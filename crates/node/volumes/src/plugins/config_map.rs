//! configMap: the keys of a ConfigMap as files. Upstream counterpart: pkg/volume/configmap.
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ConfigMap, KeyToPath, Volume};

use super::Plugin;
use crate::atomic_writer::{File, Payload};
use crate::plugins::projected::{self, Collected};
use crate::{FetchError, Mounted, SetUp, VolumeError};

pub static PLUGIN: ConfigMapVolume = ConfigMapVolume;

pub struct ConfigMapVolume;

#[async_trait]
impl Plugin for ConfigMapVolume {
    fn name(&self) -> &'static str {
        "configMap"
    }

    fn supports(&self, volume: &Volume) -> bool {
        volume.config_map.is_some()
    }

    async fn set_up(&self, set_up: &SetUp<'_>) -> Result<Mounted, VolumeError> {
        let source = set_up.volume.config_map.clone().unwrap_or_default();
        let is_optional = source.optional.unwrap_or(false);
        let mode = source.default_mode.unwrap_or(0o644);
        let payload = collect(set_up, &source.name, source.items.as_deref(), mode, is_optional).await?;
        projected::publish(set_up, &Collected { payload, refresh_after: None }, false).await
    }
}

/// The files that a ConfigMap makes; none where it is optional and missing.
pub async fn collect(
    set_up: &SetUp<'_>,
    name: &str,
    items: Option<&[KeyToPath]>,
    default_mode: i32,
    is_optional: bool,
) -> Result<Payload, VolumeError> {
    let object = match set_up.host.objects.config_map(set_up.namespace(), name).await {
        Ok(object) => object,
        Err(FetchError::NotFound { .. }) if is_optional => return Ok(Payload::new()),
        Err(error) => return Err(error.into()),
    };
    payload(&object, items, default_mode, is_optional)
}

fn payload(
    object: &ConfigMap,
    items: Option<&[KeyToPath]>,
    default_mode: i32,
    is_optional: bool,
) -> Result<Payload, VolumeError> {
    let text = object.data.iter().flatten().map(|(k, v)| (k.as_str(), v.as_bytes()));
    let binary = object.binary_data.iter().flatten().map(|(k, v)| (k.as_str(), v.0.as_slice()));
    let all: std::collections::BTreeMap<&str, &[u8]> = text.chain(binary).collect();
    select("config", &all, items, default_mode, is_optional)
}

/// All keys as files, or the ones of `items` at their paths.
pub(crate) fn select(
    kind: &'static str,
    all: &std::collections::BTreeMap<&str, &[u8]>,
    items: Option<&[KeyToPath]>,
    default_mode: i32,
    is_optional: bool,
) -> Result<Payload, VolumeError> {
    let file = |content: &[u8], mode: i32| File { content: content.to_vec(), mode: mode as u32, owner: None };
    let Some(items) = items.filter(|i| !i.is_empty()) else {
        return Ok(all.iter().map(|(k, v)| ((*k).to_string(), file(v, default_mode))).collect());
    };
    let mut payload = Payload::new();
    for item in items {
        match all.get(item.key.as_str()) {
            Some(content) => {
                payload.insert(item.path.clone(), file(content, item.mode.unwrap_or(default_mode)));
            }
            None if is_optional => {}
            None => return Err(VolumeError::MissingKey { kind, key: item.key.clone() }),
        }
    }
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_items_and_modes() {
        let object: ConfigMap =
            serde_json::from_value(serde_json::json!({"data": {"a": "1"}, "binaryData": {"b": "/w=="}}))
                .unwrap();
        let all = payload(&object, None, 0o644, false).unwrap();
        assert_eq!((all["a"].mode, all["b"].content.as_slice()), (0o644, [0xff].as_slice()));
        let item = |key: &str| vec![KeyToPath { key: key.into(), path: "p/q".into(), mode: Some(0o400) }];
        let some = payload(&object, Some(&item("a")), 0o644, false).unwrap();
        assert_eq!(some.keys().collect::<Vec<_>>(), ["p/q"]);
        assert_eq!(some["p/q"].mode, 0o400);
        let error = payload(&object, Some(&item("x")), 0o644, false).unwrap_err();
        assert_eq!(error.to_string(), "references non-existent config key: x");
        assert!(payload(&object, Some(&item("x")), 0o644, true).unwrap().is_empty());
    }
}
