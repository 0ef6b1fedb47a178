//! Bootstrap tokens: `<id>.<secret>`, kept as Secrets of the type `bootstrap.kubernetes.io/token` in kube-system.
//!
//! Upstream counterparts: cluster-bootstrap token/{api,util} and plugin/pkg/auth/authenticator/token/bootstrap.
use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::Timestamp;
use sampan_world::random;
use serde_json::{Value, json};

pub const NAMESPACE: &str = "kube-system";
pub const SECRET_TYPE: &str = "bootstrap.kubernetes.io/token";
pub const NAME_PREFIX: &str = "bootstrap-token-";
/// The group of every user that comes with one.
pub const GROUP: &str = "system:bootstrappers";
const GROUP_PREFIX: &str = "system:bootstrappers:";
const ID_LENGTH: usize = 6;
const SECRET_LENGTH: usize = 16;
const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// An id, which is public, and a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct BootstrapToken {
    pub id: String,
    secret: String,
}

impl BootstrapToken {
    pub fn generate() -> Self {
        Self { id: characters(ID_LENGTH), secret: characters(SECRET_LENGTH) }
    }

    /// `[a-z0-9]{6}.[a-z0-9]{16}`
    pub fn parse(text: &str) -> Option<Self> {
        let (id, secret) = text.split_once('.')?;
        let plain = |s: &str, n| s.len() == n && s.bytes().all(|b| ALPHABET.contains(&b));
        (plain(id, ID_LENGTH) && plain(secret, SECRET_LENGTH))
            .then(|| Self { id: id.to_string(), secret: secret.to_string() })
    }

    /// The name of the Secret that holds it.
    pub fn secret_name(&self) -> String {
        format!("{NAME_PREFIX}{}", self.id)
    }

    /// The Secret to create. Without `expires` it lives until it is deleted.
    pub fn to_secret(&self, expires: Option<Timestamp>, description: &str, groups: &[&str]) -> Value {
        let mut data = BTreeMap::from([
            ("token-id", self.id.clone()),
            ("token-secret", self.secret.clone()),
            ("usage-bootstrap-authentication", "true".to_string()),
            ("usage-bootstrap-signing", "true".to_string()),
        ]);
        if let Some(expires) = expires {
            data.insert("expiration", expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        }
        if !description.is_empty() {
            data.insert("description", description.to_string());
        }
        if !groups.is_empty() {
            data.insert("auth-extra-groups", groups.join(","));
        }
        let data: BTreeMap<&str, String> = data.into_iter().map(|(k, v)| (k, BASE64.encode(v))).collect();
        json!({
            "apiVersion": "v1", "kind": "Secret", "type": SECRET_TYPE,
            "metadata": {"name": self.secret_name(), "namespace": NAMESPACE}, "data": data,
        })
    }

    /// The groups of a user that comes with this token, when the Secret of its name says that it is valid at `now`.
    pub fn groups(&self, secret: &Value, now: Timestamp) -> Option<Vec<String>> {
        let stored = Stored::read(secret)?;
        let valid = stored.token == *self && stored.authenticates && !stored.is_expired(now);
        (valid && crate::same_secret(&stored.token.secret, &self.secret)).then_some(stored.groups)
    }
}

/// A bootstrap token as its Secret describes it, for lists.
#[derive(Clone, PartialEq, Eq)]
pub struct Stored {
    pub token: BootstrapToken,
    pub description: String,
    pub expires: Option<Timestamp>,
    /// An `expiration` that cannot be read counts as long past.
    pub malformed_expiry: bool,
    pub authenticates: bool,
    pub groups: Vec<String>,
}

impl Stored {
    /// `None` when the Secret holds no well-formed bootstrap token.
    pub fn read(secret: &Value) -> Option<Self> {
        let metadata = secret.get("metadata")?;
        let text = |key: &str| {
            let bytes = BASE64.decode(secret.get("data")?.get(key)?.as_str()?).ok()?;
            String::from_utf8(bytes).ok()
        };
        let token = BootstrapToken::parse(&format!("{}.{}", text("token-id")?, text("token-secret")?))?;
        let right_place = secret.get("type").and_then(Value::as_str) == Some(SECRET_TYPE)
            && metadata.get("name").and_then(Value::as_str) == Some(token.secret_name().as_str())
            && metadata.get("deletionTimestamp").is_none();
        if !right_place {
            return None;
        }
        let expiration = text("expiration").filter(|e| !e.is_empty());
        let expires = expiration.as_ref().and_then(|e| e.parse().ok());
        let mut groups = vec![GROUP.to_string()];
        for group in text("auth-extra-groups").unwrap_or_default().split(',').filter(|g| !g.is_empty()) {
            // upstream refuses the whole token when one of its groups is not a bootstrappers group
            if !group.starts_with(GROUP_PREFIX) {
                return None;
            }
            groups.push(group.to_string());
        }
        Some(Self {
            description: text("description").unwrap_or_default(),
            malformed_expiry: expiration.is_some() && expires.is_none(),
            expires,
            authenticates: text("usage-bootstrap-authentication").as_deref() == Some("true"),
            groups,
            token,
        })
    }

    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.malformed_expiry || self.expires.is_some_and(|expires| expires <= now)
    }
}

fn characters(n: usize) -> String {
    // 252 is the largest multiple of 36 in a byte: what is above would favour some characters
    let mut text = String::with_capacity(n);
    while text.len() < n {
        let mut bytes = [0; 32];
        random::fill(&mut bytes);
        let usable = bytes.iter().filter(|b| **b < 252).map(|b| ALPHABET[usize::from(b % 36)] as char);
        text.extend(usable.take(n - text.len()));
    }
    text
}

impl fmt::Display for BootstrapToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.id, self.secret)
    }
}

/// Never shows the secret.
impl fmt::Debug for BootstrapToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BootstrapToken").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_valid_until_it_expires() {
        let token = BootstrapToken::generate();
        assert_eq!(BootstrapToken::parse(&token.to_string()), Some(token.clone()));
        let (before, at): (Timestamp, Timestamp) =
            ("2026-01-01T00:00:00Z".parse().unwrap(), "2026-01-01T00:00:01Z".parse().unwrap());
        let secret = token.to_secret(Some(at), "laptop", &["system:bootstrappers:sampan:default-node-token"]);
        let groups = token.groups(&secret, before).unwrap();
        assert_eq!(groups, ["system:bootstrappers", "system:bootstrappers:sampan:default-node-token"]);
        assert_eq!(token.groups(&secret, at), None);
        let other = BootstrapToken { secret: "0".repeat(16), ..token.clone() };
        assert_eq!(other.groups(&secret, before), None);
        for (pointer, value) in [
            ("/type", json!("Opaque")),
            ("/metadata/name", json!("x")),
            ("/data/usage-bootstrap-authentication", json!("ZmFsc2U=")),
            ("/data/expiration", json!(BASE64.encode("tomorrow"))),
            ("/data/auth-extra-groups", json!(BASE64.encode("system:masters"))),
            ("/data/token-secret", json!("not base64")),
        ] {
            let mut secret = secret.clone();
            *secret.pointer_mut(pointer).unwrap() = value;
            assert_eq!(token.groups(&secret, before), None, "{pointer}");
        }
        assert_eq!(token.groups(&json!({}), before), None);
    }

    #[test]
    fn rubbish_is_no_token() {
        for text in [
            "",
            ".",
            "abcdef",
            "abcdef.0123456789abcde",
            "ABCDEF.0123456789abcdef",
            "abcdef.0123456789abcdef.",
            "äbcde.0123456789abcdef",
        ] {
            assert_eq!(BootstrapToken::parse(text), None, "{text}");
        }
    }
}
