//! Base images: found in the store, pulled from their registry, or taken from this machine's node.
//!
//! Upstream counterpart: BuildKit's `source/containerimage`. What was built here under a name is taken for it before the
//! registry is asked, unless `--pull`; a registry that can't be reached is done without when an earlier pull is here;
//! what a registry hasn't got may be on the node. Deliberate difference: a base of another architecture than asked for
//! is an error, also when it is the only one.
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::BodyExt;
use sampan_image::archive::Archive;
use sampan_image::client::{FetchError, Resolved, Sink};
use sampan_image::manifest::{Descriptor, Document, ImageConfig, Manifest};
use sampan_image::source::Source;
use sampan_image::{Client, ImageError, Platform, Reference, platform};
use tokio::runtime::Handle;

use crate::error::{BuildError, io_error};
use crate::image::Image;
use crate::options::{Cancel, LocalImages};
use crate::progress::{Reporter, Task};
use crate::store::{Blob, ImageRecord, Layer, Scratch, Store, folder_name};

/// Layers on their way at a time.
const AT_ONCE: usize = 3;

pub struct Base {
    pub image: Image,
    pub layers: Vec<Layer>,
    /// With the digest of its manifest.
    pub name: String,
}

/// What a registry answered for a name, or an archive holds.
struct Found {
    digest: String,
    bytes: Bytes,
    manifest: Manifest,
}

enum From<'a> {
    Registry(&'a Client, &'a Reference),
    Archive(&'a Archive),
}

impl From<'_> {
    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError> {
        match self {
            From::Registry(client, name) => client.small_blob(name, descriptor, &[]).await,
            From::Archive(archive) => archive.config(descriptor).await,
        }
    }

    async fn blob(&self, descriptor: &Descriptor, mut into: Blob) -> Result<Blob, FetchError> {
        match self {
            From::Registry(client, name) => client.blob(name, descriptor, &[], &mut into).await?,
            From::Archive(archive) => {
                let mut body = archive.open(descriptor, 0).await?;
                while let Some(frame) = body.frame().await {
                    if let Some(data) = frame?.data_ref() {
                        Sink::write(&mut into, data)?;
                    }
                }
            }
        }
        if into.digest() != descriptor.digest {
            let got = into.digest();
            let message = format!("blob {}: its bytes have digest {got}", descriptor.digest);
            return Err(ImageError::Invalid(message).into());
        }
        Ok(into)
    }
}

pub struct Bases<'a> {
    pub store: &'a Store,
    pub scratch: &'a Scratch,
    pub client: &'a Client,
    pub local: Option<&'a dyn LocalImages>,
    pub runtime: Handle,
    pub pull: bool,
    pub reporter: Reporter,
    pub cancel: &'a Cancel,
    pub known: HashMap<(String, String), Arc<Base>>,
}

impl Bases<'_> {
    /// The image of that name for that platform; `shown` is what the step is called.
    pub fn get(&mut self, name: &str, wanted: &Platform, shown: &str) -> Result<Arc<Base>, BuildError> {
        let wrong = |source: ImageError| BuildError::Image { name: name.to_string(), source };
        let reference = Reference::parse(name).map_err(wrong)?;
        let key = (reference.to_string(), platform::format(wanted));
        if let Some(known) = self.known.get(&key) {
            return Ok(known.clone());
        }
        let task = self.reporter.begin(&format!("{shown} {reference}"));
        let found = self.find(&reference, wanted, &task);
        match &found {
            Ok(_) => task.done(),
            Err(e) => task.failed(&e.to_string()),
        }
        let base = Arc::new(found?);
        self.known.insert(key, base.clone());
        Ok(base)
    }

    fn find(&self, name: &Reference, wanted: &Platform, task: &Task) -> Result<Base, BuildError> {
        let text = name.to_string();
        let kept = self.store.image(&text, wanted);
        if let Some(built) = kept.as_ref().filter(|k| k.built && !self.pull) {
            task.line("built on this machine");
            return self.load(built, name);
        }
        self.cancel.check()?;
        let wrong = |source: ImageError| BuildError::Image { name: text.clone(), source };
        let asked = self.runtime.block_on(self.resolve(name, wanted));
        let error = match asked {
            Ok(found) => {
                if let Some(same) = kept.filter(|k| k.manifest == found.digest) {
                    return self.load(&same, name);
                }
                return self.take(&From::Registry(self.client, name), name, wanted, &found, task);
            }
            Err(error) => error,
        };
        if self.pull || matches!(error, ImageError::NoPlatform { .. } | ImageError::Invalid(_)) {
            return Err(wrong(error));
        }
        if let (ImageError::Unavailable(why), Some(kept)) = (&error, &kept) {
            self.reporter.warn(&format!(
                "{text}: an earlier pull is used, since the registry can't be reached: {why}"
            ));
            return self.load(kept, name);
        }
        match self.on_node(name, wanted, task)? {
            Some(base) => Ok(base),
            None => Err(wrong(error)),
        }
    }

    fn load(&self, record: &ImageRecord, name: &Reference) -> Result<Base, BuildError> {
        let wrong = |source: ImageError| BuildError::Image { name: name.to_string(), source };
        let lost =
            || ImageError::Invalid("its configuration is lost; build or pull it again with --pull".into());
        let config = self.store.document(&record.config).ok_or_else(lost).map_err(wrong)?;
        let image = Image::from_config(&config, record.layers.len()).map_err(wrong)?;
        let pinned = Reference { digest: Some(record.manifest.clone()), ..name.clone() };
        Ok(Base { image, layers: record.layers.clone(), name: pinned.to_string() })
    }

    /// The manifest for a platform.
    async fn resolve(&self, name: &Reference, wanted: &Platform) -> Result<Found, ImageError> {
        let Resolved { digest, bytes, document, .. } = self.client.resolve(name, &[]).await?;
        match document {
            Document::Manifest(manifest) => Ok(Found { digest, bytes, manifest }),
            Document::Index(index) => {
                let images = index.images();
                let platforms: Vec<Platform> = images.iter().map(|(p, _)| p.clone()).collect();
                let descriptor = images[chosen(wanted, &platforms)?].1;
                let child = self.client.manifest(name, descriptor, &[]).await?;
                match child.document {
                    Document::Manifest(manifest) => {
                        Ok(Found { digest: child.digest, bytes: child.bytes, manifest })
                    }
                    Document::Index(_) => Err(ImageError::Invalid("an index in an index".into())),
                }
            }
        }
    }

    /// An image that only the node here has.
    fn on_node(&self, name: &Reference, wanted: &Platform, task: &Task) -> Result<Option<Base>, BuildError> {
        let Some(local) = self.local else { return Ok(None) };
        let path = self.scratch.place("base.tar");
        let exported = self.runtime.block_on(local.export(name, &path));
        if !exported.map_err(|e| self.store.io(format!("taking {name} from the node"), e))? {
            return Ok(None);
        }
        let wrong = |source: ImageError| BuildError::Image { name: name.to_string(), source };
        let mut archive = Archive::open(&path).map_err(wrong)?;
        let images = archive.images().map_err(wrong)?;
        let manifests: Vec<_> = images.into_iter().flat_map(|i| i.manifests).collect();
        let platforms: Vec<Platform> = manifests.iter().map(|m| m.platform.clone()).collect();
        let found = &manifests[chosen(wanted, &platforms).map_err(wrong)?];
        let found = Found {
            digest: found.digest.clone(),
            bytes: found.bytes.clone().into(),
            manifest: found.manifest.clone(),
        };
        task.line("from this machine's node");
        self.take(&From::Archive(&archive), name, wanted, &found, task).map(Some)
    }

    /// Brings an image into the store.
    fn take(
        &self,
        from: &From<'_>,
        name: &Reference,
        wanted: &Platform,
        found: &Found,
        task: &Task,
    ) -> Result<Base, BuildError> {
        let wrong = |source: ImageError| BuildError::Image { name: name.to_string(), source };
        let config = self.runtime.block_on(from.config(&found.manifest.config)).map_err(wrong)?;
        let parsed = ImageConfig::parse(&config).map_err(wrong)?;
        chosen(wanted, &[parsed.platform()]).map_err(wrong)?;
        let diff_ids = parsed.diff_ids();
        if diff_ids.len() != found.manifest.layers.len() {
            let message = "configuration and manifest disagree about the layers";
            return Err(wrong(ImageError::Invalid(message.into())));
        }
        let layers = self.take_layers(from, name, &found.manifest.layers, diff_ids, task)?;
        let record = ImageRecord {
            name: name.to_string(),
            platform: wanted.clone(),
            built: false,
            manifest: self.store.keep_document(&found.bytes)?,
            config: self.store.keep_document(&config)?,
            layers,
        };
        self.store.put_image(&record)?;
        self.load(&record, name)
    }

    fn take_layers(
        &self,
        from: &From<'_>,
        name: &Reference,
        described: &[Descriptor],
        diff_ids: &[String],
        task: &Task,
    ) -> Result<Vec<Layer>, BuildError> {
        let mut layers: Vec<Layer> = Vec::new();
        for (descriptor, diff_id) in described.iter().zip(diff_ids) {
            layers.push(Layer {
                folder: folder_name(&layers, diff_id),
                diff_id: diff_id.clone(),
                digest: descriptor.digest.clone(),
                size_bytes: descriptor.size,
                media_type: descriptor.media_type.clone(),
                unpacked_bytes: 0,
            });
        }
        let missing: Vec<usize> =
            (0..layers.len()).filter(|at| !self.store.has_layer(&layers[*at])).collect();
        self.runtime.block_on(async {
            let fetches = missing.iter().map(|at| async move {
                if self.store.has_blob(&described[*at].digest) {
                    return Ok((*at, None));
                }
                let blob = self.scratch.blob()?;
                Ok::<_, FetchError>((*at, Some(from.blob(&described[*at], blob).await?)))
            });
            let mut fetched = futures::stream::iter(fetches).buffered(AT_ONCE);
            while let Some(result) = fetched.next().await {
                self.cancel.check()?;
                let (at, blob) = result.map_err(|e| match e {
                    FetchError::Image(source) => BuildError::Image { name: name.to_string(), source },
                    FetchError::Sink(e) => self.store.io(format!("pulling {name}"), e),
                })?;
                self.unpack(&mut layers, at, blob, name)?;
                task.line(&format!("{} {} bytes", layers[at].digest, layers[at].size_bytes));
            }
            Ok::<(), BuildError>(())
        })?;
        Ok(layers)
    }

    fn unpack(
        &self,
        layers: &mut [Layer],
        at: usize,
        blob: Option<Blob>,
        name: &Reference,
    ) -> Result<(), BuildError> {
        let layer = &layers[at];
        let path = blob.map_or_else(|| self.store.blob_path(&layer.digest), |b| b.path);
        let target = self.scratch.place("layer");
        std::fs::create_dir_all(&target).map_err(io_error("unpacking a layer"))?;
        let parents: Vec<_> =
            layers[..at].iter().rev().map(|l| self.store.layers_folder().join(&l.folder)).collect();
        let file = File::open(&path).map_err(io_error("opening a layer"))?;
        let unpacked = sampan_runtime::unpack(file, &target, &parents, &sampan_runtime::Limits::default());
        let unpacked = unpacked.map_err(|e| match e {
            sampan_runtime::UnpackError::NoSpace => {
                self.store.io(format!("unpacking {name}"), rustix::io::Errno::NOSPC.into())
            }
            sampan_runtime::UnpackError::Io(e) if crate::error::is_full(&e) => {
                self.store.io(format!("unpacking {name}"), e)
            }
            other => invalid(name, format!("layer {}: {other}", layer.digest)),
        })?;
        if unpacked.diff_id != layer.diff_id {
            let message =
                format!("layer {} unpacks to {}, not {}", layer.digest, unpacked.diff_id, layer.diff_id);
            return Err(invalid(name, message));
        }
        layers[at].unpacked_bytes = unpacked.size_bytes;
        self.store.keep_layer(&layers[at], &path, &target)
    }
}

fn invalid(name: &Reference, message: String) -> BuildError {
    BuildError::Image { name: name.to_string(), source: ImageError::Invalid(message) }
}

/// Which of the platforms is the one asked for: of the same architecture, the best of its variants.
fn chosen(wanted: &Platform, offered: &[Platform]) -> Result<usize, ImageError> {
    let same = |p: &Platform| platform::normalise(p).architecture == platform::normalise(wanted).architecture;
    let ranked = offered.iter().enumerate().filter(|(_, p)| same(p));
    let best = ranked.filter_map(|(at, p)| Some((platform::rank(wanted, p)?, at))).min();
    best.map(|(_, at)| at).ok_or_else(|| ImageError::NoPlatform {
        wanted: platform::format(wanted),
        available: platform::list(offered),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_architecture_only() {
        let parse = |names: &[&str]| names.iter().map(|n| platform::parse(n).unwrap()).collect::<Vec<_>>();
        let offered = parse(&["linux/amd64", "linux/arm/v6", "linux/arm/v7"]);
        for (wanted, at) in [
            ("linux/amd64", Some(0)),
            ("linux/arm/v7", Some(2)),
            ("linux/arm/v6", Some(1)),
            ("linux/arm64", None),
        ] {
            assert_eq!(chosen(&platform::parse(wanted).unwrap(), &offered).ok(), at, "{wanted}");
        }
    }
}
