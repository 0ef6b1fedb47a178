//! Service account tokens: what they claim, and whether it still holds.
//!
//! Upstream counterparts: pkg/serviceaccount/{jwt,claims,openidmetadata}.go. What stays true: a token is good only as
//! long as its account and the pod, secret or node it is bound to exist with the same UIDs.
use std::sync::Arc;

use jiff::Timestamp;
use sampan_client::Identity;
use sampan_pki::{ServiceAccountKey, service_account_key};
use sampan_world::clock;
use serde_json::{Value, json};

use super::{Authenticated, AuthnError, CREDENTIAL_ID, Lookup};

pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// Clocks of nodes may differ by this much.
const LEEWAY_SECONDS: i64 = 60;

/// Issues and verifies service account tokens.
pub struct ServiceAccountTokens {
    pub(super) key: Arc<ServiceAccountKey>,
    pub(super) lookup: Arc<dyn Lookup>,
    audiences: Vec<String>,
}

/// What `/.well-known/openid-configuration` answers.
pub fn openid_configuration() -> Value {
    json!({
        "issuer": ISSUER,
        "jwks_uri": format!("{ISSUER}/openid/v1/jwks"),
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    })
}

impl ServiceAccountTokens {
    pub fn new(key: impl Into<Arc<ServiceAccountKey>>, lookup: Arc<dyn Lookup>) -> Self {
        Self { key: key.into(), lookup, audiences: vec![ISSUER.to_string()] }
    }

    /// The API server's own audiences.
    pub fn audiences(&self) -> &[String] {
        &self.audiences
    }

    /// What `/openid/v1/jwks` answers, as `application/jwk-set+json`.
    pub fn jwks(&self) -> Value {
        self.key.jwks()
    }

    /// Who a token is, for one of `wanted`; `None` when it is not one of ours at all.
    pub async fn authenticate(
        &self,
        token: &str,
        wanted: &[String],
    ) -> Result<Option<Authenticated>, AuthnError> {
        let ours = service_account_key::unverified_claims(token).is_some_and(|c| c["iss"] == ISSUER);
        if !ours {
            return Ok(None);
        }
        let claims = self.key.verify(token).map_err(|e| AuthnError(e.to_string()))?;
        let audiences = match &claims["aud"] {
            Value::String(one) => vec![one.clone()],
            Value::Array(all) => all.iter().filter_map(Value::as_str).map(str::to_string).collect(),
            _ => self.audiences.clone(),
        };
        let served: Vec<String> = audiences.iter().filter(|a| wanted.contains(a)).cloned().collect();
        if served.is_empty() {
            return Err(AuthnError(format!(
                "token audiences {audiences:?} is invalid for the target audiences {wanted:?}"
            )));
        }
        check_times(&claims, clock::now())?;
        self.check_bindings(&claims).await?;
        Ok(Some(Authenticated { identity: identity(&claims)?, audiences: served }))
    }

    async fn check_bindings(&self, claims: &Value) -> Result<(), AuthnError> {
        let own = &claims["kubernetes.io"];
        let namespace = own["namespace"].as_str().unwrap_or_default();
        let account = &own["serviceaccount"];
        let name = account["name"].as_str().unwrap_or_default();
        let found = self.lookup.get("serviceaccounts", namespace, name).await.map_err(AuthnError)?;
        let Some(found) = found else { return refuse(format!("serviceaccounts {name:?} not found")) };
        let (uid, claimed) = (uid_of(&found), account["uid"].as_str().unwrap_or_default());
        if uid != claimed {
            return refuse(format!("service account UID ({uid}) does not match claim ({claimed})"));
        }
        if is_deleted(&found) {
            return refuse(format!("service account {namespace}/{name} has been deleted"));
        }
        self.check_reference("secrets", "secret", namespace, &own["secret"]).await?;
        self.check_reference("pods", "pod", namespace, &own["pod"]).await?;
        // a pod's token only tells the node
        if own["pod"].is_null() {
            self.check_reference("nodes", "node", "", &own["node"]).await?;
        }
        Ok(())
    }

    async fn check_reference(
        &self,
        resource: &str,
        kind: &str,
        namespace: &str,
        claim: &Value,
    ) -> Result<(), AuthnError> {
        if claim.is_null() {
            return Ok(());
        }
        let name = claim["name"].as_str().unwrap_or_default();
        let found = self.lookup.get(resource, namespace, name).await.map_err(AuthnError)?;
        let Some(found) = found.filter(|object| !is_deleted(object)) else {
            return refuse("service account token has been invalidated".to_string());
        };
        let (uid, claimed) = (uid_of(&found), claim["uid"].as_str().unwrap_or_default());
        match uid == claimed {
            true => Ok(()),
            false => refuse(format!(
                "{kind} UID ({uid}) does not match service account {kind} ref claim ({claimed})"
            )),
        }
    }
}

fn refuse(why: String) -> Result<(), AuthnError> {
    Err(AuthnError(why))
}

pub(super) fn uid_of(object: &Value) -> &str {
    object["metadata"]["uid"].as_str().unwrap_or_default()
}

/// Whether it is being deleted for longer than clocks may differ.
fn is_deleted(object: &Value) -> bool {
    let at = object["metadata"]["deletionTimestamp"].as_str().and_then(|t| t.parse::<Timestamp>().ok());
    at.is_some_and(|at| at.as_second() < clock::now().as_second() - LEEWAY_SECONDS)
}

fn check_times(claims: &Value, now: Timestamp) -> Result<(), AuthnError> {
    let at = |claim: &str| claims[claim].as_f64().map(|seconds| seconds as i64);
    let now = now.as_second();
    if at("nbf").is_some_and(|nbf| now + LEEWAY_SECONDS < nbf) {
        return refuse("service account token is not valid yet".to_string());
    }
    // upstream takes a token without `exp` for one that never expires; those are legacy tokens, which we never issued
    if at("exp").is_none_or(|exp| now - LEEWAY_SECONDS > exp) {
        return refuse("service account token has expired".to_string());
    }
    if at("iat").is_some_and(|iat| now + LEEWAY_SECONDS < iat) {
        return refuse("service account token is issued in the future".to_string());
    }
    Ok(())
}

fn identity(claims: &Value) -> Result<Identity, AuthnError> {
    let own = &claims["kubernetes.io"];
    let text = |value: &Value| value.as_str().filter(|s| !s.is_empty()).map(str::to_string);
    let namespace = text(&own["namespace"]);
    let account = &own["serviceaccount"];
    let (Some(namespace), Some(name)) = (namespace, text(&account["name"])) else {
        return Err(AuthnError("the token names no service account".to_string()));
    };
    let mut identity = Identity {
        username: format!("system:serviceaccount:{namespace}:{name}"),
        uid: text(&account["uid"]).unwrap_or_default(),
        groups: vec!["system:serviceaccounts".to_string(), format!("system:serviceaccounts:{namespace}")],
        ..Identity::default()
    };
    let extras = [
        ("pod-name", text(&own["pod"]["name"])),
        ("pod-uid", text(&own["pod"]["uid"])),
        ("node-name", text(&own["node"]["name"])),
        ("node-uid", text(&own["node"]["uid"])),
    ];
    for (key, value) in extras {
        if let Some(value) = value {
            identity.extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value]);
        }
    }
    if let Some(id) = text(&claims["jti"]) {
        identity.extra.insert(CREDENTIAL_ID.to_string(), vec![format!("JTI={id}")]);
    }
    Ok(identity)
}
