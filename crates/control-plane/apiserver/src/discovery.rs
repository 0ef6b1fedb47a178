//! Discovery: which groups, versions and resources there are, in the old form and the aggregated one.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/endpoints/discovery (and …/discovery/aggregated).
use std::fmt::Write;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::request::Parts;
use http::{HeaderValue, Response, header};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::Server;
use crate::body::{self, Body};
use crate::codec;
use crate::negotiate::{self, Output};
use crate::registry::Resource;
use crate::reply;
use crate::status::{Result, Status};
use crate::storage::{Storage, api_version};

/// A group with its versions, in order of preference.
struct Group<'a> {
    name: &'a str,
    versions: Vec<(&'a str, Vec<&'a Resource>)>,
}

fn groups<'a>(resources: &'a [Arc<Resource>]) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'a>> = Vec::new();
    for resource in resources {
        let at = groups.iter().position(|group| group.name == resource.group).unwrap_or_else(|| {
            groups.push(Group { name: &resource.group, versions: Vec::new() });
            groups.len() - 1
        });
        let versions = &mut groups[at].versions;
        match versions.iter_mut().find(|(version, _)| *version == resource.version) {
            Some((_, resources)) => resources.push(resource),
            None => versions.push((&resource.version, vec![resource])),
        }
    }
    groups
}

/// What `/` lists.
pub fn paths(server: &Server) -> Vec<String> {
    let all = server.registry.all();
    let mut paths: Vec<String> =
        vec!["/.well-known/openid-configuration".into(), "/api".into(), "/api/v1".into()];
    paths.push("/apis".into());
    for group in groups(&all).iter().filter(|group| !group.name.is_empty()) {
        paths.push(format!("/apis/{}", group.name));
        paths.extend(group.versions.iter().map(|(version, _)| format!("/apis/{}/{version}", group.name)));
    }
    for path in [
        "/healthz",
        "/livez",
        "/metrics",
        "/openapi/v2",
        "/openapi/v3",
        "/openid/v1/jwks",
        "/readyz",
        "/version",
    ] {
        paths.push(path.into());
    }
    paths.sort();
    paths
}

pub fn serve(server: &Server, segments: &[&str], parts: &Parts, output: Output) -> Result<Response<Body>> {
    let all = server.registry.all();
    let groups = groups(&all);
    let find = |name: &str| groups.iter().find(|group| group.name == name).ok_or_else(Status::no_such_path);
    match *segments {
        [root @ ("api" | "apis")] if negotiate::wants_aggregated_discovery(&parts.headers) => {
            let core = root == "api";
            let items: Vec<Value> =
                groups.iter().filter(|group| group.name.is_empty() == core).map(aggregated).collect();
            aggregated_answer(&items, parts)
        }
        ["api"] => {
            let address = server.config.advertise.map(|address| address.to_string()).unwrap_or_default();
            let body = json!({"kind": "APIVersions", "versions": ["v1"],
                "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]});
            reply::typed_value(200, &body, codec::meta_type("APIVersions"), output)
        }
        ["apis"] => {
            let list: Vec<Value> = groups
                .iter()
                .filter(|group| !group.name.is_empty())
                .map(|group| api_group(group, false))
                .collect();
            let body = json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": list});
            reply::typed_value(200, &body, codec::meta_type("APIGroupList"), output)
        }
        ["apis", group] if !group.is_empty() => {
            reply::typed_value(200, &api_group(find(group)?, true), codec::meta_type("APIGroup"), output)
        }
        ["api", version] => resource_list(find("")?, version, output),
        ["apis", group, version] if !group.is_empty() => resource_list(find(group)?, version, output),
        _ => Err(Status::no_such_path()),
    }
}

fn api_group(group: &Group<'_>, typed: bool) -> Value {
    let versions: Vec<Value> = group
        .versions
        .iter()
        .map(|(version, _)| json!({"groupVersion": api_version(group.name, version), "version": version}))
        .collect();
    let preferred = versions.first().cloned().unwrap_or_default();
    let mut body = json!({"name": group.name, "versions": versions, "preferredVersion": preferred});
    if typed {
        body["kind"] = "APIGroup".into();
        body["apiVersion"] = "v1".into();
    }
    body
}

fn resource_list(group: &Group<'_>, version: &str, output: Output) -> Result<Response<Body>> {
    let found = group.versions.iter().find(|(name, _)| *name == version).ok_or_else(Status::no_such_path)?;
    let mut resources = Vec::new();
    for resource in &found.1 {
        let mut entry = json!({"name": resource.name, "singularName": resource.singular,
            "namespaced": resource.namespaced, "kind": resource.kind, "verbs": resource.verbs});
        if !resource.short_names.is_empty() {
            entry["shortNames"] = resource.short_names.clone().into();
        }
        if !resource.categories.is_empty() {
            entry["categories"] = resource.categories.clone().into();
        }
        if resource.verbs.iter().any(|verb| verb == "list") && resource.name != "componentstatuses" {
            entry["storageVersionHash"] = storage_version_hash(&resource.storage).into();
        }
        resources.push(entry);
        for (name, sub) in &resource.subresources {
            let mut entry = json!({"name": format!("{}/{name}", resource.name), "singularName": "",
                "namespaced": resource.namespaced, "kind": sub.kind, "verbs": sub.verbs});
            if (sub.group.as_str(), sub.version.as_str()) != (group.name, version) {
                entry["group"] = sub.group.as_str().into();
                entry["version"] = sub.version.as_str().into();
            }
            resources.push(entry);
        }
    }
    let mut body = json!({"kind": "APIResourceList", "groupVersion": api_version(group.name, version),
        "resources": resources});
    // As upstream: the core group's list doesn't state its own version.
    if !group.name.is_empty() {
        body["apiVersion"] = "v1".into();
    }
    reply::typed_value(200, &body, codec::meta_type("APIResourceList"), output)
}

/// Upstream's StorageVersionHash: of the group, version and kind that objects are stored as.
fn storage_version_hash(storage: &Storage) -> String {
    let version = storage.api_version.rsplit('/').next().unwrap_or_default();
    let hash = Sha256::digest(format!("{}/{version}/{}", storage.group, storage.kind));
    STANDARD.encode(&hash[..8])
}

fn aggregated(group: &Group<'_>) -> Value {
    let versions: Vec<Value> = group
        .versions
        .iter()
        .map(|(version, resources)| {
            let resources: Vec<Value> =
                resources.iter().map(|resource| aggregated_resource(resource)).collect();
            json!({"version": version, "resources": resources, "freshness": "Current"})
        })
        .collect();
    let mut metadata = Map::new();
    if !group.name.is_empty() {
        metadata.insert("name".into(), group.name.into());
    }
    metadata.insert("creationTimestamp".into(), Value::Null);
    json!({"metadata": metadata, "versions": versions})
}

fn aggregated_resource(resource: &Resource) -> Value {
    let kind =
        |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
    let mut entry = json!({"resource": resource.name,
        "responseKind": kind(&resource.group, &resource.version, &resource.kind),
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": resource.singular, "verbs": resource.verbs});
    if !resource.short_names.is_empty() {
        entry["shortNames"] = resource.short_names.clone().into();
    }
    if !resource.categories.is_empty() {
        entry["categories"] = resource.categories.clone().into();
    }
    let subresources: Vec<Value> = resource
        .subresources
        .iter()
        .map(|(name, sub)| {
            json!({"subresource": name, "responseKind": kind(&sub.group, &sub.version, &sub.kind), "verbs": sub.verbs})
        })
        .collect();
    if !subresources.is_empty() {
        entry["subresources"] = subresources.into();
    }
    entry
}

fn aggregated_answer(items: &[Value], parts: &Parts) -> Result<Response<Body>> {
    let body =
        json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {},
        "items": items})
        .to_string();
    let etag = etag(body.as_bytes());
    let same = parts.headers.get(header::IF_NONE_MATCH).is_some_and(|tag| tag.as_bytes() == etag.as_bytes());
    let media_type = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let mut response = match same {
        true => reply::bytes(304, media_type, body::empty()),
        false => reply::bytes(200, media_type, body::full(body)),
    };
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    Ok(response)
}

/// A quoted hash of a document.
pub fn etag(document: &[u8]) -> String {
    let mut tag = String::from("\"");
    for byte in Sha256::digest(document) {
        let _ = write!(tag, "{byte:02X}");
    }
    tag.push('"');
    tag
}
