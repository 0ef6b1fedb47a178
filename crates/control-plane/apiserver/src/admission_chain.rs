//! The admission plugins behind the API server's seam: attributes go in, refusals come out as `Status`.
use async_trait::async_trait;
use sampan_admission::{Chain, Operation, Rejection, Request};
use serde_json::Value;

use crate::admit::{self, Admission, Refusal};
use crate::status::{GroupResource, Status};

#[async_trait]
impl Admission for Chain {
    async fn mutate(
        &self,
        attributes: &admit::Attributes<'_>,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<(), Refusal> {
        let request = request(attributes);
        self.admit(&request, object, old).await.map_err(|rejection| refusal(rejection, &request))
    }

    async fn validate(
        &self,
        attributes: &admit::Attributes<'_>,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<(), Refusal> {
        let request = request(attributes);
        Chain::validate(self, &request, object, old).await.map_err(|rejection| refusal(rejection, &request))
    }
}

fn request<'a>(attributes: &admit::Attributes<'a>) -> Request<'a> {
    Request {
        operation: match attributes.operation {
            admit::Operation::Create => Operation::Create,
            admit::Operation::Update => Operation::Update,
            admit::Operation::Delete => Operation::Delete,
            admit::Operation::Connect => Operation::Connect,
        },
        group: attributes.group,
        version: attributes.version,
        resource: attributes.resource,
        subresource: attributes.subresource,
        kind: attributes.kind,
        namespace: attributes.namespace,
        name: attributes.name,
        dry_run: attributes.dry_run,
        user: attributes.identity,
    }
}

fn refusal(rejection: Rejection, request: &Request<'_>) -> Refusal {
    match rejection {
        Rejection::Forbidden { why, cause: None } => Refusal::Forbidden(why),
        Rejection::Forbidden { why, cause: Some(cause) } => {
            let of = GroupResource { group: request.group, resource: request.resource };
            let status = Status::forbidden(of, request.name, why);
            Refusal::Status(status.cause(cause.reason, cause.message, cause.field))
        }
        Rejection::NotFound { resource, name } => {
            Refusal::Status(Status::not_found(GroupResource { group: "", resource }, &name))
        }
        Rejection::Internal(why) => Refusal::Status(Status::internal(why)),
    }
}
