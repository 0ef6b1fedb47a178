//! pods/binding and bindings: a pod is given its node.
//!
//! Upstream counterpart: pkg/registry/core/pod/storage/storage.go (BindingREST).
use http::Response;
use sampan_kinds::Rest;
use sampan_world::clock;
use serde_json::{Value, json};

use crate::admit::{self, Operation};
use crate::body::{self, Body};
use crate::call::Call;
use crate::codec::{self, Expected};
use crate::negotiate::{Output, Transform};
use crate::reply;
use crate::rest::delete::plain_success;
use crate::status::{GroupResource, Result, Status};
use crate::write::{self, Target, text};

const PODS_BINDING: GroupResource<'static> = GroupResource { group: "", resource: "pods/binding" };

pub async fn serve(call: &Call, body: Body) -> Result<Response<Body>> {
    let options = call.write_options("CreateOptions")?;
    let bytes = body::read(body).await?;
    let ty = codec::type_of("", "v1", "Binding").ok_or_else(Status::no_such_path)?;
    let expected = Expected { group: "", version: "v1", kind: "Binding", ty };
    let mut binding = codec::read(call, &bytes, &expected, options.validation)?;
    let name = text(&binding, "/metadata/name").to_string();
    let name = name.as_str();
    if !call.info.name.is_empty() && name != call.info.name {
        return Err(Status::bad_request("name in URL does not match name in Binding object"));
    }
    let pods = call.on("", "v1", "pods", name)?;
    admit::mutate(&pods, Operation::Create, "binding", &mut binding, None, &options).await?;
    let errors = sampan_kinds::core::v1::binding::validate(&binding);
    if !errors.is_empty() {
        return Err(Status::invalid("", "Binding", name, &errors));
    }
    let node = text(&binding, "/target/name");
    admit::validate(&pods, Operation::Create, "binding", Some(&binding), None, &options).await?;
    let rest = Rest::ANY;
    let target = Target { rest: &rest, subresource: "binding", unconditional: true, ..Target::of(&pods) };
    let make = |stored: Option<&Value>| assign(stored.ok_or_else(|| pods.not_found())?, &binding, node);
    write::update(&pods, &target, &make, &options).await?;
    let output = Output { transform: Transform::None, ..call.output };
    let mut success = plain_success();
    success["code"] = 201.into();
    reply::typed_value(201, &success, codec::status_type(), output)
}

fn assign(stored: &Value, binding: &Value, node: &str) -> Result<Value> {
    let mut pod = stored.clone();
    let name = text(stored, "/metadata/name");
    let conflict = |why: String| Err(Status::conflict(PODS_BINDING, name, why));
    let uid = text(binding, "/metadata/uid");
    if !uid.is_empty() && uid != text(stored, "/metadata/uid") {
        let why = format!(
            "StorageError: invalid object, Code: 4, Key: /pods/{}/{name}, ResourceVersion: 0, AdditionalErrorMsg: \
             Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            text(stored, "/metadata/namespace"),
            text(stored, "/metadata/uid")
        );
        return Err(Status::conflict(GroupResource { group: "", resource: "pods" }, name, why));
    }
    if stored.pointer("/metadata/deletionTimestamp").is_some() {
        return conflict(format!("pod {name} is being deleted, cannot be assigned to a host"));
    }
    let present = text(stored, "/spec/nodeName");
    if !present.is_empty() {
        return conflict(format!("pod {name} is already assigned to node {present:?}"));
    }
    if stored
        .pointer("/spec/schedulingGates")
        .and_then(Value::as_array)
        .is_some_and(|gates| !gates.is_empty())
    {
        return conflict(format!("pod {name} has non-empty .spec.schedulingGates"));
    }
    pod["spec"]["nodeName"] = node.into();
    for part in ["annotations", "labels"] {
        for (key, value) in
            binding.pointer(&format!("/metadata/{part}")).and_then(Value::as_object).into_iter().flatten()
        {
            pod["metadata"][part][key] = value.clone();
        }
    }
    if let Some(status) = pod.get_mut("status").and_then(Value::as_object_mut) {
        status.remove("nominatedNodeName");
    }
    set_condition(&mut pod, json!({"type": "PodScheduled", "status": "True"}));
    Ok(pod)
}

/// Sets a condition of the pod's status, with the time where its status changes.
pub fn set_condition(pod: &mut Value, mut condition: Value) {
    let now = clock::now_seconds().to_string();
    condition["lastProbeTime"] = Value::Null;
    condition["lastTransitionTime"] = now.into();
    if let Some(generation) = pod.pointer("/metadata/generation").cloned() {
        condition["observedGeneration"] = generation;
    }
    if !pod["status"]["conditions"].is_array() {
        pod["status"]["conditions"] = json!([]);
    }
    let Some(conditions) = pod["status"]["conditions"].as_array_mut() else { return };
    match conditions.iter_mut().find(|present| present.get("type") == condition.get("type")) {
        Some(present) => {
            if present.get("status") == condition.get("status") {
                condition["lastTransitionTime"] =
                    present.get("lastTransitionTime").cloned().unwrap_or_default();
            }
            *present = condition;
        }
        None => conditions.push(condition),
    }
}
