//! CREATE.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/endpoints/handlers/create.go.
use http::Response;
use serde_json::Value;

use crate::body::{self, Body};
use crate::call::Call;
use crate::codec::{self, Expected};
use crate::managed;
use crate::reply;
use crate::status::{Result, Status};
use crate::write::{self, text};

pub async fn serve(call: &Call, body: Body) -> Result<Response<Body>> {
    let options = call.write_options("CreateOptions")?;
    let bytes = body::read(body).await?;
    let mut object = codec::read(call, &bytes, &expected(call), options.validation)?;
    check_namespace(call, &object)?;
    (call.resource.rules.defaults)(&mut object);
    managed::track(call, &options, "", None, &mut object);
    let written = write::create(call, call.resource.to_storage(object), &options).await?;
    reply::object(call, 201, &written.bytes, written.revision)
}

/// The resource's own kind.
pub fn expected(call: &Call) -> Expected<'_> {
    let resource = &call.resource;
    Expected {
        group: &resource.group,
        version: &resource.version,
        kind: &resource.kind,
        ty: &resource.schema,
    }
}

/// An object's namespace, where it states one, must be the request's.
pub fn check_namespace(call: &Call, object: &Value) -> Result<()> {
    let stated = text(object, "/metadata/namespace");
    let wanted = if call.resource.namespaced { call.info.namespace.as_str() } else { "" };
    if stated.is_empty() || stated == wanted {
        return Ok(());
    }
    Err(Status::bad_request(
        "the namespace of the provided object does not match the namespace sent on the request",
    ))
}
