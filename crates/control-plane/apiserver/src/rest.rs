//! The verbs, and the subresources that aren't plain verbs.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/endpoints/{installer.go,handlers}, …/registry/generic/registry.
pub mod create;
pub mod delete;
pub mod get;
pub mod list;
pub mod patch;
pub mod subresource;
pub mod update;
pub mod watch;

use http::{Method, Response};

use crate::body::Body;
use crate::call::Call;
use crate::status::{Result, Status};

/// Answers a request for a resource.
pub async fn serve(call: Call, body: Body) -> Result<Response<Body>> {
    let unnamed = call.info.name.is_empty() || call.info.verb == "list" || call.info.verb == "watch";
    if call.parts.method == Method::HEAD {
        return Err(Status::method_unknown());
    }
    if call.resource.namespaced && call.info.namespace.is_empty() {
        // Across all namespaces objects can only be read, or not be named.
        match call.info.verb.as_str() {
            "list" | "watch" if call.resource.allows("list") => {}
            _ if !unnamed || !call.resource.allows("list") => return Err(Status::no_such_path()),
            _ => return Err(Status::method_unknown()),
        }
    }
    if !call.info.subresource.is_empty() {
        return subresource::serve(call, body).await;
    }
    if !call.resource.allows(&call.info.verb) {
        let is_virtual = subresource::is_virtual(&call.resource);
        return Err(if is_virtual && !unnamed { Status::no_such_path() } else { Status::method_unknown() });
    }
    match call.info.verb.as_str() {
        "update" | "patch" if unnamed => Err(Status::method_unknown()),
        "create" if subresource::is_virtual(&call.resource) => subresource::serve(call, body).await,
        "get" => get::serve(&call).await,
        "list" => list::serve(&call).await,
        "watch" => watch::serve(&call).await,
        "create" if unnamed => create::serve(&call, body).await,
        "update" => update::serve(&call, body).await,
        "patch" => patch::serve(&call, body).await,
        "delete" => delete::serve(&call, body).await,
        "deletecollection" => delete::serve_collection(&call, body).await,
        _ => Err(Status::method_unknown()),
    }
}
