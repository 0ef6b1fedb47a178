//! Projected volumes and downward API files.
//!
//! Upstream counterpart: validateProjectionSources and validateDownwardAPIVolumeFile in validation.go. The sources
//! clusterTrustBundle and podCertificate are off in 1.36 and dropped before.
use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, KeyToPath, ProjectedVolumeSource, VolumeProjection};

use super::env::{VOLUME_FIELDS, validate_field_ref, validate_resource_field_ref};
use super::volumes::{file_mode, keys_to_paths, local_non_reserved_path};
use crate::field::{ErrorList, FieldError, Path};

pub fn validate(projected: &ProjectedVolumeSource, path: &Path, errors: &mut ErrorList) {
    file_mode(projected.default_mode, &path.child("defaultMode"), errors);
    let mut taken = BTreeSet::new();
    for (i, source) in projected.sources.iter().flatten().enumerate() {
        let at = path.child("sources").index(i);
        validate_source(source, path, &at, &mut taken, errors);
    }
}

fn validate_source<'a>(
    source: &'a VolumeProjection,
    volume: &Path,
    path: &Path,
    taken: &mut BTreeSet<&'a str>,
    errors: &mut ErrorList,
) {
    let mut count = 0;
    let keyed = [
        ("secret", source.secret.as_ref().map(|s| (&s.name, &s.items))),
        ("configMap", source.config_map.as_ref().map(|s| (&s.name, &s.items))),
    ];
    for (key, (name, items)) in keyed.into_iter().filter_map(|(key, source)| source.map(|s| (key, s))) {
        count += 1;
        let at = path.child(key);
        if name.is_empty() {
            errors.push(FieldError::required(&at.child("name"), ""));
        }
        let items: &[KeyToPath] = items.as_deref().unwrap_or_default();
        keys_to_paths(items, &at.child("items"), errors);
        items.iter().for_each(|item| claim_path(&item.path, name, volume, taken, errors));
    }
    if let Some(downward) = &source.downward_api {
        count += 1;
        for file in downward.items.iter().flatten() {
            validate_downward_file(file, &path.child("downwardAPI"), errors);
            claim_path(&file.path, &file.path, volume, taken, errors);
        }
    }
    if let Some(token) = &source.service_account_token {
        count += 1;
        let at = path.child("serviceAccountToken").child("expirationSeconds");
        let seconds = token.expiration_seconds.unwrap_or_default();
        if seconds < 600 {
            let detail = "may not specify a duration less than 10 minutes";
            errors.push(FieldError::invalid(&at, seconds, detail));
        }
        if seconds > 1 << 32 {
            let detail = "may not specify a duration larger than 2^32 seconds";
            errors.push(FieldError::invalid(&at, seconds, detail));
        }
        if token.path.is_empty() {
            errors.push(FieldError::required(&volume.child("path"), ""));
        } else {
            local_non_reserved_path(&token.path, &volume.child("path"), errors);
        }
    }
    if count > 1 {
        errors.push(FieldError::forbidden(path, "may not specify more than 1 volume type per source"));
    }
}

fn claim_path<'a>(
    file: &'a str,
    shown: &str,
    volume: &Path,
    taken: &mut BTreeSet<&'a str>,
    errors: &mut ErrorList,
) {
    if !file.is_empty() && !taken.insert(file) {
        errors.push(FieldError::invalid(volume, shown, "conflicting duplicate paths"));
    }
}

pub fn validate_downward_file(file: &DownwardAPIVolumeFile, path: &Path, errors: &mut ErrorList) {
    if file.path.is_empty() {
        errors.push(FieldError::required(&path.child("path"), ""));
    }
    local_non_reserved_path(&file.path, &path.child("path"), errors);
    match (&file.field_ref, &file.resource_field_ref) {
        (Some(field), resource) => {
            validate_field_ref(field, VOLUME_FIELDS, &path.child("fieldRef"), errors);
            if resource.is_some() {
                let detail = "fieldRef and resourceFieldRef can not be specified simultaneously";
                errors.push(FieldError::invalid(path, "resource", detail));
            }
        }
        (None, Some(resource)) => {
            validate_resource_field_ref(resource, true, &path.child("resourceFieldRef"), errors);
        }
        (None, None) => {
            errors.push(FieldError::required(path, "one of fieldRef and resourceFieldRef is required"));
        }
    }
    file_mode(file.mode, &path.child("mode"), errors);
}
