//! A build context on its way to another machine: a tar of what `.dockerignore` leaves.
//!
//! Upstream counterpart: fsutil's `send`. Files belong to root there as they do in every context, so owners are not sent.
use std::io::{self, Write};
use std::path::Path;

use rustix::fs::FileType;
use tar::{Builder, EntryType, Header};

use crate::context::Context;
use crate::dockerignore::Ignore;
use crate::error::{BuildError, io_error};
use crate::rooted::kind;
use crate::select::{Wanted, select};

/// Writes the context below `folder`; `ignore` is the name and text of the file that says what is left out.
pub fn send_context(
    folder: &Path,
    ignore: Option<&(String, String)>,
    out: impl Write,
) -> Result<(), BuildError> {
    let context = Context::open(folder, ignore)?;
    let tree = context.tree();
    let none = Ignore::default();
    let mut tar = Builder::new(out);
    for pick in select(tree, ".", &Wanted { exclude: &none, parents: false })? {
        for item in &pick.items {
            let sent = (|| {
                let mut header = Header::new_gnu();
                header.set_mode(item.stat.st_mode & 0o7777);
                header.set_mtime(u64::try_from(item.stat.st_mtime).unwrap_or(0));
                header.set_size(0);
                match kind(&item.stat) {
                    FileType::Directory => {
                        header.set_entry_type(EntryType::Directory);
                        tar.append_data(&mut header, &item.target, io::empty())
                    }
                    FileType::Symlink => {
                        header.set_entry_type(EntryType::Symlink);
                        tar.append_link(&mut header, &item.target, tree.root.read_link(&item.source)?)
                    }
                    FileType::RegularFile => {
                        let file = tree.root.file(&item.source)?;
                        header.set_size(file.metadata()?.len());
                        tar.append_data(&mut header, &item.target, file)
                    }
                    _ => Ok(()),
                }
            })();
            sent.map_err(io_error(format!("sending {}", item.source.display())))?;
        }
    }
    tar.finish().map_err(io_error("sending the build context"))
}

/// Unpacks what [`send_context`] wrote.
pub fn receive_context(tar: impl io::Read, folder: &Path) -> Result<(), BuildError> {
    match sampan_runtime::unpack(tar, folder, &[], &sampan_runtime::Limits::default()) {
        Ok(_) => Ok(()),
        Err(sampan_runtime::UnpackError::Io(e)) => Err(io_error("receiving the build context")(e)),
        Err(sampan_runtime::UnpackError::NoSpace) => {
            Err(io_error("receiving the build context")(rustix::io::Errno::NOSPC.into()))
        }
        Err(e) => Err(crate::error::refused(format!("the build context: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_not_sent() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("a/b")).unwrap();
        for (name, text) in [("a/b/c", "c"), ("a/d.log", "d"), ("e", "e")] {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        std::os::unix::fs::symlink("e", folder.path().join("link")).unwrap();
        let mut bytes = Vec::new();
        let ignore = (".dockerignore".to_string(), "**/*.log\n".to_string());
        send_context(folder.path(), Some(&ignore), &mut bytes).unwrap();
        let mut names = Vec::new();
        for entry in tar::Archive::new(bytes.as_slice()).entries().unwrap() {
            names.push(String::from_utf8_lossy(&entry.unwrap().path_bytes()).into_owned());
        }
        assert_eq!(names, ["a", "a/b", "a/b/c", "e", "link"]);
    }
}
