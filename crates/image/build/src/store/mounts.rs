//! Folders that stay between builds: `RUN --mount=type=cache`.
//!
//! Upstream counterpart: BuildKit's cache mounts. `shared` takes the folder as it is, `locked` waits until nobody else
//! has it, `private` takes another one when somebody has it.
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sampan_image::manifest;
use serde::{Deserialize, Serialize};

use super::{Store, lock_file, read_json, touch};
use crate::dockerfile::Sharing;
use crate::error::BuildError;
use crate::options::Cancel;

/// Private copies of one cache that may be in use at a time.
const PRIVATE_MAX: usize = 64;
const WAIT: std::time::Duration = std::time::Duration::from_millis(200);

/// A cache mount in use; its lock goes with it.
pub struct CacheMount {
    pub data: PathBuf,
    /// Nothing is in it yet.
    pub is_new: bool,
    folder: PathBuf,
    _lock: File,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct About {
    pub id: String,
    pub size_bytes: u64,
}

impl Store {
    pub fn cache_mount(&self, id: &str, sharing: Sharing, cancel: &Cancel) -> Result<CacheMount, BuildError> {
        let key: String =
            manifest::digest(id.as_bytes()).trim_start_matches("sha256:").chars().take(24).collect();
        let failed = |e: io::Error| self.io(format!("opening cache mount {id}"), e);
        let how = match sharing {
            Sharing::Shared => FlockOperation::NonBlockingLockShared,
            Sharing::Private | Sharing::Locked => FlockOperation::NonBlockingLockExclusive,
        };
        let mut number = 0;
        loop {
            let folder = self.folder.join("mounts").join(format!("{key}.{number}"));
            fs::create_dir_all(&folder).map_err(failed)?;
            let lock = lock_file(&folder.join("lock")).map_err(failed)?;
            if flock(&lock, how).is_ok() {
                return self.taken(id, folder, lock).map_err(failed);
            }
            cancel.check()?;
            match sharing {
                Sharing::Private if number + 1 < PRIVATE_MAX => number += 1,
                _ => std::thread::sleep(WAIT),
            }
        }
    }

    fn taken(&self, id: &str, folder: PathBuf, lock: File) -> io::Result<CacheMount> {
        let (data, about) = (folder.join("data"), folder.join("about.json"));
        let is_new = !data.is_dir();
        fs::create_dir_all(&data)?;
        match about.exists() {
            true => touch(&about),
            false => {
                let text = serde_json::to_vec(&About { id: id.into(), size_bytes: 0 })?;
                sampan_world::files::write_atomic(&about, &text, 0o600)?;
            }
        }
        Ok(CacheMount { data, is_new, folder, _lock: lock })
    }
}

impl CacheMount {
    /// Notes how large it became.
    pub fn measure(&self) {
        let about = self.folder.join("about.json");
        let mut noted: About = read_json(&about).unwrap_or_default();
        noted.size_bytes = folder_size_bytes(&self.data, 0);
        if let Ok(bytes) = serde_json::to_vec(&noted) {
            let _ = sampan_world::files::write_atomic(&about, &bytes, 0o600);
        }
    }
}

const DEPTH_MAX: usize = 256;

/// What files of a folder take on disk.
fn folder_size_bytes(folder: &Path, depth: usize) -> u64 {
    use std::os::unix::fs::MetadataExt;
    if depth > DEPTH_MAX {
        return 0;
    }
    let mut size = 0;
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(meta) = entry.metadata() else { continue };
        size += meta.blocks() * 512;
        if meta.is_dir() {
            size += folder_size_bytes(&entry.path(), depth + 1);
        }
    }
    size
}
