//! The images on this node: what names lead to, and how they come here and go.
//!
//! Upstream counterpart: containerd's image service in the CRI plugin. `images.json` is the one list of what exists;
//! blobs and layers that it doesn't need are removed. An image's id is its configuration's digest.
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use sampan_drivers::runtime::{Auth, Image, ImageError, Platform, RuntimeError};
use sampan_image::archive::{Archive, ArchiveImage};
use sampan_image::manifest::{self, Document, ImageConfig, Manifest, RunConfig};
use sampan_image::{Client, Reference, platform};
use serde::{Deserialize, Serialize};

use crate::content::{Content, ContentError};

mod by_hand;
mod kept;
pub use by_hand::ImageFiles;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImageRecord {
    pub id: String,
    pub tags: Vec<String>,
    pub digests: Vec<String>,
    pub manifest: String,
    pub platform: Platform,
    /// All platforms that the image has, not only this node's.
    pub platforms: Vec<Platform>,
    pub size_bytes: u64,
    pub unpacked_bytes: u64,
    /// Layer folders, lowest first.
    pub layers: Vec<String>,
}

/// Imported archives' images that have nothing for this node: named, so that the answer is the right one.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Foreign {
    name: String,
    platforms: Vec<Platform>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Table {
    images: Vec<ImageRecord>,
    foreign: Vec<Foreign>,
    /// What other nodes may have.
    kept: Vec<kept::Kept>,
}

pub struct Images {
    pub content: Content,
    client: Client,
    platform: Platform,
    path: PathBuf,
    table: Mutex<Table>,
    /// Ids of what the archives hold that lie on this node: no registry may have them, so they are never collected.
    pinned: Mutex<Vec<String>>,
    /// One pull at a time, as kubelet's `serializeImagePulls` has it; also what keeps removal and pulls apart.
    pulling: tokio::sync::Mutex<()>,
}

fn failed(e: ContentError) -> RuntimeError {
    if e.is_no_space() {
        return RuntimeError::NoSpace { doing: format!("pulling an image: {e}") };
    }
    RuntimeError::Failed { message: e.to_string() }
}

/// Errors of content that came from elsewhere are the image's.
fn of_image(image: &str, e: ContentError) -> RuntimeError {
    match &e {
        ContentError::Io { .. } => failed(e),
        _ if e.is_no_space() => failed(e),
        _ => RuntimeError::Image { image: image.into(), source: ImageError::Invalid(e.to_string()) },
    }
}

/// Folder names of layers: by chain, since a folder's attributes may come from the layers below.
fn chain(diff_ids: &[String]) -> Vec<String> {
    let mut chain = String::new();
    let mut names = Vec::new();
    for id in diff_ids {
        chain =
            if chain.is_empty() { id.clone() } else { manifest::digest(format!("{chain} {id}").as_bytes()) };
        names.push(chain.trim_start_matches("sha256:").chars().take(20).collect());
    }
    names
}

impl Images {
    pub fn open(folder: &Path, client: Client, platform: Platform) -> Result<Arc<Images>, RuntimeError> {
        let content = Content::open(folder).map_err(failed)?;
        let path = folder.join("images.json");
        let mut table = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|e| {
                tracing::warn!(error = %e, "images.json can't be read; images will be pulled again");
                Table::default()
            }),
            Err(_) => Table::default(),
        };
        table.kept.retain(|kept| client.is_mirrored(kept.registry()));
        let table = Mutex::new(table);
        let pinned = Mutex::default();
        let images = Images { content, client, platform, path, table, pinned, pulling: Default::default() };
        // A layer that went missing makes its image one to be pulled again.
        images.table.lock().images.retain(|i| i.layers.iter().all(|l| images.content.has_layer(l)));
        Ok(Arc::new(images))
    }

    pub fn find(&self, image: &str) -> Option<ImageRecord> {
        let table = self.table.lock();
        let by_id = |i: &&ImageRecord| i.id == image || i.id.strip_prefix("sha256:") == Some(image);
        if let Some(found) = table.images.iter().find(by_id) {
            return Some(found.clone());
        }
        let name = Reference::parse(image).ok()?;
        table.images.iter().find(|i| names(i, &name)).cloned()
    }

    pub fn list(&self) -> Vec<ImageRecord> {
        self.table.lock().images.clone()
    }

    pub fn config(&self, record: &ImageRecord) -> Option<RunConfig> {
        let config = ImageConfig::parse(&self.content.read(&record.id)?).ok()?;
        Some(config.config.unwrap_or_default())
    }

    pub fn describe(&self, record: &ImageRecord) -> Image {
        Image {
            id: record.id.clone(),
            repo_tags: record.tags.clone(),
            repo_digests: record.digests.clone(),
            size_bytes: record.size_bytes,
            user: self.config(record).and_then(|c| c.user).unwrap_or_default(),
            platform: record.platform.clone(),
            pinned: self.pinned.lock().contains(&record.id),
        }
    }

    fn save(&self, table: &Table) -> Result<(), RuntimeError> {
        let bytes = serde_json::to_vec(table).map_err(|e| RuntimeError::Failed { message: e.to_string() })?;
        sampan_world::files::write_atomic(&self.path, &bytes, 0o600)
            .map_err(|source| failed(ContentError::Io { what: "images.json".into(), source }))
    }

    /// The image's id.
    pub async fn pull(self: &Arc<Self>, image: &str, auth: &[Auth]) -> Result<String, RuntimeError> {
        let wrong = |source: ImageError| RuntimeError::Image { image: image.to_string(), source };
        let reference = Reference::parse(image).map_err(wrong)?;
        let _one = self.pulling.lock().await;
        let resolved = self.client.resolve(&reference, auth).await.map_err(wrong)?;
        let (top, top_bytes) = (resolved.digest.clone(), resolved.bytes.clone());
        let (found, digest, bytes, platforms) = match resolved.document {
            Document::Manifest(m) => (m, resolved.digest, resolved.bytes, None),
            Document::Index(index) => {
                let images = index.images();
                let platforms: Vec<Platform> = images.iter().map(|(p, _)| p.clone()).collect();
                let chosen = platform::choose(&self.platform, &platforms).and_then(|i| images.get(i));
                let Some((_, descriptor)) = chosen else { return Err(wrong(self.no_platform(&platforms))) };
                let child = self.client.manifest(&reference, descriptor, auth).await.map_err(wrong)?;
                match child.document {
                    Document::Manifest(m) => (m, child.digest, child.bytes, Some(platforms)),
                    Document::Index(_) => {
                        return Err(wrong(ImageError::Invalid("an index in an index".into())));
                    }
                }
            }
        };
        let config_bytes = self.client.small_blob(&reference, &found.config, auth).await.map_err(wrong)?;
        let config = ImageConfig::parse(&config_bytes).map_err(wrong)?;
        let platforms = platforms.unwrap_or_else(|| vec![config.platform()]);
        let mut record = self.record(&found, &digest, &config, platforms).map_err(wrong)?;
        record.digests.push(format!("{}@{top}", reference.name()));
        if reference.digest.is_none() {
            record.tags.push(reference.to_string());
        }
        for (index, layer) in found.layers.iter().enumerate() {
            let name = record.layers[index].clone();
            if self.content.has_layer(&name) {
                continue;
            }
            let mut ingest = self.content.ingest(&layer.digest).map_err(failed)?;
            match self.client.blob(&reference, layer, auth, &mut ingest).await {
                Ok(()) => {}
                Err(sampan_image::client::FetchError::Image(e)) => return Err(wrong(e)),
                Err(sampan_image::client::FetchError::Sink(source)) => {
                    return Err(failed(ContentError::Io { what: format!("layer {}", layer.digest), source }));
                }
            }
            let (this, keep) = (self.clone(), self.client.is_mirrored(&reference.registry));
            let (digest, diff_id) = (layer.digest.clone(), config.diff_ids()[index].clone());
            let parents: Vec<String> = record.layers[..index].iter().rev().cloned().collect();
            let unpacked = tokio::task::spawn_blocking(move || {
                this.content.unpack_layer(ingest, keep, &digest, &diff_id, &name, &parents)
            });
            let size = unpacked.await.map_err(|e| RuntimeError::Failed { message: e.to_string() })?;
            record.unpacked_bytes += size.map_err(|e| of_image(image, e))?;
        }
        self.content.write(&digest, &bytes).map_err(failed)?;
        self.content.write(&record.id, &config_bytes).map_err(|e| of_image(image, e))?;
        let mut parts = vec![top.clone(), digest, record.id.clone()];
        parts.extend(found.layers.into_iter().map(|l| l.digest));
        let id = self.add(record)?;
        if let Err(error) = self.keep_pulled(&reference, (&top, &top_bytes), parts) {
            tracing::warn!(image, %error, "not shared with other nodes");
        }
        Ok(id)
    }

    fn no_platform(&self, platforms: &[Platform]) -> ImageError {
        ImageError::NoPlatform {
            wanted: platform::format(&self.platform),
            available: platform::list(platforms),
        }
    }

    fn record(
        &self,
        m: &Manifest,
        digest: &str,
        config: &ImageConfig,
        platforms: Vec<Platform>,
    ) -> Result<ImageRecord, ImageError> {
        if platform::rank(&self.platform, &config.platform()).is_none() {
            return Err(self.no_platform(&platforms));
        }
        if config.diff_ids().len() != m.layers.len() {
            return Err(ImageError::Invalid("configuration and manifest disagree about the layers".into()));
        }
        Ok(ImageRecord {
            id: m.config.digest.clone(),
            tags: Vec::new(),
            digests: Vec::new(),
            manifest: digest.to_string(),
            platform: config.platform(),
            platforms,
            size_bytes: m.config.size + m.layers.iter().map(|l| l.size).sum::<u64>(),
            unpacked_bytes: 0,
            layers: chain(config.diff_ids()),
        })
    }

    fn add(&self, mut record: ImageRecord) -> Result<String, RuntimeError> {
        let mut table = self.table.lock();
        for other in &mut table.images {
            other.tags.retain(|t| !record.tags.contains(t));
            other.digests.retain(|d| !record.digests.contains(d));
        }
        table.foreign.retain(|f| !record.tags.contains(&f.name));
        table.unname(&record.tags);
        if let Some(at) = table.images.iter().position(|i| i.id == record.id) {
            let old = table.images.swap_remove(at);
            record.tags.extend(old.tags);
            record.digests.extend(old.digests);
            record.unpacked_bytes = record.unpacked_bytes.max(old.unpacked_bytes);
        }
        let id = record.id.clone();
        table.images.push(record);
        self.save(&table)?;
        Ok(id)
    }

    /// Takes a name away, or the whole image when named by its id or last name.
    pub async fn remove(&self, image: &str, used_layers: &[String]) -> Result<(), RuntimeError> {
        let _one = self.pulling.lock().await;
        if let Some(found) = self.find(image) {
            let mut table = self.table.lock();
            if image.contains(&found.id) || found.id.ends_with(image) {
                table.images.retain(|i| i.id != found.id);
            } else if let Ok(name) = Reference::parse(image) {
                let text = name.to_string();
                for i in table.images.iter_mut().filter(|i| i.id == found.id) {
                    i.tags.retain(|t| *t != text);
                    i.digests.retain(|d| *d != text);
                }
                table.images.retain(|i| i.id != found.id || !i.tags.is_empty());
            }
            self.save(&table)?;
        }
        self.collect(used_layers);
        Ok(())
    }

    /// Removes blobs and layers that no image and none of `used_layers` needs.
    pub fn collect(&self, used_layers: &[String]) {
        let mut table = self.table.lock();
        table.release();
        let mut blobs: Vec<String> =
            table.images.iter().flat_map(|i| [i.id.clone(), i.manifest.clone()]).collect();
        blobs.extend(table.kept.iter().flat_map(|k| k.blobs.iter().cloned()));
        let mut layers: Vec<String> = table.images.iter().flat_map(|i| i.layers.clone()).collect();
        layers.extend(used_layers.iter().cloned());
        self.content.collect(&blobs, &layers);
    }

    /// The platforms of an image: what is here says so, else its registry.
    pub async fn platforms(&self, image: &str, auth: &[Auth]) -> Result<Vec<Platform>, ImageError> {
        let reference = Reference::parse(image)?;
        if let Some(found) = self.find(image) {
            return Ok(found.platforms);
        }
        let text = reference.to_string();
        if let Some(found) = self.table.lock().foreign.iter().find(|f| f.name == text) {
            return Ok(found.platforms.clone());
        }
        self.client.platforms(&reference, auth).await
    }

    /// For pull policy errors: an imported image that has nothing for this node.
    pub fn foreign(&self, image: &str) -> Option<ImageError> {
        let name = Reference::parse(image).ok()?.to_string();
        let table = self.table.lock();
        table.foreign.iter().find(|f| f.name == name).map(|f| self.no_platform(&f.platforms))
    }

    /// Imports every archive of a folder; a bad one is logged and left. Blocking.
    pub fn import_folder(&self, folder: &Path) {
        let mut archives: Vec<PathBuf> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
        archives.retain(|p| {
            let name = p.to_string_lossy();
            [".tar", ".oci", ".tar.gz", ".tgz", ".tar.zst"].iter().any(|end| name.ends_with(end))
        });
        archives.sort();
        for path in archives {
            match self.import(&path) {
                Ok(ids) => self.pinned.lock().extend(ids),
                Err(error) => tracing::warn!(archive = %path.display(), %error, "image archive not imported"),
            }
        }
    }

    /// Imports an archive: this node's platform of every image in it. Blocking.
    pub fn import(&self, path: &Path) -> Result<Vec<String>, RuntimeError> {
        let shown = path.display().to_string();
        let wrong = |source: ImageError| RuntimeError::Image { image: shown.clone(), source };
        let mut archive = Archive::open(path).map_err(wrong)?;
        let mut ids = Vec::new();
        for image in archive.images().map_err(wrong)? {
            ids.extend(self.import_image(&archive, &image, &shown)?);
            self.keep_archived(&archive, &image);
        }
        Ok(ids)
    }

    fn import_image(
        &self,
        archive: &Archive,
        image: &ArchiveImage,
        shown: &str,
    ) -> Result<Option<String>, RuntimeError> {
        use std::io::Read;
        let wrong = |source: ImageError| RuntimeError::Image { image: shown.to_string(), source };
        let platforms: Vec<Platform> = image.manifests.iter().map(|m| m.platform.clone()).collect();
        let chosen = platform::choose(&self.platform, &platforms).and_then(|i| image.manifests.get(i));
        let Some(chosen) = chosen else {
            let mut table = self.table.lock();
            for name in image.names.iter().map(ToString::to_string) {
                table.foreign.retain(|f| f.name != name);
                table.foreign.push(Foreign { name, platforms: platforms.clone() });
            }
            self.save(&table)?;
            return Ok(None);
        };
        let mut bytes = Vec::new();
        let blob = archive.blob(&chosen.manifest.config.digest).map_err(wrong)?;
        blob.take(manifest::DOCUMENT_MAX_BYTES)
            .read_to_end(&mut bytes)
            .map_err(|e| wrong(ImageError::Invalid(e.to_string())))?;
        let config = ImageConfig::parse(&bytes).map_err(wrong)?;
        let mut record = self.record(&chosen.manifest, &chosen.digest, &config, platforms).map_err(wrong)?;
        record.tags = image.names.iter().map(ToString::to_string).collect();
        record.digests = image.names.iter().map(|n| format!("{}@{}", n.name(), image.digest)).collect();
        for (index, layer) in chosen.manifest.layers.iter().enumerate() {
            let name = &record.layers[index];
            if self.content.has_layer(name) {
                continue;
            }
            let parents: Vec<String> = record.layers[..index].iter().rev().cloned().collect();
            let reader = archive.blob(&layer.digest).map_err(wrong)?;
            let diff_id = &config.diff_ids()[index];
            let size = self.content.unpack_reader(reader, &layer.digest, diff_id, name, &parents);
            record.unpacked_bytes += size.map_err(|e| of_image(shown, e))?;
        }
        self.content.write(&chosen.digest, &chosen.bytes).map_err(failed)?;
        self.content.write(&record.id, &bytes).map_err(|e| of_image(shown, e))?;
        self.add(record).map(Some)
    }
}

fn names(record: &ImageRecord, name: &Reference) -> bool {
    match &name.digest {
        Some(digest) => record.digests.contains(&format!("{}@{digest}", name.name())),
        None => record.tags.contains(&name.to_string()),
    }
}
