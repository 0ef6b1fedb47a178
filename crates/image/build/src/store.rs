//! What builds keep on disk: layers, both packed and unpacked, the cache of steps, images by name, cache mounts.
//!
//! Upstream counterparts: BuildKit's content store, snapshotter and cache manager in one. A folder below `layers` and a
//! file below `blobs` is whole: both come there by rename, after they were synced. What stays true: only records lead to
//! layers, so a layer without a record is rubbish and a record whose layer is gone is none. Builds share the store, each
//! with a shared lock; what removes things takes the lock alone. A build's own folder below `work` is locked while the
//! build lives, so the next one knows which are left over from builds that were killed.
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sampan_image::Platform;
use sampan_image::client::Sink;
use sampan_image::manifest::{self, hex_digest};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{BuildError, io_error, is_full};

mod collect;
mod mounts;

pub use collect::Freed;
pub use mounts::CacheMount;

/// Steps' control groups begin here, unless the caller says otherwise.
pub const CGROUP_ROOT: &str = "sampan-build";
const FOLDERS: [&str; 7] = ["layers", "layers/empty", "blobs", "cache", "images", "mounts", "work"];
/// Less than this is nothing left.
const FULL_BYTES: u64 = 128 * 1024;
pub const GZIP_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layer, packed and unpacked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Of the plain tar.
    pub diff_id: String,
    /// Of the blob.
    pub digest: String,
    pub size_bytes: u64,
    pub media_type: String,
    /// Below `layers`: its content may depend on the layers below it, so its name does.
    pub folder: String,
    pub unpacked_bytes: u64,
}

/// What a step made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// `None` when it changed no file.
    pub layer: Option<Layer>,
    pub created: String,
}

/// An image that was pulled or built.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImageRecord {
    pub name: String,
    pub platform: Platform,
    /// Made here, and perhaps nowhere else.
    pub built: bool,
    pub manifest: String,
    pub config: String,
    pub layers: Vec<Layer>,
}

pub struct Store {
    folder: PathBuf,
    lock: File,
}

/// The name of a stack of layers: it says everything about the files in it.
pub fn chain(layers: &[Layer]) -> String {
    let mut chain = String::from("scratch");
    for layer in layers {
        chain = manifest::digest(format!("{chain} {}", layer.diff_id).as_bytes());
    }
    chain
}

/// Where a layer of `diff_id` over `below` lies.
pub fn folder_name(below: &[Layer], diff_id: &str) -> String {
    let chain = manifest::digest(format!("{} {diff_id}", chain(below)).as_bytes());
    chain.trim_start_matches("sha256:").chars().take(24).collect()
}

fn lock_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).open(path)
}

impl Store {
    /// Opens the store below `folder`, and clears away what killed builds left.
    pub fn open(folder: &Path, cgroup_root: &str) -> Result<Store, BuildError> {
        let opening = || io_error(format!("opening the build store {}", folder.display()));
        for name in FOLDERS {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(if name == "layers/empty" { 0o755 } else { 0o700 });
            builder.create(folder.join(name)).map_err(opening())?;
        }
        // steps have other working directories
        let folder = &folder.canonicalize().map_err(opening())?;
        let lock = lock_file(&folder.join("lock")).map_err(opening())?;
        flock(&lock, FlockOperation::LockShared).map_err(|e| opening()(e.into()))?;
        let store = Store { folder: folder.to_path_buf(), lock };
        store.clear_work(cgroup_root).map_err(opening())?;
        Ok(store)
    }

    /// Only one at a time makes or clears folders below `work`.
    fn work_guard(&self) -> io::Result<File> {
        let guard = lock_file(&self.folder.join("work.lock"))?;
        flock(&guard, FlockOperation::LockExclusive)?;
        Ok(guard)
    }

    fn clear_work(&self, cgroup_root: &str) -> io::Result<()> {
        let _guard = self.work_guard()?;
        for entry in fs::read_dir(self.folder.join("work"))?.flatten() {
            let path = entry.path();
            if let Ok(lock) = File::open(path.join("lock"))
                && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err()
            {
                continue;
            }
            sampan_runtime::remove_step_groups(cgroup_root, &entry.file_name().to_string_lossy());
            if let Err(error) = fs::remove_dir_all(&path) {
                tracing::warn!(folder = %path.display(), %error, "left over from a build, and not removed");
            }
        }
        Ok(())
    }

    /// A folder for one build; it goes with its value, or with the next build when this one is killed.
    pub fn scratch(&self) -> Result<Scratch, BuildError> {
        let making = || io_error("making a folder for the build");
        let _guard = self.work_guard().map_err(making())?;
        let id = sampan_world::random::suffix(10);
        let path = self.folder.join("work").join(&id);
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(making())?;
        let lock = lock_file(&path.join("lock")).map_err(making())?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| making()(e.into()))?;
        Ok(Scratch { id, path, next: std::sync::atomic::AtomicU64::new(0), _lock: lock })
    }

    pub fn layers_folder(&self) -> PathBuf {
        self.folder.join("layers")
    }

    pub fn has_layer(&self, layer: &Layer) -> bool {
        self.layers_folder().join(&layer.folder).is_dir() && self.blob_path(&layer.digest).is_file()
    }

    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.folder.join("blobs").join(digest.replace(':', "-"))
    }

    pub fn has_blob(&self, digest: &str) -> bool {
        self.blob_path(digest).is_file()
    }

    /// A manifest or configuration, verified.
    pub fn document(&self, digest: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = File::open(self.blob_path(digest)).ok()?;
        file.take(manifest::DOCUMENT_MAX_BYTES).read_to_end(&mut bytes).ok()?;
        (manifest::digest(&bytes) == digest).then_some(bytes)
    }

    pub fn keep_document(&self, bytes: &[u8]) -> Result<String, BuildError> {
        let digest = manifest::digest(bytes);
        if self.document(&digest).is_none() {
            let written = sampan_world::files::write_atomic(&self.blob_path(&digest), bytes, 0o600);
            written.map_err(|e| self.io(format!("keeping {digest}"), e))?;
        }
        Ok(digest)
    }

    /// Moves a layer's blob and folder to where they stay.
    pub fn keep_layer(&self, layer: &Layer, blob: &Path, unpacked: &Path) -> Result<(), BuildError> {
        let kept = (|| {
            let folder = File::open(unpacked)?;
            rustix::fs::syncfs(&folder)?;
            fs::rename(blob, self.blob_path(&layer.digest))?;
            let target = self.layers_folder().join(&layer.folder);
            match fs::rename(unpacked, &target) {
                // somebody was faster
                Err(_) if target.is_dir() => {}
                other => other?,
            }
            File::open(self.layers_folder())?.sync_all()
        })();
        kept.map_err(|e| self.io(format!("keeping layer {}", layer.digest), e))
    }

    /// Whether what failed did so for want of space.
    pub fn is_full(&self) -> bool {
        let stat = rustix::fs::statvfs(&self.folder);
        stat.is_ok_and(|s| {
            s.f_bavail.saturating_mul(s.f_frsize) < FULL_BYTES || (s.f_files > 0 && s.f_favail == 0)
        })
    }

    pub fn io(&self, what: String, error: io::Error) -> BuildError {
        match is_full(&error) {
            true => BuildError::NoSpace { what, place: self.folder.display().to_string() },
            false => BuildError::Io { what, source: error },
        }
    }

    /// What a step made before, if that is still here. Finding it keeps it for longer.
    pub fn record(&self, key: &str) -> Option<Record> {
        let path = self.record_path("cache", key);
        let record: Record = read_json(&path)?;
        if record.layer.as_ref().is_some_and(|l| !self.has_layer(l)) {
            return None;
        }
        touch(&path);
        Some(record)
    }

    pub fn put_record(&self, key: &str, record: &Record) -> Result<(), BuildError> {
        self.write_json(&self.record_path("cache", key), record)
    }

    /// An image of that name for that platform.
    pub fn image(&self, name: &str, platform: &Platform) -> Option<ImageRecord> {
        let path = self.record_path("images", &image_key(name, platform));
        let record: ImageRecord = read_json(&path)?;
        if record.name != name || !record.layers.iter().all(|l| self.has_layer(l)) {
            return None;
        }
        touch(&path);
        Some(record)
    }

    pub fn put_image(&self, record: &ImageRecord) -> Result<(), BuildError> {
        let key = image_key(&record.name, &record.platform);
        self.write_json(&self.record_path("images", &key), record)
    }

    fn record_path(&self, kind: &str, key: &str) -> PathBuf {
        self.folder.join(kind).join(format!("{}.json", key.trim_start_matches("sha256:")))
    }

    fn write_json<T: Serialize>(&self, path: &Path, value: &T) -> Result<(), BuildError> {
        let written = serde_json::to_vec(value).map_err(io::Error::from);
        let written = written.and_then(|bytes| sampan_world::files::write_atomic(path, &bytes, 0o600));
        written.map_err(|e| self.io(format!("writing {}", path.display()), e))
    }
}

fn image_key(name: &str, platform: &Platform) -> String {
    manifest::digest(format!("{name} {}", sampan_image::platform::format(platform)).as_bytes())
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// The time of last use is the file's.
fn touch(path: &Path) {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, utimensat};
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW as _ };
    let times = Timestamps { last_access: now, last_modification: now };
    let _ = utimensat(CWD, path, &times, AtFlags::empty());
}

/// A build's own folder.
pub struct Scratch {
    pub id: String,
    pub path: PathBuf,
    next: std::sync::atomic::AtomicU64,
    _lock: File,
}

impl Scratch {
    /// A path in it that nothing else has.
    pub fn place(&self, what: &str) -> PathBuf {
        let number = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.path.join(format!("{what}-{number}"))
    }

    pub fn blob(&self) -> io::Result<Blob> {
        let path = self.place("blob");
        let file = OpenOptions::new().write(true).read(true).create_new(true).open(&path)?;
        Ok(Blob { path, file, written: 0, hash: Sha256::new() })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A blob on its way, digested as it is written.
pub struct Blob {
    pub path: PathBuf,
    file: File,
    written: u64,
    hash: Sha256,
}

impl Blob {
    pub fn digest(&self) -> String {
        hex_digest(&self.hash.clone().finalize())
    }

    pub fn size_bytes(&self) -> u64 {
        self.written
    }
}

impl Write for Blob {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Sink for Blob {
    fn offset(&self) -> u64 {
        self.written
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        io::Seek::seek(&mut self.file, io::SeekFrom::Start(0))?;
        self.hash = Sha256::new();
        self.written = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
