//! The registry over HTTP: which request means what, and what is answered.
//!
//! Upstream counterparts: the OCI distribution spec; distribution's `registry/handlers`. Locations are paths, so that a
//! registry behind a proxy needs to know nothing of it. What changes something runs to its end even when the client
//! goes away in the middle.
use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};

use crate::digest::{Algorithm, Digest};
use crate::error::RegistryError;
use crate::registry::{MANIFEST_MAX_BYTES, Reference, Registry};

mod content;
mod query;
mod routes;
mod writes;

pub(crate) use content::{blob_headers, manifest_response, range_of};
pub(crate) use query::{Query, encode};
pub(crate) use routes::{Route, Target, upload_location};

const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");
const VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// How much of a refused body is read, and for how long.
const DRAIN_MAX_BYTES: usize = 256 << 20;
const DRAIN: std::time::Duration = std::time::Duration::from_secs(10);

pub(crate) type Answer = Result<Response<Body>, RegistryError>;

impl Registry {
    /// The whole HTTP interface as a service, to be served here or mounted elsewhere.
    pub fn router(self: &Arc<Self>) -> axum::Router {
        let registry = self.clone();
        axum::Router::new().fallback(move |request: Request<Body>| {
            let registry = registry.clone();
            async move { registry.handle(request).await }
        })
    }

    pub async fn handle(self: Arc<Self>, request: Request<Body>) -> Response<Body> {
        let (method, path) = (request.method().clone(), request.uri().path().to_string());
        let mut response = match self.answer(request).await {
            Ok(response) => response,
            Err(error) => {
                if error.status().is_server_error() {
                    tracing::warn!(%method, path, %error, "request failed");
                }
                error.response()
            }
        };
        let headers = response.headers_mut();
        headers.insert(VERSION, HeaderValue::from_static("registry/2.0"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        tracing::debug!(%method, path, status = response.status().as_u16(), "answered");
        response
    }

    async fn answer(self: Arc<Self>, request: Request<Body>) -> Answer {
        let route = Route::parse(request.uri().path())?;
        let query = Query::parse(request.uri().query().unwrap_or(""));
        if route.target == Target::Root {
            return Ok(Response::new(Body::empty()));
        }
        if let (Some(proxy), Some(registry)) = (&self.proxy, query.get("ns").filter(|ns| !ns.is_empty())) {
            proxy.check_namespace(registry)?;
        }
        self.access.authorize(request.headers(), &route.accesses(request.method(), &query)).await?;
        let method = request.method().clone();
        if method == Method::GET || method == Method::HEAD {
            return self.read(route, &query, request).await;
        }
        self.check_writable(&method)?;
        // a task of its own: it is never left half-way
        match tokio::spawn(self.write(method, route, query, request)).await {
            Ok(answer) => answer,
            Err(e) => Err(RegistryError::UploadInvalid(format!("the request ended: {e}"))),
        }
    }

    fn check_writable(&self, method: &Method) -> Result<(), RegistryError> {
        if self.options.read_only {
            return Err(RegistryError::Unsupported("the registry is read-only".into()));
        }
        if self.proxy.is_some() {
            return Err(RegistryError::Unsupported("the registry only caches another".into()));
        }
        if *method == Method::DELETE && !self.options.delete_enabled {
            return Err(RegistryError::Unsupported("deletion is disabled".into()));
        }
        Ok(())
    }

    async fn read(self: Arc<Self>, route: Route, query: &Query, request: Request<Body>) -> Answer {
        let head = request.method() == Method::HEAD;
        let name = route.repository;
        match route.target {
            Target::Root => Ok(Response::new(Body::empty())),
            Target::Base => Ok(json(b"{}".to_vec())),
            Target::Catalog => self.catalog_page(query).await,
            Target::Tags => self.tags_page(&name, query).await,
            Target::Manifest(reference) => {
                self.get_manifest(&name, &Reference::parse(&reference)?, request.headers(), head).await
            }
            Target::Blob(digest) => self.get_blob(&name, &digest.parse()?, request.headers(), head).await,
            Target::Referrers(digest) => self.get_referrers(&name, &digest.parse()?, query).await,
            Target::Upload(id) => {
                let status = self.upload_status(&name, &id).await?;
                Ok(writes::upload_response(StatusCode::NO_CONTENT, &name, &status, None))
            }
            Target::Uploads => Err(RegistryError::Unsupported("uploads begin with POST".into())),
        }
    }
}

/// Reads what a refused client sends still: most don't look for an answer before they have sent it all, and see a
/// broken connection instead.
pub(crate) async fn drain(body: &mut Body) {
    let mut read = 0;
    let reading = async {
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, Bytes::len);
            if read > DRAIN_MAX_BYTES {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(DRAIN, reading).await;
}

pub(crate) fn json(body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: impl AsRef<str>) {
    if let Ok(value) = HeaderValue::from_str(value.as_ref()) {
        headers.append(name, value);
    }
}

fn length_of(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

async fn read_manifest(request: Request<Body>) -> Result<Bytes, RegistryError> {
    if length_of(request.headers()).is_some_and(|length| length > MANIFEST_MAX_BYTES as u64) {
        drain(&mut request.into_body()).await;
        return Err(RegistryError::ManifestTooLarge(MANIFEST_MAX_BYTES));
    }
    match Limited::new(request.into_body(), MANIFEST_MAX_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) if e.is::<http_body_util::LengthLimitError>() => {
            Err(RegistryError::ManifestTooLarge(MANIFEST_MAX_BYTES))
        }
        Err(e) => Err(RegistryError::ClientGone(e.to_string())),
    }
}
