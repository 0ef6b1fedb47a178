//! What a controller has written and not yet seen in its informer. Upstream counterpart:
//! pkg/controller/controller_utils.go (UIDTrackingControllerExpectations).
//!
//! A controller may count its objects only when its own creations and deletions have been observed, otherwise it
//! would create or delete twice. An expectation that is not met in five minutes is given up, as upstream does.
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use parking_lot::Mutex;
use sampan_world::clock;
use tokio::time::Instant;

use crate::controller::Key;

const TIMEOUT: Duration = Duration::from_secs(300);

#[derive(Default)]
pub struct Expectations(Mutex<HashMap<Key, Pending>>);

struct Pending {
    creations: i64,
    /// UIDs of the objects that are expected to go.
    deletions: HashSet<String>,
    at: Instant,
}

impl Expectations {
    /// Expects `creations` more and the deletion of `deletions`; replaces what was expected before.
    pub fn expect(&self, key: &Key, creations: usize, deletions: impl IntoIterator<Item = String>) {
        let deletions = deletions.into_iter().collect();
        let pending = Pending { creations: creations as i64, deletions, at: clock::monotonic() };
        self.0.lock().insert(key.clone(), pending);
    }

    pub fn creation_observed(&self, key: &Key) {
        self.lower_creations(key, 1);
    }

    pub fn lower_creations(&self, key: &Key, by: usize) {
        if let Some(pending) = self.0.lock().get_mut(key) {
            pending.creations -= by as i64;
        }
    }

    pub fn deletion_observed(&self, key: &Key, uid: &str) {
        if let Some(pending) = self.0.lock().get_mut(key) {
            pending.deletions.remove(uid);
        }
    }

    /// Whether the controller may act on `key`.
    pub fn satisfied(&self, key: &Key) -> bool {
        match self.0.lock().get(key) {
            None => true,
            Some(p) => (p.creations <= 0 && p.deletions.is_empty()) || p.at.elapsed() > TIMEOUT,
        }
    }

    pub fn forget(&self, key: &Key) {
        self.0.lock().remove(key);
    }
}

/// The newest version of each object that a controller itself has written: reading an older one from the informer
/// would undo or repeat what was just done. Upstream counterpart: pkg/controller/util/consistency.
#[derive(Default)]
pub struct OwnWrites(Mutex<HashMap<Key, (String, u64)>>);

impl OwnWrites {
    /// Remembers what the API answered to a write.
    pub fn wrote<K: kube::Resource>(&self, object: &K) {
        let meta = object.meta();
        let version = meta.resource_version.as_deref().and_then(|v| v.parse().ok());
        if let (Some(version), Some(uid)) = (version, meta.uid.clone()) {
            self.0.lock().insert(sampan_client::informer::key(object), (uid, version));
        }
    }

    /// Whether `object`, as the informer has it, is not older than the last write. When it is, the informer will
    /// bring the newer one, and with it the next reconciliation.
    pub fn observed<K: kube::Resource>(&self, object: &K) -> bool {
        let mut writes = self.0.lock();
        let key = sampan_client::informer::key(object);
        let meta = object.meta();
        let version: Option<u64> = meta.resource_version.as_deref().and_then(|v| v.parse().ok());
        let behind = match (writes.get(&key), version) {
            (Some((uid, wrote)), Some(version)) => meta.uid.as_ref() == Some(uid) && version < *wrote,
            _ => false,
        };
        if !behind {
            writes.remove(&key);
        }
        !behind
    }

    pub fn forget(&self, key: &Key) {
        self.0.lock().remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn is_satisfied_when_all_was_observed_or_given_up() {
        let (e, key) = (Expectations::default(), ("ns".to_string(), "a".to_string()));
        assert!(e.satisfied(&key));
        e.expect(&key, 2, ["u1".to_string()]);
        e.creation_observed(&key);
        e.deletion_observed(&key, "u1");
        e.deletion_observed(&key, "u1");
        assert!(!e.satisfied(&key));
        e.creation_observed(&key);
        assert!(e.satisfied(&key));
        e.expect(&key, 1, []);
        tokio::time::advance(TIMEOUT + Duration::from_secs(1)).await;
        assert!(e.satisfied(&key));
    }
}
