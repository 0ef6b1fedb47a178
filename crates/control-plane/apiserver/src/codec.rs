//! Bytes to values and back: request bodies by the schema's rules, answers in YAML and protobuf.
//!
//! Upstream counterparts: k8s.io/apimachinery/pkg/runtime/serializer, …/endpoints/handlers/rest.go (the words of
//! decoding errors).
use bytes::Bytes;
use sampan_schema::{Type, decode, proto};
use serde_json::{Map, Value};

use crate::call::{Call, FieldValidation};
use crate::negotiate::{self, Format};
use crate::status::{Result, Status};
use crate::storage::api_version;

/// The built-in type of a kind.
pub fn type_of(group: &str, version: &str, kind: &str) -> Option<&'static Type> {
    sampan_schema::by_gvk(group, version, kind)
}

pub fn status_type() -> Option<&'static Type> {
    type_of("", "v1", "Status")
}

/// A type of `meta.k8s.io/v1`.
pub fn meta_type(kind: &str) -> Option<&'static Type> {
    type_of("meta.k8s.io", "v1", kind)
        .or_else(|| sampan_schema::by_name(&format!("io.k8s.apimachinery.pkg.apis.meta.v1.{kind}")))
}

pub fn to_yaml(value: &Value) -> Result<Bytes> {
    serde_yaml_ng::to_string(value).map(Bytes::from).map_err(Status::internal)
}

pub fn to_protobuf(ty: Option<&Type>, value: &Value) -> Result<Bytes> {
    let not_acceptable = || Status::not_acceptable(&[negotiate::JSON, negotiate::YAML]);
    let ty = ty.ok_or_else(not_acceptable)?;
    if !ty.has_wire {
        return Err(not_acceptable());
    }
    proto::encode(ty, value).map(Bytes::from).map_err(Status::internal)
}

/// What a body is to be.
pub struct Expected<'a> {
    pub group: &'a str,
    pub version: &'a str,
    pub kind: &'a str,
    pub ty: &'a Type,
}

impl Expected<'_> {
    pub fn api_version(&self) -> String {
        api_version(self.group, self.version)
    }
}

/// Reads a body by the request's content type and field validation; what is missing of apiVersion and kind is
/// filled in.
pub fn read(call: &Call, body: &[u8], expected: &Expected<'_>, validation: FieldValidation) -> Result<Value> {
    let format = negotiate::input_format(&call.parts.headers)?;
    let (value, strict) = parse(body, expected, format)?;
    note_strict(call, strict, validation, |why| cannot_be_handled(expected, &value, why))?;
    Ok(value)
}

/// What the reader of kind and version takes a body for.
const TYPE_META: &str = "struct { APIVersion string \"json:\\\"apiVersion,omitempty\\\"\"; \
     Kind string \"json:\\\"kind,omitempty\\\"\" }";

/// Reads bytes of that format; what a strict reader would object to comes along.
pub fn parse(body: &[u8], expected: &Expected<'_>, format: Format) -> Result<(Value, Vec<String>)> {
    let unrecognized = |why: String| {
        if expected.kind == DELETE_OPTIONS {
            return Status::bad_request(why);
        }
        let (kind, summary) = (expected.kind, summary(body));
        Status::bad_request(format!(
            "the object provided is unrecognized (must be of type {kind}): {why} ({summary})"
        ))
    };
    let no_kind = |why: String| unrecognized(format!("couldn't get version/kind; json parse error: {why}"));
    let (mut value, mut strict) = match format {
        Format::Json | Format::Yaml => {
            let decoded = match format {
                Format::Json => decode::json(body, Some(expected.ty)),
                _ => decode::yaml(body, Some(expected.ty)),
            };
            let decoded = decoded.map_err(|e| match &e {
                decode::DecodeError::Json(_)
                    if serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok() =>
                {
                    cannot_be_handled(expected, &Value::Null, e.to_string())
                }
                decode::DecodeError::Json(_) => no_kind(e.to_string()),
                _ => unrecognized(e.to_string()),
            })?;
            let strict = decoded.strict.iter().map(ToString::to_string).collect();
            (decoded.value, strict)
        }
        Format::Protobuf => {
            let default = (expected.api_version(), expected.kind);
            let value = proto::decode(body, Some((&default.0, default.1)))
                .map_err(|e| unrecognized(e.to_string()))?;
            (value, Vec::new())
        }
    };
    if value.is_null() {
        value = Value::Object(Map::new());
    }
    if !value.is_object() {
        return Err(no_kind(cannot_unmarshal(&value, TYPE_META)));
    }
    for (field, name) in [("apiVersion", "apiVersion"), ("kind", "kind")] {
        if value.get(field).is_some_and(|value| !value.is_string() && !value.is_null()) {
            let what = json_kind(&value[field]);
            return Err(no_kind(format!(
                "json: cannot unmarshal {what} into Go struct field .{name} of type string"
            )));
        }
    }
    let version = value.get("apiVersion").and_then(Value::as_str).unwrap_or("");
    if version.matches('/').count() > 1 {
        return Err(unrecognized(format!("unexpected GroupVersion string: {version}")));
    }
    check_kind(&mut value, expected)?;
    let conformed = sampan_schema::conform::conform(expected.ty, &mut value)
        .map_err(|e| cannot_be_handled(expected, &value, e.to_string()))?;
    strict.extend(conformed.unknown.iter().map(|path| format!("unknown field {path:?}")));
    strict.dedup();
    Ok((value, strict))
}

/// What Go's reader calls a value.
fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// What Go says of JSON that isn't what it should be.
pub fn cannot_unmarshal(value: &Value, wanted: &str) -> String {
    format!("json: cannot unmarshal {} into Go value of type {wanted}", json_kind(value))
}

/// Fails, warns or passes over what a strict reader objects to.
pub fn note_strict(
    call: &Call,
    strict: Vec<String>,
    validation: FieldValidation,
    fail: impl FnOnce(String) -> Status,
) -> Result<()> {
    match validation {
        FieldValidation::Strict if !strict.is_empty() => {
            let of_yaml = |text: &String| text.starts_with("line ") && text.ends_with("already set in map");
            let (lines, mut others): (Vec<String>, Vec<String>) = strict.into_iter().partition(of_yaml);
            if !lines.is_empty() {
                others.insert(0, format!("yaml: unmarshal errors:\n  {}", lines.join("\n  ")));
            }
            Err(fail(format!("strict decoding error: {}", others.join(", "))))
        }
        FieldValidation::Warn => {
            strict.into_iter().for_each(|warning| call.warn(warning));
            Ok(())
        }
        _ => Ok(()),
    }
}

const DELETE_OPTIONS: &str = "DeleteOptions";
const SCHEME: &str = "pkg/api/legacyscheme/scheme.go:30";
const META_SCHEME: &str = "pkg/apis/meta/internalversion/scheme/register.go:27";

fn cannot_be_handled(expected: &Expected<'_>, value: &Value, why: String) -> Status {
    if expected.kind == DELETE_OPTIONS {
        return Status::bad_request(why);
    }
    let kind = value.get("kind").and_then(Value::as_str).unwrap_or(expected.kind);
    let stated = value.get("apiVersion").and_then(Value::as_str).filter(|version| !version.is_empty());
    let version = stated.map_or(expected.version, |version| version.rsplit('/').next().unwrap_or(version));
    Status::bad_request(format!(
        "{kind} in version {version:?} cannot be handled as a {}: {why}",
        expected.kind
    ))
}

fn not_registered(api_version: &str, kind: &str, scheme: &str) -> String {
    format!("no kind {kind:?} is registered for version {api_version:?} in scheme {scheme:?}")
}

/// Why an object of that version and kind is not one of the wanted kind.
pub fn wrong_kind(version: &str, kind: &str, wanted_group: &str, wanted_kind: &str) -> String {
    let (group, short) = version.split_once('/').unwrap_or(("", version));
    match type_of(group, short, kind) {
        Some(_) => {
            let package = package(wanted_group);
            format!("converting ({short}.{kind}) to ({package}.{wanted_kind}): unknown conversion")
        }
        None => not_registered(version, kind, SCHEME),
    }
}

fn check_kind(value: &mut Value, expected: &Expected<'_>) -> Result<()> {
    let text = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or("").to_string();
    let wanted = expected.api_version();
    let (version, kind) = (text("apiVersion"), text("kind"));
    // DeleteOptions are a kind of every group and version; clients send them as of their resource's.
    if expected.kind == DELETE_OPTIONS {
        if !kind.is_empty() && kind != DELETE_OPTIONS {
            let version = if version.is_empty() { "meta.k8s.io/v1" } else { &version };
            return Err(Status::bad_request(not_registered(version, &kind, META_SCHEME)));
        }
    } else {
        let version = if version.is_empty() { wanted.as_str() } else { &version };
        let kind = if kind.is_empty() { expected.kind } else { &kind };
        if kind != expected.kind || (version != wanted && !is_known(version, kind)) {
            let why = wrong_kind(version, kind, expected.group, expected.kind);
            return Err(cannot_be_handled(expected, value, why));
        }
        if version != wanted {
            return Err(Status::bad_request(format!(
                "the API version in the data ({version}) does not match the expected API version ({wanted})"
            )));
        }
    }
    value["apiVersion"] = wanted.into();
    value["kind"] = expected.kind.into();
    Ok(())
}

fn is_known(api_version: &str, kind: &str) -> bool {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    type_of(group, version, kind).is_some()
}

/// Upstream's package of a group's internal types.
pub fn package(group: &str) -> &str {
    if group.is_empty() { "core" } else { group.split('.').next().unwrap_or(group) }
}

/// The beginning of a body, as upstream shows it in errors.
fn summary(body: &[u8]) -> String {
    const LENGTH: usize = 30;
    match body {
        [] => "<empty>".to_string(),
        [b'{', ..] if body.len() > LENGTH => format!("{} ...", String::from_utf8_lossy(&body[..LENGTH])),
        [b'{', ..] => String::from_utf8_lossy(body).into_owned(),
        _ => {
            let hex = body.iter().take(LENGTH).map(|byte| format!("{byte:02x}")).collect::<String>();
            if body.len() > LENGTH { format!("{hex} ...") } else { hex }
        }
    }
}
