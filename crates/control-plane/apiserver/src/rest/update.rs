//! UPDATE (PUT) of an object or its status.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/endpoints/handlers/update.go.
use http::Response;
use serde_json::Value;

use crate::body::{self, Body};
use crate::call::Call;
use crate::codec;
use crate::managed;
use crate::reply;
use crate::rest::create::{check_namespace, expected};
use crate::status::{Result, Status};
use crate::write::{self, Target, text};

pub async fn serve(call: &Call, body: Body) -> Result<Response<Body>> {
    let rules = &call.resource.storage.rules;
    let target = Target { create: rules.create_on_update, ..Target::of(call) };
    replace(call, body, &target).await
}

/// Puts the body in the place of the target.
pub async fn replace(call: &Call, body: Body, target: &Target<'_>) -> Result<Response<Body>> {
    let options = call.write_options("UpdateOptions")?;
    let bytes = body::read(body).await?;
    let mut object = codec::read(call, &bytes, &expected(call), options.validation)?;
    check_namespace(call, &object)?;
    check_name(call, &mut object)?;
    (call.resource.rules.defaults)(&mut object);
    let make = |stored: Option<&Value>| {
        let mut object = object.clone();
        let live = stored.map(|stored| call.resource.from_storage(stored.clone()));
        managed::track(call, &options, target.subresource, live.as_ref(), &mut object);
        Ok(call.resource.to_storage(object))
    };
    let written = write::update(call, target, &make, &options).await?;
    reply::object(call, if written.created { 201 } else { 200 }, &written.bytes, written.revision)
}

/// The body names the object that the path names.
fn check_name(call: &Call, object: &mut Value) -> Result<()> {
    let (name, wanted) = (text(object, "/metadata/name"), call.info.name.as_str());
    if name.is_empty() {
        return Err(Status::bad_request(format!(
            "the name of the object ({wanted} based on URL) was undeterminable: name must be provided"
        )));
    }
    if name != wanted {
        return Err(Status::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({wanted})"
        )));
    }
    Ok(())
}
