//! Paths below a folder that is somebody's root: a build context, an image's file system.
//!
//! Upstream counterpart: containerd/continuity's `fs.RootPath`. What stays true: nothing opened here lies outside of the
//! root, whatever `..` and symlinks say; names are opened by openat2 with RESOLVE_IN_ROOT, so the kernel decides.
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, openat2, statat};
use rustix::io::Errno;

/// As many symlinks as a path may lead over.
const LINKS_MAX: u32 = 255;

pub struct Root {
    fd: OwnedFd,
}

/// The name of a folder's fd, for calls that know paths only.
pub fn fd_path(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

pub fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub fn is_folder(stat: &Stat) -> bool {
    kind(stat) == FileType::Directory
}

fn here(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

impl Root {
    pub fn open(path: &Path) -> io::Result<Root> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Root { fd: rustix::fs::open(path, flags, Mode::empty())? })
    }

    fn open_at(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let path = path.strip_prefix("/").unwrap_or(path);
        Ok(openat2(&self.fd, here(path), flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    /// What is there, a symlink itself; `None` where nothing is.
    pub fn stat(&self, path: &Path) -> io::Result<Option<Stat>> {
        match self.open_at(path, OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(fd) => Ok(Some(rustix::fs::fstat(&fd)?)),
            Err(e) if is_missing(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// By descriptor only, to be used by [`fd_path`].
    pub fn handle(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open_at(path, OFlags::PATH | OFlags::NOFOLLOW)
    }

    pub fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW)
    }

    pub fn file(&self, path: &Path) -> io::Result<File> {
        // a pipe must not hold the build up
        let fd = self.open_at(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK)?;
        Ok(File::from(fd))
    }

    /// A small file, symlinks followed within the root; `None` where nothing is.
    pub fn read(&self, path: &Path, limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
        let resolved = self.resolve(path, true)?;
        if !self.stat(&resolved)?.is_some_and(|s| kind(&s) == FileType::RegularFile) {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(self.file(&resolved)?, limit_bytes), &mut bytes)?;
        Ok(Some(bytes))
    }

    pub fn read_link(&self, path: &Path) -> io::Result<PathBuf> {
        let fd = self.handle(path)?;
        let target = rustix::fs::readlinkat(&fd, "", Vec::new())?;
        Ok(PathBuf::from(OsStr::from_bytes(target.as_bytes())))
    }

    /// Names in a folder, sorted.
    pub fn names(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let folder = self.folder(path)?;
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&folder)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(OsStr::from_bytes(name).to_os_string());
            }
        }
        names.sort();
        Ok(names)
    }

    /// The path with all symlinks followed within the root, relative to it; what does not exist stays as it is written.
    pub fn resolve(&self, path: &Path, follow_last: bool) -> io::Result<PathBuf> {
        let mut rest: Vec<OsString> = parts(path);
        rest.reverse();
        let (mut found, mut links) = (PathBuf::new(), 0);
        while let Some(part) = rest.pop() {
            if part == ".." {
                found.pop();
                continue;
            }
            let next = found.join(&part);
            let stat = match self.stat(&next) {
                Ok(stat) => stat,
                Err(e) if e.raw_os_error() == Some(Errno::NOTDIR.raw_os_error()) => None,
                Err(e) => return Err(e),
            };
            let is_link = stat.is_some_and(|s| kind(&s) == FileType::Symlink);
            if !is_link || (rest.is_empty() && !follow_last) {
                found = next;
                continue;
            }
            links += 1;
            if links > LINKS_MAX {
                return Err(Errno::LOOP.into());
            }
            let target = self.read_link(&next)?;
            if target.is_absolute() {
                found = PathBuf::new();
            }
            rest.extend(parts(&target).into_iter().rev());
        }
        Ok(found)
    }

    /// The folder that holds a path without symlinks, and the name in it.
    pub fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::other("the root has no name"));
        };
        Ok((self.folder(parent)?, name))
    }
}

pub fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// What is at `name`, a symlink itself.
pub fn stat_at(folder: &OwnedFd, name: &OsStr) -> io::Result<Option<Stat>> {
    match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn parts(path: &Path) -> Vec<OsString> {
    let part = |c: Component<'_>| match c {
        Component::Normal(part) => Some(part.to_os_string()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(part).collect()
}

/// An absolute path without `.` and `..`; `base` is what a relative one is relative to.
pub fn absolute(base: &str, path: &str) -> String {
    let joined = if path.starts_with('/') { path.to_string() } else { format!("{base}/{path}") };
    let mut clean: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                clean.pop();
            }
            part => clean.push(part),
        }
    }
    format!("/{}", clean.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn nothing_leads_out_of_the_root() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("usr/lib")).unwrap();
        std::fs::write(at("usr/lib/a"), "a").unwrap();
        symlink("/usr/lib", at("lib")).unwrap();
        symlink("../../../../etc", at("usr/etc")).unwrap();
        symlink("loop", at("loop")).unwrap();
        symlink("/run/none/resolv.conf", at("dangling")).unwrap();
        let root = Root::open(folder.path()).unwrap();
        for (given, follow, wanted) in [
            ("/lib/a", true, "usr/lib/a"),
            ("lib", false, "lib"),
            ("lib", true, "usr/lib"),
            ("lib/../..//usr/./lib", true, "usr/lib"),
            ("usr/etc/passwd", true, "etc/passwd"),
            ("../../..", true, ""),
            ("dangling", true, "run/none/resolv.conf"),
            ("usr/lib/a/b", true, "usr/lib/a/b"),
        ] {
            assert_eq!(root.resolve(Path::new(given), follow).unwrap(), Path::new(wanted), "{given}");
        }
        assert!(root.resolve(Path::new("loop"), true).is_err());
        assert!(root.stat(Path::new("usr/etc/passwd")).unwrap().is_none());
        assert_eq!(root.read(Path::new("lib/a"), 10).unwrap().unwrap(), b"a");
        assert_eq!(root.names(Path::new("usr")).unwrap(), ["etc", "lib"]);
        assert_eq!(absolute("/a/b", "../c/./d/"), "/a/c/d");
        assert_eq!(absolute("/a", "/../.."), "/");
    }
}
