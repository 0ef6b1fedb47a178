//! Field errors and paths, with upstream's words (k8s.io/apimachinery/pkg/util/validation/field).
use std::fmt;

use serde_json::Value;

/// What is wrong with a field. The names are those of `StatusCause.reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorType {
    NotFound,
    Required,
    Duplicate,
    Invalid,
    NotSupported,
    Forbidden,
    TooLong,
    TooMany,
    InternalError,
    TypeInvalid,
}

impl ErrorType {
    /// The machine-readable reason: `FieldValueInvalid` and its like.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotFound => "FieldValueNotFound",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::InternalError => "InternalError",
            Self::TypeInvalid => "FieldValueTypeInvalid",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::NotFound => "Not found",
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::InternalError => "Internal error",
        }
    }
}

/// One thing wrong with one field.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    pub kind: ErrorType,
    pub field: String,
    pub bad_value: Value,
    pub detail: String,
}

pub type ErrorList = Vec<FieldError>;

impl FieldError {
    fn new(kind: ErrorType, path: &Path, bad_value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self { kind, field: path.to_string(), bad_value: bad_value.into(), detail: detail.into() }
    }
    pub fn required(path: &Path, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Required, path, "", detail)
    }
    pub fn invalid(path: &Path, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Invalid, path, value, detail)
    }
    pub fn type_invalid(path: &Path, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::TypeInvalid, path, value, detail)
    }
    pub fn duplicate(path: &Path, value: impl Into<Value>) -> Self {
        Self::new(ErrorType::Duplicate, path, value, "")
    }
    pub fn not_found(path: &Path, value: impl Into<Value>) -> Self {
        Self::new(ErrorType::NotFound, path, value, "")
    }
    pub fn forbidden(path: &Path, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Forbidden, path, "", detail)
    }
    pub fn internal(path: &Path, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::InternalError, path, "", detail)
    }
    /// One `Invalid` for every message a check of [`crate::names`] returned.
    pub fn invalid_each(path: &Path, value: &str, messages: Vec<String>) -> impl Iterator<Item = Self> {
        messages.into_iter().map(move |message| Self::invalid(path, value, message))
    }
    /// The same error with more detail after it.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }
    /// `supported` is sorted and quoted as upstream does where it has a set.
    pub fn not_supported(path: &Path, value: impl Into<Value>, supported: &[&str]) -> Self {
        let mut sorted = supported.to_vec();
        sorted.sort_unstable();
        Self::not_supported_as_listed(path, value, &sorted)
    }
    /// In the given order, for the places where upstream has a list.
    pub fn not_supported_as_listed(path: &Path, value: impl Into<Value>, supported: &[&str]) -> Self {
        let detail = match supported.is_empty() {
            true => String::new(),
            false => {
                let quoted: Vec<String> = supported.iter().map(|s| go_quote(s)).collect();
                format!("supported values: {}", quoted.join(", "))
            }
        };
        Self::new(ErrorType::NotSupported, path, value, detail)
    }
    /// The value itself is left out of the message, as upstream does.
    pub fn too_long(path: &Path, max_length: usize) -> Self {
        let detail = format!("may not be more than {max_length} bytes");
        Self::new(ErrorType::TooLong, path, "<value omitted>", detail)
    }
    pub fn too_many(path: &Path, actual: usize, max: usize) -> Self {
        let items = if max == 1 { "item" } else { "items" };
        Self::new(ErrorType::TooMany, path, actual, format!("must have at most {max} {items}"))
    }

    /// The message without the field: what `StatusCause.message` carries.
    pub fn body(&self) -> String {
        let words = self.kind.words();
        let mut body = match self.kind {
            ErrorType::Required | ErrorType::Forbidden | ErrorType::TooLong | ErrorType::InternalError => {
                words.to_string()
            }
            _ => format!("{words}: {}", go_value(&self.bad_value)),
        };
        if !self.detail.is_empty() {
            body.push_str(": ");
            body.push_str(&self.detail);
        }
        body
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.body())
    }
}

/// A value as upstream's messages show it: strings quoted, other scalars plain, the rest as JSON.
fn go_value(value: &Value) -> String {
    match value {
        Value::String(s) => go_quote(s),
        Value::Null => "null".to_string(),
        other => other.to_string(),
    }
}

/// Quotes as Go's `%q` does.
pub fn go_quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\u{7}' => quoted.push_str("\\a"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{b}' => quoted.push_str("\\v"),
            '\u{c}' => quoted.push_str("\\f"),
            c if c.is_ascii_control() => quoted.push_str(&format!("\\x{:02x}", c as u32)),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", c as u32)),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Where a field is: `spec.containers[0].name`, `metadata.labels[app]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path(String);

impl Path {
    /// A path that starts at `name`; an empty name is the object itself.
    pub fn new(name: &str) -> Self {
        Self(name.to_string())
    }
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        match self.0.is_empty() {
            true => Self(name.to_string()),
            false => Self(format!("{}.{name}", self.0)),
        }
    }
    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }
    #[must_use]
    pub fn key(&self, key: &str) -> Self {
        Self(format!("{}[{key}]", self.0))
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "[]" } else { &self.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_upstreams() {
        let path = Path::new("spec").child("containers").index(0).child("name");
        let cases = [
            (FieldError::required(&path, ""), "spec.containers[0].name: Required value"),
            (FieldError::invalid(&path, "A", "bad"), "spec.containers[0].name: Invalid value: \"A\": bad"),
            (
                FieldError::invalid(&path, "a\"\u{1}b", "bad"),
                "spec.containers[0].name: Invalid value: \"a\\\"\\x01b\": bad",
            ),
            (FieldError::invalid(&path, 3, "bad"), "spec.containers[0].name: Invalid value: 3: bad"),
            (FieldError::forbidden(&path, "no"), "spec.containers[0].name: Forbidden: no"),
            (FieldError::duplicate(&path, "a"), "spec.containers[0].name: Duplicate value: \"a\""),
            (
                FieldError::not_supported(&path, "x", &["b", "a"]),
                "spec.containers[0].name: Unsupported value: \"x\": supported values: \"a\", \"b\"",
            ),
            (
                FieldError::too_long(&path.key("k"), 5),
                "spec.containers[0].name[k]: Too long: may not be more than 5 bytes",
            ),
        ];
        for (error, want) in cases {
            assert_eq!(error.to_string(), want);
        }
    }
}
