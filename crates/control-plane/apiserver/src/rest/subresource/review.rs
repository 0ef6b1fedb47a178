//! Reviews and token requests: questions that authentication and authorization answer.
//!
//! Upstream counterparts: pkg/registry/{authentication,authorization}, pkg/registry/core/serviceaccount/storage/token.go.
use http::Response;

use crate::access::ReviewRequest;
use crate::admit::{self, Operation};
use crate::body::{self, Body};
use crate::call::Call;
use crate::codec::{self, Expected};
use crate::negotiate::{Output, Transform};
use crate::reply;
use crate::rest::create::check_namespace;
use crate::status::{Result, Status};

pub async fn serve(call: &Call, body: Body) -> Result<Response<Body>> {
    let resource = &call.resource;
    let (group, version, kind) = match resource.subresources.get(&call.info.subresource) {
        Some(sub) => (sub.group.as_str(), sub.version.as_str(), sub.kind.as_str()),
        None => (resource.group.as_str(), resource.version.as_str(), resource.kind.as_str()),
    };
    let options = call.write_options("CreateOptions")?;
    let bytes = body::read(body).await?;
    let ty = codec::type_of(group, version, kind).ok_or_else(Status::no_such_path)?;
    let mut object = codec::read(call, &bytes, &Expected { group, version, kind, ty }, options.validation)?;
    if call.info.subresource.is_empty() {
        check_namespace(call, &object)?;
    }
    let subresource = call.info.subresource.as_str();
    admit::mutate(call, Operation::Create, subresource, &mut object, None, &options).await?;
    admit::validate(call, Operation::Create, subresource, Some(&object), None, &options).await?;
    let reviews = call.server.reviews.get().ok_or_else(|| Status::unavailable("the server is starting"))?;
    let request = ReviewRequest { identity: &call.identity, info: &call.info, kind };
    let answer = reviews.review(&request, object).await?;
    let output = Output { transform: Transform::None, ..call.output };
    reply::typed_value(201, &answer, Some(ty), output)
}
