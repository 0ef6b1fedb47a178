//! PATCH: JSON patch, merge patch, strategic merge patch and server-side apply.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/endpoints/handlers/patch.go. A patch is made anew against each state
//! that the race leaves it with, so one without resourceVersion always lands; one with it conflicts.
use bytes::Bytes;
use http::Response;
use sampan_kinds::{ErrorList, FieldError, Path};
use sampan_schema::patch::{self, PatchError};
use sampan_schema::{conform, decode};
use serde_json::{Map, Value};

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

impl PatchType {
    pub fn of(call: &Call) -> Result<Self> {
        match negotiate::content_type(&call.parts.headers).as_str() {
            "application/json-patch+json" => Ok(Self::Json),
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic),
            "application/apply-patch+yaml" => Ok(Self::Apply),
            _ => Err(Status::no_such_patch()),
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
    let target = Target { create: creates, unconditional: true, uid_is_precondition: false, ..*target };
    let parsed = Patch::parse(patch_type, &bytes);
    let make = |stored: Option<&Value>| {
        // An object that isn't there is missed before a patch that can't be read.
        let patch = parsed.as_ref().map_err(Clone::clone)?;
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
    pub fn parse(patch_type: PatchType, bytes: &Bytes) -> Result<Self> {
        let decoded = match patch_type {
            PatchType::Apply => decode::yaml(bytes, None)
                .map_err(|e| format!("error decoding YAML: error converting YAML to JSON: {e}")),
            PatchType::Strategic => decode::json(bytes, None).map_err(|e| e.to_string()),
            _ => decode::json(bytes, None).map_err(|e| format!("error decoding patch: {e}")),
        };
        let decoded = decoded.map_err(Status::bad_request)?;
        let (mut value, mut strict) = (decoded.value, strict_texts(&decoded.strict));
        match patch_type {
            PatchType::Json => {
                let doubles = strict.into_iter().map(|text| format!("json patch {text}"));
                strict = doubles.chain(patch::json::unknown_fields(&value)).collect();
            }
            PatchType::Apply | PatchType::Strategic if value.is_null() => value = Value::Object(Map::new()),
            PatchType::Merge if value.is_null() => return Err(Status::bad_request("Invalid JSON Patch")),
            _ if !value.is_object() => return Err(Status::bad_request(not_an_object(patch_type, &value))),
            _ => {}
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
        let shown = match self.patch_type {
            PatchType::Strategic => go_map(&self.value),
            _ => object.to_string(),
        };
        self.check_kind(call, &mut object).map_err(|why| self.invalid(&shown, &why))?;
        let conformed = conform::conform(&call.resource.schema, &mut object)
            .map_err(|e| self.invalid(&shown, &e.to_string()))?;
        let unknown = conformed.unknown.iter().map(|path| format!("unknown field {path:?}"));
        let strict: Vec<String> = self.strict.iter().cloned().chain(unknown).collect();
        codec::note_strict(call, strict, options.validation, |why| self.invalid(&shown, &why))?;
        Ok(object)
    }

    /// No patch makes another kind of an object: a strategic one that tries is not heeded, others are refused.
    fn check_kind(&self, call: &Call, object: &mut Value) -> std::result::Result<(), String> {
        let (wanted_version, wanted_kind) = (call.resource.api_version(), call.resource.kind.as_str());
        // What isn't said is what it was.
        let is = |pointer: &str, wanted: &str| matches!(text(object, pointer), stated if stated.is_empty() || stated == wanted);
        let same = is("/apiVersion", &wanted_version) && is("/kind", wanted_kind);
        if !same && self.patch_type != PatchType::Strategic {
            let (version, kind) = (text(object, "/apiVersion"), text(object, "/kind"));
            return Err(codec::wrong_kind(version, kind, &call.resource.group, wanted_kind));
        }
        if let Some(fields) = object.as_object_mut() {
            fields.insert("apiVersion".into(), wanted_version.into());
            fields.insert("kind".into(), wanted_kind.into());
        }
        Ok(())
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
        // Doubles in the YAML are looked for last, as upstream does.
        codec::note_strict(call, self.strict.clone(), options.validation, |why| {
            let why = why.trim_start_matches("strict decoding error: ");
            Status::bad_request(format!("error strict decoding YAML: error converting YAML to JSON: {why}"))
        })?;
        conform::conform(&call.resource.schema, &mut object)
            .map_err(|e| Status::bad_request(e.to_string()))?;
        Ok(object)
    }

    fn invalid(&self, shown: &str, why: &str) -> Status {
        Status::invalid("", "", "", &vec![FieldError::invalid(&Path::new("patch"), shown, why)])
    }
}

pub fn failed(error: &PatchError) -> Status {
    match error {
        PatchError::Malformed(message) => Status::bad_request(message.as_str()),
        PatchError::TooLarge(message) => Status::too_large(message),
        PatchError::Unprocessable(_) => {
            let mut status = Status::new(422, "Invalid", PatchError::UNPROCESSABLE_MESSAGE);
            status.0.detailed = true;
            status
        }
        PatchError::Internal(message) => Status::new(500, "", message.as_str()),
    }
}

fn strict_texts(errors: &[decode::StrictError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

fn not_an_object(patch_type: PatchType, value: &Value) -> String {
    let why = codec::cannot_unmarshal(value, "map[string]interface {}");
    match patch_type {
        PatchType::Apply => {
            format!("error decoding YAML: error unmarshaling JSON: while decoding JSON: {why}")
        }
        PatchType::Merge => format!("error decoding patch: {why}"),
        _ => why,
    }
}

/// A value as Go's fmt shows a map of interfaces.
fn go_map(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let mut keys: Vec<&String> = fields.keys().collect();
            keys.sort();
            let members: Vec<String> =
                keys.into_iter().map(|key| format!("{key}:{}", go_map(&fields[key]))).collect();
            format!("map[{}]", members.join(" "))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(go_map).collect::<Vec<_>>().join(" ")),
        Value::String(text) => text.clone(),
        Value::Null => "<nil>".into(),
        other => other.to_string(),
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
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
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
