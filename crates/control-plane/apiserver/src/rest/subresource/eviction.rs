//! pods/eviction: a delete that disruption budgets may refuse.
//!
//! Upstream counterpart: pkg/registry/core/pod/storage/eviction.go.
use std::sync::Arc;

use http::Response;
use sampan_kinds::Rest;
use sampan_world::clock;
use serde_json::{Value, json};

use super::binding::set_condition;
use crate::admit::{self, Operation};
use crate::body::{self, Body};
use crate::cache::Object;
use crate::call::Call;
use crate::codec::{self, Expected};
use crate::negotiate::{Output, Transform};
use crate::reply;
use crate::rest::delete::{self, DeleteOptions, plain_success};
use crate::selector::LabelSelector;
use crate::status::{GroupResource, Result, Status};
use crate::write::{self, Target, text};

/// Upstream's bound on evictions that a budget's controller has not confirmed.
const DISRUPTED_PODS_MAX: usize = 2000;

pub async fn serve(call: &Call, body: Body) -> Result<Response<Body>> {
    let mut options = call.write_options("CreateOptions")?;
    let bytes = body::read(body).await?;
    // policy/v1beta1 is what old clients still send.
    let stated: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let version = if text(&stated, "/apiVersion") == "policy/v1beta1" { "v1beta1" } else { "v1" };
    let ty = codec::type_of("policy", "v1", "Eviction").ok_or_else(Status::no_such_path)?;
    let expected = Expected { group: "policy", version, kind: "Eviction", ty };
    let mut eviction = codec::read(call, &bytes, &expected, options.validation)?;
    let name = call.info.name.as_str();
    if text(&eviction, "/metadata/name") != name {
        return Err(Status::bad_request("name in URL does not match name in Eviction object"));
    }
    let pods = call.on("", "v1", "pods", name)?;
    let mut deletion = DeleteOptions::from_value(eviction.get("deleteOptions").unwrap_or(&Value::Null))?;
    deletion.dry_run |= options.dry_run;
    options.dry_run = deletion.dry_run;
    admit::mutate(&pods, Operation::Create, "eviction", &mut eviction, None, &options).await?;
    admit::validate(&pods, Operation::Create, "eviction", Some(&eviction), None, &options).await?;
    let object = pods.present().await?;
    let pod = object.value(&pods.resource.storage)?;
    if !needs_no_budget(&pod) {
        let budgets = budgets_of(call, &pod).await?;
        match budgets.as_slice() {
            [] => {}
            [budget] => take_from(call, budget, &pod, deletion.dry_run).await?,
            _ => {
                let message = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.";
                return Err(Status::new(500, "", message));
            }
        }
    }
    if !deletion.dry_run && deletion.resource_version.is_none() {
        note_disruption(&pods, &options).await?;
    }
    delete::delete(&pods, name, &deletion).await?;
    let output = Output { transform: Transform::None, ..call.output };
    let mut success = plain_success();
    success["code"] = 201.into();
    reply::typed_value(201, &success, codec::status_type(), output)
}

fn needs_no_budget(pod: &Value) -> bool {
    matches!(text(pod, "/status/phase"), "Succeeded" | "Failed" | "Pending" | "")
        || pod.pointer("/metadata/deletionTimestamp").is_some()
}

/// The pod says why it goes.
async fn note_disruption(pods: &Call, options: &crate::call::WriteOptions) -> Result<()> {
    let rest = Rest::ANY;
    let target = Target { rest: &rest, subresource: "status", unconditional: true, ..Target::of(pods) };
    let make = |stored: Option<&Value>| {
        let mut pod = stored.ok_or_else(|| pods.not_found())?.clone();
        set_condition(
            &mut pod,
            json!({"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
                "message": "Eviction API: evicting"}),
        );
        Ok(pod)
    };
    write::update(pods, &target, &make, options).await.map(drop)
}

async fn budgets_of(call: &Call, pod: &Value) -> Result<Vec<Arc<Object>>> {
    let budgets = call.on("policy", "v1", "poddisruptionbudgets", "")?;
    let cache = budgets.cache().await?;
    call.server.caches.catch_up().await?;
    let prefix = budgets.resource.storage.namespace_prefix(&call.info.namespace);
    let mut found = Vec::new();
    for object in call.server.caches.snapshot(&cache, &prefix, None).objects {
        let budget = object.value(&budgets.resource.storage)?;
        let selector = budget.pointer("/spec/selector").and_then(LabelSelector::from_object);
        let label = |key: &str| pod.pointer("/metadata/labels")?.get(key)?.as_str();
        if selector.is_some_and(|selector| selector.matches(label)) {
            found.push(object);
        }
    }
    Ok(found)
}

/// Counts the eviction against the budget, or refuses it.
async fn take_from(call: &Call, budget: &Arc<Object>, pod: &Value, dry_run: bool) -> Result<()> {
    let budgets = call.on("policy", "v1", "poddisruptionbudgets", budget.name())?;
    let present = budget.value(&budgets.resource.storage)?;
    let number = |pointer: &str| present.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
    if !is_ready(pod) {
        let desired = number("/status/desiredHealthy");
        if text(&present, "/spec/unhealthyPodEvictionPolicy") == "AlwaysAllow"
            || (number("/status/currentHealthy") >= desired && desired > 0)
        {
            return Ok(());
        }
    }
    let mut options = budgets.write_options("UpdateOptions")?;
    options.dry_run = dry_run;
    let rest = Rest::ANY;
    let target = Target { rest: &rest, subresource: "status", unconditional: true, ..Target::of(&budgets) };
    let name = text(pod, "/metadata/name");
    let make = |stored: Option<&Value>| decrement(stored.ok_or_else(|| budgets.not_found())?, name);
    write::update(&budgets, &target, &make, &options).await.map(drop)
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    conditions.into_iter().any(|c| text(c, "/type") == "Ready" && text(c, "/status") == "True")
}

fn refused(message: String, retry_after_seconds: u32) -> Status {
    Status::too_many_requests(
        "Cannot evict pod as it would violate the pod's disruption budget.",
        retry_after_seconds,
    )
    .cause("DisruptionBudget", message, "")
}

fn decrement(stored: &Value, pod: &str) -> Result<Value> {
    let name = text(stored, "/metadata/name");
    let number = |pointer: &str| stored.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
    if number("/status/observedGeneration") < number("/metadata/generation") {
        return Err(refused(
            format!("The disruption budget {name} is still being processed by the server."),
            10,
        ));
    }
    let of = GroupResource { group: "policy", resource: "poddisruptionbudget" };
    let allowed = number("/status/disruptionsAllowed");
    if allowed < 0 {
        return Err(Status::forbidden(of, name, "pdb disruptions allowed is negative"));
    }
    let disrupted =
        stored.pointer("/status/disruptedPods").and_then(Value::as_object).map_or(0, |map| map.len());
    if disrupted > DISRUPTED_PODS_MAX {
        let why = "DisruptedPods map too big - too many evictions not confirmed by PDB controller";
        return Err(Status::forbidden(of, name, why));
    }
    if allowed == 0 {
        let (desired, current) = (number("/status/desiredHealthy"), number("/status/currentHealthy"));
        let message = match current <= desired {
            true => format!(
                "The disruption budget {name} needs {desired} healthy pods and has {current} currently"
            ),
            false => format!("The disruption budget {name} does not allow evicting pods currently"),
        };
        return Err(refused(message, 0));
    }
    let mut budget = stored.clone();
    budget["status"]["disruptionsAllowed"] = (allowed - 1).into();
    budget["status"]["disruptedPods"][pod] = clock::now_seconds().to_string().into();
    Ok(budget)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_counts_down_and_then_refuses() {
        let budget = json!({"metadata": {"name": "b", "generation": 1}, "status": {"observedGeneration": 1,
            "disruptionsAllowed": 1, "desiredHealthy": 2, "currentHealthy": 2}});
        let after = decrement(&budget, "p").unwrap();
        assert_eq!(after["status"]["disruptionsAllowed"], 0);
        assert!(after["status"]["disruptedPods"]["p"].is_string());
        let status = decrement(&after, "q").unwrap_err();
        assert_eq!(status.0.code, 429);
        assert_eq!(
            status.0.causes[0].message,
            "The disruption budget b needs 2 healthy pods and has 2 currently"
        );
    }
}
