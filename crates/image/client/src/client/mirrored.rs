//! Fetching from a [`Mirror`](crate::mirror::Mirror): one source after the other, and nothing without its digest.
use super::*;
use crate::mirror::Mirror;

/// A blob is begun anew once at a source: what came before from another may be what is wrong.
const BEGINNINGS: u32 = 2;

/// When the mirror is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    BeforeTheRegistry,
    /// `latest` moves often: what a node has under it may be long out of date.
    WhenTheRegistryIsAway,
}

impl Client {
    /// The mirror that may have `path`, and when to ask it.
    pub(super) fn mirror_for(&self, reference: &Reference, path: &str) -> Option<(&dyn Mirror, Turn)> {
        let mirror = self.mirror.as_deref().filter(|m| m.covers(&reference.registry))?;
        let turn = match path {
            "manifests/latest" => Turn::WhenTheRegistryIsAway,
            _ => Turn::BeforeTheRegistry,
        };
        Some((mirror, turn))
    }

    /// A document and its media type, of the first source whose bytes are right.
    pub(super) async fn document_from(
        &self,
        mirror: &dyn Mirror,
        reference: &Reference,
        path: &str,
        digest: Option<&str>,
    ) -> Option<(String, Bytes)> {
        for source in mirror.sources(reference, path).await {
            let got = async {
                let response = within_stall(source.get(0)).await?;
                let media_type = media_type(&response);
                let bytes = read_document(response).await?;
                digest.map_or(Ok(()), |wanted| check_digest(&bytes, wanted))?;
                Ok((media_type, bytes))
            };
            match got.await {
                Ok(found) => {
                    tracing::debug!(image = %reference, path, source = source.name(), "mirrored");
                    return Some(found);
                }
                Err(error) => refused(reference, path, source.name(), &error),
            }
        }
        None
    }

    /// Whether a source had the blob; what came of it otherwise is left in `sink`, for the next one to go on with.
    pub(super) async fn blob_from(
        &self,
        mirror: &dyn Mirror,
        reference: &Reference,
        path: &str,
        descriptor: &Descriptor,
        sink: &mut dyn Sink,
    ) -> Result<bool, FetchError> {
        for source in mirror.sources(reference, path).await {
            for _ in 0..BEGINNINGS {
                let began = sink.offset();
                let got = async {
                    let size_bytes = descriptor.size;
                    if !has_all(size_bytes, sink)? {
                        let response = within_stall(source.get(sink.offset())).await?;
                        pour(response, source.name(), path, size_bytes, sink).await?;
                    }
                    check_whole(descriptor, began, sink)
                };
                match got.await {
                    Ok(()) => {
                        tracing::debug!(image = %reference, path, source = source.name(), "mirrored");
                        return Ok(true);
                    }
                    Err(FetchError::Image(error)) => refused(reference, path, source.name(), &error),
                    Err(error) => return Err(error),
                }
                // only what was begun by another is worth beginning again
                if began == 0 || sink.offset() > 0 {
                    break;
                }
            }
        }
        Ok(false)
    }
}

fn refused(reference: &Reference, path: &str, source: &str, error: &ImageError) {
    match error {
        ImageError::Invalid(_) => {
            tracing::warn!(image = %reference, path, source, %error, "what the node sent is refused");
        }
        _ => tracing::debug!(image = %reference, path, source, %error, "not mirrored"),
    }
}

async fn within_stall<T>(
    answer: impl Future<Output = Result<Response<T>, ImageError>>,
) -> Result<Response<T>, ImageError> {
    let late = || ImageError::Unavailable(format!("no answer within {} s", STALL.as_secs()));
    tokio::time::timeout(STALL, answer).await.map_err(|_| late())?
}
