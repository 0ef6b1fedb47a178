//! Any URL's content: what a Dockerfile's ADD names.
//!
//! Upstream counterpart: BuildKit's `source/http`. No credentials are sent; redirects are followed, from https never to
//! http.
use std::time::Duration;

use bytes::Bytes;
use http::header::{LAST_MODIFIED, LOCATION, USER_AGENT};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use sampan_drivers::runtime::ImageError;

use crate::client::{FetchError, Sink};
use crate::transport::Transport;

const STALL: Duration = Duration::from_secs(30);
const REDIRECTS_MAX: u32 = 10;

/// What the server says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Downloaded {
    /// `Last-Modified`, as it was sent.
    pub modified: Option<String>,
}

/// Writes what `url` answers into `sink`.
pub async fn download(url: &str, sink: &mut dyn Sink) -> Result<Downloaded, FetchError> {
    let unavailable = |why: String| FetchError::Image(ImageError::Unavailable(format!("{url}: {why}")));
    let client = Transport::default().client("", None).map_err(unavailable)?;
    let mut uri: Uri = url.parse().map_err(|e| ImageError::Invalid(format!("{url}: {e}")))?;
    for _ in 0..=REDIRECTS_MAX {
        let request = Request::get(uri.clone())
            .header(USER_AGENT, concat!("sampan/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync())
            .map_err(|e| ImageError::Invalid(format!("{url}: {e}")))?;
        let answer = tokio::time::timeout(STALL, client.request(request)).await;
        let answer = answer.map_err(|_| unavailable(format!("no answer within {} s", STALL.as_secs())))?;
        let response = answer.map_err(|e| unavailable(causes(&e)))?;
        let status = response.status();
        let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok()).map(String::from);
        if status.is_redirection() {
            let location = header(LOCATION).unwrap_or_default();
            uri = next(&uri, &location)
                .ok_or_else(|| ImageError::Invalid(format!("{url}: redirect to {location:?}")))?;
            continue;
        }
        if !status.is_success() {
            let text = format!("{url}: {status}");
            return Err(FetchError::Image(match status {
                StatusCode::NOT_FOUND | StatusCode::GONE => ImageError::NotFound(text),
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ImageError::Denied(text),
                _ => ImageError::Unavailable(text),
            }));
        }
        let modified = header(LAST_MODIFIED);
        let mut body = response.into_body();
        loop {
            match tokio::time::timeout(STALL, body.frame()).await {
                Err(_) => return Err(unavailable("the server stopped sending".into())),
                Ok(None) => return Ok(Downloaded { modified }),
                Ok(Some(Err(e))) => return Err(unavailable(causes(&e))),
                Ok(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        sink.write(data)?;
                    }
                }
            }
        }
    }
    Err(ImageError::Invalid(format!("{url}: more than {REDIRECTS_MAX} redirects")).into())
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// Where a redirect leads.
fn next(from: &Uri, location: &str) -> Option<Uri> {
    let to: Uri = match location.starts_with('/') && !location.starts_with("//") {
        true => format!("{}://{}{location}", from.scheme_str()?, from.authority()?).parse().ok()?,
        false => location.parse().ok()?,
    };
    match (from.scheme_str()?, to.scheme_str()?) {
        ("https", "https") | ("http", "http" | "https") => Some(to),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_they_may() {
        let from = |text: &str| text.parse::<Uri>().unwrap();
        for (start, location, wanted) in [
            ("https://a/b", "/c?d=e", Some("https://a/c?d=e")),
            ("http://a/b", "https://c/d", Some("https://c/d")),
            ("https://a/b", "http://a/b", None),
            ("http://a/b", "file:///etc/passwd", None),
            ("http://a/b", "", None),
        ] {
            let found = next(&from(start), location).map(|u| u.to_string());
            assert_eq!(found.as_deref(), wanted, "{start} {location}");
        }
    }
}
