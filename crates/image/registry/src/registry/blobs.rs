//! Blobs of a repository: a link in the repository, the content once for all of them.
//!
//! Upstream counterpart: distribution's `registry/storage/linkedblobstore.go`. A client that asks whether a blob is
//! there goes on to push a manifest that needs it: asking renews the grace period that the collection leaves it.
use super::*;
use crate::storage::ByteStream;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobInfo {
    pub digest: Digest,
    pub size_bytes: u64,
}

impl Registry {
    pub async fn blob(&self, repository: &str, digest: &Digest) -> Result<BlobInfo, RegistryError> {
        match self.stored_blob(repository, digest).await? {
            Some(info) => Ok(info),
            None => Err(RegistryError::BlobUnknown(digest.to_string())),
        }
    }

    pub(crate) async fn stored_blob(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<Option<BlobInfo>, RegistryError> {
        let Some(link) = self.storage.stat(&layout::layer(repository, digest)).await? else {
            return Ok(None);
        };
        let Some(content) = self.storage.stat(&layout::blob(digest)).await? else { return Ok(None) };
        if !self.options.read_only && is_older(link.modified, self.options.collect.grace / 2) {
            let renewed = self.storage.touch(&layout::layer(repository, digest)).await?;
            if !renewed {
                return Ok(None);
            }
        }
        Ok(Some(BlobInfo { digest: digest.clone(), size_bytes: content.size_bytes }))
    }

    pub async fn read_blob(
        &self,
        digest: &Digest,
        offset: u64,
        length: u64,
    ) -> Result<ByteStream, RegistryError> {
        match self.storage.read(&layout::blob(digest), offset, length).await {
            Err(e) if e.is_not_found() => Err(RegistryError::BlobUnknown(digest.to_string())),
            read => Ok(read?),
        }
    }

    /// Links a blob of another repository, or with `from` empty of any, into this one. `None`: it can't be found there.
    pub async fn mount(
        &self,
        repository: &str,
        digest: &Digest,
        from: Option<&str>,
    ) -> Result<Option<BlobInfo>, RegistryError> {
        let _gate = self.making_reachable().await;
        if let Some(from) = from
            && !self.exists(&layout::layer(from, digest)).await?
        {
            return Ok(None);
        }
        let Some(content) = self.storage.stat(&layout::blob(digest)).await? else { return Ok(None) };
        if !self.exists(&layout::layer(repository, digest)).await? {
            self.usage.add_to_repository(repository, content.size_bytes)?;
        }
        self.keep([digest]);
        self.link(&layout::layer(repository, digest), digest, Sync::Lazy).await?;
        Ok(Some(BlobInfo { digest: digest.clone(), size_bytes: content.size_bytes }))
    }

    /// Takes a blob out of a repository; its content goes with the next collection.
    pub async fn delete_blob(&self, repository: &str, digest: &Digest) -> Result<(), RegistryError> {
        let info = self.blob(repository, digest).await?;
        self.storage.remove(&layout::layer_folder(repository, digest)).await?;
        self.usage.take_from_repository(repository, info.size_bytes);
        Ok(())
    }
}
