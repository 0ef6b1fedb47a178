//! Others who may hold what a registry has: the nodes of a cluster, which share what they pulled.
//!
//! Upstream counterparts: spegel, and K3s' embedded registry mirror. What stays true: whoever hands out content is
//! believed nothing that a digest can tell, and needs no credentials; a tag means what the first holder says, so `latest`
//! is the registry's to tell while it can be reached.
use async_trait::async_trait;
use http::Response;
use sampan_drivers::runtime::ImageError;

use crate::reference::Reference;
use crate::transport::Body;

/// Asked besides a registry's endpoints.
#[async_trait]
pub trait Mirror: Send + Sync {
    /// Whether images of this registry are shared: asked for, and kept for those who ask.
    fn covers(&self, registry: &str) -> bool;
    /// Those to ask for `path` (`manifests/…` or `blobs/…`) of the image's repository, nearest first.
    async fn sources(&self, reference: &Reference, path: &str) -> Vec<Box<dyn MirrorSource>>;
}

/// One who says to have it.
#[async_trait]
pub trait MirrorSource: Send + Sync {
    fn name(&self) -> &str;
    /// What was asked for, from `offset` on (206), or all of it (200).
    async fn get(&self, offset: u64) -> Result<Response<Body>, ImageError>;
}
