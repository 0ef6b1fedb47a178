//! StatefulSet.
//!
//! Upstream counterpart: pkg/registry/apps/statefulset, ValidateStatefulSetSpec in pkg/apis/apps/validation.
//! Deliberately different: what is wrong with the template's labels and annotations is said once, not twice.
use k8s_openapi::api::core::v1::{
    PersistentVolumeClaimSpec, PersistentVolumeClaimVolumeSource, PodTemplateSpec, Volume,
};
use serde_json::{Value, json};

use super::workload::{
    Parts, collisions_only_grow, drop_disabled, int_or_percent_value, nonnegative_keys, not_above,
    not_above_100_percent, parts, template_cells, template_warnings, validate_int_or_percent,
};
use crate::core::v1::persistent_volume_claim;
use crate::core::v1::pod_template::{defaults_spec, validate_spec};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, NameRule, Rest};
use crate::names;
use crate::object::{
    bump_generation, child, default_absent, default_zero, integer, items, items_mut, keep, read, remove,
    same, same_in, set_generation, text,
};
use crate::quantity::parse;
use crate::table;

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    default_zero(spec, "podManagementPolicy", "OrderedReady");
    let strategy = child(spec, "updateStrategy");
    if text(strategy, "/type").is_empty() {
        strategy["type"] = "RollingUpdate".into();
        child(strategy, "rollingUpdate");
    }
    if text(strategy, "/type") == "RollingUpdate"
        && let Some(rolling) = strategy.get_mut("rollingUpdate")
    {
        default_absent(rolling, "partition", 0);
    }
    let retention = child(spec, "persistentVolumeClaimRetentionPolicy");
    default_zero(retention, "whenDeleted", "Retain");
    default_zero(retention, "whenScaled", "Retain");
    default_absent(spec, "replicas", 1);
    default_absent(spec, "revisionHistoryLimit", 10);
    if let Some(template) = spec.get_mut("template") {
        defaults_spec(template);
    }
    for claim in items_mut(spec, "/volumeClaimTemplates").iter_mut().filter(|c| c.is_object()) {
        claim["apiVersion"] = "v1".into();
        claim["kind"] = "PersistentVolumeClaim".into();
        (persistent_volume_claim::KIND.defaults)(claim);
    }
}

/// What an update leaves unchecked.
#[derive(Clone, Copy, PartialEq)]
enum Leave {
    Nothing,
    /// What can't change any more: the claims' templates and the service's name.
    Immutable,
    /// That, and the template, because the stored one is wrong already.
    ImmutableAndTemplate,
}

fn validate_strategy(object: &Value, path: &Path, errors: &mut ErrorList) {
    let at = path.child("updateStrategy");
    let rolling = object.pointer("/spec/updateStrategy/rollingUpdate").filter(|r| !r.is_null());
    match (text(object, "/spec/updateStrategy/type"), rolling) {
        ("", _) => errors.push(FieldError::required(&at, "")),
        ("OnDelete" | "RollingUpdate", None) => {}
        ("OnDelete", Some(rolling)) => {
            let detail = "only allowed for updateStrategy 'RollingUpdate'";
            errors.push(FieldError::invalid(&at.child("rollingUpdate"), rolling.clone(), detail));
        }
        ("RollingUpdate", Some(rolling)) => {
            let at = at.child("rollingUpdate");
            nonnegative_keys(rolling, "", &at, &["partition"], errors);
            if let Some(unavailable) = rolling.get("maxUnavailable").filter(|m| !m.is_null()) {
                let at = at.child("maxUnavailable");
                validate_int_or_percent(unavailable, &at, errors);
                if int_or_percent_value(unavailable) == 0 {
                    errors.push(FieldError::invalid(&at, unavailable.clone(), "cannot be 0"));
                }
                not_above_100_percent(unavailable, &at, errors);
            }
        }
        _ => {
            let value = object.pointer("/spec/updateStrategy").cloned().unwrap_or_default();
            errors.push(FieldError::invalid(&at, value, "must be 'RollingUpdate' or 'OnDelete'"));
        }
    }
}

fn validate_claims(object: &Value, path: &Path, errors: &mut ErrorList) {
    let at = path.child("persistentVolumeClaimRetentionPolicy");
    if object.pointer("/spec/persistentVolumeClaimRetentionPolicy").is_some_and(|p| !p.is_null()) {
        for key in ["whenDeleted", "whenScaled"] {
            let policy = text(object, &format!("/spec/persistentVolumeClaimRetentionPolicy/{key}"));
            if !["Delete", "Retain"].contains(&policy) {
                let supported = ["Retain", "Delete"];
                errors.push(FieldError::not_supported_as_listed(&at.child(key), policy, &supported));
            }
        }
    }
}

fn validate_claim_templates(object: &Value, path: &Path, errors: &mut ErrorList) {
    for (i, claim) in items(object, "/spec/volumeClaimTemplates").iter().enumerate() {
        let at = path.child("volumeClaimTemplates").index(i).child("spec");
        match read::<PersistentVolumeClaimSpec>(claim.get("spec"), &at) {
            Ok(spec) => persistent_volume_claim::validate_spec(&spec, &at, errors),
            Err(error) => errors.push(error),
        }
    }
}

/// The template as the controller will use it: with the claims as volumes, without a hostname.
fn with_claims(object: &Value, template: &PodTemplateSpec) -> PodTemplateSpec {
    let mut template = template.clone();
    let spec = template.spec.get_or_insert_default();
    (spec.subdomain, spec.hostname) = (None, None);
    let claims: Vec<&str> =
        items(object, "/spec/volumeClaimTemplates").iter().map(|c| text(c, "/metadata/name")).collect();
    if !claims.is_empty() {
        let volumes = spec.volumes.take().unwrap_or_default();
        let others = volumes.into_iter().filter(|v| !claims.contains(&v.name.as_str()));
        let claimed = claims.iter().map(|name| Volume {
            name: (*name).to_string(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: (*name).to_string(),
                read_only: None,
            }),
            ..Volume::default()
        });
        spec.volumes = Some(claimed.chain(others).collect());
    }
    template
}

fn validate_spec_of(object: &Value, leave: Leave) -> ErrorList {
    let path = Path::new("spec");
    let parts: Parts = match parts(object, "/spec") {
        Ok(parts) => parts,
        Err(error) => return vec![error],
    };
    let mut errors = ErrorList::new();
    let at = path.child("podManagementPolicy");
    match text(object, "/spec/podManagementPolicy") {
        "" => errors.push(FieldError::required(&at, "")),
        "OrderedReady" | "Parallel" => {}
        other => errors.push(FieldError::invalid(&at, other, "must be 'OrderedReady' or 'Parallel'")),
    }
    validate_strategy(object, &path, &mut errors);
    validate_claims(object, &path, &mut errors);
    if leave == Leave::Nothing {
        validate_claim_templates(object, &path, &mut errors);
    }
    nonnegative_keys(object, "/spec", &path, &["replicas", "minReadySeconds"], &mut errors);
    let start = integer(object, "/spec/ordinals/start");
    crate::meta::nonnegative(start, &path.child("ordinals.start"), &mut errors);
    let service = text(object, "/spec/serviceName");
    if leave == Leave::Nothing && !service.is_empty() {
        let at = path.child("serviceName");
        errors.extend(FieldError::invalid_each(&at, service, names::dns1123_label(service)));
    }
    parts.require_selector("statefulset", &path, &mut errors);
    if parts.selector_is_usable("", &path, &mut errors) {
        parts.require_match(&path, &mut errors);
        if leave != Leave::ImmutableAndTemplate {
            errors.extend(validate_spec(&with_claims(object, &parts.template), &path.child("template")));
        }
    }
    parts.require_endless("StatefulSet", &path, &mut errors);
    errors
}

/// What of a StatefulSet's spec may change.
const MUTABLE: [&str; 7] = [
    "replicas",
    "template",
    "updateStrategy",
    "minReadySeconds",
    "ordinals",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
];

fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let leave = match validate_spec_of(old, Leave::Immutable).is_empty() {
        true => Leave::Immutable,
        false => Leave::ImmutableAndTemplate,
    };
    let mut errors = validate_spec_of(new, leave);
    let fixed = |object: &Value| {
        let mut spec = object.get("spec").cloned().unwrap_or_default();
        MUTABLE.iter().for_each(|key| drop(remove(&mut spec, key)));
        spec
    };
    if !same(Some(&fixed(new)), Some(&fixed(old))) {
        let detail = "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', \
                      'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and \
                      'minReadySeconds' are forbidden";
        errors.push(FieldError::forbidden(&Path::new("spec"), detail));
    }
    errors
}

fn validate_status(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let (path, counts) =
        (Path::new("status"), ["readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas"]);
    nonnegative_keys(new, "/status", &path, &["replicas"], &mut errors);
    nonnegative_keys(new, "/status", &path, &counts, &mut errors);
    nonnegative_keys(new, "/status", &path, &["observedGeneration", "collisionCount"], &mut errors);
    not_above(new, &counts, "replicas", "cannot be greater than status.replicas", &mut errors);
    let detail = "cannot be greater than status.readyReplicas";
    not_above(new, &["availableReplicas"], "readyReplicas", detail, &mut errors);
    collisions_only_grow(new, old, &mut errors);
    errors
}

fn warnings(new: &Value, old: Option<&Value>) -> Vec<String> {
    let mut out = template_warnings(new, old);
    for (i, claim) in items(new, "/spec/volumeClaimTemplates").iter().enumerate() {
        for list in ["requests", "limits"] {
            let amount = text(claim, &format!("/spec/resources/{list}/storage"));
            if parse(amount).is_some_and(|(amount, _)| !amount.is_whole()) {
                let at = Path::new("spec").child("volumeClaimTemplates").index(i);
                let at = if old.is_some() { at.child("Spec") } else { at };
                let at = at.child("resources").child(list).key("storage");
                out.push(format!("{at}: fractional byte value \"{amount}\" is invalid, must be an integer"));
            }
        }
    }
    if integer(new, "/spec/revisionHistoryLimit") < 0 {
        out.push(
            "spec.revisionHistoryLimit: a negative value retains all historical revisions; a value >= 0 is \
             recommended"
                .to_string(),
        );
    }
    out
}

/// Removes a field that 1.36 has off by default, unless it is in use.
fn drop_max_unavailable(new: &mut Value, old: Option<&Value>) {
    let at = "/spec/updateStrategy/rollingUpdate";
    let used = old.and_then(|o| o.pointer(at)?.get("maxUnavailable")).is_some_and(|m| !m.is_null());
    if let Some(rolling) = new.pointer_mut(at).filter(|_| !used) {
        remove(rolling, "maxUnavailable");
    }
}

pub const KIND: Kind = Kind {
    name_rule: NameRule::DnsLabel,
    defaults,
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({"availableReplicas": 0, "replicas": 0});
            set_generation(object, 1);
            drop_max_unavailable(object, None);
            drop_disabled(object, "/spec/template");
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            drop_max_unavailable(new, Some(old));
            drop_disabled(new, "/spec/template");
            bump_generation(new, old, !same_in(new, old, "/spec"));
        },
        validate: |object| validate_spec_of(object, Leave::Nothing),
        validate_update,
        warnings,
    },
    status: Some(Rest {
        prepare_update: |new, old| keep(new, old, "spec"),
        validate_update: validate_status,
        ..Rest::ANY
    }),
    columns: &[
        Column::NAME,
        Column::string("Ready", "Number of the pod with ready state"),
        Column::AGE,
        Column::string("Containers", "Names of each container in the template.").wide(),
        Column::string("Images", "Images referenced by each container in the template.").wide(),
    ],
    row: |object, now| {
        let [names, images] = template_cells(object, "/spec/template");
        let (ready, wanted) = (integer(object, "/status/readyReplicas"), integer(object, "/spec/replicas"));
        vec![table::name(object), format!("{ready}/{wanted}").into(), table::age(object, now), names, images]
    },
    ..Kind::plain("apps", "v1", "StatefulSet")
};

#[cfg(test)]
mod tests {
    use super::*;

    fn set(patch: Value) -> Value {
        let mut object = json!({
            "metadata": {"name": "s", "generation": 1},
            "spec": {
                "serviceName": "s",
                "selector": {"matchLabels": {"a": "b"}},
                "template": {
                    "metadata": {"labels": {"a": "b"}},
                    "spec": {"containers": [{
                        "name": "c", "image": "i", "volumeMounts": [{"name": "data", "mountPath": "/data"}]
                    }]}
                },
                "volumeClaimTemplates": [{
                    "metadata": {"name": "data"},
                    "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
                }]
            }
        });
        for (key, value) in patch.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        defaults(&mut object);
        object
    }

    fn texts(errors: ErrorList) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn validation() {
        let claim = &set(json!({}))["spec"]["volumeClaimTemplates"][0];
        assert_eq!(
            (text(claim, "/kind"), text(claim, "/status/phase")),
            ("PersistentVolumeClaim", "Pending")
        );
        let cases: Vec<(Value, &[&str])> = vec![
            (json!({}), &[]),
            (
                json!({"volumeClaimTemplates": []}),
                &["spec.template.spec.containers[0].volumeMounts[0].name: Not found: \"data\""],
            ),
            (
                json!({"podManagementPolicy": "x"}),
                &["spec.podManagementPolicy: Invalid value: \"x\": must be 'OrderedReady' or 'Parallel'"],
            ),
            (
                json!({"updateStrategy": {"type": "OnDelete", "rollingUpdate": {"partition": 1}}}),
                &[
                    "spec.updateStrategy.rollingUpdate: Invalid value: {\"partition\":1}: only allowed for updateStrategy 'RollingUpdate'",
                ],
            ),
            (
                json!({"ordinals": {"start": -1}}),
                &["spec.ordinals.start: Invalid value: -1: must be greater than or equal to 0"],
            ),
        ];
        for (patch, want) in cases {
            assert_eq!(texts((KIND.rest.validate)(&set(patch.clone()))), want, "{patch}");
        }
    }

    #[test]
    fn only_some_of_the_spec_changes() {
        let old = set(json!({}));
        let changed = set(json!({"replicas": 3, "revisionHistoryLimit": 2, "ordinals": {"start": 1}}));
        assert_eq!(texts(validate_update(&changed, &old)), Vec::<String>::new());
        let errors = texts(validate_update(&set(json!({"serviceName": "other"})), &old));
        assert_eq!(errors.len(), 1);
        assert!(errors[0].starts_with("spec: Forbidden: updates to statefulset spec for fields other than"));
    }
}
