//! What registries' answers mean: which errors are worth another try, and which of two says more.
use http_body_util::{BodyExt, Limited};

use super::*;

/// An error with its causes: hyper's own text says only "client error (Connect)".
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

pub(super) fn same_host(a: &Uri, b: &Uri) -> bool {
    (a.authority(), a.scheme()) == (b.authority(), b.scheme())
}

pub(super) fn unavailable(endpoint: &Endpoint, why: impl std::fmt::Display) -> ImageError {
    ImageError::Unavailable(format!("{}: {why}", endpoint.host))
}

pub(super) fn delay(attempt: u32) -> Duration {
    FIRST_DELAY * 2u32.saturating_pow(attempt.saturating_sub(1).min(4))
}

/// Which of two errors says more about the image.
pub(super) fn worse(old: ImageError, new: ImageError) -> ImageError {
    let rank = |e: &ImageError| match e {
        ImageError::Unavailable(_) => 0,
        ImageError::NotFound(_) => 1,
        ImageError::Denied(_) => 2,
        _ => 3,
    };
    if rank(&new) >= rank(&old) { new } else { old }
}

/// After a failure: keeps the error worth telling in `last`, waits, and says whether to try the same once more.
pub(super) async fn again(
    last: &mut ImageError,
    error: ImageError,
    endpoint: &Endpoint,
    attempt: u32,
    is_last_endpoint: bool,
) -> bool {
    let is_unavailable = matches!(error, ImageError::Unavailable(_));
    if is_unavailable {
        tracing::debug!(host = endpoint.host, attempt, %error, "registry request failed");
    }
    *last = worse(std::mem::replace(last, ImageError::Unavailable(String::new())), error);
    // A mirror that is down must not hold up the next endpoint for long.
    if !is_unavailable || attempt == ATTEMPTS || !is_last_endpoint {
        return false;
    }
    tokio::time::sleep(delay(attempt)).await;
    true
}

pub(super) async fn judge(
    response: Response<Incoming>,
    endpoint: &Endpoint,
    path: &str,
) -> Result<Response<Incoming>, ImageError> {
    let what = format!("{}/{}: {path}", endpoint.host, endpoint.repository);
    let status = response.status();
    match status.as_u16() {
        200 | 206 => Ok(response),
        404 => Err(ImageError::NotFound(what)),
        401 | 403 => Err(ImageError::Denied(format!(
            "{what}: {status}: repository does not exist or may require authorization"
        ))),
        408 | 425 | 429 | 500..=599 => Err(ImageError::Unavailable(format!("{what}: {status}"))),
        _ => Err(ImageError::Invalid(format!("{what}: unexpected status {status}"))),
    }
}

pub(super) async fn read_document<B>(response: Response<B>) -> Result<Bytes, ImageError>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let body = Limited::new(response.into_body(), DOCUMENT_MAX_BYTES as usize);
    match tokio::time::timeout(STALL, body.collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => {
            Err(ImageError::Invalid(format!("document over {DOCUMENT_MAX_BYTES} bytes")))
        }
        Ok(Err(e)) => Err(ImageError::Unavailable(e.to_string())),
        Err(_) => Err(ImageError::Unavailable("the registry stopped sending".into())),
    }
}

pub(super) fn check_digest(bytes: &[u8], wanted: &str) -> Result<(), ImageError> {
    let got = manifest::digest(bytes);
    if got == wanted {
        return Ok(());
    }
    Err(ImageError::Invalid(format!("digest is {got}, not the {wanted} asked for")))
}

pub(super) fn media_type<B>(response: &Response<B>) -> String {
    let text = response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    text.split(';').next().unwrap_or("").trim().to_string()
}

/// Whether the blob is whole already; what is longer than it may be is forgotten.
pub(super) fn has_all(size_bytes: u64, sink: &mut dyn Sink) -> io::Result<bool> {
    if size_bytes > 0 && sink.offset() > size_bytes {
        sink.restart()?;
    }
    Ok(size_bytes > 0 && sink.offset() == size_bytes)
}

/// A blob's bytes into the sink, which goes on where it was when the answer does.
pub(super) async fn pour<B>(
    response: Response<B>,
    host: &str,
    path: &str,
    size_bytes: u64,
    sink: &mut dyn Sink,
) -> Result<(), FetchError>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let broken = |why: String| ImageError::Unavailable(format!("{host}: {why}"));
    if response.status() != StatusCode::PARTIAL_CONTENT && sink.offset() > 0 {
        sink.restart()?;
    }
    let mut body = response.into_body();
    loop {
        let frame = match tokio::time::timeout(STALL, body.frame()).await {
            Err(_) => return Err(broken("the registry stopped sending".into()).into()),
            Ok(None) => break,
            Ok(Some(Err(e))) => return Err(broken(e.to_string()).into()),
            Ok(Some(Ok(frame))) => frame,
        };
        if let Some(data) = frame.data_ref() {
            if size_bytes > 0 && sink.offset() + data.len() as u64 > size_bytes {
                return Err(
                    ImageError::Invalid(format!("{path} is longer than its {size_bytes} bytes")).into()
                );
            }
            sink.write(data)?;
        }
    }
    if sink.offset() < size_bytes {
        return Err(broken(format!("{path} ended after {} bytes", sink.offset())).into());
    }
    Ok(())
}

/// A whole blob must have its digest, where the sink can tell. Wrong bytes are forgotten; were some of them there before
/// (up to `began`), they may be to blame, and the same is worth another try.
pub(super) fn check_whole(
    descriptor: &Descriptor,
    began: u64,
    sink: &mut dyn Sink,
) -> Result<(), FetchError> {
    let Some(got) = sink.digest().filter(|got| *got != descriptor.digest) else { return Ok(()) };
    sink.restart()?;
    let message = format!("blob {}: its bytes have digest {got}", descriptor.digest);
    Err(match began {
        0 => ImageError::Invalid(message),
        _ => ImageError::Unavailable(message),
    }
    .into())
}

pub(super) fn relative(base: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with("http://") || location.starts_with("https://") {
        return location.parse().ok();
    }
    let path = location.starts_with('/').then_some(location)?;
    format!("{}://{}{path}", base.scheme_str()?, base.authority()?).parse().ok()
}
