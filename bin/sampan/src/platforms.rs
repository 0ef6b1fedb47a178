//! Which platforms an image really has, asked of its registry through the server's mirrors and the pod's pull secrets.
//!
//! The scheduler bounds and caches its own questions; the DaemonSet controller asks on every sync, so answers are kept
//! here for a minute, at most [`ANSWERS_MAX`].
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{PodSpec, Secret};
use kube::{Api, Client};
use sampan_drivers::runtime::{Auth, Platform};
use sampan_image::{Reference, Registries};
use sampan_kubelet::pull;
use sampan_scheduler::{ImageQuery, Platforms};
use tokio::sync::Mutex;
use tokio::time::Instant;

const ANSWERS_MAX: usize = 256;
const FRESH: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(5);

pub struct RegistryPlatforms {
    images: sampan_image::Client,
    client: Client,
    answers: Mutex<HashMap<String, (Option<Vec<Platform>>, Instant)>>,
}

impl RegistryPlatforms {
    /// `client` must be allowed to read pull secrets.
    pub fn new(registries: Registries, client: Client) -> Arc<Self> {
        Arc::new(Self { images: sampan_image::Client::new(registries), client, answers: Mutex::default() })
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

    /// For the DaemonSet controller: the platforms of each image that the pod has pulled, where they are known.
    pub async fn of_pod(&self, namespace: String, spec: PodSpec) -> Vec<Vec<Platform>> {
        let secrets = spec.image_pull_secrets.unwrap_or_default();
        let pull_secrets: Vec<String> = secrets.into_iter().map(|s| s.name).collect();
        let containers = spec.init_containers.unwrap_or_default().into_iter().chain(spec.containers);
        let pulled = containers.filter(|c| c.image_pull_policy.as_deref() != Some("Never"));
        let images: BTreeSet<String> = pulled.filter_map(|c| c.image).collect();
        let mut known = Vec::new();
        for image in images {
            let query =
                ImageQuery { image, namespace: namespace.clone(), pull_secrets: pull_secrets.clone() };
            known.extend(self.remembered(&query).await);
        }
        known
    }

    async fn remembered(&self, query: &ImageQuery) -> Option<Vec<Platform>> {
        let now = sampan_world::clock::monotonic();
        if let Some((answer, at)) = self.answers.lock().await.get(&query.image)
            && now.duration_since(*at) < FRESH
        {
            return answer.clone();
        }
        let answer = tokio::time::timeout(PATIENCE, self.lookup(query)).await.ok().flatten();
        let mut answers = self.answers.lock().await;
        answers.retain(|_, (_, at)| now.duration_since(*at) < FRESH);
        if answers.len() < ANSWERS_MAX {
            answers.insert(query.image.clone(), (answer.clone(), now));
        }
        answer
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
