//! Who may do what: nobody is asked, a password file, or tokens of another server.
//!
//! Upstream counterpart: distribution's `registry/auth`. What stays true: what can't be checked is refused; secrets are
//! never logged.
use http::HeaderMap;
use http::header::AUTHORIZATION;

use crate::error::RegistryError;

pub mod htpasswd;
mod keys;
pub mod token;

pub use htpasswd::Htpasswd;
pub use token::TokenAuth;

/// Something to be allowed: `repository:a/b:pull,push`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    pub kind: String,
    pub name: String,
    pub actions: Vec<String>,
}

impl Access {
    pub fn new(kind: &str, name: &str, actions: &[&str]) -> Access {
        let actions = actions.iter().map(|a| (*a).to_string()).collect();
        Access { kind: kind.to_string(), name: name.to_string(), actions }
    }
}

pub enum AccessController {
    /// Everyone may do everything.
    None,
    Htpasswd(Htpasswd),
    Token(TokenAuth),
}

#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("{file}: {message}")]
    File { file: String, message: String },
    #[error("token authentication needs a key to check tokens with: a root certificate bundle or a JWKS")]
    NoKeys,
    #[error("token authentication needs {0}")]
    Missing(&'static str),
}

impl AccessController {
    pub(crate) async fn authorize(
        &self,
        headers: &HeaderMap,
        accesses: &[Access],
    ) -> Result<(), RegistryError> {
        match self {
            AccessController::None => Ok(()),
            AccessController::Htpasswd(htpasswd) => htpasswd.authorize(headers).await,
            AccessController::Token(token) => token.authorize(headers, accesses),
        }
    }
}

/// What follows `scheme` in the Authorization header.
fn credentials<'a>(headers: &'a HeaderMap, scheme: &str) -> Option<&'a str> {
    let (given, value) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    given.eq_ignore_ascii_case(scheme).then(|| value.trim())
}

/// For a quoted string in a header.
fn quoted(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() && *c != '"' && *c != '\\').collect()
}
