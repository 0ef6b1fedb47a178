//! Deletes bootstrap tokens when they expire. Upstream counterpart: pkg/controller/bootstrap/tokencleaner.go.
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Client};
use sampan_client::informer::key;
use sampan_client::{Informer, WorkQueue};
use sampan_world::clock;

use crate::controller::{Controller, Descriptor, Key, SyncResult, run};
use crate::controller_ref::namespace;
use crate::{Scope, api_error};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "token-cleaner-controller",
    service_account: "token-cleaner",
    component: "token-cleaner",
    build: |scope| run(TokenCleaner::new(&scope)),
};

const NAMESPACE: &str = "kube-system";
const EXPIRATION: &str = "expiration";

struct TokenCleaner {
    client: Client,
    secrets: Informer<Secret>,
    queue: WorkQueue<Key>,
}

impl TokenCleaner {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            secrets: scope.informers.selected("type=bootstrap.kubernetes.io/token"),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.secrets.on_event(move |event| me.queue.add(key(&**event.object())));
        this
    }
}

/// How long a token may stay; one whose expiration cannot be read is over, one without any stays for good.
fn left(secret: &Secret, now: Timestamp) -> Option<Duration> {
    let expiration = secret.data.as_ref()?.get(EXPIRATION)?;
    let at: Option<Timestamp> = std::str::from_utf8(&expiration.0).ok().and_then(|t| t.parse().ok());
    let left = at.map_or(0, |at| at.duration_since(now).as_millis().max(0));
    Some(Duration::from_millis(u64::try_from(left).unwrap_or(0)))
}

impl Controller for TokenCleaner {
    type Key = Key;
    const WORKERS: usize = 1;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.secrets.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.secrets.list().iter().map(|s| key(&**s)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(secret) = self.secrets.get(&key.0, &key.1).filter(|s| namespace(&**s) == NAMESPACE) else {
            return Ok(());
        };
        let Some(left) = left(&secret, clock::now()) else { return Ok(()) };
        if !left.is_zero() {
            self.queue.add_after(key, left);
            return Ok(());
        }
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &key.0);
        let exactly = Preconditions { uid: secret.metadata.uid.clone(), resource_version: None };
        api_error::found(api.delete(&key.1, &DeleteParams::default().preconditions(exactly)).await)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expiry() {
        let secret = |text: Option<&str>| Secret {
            data: text.map(|t| [(EXPIRATION.to_string(), k8s_openapi::ByteString(t.into()))].into()),
            ..Secret::default()
        };
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        assert_eq!(left(&secret(None), now), None);
        assert_eq!(left(&secret(Some("2026-01-01T00:00:05Z")), now), Some(Duration::from_secs(5)));
        assert_eq!(left(&secret(Some("2025-01-01T00:00:00Z")), now), Some(Duration::ZERO));
        assert_eq!(left(&secret(Some("soon")), now), Some(Duration::ZERO));
    }
}
