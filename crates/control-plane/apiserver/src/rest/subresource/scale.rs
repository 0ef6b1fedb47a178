//! The scale subresource: an `autoscaling/v1` Scale in front of `spec.replicas`.
//!
//! Upstream counterparts: pkg/registry/apps/*/storage, pkg/registry/core/replicationcontroller/storage.
use http::Response;
use sampan_kinds::{FieldError, Path, Rest};
use sampan_schema::{Type, apply, conform, patch};
use sampan_world::clock;
use serde_json::{Value, json};

use crate::body::{self, Body};
use crate::call::{Call, WriteOptions};
use crate::codec::{self, Expected};
use crate::managed;
use crate::negotiate::{Output, Transform};
use crate::reply;
use crate::rest::get;
use crate::rest::patch::PatchType;
use crate::status::{GroupResource, Result, Status};
use crate::storage;
use crate::write::{self, Target, text};

pub async fn serve(call: &Call, body: Body) -> Result<Response<Body>> {
    let ty = codec::type_of("autoscaling", "v1", "Scale").ok_or_else(Status::no_such_path)?;
    let output = Output { transform: Transform::None, ..call.output };
    if call.info.verb == "get" {
        let object = get::find(call).await?;
        let parent = object.value(&call.resource.storage)?;
        return reply::typed_value(200, &scale_of(&parent), Some(ty), output);
    }
    let kind = if call.info.verb == "patch" { "PatchOptions" } else { "UpdateOptions" };
    let options = call.write_options(kind)?;
    let wanted = Wanted::read(call, body, ty, &options).await?;
    let make = |stored: Option<&Value>| {
        let stored = stored.ok_or_else(|| call.not_found())?;
        let mut present = scale_of(stored);
        if let Wanted::Patch(PatchType::Apply, _) = wanted {
            present["metadata"]["managedFields"] = owners_of_scale(stored, &call.resource.api_version());
        }
        let scale = wanted.against(call, &present, ty, &options)?;
        scaled(call, stored, &scale, &options)
    };
    // The parent's own rules: a changed replica count is a new generation.
    let rules = &call.resource.storage.rules;
    let rest = Rest { ..rules.rest };
    let target = Target { rest: &rest, subresource: "scale", unconditional: true, ..Target::of(call) };
    let written = write::update(call, &target, &make, &options).await?;
    let parent = storage::decode(&call.resource.storage, &written.bytes, written.revision)?;
    reply::typed_value(200, &scale_of(&parent), Some(ty), output)
}

/// What the client sent: a whole Scale or a patch of one.
enum Wanted {
    Scale(Value),
    Patch(PatchType, Value),
}

impl Wanted {
    async fn read(call: &Call, body: Body, ty: &Type, options: &WriteOptions) -> Result<Self> {
        let bytes = body::read(body).await?;
        if call.info.verb == "patch" {
            let patch_type = PatchType::of(call)?;
            let value = match patch_type {
                PatchType::Apply => sampan_schema::decode::yaml(&bytes, None).map(|decoded| decoded.value),
                _ => sampan_schema::decode::json(&bytes, None).map(|decoded| decoded.value),
            };
            let value = value.map_err(|e| Status::bad_request(format!("error decoding patch: {e}")))?;
            return Ok(Self::Patch(patch_type, value));
        }
        let expected = Expected { group: "autoscaling", version: "v1", kind: "Scale", ty };
        Ok(Self::Scale(codec::read(call, &bytes, &expected, options.validation)?))
    }

    /// The Scale that is to be, given the present one.
    fn against(&self, call: &Call, present: &Value, ty: &Type, options: &WriteOptions) -> Result<Value> {
        let mut scale = match self {
            Self::Scale(scale) => scale.clone(),
            Self::Patch(PatchType::Apply, config) => apply_config(present, config, ty, options)?,
            Self::Patch(patch_type, value) => {
                let patched = match patch_type {
                    PatchType::Json => patch::json(present.clone(), value),
                    PatchType::Merge => patch::merge(present.clone(), value.clone()),
                    _ => patch::strategic(ty, present.clone(), value.clone()),
                };
                patched.map_err(|e| super::super::patch::failed(&e))?
            }
        };
        let shown = scale.clone();
        conform::conform(ty, &mut scale).map_err(|e| match self {
            Self::Scale(_) => Status::bad_request(e.to_string()),
            Self::Patch(..) => {
                let path = Path::new("patch");
                let errors = vec![FieldError::invalid(&path, shown.to_string(), e.to_string())];
                Status::invalid("", "", "", &errors)
            }
        })?;
        if text(&scale, "/metadata/name") != call.info.name {
            let (name, wanted) = (text(&scale, "/metadata/name"), &call.info.name);
            return Err(Status::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({wanted})"
            )));
        }
        Ok(scale)
    }
}

fn apply_config(present: &Value, config: &Value, ty: &Type, options: &WriteOptions) -> Result<Value> {
    let nothing = apply::Reset::fields([]);
    let writer = apply::Writer {
        manager: &options.manager,
        subresource: "scale",
        api_version: "autoscaling/v1",
        now: clock::now_seconds(),
        reset: &nothing,
    };
    let applied = apply::apply(ty, Some(present), config, options.force.unwrap_or(false), &writer);
    applied.map(|applied| applied.object).map_err(|e| managed::failed(&e))
}

/// The parent with the Scale's replicas.
fn scaled(call: &Call, stored: &Value, scale: &Value, options: &WriteOptions) -> Result<Value> {
    let replicas = scale.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
    if replicas < 0 {
        let path = Path::new("spec").child("replicas");
        let errors = vec![FieldError::invalid(&path, replicas, "must be greater than or equal to 0")];
        return Err(Status::invalid("autoscaling", "Scale", &call.info.name, &errors));
    }
    let (wanted, present) = (text(scale, "/metadata/uid"), text(stored, "/metadata/uid"));
    if !wanted.is_empty() && wanted != present {
        let resource = format!("{}/scale", call.resource.name);
        let of = GroupResource { group: &call.resource.group, resource: &resource };
        let why =
            format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {present}");
        return Err(Status::conflict(of, &call.info.name, why));
    }
    let mut parent = stored.clone();
    parent["spec"]["replicas"] = replicas.into();
    match text(scale, "/metadata/resourceVersion") {
        "" => drop(parent["metadata"].as_object_mut().and_then(|meta| meta.remove("resourceVersion"))),
        version => parent["metadata"]["resourceVersion"] = version.into(),
    }
    match scale.pointer("/metadata/managedFields") {
        Some(owners) => {
            parent["metadata"]["managedFields"] =
                owners_of_parent(stored, owners, &call.resource.api_version());
        }
        None => managed::track(call, options, "scale", Some(stored), &mut parent),
    }
    Ok(parent)
}

fn entries(object: &Value) -> impl Iterator<Item = &Value> {
    object.pointer("/metadata/managedFields").and_then(Value::as_array).into_iter().flatten()
}

fn owns_replicas(entry: &Value) -> bool {
    entry.pointer("/fieldsV1/f:spec/f:replicas").is_some()
}

/// Who owns the Scale's replicas, from who owns the parent's (upstream's ScaleHandler.ToSubresource).
fn owners_of_scale(parent: &Value, api_version: &str) -> Value {
    let owners = entries(parent).filter(|e| text(e, "/apiVersion") == api_version && owns_replicas(e));
    owners
        .map(|entry| {
            let mut entry = entry.clone();
            entry["apiVersion"] = "autoscaling/v1".into();
            entry["fieldsV1"] = json!({"f:spec": {"f:replicas": {}}});
            entry
        })
        .collect()
}

/// The parent's managed fields after a Scale with those owners was applied (upstream's ScaleHandler.ToParent).
fn owners_of_parent(parent: &Value, owners: &Value, api_version: &str) -> Value {
    let same = |a: &Value, b: &Value| {
        ["/manager", "/operation", "/subresource"].iter().all(|part| text(a, part) == text(b, part))
    };
    let mut left: Vec<&Value> =
        owners.as_array().into_iter().flatten().filter(|entry| owns_replicas(entry)).collect();
    let mut out = Vec::new();
    for entry in entries(parent) {
        let mut entry = entry.clone();
        if text(&entry, "/apiVersion") == api_version && owns_replicas(&entry) {
            match left.iter().position(|owner| same(owner, &entry)) {
                Some(at) => drop(left.remove(at)),
                None => take_replicas(&mut entry),
            }
        }
        if entry["fieldsV1"].as_object().is_some_and(|fields| !fields.is_empty()) {
            out.push(entry);
        }
    }
    out.extend(left.into_iter().map(|entry| {
        let mut entry = entry.clone();
        entry["apiVersion"] = api_version.into();
        entry
    }));
    Value::Array(out)
}

fn take_replicas(entry: &mut Value) {
    let Some(fields) = entry["fieldsV1"].as_object_mut() else { return };
    if let Some(spec) = fields.get_mut("f:spec").and_then(Value::as_object_mut) {
        spec.remove("f:replicas");
        if spec.is_empty() {
            fields.remove("f:spec");
        }
    }
}

/// The Scale of an object.
fn scale_of(parent: &Value) -> Value {
    let mut metadata = json!({});
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = parent.pointer(&format!("/metadata/{field}")) {
            metadata[field] = value.clone();
        }
    }
    let number = |pointer: &str| parent.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
    let mut status = json!({"replicas": number("/status/replicas")});
    let selector = selector_text(parent.pointer("/spec/selector").unwrap_or(&Value::Null));
    if !selector.is_empty() {
        status["selector"] = selector.into();
    }
    let spec = match number("/spec/replicas") {
        0 => json!({}),
        replicas => json!({"replicas": replicas}),
    };
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": spec, "status": status})
}

/// A label selector, or a replication controller's plain map, in its text form.
fn selector_text(selector: &Value) -> String {
    let is_plain = selector.as_object().is_some_and(|map| map.values().all(Value::is_string));
    let labels = if is_plain { Some(selector) } else { selector.get("matchLabels") };
    let mut parts: Vec<(String, String)> = Vec::new();
    for (key, value) in labels.and_then(Value::as_object).into_iter().flatten() {
        parts.push((key.clone(), format!("{key}={}", value.as_str().unwrap_or(""))));
    }
    for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
        let key = text(expression, "/key").to_string();
        let mut values: Vec<&str> = expression
            .get("values")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        values.sort_unstable();
        let values = values.join(",");
        let part = match text(expression, "/operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.clone(),
            _ => format!("!{key}"),
        };
        parts.push((key, part));
    }
    parts.sort();
    parts.into_iter().map(|(_, part)| part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_applied_scale_takes_the_replicas_from_their_owner() {
        let entry = |manager: &str, fields: Value| {
            json!({"manager": manager, "operation": "Apply",
            "apiVersion": "apps/v1", "fieldsV1": fields})
        };
        let parent = json!({"metadata": {"managedFields": [
            entry("a", json!({"f:spec": {"f:replicas": {}, "f:paused": {}}})),
            entry("b", json!({"f:spec": {"f:replicas": {}}})),
            entry("c", json!({"f:metadata": {}})),
        ]}});
        let owners = owners_of_scale(&parent, "apps/v1");
        assert_eq!(owners.as_array().map(Vec::len), Some(2));
        assert_eq!(owners[0]["apiVersion"], "autoscaling/v1");
        let taken = json!([{"manager": "s", "operation": "Apply", "subresource": "scale",
            "apiVersion": "autoscaling/v1", "fieldsV1": {"f:spec": {"f:replicas": {}}}}]);
        let after = owners_of_parent(&parent, &taken, "apps/v1");
        let names: Vec<&str> = after.as_array().unwrap().iter().map(|e| text(e, "/manager")).collect();
        assert_eq!(names, ["a", "c", "s"]);
        assert_eq!(after[0]["fieldsV1"], json!({"f:spec": {"f:paused": {}}}));
        assert_eq!(after[2]["apiVersion"], "apps/v1");
        assert_eq!(owners_of_parent(&parent, &owners, "apps/v1"), parent["metadata"]["managedFields"]);
    }

    #[test]
    fn a_scale_shows_its_selector_as_text() {
        let deployment = json!({"metadata": {"name": "d"}, "spec": {"replicas": 2, "selector": {
            "matchLabels": {"b": "1", "a": "2"},
            "matchExpressions": [{"key": "c", "operator": "In", "values": ["y", "x"]}]}}});
        let scale = scale_of(&deployment);
        assert_eq!(scale["status"]["selector"], "a=2,b=1,c in (x,y)");
        assert_eq!(scale["spec"]["replicas"], 2);
    }
}
