//! Asks a registry for an image of one platform, and what it is made for.
//!
//! Upstream counterpart: docker/cli's `internal/registryclient/fetcher.go`. The platform is the configuration's; where
//! that names no architecture, the programs in the image do.
use sampan_image::manifest::{self, Document, ImageConfig};
use sampan_image::source::Repository;
use sampan_image::{Client, Reference};

use crate::inspect;
use crate::list::{Given, Member, OsPlatform};
use crate::{ManifestError, list};

/// Whether programs of the image are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checks {
    None,
    Programs,
}

pub async fn resolve(client: &Client, name: &Reference, checks: Checks) -> Result<Member, ManifestError> {
    let of = |e| ManifestError::of(name, e);
    let found = client.resolve(name, &[]).await.map_err(of)?;
    let Document::Manifest(m) = found.document else {
        return Err(ManifestError::IsList { name: name.to_string() });
    };
    let config = client.small_blob(name, &m.config, &[]).await.map_err(of)?;
    let mut guessed: OsPlatform = serde_json::from_slice(&config).unwrap_or_default();
    let run = ImageConfig::parse(&config).ok().and_then(|c| c.config).unwrap_or_default();
    let mut program: Option<list::Program> = None;
    if checks == Checks::Programs {
        let pinned = Reference { digest: Some(found.digest.clone()), ..name.clone() };
        let source = Repository { client, reference: &pinned, auth: &[] };
        program = inspect::program(&source, &m, &run).await;
    }
    if let Some(program) = program.as_ref().filter(|_| guessed.architecture.is_empty()) {
        guessed.architecture.clone_from(&program.architecture);
        if guessed.os.is_empty() {
            guessed.os = "linux".into();
        }
    }
    let raw = String::from_utf8(found.bytes.to_vec())
        .map_err(|_| of(sampan_image::ImageError::Invalid("manifest: not UTF-8".into())))?;
    let given = Given::default();
    let media_type = own_media_type(&raw).unwrap_or_else(|| manifest::OCI_MANIFEST.to_string());
    let (digest, size) = (found.digest, raw.len() as u64);
    Ok(Member { name: name.to_string(), media_type, digest, size, raw, guessed, given, program })
}

/// Docker's media type is in the manifest; OCI's may be missing.
pub(crate) fn own_media_type(raw: &str) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(raw).ok()?;
    value["mediaType"].as_str().filter(|t| !t.is_empty()).map(str::to_string)
}
