//! Job.
//!
//! Upstream counterpart: pkg/registry/batch/job, pkg/apis/batch/validation. What stays true: unless `manualSelector` is
//! set, a job selects the pods that carry its uid, which is set before the strategy runs.
use serde_json::{Value, json};

use crate::apps::v1::workload::{drop_disabled, name_warning, template_cells};
use crate::core::v1::pod_template::{defaults_spec, warnings_spec as template_warnings};
use crate::field::Path;
use crate::kind::{Column, Kind, Rest};
use crate::label_selector::cell;
use crate::object::{
    bump_generation, child, count, default_absent, default_zero, integer, items, items_mut, keep, same_in,
    set_generation, text, truth,
};
use crate::table;

mod status;
pub mod update;
pub mod validation;

/// Labels of a job's pods: the job's name and uid, each under its older name too.
const JOB_NAME_LABELS: [&str; 2] = ["job-name", "batch.kubernetes.io/job-name"];
const CONTROLLER_UID_LABELS: [&str; 2] = ["controller-uid", "batch.kubernetes.io/controller-uid"];

fn defaults(object: &mut Value) {
    let labels = object.pointer("/spec/template/metadata/labels").cloned().unwrap_or_default();
    let spec = child(object, "spec");
    if spec.get("parallelism").is_none_or(Value::is_null) {
        default_absent(spec, "completions", 1);
        default_absent(spec, "parallelism", 1);
    }
    let per_index = spec.get("backoffLimitPerIndex").is_some_and(|l| !l.is_null());
    default_absent(spec, "backoffLimit", if per_index { i32::MAX } else { 6 });
    default_absent(spec, "completionMode", "NonIndexed");
    default_absent(spec, "suspend", false);
    let has_policy = spec.get("podFailurePolicy").is_some_and(|p| !p.is_null());
    let replacement = if has_policy { "Failed" } else { "TerminatingOrFailed" };
    default_absent(spec, "podReplacementPolicy", replacement);
    default_absent(spec, "manualSelector", false);
    defaults_failure_policy(spec);
    if let Some(template) = spec.get_mut("template") {
        defaults_spec(template);
    }
    if count(&labels, "") > 0 && count(object, "/metadata/labels") == 0 {
        child(object, "metadata")["labels"] = labels;
    }
}

/// Defaults of a job's failure policy, which CronJob's template gets too.
pub fn defaults_failure_policy(job_spec: &mut Value) {
    for rule in items_mut(job_spec, "/podFailurePolicy/rules") {
        items_mut(rule, "/onPodConditions").iter_mut().for_each(|p| default_zero(p, "status", "True"));
    }
}

/// Gives the pods labels that are this job's alone, and selects them. What the client has set stays, for validation
/// to refuse.
fn generate_selector(job: &mut Value) {
    let [name, uid] = ["name", "uid"].map(|key| text(job, &format!("/metadata/{key}")).to_string());
    let spec = child(job, "spec");
    let labels = child(child(child(spec, "template"), "metadata"), "labels");
    JOB_NAME_LABELS.iter().for_each(|label| default_absent(labels, label, name.as_str()));
    CONTROLLER_UID_LABELS.iter().for_each(|label| default_absent(labels, label, uid.as_str()));
    let selected = child(child(spec, "selector"), "matchLabels");
    default_absent(selected, CONTROLLER_UID_LABELS[1], uid);
}

/// Warnings about the job's spec at `pointer`.
pub fn warnings_spec(object: &Value, pointer: &str, path: &Path) -> Vec<String> {
    let mut out = Vec::new();
    let of = |key: &str| integer(object, &format!("{pointer}/{key}"));
    let indexed = text(object, &format!("{pointer}/completionMode")) == "Indexed";
    if indexed && of("completions") > 100_000 && of("parallelism") > 10_000 {
        out.push(format!(
            "{path}: In Indexed Jobs with a number of completions higher than 10^5 and a parallelism higher than \
             10^4, Kubernetes might not be able to track completedIndexes when a big number of indexes fail"
        ));
    }
    out.extend(template_warnings(object.pointer(&format!("{pointer}/template")), &path.child("template")));
    out
}

fn warnings(new: &Value, old: Option<&Value>) -> Vec<String> {
    let generation = |object: &Value| integer(object, "/metadata/generation");
    if old.is_some_and(|old| generation(old) == generation(new)) {
        return Vec::new();
    }
    let name = if old.is_none() { name_warning(new) } else { None };
    name.into_iter().chain(warnings_spec(new, "/spec", &Path::new("spec"))).collect()
}

/// Whether the job has the condition with that status.
fn has_condition(job: &Value, kind: &str, status: &str) -> bool {
    items(job, "/status/conditions").iter().any(|c| text(c, "/type") == kind && text(c, "/status") == status)
}

fn is_true(job: &Value, kind: &str) -> bool {
    has_condition(job, kind, "True")
}

fn state(job: &Value) -> &'static str {
    let deleted = job.pointer("/metadata/deletionTimestamp").is_some_and(|t| !t.is_null());
    match () {
        () if is_true(job, "Complete") => "Complete",
        () if is_true(job, "Failed") => "Failed",
        () if deleted => "Terminating",
        () if is_true(job, "Suspended") => "Suspended",
        () if is_true(job, "FailureTarget") => "FailureTarget",
        () if is_true(job, "SuccessCriteriaMet") => "SuccessCriteriaMet",
        () => "Running",
    }
}

fn row(job: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let (succeeded, parallelism) = (integer(job, "/status/succeeded"), integer(job, "/spec/parallelism"));
    let completions = match job.pointer("/spec/completions").and_then(Value::as_i64) {
        Some(completions) => format!("{succeeded}/{completions}"),
        None if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
        None => format!("{succeeded}/1"),
    };
    let time = |key: &str| text(job, &format!("/status/{key}")).parse::<jiff::Timestamp>().ok();
    let duration = time("startTime").map(|start| {
        let seconds = time("completionTime").unwrap_or(now).duration_since(start).as_secs();
        table::human_duration(seconds)
    });
    let [names, images] = template_cells(job, "/spec/template");
    vec![
        table::name(job),
        state(job).into(),
        completions.into(),
        duration.unwrap_or_default().into(),
        table::age(job, now),
        names,
        images,
        cell(job.pointer("/spec/selector")),
    ]
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| {
            if !truth(object, "/spec/manualSelector") {
                generate_selector(object);
            }
            object["status"] = json!({});
            set_generation(object, 1);
            drop_disabled(object, "/spec/template");
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            drop_disabled(new, "/spec/template");
            bump_generation(new, old, !same_in(new, old, "/spec"));
        },
        validate: |object| validation::validate(object, true),
        validate_update: update::validate_update,
        warnings,
    },
    status: Some(Rest {
        prepare_update: |new, old| keep(new, old, "spec"),
        validate_update: status::validate_update,
        ..Rest::ANY
    }),
    columns: &[
        Column::NAME,
        Column::string("Status", "Status of the job."),
        Column::string("Completions", "How many of its pods have succeeded."),
        Column::string("Duration", "Time required to complete the job."),
        Column::AGE,
        Column::string("Containers", "Names of each container in the template.").wide(),
        Column::string("Images", "Images referenced by each container in the template.").wide(),
        Column::string("Selector", "Which pods belong to it.").wide(),
    ],
    row,
    selectable: |job| vec![("status.successful", integer(job, "/status/succeeded").to_string())],
    ..Kind::plain("batch", "v1", "Job")
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::ErrorList;

    fn job(patch: Value) -> Value {
        let mut object = json!({
            "metadata": {"name": "j", "uid": "u", "generation": 1},
            "spec": {"template": {"spec": {
                "restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]
            }}}
        });
        for (key, value) in patch.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        defaults(&mut object);
        (KIND.rest.prepare_create)(&mut object);
        object
    }

    fn texts(errors: ErrorList) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn creation() {
        let made = job(json!({}));
        assert_eq!(
            made["spec"]["selector"]["matchLabels"],
            json!({"batch.kubernetes.io/controller-uid": "u"})
        );
        assert_eq!(made["spec"]["template"]["metadata"]["labels"]["job-name"], "j");
        let indexed = |patch: Value| {
            let mut all = json!({"completionMode": "Indexed", "completions": 3});
            all.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
            all
        };
        let cases: Vec<(Value, &[&str])> = vec![
            (json!({}), &[]),
            (
                json!({"template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}}),
                &["spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\""],
            ),
            (
                json!({"manualSelector": true}),
                &[
                    "spec.selector: Required value",
                    "spec.template.metadata.labels: Invalid value: {}: `selector` does not match template `labels`",
                ],
            ),
            (
                json!({"maxFailedIndexes": 1}),
                &[
                    "spec.backoffLimitPerIndex: Required value: when maxFailedIndexes is specified",
                    "spec.maxFailedIndexes: Invalid value: 1: requires indexed completion mode",
                ],
            ),
            (
                json!({"managedBy": "x"}),
                &[
                    "spec.managedBy: Invalid value: \"x\": must be a domain-prefixed path (such as \"acme.io/foo\")",
                ],
            ),
            (
                indexed(json!({"successPolicy": {"rules": [{"succeededIndexes": "0-1,5"}]}})),
                &[
                    "spec.successPolicy.rules[0].succeededIndexes: Invalid value: \"0-1,5\": error parsing succeededIndexes: too large index: \"5\"",
                ],
            ),
            (
                json!({"podFailurePolicy": {"rules": [{"action": "Ignore", "onExitCodes": {"operator": "In", "values": [0, 2, 1]}}]}}),
                &[
                    "spec.podFailurePolicy.rules[0].onExitCodes.values[0]: Invalid value: 0: must not be 0 for the In operator",
                    "spec.podFailurePolicy.rules[0].onExitCodes.values: Invalid value: [0,2,1]: must be ordered",
                ],
            ),
        ];
        for (patch, want) in cases {
            assert_eq!(texts((KIND.rest.validate)(&job(patch.clone()))), want, "{patch}");
        }
    }

    #[test]
    fn the_template_changes_only_while_suspended() {
        let change = |old: &Value, key: &str| {
            let mut new = old.clone();
            match key {
                "selector" => new["spec"]["template"]["spec"]["nodeSelector"] = json!({"a": "b"}),
                _ => new["spec"]["template"]["spec"]["containers"][0]["image"] = "other".into(),
            }
            texts((KIND.rest.validate_update)(&new, old))
        };
        let running = job(json!({}));
        let suspended = job(json!({"suspend": true}));
        assert!(change(&running, "selector")[0].starts_with("spec.template: Invalid value"));
        assert_eq!(change(&suspended, "selector"), Vec::<String>::new());
        assert!(change(&suspended, "image")[0].starts_with("spec.template.spec: Invalid value"));
        let mut new = running.clone();
        new["spec"]["completions"] = 5.into();
        assert_eq!(
            texts((KIND.rest.validate_update)(&new, &running)),
            ["spec.completions: Invalid value: 5: field is immutable"]
        );
    }

    #[test]
    fn status_rules() {
        let old = job(json!({}));
        let update = KIND.status.unwrap().validate_update;
        let with = |status: Value| {
            let mut new = old.clone();
            new["status"] = status;
            texts(update(&new, &old))
        };
        let condition = |kind: &str| json!({"type": kind, "status": "True"});
        assert_eq!(with(json!({"active": 1, "startTime": "2024-01-01T00:00:00Z"})), Vec::<String>::new());
        let done = json!({
            "startTime": "2024-01-01T00:00:00Z", "completionTime": "2024-01-01T00:00:01Z", "succeeded": 1,
            "conditions": [condition("SuccessCriteriaMet"), condition("Complete")]
        });
        assert_eq!(with(done), Vec::<String>::new());
        let errors = with(json!({"conditions": [condition("Complete")], "active": 1}));
        assert_eq!(errors.len(), 4, "{errors:?}");
        assert!(
            errors.contains(
                &"status.completionTime: Required value: completionTime is required for Complete jobs"
                    .to_string()
            )
        );
        let errors = with(json!({"completedIndexes": "0"}));
        assert_eq!(errors.len(), 1, "{errors:?}");
    }
}
