//! POST, PATCH, PUT and DELETE: uploads, mounts, manifests, deletions.
use super::*;
use crate::auth::AccessController;
use crate::http::routes::blob_location;
use crate::registry::{BlobInfo, UploadStatus};

/// Tags that one push by digest may set; the spec asks for ten.
const TAGS_MAX: usize = 32;

impl Registry {
    pub(super) async fn write(
        self: Arc<Self>,
        method: Method,
        route: Route,
        query: Query,
        request: Request<Body>,
    ) -> Answer {
        let name = route.repository;
        match (method, route.target) {
            (Method::POST, Target::Uploads) => self.post_upload(&name, &query, request).await,
            (Method::PATCH, Target::Upload(id)) => self.patch_upload(&name, &id, &query, request).await,
            (Method::PUT, Target::Upload(id)) => self.put_upload(&name, &id, &query, request).await,
            (Method::DELETE, Target::Upload(id)) => {
                self.cancel_upload(&name, &id).await?;
                Ok(status(StatusCode::NO_CONTENT))
            }
            (Method::PUT, Target::Manifest(reference)) => {
                self.push_manifest(&name, &Reference::parse(&reference)?, &query, request).await
            }
            (Method::DELETE, Target::Manifest(reference)) => {
                self.delete_manifest(&name, &Reference::parse(&reference)?).await?;
                Ok(status(StatusCode::ACCEPTED))
            }
            (Method::DELETE, Target::Blob(digest)) => {
                self.delete_blob(&name, &digest.parse()?).await?;
                Ok(status(StatusCode::ACCEPTED))
            }
            (method, _) => Err(RegistryError::Unsupported(format!("{method} here"))),
        }
    }

    async fn post_upload(&self, name: &str, query: &Query, request: Request<Body>) -> Answer {
        let algorithm = algorithm(query)?;
        if let Some(digest) = query.get("mount") {
            let from = query.get("from").filter(|f| !f.is_empty());
            if from.is_some_and(|from| !crate::name::is_repository(from)) {
                return Err(RegistryError::NameInvalid(from.unwrap_or("").chars().take(300).collect()));
            }
            // without a source it would be taken from repositories that the client may not read
            let open = matches!(self.access, AccessController::None);
            if (from.is_some() || open)
                && let Some(info) = self.mount(name, &digest.parse()?, from).await?
            {
                return Ok(created(name, &info));
            }
        }
        let digest = query.get("digest").map(str::parse::<Digest>).transpose()?;
        let upload = self.start_upload(name).await?;
        let Some(digest) = digest else {
            return Ok(upload_response(StatusCode::ACCEPTED, name, &upload, algorithm));
        };
        let length = length_of(request.headers());
        let written =
            self.write_upload(name, &upload.id, None, length, digest.algorithm(), request.into_body()).await;
        if let Err(e) = written {
            // the client has no name for it, so it can't go on with it
            self.cancel_upload(name, &upload.id).await?;
            return Err(e);
        }
        Ok(created(name, &self.finish_upload(name, &upload.id, &digest).await?))
    }

    async fn patch_upload(&self, name: &str, id: &str, query: &Query, request: Request<Body>) -> Answer {
        let hint = algorithm(query)?;
        let range = content_range(request.headers())?;
        let length = length_of(request.headers());
        let algorithm = hint.unwrap_or(Algorithm::Sha256);
        let upload = self.write_upload(name, id, range, length, algorithm, request.into_body()).await?;
        Ok(upload_response(StatusCode::ACCEPTED, name, &upload, hint))
    }

    async fn put_upload(&self, name: &str, id: &str, query: &Query, request: Request<Body>) -> Answer {
        let digest: Digest = query
            .get("digest")
            .ok_or_else(|| RegistryError::DigestInvalid("the digest parameter is missing".into()))?
            .parse()?;
        let range = content_range(request.headers())?;
        let length = length_of(request.headers());
        self.write_upload(name, id, range, length, digest.algorithm(), request.into_body()).await?;
        Ok(created(name, &self.finish_upload(name, id, &digest).await?))
    }

    async fn push_manifest(
        &self,
        name: &str,
        reference: &Reference,
        query: &Query,
        request: Request<Body>,
    ) -> Answer {
        let tags = query.all("tag");
        if tags.len() > TAGS_MAX {
            let mut response = RegistryError::TagInvalid(format!("more than {TAGS_MAX} tags")).response();
            *response.status_mut() = StatusCode::URI_TOO_LONG;
            return Ok(response);
        }
        if let Some(bad) = tags.iter().find(|t| !crate::name::is_tag(t)) {
            return Err(RegistryError::TagInvalid(bad.chars().take(160).collect()));
        }
        let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let content_type = content_type.map(str::to_string);
        let bytes = read_manifest(request).await?;
        let stored = self.put_manifest(name, reference, &tags, content_type.as_deref(), bytes).await?;
        tracing::info!(repository = name, %reference, digest = %stored.digest, "pushed");
        let mut response = status(StatusCode::CREATED);
        let out = response.headers_mut();
        set(out, header::LOCATION, format!("/v2/{name}/manifests/{}", stored.digest));
        set(out, DIGEST, stored.digest.to_string());
        if let Some(subject) = stored.subject {
            set(out, HeaderName::from_static("oci-subject"), subject.to_string());
        }
        if matches!(reference, Reference::Digest(_)) {
            for tag in tags {
                set(out, HeaderName::from_static("oci-tag"), tag);
            }
        }
        Ok(response)
    }
}

fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    set(response.headers_mut(), header::CONTENT_LENGTH, "0");
    if status == StatusCode::NO_CONTENT {
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    response
}

fn created(name: &str, info: &BlobInfo) -> Response<Body> {
    let mut response = status(StatusCode::CREATED);
    set(response.headers_mut(), header::LOCATION, blob_location(name, &info.digest));
    set(response.headers_mut(), DIGEST, info.digest.to_string());
    response
}

pub(super) fn upload_response(
    code: StatusCode,
    name: &str,
    upload: &UploadStatus,
    algorithm: Option<Algorithm>,
) -> Response<Body> {
    let mut response = status(code);
    let out = response.headers_mut();
    let hint = algorithm.map(|a| format!("?digest-algorithm={}", a.name())).unwrap_or_default();
    set(out, header::LOCATION, format!("{}{hint}", upload_location(name, &upload.id)));
    set(out, header::RANGE, format!("0-{}", upload.offset.saturating_sub(1)));
    set(out, UPLOAD_ID, &upload.id);
    response
}

fn algorithm(query: &Query) -> Result<Option<Algorithm>, RegistryError> {
    let known = |name: &str| {
        Algorithm::from_name(name)
            .ok_or_else(|| RegistryError::DigestInvalid(format!("{name} is no supported algorithm")))
    };
    query.get("digest-algorithm").map(known).transpose()
}

/// `first-last`, the spec's form, or HTTP's own.
fn content_range(headers: &HeaderMap) -> Result<Option<(u64, u64)>, RegistryError> {
    let Some(value) = headers.get(header::CONTENT_RANGE) else { return Ok(None) };
    let text = value.to_str().unwrap_or("");
    let plain = text.strip_prefix("bytes ").unwrap_or(text).split('/').next().unwrap_or("");
    let range = plain.split_once('-').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    match range {
        Some(range) => Ok(Some(range)),
        None => Err(RegistryError::UploadInvalid(format!("Content-Range {text:?}"))),
    }
}
