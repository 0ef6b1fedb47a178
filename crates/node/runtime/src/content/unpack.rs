//! A layer's tar into a folder that overlayfs can use.
//!
//! Upstream counterpart: containerd's `archive.Apply`. Layers are foreign input: every name is opened below the
//! layer's folder with openat2 (RESOLVE_IN_ROOT, and the last part never followed), so neither `..` nor symlinks nor
//! hard links reach outside; sizes and counts are bounded. `.wh.` files become overlayfs' whiteouts. Folders that a
//! layer implies without describing them get the attributes that the layers below give them.
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::{Mode as NixMode, SFlag, mknodat};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chownat, linkat, mkdirat,
    openat2, symlinkat, unlinkat, utimensat,
};
use sampan_image::manifest::hex_digest;
use sha2::{Digest, Sha256};
use tar::EntryType;

#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("entry {0:?} leads out of the layer")]
    Escape(String),
    #[error("more than {0}")]
    TooMuch(String),
    #[error("entry {name:?}: {message}")]
    Bad { name: String, message: String },
    #[error("no space left on the node")]
    NoSpace,
}

/// What a layer may cost at most.
pub struct Limits {
    pub size_bytes: u64,
    pub entries: u64,
    /// The file system keeps at least this much.
    pub keep_free_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { size_bytes: 64 << 30, entries: 4 << 20, keep_free_bytes: 64 << 20 }
    }
}

#[derive(Debug)]
pub struct Unpacked {
    /// Digest of the uncompressed tar.
    pub diff_id: String,
    pub size_bytes: u64,
}

const XATTRS_MAX_BYTES: usize = 64 * 1024;
const CHECK_SPACE_EVERY_BYTES: u64 = 16 << 20;
const PATH_PARTS_MAX: usize = 256;

/// Reads a plain, gzip or zstd tar. Blocking.
pub fn unpack(
    reader: impl Read,
    target: &Path,
    parents: &[PathBuf],
    limits: &Limits,
) -> Result<Unpacked, UnpackError> {
    let mut reader = BufReader::with_capacity(64 * 1024, reader);
    let head = io::BufRead::fill_buf(&mut reader)?;
    let plain: Box<dyn Read> = match head {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(
            ruzstd::decoding::StreamingDecoder::new(reader).map_err(|e| io::Error::other(e.to_string()))?,
        ),
        _ => Box::new(reader),
    };
    // Twice the files' bytes: a tar of empty files has a header each.
    let bound = limits.size_bytes.saturating_mul(2);
    let mut hashing = Hashing { inner: plain, hash: Sha256::new(), left: bound };
    let mut layer = Layer::open(target, parents, limits)?;
    {
        let mut archive = tar::Archive::new(&mut hashing);
        for entry in archive.entries()? {
            layer.apply(&mut entry?)?;
        }
    }
    // The digest covers the padding too.
    io::copy(&mut hashing, &mut io::sink())?;
    layer.finish()?;
    Ok(Unpacked { diff_id: hex_digest(&hashing.hash.finalize()), size_bytes: layer.written })
}

struct Hashing<R> {
    inner: R,
    hash: Sha256,
    left: u64,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.left =
            self.left.checked_sub(n as u64).ok_or_else(|| io::Error::other("the layer is too large"))?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}

struct Layer<'a> {
    root: OwnedFd,
    parents: &'a [PathBuf],
    limits: &'a Limits,
    written: u64,
    checked: u64,
    entries: u64,
    /// Folders' times are set last: what comes into them changes them.
    folders: Vec<(PathBuf, Timestamps)>,
    buffer: Vec<u8>,
}

impl<'a> Layer<'a> {
    fn open(target: &Path, parents: &'a [PathBuf], limits: &'a Limits) -> Result<Layer<'a>, UnpackError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(target, flags, Mode::empty()).map_err(io::Error::from)?;
        let layer = Layer {
            root,
            parents,
            limits,
            written: 0,
            checked: 0,
            entries: 0,
            folders: Vec::new(),
            buffer: vec![0; 128 * 1024],
        };
        // The root's own attributes come from the lower layers too, until this one says otherwise.
        if let Some(below) = layer.below(Path::new("")) {
            layer.attributes_from(Path::new("."), &below)?;
        } else {
            fchmod_at(&layer.root, Path::new("."), 0o755)?;
        }
        Ok(layer)
    }

    fn apply<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<(), UnpackError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(UnpackError::TooMuch(format!("{} entries", self.limits.entries)));
        }
        let raw = PathBuf::from(OsString::from_vec(entry.path_bytes().into_owned()));
        let path = inside(&raw)?;
        let kind = entry.header().entry_type();
        if path.as_os_str().is_empty() {
            return if kind == EntryType::Directory {
                self.attributes(entry, Path::new("."))
            } else {
                Ok(())
            };
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
        let folder = self.folder(parent)?;
        if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
            return whiteout(&folder, OsStr::from_bytes(hidden), &raw);
        }
        self.make_room(&folder, name, kind)?;
        match kind {
            EntryType::Directory => match mkdirat(&folder, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(e) => return Err(io::Error::from(e).into()),
            },
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(entry, &folder, name)?
            }
            EntryType::Symlink => {
                let link = entry.link_name_bytes().unwrap_or_default().into_owned();
                symlinkat(OsStr::from_bytes(&link), &folder, name).map_err(io::Error::from)?;
            }
            EntryType::Link => return self.hard_link(entry, &folder, name),
            EntryType::Char | EntryType::Block | EntryType::Fifo => node(entry, &folder, name, kind)?,
            // Global headers and the like describe, they aren't files.
            _ => return Ok(()),
        }
        self.attributes(entry, &path)
    }

    /// Removes what an earlier entry put there, unless a folder stays a folder.
    fn make_room(&self, folder: &OwnedFd, name: &OsStr, kind: EntryType) -> Result<(), UnpackError> {
        let Ok(stat) = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) else { return Ok(()) };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            if kind != EntryType::Directory {
                let path = format!("/proc/self/fd/{}", folder.as_raw_fd());
                fs::remove_dir_all(Path::new(&path).join(name))?;
            }
            return Ok(());
        }
        unlinkat(folder, name, AtFlags::empty()).map_err(io::Error::from)?;
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        folder: &OwnedFd,
        name: &OsStr,
    ) -> Result<(), UnpackError> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(folder, name, flags, Mode::from_raw_mode(0o600)).map_err(io::Error::from)?;
        let mut file = fs::File::from(fd);
        let sparse = entry.header().entry_type() == EntryType::GNUSparse;
        let mut length = 0u64;
        loop {
            let n = entry.read(&mut self.buffer)?;
            if n == 0 {
                break;
            }
            length += n as u64;
            self.written += n as u64;
            if self.written > self.limits.size_bytes {
                return Err(UnpackError::TooMuch(format!("{} bytes", self.limits.size_bytes)));
            }
            if self.written - self.checked > CHECK_SPACE_EVERY_BYTES {
                self.checked = self.written;
                let free = rustix::fs::fstatvfs(&file).map_err(io::Error::from)?;
                if free.f_bavail.saturating_mul(free.f_frsize) < self.limits.keep_free_bytes {
                    return Err(UnpackError::NoSpace);
                }
            }
            if sparse && self.buffer[..n].iter().all(|b| *b == 0) {
                io::Seek::seek(&mut file, io::SeekFrom::Current(n as i64))?;
            } else {
                file.write_all(&self.buffer[..n])?;
            }
        }
        if sparse {
            file.set_len(length)?;
        }
        Ok(())
    }

    fn hard_link<R: Read>(
        &self,
        entry: &tar::Entry<'_, R>,
        folder: &OwnedFd,
        name: &OsStr,
    ) -> Result<(), UnpackError> {
        let link = entry.link_name_bytes().unwrap_or_default().into_owned();
        let to = inside(Path::new(OsStr::from_bytes(&link)))?;
        let (Some(parent), Some(file)) = (to.parent(), to.file_name()) else {
            return Err(UnpackError::Escape(to.display().to_string()));
        };
        // The last part itself, even if it is a symlink; its folders within the layer.
        let source = self.folder(parent)?;
        match linkat(&source, file, folder, name, AtFlags::empty()) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::NOENT) => {
                Err(bad(&to, "a hard link to a file that isn't in the same layer is not supported"))
            }
            Err(e) => Err(io::Error::from(e).into()),
        }
    }

    fn find(&self, path: &Path) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(openat2(
            &self.root,
            path,
            flags,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )?)
    }

    /// A folder of the layer, made with what the lower layers say of it when it isn't described here.
    fn folder(&self, path: &Path) -> Result<OwnedFd, UnpackError> {
        if let Ok(found) = self.find(path) {
            return Ok(found);
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(self.find(path)?);
        };
        let above = self.folder(parent)?;
        match mkdirat(&above, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => match self.below(path) {
                Some(below) => self.attributes_from(path, &below)?,
                None => fchmod_at(&self.root, path, 0o755)?,
            },
            Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
        self.find(path).map_err(|_| bad(path, "not a folder"))
    }

    fn below(&self, path: &Path) -> Option<fs::Metadata> {
        let found = self.parents.iter().filter_map(|p| fs::symlink_metadata(p.join(path)).ok()).next()?;
        found.is_dir().then_some(found)
    }

    fn attributes_from(&self, path: &Path, from: &fs::Metadata) -> Result<(), UnpackError> {
        let owner = (Uid::from_raw(from.uid()), Gid::from_raw(from.gid()));
        chownat(&self.root, path, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(io::Error::from)?;
        fchmod_at(&self.root, path, from.mode() & 0o7777)
    }

    /// Owner, mode, extended attributes and times, by descriptor or without following.
    fn attributes<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, path: &Path) -> Result<(), UnpackError> {
        let header = entry.header();
        // An empty field is zero, as Go's tar reads it.
        let (uid, gid) = (header.uid().unwrap_or(0), header.gid().unwrap_or(0));
        let (uid, gid) = (u32::try_from(uid).unwrap_or(0), u32::try_from(gid).unwrap_or(0));
        let (mode, mtime) = (header.mode()? & 0o7777, header.mtime().unwrap_or(0));
        let kind = header.entry_type();
        let parent = self.folder(path.parent().unwrap_or(Path::new("")))?;
        let name = path.file_name().unwrap_or(OsStr::new("."));
        // Not following: the name itself, whatever it is.
        let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        chownat(&parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).map_err(io::Error::from)?;
        // After the owner, since a change of owner clears set-user-ID and capabilities.
        if kind != EntryType::Symlink {
            fchmod_at(&parent, Path::new(name), mode)?;
        }
        self.extended(entry, &parent, name)?;
        let time = Timespec { tv_sec: i64::try_from(mtime).unwrap_or(0), tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        if kind == EntryType::Directory {
            self.folders.push((path.to_path_buf(), times));
        } else {
            utimensat(&parent, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(io::Error::from)?;
        }
        Ok(())
    }

    fn extended<R: Read>(
        &self,
        entry: &mut tar::Entry<'_, R>,
        parent: &OwnedFd,
        name: &OsStr,
    ) -> Result<(), UnpackError> {
        let Some(extensions) = entry.pax_extensions()? else { return Ok(()) };
        for extension in extensions {
            let extension = extension?;
            let Some(key) = extension.key().ok().and_then(|k| k.strip_prefix("SCHILY.xattr.")) else {
                continue;
            };
            let value = extension.value_bytes();
            // overlayfs' own attributes would let a layer point anywhere.
            if !(key.starts_with("user.") || key == "security.capability") || value.len() > XATTRS_MAX_BYTES {
                continue;
            }
            let path = format!("/proc/self/fd/{}", parent.as_raw_fd());
            let path = Path::new(&path).join(name);
            match rustix::fs::lsetxattr(&path, key, value, rustix::fs::XattrFlags::empty()) {
                // Not every file system and file type takes them; user attributes can be done without.
                Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::PERM) if key.starts_with("user.") => {}
                other => other.map_err(io::Error::from)?,
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), UnpackError> {
        for (path, times) in self.folders.drain(..).rev() {
            // A later entry may have replaced the folder.
            let _ = utimensat(&self.root, &path, &times, AtFlags::SYMLINK_NOFOLLOW);
        }
        Ok(())
    }
}

fn bad(path: &Path, message: impl Into<String>) -> UnpackError {
    UnpackError::Bad { name: path.display().to_string(), message: message.into() }
}

/// The path below the layer; `..` may not lead above it.
fn inside(path: &Path) -> Result<PathBuf, UnpackError> {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => out.push(part),
            Component::ParentDir => {
                if !out.pop() {
                    return Err(UnpackError::Escape(path.display().to_string()));
                }
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if out.components().count() > PATH_PARTS_MAX {
        return Err(bad(path, "nested too deep"));
    }
    Ok(out)
}

/// `.wh.name` hides what lies below; `.wh..wh..opq` hides all of a folder.
fn whiteout(folder: &OwnedFd, hidden: &OsStr, raw: &Path) -> Result<(), UnpackError> {
    if hidden == ".wh..opq" {
        let path = format!("/proc/self/fd/{}", folder.as_raw_fd());
        rustix::fs::setxattr(&path, "trusted.overlay.opaque", b"y", rustix::fs::XattrFlags::empty())
            .map_err(io::Error::from)?;
        return Ok(());
    }
    if hidden.is_empty() || hidden == "." || hidden == ".." {
        return Err(UnpackError::Escape(raw.display().to_string()));
    }
    // aufs' own bookkeeping
    if hidden.as_bytes().starts_with(b".wh.") {
        return Ok(());
    }
    match mknodat(folder.as_fd(), hidden, SFlag::S_IFCHR, NixMode::empty(), 0) {
        // The layer itself has the name: its own file stands.
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(e) => Err(io::Error::from(e).into()),
    }
}

fn node<R: Read>(
    entry: &tar::Entry<'_, R>,
    folder: &OwnedFd,
    name: &OsStr,
    kind: EntryType,
) -> Result<(), UnpackError> {
    let header = entry.header();
    let number = |n: io::Result<Option<u32>>| n.map(|n| u64::from(n.unwrap_or(0)));
    let (kind, device) = match kind {
        EntryType::Fifo => (SFlag::S_IFIFO, 0),
        other => {
            let device =
                nix::sys::stat::makedev(number(header.device_major())?, number(header.device_minor())?);
            (if other == EntryType::Char { SFlag::S_IFCHR } else { SFlag::S_IFBLK }, device)
        }
    };
    mknodat(folder.as_fd(), name, kind, NixMode::from_bits_truncate(0o600), device)
        .map_err(io::Error::from)?;
    Ok(())
}

/// Changes the mode of the thing itself; callers know that it is no symlink.
fn fchmod_at(folder: &OwnedFd, path: &Path, mode: u32) -> Result<(), UnpackError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat2(folder, path, flags, Mode::empty(), ResolveFlags::IN_ROOT).map_err(io::Error::from)?;
    rustix::fs::chmod(format!("/proc/self/fd/{}", fd.as_raw_fd()), Mode::from_raw_mode(mode))
        .map_err(io::Error::from)?;
    Ok(())
}

#[cfg(test)]
mod tests;
