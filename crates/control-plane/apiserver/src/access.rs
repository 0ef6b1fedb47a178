//! Who may do what: the seams through which the request pipeline asks for authentication, authorization and reviews.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/authentication/authenticator, …/authorization/authorizer. They are
//! filled in after the router exists (`crate::ApiServer::install_*`), because they read the cluster through it; until
//! then only callers in memory who are `system:masters` are served.
use std::sync::Arc;

use async_trait::async_trait;
use http::request::Parts;
use rustls::pki_types::CertificateDer;
use sampan_client::Identity;
use serde_json::Value;

use crate::request_info::RequestInfo;
use crate::selector::{FieldSelector, LabelSelector};
use crate::status::{GroupResource, Result, Status};

/// The certificates that the peer of a connection has shown and the TLS layer has verified; an extension of each
/// request on that connection.
#[derive(Clone)]
pub struct PeerCertificates(pub Arc<Vec<CertificateDer<'static>>>);

/// Finds out who calls.
#[async_trait]
pub trait Authenticator: Send + Sync {
    /// The caller; an error (401) where credentials are wrong, or missing where anonymous callers aren't let in.
    async fn authenticate(&self, request: &Parts) -> Result<Identity>;
}

/// What is to be allowed or not.
#[derive(Clone, Debug)]
pub struct Attributes<'a> {
    pub identity: &'a Identity,
    pub verb: &'a str,
    pub group: &'a str,
    pub version: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub namespace: &'a str,
    pub name: &'a str,
    /// For requests outside the API's resources.
    pub path: &'a str,
    pub is_resource: bool,
    /// What a list, watch or deletecollection is limited to.
    pub field_selector: &'a FieldSelector,
    pub label_selector: &'a LabelSelector,
}

impl<'a> Attributes<'a> {
    pub fn of(identity: &'a Identity, info: &'a RequestInfo) -> Self {
        Self {
            identity,
            verb: &info.verb,
            group: &info.group,
            version: &info.version,
            resource: &info.resource,
            subresource: &info.subresource,
            namespace: &info.namespace,
            name: &info.name,
            path: &info.path,
            is_resource: info.is_resource,
            field_selector: &info.field_selector,
            label_selector: &info.label_selector,
        }
    }

    /// The 403 that a denial is answered with.
    pub fn forbidden(&self, reason: &str) -> Status {
        let user = &self.identity.username;
        let tail = if reason.is_empty() { String::new() } else { format!(": {reason}") };
        if !self.is_resource {
            let path = self.path;
            let of = GroupResource { group: "", resource: "" };
            let mut status = Status::forbidden(of, "", "");
            status.0.message = format!("forbidden: User {user:?} cannot {} path {path:?}{tail}", self.verb);
            return status;
        }
        let resource = match self.subresource {
            "" => self.resource.to_string(),
            sub => format!("{}/{sub}", self.resource),
        };
        let scope = match self.namespace {
            "" => "at the cluster scope".to_string(),
            namespace => format!("in the namespace {namespace:?}"),
        };
        let why = format!(
            "User {user:?} cannot {} resource {resource:?} in API group {:?} {scope}{tail}",
            self.verb, self.group
        );
        Status::forbidden(GroupResource { group: self.group, resource: self.resource }, self.name, why)
    }
}

/// An authorizer's verdict; a denial says why where there is something to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow,
    Deny(String),
}

/// Decides what callers may do.
#[async_trait]
pub trait Authorizer: Send + Sync {
    async fn authorize(&self, attributes: &Attributes<'_>) -> Decision;

    /// Refuses a write of a role or binding by which the caller would grant what it doesn't have (upstream's
    /// escalation check). `object` is about to be stored in the place of `old`.
    fn check_escalation(
        &self,
        _identity: &Identity,
        _resource: &str,
        _namespace: &str,
        _old: Option<&Value>,
        _object: &Value,
    ) -> Result<()> {
        Ok(())
    }
}

/// What a review or token request is about, besides its body.
pub struct ReviewRequest<'a> {
    pub identity: &'a Identity,
    pub info: &'a RequestInfo,
    /// `TokenReview`, `SubjectAccessReview`, …, `TokenRequest`.
    pub kind: &'a str,
}

/// Answers the virtual resources of authentication.k8s.io and authorization.k8s.io, and serviceaccounts/token.
#[async_trait]
pub trait Reviews: Send + Sync {
    /// The posted object, its status filled in.
    async fn review(&self, request: &ReviewRequest<'_>, object: Value) -> Result<Value>;
}
