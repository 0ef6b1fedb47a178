//! What COPY and ADD take: from sources, wildcards and exclusions to a list of files, and what the list is worth.
//!
//! Upstream counterparts: fsutil's `copy` (wildcards, `--exclude`, `--parents`) and BuildKit's `contenthash`. The list is
//! made before anything is copied, so its digest decides whether anything needs to be. What stays true: a symlink that is
//! named is followed within its root, one that is found in a folder is copied as it is; what `.dockerignore` leaves out
//! does not exist. Deliberate differences: times are no part of the digest; `--exclude` holds for files that are named,
//! too, as the documentation has it.
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Stat};
use sampan_image::manifest::hex_digest;
use sha2::{Digest, Sha256};

use crate::dockerignore::Ignore;
use crate::error::{BuildError, io_error, refused};
use crate::rooted::{Root, fd_path, is_folder, kind};

const ITEMS_MAX: usize = 4 << 20;
const DEPTH_MAX: usize = 512;

/// Where files are taken from.
#[derive(Clone, Copy)]
pub struct Tree<'a> {
    pub root: &'a Root,
    /// `.dockerignore`
    pub ignore: Option<&'a Ignore>,
    /// Files belong to root, whoever owns them on this machine.
    pub is_context: bool,
}

/// One source that was found.
pub struct Pick {
    /// As it was named: what it is called in a folder.
    pub name: OsString,
    /// Its content is copied, not itself.
    pub is_folder: bool,
    /// Of the folder itself.
    pub top: Stat,
    pub items: Vec<Item>,
}

pub struct Item {
    pub source: PathBuf,
    /// Below the destination; empty for a file that is named.
    pub target: PathBuf,
    pub stat: Stat,
    /// A folder that is there only for what is in it.
    pub implied: bool,
}

pub struct Wanted<'a> {
    pub exclude: &'a Ignore,
    pub parents: bool,
}

/// Finds what a source names. Wildcards may find nothing.
pub fn select(tree: Tree<'_>, source: &str, wanted: &Wanted<'_>) -> Result<Vec<Pick>, BuildError> {
    if wanted.parents {
        return with_parents(tree, source, wanted.exclude).map(|pick| vec![pick]);
    }
    let mut picks = Vec::new();
    let is_pattern = has_wildcard(source);
    let paths = if is_pattern { expand(tree, source)? } else { vec![plain(source)] };
    for path in paths {
        let found = look(tree, &path)?;
        let Some((resolved, stat)) = found else {
            if is_pattern {
                continue;
            }
            return Err(not_found(tree, source));
        };
        let name = path.file_name().unwrap_or_default().to_os_string();
        let mut items = Vec::new();
        let is_folder = is_folder(&stat);
        if is_folder {
            let mut walk = Walk { tree, exclude: wanted.exclude, only: None, items: &mut items };
            walk.folder(&resolved, Path::new(""), 0)?;
        } else if wanted.exclude.excluded(&name.to_string_lossy()) {
            continue;
        } else {
            items.push(Item { source: resolved, target: PathBuf::new(), stat, implied: false });
        }
        picks.push(Pick { name, is_folder, top: stat, items });
    }
    Ok(picks)
}

fn not_found(tree: Tree<'_>, source: &str) -> BuildError {
    let path = plain(source);
    let hidden = tree.ignore.is_some()
        && tree.root.resolve(&path, true).is_ok_and(|p| tree.root.stat(&p).is_ok_and(|s| s.is_some()));
    match hidden {
        true => refused(format!("{source:?} is left out by .dockerignore")),
        false if tree.is_context => refused(format!("{source:?} not found in the build context")),
        false => refused(format!("{source:?} not found")),
    }
}

fn has_wildcard(text: &str) -> bool {
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '*' | '?' | '[' => return true,
            '\\' => drop(chars.next()),
            _ => {}
        }
    }
    false
}

/// A source without wildcards as a path.
fn plain(source: &str) -> PathBuf {
    let mut text = String::new();
    let mut chars = source.chars();
    while let Some(c) = chars.next() {
        text.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    let mut path = PathBuf::new();
    for part in Path::new(&text).components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::ParentDir => drop(path.pop()),
            _ => {}
        }
    }
    path
}

/// What is at a path after following symlinks, if it may be seen.
fn look(tree: Tree<'_>, path: &Path) -> Result<Option<(PathBuf, Stat)>, BuildError> {
    let reading = || io_error(format!("{}", path.display()));
    let resolved = tree.root.resolve(path, true).map_err(reading())?;
    let Some(stat) = tree.root.stat(&resolved).map_err(reading())? else { return Ok(None) };
    if let Some(ignore) = tree.ignore {
        let text = resolved.to_string_lossy();
        if ignore.excluded(&text) && !(is_folder(&stat) && ignore.descend(&text)) {
            return Ok(None);
        }
    }
    Ok(Some((resolved, stat)))
}

/// Paths that a pattern matches, part by part.
fn expand(tree: Tree<'_>, source: &str) -> Result<Vec<PathBuf>, BuildError> {
    let mut found = vec![PathBuf::new()];
    for part in source.split('/').filter(|p| !p.is_empty() && *p != ".") {
        let mut next = Vec::new();
        for path in found {
            if part == ".." {
                next.push(path.parent().map(Path::to_path_buf).unwrap_or_default());
                continue;
            }
            if !has_wildcard(part) {
                next.push(path.join(plain(part)));
                continue;
            }
            let Some((folder, stat)) = look(tree, &path)? else { continue };
            if !is_folder(&stat) {
                continue;
            }
            let names = tree.root.names(&folder).map_err(io_error(folder.display().to_string()))?;
            next.extend(names.iter().filter(|n| matches(part, &n.to_string_lossy())).map(|n| path.join(n)));
            if next.len() > ITEMS_MAX {
                return Err(refused(format!("{source:?} matches more than {ITEMS_MAX} files")));
            }
        }
        found = next;
    }
    Ok(found)
}

/// Go's `filepath.Match` for one part of a path: `*`, `?`, `[a-z]`, `[^a]` and `\` before what is meant as it is.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        if pattern.get(p) == Some(&'*') {
            star = Some((p, n));
            p += 1;
            continue;
        }
        if let Some(width) = one(&pattern[p..], name[n]) {
            p += width;
            n += 1;
            continue;
        }
        // the last star takes one more
        let Some((at, taken)) = star else { return false };
        star = Some((at, taken + 1));
        (p, n) = (at + 1, taken + 1);
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// How many characters of the pattern stand for `c`.
fn one(pattern: &[char], c: char) -> Option<usize> {
    match pattern {
        ['?', ..] => Some(1),
        ['\\', escaped, ..] => (*escaped == c).then_some(2),
        ['[', rest @ ..] => {
            let negated = rest.first() == Some(&'^');
            let (mut at, mut hit, mut first) = (usize::from(negated), false, true);
            loop {
                let low = match rest.get(at)? {
                    ']' if !first => return (hit != negated).then_some(at + 2),
                    '\\' => {
                        at += 1;
                        rest.get(at)?
                    }
                    low => low,
                };
                at += 1;
                let mut high = low;
                if rest.get(at) == Some(&'-') && rest.get(at + 1).is_some_and(|c| *c != ']') {
                    high = rest.get(at + 1)?;
                    at += 2;
                }
                hit |= (*low..=*high).contains(&c);
                first = false;
            }
        }
        [same, ..] => (*same == c).then_some(1),
        [] => None,
    }
}

/// `--parents`: what matches below the pivot (`/./`, or the root) keeps its folders.
fn with_parents(tree: Tree<'_>, source: &str, exclude: &Ignore) -> Result<Pick, BuildError> {
    let (base, pattern) =
        source.split_once("/./").unwrap_or(("", source.strip_prefix("./").unwrap_or(source)));
    let Some((resolved, top)) = look(tree, &plain(base))? else { return Err(not_found(tree, base)) };
    if !is_folder(&top) {
        return Err(refused(format!("{base:?} is not a folder")));
    }
    let pattern = pattern.trim_matches('/').to_string();
    let wrong = |e| refused(format!("{source:?}: {e}"));
    let include = Ignore::from_patterns(std::slice::from_ref(&pattern)).map_err(wrong)?;
    let prefix: Vec<&str> =
        pattern.split('/').take_while(|p| !has_wildcard(p)).filter(|p| *p != ".").collect();
    let only = if pattern.is_empty() { None } else { Some(Only { include: &include, prefix }) };
    let mut items = Vec::new();
    Walk { tree, exclude, only, items: &mut items }.folder(&resolved, Path::new(""), 0)?;
    if items.is_empty() && !has_wildcard(source) {
        return Err(not_found(tree, source));
    }
    Ok(Pick { name: OsString::new(), is_folder: true, top, items })
}

struct Only<'a> {
    include: &'a Ignore,
    /// Names without wildcards that the pattern begins with: nothing else need be walked.
    prefix: Vec<&'a str>,
}

struct Walk<'a, 'b> {
    tree: Tree<'a>,
    exclude: &'b Ignore,
    only: Option<Only<'b>>,
    items: &'b mut Vec<Item>,
}

impl Walk<'_, '_> {
    fn folder(&mut self, source: &Path, target: &Path, depth: usize) -> Result<(), BuildError> {
        if depth > DEPTH_MAX {
            return Err(refused(format!("{}: folders nested too deep", source.display())));
        }
        let reading = |path: &Path| io_error(path.display().to_string());
        for name in self.tree.root.names(source).map_err(reading(source))? {
            let wanted = self.only.as_ref().and_then(|o| o.prefix.get(depth));
            if wanted.is_some_and(|w| name != *w) {
                continue;
            }
            let (from, to) = (source.join(&name), target.join(&name));
            // gone since the folder was listed
            let Some(stat) = self.tree.root.stat(&from).map_err(reading(&from))? else { continue };
            let (left_out, descend) = self.judge(&from, &to);
            if kind(&stat) == FileType::Socket || (left_out && !(is_folder(&stat) && descend)) {
                continue;
            }
            if self.items.len() >= ITEMS_MAX {
                return Err(refused(format!("more than {ITEMS_MAX} files")));
            }
            let before = self.items.len();
            self.items.push(Item { source: from.clone(), target: to.clone(), stat, implied: left_out });
            if is_folder(&stat) {
                self.folder(&from, &to, depth + 1)?;
                if left_out && self.items.len() == before + 1 {
                    self.items.pop();
                }
            }
        }
        Ok(())
    }

    /// (left out, but what is in it may not be).
    fn judge(&self, from: &Path, to: &Path) -> (bool, bool) {
        let (from, to) = (from.to_string_lossy(), to.to_string_lossy());
        let (mut left_out, mut descend) = (false, true);
        for (ignore, path) in [(self.tree.ignore, &from), (Some(self.exclude), &to)] {
            if let Some(ignore) = ignore.filter(|i| !i.is_empty() && i.excluded(path)) {
                left_out = true;
                descend &= ignore.descend(path);
            }
        }
        let outside = self.only.as_ref().is_some_and(|o| !o.include.excluded(&to));
        (left_out || outside, descend)
    }
}

/// What the picks are worth: names, kinds, modes, owners where they count, and contents.
pub fn digest(tree: Tree<'_>, picks: &[Pick]) -> Result<String, BuildError> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 128 * 1024];
    for pick in picks {
        field(&mut hash, pick.name.as_bytes());
        hash.update([u8::from(pick.is_folder)]);
        for item in &pick.items {
            let worth = worth(tree, item, &mut buffer);
            let worth = worth.map_err(io_error(item.source.display().to_string()))?;
            field(&mut hash, item.target.as_os_str().as_bytes());
            field(&mut hash, &worth);
        }
        hash.update(b"end");
    }
    Ok(hex_digest(&hash.finalize()))
}

fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn worth(tree: Tree<'_>, item: &Item, buffer: &mut [u8]) -> io::Result<Vec<u8>> {
    let stat = &item.stat;
    let mut hash = Sha256::new();
    let owner = if tree.is_context { (0, 0) } else { (stat.st_uid, stat.st_gid) };
    hash.update(format!("{:o} {} {} {}", stat.st_mode, owner.0, owner.1, item.implied));
    match kind(stat) {
        FileType::RegularFile => {
            let mut file = tree.root.file(&item.source)?;
            loop {
                match file.read(buffer)? {
                    0 => break,
                    n => hash.update(&buffer[..n]),
                }
            }
        }
        FileType::Symlink => hash.update(tree.root.read_link(&item.source)?.as_os_str().as_bytes()),
        FileType::Directory => {}
        _ => hash.update(stat.st_rdev.to_le_bytes()),
    }
    for (name, value) in attributes(tree.root, &item.source)? {
        hash.update(name.as_bytes());
        hash.update(value);
    }
    Ok(hash.finalize().to_vec())
}

const ATTRIBUTES_MAX_BYTES: usize = 64 * 1024;

/// The extended attributes that layers carry.
pub fn attributes(root: &Root, path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let (folder, name) = match root.parent(path) {
        Ok(found) => found,
        Err(_) => (root.folder(path)?, OsStr::new(".")),
    };
    let full = fd_path(&folder).join(name);
    let mut names = vec![0; 1024];
    let length = match rustix::fs::llistxattr(&full, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::RANGE) => {
            names.resize(ATTRIBUTES_MAX_BYTES, 0);
            rustix::fs::llistxattr(&full, &mut names[..])?
        }
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(e.into()),
    };
    let mut found = Vec::new();
    for name in names[..length].split(|b| *b == 0).filter_map(|n| std::str::from_utf8(n).ok()) {
        if !(name.starts_with("user.") || name == "security.capability") {
            continue;
        }
        let mut value = vec![0; ATTRIBUTES_MAX_BYTES];
        let length = rustix::fs::lgetxattr(&full, name, &mut value[..])?;
        value.truncate(length);
        found.push((name.to_string(), value));
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn names_match_as_gos() {
        for (pattern, name, wanted) in [
            ("*.txt", "a.txt", true),
            ("*.txt", ".txt", true),
            ("a*b*c", "aXbYbZc", true),
            ("a*b", "aXbY", false),
            ("h?m", "ham", true),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("[\\]]", "]", true),
            ("*", "", true),
            ("[a", "a", false),
        ] {
            assert_eq!(matches(pattern, name), wanted, "{pattern} {name}");
        }
    }

    fn context() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in
            ["a.txt", "b.md", "dir/c.txt", "dir/deep/d.txt", "dir/deep/e.md", "skip/f.txt", "skip/keep/g.txt"]
        {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        std::os::unix::fs::symlink("dir/deep", folder.path().join("link")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("out")).unwrap();
        folder
    }

    #[test]
    fn sources_find_what_docker_copies() {
        let folder = context();
        let root = Root::open(folder.path()).unwrap();
        let ignore = crate::dockerignore::parse("skip\n!skip/keep\n*.md\n").unwrap();
        let tree = Tree { root: &root, ignore: Some(&ignore), is_context: true };
        let none = Ignore::default();
        let excluding = Ignore::from_patterns(&["deep".into(), "a.*".into()]).unwrap();
        let shown = |source: &str, exclude: &Ignore, parents: bool| {
            let picks = select(tree, source, &Wanted { exclude, parents }).map_err(|e| e.to_string())?;
            let one = |p: &Pick| {
                let items: Vec<String> = p.items.iter().map(|i| i.target.display().to_string()).collect();
                format!("{}:{}", p.name.display(), items.join(","))
            };
            Ok::<_, String>(picks.iter().map(one).collect::<Vec<_>>().join(" "))
        };
        for (source, exclude, parents, wanted) in [
            ("a.txt", &none, false, "a.txt:"),
            ("*.txt", &none, false, "a.txt:"),
            ("dir", &none, false, "dir:c.txt,deep,deep/d.txt,deep/e.md"),
            ("link", &none, false, "link:d.txt,e.md"),
            ("d*/d*", &none, false, "deep:d.txt,e.md"),
            (
                ".",
                &none,
                false,
                ":a.txt,dir,dir/c.txt,dir/deep,dir/deep/d.txt,dir/deep/e.md,link,out,skip,skip/keep,skip/keep/g.txt",
            ),
            ("*.txt", &excluding, false, ""),
            ("dir", &excluding, false, "dir:c.txt"),
            ("dir/deep/*.txt", &none, true, ":dir,dir/deep,dir/deep/d.txt"),
            ("dir/./deep/d.txt", &none, true, ":deep,deep/d.txt"),
            (
                "**/*.txt",
                &none,
                true,
                ":a.txt,dir,dir/c.txt,dir/deep,dir/deep/d.txt,skip,skip/keep,skip/keep/g.txt",
            ),
            ("../../dir/c.txt", &none, false, "c.txt:"),
            ("nothing*", &none, false, ""),
        ] {
            assert_eq!(shown(source, exclude, parents).as_deref(), Ok(wanted), "{source}");
        }
        for (source, why) in [
            ("b.md", "left out by .dockerignore"),
            ("none", "not found"),
            ("out", "not found"),
            ("skip/f.txt", "left out"),
        ] {
            let error = shown(source, &none, false).unwrap_err();
            assert!(error.contains(why), "{source}: {error}");
        }
    }

    #[test]
    fn the_digest_is_of_content_not_of_time() {
        let folder = context();
        let root = Root::open(folder.path()).unwrap();
        let tree = Tree { root: &root, ignore: None, is_context: true };
        let none = Ignore::default();
        let of = || {
            digest(tree, &select(tree, "dir", &Wanted { exclude: &none, parents: false }).unwrap()).unwrap()
        };
        let first = of();
        let path = folder.path().join("dir/c.txt");
        fs::File::open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(of(), first);
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let second = of();
        assert_ne!(second, first);
        fs::write(&path, "other").unwrap();
        assert_ne!(of(), second);
    }
}
