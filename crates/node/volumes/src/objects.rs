//! The ConfigMaps, Secrets and tokens that the node's pods use, and no others.
//!
//! Upstream counterpart: pkg/kubelet/util/manager/watch_based_manager.go and pkg/kubelet/token. A node may only watch
//! single objects that its pods name, so each gets a watch of its own (`metadata.name=x`), kept while a pod of this node
//! uses it. Until a watch has its first list, a read asks the server. Bounded by what the node's pods name.
//!
//! Unlike upstream, what was last seen is also kept on disk (mode 0600) while a pod uses it, so that a node that reboots
//! without its server can start its pods; it is read only when the server cannot be reached.
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, ServiceAccount};
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt};
use parking_lot::Mutex;
use sampan_client::reflector::Following;
use sampan_world::clock;

mod follow;

/// How long to wait between answers that forbid, before one of them is believed.
const FORBIDDEN_WAITS_MS: [u64; 6] = [20, 50, 100, 200, 400, 800];

#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    #[error("{kind} {name:?} not found")]
    NotFound { kind: &'static str, name: String },
    #[error("failed to fetch {kind} {key}: {message}")]
    Failed { kind: &'static str, key: String, message: String },
}

/// A service account's token and how long until a fresh one should take its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub token: String,
    pub refresh_after: Duration,
}

/// Where volumes and environment variables get objects from.
#[async_trait]
pub trait PodObjects: Send + Sync {
    async fn config_map(&self, namespace: &str, name: &str) -> Result<Arc<ConfigMap>, FetchError>;
    async fn secret(&self, namespace: &str, name: &str) -> Result<Arc<Secret>, FetchError>;
    /// A token of the pod's service account, bound to the pod.
    async fn token(
        &self,
        pod: &Pod,
        audience: Option<&str>,
        expiration_seconds: i64,
    ) -> Result<Token, FetchError>;
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Reference {
    is_secret: bool,
    namespace: String,
    name: String,
}

#[derive(Clone)]
enum Held {
    ConfigMap(Arc<ConfigMap>),
    Secret(Arc<Secret>),
}

struct Watched {
    /// `None` until the first list; then what there is.
    seen: Option<Option<Held>>,
    users: BTreeSet<String>,
    _following: Following,
}

type OnChange = Arc<dyn Fn(&str) + Send + Sync>;

struct CachedToken {
    token: String,
    refresh_at: jiff::Timestamp,
}

/// Watches on single objects, shared by the pods that name them.
#[derive(Clone)]
pub struct ObjectWatches(Arc<Inner>);

struct Inner {
    client: Client,
    watched: Mutex<HashMap<Reference, Watched>>,
    tokens: Mutex<HashMap<(String, String, i64), CachedToken>>,
    on_change: Mutex<Option<OnChange>>,
    last_known: Mutex<Option<PathBuf>>,
}

impl ObjectWatches {
    pub fn new(client: Client) -> Self {
        Self(Arc::new(Inner {
            client,
            watched: Mutex::default(),
            tokens: Mutex::default(),
            on_change: Mutex::default(),
            last_known: Mutex::default(),
        }))
    }

    /// Keeps what was last seen in that folder.
    #[must_use]
    pub fn with_last_known(self, folder: PathBuf) -> Self {
        *self.0.last_known.lock() = Some(folder);
        self
    }

    /// Calls `handler` with the UID of each pod that uses an object that changed.
    pub fn on_change(&self, handler: impl Fn(&str) + Send + Sync + 'static) {
        *self.0.on_change.lock() = Some(Arc::new(handler));
    }

    /// Follows what `pod` names from now on.
    pub fn register(&self, pod: &Pod) {
        let uid = pod.uid().unwrap_or_default();
        let wanted = references(pod);
        let mut watched = self.0.watched.lock();
        for (reference, entry) in watched.iter_mut() {
            if !wanted.contains(reference) {
                entry.users.remove(&uid);
            }
        }
        for reference in wanted {
            let entry = watched.entry(reference.clone()).or_insert_with(|| {
                let inner = Arc::downgrade(&self.0);
                let following = follow::follow(inner, self.0.client.clone(), reference);
                Watched { seen: None, users: BTreeSet::new(), _following: following }
            });
            entry.users.insert(uid.clone());
        }
        self.0.forget(drop_unused(&mut watched));
    }

    /// Forgets what only that pod used.
    pub fn unregister(&self, uid: &str) {
        let mut watched = self.0.watched.lock();
        for entry in watched.values_mut() {
            entry.users.remove(uid);
        }
        self.0.forget(drop_unused(&mut watched));
        self.0.tokens.lock().retain(|(pod, _, _), _| pod != uid);
        if let Some(folder) = &*self.0.last_known.lock() {
            let _ = std::fs::remove_dir_all(folder.join("tokens").join(uid));
        }
    }

    /// How many objects are followed.
    pub fn len(&self) -> usize {
        self.0.watched.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn seen(&self, is_secret: bool, namespace: &str, name: &str) -> Option<Option<Held>> {
        let reference = Reference { is_secret, namespace: namespace.into(), name: name.into() };
        self.0.watched.lock().get(&reference)?.seen.clone()
    }
}

fn drop_unused(watched: &mut HashMap<Reference, Watched>) -> Vec<Reference> {
    let unused: Vec<Reference> =
        watched.iter().filter(|(_, entry)| entry.users.is_empty()).map(|(r, _)| r.clone()).collect();
    watched.retain(|_, entry| !entry.users.is_empty());
    unused
}

impl Reference {
    fn file(&self) -> PathBuf {
        let kind = if self.is_secret { "secrets" } else { "configmaps" };
        PathBuf::from(kind).join(format!("{}_{}.json", self.namespace, self.name))
    }
}

/// All ConfigMaps and Secrets that a pod's spec names.
fn references(pod: &Pod) -> BTreeSet<Reference> {
    let namespace = pod.namespace().unwrap_or_default();
    let mut found = BTreeSet::new();
    let mut add = |is_secret: bool, name: &str| {
        if !name.is_empty() {
            found.insert(Reference { is_secret, namespace: namespace.clone(), name: name.to_string() });
        }
    };
    let Some(spec) = &pod.spec else { return found };
    for secret in spec.image_pull_secrets.iter().flatten() {
        add(true, &secret.name);
    }
    for volume in spec.volumes.iter().flatten() {
        if let Some(source) = &volume.config_map {
            add(false, &source.name);
        }
        if let Some(source) = &volume.secret {
            add(true, source.secret_name.as_deref().unwrap_or_default());
        }
        for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            if let Some(source) = &source.config_map {
                add(false, &source.name);
            }
            if let Some(source) = &source.secret {
                add(true, &source.name);
            }
        }
    }
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let envs = containers.map(|c| (&c.env, &c.env_from));
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| (&c.env, &c.env_from));
    for (env, env_from) in envs.chain(ephemeral) {
        for source in env_from.iter().flatten() {
            source.config_map_ref.iter().for_each(|r| add(false, &r.name));
            source.secret_ref.iter().for_each(|r| add(true, &r.name));
        }
        for source in env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
            source.config_map_key_ref.iter().for_each(|r| add(false, &r.name));
            source.secret_key_ref.iter().for_each(|r| add(true, &r.name));
        }
    }
    found
}

impl Inner {
    fn remember(&self, file: &std::path::Path, content: &[u8]) {
        let Some(folder) = self.last_known.lock().clone() else { return };
        let path = folder.join(file);
        if std::fs::read(&path).is_ok_and(|there| there == content) {
            return;
        }
        let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        if let Err(error) = made.and_then(|()| sampan_world::files::write_atomic(&path, content, 0o600)) {
            tracing::warn!(%error, "keeping what a pod uses");
        }
    }

    fn recall(&self, file: &std::path::Path) -> Option<Vec<u8>> {
        let folder = self.last_known.lock().clone()?;
        std::fs::read(folder.join(file)).ok()
    }

    fn forget(&self, references: Vec<Reference>) {
        let Some(folder) = self.last_known.lock().clone() else { return };
        for reference in references {
            let _ = std::fs::remove_file(folder.join(reference.file()));
        }
    }

    /// What the server says, else (where it cannot be reached) what it said last.
    fn settle<K>(&self, reference: &Reference, answer: Result<K, kube::Error>) -> Result<Arc<K>, FetchError>
    where
        K: for<'a> k8s_openapi::serde::Deserialize<'a>,
    {
        let kind = if reference.is_secret { "secret" } else { "configmap" };
        match answer {
            Ok(object) => Ok(Arc::new(object)),
            Err(error) if !matches!(error, kube::Error::Api(_)) => {
                let known =
                    self.recall(&reference.file()).and_then(|bytes| serde_json::from_slice(&bytes).ok());
                known.map(Arc::new).ok_or_else(|| failed(kind, &reference.namespace, &reference.name, error))
            }
            Err(error) => Err(failed(kind, &reference.namespace, &reference.name, error)),
        }
    }

    fn changed(&self, reference: &Reference, now: Option<Held>) {
        let content = match &now {
            Some(Held::ConfigMap(object)) => serde_json::to_vec(&**object).ok(),
            Some(Held::Secret(object)) => serde_json::to_vec(&**object).ok(),
            None => None,
        };
        match content {
            Some(content) => self.remember(&reference.file(), &content),
            None => self.forget(vec![reference.clone()]),
        }
        let users = {
            let mut watched = self.watched.lock();
            let Some(entry) = watched.get_mut(reference) else { return };
            entry.seen = Some(now);
            entry.users.clone()
        };
        let handler = self.on_change.lock().clone();
        if let Some(handler) = handler {
            users.iter().for_each(|uid| handler(uid));
        }
    }
}

/// The server hears of a pod a moment after this node does, and forbids until then what the pod needs: asks again.
async fn patiently<T, F>(mut ask: impl FnMut() -> F) -> Result<T, kube::Error>
where
    F: Future<Output = Result<T, kube::Error>>,
{
    for wait_ms in FORBIDDEN_WAITS_MS {
        match ask().await {
            Err(kube::Error::Api(status)) if status.code == 403 => {
                tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            }
            answer => return answer,
        }
    }
    ask().await
}

fn failed(kind: &'static str, namespace: &str, name: &str, error: kube::Error) -> FetchError {
    match error {
        kube::Error::Api(status) if status.code == 404 => {
            FetchError::NotFound { kind, name: name.to_string() }
        }
        error => FetchError::Failed { kind, key: format!("{namespace}/{name}"), message: error.to_string() },
    }
}

#[async_trait]
impl PodObjects for ObjectWatches {
    async fn config_map(&self, namespace: &str, name: &str) -> Result<Arc<ConfigMap>, FetchError> {
        if let Some(Some(Held::ConfigMap(object))) = self.seen(false, namespace, name) {
            return Ok(object);
        }
        let api: Api<ConfigMap> = Api::namespaced(self.0.client.clone(), namespace);
        let reference = Reference { is_secret: false, namespace: namespace.into(), name: name.into() };
        self.0.settle(&reference, patiently(|| api.get(name)).await)
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Arc<Secret>, FetchError> {
        if let Some(Some(Held::Secret(object))) = self.seen(true, namespace, name) {
            return Ok(object);
        }
        let api: Api<Secret> = Api::namespaced(self.0.client.clone(), namespace);
        let reference = Reference { is_secret: true, namespace: namespace.into(), name: name.into() };
        self.0.settle(&reference, patiently(|| api.get(name)).await)
    }

    async fn token(
        &self,
        pod: &Pod,
        audience: Option<&str>,
        expiration_seconds: i64,
    ) -> Result<Token, FetchError> {
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let uid = pod.uid().unwrap_or_default();
        let key = (uid.clone(), audience.unwrap_or_default().to_string(), expiration_seconds);
        if let Some(cached) = self.0.tokens.lock().get(&key) {
            let left = cached.refresh_at.duration_since(clock::now());
            if let Ok(refresh_after) = Duration::try_from(left) {
                return Ok(Token { token: cached.token.clone(), refresh_after });
            }
        }
        let account = pod.spec.as_ref().and_then(|s| s.service_account_name.as_deref()).unwrap_or("default");
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(audience.filter(|a| !a.is_empty()).map(str::to_string).into_iter().collect()),
                expiration_seconds: Some(expiration_seconds),
                bound_object_ref: Some(BoundObjectReference {
                    kind: Some("Pod".to_string()),
                    api_version: Some("v1".to_string()),
                    name: Some(name),
                    uid: Some(uid),
                }),
            }),
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.0.client.clone(), &namespace);
        let file =
            PathBuf::from("tokens").join(&key.0).join(format!("{}_{}", key.1.replace('/', "_"), key.2));
        let parameters = PostParams::default();
        let answer = match patiently(|| api.create_token_request(account, &parameters, &request)).await {
            Ok(answer) => answer,
            Err(error) => {
                let known = match &error {
                    kube::Error::Api(_) => None,
                    _ => self.0.recall(&file).and_then(|bytes| String::from_utf8(bytes).ok()),
                };
                // asked for again soon: it may be too old already
                let refresh_after = Duration::from_secs(60);
                return known
                    .map(|token| Token { token, refresh_after })
                    .ok_or_else(|| failed("token", &namespace, account, error));
            }
        };
        let status = answer.status.unwrap_or_default();
        let token = status.token.unwrap_or_default();
        // upstream asks again when 80 % of the time is over, at the latest after a day
        let lifetime =
            status.expiration_timestamp.map(|t| t.0.duration_since(clock::now()).as_secs()).unwrap_or(0);
        let seconds = u64::try_from(lifetime).unwrap_or(0).saturating_mul(4) / 5;
        let refresh_after = Duration::from_secs(seconds.clamp(10, 86_400));
        let refresh_at = clock::now().saturating_add(refresh_after).unwrap_or(clock::now());
        self.0.remember(&file, token.as_bytes());
        self.0.tokens.lock().insert(key, CachedToken { token: token.clone(), refresh_at });
        Ok(Token { token, refresh_after })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_last_known_counts_where_the_server_is_away() {
        let dir = tempfile::tempdir().unwrap();
        let service = tower::service_fn(|_: http::Request<kube::client::Body>| async {
            Err::<http::Response<kube::client::Body>, _>(std::io::Error::other("away"))
        });
        let watches = ObjectWatches::new(Client::new(service, "default")).with_last_known(dir.path().into());
        assert!(matches!(watches.config_map("ns", "a").await, Err(FetchError::Failed { .. })));
        let object: ConfigMap = serde_json::from_value(serde_json::json!({"data": {"k": "v"}})).unwrap();
        let reference = Reference { is_secret: false, namespace: "ns".into(), name: "a".into() };
        watches.0.changed(&reference, Some(Held::ConfigMap(Arc::new(object))));
        assert_eq!(watches.config_map("ns", "a").await.unwrap().data.as_ref().unwrap()["k"], "v");
        watches.0.changed(&reference, None);
        assert!(watches.config_map("ns", "a").await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_forbidden_for_a_moment_is_asked_for_again() {
        let asked = Arc::new(Mutex::new(0));
        let counted = asked.clone();
        let service = tower::service_fn(move |_: http::Request<kube::client::Body>| {
            let mut asked = counted.lock();
            *asked += 1;
            let (code, body) = match *asked {
                1 | 2 => (403, serde_json::json!({"kind": "Status", "status": "Failure", "code": 403})),
                _ => (200, serde_json::json!({"metadata": {"name": "a"}, "data": {"k": "v"}})),
            };
            let body = kube::client::Body::from(body.to_string().into_bytes());
            async move { Ok::<_, std::io::Error>(http::Response::builder().status(code).body(body).unwrap()) }
        });
        let watches = ObjectWatches::new(Client::new(service, "default"));
        assert!(watches.config_map("ns", "a").await.is_ok());
        assert_eq!(*asked.lock(), 3);
    }

    #[test]
    fn finds_every_reference() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {
                "imagePullSecrets": [{"name": "pull"}],
                "volumes": [{"name": "a", "configMap": {"name": "c1"}}, {"name": "b", "secret": {"secretName": "s1"}},
                    {"name": "p", "projected": {"sources": [{"configMap": {"name": "c2"}}, {"secret": {"name": "s2"}}]}}],
                "containers": [{"name": "c", "envFrom": [{"configMapRef": {"name": "c3"}}],
                    "env": [{"name": "e", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "k"}}}]}]
            }
        }))
        .unwrap();
        let names: Vec<String> = references(&pod).into_iter().map(|r| r.name).collect();
        assert_eq!(names, ["c1", "c2", "c3", "pull", "s1", "s2", "s3"]);
    }
}
