//! Images by hand: what `sampan image` asks of the node that runs.
use sampan_drivers::runtime::RuntimeError;

use super::Node;
use crate::images::{ImageFiles, ImageRecord};

impl Node {
    pub fn image_records(&self) -> Vec<ImageRecord> {
        self.inner.images.list()
    }

    pub fn find_image(&self, image: &str) -> Option<ImageRecord> {
        self.inner.images.find(image)
    }

    pub async fn tag_image(&self, image: &str, name: &str) -> Result<(), RuntimeError> {
        self.inner.images.tag(image, name).await
    }

    /// The containers made from an image, as `namespace/pod/container`.
    pub fn image_users(&self, id: &str) -> Vec<String> {
        let state = self.inner.state.lock();
        let users = state.containers.values().filter(|c| c.config.image_id == id);
        let named = users.map(|c| {
            let pod = state.sandboxes.get(&c.sandbox_id).map(|s| &s.config);
            let pod = pod.map_or_else(String::new, |p| format!("{}/{}/", p.namespace, p.name));
            format!("{pod}{}", c.config.name)
        });
        named.collect()
    }

    /// Removes images that no container is made from: those without a name, or `all`.
    pub async fn prune_images(&self, all: bool) -> Result<Vec<ImageRecord>, RuntimeError> {
        let used: Vec<String> =
            self.inner.state.lock().containers.values().map(|c| c.config.image_id.clone()).collect();
        self.inner.images.prune(all, &used, &self.used_layers()).await
    }

    /// Keeps what the archives on this node hold for other nodes, when the mirror was turned on after the start.
    pub async fn keep_archives(&self) {
        let (images, archives) = (self.inner.images.clone(), self.inner.options.data_dir.join("images"));
        if let Err(error) = tokio::task::spawn_blocking(move || images.import_folder(&archives)).await {
            tracing::warn!(%error, "the archives on this node are not shared");
        }
    }

    /// A manifest or an index that another node may have, by tag or digest. Blocking.
    pub fn shared_manifest(&self, registry: &str, repository: &str, reference: &str) -> Option<Vec<u8>> {
        self.inner.images.shared_manifest(registry, repository, reference)
    }

    /// A blob that another node may have, and its size. Blocking.
    pub fn shared_blob(&self, registry: &str, digest: &str) -> Option<(std::fs::File, u64)> {
        self.inner.images.shared_blob(registry, digest)
    }

    pub fn image_files(&self, image: &str) -> Option<ImageFiles> {
        self.inner.images.files(image)
    }
}
