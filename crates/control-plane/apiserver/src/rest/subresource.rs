//! Subresources, and the virtual resources that only exist as requests.
//!
//! Upstream counterparts: pkg/registry/*/storage. Each has its own file; what is a plain read or write of the parent
//! under other rules (status, finalize, …) is here.
pub mod binding;
pub mod eviction;
pub mod log_socket;
pub mod node_stream;
pub mod proxy_path;
pub mod review;
pub mod scale;

use http::Response;
use sampan_kinds::Rest;

use crate::body::Body;
use crate::call::Call;
use crate::registry::Resource;
use crate::rest::{get, patch, update};
use crate::status::{Result, Status};
use crate::write::Target;

/// Resources without storage: a create is a question.
pub fn is_virtual(resource: &Resource) -> bool {
    resource.verbs.iter().all(|verb| verb == "create")
}

pub async fn serve(call: Call, body: Body) -> Result<Response<Body>> {
    let resource = call.resource.name.clone();
    let subresource = call.info.subresource.clone();
    if !subresource.is_empty() {
        let known = call.resource.subresources.get(&subresource).ok_or_else(Status::no_such_path)?;
        let deep = call.info.parts.len() > 3 && subresource != "proxy";
        if deep {
            return Err(Status::no_such_path());
        }
        if !known.verbs.contains(&call.info.verb) {
            return Err(Status::method_unknown());
        }
    }
    match (resource.as_str(), subresource.as_str()) {
        ("bindings", "") | ("pods", "binding") => binding::serve(&call, body).await,
        ("pods", "eviction") => eviction::serve(&call, body).await,
        ("pods", "log" | "exec" | "attach" | "portforward") => node_stream::serve(&call, body).await,
        ("pods" | "services" | "nodes", "proxy") => proxy_path::serve(&call, body).await,
        (_, "scale") => scale::serve(&call, body).await,
        ("serviceaccounts", "token") => review::serve(&call, body).await,
        (_, "") => review::serve(&call, body).await,
        (_, name) => {
            let rest = rules_of(&call, name).ok_or_else(Status::no_such_path)?;
            let target = Target { rest: &rest, subresource: name, ..Target::of(&call) };
            match call.info.verb.as_str() {
                "get" => get::serve(&call).await,
                "update" => update::replace(&call, body, &target).await,
                "patch" => patch::run(&call, body, &target).await,
                _ => Err(Status::method_unknown()),
            }
        }
    }
}

/// The rules of a subresource that is written like its parent.
fn rules_of(call: &Call, subresource: &str) -> Option<Rest> {
    let rules = &call.resource.storage.rules;
    if let Some((_, rest)) = rules.subresources.iter().find(|(name, _)| *name == subresource) {
        return Some(*rest);
    }
    match (call.resource.name.as_str(), subresource) {
        (_, "status") => Some(rules.status.unwrap_or(STATUS_ONLY)),
        ("certificatesigningrequests", "approval") => Some(STATUS_ONLY),
        _ => None,
    }
}

/// Only `status` changes: for kinds whose own rules aren't there yet.
const STATUS_ONLY: Rest = Rest {
    prepare_update: |new, old| {
        let status = new.get("status").cloned();
        let meta = kept_metadata(new, old);
        *new = old.clone();
        new["metadata"] = meta;
        put(new, "status", status);
    },
    ..Rest::ANY
};

/// The stored metadata with what a subresource's client may still say: the version it has seen, and the managed
/// fields that were noted.
fn kept_metadata(new: &serde_json::Value, old: &serde_json::Value) -> serde_json::Value {
    let mut meta = old.get("metadata").cloned().unwrap_or_default();
    for field in ["resourceVersion", "managedFields"] {
        put(&mut meta, field, new.get("metadata").and_then(|meta| meta.get(field)).cloned());
    }
    meta
}

fn put(object: &mut serde_json::Value, field: &str, value: Option<serde_json::Value>) {
    match value {
        Some(value) => object[field] = value,
        None => drop(object.as_object_mut().and_then(|object| object.remove(field))),
    }
}
