//! What an agent is given to join: `K10<hash of the authority>::<user>:<secret>`, the format of K3s.
//!
//! What stays true: an agent that knows no more than an address and a secure token can verify the authority it
//! downloads from `/cacerts` before it sends the secret anywhere. Deliberately different from K3s: the hash is of the
//! certificate's DER form, so that white space in the PEM text does not matter, and of one certificate of the bundle, so
//! that a token outlives a new authority that the old one signed.
use std::fmt;

use crate::{BootstrapToken, PkiError, certificate};

const PREFIX: &str = "K10";
const HASH_LENGTH: usize = 64;
const MAX_LENGTH: usize = 1024;

/// What proves that an agent may join.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// The cluster's own secret; the user says what for (`node`, `server`).
    Secret { user: String, secret: String },
    /// A bootstrap token.
    Bootstrap(BootstrapToken),
}

/// A parsed join token.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The hash of the authority, in a secure token.
    pub authority_hash: Option<String>,
    pub credentials: Credentials,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinTokenError {
    #[error("the token is empty")]
    Empty,
    #[error("the token is longer than {MAX_LENGTH} characters or has white space in it")]
    Malformed,
    #[error(
        "the token starts with {PREFIX} but the hash of the authority is not {HASH_LENGTH} hex digits and \"::\""
    )]
    Hash,
    #[error("the token has no secret")]
    NoSecret,
}

impl JoinToken {
    pub fn secure(authority_hash: &str, credentials: Credentials) -> Self {
        Self { authority_hash: Some(authority_hash.to_string()), credentials }
    }

    pub fn parse(text: &str) -> Result<Self, JoinTokenError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(JoinTokenError::Empty);
        }
        if text.len() > MAX_LENGTH || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(JoinTokenError::Malformed);
        }
        let (authority_hash, rest) = match text.strip_prefix(PREFIX) {
            None => (None, text),
            Some(rest) => {
                let (hash, rest) = rest.split_once("::").ok_or(JoinTokenError::Hash)?;
                if hash.len() != HASH_LENGTH || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(JoinTokenError::Hash);
                }
                (Some(hash.to_ascii_lowercase()), rest)
            }
        };
        let credentials = match (BootstrapToken::parse(rest), rest.split_once(':')) {
            (Some(token), _) => Credentials::Bootstrap(token),
            (None, Some((user, secret))) => {
                Credentials::Secret { user: user.to_string(), secret: secret.to_string() }
            }
            (None, None) => Credentials::Secret { user: String::new(), secret: rest.to_string() },
        };
        match &credentials {
            Credentials::Secret { secret, .. } if secret.is_empty() => Err(JoinTokenError::NoSecret),
            _ => Ok(Self { authority_hash, credentials }),
        }
    }

    /// What goes after `Authorization: Bearer`.
    pub fn bearer(&self) -> String {
        match &self.credentials {
            Credentials::Secret { secret, .. } => secret.clone(),
            Credentials::Bootstrap(token) => token.to_string(),
        }
    }

    /// What to trust of `pem`, as downloaded: the one certificate that this token names, also when others came after
    /// or before it; `None` when it is not among them. A token without a hash trusts all.
    pub fn trusted(&self, pem: &str) -> Result<Option<String>, PkiError> {
        let certificates = certificate::certificates(pem)?;
        let Some(hash) = &self.authority_hash else { return Ok(Some(pem.to_string())) };
        let named = certificates.iter().find(|one| crate::sha256_hex(one) == *hash);
        Ok(named.map(certificate::pem))
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(hash) = &self.authority_hash {
            write!(f, "{PREFIX}{hash}::")?;
        }
        match &self.credentials {
            // alone it might read as something else
            Credentials::Secret { user, secret }
                if user.is_empty()
                    && !secret.contains(':')
                    && !secret.starts_with(PREFIX)
                    && BootstrapToken::parse(secret).is_none() =>
            {
                f.write_str(secret)
            }
            Credentials::Secret { user, secret } => write!(f, "{user}:{secret}"),
            Credentials::Bootstrap(token) => write!(f, "{token}"),
        }
    }
}

/// Never shows the secret.
impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("authority_hash", &self.authority_hash).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints() {
        let hash = "0123456789abcdef".repeat(4);
        let good = [
            (format!("K10{hash}::node:s3cret"), Some(&hash), "s3cret"),
            (format!("K10{hash}::s3cret"), Some(&hash), "s3cret"),
            (format!("K10{hash}::node:with:colon"), Some(&hash), "with:colon"),
            (format!("K10{hash}::abcdef.0123456789abcdef"), Some(&hash), "abcdef.0123456789abcdef"),
            ("abcdef.0123456789abcdef".to_string(), None, "abcdef.0123456789abcdef"),
            ("plain".to_string(), None, "plain"),
            ("::a".to_string(), None, ":a"),
            (":K10x".to_string(), None, "K10x"),
        ];
        for (text, hash, bearer) in good {
            let token = JoinToken::parse(&format!(" {text}\n")).unwrap();
            assert_eq!((token.authority_hash.as_ref(), token.bearer().as_str()), (hash, bearer));
            assert_eq!(token.to_string(), text);
            assert!(!format!("{token:?}").contains(bearer));
        }
        let bad = [
            ("", JoinTokenError::Empty),
            ("K10", JoinTokenError::Hash),
            ("K10abc::node:x", JoinTokenError::Hash),
            ("node:", JoinTokenError::NoSecret),
            ("a b", JoinTokenError::Malformed),
        ];
        for (text, want) in bad {
            assert_eq!(JoinToken::parse(text).err(), Some(want), "{text}");
        }
        assert_eq!(JoinToken::parse(&format!("K10{hash}::")).err(), Some(JoinTokenError::NoSecret));
        assert_eq!(JoinToken::parse(&"x".repeat(2000)).err(), Some(JoinTokenError::Malformed));
    }

    #[test]
    fn trusts_one_authority() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [ours, other] = folders.each_ref().map(|f| crate::Authority::load_or_create(f.path()).unwrap());
        let secret = Credentials::Secret { user: "node".into(), secret: "x".into() };
        let token = JoinToken::secure(&ours.hash(), secret);
        let own = certificate::pem(&ours.trusted()[0]);
        assert_eq!(token.trusted(&format!("\n{}", ours.certificate_pem())).unwrap(), Some(own.clone()));
        assert_eq!(token.trusted(other.certificate_pem()).unwrap(), None);
        // whoever adds one of his own to the bundle gains nothing
        let both = format!("{}{}", other.certificate_pem(), ours.certificate_pem());
        assert_eq!(token.trusted(&both).unwrap(), Some(own));
        assert!(token.trusted("nothing").is_err());
    }
}
