//! Images built from Dockerfiles, each platform natively or by emulation.
//!
//! Upstream counterparts: moby/buildkit's Dockerfile frontend, file operations, executor and exporters. How it goes:
//! [`dockerfile`] says what is to be done, [`build::build`] does it stage by stage on overlay mounts of the layers in a
//! [`store::Store`], and a [`Built`] is a [`sampan_image::source::Source`] that is pushed and exported like any other.
//! What stays true: a layer and everything about it follow from what it is made of; a key of the cache stands for one
//! content; mounts live in a mount namespace of the build's own, so that a killed build leaves none.
mod base;
pub mod build;
mod commit;
mod context;
mod copy;
pub mod dockerfile;
pub mod dockerignore;
mod download;
mod emulation;
mod error;
mod image;
mod options;
mod output;
mod overlay;
mod progress;
mod rooted;
mod run;
mod select;
mod send;
mod stage;
pub mod store;

pub use build::{Means, build, remember};
pub use emulation::machine_platform;
pub use error::BuildError;
pub use options::{Cancel, LocalImages, Options};
pub use output::{Built, BuiltImage, Exported};
pub use progress::{Kind, Progress, plain};
pub use send::{receive_context, send_context};
