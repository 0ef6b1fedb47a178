//! Who calls: from a client certificate, a token, or memory.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/authentication/{request,group}, endpoints/filters/authentication.go and
//! pkg/kubeapiserver/authenticator. What stays true: credentials that are there but wrong are a 401 answer, never
//! anonymous; a caller in memory carries its identity in the request's extensions, which nothing from the network can.
//! What was found out is remembered for ten seconds, as upstream does for tokens, for certificates too.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL};
use http::{HeaderMap, request::Parts};
use parking_lot::{Mutex, RwLock};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use sampan_client::Identity;
use sampan_pki::{BootstrapToken, certificate};
use sampan_world::clock;
use tokio::time::Instant;

use crate::access;
use crate::status::Status;

pub mod impersonation;
pub mod lookup;
pub mod service_account;
pub mod token_request;
pub mod token_review;
pub mod virtual_resources;

pub use lookup::{ClientLookup, Lookup};
pub use service_account::ServiceAccountTokens;
pub use virtual_resources::VirtualResources;

pub use crate::access::PeerCertificates;

pub const ANONYMOUS: &str = "system:anonymous";
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";
const REMEMBERED_FOR: Duration = Duration::from_secs(10);
const REMEMBERED_MAX: usize = 1024;
const WEBSOCKET_TOKEN: &str = "base64url.bearer.authorization.k8s.io.";

/// Credentials that are there but wrong. The client only learns that it is not authorized.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AuthnError(pub String);

impl From<AuthnError> for Status {
    fn from(_: AuthnError) -> Self {
        Status::unauthorized()
    }
}

/// A user, and the audiences that its token is for among those asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authenticated {
    pub identity: Identity,
    pub audiences: Vec<String>,
}

/// What an [`Authenticator`] is made of.
pub struct Options {
    pub service_accounts: Arc<ServiceAccountTokens>,
    /// From `sampan_pki::tls::client_verifier`.
    pub client_verifier: Arc<dyn ClientCertVerifier>,
    pub lookup: Arc<dyn Lookup>,
    /// Tokens that are known without looking anything up: the cluster's own join secrets.
    pub static_tokens: Vec<(String, Identity)>,
    /// Whether requests without credentials are let through as `system:anonymous`.
    pub anonymous: bool,
}

/// Finds out who calls.
pub struct Authenticator {
    options: Options,
    static_tokens: RwLock<Vec<(String, Identity)>>,
    remembered: Mutex<HashMap<String, (Authenticated, Instant)>>,
}

impl Authenticator {
    pub fn new(mut options: Options) -> Self {
        let static_tokens = RwLock::new(std::mem::take(&mut options.static_tokens));
        Self { options, static_tokens, remembered: Mutex::default() }
    }

    /// Other tokens in place of those from [`Options::static_tokens`], from the next request on.
    pub fn replace_static_tokens(&self, tokens: Vec<(String, Identity)>) {
        *self.static_tokens.write() = tokens;
    }

    /// The caller; `None` when it brought no credentials and anonymous callers are not let in.
    pub async fn authenticate(&self, request: &Parts) -> Result<Option<Identity>, AuthnError> {
        if let Some(identity) = request.extensions.get::<Identity>() {
            return Ok(Some(identity.clone()));
        }
        let mut error = None;
        if let Some(PeerCertificates(chain)) = request.extensions.get::<PeerCertificates>() {
            match self.by_certificate(chain) {
                Ok(Some(identity)) => return Ok(Some(identity)),
                Ok(None) => {}
                Err(e) => error = Some(e),
            }
        }
        if let Some(token) = bearer_token(&request.headers) {
            match self.by_token(&token, &[]).await {
                Ok(Some(authenticated)) => return Ok(Some(authenticated.identity)),
                Ok(None) => error = Some(AuthnError("invalid bearer token".to_string())),
                Err(e) => error = Some(e),
            }
        }
        match error {
            Some(error) => Err(error),
            None if self.options.anonymous => Ok(Some(anonymous())),
            None => Ok(None),
        }
    }

    fn by_certificate(&self, chain: &[CertificateDer<'static>]) -> Result<Option<Identity>, AuthnError> {
        let Some((leaf, intermediates)) = chain.split_first() else { return Ok(None) };
        let id = sampan_pki::sha256_hex(leaf);
        if let Some(found) = self.recall(&id) {
            return Ok(Some(found.identity));
        }
        let now = UnixTime::since_unix_epoch(Duration::from_secs(clock::now().as_second().unsigned_abs()));
        self.options
            .client_verifier
            .verify_client_cert(leaf, intermediates, now)
            .map_err(|e| AuthnError(format!("verifying the client certificate failed: {e}")))?;
        let subject = certificate::subject(leaf).filter(|s| !s.common_name.is_empty());
        let Some(subject) = subject else { return Ok(None) };
        let identity = Identity {
            username: subject.common_name,
            uid: String::new(),
            groups: subject.organizations,
            extra: [(CREDENTIAL_ID.to_string(), vec![format!("X509SHA256={id}")])].into(),
        };
        let found = Authenticated { identity: with_authenticated(identity), audiences: Vec::new() };
        self.remember(id, &found);
        Ok(Some(found.identity))
    }

    /// Who a token is; `None` when nobody knows it. No `audiences` means the API server's own.
    pub async fn by_token(
        &self,
        token: &str,
        audiences: &[String],
    ) -> Result<Option<Authenticated>, AuthnError> {
        let own = self.options.service_accounts.audiences();
        let audiences = if audiences.is_empty() { own } else { audiences };
        // a static or bootstrap token is for the API server only
        let served: Vec<String> = audiences.iter().filter(|a| own.contains(a)).cloned().collect();
        let of_static = |(known, identity): &(String, Identity)| {
            sampan_pki::same_secret(known, token).then(|| identity.clone())
        };
        let known = self.static_tokens.read().iter().find_map(of_static);
        if let Some(identity) = known {
            let identity = with_authenticated(identity);
            return Ok((!served.is_empty()).then_some(Authenticated { identity, audiences: served }));
        }
        let key = sampan_pki::sha256_hex(format!("{token}\n{}", audiences.join("\n")).as_bytes());
        if let Some(found) = self.recall(&key) {
            return Ok(Some(found));
        }
        let found = match BootstrapToken::parse(token) {
            Some(token) if !served.is_empty() => {
                let identity = self.by_bootstrap_token(&token).await?;
                identity.map(|identity| Authenticated { identity, audiences: served })
            }
            Some(_) => None,
            None => self.options.service_accounts.authenticate(token, audiences).await?,
        };
        let Some(mut found) = found else { return Ok(None) };
        found.identity = with_authenticated(found.identity);
        self.remember(key, &found);
        Ok(Some(found))
    }

    async fn by_bootstrap_token(&self, token: &BootstrapToken) -> Result<Option<Identity>, AuthnError> {
        let namespace = sampan_pki::bootstrap_token::NAMESPACE;
        let secret = self.options.lookup.get("secrets", namespace, &token.secret_name()).await;
        let Some(secret) = secret.map_err(AuthnError)? else { return Ok(None) };
        Ok(token.groups(&secret, clock::now()).map(|groups| Identity {
            username: format!("system:bootstrap:{}", token.id),
            groups,
            ..Identity::default()
        }))
    }

    fn recall(&self, key: &str) -> Option<Authenticated> {
        let remembered = self.remembered.lock();
        let (found, until) = remembered.get(key)?;
        (*until > clock::monotonic()).then(|| found.clone())
    }

    fn remember(&self, key: String, found: &Authenticated) {
        let now = clock::monotonic();
        let mut remembered = self.remembered.lock();
        if remembered.len() >= REMEMBERED_MAX {
            remembered.retain(|_, (_, until)| *until > now);
        }
        if remembered.len() < REMEMBERED_MAX {
            remembered.insert(key, (found.clone(), now + REMEMBERED_FOR));
        }
    }
}

#[async_trait]
impl access::Authenticator for Authenticator {
    async fn authenticate(&self, request: &Parts) -> Result<Identity, Status> {
        match Self::authenticate(self, request).await {
            Ok(Some(identity)) => Ok(identity),
            Ok(None) => Err(Status::unauthorized()),
            Err(error) => {
                tracing::debug!(%error, "unable to authenticate the request");
                Err(error.into())
            }
        }
    }
}

/// The user of requests without credentials.
pub fn anonymous() -> Identity {
    Identity {
        username: ANONYMOUS.to_string(),
        groups: vec![UNAUTHENTICATED.to_string()],
        ..Identity::default()
    }
}

fn with_authenticated(mut identity: Identity) -> Identity {
    let special = |g: &String| g == Identity::AUTHENTICATED || g == UNAUTHENTICATED;
    if !identity.groups.iter().any(special) {
        identity.groups.push(Identity::AUTHENTICATED.to_string());
    }
    identity
}

/// The token of an `Authorization: Bearer` header, or of a browser's WebSocket, which can send no such header.
fn bearer_token(headers: &HeaderMap) -> Option<String> {
    use base64::Engine;
    if let Some(value) = headers.get(AUTHORIZATION).and_then(|v| v.to_str().ok()) {
        let (scheme, token) = value.trim().split_once(' ')?;
        return (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty())
            .then(|| token.trim().to_string());
    }
    let protocols = headers.get_all(SEC_WEBSOCKET_PROTOCOL);
    let protocols = protocols.iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    let encoded = protocols.map(str::trim).find_map(|p| p.strip_prefix(WEBSOCKET_TOKEN))?;
    let token = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(encoded).ok()?;
    String::from_utf8(token).ok().filter(|t| !t.is_empty())
}

/// Removes what was only for authentication, so that nothing behind it sees or forwards it.
pub fn strip(headers: &mut HeaderMap) {
    headers.remove(AUTHORIZATION);
    let protocols = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|v| v.to_str().ok());
    let protocols: Vec<&str> = protocols.flat_map(|v| v.split(',')).map(str::trim).collect();
    if protocols.iter().any(|p| p.starts_with(WEBSOCKET_TOKEN)) {
        let left: Vec<&str> = protocols.into_iter().filter(|p| !p.starts_with(WEBSOCKET_TOKEN)).collect();
        let left = http::HeaderValue::from_str(&left.join(", ")).ok().filter(|left| !left.is_empty());
        match left {
            Some(left) => drop(headers.insert(SEC_WEBSOCKET_PROTOCOL, left)),
            None => drop(headers.remove(SEC_WEBSOCKET_PROTOCOL)),
        }
    }
    let proxied = |name: &str| {
        matches!(name, "x-remote-user" | "x-remote-uid" | "x-remote-group")
            || name.starts_with("x-remote-extra-")
    };
    let names: Vec<_> = headers.keys().filter(|k| proxied(k.as_str())).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::lookup::tests::Objects;
    use super::*;
    use sampan_pki::{Authority, ServiceAccountKey};

    fn parts(headers: &[(&str, &str)]) -> Parts {
        let mut request = http::Request::builder();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[tokio::test]
    async fn finds_out_who_calls() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(folder.path()).unwrap();
        let foreign = tempfile::tempdir().unwrap();
        let foreign = Authority::load_or_create(foreign.path()).unwrap();
        let bootstrap = BootstrapToken::generate();
        let objects = Arc::new(Objects::default());
        objects.put("secrets", "kube-system", &bootstrap.secret_name(), bootstrap.to_secret(None, "", &[]));
        let key = ServiceAccountKey::load_or_create(&folder.path().join("sa.key")).unwrap();
        let authenticator = Authenticator::new(Options {
            service_accounts: Arc::new(ServiceAccountTokens::new(key, objects.clone())),
            client_verifier: sampan_pki::tls::client_verifier(authority.trusted()).unwrap(),
            lookup: objects,
            static_tokens: vec![("admin-token".into(), Identity::new("admin", &["system:masters"]))],
            anonymous: true,
        });
        let who = async |parts: &Parts| authenticator.authenticate(parts).await.map(|i| i.unwrap());

        let with_certificate = |authority: &Authority| {
            let mut parts = parts(&[]);
            let chain = authority.client("jane", &["devs"]).unwrap().certificates().unwrap();
            parts.extensions.insert(PeerCertificates(Arc::new(chain)));
            parts
        };
        for _ in 0..2 {
            let jane = who(&with_certificate(&authority)).await.unwrap();
            assert_eq!(
                (jane.username.as_str(), jane.groups.join(",")),
                ("jane", "devs,system:authenticated".into())
            );
            assert!(jane.extra[CREDENTIAL_ID][0].starts_with("X509SHA256="));
        }
        assert!(who(&with_certificate(&foreign)).await.is_err(), "never anonymous");

        assert_eq!(who(&parts(&[])).await.unwrap(), anonymous());
        let admin = who(&parts(&[("authorization", "bearer admin-token")])).await.unwrap();
        assert!(admin.is_in("system:masters") && admin.is_in("system:authenticated"));
        authenticator
            .replace_static_tokens(vec![("other".into(), Identity::new("admin", &["system:masters"]))]);
        assert!(who(&parts(&[("authorization", "bearer admin-token")])).await.is_err(), "it was replaced");
        authenticator.replace_static_tokens(vec![("admin-token".into(), Identity::new("admin", &[]))]);
        for wrong in ["Bearer nonsense", "Bearer a.b.c", "Bearer abcdef.0123456789abcdef"] {
            assert!(who(&parts(&[("authorization", wrong)])).await.is_err(), "{wrong}");
        }
        let joining = who(&parts(&[("authorization", &format!("Bearer {bootstrap}"))])).await.unwrap();
        assert_eq!(joining.username, format!("system:bootstrap:{}", bootstrap.id));
        assert!(joining.is_in("system:bootstrappers"));
        let socket = parts(&[(
            "sec-websocket-protocol",
            &format!("v5.channel.k8s.io, {WEBSOCKET_TOKEN}YWRtaW4tdG9rZW4"),
        )]);
        assert_eq!(who(&socket).await.unwrap().username, "admin");
        let mut stripped = socket.headers;
        strip(&mut stripped);
        assert_eq!(stripped[SEC_WEBSOCKET_PROTOCOL], "v5.channel.k8s.io");
        let mut inside = parts(&[]);
        inside.extensions.insert(Identity::loopback());
        assert_eq!(who(&inside).await.unwrap(), Identity::loopback());
    }
}
