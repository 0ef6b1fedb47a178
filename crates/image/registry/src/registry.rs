//! The registry itself, whatever protocol it is reached by: repositories, blobs, uploads, manifests, tags, referrers.
//!
//! Upstream counterpart: distribution's `registry/storage`. How it stays consistent without a database: content is
//! written before what refers to it and removed after; whoever makes content reachable holds `gate` for reading and
//! the garbage collection holds it for writing while it removes, having been told of all that became reachable since it
//! began.
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Mutex, MutexGuard, Notify, RwLock, RwLockReadGuard};

use crate::auth::AccessController;
use crate::digest::{Algorithm, Digest};
use crate::error::RegistryError;
use crate::layout;
use crate::name;
use crate::proxy::Proxy;
use crate::storage::{Storage, StorageError, Sync};

mod blobs;
mod collect;
mod documents;
mod manifests;
mod referrers;
mod uploads;
mod usage;

pub use blobs::BlobInfo;
pub use collect::{CollectOptions, Collected};
pub use documents::{Document, MANIFEST_MAX_BYTES};
pub use manifests::{Manifest, Reference};
pub use uploads::UploadStatus;
pub use usage::Quota;

/// Locks that manifests and tags of a repository are changed under; repositories share them.
const STRIPES: usize = 32;
/// How exactly it is known when a cached image was last pulled.
const USE_NOTED: Duration = Duration::from_secs(600);

#[derive(Clone, Debug)]
pub struct Options {
    /// Pushes and deletions are refused.
    pub read_only: bool,
    /// Deletions are allowed.
    pub delete_enabled: bool,
    /// Manifests are refused whose blobs and manifests aren't there.
    pub validate: bool,
    pub collect: CollectOptions,
    pub quota: Quota,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            read_only: false,
            delete_enabled: true,
            validate: true,
            collect: CollectOptions::default(),
            quota: Quota::default(),
        }
    }
}

pub struct Registry {
    storage: Arc<dyn Storage>,
    pub(crate) options: Options,
    pub(crate) access: AccessController,
    pub(crate) proxy: Option<Proxy>,
    gate: RwLock<()>,
    /// What became reachable since the garbage collection under way began.
    live: parking_lot::Mutex<Option<HashSet<u128>>>,
    collecting: Mutex<()>,
    collect_now: Notify,
    stripes: [Mutex<()>; STRIPES],
    sessions: uploads::Sessions,
    usage: usage::Usage,
}

impl Registry {
    pub fn new(storage: Arc<dyn Storage>, options: Options) -> Registry {
        Registry {
            storage,
            access: AccessController::None,
            proxy: None,
            gate: RwLock::new(()),
            live: parking_lot::Mutex::new(None),
            collecting: Mutex::new(()),
            collect_now: Notify::new(),
            stripes: std::array::from_fn(|_| Mutex::new(())),
            sessions: uploads::Sessions::default(),
            usage: usage::Usage::new(options.quota.clone()),
            options,
        }
    }

    /// Asks everyone who they are.
    pub fn with_access(mut self, access: AccessController) -> Registry {
        self.access = access;
        self
    }

    /// Fetches from another registry what isn't here.
    pub fn with_proxy(mut self, proxy: Proxy) -> Registry {
        self.proxy = Some(proxy);
        self
    }

    /// Prepares for serving: with a quota, adds up what is stored.
    pub async fn start(&self) -> Result<(), RegistryError> {
        if self.usage.is_counted() {
            self.count_usage().await?;
        }
        Ok(())
    }

    /// Collects garbage from time to time and when [`Registry::collect_soon`] asks; never returns.
    pub async fn maintain(&self) {
        loop {
            let due = async {
                match self.options.collect.interval {
                    Some(interval) => tokio::time::sleep(interval).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                () = self.collect_now.notified() => {}
            }
            match self.collect(false).await {
                Ok(collected) => tracing::info!("garbage collection: {collected}"),
                Err(error) => tracing::error!(%error, "garbage collection gave up; nothing is lost"),
            }
        }
    }

    pub fn collect_soon(&self) {
        self.collect_now.notify_one();
    }

    pub(crate) fn storage(&self) -> &dyn Storage {
        self.storage.as_ref()
    }

    /// Notes that a cached manifest is of use still.
    pub(crate) async fn used(&self, repository: &str, digest: &Digest) {
        let key = layout::revision(repository, digest);
        if let Ok(Some(stat)) = self.storage.stat(&key).await
            && is_older(stat.modified, USE_NOTED)
        {
            let _ = self.storage.touch(&key).await;
        }
    }

    async fn making_reachable(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().await
    }

    /// Keeps what is being made reachable from a collection under way; the caller holds the gate.
    fn keep<'a>(&self, digests: impl IntoIterator<Item = &'a Digest>) {
        if let Some(live) = self.live.lock().as_mut() {
            live.extend(digests.into_iter().map(Digest::key));
        }
    }

    async fn changing(&self, repository: &str) -> MutexGuard<'_, ()> {
        let hash = repository.bytes().fold(0_usize, |h, b| h.wrapping_mul(31).wrapping_add(usize::from(b)));
        self.stripes[hash % STRIPES].lock().await
    }

    async fn link(&self, key: &str, digest: &Digest, sync: Sync) -> Result<(), StorageError> {
        self.storage.put(key, Bytes::from(digest.to_string()), sync).await
    }

    async fn exists(&self, key: &str) -> Result<bool, StorageError> {
        Ok(self.storage.stat(key).await?.is_some())
    }

    /// Tags in order; an error when there is no such repository.
    pub async fn tags(&self, repository: &str) -> Result<Vec<String>, RegistryError> {
        let tags = self.storage.list(&layout::tags(repository), Some(layout::TAG_CURRENT)).await?;
        if tags.is_empty() && !self.has_repository(repository).await? {
            return Err(RegistryError::NameUnknown(repository.to_string()));
        }
        Ok(tags)
    }

    async fn has_repository(&self, repository: &str) -> Result<bool, RegistryError> {
        let entries = self.storage.list(&layout::repository(repository), None).await?;
        Ok(entries.iter().any(|e| e.starts_with('_')))
    }

    /// All repositories, in order.
    pub async fn repositories(&self) -> Result<Vec<String>, RegistryError> {
        let mut found = Vec::new();
        let mut open = vec![String::new()];
        while let Some(parent) = open.pop() {
            let folder = if parent.is_empty() {
                layout::REPOSITORIES.to_string()
            } else {
                layout::repository(&parent)
            };
            let entries = self.storage.list(&folder, None).await?;
            if entries.iter().any(|e| e == "_manifests" || e == "_layers" || e == "_uploads") {
                found.push(parent.clone());
            }
            for entry in entries.iter().rev() {
                let child = if parent.is_empty() { entry.clone() } else { format!("{parent}/{entry}") };
                if name::is_repository(&child) {
                    open.push(child);
                }
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Repositories that have, or had, manifests: what the catalog shows.
    pub async fn catalog(&self) -> Result<Vec<String>, RegistryError> {
        let mut shown = Vec::new();
        for repository in self.repositories().await? {
            let mut any = false;
            for algorithm in Algorithm::ALL {
                any = any
                    || !self
                        .storage
                        .list(&layout::revisions(&repository, algorithm), Some(layout::LINK))
                        .await?
                        .is_empty();
            }
            if any {
                shown.push(repository);
            }
        }
        Ok(shown)
    }

    /// Digests that have a folder with a link below `folder`.
    async fn linked(&self, folder: &str, algorithm: Algorithm) -> Result<Vec<Digest>, StorageError> {
        let names = self.storage.list(folder, Some(layout::LINK)).await?;
        Ok(names.iter().filter_map(|hex| Digest::new(algorithm, hex)).collect())
    }
}

/// Whether something of that age is older than `limit`, by the wall clock; what is from the future isn't.
fn is_older(modified: i64, limit: Duration) -> bool {
    let age = sampan_world::clock::now().as_second().saturating_sub(modified);
    age >= 0 && age.unsigned_abs() >= limit.as_secs()
}
