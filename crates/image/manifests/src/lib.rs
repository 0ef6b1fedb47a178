//! Manifest lists: made from images of single platforms, kept while they are pending, pushed, shown.
//!
//! Upstream counterpart: `docker manifest` (docker/cli, cli/command/manifest and cli/manifest), whose words, order of
//! members and bytes of the pushed list these are. Deliberate differences: a member may come from another registry or
//! repository and is copied; `create` always asks the registry again; platforms are checked against what is in the
//! images ([`inspect`]); a pending list is one file of ours, not a folder below `~/.docker`.
mod elf;
pub mod inspect;
pub mod json;
mod list;
mod pending;
mod push;
mod resolve;
mod show;

pub use list::{Given, Member, OsPlatform, PendingList};
pub use pending::Store;
pub use push::push;
pub use resolve::{Checks, resolve};
pub use show::{inspect, inspect_list, inspect_member};

use sampan_image::ImageError;

#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("no such manifest: {name} ({why})")]
    NotFound { name: String, why: String },
    #[error("No such manifest: {name}")]
    NotPending { name: String },
    #[error(
        "{name} is a manifest list; name its images, or one of them by digest (`sampan manifest inspect {name}` shows them)"
    )]
    IsList { name: String },
    #[error("manifest entry for image has unsupported os/arch combination: {os}/{arch}")]
    Unsupported { os: String, arch: String },
    #[error(
        "manifest {name} must have an OS and Architecture to be pushed to a registry; `sampan manifest annotate --os OS --arch ARCH` sets them"
    )]
    NoPlatform { name: String },
    #[error("{name}: {error}")]
    Image { name: String, error: ImageError },
    #[error("pending manifest lists in {path}: {message}")]
    Store { path: String, message: String },
}

impl ManifestError {
    /// An error of a registry, under the name of the image it is about.
    fn of(name: &sampan_image::Reference, error: ImageError) -> ManifestError {
        let name = name.to_string();
        match error {
            ImageError::NotFound(what) => {
                let why = format!("its registry does not have {what}; check name and tag");
                ManifestError::NotFound { name, why }
            }
            ImageError::Denied(what) => {
                let why = format!("{what}; `docker login` or registries.yaml give credentials");
                ManifestError::Image { name, error: ImageError::Denied(why) }
            }
            // What a TLS client says of a server that speaks plain HTTP.
            ImageError::Unavailable(what)
                if what.contains("InvalidContentType") || what.contains("corrupt") =>
            {
                let why = format!("{what}; it does not seem to speak TLS: --insecure allows plain HTTP");
                ManifestError::Image { name, error: ImageError::Unavailable(why) }
            }
            ImageError::Unavailable(what) if what.contains("certificate") => {
                let why = format!("{what}; give its authority in registries.yaml, or --insecure");
                ManifestError::Image { name, error: ImageError::Unavailable(why) }
            }
            error => ManifestError::Image { name, error },
        }
    }
}
