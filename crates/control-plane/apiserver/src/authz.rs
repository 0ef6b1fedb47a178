//! Who may do what: every request is asked about, those from memory too.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/authorization/{authorizer,union} and
//! endpoints/handlers/responsewriters/errors.go. What stays true: everything is forbidden until one authorizer allows
//! it, in the order: superusers, nodes, RBAC. Nothing here reads the store: roles, bindings and pods come from
//! informers, so a decision never waits.
use std::fmt;

use async_trait::async_trait;
use sampan_client::{Identity, Informers};

use crate::access;
use crate::selector::{FieldSelector, LabelSelector};
use crate::status::{GroupResource, Status};

pub mod aggregation;
pub mod bootstrap_policy;
pub mod escalation;
pub mod node;
pub mod rbac;
pub mod reviews;

/// What is asked about.
#[derive(Clone, Debug, Default)]
pub struct Attributes {
    pub user: Identity,
    pub verb: String,
    pub api_group: String,
    pub api_version: String,
    pub resource: String,
    pub subresource: String,
    pub name: String,
    pub namespace: String,
    /// False for paths such as `/healthz`, of which only `verb` and `path` count.
    pub resource_request: bool,
    pub path: String,
    pub field_selector: FieldSelector,
    pub label_selector: LabelSelector,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow,
    Deny,
    /// Nobody said yes, which forbids it.
    NoOpinion,
}

/// A decision, and why in a sentence for whoever asked ("" when there is nothing to say).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub decision: Decision,
    pub reason: String,
}

impl Verdict {
    pub fn allow(reason: impl Into<String>) -> Self {
        Self { decision: Decision::Allow, reason: reason.into() }
    }

    pub fn no_opinion(reason: impl Into<String>) -> Self {
        Self { decision: Decision::NoOpinion, reason: reason.into() }
    }

    pub fn is_allowed(&self) -> bool {
        self.decision == Decision::Allow
    }
}

/// The union of all authorizers.
#[derive(Clone)]
pub struct Authorizer {
    pub node: node::NodeAuthorizer,
    pub rbac: rbac::Rbac,
}

impl Authorizer {
    /// `informers` must see everything: they are those of the loopback identity.
    pub fn new(informers: &Informers) -> Self {
        Self { node: node::NodeAuthorizer::new(informers), rbac: rbac::Rbac::new(informers) }
    }

    /// Waits until roles and bindings are known. Before that only superusers are let in.
    pub async fn ready(&self) {
        self.rbac.ready().await;
    }

    pub fn authorize(&self, attributes: &Attributes) -> Verdict {
        if attributes.user.is_in(Identity::MASTERS) {
            return Verdict::allow("");
        }
        let node = self.node.authorize(attributes);
        if node.decision != Decision::NoOpinion {
            return node;
        }
        let rbac = self.rbac.authorize(attributes);
        if rbac.decision != Decision::NoOpinion || node.reason.is_empty() {
            return rbac;
        }
        match rbac.reason.is_empty() {
            true => node,
            false => Verdict::no_opinion(format!("{}\n{}", node.reason, rbac.reason)),
        }
    }

    /// [`Self::authorize`], as the answer to the client when it is forbidden.
    pub fn check(&self, attributes: &Attributes) -> Result<(), Status> {
        let verdict = self.authorize(attributes);
        if verdict.is_allowed() { Ok(()) } else { Err(forbidden(attributes, &verdict.reason)) }
    }
}

#[async_trait]
impl access::Authorizer for Authorizer {
    fn check_escalation(
        &self,
        identity: &Identity,
        resource: &str,
        namespace: &str,
        old: Option<&serde_json::Value>,
        object: &serde_json::Value,
    ) -> Result<(), Status> {
        escalation::check_write(self, identity, resource, namespace, old, object)
    }

    async fn authorize(&self, asked: &access::Attributes<'_>) -> access::Decision {
        let verdict = Self::authorize(self, &Attributes::from(asked));
        match verdict.decision {
            Decision::Allow => access::Decision::Allow,
            Decision::Deny | Decision::NoOpinion => access::Decision::Deny(verdict.reason),
        }
    }
}

impl From<&access::Attributes<'_>> for Attributes {
    fn from(asked: &access::Attributes<'_>) -> Self {
        Self {
            user: asked.identity.clone(),
            verb: asked.verb.to_string(),
            api_group: asked.group.to_string(),
            api_version: asked.version.to_string(),
            resource: asked.resource.to_string(),
            subresource: asked.subresource.to_string(),
            name: asked.name.to_string(),
            namespace: asked.namespace.to_string(),
            resource_request: asked.is_resource,
            path: asked.path.to_string(),
            field_selector: asked.field_selector.clone(),
            label_selector: asked.label_selector.clone(),
        }
    }
}

impl<'a> From<&'a Attributes> for access::Attributes<'a> {
    fn from(asked: &'a Attributes) -> Self {
        Self {
            identity: &asked.user,
            verb: &asked.verb,
            group: &asked.api_group,
            version: &asked.api_version,
            resource: &asked.resource,
            subresource: &asked.subresource,
            namespace: &asked.namespace,
            name: &asked.name,
            path: &asked.path,
            is_resource: asked.resource_request,
            field_selector: &asked.field_selector,
            label_selector: &asked.label_selector,
        }
    }
}

/// The 403 answer.
pub fn forbidden(attributes: &Attributes, reason: &str) -> Status {
    let mut why = attributes.to_string().replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    if !reason.is_empty() {
        why = format!("{why}: {reason}");
    }
    let of = GroupResource { group: &attributes.api_group, resource: &attributes.resource };
    match attributes.resource.is_empty() {
        true => Status::new(403, "Forbidden", format!("forbidden: {why}")),
        false => Status::forbidden(of, &attributes.name, why),
    }
}

impl fmt::Display for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (user, verb) = (&self.user.username, &self.verb);
        if !self.resource_request {
            return write!(f, "User {user:?} cannot {verb} path {:?}", self.path);
        }
        let slash = if self.subresource.is_empty() { "" } else { "/" };
        let resource = format!("{}{slash}{}", self.resource, self.subresource);
        write!(f, "User {user:?} cannot {verb} resource {resource:?} in API group {:?} ", self.api_group)?;
        match self.namespace.is_empty() {
            true => f.write_str("at the cluster scope"),
            false => write!(f, "in the namespace {:?}", self.namespace),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubelets_watch_of_its_pods_is_allowed() {
        let authorizer = Authorizer { node: node::NodeAuthorizer::detached(), rbac: rbac::Rbac::detached() };
        let node = Identity::new("system:node:a", &["system:nodes"]);
        for (query, want) in [
            ("watch=1&fieldSelector=spec.nodeName%3Da", true),
            ("fieldSelector=spec.nodeName%3Da", true),
            ("fieldSelector=spec.nodeName%3Db", false),
            ("", false),
        ] {
            let query = crate::query::Query::parse(Some(query));
            let info = crate::request_info::RequestInfo::parse(&http::Method::GET, "/api/v1/pods", &query);
            let asked = Attributes::from(&access::Attributes::of(&node, &info));
            assert_eq!(authorizer.authorize(&asked).is_allowed(), want, "{query:?}");
        }
    }

    #[test]
    fn forbidden_is_said_as_upstream_says_it() {
        let pods = Attributes {
            user: Identity { username: "x".into(), ..Identity::default() },
            verb: "list".into(),
            resource: "pods".into(),
            namespace: "default".into(),
            resource_request: true,
            ..Attributes::default()
        };
        let scale = Attributes {
            api_group: "apps".into(),
            resource: "deployments".into(),
            subresource: "scale".into(),
            name: "d".into(),
            namespace: String::new(),
            verb: "get".into(),
            ..pods.clone()
        };
        let path = Attributes {
            path: "/metrics".into(),
            verb: "get".into(),
            user: pods.user.clone(),
            ..Attributes::default()
        };
        let cases = [
            (
                &pods,
                "",
                r#"pods is forbidden: User "x" cannot list resource "pods" in API group "" in the namespace "default""#,
            ),
            (
                &scale,
                "why",
                r#"deployments.apps "d" is forbidden: User "x" cannot get resource "deployments/scale" in API group "apps" at the cluster scope: why"#,
            ),
            (&path, "", r#"forbidden: User "x" cannot get path "/metrics""#),
        ];
        for (attributes, reason, want) in cases {
            let status = forbidden(attributes, reason);
            assert_eq!((status.0.code, status.0.message.as_str()), (403, want));
        }
    }
}
