//! Subresources, and the virtual resources that only exist as requests.
//!
//! Upstream counterparts: pkg/registry/*/storage. Each has its own file; what is a plain read or write of the parent
//! under other rules (status, finalize, …) is here.
pub mod binding;
pub mod eviction;
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
            return Err(Status::method_not_allowed(call.resource.group_resource(), &call.info.verb));
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
            let rules = &call.resource.storage.rules;
            let rest = rules_of(&call, name).unwrap_or(rules.rest);
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
    match (call.resource.name.as_str(), subresource) {
        (_, "status") => Some(rules.status.unwrap_or(STATUS_ONLY)),
        ("namespaces", "finalize") => Some(FINALIZE),
        ("pods", "ephemeralcontainers") => Some(EPHEMERAL_CONTAINERS),
        ("pods", "resize") => Some(RESIZE),
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

/// Only `spec.finalizers` changes.
const FINALIZE: Rest = Rest {
    prepare_update: |new, old| {
        let finalizers = new.pointer("/spec/finalizers").cloned();
        let version = new.pointer("/metadata/resourceVersion").cloned();
        *new = old.clone();
        if let Some(version) = version {
            new["metadata"]["resourceVersion"] = version;
        }
        match finalizers {
            Some(finalizers) => new["spec"]["finalizers"] = finalizers,
            None => drop(new["spec"].as_object_mut().and_then(|spec| spec.remove("finalizers"))),
        }
    },
    ..Rest::ANY
};

/// Only `spec.ephemeralContainers` grows.
const EPHEMERAL_CONTAINERS: Rest = Rest {
    prepare_update: |new, old| {
        let containers = new.pointer("/spec/ephemeralContainers").cloned();
        let meta = kept_metadata(new, old);
        *new = old.clone();
        new["metadata"] = meta;
        if let Some(containers) = containers {
            let changed = old.pointer("/spec/ephemeralContainers") != Some(&containers);
            new["spec"]["ephemeralContainers"] = containers;
            let generation = old.pointer("/metadata/generation").and_then(serde_json::Value::as_i64);
            if let Some(generation) = generation.filter(|_| changed) {
                new["metadata"]["generation"] = (generation + 1).into();
            }
        }
    },
    validate_update: |new, old| {
        let of = |object: &serde_json::Value| {
            object
                .pointer("/spec/ephemeralContainers")
                .and_then(|c| c.as_array())
                .cloned()
                .unwrap_or_default()
        };
        let path = sampan_kinds::Path::new("spec").child("ephemeralContainers");
        let now = of(new);
        of(old)
            .iter()
            .filter(|container| !now.contains(container))
            .map(|container| {
                let name = container.get("name").and_then(|n| n.as_str()).unwrap_or("");
                let detail =
                    format!("existing ephemeral containers {name:?} may not be removed or changed\n");
                sampan_kinds::FieldError::forbidden(&path, detail)
            })
            .collect()
    },
    ..Rest::ANY
};

/// Only the containers' resources and resize policy change.
const RESIZE: Rest = Rest {
    prepare_update: |new, old| {
        let wanted = new.clone();
        let meta = kept_metadata(new, old);
        *new = old.clone();
        new["metadata"] = meta;
        for list in ["containers", "initContainers"] {
            let pointer = format!("/spec/{list}");
            let from = wanted.pointer(&pointer).and_then(|c| c.as_array()).cloned().unwrap_or_default();
            for container in new.pointer_mut(&pointer).and_then(|c| c.as_array_mut()).into_iter().flatten() {
                let same = from.iter().find(|other| other.get("name") == container.get("name"));
                for field in ["resources", "resizePolicy"] {
                    if let Some(value) = same.and_then(|same| same.get(field)) {
                        container[field] = value.clone();
                    }
                }
            }
        }
        if new.get("spec") != old.get("spec")
            && let Some(generation) = old.pointer("/metadata/generation").and_then(serde_json::Value::as_i64)
        {
            new["metadata"]["generation"] = (generation + 1).into();
        }
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
