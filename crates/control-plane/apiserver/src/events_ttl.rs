//! Events go after an hour.
//!
//! Upstream counterpart: the TTL that pkg/registry/core/event gives its keys (an etcd lease). Deliberately different:
//! the server takes old events away itself, now and then, and only where events are in use. Of several servers each does
//! so, at times that chance spreads: who comes later finds nothing left.
use std::sync::{Arc, Weak};
use std::time::Duration;

use sampan_store::{Expect, Write};
use sampan_world::{clock, random};

use crate::Server;

/// Upstream's `--event-ttl`.
const TTL_S: i64 = 3600;
const EVERY: Duration = Duration::from_secs(600);
/// Servers with a shared store wait up to so much longer.
const SPREAD_S: u64 = 300;

/// Runs for as long as the server lives.
pub async fn run(server: Weak<Server>) {
    loop {
        let spread = match server.upgrade() {
            None => return,
            Some(server) if server.config.store.is_shared() => Duration::from_secs(random::below(SPREAD_S)),
            Some(_) => Duration::ZERO,
        };
        tokio::time::sleep(EVERY + spread).await;
        let Some(server) = server.upgrade() else { return };
        if server.shutdown.is_cancelled() {
            return;
        }
        sweep(&server).await;
    }
}

/// Removes what was last changed before the TTL.
pub async fn sweep(server: &Arc<Server>) {
    let Some(resource) = server.registry.find("", "v1", "events") else { return };
    let Some(cache) = server.caches.existing(&resource.storage) else { return };
    let now = clock::now();
    let mut old = Vec::new();
    cache.visit("", |object| {
        let Ok(event) = object.value(&resource.storage) else { return };
        let times =
            ["/lastTimestamp", "/series/lastObservedTime", "/eventTime", "/metadata/creationTimestamp"];
        let last = times
            .iter()
            .filter_map(|pointer| event.pointer(pointer)?.as_str()?.parse::<jiff::Timestamp>().ok())
            .max();
        if last.is_none_or(|last| now.duration_since(last).as_secs() > TTL_S) {
            old.push((object.key.clone(), object.revision));
        }
    });
    for (key, revision) in old {
        let write = Write::delete(key.to_string(), Expect::Revision(revision)).deferred();
        if let Err(error) = server.caches.store().write(write).await {
            tracing::debug!(%key, %error, "an old event stays");
        }
    }
}
