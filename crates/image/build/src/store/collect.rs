//! Keeping the store small: what was used last stays, as much as fits.
//!
//! Upstream counterpart: BuildKit's garbage collection policies, reduced to one: least recently used.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

use super::mounts::About;
use super::{ImageRecord, Layer, Record, Store, read_json};
use crate::error::{BuildError, io_error, refused};

const SIZE_MIN_BYTES: u64 = 2 << 30;
const SIZE_MAX_BYTES: u64 = 20 << 30;

/// What a collection removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    pub entries: usize,
    pub size_bytes: u64,
}

/// A record, image or cache mount.
struct Entry {
    path: PathBuf,
    used: SystemTime,
    layers: Vec<Layer>,
    documents: Vec<String>,
    /// Of a cache mount.
    own_bytes: u64,
}

impl Store {
    /// A tenth of the disk, within bounds.
    pub fn default_limit_bytes(&self) -> u64 {
        let disk = rustix::fs::statvfs(&self.folder).map_or(0, |s| s.f_blocks.saturating_mul(s.f_frsize));
        (disk / 10).clamp(SIZE_MIN_BYTES, SIZE_MAX_BYTES)
    }

    /// Removes what was not used for longest, until the rest is at most `limit_bytes`. While another build goes on
    /// nothing is done, or an error when it `must` be.
    pub fn collect(&self, limit_bytes: u64, must: bool) -> Result<Freed, BuildError> {
        // changing a lock lets go of it for a moment: whoever comes in between keeps us from going on
        if flock(&self.lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return match must {
                true => Err(refused("a build is running on this machine; its cache can't be removed now")),
                false => Ok(Freed::default()),
            };
        }
        let freed =
            self.collect_alone(limit_bytes).map_err(io_error("removing old steps of the build cache"));
        let _ = flock(&self.lock, FlockOperation::LockShared);
        freed
    }

    fn collect_alone(&self, limit_bytes: u64) -> std::io::Result<Freed> {
        let mut entries = self.entries()?;
        entries.sort_by_key(|e| std::cmp::Reverse(e.used));
        let (mut freed, mut kept_bytes) = (Freed::default(), 0u64);
        let (mut folders, mut blobs) = (BTreeSet::from(["empty".to_string()]), BTreeSet::new());
        // several entries may share a layer
        let mut gone: BTreeMap<String, u64> = BTreeMap::new();
        for entry in entries {
            let new = entry.layers.iter().filter(|l| !folders.contains(&l.folder));
            let size = entry.own_bytes + new.map(|l| l.size_bytes + l.unpacked_bytes).sum::<u64>();
            if kept_bytes + size > limit_bytes || limit_bytes == 0 {
                freed.entries += 1;
                freed.size_bytes += entry.own_bytes;
                gone.extend(entry.layers.into_iter().map(|l| (l.folder, l.size_bytes + l.unpacked_bytes)));
                remove(&entry.path);
                continue;
            }
            kept_bytes += size;
            blobs.extend(entry.documents.iter().map(|d| d.replace(':', "-")));
            for layer in entry.layers {
                blobs.insert(layer.digest.replace(':', "-"));
                folders.insert(layer.folder);
            }
        }
        gone.retain(|folder, _| !folders.contains(folder));
        freed.size_bytes += gone.values().sum::<u64>();
        for (folder, kept) in [("layers", &folders), ("blobs", &blobs)] {
            for found in fs::read_dir(self.folder.join(folder))?.flatten() {
                if !kept.contains(found.file_name().to_string_lossy().as_ref()) {
                    // out of sight first: half a layer must not be taken for one
                    let away = self.folder.join("work").join(sampan_world::random::suffix(12));
                    if fs::rename(found.path(), &away).is_ok() {
                        remove(&away);
                    }
                }
            }
        }
        Ok(freed)
    }

    fn entries(&self) -> std::io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for kind in ["cache", "images", "mounts"] {
            for found in fs::read_dir(self.folder.join(kind))?.flatten() {
                let path = found.path();
                let noted = if kind == "mounts" { path.join("about.json") } else { path.clone() };
                let used = fs::metadata(&noted).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
                let mut entry = Entry { path, used, layers: vec![], documents: vec![], own_bytes: 0 };
                match kind {
                    "cache" => {
                        let record = read_json::<Record>(&noted);
                        entry.layers = record.and_then(|r| r.layer).into_iter().collect();
                    }
                    "images" => {
                        if let Some(image) = read_json::<ImageRecord>(&noted) {
                            entry.layers = image.layers;
                            entry.documents = vec![image.manifest, image.config];
                        }
                    }
                    _ => entry.own_bytes = read_json::<About>(&noted).unwrap_or_default().size_bytes,
                }
                entries.push(entry);
            }
        }
        Ok(entries)
    }
}

fn remove(path: &std::path::Path) {
    let removed = match path.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "not removed from the build cache");
    }
}
