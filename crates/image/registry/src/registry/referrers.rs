//! What refers to a manifest: signatures, SBOMs, attestations.
//!
//! Upstream counterpart: the OCI distribution spec, "Listing referrers"; docker-registry has none. The list is kept as
//! one small file a referrer, so that pushes never contend for it; the collection makes entries anew for manifests
//! that lack theirs, those that docker-registry stored among them.
use serde_json::value::RawValue;

use super::documents::OCI_INDEX;
use super::*;

/// A page ends at the first entry beyond this.
const PAGE_BYTES: usize = 1 << 20;

#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    media_type: &'static str,
    manifests: Vec<Box<RawValue>>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Filtered {
    artifact_type: Option<String>,
}

/// An index of referrers, and where the next page goes on.
pub struct Referrers {
    pub index: Vec<u8>,
    pub next: Option<String>,
}

impl Registry {
    pub async fn referrers(
        &self,
        repository: &str,
        subject: &Digest,
        artifact_type: Option<&str>,
        last: Option<&str>,
    ) -> Result<Referrers, RegistryError> {
        let mut manifests = Vec::new();
        let (mut size, mut next) = (0, None);
        for name in self.storage.list(&layout::referrers(repository, subject), None).await? {
            if last.is_some_and(|last| name.as_str() <= last) {
                continue;
            }
            let Some(digest) = layout::dashed(&name) else { continue };
            // an entry is written before its manifest
            if !self.exists(&layout::revision(repository, &digest)).await? {
                continue;
            }
            let Some(entry) = self.storage.get(&layout::referrer(repository, subject, &digest)).await? else {
                continue;
            };
            let Ok(filtered) = serde_json::from_slice::<Filtered>(&entry) else { continue };
            if artifact_type.is_some_and(|wanted| filtered.artifact_type.as_deref() != Some(wanted)) {
                continue;
            }
            if let Ok(entry) = serde_json::from_slice::<Box<RawValue>>(&entry) {
                manifests.push(entry);
            }
            size += entry.len();
            if size > PAGE_BYTES {
                next = Some(name);
                break;
            }
        }
        let index = Index { schema_version: 2, media_type: OCI_INDEX, manifests };
        let index = serde_json::to_vec(&index).map_err(|e| RegistryError::ManifestInvalid(e.to_string()))?;
        Ok(Referrers { index, next })
    }
}
