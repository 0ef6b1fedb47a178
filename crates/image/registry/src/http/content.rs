//! GET and HEAD: blobs with ranges, manifests, lists.
use super::*;
use crate::http::routes::{next_link, referrers_query};
use crate::registry::Manifest;

/// Content under a digest never changes.
const FOREVER: &str = "max-age=31536000";

/// What part of a blob is asked for.
#[derive(Debug, PartialEq, Eq)]
enum Range {
    Whole,
    Part { first: u64, last: u64 },
    Outside,
}

impl Registry {
    pub(crate) async fn get_blob(
        self: &Arc<Self>,
        name: &str,
        digest: &Digest,
        headers: &HeaderMap,
        head: bool,
    ) -> Answer {
        let stored = self.stored_blob(name, digest).await?;
        let info = match (stored, &self.proxy) {
            (Some(info), _) => info,
            (None, Some(proxy)) => return proxy.blob(self, name, digest, headers, head).await,
            (None, None) => return Err(RegistryError::BlobUnknown(digest.to_string())),
        };
        let (mut response, part) = blob_headers(digest, info.size_bytes, headers)?;
        if let Some((first, length)) = part.filter(|_| !head) {
            *response.body_mut() = Body::from_stream(self.read_blob(digest, first, length).await?);
        }
        Ok(response)
    }

    pub(super) async fn get_manifest(
        self: &Arc<Self>,
        name: &str,
        reference: &Reference,
        headers: &HeaderMap,
        head: bool,
    ) -> Answer {
        let manifest = match &self.proxy {
            Some(proxy) => proxy.manifest(self, name, reference).await?,
            None => self.manifest(name, reference).await?,
        };
        Ok(manifest_response(manifest, headers, head))
    }

    pub(super) async fn get_referrers(
        self: &Arc<Self>,
        name: &str,
        subject: &Digest,
        query: &Query,
    ) -> Answer {
        let filter = query.get("artifactType").filter(|t| !t.is_empty());
        if let Some(proxy) = &self.proxy {
            proxy.fetch_referrers(self, name, subject).await;
        }
        let referrers = self.referrers(name, subject, filter, query.get("last")).await?;
        let mut response = json(referrers.index);
        let out = response.headers_mut();
        out.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/vnd.oci.image.index.v1+json"));
        if filter.is_some() {
            set(out, HeaderName::from_static("oci-filters-applied"), "artifactType");
        }
        if let Some(last) = referrers.next {
            let path = format!("/v2/{name}/referrers/{subject}");
            set(out, header::LINK, next_link(&path, &referrers_query(filter, &last)));
        }
        Ok(response)
    }

    pub(super) async fn tags_page(self: &Arc<Self>, name: &str, query: &Query) -> Answer {
        let tags = match &self.proxy {
            Some(proxy) => proxy.tags(self, name).await?,
            None => self.tags(name).await?,
        };
        let (page, next) = query.page(tags, false)?;
        let mut response = json(serde_json::json!({"name": name, "tags": page}).to_string().into_bytes());
        if let Some(next) = next {
            let link = next_link(&format!("/v2/{name}/tags/list"), &next);
            set(response.headers_mut(), header::LINK, link);
        }
        Ok(response)
    }

    pub(super) async fn catalog_page(self: &Arc<Self>, query: &Query) -> Answer {
        let (page, next) = query.page(self.catalog().await?, true)?;
        let mut response = json(serde_json::json!({"repositories": page}).to_string().into_bytes());
        if let Some(next) = next {
            set(response.headers_mut(), header::LINK, next_link("/v2/_catalog", &next));
        }
        Ok(response)
    }
}

/// The answer for a blob without its body, and what of it to send: begin and length.
pub(crate) fn blob_headers(
    digest: &Digest,
    size: u64,
    headers: &HeaderMap,
) -> Result<(Response<Body>, Option<(u64, u64)>), RegistryError> {
    let etag = format!("\"{digest}\"");
    let mut response = Response::new(Body::empty());
    let out = response.headers_mut();
    set(out, header::ETAG, &etag);
    set(out, header::CACHE_CONTROL, FOREVER);
    set(out, DIGEST, digest.to_string());
    if is_known(headers, &etag) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok((response, None));
    }
    set(out, header::CONTENT_TYPE, "application/octet-stream");
    set(out, header::ACCEPT_RANGES, "bytes");
    let (first, length) = match range_of(headers, size, digest)? {
        None => (0, size),
        Some((first, length)) => {
            set(out, header::CONTENT_RANGE, format!("bytes {first}-{}/{size}", first + length - 1));
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            (first, length)
        }
    };
    set(response.headers_mut(), header::CONTENT_LENGTH, length.to_string());
    Ok((response, Some((first, length))))
}

pub(crate) fn manifest_response(manifest: Manifest, headers: &HeaderMap, head: bool) -> Response<Body> {
    let etag = format!("\"{}\"", manifest.digest);
    let mut response = Response::new(Body::empty());
    let out = response.headers_mut();
    set(out, header::ETAG, &etag);
    set(out, DIGEST, manifest.digest.to_string());
    if is_known(headers, &etag) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return response;
    }
    set(out, header::CONTENT_TYPE, &manifest.media_type);
    set(out, header::CONTENT_LENGTH, manifest.bytes.len().to_string());
    if !head {
        *response.body_mut() = Body::from(manifest.bytes);
    }
    response
}

fn is_known(headers: &HeaderMap, etag: &str) -> bool {
    let tags = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|v| v.to_str().ok());
    tags.flat_map(|v| v.split(',')).map(str::trim).any(|t| {
        let t = t.strip_prefix("W/").unwrap_or(t);
        t == "*" || t == etag || t == etag.trim_matches('"')
    })
}

/// One range is served; several, or what isn't understood, is answered with the whole, as RFC 9110 allows.
fn range(headers: &HeaderMap, size: u64, etag: &str) -> Range {
    let Some(text) = headers.get(header::RANGE).and_then(|v| v.to_str().ok()) else { return Range::Whole };
    if headers.get(header::IF_RANGE).is_some_and(|v| v.as_bytes() != etag.as_bytes()) {
        return Range::Whole;
    }
    let Some((first, last)) = text.strip_prefix("bytes=").and_then(|r| r.trim().split_once('-')) else {
        return Range::Whole;
    };
    let number = |t: &str| if t.is_empty() { Some(None) } else { t.parse::<u64>().ok().map(Some) };
    match (number(first), number(last)) {
        (Some(Some(first)), Some(last)) => {
            let last = last.unwrap_or(u64::MAX);
            match () {
                () if last < first || first >= size => Range::Outside,
                () => Range::Part { first, last: last.min(size - 1) },
            }
        }
        (Some(None), Some(Some(0))) => Range::Outside,
        (Some(None), Some(Some(_))) if size == 0 => Range::Outside,
        (Some(None), Some(Some(length))) => Range::Part { first: size - length.min(size), last: size - 1 },
        _ => Range::Whole,
    }
}

/// What part is asked for, as begin and length; `None` for the whole.
pub(crate) fn range_of(
    headers: &HeaderMap,
    size: u64,
    digest: &Digest,
) -> Result<Option<(u64, u64)>, RegistryError> {
    match range(headers, size, &format!("\"{digest}\"")) {
        Range::Whole => Ok(None),
        Range::Part { first, last } => Ok(Some((first, last - first + 1))),
        Range::Outside => Err(RegistryError::RangeNotSatisfiable { size }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        let of = |text: &str, size| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, text.parse().unwrap());
            range(&headers, size, "\"x\"")
        };
        for (text, wanted) in [
            ("bytes=0-0", Range::Part { first: 0, last: 0 }),
            ("bytes=3-", Range::Part { first: 3, last: 9 }),
            ("bytes=3-100", Range::Part { first: 3, last: 9 }),
            ("bytes=-4", Range::Part { first: 6, last: 9 }),
            ("bytes=-40", Range::Part { first: 0, last: 9 }),
            ("bytes=10-", Range::Outside),
            ("bytes=-0", Range::Outside),
            ("bytes=4-3", Range::Outside),
            ("bytes=0-1,3-4", Range::Whole),
            ("lines=1-2", Range::Whole),
        ] {
            assert_eq!(of(text, 10), wanted, "{text}");
        }
        assert_eq!(of("bytes=0-", 0), Range::Outside);
    }
}
