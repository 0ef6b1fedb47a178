//! Gives a volume to the pod's fsGroup. Upstream counterpart: pkg/volume/volume_linux.go.
//!
//! Symbolic links are changed themselves, never what they lead to.
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;

/// Owned by `group` and accessible to it, with set-group-ID folders, from `path` down.
pub fn set(path: &Path, group: Option<i64>, readonly: bool) -> io::Result<()> {
    let Some(group) = group.and_then(|g| u32::try_from(g).ok()) else { return Ok(()) };
    let metadata = fs::symlink_metadata(path)?;
    lchown(path, None, Some(group))?;
    if metadata.is_symlink() {
        return Ok(());
    }
    let mut mode = metadata.mode() & 0o7777 | if readonly { 0o440 } else { 0o660 };
    if metadata.is_dir() {
        mode |= 0o2110;
        for entry in fs::read_dir(path)? {
            set(&entry?.path(), Some(i64::from(group)), readonly)?;
        }
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Whether `path` itself is as [`set`] leaves it, for `fsGroupChangePolicy: OnRootMismatch`.
pub fn is_set(path: &Path, group: Option<i64>) -> bool {
    let Some(group) = group else { return true };
    fs::metadata(path).is_ok_and(|m| i64::from(m.gid()) == group && m.mode() & 0o2770 == 0o2770)
}
