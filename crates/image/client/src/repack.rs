//! An unpacked layer back into a tar: what a node hands out of an image that it holds.
//!
//! Upstream counterpart: containerd's `archive.WriteDiff`. The node keeps layers as folders for overlayfs and not the
//! bytes they came as, so the tar made here means the same but has another digest. It is the same for the same folder:
//! entries are sorted, times are whole seconds, access times and user names are left out.
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::BodyExt;
use sampan_drivers::runtime::ImageError;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::archive::nameless;
use crate::manifest::{self, Descriptor, OCI_MANIFEST, hex_digest};
use crate::source::{FileBody, Source};
use crate::transport::Body;

const DEPTH_MAX: usize = 512;
const ATTRIBUTES_MAX_BYTES: usize = 64 * 1024;

/// An image made from a node's layers, to be copied like any other.
pub struct Repacked {
    pub manifest: Bytes,
    config: Bytes,
    layers: HashMap<String, File>,
}

impl Repacked {
    /// Packs `layers`, lowest first; what they weigh is needed in `scratch` as long as this lives. Blocking.
    pub fn new(config: &[u8], layers: &[PathBuf], scratch: &Path) -> io::Result<Repacked> {
        let mut config: Value = serde_json::from_slice(config)?;
        let (mut diff_ids, mut descriptors, mut files) = (Vec::new(), Vec::new(), HashMap::new());
        for folder in layers {
            let packed = Hashing::new(nameless(scratch)?);
            let packed = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
            let mut plain = Hashing::new(packed);
            repack(folder, &mut plain)?;
            let (diff_id, packed) = plain.end();
            let (digest, file) = packed.finish()?.end();
            let size = file.metadata()?.len();
            let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
            descriptors.push(json!({"mediaType": media_type, "digest": digest, "size": size}));
            diff_ids.push(diff_id);
            files.insert(digest, file);
        }
        config["rootfs"] = json!({"type": "layers", "diff_ids": diff_ids});
        let config = Bytes::from(serde_json::to_vec(&config)?);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": manifest::digest(&config),
                "size": config.len(),
            },
            "layers": descriptors,
        });
        Ok(Repacked { manifest: serde_json::to_vec(&manifest)?.into(), config, layers: files })
    }
}

#[async_trait]
impl Source for Repacked {
    async fn manifest(&self, _: &Descriptor) -> Result<Bytes, ImageError> {
        Ok(self.manifest.clone())
    }

    async fn config(&self, _: &Descriptor) -> Result<Bytes, ImageError> {
        Ok(self.config.clone())
    }

    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<Body, ImageError> {
        let missing = || ImageError::NotFound(format!("{} in the image", blob.digest));
        let reader: Box<dyn io::Read + Send + Unpin> = match self.layers.get(&blob.digest) {
            Some(file) => {
                let file = file.try_clone().map_err(|e| ImageError::Unavailable(e.to_string()))?;
                Box::new(Reader { file, at: offset })
            }
            None if blob.digest == manifest::digest(&self.config) => {
                let mut config = io::Cursor::new(self.config.clone());
                config.set_position(offset);
                Box::new(config)
            }
            None => return Err(missing()),
        };
        Ok(FileBody { reader }.boxed_unsync())
    }
}

/// A file read at a position of its own.
struct Reader {
    file: File,
    at: u64,
}

impl io::Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Hashing<W> {
        Hashing { inner, hash: Sha256::new() }
    }

    fn end(self) -> (String, W) {
        (hex_digest(&self.hash.finalize()), self.inner)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes the folder of one layer as a tar. Blocking.
pub fn repack(folder: &Path, out: impl Write) -> io::Result<()> {
    let mut tar = Builder::new(out);
    tar.follow_symlinks(false);
    let mut links = HashMap::new();
    walk(&mut tar, folder, Path::new(""), 0, &mut links)?;
    tar.finish()
}

fn walk<W: Write>(
    tar: &mut Builder<W>,
    root: &Path,
    below: &Path,
    depth: usize,
    links: &mut HashMap<(u64, u64), PathBuf>,
) -> io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(io::Error::other("folders nested too deep"));
    }
    let mut names: Vec<_> = fs::read_dir(root.join(below))?.collect::<io::Result<Vec<_>>>()?;
    names.sort_by_key(fs::DirEntry::file_name);
    for entry in names {
        let (name, path) = (entry.file_name(), below.join(entry.file_name()));
        let full = root.join(&path);
        let meta = fs::symlink_metadata(&full)?;
        let kind = meta.file_type();
        // overlayfs' whiteout
        if kind.is_char_device() && meta.rdev() == 0 {
            let mut hidden = OsStr::new(".wh.").to_os_string();
            hidden.push(&name);
            empty(tar, &below.join(hidden))?;
            continue;
        }
        if !meta.is_dir() && meta.nlink() > 1 {
            if let Some(first) = links.get(&(meta.dev(), meta.ino())) {
                let mut header = header(&meta, EntryType::Link);
                tar.append_link(&mut header, &path, first)?;
                continue;
            }
            links.insert((meta.dev(), meta.ino()), path.clone());
        }
        attributes(tar, &full)?;
        if kind.is_dir() {
            tar.append_data(&mut header(&meta, EntryType::Directory), slashed(&path), io::empty())?;
            if attribute(&full, "trusted.overlay.opaque").as_deref() == Some(b"y") {
                empty(tar, &path.join(".wh..wh..opq"))?;
            }
            walk(tar, root, &path, depth + 1, links)?;
        } else if kind.is_symlink() {
            tar.append_link(&mut header(&meta, EntryType::Symlink), &path, fs::read_link(&full)?)?;
        } else if kind.is_file() {
            let mut header = header(&meta, EntryType::Regular);
            header.set_size(meta.len());
            tar.append_data(&mut header, &path, fs::File::open(&full)?)?;
        } else if kind.is_char_device() || kind.is_block_device() || kind.is_fifo() {
            let kind = match (kind.is_char_device(), kind.is_fifo()) {
                (true, _) => EntryType::Char,
                (_, true) => EntryType::Fifo,
                _ => EntryType::Block,
            };
            let mut header = header(&meta, kind);
            header.set_device_major(rustix::fs::major(meta.rdev()))?;
            header.set_device_minor(rustix::fs::minor(meta.rdev()))?;
            tar.append_data(&mut header, &path, io::empty())?;
        }
    }
    Ok(())
}

fn slashed(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push("/");
    name.into()
}

fn empty<W: Write>(tar: &mut Builder<W>, path: &Path) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(0);
    tar.append_data(&mut header, path, io::empty())
}

fn header(meta: &Metadata, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(meta.mode() & 0o7777);
    header.set_uid(u64::from(meta.uid()));
    header.set_gid(u64::from(meta.gid()));
    header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
    header.set_size(0);
    header
}

/// Extended attributes but overlayfs' own, as the entry's extension.
fn attributes<W: Write>(tar: &mut Builder<W>, path: &Path) -> io::Result<()> {
    let mut names = vec![0; ATTRIBUTES_MAX_BYTES];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(e.into()),
    };
    let mut found: Vec<(String, Vec<u8>)> = Vec::new();
    for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let Ok(name) = std::str::from_utf8(name) else { continue };
        // The machine's own labels are not the image's.
        if name.starts_with("trusted.overlay.") || name == "security.selinux" {
            continue;
        }
        if let Some(value) = attribute(path, name) {
            found.push((format!("SCHILY.xattr.{name}"), value));
        }
    }
    found.sort();
    if found.is_empty() {
        return Ok(());
    }
    tar.append_pax_extensions(found.iter().map(|(k, v)| (k.as_str(), v.as_slice())))
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; ATTRIBUTES_MAX_BYTES];
    let length = rustix::fs::lgetxattr(path, name, &mut value[..]).ok()?;
    value.truncate(length);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_layer_comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("usr/bin")).unwrap();
        fs::write(at("usr/bin/a"), "program").unwrap();
        fs::hard_link(at("usr/bin/a"), at("usr/bin/b")).unwrap();
        std::os::unix::fs::symlink("usr/bin", at("bin")).unwrap();
        let long = "x".repeat(180);
        fs::write(at(&long), "").unwrap();
        let mut first = Vec::new();
        repack(folder.path(), &mut first).unwrap();
        let mut second = Vec::new();
        repack(folder.path(), &mut second).unwrap();
        assert!(first == second);
        let mut archive = tar::Archive::new(first.as_slice());
        let mut seen = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let link = entry.link_name().unwrap().map(|l| l.display().to_string()).unwrap_or_default();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            seen.push(format!("{name} {link} {text}"));
        }
        let long = format!("{long}  ");
        assert_eq!(
            seen,
            [
                "bin usr/bin ",
                "usr/  ",
                "usr/bin/  ",
                "usr/bin/a  program",
                "usr/bin/b usr/bin/a ",
                long.as_str()
            ]
        );
    }
}
