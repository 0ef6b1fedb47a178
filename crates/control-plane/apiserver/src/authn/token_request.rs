//! `POST serviceaccounts/{name}/token`: issues a token.
//!
//! Upstream counterpart: pkg/registry/core/serviceaccount/storage/token.go and pkg/serviceaccount/claims.go. What stays
//! true: a pod's token asked for with the default lifetime of projected volumes lives for a year and warns after an
//! hour, so that old clients that never read it again go on working.
use sampan_kinds::{FieldError, Path};
use sampan_world::{clock, random};
use serde_json::{Map, Value, json};

use super::ServiceAccountTokens;
use super::service_account::{ISSUER, uid_of};
use crate::status::{GroupResource, Status};

const DEFAULT_SECONDS: i64 = 3600;
const MIN_SECONDS: i64 = 600;
/// What the ServiceAccount admission plugin asks for in projected volumes.
const PROJECTED_SECONDS: i64 = 3607;
const EXTENDED_SECONDS: i64 = 365 * 24 * 3600;
const GROUP: &str = "authentication.k8s.io";

/// What a token is bound to.
#[derive(Default)]
struct Bound {
    pod: Option<Value>,
    secret: Option<Value>,
    /// The node the token is bound to, or that its pod is on.
    node: Option<Value>,
}

impl ServiceAccountTokens {
    /// Answers the TokenRequest with its status filled in.
    pub async fn request(&self, namespace: &str, name: &str, mut request: Value) -> Result<Value, Status> {
        let account = self.find("serviceaccounts", namespace, name).await?;
        default(&mut request, namespace, name, &account, self.audiences())?;
        let spec = &request["spec"];
        let seconds = spec["expirationSeconds"].as_i64().unwrap_or(DEFAULT_SECONDS);
        validate(seconds)?;
        let bound = self.bound(namespace, name, &spec["boundObjectRef"]).await?;
        let own = spec["audiences"].as_array().is_some_and(|all| {
            all.iter().all(|a| a.as_str().is_some_and(|a| self.audiences().iter().any(|own| own == a)))
        });
        let extended = seconds == PROJECTED_SECONDS && bound.pod.is_some() && own;
        let now = clock::now();
        let (lives, warns) = if extended { (EXTENDED_SECONDS, Some(seconds)) } else { (seconds, None) };
        let claims = claims(&account, &bound, &spec["audiences"], now.as_second(), lives, warns);
        let token =
            self.key.sign(&claims).map_err(|e| Status::internal(format!("failed to generate token: {e}")))?;
        let expires = now.saturating_add(jiff::SignedDuration::from_secs(seconds)).unwrap_or(now);
        request["metadata"]["creationTimestamp"] = json!(clock::now_seconds().to_string());
        request["status"] = json!({
            "token": token,
            "expirationTimestamp": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        });
        Ok(request)
    }

    async fn find(&self, resource: &'static str, namespace: &str, name: &str) -> Result<Value, Status> {
        let found = self.lookup.get(resource, namespace, name).await.map_err(Status::internal)?;
        found.ok_or_else(|| Status::not_found(GroupResource { group: "", resource }, name))
    }

    async fn bound(&self, namespace: &str, account: &str, reference: &Value) -> Result<Bound, Status> {
        if reference.is_null() {
            return Ok(Bound::default());
        }
        let text = |field: &str| reference[field].as_str().unwrap_or_default();
        let (kind, name, version) = (text("kind"), text("name"), text("apiVersion"));
        let mut bound = Bound::default();
        let found = match (version.contains('/'), kind) {
            (false, "Pod") => {
                let pod = self.find("pods", namespace, name).await?;
                if pod["spec"]["serviceAccountName"] != account {
                    return Err(Status::bad_request(format!(
                        "cannot bind token for serviceaccount {account:?} to pod running with different \
                         serviceaccount name."
                    )));
                }
                if let Some(node) = pod["spec"]["nodeName"].as_str().filter(|n| !n.is_empty()) {
                    let found = self.lookup.get("nodes", "", node).await.map_err(Status::internal)?;
                    bound.node = Some(found.unwrap_or_else(|| json!({"metadata": {"name": node}})));
                }
                bound.pod.insert(pod)
            }
            (false, "Node") => bound.node.insert(self.find("nodes", "", name).await?),
            (false, "Secret") => bound.secret.insert(self.find("secrets", namespace, name).await?),
            _ => {
                let (group, version) = version.rsplit_once('/').unwrap_or(("", version));
                let message = format!("cannot bind token to object of type {group}/{version}, Kind={kind}");
                return Err(Status::bad_request(message));
            }
        };
        let wanted = text("uid");
        if !wanted.is_empty() && uid_of(found) != wanted {
            let why = format!(
                "the UID in the bound object reference ({wanted}) does not match the UID in record. The object might \
                 have been deleted and then recreated"
            );
            return Err(Status::conflict(GroupResource { group: "", resource: kind }, name, why));
        }
        Ok(bound)
    }
}

/// Fills in what was left out, and refuses a body that is about another account.
fn default(
    request: &mut Value,
    namespace: &str,
    name: &str,
    account: &Value,
    audiences: &[String],
) -> Result<(), Status> {
    if !request.is_object() {
        return Err(Status::bad_request("the request is not a TokenRequest"));
    }
    let metadata = Path::new("metadata");
    for (field, want, what) in [("name", name, "name"), ("namespace", namespace, "namespace")] {
        let given = request["metadata"][field].as_str().unwrap_or_default();
        if !given.is_empty() && given != want {
            let words = format!("must match the service account {what} if specified");
            let error = FieldError::invalid(&metadata.child(field), given, words);
            return Err(Status::invalid(GROUP, "TokenRequest", name, &vec![error]));
        }
    }
    let (given, uid) = (request["metadata"]["uid"].as_str().unwrap_or_default(), uid_of(account));
    if !given.is_empty() && given != uid {
        let why = format!(
            "the UID in the token request ({given}) does not match the UID of the service account ({uid})"
        );
        return Err(Status::conflict(GroupResource { group: GROUP, resource: "TokenRequest" }, name, why));
    }
    for field in ["metadata", "spec"] {
        if !request[field].is_object() {
            request[field] = Value::Object(Map::new());
        }
    }
    request["metadata"]["name"] = json!(name);
    request["metadata"]["namespace"] = json!(namespace);
    request["metadata"]["uid"] = json!(uid);
    let spec = &mut request["spec"];
    if spec["audiences"].as_array().is_none_or(Vec::is_empty) {
        spec["audiences"] = json!(audiences);
    }
    if spec["expirationSeconds"].is_null() {
        spec["expirationSeconds"] = json!(DEFAULT_SECONDS);
    }
    // indexing made what was missing null
    if let Some(spec) = spec.as_object_mut() {
        spec.retain(|_, value| !value.is_null());
    }
    Ok(())
}

fn validate(seconds: i64) -> Result<(), Status> {
    let path = Path::new("spec").child("expirationSeconds");
    let words = match seconds {
        ..MIN_SECONDS => "may not specify a duration less than 10 minutes",
        0x1_0000_0001.. => "may not specify a duration larger than 2^32 seconds",
        _ => return Ok(()),
    };
    Err(Status::invalid(GROUP, "TokenRequest", "", &vec![FieldError::invalid(&path, seconds, words)]))
}

fn claims(
    account: &Value,
    bound: &Bound,
    audiences: &Value,
    now: i64,
    lives: i64,
    warns: Option<i64>,
) -> Value {
    let reference = |object: &Value| {
        let mut reference = json!({"name": object["metadata"]["name"]});
        if !uid_of(object).is_empty() {
            reference["uid"] = json!(uid_of(object));
        }
        reference
    };
    let metadata = &account["metadata"];
    let (namespace, name) = (&metadata["namespace"], &metadata["name"]);
    let mut own = json!({"namespace": namespace, "serviceaccount": reference(account)});
    for (kind, object) in [("pod", &bound.pod), ("secret", &bound.secret), ("node", &bound.node)] {
        if let Some(object) = object {
            own[kind] = reference(object);
        }
    }
    if let Some(warns) = warns {
        own["warnafter"] = json!(now + warns);
    }
    let (namespace, name) = (namespace.as_str().unwrap_or_default(), name.as_str().unwrap_or_default());
    json!({
        "iss": ISSUER,
        "sub": format!("system:serviceaccount:{namespace}:{name}"),
        "aud": audiences,
        "iat": now,
        "nbf": now,
        "exp": now + lives,
        "jti": random::uuid(),
        "kubernetes.io": own,
    })
}

#[cfg(test)]
mod tests {
    use super::super::lookup::tests::Objects;
    use super::*;
    use sampan_pki::{ServiceAccountKey, service_account_key::unverified_claims};
    use std::sync::Arc;

    fn tokens() -> (ServiceAccountTokens, Arc<Objects>) {
        let folder = tempfile::tempdir().unwrap();
        let key = ServiceAccountKey::load_or_create(&folder.path().join("key")).unwrap();
        let objects = Arc::new(Objects::default());
        let object =
            |name: &str, uid: &str| json!({"metadata": {"name": name, "namespace": "ns", "uid": uid}});
        objects.put("serviceaccounts", "ns", "sa", object("sa", "u1"));
        objects.put("nodes", "", "n", object("n", "u3"));
        let mut pod = object("p", "u2");
        pod["spec"] = json!({"serviceAccountName": "sa", "nodeName": "n"});
        objects.put("pods", "ns", "p", pod);
        (ServiceAccountTokens::new(key, objects.clone()), objects)
    }

    #[tokio::test]
    async fn a_token_lives_as_long_as_its_pod() {
        let (tokens, objects) = tokens();
        let bound = json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u2"});
        let body = json!({"spec": {"expirationSeconds": 3607, "boundObjectRef": bound}});
        let answer = tokens.request("ns", "sa", body).await.unwrap();
        let token = answer["status"]["token"].as_str().unwrap();
        let claims = unverified_claims(token).unwrap();
        let own = &claims["kubernetes.io"];
        assert_eq!(own["pod"], json!({"name": "p", "uid": "u2"}));
        assert_eq!(own["node"], json!({"name": "n", "uid": "u3"}));
        let iat = claims["iat"].as_i64().unwrap();
        assert_eq!(claims["exp"], json!(iat + EXTENDED_SECONDS));
        assert_eq!(own["warnafter"], json!(iat + 3607));
        assert_eq!(answer["spec"]["audiences"], json!([ISSUER]));

        let who = tokens.authenticate(token, tokens.audiences()).await.unwrap().unwrap().identity;
        assert_eq!(who.username, "system:serviceaccount:ns:sa");
        assert_eq!(who.groups, ["system:serviceaccounts", "system:serviceaccounts:ns"]);
        assert_eq!(who.extra["authentication.kubernetes.io/pod-uid"], ["u2"]);
        let other = tokens.authenticate(token, &["other".to_string()]).await;
        assert!(other.unwrap_err().0.contains("is invalid for the target audiences"));
        objects.remove("pods", "ns", "p");
        let gone = tokens.authenticate(token, tokens.audiences()).await;
        assert_eq!(gone.unwrap_err().0, "service account token has been invalidated");
    }

    #[tokio::test]
    async fn the_clock_decides() {
        let (tokens, _) = tokens();
        let answer = tokens.request("ns", "sa", json!({"spec": {"expirationSeconds": 600}})).await.unwrap();
        let token = answer["status"]["token"].as_str().unwrap();
        let claims = tokens.key.verify(token).unwrap();
        let signed = |change: &dyn Fn(&mut Value)| {
            let mut claims = claims.clone();
            change(&mut claims);
            tokens.key.sign(&claims).unwrap()
        };
        let now = clock::now().as_second();
        for (token, want) in [
            (signed(&|c| c["exp"] = json!(now - 120)), "service account token has expired"),
            (signed(&|c| c["nbf"] = json!(now + 120)), "service account token is not valid yet"),
            (
                signed(&|c| c["kubernetes.io"]["serviceaccount"]["uid"] = json!("x")),
                "service account UID (u1) does not match claim (x)",
            ),
        ] {
            assert_eq!(tokens.authenticate(&token, tokens.audiences()).await.unwrap_err().0, want);
        }
        let foreign = signed(&|c| c["iss"] = json!("https://elsewhere"));
        assert_eq!(tokens.authenticate(&foreign, tokens.audiences()).await.unwrap(), None);
    }

    #[tokio::test]
    async fn refuses_as_upstream() {
        let (tokens, objects) = tokens();
        objects.put(
            "serviceaccounts",
            "ns",
            "other",
            json!({"metadata": {"name": "other", "namespace": "ns", "uid": "u9"}}),
        );
        let pod = |uid: &str| json!({"spec": {"boundObjectRef": {"kind": "Pod", "name": "p", "uid": uid}}});
        let cases = [
            ("gone", json!({}), 404),
            ("sa", json!({"spec": {"expirationSeconds": 599}}), 422),
            ("sa", json!({"spec": {"expirationSeconds": 4_294_967_297_i64}}), 422),
            ("sa", json!({"metadata": {"name": "x"}}), 422),
            ("sa", json!({"metadata": {"uid": "x"}}), 409),
            ("sa", pod("x"), 409),
            ("other", pod(""), 400),
            ("sa", json!({"spec": {"boundObjectRef": {"kind": "ConfigMap", "name": "p"}}}), 400),
            ("sa", json!([]), 400),
        ];
        for (name, body, code) in cases {
            let refused = tokens.request("ns", name, body.clone()).await.unwrap_err();
            assert_eq!(refused.0.code, code, "{body}: {}", refused.0.message);
        }
    }
}
