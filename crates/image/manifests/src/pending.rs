//! Lists that are not pushed yet, a file each.
//!
//! Upstream counterpart: docker/cli's `cli/manifest/store`. What stays true: a file is whole (it comes by rename), and
//! two commands at once don't undo each other's changes. Nothing is read from here but what the user asked to be made;
//! images are asked of their registries again whenever they are named.
use std::fs::File;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use sampan_image::Reference;

use crate::{ManifestError, PendingList};

const FILE_MAX_BYTES: u64 = 64 << 20;
const LISTS_MAX: usize = 10_000;

pub struct Store {
    folder: PathBuf,
}

/// While this is held, no other command changes lists.
pub struct Lock {
    _file: Flock<File>,
}

impl Store {
    pub fn new(folder: PathBuf) -> Store {
        Store { folder }
    }

    /// `$SAMPAN_MANIFESTS`, else below the user's state folder.
    pub fn of_user() -> Result<Store, ManifestError> {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let state = variable("XDG_STATE_HOME").or_else(|| Some(variable("HOME")?.join(".local/state")));
        let folder = variable("SAMPAN_MANIFESTS").or_else(|| Some(state?.join("sampan/manifests")));
        folder.map(Store::new).ok_or_else(|| ManifestError::Store {
            path: "$HOME".into(),
            message: "neither HOME, XDG_STATE_HOME nor SAMPAN_MANIFESTS is set".into(),
        })
    }

    fn failed(&self, path: &Path, e: impl std::fmt::Display) -> ManifestError {
        ManifestError::Store { path: path.display().to_string(), message: e.to_string() }
    }

    fn path(&self, name: &Reference) -> PathBuf {
        let digest = sampan_image::manifest::digest(name.to_string().as_bytes());
        self.folder.join(format!("{}.json", &digest[7..39]))
    }

    pub fn lock(&self) -> Result<Lock, ManifestError> {
        let path = self.folder.join("lock");
        std::fs::create_dir_all(&self.folder).map_err(|e| self.failed(&self.folder, e))?;
        let file = File::create(&path).map_err(|e| self.failed(&path, e))?;
        let locked = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| self.failed(&path, e))?;
        Ok(Lock { _file: locked })
    }

    fn read(&self, path: &Path) -> Result<Option<PendingList>, ManifestError> {
        match std::fs::metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(self.failed(path, e)),
            Ok(meta) if meta.len() > FILE_MAX_BYTES => return Err(self.failed(path, "is too large")),
            Ok(_) => {}
        }
        let bytes = std::fs::read(path).map_err(|e| self.failed(path, e))?;
        let list = serde_json::from_slice(&bytes)
            .map_err(|e| self.failed(path, format!("{e}; remove the file and make the list again")))?;
        Ok(Some(list))
    }

    pub fn get(&self, name: &Reference) -> Result<PendingList, ManifestError> {
        let missing = || ManifestError::NotPending { name: name.to_string() };
        self.read(&self.path(name))?.ok_or_else(missing)
    }

    pub fn find(&self, name: &Reference) -> Result<Option<PendingList>, ManifestError> {
        self.read(&self.path(name))
    }

    pub fn save(&self, name: &Reference, list: &PendingList) -> Result<(), ManifestError> {
        let path = self.path(name);
        std::fs::create_dir_all(&self.folder).map_err(|e| self.failed(&self.folder, e))?;
        let bytes = serde_json::to_vec(list).map_err(|e| self.failed(&path, e))?;
        sampan_world::files::write_atomic(&path, &bytes, 0o600).map_err(|e| self.failed(&path, e))
    }

    pub fn remove(&self, name: &Reference) -> Result<(), ManifestError> {
        let path = self.path(name);
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                Err(ManifestError::NotPending { name: name.to_string() })
            }
            Err(e) => Err(self.failed(&path, e)),
        }
    }

    /// All of them, by name.
    pub fn list(&self) -> Result<Vec<PendingList>, ManifestError> {
        let entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(self.failed(&self.folder, e)),
        };
        let mut lists = Vec::new();
        for entry in entries.flatten().take(LISTS_MAX) {
            if entry.path().extension().is_some_and(|e| e == "json") {
                lists.extend(self.read(&entry.path())?);
            }
        }
        lists.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(lists)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::list::tests::member;

    #[test]
    fn lists_are_kept_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("below"));
        let (a, b) = (Reference::parse("r.example/x:a").unwrap(), Reference::parse("r.example/x_a").unwrap());
        assert!(store.list().unwrap().is_empty());
        let _lock = store.lock().unwrap();
        store.save(&a, &PendingList::new(a.to_string(), vec![member("m", "arm")])).unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
        assert_eq!(store.get(&a).unwrap().members[0].name, "m");
        assert_eq!(store.get(&b).unwrap_err().to_string(), "No such manifest: r.example/x_a:latest");
        store.remove(&a).unwrap();
        assert!(store.remove(&a).is_err() && store.find(&a).unwrap().is_none());
    }
}
