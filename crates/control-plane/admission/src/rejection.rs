//! Why a write is refused, as the client sees it. Upstream counterpart: k8s.io/apiserver/pkg/admission/errors.go.
use crate::Request;

/// A cause in the answer's details.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    pub reason: &'static str,
    pub message: String,
    pub field: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// 403; `<resource> "<name>" is forbidden: ` goes before the reason.
    Forbidden { why: String, cause: Option<Cause> },
    /// 404
    NotFound { resource: &'static str, name: String },
    /// 500
    Internal(String),
}

impl Rejection {
    pub fn forbidden(why: impl Into<String>) -> Self {
        Self::Forbidden { why: why.into(), cause: None }
    }

    pub fn code(&self) -> u16 {
        match self {
            Self::Forbidden { .. } => 403,
            Self::NotFound { .. } => 404,
            Self::Internal(_) => 500,
        }
    }

    /// The machine-readable reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Forbidden { .. } => "Forbidden",
            Self::NotFound { .. } => "NotFound",
            Self::Internal(_) => "InternalError",
        }
    }

    /// The whole message of the answer.
    pub fn message(&self, request: &Request<'_>) -> String {
        let dot = if request.group.is_empty() { "" } else { "." };
        let resource = format!("{}{dot}{}", request.resource, request.group);
        match self {
            Self::Forbidden { why, .. } if request.name.is_empty() => {
                format!("{resource} is forbidden: {why}")
            }
            Self::Forbidden { why, .. } => format!("{resource} {:?} is forbidden: {why}", request.name),
            Self::NotFound { resource, name } => format!("{resource} {name:?} not found"),
            Self::Internal(why) => format!("Internal error occurred: {why}"),
        }
    }
}
