//! What can go wrong in a build.
use std::io;

use sampan_image::ImageError;

use crate::dockerfile;

#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Points at a line of the Dockerfile.
    #[error(transparent)]
    Dockerfile(#[from] dockerfile::Error),
    #[error("{error}")]
    Step { error: dockerfile::Error, output: Vec<String> },
    #[error(
        "{what}: no space left on the disk of {place}; `sampan image prune --build-cache` frees what builds keep"
    )]
    NoSpace { what: String, place: String },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{name}: {source}")]
    Image { name: String, source: ImageError },
    #[error("{0}")]
    Refused(String),
    #[error("the build was interrupted")]
    Cancelled,
}

/// Makes an error of what failed, and tells a full disk from everything else.
pub fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> BuildError {
    let what = what.into();
    move |source| match is_full(&source) {
        true => BuildError::NoSpace { what, place: "the build's data".into() },
        false => BuildError::Io { what, source },
    }
}

pub fn is_full(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    code == Some(rustix::io::Errno::NOSPC.raw_os_error())
        || code == Some(rustix::io::Errno::DQUOT.raw_os_error())
        || error.kind() == io::ErrorKind::StorageFull
}

pub fn refused(message: impl Into<String>) -> BuildError {
    BuildError::Refused(message.into())
}
