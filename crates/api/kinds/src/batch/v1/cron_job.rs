//! CronJob.
//!
//! Upstream counterpart: pkg/registry/batch/cronjob, validateCronJobSpec in pkg/apis/batch/validation. Left out:
//! whether there is such a time zone, which only the machine that runs the controller knows; its form is checked.
use serde_json::{Value, json};

use super::cron_schedule;
use super::job::{defaults_failure_policy, validation::validate_spec, warnings_spec};
use crate::apps::v1::workload::{drop_disabled, name_warning, nonnegative_keys, template_cells};
use crate::core::v1::pod_spec::one_of;
use crate::core::v1::pod_template::defaults_spec;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::label_selector::cell;
use crate::object::{
    bump_generation, child, count, default_absent, default_zero, integer, keep, same_in, set_generation,
    text, truth,
};
use crate::table;

const JOB: &str = "/spec/jobTemplate/spec";
/// The controller adds a dash and ten digits to make a job's name, which is a label.
const NAME_MAX: usize = 52;

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    default_zero(spec, "concurrencyPolicy", "Allow");
    default_absent(spec, "suspend", false);
    default_absent(spec, "successfulJobsHistoryLimit", 3);
    default_absent(spec, "failedJobsHistoryLimit", 1);
    if let Some(job) = object.pointer_mut(JOB) {
        defaults_failure_policy(job);
        if let Some(template) = job.get_mut("template") {
            defaults_spec(template);
        }
    }
}

fn validate_schedule(object: &Value, old: Option<&Value>, errors: &mut ErrorList) {
    let (path, schedule) = (Path::new("spec").child("schedule"), text(object, "/spec/schedule"));
    if schedule.is_empty() {
        errors.push(FieldError::required(&path, ""));
        return;
    }
    let mut refuse = |detail: &str| errors.push(FieldError::invalid(&path, schedule, detail));
    if let Err(error) = cron_schedule::check(schedule) {
        refuse(&error);
    }
    if !schedule.contains("TZ") {
        return;
    }
    if !old.is_some_and(|old| text(old, "/spec/schedule").contains("TZ")) {
        refuse("cannot use TZ or CRON_TZ in schedule, use timeZone field instead");
    } else if object.pointer("/spec/timeZone").is_some_and(|z| !z.is_null()) {
        refuse("cannot use both timeZone field and TZ or CRON_TZ in schedule");
    }
}

fn validate_time_zone(object: &Value, errors: &mut ErrorList) {
    let path = Path::new("spec").child("timeZone");
    let Some(zone) = object.pointer("/spec/timeZone").and_then(Value::as_str) else { return };
    let part_fits = |part: &str| {
        let fits = |b: u8| b.is_ascii_alphanumeric() || b".-_+".contains(&b);
        (1..=14).contains(&part.len())
            && part.bytes().all(fits)
            && ![".", ".."].contains(&part)
            && !part.starts_with('-')
    };
    if zone.is_empty() {
        errors.push(FieldError::invalid(&path, zone, "timeZone must be nil or non-empty string"));
    } else if !zone.split('/').all(part_fits) {
        errors.push(FieldError::invalid(&path, zone, format!("unknown time zone {zone}")));
    } else if zone.eq_ignore_ascii_case("Local") {
        let detail = "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones";
        errors.push(FieldError::invalid(&path, zone, detail));
    }
}

fn validate_spec_of(object: &Value, old: Option<&Value>) -> ErrorList {
    let path = Path::new("spec");
    let mut errors = ErrorList::new();
    validate_schedule(object, old, &mut errors);
    nonnegative_keys(object, "/spec", &path, &["startingDeadlineSeconds"], &mut errors);
    if old.is_none_or(|old| object.pointer("/spec/timeZone") != old.pointer("/spec/timeZone")) {
        validate_time_zone(object, &mut errors);
    }
    let at = path.child("concurrencyPolicy");
    let policy = text(object, "/spec/concurrencyPolicy");
    one_of(policy, &["Allow", "Forbid", "Replace"], &at, &mut errors);
    let at = path.child("jobTemplate").child("spec");
    validate_spec(object, JOB, &at, &mut errors);
    if let Some(selector) = object.pointer(&format!("{JOB}/selector")).filter(|s| !s.is_null()) {
        let detail = "`selector` will be auto-generated";
        errors.push(FieldError::invalid(&at.child("selector"), selector.clone(), detail));
    }
    if truth(object, &format!("{JOB}/manualSelector")) {
        errors.push(FieldError::not_supported(&at.child("manualSelector"), true, &["nil", "false"]));
    }
    let limits = ["successfulJobsHistoryLimit", "failedJobsHistoryLimit"];
    nonnegative_keys(object, "/spec", &path, &limits, &mut errors);
    errors
}

fn validate(object: &Value) -> ErrorList {
    let mut errors = validate_spec_of(object, None);
    let name = text(object, "/metadata/name");
    if name.len() > NAME_MAX {
        let at = Path::new("metadata").child("name");
        errors.push(FieldError::invalid(&at, name, "must be no more than 52 characters"));
    }
    errors
}

fn warnings(new: &Value, old: Option<&Value>) -> Vec<String> {
    let mut out: Vec<String> =
        if old.is_none() { name_warning(new).into_iter().collect() } else { Vec::new() };
    let generation = |object: &Value| integer(object, "/metadata/generation");
    if old.is_none_or(|old| generation(old) != generation(new)) {
        out.extend(warnings_spec(new, JOB, &Path::new("spec").child("jobTemplate").child("spec")));
    }
    if old.is_some() && text(new, "/spec/schedule").contains("TZ") {
        out.push(
            "cannot use TZ or CRON_TZ in spec.spec.schedule, use timeZone instead, see \
             https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/ for more details"
                .to_string(),
        );
    }
    out
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let [names, images] = template_cells(object, &format!("{JOB}/template"));
    let last = object.pointer("/status/lastScheduleTime").filter(|t| !t.is_null());
    let suspended = match object.pointer("/spec/suspend").and_then(Value::as_bool) {
        None => "<unset>",
        Some(true) => "True",
        Some(false) => "False",
    };
    vec![
        table::name(object),
        text(object, "/spec/schedule").into(),
        table::or_none(text(object, "/spec/timeZone")),
        suspended.into(),
        count(object, "/status/active").into(),
        last.map_or_else(|| "<none>".to_string(), |t| table::since(Some(t), now)).into(),
        table::age(object, now),
        names,
        images,
        cell(object.pointer(&format!("{JOB}/selector"))),
    ]
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({});
            set_generation(object, 1);
            drop_disabled(object, "/spec/jobTemplate/spec/template");
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            drop_disabled(new, "/spec/jobTemplate/spec/template");
            bump_generation(new, old, !same_in(new, old, "/spec"));
        },
        validate,
        validate_update: |new, old| validate_spec_of(new, Some(old)),
        warnings,
    },
    status: Some(Rest { prepare_update: |new, old| keep(new, old, "spec"), ..Rest::ANY }),
    columns: &[
        Column::NAME,
        Column::string("Schedule", "When jobs are made, as cron writes it."),
        Column::string("Timezone", "The time zone of the schedule."),
        Column { kind: "boolean", ..Column::string("Suspend", "Whether no further jobs are made.") },
        Column::integer("Active", "How many of its jobs run."),
        Column::string("Last Schedule", "When the last job was made."),
        Column::AGE,
        Column::string("Containers", "Names of each container in the template.").wide(),
        Column::string("Images", "Images referenced by each container in the template.").wide(),
        Column::string("Selector", "Which pods belong to a job of it.").wide(),
    ],
    row,
    ..Kind::plain("batch", "v1", "CronJob")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validation() {
        let cron_job = |patch: Value| {
            let mut object = json!({
                "metadata": {"name": "c"},
                "spec": {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": {
                    "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}
                }}}}
            });
            for (key, value) in patch.as_object().unwrap() {
                object["spec"][key] = value.clone();
            }
            defaults(&mut object);
            object
        };
        let cases: Vec<(Value, &[&str])> = vec![
            (json!({"timeZone": "Europe/Berlin"}), &[]),
            (json!({"schedule": ""}), &["spec.schedule: Required value"]),
            (
                json!({"schedule": "x"}),
                &["spec.schedule: Invalid value: \"x\": expected exactly 5 fields, found 1: [x]"],
            ),
            (
                json!({"schedule": "TZ=UTC * * * * *"}),
                &[
                    "spec.schedule: Invalid value: \"TZ=UTC * * * * *\": cannot use TZ or CRON_TZ in schedule, use timeZone field instead",
                ],
            ),
            (
                json!({"timeZone": "a//b"}),
                &["spec.timeZone: Invalid value: \"a//b\": unknown time zone a//b"],
            ),
            (
                json!({"concurrencyPolicy": "x"}),
                &[
                    "spec.concurrencyPolicy: Unsupported value: \"x\": supported values: \"Allow\", \"Forbid\", \"Replace\"",
                ],
            ),
            (
                json!({"jobTemplate": {"spec": {"template": {"spec": {
                "restartPolicy": "Always", "containers": [{"name": "c", "image": "i"}]}}}}}),
                &[
                    "spec.jobTemplate.spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\"",
                ],
            ),
        ];
        for (patch, want) in cases {
            let errors = validate(&cron_job(patch.clone()));
            assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), want, "{patch}");
        }
    }
}
