//! Who owns which field: the calls into `sampan_schema::apply` that writes make.
//!
//! Upstream counterpart: k8s.io/apimachinery/pkg/util/managedfields as the handlers use it.
use std::sync::LazyLock;

use sampan_schema::apply::{self, ApplyError, Reset, Writer};
use sampan_world::clock;
use serde_json::{Value, json};

use crate::call::{Call, WriteOptions};
use crate::registry::Schema;
use crate::status::{Cause, Result, Status};

static NOTHING: LazyLock<Reset> = LazyLock::new(|| Reset::fields([]));
static STATUS: LazyLock<Reset> = LazyLock::new(|| Reset::fields(["status"]));
static SPEC: LazyLock<Reset> = LazyLock::new(|| Reset::fields(["spec"]));
static ALL_BUT_STATUS: LazyLock<Reset> = LazyLock::new(|| Reset::fields(["metadata", "spec"]));
static ALL: LazyLock<Reset> = LazyLock::new(|| Reset::fields(["spec", "status"]));
static BUT_CERTIFICATE: LazyLock<Reset> = LazyLock::new(|| Reset::fields(["spec", "status.conditions"]));
static BUT_CONDITIONS: LazyLock<Reset> = LazyLock::new(|| Reset::fields(["spec", "status.certificate"]));
static DEPLOYMENT_STATUS: LazyLock<Reset> = LazyLock::new(|| Reset::fields(["spec", "metadata.labels"]));
static POD_STATUS: LazyLock<Reset> =
    LazyLock::new(|| Reset::fields(["spec", "metadata.deletionTimestamp", "metadata.ownerReferences"]));
static EPHEMERAL: Reset = Reset::AllBut(&[&["spec", "ephemeralContainers"]]);
static RESIZE: Reset = Reset::AllBut(&[
    &["spec", "containers", "*", "resources"],
    &["spec", "containers", "*", "resizePolicy"],
    &["spec", "initContainers", "*", "resources"],
    &["spec", "initContainers", "*", "resizePolicy"],
]);

/// Upstream's GetResetFields and GetResetFieldsFilter of the endpoint. `has_status`: there is a status subresource.
/// A custom resource's `custom` status keeps nothing else.
fn reset(resource: &str, subresource: &str, has_status: bool, custom: bool) -> &'static Reset {
    match (resource, subresource) {
        ("certificatesigningrequests", "") => &ALL,
        ("certificatesigningrequests", "status") => &BUT_CERTIFICATE,
        ("certificatesigningrequests", "approval") => &BUT_CONDITIONS,
        ("deployments", "status") => &DEPLOYMENT_STATUS,
        ("pods", "status") => &POD_STATUS,
        ("pods", "ephemeralcontainers") => &EPHEMERAL,
        ("pods", "resize") => &RESIZE,
        ("namespaces", "finalize") => &STATUS,
        (
            "servicecidrs"
            | "resourceclaims"
            | "volumeattachments"
            | "flowschemas"
            | "prioritylevelconfigurations"
            | "validatingadmissionpolicies"
            | "apiservices"
            | "customresourcedefinitions",
            "status",
        ) => &ALL_BUT_STATUS,
        (_, "status") if custom => &ALL_BUT_STATUS,
        (_, "status") => &SPEC,
        (_, "") if has_status => &STATUS,
        _ => &NOTHING,
    }
}

fn writer<'a>(
    call: &Call,
    options: &'a WriteOptions,
    subresource: &'a str,
    api_version: &'a str,
) -> Writer<'a> {
    let resource = &call.resource;
    let custom = matches!(resource.schema, Schema::Custom(_));
    let reset = reset(&resource.name, subresource, resource.subresources.contains_key("status"), custom);
    Writer { manager: &options.manager, subresource, api_version, now: clock::now_seconds(), reset }
}

/// Notes in `new` which fields this write changes against `live` (None: all is new). Both of the request's version.
pub fn track(call: &Call, options: &WriteOptions, subresource: &str, live: Option<&Value>, new: &mut Value) {
    let api_version = call.resource.api_version();
    let writer = writer(call, options, subresource, &api_version);
    let nothing = json!({});
    if let Err(error) = apply::track_update(&call.resource.schema, live.unwrap_or(&nothing), new, &writer) {
        tracing::warn!(resource = %call.resource.group_resource(), name = call.info.name, error, "managed fields");
    }
}

/// Applies `config`; the answer is the merged object of the request's version.
pub fn apply(
    call: &Call,
    options: &WriteOptions,
    subresource: &str,
    live: Option<&Value>,
    config: &Value,
) -> Result<Value> {
    let api_version = call.resource.api_version();
    let writer = writer(call, options, subresource, &api_version);
    let force = options.force.unwrap_or(false);
    let applied = apply::apply(&call.resource.schema, live, config, force, &writer);
    applied.map(|applied| applied.object).map_err(|error| failed(&error))
}

/// An apply's error as the client sees it.
pub fn failed(error: &ApplyError) -> Status {
    match error {
        ApplyError::BadRequest(message) => Status::bad_request(message.as_str()),
        ApplyError::Internal(message) => Status::new(500, "", message.as_str()),
        ApplyError::Conflict(conflicts) => {
            let causes = conflicts.iter().map(|conflict| Cause {
                reason: "FieldManagerConflict".into(),
                message: conflict.message(),
                field: conflict.field(),
            });
            Status::apply_conflict(causes.collect(), error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_endpoints_reset() {
        let paths = |reset: &Reset| match reset {
            Reset::Fields(fields) => {
                fields.paths().iter().map(|path| apply::show_path(path)).collect::<String>()
            }
            Reset::AllBut(patterns) => format!("!{}", patterns.len()),
        };
        let cases = [
            ("configmaps", "", false, ""),
            ("deployments", "", true, ".status"),
            ("deployments", "status", true, ".spec.metadata.labels"),
            ("deployments", "scale", true, ""),
            ("daemonsets", "status", true, ".spec"),
            ("certificatesigningrequests", "", true, ".spec.status"),
            ("certificatesigningrequests", "approval", true, ".spec.status.certificate"),
            ("resourceclaims", "status", true, ".metadata.spec"),
            ("pods", "resize", true, "!4"),
            ("namespaces", "finalize", true, ".status"),
        ];
        for (resource, subresource, has_status, want) in cases {
            assert_eq!(
                paths(reset(resource, subresource, has_status, false)),
                want,
                "{resource}/{subresource}"
            );
        }
    }
}
