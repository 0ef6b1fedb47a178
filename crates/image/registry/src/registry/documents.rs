//! Manifests and indexes as documents: what type they are, what they refer to.
//!
//! Upstream counterparts: the OCI image spec, Docker's schema 2. Nothing is ever written back: clients get the bytes
//! that were pushed. Docker's schema 1 is refused.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::digest::Digest;
use crate::error::RegistryError;

pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_ARTIFACT: &str = "application/vnd.oci.artifact.manifest.v1+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const SUPPORTED: [&str; 5] = [OCI_INDEX, OCI_MANIFEST, OCI_ARTIFACT, DOCKER_LIST, DOCKER_MANIFEST];

/// What the spec says every registry should take.
pub const MANIFEST_MAX_BYTES: usize = 4 << 20;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw<'a> {
    schema_version: Option<u64>,
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    blobs: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    subject: Option<Descriptor>,
    #[serde(borrow)]
    annotations: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    urls: Vec<String>,
}

/// An entry of the referrers list.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Referrer<'a> {
    media_type: &'a str,
    digest: String,
    size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<&'a BTreeMap<String, String>>,
}

#[derive(Debug)]
pub struct Document {
    pub media_type: String,
    /// Configuration, layers, an index' entries: all that must be kept with it.
    pub references: Vec<Digest>,
    /// Those of `references` that may lie elsewhere: layers with URLs.
    pub foreign: Vec<Digest>,
    pub is_index: bool,
    pub subject: Option<Digest>,
    pub artifact_type: Option<String>,
    annotations: Option<BTreeMap<String, String>>,
}

impl Document {
    /// Reads a manifest; `content_type` is what its pusher called it, if anything.
    pub fn parse(content_type: Option<&str>, bytes: &[u8]) -> Result<Document, RegistryError> {
        let invalid = |why: String| RegistryError::ManifestInvalid(why);
        let raw: Raw<'_> = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
        let content_type = content_type.map(|t| t.split(';').next().unwrap_or("").trim());
        let content_type = content_type.filter(|t| !t.is_empty() && *t != "application/octet-stream");
        if let (Some(told), Some(own)) = (content_type, raw.media_type.as_deref())
            && told != own
            && !own.is_empty()
        {
            return Err(invalid(format!("its mediaType is {own}, its Content-Type {told}")));
        }
        let own = raw.media_type.as_deref().filter(|t| !t.is_empty());
        let media_type = own.or(content_type).unwrap_or(sniff(&raw)).to_string();
        if !SUPPORTED.contains(&media_type.as_str()) || raw.schema_version == Some(1) {
            return Err(invalid(format!("{media_type} is not supported")));
        }
        if media_type != OCI_ARTIFACT && raw.schema_version != Some(2) {
            return Err(invalid("schemaVersion is not 2".into()));
        }
        let is_index = media_type == OCI_INDEX || media_type == DOCKER_LIST;
        let descriptors = if is_index {
            if raw.layers.is_some() || raw.config.is_some() {
                return Err(invalid("an index has neither config nor layers".into()));
            }
            raw.manifests.ok_or_else(|| invalid("manifests is missing".into()))?
        } else if media_type == OCI_ARTIFACT {
            raw.blobs.unwrap_or_default()
        } else {
            if raw.manifests.is_some() {
                return Err(invalid("a manifest has no manifests".into()));
            }
            raw.layers.ok_or_else(|| invalid("layers is missing".into()))?
        };
        if raw.config.is_none() && (media_type == OCI_MANIFEST || media_type == DOCKER_MANIFEST) {
            return Err(invalid("config is missing".into()));
        }
        let parse = |d: &Descriptor| d.digest.parse::<Digest>().map_err(|e| invalid(e.to_string()));
        let foreign = descriptors.iter().filter(|d| !is_index && is_foreign(d)).map(parse);
        let foreign = foreign.collect::<Result<Vec<_>, _>>()?;
        let references = raw.config.iter().chain(&descriptors).map(parse).collect::<Result<Vec<_>, _>>()?;
        let annotations = match raw.annotations.map(RawValue::get) {
            None | Some("null") => None,
            Some(text) => Some(serde_json::from_str(text).map_err(|e| invalid(format!("annotations: {e}")))?),
        };
        let config_type = raw.config.as_ref().map(|c| c.media_type.clone());
        let artifact_type = raw.artifact_type.filter(|t| !t.is_empty());
        Ok(Document {
            references,
            foreign,
            is_index,
            subject: raw.subject.as_ref().map(parse).transpose()?,
            artifact_type: artifact_type.or(config_type.filter(|t| !t.is_empty())),
            annotations,
            media_type,
        })
    }

    /// The entry in the list of what refers to its subject.
    pub fn referrer(&self, digest: &Digest, size: usize) -> Result<Vec<u8>, RegistryError> {
        let entry = Referrer {
            media_type: &self.media_type,
            digest: digest.to_string(),
            size,
            artifact_type: self.artifact_type.as_deref(),
            annotations: self.annotations.as_ref(),
        };
        serde_json::to_vec(&entry).map_err(|e| RegistryError::ManifestInvalid(e.to_string()))
    }
}

/// The type of a document that doesn't say: OCI's, which allows that.
fn sniff(raw: &Raw<'_>) -> &'static str {
    if raw.manifests.is_some() { OCI_INDEX } else { OCI_MANIFEST }
}

fn is_foreign(descriptor: &Descriptor) -> bool {
    !descriptor.urls.is_empty()
        || descriptor.media_type.contains(".nondistributable.")
        || descriptor.media_type == "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(c: char) -> String {
        format!("sha256:{}", c.to_string().repeat(64))
    }

    #[test]
    fn documents_are_told_apart() {
        let (a, b, c) = (hex('a'), hex('b'), hex('c'));
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"x/config","digest":"{a}","size":1}},
            "layers":[{{"digest":"{b}"}},{{"digest":"{c}","urls":["https://x"]}}],
            "subject":{{"digest":"{c}"}},"annotations":{{"k":"v"}}}}"#
        );
        let parsed = Document::parse(None, manifest.as_bytes()).unwrap();
        assert_eq!((parsed.media_type.as_str(), parsed.is_index), (OCI_MANIFEST, false));
        assert_eq!((parsed.references.len(), parsed.foreign.len()), (3, 1));
        assert_eq!(parsed.artifact_type.as_deref(), Some("x/config"));
        let entry = parsed.referrer(&a.parse().unwrap(), 7).unwrap();
        let entry: serde_json::Value = serde_json::from_slice(&entry).unwrap();
        assert_eq!(entry["annotations"]["k"], "v");
        assert_eq!(entry["artifactType"], "x/config");
        assert!(Document::parse(Some(OCI_INDEX), manifest.as_bytes()).is_err());
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{a}"}}]}}"#);
        assert_eq!(Document::parse(Some(DOCKER_LIST), index.as_bytes()).unwrap().media_type, DOCKER_LIST);
        let index = Document::parse(None, index.as_bytes()).unwrap();
        assert!(index.is_index && index.artifact_type.is_none());
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"schemaVersion":1,"mediaType":"application/vnd.docker.distribution.manifest.v1+json"}"#,
            r#"{"schemaVersion":2,"layers":[]}"#,
            r#"{"schemaVersion":2,"config":{"digest":"sha256:../../etc"},"layers":[]}"#,
            r#"{"schemaVersion":2,"mediaType":"text/plain","manifests":[]}"#,
        ] {
            assert!(Document::parse(None, bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
