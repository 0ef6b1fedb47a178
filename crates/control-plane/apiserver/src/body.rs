//! Bodies of requests and answers.
use std::convert::Infallible;
use std::io::Write;

use bytes::{Bytes, BytesMut};
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::Stream;
use http::{HeaderMap, HeaderValue, Response, header};
use http_body::{Body as _, Frame};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};

use crate::status::{Result, Status};

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// The body of any request or answer here.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;

/// The largest body of a request: upstream's 3 MiB.
pub const REQUEST_BODY_MAX: usize = 3 << 20;
/// Answers from this size on are compressed for those who ask for it.
const GZIP_FROM: u64 = 128 << 10;

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(never).boxed_unsync()
}

pub fn empty() -> Body {
    full(Bytes::new())
}

/// A body that is made while it is sent.
pub fn stream(chunks: impl Stream<Item = Bytes> + Send + 'static) -> Body {
    use futures::StreamExt;
    StreamBody::new(chunks.map(|bytes| Ok::<_, Infallible>(Frame::data(bytes)))).map_err(never).boxed_unsync()
}

fn never(never: Infallible) -> BoxError {
    match never {}
}

/// A request's whole body.
pub async fn read(mut body: Body) -> Result<Bytes> {
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| Status::bad_request(format!("unable to read the body: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if whole.len() + data.len() > REQUEST_BODY_MAX {
            return Err(Status::too_large(format_args!("limit is {REQUEST_BODY_MAX}")));
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

/// Compresses a big answer whose size is known, when the request accepts gzip.
pub async fn compress(request: &HeaderMap, response: Response<Body>) -> Response<Body> {
    let accepted = request
        .get_all(header::ACCEPT_ENCODING)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|coding| coding.split(';').next().is_some_and(|name| name.trim() == "gzip"));
    let big = response.body().size_hint().exact().is_some_and(|size| size >= GZIP_FROM);
    if !accepted || !big || response.headers().contains_key(header::CONTENT_ENCODING) {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let Ok(collected) = body.collect().await else { return Response::from_parts(parts, empty()) };
    let plain = collected.to_bytes();
    let mut encoder = GzEncoder::new(Vec::with_capacity(plain.len() / 4), Compression::fast());
    let packed = encoder.write_all(&plain).and_then(|()| encoder.finish());
    match packed {
        Ok(packed) => {
            parts.headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            parts.headers.append(header::VARY, HeaderValue::from_static("Accept-Encoding"));
            parts.headers.remove(header::CONTENT_LENGTH);
            Response::from_parts(parts, full(packed))
        }
        Err(_) => Response::from_parts(parts, full(plain)),
    }
}

/// Joins what `write` appends into one buffer.
pub fn build(capacity: usize, write: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::with_capacity(capacity);
    write(&mut out);
    out.freeze()
}
