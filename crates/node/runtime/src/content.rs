//! Blobs and layers on disk.
//!
//! Upstream counterparts: containerd's content store and overlayfs snapshotter. What stays true: a file under `blobs/`
//! has the digest of its name, and a folder under `layers/` is whole: both come there by rename, after they were
//! synced. Whatever a kill or a full disk leaves behind lies under `ingest/`; blobs there are resumed, layers removed.
//! Deliberate difference: a layer's compressed blob is dropped once it is unpacked, since small machines have small
//! disks, unless it is kept for other nodes ([`Content::unpack_layer`]).
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sampan_image::client::Sink;
use sampan_image::manifest::hex_digest;
use sha2::{Digest, Sha256};

mod unpack;
pub use unpack::{Limits, UnpackError, Unpacked, unpack};

/// In the names of blobs on their way out of an archive: they are begun anew.
const IMPORTED: &str = ".import-";

#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    #[error("blob {digest}: its bytes have digest {got}")]
    Digest { digest: String, got: String },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("layer {digest}: {source}")]
    Unpack { digest: String, source: UnpackError },
}

impl ContentError {
    pub fn is_no_space(&self) -> bool {
        let full = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
        match self {
            ContentError::Io { source, .. } => full(source),
            ContentError::Unpack { source: UnpackError::Io(e), .. } => full(e),
            ContentError::Unpack { source: UnpackError::NoSpace, .. } => true,
            _ => false,
        }
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ContentError {
    let what = what.into();
    |source| ContentError::Io { what, source }
}

pub struct Content {
    folder: PathBuf,
}

/// A blob on its way; kept for the next try when dropped.
pub struct Ingest {
    file: File,
    path: PathBuf,
    written: u64,
    hash: Sha256,
}

impl Content {
    pub fn open(folder: &Path) -> Result<Content, ContentError> {
        for name in ["blobs", "layers", "ingest"] {
            let path = folder.join(name);
            fs::create_dir_all(&path).map_err(io_error(path.display().to_string()))?;
        }
        let content = Content { folder: folder.to_path_buf() };
        for entry in fs::read_dir(folder.join("ingest")).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                let _ = fs::remove_dir_all(entry.path());
            } else if entry.file_name().to_string_lossy().contains(IMPORTED) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(content)
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.folder.join("blobs").join(digest.replace(':', "-"))
    }

    pub fn layers_folder(&self) -> PathBuf {
        self.folder.join("layers")
    }

    /// A small blob: manifests, configurations. Verified again, since disks of small machines lie.
    pub fn read(&self, digest: &str) -> Option<Vec<u8>> {
        let bytes = fs::read(self.blob_path(digest)).ok()?;
        (sampan_image::manifest::digest(&bytes) == digest).then_some(bytes)
    }

    /// A blob's file and size.
    pub fn open_blob(&self, digest: &str) -> Option<(File, u64)> {
        let file = File::open(self.blob_path(digest)).ok()?;
        let size_bytes = file.metadata().ok().filter(fs::Metadata::is_file)?.len();
        Some((file, size_bytes))
    }

    pub fn has_blob(&self, digest: &str) -> bool {
        self.blob_path(digest).is_file()
    }

    /// Keeps a blob of any size. Blocking.
    pub fn write_from(&self, digest: &str, mut reader: impl Read) -> Result<(), ContentError> {
        let name = format!("{}{IMPORTED}{}", digest.replace(':', "-"), sampan_world::random::suffix(6));
        let path = self.folder.join("ingest").join(name);
        let copied = (|| {
            let (mut file, mut hash) = (File::create_new(&path)?, Sha256::new());
            let mut piece = vec![0; 64 * 1024];
            loop {
                match reader.read(&mut piece)? {
                    0 => break,
                    n => {
                        hash.update(&piece[..n]);
                        file.write_all(&piece[..n])?;
                    }
                }
            }
            file.sync_all()?;
            Ok(hex_digest(&hash.finalize()))
        })();
        let kept = match copied {
            Err(e) => Err(io_error(format!("blob {digest}"))(e)),
            Ok(got) if got != digest => Err(ContentError::Digest { digest: digest.into(), got }),
            Ok(_) => fs::rename(&path, self.blob_path(digest)).map_err(io_error(format!("blob {digest}"))),
        };
        if kept.is_err() {
            let _ = fs::remove_file(&path);
        }
        kept
    }

    pub fn has_layer(&self, name: &str) -> bool {
        self.folder.join("layers").join(name).is_dir()
    }

    pub fn write(&self, digest: &str, bytes: &[u8]) -> Result<(), ContentError> {
        let got = sampan_image::manifest::digest(bytes);
        if got != digest {
            return Err(ContentError::Digest { digest: digest.into(), got });
        }
        sampan_world::files::write_atomic(&self.blob_path(digest), bytes, 0o600)
            .map_err(io_error(format!("writing blob {digest}")))
    }

    /// Begins or resumes a blob.
    pub fn ingest(&self, digest: &str) -> Result<Ingest, ContentError> {
        let path = self.folder.join("ingest").join(digest.replace(':', "-"));
        let failed = || io_error(format!("blob {digest}"));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed())?;
        let (mut hash, mut written) = (Sha256::new(), 0);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match file.read(&mut buffer).map_err(failed())? {
                0 => break,
                n => {
                    hash.update(&buffer[..n]);
                    written += n as u64;
                }
            }
        }
        Ok(Ingest { file, path, written, hash })
    }

    /// Unpacks a layer whose compressed bytes are whole in `ingest`; both digests are checked. With `keep` these bytes
    /// stay too, as a blob. Blocking.
    pub fn unpack_layer(
        &self,
        mut ingest: Ingest,
        keep: bool,
        digest: &str,
        diff_id: &str,
        name: &str,
        parents: &[String],
    ) -> Result<u64, ContentError> {
        let got = hex_digest(&ingest.hash.clone().finalize());
        if got != digest {
            ingest.discard();
            return Err(ContentError::Digest { digest: digest.into(), got });
        }
        ingest.file.seek(SeekFrom::Start(0)).map_err(io_error("layer"))?;
        let file = ingest.file.try_clone().map_err(io_error("layer"))?;
        let size = self.unpack_reader(file, digest, diff_id, name, parents);
        if size.is_ok() && keep {
            // it was synced together with the layer
            let kept = fs::rename(&ingest.path, self.blob_path(digest));
            return kept.map_err(io_error(format!("blob {digest}"))).and(size);
        }
        // Whole but broken: the next try begins anew.
        if !matches!(&size, Err(e) if e.is_no_space()) {
            ingest.discard();
        }
        size
    }

    /// Unpacks a layer from a reader into `layers/<name>`. Blocking.
    pub fn unpack_reader(
        &self,
        reader: impl Read,
        digest: &str,
        diff_id: &str,
        name: &str,
        parents: &[String],
    ) -> Result<u64, ContentError> {
        let temporary =
            self.folder.join("ingest").join(format!("{name}.{}", sampan_world::random::suffix(6)));
        let parents: Vec<PathBuf> = parents.iter().map(|p| self.layers_folder().join(p)).collect();
        let unpacked = (|| {
            fs::create_dir_all(&temporary).map_err(io_error("layer"))?;
            let unpacked = unpack(reader, &temporary, &parents, &Limits::default())
                .map_err(|source| ContentError::Unpack { digest: digest.into(), source })?;
            if unpacked.diff_id != diff_id {
                return Err(ContentError::Digest { digest: diff_id.into(), got: unpacked.diff_id });
            }
            let folder = File::open(&temporary).map_err(io_error("layer"))?;
            rustix::fs::syncfs(&folder).map_err(|e| io_error("syncing a layer")(e.into()))?;
            let target = self.layers_folder().join(name);
            match fs::rename(&temporary, &target) {
                // Somebody else was faster.
                Err(_) if target.is_dir() => {}
                other => other.map_err(io_error("layer"))?,
            }
            File::open(self.layers_folder()).and_then(|f| f.sync_all()).map_err(io_error("layers"))?;
            Ok(unpacked.size_bytes)
        })();
        let _ = fs::remove_dir_all(&temporary);
        unpacked
    }

    /// Removes what nothing refers to: blobs by digest, layers by name.
    pub fn collect(&self, blobs: &[String], layers: &[String]) {
        for entry in fs::read_dir(self.folder.join("blobs")).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().replacen('-', ":", 1);
            if !blobs.contains(&name) {
                let _ = fs::remove_file(entry.path());
            }
        }
        for entry in fs::read_dir(self.layers_folder()).into_iter().flatten().flatten() {
            if !layers.iter().any(|l| entry.file_name() == l.as_str()) {
                // First out of sight: half a removed layer must never be found as a whole one.
                let away =
                    self.folder.join("ingest").join(format!("gone.{}", sampan_world::random::suffix(8)));
                if fs::rename(entry.path(), &away).is_ok() {
                    let _ = fs::remove_dir_all(away);
                }
            }
        }
    }
}

impl Ingest {
    fn discard(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Sink for Ingest {
    fn offset(&self) -> u64 {
        self.written
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn digest(&self) -> Option<String> {
        Some(hex_digest(&self.hash.clone().finalize()))
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hash = Sha256::new();
        self.written = 0;
        Ok(())
    }
}
