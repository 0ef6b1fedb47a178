//! Answers what is posted to reviews and to `serviceaccounts/token`. Nothing of it is stored.
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

use super::{Authenticator, ServiceAccountTokens};
use crate::access::{ReviewRequest, Reviews};
use crate::authz::{Authorizer, reviews};
use crate::status::{Result, Status};

/// The virtual resources of authentication.k8s.io and authorization.k8s.io.
pub struct VirtualResources {
    pub authenticator: Arc<Authenticator>,
    pub authorizer: Authorizer,
    pub service_accounts: Arc<ServiceAccountTokens>,
}

#[async_trait]
impl Reviews for VirtualResources {
    async fn review(&self, request: &ReviewRequest<'_>, object: Value) -> Result<Value> {
        let (user, info) = (request.identity, request.info);
        match request.kind {
            "TokenRequest" => self.service_accounts.request(&info.namespace, &info.name, object).await,
            "TokenReview" => self.authenticator.token_review(object).await,
            "SelfSubjectReview" => Ok(reviews::self_subject_review(user, object)),
            "SubjectAccessReview" => reviews::subject_access_review(&self.authorizer, object),
            "SelfSubjectAccessReview" => reviews::self_subject_access_review(&self.authorizer, user, object),
            "LocalSubjectAccessReview" => {
                reviews::local_subject_access_review(&self.authorizer, &info.namespace, object)
            }
            "SelfSubjectRulesReview" => reviews::self_subject_rules_review(&self.authorizer, user, object),
            kind => Err(Status::internal(format!("nobody answers a {kind}"))),
        }
    }
}
