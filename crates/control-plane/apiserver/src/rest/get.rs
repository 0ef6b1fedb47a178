//! GET of one object.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/endpoints/handlers/get.go.
use std::sync::Arc;

use http::Response;

use crate::body::Body;
use crate::cache::Object;
use crate::call::Call;
use crate::reply;
use crate::resource_version::{self, Read};
use crate::status::Result;

pub async fn serve(call: &Call) -> Result<Response<Body>> {
    let object = find(call).await?;
    reply::object(call, 200, &object.bytes, object.revision)
}

/// The object that the request names, as new as it asks for.
pub async fn find(call: &Call) -> Result<Arc<Object>> {
    let cache = call.cache().await?;
    match resource_version::for_get(&call.query)? {
        Read::Any => {}
        Read::NotOlderThan(revision) => call.server.caches.reach(revision).await?,
        _ => call.server.caches.catch_up().await?,
    }
    cache.get(&call.key()).ok_or_else(|| call.not_found())
}
