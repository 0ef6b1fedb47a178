//! Bytes to values and back: request bodies by the schema's rules, answers in YAML and protobuf.
//!
//! Upstream counterparts: k8s.io/apimachinery/pkg/runtime/serializer, …/endpoints/handlers/rest.go (the words of
//! decoding errors).
use bytes::Bytes;
use sampan_schema::{Type, decode, proto};
use serde_json::Value;

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

/// Reads bytes of that format; what a strict reader would object to comes along.
pub fn parse(body: &[u8], expected: &Expected<'_>, format: Format) -> Result<(Value, Vec<String>)> {
    let unrecognized = |why: String| {
        let summary = summary(body);
        let kind = expected.kind;
        Status::bad_request(format!(
            "the object provided is unrecognized (must be of type {kind}): {why} ({summary})"
        ))
    };
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
                _ => unrecognized(format!("couldn't get version/kind; json parse error: {e}")),
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
    if !value.is_object() {
        let why = "couldn't get version/kind; json parse error: the body is not a JSON object".to_string();
        return Err(unrecognized(why));
    }
    check_kind(&mut value, expected)?;
    let conformed = sampan_schema::conform::conform(expected.ty, &mut value)
        .map_err(|e| cannot_be_handled(expected, &value, e.to_string()))?;
    strict.extend(conformed.unknown.iter().map(|path| format!("unknown field {path:?}")));
    strict.dedup();
    Ok((value, strict))
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
            Err(fail(format!("strict decoding error: {}", strict.join(", "))))
        }
        FieldValidation::Warn => {
            strict.into_iter().for_each(|warning| call.warn(warning));
            Ok(())
        }
        _ => Ok(()),
    }
}

fn cannot_be_handled(expected: &Expected<'_>, value: &Value, why: String) -> Status {
    let kind = value.get("kind").and_then(Value::as_str).unwrap_or(expected.kind);
    Status::bad_request(format!(
        "{kind} in version {:?} cannot be handled as a {}: {why}",
        expected.version, expected.kind
    ))
}

fn check_kind(value: &mut Value, expected: &Expected<'_>) -> Result<()> {
    let text = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or("").to_string();
    let (version, kind) = (text("apiVersion"), text("kind"));
    let wanted = expected.api_version();
    if !kind.is_empty() && kind != expected.kind {
        let (group, version) = version.split_once('/').unwrap_or(("", &version));
        let known = type_of(group, version, &kind).is_some();
        return Err(match known {
            true => cannot_be_handled(expected, value, {
                let (group, wanted_group) = (group_text(group), group_text(expected.group));
                format!(
                    "converting ({group}.{kind}) to ({wanted_group}.{}): unknown conversion",
                    expected.kind
                )
            }),
            false => Status::bad_request(format!(
                "no kind {kind:?} is registered for version {:?} in scheme \"pkg/api/legacyscheme/scheme.go:30\"",
                api_version(group, version)
            )),
        });
    }
    // DeleteOptions are a kind of every group and version; clients send them as of their resource's.
    if !version.is_empty() && version != wanted && kind != "DeleteOptions" {
        return Err(Status::bad_request(format!(
            "the API version in the data ({version}) does not match the expected API version ({wanted})"
        )));
    }
    value["apiVersion"] = wanted.into();
    value["kind"] = expected.kind.into();
    Ok(())
}

fn group_text(group: &str) -> &str {
    if group.is_empty() { "core" } else { group }
}

/// The beginning of a body, as upstream shows it in errors.
fn summary(body: &[u8]) -> String {
    const LENGTH: usize = 30;
    match body {
        [] => "<empty>".to_string(),
        [b'{', ..] if body.len() > LENGTH => format!("{:?} ...", String::from_utf8_lossy(&body[..LENGTH])),
        [b'{', ..] => format!("{:?}", String::from_utf8_lossy(body)),
        _ => {
            let hex = body.iter().take(LENGTH).map(|byte| format!("{byte:02x}")).collect::<String>();
            if body.len() > LENGTH { format!("{hex} ...") } else { hex }
        }
    }
}
