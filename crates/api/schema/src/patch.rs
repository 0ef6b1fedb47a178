//! Patches: how a document and a client's patch become a new document.
//!
//! Upstream: staging/src/k8s.io/apiserver/pkg/endpoints/handlers/patch.go, evanphx/json-patch (v4), and
//! staging/src/k8s.io/apimachinery/pkg/util/strategicpatch. Server-side apply is [`crate::apply`].
//!
//! What stays true: a patch never touches the document on failure (it is consumed by value), and every error
//! says which HTTP answer it stands for. Difference: numbers keep the form that JSON gave them, and lookups
//! in merged lists go through an index instead of scanning.

pub mod json;
pub mod merge;
pub mod strategic;
pub(crate) mod wording;

use serde_json::Value;

pub use json::json;
pub use merge::merge;
pub use strategic::strategic;

/// Why a patch didn't apply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// 400 BadRequest with this message.
    #[error("{0}")]
    Malformed(String),
    /// 413 RequestEntityTooLarge with this message.
    #[error("{0}")]
    TooLarge(String),
    /// 422 Invalid. Upstream answers with [`PatchError::UNPROCESSABLE_MESSAGE`] and keeps this text to itself.
    #[error("{0}")]
    Unprocessable(String),
    /// 500 InternalError with this message.
    #[error("{0}")]
    Internal(String),
}

impl PatchError {
    /// What a client reads for [`PatchError::Unprocessable`].
    pub const UNPROCESSABLE_MESSAGE: &str = "the server rejected our request due to an error in our request";
}

/// Reads a patch's body as JSON. Duplicate keys are not looked for here: that is strict decoding's work.
pub fn parse(body: &[u8]) -> Result<Value, PatchError> {
    serde_json::from_slice(body)
        .map_err(|error| PatchError::Malformed(format!("error decoding patch: {error}")))
}
