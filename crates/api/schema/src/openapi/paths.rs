//! The paths of a document: what can be asked for, how, and of which kind it is.
//!
//! Upstream: staging/src/k8s.io/apiserver/pkg/endpoints/installer.go.

use serde_json::{Map, Value, json};

use super::{Version, root};
use crate::types::{ResourceFact, Type};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";
const MEDIA: [&str; 3] = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];
const PATCHES: [&str; 4] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

/// Query parameters with their types.
const LISTING: &[(&str, &str)] = &[
    ("allowWatchBookmarks", "boolean"),
    ("continue", "string"),
    ("fieldSelector", "string"),
    ("labelSelector", "string"),
    ("limit", "integer"),
    ("resourceVersion", "string"),
    ("resourceVersionMatch", "string"),
    ("sendInitialEvents", "boolean"),
    ("timeoutSeconds", "integer"),
    ("watch", "boolean"),
];
const WRITING: &[(&str, &str)] =
    &[("dryRun", "string"), ("fieldManager", "string"), ("fieldValidation", "string")];
const DELETING: &[(&str, &str)] = &[
    ("dryRun", "string"),
    ("gracePeriodSeconds", "integer"),
    ("orphanDependents", "boolean"),
    ("propagationPolicy", "string"),
];

/// The type of `FooList`, where such a list is served.
pub fn list_type(fact: &ResourceFact) -> Option<&'static Type> {
    fact.verbs
        .contains(&"list")
        .then(|| crate::by_gvk(fact.kind_group, fact.kind_version, &format!("{}List", fact.kind)))
        .flatten()
}

/// Every path with its item, sorted.
pub fn paths(facts: &[&ResourceFact], version: Version) -> Vec<(String, Value)> {
    let mut out: std::collections::BTreeMap<String, Map<String, Value>> = std::collections::BTreeMap::new();
    for fact in facts {
        let prefix = format!("/{}", root(&fact.group_version()));
        out.entry(format!("{prefix}/")).or_insert_with(|| discovery(fact, version));
        let (resource, sub) = (fact.resource(), fact.subresource());
        let collection = match fact.namespaced {
            true => format!("{prefix}/namespaces/{{namespace}}/{resource}"),
            false => format!("{prefix}/{resource}"),
        };
        let item = match sub {
            Some(sub) => format!("{collection}/{{name}}/{sub}"),
            None => format!("{collection}/{{name}}"),
        };
        if fact.namespaced && fact.verbs.contains(&"list") {
            let everywhere = Maker { fact, version, namespaced: false };
            let map = out.entry(format!("{prefix}/{resource}")).or_default();
            map.insert("get".into(), everywhere.operation("list", "get", "ForAllNamespaces"));
        }
        let maker = Maker { fact, version, namespaced: fact.namespaced };
        for verb in &fact.verbs {
            let of_collection =
                matches!(*verb, "list" | "deletecollection") || *verb == "create" && sub.is_none();
            let path = if of_collection { &collection } else { &item };
            let Some((method, action)) = method(verb, fact) else { continue };
            let map = out.entry(path.clone()).or_default();
            map.insert("parameters".into(), maker.path_parameters(!of_collection, false));
            map.insert(method.into(), maker.operation(action, method, ""));
            if sub == Some("proxy") {
                let map = out.entry(format!("{path}/{{path}}")).or_default();
                map.insert("parameters".into(), maker.path_parameters(true, true));
                map.insert(method.into(), maker.operation(action, method, "WithPath"));
            }
        }
    }
    out.into_iter().map(|(path, item)| (path, Value::Object(item))).collect()
}

/// HTTP method and x-kubernetes-action of a verb; None for watch, which is a parameter of list.
fn method(verb: &str, fact: &ResourceFact) -> Option<(&'static str, &'static str)> {
    let (method, action) = match verb {
        "get" => ("get", "get"),
        "list" => ("get", "list"),
        "create" => ("post", "post"),
        "update" => ("put", "put"),
        "patch" => ("patch", "patch"),
        "delete" => ("delete", "delete"),
        "deletecollection" => ("delete", "deletecollection"),
        _ => return None,
    };
    Some((method, if connects(fact) { "connect" } else { action }))
}

/// exec, attach, proxy and so on: not an object but a connection.
fn connects(fact: &ResourceFact) -> bool {
    fact.kind.ends_with("Options")
}

fn discovery(fact: &ResourceFact, version: Version) -> Map<String, Value> {
    let schema = version.reference(&format!("{META}.APIResourceList"));
    let mut operation = Map::new();
    operation.insert("description".into(), "get available resources".into());
    operation.insert("operationId".into(), format!("get{}APIResources", group_name(fact)).into());
    operation.insert("tags".into(), json!([tag(fact)]));
    operation.insert("responses".into(), responses(Some(schema), &["200"], version));
    if version == Version::V2 {
        operation.insert("produces".into(), json!(MEDIA));
        operation.insert("consumes".into(), json!(MEDIA));
        operation.insert("schemes".into(), json!(["https"]));
    }
    Map::from_iter([("get".to_owned(), Value::Object(operation))])
}

/// `apps_v1`, `core_v1`.
fn tag(fact: &ResourceFact) -> String {
    let group = if fact.group.is_empty() { "core" } else { fact.group.trim_end_matches(".k8s.io") };
    let words: Vec<String> = group.split('.').map(str::to_owned).collect();
    let mut name = String::new();
    for (at, word) in words.iter().enumerate() {
        name.push_str(&if at == 0 { word.clone() } else { capital(word) });
    }
    format!("{name}_{}", fact.version)
}

/// `AppsV1`, `RbacAuthorizationV1`.
fn group_name(fact: &ResourceFact) -> String {
    tag(fact).split('_').map(capital).collect()
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + letters.as_str())
}

fn responses(schema: Option<Value>, codes: &[&str], version: Version) -> Value {
    let mut out = Map::new();
    for code in codes {
        let text = match *code {
            "201" => "Created",
            "202" => "Accepted",
            _ => "OK",
        };
        let mut response = Map::from_iter([("description".to_owned(), Value::from(text))]);
        match (version, &schema) {
            (_, None) => {}
            (Version::V2, Some(schema)) => {
                response.insert("schema".into(), schema.clone());
            }
            (Version::V3, Some(schema)) => {
                let content: Map<String, Value> =
                    MEDIA.iter().map(|media| ((*media).to_owned(), json!({ "schema": schema }))).collect();
                response.insert("content".into(), Value::Object(content));
            }
        }
        out.insert((*code).to_owned(), Value::Object(response));
    }
    out.insert("401".into(), json!({"description": "Unauthorized"}));
    Value::Object(out)
}

/// Makes the operations of one resource.
struct Maker<'a> {
    fact: &'a ResourceFact,
    version: Version,
    namespaced: bool,
}

impl Maker<'_> {
    fn operation(&self, action: &str, method: &str, suffix: &str) -> Value {
        let fact = self.fact;
        let kind = json!({"group": fact.kind_group, "version": fact.kind_version, "kind": fact.kind});
        let mut out = Map::new();
        out.insert("description".into(), format!("{action} {}", fact.kind).into());
        out.insert("operationId".into(), self.operation_id(action, method, suffix).into());
        out.insert("tags".into(), json!([tag(fact)]));
        out.insert("x-kubernetes-action".into(), action.into());
        out.insert("x-kubernetes-group-version-kind".into(), kind);
        let mut parameters: Vec<Value> = self.query(action);
        let body = self.body(action);
        let schema = match action {
            "connect" => Some(json!({"type": "string"})),
            "list" => list_type(fact).map(|ty| self.version.reference(&ty.name)),
            "delete" | "deletecollection" => Some(self.version.reference(&format!("{META}.Status"))),
            _ if fact.name == "pods/log" => Some(json!({"type": "string"})),
            _ => fact.kind_type().map(|ty| self.version.reference(&ty.name)),
        };
        let codes: &[&str] = match action {
            "post" => &["200", "201", "202"],
            "put" | "patch" => &["200", "201"],
            "delete" => &["200", "202"],
            _ => &["200"],
        };
        match (self.version, body) {
            (Version::V2, body) => {
                if let Some((schema, required)) = body {
                    let mut body = json!({"name": "body", "in": "body", "schema": schema});
                    if required {
                        body["required"] = true.into();
                    }
                    parameters.insert(0, body);
                }
                let patch = action == "patch";
                out.insert("consumes".into(), if patch { json!(PATCHES) } else { json!(["*/*"]) });
                out.insert(
                    "produces".into(),
                    if action == "connect" { json!(["*/*"]) } else { json!(MEDIA) },
                );
                out.insert("schemes".into(), json!(["https"]));
            }
            (Version::V3, Some((schema, required))) => {
                let media: &[&str] = if action == "patch" { &PATCHES } else { &["*/*"] };
                let content: Map<String, Value> =
                    media.iter().map(|media| ((*media).to_owned(), json!({ "schema": schema }))).collect();
                let mut body = json!({ "content": content });
                if required {
                    body["required"] = true.into();
                }
                out.insert("requestBody".into(), body);
            }
            (Version::V3, None) => {}
        }
        if !parameters.is_empty() {
            out.insert("parameters".into(), Value::Array(parameters));
        }
        out.insert("responses".into(), responses(schema, codes, self.version));
        Value::Object(out)
    }

    /// Schema of the request's body and whether there must be one.
    fn body(&self, action: &str) -> Option<(Value, bool)> {
        match action {
            "post" | "put" => Some((self.version.reference(&self.fact.kind_type()?.name), true)),
            "patch" => Some((self.version.reference(&format!("{META}.Patch")), true)),
            "delete" | "deletecollection" => {
                Some((self.version.reference(&format!("{META}.DeleteOptions")), false))
            }
            _ => None,
        }
    }

    fn query(&self, action: &str) -> Vec<Value> {
        let lists: &[&[(&str, &str)]] = match action {
            "list" => &[LISTING],
            "deletecollection" => &[LISTING, DELETING],
            "delete" => &[DELETING],
            "post" | "put" => &[WRITING],
            "patch" => &[WRITING, &[("force", "boolean")]],
            _ => &[],
        };
        lists
            .iter()
            .flat_map(|list| list.iter())
            .map(|(name, ty)| self.parameter("query", name, ty))
            .collect()
    }

    fn path_parameters(&self, named: bool, path: bool) -> Value {
        let mut out = Vec::new();
        if named {
            out.push(self.parameter("path", "name", "string"));
        }
        if self.namespaced {
            out.push(self.parameter("path", "namespace", "string"));
        }
        if path {
            out.push(self.parameter("path", "path", "string"));
        }
        out.push(self.parameter("query", "pretty", "string"));
        Value::Array(out)
    }

    fn parameter(&self, place: &str, name: &str, ty: &str) -> Value {
        let mut out = match self.version {
            Version::V2 => json!({"name": name, "in": place, "type": ty, "uniqueItems": true}),
            Version::V3 => json!({"name": name, "in": place, "schema": {"type": ty, "uniqueItems": true}}),
        };
        if place == "path" {
            out["required"] = true.into();
        }
        out
    }

    fn operation_id(&self, action: &str, method: &str, suffix: &str) -> String {
        let verb = match action {
            "get" => "read",
            "post" => "create",
            "put" => "replace",
            "deletecollection" => "deleteCollection",
            other => other,
        };
        let scope = if self.namespaced { "Namespaced" } else { "" };
        let sub = self.fact.subresource().map(capital).unwrap_or_default();
        let (verb, middle) = match verb {
            "deleteCollection" => ("delete", "Collection".to_owned()),
            "connect" => (verb, capital(method)),
            verb => (verb, String::new()),
        };
        format!("{verb}{}{middle}{scope}{}{sub}{suffix}", group_name(self.fact), self.owner())
    }

    /// The kind of the resource that the subresource belongs to.
    fn owner(&self) -> String {
        if self.fact.subresource().is_none() {
            return self.fact.kind.to_owned();
        }
        let main = crate::resources().iter().find(|other| {
            other.name == self.fact.resource()
                && other.group == self.fact.group
                && other.version == self.fact.version
        });
        main.map_or(self.fact.kind, |main| main.kind).to_owned()
    }
}
