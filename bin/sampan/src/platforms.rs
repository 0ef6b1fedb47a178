//! Which platforms an image really has, asked of its registry through the server's mirrors and the pod's pull secrets.
//! Every question goes there: the scheduler's cache is before it.
use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use sampan_drivers::platform::{ImageQuery, Platforms};
use sampan_drivers::runtime::{Auth, Platform};
use sampan_image::{Reference, Registries};
use sampan_kubelet::pull;

pub struct RegistryPlatforms {
    images: sampan_image::Client,
    client: Client,
}

impl RegistryPlatforms {
    /// `client` must be allowed to read pull secrets.
    pub fn new(registries: Registries, client: Client) -> Self {
        Self { images: sampan_image::Client::new(registries), client }
    }

    /// Asks nodes too what their images are.
    pub fn with_mirror(mut self, mirror: Option<Arc<dyn sampan_image::Mirror>>) -> Self {
        self.images = self.images.with_mirror(mirror);
        self
    }

    /// Credentials for the image out of the pod's pull secrets.
    async fn credentials(&self, query: &ImageQuery) -> Vec<Auth> {
        let secrets = Api::<Secret>::namespaced(self.client.clone(), &query.namespace);
        let mut found = Vec::new();
        for name in &query.pull_secrets {
            if let Ok(Some(secret)) = secrets.get_opt(name).await {
                found.extend(pull::from_secret(&secret, &query.image));
            }
        }
        found.into_iter().map(|(_, auth)| auth).collect()
    }
}

#[async_trait]
impl Platforms for RegistryPlatforms {
    async fn lookup(&self, query: &ImageQuery) -> Option<Vec<Platform>> {
        let reference = Reference::parse(&query.image).ok()?;
        let credentials = self.credentials(query).await;
        match self.images.platforms(&reference, &credentials).await {
            Ok(platforms) => Some(platforms),
            Err(error) => {
                tracing::debug!(image = query.image, %error, "the image's platforms are not known");
                None
            }
        }
    }
}
