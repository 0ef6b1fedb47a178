//! Images in tar archives: OCI layouts (`docker buildx`, `ctr export`, `skopeo`) and `docker save`'s older form.
//!
//! Upstream counterpart: containerd's `images/archive`. The archive stays a file (a compressed one is unpacked into a
//! file without a name), or is a folder with an OCI layout; blobs are read in place. Archives are foreign input: names
//! inside are keys of a table and never become paths.
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use sampan_drivers::runtime::{ImageError, Platform};
use serde::Deserialize;

use crate::manifest::{self, DOCUMENT_MAX_BYTES, Descriptor, Document, ImageConfig, Index, Manifest};
use crate::reference::Reference;

/// More entries than any image archive has.
const ENTRIES_MAX: usize = 1 << 20;
const NESTING_MAX: u32 = 3;
/// A compressed archive may not grow beyond this.
const UNPACKED_MAX_BYTES: u64 = 64 << 30;

pub struct Archive {
    place: Place,
    /// Name in the archive: (offset, size).
    entries: HashMap<String, (u64, u64)>,
    /// Blobs that an old docker archive keeps under other names.
    aliases: HashMap<String, String>,
}

enum Place {
    Tar(File),
    Folder(PathBuf),
}

/// One image of an archive.
#[derive(Debug)]
pub struct ArchiveImage {
    pub names: Vec<Reference>,
    /// The digest of the index or manifest that the name stands for.
    pub digest: String,
    pub manifests: Vec<ArchiveManifest>,
}

#[derive(Debug)]
pub struct ArchiveManifest {
    pub platform: Platform,
    pub digest: String,
    pub bytes: Vec<u8>,
    pub manifest: Manifest,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn invalid(e: impl std::fmt::Display) -> ImageError {
    ImageError::Invalid(format!("image archive: {e}"))
}

impl Archive {
    pub fn open(path: &Path) -> Result<Archive, ImageError> {
        let shown = |e: io::Error| invalid(format!("{}: {e}", path.display()));
        if path.is_dir() {
            let entries = layout_entries(path).map_err(shown)?;
            return Ok(Archive { place: Place::Folder(path.into()), entries, aliases: HashMap::new() });
        }
        let file = plain(File::open(path).map_err(shown)?, path).map_err(shown)?;
        let mut entries = HashMap::new();
        let mut tar = tar::Archive::new(BufReader::new(file.try_clone().map_err(shown)?));
        for entry in tar.entries_with_seek().map_err(shown)? {
            let entry = entry.map_err(shown)?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let name = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_string();
            entries.insert(name, (entry.raw_file_position(), entry.size()));
            if entries.len() > ENTRIES_MAX {
                return Err(invalid("too many entries"));
            }
        }
        Ok(Archive { place: Place::Tar(file), entries, aliases: HashMap::new() })
    }

    /// The images in it, with every platform that the archive really holds.
    pub fn images(&mut self) -> Result<Vec<ArchiveImage>, ImageError> {
        if self.entries.contains_key("index.json") {
            return self.oci_images();
        }
        if self.entries.contains_key("manifest.json") {
            return self.docker_images();
        }
        Err(invalid("neither index.json nor manifest.json in it"))
    }

    /// The bytes of a blob; not verified.
    pub fn blob(&self, digest: &str) -> Result<impl Read + Send + use<>, ImageError> {
        self.blob_from(digest, 0)
    }

    /// The same, from `offset` on.
    pub fn blob_from(&self, digest: &str, offset: u64) -> Result<impl Read + Send + use<>, ImageError> {
        let (file, at, size) = self.entry(&self.blob_name(digest))?;
        let offset = offset.min(size);
        Ok(Region { file, at: at + offset, left: size - offset })
    }

    /// A manifest or configuration, verified.
    pub fn read(&self, digest: &str) -> Result<Vec<u8>, ImageError> {
        self.verified(digest)
    }

    pub fn has(&self, digest: &str) -> bool {
        self.entries.contains_key(&self.blob_name(digest))
    }

    /// A file of the archive: where its bytes begin and how many they are.
    fn entry(&self, name: &str) -> Result<(File, u64, u64), ImageError> {
        let (offset, size) = *self.entries.get(name).ok_or_else(|| invalid(format!("{name} is missing")))?;
        let file = match &self.place {
            Place::Tar(file) => file.try_clone(),
            Place::Folder(folder) => File::open(folder.join(name)),
        };
        Ok((file.map_err(invalid)?, offset, size))
    }

    fn blob_name(&self, digest: &str) -> String {
        self.aliases.get(digest).cloned().unwrap_or_else(|| format!("blobs/{}", digest.replacen(':', "/", 1)))
    }

    fn document(&self, name: &str) -> Result<Vec<u8>, ImageError> {
        let (file, at, size) = self.entry(name)?;
        if size > DOCUMENT_MAX_BYTES {
            return Err(invalid(format!("{name} has {size} bytes")));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        Region { file, at, left: size }.read_to_end(&mut bytes).map_err(invalid)?;
        Ok(bytes)
    }

    fn verified(&self, digest: &str) -> Result<Vec<u8>, ImageError> {
        let bytes = self.document(&self.blob_name(digest))?;
        let got = manifest::digest(&bytes);
        if got != digest {
            return Err(invalid(format!("blob {digest} has digest {got}")));
        }
        Ok(bytes)
    }

    fn oci_images(&self) -> Result<Vec<ArchiveImage>, ImageError> {
        let index: Index = serde_json::from_slice(&self.document("index.json")?).map_err(invalid)?;
        let mut images: Vec<ArchiveImage> = Vec::new();
        for descriptor in &index.manifests {
            let annotation = |k: &str| descriptor.annotations.get(k).map(String::as_str);
            // The OCI annotation is often a bare tag; then it names nothing.
            let name = annotation("io.containerd.image.name")
                .or_else(|| annotation("org.opencontainers.image.ref.name").filter(|n| n.contains('/')));
            let names: Vec<Reference> = name.map(Reference::parse).transpose()?.into_iter().collect();
            if let Some(same) = images.iter_mut().find(|i| i.digest == descriptor.digest) {
                same.names.extend(names);
                continue;
            }
            let mut manifests = Vec::new();
            self.collect(descriptor, 0, &mut manifests)?;
            images.push(ArchiveImage { names, digest: descriptor.digest.clone(), manifests });
        }
        Ok(images)
    }

    /// All manifests below `descriptor` whose blobs are in the archive (exports may hold one platform only).
    fn collect(
        &self,
        descriptor: &Descriptor,
        depth: u32,
        out: &mut Vec<ArchiveManifest>,
    ) -> Result<(), ImageError> {
        if depth >= NESTING_MAX {
            return Err(invalid("indexes nested too deep"));
        }
        if !crate::reference::is_digest(&descriptor.digest) {
            return Err(invalid(format!("unsupported digest {:?}", descriptor.digest)));
        }
        let bytes = self.verified(&descriptor.digest)?;
        match manifest::parse(&descriptor.media_type, &bytes)? {
            Document::Index(index) => {
                for (_, child) in index.images() {
                    if self.entries.contains_key(&self.blob_name(&child.digest)) {
                        self.collect(child, depth + 1, out)?;
                    }
                }
            }
            Document::Manifest(m) => {
                let platform = match &descriptor.platform {
                    Some(p) => p.platform(),
                    None => ImageConfig::parse(&self.verified(&m.config.digest)?)?.platform(),
                };
                out.push(ArchiveManifest { platform, digest: descriptor.digest.clone(), bytes, manifest: m });
            }
        }
        Ok(())
    }

    fn docker_images(&mut self) -> Result<Vec<ArchiveImage>, ImageError> {
        let entries: Vec<DockerEntry> =
            serde_json::from_slice(&self.document("manifest.json")?).map_err(invalid)?;
        let mut images = Vec::new();
        for entry in entries {
            let config_bytes = self.document(&entry.config)?;
            let config = ImageConfig::parse(&config_bytes)?;
            if config.diff_ids().len() != entry.layers.len() {
                return Err(invalid("configuration and manifest.json disagree about the layers"));
            }
            let mut describe = |digest: String, name: &str, media_type: &str| {
                let size = self.entries.get(name).map_or(0, |(_, size)| *size);
                self.aliases.insert(digest.clone(), name.to_string());
                let media_type = media_type.to_string();
                Descriptor { media_type, digest, size, platform: None, annotations: Default::default() }
            };
            let config_digest = manifest::digest(&config_bytes);
            let described =
                describe(config_digest, &entry.config, "application/vnd.docker.container.image.v1+json");
            let layers = config.diff_ids().iter().zip(&entry.layers);
            let layers = layers
                .map(|(id, name)| describe(id.clone(), name, "application/vnd.oci.image.layer.v1.tar"))
                .collect();
            let m = Manifest { config: described, layers };
            let bytes = serde_json::to_vec(&serde_json::json!({
                "schemaVersion": 2, "mediaType": manifest::OCI_MANIFEST, "config": m.config, "layers": m.layers,
            }))
            .map_err(invalid)?;
            let digest = manifest::digest(&bytes);
            let names = entry
                .repo_tags
                .unwrap_or_default()
                .iter()
                .map(|n| Reference::parse(n))
                .collect::<Result<_, _>>()?;
            let one =
                ArchiveManifest { platform: config.platform(), digest: digest.clone(), bytes, manifest: m };
            images.push(ArchiveImage { names, digest, manifests: vec![one] });
        }
        Ok(images)
    }
}

/// The files of an OCI layout's folder: names that listing it gave, so that none leads elsewhere.
fn layout_entries(folder: &Path) -> io::Result<HashMap<String, (u64, u64)>> {
    let mut entries = HashMap::new();
    let mut add = |path: &Path, name: String| -> io::Result<()> {
        let found = std::fs::symlink_metadata(path)?;
        if found.is_file() {
            entries.insert(name, (0, found.len()));
        }
        Ok(())
    };
    add(&folder.join("index.json"), "index.json".into())?;
    for entry in std::fs::read_dir(folder.join("blobs/sha256"))? {
        let entry = entry?;
        add(&entry.path(), format!("blobs/sha256/{}", entry.file_name().to_string_lossy()))?;
    }
    Ok(entries)
}

/// The tar itself: what is compressed is unpacked into a file beside it that has no name and goes with its last user.
fn plain(mut file: File, path: &Path) -> io::Result<File> {
    let mut head = [0; 4];
    let got = file.read(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    let mut reader: Box<dyn Read> = match &head[..got] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(file))),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(
            ruzstd::decoding::StreamingDecoder::new(BufReader::new(file))
                .map_err(|e| io::Error::other(e.to_string()))?,
        ),
        _ => return Ok(file),
    };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut unpacked = nameless(folder)?;
    let copied = io::copy(&mut reader.by_ref().take(UNPACKED_MAX_BYTES), &mut unpacked)?;
    if copied == UNPACKED_MAX_BYTES {
        return Err(io::Error::other(format!("unpacks to more than {UNPACKED_MAX_BYTES} bytes")));
    }
    unpacked.seek(SeekFrom::Start(0))?;
    Ok(unpacked)
}

/// A file that has no name and goes with its last user.
pub(crate) fn nameless(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(folder, flags, Mode::from_raw_mode(0o600))?))
}

/// A part of a file, read with positions of its own.
struct Region {
    file: File,
    at: u64,
    left: u64,
}

impl Read for Region {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt;
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let got = self.file.read_at(&mut buffer[..wanted], self.at)?;
        self.at += got as u64;
        self.left -= got as u64;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_of(files: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut tar = tar::Builder::new(file.reopen().unwrap());
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, *bytes).unwrap();
        }
        tar.finish().unwrap();
        file
    }

    #[test]
    fn old_docker_archives_are_read() {
        let id = manifest::digest(b"layer");
        let config = format!(r#"{{"architecture":"arm","os":"linux","rootfs":{{"diff_ids":["{id}"]}}}}"#);
        let list = br#"[{"Config":"c.json","RepoTags":["x:1"],"Layers":["a/layer.tar"]}]"#;
        let file =
            tar_of(&[("c.json", config.as_bytes()), ("a/layer.tar", b"layer"), ("manifest.json", list)]);
        let mut archive = Archive::open(file.path()).unwrap();
        let images = archive.images().unwrap();
        assert_eq!(images[0].names[0].to_string(), "docker.io/library/x:1");
        assert_eq!(crate::platform::format(&images[0].manifests[0].platform), "linux/arm/v7");
        let mut layer = String::new();
        archive.blob(&id).unwrap().read_to_string(&mut layer).unwrap();
        assert_eq!(layer, "layer");
    }

    #[test]
    fn oci_archives_list_every_platform_and_are_verified() {
        let layer = manifest::digest(b"layer");
        let mut files: Vec<(String, Vec<u8>)> = Vec::new();
        let mut add = |bytes: Vec<u8>| {
            let digest = manifest::digest(&bytes);
            files.push((format!("blobs/{}", digest.replace(':', "/")), bytes));
            digest
        };
        let mut children = Vec::new();
        for arch in ["amd64", "arm64"] {
            let config = add(format!(r#"{{"architecture":"{arch}","os":"linux"}}"#).into_bytes());
            let m = add(format!(
                r#"{{"schemaVersion":2,"config":{{"digest":"{config}"}},"layers":[{{"digest":"{layer}"}}]}}"#
            )
            .into_bytes());
            children
                .push(format!(r#"{{"digest":"{m}","platform":{{"os":"linux","architecture":"{arch}"}}}}"#));
        }
        let index =
            add(format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, children.join(",")).into_bytes());
        let top = format!(
            r#"{{"manifests":[{{"digest":"{index}","annotations":{{"io.containerd.image.name":"r.io/a:b"}}}}]}}"#
        );
        files.push(("index.json".into(), top.into_bytes()));
        let borrowed: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
        let images = Archive::open(tar_of(&borrowed).path()).unwrap().images().unwrap();
        assert_eq!(images[0].names[0].to_string(), "r.io/a:b");
        let platforms: Vec<String> =
            images[0].manifests.iter().map(|m| crate::platform::format(&m.platform)).collect();
        assert_eq!(platforms, ["linux/amd64", "linux/arm64"]);
        // One changed byte in a manifest is noticed.
        let mut forged = files.clone();
        forged[1].1.push(b' ');
        let borrowed: Vec<(&str, &[u8])> = forged.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
        assert!(Archive::open(tar_of(&borrowed).path()).unwrap().images().is_err());
    }
}
