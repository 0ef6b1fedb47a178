//! What can go wrong with a request, and how it is told: the spec's codes in the spec's JSON.
//!
//! Upstream counterpart: distribution's `registry/api/errcode`. Messages name the repository and the thing in question;
//! what goes wrong inside is logged here, once, and told without details of this machine.
use axum::body::Body;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Response, StatusCode};

use crate::digest::{Digest, InvalidDigest};
use crate::storage::StorageError;

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("blob unknown to registry: {0}")]
    BlobUnknown(String),
    #[error("blob upload invalid: {0}")]
    UploadInvalid(String),
    #[error("blob upload unknown to registry: {0}")]
    UploadUnknown(String),
    #[error("provided digest did not match uploaded content: {0}")]
    DigestInvalid(String),
    /// The missing digests; each becomes an error of its own.
    #[error("manifest references a manifest or blob unknown to registry")]
    ManifestBlobUnknown(Vec<Digest>),
    #[error("manifest invalid: {0}")]
    ManifestInvalid(String),
    #[error("manifest unknown: {0}")]
    ManifestUnknown(String),
    #[error("manifest is over {0} bytes")]
    ManifestTooLarge(usize),
    #[error("invalid repository name: {0}")]
    NameInvalid(String),
    #[error("repository name not known to registry: {0}")]
    NameUnknown(String),
    #[error("provided length did not match content length: {0}")]
    SizeInvalid(String),
    #[error("tag invalid: {0}")]
    TagInvalid(String),
    #[error("invalid number of results requested: {0}")]
    PaginationInvalid(String),
    #[error("authentication required")]
    Unauthorized { challenge: String },
    #[error("requested access to the resource is denied: {0}")]
    Denied(String),
    #[error("the operation is unsupported: {0}")]
    Unsupported(String),
    #[error("too many requests: {0}")]
    TooManyRequests(String),
    #[error("no such endpoint")]
    NoEndpoint,
    /// A chunk that doesn't follow the last one; with where the upload is and how far.
    #[error("the upload stands at {offset} bytes; send what follows")]
    OutOfOrder { location: String, id: String, offset: u64 },
    #[error("the range is outside of the content's {size} bytes")]
    RangeNotSatisfiable { size: u64 },
    #[error("the upstream registry is away: {0}")]
    Upstream(String),
    #[error("the client stopped sending: {0}")]
    ClientGone(String),
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl From<InvalidDigest> for RegistryError {
    fn from(e: InvalidDigest) -> RegistryError {
        RegistryError::DigestInvalid(e.to_string())
    }
}

impl RegistryError {
    pub fn status(&self) -> StatusCode {
        use RegistryError::*;
        match self {
            BlobUnknown(_) | UploadUnknown(_) | ManifestUnknown(_) | NameUnknown(_) | NoEndpoint => {
                StatusCode::NOT_FOUND
            }
            UploadInvalid(_)
            | DigestInvalid(_)
            | ManifestBlobUnknown(_)
            | ManifestInvalid(_)
            | NameInvalid(_)
            | SizeInvalid(_)
            | TagInvalid(_)
            | PaginationInvalid(_)
            | ClientGone(_) => StatusCode::BAD_REQUEST,
            ManifestTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Unauthorized { .. } => StatusCode::UNAUTHORIZED,
            Denied(_) => StatusCode::FORBIDDEN,
            Unsupported(_) => StatusCode::METHOD_NOT_ALLOWED,
            TooManyRequests(_) => StatusCode::TOO_MANY_REQUESTS,
            OutOfOrder { .. } | RangeNotSatisfiable { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
            Upstream(_) => StatusCode::BAD_GATEWAY,
            Storage(e) if e.is_full() => StatusCode::INSUFFICIENT_STORAGE,
            Storage(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    pub fn code(&self) -> &'static str {
        use RegistryError::*;
        match self {
            BlobUnknown(_) => "BLOB_UNKNOWN",
            UploadInvalid(_) | OutOfOrder { .. } | ClientGone(_) => "BLOB_UPLOAD_INVALID",
            UploadUnknown(_) => "BLOB_UPLOAD_UNKNOWN",
            DigestInvalid(_) => "DIGEST_INVALID",
            ManifestBlobUnknown(_) => "MANIFEST_BLOB_UNKNOWN",
            ManifestInvalid(_) | TagInvalid(_) => "MANIFEST_INVALID",
            ManifestUnknown(_) => "MANIFEST_UNKNOWN",
            NameInvalid(_) => "NAME_INVALID",
            NameUnknown(_) | NoEndpoint => "NAME_UNKNOWN",
            SizeInvalid(_) | ManifestTooLarge(_) | RangeNotSatisfiable { .. } => "SIZE_INVALID",
            Unauthorized { .. } => "UNAUTHORIZED",
            Denied(_) => "DENIED",
            Unsupported(_) => "UNSUPPORTED",
            PaginationInvalid(_) => "PAGINATION_NUMBER_INVALID",
            TooManyRequests(_) => "TOOMANYREQUESTS",
            // the spec has no code for failures of the server itself; this is distribution's
            Upstream(_) | Storage(_) => "UNKNOWN",
        }
    }

    fn body(&self) -> serde_json::Value {
        let errors = match self {
            RegistryError::ManifestBlobUnknown(missing) => {
                let one = |d: &Digest| serde_json::json!({"code": self.code(), "message": "blob unknown to registry", "detail": {"digest": d.to_string()}});
                missing.iter().take(64).map(one).collect()
            }
            RegistryError::Storage(e) if e.is_full() => {
                vec![
                    serde_json::json!({"code": "UNKNOWN", "message": "no space left on the registry's device"}),
                ]
            }
            RegistryError::Storage(_) => {
                vec![serde_json::json!({"code": "UNKNOWN", "message": "the registry's storage failed"})]
            }
            _ => vec![serde_json::json!({"code": self.code(), "message": self.to_string()})],
        };
        serde_json::json!({ "errors": errors })
    }

    pub fn response(&self) -> Response<Body> {
        if let RegistryError::Storage(e) = self {
            tracing::error!(error = %e, "the registry's storage failed");
        }
        let mut response = Response::new(Body::from(self.body().to_string()));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut set = |name: HeaderName, value: String| {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name, value);
            }
        };
        match self {
            RegistryError::Unauthorized { challenge } => {
                set(http::header::WWW_AUTHENTICATE, challenge.clone());
            }
            RegistryError::OutOfOrder { location, id, offset } => {
                set(http::header::LOCATION, location.clone());
                set(http::header::RANGE, format!("0-{}", offset.saturating_sub(1)));
                set(HeaderName::from_static("docker-upload-uuid"), id.clone());
            }
            RegistryError::RangeNotSatisfiable { size } => {
                set(http::header::CONTENT_RANGE, format!("bytes */{size}"));
            }
            RegistryError::TooManyRequests(_) => set(http::header::RETRY_AFTER, "1".into()),
            _ => {}
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_carry_the_codes_of_the_spec() {
        let digest = Digest::of(crate::digest::Algorithm::Sha256, b"x");
        for (error, status, code) in [
            (RegistryError::BlobUnknown("x".into()), 404, "BLOB_UNKNOWN"),
            (RegistryError::ManifestBlobUnknown(vec![digest]), 400, "MANIFEST_BLOB_UNKNOWN"),
            (RegistryError::Denied("quota".into()), 403, "DENIED"),
            (RegistryError::Unsupported("read-only".into()), 405, "UNSUPPORTED"),
            (RegistryError::ManifestTooLarge(1), 413, "SIZE_INVALID"),
        ] {
            assert_eq!(error.status().as_u16(), status);
            assert_eq!(error.body()["errors"][0]["code"], code);
        }
    }
}
