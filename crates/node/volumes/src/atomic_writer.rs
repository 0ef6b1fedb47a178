//! Writes a set of files so that readers see all of the old set or all of the new.
//!
//! Upstream counterpart: pkg/volume/util/atomic_writer.go, whose layout this keeps, since containers see it: the files
//! lie in a folder named by time, `..data` is a symbolic link to it, and each first path element of the payload is a
//! link through `..data`. One rename switches from one set to the next. Nothing is synced to disk: a volume is made
//! anew after a power loss.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

const DATA: &str = "..data";
const NEXT: &str = "..data_tmp";

/// One file of a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub content: Vec<u8>,
    pub mode: u32,
    /// Who owns it, where that is not root.
    pub owner: Option<u32>,
}

/// Files by their path in the volume.
pub type Payload = BTreeMap<String, File>;

/// Makes `target` hold just `payload`; `set_owner` is called on the new set before it is shown. Returns whether
/// anything changed.
pub fn write(
    target: &Path,
    payload: &Payload,
    set_owner: impl Fn(&Path) -> io::Result<()>,
) -> io::Result<bool> {
    for path in payload.keys() {
        check_path(path)?;
    }
    let data = target.join(DATA);
    let current = fs::read_link(&data).ok().map(|name| target.join(name));
    if let Some(current) = &current
        && same(current, payload)?
    {
        link_first_elements(target, payload)?;
        return Ok(false);
    }
    let name = folder_name();
    let folder = target.join(&name);
    fs::create_dir(&folder)?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    let written = write_files(&folder, payload).and_then(|()| set_owner(&folder));
    if let Err(error) = written {
        let _ = fs::remove_dir_all(&folder);
        return Err(error);
    }
    let next = target.join(NEXT);
    let _ = fs::remove_file(&next);
    symlink(&name, &next)?;
    fs::rename(&next, &data)?;
    link_first_elements(target, payload)?;
    remove_stale(target, payload, &name)?;
    Ok(true)
}

fn folder_name() -> String {
    let stamp = sampan_world::clock::now().to_string();
    let digits: String = stamp.chars().take(19).map(|c| if c.is_ascii_digit() { c } else { '_' }).collect();
    format!("..{digits}.{}", sampan_world::random::below(4_000_000_000))
}

fn check_path(path: &str) -> io::Result<()> {
    let plain = Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
    if path.is_empty() || !plain || path.starts_with("..") || path.len() > 4096 {
        return Err(io::Error::other(format!("invalid path {path:?}: must be relative and without ..")));
    }
    Ok(())
}

fn write_files(folder: &Path, payload: &Payload) -> io::Result<()> {
    for (path, file) in payload {
        let path = folder.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, &file.content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))?;
        if let Some(owner) = file.owner {
            std::os::unix::fs::chown(&path, Some(owner), None)?;
        }
    }
    Ok(())
}

/// Whether the set in `folder` is the payload, modes apart from what ownership added.
fn same(folder: &Path, payload: &Payload) -> io::Result<bool> {
    let mut there = BTreeSet::new();
    match files_below(folder, folder, &mut there) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    }
    if there.len() != payload.len() {
        return Ok(false);
    }
    for (path, file) in payload {
        let full = folder.join(path);
        if !there.contains(Path::new(path)) || fs::read(&full)? != file.content {
            return Ok(false);
        }
        if fs::metadata(&full)?.permissions().mode() & file.mode != file.mode {
            return Ok(false);
        }
    }
    Ok(true)
}

fn files_below(root: &Path, folder: &Path, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files_below(root, &entry.path(), found)?;
        } else if let Ok(path) = entry.path().strip_prefix(root) {
            found.insert(path.to_path_buf());
        }
    }
    Ok(())
}

fn first_elements(payload: &Payload) -> BTreeSet<String> {
    payload.keys().filter_map(|p| p.split('/').next().map(str::to_string)).collect()
}

fn link_first_elements(target: &Path, payload: &Payload) -> io::Result<()> {
    for name in first_elements(payload) {
        match symlink(Path::new(DATA).join(&name), target.join(&name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Removes links to files that are gone and all sets but the one of that name.
fn remove_stale(target: &Path, payload: &Payload, keep: &str) -> io::Result<()> {
    let wanted = first_elements(payload);
    for entry in fs::read_dir(target)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == keep || name == DATA || wanted.contains(&name) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            if name.starts_with("..") {
                fs::remove_dir_all(entry.path())?;
            }
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str, u32)]) -> Payload {
        let file = |text: &str, mode| File { content: text.into(), mode, owner: None };
        files.iter().map(|(p, t, m)| ((*p).to_string(), file(t, *m))).collect()
    }

    #[test]
    fn switches_sets_and_removes_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let nothing = |_: &Path| Ok(());
        assert!(write(dir.path(), &payload(&[("a", "1", 0o644), ("d/b", "2", 0o400)]), nothing).unwrap());
        assert_eq!(fs::read_to_string(dir.path().join("d/b")).unwrap(), "2");
        assert_eq!(fs::read_link(dir.path().join("a")).unwrap(), Path::new("..data/a"));
        assert_eq!(fs::metadata(dir.path().join("d/b")).unwrap().permissions().mode() & 0o777, 0o400);
        let first = fs::read_link(dir.path().join("..data")).unwrap();
        assert!(!write(dir.path(), &payload(&[("a", "1", 0o644), ("d/b", "2", 0o400)]), nothing).unwrap());
        assert_eq!(
            fs::read_link(dir.path().join("..data")).unwrap(),
            first,
            "nothing changed, nothing written"
        );
        assert!(write(dir.path(), &payload(&[("a", "3", 0o644)]), nothing).unwrap());
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "3");
        assert!(!dir.path().join("d").exists() && !dir.path().join(first).exists());
    }

    #[test]
    fn paths_that_leave_the_volume_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["../x", "/x", "a/../../x", "..x", ""] {
            assert!(write(dir.path(), &payload(&[(path, "", 0o644)]), |_| Ok(())).is_err(), "{path}");
        }
    }

    #[test]
    fn an_empty_payload_still_has_its_data_link() {
        let dir = tempfile::tempdir().unwrap();
        assert!(write(dir.path(), &Payload::new(), |_| Ok(())).unwrap());
        assert!(dir.path().join("..data").exists());
    }
}
