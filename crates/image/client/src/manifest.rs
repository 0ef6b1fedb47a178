//! Indexes, manifests and configurations, as OCI and Docker (schema 2) write them.
//!
//! Upstream counterpart: `opencontainers/image-spec`. Only the fields that are used are read; all input is foreign.
use std::collections::BTreeMap;

use sampan_drivers::runtime::{ImageError, Platform};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::platform;
use crate::reference::is_digest;

pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Manifests, indexes and configurations are held in memory: they stay small.
pub const DOCUMENT_MAX_BYTES: u64 = 4 << 20;
/// overlayfs takes no more lower layers than about this.
pub const LAYERS_MAX: usize = 128;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    #[serde(default)]
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<WirePlatform>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WirePlatform {
    pub architecture: String,
    pub os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl WirePlatform {
    pub fn platform(&self) -> Platform {
        platform::normalise(&Platform {
            os: self.os.clone(),
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
        })
    }

    /// Attestations and the like carry `unknown/unknown`.
    fn is_known(&self) -> bool {
        !self.os.is_empty()
            && self.os != "unknown"
            && !self.architecture.is_empty()
            && self.architecture != "unknown"
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    pub manifests: Vec<Descriptor>,
}

impl Index {
    /// The entries that are images for some platform, with it.
    pub fn images(&self) -> Vec<(Platform, &Descriptor)> {
        let known = |d: &&Descriptor| d.platform.as_ref().is_some_and(WirePlatform::is_known);
        let image = |d: &&Descriptor| !d.annotations.contains_key("vnd.docker.reference.type");
        self.manifests
            .iter()
            .filter(known)
            .filter(image)
            .filter_map(|d| Some((d.platform.as_ref()?.platform(), d)))
            .collect()
    }
}

/// What a manifest URL may lead to.
pub enum Document {
    Index(Index),
    Manifest(Manifest),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageConfig {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub variant: Option<String>,
    #[serde(default)]
    pub config: Option<RunConfig>,
    #[serde(default)]
    pub rootfs: Option<RootFs>,
}

/// What the image says about running it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RunConfig {
    pub user: Option<String>,
    pub env: Option<Vec<String>>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub working_dir: Option<String>,
    pub stop_signal: Option<String>,
    pub labels: Option<BTreeMap<String, String>>,
    pub volumes: Option<BTreeMap<String, serde_json::Value>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    #[serde(default)]
    pub diff_ids: Vec<String>,
}

impl ImageConfig {
    pub fn parse(bytes: &[u8]) -> Result<ImageConfig, ImageError> {
        serde_json::from_slice(bytes).map_err(|e| ImageError::Invalid(format!("image configuration: {e}")))
    }

    pub fn platform(&self) -> Platform {
        platform::normalise(&Platform {
            os: self.os.clone(),
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
        })
    }

    pub fn diff_ids(&self) -> &[String] {
        self.rootfs.as_ref().map_or(&[], |r| &r.diff_ids)
    }
}

/// Reads an index or a manifest; the media type may be missing in old OCI documents.
pub fn parse(media_type: &str, bytes: &[u8]) -> Result<Document, ImageError> {
    let invalid = |e: serde_json::Error| ImageError::Invalid(format!("manifest: {e}"));
    let value: serde_json::Value = serde_json::from_slice(bytes).map_err(invalid)?;
    if value.get("schemaVersion").and_then(serde_json::Value::as_u64) == Some(1) {
        return Err(ImageError::Invalid("Docker image manifest version 2, schema 1 is not supported".into()));
    }
    let own = value.get("mediaType").and_then(serde_json::Value::as_str).unwrap_or("");
    let is_index = [own, media_type].iter().any(|t| *t == OCI_INDEX || *t == DOCKER_LIST);
    if is_index || (value.get("manifests").is_some() && value.get("layers").is_none()) {
        let index: Index = serde_json::from_value(value).map_err(invalid)?;
        check(&index.manifests)?;
        return Ok(Document::Index(index));
    }
    let manifest: Manifest = serde_json::from_value(value).map_err(invalid)?;
    check(&manifest.layers)?;
    check(std::slice::from_ref(&manifest.config))?;
    if manifest.layers.len() > LAYERS_MAX {
        return Err(ImageError::Invalid(format!("{} layers, at most {LAYERS_MAX}", manifest.layers.len())));
    }
    Ok(Document::Manifest(manifest))
}

fn check(descriptors: &[Descriptor]) -> Result<(), ImageError> {
    match descriptors.iter().find(|d| !is_digest(&d.digest)) {
        Some(d) => Err(ImageError::Invalid(format!("unsupported digest {:?}", d.digest))),
        None => Ok(()),
    }
}

/// `sha256:…` of `bytes`.
pub fn digest(bytes: &[u8]) -> String {
    hex_digest(&Sha256::digest(bytes))
}

pub fn hex_digest(hash: &[u8]) -> String {
    let mut text = String::with_capacity(7 + hash.len() * 2);
    text.push_str("sha256:");
    for byte in hash {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(nibble), 16).unwrap_or('0'));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_told_apart_and_checked() {
        let d = digest(b"x");
        let descriptor = |p: &str| format!(r#"{{"mediaType":"m","digest":"{d}","size":1{p}}}"#);
        let manifest = format!(r#"{{"schemaVersion":2,"config":{0},"layers":[{0}]}}"#, descriptor(""));
        assert!(matches!(parse("", manifest.as_bytes()), Ok(Document::Manifest(m)) if m.layers.len() == 1));
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{},{}]}}"#,
            descriptor(r#","platform":{"os":"linux","architecture":"arm64","variant":"v8"}"#),
            descriptor(r#","platform":{"os":"unknown","architecture":"unknown"}"#),
            descriptor(""),
        );
        let Ok(Document::Index(index)) = parse("", index.as_bytes()) else { panic!("an index") };
        let platforms: Vec<String> = index.images().iter().map(|(p, _)| platform::format(p)).collect();
        assert_eq!(platforms, ["linux/arm64"]);
        for bad in [
            "".to_string(),
            "{}".into(),
            r#"{"schemaVersion":1,"fsLayers":[]}"#.into(),
            manifest.replace(&d, "sha256:../../etc/passwd"),
            format!(
                r#"{{"config":{0},"layers":[{1}]}}"#,
                descriptor(""),
                vec![descriptor(""); 200].join(",")
            ),
        ] {
            assert!(parse("", bad.as_bytes()).is_err(), "{bad:.80}");
        }
    }
}
