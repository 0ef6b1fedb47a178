//! Bad input and refused callers, each with upstream's status code, reason and message.
//!
//! Upstream counterpart: test/integration/apiserver and test/cmd. The requests are raw: no client tidies them up.
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use sampan_tests::{Answer, Space, Suite, cases, has};
use serde_json::{Value, json};

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];
const YAML: &[(&str, &str)] = &[("content-type", "application/yaml")];
const PROTOBUF: &[(&str, &str)] = &[("content-type", "application/vnd.kubernetes.protobuf")];
const MERGE: &[(&str, &str)] = &[("content-type", "application/merge-patch+json")];
/// The largest body of a write, in bytes.
const BODY_LIMIT_BYTES: usize = 3 * 1024 * 1024;

fn main() -> ExitCode {
    Suite::new("api", "amd64")
        .without_nodes()
        .together(cases![
            malformed_json,
            malformed_yaml,
            malformed_protobuf,
            nested_too_deep,
            content_types,
            unknown_and_duplicate_fields,
            wrong_types,
            names,
            immutable_fields,
            stale_resource_version,
            preconditions,
            body_over_the_limit,
            wrong_token,
            wrong_certificate,
            forbidden_verbs,
            methods_not_allowed,
            missing_and_existing,
            bad_patches,
            bad_parameters,
            chunked_list_and_watch,
            apply_conflicts,
            service_account_token,
        ])
        .run()
}

fn config_map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "b"}})
}

fn malformed_json(s: &Space) -> Result<()> {
    let path = s.path("configmaps");
    for body in [r#"{"apiVersion":"v1","kind":"ConfigMap","#, "{", "", "[]", "\"x\"", "nonsense"] {
        let answer = s.send("POST", &path, JSON, body.as_bytes().to_vec())?;
        answer.is(400, "BadRequest", "").with_context(|| format!("body {body:?}"))?;
    }
    // to Go's decoder this is an object without fields
    let answer = s.send("POST", &path, JSON, b"null".to_vec())?;
    answer.is(422, "Invalid", "name or generateName is required")?;
    let answer = s.send("POST", &path, JSON, br#"{"apiVersion":"v1","kind":"ConfigMap","#.to_vec())?;
    answer.is(400, "BadRequest", "json parse error")?;
    let answer = s.send("POST", &path, JSON, br#"{"apiVersion":"v1","kind":"Secret"}"#.to_vec())?;
    answer.is(400, "BadRequest", "Secret in version \"v1\" cannot be handled as a ConfigMap")?;
    let answer = s.send("POST", &path, JSON, br#"{"apiVersion":"v9","kind":"ConfigMap"}"#.to_vec())?;
    answer.is(400, "BadRequest", "")
}

fn malformed_yaml(s: &Space) -> Result<()> {
    for body in ["apiVersion: v1\nkind: [", "a: b: c", "\t- x", "kind: ConfigMap\n  bad: indent"] {
        let answer = s.send("POST", &s.path("configmaps"), YAML, body.as_bytes().to_vec())?;
        answer.is(400, "BadRequest", "").with_context(|| format!("body {body:?}"))?;
    }
    let good = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: yaml}\ndata: {a: b}\n";
    s.send("POST", &s.path("configmaps"), YAML, good.as_bytes().to_vec())?.ok()?;
    // aliases that grow without bound must not
    let lines: String = (1..30).map(|i| format!("a{i}: &a{i} [*a{0}, *a{0}]\n", i - 1)).collect();
    let bomb = format!("apiVersion: v1\nkind: ConfigMap\na0: &a0 [x, x]\n{lines}");
    let answer = s.send("POST", &s.path("configmaps"), YAML, bomb.into_bytes())?;
    ensure!((400..500).contains(&answer.code), "an alias bomb: {}", answer.code);
    s.wait_until_served()
}

fn malformed_protobuf(s: &Space) -> Result<()> {
    let path = s.path("configmaps");
    let envelope = |rest: &[u8]| [b"k8s\0", rest].concat();
    let bodies = [
        b"no magic".to_vec(),
        envelope(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        envelope(b"\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12\x05\x0a\x7f\x0a\x01x"),
        envelope(&[0xff; 64]),
    ];
    for body in bodies {
        let shown = body.clone();
        let answer = s.send("POST", &path, PROTOBUF, body)?;
        answer.is(400, "BadRequest", "").with_context(|| format!("body {shown:?}"))?;
    }
    // ConfigMap{metadata{name: "proto"}, data{"a": "b"}} in its envelope
    let object = b"\x0a\x07\x0a\x05proto\x12\x06\x0a\x01a\x12\x01b";
    let mut good = b"\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12".to_vec();
    good.push(u8::try_from(object.len())?);
    good.extend_from_slice(object);
    let made = s.send("POST", &path, PROTOBUF, envelope(&good))?.ok()?;
    ensure!(made["data"]["a"] == "b", "decoded from protobuf: {made}");
    let accept = [("accept", "application/vnd.kubernetes.protobuf")];
    let read = s.send("GET", &s.path("configmaps/proto"), &accept, Vec::new())?;
    ensure!(read.body.starts_with(b"k8s\0"), "answered in protobuf");
    Ok(())
}

fn nested_too_deep(s: &Space) -> Result<()> {
    let deep = |open: &str, close: &str| {
        let (open, close) = (open.repeat(100_000), close.repeat(100_000));
        format!(
            r#"{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"deep"}},"data":{open}1{close}}}"#
        )
    };
    for body in [deep("[", "]"), deep(r#"{"a":"#, "}")] {
        let answer = s.send("POST", &s.path("configmaps"), JSON, body.into_bytes())?;
        answer.is(400, "BadRequest", "")?;
    }
    s.post(&s.path("configmaps"), &config_map("shallow"))?.ok()?;
    let patch = format!(r#"{{"data":{}1{}}}"#, r#"{"a":"#.repeat(50_000), "}".repeat(50_000));
    let answer = s.send("PATCH", &s.path("configmaps/shallow"), MERGE, patch.into_bytes())?;
    ensure!((400..500).contains(&answer.code), "a deep patch: {}", answer.code);
    s.wait_until_served()
}

fn content_types(s: &Space) -> Result<()> {
    let body = config_map("x").to_string().into_bytes();
    let path = s.path("configmaps");
    let answer = s.send("POST", &path, &[("content-type", "text/plain")], body.clone())?;
    answer.is(415, "UnsupportedMediaType", "the body of the request was in an unknown format")?;
    let accept = [("accept", "image/png")];
    s.send("GET", &path, &accept, Vec::new())?.is(
        406,
        "NotAcceptable",
        "Available representations: application/json",
    )?;
    let patch = [("content-type", "application/json")];
    s.post(&path, &config_map("x"))?.ok()?;
    let answer = s.send("PATCH", &s.path("configmaps/x"), &patch, b"{}".to_vec())?;
    answer.is(415, "UnsupportedMediaType", "")?;
    // kubectl before 1.27 asks with a name that is no media type, and does not understand it in the answer
    let old = [("accept", "application/com.github.proto-openapi.spec.v2@v1.0+protobuf")];
    let answer = s.send("GET", "/openapi/v2", &old, Vec::new())?;
    let kind = answer.headers.get("content-type").map(|v| v.to_str().unwrap_or_default().to_string());
    ensure!(
        kind.as_deref() == Some("application/com.github.proto-openapi.spec.v2.v1.0+protobuf"),
        "{kind:?}"
    );
    Ok(())
}

fn unknown_and_duplicate_fields(s: &Space) -> Result<()> {
    let body = |name: &str| {
        let text = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"NAME","bogus":1},"data":{"a":"b"},
            "data":{"a":"c"},"extra":true}"#;
        text.replace("NAME", name).into_bytes()
    };
    let send = |name: &str, mode: &str| {
        s.send("POST", &format!("{}?fieldValidation={mode}", s.path("configmaps")), JSON, body(name))
    };
    let strict = send("strict", "Strict")?;
    strict.is(400, "BadRequest", "strict decoding error: ")?;
    for want in [r#"duplicate field "data""#, r#"unknown field "extra""#, r#"unknown field "metadata.bogus""#]
    {
        strict.is(400, "BadRequest", want)?;
    }
    let warnings = |answer: &Answer| -> Vec<String> {
        let all = answer.headers.get_all("warning").into_iter();
        all.map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned()).collect()
    };
    let warn = send("warn", "Warn")?;
    ensure!(warn.code == 201, "{}", warn.code);
    let told = warnings(&warn).join("\n");
    for want in [
        r#"299 - "unknown field \"extra\"""#,
        r#"unknown field \"metadata.bogus\""#,
        r#"duplicate field \"data\""#,
    ] {
        has(&told, want)?;
    }
    ensure!(warn.json()["data"]["a"] == "c", "the last of duplicates wins: {}", warn.json());
    ensure!(warn.json().get("extra").is_none(), "unknown fields are dropped");
    let ignore = send("ignore", "Ignore")?;
    ensure!(ignore.code == 201 && warnings(&ignore).is_empty(), "ignored silently: {:?}", warnings(&ignore));
    send("never", "Sometimes")?.is(422, "Invalid", "fieldValidation")?;
    let applied = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: extra}\nextra: 1\n";
    s.k_with(&["create", "-f", "-"], applied)?.refused("unknown field \"extra\"")
}

fn wrong_types(s: &Space) -> Result<()> {
    let pod =
        |spec: Value| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec});
    let table = [
        ("configmaps", json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": 1}}), "ConfigMap.data"),
        ("configmaps", json!({"apiVersion": "v1", "kind": "ConfigMap", "data": "x"}), "ConfigMap.data"),
        ("configmaps", json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": []}), "metadata"),
        ("pods", pod(json!({"containers": {}})), "containers"),
        ("pods", pod(json!({"terminationGracePeriodSeconds": "soon"})), "terminationGracePeriodSeconds"),
        ("pods", pod(json!({"hostNetwork": "yes"})), "hostNetwork"),
    ];
    for (resource, body, field) in table {
        let answer = s.post(&s.path(resource), &body)?;
        answer.is(400, "BadRequest", "json: cannot unmarshal").with_context(|| body.to_string())?;
        answer.is(400, "BadRequest", field)?;
    }
    let quantity =
        pod(json!({"containers": [{"name": "a", "image": "b", "resources": {"limits": {"cpu": "x"}}}]}));
    s.post(&s.path("pods"), &quantity)?.is(400, "BadRequest", "quantities must match the regular expression")
}

fn names(s: &Space) -> Result<()> {
    let long = "a".repeat(254);
    let answer = s.post(&s.path("configmaps"), &config_map(&long))?;
    answer.is(422, "Invalid", "must be no more than 253")?;
    let cause = &answer.json()["details"]["causes"][0];
    ensure!(cause["field"] == "metadata.name" && cause["reason"] == "FieldValueInvalid", "{cause}");
    s.post(&s.path("configmaps"), &config_map("No_Capitals"))?.is(422, "Invalid", "RFC 1123 subdomain")?;
    s.post(&s.path("configmaps"), &config_map(""))?.is(422, "Invalid", "name or generateName is required")?;
    s.post(&s.path("configmaps"), &config_map("a/b"))?.is(422, "Invalid", "metadata.name")?;
    let mut labelled = config_map("labelled");
    labelled["metadata"]["labels"] = json!({"k": "v".repeat(64), "not a key": "x"});
    let answer = s.post(&s.path("configmaps"), &labelled)?;
    answer.is(422, "Invalid", "must be no more than 63")?;
    answer.is(422, "Invalid", "metadata.labels")?;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n".repeat(64)}});
    s.post("/api/v1/namespaces", &namespace)?.is(422, "Invalid", "must be no more than 63")?;
    let mut key = config_map("key");
    key["data"] = json!({"a b": "c"});
    s.post(&s.path("configmaps"), &key)?.is(422, "Invalid", "data[a b]")?;
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "1st"}, "spec": {"ports": [{"port": 70000}]}});
    let answer = s.post(&s.path("services"), &service)?;
    answer.is(422, "Invalid", "must be between 1 and 65535, inclusive")
}

fn immutable_fields(s: &Space) -> Result<()> {
    let mut fixed = config_map("fixed");
    fixed["immutable"] = json!(true);
    s.post(&s.path("configmaps"), &fixed)?.ok()?;
    let merge = |path: &str, patch: Value| s.send("PATCH", path, MERGE, patch.to_string().into_bytes());
    let answer = merge(&s.path("configmaps/fixed"), json!({"data": {"a": "z"}}))?;
    answer.is(422, "Invalid", "field is immutable when `immutable` is set")?;
    let answer = merge(&s.path("configmaps/fixed"), json!({"immutable": false}))?;
    answer.is(422, "Invalid", "field is immutable when `immutable` is set")?;

    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "type": "Opaque"});
    s.post(&s.path("secrets"), &secret)?.ok()?;
    merge(&s.path("secrets/s"), json!({"type": "other"}))?.is(422, "Invalid", "field is immutable")?;

    let template =
        json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let set = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"},
        "spec": {"replicas": 0, "selector": {"matchLabels": {"a": "b"}}, "template": template}});
    s.post(&s.path("apps/v1/deployments"), &set)?.ok()?;
    let patch = json!({"spec": {"selector": {"matchLabels": {"a": "c"}}, "template": {"metadata": {"labels": {"a": "c"}}}}});
    merge(&s.path("apps/v1/deployments/d"), patch)?.is(422, "Invalid", "field is immutable")?;

    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "svc"}, "spec": {"ports": [{"port": 80}]}});
    let made = s.post(&s.path("services"), &service)?.ok()?;
    ensure!(made["spec"]["clusterIP"].as_str().is_some_and(|ip| ip.starts_with("10.43.")), "{made}");
    let answer = merge(
        &s.path("services/svc"),
        json!({"spec": {"clusterIP": "10.43.9.9", "clusterIPs": ["10.43.9.9"]}}),
    )?;
    answer.is(422, "Invalid", "may not change once set")?;
    let uid = merge(
        &s.path("configmaps/fixed"),
        json!({"metadata": {"uid": "11111111-2222-3333-4444-555555555555"}}),
    )?;
    uid.is(422, "Invalid", "metadata.uid: Invalid value")
}

fn stale_resource_version(s: &Space) -> Result<()> {
    let first = s.post(&s.path("configmaps"), &config_map("c"))?.ok()?;
    let path = s.path("configmaps/c");
    let mut second = first.clone();
    second["data"]["a"] = json!("second");
    s.put(&path, &second)?.ok()?;
    let answer = s.put(&path, &first)?;
    answer.is(
        409,
        "Conflict",
        "Operation cannot be fulfilled on configmaps \"c\": the object has been modified; please apply your changes to \
         the latest version and try again",
    )?;
    ensure!(s.object("configmaps/c")?["data"]["a"] == "second", "the later write stays");
    // what the answer says is in the list, and unchanged writes change nothing
    let now = s.object("configmaps/c")?;
    let again = s.put(&path, &now)?.ok()?;
    ensure!(
        again["metadata"]["resourceVersion"] == now["metadata"]["resourceVersion"],
        "a write that changes nothing"
    );
    let mut bad = now.clone();
    bad["metadata"]["resourceVersion"] = json!("not a number");
    // upstream lets this one through to a plain 500
    s.put(&path, &bad)?.is(500, "", "strconv.ParseUint: parsing \"not a number\": invalid syntax")?;
    // kube-rs sees the same
    let api: Api<ConfigMap> = Api::namespaced(s.client(), &s.name);
    let stale: ConfigMap = serde_json::from_value(first)?;
    let error = s.block_on(api.replace("c", &PostParams::default(), &stale))?;
    match error {
        Err(kube::Error::Api(status)) => ensure!(status.is_conflict(), "{status:?}"),
        other => anyhow::bail!("{other:?}"),
    }
    Ok(())
}

fn preconditions(s: &Space) -> Result<()> {
    let made = s.post(&s.path("configmaps"), &config_map("c"))?.ok()?;
    let delete = |conditions: Value| {
        let body = json!({"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": conditions});
        s.send("DELETE", &s.path("configmaps/c"), JSON, body.to_string().into_bytes())
    };
    delete(json!({"uid": "another"}))?.is(
        409,
        "Conflict",
        "the UID in the precondition (another) does not match the UID in record",
    )?;
    delete(json!({"resourceVersion": "1"}))?.is(
        409,
        "Conflict",
        "the ResourceVersion in the precondition (1) does not match the ResourceVersion in record",
    )?;
    let renamed = config_map("other");
    s.put(&s.path("configmaps/c"), &renamed)?.is(
        400,
        "BadRequest",
        "the name of the object (other) does not match the name on the URL (c)",
    )?;
    let mut elsewhere = config_map("c");
    elsewhere["metadata"]["namespace"] = json!("default");
    s.post(&s.path("configmaps"), &elsewhere)?.is(
        400,
        "BadRequest",
        "the namespace of the provided object does not match",
    )?;
    let answer = delete(json!({"uid": made["metadata"]["uid"]}))?.ok()?;
    ensure!(answer["status"] == "Success", "{answer}");
    Ok(())
}

fn body_over_the_limit(s: &Space) -> Result<()> {
    let mut object = config_map("big");
    object["data"]["a"] = json!("x".repeat(BODY_LIMIT_BYTES));
    let answer = s.post(&s.path("configmaps"), &object)?;
    answer.is(413, "RequestEntityTooLarge", "limit is 3145728")?;
    // what fits the request but not the kind is the kind's own error
    object["data"]["a"] = json!("x".repeat(1024 * 1024 + 1));
    s.post(&s.path("configmaps"), &object)?.is(
        422,
        "Invalid",
        "Too long: may not be more than 1048576 bytes",
    )?;
    s.wait_until_served()
}

fn wrong_token(s: &Space) -> Result<()> {
    let with = |token: &str| {
        let token = token.to_string();
        s.client_as(move |info| {
            *info = kube::config::AuthInfo { token: Some(token.into()), ..Default::default() };
        })
    };
    for token in ["nonsense", "a.b.c", "abcdef.0123456789abcdef", "eyJhbGciOiJub25lIn0.e30."] {
        let answer = s.send_as(&with(token)?, "GET", "/api/v1/nodes", &[], Vec::new())?;
        answer.is(401, "Unauthorized", "Unauthorized").with_context(|| format!("token {token}"))?;
    }
    let nobody = s.client_as(|info| *info = kube::config::AuthInfo::default())?;
    let answer = s.send_as(&nobody, "GET", "/api/v1/nodes", &[], Vec::new())?;
    answer.is(
        403,
        "Forbidden",
        "nodes is forbidden: User \"system:anonymous\" cannot list resource \"nodes\"",
    )?;
    let answer = s.send_as(&nobody, "GET", "/readyz", &[], Vec::new())?;
    ensure!(answer.code == 200, "anybody may ask for the health: {}", answer.code);
    // the secret that nodes join with is no administrator's
    let joiner = with(&s.token()?)?;
    s.send_as(&joiner, "GET", "/api/v1/secrets", &[], Vec::new())?.is(
        403,
        "Forbidden",
        "secrets is forbidden",
    )
}

fn wrong_certificate(s: &Space) -> Result<()> {
    let folder = s.folder().join("other-authority");
    std::fs::create_dir_all(&folder)?;
    let other = sampan_pki::Authority::load_or_create(&folder)?;
    let pair = other.client("admin", &["system:masters"])?;
    let (certificate, key) = (folder.join("client.crt"), folder.join("client.key"));
    std::fs::write(&certificate, &pair.certificate_pem)?;
    std::fs::write(&key, &pair.key_pem)?;
    let client = s.client_as(|info| {
        *info = kube::config::AuthInfo {
            client_certificate: Some(certificate.display().to_string()),
            client_key: Some(key.display().to_string()),
            ..Default::default()
        };
    })?;
    let answer = s.send_as(&client, "GET", "/api/v1/nodes", &[], Vec::new())?;
    answer.is(401, "Unauthorized", "Unauthorized")
}

fn forbidden_verbs(s: &Space) -> Result<()> {
    let as_nobody = |args: &[&str]| s.try_k(&[&["--as=nobody"], args].concat());
    let n = &s.name;
    as_nobody(&["get", "pods"])?.refused(&format!(
        "pods is forbidden: User \"nobody\" cannot list resource \"pods\" in API group \"\" in the namespace \"{n}\""
    ))?;
    as_nobody(&["delete", "configmap", "x"])?.refused("cannot delete resource \"configmaps\"")?;
    s.k(&["create", "role", "reader", "--verb=get,list", "--resource=configmaps"])?;
    s.k(&["create", "rolebinding", "reader", "--role=reader", "--user=nobody"])?;
    sampan_tests::wait_for("the role to count", sampan_tests::seconds(5), || {
        let ran = as_nobody(&["get", "configmaps"])?;
        Ok(if ran.code == 0 { Ok(()) } else { Err(ran.text()) })
    })?;
    as_nobody(&["create", "configmap", "x"])?.refused("cannot create resource \"configmaps\"")?;
    as_nobody(&["create", "role", "all", "--verb=*", "--resource=*"])?.refused("forbidden")?;
    // nobody may give away what they do not have
    s.k(&[
        "create",
        "role",
        "granter",
        "--verb=create,update,bind",
        "--resource=roles.rbac.authorization.k8s.io",
    ])?;
    s.k(&["create", "rolebinding", "granter", "--role=granter", "--user=granter"])?;
    sampan_tests::wait_for("escalation to be refused", sampan_tests::seconds(5), || {
        let ran = s.try_k(&["--as=granter", "create", "role", "all", "--verb=get", "--resource=secrets"])?;
        let refused =
            ran.code != 0 && ran.text().contains("attempting to grant RBAC permissions not currently held");
        Ok(if refused { Ok(()) } else { Err(ran.text()) })
    })?;
    let nobody = s.k(&["auth", "can-i", "delete", "pods", "--as=nobody"]);
    ensure!(nobody.is_err(), "can-i says no by its exit code");
    has(&s.k(&["auth", "can-i", "list", "configmaps", "--as=nobody"])?, "yes")
}

fn methods_not_allowed(s: &Space) -> Result<()> {
    let want = "the server does not allow this method on the requested resource";
    s.post(&s.path("configmaps/x"), &config_map("x"))?.is(405, "MethodNotAllowed", want)?;
    s.send("PUT", &s.path("configmaps"), JSON, b"{}".to_vec())?.is(405, "MethodNotAllowed", want)?;
    s.get(&s.path("nonsense"))?.is(404, "NotFound", "the server could not find the requested resource")?;
    let unknown = s.get("/apis/nonsense.example.com/v1")?;
    ensure!(unknown.code == 404, "{}", unknown.code);
    let unknown = s.get("/nonsense")?;
    ensure!(unknown.code == 404, "{}", unknown.code);
    Ok(())
}

fn missing_and_existing(s: &Space) -> Result<()> {
    s.get(&s.path("configmaps/none"))?.is(404, "NotFound", "configmaps \"none\" not found")?;
    s.post(&s.path("configmaps"), &config_map("one"))?.ok()?;
    s.post(&s.path("configmaps"), &config_map("one"))?.is(
        409,
        "AlreadyExists",
        "configmaps \"one\" already exists",
    )?;
    let answer = s.post("/api/v1/namespaces/none/configmaps", &config_map("x"))?;
    answer.is(404, "NotFound", "namespaces \"none\" not found")?;
    s.send("DELETE", "/api/v1/namespaces/kube-system", &[], Vec::new())?.is(
        403,
        "Forbidden",
        "this namespace may not be deleted",
    )?;
    let mut versioned = config_map("versioned");
    versioned["metadata"]["resourceVersion"] = json!("7");
    let answer = s.post(&s.path("configmaps"), &versioned)?;
    ensure!((400..=500).contains(&answer.code), "{}", answer.code);
    ensure!(
        String::from_utf8_lossy(&answer.body)
            .contains("resourceVersion should not be set on objects to be created")
    );
    Ok(())
}

fn bad_patches(s: &Space) -> Result<()> {
    s.post(&s.path("configmaps"), &config_map("c"))?.ok()?;
    let path = s.path("configmaps/c");
    let patch =
        |kind: &str, body: &str| s.send("PATCH", &path, &[("content-type", kind)], body.as_bytes().to_vec());
    let (json_patch, merge, strategic, apply) = (
        "application/json-patch+json",
        "application/merge-patch+json",
        "application/strategic-merge-patch+json",
        "application/apply-patch+yaml",
    );
    for kind in [json_patch, merge, strategic] {
        patch(kind, "{\"data\":")?.is(400, "BadRequest", "").context(kind)?;
    }
    patch(json_patch, r#"[{"op":"test","path":"/data/a","value":"no"}]"#)?.is(422, "Invalid", "")?;
    patch(json_patch, r#"[{"op":"remove","path":"/data/none"}]"#)?.is(422, "Invalid", "")?;
    patch(json_patch, r#"[{"op":"dance","path":"/data/a"}]"#)?.is(422, "Invalid", "")?;
    patch(merge, r#"{"metadata":{"name":"other"}}"#)?.is(
        400,
        "BadRequest",
        "the name of the object (other)",
    )?;
    patch(merge, r#"{"data":{"a":1}}"#)?.is(422, "Invalid", "json: cannot unmarshal number")?;
    let many =
        (0..10_001).map(|_| r#"{"op":"add","path":"/data/a","value":"x"}"#).collect::<Vec<_>>().join(",");
    let answer = patch(json_patch, &format!("[{many}]"))?;
    answer.is(413, "RequestEntityTooLarge", "The allowed maximum operations in a JSON patch is 10000")?;
    patch(apply, "apiVersion: v1\nkind: ConfigMap\n")?.is(
        422,
        "Invalid",
        "fieldManager: Required value: is required for apply patch",
    )?;
    ensure!(s.object("configmaps/c")?["data"] == json!({"a": "b"}), "none of it changed the object");
    Ok(())
}

fn bad_parameters(s: &Space) -> Result<()> {
    let list = |query: &str| s.get(&format!("{}?{query}", s.path("pods")));
    list("labelSelector=a%3D%3D%3Db")?.is(400, "BadRequest", "unable to parse requirement")?;
    list("fieldSelector=spec.bogus%3Dx")?.is(400, "BadRequest", "field label not supported: spec.bogus")?;
    list("resourceVersion=abc")?.is(400, "BadRequest", "")?;
    list("resourceVersionMatch=Exact")?.is(
        422,
        "Invalid",
        "resourceVersionMatch is forbidden unless resourceVersion is provided",
    )?;
    list("resourceVersion=1&resourceVersionMatch=Sometimes")?.is(422, "Invalid", "resourceVersionMatch")?;
    list("continue=nonsense")?.is(400, "BadRequest", "continue key is not valid")?;
    list("limit=many")?.is(400, "BadRequest", "")?;
    list("resourceVersion=999999999&resourceVersionMatch=NotOlderThan")?.is(
        504,
        "Timeout",
        "Too large resource version",
    )?;
    let answer = s.post(&format!("{}?dryRun=Some", s.path("configmaps")), &config_map("dry"))?;
    answer.is(422, "Invalid", "dryRun")?;
    s.post(&format!("{}?dryRun=All", s.path("configmaps")), &config_map("dry"))?.ok()?;
    s.get(&s.path("configmaps/dry"))?.is(404, "NotFound", "")
}

fn chunked_list_and_watch(s: &Space) -> Result<()> {
    for number in 0..7 {
        s.post(&s.path("configmaps"), &config_map(&format!("c{number}")))?.ok()?;
    }
    let api: Api<ConfigMap> = Api::namespaced(s.client(), &s.name);
    let only = |params: ListParams| params.fields("metadata.name!=kube-root-ca.crt");
    let first = s.block_on(api.list(&only(ListParams::default().limit(3))))??;
    ensure!(first.items.len() == 3 && first.metadata.remaining_item_count != Some(0), "{:?}", first.metadata);
    let token = first.metadata.continue_.clone().context("there is more")?;
    // a later write does not show in the list that was begun before
    s.post(&s.path("configmaps"), &config_map("c3a"))?.ok()?;
    let rest = s.block_on(api.list(&only(ListParams::default().continue_token(&token))))??;
    let names: Vec<_> = rest.items.iter().filter_map(|c| c.metadata.name.clone()).collect();
    ensure!(names == ["c3", "c4", "c5", "c6"], "{names:?}");
    ensure!(rest.metadata.resource_version == first.metadata.resource_version, "one consistent list");
    // a watch from there tells what came since
    let from = first.metadata.resource_version.context("a list has a version")?;
    let path = format!("{}?watch=true&timeoutSeconds=1&resourceVersion={from}", s.path("configmaps"));
    let seen = String::from_utf8_lossy(&s.get(&path)?.body).into_owned();
    has(&seen, r#""type":"ADDED""#)?;
    has(&seen, "c3a")?;
    ensure!(!seen.contains("\"c1\""), "only what came since:\n{seen}");
    Ok(())
}

fn apply_conflicts(s: &Space) -> Result<()> {
    let api: Api<ConfigMap> = Api::namespaced(s.client(), &s.name);
    let wanted = |value: &str| {
        Patch::Apply(
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a": value}}),
        )
    };
    s.block_on(api.patch("c", &PatchParams::apply("first"), &wanted("1")))??;
    let conflict = s.block_on(api.patch("c", &PatchParams::apply("second"), &wanted("2")))?;
    match conflict {
        Err(kube::Error::Api(status)) => {
            ensure!(status.code == 409 && status.reason == "Conflict", "{status:?}");
            has(&status.message, "Apply failed with 1 conflict: conflict with \"first\"")?;
            has(&status.message, ".data.a")?;
        }
        other => anyhow::bail!("{other:?}"),
    }
    let forced = s.block_on(api.patch("c", &PatchParams::apply("second").force(), &wanted("2")))??;
    ensure!(forced.data.is_some_and(|d| d["a"] == "2"), "forced");
    let owners: Vec<_> =
        forced.metadata.managed_fields.unwrap_or_default().into_iter().filter_map(|m| m.manager).collect();
    ensure!(owners.contains(&"second".to_string()), "{owners:?}");
    Ok(())
}

fn service_account_token(s: &Space) -> Result<()> {
    s.k(&["create", "serviceaccount", "robot"])?;
    let token = s.k(&["create", "token", "robot"])?.trim().to_string();
    let robot = s.client_as(|info| {
        *info = kube::config::AuthInfo { token: Some(token.clone().into()), ..Default::default() };
    })?;
    let answer = s.send_as(&robot, "GET", &s.path("secrets"), &[], Vec::new())?;
    let user = format!("User \"system:serviceaccount:{}:robot\" cannot list resource \"secrets\"", s.name);
    answer.is(403, "Forbidden", &user)?;
    let review =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
    let review = s.post("/apis/authentication.k8s.io/v1/tokenreviews", &review)?.ok()?;
    ensure!(review["status"]["authenticated"] == true, "{review}");
    // its account gone, the token is worth nothing
    s.k(&["delete", "serviceaccount", "robot"])?;
    sampan_tests::wait_for("the token to be refused", sampan_tests::seconds(15), || {
        let answer = s.send_as(&robot, "GET", &s.path("secrets"), &[], Vec::new())?;
        Ok(if answer.code == 401 { Ok(()) } else { Err(answer.code) })
    })
}
