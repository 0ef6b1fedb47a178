//! subPath mounts that cannot be led out of their volume.
//!
//! Upstream counterpart: pkg/volume/util/subpath/subpath_linux.go. The kernel resolves the path beneath the volume
//! (openat2 with RESOLVE_BENEATH), so no symbolic link that a container left there leads outside, and what was opened
//! is bind-mounted by its descriptor, so that it cannot be swapped afterwards. Kernels without openat2 get a walk that
//! follows no link at all.
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, statat};
use rustix::io::Errno;

/// Opens `subpath` in `volume` (a folder), making folders that are missing.
fn open_beneath(volume: &Path, subpath: &Path) -> io::Result<OwnedFd> {
    let root = openat(CWD, volume, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    match resolve(&root, subpath) {
        Ok(fd) => return Ok(fd),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(escape(error, subpath)),
    }
    let mode = fs::metadata(volume)?.mode() & 0o777 | 0o750;
    let mut made = PathBuf::new();
    for component in subpath.components() {
        let parent = match made.as_os_str().is_empty() {
            true => resolve(&root, Path::new(".")),
            false => resolve(&root, &made),
        }
        .map_err(|e| escape(e, subpath))?;
        let Component::Normal(name) = component else {
            return Err(io::Error::other(format!("{} is not a plain path", subpath.display())));
        };
        match mkdirat(&parent, name, Mode::from_raw_mode(mode)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        made.push(name);
        let fd = resolve(&root, &made).map_err(|e| escape(e, subpath))?;
        if let Ok(stat) = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)
            && stat.st_mode & 0o777 != mode
            && stat.st_nlink == 2
            && made == subpath
        {
            // the process's umask must not take from it
            let _ = fs::set_permissions(by_descriptor(&fd), fs::Permissions::from_mode(mode));
        }
    }
    resolve(&root, subpath).map_err(|e| escape(e, subpath))
}

fn escape(error: Errno, subpath: &Path) -> io::Error {
    match error {
        Errno::XDEV | Errno::LOOP => {
            io::Error::other(format!("subpath {} leads out of its volume", subpath.display()))
        }
        error => error.into(),
    }
}

fn resolve(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match openat2(root, path, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS) {
        Err(Errno::NOSYS | Errno::PERM) => {}
        other => return other,
    }
    let mut at = openat(root, ".", flags | OFlags::DIRECTORY, Mode::empty())?;
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(name) => {
                let next = openat(&at, name, flags | OFlags::NOFOLLOW, Mode::empty())?;
                if statat(&next, "", AtFlags::EMPTY_PATH)?.st_mode & 0o170_000 == 0o120_000 {
                    return Err(Errno::LOOP);
                }
                at = next;
            }
            _ => return Err(Errno::XDEV),
        }
    }
    Ok(at)
}

fn by_descriptor(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Bind-mounts `subpath` of `volume` to `target`, which is made, and returns it. Safe to repeat: what a former container
/// had there is replaced.
pub fn prepare(volume: &Path, subpath: &str, target: &Path) -> io::Result<PathBuf> {
    let subpath = Path::new(subpath);
    if subpath.is_absolute() || subpath.components().any(|c| matches!(c, Component::ParentDir)) {
        return Err(io::Error::other(format!(
            "subPath {} must be relative and without ..",
            subpath.display()
        )));
    }
    let fd = open_beneath(volume, subpath)?;
    crate::mounts::unmount_below(target)?;
    let is_dir = fs::metadata(by_descriptor(&fd))?.is_dir();
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    if target.exists() && target.is_dir() != is_dir {
        if target.is_dir() { fs::remove_dir(target)? } else { fs::remove_file(target)? }
    }
    if is_dir {
        fs::create_dir_all(target)?;
    } else {
        fs::OpenOptions::new().create(true).append(true).open(target)?;
    }
    crate::mounts::bind(&by_descriptor(&fd), target)?;
    Ok(target.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_beneath_its_volume() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        fs::create_dir_all(volume.join("sub/real")).unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink("../secret", volume.join("up")).unwrap();
        std::os::unix::fs::symlink("/etc", volume.join("absolute")).unwrap();
        std::os::unix::fs::symlink("sub/real", volume.join("inside")).unwrap();
        let cases = [
            ("sub", true),
            ("new/deep/folder", true),
            ("inside", true),
            ("up", false),
            ("absolute", false),
            ("absolute/x", false),
        ];
        for (path, ok) in cases {
            assert_eq!(open_beneath(&volume, Path::new(path)).is_ok(), ok, "{path}");
        }
        assert!(volume.join("new/deep/folder").is_dir());
        assert!(prepare(&volume, "../x", &dir.path().join("t")).is_err());
        assert!(prepare(&volume, "/x", &dir.path().join("t")).is_err());
    }
}
