//! Annotations that mean something to pods: mirror pods, deletion cost, old seccomp and AppArmor profiles.
//!
//! Upstream counterpart: ValidatePodSpecificAnnotations, ValidatePodSpecificAnnotationUpdates,
//! validateSeccompAnnotationsAndFields and validateAppArmorAnnotationsAndFieldsMatchOnCreate in validation.go.
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::PodSpec;

use super::visit_containers;
use super::volumes::local_descending_path;
use crate::field::{ErrorList, FieldError, Path};

pub const MIRROR: &str = "kubernetes.io/config.mirror";
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
const SECCOMP_POD: &str = "seccomp.security.alpha.kubernetes.io/pod";
const SECCOMP_CONTAINER: &str = "container.seccomp.security.alpha.kubernetes.io/";
pub const APP_ARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";

type Annotations = BTreeMap<String, String>;

pub fn validate(annotations: Option<&Annotations>, spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let Some(annotations) = annotations else { return };
    if let Some(value) = annotations.get(MIRROR)
        && spec.node_name.as_deref().unwrap_or_default().is_empty()
    {
        let detail = "must set spec.nodeName if mirror pod annotation is set";
        errors.push(FieldError::invalid(&path.key(MIRROR), value.as_str(), detail));
    }
    if let Some(cost) = annotations.get(DELETION_COST)
        && !is_deletion_cost(cost)
    {
        errors.push(FieldError::invalid(&path.key(DELETION_COST), cost.as_str(), "must be a 32bit integer"));
    }
    for (key, profile) in annotations {
        if key == SECCOMP_POD || key.starts_with(SECCOMP_CONTAINER) {
            validate_seccomp(profile, &path.child(key), errors);
        }
        if let Some(name) = key.strip_prefix(APP_ARMOR) {
            let mut found = false;
            visit_containers(spec, path, |container, _| found |= container.name == name);
            if !found {
                errors.push(FieldError::invalid(&path.key(key), name, "container not found"));
            }
            let known = ["", "runtime/default", "unconfined"].contains(&profile.as_str());
            if !known && !profile.starts_with("localhost/") {
                let detail = format!("invalid AppArmor profile name: \"{profile}\"");
                errors.push(FieldError::invalid(&path.key(key), profile.as_str(), detail));
            }
        }
    }
}

fn is_deletion_cost(cost: &str) -> bool {
    let digits = cost.strip_prefix('-').unwrap_or(cost);
    let canonical = cost == "0" || (!digits.starts_with('0') && !digits.starts_with('+'));
    canonical && cost.parse::<i32>().is_ok()
}

fn validate_seccomp(profile: &str, path: &Path, errors: &mut ErrorList) {
    if ["runtime/default", "docker/default", "unconfined"].contains(&profile) {
        return;
    }
    match profile.strip_prefix("localhost/") {
        Some(file) => local_descending_path(file, path, errors),
        None => errors.push(FieldError::invalid(path, profile, "must be a valid seccomp profile")),
    }
}

/// Profiles given in annotation and field have to be the same.
pub fn validate_match(
    annotations: Option<&Annotations>,
    spec: &PodSpec,
    path: &Path,
    errors: &mut ErrorList,
) {
    let Some(annotations) = annotations else { return };
    let pod = spec.security_context.as_ref();
    let same = |annotation: &str,
                kind: &str,
                file: &Option<String>,
                what: &str,
                at: &Path,
                errors: &mut ErrorList| {
        let type_detail = format!("{what} type in annotation and field must match");
        let wrong_type = match kind {
            "Unconfined" => annotation != "unconfined",
            "RuntimeDefault" => {
                annotation != "runtime/default" && !(what == "seccomp" && annotation == "docker/default")
            }
            "Localhost" => match annotation.strip_prefix("localhost/") {
                None => true,
                Some(name) => {
                    if file.as_deref() != Some(name) {
                        let detail = format!("{what} profile in annotation and field must match");
                        errors.push(FieldError::forbidden(&at.child("localhostProfile"), detail));
                    }
                    false
                }
            },
            _ => false,
        };
        if wrong_type {
            errors.push(FieldError::forbidden(&at.child("type"), type_detail));
        }
    };
    if let (Some(profile), Some(annotation)) =
        (pod.and_then(|c| c.seccomp_profile.as_ref()), annotations.get(SECCOMP_POD))
    {
        let at = path.child("securityContext").child("seccompProfile");
        same(annotation, &profile.type_, &profile.localhost_profile, "seccomp", &at, errors);
    }
    let windows = spec.os.as_ref().is_some_and(|os| os.name == "windows");
    visit_containers(spec, path, |container, at| {
        let context = at.child("securityContext");
        let own = container.security_context.as_ref();
        if let (Some(profile), Some(annotation)) = (
            own.and_then(|c| c.seccomp_profile.as_ref()),
            annotations.get(&format!("{SECCOMP_CONTAINER}{}", container.name)),
        ) {
            let at = context.child("seccompProfile");
            same(annotation, &profile.type_, &profile.localhost_profile, "seccomp", &at, errors);
        }
        let profile = own
            .and_then(|c| c.app_armor_profile.as_ref())
            .or_else(|| pod.and_then(|c| c.app_armor_profile.as_ref()))
            .filter(|_| !windows);
        if let (Some(profile), Some(annotation)) =
            (profile, annotations.get(&format!("{APP_ARMOR}{}", container.name)))
        {
            let at = context.child("appArmorProfile");
            same(annotation, &profile.type_, &profile.localhost_profile, "apparmor", &at, errors);
        }
    });
}

/// Annotations that no update may add, change or remove.
pub fn validate_update(
    new: Option<&Annotations>,
    old: Option<&Annotations>,
    path: &Path,
    errors: &mut ErrorList,
) {
    let none = Annotations::new();
    let (new, old) = (new.unwrap_or(&none), old.unwrap_or(&none));
    for key in old.iter().filter(|(k, v)| new.get(*k) != Some(v)).map(|(k, _)| k) {
        if key.starts_with(APP_ARMOR) {
            let detail = "may not remove or update AppArmor annotations";
            errors.push(FieldError::forbidden(&path.key(key), detail));
        }
        if key == MIRROR {
            let detail = "may not remove or update mirror pod annotation";
            errors.push(FieldError::forbidden(&path.key(key), detail));
        }
    }
    for key in new.keys().filter(|k| !old.contains_key(*k)) {
        if key.starts_with(APP_ARMOR) {
            errors.push(FieldError::forbidden(&path.key(key), "may not add AppArmor annotations"));
        }
        if key == MIRROR {
            errors.push(FieldError::forbidden(&path.key(key), "may not add mirror pod annotation"));
        }
    }
}
