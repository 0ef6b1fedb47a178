//! The review APIs: what a user may do, and who one is.
//!
//! Upstream counterparts: pkg/registry/authorization/* and pkg/registry/authentication/selfsubjectreview. Each
//! function takes the review as it came and answers it with its status filled in; nothing is stored.
use k8s_openapi::api::authorization::v1::{
    NonResourceAttributes, ResourceAttributes, SelfSubjectAccessReviewSpec, SubjectAccessReviewSpec,
};
use k8s_openapi::api::rbac::v1::PolicyRule;
use sampan_client::Identity;
use sampan_kinds::{ErrorList, FieldError, Path};
use serde_json::{Value, json};

use super::node::node_name;
use super::{Attributes, Authorizer, Decision};
use crate::selector::{FieldSelector, LabelSelector, Term};
use crate::status::Status;

const GROUP: &str = "authorization.k8s.io";

/// `POST subjectaccessreviews`
pub fn subject_access_review(authorizer: &Authorizer, review: Value) -> Result<Value, Status> {
    let spec: SubjectAccessReviewSpec = spec_of(&review)?;
    let mut errors = validate(spec.resource_attributes.as_ref(), spec.non_resource_attributes.as_ref());
    validate_subject(&spec, &mut errors);
    validate_metadata(&review, &mut errors);
    finish(authorizer, "SubjectAccessReview", review, errors, attributes_of(spec))
}

/// `POST selfsubjectaccessreviews`
pub fn self_subject_access_review(
    authorizer: &Authorizer,
    user: &Identity,
    review: Value,
) -> Result<Value, Status> {
    let spec: SelfSubjectAccessReviewSpec = spec_of(&review)?;
    let mut errors = validate(spec.resource_attributes.as_ref(), spec.non_resource_attributes.as_ref());
    validate_metadata(&review, &mut errors);
    let attributes = attributes(user.clone(), spec.resource_attributes, spec.non_resource_attributes);
    finish(authorizer, "SelfSubjectAccessReview", review, errors, attributes)
}

/// `POST namespaces/{namespace}/localsubjectaccessreviews`
pub fn local_subject_access_review(
    authorizer: &Authorizer,
    namespace: &str,
    review: Value,
) -> Result<Value, Status> {
    let spec: SubjectAccessReviewSpec = spec_of(&review)?;
    let mut errors = validate(spec.resource_attributes.as_ref(), spec.non_resource_attributes.as_ref());
    validate_subject(&spec, &mut errors);
    let own = review.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or_default().to_string();
    let path = Path::new("spec");
    match &spec.resource_attributes {
        Some(resource) if resource.namespace.as_deref().unwrap_or_default() != own => {
            let value = resource.namespace.clone().unwrap_or_default();
            let path = path.child("resourceAttributes").child("namespace");
            errors.push(FieldError::invalid(&path, value, "must match metadata.namespace"));
        }
        _ => {}
    }
    if spec.non_resource_attributes.is_some() {
        let value = review.pointer("/spec/nonResourceAttributes").cloned().unwrap_or_default();
        let words = "disallowed on this kind of request";
        errors.push(FieldError::invalid(&path.child("nonResourceAttributes"), value, words));
    }
    if errors.is_empty() && own != namespace {
        let message = format!("spec.resourceAttributes.namespace must match namespace: {namespace}");
        return Err(Status::bad_request(message));
    }
    finish(authorizer, "LocalSubjectAccessReview", review, errors, attributes_of(spec))
}

/// `POST selfsubjectrulesreviews`
pub fn self_subject_rules_review(
    authorizer: &Authorizer,
    user: &Identity,
    mut review: Value,
) -> Result<Value, Status> {
    let namespace = review.pointer("/spec/namespace").and_then(Value::as_str).unwrap_or_default().to_string();
    if namespace.is_empty() {
        return Err(Status::bad_request("no namespace on request"));
    }
    let (mut rules, mut error) = authorizer.rbac.rules_for(user, &namespace);
    if user.is_in(Identity::MASTERS) {
        let any = || vec!["*".to_string()];
        rules.insert(
            0,
            PolicyRule {
                verbs: any(),
                api_groups: Some(any()),
                resources: Some(any()),
                ..PolicyRule::default()
            },
        );
        rules.insert(1, PolicyRule { verbs: any(), non_resource_urls: Some(any()), ..PolicyRule::default() });
    }
    let is_node = node_name(user).is_some();
    if is_node {
        error = Some("node authorizer does not support user rule resolution".to_string());
    }
    let listed = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|l| !l.is_empty());
    let resources: Vec<Value> = rules
        .iter()
        .filter(|r| listed(&r.resources))
        .map(|r| {
            let mut rule = json!({"verbs": r.verbs, "apiGroups": r.api_groups, "resources": r.resources});
            if listed(&r.resource_names) {
                rule["resourceNames"] = json!(r.resource_names);
            }
            rule
        })
        .collect();
    let paths: Vec<Value> = rules
        .iter()
        .filter(|r| listed(&r.non_resource_urls))
        .map(|r| json!({"verbs": r.verbs, "nonResourceURLs": r.non_resource_urls}))
        .collect();
    let mut status = json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": is_node});
    if let Some(error) = error {
        status["evaluationError"] = json!(error);
    }
    // upstream answers with an empty spec
    review["spec"] = json!({});
    review["status"] = status;
    Ok(review)
}

/// `POST selfsubjectreviews` of authentication.k8s.io
pub fn self_subject_review(user: &Identity, mut review: Value) -> Value {
    let now = sampan_world::clock::now_seconds().to_string();
    review["metadata"] = json!({"creationTimestamp": now});
    review["status"] = json!({"userInfo": user_info(user)});
    review
}

/// A user as `authentication.k8s.io/v1` UserInfo has it.
pub fn user_info(user: &Identity) -> Value {
    let mut info = json!({"username": user.username, "groups": user.groups});
    if !user.uid.is_empty() {
        info["uid"] = json!(user.uid);
    }
    if !user.extra.is_empty() {
        info["extra"] = json!(user.extra);
    }
    info
}

fn spec_of<T: serde::de::DeserializeOwned>(review: &Value) -> Result<T, Status> {
    let spec = review.get("spec").cloned().unwrap_or_else(|| json!({}));
    serde_json::from_value(spec).map_err(|e| Status::bad_request(e.to_string()))
}

fn validate(resource: Option<&ResourceAttributes>, other: Option<&NonResourceAttributes>) -> ErrorList {
    let path = Path::new("spec");
    match (resource, other) {
        (Some(_), Some(other)) => vec![FieldError::invalid(
            &path.child("nonResourceAttributes"),
            serde_json::to_value(other).unwrap_or_default(),
            "cannot be specified in combination with resourceAttributes",
        )],
        (None, None) => vec![FieldError::invalid(
            &path.child("resourceAttributes"),
            Value::Null,
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        )],
        _ => Vec::new(),
    }
}

fn validate_subject(spec: &SubjectAccessReviewSpec, errors: &mut ErrorList) {
    let user = spec.user.as_deref().unwrap_or_default();
    if user.is_empty() && spec.groups.as_ref().is_none_or(Vec::is_empty) {
        let path = Path::new("spec").child("user");
        errors.push(FieldError::invalid(&path, user, "at least one of user or group must be specified"));
    }
}

fn validate_metadata(review: &Value, errors: &mut ErrorList) {
    let set = review.get("metadata").and_then(Value::as_object).is_some_and(|m| {
        m.iter().any(|(key, value)| key != "managedFields" && key != "creationTimestamp" && !value.is_null())
    });
    if set {
        let metadata = review.get("metadata").cloned().unwrap_or_default();
        errors.push(FieldError::invalid(&Path::new("metadata"), metadata, "must be empty"));
    }
}

fn attributes_of(spec: SubjectAccessReviewSpec) -> (Attributes, Option<String>) {
    let user = Identity {
        username: spec.user.unwrap_or_default(),
        uid: spec.uid.unwrap_or_default(),
        groups: spec.groups.unwrap_or_default(),
        extra: spec.extra.unwrap_or_default().into_iter().map(|(k, v)| (k.to_lowercase(), v)).collect(),
    };
    attributes(user, spec.resource_attributes, spec.non_resource_attributes)
}

/// What is asked, and what of its selectors could not be understood (which only asks for more).
fn attributes(
    user: Identity,
    resource: Option<ResourceAttributes>,
    other: Option<NonResourceAttributes>,
) -> (Attributes, Option<String>) {
    let mut error = None;
    let Some(resource) = resource else {
        let other = other.unwrap_or_default();
        let (path, verb) = (other.path.unwrap_or_default(), other.verb.unwrap_or_default());
        return (Attributes { user, path, verb, ..Attributes::default() }, None);
    };
    let mut field_selector = FieldSelector::default();
    if let Some(selector) = &resource.field_selector {
        if let Some(raw) = selector.raw_selector.as_deref().filter(|r| !r.is_empty()) {
            match FieldSelector::parse(raw) {
                Ok(parsed) => field_selector = parsed,
                Err(e) => error = Some(e.to_string()),
            }
        }
        let requirements = selector.requirements.as_deref().unwrap_or_default();
        let terms = requirements.iter().filter_map(|r| match (r.operator.as_str(), r.values.as_deref()) {
            ("In", Some([value])) => Some(Term { field: r.key.clone(), value: value.clone(), equal: true }),
            ("NotIn", Some([value])) => {
                Some(Term { field: r.key.clone(), value: value.clone(), equal: false })
            }
            _ => None,
        });
        if !requirements.is_empty() {
            field_selector = terms.collect();
        }
    }
    let mut label_selector = LabelSelector::default();
    if let Some(raw) = resource.label_selector.as_ref().and_then(|s| s.raw_selector.as_deref()) {
        match LabelSelector::parse(raw) {
            Ok(parsed) => label_selector = parsed,
            Err(e) => error = Some(e.to_string()),
        }
    }
    let version = resource.version.filter(|v| !v.is_empty()).unwrap_or_else(|| "*".to_string());
    let attributes = Attributes {
        user,
        verb: resource.verb.unwrap_or_default(),
        api_group: resource.group.unwrap_or_default(),
        api_version: version,
        resource: resource.resource.unwrap_or_default(),
        subresource: resource.subresource.unwrap_or_default(),
        name: resource.name.unwrap_or_default(),
        namespace: resource.namespace.unwrap_or_default(),
        resource_request: true,
        path: String::new(),
        field_selector,
        label_selector,
    };
    (attributes, error)
}

fn finish(
    authorizer: &Authorizer,
    kind: &str,
    mut review: Value,
    errors: ErrorList,
    (attributes, error): (Attributes, Option<String>),
) -> Result<Value, Status> {
    if !errors.is_empty() {
        return Err(Status::invalid(GROUP, kind, "", &errors));
    }
    let verdict = authorizer.authorize(&attributes);
    let mut status = json!({"allowed": verdict.is_allowed()});
    if verdict.decision == Decision::Deny {
        status["denied"] = json!(true);
    }
    if !verdict.reason.is_empty() {
        status["reason"] = json!(verdict.reason);
    }
    if let Some(error) = error {
        status["evaluationError"] = json!(error);
    }
    review["status"] = status;
    Ok(review)
}

#[cfg(test)]
mod tests {
    use super::super::rbac::tests::{bind, cluster_role, rule};
    use super::super::{node, rbac};
    use super::*;

    fn authorizer() -> Authorizer {
        let rbac = rbac::Rbac::detached();
        rbac.cluster_roles.put(cluster_role("r", vec![rule(&["get"], &[""], &["pods"], &[])]));
        rbac.role_bindings.put(bind("ns", "b", "ClusterRole", "r", ("User", "jane")));
        Authorizer { node: node::NodeAuthorizer::detached(), rbac }
    }

    #[test]
    fn answers_reviews() {
        let authorizer = authorizer();
        let resource = json!({"verb": "get", "resource": "pods", "namespace": "ns"});
        let review = |user: &str| json!({"spec": {"user": user, "resourceAttributes": resource.clone()}});
        let status = |review| subject_access_review(&authorizer, review).unwrap()["status"].take();
        assert_eq!(status(review("jane"))["allowed"], true);
        assert_eq!(status(review("joe")), json!({"allowed": false}));
        let jane = Identity::new("jane", &[]);
        let own = json!({"spec": {"resourceAttributes": resource.clone()}});
        assert_eq!(self_subject_access_review(&authorizer, &jane, own).unwrap()["status"]["allowed"], true);
        let rules =
            self_subject_rules_review(&authorizer, &jane, json!({"spec": {"namespace": "ns"}})).unwrap();
        assert_eq!(
            rules["status"]["resourceRules"],
            json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}])
        );
        assert_eq!(self_subject_review(&jane, json!({}))["status"]["userInfo"]["username"], "jane");

        let mut local = review("jane");
        local["metadata"] = json!({"namespace": "ns"});
        assert_eq!(
            local_subject_access_review(&authorizer, "ns", local.clone()).unwrap()["status"]["allowed"],
            true
        );
        assert_eq!(local_subject_access_review(&authorizer, "x", local).unwrap_err().0.code, 400);
        for bad in
            [json!({}), json!({"spec": {"user": "u"}}), json!({"spec": {"resourceAttributes": resource}})]
        {
            assert_eq!(subject_access_review(&authorizer, bad).unwrap_err().0.code, 422);
        }
    }
}
