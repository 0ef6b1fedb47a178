//! CSIDriver.
//!
//! Upstream counterpart: pkg/registry/storage/csidriver, ValidateCSIDriver in pkg/apis/storage/validation.
use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::apps::v1::workload::immutable;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::object::{bump_generation, child, count, default_absent, items, remove, same_in, text, truth};
use crate::table;

const POLICIES: &[&str] = &["File", "None", "ReadWriteOnceWithFSType"];
const MODES: &[&str] = &["Ephemeral", "Persistent"];

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    default_absent(spec, "attachRequired", true);
    for key in ["podInfoOnMount", "storageCapacity", "requiresRepublish", "seLinuxMount"] {
        default_absent(spec, key, false);
    }
    default_absent(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
    if count(spec, "/volumeLifecycleModes") == 0 {
        spec["volumeLifecycleModes"] = json!(["Persistent"]);
    }
}

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let field = |key: &str| object.pointer(&format!("/spec/{key}")).filter(|v| !v.is_null());
    let required = [
        ("attachRequired", "attachedRequired"),
        ("podInfoOnMount", "podInfoOnMount"),
        ("storageCapacity", "storageCapacity"),
        ("seLinuxMount", "seLinuxMount"),
    ];
    for (_, shown) in required.iter().filter(|(key, _)| field(key).is_none()) {
        errors.push(FieldError::required(&path.child(shown), ""));
    }
    let policy = field("fsGroupPolicy").and_then(Value::as_str);
    if let Some(policy) = policy.filter(|p| !POLICIES.contains(p)) {
        errors.push(FieldError::not_supported(&path.child("fsGroupPolicy"), policy, POLICIES));
    }
    validate_token_requests(object, &path.child("tokenRequests"), &mut errors);
    let modes = items(object, "/spec/volumeLifecycleModes").iter().filter_map(Value::as_str);
    for mode in modes.filter(|m| !MODES.contains(m)) {
        errors.push(FieldError::not_supported(&path.child("volumeLifecycleModes"), mode, MODES));
    }
    let period = field("nodeAllocatableUpdatePeriodSeconds").and_then(Value::as_i64);
    if let Some(period) = period.filter(|p| *p < 10) {
        let at = path.child("nodeAllocatableUpdatePeriodSeconds");
        errors.push(FieldError::invalid(&at, period, "must be greater than or equal to 10 seconds"));
    }
    if let Some(set) =
        field("serviceAccountTokenInSecrets").filter(|_| count(object, "/spec/tokenRequests") == 0)
    {
        let detail = "serviceAccountTokenInSecrets is set but no tokenRequests are specified";
        let at = path.child("serviceAccountTokenInSecrets");
        errors.push(FieldError::invalid(&at, set.clone(), detail));
    }
    errors
}

fn validate_token_requests(object: &Value, path: &Path, errors: &mut ErrorList) {
    let mut seen = BTreeSet::new();
    for (i, request) in items(object, "/spec/tokenRequests").iter().enumerate() {
        let (at, audience) = (path.index(i), text(request, "/audience"));
        if !seen.insert(audience) {
            errors.push(FieldError::duplicate(&at.child("audience"), audience));
            continue;
        }
        let Some(seconds) = request.get("expirationSeconds").and_then(Value::as_i64) else { continue };
        let at = at.child("expirationSeconds");
        if seconds < 600 {
            errors.push(FieldError::invalid(&at, seconds, "may not specify a duration less than 10 minutes"));
        }
        if seconds > 1 << 32 {
            let detail = "may not specify a duration larger than 2^32 seconds";
            errors.push(FieldError::invalid(&at, seconds, detail));
        }
    }
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let join = |pointer: &str, part: &str| {
        let texts: Vec<&str> = items(object, pointer).iter().map(|item| text(item, part)).collect();
        texts.join(",")
    };
    let has_requests = object.pointer("/spec/tokenRequests").is_some_and(|r| !r.is_null());
    let requests =
        if has_requests { join("/spec/tokenRequests", "/audience") } else { "<unset>".to_string() };
    let attach = object.pointer("/spec/attachRequired").and_then(Value::as_bool).unwrap_or(true);
    vec![
        table::name(object),
        attach.into(),
        truth(object, "/spec/podInfoOnMount").into(),
        truth(object, "/spec/storageCapacity").into(),
        requests.into(),
        truth(object, "/spec/requiresRepublish").into(),
        table::or_none(&join("/spec/volumeLifecycleModes", "")),
        table::age(object, now),
    ]
}

const fn boolean(name: &'static str, description: &'static str) -> Column {
    Column { kind: "boolean", ..Column::string(name, description) }
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| drop_disabled(object, None),
        prepare_update: |new, old| {
            drop_disabled(new, Some(old));
            bump_generation(new, old, !same_in(new, old, "/spec"));
        },
        validate,
        validate_update: |new, old| {
            let mut errors = validate(new);
            let path = Path::new("spec");
            immutable(new, old, "/spec/attachRequired", &path.child("attachedRequired"), &mut errors);
            let at = path.child("volumeLifecycleModes");
            immutable(new, old, "/spec/volumeLifecycleModes", &at, &mut errors);
            errors
        },
        ..Rest::ANY
    },
    unconditional_update: false,
    columns: &[
        Column::NAME,
        boolean("AttachRequired", "Whether volumes have to be attached to nodes."),
        boolean("PodInfoOnMount", "Whether the driver is told about the pod."),
        boolean("StorageCapacity", "Whether the scheduler looks at the driver's capacity."),
        Column::string("TokenRequests", "For whom the driver gets tokens of the pod's service account."),
        boolean("RequiresRepublish", "Whether volumes are published again and again."),
        Column::string("Modes", "What volumes the driver can provide."),
        Column::AGE,
    ],
    row,
    ..Kind::plain("storage.k8s.io", "v1", "CSIDriver")
};

/// Removes a field that 1.36 has off by default, unless it is in use.
fn drop_disabled(new: &mut Value, old: Option<&Value>) {
    let key = "preventPodSchedulingIfMissing";
    let used = old.and_then(|o| o.pointer("/spec")?.get(key)).is_some_and(|v| !v.is_null());
    if let Some(spec) = new.get_mut("spec").filter(|_| !used) {
        remove(spec, key);
    }
}
