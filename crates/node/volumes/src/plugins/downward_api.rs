//! downwardAPI: fields of the pod as files, written again when labels or annotations change.
//!
//! Upstream counterpart: pkg/volume/downwardapi.
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, Volume};

use super::Plugin;
use crate::atomic_writer::{File, Payload};
use crate::plugins::projected::{self, Collected};
use crate::{Mounted, SetUp, VolumeError, field_path};

pub static PLUGIN: DownwardApi = DownwardApi;

pub struct DownwardApi;

#[async_trait]
impl Plugin for DownwardApi {
    fn name(&self) -> &'static str {
        "downwardAPI"
    }

    fn supports(&self, volume: &Volume) -> bool {
        volume.downward_api.is_some()
    }

    async fn set_up(&self, set_up: &SetUp<'_>) -> Result<Mounted, VolumeError> {
        let source = set_up.volume.downward_api.clone().unwrap_or_default();
        let mode = source.default_mode.unwrap_or(0o644);
        let payload = collect(set_up, source.items.as_deref().unwrap_or_default(), mode)?;
        projected::publish(set_up, &Collected { payload, refresh_after: None }, true).await
    }
}

/// One file an item.
pub fn collect(
    set_up: &SetUp<'_>,
    items: &[DownwardAPIVolumeFile],
    default_mode: i32,
) -> Result<Payload, VolumeError> {
    let mut payload = Payload::new();
    for item in items {
        let text = if let Some(field) = &item.field_ref {
            field_path::metadata(set_up.pod, &field.field_path)
                .ok_or_else(|| VolumeError::Invalid(format!("unsupported fieldPath: {}", field.field_path)))?
        } else if let Some(selector) = &item.resource_field_ref {
            let name = selector.container_name.as_deref().unwrap_or_default();
            let spec = set_up.pod.spec.as_ref();
            let containers =
                spec.into_iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
            let container = containers
                .into_iter()
                .find(|c| c.name == name)
                .ok_or_else(|| VolumeError::Invalid(format!("container {name} not found")))?;
            let allocatable = set_up.host.allocatable.read();
            field_path::resource(set_up.pod, container, selector, &allocatable)
                .map_err(VolumeError::Invalid)?
        } else {
            return Err(VolumeError::Invalid(format!(
                "{}: fieldRef or resourceFieldRef is needed",
                item.path
            )));
        };
        let mode = item.mode.unwrap_or(default_mode) as u32;
        payload.insert(item.path.clone(), File { content: text.into_bytes(), mode, owner: None });
    }
    Ok(payload)
}
