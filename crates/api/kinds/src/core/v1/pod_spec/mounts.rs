//! A container's volume mounts and devices.
//!
//! Upstream counterpart: ValidateVolumeMounts and ValidateVolumeDevices in validation.go. Like upstream, errors in a
//! mount's subPath and propagation name the list, not the item.
use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Container, VolumeMount};

use super::Scope;
use super::volumes::{local_descending_path, path_no_backsteps};
use crate::field::{ErrorList, FieldError, Path};
use crate::object::or_empty;

pub fn validate_mounts(container: &Container, scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    let mut paths = BTreeSet::new();
    for (i, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let at = path.index(i);
        let (name_path, mount_path) = (at.child("name"), at.child("mountPath"));
        if mount.name.is_empty() {
            errors.push(FieldError::required(&name_path, ""));
        }
        if !scope.volumes.contains_key(mount.name.as_str()) {
            errors.push(FieldError::not_found(&name_path, mount.name.as_str()));
        }
        if mount.mount_path.is_empty() {
            errors.push(FieldError::required(&mount_path, ""));
        }
        if !paths.insert(mount.mount_path.as_str()) {
            errors.push(FieldError::invalid(&mount_path, mount.mount_path.as_str(), "must be unique"));
        }
        for device in container.volume_devices.iter().flatten() {
            if device.name == mount.name {
                let detail = "must not already exist in volumeDevices";
                errors.push(FieldError::invalid(&name_path, mount.name.as_str(), detail));
            }
            if device.device_path == mount.mount_path {
                let detail = "must not already exist as a path in volumeDevices";
                errors.push(FieldError::invalid(&mount_path, mount.mount_path.as_str(), detail));
            }
        }
        let (sub_path, expression) = (or_empty(&mount.sub_path), or_empty(&mount.sub_path_expr));
        if !sub_path.is_empty() {
            local_descending_path(sub_path, &path.child("subPath"), errors);
        }
        if !expression.is_empty() {
            if !sub_path.is_empty() {
                let detail = "subPathExpr and subPath are mutually exclusive";
                errors.push(FieldError::invalid(&at.child("subPathExpr"), expression, detail));
            }
            local_descending_path(expression, &path.child("subPathExpr"), errors);
        }
        propagation(mount, container, &path.child("mountPropagation"), errors);
        recursive_read_only(mount, &path.child("recursiveReadOnly"), errors);
    }
}

fn propagation(mount: &VolumeMount, container: &Container, path: &Path, errors: &mut ErrorList) {
    let Some(propagation) = &mount.mount_propagation else { return };
    let supported = ["Bidirectional", "HostToContainer", "None"];
    if !supported.contains(&propagation.as_str()) {
        errors.push(FieldError::not_supported(path, propagation.as_str(), &supported));
    }
    let privileged = container.security_context.as_ref().and_then(|c| c.privileged) == Some(true);
    if propagation == "Bidirectional" && !privileged {
        let detail = "Bidirectional mount propagation is available only to privileged containers";
        errors.push(FieldError::forbidden(path, detail));
    }
}

fn recursive_read_only(mount: &VolumeMount, path: &Path, errors: &mut ErrorList) {
    match mount.recursive_read_only.as_deref() {
        None | Some("Disabled") => {}
        Some("Enabled" | "IfPossible") => {
            if mount.read_only != Some(true) {
                errors.push(FieldError::forbidden(path, "may only be specified when readOnly is true"));
            }
            if mount.mount_propagation.as_deref().is_some_and(|p| p != "None") {
                let detail = "may only be specified when mountPropagation is None or not specified";
                errors.push(FieldError::forbidden(path, detail));
            }
        }
        Some(other) => {
            errors.push(FieldError::not_supported(path, other, &["Disabled", "Enabled", "IfPossible"]));
        }
    }
}

pub fn validate_devices(container: &Container, scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    let (mut names, mut paths) = (BTreeSet::new(), BTreeSet::new());
    for (i, device) in container.volume_devices.iter().flatten().enumerate() {
        let (name, device_path) = (device.name.as_str(), device.device_path.as_str());
        let (name_at, path_at) = (path.index(i).child("name"), path.index(i).child("devicePath"));
        if name.is_empty() {
            errors.push(FieldError::required(&name_at, ""));
        }
        if names.contains(name) {
            errors.push(FieldError::invalid(&name_at, name, "must be unique"));
        }
        match scope.volumes.get(name) {
            None => errors.push(FieldError::not_found(&name_at, name)),
            Some(volume) if volume.persistent_volume_claim.is_none() && volume.ephemeral.is_none() => {
                let detail =
                    "can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode";
                errors.push(FieldError::invalid(&name_at, name, detail));
            }
            Some(_) => {}
        }
        if device_path.is_empty() {
            errors.push(FieldError::required(&path_at, ""));
        }
        if paths.contains(device_path) {
            errors.push(FieldError::invalid(&path_at, device_path, "must be unique"));
        }
        let mut steps = ErrorList::new();
        path_no_backsteps(device_path, path, &mut steps);
        if steps.is_empty() {
            paths.insert(device_path);
        } else {
            errors.push(FieldError::invalid(&path_at, device_path, "can not contain backsteps ('..')"));
        }
        for mount in container.volume_mounts.iter().flatten() {
            if mount.name == name {
                errors.push(FieldError::invalid(&name_at, name, "must not already exist in volumeMounts"));
            }
            if mount.mount_path == device_path {
                let detail = "must not already exist as a path in volumeMounts";
                errors.push(FieldError::invalid(&path_at, device_path, detail));
            }
        }
        if !name.is_empty() {
            names.insert(name);
        }
    }
}
