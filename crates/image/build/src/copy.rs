//! Files put into an image: COPY and ADD.
//!
//! Upstream counterpart: fsutil's `copy`, whose rules about destinations and whose error texts these are. What stays
//! true: nothing is written outside of the image's root, whatever its symlinks say; parents that exist keep their owner
//! and mode; a file never takes a folder's place nor a folder a file's.
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode as NixMode, SFlag, mknodat};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat,
    linkat, mkdirat, openat, symlinkat, unlinkat, utimensat,
};

use crate::error::{BuildError, io_error, refused};
use crate::rooted::{Root, fd_path, is_folder, kind, stat_at};
use crate::select::{Pick, Tree, attributes};

/// What `--chmod` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModeChange {
    Octal(u32),
    Symbolic(Vec<Clause>),
}

/// `u+rwX`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clause {
    /// Bits that it may change.
    who: u32,
    what: char,
    permissions: String,
}

impl ModeChange {
    pub fn parse(text: &str) -> Result<ModeChange, BuildError> {
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            return match u32::from_str_radix(text, 8) {
                Ok(mode) if mode <= 0o7777 => Ok(ModeChange::Octal(mode)),
                _ => Err(refused(format!(
                    "invalid chmod parameter: '{text}'. it should be octal string and between 0 and 07777"
                ))),
            };
        }
        let clauses: Option<Vec<Vec<Clause>>> = text.split(',').map(clause).collect();
        let clauses: Vec<Clause> = clauses
            .ok_or_else(|| {
                refused(format!("invalid chmod parameter: '{text}'; expected 0755 or u=rwX,go=rX"))
            })?
            .concat();
        Ok(ModeChange::Symbolic(clauses))
    }

    fn apply(&self, mode: u32, is_folder: bool) -> u32 {
        let clauses = match self {
            ModeChange::Octal(mode) => return *mode,
            ModeChange::Symbolic(clauses) => clauses,
        };
        let mut mode = mode & 0o7777;
        for clause in clauses {
            let mut bits = 0;
            for permission in clause.permissions.chars() {
                bits |= match permission {
                    'r' => 0o444,
                    'w' => 0o222,
                    'x' => 0o111,
                    'X' if is_folder || mode & 0o111 != 0 => 0o111,
                    's' => 0o6000,
                    't' => 0o1000,
                    'u' => (mode >> 6 & 7) * 0o111,
                    'g' => (mode >> 3 & 7) * 0o111,
                    'o' => (mode & 7) * 0o111,
                    _ => 0,
                };
            }
            bits &= clause.who;
            mode = match clause.what {
                '+' => mode | bits,
                '-' => mode & !bits,
                _ => (mode & !(clause.who & 0o777)) | bits,
            };
        }
        mode
    }
}

fn clause(text: &str) -> Option<Vec<Clause>> {
    let at = text.find(['+', '-', '='])?;
    let (who, rest) = text.split_at(at);
    let mut bits = 0;
    for c in who.chars() {
        bits |= match c {
            'u' => 0o4700,
            'g' => 0o2070,
            'o' => 0o0007 | 0o1000,
            'a' => 0o7777,
            _ => return None,
        };
    }
    let who = if bits == 0 { 0o7777 } else { bits };
    let mut clauses: Vec<Clause> = Vec::new();
    for c in rest.chars() {
        match c {
            '+' | '-' | '=' => clauses.push(Clause { who, what: c, permissions: String::new() }),
            'r' | 'w' | 'x' | 'X' | 's' | 't' | 'u' | 'g' | 'o' => clauses.last_mut()?.permissions.push(c),
            _ => return None,
        }
    }
    Some(clauses)
}

/// Where files go, and whose they become.
pub struct Target<'a> {
    pub root: &'a Root,
    /// Absolute; a slash at the end says that it is a folder.
    pub destination: &'a str,
    pub owner: Option<(u32, u32)>,
    pub mode: Option<&'a ModeChange>,
}

impl Target<'_> {
    fn mode(&self, stat: &Stat) -> u32 {
        let mode = stat.st_mode & 0o7777;
        self.mode.map_or(mode, |change| change.apply(mode, is_folder(stat)))
    }

    /// Makes a folder with the folders above it; whether it is new.
    pub fn make_folders(&self, path: &Path) -> Result<bool, BuildError> {
        let mode = match self.mode {
            Some(ModeChange::Octal(mode)) => *mode,
            _ => 0o755,
        };
        make_folders(self.root, path, self.owner.unwrap_or((0, 0)), mode)
    }
}

/// Makes what is missing of a path without symlinks; whether the last was.
pub fn make_folders(root: &Root, path: &Path, owner: (u32, u32), mode: u32) -> Result<bool, BuildError> {
    let making = || io_error(format!("making /{}", path.display()));
    if let Some(stat) = root.stat(path).map_err(making())? {
        return match is_folder(&stat) {
            true => Ok(false),
            false => Err(refused(format!("cannot copy to non-directory: /{}", path.display()))),
        };
    }
    let Some(above) = path.parent() else { return Ok(false) };
    make_folders(root, above, owner, mode)?;
    let made = (|| {
        let (folder, name) = root.parent(path)?;
        mkdirat(&folder, name, Mode::from_raw_mode(0o700))?;
        chownat(
            &folder,
            name,
            Some(Uid::from_raw(owner.0)),
            Some(Gid::from_raw(owner.1)),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        chmodat(&folder, name, Mode::from_raw_mode(mode), AtFlags::empty())?;
        Ok(true)
    })();
    made.map_err(making())
}

/// Copies what one source found.
pub fn copy(tree: Tree<'_>, pick: &Pick, target: &Target<'_>) -> Result<(), BuildError> {
    let given = Path::new(target.destination);
    let finding = || io_error(target.destination.to_string());
    let mut base = target.root.resolve(given, true).map_err(finding())?;
    let existing = target.root.stat(&base).map_err(finding())?;
    if target.destination.ends_with('/') || pick.is_folder {
        let made = target.make_folders(&base)?;
        if !pick.is_folder {
            base.push(&pick.name);
        } else if made {
            set_times(target.root, &base, &pick.top).map_err(finding())?;
        }
    } else if existing.is_some_and(|s| is_folder(&s)) {
        base.push(&pick.name);
    } else if let Some(above) = base.parent() {
        target.make_folders(above)?;
    }
    Copier { tree, target, base, links: HashMap::new(), folders: Vec::new() }.all(pick)
}

fn times(stat: &Stat) -> Timestamps {
    let time = Timespec { tv_sec: stat.st_mtime as _, tv_nsec: stat.st_mtime_nsec as _ };
    Timestamps { last_access: time, last_modification: time }
}

fn set_times(root: &Root, path: &Path, stat: &Stat) -> io::Result<()> {
    let (folder, name) = match root.parent(path) {
        Ok(found) => found,
        Err(_) => (root.folder(path)?, OsStr::new(".")),
    };
    Ok(utimensat(&folder, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)?)
}

struct Copier<'a> {
    tree: Tree<'a>,
    target: &'a Target<'a>,
    base: PathBuf,
    /// Files with several names: where the first of them went.
    links: HashMap<(u64, u64), PathBuf>,
    /// Folders' times are set last: what comes into them changes them.
    folders: Vec<(PathBuf, Stat)>,
}

impl Copier<'_> {
    fn all(mut self, pick: &Pick) -> Result<(), BuildError> {
        let mut above: Option<(PathBuf, OwnedFd)> = None;
        for item in &pick.items {
            let to = match item.target.as_os_str().is_empty() {
                true => self.base.clone(),
                false => self.base.join(&item.target),
            };
            let failed = || io_error(format!("copying to /{}", to.display()));
            let (Some(parent), Some(name)) = (to.parent(), to.file_name()) else { continue };
            if above.as_ref().is_none_or(|(path, _)| path != parent) {
                let folder = self.target.root.folder(parent).map_err(failed())?;
                above = Some((parent.to_path_buf(), folder));
            }
            let Some((_, folder)) = &above else { continue };
            let there = stat_at(folder, name).map_err(failed())?;
            if is_folder(&item.stat) {
                match there {
                    None => {
                        mkdirat(folder, name, Mode::from_raw_mode(0o700)).map_err(|e| failed()(e.into()))?
                    }
                    Some(stat) if !is_folder(&stat) => {
                        return Err(refused(format!("cannot copy to non-directory: /{}", to.display())));
                    }
                    Some(_) if item.implied => continue,
                    Some(_) => {}
                }
                self.attributes(folder, name, &item.source, &item.stat).map_err(failed())?;
                self.folders.push((to.clone(), item.stat));
                continue;
            }
            match there {
                Some(stat) if is_folder(&stat) => {
                    return Err(refused(format!("cannot replace to directory /{} with file", to.display())));
                }
                Some(_) => unlinkat(folder, name, AtFlags::empty()).map_err(|e| failed()(e.into()))?,
                None => {}
            }
            self.one(folder, name, &to, &item.source, &item.stat).map_err(failed())?;
        }
        for (path, stat) in self.folders.iter().rev() {
            set_times(self.target.root, path, stat).map_err(io_error(format!("/{}", path.display())))?;
        }
        Ok(())
    }

    fn one(&mut self, folder: &OwnedFd, name: &OsStr, to: &Path, from: &Path, stat: &Stat) -> io::Result<()> {
        let mode = NixMode::from_bits_truncate(0o600);
        match kind(stat) {
            FileType::RegularFile => {
                if stat.st_nlink > 1 {
                    let key = (stat.st_dev, stat.st_ino);
                    if let Some(first) = self.links.get(&key) {
                        let (other, first) = self.target.root.parent(first)?;
                        return Ok(linkat(&other, first, folder, name, AtFlags::empty())?);
                    }
                    self.links.insert(key, to.to_path_buf());
                }
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut file = File::from(openat(folder, name, flags, Mode::from_raw_mode(0o600))?);
                io::copy(&mut self.tree.root.file(from)?, &mut file)?;
            }
            FileType::Symlink => {
                let link = self.tree.root.read_link(from)?;
                symlinkat(link.as_os_str().as_bytes(), folder, name)?;
            }
            FileType::Fifo => mknodat(folder.as_fd(), name, SFlag::S_IFIFO, mode, 0)?,
            // overlayfs' whiteout is nothing to be copied
            FileType::CharacterDevice if stat.st_rdev == 0 => return Ok(()),
            FileType::CharacterDevice => {
                mknodat(folder.as_fd(), name, SFlag::S_IFCHR, mode, stat.st_rdev as _)?
            }
            FileType::BlockDevice => mknodat(folder.as_fd(), name, SFlag::S_IFBLK, mode, stat.st_rdev as _)?,
            _ => return Ok(()),
        }
        self.attributes(folder, name, from, stat)?;
        Ok(utimensat(folder, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Owner, mode, extended attributes.
    fn attributes(&self, folder: &OwnedFd, name: &OsStr, from: &Path, stat: &Stat) -> io::Result<()> {
        let own = if self.tree.is_context { (0, 0) } else { (stat.st_uid, stat.st_gid) };
        let (uid, gid) = self.target.owner.unwrap_or(own);
        chownat(folder, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::SYMLINK_NOFOLLOW)?;
        // after the owner, whose change clears set-user-ID and capabilities
        if kind(stat) != FileType::Symlink {
            chmodat(folder, name, Mode::from_raw_mode(self.target.mode(stat)), AtFlags::empty())?;
        }
        let full = fd_path(folder).join(name);
        for (name, value) in attributes(self.tree.root, from)? {
            match rustix::fs::lsetxattr(&full, name.as_str(), &value, XattrFlags::empty()) {
                Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::PERM) if name.starts_with("user.") => {}
                other => other?,
            }
        }
        Ok(())
    }
}

/// `--chown` and the owner of WORKDIR: names are looked up in the image, a user's number is its group's too.
pub fn owner(root: &Root, text: &str) -> Result<(u32, u32), BuildError> {
    const FILE_MAX_BYTES: u64 = 4 << 20;
    let read = |path: &str| {
        let bytes = root.read(Path::new(path), FILE_MAX_BYTES).map_err(io_error(path))?;
        Ok::<_, BuildError>(String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
    };
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (text, None),
    };
    let (uid, own_gid) = match user.parse::<u32>() {
        Ok(uid) => (uid, uid),
        Err(_) if user.is_empty() => (0, 0),
        Err(_) => {
            let passwd = read("/etc/passwd")?;
            let ids = |line: &str| {
                let fields: Vec<&str> = line.split(':').collect();
                let same = fields.first() == Some(&user);
                same.then_some(())?;
                Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
            };
            passwd.lines().find_map(ids).ok_or_else(|| {
                refused(format!("unable to find user {user}: no matching entries in the image's /etc/passwd"))
            })?
        }
    };
    let gid = match group {
        None => own_gid,
        Some(group) => match group.parse() {
            Ok(gid) => gid,
            Err(_) => {
                let id = |line: &str| {
                    let fields: Vec<&str> = line.split(':').collect();
                    (fields.first() == Some(&group)).then(|| fields.get(2)?.parse().ok()).flatten()
                };
                read("/etc/group")?.lines().find_map(id).ok_or_else(|| {
                    refused(format!(
                        "unable to find group {group}: no matching entries in the image's /etc/group"
                    ))
                })?
            }
        },
    };
    Ok((uid, gid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dockerignore::Ignore;
    use crate::select::{Wanted, select};
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn modes_change_as_chmod_has_it() {
        for (text, mode, folder, wanted) in [
            ("0755", 0o600, false, 0o755),
            ("u+x", 0o644, false, 0o744),
            ("go-rwx", 0o777, false, 0o700),
            ("a=r", 0o755, false, 0o444),
            ("u=rwX,go=rX", 0o600, true, 0o755),
            ("u=rwX,go=rX", 0o600, false, 0o644),
            ("+x", 0o644, false, 0o755),
            ("g=u", 0o740, false, 0o770),
            ("u+s", 0o755, false, 0o4755),
            ("+t", 0o777, true, 0o1777),
        ] {
            let change = ModeChange::parse(text).unwrap();
            assert_eq!(change.apply(mode, folder), wanted, "{text} of {mode:o}");
        }
        for bad in ["", "08", "77777", "z+x", "u", "u+z", "ux"] {
            assert!(ModeChange::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn owners_are_the_images() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("etc")).unwrap();
        fs::write(folder.path().join("etc/passwd"), "root:x:0:0::/:\nweb:x:101:102::/:\n").unwrap();
        fs::write(folder.path().join("etc/group"), "www:x:103:\n").unwrap();
        let root = Root::open(folder.path()).unwrap();
        for (text, wanted) in [
            ("web", (101, 102)),
            ("web:www", (101, 103)),
            ("5", (5, 5)),
            ("5:6", (5, 6)),
            (":www", (0, 103)),
            ("web:0", (101, 0)),
        ] {
            assert_eq!(owner(&root, text).unwrap(), wanted, "{text}");
        }
        assert!(owner(&root, "none").is_err() && owner(&root, "web:none").is_err());
    }

    /// Copies as whoever runs the test: owners stay its own.
    fn run(source: &Path, from: &str, root: &Path, destination: &str) -> Result<(), String> {
        let (source, root) = (Root::open(source).unwrap(), Root::open(root).unwrap());
        let tree = Tree { root: &source, ignore: None, is_context: false };
        let none = Ignore::default();
        for pick in
            select(tree, from, &Wanted { exclude: &none, parents: false }).map_err(|e| e.to_string())?
        {
            let me = Some((nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()));
            let target = Target { root: &root, destination, owner: me, mode: None };
            copy(tree, &pick, &target).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    #[test]
    fn destinations_are_dockers() {
        let source = tempfile::tempdir().unwrap();
        let from = |name: &str| source.path().join(name);
        fs::create_dir_all(from("dir/sub")).unwrap();
        fs::write(from("file"), "file").unwrap();
        fs::write(from("dir/a"), "a").unwrap();
        fs::hard_link(from("dir/a"), from("dir/b")).unwrap();
        fs::write(from("dir/sub/c"), "c").unwrap();
        symlink("a", from("dir/link")).unwrap();
        let target = tempfile::tempdir().unwrap();
        let to = |name: &str| target.path().join(name);
        fs::create_dir_all(to("there")).unwrap();
        symlink("there", to("alias")).unwrap();
        symlink("/../../../nowhere/else", to("dangling")).unwrap();
        for (given, destination, made) in [
            ("file", "/new", "new"),
            ("file", "/x/y/z", "x/y/z"),
            ("file", "/folder/", "folder/file"),
            ("file", "/there", "there/file"),
            ("file", "/alias/", "there/file"),
            ("file", "/dangling", "nowhere/else"),
            ("dir", "/copied", "copied/sub/c"),
            ("dir", "/there", "there/a"),
        ] {
            run(source.path(), given, target.path(), destination).unwrap();
            assert!(to(made).is_file(), "{given} {destination}");
        }
        assert_eq!(fs::read_link(to("copied/link")).unwrap(), Path::new("a"));
        assert_eq!(fs::metadata(to("copied/a")).unwrap().ino(), fs::metadata(to("copied/b")).unwrap().ino());
        assert_eq!(
            fs::metadata(to("copied/a")).unwrap().modified().unwrap(),
            fs::metadata(from("dir/a")).unwrap().modified().unwrap()
        );
        // no file for a folder, no folder for a file
        fs::create_dir_all(to("clash/a")).unwrap();
        assert!(
            run(source.path(), "dir", target.path(), "/clash")
                .unwrap_err()
                .contains("cannot replace to directory /clash/a")
        );
        assert!(run(source.path(), "dir", target.path(), "/new").unwrap_err().contains("non-directory"));
        symlink("/there", to("copied/sub2")).unwrap();
        fs::create_dir_all(from("dir/sub2")).unwrap();
        assert!(run(source.path(), "dir", target.path(), "/copied").unwrap_err().contains("non-directory"));
    }
}
