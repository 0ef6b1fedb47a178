//! The volume plugins. Adding one is a file here and a line in the list.
//!
//! Upstream counterpart: pkg/volume/plugins.go. The first plugin that supports a volume gets it.
use async_trait::async_trait;
use k8s_openapi::api::core::v1::Volume;

use crate::{Mounted, SetUp, VolumeError};

/// One type of volume.
#[async_trait]
pub trait Plugin: Send + Sync {
    /// The name of its field in `spec.volumes[]`.
    fn name(&self) -> &'static str;
    fn supports(&self, volume: &Volume) -> bool;
    /// Makes the volume what the pod says; safe to repeat.
    async fn set_up(&self, set_up: &SetUp<'_>) -> Result<Mounted, VolumeError>;
}

macro_rules! registry {
    ($($module:ident),* $(,)?) => {
        $(pub mod $module;)*
        /// All plugins, in order of asking.
        pub static PLUGINS: &[&dyn Plugin] = &[$(&$module::PLUGIN),*];
    };
}

registry![empty_dir, host_path, config_map, secret, downward_api, projected];

/// The plugin for `volume`, or what its type is called.
pub fn find(volume: &Volume) -> Result<&'static dyn Plugin, VolumeError> {
    PLUGINS.iter().find(|p| p.supports(volume)).copied().ok_or_else(|| {
        let kind = serde_json::to_value(volume)
            .ok()
            .and_then(|v| v.as_object().and_then(|o| o.keys().find(|k| *k != "name").cloned()));
        VolumeError::Unsupported { kind: kind.unwrap_or_else(|| "unknown".to_string()) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_volume_has_its_plugin() {
        let cases = [
            (serde_json::json!({"name": "v", "emptyDir": {}}), Ok("emptyDir")),
            (serde_json::json!({"name": "v", "hostPath": {"path": "/"}}), Ok("hostPath")),
            (serde_json::json!({"name": "v", "configMap": {"name": "a"}}), Ok("configMap")),
            (serde_json::json!({"name": "v", "secret": {"secretName": "a"}}), Ok("secret")),
            (serde_json::json!({"name": "v", "downwardAPI": {}}), Ok("downwardAPI")),
            (serde_json::json!({"name": "v", "projected": {}}), Ok("projected")),
            (
                serde_json::json!({"name": "v", "persistentVolumeClaim": {"claimName": "a"}}),
                Err("volumes of type persistentVolumeClaim are not supported by this node yet"),
            ),
        ];
        let mut names: Vec<&str> = PLUGINS.iter().map(|p| p.name()).collect();
        names.dedup();
        assert_eq!(names.len(), PLUGINS.len());
        for (volume, want) in cases {
            let volume: Volume = serde_json::from_value(volume).unwrap();
            match (find(&volume), want) {
                (Ok(plugin), Ok(name)) => assert_eq!(plugin.name(), name),
                (Err(error), Err(text)) => assert_eq!(error.to_string(), text),
                (got, want) => panic!("{:?} {want:?}", got.map(|p| p.name())),
            }
        }
    }
}
