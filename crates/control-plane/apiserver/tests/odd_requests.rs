//! Requests that no well-behaved client sends, with the code and the words that upstream 1.36.2 answers them with.
#![allow(clippy::unwrap_used)]
use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use sampan_apiserver::{ApiServer, Config, body, handler, storage};
use sampan_client::Identity;
use sampan_store::{Options, Store};
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const JSON: &str = "application/json";
const YAML: &str = "application/yaml";
const MERGE: &str = "application/merge-patch+json";
const STRATEGIC: &str = "application/strategic-merge-patch+json";
const JSON_PATCH: &str = "application/json-patch+json";

/// Method, path below the configmaps (or a whole one), content type, body, code, what the message has.
type Case<'a> = (&'a str, &'a str, &'a str, &'a [u8], u16, &'a str);

#[rustfmt::skip]
const CASES: &[Case<'_>] = &[
    ("POST", "", JSON, b"[]", 400, "json: cannot unmarshal array into Go value of type struct { APIVersion string"),
    ("POST", "", JSON, b"null", 422, "metadata.name: Required value: name or generateName is required"),
    ("POST", "", JSON, b"{\"kind\":3}", 400, "cannot unmarshal number into Go struct field .kind of type string ({\"kind\":3})"),
    ("POST", "", JSON, b"{\"apiVersion\":\"v2\"}", 400,
        "ConfigMap in version \"v2\" cannot be handled as a ConfigMap: no kind \"ConfigMap\" is registered for version \"v2\""),
    ("POST", "", JSON, b"{\"apiVersion\":\"v1\",\"kind\":\"Pod\"}", 400, "converting (v1.Pod) to (core.ConfigMap): unknown conversion"),
    ("POST", "", JSON, b"{\"apiVersion\":\"a/b/c\"}", 400, "unexpected GroupVersion string: a/b/c"),
    ("POST", "?dryRun=All", JSON, b"{\"metadata\":{\"name\":\"s\"},\"data\":{\"a\":\"\\ud800\"}}", 201, ""),
    ("POST", "?fieldValidation=Strict", YAML, b"metadata:\n  name: u\n  name: v\nzip: 1\n", 400,
        "strict decoding error: yaml: unmarshal errors:\n  line 3: key \"name\" already set in map, unknown field \"zip\""),
    ("POST", "?dryRun=", JSON, b"{}", 422, "dryRun: Unsupported value: [\"\"]"),
    ("POST", "?timeout=foo", JSON, b"{}", 400, "invalid timeout specified in the request URL - time: invalid duration \"foo\""),
    ("PUT", "/a", JSON, b"{\"metadata\":{\"name\":\"a\",\"resourceVersion\":\"x\"}}", 500, "strconv.ParseUint: parsing \"x\": invalid syntax"),
    ("PUT", "/a", JSON, b"{\"metadata\":{\"name\":\"a\",\"deletionTimestamp\":\"2020-01-01T00:00:00Z\"}}", 422,
        "metadata.deletionTimestamp: Invalid value: \"2020-01-01T00:00:00Z\": field is immutable"),
    ("PUT", "/a", JSON, b"{\"metadata\":{\"name\":\"a\",\"uid\":\"x\"}}", 409, "Key: /registry/configmaps/default/a"),
    ("PATCH", "/a", MERGE, b"{\"metadata\":{\"uid\":\"x\"}}", 422, "metadata.uid: Invalid value: \"x\": field is immutable"),
    ("PATCH", "/a", MERGE, b"{\"kind\":\"Pod\"}", 422, "converting (v1.Pod) to (core.ConfigMap): unknown conversion"),
    ("PATCH", "/a", STRATEGIC, b"{\"kind\":\"Pod\"}", 200, ""),
    ("PATCH", "/a", STRATEGIC, b"null", 200, ""),
    ("PATCH", "/a", JSON_PATCH, b"[{\"op\":\"remove\",\"path\":\"/kind\"}]", 200, ""),
    ("PATCH", "/a?fieldValidation=Strict", JSON_PATCH, b"[{\"op\":\"test\",\"path\":\"/kind\",\"value\":1,\"value\":\"ConfigMap\"}]", 422,
        "json patch duplicate field \"[0].value\""),
    ("PATCH", "/none", MERGE, b"{", 404, "configmaps \"none\" not found"),
    ("PATCH", "/a", JSON, b"{}", 415, "415: Unsupported Media Type"),
    ("DELETE", "/a", JSON, b"{\"preconditions\":{\"uid\":\"x\"}}", 409, "fulfilled on ConfigMap \"a\": the UID in the precondition (x)"),
    ("DELETE", "/a", JSON, b"{\"kind\":\"ConfigMap\",\"apiVersion\":\"v1\"}", 400, "pkg/apis/meta/internalversion/scheme/register.go:27"),
    ("HEAD", "/a", "", b"", 405, ""),
    ("POST", "/a", JSON, b"{}", 405, "the server does not allow this method on the requested resource"),
    ("GET", "?continue=abc", "", b"", 400, "invalid continue token: continue key is not valid: "),
    ("GET", "?resourceVersion=x", "", b"", 400, "invalid resource version: resourceVersion: Invalid value: \"x\""),
    ("GET", "?timeoutSeconds=x", "", b"", 400, "strconv.ParseInt: parsing \"x\": invalid syntax"),
    ("GET", "?labelSelector=a%3D-b", "", b"", 400, "unable to parse requirement: values[0][a]: Invalid value: \"-b\""),
    ("GET", "/api/v1/configmaps/a", "", b"", 404, "the server could not find the requested resource"),
    ("PUT", "/api/v1/configmaps", JSON, b"{}", 405, "the server does not allow this method on the requested resource"),
    ("GET", "/api/v1/bindings", "", b"", 404, "the server could not find the requested resource"),
    ("GET", "/apis/nope/v1/x", "", b"", 404, "404 page not found\n"),
    ("GET", "/apis/apps/v9/x", "", b"", 404, "the server could not find the requested resource"),
    ("GET", "/apis/batch/v1/jobs?fieldSelector=x%3Dy", "", b"", 400, "field label \"x\" not supported for Job"),
    ("GET", "/apis/events.k8s.io/v1/events?fieldSelector=involvedObject.kind%3DPod", "", b"", 400, "field label not supported: involvedObject.kind"),
    ("POST", "/apis/events.k8s.io/v1/namespaces/default/events", JSON,
        b"{\"metadata\":{\"name\":\"e\"},\"regarding\":{\"namespace\":\"default\"},\"deprecatedCount\":1}", 422, "count: Invalid value: \"\": needs to be unset"),
    ("POST", "/api/v1/namespaces/default/events", JSON,
        b"{\"metadata\":{\"name\":\"e\"},\"involvedObject\":{\"namespace\":\"default\"},\"count\":1}", 201, ""),
    ("POST", "/api/v1/namespaces/default/services", JSON,
        b"{\"metadata\":{\"name\":\"s\"},\"spec\":{\"clusterIP\":\"None\",\"clusterIPs\":[\"1.2.3.4\"],\"ports\":[{\"port\":1}]}}", 422,
        "first value must match `clusterIP`"),
    ("PATCH", "/api/v1/namespaces/default/services/kubernetes", MERGE, b"{\"spec\":{\"clusterIP\":\"10.43.9.9\"}}", 422,
        "spec.clusterIPs[0]: Invalid value: [\"10.43.9.9\"]: may not change once set"),
];

async fn send(
    api: &ApiServer,
    method: &str,
    path: &str,
    kind: &str,
    accept: &str,
    bytes: &[u8],
) -> (u16, Value) {
    let mut request = Request::builder().method(method).uri(path).header("user-agent", "test/1");
    for (name, value) in [("content-type", kind), ("accept", accept)] {
        if !value.is_empty() {
            request = request.header(name, value);
        }
    }
    let mut request = request.body(body::full(Bytes::copy_from_slice(bytes))).unwrap();
    request.extensions_mut().insert(Identity::loopback());
    let response = handler::handle(api.server().clone(), request).await;
    let code = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    (code, serde_json::from_slice(&bytes).unwrap_or_else(|_| json!({"message": text})))
}

async fn server(folder: &tempfile::TempDir) -> ApiServer {
    let options = Options::new(folder.path().join("store.db")).deferred(storage::DEFERRED_PREFIXES);
    let api = ApiServer::new(Config::new(Store::open(options).unwrap())).await.unwrap();
    api.bootstrap().await.unwrap();
    api
}

#[tokio::test]
async fn are_answered_as_upstream_does() {
    let folder = tempfile::tempdir().unwrap();
    let api = server(&folder).await;
    let (code, _) =
        send(&api, "POST", MAPS, JSON, "", br#"{"metadata":{"name":"a"},"data":{"k":"v"}}"#).await;
    assert_eq!(code, 201);
    for (method, path, kind, bytes, want, words) in CASES {
        let path = if path.starts_with("/api") { (*path).to_string() } else { format!("{MAPS}{path}") };
        let (code, answer) = send(&api, method, &path, kind, "", bytes).await;
        let message = answer["message"].as_str().unwrap_or_default();
        assert_eq!((code, message.contains(words)), (*want, true), "{method} {path}: {answer}");
    }
}

#[tokio::test]
async fn a_dry_run_makes_no_revision_and_errors_have_no_table() {
    let folder = tempfile::tempdir().unwrap();
    let api = server(&folder).await;
    let dry = format!("{MAPS}?dryRun=All");
    let (code, made) = send(&api, "POST", &dry, JSON, "", br#"{"metadata":{"name":"a"}}"#).await;
    assert_eq!((code, made["metadata"].get("resourceVersion")), (201, None));
    let table = "application/yaml;as=Table;g=meta.k8s.io;v=v1";
    let (code, missed) = send(&api, "GET", &format!("{MAPS}/a"), "", table, b"").await;
    assert_eq!((code, &missed["reason"]), (404, &json!("NotFound")), "errors are JSON then");
    let review = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let table = "application/json;as=Table;g=meta.k8s.io;v=v1";
    let (code, _) = send(&api, "POST", review, JSON, table, b"{}").await;
    assert_eq!(code, 406, "a review is no table");
    let (code, cidr) =
        send(&api, "GET", "/apis/networking.k8s.io/v1/servicecidrs/kubernetes", "", "", b"").await;
    assert_eq!((code, &cidr["status"]["conditions"][0]["type"]), (200, &json!("Ready")));
}

#[tokio::test]
async fn a_signing_request_names_who_made_it() {
    let folder = tempfile::tempdir().unwrap();
    let api = server(&folder).await;
    let path = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    let body = json!({"metadata": {"name": "a"}, "spec": {"request": "eA==", "signerName": "example.com/a",
        "usages": ["client auth"], "username": "forged"}});
    let (code, answer) = send(&api, "POST", path, JSON, "", body.to_string().as_bytes()).await;
    let message = answer["message"].as_str().unwrap_or_default();
    assert_eq!(code, 422, "{answer}");
    assert!(message.contains("PEM block type must be CERTIFICATE REQUEST"), "{message}");
}
