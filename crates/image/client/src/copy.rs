//! Copying an image with all its platforms, or some: what belongs to it, and pushing that to a registry.
//!
//! Upstream counterpart: containers/image's `copy` package. What stays true: what is copied whole keeps its digest, and
//! children are there before the index that names them. An index of which only some platforms are wanted, or there, is
//! written anew and has another digest. A single platform is copied as its manifest, without an index.
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use sampan_drivers::runtime::{Auth, ImageError, Platform};

use crate::client::{Client, Pushed, Upload};
use crate::manifest::{self, Descriptor, Document, ImageConfig, Index, Manifest};
use crate::platform;
use crate::reference::Reference;
use crate::source::Source;

/// Blobs on their way at a time.
const AT_ONCE: usize = 3;
const NESTING_MAX: u32 = 3;
/// More manifests than any index has.
const MANIFESTS_MAX: usize = 1024;

/// Told what happens; [`Quiet`] is told in vain.
pub trait Report: Send + Sync {
    /// A blob begins; the number says how many of its bytes are through.
    fn begin(&self, blob: &Descriptor) -> Arc<AtomicU64>;
    fn end(&self, blob: &Descriptor, how: Pushed);
}

pub struct Quiet;

impl Report for Quiet {
    fn begin(&self, _: &Descriptor) -> Arc<AtomicU64> {
        Arc::default()
    }
    fn end(&self, _: &Descriptor, _: Pushed) {}
}

/// A manifest or an index, as it will be written.
#[derive(Clone, Debug)]
pub struct Planned {
    pub media_type: String,
    pub digest: String,
    pub bytes: Bytes,
    /// Of a manifest: for whom it is, what it is made of.
    pub platform: Option<Platform>,
    pub manifest: Option<Manifest>,
}

/// What belongs to an image.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Children before those that name them; the last is the image itself.
    pub documents: Vec<Planned>,
    pub blobs: Vec<Descriptor>,
    /// Platforms that the index names, but the archive does not hold.
    pub left_out: Vec<String>,
}

impl Plan {
    pub fn top(&self) -> Option<&Planned> {
        self.documents.last()
    }

    pub fn size_bytes(&self) -> u64 {
        self.blobs.iter().map(|b| b.size).sum()
    }

    pub fn platforms(&self) -> Vec<Platform> {
        self.documents.iter().filter_map(|d| d.platform.clone()).collect()
    }
}

/// Finds what belongs to the image at `top`; only `wanted` platforms, all when there are none.
pub async fn plan(
    source: &dyn Source,
    media_type: &str,
    bytes: &Bytes,
    wanted: &[Platform],
) -> Result<Plan, ImageError> {
    let mut planner = Planner { source, documents: Vec::new(), blobs: Vec::new(), left_out: Vec::new() };
    match manifest::parse(media_type, bytes)? {
        Document::Manifest(m) => {
            let found = planner.manifest(media_type, bytes.clone(), m, None).await?;
            let available = found.platform.clone();
            planner.documents.push(found);
            if let Some(available) = available
                && !wanted.is_empty()
                && platform::choose(&available, wanted).is_none()
            {
                return Err(missing(&wanted[0], &[available]));
            }
        }
        Document::Index(index) => planner.index(media_type, bytes, &index, wanted, 0).await?,
    }
    let Planner { documents, mut blobs, left_out, .. } = planner;
    let mut seen = BTreeSet::new();
    blobs.retain(|b| seen.insert(b.digest.clone()));
    Ok(Plan { documents, blobs, left_out })
}

fn missing(wanted: &Platform, available: &[Platform]) -> ImageError {
    ImageError::NoPlatform { wanted: platform::format(wanted), available: platform::list(available) }
}

struct Planner<'a> {
    source: &'a dyn Source,
    documents: Vec<Planned>,
    blobs: Vec<Descriptor>,
    left_out: Vec<String>,
}

impl Planner<'_> {
    async fn index(
        &mut self,
        media_type: &str,
        bytes: &Bytes,
        index: &Index,
        wanted: &[Platform],
        depth: u32,
    ) -> Result<(), ImageError> {
        if depth >= NESTING_MAX || self.documents.len() + index.manifests.len() > MANIFESTS_MAX {
            return Err(ImageError::Invalid("an index that is nested too deep or names too much".into()));
        }
        let chosen = choose(index, wanted)?;
        let mut kept = BTreeSet::new();
        for (at, descriptor) in index.manifests.iter().enumerate() {
            if !chosen.contains(&at) {
                continue;
            }
            let child = match self.source.manifest(descriptor).await {
                Ok(child) => child,
                // An archive may hold some platforms only.
                Err(ImageError::NotFound(_)) if self.source.origin().is_none() => {
                    let name = descriptor.platform.as_ref().map(|p| platform::format(&p.platform()));
                    self.left_out.push(name.unwrap_or_else(|| descriptor.digest.clone()));
                    continue;
                }
                Err(e) => return Err(e),
            };
            kept.insert(at);
            match manifest::parse(&descriptor.media_type, &child)? {
                Document::Manifest(m) => {
                    let platform = descriptor.platform.as_ref().map(|p| p.platform());
                    let planned = self.manifest(&descriptor.media_type, child, m, platform).await?;
                    self.documents.push(planned);
                }
                Document::Index(inner) => {
                    Box::pin(self.index(&descriptor.media_type, &child, &inner, &[], depth + 1)).await?;
                }
            }
        }
        if depth == 0 && wanted.len() == 1 && kept.len() == 1 {
            return Ok(());
        }
        let bytes = match kept.len() == index.manifests.len() {
            true => bytes.clone(),
            false => narrowed(bytes, &kept)?,
        };
        let media_type = media_type_of(media_type, &bytes, manifest::OCI_INDEX);
        let digest = manifest::digest(&bytes);
        self.documents.push(Planned { media_type, digest, bytes, platform: None, manifest: None });
        Ok(())
    }

    async fn manifest(
        &mut self,
        media_type: &str,
        bytes: Bytes,
        m: Manifest,
        platform: Option<Platform>,
    ) -> Result<Planned, ImageError> {
        let platform = match platform {
            Some(platform) => platform,
            None => ImageConfig::parse(&self.source.config(&m.config).await?)?.platform(),
        };
        self.blobs.push(m.config.clone());
        // Layers that may not be handed on stay where their URLs say.
        let free =
            |l: &&Descriptor| !l.media_type.contains("foreign") && !l.media_type.contains("nondistributable");
        self.blobs.extend(m.layers.iter().filter(free).cloned());
        let media_type = media_type_of(media_type, &bytes, manifest::OCI_MANIFEST);
        let digest = manifest::digest(&bytes);
        Ok(Planned { media_type, digest, bytes, platform: Some(platform), manifest: Some(m) })
    }
}

/// What the document says of itself, else what it came as.
fn media_type_of(given: &str, bytes: &[u8], default: &str) -> String {
    let value: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
    match value["mediaType"].as_str() {
        Some(own) if !own.is_empty() => own.to_string(),
        _ if !given.is_empty() && given != "application/json" => given.to_string(),
        _ => default.to_string(),
    }
}

/// Which of the index' entries are wanted.
fn choose(index: &Index, wanted: &[Platform]) -> Result<BTreeSet<usize>, ImageError> {
    if wanted.is_empty() {
        return Ok((0..index.manifests.len()).collect());
    }
    let images = index.images();
    let platforms: Vec<Platform> = images.iter().map(|(p, _)| p.clone()).collect();
    let mut chosen = BTreeSet::new();
    for want in wanted {
        let found = platform::choose(want, &platforms).ok_or_else(|| missing(want, &platforms))?;
        let digest = &images[found].1.digest;
        chosen.extend(index.manifests.iter().position(|d| d.digest == *digest));
    }
    Ok(chosen)
}

/// An index without the entries that are not kept; all else stays as it was.
fn narrowed(bytes: &[u8], kept: &BTreeSet<usize>) -> Result<Bytes, ImageError> {
    let invalid = |e: serde_json::Error| ImageError::Invalid(format!("index: {e}"));
    let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(invalid)?;
    if let Some(manifests) = value.get_mut("manifests").and_then(serde_json::Value::as_array_mut) {
        let mut at = 0;
        manifests.retain(|_| {
            at += 1;
            kept.contains(&(at - 1))
        });
    }
    Ok(serde_json::to_vec(&value).map_err(invalid)?.into())
}

/// Pushes a plan as `target`; the digest of what its name leads to.
pub async fn push(
    client: &Client,
    source: &dyn Source,
    plan: &Plan,
    target: &Reference,
    auth: &[Auth],
    report: &dyn Report,
) -> Result<String, ImageError> {
    let blobs = futures::stream::iter(&plan.blobs).map(|blob| async move {
        let upload = Upload { blob, source, sent: report.begin(blob) };
        let how = client.push_blob(target, auth, &upload).await?;
        report.end(blob, how);
        Ok::<(), ImageError>(())
    });
    blobs.buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await?;
    let mut last = String::new();
    for (at, document) in plan.documents.iter().enumerate() {
        let is_top = at + 1 == plan.documents.len();
        let name = match is_top {
            true => target.clone(),
            false => Reference { tag: None, digest: Some(document.digest.clone()), ..target.clone() },
        };
        last = client.put_manifest(&name, &document.media_type, &document.bytes, auth).await?;
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_narrowed_to_what_is_wanted() {
        let entry = |c: char, arch: &str| {
            let digest = format!("sha256:{}", c.to_string().repeat(64));
            format!(
                r#"{{"mediaType":"m","digest":"{digest}","size":1,"platform":{{"os":"linux","architecture":"{arch}"}}}}"#
            )
        };
        let text = format!(
            r#"{{"schemaVersion":2,"annotations":{{"k":"v"}},"manifests":[{},{},{}]}}"#,
            entry('a', "amd64"),
            entry('b', "arm64"),
            entry('c', "unknown")
        );
        let index: Index = serde_json::from_str(&text).unwrap();
        let want = |names: &[&str]| {
            let wanted: Vec<Platform> = names.iter().map(|n| platform::parse(n).unwrap()).collect();
            choose(&index, &wanted)
        };
        assert_eq!(want(&[]).unwrap().len(), 3);
        assert_eq!(want(&["linux/arm64"]).unwrap(), BTreeSet::from([1]));
        let error = want(&["linux/riscv64"]).unwrap_err().to_string();
        assert!(error.contains("linux/riscv64") && error.contains("linux/amd64, linux/arm64"), "{error}");
        let narrow = narrowed(text.as_bytes(), &BTreeSet::from([1])).unwrap();
        let narrow: serde_json::Value = serde_json::from_slice(&narrow).unwrap();
        assert_eq!(narrow["manifests"].as_array().unwrap().len(), 1);
        assert_eq!(narrow["manifests"][0]["platform"]["architecture"], "arm64");
        assert_eq!(narrow["annotations"]["k"], "v");
    }
}
