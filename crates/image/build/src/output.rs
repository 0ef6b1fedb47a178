//! What a build made: a source of blobs and manifests to push and to export, and plain files.
//!
//! Upstream counterparts: BuildKit's `exporter/containerimage`, `exporter/local` and `exporter/tar`. One platform is a
//! manifest, several are an index over their manifests.
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::BodyExt;
use sampan_image::manifest::{self, Descriptor, OCI_INDEX, OCI_MANIFEST};
use sampan_image::repack::repack;
use sampan_image::source::{FileBody, Source};
use sampan_image::{Body, ImageError, Platform, platform};
use serde_json::json;

use crate::copy::{self, Target};
use crate::dockerignore::Ignore;
use crate::error::{BuildError, io_error};
use crate::overlay;
use crate::rooted::Root;
use crate::select::{Tree, Wanted, select};
use crate::store::{Layer, Scratch, Store};

/// An image of one platform.
pub struct BuiltImage {
    pub platform: Platform,
    pub layers: Vec<Layer>,
    pub config: Bytes,
    pub manifest: Bytes,
    /// Where layers' blobs lie, by digest.
    pub blobs: HashMap<String, PathBuf>,
}

pub struct Built {
    pub images: Vec<BuiltImage>,
    /// The index or manifest that a name leads to.
    pub top: Bytes,
    pub media_type: &'static str,
}

impl Built {
    pub fn new(images: Vec<BuiltImage>, annotations: &BTreeMap<String, String>) -> Built {
        if let [one] = images.as_slice()
            && annotations.is_empty()
        {
            return Built { top: one.manifest.clone(), media_type: OCI_MANIFEST, images };
        }
        let one = |image: &BuiltImage| {
            let p = platform::normalise(&image.platform);
            let mut shown = json!({"architecture": p.architecture, "os": p.os});
            if let Some(variant) = p.variant {
                shown["variant"] = variant.into();
            }
            json!({"mediaType": OCI_MANIFEST, "digest": manifest::digest(&image.manifest),
                "size": image.manifest.len(), "platform": shown})
        };
        let manifests: Vec<_> = images.iter().map(one).collect();
        let mut index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests});
        if !annotations.is_empty() {
            index["annotations"] = json!(annotations);
        }
        Built { top: index.to_string().into_bytes().into(), media_type: OCI_INDEX, images }
    }

    /// Of what the image's name leads to.
    pub fn digest(&self) -> String {
        manifest::digest(&self.top)
    }

    /// The configuration's digest where there is one platform only, as `docker build` prints it.
    pub fn id(&self) -> String {
        match self.images.as_slice() {
            [one] => manifest::digest(&one.config),
            _ => self.digest(),
        }
    }
}

#[async_trait]
impl Source for Built {
    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError> {
        let found = self.images.iter().find(|i| manifest::digest(&i.manifest) == descriptor.digest);
        found.map(|i| i.manifest.clone()).ok_or_else(|| missing(descriptor))
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError> {
        let found = self.images.iter().find(|i| manifest::digest(&i.config) == descriptor.digest);
        found.map(|i| i.config.clone()).ok_or_else(|| missing(descriptor))
    }

    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<Body, ImageError> {
        if let Some(path) = self.images.iter().find_map(|i| i.blobs.get(&blob.digest)) {
            let file =
                File::open(path).map_err(|e| ImageError::Unavailable(format!("{}: {e}", blob.digest)))?;
            return Ok(FileBody { reader: At { file, offset } }.boxed_unsync());
        }
        let mut reader = io::Cursor::new(self.config(blob).await?);
        reader.set_position(offset);
        Ok(FileBody { reader }.boxed_unsync())
    }
}

fn missing(descriptor: &Descriptor) -> ImageError {
    ImageError::NotFound(format!("{} in what was built", descriptor.digest))
}

/// A file read from a place of its own.
struct At {
    file: File,
    offset: u64,
}

impl io::Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

/// Where files go that are wanted as files.
pub enum Exported<'a> {
    /// Into a folder; what is there already stays where nothing takes its place.
    Folder(&'a Path),
    Tar(&'a mut (dyn io::Write + Send)),
}

impl Built {
    /// Writes the images' files: of one platform as they are, of several in a folder each. Blocking, as [`crate::build`].
    pub fn export_files(&self, store: &Store, scratch: &Scratch, to: Exported<'_>) -> Result<(), BuildError> {
        overlay::own_namespace()?;
        let exporting = || io_error("exporting files");
        let staging = scratch.place("files");
        fs::create_dir(&staging).map_err(exporting())?;
        let mut views = Vec::new();
        for image in &self.images {
            let name = platform::format(&image.platform).replace('/', "_");
            let below = if self.images.len() == 1 { staging.clone() } else { staging.join(name) };
            views.push((overlay::view(store, &image.layers, below.clone())?, below));
        }
        match to {
            Exported::Tar(out) => repack(&staging, out).map_err(exporting())?,
            Exported::Folder(folder) => {
                fs::create_dir_all(folder).map_err(io_error(folder.display().to_string()))?;
                let target = Root::open(folder).map_err(exporting())?;
                for (_, below) in &views {
                    let root = Root::open(below).map_err(exporting())?;
                    let name = below.strip_prefix(&staging).unwrap_or(Path::new(""));
                    let destination = format!("/{}", name.display());
                    let tree = Tree { root: &root, ignore: None, is_context: false };
                    let none = Ignore::default();
                    for pick in select(tree, ".", &Wanted { exclude: &none, parents: false })? {
                        let to = Target { root: &target, destination: &destination, owner: None, mode: None };
                        copy::copy(tree, &pick, &to)?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str) -> BuiltImage {
        BuiltImage {
            platform: platform::parse(name).unwrap(),
            layers: vec![],
            config: Bytes::from(name.to_string()),
            manifest: Bytes::from(format!("m {name}")),
            blobs: HashMap::new(),
        }
    }

    #[test]
    fn one_platform_is_a_manifest_several_are_an_index() {
        let none = BTreeMap::new();
        let one = Built::new(vec![image("linux/amd64")], &none);
        assert_eq!((one.media_type, one.id()), (OCI_MANIFEST, manifest::digest(b"linux/amd64")));
        let two = Built::new(vec![image("linux/arm/v7"), image("linux/amd64")], &none);
        let index: serde_json::Value = serde_json::from_slice(&two.top).unwrap();
        assert_eq!(index["manifests"][0]["platform"]["variant"], "v7");
        assert_eq!(index["manifests"][1]["digest"], manifest::digest(b"m linux/amd64"));
        assert_eq!(two.id(), two.digest());
        let said = BTreeMap::from([("a".to_string(), "b".to_string())]);
        assert_eq!(Built::new(vec![image("linux/amd64")], &said).media_type, OCI_INDEX);
    }
}
