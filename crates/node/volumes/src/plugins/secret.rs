//! secret: the keys of a Secret as files in memory. Upstream counterpart: pkg/volume/secret.
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{KeyToPath, Volume};

use super::Plugin;
use crate::atomic_writer::Payload;
use crate::plugins::config_map::select;
use crate::plugins::projected::{self, Collected};
use crate::{FetchError, Mounted, SetUp, VolumeError};

pub static PLUGIN: SecretVolume = SecretVolume;

pub struct SecretVolume;

#[async_trait]
impl Plugin for SecretVolume {
    fn name(&self) -> &'static str {
        "secret"
    }

    fn supports(&self, volume: &Volume) -> bool {
        volume.secret.is_some()
    }

    async fn set_up(&self, set_up: &SetUp<'_>) -> Result<Mounted, VolumeError> {
        let source = set_up.volume.secret.clone().unwrap_or_default();
        let (name, is_optional) = (source.secret_name.unwrap_or_default(), source.optional.unwrap_or(false));
        let mode = source.default_mode.unwrap_or(0o644);
        let payload = collect(set_up, &name, source.items.as_deref(), mode, is_optional).await?;
        projected::publish(set_up, &Collected { payload, refresh_after: None }, true).await
    }
}

/// The files that a Secret makes; none where it is optional and missing.
pub async fn collect(
    set_up: &SetUp<'_>,
    name: &str,
    items: Option<&[KeyToPath]>,
    default_mode: i32,
    is_optional: bool,
) -> Result<Payload, VolumeError> {
    let object = match set_up.host.objects.secret(set_up.namespace(), name).await {
        Ok(object) => object,
        Err(FetchError::NotFound { .. }) if is_optional => return Ok(Payload::new()),
        Err(error) => return Err(error.into()),
    };
    let all = object.data.iter().flatten().map(|(k, v)| (k.as_str(), v.0.as_slice())).collect();
    select("secret", &all, items, default_mode, is_optional)
}
