//! What the scheduler asks about images: the platforms each is built for. `bin/sampan` implements this with the image
//! client, since planes do not import each other.
use async_trait::async_trait;
use sampan_drivers::runtime::Platform;

/// An image of a pod, with what its registry may want to see.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageQuery {
    /// As the pod names it.
    pub image: String,
    /// The pod's namespace, where the pull secrets are.
    pub namespace: String,
    /// Names of the pod's `imagePullSecrets` (the service account's were added to it at admission).
    pub pull_secrets: Vec<String>,
}

/// Looks up the platforms of images. The scheduler bounds, times out and caches the calls itself.
#[async_trait]
pub trait Platforms: Send + Sync {
    /// The platforms `query.image` is built for; `None` where that cannot be known (registry down, access denied,
    /// no such image): then the scheduler leaves the pod's choice of nodes alone.
    async fn lookup(&self, query: &ImageQuery) -> Option<Vec<Platform>>;
}
