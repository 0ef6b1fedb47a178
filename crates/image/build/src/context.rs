//! The build context: a folder, seen through `.dockerignore`.
use std::path::Path;

use crate::dockerignore::{self, Ignore};
use crate::error::{BuildError, io_error, refused};
use crate::rooted::Root;
use crate::select::Tree;

pub struct Context {
    root: Root,
    ignore: Option<Ignore>,
}

impl Context {
    /// `ignore` is the name and text of the file that says what is left out.
    pub fn open(folder: &Path, ignore: Option<&(String, String)>) -> Result<Context, BuildError> {
        let root = Root::open(folder).map_err(io_error(format!("build context {}", folder.display())))?;
        let ignore = match ignore {
            None => None,
            Some((name, text)) => {
                Some(dockerignore::parse(text).map_err(|e| refused(format!("{name}: {e}")))?)
            }
        };
        Ok(Context { root, ignore })
    }

    pub fn tree(&self) -> Tree<'_> {
        Tree { root: &self.root, ignore: self.ignore.as_ref(), is_context: true }
    }
}
