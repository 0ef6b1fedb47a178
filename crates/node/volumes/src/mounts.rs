//! Mounting for volumes, and taking a pod's folder away without ever deleting through a mount.
//!
//! Upstream counterpart: k8s.io/mount-utils, pkg/volume/util/util.go (UnmountMountPoint), pkg/kubelet/kubelet_volumes.go.
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};

/// The mount points at or below `path`, deepest first.
pub fn below(path: &Path) -> io::Result<Vec<PathBuf>> {
    let info = fs::read_to_string("/proc/self/mountinfo")?;
    let mut found: Vec<PathBuf> = info
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .filter(|point| point.starts_with(path))
        .collect();
    found.reverse();
    found.sort_by_key(|p| std::cmp::Reverse(p.components().count()));
    Ok(found)
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        match rest.get(at + 1..at + 4).and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    Ok(below(path)?.iter().any(|p| p == path))
}

/// A tmpfs at `path`, of at most `size_bytes`.
pub fn tmpfs(path: &Path, size_bytes: Option<i64>) -> io::Result<()> {
    let options = size_bytes.map(|size| format!("size={size}")).unwrap_or_default();
    let options = std::ffi::CString::new(options).map_err(io::Error::other)?;
    mount("tmpfs", path, "tmpfs", MountFlags::NOATIME, options.as_c_str())?;
    // what other namespaces do must not come back through it
    let _ = mount_change(path, MountPropagationFlags::PRIVATE);
    Ok(())
}

pub fn bind(from: &Path, to: &Path) -> io::Result<()> {
    Ok(mount_bind(from, to)?)
}

/// Unmounts all at or below `path`.
pub fn unmount_below(path: &Path) -> io::Result<()> {
    for point in below(path)? {
        match unmount(&point, UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            // a process that outlives its container may hold it: the last one to leave frees it
            Err(rustix::io::Errno::BUSY) => unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Unmounts everything in `path` and removes it. Refuses while something is still mounted.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    unmount_below(path)?;
    if let Some(point) = below(path)?.first() {
        return Err(io::Error::other(format!("{} is still mounted", point.display())));
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn mountinfo_escapes() {
        for (from, to) in [("/a\\040b", "/a b"), ("/a", "/a"), ("/x\\134y", "/x\\y"), ("/x\\", "/x\\")] {
            assert_eq!(super::unescape(from), to);
        }
        assert!(super::is_mount_point(std::path::Path::new("/proc")).unwrap());
    }
}
