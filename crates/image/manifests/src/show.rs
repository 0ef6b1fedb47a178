//! What `inspect` prints, byte for byte docker's.
//!
//! Upstream counterpart: docker/cli's `cli/command/manifest/inspect.go`. A list is shown rebuilt from its entries, as
//! docker does; with `verbose`, every manifest of it is fetched.
use base64::Engine;
use sampan_image::manifest::{self, Descriptor, Document, Index, OCI_MANIFEST};
use sampan_image::{Client, ImageError, Reference};
use serde::Deserialize;

use crate::list::{Entry, Member, OsPlatform, PendingList, document};
use crate::resolve::{Checks, own_media_type, resolve};
use crate::{ManifestError, json};

const UNIT: &str = "\t";

/// A name's manifest or list, as its registry has it.
pub async fn inspect(client: &Client, name: &Reference, verbose: bool) -> Result<String, ManifestError> {
    let of = |e| ManifestError::of(name, e);
    let found = client.resolve(name, &[]).await.map_err(of)?;
    match (&found.document, verbose) {
        (Document::Manifest(_), false) => Ok(json::indent(&String::from_utf8_lossy(&found.bytes), UNIT)),
        (Document::Manifest(_), true) => inspect_member(&resolve(client, name, Checks::None).await?, true),
        (Document::Index(index), false) => {
            let platforms: RawIndex = serde_json::from_slice(&found.bytes)
                .map_err(|e| of(ImageError::Invalid(format!("manifest list: {e}"))))?;
            let entries = index.manifests.iter().zip(platforms.manifests).map(|(d, raw)| Entry {
                media_type: if d.media_type.is_empty() { OCI_MANIFEST.into() } else { d.media_type.clone() },
                size: d.size,
                digest: d.digest.clone(),
                platform: raw.platform,
            });
            Ok(document(entries.collect()).1)
        }
        (Document::Index(index), true) => {
            let platforms: RawIndex = serde_json::from_slice(&found.bytes)
                .map_err(|e| of(ImageError::Invalid(format!("manifest list: {e}"))))?;
            let members = members(client, name, index, platforms).await?;
            Ok(array(&members))
        }
    }
}

#[derive(Deserialize)]
struct RawIndex {
    manifests: Vec<RawEntry>,
}

#[derive(Deserialize)]
struct RawEntry {
    #[serde(default)]
    platform: OsPlatform,
}

async fn members(
    client: &Client,
    name: &Reference,
    index: &Index,
    raw: RawIndex,
) -> Result<Vec<Member>, ManifestError> {
    let mut members = Vec::new();
    for (descriptor, entry) in index.manifests.iter().zip(raw.manifests) {
        let pinned = Reference { digest: Some(descriptor.digest.clone()), ..name.clone() };
        members.push(member(client, &pinned, descriptor, entry.platform).await?);
    }
    Ok(members)
}

async fn member(
    client: &Client,
    name: &Reference,
    descriptor: &Descriptor,
    platform: OsPlatform,
) -> Result<Member, ManifestError> {
    let found = client.manifest(name, descriptor, &[]).await.map_err(|e| ManifestError::of(name, e))?;
    let raw = String::from_utf8_lossy(&found.bytes).into_owned();
    Ok(Member {
        name: name.to_string(),
        media_type: own_media_type(&raw).unwrap_or_else(|| OCI_MANIFEST.into()),
        digest: found.digest,
        size: found.bytes.len() as u64,
        raw,
        guessed: platform,
        given: Default::default(),
        program: None,
    })
}

/// A pending list.
pub fn inspect_list(list: &PendingList, verbose: bool) -> Result<String, ManifestError> {
    if verbose {
        return Ok(array(&list.members));
    }
    let entries = list.members.iter().map(|m| Entry {
        media_type: m.media_type.clone(),
        size: m.size,
        digest: m.digest.clone(),
        platform: m.platform(),
    });
    Ok(document(entries.collect()).1)
}

/// An image of a pending list.
pub fn inspect_member(member: &Member, verbose: bool) -> Result<String, ManifestError> {
    Ok(match verbose {
        false => json::indent(&member.raw, UNIT),
        true => json::marshal_indent(&object(member), UNIT),
    })
}

fn array(members: &[Member]) -> String {
    let objects: Vec<String> = members.iter().map(object).collect();
    json::marshal_indent(&format!("[{}]", objects.join(",")), UNIT)
}

/// Docker's `ImageManifest`, in its order of keys.
fn object(member: &Member) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let platform = serde_json::to_string(&member.platform()).unwrap_or_default();
    let raw = base64::engine::general_purpose::STANDARD.encode(&member.raw);
    let kind = match member.media_type == manifest::DOCKER_MANIFEST {
        true => "SchemaV2Manifest",
        false => "OCIManifest",
    };
    format!(
        r#"{{"Ref":{},"Descriptor":{{"mediaType":{},"digest":{},"size":{},"platform":{platform}}},"Raw":{},"{kind}":{}}}"#,
        quoted(&member.name),
        quoted(&member.media_type),
        quoted(&member.digest),
        member.size,
        quoted(&raw),
        member.raw.trim()
    )
}
