//! The verbs through the router, as a caller in memory sees them, over a store in a temporary folder.
#![allow(clippy::unwrap_used)]
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::BodyExt;
use sampan_apiserver::{ApiServer, Body, Config, body, handler, storage};
use sampan_client::Identity;
use sampan_store::{Options, Store};
use serde_json::{Value, json};

struct World {
    api: ApiServer,
    _folder: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = Options::new(folder.path().join("store.db")).deferred(storage::DEFERRED_PREFIXES);
        let api = ApiServer::new(Config::new(Store::open(options).unwrap())).await.unwrap();
        api.bootstrap().await.unwrap();
        Self { api, _folder: folder }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        accept: &str,
        body: Bytes,
    ) -> http::Response<Body> {
        let mut request = Request::builder().method(method).uri(path).header("user-agent", "test/1");
        if !kind.is_empty() {
            request = request.header("content-type", kind);
        }
        if !accept.is_empty() {
            request = request.header("accept", accept);
        }
        let mut request = request.body(body::full(body)).unwrap();
        request.extensions_mut().insert(Identity::loopback());
        handler::handle(self.api.server().clone(), request).await
    }

    async fn call(&self, method: Method, path: &str, kind: &str, body: &Value) -> (u16, Value) {
        let bytes = if body.is_null() { Bytes::new() } else { body.to_string().into() };
        let response = self.send(method, path, kind, "", bytes).await;
        let code = response.status().as_u16();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (
            code,
            serde_json::from_slice(&bytes).unwrap_or(Value::String(String::from_utf8_lossy(&bytes).into())),
        )
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.call(Method::GET, path, "", &Value::Null).await
    }
    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.call(Method::POST, path, "application/json", &body).await
    }
    async fn put(&self, path: &str, body: Value) -> (u16, Value) {
        self.call(Method::PUT, path, "application/json", &body).await
    }
    async fn patch(&self, path: &str, kind: &str, body: Value) -> (u16, Value) {
        self.call(Method::PATCH, path, kind, &body).await
    }
    async fn delete(&self, path: &str, body: Value) -> (u16, Value) {
        self.call(Method::DELETE, path, "application/json", &body).await
    }
}

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"app": name}},
        "data": {"key": "value"}})
}

/// The next events of a watch's body.
async fn events(body: &mut Body, count: usize) -> Vec<Value> {
    let mut found = Vec::new();
    while found.len() < count {
        let frame =
            tokio::time::timeout(Duration::from_secs(5), body.frame()).await.unwrap().unwrap().unwrap();
        let data = frame.into_data().unwrap();
        found.extend(
            data.split(|b| *b == b'\n').filter(|l| !l.is_empty()).map(|l| serde_json::from_slice(l).unwrap()),
        );
    }
    found
}

#[tokio::test]
async fn create_get_update_delete() {
    let world = World::new().await;
    let (code, made) = world.post(MAPS, map("a")).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(made["kind"], "ConfigMap");
    assert_eq!(made["metadata"]["namespace"], "default");
    assert_eq!(made["metadata"]["managedFields"][0]["manager"], "test");
    assert_eq!(world.get(&format!("{MAPS}/a")).await, (200, made.clone()));

    let (code, again) = world.post(MAPS, map("a")).await;
    assert_eq!((code, &again["reason"]), (409, &json!("AlreadyExists")));
    assert_eq!(again["message"], "configmaps \"a\" already exists");

    let mut changed = made.clone();
    changed["data"]["key"] = "other".into();
    let (code, updated) = world.put(&format!("{MAPS}/a"), changed.clone()).await;
    assert_eq!((code, &updated["data"]["key"]), (200, &json!("other")));
    let (code, stale) = world.put(&format!("{MAPS}/a"), changed).await;
    assert_eq!((code, &stale["reason"]), (409, &json!("Conflict")));
    // An update that changes nothing writes nothing.
    let (_, same) = world.put(&format!("{MAPS}/a"), updated.clone()).await;
    assert_eq!(same["metadata"]["resourceVersion"], updated["metadata"]["resourceVersion"]);

    let (code, generated) = world.post(MAPS, json!({"metadata": {"generateName": "g-"}})).await;
    assert_eq!(code, 201);
    assert_eq!(generated["metadata"]["name"].as_str().unwrap().len(), 7);

    let (code, wrong) = world.delete(&format!("{MAPS}/a"), json!({"preconditions": {"uid": "x"}})).await;
    assert_eq!((code, &wrong["reason"]), (409, &json!("Conflict")));
    let (code, gone) = world.delete(&format!("{MAPS}/a"), Value::Null).await;
    assert_eq!((code, &gone["status"]), (200, &json!("Success")));
    let (code, missing) = world.get(&format!("{MAPS}/a")).await;
    assert_eq!((code, &missing["message"]), (404, &json!("configmaps \"a\" not found")));
}

#[tokio::test]
async fn bad_input_is_refused_in_upstreams_words() {
    let world = World::new().await;
    let strict = format!("{MAPS}?fieldValidation=Strict");
    let mut odd = map("odd");
    odd["nope"] = 1.into();
    let (code, status) = world.post(&strict, odd.clone()).await;
    assert_eq!(code, 400);
    assert!(
        status["message"].as_str().unwrap().contains("strict decoding error: unknown field \"nope\""),
        "{status}"
    );
    let response = world.send(Method::POST, MAPS, "application/json", "", odd.to_string().into()).await;
    assert_eq!(response.status(), 201);
    assert_eq!(response.headers()["warning"], "299 - \"unknown field \\\"nope\\\"\"");

    let cases = [
        (json!({"metadata": {"name": "Not Valid"}}), 422, "Invalid"),
        (json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "x"}}), 400, "BadRequest"),
        (json!({"metadata": {"name": "x", "namespace": "other"}}), 400, "BadRequest"),
        (json!({"metadata": {"name": "x"}, "data": 5}), 400, "BadRequest"),
        (json!([1]), 400, "BadRequest"),
    ];
    for (body, code, reason) in cases {
        let (got, status) = world.post(MAPS, body.clone()).await;
        assert_eq!((got, &status["reason"]), (code, &json!(reason)), "{body}: {status}");
    }
    let big = Bytes::from(vec![b' '; 4 << 20]);
    let response = world.send(Method::POST, MAPS, "application/json", "", big).await;
    assert_eq!(response.status(), 413);
    let response = world.send(Method::POST, MAPS, "application/cbor", "", Bytes::from("{}")).await;
    assert_eq!(response.status(), 415);
    assert_eq!(world.get("/api/v1/namespaces/default/nothings").await.0, 404);
    assert_eq!(world.get(&format!("{MAPS}?fieldSelector=spec.x%3D1")).await.0, 400);
    let (code, _) = world.call(Method::PATCH, MAPS, "", &Value::Null).await;
    assert_eq!(code, 405);
}

#[tokio::test]
async fn lists_pages_and_selectors() {
    let world = World::new().await;
    for name in ["a", "b", "c", "d", "e"] {
        assert_eq!(world.post(MAPS, map(name)).await.0, 201);
    }
    let (_, all) = world.get(MAPS).await;
    assert_eq!(all["kind"], "ConfigMapList");
    assert_eq!(all["items"].as_array().unwrap().len(), 5);
    assert!(all["items"][0].get("kind").is_none());
    let (_, selected) = world.get(&format!("{MAPS}?labelSelector=app+in+(a,b)")).await;
    assert_eq!(selected["items"].as_array().unwrap().len(), 2);
    let (_, named) = world.get(&format!("{MAPS}?fieldSelector=metadata.name%3Dc")).await;
    assert_eq!(named["items"][0]["metadata"]["name"], "c");

    let (_, first) = world.get(&format!("{MAPS}?limit=2")).await;
    assert_eq!(first["metadata"]["remainingItemCount"], 3);
    // What comes in between isn't in later pages.
    assert_eq!(world.post(MAPS, map("bb")).await.0, 201);
    assert_eq!(world.delete(&format!("{MAPS}/d"), Value::Null).await.0, 200);
    let token = first["metadata"]["continue"].as_str().unwrap();
    let (_, second) = world.get(&format!("{MAPS}?limit=10&continue={token}")).await;
    let names: Vec<&str> =
        second["items"].as_array().unwrap().iter().map(|i| i["metadata"]["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["c", "d", "e"]);
    assert_eq!(second["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    // A page of a state that is compacted away says how to go on.
    let server = world.api.server();
    server.config.store.compact(server.config.store.revision()).await.unwrap();
    let (code, expired) = world.get(&format!("{MAPS}?limit=10&continue={token}")).await;
    assert_eq!((code, &expired["reason"]), (410, &json!("Expired")));
    let token = expired["metadata"]["continue"].as_str().unwrap();
    assert_eq!(world.get(&format!("{MAPS}?limit=10&continue={token}")).await.0, 200);

    let future = server.config.store.revision() + 1000;
    let (code, status) = world.get(&format!("{MAPS}?resourceVersion={future}")).await;
    assert_eq!((code, &status["details"]["causes"][0]["reason"]), (504, &json!("ResourceVersionTooLarge")));
    let table = "application/json;as=Table;v=v1;g=meta.k8s.io";
    let response = world.send(Method::GET, MAPS, "", table, Bytes::new()).await;
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let table: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!((&table["kind"], table["rows"].as_array().unwrap().len()), (&json!("Table"), 5));
    assert_eq!(world.delete(&format!("{MAPS}?labelSelector=app"), Value::Null).await.0, 200);
    assert_eq!(world.get(MAPS).await.1["items"], json!([]));
}

#[tokio::test]
async fn watches_see_transitions_bookmarks_and_expiry() {
    let world = World::new().await;
    world.post(MAPS, map("a")).await;
    let initial = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let watch = format!("{MAPS}?watch=1&labelSelector=app%3Da&{initial}");
    let mut body = world.send(Method::GET, &watch, "", "", Bytes::new()).await.into_body();
    let first = events(&mut body, 2).await;
    assert_eq!((&first[0]["type"], &first[1]["type"]), (&json!("ADDED"), &json!("BOOKMARK")));
    assert_eq!(first[1]["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    let merge = "application/merge-patch+json";
    world.patch(&format!("{MAPS}/a"), merge, json!({"data": {"key": "x"}})).await;
    world.patch(&format!("{MAPS}/a"), merge, json!({"metadata": {"labels": {"app": "z"}}})).await;
    world.post(MAPS, map("b")).await;
    world.patch(&format!("{MAPS}/a"), merge, json!({"metadata": {"labels": {"app": "a"}}})).await;
    let (_, gone) = world.delete(&format!("{MAPS}/a"), Value::Null).await;
    assert_eq!(gone["status"], "Success");
    let seen = events(&mut body, 4).await;
    let types: Vec<&str> = seen.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["MODIFIED", "DELETED", "ADDED", "DELETED"]);
    // Each event carries its own revision, a deletion too.
    let versions: Vec<u64> = seen
        .iter()
        .map(|event| event["object"]["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap())
        .collect();
    assert!(versions.is_sorted() && versions[3] > versions[2], "{versions:?}");

    let mut body = world
        .send(Method::GET, &format!("{MAPS}?watch=1&resourceVersion=1"), "", "", Bytes::new())
        .await
        .into_body();
    let error = events(&mut body, 1).await;
    assert_eq!((&error[0]["type"], &error[0]["object"]["code"]), (&json!("ERROR"), &json!(410)));
}

#[tokio::test]
async fn patches() {
    let world = World::new().await;
    let path = format!("{MAPS}/a");
    world.post(MAPS, map("a")).await;
    let (code, json_patched) = world
        .patch(
            &path,
            "application/json-patch+json",
            json!([{"op": "add", "path": "/data/two", "value": "2"}]),
        )
        .await;
    assert_eq!((code, &json_patched["data"]["two"]), (200, &json!("2")));
    let (code, strategic) =
        world.patch(&path, "application/strategic-merge-patch+json", json!({"data": {"two": null}})).await;
    assert_eq!((code, strategic["data"].get("two")), (200, None));
    let config =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"key": "mine"}});
    let apply = "application/apply-patch+yaml";
    let (code, conflict) = world.patch(&format!("{path}?fieldManager=me"), apply, config.clone()).await;
    assert_eq!((code, &conflict["details"]["causes"][0]["reason"]), (409, &json!("FieldManagerConflict")));
    let (code, forced) =
        world.patch(&format!("{path}?fieldManager=me&force=true"), apply, config.clone()).await;
    assert_eq!((code, &forced["data"]["key"]), (200, &json!("mine")));
    let (code, _) = world.patch(&path, apply, config).await;
    assert_eq!(code, 422);
    let new = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "n"}, "data": {"k": "v"}});
    let (code, made) = world.patch(&format!("{MAPS}/n?fieldManager=me"), apply, new).await;
    assert_eq!((code, &made["metadata"]["managedFields"][0]["operation"]), (201, &json!("Apply")));
    let (code, _) = world.patch(&path, "text/plain", json!({})).await;
    assert_eq!(code, 415);
    let (code, dry) = world
        .patch(&format!("{path}?dryRun=All"), "application/merge-patch+json", json!({"data": {"d": "r"}}))
        .await;
    assert_eq!((code, &dry["data"]["d"]), (200, &json!("r")));
    assert_eq!(world.get(&path).await.1["data"].get("d"), None);
}

#[tokio::test]
async fn finalizers_grace_and_namespaces() {
    let world = World::new().await;
    let api = "/apis/storage.k8s.io/v1/storageclasses";
    let class = json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "c"},
        "provisioner": "example.com/p"});
    assert_eq!(world.post(api, class).await.0, 201);
    let options = json!({"apiVersion": "storage.k8s.io/v1", "kind": "DeleteOptions"});
    assert_eq!(world.delete(&format!("{api}/c"), options).await.0, 200, "options are of any group");
    let mut held = map("held");
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    world.post(MAPS, held).await;
    let (code, marked) = world.delete(&format!("{MAPS}/held"), Value::Null).await;
    assert_eq!(code, 200);
    assert!(marked["metadata"]["deletionTimestamp"].is_string(), "{marked}");
    let merge = "application/merge-patch+json";
    let (code, _) =
        world.patch(&format!("{MAPS}/held"), merge, json!({"metadata": {"finalizers": null}})).await;
    assert_eq!(code, 200);
    assert_eq!(world.get(&format!("{MAPS}/held")).await.0, 404);

    let (code, foreground) = {
        world.post(MAPS, map("fore")).await;
        world.delete(&format!("{MAPS}/fore"), json!({"propagationPolicy": "Foreground"})).await
    };
    assert_eq!((code, &foreground["metadata"]["finalizers"]), (200, &json!(["foregroundDeletion"])));
}

#[tokio::test]
async fn services_get_addresses() {
    let world = World::new().await;
    let services = "/api/v1/namespaces/default/services";
    let (_, own) = world.get(&format!("{services}/kubernetes")).await;
    assert_eq!(own["spec"]["clusterIP"], "10.43.0.1");
    let service = |name: &str, kind: &str| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"type": kind, "ports": [{"name": "a", "port": 80, "protocol": "TCP"}]}})
    };
    let (code, made) = world.post(services, service("s", "NodePort")).await;
    assert_eq!(code, 201, "{made}");
    assert!(made["spec"]["clusterIP"].as_str().unwrap().starts_with("10.43."));
    let port = made["spec"]["ports"][0]["nodePort"].as_u64().unwrap();
    assert!((30000..=32767).contains(&port));
    let mut same = service("t", "ClusterIP");
    same["spec"]["clusterIP"] = made["spec"]["clusterIP"].clone();
    let (code, taken) = world.post(services, same.clone()).await;
    assert_eq!(code, 422);
    assert!(taken["message"].as_str().unwrap().contains("provided IP is already allocated"), "{taken}");
    assert_eq!(world.delete(&format!("{services}/s"), Value::Null).await.0, 200);
    assert_eq!(world.post(services, same).await.0, 201);
}

#[tokio::test]
async fn events_are_one_thing_in_two_versions() {
    let world = World::new().await;
    let event = json!({"metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "p", "namespace": "default"},
        "message": "hello", "reason": "Because", "type": "Normal"});
    let (code, made) = world.post("/api/v1/namespaces/default/events", event).await;
    assert_eq!(code, 201, "{made}");
    let (_, other) = world.get("/apis/events.k8s.io/v1/namespaces/default/events/e").await;
    assert_eq!((&other["note"], &other["regarding"]["name"]), (&json!("hello"), &json!("p")));
    assert_eq!(other["apiVersion"], "events.k8s.io/v1");
}

#[tokio::test]
async fn discovery_health_and_version() {
    let world = World::new().await;
    let (_, core) = world.get("/api/v1").await;
    let names: Vec<&str> =
        core["resources"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"pods") && names.contains(&"pods/log"));
    let (_, groups) = world.get("/apis").await;
    assert!(groups["groups"].as_array().unwrap().iter().any(|group| group["name"] == "apps"));
    assert_eq!(world.get("/version").await.1["minor"], "36");
    assert_eq!(world.get("/readyz").await, (200, json!("ok")));
    assert_eq!(world.get("/apis/none.example.com/v1").await.0, 404);
    let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let response = world.send(Method::GET, "/apis", "", accept, Bytes::new()).await;
    assert_eq!(response.headers()["content-type"], accept);
}

#[tokio::test]
async fn protobuf_goes_both_ways() {
    let world = World::new().await;
    let proto = "application/vnd.kubernetes.protobuf";
    world.post(MAPS, map("a")).await;
    let response = world.send(Method::GET, &format!("{MAPS}/a"), "", proto, Bytes::new()).await;
    assert_eq!(response.headers()["content-type"], proto);
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    assert!(bytes.starts_with(b"k8s\0"));
    assert_eq!(world.delete(&format!("{MAPS}/a"), Value::Null).await.0, 200);
    let mut value = sampan_schema::proto::decode(&bytes, None).unwrap();
    value["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    let ty = sampan_schema::by_gvk("", "v1", "ConfigMap").unwrap();
    let body = sampan_schema::proto::encode(ty, &value).unwrap();
    let response = world.send(Method::POST, MAPS, proto, "", body.into()).await;
    assert_eq!(response.status(), 201);
    assert_eq!(world.get(&format!("{MAPS}/a")).await.1["data"]["key"], "value");
}

#[tokio::test]
async fn a_kube_client_works_in_memory() {
    let world = World::new().await;
    let client = world.api.client(Identity::loopback(), "memory");
    let nodes: kube::Api<k8s_openapi::api::core::v1::Namespace> = kube::Api::all(client);
    let list = nodes.list(&kube::api::ListParams::default()).await.unwrap();
    assert_eq!(list.items.len(), 4);
}

/// Allows all but acting with another's uid.
struct NoUids;

#[async_trait::async_trait]
impl sampan_apiserver::Authorizer for NoUids {
    async fn authorize(
        &self,
        asked: &sampan_apiserver::access::Attributes<'_>,
    ) -> sampan_apiserver::access::Decision {
        match asked.resource {
            "uids" => sampan_apiserver::access::Decision::Deny("no".to_string()),
            _ => sampan_apiserver::access::Decision::Allow,
        }
    }
}

#[tokio::test]
async fn everything_impersonated_is_authorized() {
    let world = World::new().await;
    world.api.install_authorization(std::sync::Arc::new(NoUids));
    for (uid, want) in [("", 200), ("7", 403)] {
        let mut request = Request::builder()
            .uri("/api/v1/namespaces/default/configmaps")
            .header("impersonate-user", "jane");
        if !uid.is_empty() {
            request = request.header("impersonate-uid", uid);
        }
        let mut request = request.body(body::empty()).unwrap();
        request.extensions_mut().insert(Identity::new("joe", &[]));
        let response = handler::handle(world.api.server().clone(), request).await;
        assert_eq!(response.status(), want, "{uid:?}");
    }
}
