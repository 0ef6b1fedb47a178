//! The seam to admission: what plugins see of a write, and the chain that the binary installs.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/admission. Objects are in the stored version, as upstream's plugins see
//! the internal one.
use async_trait::async_trait;
use sampan_client::Identity;
use serde_json::Value;

use crate::call::{Call, WriteOptions};
use crate::status::{GroupResource, Result, Status};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update,
    Delete,
    Connect,
}

impl Operation {
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Connect => "CONNECT",
        }
    }
}

/// What a plugin is told besides the objects.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    pub operation: Operation,
    pub group: &'a str,
    pub version: &'a str,
    pub resource: &'a str,
    pub kind: &'a str,
    pub subresource: &'a str,
    pub namespace: &'a str,
    /// "" for a create with a generated name.
    pub name: &'a str,
    pub identity: &'a Identity,
    pub dry_run: bool,
}

/// Why a plugin refuses a write.
#[derive(Clone, Debug)]
pub enum Refusal {
    /// 403 with upstream's words around the reason.
    Forbidden(String),
    /// Any other answer.
    Status(Status),
}

/// The installed plugins, in order.
#[async_trait]
pub trait Admission: Send + Sync {
    /// Changes the object, or refuses it.
    async fn mutate(
        &self,
        attributes: &Attributes<'_>,
        object: &mut Value,
        old: Option<&Value>,
    ) -> std::result::Result<(), Refusal>;

    /// Refuses the write or lets it be. A delete has only `old`.
    async fn validate(
        &self,
        attributes: &Attributes<'_>,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> std::result::Result<(), Refusal>;
}

fn attributes<'a>(
    call: &'a Call,
    operation: Operation,
    subresource: &'a str,
    name: &'a str,
    dry_run: bool,
) -> Attributes<'a> {
    let storage = &call.resource.storage;
    let version = storage.api_version.rsplit('/').next().unwrap_or("");
    Attributes {
        operation,
        group: &storage.group,
        version,
        resource: &storage.resource,
        kind: &storage.kind,
        subresource,
        namespace: &call.info.namespace,
        name,
        identity: &call.identity,
        dry_run,
    }
}

/// The name on the path, which a body can't belie; on creates and of collections the object's.
fn name_of<'a>(call: &'a Call, object: Option<&'a Value>) -> &'a str {
    if !call.info.name.is_empty() {
        return &call.info.name;
    }
    object.and_then(|object| object.pointer("/metadata/name")).and_then(Value::as_str).unwrap_or_default()
}

fn refused(call: &Call, name: &str, refusal: Refusal) -> Status {
    let of = call.resource.group_resource();
    match refusal {
        Refusal::Forbidden(why) => Status::forbidden(GroupResource { ..of }, name, why),
        Refusal::Status(status) => status,
    }
}

pub async fn mutate(
    call: &Call,
    operation: Operation,
    subresource: &str,
    object: &mut Value,
    old: Option<&Value>,
    options: &WriteOptions,
) -> Result<()> {
    let Some(chain) = call.server.admission.get() else { return Ok(()) };
    let name = name_of(call, Some(object)).to_string();
    let attributes = attributes(call, operation, subresource, &name, options.dry_run);
    chain.mutate(&attributes, object, old).await.map_err(|refusal| refused(call, &name, refusal))
}

pub async fn validate(
    call: &Call,
    operation: Operation,
    subresource: &str,
    object: Option<&Value>,
    old: Option<&Value>,
    options: &WriteOptions,
) -> Result<()> {
    let Some(chain) = call.server.admission.get() else { return Ok(()) };
    let name = name_of(call, object.or(old));
    let attributes = attributes(call, operation, subresource, name, options.dry_run);
    chain.validate(&attributes, object, old).await.map_err(|refusal| refused(call, name, refusal))
}
