//! What controllers ask of an API error. Upstream counterpart: apimachinery api/errors.
use kube::Error;

fn reason(error: &Error) -> &str {
    match error {
        Error::Api(status) => &status.reason,
        _ => "",
    }
}

fn code(error: &Error) -> u16 {
    match error {
        Error::Api(status) => status.code,
        _ => 0,
    }
}

pub fn is_not_found(error: &Error) -> bool {
    reason(error) == "NotFound" || code(error) == 404
}

pub fn is_already_exists(error: &Error) -> bool {
    reason(error) == "AlreadyExists"
}

pub fn is_conflict(error: &Error) -> bool {
    reason(error) == "Conflict"
}

pub fn is_invalid(error: &Error) -> bool {
    reason(error) == "Invalid"
}

pub fn is_forbidden(error: &Error) -> bool {
    reason(error) == "Forbidden"
}

pub fn is_method_not_supported(error: &Error) -> bool {
    reason(error) == "MethodNotAllowed" || code(error) == 405
}

/// Whether the error's details hold a cause of that type.
pub fn has_cause(error: &Error, cause: &str) -> bool {
    let Error::Api(status) = error else { return false };
    status.details.iter().flat_map(|d| &d.causes).any(|c| c.reason == cause)
}

/// The namespace is going away, so no creation in it can succeed.
pub fn is_namespace_terminating(error: &Error) -> bool {
    has_cause(error, "NamespaceTerminating")
}

/// The API's own sentence.
pub fn message(error: &Error) -> String {
    match error {
        Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// `Ok(None)` where the object is gone.
pub fn found<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if is_not_found(&e) => Ok(None),
        Err(e) => Err(e),
    }
}
