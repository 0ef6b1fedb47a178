//! Images as registries and archives hold them: names, platforms, manifests, and the client that fetches them.
//!
//! Upstream counterparts: containerd's `reference`, `platforms` and `remotes/docker` packages; K3s' registries.yaml.
//! Nothing here keeps state on disk: what is fetched goes to a [`client::Sink`] or a [`layout::LayoutWriter`] that the
//! caller owns; what is pushed comes from a [`source::Source`].
pub mod archive;
pub mod client;
pub mod copy;
pub mod credentials;
pub mod download;
pub mod layout;
pub mod manifest;
pub mod mirror;
pub mod platform;
pub mod reference;
pub mod registries;
pub mod repack;
pub mod source;
mod transport;

pub use client::Client;
pub use credentials::Keychain;
pub use mirror::{Mirror, MirrorSource};
pub use reference::Reference;
pub use registries::Registries;
pub use transport::Body;

pub use sampan_drivers::runtime::{Auth, ImageError, Platform};
