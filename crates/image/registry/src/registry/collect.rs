//! Garbage collection while the registry serves: mark what manifests need, sweep the rest.
//!
//! Upstream counterpart: distribution's `registry/storage/garbagecollect.go`, which needs the registry stopped or
//! read-only. What stays true: nothing is removed that a manifest of its repository refers to, that became reachable
//! since the collection began, or that is younger than the grace period; when anything can't be read, nothing that it
//! could refer to is removed. Removal takes links before content, so that a crash leaves garbage, never a dead link.
use std::collections::HashMap;
use std::fmt;

use super::*;

/// Removed under one hold of the gate: pushes wait no longer than for this many.
const BATCH: usize = 16;
/// How many missing blobs are named one by one.
const NAMED_MAX: usize = 32;

#[derive(Clone, Debug)]
pub struct CollectOptions {
    /// How long what nothing refers to is kept: pushes under way need it soon.
    pub grace: Duration,
    /// How often; `None` for only when asked.
    pub interval: Option<Duration>,
    /// Removes manifests too that no tag leads to, directly or through an index or a subject.
    pub delete_untagged: bool,
    /// How long an upload may lie idle.
    pub upload_age: Duration,
}

impl Default for CollectOptions {
    fn default() -> CollectOptions {
        CollectOptions {
            grace: Duration::from_secs(3600),
            interval: Some(Duration::from_secs(24 * 3600)),
            delete_untagged: false,
            upload_age: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

/// What a collection found and removed (or would, in a dry run).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    pub repositories: u64,
    pub manifests: u64,
    pub blobs_kept: u64,
    pub manifests_removed: u64,
    pub links_removed: u64,
    pub blobs_removed: u64,
    pub bytes_removed: u64,
    pub uploads_removed: u64,
    /// Leftovers of crashes.
    pub leftovers_removed: u64,
    /// What manifests refer to and the disk doesn't have.
    pub missing: u64,
    pub missing_digests: Vec<Digest>,
}

impl fmt::Display for Collected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} repositories, {} manifests, {} blobs kept; removed {} manifests, {} links, {} blobs ({} bytes), \
             {} uploads, {} leftovers; {} blobs missing",
            self.repositories,
            self.manifests,
            self.blobs_kept,
            self.manifests_removed,
            self.links_removed,
            self.blobs_removed,
            self.bytes_removed,
            self.uploads_removed,
            self.leftovers_removed,
            self.missing
        )
    }
}

/// One collection under way.
struct Collection<'a> {
    registry: &'a Registry,
    dry_run: bool,
    marks: HashSet<u128>,
    collected: Collected,
}

/// Ends the watch for what becomes reachable, however the collection ends.
struct Watch<'a>(&'a Registry);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        *self.0.live.lock() = None;
    }
}

impl Registry {
    /// Collects garbage now. With `dry_run` nothing is removed, only told.
    pub async fn collect(&self, dry_run: bool) -> Result<Collected, RegistryError> {
        let _one = self.collecting.lock().await;
        {
            let _closed = self.gate.write().await;
            *self.live.lock() = Some(HashSet::new());
        }
        let _watch = Watch(self);
        let mut collection =
            Collection { registry: self, dry_run, marks: HashSet::new(), collected: Collected::default() };
        for repository in self.repositories().await? {
            collection.repository(&repository).await?;
        }
        collection.blobs().await?;
        if !dry_run {
            collection.collected.leftovers_removed = self.storage.sweep().await?;
        }
        for digest in &collection.collected.missing_digests {
            tracing::warn!(%digest, "a manifest refers to a blob that is not there");
        }
        Ok(collection.collected)
    }

    /// Adds up what is stored, for the quotas.
    pub(super) async fn count_usage(&self) -> Result<(), RegistryError> {
        let mut sums = usage::Sums::default();
        for repository in self.repositories().await? {
            let mut used = 0;
            for algorithm in Algorithm::ALL {
                for folder in
                    [layout::layers(&repository, algorithm), layout::revisions(&repository, algorithm)]
                {
                    for digest in self.linked(&folder, algorithm).await? {
                        used += self.storage.stat(&layout::blob(&digest)).await?.map_or(0, |s| s.size_bytes);
                    }
                }
            }
            for id in self.storage.list(&layout::uploads(&repository), None).await? {
                let stat = self.storage.upload_stat(&layout::upload(&repository, &id)).await?;
                let size_bytes = stat.map_or(0, |s| s.size_bytes);
                used += size_bytes;
                sums.total += size_bytes;
            }
            sums.repositories.insert(repository, used);
        }
        for (_, folder) in self.blob_folders().await? {
            for hex in self.storage.list(&folder, Some(layout::DATA)).await? {
                let stat = self.storage.stat(&format!("{folder}/{hex}/{}", layout::DATA)).await?;
                sums.total += stat.map_or(0, |s| s.size_bytes);
            }
        }
        self.usage.set(sums);
        Ok(())
    }

    async fn blob_folders(&self) -> Result<Vec<(Algorithm, String)>, StorageError> {
        let mut folders = Vec::new();
        for algorithm in Algorithm::ALL {
            let root = format!("{}/{}", layout::BLOBS, algorithm.name());
            for prefix in self.storage.list(&root, None).await? {
                folders.push((algorithm, format!("{root}/{prefix}")));
            }
        }
        Ok(folders)
    }

    fn is_live(&self, digest: &Digest) -> bool {
        self.live.lock().as_ref().is_none_or(|live| live.contains(&digest.key()))
    }
}

impl Collection<'_> {
    async fn repository(&mut self, repository: &str) -> Result<(), RegistryError> {
        self.collected.repositories += 1;
        self.uploads(repository).await?;
        let mut documents = HashMap::new();
        let mut readable = true;
        for algorithm in Algorithm::ALL {
            let folder = layout::revisions(repository, algorithm);
            for digest in self.registry.linked(&folder, algorithm).await? {
                readable &= self.read(repository, digest, &mut documents).await?;
            }
        }
        if readable && self.registry.options.collect.delete_untagged {
            self.untagged(repository, &mut documents).await?;
        }
        self.expired(repository, &mut documents).await?;
        let mut marks = HashSet::new();
        for (digest, document) in &documents {
            self.collected.manifests += 1;
            marks.insert(digest.key());
            let Some(document) = document else { continue };
            for reference in &document.references {
                marks.insert(reference.key());
                self.check(repository, reference, document).await?;
            }
            self.heal_referrer(repository, digest, document).await?;
        }
        self.links(repository, &marks, readable).await?;
        self.referrers(repository).await?;
        self.marks.extend(marks);
        self.empty(repository).await
    }

    /// Reads a manifest; `false` when what it needs can't be told.
    async fn read(
        &mut self,
        repository: &str,
        digest: Digest,
        documents: &mut HashMap<Digest, Option<Document>>,
    ) -> Result<bool, RegistryError> {
        let storage = &self.registry.storage;
        let document = match storage.get(&layout::blob(&digest)).await? {
            Some(bytes) => Document::parse(None, &bytes).ok(),
            None => {
                // gone meanwhile with its link, or lost
                if self.registry.exists(&layout::revision(repository, &digest)).await? {
                    self.missing(&digest);
                }
                return Ok(true);
            }
        };
        let readable = document.is_some();
        if !readable {
            tracing::warn!(repository, %digest, "a manifest can't be read; its repository keeps all its blobs");
        }
        documents.insert(digest, document);
        Ok(readable)
    }

    fn missing(&mut self, digest: &Digest) {
        self.collected.missing += 1;
        if self.collected.missing_digests.len() < NAMED_MAX {
            self.collected.missing_digests.push(digest.clone());
        }
    }

    async fn check(
        &mut self,
        repository: &str,
        reference: &Digest,
        document: &Document,
    ) -> Result<(), RegistryError> {
        let registry = self.registry;
        // a cache has of an image what was asked for; without validation anything goes
        if registry.proxy.is_some() || !registry.options.validate || document.foreign.contains(reference) {
            return Ok(());
        }
        let linked = registry.exists(&layout::layer(repository, reference)).await?
            || registry.exists(&layout::revision(repository, reference)).await?;
        if linked && !registry.exists(&layout::blob(reference)).await? {
            self.missing(reference);
        }
        Ok(())
    }

    async fn uploads(&mut self, repository: &str) -> Result<(), RegistryError> {
        let registry = self.registry;
        for id in registry.storage.list(&layout::uploads(repository), None).await? {
            let _closed = registry.gate.write().await;
            let stat = registry.storage.upload_stat(&layout::upload(repository, &id)).await?;
            let (old, size_bytes) = match stat {
                Some(stat) => (is_older(stat.modified, registry.options.collect.upload_age), stat.size_bytes),
                // its content became a blob, and then the server was killed
                None => (true, 0),
            };
            if old {
                self.collected.uploads_removed += 1;
                if !self.dry_run {
                    registry.discard_upload(repository, &id, size_bytes).await?;
                }
            }
        }
        Ok(())
    }

    /// Removes manifests that no tag leads to.
    async fn untagged(
        &mut self,
        repository: &str,
        documents: &mut HashMap<Digest, Option<Document>>,
    ) -> Result<(), RegistryError> {
        let mut kept = HashSet::new();
        let registry = self.registry;
        for tag in registry.storage.list(&layout::tags(repository), Some(layout::TAG_CURRENT)).await? {
            kept.extend(registry.tagged(repository, &tag).await?);
        }
        // indexes lead to their manifests, subjects to what refers to them
        loop {
            let before = kept.len();
            for (digest, document) in documents.iter() {
                let Some(document) = document else { continue };
                if document.subject.as_ref().is_some_and(|s| kept.contains(s)) {
                    kept.insert(digest.clone());
                }
                if kept.contains(digest) && document.is_index {
                    kept.extend(document.references.iter().cloned());
                }
            }
            if kept.len() == before {
                break;
            }
        }
        let doomed: Vec<Digest> = documents.keys().filter(|d| !kept.contains(d)).cloned().collect();
        let grace = registry.options.collect.grace;
        self.remove_manifests(repository, documents, doomed, grace).await
    }

    /// Removes cached manifests that nobody asked for in a long time.
    async fn expired(
        &mut self,
        repository: &str,
        documents: &mut HashMap<Digest, Option<Document>>,
    ) -> Result<(), RegistryError> {
        let Some(ttl) = self.registry.proxy.as_ref().and_then(Proxy::ttl) else { return Ok(()) };
        let all = documents.keys().cloned().collect();
        self.remove_manifests(repository, documents, all, ttl).await
    }

    async fn remove_manifests(
        &mut self,
        repository: &str,
        documents: &mut HashMap<Digest, Option<Document>>,
        doomed: Vec<Digest>,
        age: Duration,
    ) -> Result<(), RegistryError> {
        let registry = self.registry;
        for batch in doomed.chunks(BATCH) {
            let _closed = registry.gate.write().await;
            for digest in batch {
                let stat = registry.storage.stat(&layout::revision(repository, digest)).await?;
                if !stat.is_some_and(|s| is_older(s.modified, age)) || registry.is_live(digest) {
                    continue;
                }
                self.collected.manifests_removed += 1;
                documents.remove(digest);
                if !self.dry_run {
                    let reference = Reference::Digest(digest.clone());
                    match registry.delete_manifest(repository, &reference).await {
                        Err(RegistryError::ManifestUnknown(_)) => {}
                        done => done?,
                    }
                }
            }
        }
        Ok(())
    }

    /// The entry of a manifest in the list of its subject, where it lacks one.
    async fn heal_referrer(
        &self,
        repository: &str,
        digest: &Digest,
        document: &Document,
    ) -> Result<(), RegistryError> {
        let Some(subject) = document.subject.as_ref().filter(|_| !self.dry_run) else { return Ok(()) };
        let storage = &self.registry.storage;
        let key = layout::referrer(repository, subject, digest);
        let whole = storage.get(&key).await?.is_some_and(|entry| entry.ends_with(b"}"));
        if !whole && let Some(stat) = storage.stat(&layout::blob(digest)).await? {
            let entry = document.referrer(digest, stat.size_bytes as usize)?;
            storage.put(&key, entry.into(), Sync::Lazy).await?;
        }
        Ok(())
    }

    /// Removes links to blobs that no manifest of the repository needs.
    async fn links(
        &mut self,
        repository: &str,
        marks: &HashSet<u128>,
        readable: bool,
    ) -> Result<(), RegistryError> {
        let registry = self.registry;
        for algorithm in Algorithm::ALL {
            let linked = registry.linked(&layout::layers(repository, algorithm), algorithm).await?;
            let (needed, spare): (Vec<_>, Vec<_>) =
                linked.into_iter().partition(|d| !readable || marks.contains(&d.key()));
            self.marks.extend(needed.iter().map(Digest::key));
            for batch in spare.chunks(BATCH) {
                let _closed = registry.gate.write().await;
                for digest in batch {
                    let key = layout::layer(repository, digest);
                    let Some(stat) = registry.storage.stat(&key).await? else { continue };
                    if registry.is_live(digest) || !is_older(stat.modified, registry.options.collect.grace) {
                        self.marks.insert(digest.key());
                        continue;
                    }
                    self.collected.links_removed += 1;
                    if !self.dry_run {
                        registry.storage.remove(&layout::layer_folder(repository, digest)).await?;
                        if let Some(content) = registry.storage.stat(&layout::blob(digest)).await? {
                            registry.usage.take_from_repository(repository, content.size_bytes);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes entries of referrers whose manifest is gone.
    async fn referrers(&mut self, repository: &str) -> Result<(), RegistryError> {
        let storage = &self.registry.storage;
        for subject in storage.list(&layout::referrers_root(repository), None).await? {
            let Some(subject) = layout::dashed(&subject) else { continue };
            let mut left = 0;
            for entry in storage.list(&layout::referrers(repository, &subject), None).await? {
                left += 1;
                let Some(digest) = layout::dashed(&entry) else { continue };
                let key = layout::referrer(repository, &subject, &digest);
                let _closed = self.registry.gate.write().await;
                let there = self.registry.exists(&layout::revision(repository, &digest)).await?;
                if !there && !self.dry_run {
                    storage.remove(&key).await?;
                    left -= 1;
                }
            }
            if left == 0 && !self.dry_run {
                let _closed = self.registry.gate.write().await;
                let folder = layout::referrers(repository, &subject);
                if storage.list(&folder, None).await?.is_empty() {
                    storage.remove(&folder).await?;
                }
            }
        }
        Ok(())
    }

    /// Removes a repository that has nothing any more; repositories below it stay.
    async fn empty(&mut self, repository: &str) -> Result<(), RegistryError> {
        if self.dry_run {
            return Ok(());
        }
        let (registry, storage) = (self.registry, &self.registry.storage);
        let _closed = registry.gate.write().await;
        let mut something = !storage.list(&layout::uploads(repository), None).await?.is_empty()
            || !storage.list(&layout::tags(repository), Some(layout::TAG_CURRENT)).await?.is_empty();
        for algorithm in Algorithm::ALL {
            something |= !storage.list(&layout::layers(repository, algorithm), None).await?.is_empty()
                || !storage.list(&layout::revisions(repository, algorithm), None).await?.is_empty();
        }
        if something {
            return Ok(());
        }
        for folder in ["_manifests", "_layers", "_uploads"] {
            storage.remove(&format!("{}/{folder}", layout::repository(repository))).await?;
        }
        let mut path = repository;
        while storage.list(&layout::repository(path), None).await?.is_empty() {
            storage.remove(&layout::repository(path)).await?;
            let Some((parent, _)) = path.rsplit_once('/') else { break };
            path = parent;
        }
        Ok(())
    }

    /// Removes blobs that no repository needs.
    async fn blobs(&mut self) -> Result<(), RegistryError> {
        let registry = self.registry;
        for (algorithm, folder) in registry.blob_folders().await? {
            let names = registry.storage.list(&folder, Some(layout::DATA)).await?;
            let digests = names.iter().filter_map(|hex| Digest::new(algorithm, hex));
            let (kept, spare): (Vec<_>, Vec<_>) =
                digests.partition(|d: &Digest| self.marks.contains(&d.key()));
            self.collected.blobs_kept += kept.len() as u64;
            for batch in spare.chunks(BATCH) {
                let _closed = registry.gate.write().await;
                for digest in batch {
                    let Some(stat) = registry.storage.stat(&layout::blob(digest)).await? else { continue };
                    if registry.is_live(digest) || !is_older(stat.modified, registry.options.collect.grace) {
                        self.collected.blobs_kept += 1;
                        continue;
                    }
                    self.collected.blobs_removed += 1;
                    self.collected.bytes_removed += stat.size_bytes;
                    if !self.dry_run {
                        registry.storage.remove(&layout::blob_folder(digest)).await?;
                        registry.usage.take_from_total(stat.size_bytes);
                    }
                }
            }
        }
        Ok(())
    }
}
