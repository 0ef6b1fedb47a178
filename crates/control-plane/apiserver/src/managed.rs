//! Who owns which field: the calls into `sampan_schema::apply` that writes make.
//!
//! Upstream counterpart: k8s.io/apimachinery/pkg/util/managedfields as the handlers use it.
use std::sync::LazyLock;

use sampan_schema::apply::{self, ApplyError, FieldSet, Writer};
use sampan_world::clock;
use serde_json::{Value, json};

use crate::call::{Call, WriteOptions};
use crate::status::{Cause, Result, Status};

static NOTHING: LazyLock<FieldSet> = LazyLock::new(|| FieldSet::of_paths([]));
static STATUS: LazyLock<FieldSet> = LazyLock::new(|| FieldSet::of_paths(["status"]));
static SPEC: LazyLock<FieldSet> = LazyLock::new(|| FieldSet::of_paths(["spec"]));

fn writer<'a>(
    call: &Call,
    options: &'a WriteOptions,
    subresource: &'a str,
    api_version: &'a str,
) -> Writer<'a> {
    let reset = match subresource {
        "" if call.resource.subresources.contains_key("status") => &*STATUS,
        "status" => &*SPEC,
        _ => &*NOTHING,
    };
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
    match apply::apply(&call.resource.schema, live, config, force, &writer) {
        Ok(applied) => Ok(applied.object),
        Err(ApplyError::BadRequest(message)) => Err(Status::bad_request(message)),
        Err(ApplyError::Internal(message)) => Err(Status::new(500, "", message)),
        Err(ref error @ ApplyError::Conflict(ref conflicts)) => {
            let causes = conflicts.iter().map(|conflict| Cause {
                reason: "FieldManagerConflict".into(),
                message: conflict.message(),
                field: conflict.field(),
            });
            Err(Status::apply_conflict(causes.collect(), error.to_string()))
        }
    }
}
