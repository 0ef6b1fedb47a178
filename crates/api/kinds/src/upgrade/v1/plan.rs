//! Plan: which nodes are to have which release of Sampan.
//!
//! Upstream counterpart: rancher's system-upgrade-controller, pkg/apis/upgrade.cattle.io/v1 (types, columns) and
//! pkg/upgrade/plan (validation); fields of the same meaning have the same names. Deliberate differences: a plan runs no
//! containers (`upgrade`, `prepare`, `secrets` are missing: nodes replace their own program), asks no channel (without a
//! version, the server's folder of programs is the channel), and is cluster-scoped, as nodes are.
use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, ObjectMeta};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::validate_label_selector;
use crate::object::{
    bump_generation, default_absent, default_zero, items, keep, read, same_in, set_generation, text,
};
use crate::table;
use crate::upgrade::release::Release;

/// Architectures that there are programs for.
pub const ARCHITECTURES: [&str; 3] = ["amd64", "arm64", "arm"];

#[derive(Clone, Debug, Default, Deserialize)]
pub struct Plan {
    pub metadata: ObjectMeta,
    #[serde(default)]
    pub spec: PlanSpec,
    #[serde(default)]
    pub status: PlanStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PlanSpec {
    pub concurrency: i64,
    pub node_selector: Option<LabelSelector>,
    pub version: String,
    pub sha256: BTreeMap<String, String>,
    pub cordon: bool,
    pub drain: Option<DrainSpec>,
    pub exclusive: bool,
    pub window: Option<TimeWindowSpec>,
    pub job_active_deadline_secs: Option<i64>,
    pub post_complete_delay: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DrainSpec {
    pub timeout: String,
    pub grace_period: Option<i32>,
    pub delete_emptydir_data: Option<bool>,
    pub ignore_daemon_sets: Option<bool>,
    pub force: bool,
    pub disable_eviction: bool,
    pub skip_wait_for_delete_timeout: i32,
    pub pod_selector: Option<LabelSelector>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TimeWindowSpec {
    pub days: Vec<String>,
    pub start_time: String,
    pub end_time: String,
    pub time_zone: String,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PlanStatus {
    pub conditions: Vec<Condition>,
    pub latest_version: String,
    pub latest_hash: String,
    pub applying: Vec<String>,
    pub observed_generation: i64,
}

impl k8s_openapi::Resource for Plan {
    const API_VERSION: &'static str = "upgrade.sampan.io/v1";
    const GROUP: &'static str = "upgrade.sampan.io";
    const KIND: &'static str = "Plan";
    const VERSION: &'static str = "v1";
    const URL_PATH_SEGMENT: &'static str = "plans";
    type Scope = k8s_openapi::ClusterResourceScope;
}

impl k8s_openapi::Metadata for Plan {
    type Ty = ObjectMeta;

    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// Go's durations without fractions of a second: `90s`, `1h30m`.
pub fn duration(text: &str) -> Option<Duration> {
    let (mut rest, mut total) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, unit) = rest.split_at(digits);
        let end = unit.find(|c: char| c.is_ascii_digit()).unwrap_or(unit.len());
        let seconds = match &unit[..end] {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return None,
        };
        total = total.checked_add(Duration::from_secs(number.parse::<u64>().ok()?.checked_mul(seconds)?))?;
        rest = &unit[end..];
    }
    (!text.is_empty()).then_some(total)
}

impl TimeWindowSpec {
    /// The day's number, Sunday 0.
    pub fn day(text: &str) -> Option<i8> {
        const DAYS: [&str; 7] =
            ["sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday"];
        let text = text.to_ascii_lowercase();
        let is = |(number, day): (usize, &&str)| {
            text == number.to_string() || text == *day || text == day[..2] || text == day[..3]
        };
        DAYS.iter().enumerate().position(is).and_then(|at| i8::try_from(at).ok())
    }

    /// Minutes since midnight of `22:00`.
    pub fn minutes(text: &str) -> Option<u16> {
        let (hour, minute) = text.split_once(':')?;
        let two = |part: &str, below: u16| {
            let number = part.parse::<u16>().ok().filter(|n| *n < below)?;
            (part.len() == 2).then_some(number)
        };
        Some(two(hour, 24)? * 60 + two(minute, 60)?)
    }
}

fn validate_selector(spec: &Value, key: &str, path: &Path, errors: &mut ErrorList) {
    let Some(selector) = spec.get(key).filter(|s| !s.is_null()) else { return };
    let path = path.child(key);
    match read(Some(selector), &path) {
        Ok(selector) => errors.extend(validate_label_selector(Some(&selector), &path)),
        Err(error) => errors.push(error),
    }
}

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let spec = &object["spec"];
    if spec.get("nodeSelector").is_none_or(Value::is_null) {
        errors.push(FieldError::required(&path.child("nodeSelector"), "{} selects all nodes"));
    }
    validate_selector(spec, "nodeSelector", &path, &mut errors);
    for (key, least) in [("concurrency", 1), ("jobActiveDeadlineSecs", 0)] {
        if let Some(value) = spec.get(key).and_then(Value::as_i64).filter(|value| *value < least) {
            let detail = format!("must be greater than or equal to {least}");
            errors.push(FieldError::invalid(&path.child(key), value, detail));
        }
    }
    if let Some(Err(error)) =
        Some(text(object, "/spec/version")).filter(|v| !v.is_empty()).map(str::parse::<Release>)
    {
        errors.push(FieldError::invalid(&path.child("version"), error.0.as_str(), error.to_string()));
    }
    for (arch, digest) in spec.get("sha256").and_then(Value::as_object).into_iter().flatten() {
        let at = path.child("sha256").key(arch);
        if !ARCHITECTURES.contains(&arch.as_str()) {
            errors.push(FieldError::not_supported(&at, arch.as_str(), &ARCHITECTURES));
        }
        let digest = digest.as_str().unwrap_or_default();
        if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            errors.push(FieldError::invalid(&at, digest, "must be 64 hexadecimal digits, in lower case"));
        }
    }
    for (pointer, at) in [
        ("/spec/postCompleteDelay", path.child("postCompleteDelay")),
        ("/spec/drain/timeout", path.child("drain").child("timeout")),
    ] {
        let given = text(object, pointer);
        if !given.is_empty() && duration(given).is_none() {
            errors.push(FieldError::invalid(&at, given, "must be a duration in h, m and s, as in 1m30s"));
        }
    }
    if let Some(drain) = spec.get("drain") {
        validate_selector(drain, "podSelector", &path.child("drain"), &mut errors);
    }
    validate_window(object, &path.child("window"), &mut errors);
    errors
}

fn validate_window(object: &Value, path: &Path, errors: &mut ErrorList) {
    for (index, day) in items(object, "/spec/window/days").iter().enumerate() {
        let day = day.as_str().unwrap_or_default();
        if TimeWindowSpec::day(day).is_none() {
            let at = path.child("days").index(index);
            errors.push(FieldError::invalid(&at, day, "must be a day of the week, as in monday, mo or 1"));
        }
    }
    for key in ["startTime", "endTime"] {
        let given = text(object, &format!("/spec/window/{key}"));
        if !given.is_empty() && TimeWindowSpec::minutes(given).is_none() {
            errors.push(FieldError::invalid(
                &path.child(key),
                given,
                "must be a time of the day, as in 22:00",
            ));
        }
    }
}

/// The condition's status and message.
fn condition<'a>(object: &'a Value, kind: &str) -> (&'a str, &'a str) {
    let found = items(object, "/status/conditions").iter().find(|c| text(c, "/type") == kind);
    found.map_or(("", ""), |c| (text(c, "/status"), text(c, "/message")))
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let version = Some(text(object, "/status/latestVersion")).filter(|v| !v.is_empty());
    let message = ["Validated", "LatestResolved", "Complete"].map(|kind| condition(object, kind).1);
    let applying: Vec<&str> = items(object, "/status/applying").iter().filter_map(Value::as_str).collect();
    vec![
        table::name(object),
        version.unwrap_or_else(|| text(object, "/spec/version")).into(),
        condition(object, "Complete").0.into(),
        message.into_iter().find(|m| !m.is_empty()).unwrap_or_default().into(),
        table::or_none(&applying.join(",")),
        table::age(object, now),
    ]
}

pub const KIND: Kind = Kind {
    defaults: |object| {
        if let Some(spec) = object.get_mut("spec").filter(|s| s.is_object()) {
            default_zero(spec, "concurrency", 1);
            default_absent(spec, "jobActiveDeadlineSecs", 900);
        }
    },
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({});
            set_generation(object, 1);
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            bump_generation(new, old, !same_in(new, old, "/spec"));
        },
        validate,
        validate_update: |new, _| validate(new),
        ..Rest::ANY
    },
    status: Some(Rest { prepare_update: |new, old| keep(new, old, "spec"), ..Rest::ANY }),
    columns: &[
        Column::NAME,
        Column::string("Version", "The release that nodes are brought to."),
        Column::string("Complete", "Whether all selected nodes have it."),
        Column::string("Message", "What keeps the plan from going on."),
        Column::string("Applying", "Nodes that are being upgraded.").wide(),
        Column::AGE,
    ],
    row,
    ..Kind::plain("upgrade.sampan.io", "v1", "Plan")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_plan_may_say() {
        let texts = |spec: Value| -> String {
            let found: Vec<String> =
                validate(&json!({"spec": spec})).iter().map(ToString::to_string).collect();
            found.join("\n")
        };
        let whole = json!({"nodeSelector": {}, "concurrency": 2, "version": "v1.36.2+sampan0.2.0",
            "sha256": {"arm": "ab".repeat(32)}, "drain": {"timeout": "5m", "podSelector": {"matchLabels": {"a": "b"}}},
            "window": {"days": ["mo", "Sunday", "6"], "startTime": "22:00", "endTime": "05:30"}, "postCompleteDelay": "1m30s"});
        assert_eq!(texts(whole), "");
        for (spec, want) in [
            (json!({}), "spec.nodeSelector: Required value"),
            (json!({"nodeSelector": {"matchExpressions": [{"key": "a", "operator": "Is"}]}}), "operator"),
            (json!({"nodeSelector": {}, "version": "0.2.0"}), "spec.version: Invalid value: \"0.2.0\""),
            (json!({"nodeSelector": {}, "sha256": {"s390x": "00"}}), "spec.sha256[s390x]: Unsupported value"),
            (json!({"nodeSelector": {}, "sha256": {"arm": "00"}}), "64 hexadecimal"),
            (json!({"nodeSelector": {}, "concurrency": -1}), "spec.concurrency: Invalid value: -1"),
            (json!({"nodeSelector": {}, "postCompleteDelay": "5"}), "spec.postCompleteDelay"),
            (json!({"nodeSelector": {}, "drain": {"timeout": "-5s"}}), "spec.drain.timeout"),
            (json!({"nodeSelector": {}, "window": {"days": ["x"]}}), "spec.window.days[0]"),
            (json!({"nodeSelector": {}, "window": {"startTime": "24:00"}}), "spec.window.startTime"),
        ] {
            assert!(texts(spec.clone()).contains(want), "{spec}: {}", texts(spec.clone()));
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("1h2m3s"), Some(Duration::from_secs(3723)));
        for bad in ["", "5", "m", "5x", "1.5s", "99999999999999999999h"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_table_and_the_struct_agree() {
        let ty = sampan_schema::by_gvk("upgrade.sampan.io", "v1", "Plan").unwrap();
        let mut object = json!({"apiVersion": "upgrade.sampan.io/v1", "kind": "Plan", "metadata": {"name": "x"},
            "spec": {"nodeSelector": {}, "drain": {}, "concurrency": 0}, "status": {}});
        sampan_schema::conform::conform(ty, &mut object).unwrap();
        (KIND.defaults)(&mut object);
        assert_eq!(object["spec"]["drain"], json!({}), "an empty pointer is kept: {object}");
        let plan: Plan = serde_json::from_value(object).unwrap();
        assert_eq!((plan.spec.concurrency, plan.spec.job_active_deadline_secs), (1, Some(900)));
        assert!(plan.spec.node_selector.is_some() && plan.spec.drain.is_some());
    }
}
