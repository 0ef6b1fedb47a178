//! The API's errors: `Status` bodies with upstream's reasons, causes, codes and words.
//!
//! Upstream counterparts: k8s.io/apimachinery/pkg/api/errors/errors.go,
//! k8s.io/apiserver/pkg/endpoints/handlers/responsewriters. Every error that leaves this server is made here.
use std::borrow::Cow;
use std::fmt;

use sampan_kinds::field::go_quote;
use sampan_kinds::{ErrorList, FieldError};
use serde_json::{Map, Value, json};

/// A group and a resource, as messages name them: `pods`, `deployments.apps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupResource<'a> {
    pub group: &'a str,
    pub resource: &'a str,
}

impl fmt::Display for GroupResource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.resource)?;
        if !self.group.is_empty() {
            write!(f, ".{}", self.group)?;
        }
        Ok(())
    }
}

/// One cause in `details.causes`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cause {
    pub reason: Cow<'static, str>,
    pub message: String,
    pub field: String,
}

/// A failure as the client sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub code: u16,
    pub reason: Cow<'static, str>,
    pub message: String,
    pub group: String,
    pub kind: String,
    pub name: String,
    pub uid: String,
    pub causes: Vec<Cause>,
    pub retry_after_seconds: u32,
    /// `metadata.continue`: a token with which an expired list can go on.
    pub continue_token: String,
    /// Whether `details` is there at all.
    pub detailed: bool,
    /// The message is the answer, as plain text.
    pub page: bool,
}

/// The error of this crate: boxed, because it is returned everywhere and made rarely.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{}", .0.message)]
pub struct Status(pub Box<Failure>);

pub type Result<T> = std::result::Result<T, Status>;

pub const OPTIMISTIC_LOCK: &str =
    "the object has been modified; please apply your changes to the latest version and try again";

impl Status {
    pub fn new(code: u16, reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self(Box::new(Failure {
            code,
            reason: reason.into(),
            message: message.into(),
            group: String::new(),
            kind: String::new(),
            name: String::new(),
            uid: String::new(),
            causes: Vec::new(),
            retry_after_seconds: 0,
            continue_token: String::new(),
            detailed: false,
            page: false,
        }))
    }

    fn about(mut self, of: GroupResource<'_>, name: &str) -> Self {
        self.0.group = of.group.to_string();
        self.0.kind = of.resource.to_string();
        self.0.name = name.to_string();
        self.0.detailed = true;
        self
    }

    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.0.retry_after_seconds = seconds;
        self.0.detailed = true;
        self
    }

    pub fn with_continue(mut self, token: String) -> Self {
        self.0.continue_token = token;
        self
    }

    pub fn cause(
        mut self,
        reason: &'static str,
        message: impl Into<String>,
        field: impl Into<String>,
    ) -> Self {
        self.0.causes.push(Cause { reason: reason.into(), message: message.into(), field: field.into() });
        self.0.detailed = true;
        self
    }

    pub fn not_found(of: GroupResource<'_>, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{of} {} not found", go_quote(name))).about(of, name)
    }

    /// No such path, or no such resource.
    pub fn no_such_path() -> Self {
        let mut status = Self::new(404, "NotFound", "the server could not find the requested resource");
        status.0.detailed = true;
        status
    }

    /// A path outside of everything that is served.
    pub fn no_such_page() -> Self {
        let mut status = Self::new(404, "NotFound", "404 page not found\n");
        status.0.page = true;
        status
    }

    pub fn already_exists(of: GroupResource<'_>, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{of} {} already exists", go_quote(name))).about(of, name)
    }

    pub fn generate_name_conflict(of: GroupResource<'_>, name: &str) -> Self {
        let message = format!(
            "{of} {} already exists, the server was not able to generate a unique name for the object",
            go_quote(name)
        );
        Self::new(409, "AlreadyExists", message).about(of, name).retry_after(1)
    }

    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// As admission words it.
    pub fn forbidden(of: GroupResource<'_>, name: &str, why: impl fmt::Display) -> Self {
        let message = match name {
            "" => format!("{of} is forbidden: {why}"),
            _ => format!("{of} {} is forbidden: {why}", go_quote(name)),
        };
        Self::new(403, "Forbidden", message).about(of, name)
    }

    pub fn conflict(of: GroupResource<'_>, name: &str, why: impl fmt::Display) -> Self {
        let message = format!("Operation cannot be fulfilled on {of} {}: {why}", go_quote(name));
        Self::new(409, "Conflict", message).about(of, name)
    }

    pub fn apply_conflict(causes: Vec<Cause>, message: String) -> Self {
        let mut status = Self::new(409, "Conflict", message);
        status.0.causes = causes;
        status.0.detailed = true;
        status
    }

    pub fn gone(message: impl Into<String>) -> Self {
        Self::new(410, "Gone", message)
    }

    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// `kind` is the kind with its group, as `Invalid` names it.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &ErrorList) -> Self {
        let of = GroupResource { group, resource: kind };
        let mut status =
            Self::new(422, "Invalid", format!("{of} {} is invalid: {}", go_quote(name), aggregate(errors)))
                .about(of, name);
        status.0.causes = errors
            .iter()
            .map(|e| Cause { reason: e.kind.reason().into(), message: e.body(), field: e.field.clone() })
            .collect();
        status
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        Self::new(429, "TooManyRequests", message).retry_after(retry_after_seconds)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    /// A method that the path doesn't know at all.
    pub fn method_unknown() -> Self {
        let mut status = Self::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        );
        status.0.detailed = true;
        status
    }

    pub fn internal(why: impl fmt::Display) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {why}")).cause(
            "",
            why.to_string(),
            "",
        )
    }

    pub fn timeout(message: impl fmt::Display, retry_after_seconds: u32) -> Self {
        Self::new(504, "Timeout", format!("Timeout: {message}")).retry_after(retry_after_seconds)
    }

    pub fn too_large_resource_version(wanted: u64, current: u64) -> Self {
        Self::timeout(format_args!("Too large resource version: {wanted}, current: {current}"), 1).cause(
            "ResourceVersionTooLarge",
            "Too large resource version",
            "",
        )
    }

    pub fn too_large(message: impl fmt::Display) -> Self {
        Self::new(413, "RequestEntityTooLarge", format!("Request entity too large: {message}"))
    }

    pub fn not_acceptable(accepted: &[&str]) -> Self {
        let message = format!("only the following media types are accepted: {}", accepted.join(", "));
        Self::new(406, "NotAcceptable", message)
    }

    /// As upstream's router words it, before any handler sees the request.
    pub fn no_representation(accepted: &[&str]) -> Self {
        let message = format!("406: Not Acceptable\n\nAvailable representations: {}", accepted.join(", "));
        let mut status = Self::new(406, "NotAcceptable", message);
        status.0.detailed = true;
        status
    }

    /// A patch of no known kind, as upstream's router words it.
    pub fn no_such_patch() -> Self {
        let mut status = Self::new(415, "UnsupportedMediaType", "415: Unsupported Media Type");
        status.0.detailed = true;
        status
    }

    pub fn unsupported_media_type(accepted: &[&str]) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Self::new(415, "UnsupportedMediaType", message)
    }

    pub fn is_conflict(&self) -> bool {
        self.0.reason == "Conflict"
    }

    pub fn is_not_found(&self) -> bool {
        self.0.reason == "NotFound"
    }

    /// The body, as JSON.
    pub fn body(&self) -> Value {
        let failure = &*self.0;
        let mut body = Map::new();
        body.insert("kind".into(), "Status".into());
        body.insert("apiVersion".into(), "v1".into());
        let metadata = match failure.continue_token.as_str() {
            "" => json!({}),
            token => json!({"continue": token}),
        };
        body.insert("metadata".into(), metadata);
        body.insert("status".into(), "Failure".into());
        body.insert("message".into(), failure.message.clone().into());
        if !failure.reason.is_empty() {
            body.insert("reason".into(), failure.reason.as_ref().into());
        }
        if failure.detailed {
            body.insert("details".into(), details(failure));
        }
        body.insert("code".into(), failure.code.into());
        Value::Object(body)
    }
}

fn details(failure: &Failure) -> Value {
    let mut details = Map::new();
    let texts =
        [("name", &failure.name), ("group", &failure.group), ("kind", &failure.kind), ("uid", &failure.uid)];
    for (key, text) in texts {
        if !text.is_empty() {
            details.insert(key.into(), text.clone().into());
        }
    }
    if !failure.causes.is_empty() {
        let causes = failure.causes.iter().map(|cause| {
            let mut body = Map::new();
            let texts =
                [("reason", cause.reason.as_ref()), ("message", &cause.message), ("field", &cause.field)];
            for (key, text) in texts {
                if !text.is_empty() {
                    body.insert(key.into(), text.into());
                }
            }
            Value::Object(body)
        });
        details.insert("causes".into(), causes.collect());
    }
    if failure.retry_after_seconds > 0 {
        details.insert("retryAfterSeconds".into(), failure.retry_after_seconds.into());
    }
    Value::Object(details)
}

/// Upstream's aggregate: one error plain, several in brackets, doubles once.
fn aggregate(errors: &[FieldError]) -> String {
    let mut messages: Vec<String> = Vec::with_capacity(errors.len());
    for message in errors.iter().map(FieldError::to_string) {
        if !messages.contains(&message) {
            messages.push(message);
        }
    }
    match messages.len() {
        1 => messages.remove(0),
        _ => format!("[{}]", messages.join(", ")),
    }
}

/// `Success`, as deletes answer it.
pub fn success(of: GroupResource<'_>, name: &str, uid: &str) -> Value {
    let mut details = Map::new();
    for (key, text) in [("name", name), ("group", of.group), ("kind", of.resource), ("uid", uid)] {
        if !text.is_empty() {
            details.insert(key.into(), text.into());
        }
    }
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})
}

#[cfg(test)]
mod tests {
    use sampan_kinds::Path;

    use super::*;

    #[test]
    fn bodies_are_upstreams() {
        let pods = GroupResource { group: "", resource: "pods" };
        let deployments = GroupResource { group: "apps", resource: "deployments" };
        let cases = [
            (Status::not_found(pods, "x"), 404, "NotFound", "pods \"x\" not found"),
            (
                Status::already_exists(deployments, "x"),
                409,
                "AlreadyExists",
                "deployments.apps \"x\" already exists",
            ),
            (
                Status::conflict(pods, "x", OPTIMISTIC_LOCK),
                409,
                "Conflict",
                "Operation cannot be fulfilled on pods \"x\": the object has been modified; please apply your \
                 changes to the latest version and try again",
            ),
            (
                Status::too_large_resource_version(7, 3),
                504,
                "Timeout",
                "Timeout: Too large resource version: 7, current: 3",
            ),
        ];
        for (status, code, reason, message) in cases {
            let body = status.body();
            assert_eq!(body["code"], code);
            assert_eq!(body["reason"], reason);
            assert_eq!(body["message"], message);
        }
        let errors = vec![
            FieldError::required(&Path::new("spec").child("a"), ""),
            FieldError::invalid(&Path::new("spec").child("b"), "v", "bad"),
        ];
        let body = Status::invalid("apps", "Deployment", "d", &errors).body();
        assert_eq!(
            body["message"],
            "Deployment.apps \"d\" is invalid: [spec.a: Required value, spec.b: Invalid value: \"v\": bad]"
        );
        assert_eq!(body["details"]["kind"], "Deployment");
        assert_eq!(body["details"]["causes"][1]["reason"], "FieldValueInvalid");
        assert_eq!(body["details"]["causes"][1]["field"], "spec.b");
    }
}
