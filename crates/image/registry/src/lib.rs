//! An OCI Distribution 1.1 registry: the server behind `sampan registry serve`, usable in-process by
//! [`Registry::router`].
//!
//! Upstream counterparts: opencontainers/distribution-spec and distribution/distribution (docker-registry), whose layout
//! on disk, flags and behaviour this follows. What stays true: manifests are kept byte by byte; a blob has the digest
//! that it is asked for by; what was acknowledged survives kill -9; garbage collection runs while pushes go on.
//! Differences: an upload keeps the bytes of a broken request so that it can be resumed; referrers are listed; schema 1
//! manifests are refused.
pub mod auth;
pub mod digest;
pub mod error;
pub mod holdings;
mod http;
pub mod layout;
pub mod name;
mod outbound;
pub mod proxy;
pub mod registry;
pub mod serve;
pub mod storage;

pub use auth::AccessController;
pub use digest::Digest;
pub use error::RegistryError;
pub use holdings::{Holdings, Lending};
pub use proxy::Proxy;
pub use registry::{CollectOptions, Collected, Options, Quota, Registry};
pub use storage::Storage;
