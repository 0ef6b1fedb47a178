//! What of images is kept as it came, so that other nodes can have it from this one.
//!
//! Upstream counterpart: containerd's content store with `discard_unpacked_layers = false`, which spegel wants. What
//! stays true: an image is shared under the names that it has here, and only while it has them; a blob goes with the
//! last image that it belongs to. Of archives all platforms are kept, of pulled images what was pulled.
use std::collections::BTreeMap;
use std::fs::File;

use super::*;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// `registry/repository`
    name: String,
    /// The index or manifest that the tags lead to.
    digest: String,
    /// Whole names, as images carry them.
    tags: Vec<String>,
    /// All that there is of it here, the above among them.
    pub(super) blobs: Vec<String>,
}

/// Adds what is kept now; a tag leads to one thing only.
fn keep(all: &mut Vec<Kept>, new: Kept) {
    unname(all, &new.tags);
    match all.iter_mut().find(|k| k.name == new.name && k.digest == new.digest) {
        Some(same) => {
            same.tags.extend(new.tags);
            same.blobs.extend(new.blobs);
            same.blobs.sort_unstable();
            same.blobs.dedup();
        }
        None => all.push(new),
    }
}

impl Kept {
    pub(super) fn registry(&self) -> &str {
        self.name.split('/').next().unwrap_or("")
    }
}

fn unname(all: &mut [Kept], tags: &[String]) {
    all.iter_mut().for_each(|k| k.tags.retain(|tag| !tags.contains(tag)));
}

impl Table {
    /// These tags lead elsewhere from now on.
    pub(super) fn unname(&mut self, tags: &[String]) {
        unname(&mut self.kept, tags);
    }

    /// Lets go of what no image has the name of any more.
    pub(super) fn release(&mut self) {
        let (images, foreign) = (&self.images, &self.foreign);
        self.kept.retain_mut(|kept| {
            kept.tags.retain(|tag| {
                images.iter().any(|i| i.tags.contains(tag)) || foreign.iter().any(|f| f.name == *tag)
            });
            let digest = format!("{}@{}", kept.name, kept.digest);
            !kept.tags.is_empty() || images.iter().any(|i| i.digests.contains(&digest))
        });
    }

    /// The image `from` is known as `tag` too.
    pub(super) fn keep_as(&mut self, from: &ImageRecord, tag: &Reference) {
        let of_image = |k: &&Kept| {
            k.tags.iter().any(|t| from.tags.contains(t))
                || from.digests.contains(&format!("{}@{}", k.name, k.digest))
        };
        let kept = self.kept.iter().find(of_image).cloned();
        self.unname(&[tag.to_string()]);
        if let Some(kept) = kept {
            keep(&mut self.kept, Kept { name: tag.name(), tags: vec![tag.to_string()], ..kept });
        }
    }
}

impl Images {
    /// Keeps what was pulled; `digests` are those of its documents and layers.
    pub(super) fn keep_pulled(
        &self,
        reference: &Reference,
        top: (&str, &[u8]),
        digests: Vec<String>,
    ) -> Result<(), RuntimeError> {
        if !self.client.is_mirrored(&reference.registry) {
            return Ok(());
        }
        self.content.write(top.0, top.1).map_err(failed)?;
        let tags = if reference.digest.is_none() { vec![reference.to_string()] } else { Vec::new() };
        let blobs = digests.into_iter().filter(|d| self.content.has_blob(d)).collect();
        let mut table = self.table.lock();
        keep(&mut table.kept, Kept { name: reference.name(), digest: top.0.to_string(), tags, blobs });
        self.save(&table)
    }

    /// Keeps all that an archive holds of an image. That this fails is no reason not to run the image. Blocking.
    pub(super) fn keep_archived(&self, archive: &Archive, image: &ArchiveImage) {
        let mirrored = |name: &&Reference| self.client.is_mirrored(&name.registry);
        let names: Vec<&Reference> = image.names.iter().filter(mirrored).collect();
        if let (Some(name), Err(error)) = (names.first(), self.keep_blobs(archive, image, &names)) {
            tracing::warn!(image = %name, %error, "not shared with other nodes");
        }
    }

    fn keep_blobs(
        &self,
        archive: &Archive,
        image: &ArchiveImage,
        names: &[&Reference],
    ) -> Result<(), RuntimeError> {
        if names.is_empty() {
            return Ok(());
        }
        let wrong = |source: ImageError| RuntimeError::Image { image: image.digest.clone(), source };
        let mut blobs = Vec::new();
        let mut documents: BTreeMap<&str, Vec<u8>> =
            image.manifests.iter().map(|m| (m.digest.as_str(), m.bytes.clone())).collect();
        if !documents.contains_key(image.digest.as_str()) {
            documents.insert(&image.digest, archive.read(&image.digest).map_err(wrong)?);
        }
        for (digest, bytes) in documents {
            if !self.content.has_blob(digest) {
                self.content.write(digest, &bytes).map_err(failed)?;
            }
            blobs.push(digest.to_string());
        }
        for descriptor in
            image.manifests.iter().flat_map(|m| m.manifest.layers.iter().chain([&m.manifest.config]))
        {
            let digest = &descriptor.digest;
            if !archive.has(digest) {
                continue;
            }
            if !self.content.has_blob(digest) {
                let reader = archive.blob(digest).map_err(wrong)?;
                self.content.write_from(digest, reader).map_err(failed)?;
            }
            blobs.push(digest.clone());
        }
        let mut table = self.table.lock();
        for name in names {
            let (digest, tags) = (image.digest.clone(), vec![name.to_string()]);
            keep(&mut table.kept, Kept { name: name.name(), digest, tags, blobs: blobs.clone() });
        }
        self.save(&table)
    }

    /// A manifest or an index of `registry/repository` that another node may have, by tag or digest.
    pub fn shared_manifest(&self, registry: &str, repository: &str, reference: &str) -> Option<Vec<u8>> {
        let name = format!("{registry}/{repository}");
        let digest = {
            let table = self.table.lock();
            let mut of_name = table.kept.iter().filter(|k| k.name == name);
            match reference.contains(':') {
                true => {
                    of_name.find(|k| k.blobs.iter().any(|b| b == reference)).map(|_| reference.to_string())
                }
                false => {
                    let tag = format!("{name}:{reference}");
                    of_name.find(|k| k.tags.contains(&tag)).map(|k| k.digest.clone())
                }
            }
        }?;
        // a layer is no document, whoever asks for it as one
        let (_, size_bytes) = self.content.open_blob(&digest)?;
        (size_bytes <= manifest::DOCUMENT_MAX_BYTES).then(|| self.content.read(&digest)).flatten()
    }

    /// A blob of an image of `registry` that another node may have, and its size.
    pub fn shared_blob(&self, registry: &str, digest: &str) -> Option<(File, u64)> {
        let known = {
            let table = self.table.lock();
            let of_registry = |k: &&Kept| k.name.strip_prefix(registry).is_some_and(|r| r.starts_with('/'));
            table.kept.iter().filter(of_registry).any(|k| k.blobs.iter().any(|b| b == digest))
        };
        known.then(|| self.content.open_blob(digest)).flatten()
    }

    /// What sharing takes of the disk.
    pub fn kept_bytes(&self) -> u64 {
        let mut blobs: Vec<String> =
            self.table.lock().kept.iter().flat_map(|k| k.blobs.iter().cloned()).collect();
        blobs.sort_unstable();
        blobs.dedup();
        blobs.iter().filter_map(|b| Some(self.content.open_blob(b)?.1)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str, tags: &[&str], digests: &[&str]) -> ImageRecord {
        let strings = |all: &[&str]| all.iter().map(ToString::to_string).collect();
        let platform = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
        ImageRecord {
            id: name.into(),
            tags: strings(tags),
            digests: strings(digests),
            manifest: String::new(),
            platform,
            platforms: Vec::new(),
            size_bytes: 0,
            unpacked_bytes: 0,
            layers: Vec::new(),
        }
    }

    fn kept(digest: &str, tags: &[&str], blobs: &[&str]) -> Kept {
        let strings = |all: &[&str]| all.iter().map(ToString::to_string).collect();
        Kept { name: "r.io/x".into(), digest: digest.into(), tags: strings(tags), blobs: strings(blobs) }
    }

    #[test]
    fn tags_lead_to_one_thing_and_nameless_ones_go() {
        let mut table =
            Table { images: vec![image("one", &["r.io/x:1"], &["r.io/x@D1"])], ..Table::default() };
        keep(&mut table.kept, kept("D1", &["r.io/x:1"], &["D1", "L1"]));
        // the tag moves; what it was stays reachable by digest
        keep(&mut table.kept, kept("D2", &["r.io/x:1"], &["D2", "L1"]));
        assert_eq!((table.kept[0].tags.len(), &table.kept[1].tags[..]), (0, &["r.io/x:1".to_string()][..]));
        table.images = vec![image("one", &[], &["r.io/x@D1"]), image("two", &["r.io/x:1"], &["r.io/x@D2"])];
        table.release();
        assert_eq!(table.kept.len(), 2);
        // another platform of the same index, and another name of the same image
        keep(&mut table.kept, kept("D2", &[], &["D2", "L2"]));
        assert_eq!(table.kept[1].blobs, ["D2", "L1", "L2"]);
        let two = table.images[1].clone();
        table.keep_as(&two, &Reference::parse("r.io/y:2").unwrap());
        assert_eq!((table.kept[2].name.as_str(), table.kept[2].digest.as_str()), ("r.io/y", "D2"));
        table.images.remove(0);
        table.release();
        let left: Vec<&str> = table.kept.iter().map(|k| k.digest.as_str()).collect();
        assert_eq!(left, ["D2"], "the other name was given to no image");
        table.images.clear();
        table.foreign.push(Foreign { name: "r.io/x:1".into(), platforms: Vec::new() });
        table.release();
        assert_eq!(table.kept.len(), 1, "an image for other platforms is shared too");
        table.foreign.clear();
        table.release();
        assert!(table.kept.is_empty());
    }

    /// Shares what is r.io's.
    struct Cluster;
    #[async_trait::async_trait]
    impl sampan_image::Mirror for Cluster {
        fn covers(&self, registry: &str) -> bool {
            registry == "r.io"
        }
        async fn sources(&self, _: &Reference, _: &str) -> Vec<Box<dyn sampan_image::MirrorSource>> {
            Vec::new()
        }
    }

    /// An OCI archive of one image for two platforms; the digests of its index and of the foreign layer.
    fn archive(path: &Path, name: &str) -> (String, String) {
        let mut files: Vec<(String, Vec<u8>)> = Vec::new();
        let mut add = |bytes: Vec<u8>| {
            let digest = manifest::digest(&bytes);
            let size = bytes.len();
            files.push((format!("blobs/{}", digest.replacen(':', "/", 1)), bytes));
            serde_json::json!({"digest": digest, "size": size})
        };
        let (mut manifests, mut last) = (Vec::new(), String::new());
        for architecture in ["amd64", "riscv64"] {
            let mut tar = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_size(architecture.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, "arch", architecture.as_bytes()).unwrap();
            let layer = add(tar.into_inner().unwrap());
            last = layer["digest"].as_str().unwrap().to_string();
            let config = serde_json::json!({"architecture": architecture, "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": [last]}});
            let config = add(config.to_string().into_bytes());
            let document = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer]});
            let mut descriptor = add(document.to_string().into_bytes());
            descriptor["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
            manifests.push(descriptor);
        }
        let index =
            serde_json::json!({"schemaVersion": 2, "mediaType": manifest::OCI_INDEX, "manifests": manifests});
        let mut top = add(index.to_string().into_bytes());
        let digest = top["digest"].as_str().unwrap().to_string();
        top["annotations"] = serde_json::json!({"io.containerd.image.name": name});
        let outer = serde_json::json!({"schemaVersion": 2, "manifests": [top]});
        files.push(("index.json".to_string(), outer.to_string().into_bytes()));
        let mut tar = tar::Builder::new(std::fs::File::create(path).unwrap());
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, bytes.as_slice()).unwrap();
        }
        tar.finish().unwrap();
        (digest, last)
    }

    fn open(folder: &Path, mirror: Option<Arc<dyn sampan_image::Mirror>>) -> Arc<Images> {
        let platform = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
        Images::open(folder, Client::new(Default::default()).with_mirror(mirror), platform).unwrap()
    }

    #[tokio::test]
    async fn all_platforms_of_archives_are_kept_while_they_are_shared() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        let images = open(folder.path(), Some(Arc::new(Cluster)));
        let (top, foreign) = archive(&path, "r.io/x:1");
        let ids = images.import(&path).unwrap();
        let (private, _) = archive(&path, "private.io/x:1");
        images.import(&path).unwrap();
        assert_eq!(top, private, "the same content under two names");
        for (registry, repository, reference, wanted) in [
            ("r.io", "x", "1", true),
            ("r.io", "x", top.as_str(), true),
            ("r.io", "x", "2", false),
            ("r.io", "y", "1", false),
            ("private.io", "x", "1", false),
        ] {
            let found = images.shared_manifest(registry, repository, reference);
            assert_eq!(
                found.map(|b| manifest::digest(&b)),
                wanted.then(|| top.clone()),
                "{registry} {reference}"
            );
        }
        let kept = images.kept_bytes();
        assert!(images.shared_blob("r.io", &foreign).is_some_and(|(_, size)| size > 0 && kept > size));
        assert!(images.shared_blob("private.io", &foreign).is_none());
        // a start later, all is there still
        drop(images);
        let images = open(folder.path(), Some(Arc::new(Cluster)));
        images.collect(&[]);
        assert!(images.shared_blob("r.io", &foreign).is_some());
        images.tag("r.io/x:1", "r.io/y:2").await.unwrap();
        assert!(images.shared_manifest("r.io", "y", "2").is_some());
        // turned off, it makes room, and the image stays
        drop(images);
        let images = open(folder.path(), None);
        images.collect(&[]);
        assert!(images.shared_blob("r.io", &foreign).is_none() && images.kept_bytes() == 0);
        assert_eq!(images.list().len(), 1);
        assert!(images.config(&images.find(&ids[0]).unwrap()).is_some());
    }
}
