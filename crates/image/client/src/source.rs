//! Where images are copied from: a registry's repository or an archive.
//!
//! Upstream counterpart: containers/image's `types.ImageSource`. What stays true: documents are verified here; blobs are
//! not (they may be read in parts), so whoever takes them checks their digest.
use std::io::{self, Read};
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use sampan_drivers::runtime::{Auth, ImageError};

use crate::archive::Archive;
use crate::client::Client;
use crate::manifest::{DOCUMENT_MAX_BYTES, Descriptor};
use crate::reference::Reference;
use crate::transport::Body;

const PIECE_BYTES: usize = 128 * 1024;

#[async_trait]
pub trait Source: Send + Sync {
    /// A manifest or an index.
    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError>;
    /// An image's configuration.
    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError>;
    /// A blob from `offset` on.
    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<Body, ImageError>;
    /// The repository that its blobs can be mounted from.
    fn origin(&self) -> Option<&Reference> {
        None
    }
}

/// A repository of a registry.
pub struct Repository<'a> {
    pub client: &'a Client,
    pub reference: &'a Reference,
    pub auth: &'a [Auth],
}

#[async_trait]
impl Source for Repository<'_> {
    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError> {
        Ok(self.client.manifest(self.reference, descriptor, self.auth).await?.bytes)
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError> {
        self.client.small_blob(self.reference, descriptor, self.auth).await
    }

    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<Body, ImageError> {
        self.client.open_blob(self.reference, blob, self.auth, offset).await
    }

    fn origin(&self) -> Option<&Reference> {
        Some(self.reference)
    }
}

#[async_trait]
impl Source for Archive {
    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError> {
        if !self.has(&descriptor.digest) {
            return Err(ImageError::NotFound(format!("{} in the archive", descriptor.digest)));
        }
        Ok(self.read(&descriptor.digest)?.into())
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError> {
        Ok(self.read(&descriptor.digest)?.into())
    }

    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<Body, ImageError> {
        Ok(FileBody { reader: self.blob_from(&blob.digest, offset)? }.boxed_unsync())
    }
}

/// A body read from a file as it is sent: pieces small enough not to hold up what else runs on the thread.
pub struct FileBody<R> {
    pub reader: R,
}

impl<R: Read + Unpin> http_body::Body for FileBody<R> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let mut piece = vec![0; PIECE_BYTES];
        Poll::Ready(match self.reader.read(&mut piece) {
            Ok(0) => None,
            Ok(n) => {
                piece.truncate(n);
                Some(Ok(Frame::data(piece.into())))
            }
            Err(e) => Some(Err(e)),
        })
    }
}

/// A registry's answer, without what comes before the offset asked for (it may not know ranges).
pub(crate) fn without_start(answer: Incoming, mut skip: u64) -> Body {
    let pieces =
        answer.into_data_stream().map_err(io::Error::other).try_filter_map(move |mut data: Bytes| {
            let skipped = skip.min(data.len() as u64);
            skip -= skipped;
            let data = data.split_off(skipped as usize);
            std::future::ready(Ok((!data.is_empty()).then(|| Frame::data(data))))
        });
    StreamBody::new(pieces).boxed_unsync()
}

/// All of a blob in memory, for what is known to be small.
pub async fn collect(body: Body) -> Result<Bytes, ImageError> {
    let limited = http_body_util::Limited::new(body, DOCUMENT_MAX_BYTES as usize);
    Ok(limited.collect().await.map_err(|e| ImageError::Unavailable(e.to_string()))?.to_bytes())
}
