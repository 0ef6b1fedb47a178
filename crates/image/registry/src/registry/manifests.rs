//! Manifests and tags.
//!
//! Upstream counterparts: distribution's `manifeststore.go`, `tagstore.go`. What stays true: a tag leads to a manifest of
//! its repository, a manifest to blobs of its repository (unless validation is off); deleting a manifest takes its tags
//! along.
use super::*;

/// What comes after `/manifests/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    Tag(String),
    Digest(Digest),
}

impl Reference {
    pub fn parse(text: &str) -> Result<Reference, RegistryError> {
        if text.contains(':') {
            return Ok(Reference::Digest(text.parse()?));
        }
        if !name::is_tag(text) {
            return Err(RegistryError::TagInvalid(text.chars().take(160).collect()));
        }
        Ok(Reference::Tag(text.to_string()))
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reference::Tag(tag) => f.write_str(tag),
            Reference::Digest(digest) => digest.fmt(f),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub digest: Digest,
    pub media_type: String,
    pub bytes: Bytes,
}

/// What a manifest was stored as.
#[derive(Debug)]
pub struct Stored {
    pub digest: Digest,
    pub subject: Option<Digest>,
}

impl Registry {
    pub async fn manifest(&self, repository: &str, reference: &Reference) -> Result<Manifest, RegistryError> {
        let unknown = || RegistryError::ManifestUnknown(format!("{repository}: {reference}"));
        let digest = match reference {
            Reference::Digest(digest) => digest.clone(),
            Reference::Tag(tag) => self.tagged(repository, tag).await?.ok_or_else(unknown)?,
        };
        if !self.exists(&layout::revision(repository, &digest)).await? {
            return Err(unknown());
        }
        let Some(bytes) = self.storage.get(&layout::blob(&digest)).await? else { return Err(unknown()) };
        if !digest.matches(&bytes) {
            tracing::error!(repository, %digest, "the manifest on disk is damaged; push it again");
            return Err(unknown());
        }
        let media_type = Document::parse(None, &bytes)?.media_type;
        Ok(Manifest { digest, media_type, bytes })
    }

    pub async fn tagged(&self, repository: &str, tag: &str) -> Result<Option<Digest>, RegistryError> {
        let link = self.storage.get(&layout::tag(repository, tag)).await?;
        Ok(link.and_then(|link| std::str::from_utf8(&link).ok()?.trim().parse().ok()))
    }

    pub async fn put_manifest(
        &self,
        repository: &str,
        reference: &Reference,
        tags: &[String],
        content_type: Option<&str>,
        bytes: Bytes,
    ) -> Result<Stored, RegistryError> {
        if bytes.len() > MANIFEST_MAX_BYTES {
            return Err(RegistryError::ManifestTooLarge(MANIFEST_MAX_BYTES));
        }
        let document = Document::parse(content_type, &bytes)?;
        let digest = match reference {
            Reference::Digest(digest) if !digest.matches(&bytes) => {
                return Err(RegistryError::DigestInvalid(format!("the manifest isn't {digest}")));
            }
            Reference::Digest(digest) => digest.clone(),
            Reference::Tag(_) => Digest::of(Algorithm::Sha256, &bytes),
        };
        let tags: Vec<&str> = match reference {
            Reference::Tag(tag) => vec![tag],
            Reference::Digest(_) => tags.iter().map(String::as_str).collect(),
        };
        let _gate = self.making_reachable().await;
        let _change = self.changing(repository).await;
        if self.options.validate && self.proxy.is_none() {
            self.check_references(repository, &document).await?;
        }
        self.keep(document.references.iter().chain([&digest]));
        self.store_manifest(repository, &digest, &document, bytes).await?;
        for tag in tags {
            self.link(&layout::tag_index(repository, tag, &digest), &digest, Sync::Lazy).await?;
            self.link(&layout::tag(repository, tag), &digest, Sync::Content).await?;
        }
        Ok(Stored { digest, subject: document.subject })
    }

    async fn check_references(&self, repository: &str, document: &Document) -> Result<(), RegistryError> {
        let mut missing = Vec::new();
        for digest in &document.references {
            if document.foreign.contains(digest) {
                continue;
            }
            // BuildKit's cache indexes have layers as their entries
            let there = (document.is_index && self.exists(&layout::revision(repository, digest)).await?)
                || self.exists(&layout::layer(repository, digest)).await?;
            if !there || !self.exists(&layout::blob(digest)).await? {
                missing.push(digest.clone());
            }
        }
        if missing.is_empty() { Ok(()) } else { Err(RegistryError::ManifestBlobUnknown(missing)) }
    }

    /// Content first, then what leads to it; the caller holds the gate and the repository.
    async fn store_manifest(
        &self,
        repository: &str,
        digest: &Digest,
        document: &Document,
        bytes: Bytes,
    ) -> Result<(), RegistryError> {
        let size_bytes = bytes.len() as u64;
        let linked = self.exists(&layout::revision(repository, digest)).await?;
        if !linked {
            self.usage.add(repository, size_bytes)?;
        }
        if let Some(subject) = &document.subject {
            let entry = document.referrer(digest, bytes.len())?;
            self.storage
                .put(&layout::referrer(repository, subject, digest), entry.into(), Sync::Lazy)
                .await?;
        }
        if self.storage.get(&layout::blob(digest)).await?.is_some_and(|stored| stored == bytes) {
            if !linked {
                self.usage.take_from_total(size_bytes);
            }
        } else {
            self.storage.put(&layout::blob(digest), bytes, Sync::Content).await?;
        }
        self.link(&layout::revision(repository, digest), digest, Sync::Name).await?;
        Ok(())
    }

    pub async fn delete_manifest(
        &self,
        repository: &str,
        reference: &Reference,
    ) -> Result<(), RegistryError> {
        let _change = self.changing(repository).await;
        let unknown = || RegistryError::ManifestUnknown(format!("{repository}: {reference}"));
        let digest = match reference {
            Reference::Digest(digest) => digest,
            Reference::Tag(tag) => {
                self.tagged(repository, tag).await?.ok_or_else(unknown)?;
                self.storage.remove(&layout::tag_folder(repository, tag)).await?;
                return Ok(());
            }
        };
        if !self.exists(&layout::revision(repository, digest)).await? {
            return Err(unknown());
        }
        for tag in self.storage.list(&layout::tags(repository), Some(layout::TAG_CURRENT)).await? {
            if self.tagged(repository, &tag).await?.as_ref() == Some(digest) {
                self.storage.remove(&layout::tag_folder(repository, &tag)).await?;
            }
        }
        self.forget_revision(repository, digest).await
    }

    /// Takes a manifest that no tag leads to out of its repository; the caller holds the repository.
    pub(super) async fn forget_revision(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<(), RegistryError> {
        if let Some(bytes) = self.storage.get(&layout::blob(digest)).await? {
            self.usage.take_from_repository(repository, bytes.len() as u64);
            if let Some(subject) = Document::parse(None, &bytes).ok().and_then(|d| d.subject) {
                self.storage.remove(&layout::referrer(repository, &subject, digest)).await?;
            }
        }
        Ok(self.storage.remove(&layout::revision_folder(repository, digest)).await?)
    }
}
