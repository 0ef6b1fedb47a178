//! OpenAPI documents, version 2 (JSON and gnostic protobuf) and version 3 (JSON, one a group version).
//!
//! Upstream: pkg/generated/openapi, k8s.io/kube-openapi (builder, builder3, handler3).
//!
//! What stays true: documents are made when asked for, piece by piece into one buffer, and kept nowhere here;
//! the caller may cache the compressed bytes. What discovery doesn't serve isn't in the paths.
//! Deliberate differences: the deprecated `/watch/` paths and CBOR media types are left out (they aren't
//! served), and parameters are described briefly.

mod definitions;
mod gnostic;
mod paths;

use std::collections::BTreeSet;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::descriptions::Descriptions;
use crate::types::{ResourceFact, Type};

/// Which of the two forms a document takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V2,
    V3,
}

impl Version {
    fn prefix(self) -> &'static str {
        match self {
            Version::V2 => "#/definitions/",
            Version::V3 => "#/components/schemas/",
        }
    }

    fn reference(self, name: &str) -> Value {
        json!({ "$ref": format!("{}{name}", self.prefix()) })
    }
}

/// The document of one group version (`v1`, `apps/v1`) as `/openapi/v3/apis/apps/v1` answers it; None when
/// nothing of it is served.
pub fn v3(group_version: &str, served: &[ResourceFact]) -> Option<Vec<u8>> {
    let facts: Vec<&ResourceFact> =
        served.iter().filter(|fact| fact.group_version() == group_version).collect();
    if facts.is_empty() {
        return None;
    }
    let texts = Descriptions::load();
    let mut out =
        Document::open(r#"{"openapi":"3.0.0","info":{"title":"Kubernetes","version":"v1.36.0"},"paths":{"#);
    for (path, item) in paths::paths(&facts, Version::V3) {
        out.entry(&path, &item);
    }
    out.raw(r#"},"components":{"schemas":{"#);
    for ty in reachable(&facts) {
        out.entry(&ty.name, &definitions::definition(ty, &texts, Version::V3, &facts));
    }
    out.raw(r#"},"securitySchemes":{"BearerToken":"#);
    out.raw(&security().to_string());
    out.raw("}}}");
    Some(out.bytes)
}

/// `/openapi/v3`: where the documents are. The hash is over the facts that go into each, so that a client's
/// cache holds until one of them changes.
pub fn v3_index(served: &[ResourceFact]) -> Vec<u8> {
    let mut paths = serde_json::Map::new();
    let versions: BTreeSet<String> = served.iter().map(ResourceFact::group_version).collect();
    for version in versions {
        let path = root(&version);
        let url = format!("/openapi/v3/{path}?hash={}", v3_hash(&version, served));
        paths.insert(path, json!({ "serverRelativeURL": url }));
    }
    json!({ "paths": paths }).to_string().into_bytes()
}

/// The hash that [`v3_index`] gives for a group version; also fit as an ETag.
pub fn v3_hash(group_version: &str, served: &[ResourceFact]) -> String {
    hash(served.iter().filter(|fact| fact.group_version() == group_version))
}

/// The hash of the v2 document, fit as an ETag.
pub fn v2_hash(served: &[ResourceFact]) -> String {
    hash(served.iter())
}

fn hash<'a>(facts: impl Iterator<Item = &'a ResourceFact>) -> String {
    let mut sum = Sha256::new();
    sum.update(env!("CARGO_PKG_VERSION"));
    for fact in facts {
        sum.update(format!("{fact:?}"));
    }
    sum.finalize().iter().fold(String::new(), |text, byte| text + &format!("{byte:02X}"))
}

/// `/openapi/v2` as JSON.
pub fn v2(served: &[ResourceFact]) -> Vec<u8> {
    let facts: Vec<&ResourceFact> = served.iter().collect();
    let texts = Descriptions::load();
    let mut out =
        Document::open(r#"{"swagger":"2.0","info":{"title":"Kubernetes","version":"v1.36.0"},"paths":{"#);
    for (path, item) in paths::paths(&facts, Version::V2) {
        out.entry(&path, &item);
    }
    out.raw(r#"},"definitions":{"#);
    for ty in reachable(&facts) {
        out.entry(&ty.name, &definitions::definition(ty, &texts, Version::V2, &facts));
    }
    out.raw(r#"},"securityDefinitions":{"BearerToken":"#);
    out.raw(&security().to_string());
    out.raw(r#"},"security":[{"BearerToken":[]}]}"#);
    out.bytes
}

/// `/openapi/v2` as `application/com.github.proto-openapi.spec.v2.v1.0+protobuf`, which kubectl before 1.27
/// asks for.
pub fn v2_protobuf(served: &[ResourceFact]) -> Vec<u8> {
    let facts: Vec<&ResourceFact> = served.iter().collect();
    let texts = Descriptions::load();
    let paths = paths::paths(&facts, Version::V2);
    let definitions = reachable(&facts);
    let definitions = definitions
        .iter()
        .map(|ty| (ty.name.as_ref(), definitions::definition(ty, &texts, Version::V2, &facts)));
    gnostic::document("Kubernetes", "v1.36.0", paths.into_iter(), definitions)
}

/// `api/v1` or `apis/apps/v1`.
fn root(group_version: &str) -> String {
    if group_version.contains('/') { format!("apis/{group_version}") } else { format!("api/{group_version}") }
}

fn security() -> Value {
    json!({"type": "apiKey", "name": "authorization", "in": "header", "description": "Bearer Token authentication"})
}

/// The types that the resources lead to, by name.
fn reachable(facts: &[&ResourceFact]) -> Vec<&'static Type> {
    let mut names: BTreeSet<String> = BTreeSet::new();
    let mut open: Vec<String> = ["APIResourceList", "DeleteOptions", "Patch", "Status", "WatchEvent"]
        .iter()
        .map(|name| format!("io.k8s.apimachinery.pkg.apis.meta.v1.{name}"))
        .collect();
    for fact in facts {
        let kinds = [fact.kind_type(), paths::list_type(fact)];
        open.extend(kinds.into_iter().flatten().map(|ty| ty.name.to_string()));
    }
    let mut types = Vec::new();
    while let Some(name) = open.pop() {
        if !names.insert(name.clone()) {
            continue;
        }
        let Some(ty) = crate::by_name(&name) else { continue };
        open.extend(ty.fields().iter().filter_map(|field| definitions::referred(&field.element)));
        if name.rsplit('.').next().is_some_and(|last| last.starts_with("JSONSchemaPropsOr")) {
            open.push(crate::types::JSON_SCHEMA_PROPS.to_owned());
        }
        types.push(ty);
    }
    types.sort_by(|a, b| a.name.cmp(&b.name));
    types
}

/// A JSON object in the making.
struct Document {
    bytes: Vec<u8>,
}

impl Document {
    fn open(head: &str) -> Document {
        Document { bytes: head.as_bytes().to_vec() }
    }

    fn raw(&mut self, text: &str) {
        self.bytes.extend_from_slice(text.as_bytes());
    }

    fn entry(&mut self, key: &str, value: &Value) {
        if self.bytes.last() != Some(&b'{') {
            self.raw(",");
        }
        self.raw(&Value::from(key).to_string());
        self.raw(":");
        self.raw(&value.to_string());
    }
}

#[cfg(test)]
mod tests;
