//! PATCH: JSON patch, merge patch, strategic merge patch and server-side apply.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/endpoints/handlers/patch.go. A patch is made anew against each state
//! that the race leaves it with, so one without resourceVersion always lands; one with it conflicts.
use bytes::Bytes;
use http::Response;
use sampan_kinds::{ErrorList, FieldError, Path};
use sampan_schema::patch::{self, PatchError};
use sampan_schema::{conform, decode};
use serde_json::Value;

use crate::body::{self, Body};
use crate::call::{Call, WriteOptions};
use crate::codec;
use crate::managed;
use crate::negotiate;
use crate::reply;
use crate::status::{Result, Status};
use crate::write::{self, Target, text};

/// The kinds of patch, by media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchType {
    Json,
    Merge,
    Strategic,
    Apply,
}

const ACCEPTED: [&str; 4] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

impl PatchType {
    pub fn of(call: &Call) -> Result<Self> {
        match negotiate::content_type(&call.parts.headers).as_str() {
            "application/json-patch+json" => Ok(Self::Json),
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic),
            "application/apply-patch+yaml" => Ok(Self::Apply),
            _ => Err(Status::unsupported_media_type(&ACCEPTED)),
        }
    }
}

pub async fn serve(call: &Call, body: Body) -> Result<Response<Body>> {
    run(call, body, &Target::of(call)).await
}

/// Patches the target with the body.
pub async fn run(call: &Call, body: Body, target: &Target<'_>) -> Result<Response<Body>> {
    let patch_type = PatchType::of(call)?;
    let options = options(call, patch_type)?;
    let bytes = body::read(body).await?;
    let creates = patch_type == PatchType::Apply && target.subresource.is_empty();
    let target = Target { create: creates, unconditional: true, ..*target };
    let patch = Patch::parse(call, patch_type, &bytes, &options)?;
    let make = |stored: Option<&Value>| {
        let live = stored.map(|stored| call.resource.from_storage(stored.clone()));
        let mut object = patch.apply(call, target.subresource, live.as_ref(), &options)?;
        check(call, &object, stored.is_none())?;
        (call.resource.rules.defaults)(&mut object);
        if patch_type != PatchType::Apply {
            managed::track(call, &options, target.subresource, live.as_ref(), &mut object);
        }
        Ok(call.resource.to_storage(object))
    };
    let written = write::update(call, &target, &make, &options).await?;
    reply::object(call, if written.created { 201 } else { 200 }, &written.bytes, written.revision)
}

/// The options, with what upstream asks of them for each kind of patch.
fn options(call: &Call, patch_type: PatchType) -> Result<WriteOptions> {
    let options = call.write_options("PatchOptions")?;
    let mut errors = ErrorList::new();
    match patch_type {
        PatchType::Apply if call.query.get("fieldManager").is_empty() => {
            let detail = "is required for apply patch";
            errors.push(FieldError::required(&Path::new("fieldManager"), detail));
        }
        PatchType::Apply => {}
        _ if options.force.is_some() => {
            errors
                .push(FieldError::forbidden(&Path::new("force"), "may not be specified for non-apply patch"));
        }
        _ => {}
    }
    if errors.is_empty() {
        Ok(options)
    } else {
        Err(Status::invalid("meta.k8s.io", "PatchOptions", "", &errors))
    }
}

/// A parsed patch.
pub struct Patch {
    patch_type: PatchType,
    value: Value,
    /// What a strict reader objects to in the patch itself.
    strict: Vec<String>,
}

impl Patch {
    pub fn parse(call: &Call, patch_type: PatchType, bytes: &Bytes, options: &WriteOptions) -> Result<Self> {
        let (value, mut strict) = match patch_type {
            PatchType::Apply => {
                let decoded = decode::yaml(bytes, None)
                    .map_err(|e| Status::bad_request(format!("error decoding YAML: {e}")))?;
                let strict: Vec<String> = decoded.strict.iter().map(ToString::to_string).collect();
                codec::note_strict(call, strict, options.validation, |why| {
                    Status::bad_request(format!("error strict decoding YAML: {why}"))
                })?;
                (decoded.value, Vec::new())
            }
            _ => {
                let decoded = decode::json(bytes, None)
                    .map_err(|e| Status::bad_request(format!("error decoding patch: {e}")))?;
                (decoded.value, decoded.strict.iter().map(ToString::to_string).collect::<Vec<_>>())
            }
        };
        if patch_type == PatchType::Json {
            strict = patch::json::unknown_fields(&value);
        } else if !value.is_object() {
            return Err(Status::bad_request("error decoding patch: the patch is not a JSON object"));
        }
        Ok(Self { patch_type, value, strict })
    }

    /// The new object of the request's version; None for `live` only ever in an apply.
    pub fn apply(
        &self,
        call: &Call,
        subresource: &str,
        live: Option<&Value>,
        options: &WriteOptions,
    ) -> Result<Value> {
        if self.patch_type == PatchType::Apply {
            return self.apply_config(call, subresource, live, options);
        }
        let live = live.cloned().ok_or_else(|| call.not_found())?;
        let patched = match self.patch_type {
            PatchType::Json => patch::json(live, &self.value),
            PatchType::Merge => patch::merge(live, self.value.clone()),
            _ => patch::strategic(&call.resource.schema, live, self.value.clone()),
        };
        let mut object = patched.map_err(|e| failed(&e))?;
        let conformed =
            conform::conform(&call.resource.schema, &mut object).map_err(|e| self.invalid(&e.to_string()))?;
        let unknown = conformed.unknown.iter().map(|path| format!("unknown field {path:?}"));
        let strict: Vec<String> = self.strict.iter().cloned().chain(unknown).collect();
        codec::note_strict(call, strict, options.validation, |why| self.invalid(&why))?;
        Ok(object)
    }

    fn apply_config(
        &self,
        call: &Call,
        subresource: &str,
        live: Option<&Value>,
        options: &WriteOptions,
    ) -> Result<Value> {
        let mut config = self.value.clone();
        if text(&config, "/metadata/name").is_empty() && config.get("metadata").is_none_or(Value::is_object) {
            config["metadata"]["name"] = call.info.name.as_str().into();
        }
        let uid = text(&config, "/metadata/uid").to_string();
        if live.is_none() && !uid.is_empty() {
            let why = format!(
                "uid mismatch: the provided object specified uid {uid}, and no existing object was found"
            );
            return Err(Status::conflict(call.resource.group_resource(), &call.info.name, why));
        }
        // Upstream's unknown fields of an apply are errors of its typed parser whatever the validation says; only
        // the JSON types are checked here.
        let mut object = managed::apply(call, options, subresource, live, &config)?;
        conform::conform(&call.resource.schema, &mut object)
            .map_err(|e| Status::bad_request(e.to_string()))?;
        Ok(object)
    }

    fn invalid(&self, why: &str) -> Status {
        let shown = self.value.to_string();
        Status::invalid("", "", "", &vec![FieldError::invalid(&Path::new("patch"), shown, why)])
    }
}

fn failed(error: &PatchError) -> Status {
    match error {
        PatchError::Malformed(message) => Status::bad_request(message.as_str()),
        PatchError::TooLarge(message) => Status::new(413, "RequestEntityTooLarge", message.as_str()),
        PatchError::Unprocessable(_) => {
            let mut status = Status::new(422, "Invalid", PatchError::UNPROCESSABLE_MESSAGE);
            status.0.detailed = true;
            status
        }
        PatchError::Internal(message) => Status::new(500, "", message.as_str()),
    }
}

/// A patch can neither rename nor move an object, nor make another kind of it.
fn check(call: &Call, object: &Value, creating: bool) -> Result<()> {
    let name = text(object, "/metadata/name");
    if name != call.info.name {
        let wanted = &call.info.name;
        return Err(Status::bad_request(match name {
            "" => format!(
                "the name of the object ({wanted} based on URL) was undeterminable: name must be provided"
            ),
            _ => format!("the name of the object ({name}) does not match the name on the URL ({wanted})"),
        }));
    }
    let (namespace, wanted) = (text(object, "/metadata/namespace"), call.info.namespace.as_str());
    if call.resource.namespaced && namespace != wanted && !(creating && namespace.is_empty()) {
        return Err(Status::bad_request(format!(
            "the namespace of the object ({namespace}) does not match the namespace on the request ({wanted})"
        )));
    }
    for (field, wanted) in [("apiVersion", call.resource.api_version()), ("kind", call.resource.kind.clone())]
    {
        let found = object.get(field).and_then(Value::as_str).unwrap_or("");
        if !found.is_empty() && found != wanted {
            return Err(Status::bad_request(format!(
                "the {field} in the data ({found}) does not match the expected {field} ({wanted})"
            )));
        }
    }
    Ok(())
}
