//! Files on disk.
//!
//! Upstream counterpart: distribution's filesystem driver; the folder is its `rootdirectory`. Differences: names are
//! synced to disk with their folders, temporary files and folders under removal lie apart in `_sampan` so that a crash
//! leaves nothing between the real ones, and a lock keeps a second process out.
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::stream;
use rustix::fs::{FlockOperation, flock};

use super::{Appender, ByteStream, PIECE_BYTES, Result, Stat, Storage, StorageError, Sync};
use crate::digest::Hasher;

/// Below the root directory, as docker-registry has it.
const BASE: &str = "docker/registry/v2";
const PRIVATE: &str = "_sampan";
/// Documents, links and descriptors; blobs are streamed.
const DOCUMENT_MAX_BYTES: u64 = 16 << 20;
/// A folder may go between making it and putting something into it; then again.
const ATTEMPTS: usize = 8;
/// Written-back early, so that the sync at an upload's end has little left to do.
const WRITE_BACK_BYTES: u64 = 8 << 20;

pub struct Disk {
    base: PathBuf,
    private: PathBuf,
    _lock: Option<File>,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{folder}: {source}")]
    Io { folder: String, source: io::Error },
    #[error("{folder} is in use by another registry process")]
    InUse { folder: String },
}

impl Disk {
    /// Opens the root directory for this process alone, and makes it where it isn't.
    pub fn open(root: &Path) -> std::result::Result<Disk, OpenError> {
        let failed = |source| OpenError::Io { folder: root.display().to_string(), source };
        let base = root.join(BASE);
        let private = base.join(PRIVATE);
        fs::create_dir_all(private.join("tmp")).map_err(failed)?;
        fs::create_dir_all(private.join("trash")).map_err(failed)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(private.join("lock"))
            .map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(OpenError::InUse { folder: root.display().to_string() });
            }
            Err(e) => return Err(failed(e.into())),
        }
        Ok(Disk { base, private, _lock: Some(lock) })
    }

    /// Opens the root directory for reading only: nothing is made, nothing locked.
    pub fn open_read_only(root: &Path) -> std::result::Result<Disk, OpenError> {
        let base = root.join(BASE);
        fs::metadata(root).map_err(|source| OpenError::Io { folder: root.display().to_string(), source })?;
        Ok(Disk { private: base.join(PRIVATE), base, _lock: None })
    }

    fn path(&self, key: &str) -> PathBuf {
        self.base.join(key)
    }

    async fn run<T: Send + 'static>(
        &self,
        key: &str,
        work: impl FnOnce(PathBuf) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let path = self.path(key);
        blocking(key, move || work(path)).await
    }
}

async fn blocking<T: Send + 'static>(
    key: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(io::Error::other(e)));
    done.map_err(|source| StorageError::Io { key: key.to_string(), source })
}

#[async_trait::async_trait]
impl Storage for Disk {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        self.run(key, |path| {
            let Some(file) = or_absent(File::open(&path))? else { return Ok(None) };
            let size = file.metadata()?.len();
            if size > DOCUMENT_MAX_BYTES {
                return Err(io::Error::other(format!("{size} bytes are too many for a document")));
            }
            let mut content = Vec::with_capacity(size as usize);
            io::Read::read_to_end(&mut io::Read::take(&file, DOCUMENT_MAX_BYTES), &mut content)?;
            Ok(Some(content.into()))
        })
        .await
    }

    async fn put(&self, key: &str, content: Bytes, sync: Sync) -> Result<()> {
        let temporary = self.private.join("tmp").join(sampan_world::random::uuid());
        self.run(key, move |path| {
            let written = (|| {
                let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
                file.write_all(&content)?;
                if sync == Sync::Content {
                    file.sync_data()?;
                }
                place(&temporary, &path, sync != Sync::Lazy)
            })();
            if written.is_err() {
                let _ = fs::remove_file(&temporary);
            }
            written
        })
        .await
    }

    async fn stat(&self, key: &str) -> Result<Option<Stat>> {
        self.run(key, |path| {
            let Some(metadata) = or_absent(fs::metadata(&path))? else { return Ok(None) };
            let since = metadata.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            Ok(Some(Stat {
                size_bytes: metadata.len(),
                modified: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            }))
        })
        .await
    }

    async fn touch(&self, key: &str) -> Result<bool> {
        let now = sampan_world::clock::now().as_second().max(0) as u64;
        self.run(key, move |path| {
            let Some(file) = or_absent(OpenOptions::new().write(true).open(&path))? else { return Ok(false) };
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(now))?;
            // an open file may have lost its name meanwhile
            Ok(or_absent(fs::metadata(&path))?.is_some())
        })
        .await
    }

    async fn list(&self, folder: &str, holding: Option<&str>) -> Result<Vec<String>> {
        let holding = holding.map(str::to_string);
        self.run(folder, move |path| {
            let Some(entries) = or_absent(fs::read_dir(&path))? else { return Ok(Vec::new()) };
            let mut names = Vec::new();
            for entry in entries {
                let Ok(name) = entry?.file_name().into_string() else { continue };
                let held = holding.as_ref().is_none_or(|file| path.join(&name).join(file).is_file());
                if held {
                    names.push(name);
                }
            }
            names.sort_unstable();
            Ok(names)
        })
        .await
    }

    async fn remove(&self, key: &str) -> Result<()> {
        let trash = self.private.join("trash").join(sampan_world::random::uuid());
        self.run(key, move |path| {
            // away at once, whatever it is; what is left to do then disturbs nobody
            match fs::rename(&path, &trash) {
                Ok(()) => discard(&trash),
                Err(e) if is_absent(&e) => Ok(()),
                Err(e) => Err(e),
            }
        })
        .await
    }

    async fn read(&self, key: &str, offset: u64, length: u64) -> Result<ByteStream> {
        let file = Arc::new(self.run(key, File::open).await?);
        Ok(stream_file(file, offset, length))
    }

    async fn create(&self, key: &str) -> Result<()> {
        self.run(key, |path| {
            with_parents(&path, false, || {
                OpenOptions::new().write(true).create_new(true).open(&path).map(drop)
            })
        })
        .await
    }

    async fn append(&self, key: &str) -> Result<Option<Box<dyn Appender>>> {
        let opened = self
            .run(key, |path| {
                let Some(file) = or_absent(OpenOptions::new().write(true).open(&path))? else {
                    return Ok(None);
                };
                let offset = file.metadata()?.len();
                Ok(Some((file, offset)))
            })
            .await?;
        let key = key.to_string();
        Ok(opened.map(|(file, offset)| {
            Box::new(DiskAppender { key, file: Arc::new(file), offset, written_back: offset })
                as Box<dyn Appender>
        }))
    }

    async fn publish(&self, upload: &str, to: &str) -> Result<()> {
        let to = self.path(to);
        self.run(upload, move |from| {
            File::open(&from)?.sync_data()?;
            place(&from, &to, true)
        })
        .await
    }

    async fn sweep(&self) -> Result<u64> {
        let (private, base) = (self.private.clone(), self.base.clone());
        blocking(PRIVATE, move || {
            let mut removed = 0;
            // A temporary file lives for the length of one write; the lock keeps other processes out.
            for folder in ["tmp", "trash"] {
                for entry in fs::read_dir(private.join(folder))? {
                    let entry = entry?;
                    let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| {
                        let now = sampan_world::clock::now().as_second().max(0) as u64;
                        (SystemTime::UNIX_EPOCH + Duration::from_secs(now)).duration_since(t).ok()
                    });
                    if age.is_some_and(|age| age > Duration::from_secs(600)) {
                        discard(&entry.path())?;
                        removed += 1;
                    }
                }
            }
            prune(&base.join(crate::layout::BLOBS), 0)?;
            Ok(removed)
        })
        .await
    }
}

impl Disk {
    /// Removes what an ended process left half-done; for the start, when nothing is under way.
    pub fn recover(&self) -> io::Result<()> {
        for folder in ["tmp", "trash"] {
            for entry in fs::read_dir(self.private.join(folder))? {
                discard(&entry?.path())?;
            }
        }
        Ok(())
    }
}

/// Folders below `blobs` that a crash left empty; the kernel refuses to remove one that isn't.
fn prune(folder: &Path, depth: usize) -> io::Result<()> {
    let Some(entries) = or_absent(fs::read_dir(folder))? else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        if depth < 2 {
            prune(&entry.path(), depth + 1)?;
        }
        if depth > 0 {
            let _ = fs::remove_dir(entry.path());
        }
    }
    Ok(())
}

fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn or_absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

fn discard(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    or_absent(removed).map(drop)
}

/// Renames `from` to `to`, making folders on the way; with `sync` the name is on disk when this returns.
fn place(from: &Path, to: &Path, sync: bool) -> io::Result<()> {
    with_parents(to, sync, || fs::rename(from, to))?;
    if sync {
        sync_folder(to.parent())?;
    }
    Ok(())
}

fn sync_folder(folder: Option<&Path>) -> io::Result<()> {
    match folder {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// Does `work`, which needs the folder of `path`; makes that when it isn't there.
fn with_parents(path: &Path, sync: bool, work: impl Fn() -> io::Result<()>) -> io::Result<()> {
    let parent = path.parent().ok_or_else(|| io::Error::other("a key without a folder"))?;
    for _ in 0..ATTEMPTS {
        match work() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => match make_folder(parent, sync) {
                // one above it went meanwhile, with the last that was in it
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                made => made?,
            },
            done => return done,
        }
    }
    work()
}

fn make_folder(folder: &Path, sync: bool) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let parent = folder.parent().ok_or(e)?;
            make_folder(parent, sync)?;
            match fs::create_dir(folder) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
                made => made?,
            }
        }
        made => made?,
    }
    if sync { sync_folder(folder.parent()) } else { Ok(()) }
}

/// `length` bytes of a file from `offset` on.
pub(crate) fn stream_file(file: Arc<File>, offset: u64, length: u64) -> ByteStream {
    let first = next_piece(&file, offset, length);
    let state = (file, offset, length, first);
    Box::pin(stream::unfold(state, |(file, offset, left, pending)| async move {
        let piece = match pending?.await.unwrap_or_else(|e| Err(io::Error::other(e))) {
            Ok(piece) => piece,
            Err(e) => return Some((Err(e), (file, offset, 0, None))),
        };
        let (offset, left) = (offset + piece.len() as u64, left - piece.len() as u64);
        // the next piece is read while this one goes out
        let pending = next_piece(&file, offset, left);
        Some((Ok(piece), (file, offset, left, pending)))
    }))
}

fn next_piece(
    file: &Arc<File>,
    offset: u64,
    left: u64,
) -> Option<tokio::task::JoinHandle<io::Result<Bytes>>> {
    if left == 0 {
        return None;
    }
    let file = file.clone();
    let size = left.min(PIECE_BYTES as u64) as usize;
    // made here: each of the many threads that read would keep memory of its own for pieces
    let mut piece = Vec::with_capacity(size);
    Some(tokio::task::spawn_blocking(move || {
        let spare = rustix::buffer::spare_capacity(&mut piece);
        let read = rustix::io::pread(&*file, spare, offset)?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than it was"));
        }
        piece.truncate(size);
        Ok(Bytes::from(piece))
    }))
}

struct DiskAppender {
    key: String,
    file: Arc<File>,
    offset: u64,
    written_back: u64,
}

#[async_trait::async_trait]
impl Appender for DiskAppender {
    fn offset(&self) -> u64 {
        self.offset
    }

    async fn write(&mut self, pieces: Vec<Bytes>, mut hasher: Option<Hasher>) -> Result<Option<Hasher>> {
        let (file, mut offset) = (self.file.clone(), self.offset);
        let written_back = self.written_back;
        let (offset, hasher) = blocking(&self.key, move || {
            for piece in pieces {
                file.write_all_at(&piece, offset)?;
                offset += piece.len() as u64;
                if let Some(hasher) = hasher.as_mut() {
                    hasher.update(&piece);
                }
            }
            if offset - written_back >= WRITE_BACK_BYTES {
                let length = std::num::NonZeroU64::new(offset - written_back);
                // advice only: where the kernel takes none, the sync at the end does it all
                let _ = rustix::fs::fadvise(&*file, written_back, length, rustix::fs::Advice::DontNeed);
            }
            Ok((offset, hasher))
        })
        .await?;
        self.offset = offset;
        if offset - written_back >= WRITE_BACK_BYTES {
            self.written_back = offset;
        }
        Ok(hasher)
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn files_come_and_go_whole() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::open(folder.path()).unwrap();
        assert!(matches!(Disk::open(folder.path()), Err(OpenError::InUse { .. })));
        assert_eq!(disk.get("a/b").await.unwrap(), None);
        disk.put("a/b", "one".into(), Sync::Content).await.unwrap();
        disk.put("a/b", "two".into(), Sync::Lazy).await.unwrap();
        assert_eq!(disk.get("a/b").await.unwrap().unwrap(), "two");
        assert_eq!(disk.get("a/b/c").await.unwrap(), None);
        disk.put("t/one/current/link", "x".into(), Sync::Name).await.unwrap();
        fs::create_dir_all(folder.path().join(BASE).join("t/ghost/current")).unwrap();
        assert_eq!(disk.list("t", None).await.unwrap(), ["ghost", "one"]);
        assert_eq!(disk.list("t", Some("current/link")).await.unwrap(), ["one"]);
        disk.remove("t/one").await.unwrap();
        disk.remove("t/one").await.unwrap();
        assert_eq!(disk.stat("t/one/current/link").await.unwrap(), None);
        assert!(!disk.touch("t/one/current/link").await.unwrap());
    }

    #[tokio::test]
    async fn uploads_go_on_where_they_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::open(folder.path()).unwrap();
        disk.create("u/1/data").await.unwrap();
        assert!(disk.append("u/2/data").await.unwrap().is_none());
        let mut first = disk.append("u/1/data").await.unwrap().unwrap();
        first.write(vec!["ab".into(), "c".into()], None).await.unwrap();
        drop(first);
        let mut second = disk.append("u/1/data").await.unwrap().unwrap();
        assert_eq!(second.offset(), 3);
        second.write(vec![Bytes::from(vec![b'x'; PIECE_BYTES])], None).await.unwrap();
        disk.publish("u/1/data", "blobs/sha256/aa/aabb/data").await.unwrap();
        let size = 3 + PIECE_BYTES as u64;
        let read = disk.read("blobs/sha256/aa/aabb/data", 2, size - 2).await.unwrap();
        let pieces: Vec<Bytes> = read.map(|p| p.unwrap()).collect().await;
        assert_eq!(pieces.concat().len() as u64, size - 2);
        assert_eq!(pieces[0][..2], *b"cx");
        assert_eq!(disk.stat("blobs/sha256/aa/aabb/data").await.unwrap().unwrap().size_bytes, size);
    }
}
