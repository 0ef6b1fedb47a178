//! Images as registries and archives hold them: names, platforms, manifests, and the client that fetches them.
//!
//! Upstream counterparts: containerd's `reference`, `platforms` and `remotes/docker` packages; K3s' registries.yaml.
//! Nothing here keeps state on disk: what is fetched goes to a [`client::Sink`] that the caller owns.
pub mod archive;
pub mod client;
pub mod manifest;
pub mod platform;
pub mod reference;
pub mod registries;
mod transport;

pub use client::Client;
pub use reference::Reference;
pub use registries::Registries;

pub use sampan_drivers::runtime::{Auth, ImageError, Platform};
