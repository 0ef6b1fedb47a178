//! What a plugin is told about a write. Upstream counterpart: k8s.io/apiserver/pkg/admission/attributes.go.
//!
//! Deliberately different: the objects are arguments of the plugins' functions, so that only mutating ones can change
//! them. They are in the stored version.
use sampan_client::Identity;

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

#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub operation: Operation,
    pub group: &'a str,
    pub version: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub kind: &'a str,
    pub namespace: &'a str,
    /// "" for a create with a generated name.
    pub name: &'a str,
    pub dry_run: bool,
    pub user: &'a Identity,
}

impl Request<'_> {
    /// Whether it is about that resource itself, no subresource.
    pub fn is_for(&self, group: &str, resource: &str) -> bool {
        self.group == group && self.resource == resource && self.subresource.is_empty()
    }
}
