//! Volumes: names, exactly one source each, and the sources in use today.
//!
//! Upstream counterpart: ValidateVolumes and validateVolumeSource in validation.go.
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{HostPathVolumeSource, KeyToPath, PodSpec, Volume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{Scope, older_volumes, one_of, projected};
use crate::core::v1::persistent_volume_claim;
use crate::field::{ErrorList, FieldError, Path};
use crate::names;
use crate::object::or_empty;
use crate::quantity::{Amount, amount};

const FILE_MODE: &str = "must be a number between 0 and 0777 (octal), both inclusive";
const HOST_PATH_TYPES: &[&str] =
    &["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];

/// The valid volumes by name, and what is wrong with the others.
pub fn validate_volumes<'a>(
    spec: &'a PodSpec,
    meta: Option<&ObjectMeta>,
    path: &Path,
) -> (BTreeMap<&'a str, &'a Volume>, ErrorList) {
    let pod_name = meta.and_then(|m| m.name.as_deref()).filter(|name| !name.is_empty());
    let volumes = spec.volumes.as_deref().unwrap_or_default();
    let created: BTreeSet<String> = pod_name
        .into_iter()
        .flat_map(|pod| {
            volumes.iter().filter(|v| v.ephemeral.is_some()).map(move |v| format!("{pod}-{}", v.name))
        })
        .collect();
    let (mut valid, mut errors) = (BTreeMap::new(), ErrorList::new());
    for (i, volume) in volumes.iter().enumerate() {
        let at = path.index(i);
        let name_path = at.child("name");
        let mut own = ErrorList::new();
        validate_source(volume, pod_name, meta.is_some(), &at, &mut own);
        if volume.name.is_empty() {
            own.push(FieldError::required(&name_path, ""));
        } else {
            own.extend(FieldError::invalid_each(
                &name_path,
                &volume.name,
                names::dns1123_label(&volume.name),
            ));
        }
        if valid.contains_key(volume.name.as_str()) {
            own.push(FieldError::duplicate(&name_path, volume.name.as_str()));
        }
        if own.is_empty() {
            valid.insert(volume.name.as_str(), volume);
        }
        errors.extend(own);
        if let Some(claim) = &volume.persistent_volume_claim
            && created.contains(&claim.claim_name)
        {
            let detail = "must not reference a PVC that gets created for an ephemeral volume";
            let at = at.child("persistentVolumeClaim").child("claimName");
            errors.push(FieldError::invalid(&at, claim.claim_name.as_str(), detail));
        }
    }
    (valid, errors)
}

/// Reports each source that is set after the first.
fn validate_source(
    volume: &Volume,
    pod_name: Option<&str>,
    is_pod: bool,
    path: &Path,
    errors: &mut ErrorList,
) {
    let mut set = sources(volume).into_iter().filter(|(_, set)| *set).map(|(key, _)| key);
    let Some(first) = set.next() else {
        errors.push(FieldError::required(path, "must specify a volume type"));
        return;
    };
    if !older_volumes::validate(volume, first, path, errors) {
        validate_one(volume, first, pod_name, is_pod, path, errors);
    }
    for more in set {
        errors.push(FieldError::forbidden(&path.child(more), "may not specify more than 1 volume type"));
    }
}

/// Sources in upstream's order, with the names its messages give them.
fn sources(v: &Volume) -> [(&'static str, bool); 30] {
    [
        ("emptyDir", v.empty_dir.is_some()),
        ("hostPath", v.host_path.is_some()),
        ("gitRepo", v.git_repo.is_some()),
        ("gcePersistentDisk", v.gce_persistent_disk.is_some()),
        ("awsElasticBlockStore", v.aws_elastic_block_store.is_some()),
        ("secret", v.secret.is_some()),
        ("nfs", v.nfs.is_some()),
        ("iscsi", v.iscsi.is_some()),
        ("glusterfs", v.glusterfs.is_some()),
        ("flocker", v.flocker.is_some()),
        ("persistentVolumeClaim", v.persistent_volume_claim.is_some()),
        ("rbd", v.rbd.is_some()),
        ("cinder", v.cinder.is_some()),
        ("cephFS", v.cephfs.is_some()),
        ("quobyte", v.quobyte.is_some()),
        ("downwarAPI", v.downward_api.is_some()),
        ("fc", v.fc.is_some()),
        ("flexVolume", v.flex_volume.is_some()),
        ("configMap", v.config_map.is_some()),
        ("azureFile", v.azure_file.is_some()),
        ("vsphereVolume", v.vsphere_volume.is_some()),
        ("photonPersistentDisk", v.photon_persistent_disk.is_some()),
        ("portworxVolume", v.portworx_volume.is_some()),
        ("azureDisk", v.azure_disk.is_some()),
        ("storageos", v.storageos.is_some()),
        ("projected", v.projected.is_some()),
        ("scaleIO", v.scale_io.is_some()),
        ("csi", v.csi.is_some()),
        ("ephemeral", v.ephemeral.is_some()),
        ("image", v.image.is_some()),
    ]
}

fn validate_one(
    volume: &Volume,
    source: &str,
    pod_name: Option<&str>,
    is_pod: bool,
    path: &Path,
    errors: &mut ErrorList,
) {
    let at = path.child(source);
    match source {
        "emptyDir" => {
            let limit = volume.empty_dir.as_ref().and_then(|e| e.size_limit.as_ref());
            if limit.is_some_and(|limit| amount(limit) < Amount::ZERO) {
                let detail = "SizeLimit field must be a valid resource quantity";
                errors.push(FieldError::forbidden(&at.child("sizeLimit"), detail));
            }
        }
        "hostPath" => volume.host_path.iter().for_each(|s| validate_host_path(s, &at, errors)),
        "secret" => {
            let Some(secret) = &volume.secret else { return };
            if or_empty(&secret.secret_name).is_empty() {
                errors.push(FieldError::required(&at.child("secretName"), ""));
            }
            file_mode(secret.default_mode, &at.child("defaultMode"), errors);
            keys_to_paths(secret.items.as_deref().unwrap_or_default(), &at.child("items"), errors);
        }
        "configMap" => {
            let Some(map) = &volume.config_map else { return };
            if map.name.is_empty() {
                errors.push(FieldError::required(&at.child("name"), ""));
            }
            file_mode(map.default_mode, &at.child("defaultMode"), errors);
            keys_to_paths(map.items.as_deref().unwrap_or_default(), &at.child("items"), errors);
        }
        "persistentVolumeClaim"
            if volume.persistent_volume_claim.as_ref().is_some_and(|c| c.claim_name.is_empty()) =>
        {
            errors.push(FieldError::required(&at.child("claimName"), ""));
        }
        "downwarAPI" => {
            let Some(downward) = &volume.downward_api else { return };
            let at = path.child("downwardAPI");
            file_mode(downward.default_mode, &at.child("defaultMode"), errors);
            for file in downward.items.iter().flatten() {
                projected::validate_downward_file(file, &at, errors);
            }
        }
        "projected" => volume.projected.iter().for_each(|p| projected::validate(p, &at, errors)),
        "ephemeral" => validate_ephemeral(volume, pod_name, path, errors),
        "image" => {
            let Some(image) = &volume.image else { return };
            if is_pod && or_empty(&image.reference).is_empty() {
                errors.push(FieldError::required(&at.child("reference"), ""));
            }
            let policies = &["Always", "IfNotPresent", "Never"];
            one_of(or_empty(&image.pull_policy), policies, &at.child("pullPolicy"), errors);
        }
        _ => {}
    }
}

fn validate_ephemeral(volume: &Volume, pod_name: Option<&str>, path: &Path, errors: &mut ErrorList) {
    let at = path.child("ephemeral").child("volumeClaimTemplate");
    match volume.ephemeral.as_ref().and_then(|e| e.volume_claim_template.as_ref()) {
        None => errors.push(FieldError::required(&at, "")),
        Some(template) => {
            if let Some(meta) = &template.metadata {
                let at = at.child("metadata");
                errors.extend(crate::meta::validate_annotations(
                    meta.annotations.as_ref(),
                    &at.child("annotations"),
                ));
                errors.extend(crate::meta::validate_labels(meta.labels.as_ref(), &at.child("labels")));
                for (key, set) in [
                    ("name", meta.name.is_some()),
                    ("generateName", meta.generate_name.is_some()),
                    ("namespace", meta.namespace.is_some()),
                ] {
                    if set {
                        errors.push(FieldError::forbidden(&at.child(key), "cannot be set"));
                    }
                }
            }
            persistent_volume_claim::validate_spec(&template.spec, &at.child("spec"), errors);
        }
    }
    if let Some(pod) = pod_name.filter(|_| !volume.name.is_empty()) {
        let claim = format!("{pod}-{}", volume.name);
        for message in names::dns1123_subdomain(&claim) {
            let detail = format!("PVC name \"{claim}\": {message}");
            errors.push(FieldError::invalid(&path.child("name"), volume.name.as_str(), detail));
        }
    }
}

pub fn validate_host_path(source: &HostPathVolumeSource, path: &Path, errors: &mut ErrorList) {
    if source.path.is_empty() {
        errors.push(FieldError::required(&path.child("path"), ""));
        return;
    }
    path_no_backsteps(&source.path, &path.child("path"), errors);
    if let Some(kind) = source.type_.as_deref().filter(|t| !HOST_PATH_TYPES.contains(t)) {
        errors.push(FieldError::not_supported(&path.child("type"), kind, HOST_PATH_TYPES));
    }
}

pub fn keys_to_paths(items: &[KeyToPath], path: &Path, errors: &mut ErrorList) {
    for (i, item) in items.iter().enumerate() {
        let at = path.index(i);
        if item.key.is_empty() {
            errors.push(FieldError::required(&at.child("key"), ""));
        }
        if item.path.is_empty() {
            errors.push(FieldError::required(&at.child("path"), ""));
        }
        local_non_reserved_path(&item.path, &at.child("path"), errors);
        file_mode(item.mode, &at.child("mode"), errors);
    }
}

pub fn file_mode(mode: Option<i32>, path: &Path, errors: &mut ErrorList) {
    if let Some(mode) = mode.filter(|mode| !(0..=0o777).contains(mode)) {
        errors.push(FieldError::invalid(path, mode, FILE_MODE));
    }
}

/// No `..` among a path's parts.
pub fn path_no_backsteps(target: &str, path: &Path, errors: &mut ErrorList) {
    if target.split('/').any(|part| part == "..") {
        errors.push(FieldError::invalid(path, target, "must not contain '..'"));
    }
}

/// A relative path without `..`.
pub fn local_descending_path(target: &str, path: &Path, errors: &mut ErrorList) {
    if target.starts_with('/') {
        errors.push(FieldError::invalid(path, target, "must be a relative path"));
    }
    path_no_backsteps(target, path, errors);
}

/// A relative path without `..` that doesn't start with two dots either.
pub fn local_non_reserved_path(target: &str, path: &Path, errors: &mut ErrorList) {
    local_descending_path(target, path, errors);
    if target.starts_with("..") && !target.starts_with("../") {
        errors.push(FieldError::invalid(path, target, "must not start with '..'"));
    }
}

/// Service account tokens in projected volumes need a service account's name; only Pods are asked.
pub fn validate_tokens_have_account(scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    if !or_empty(&scope.spec.service_account_name).is_empty() {
        return;
    }
    for (i, volume) in scope.spec.volumes.iter().flatten().enumerate() {
        let sources = volume.projected.as_ref().and_then(|p| p.sources.as_deref()).unwrap_or_default();
        for (j, _) in sources.iter().enumerate().filter(|(_, s)| s.service_account_token.is_some()) {
            let at = path.child("volumes").index(i).child("projected").child("sources").index(j);
            let detail = "must not be specified when serviceAccountName is not set";
            errors.push(FieldError::forbidden(&at.child("serviceAccountToken"), detail));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::check;

    #[test]
    fn volume_and_mount_rules() {
        let volumes = |volumes: Value| json!({"volumes": volumes});
        let mounts = |mounts: Value| {
            json!({"volumes": [{"name": "v", "emptyDir": {}}],
                "containers": [{"name": "a", "image": "i", "volumeMounts": mounts}]})
        };
        let cases: Vec<(Value, &str)> = vec![
            (
                volumes(json!([{"name": "A"}])),
                "spec.volumes[0].name: Invalid value: \"A\": a lowercase RFC 1123 label",
            ),
            (volumes(json!([{"name": "a"}, {"name": "a"}])), "spec.volumes[1].name: Duplicate value: \"a\""),
            (
                volumes(json!([{"name": "a", "emptyDir": {}, "hostPath": {"path": "/"}}])),
                "spec.volumes[0].hostPath: Forbidden: may not specify more than 1 volume type",
            ),
            (
                volumes(json!([{"name": "a", "hostPath": {"path": "/a/../b"}}])),
                "spec.volumes[0].hostPath.path: Invalid value: \"/a/../b\": must not contain '..'",
            ),
            (
                volumes(json!([{"name": "a", "hostPath": {"path": "/a", "type": "x"}}])),
                "spec.volumes[0].hostPath.type: Unsupported value: \"x\": supported values: \"\", \"BlockDevice\"",
            ),
            (
                volumes(json!([{"name": "a", "secret": {"secretName": "s", "defaultMode": 512}}])),
                "spec.volumes[0].secret.defaultMode: Invalid value: 512: must be a number between 0 and 0777",
            ),
            (
                volumes(
                    json!([{"name": "a", "configMap": {"name": "s", "items": [{"key": "k", "path": "/x"}]}}]),
                ),
                "spec.volumes[0].configMap.items[0].path: Invalid value: \"/x\": must be a relative path",
            ),
            (
                volumes(
                    json!([{"name": "a", "projected": {"sources": [{"serviceAccountToken": {"path": "t", "expirationSeconds": 5}}]}}]),
                ),
                "spec.volumes[0].projected.sources[0].serviceAccountToken.expirationSeconds: Invalid value: 5: may not specify a duration less than 10 minutes",
            ),
            (
                volumes(json!([{"name": "a", "nfs": {"server": "s", "path": "x"}}])),
                "spec.volumes[0].nfs.path: Invalid value: \"x\": must be an absolute path",
            ),
            (
                mounts(json!([{"name": "w", "mountPath": "/a"}])),
                "spec.containers[0].volumeMounts[0].name: Not found: \"w\"",
            ),
            (
                mounts(json!([{"name": "v", "mountPath": "/a"}, {"name": "v", "mountPath": "/a"}])),
                "spec.containers[0].volumeMounts[1].mountPath: Invalid value: \"/a\": must be unique",
            ),
            (
                mounts(json!([{"name": "v", "mountPath": "/a", "subPath": "/b"}])),
                "spec.containers[0].volumeMounts.subPath: Invalid value: \"/b\": must be a relative path",
            ),
            (
                mounts(json!([{"name": "v", "mountPath": "/a", "mountPropagation": "Bidirectional"}])),
                "spec.containers[0].volumeMounts.mountPropagation: Forbidden: Bidirectional mount propagation",
            ),
        ];
        for (patch, want) in cases {
            let got = check(patch.clone(), true);
            assert!(got.len() == 1 && got[0].starts_with(want), "{patch}: {got:?}");
        }
    }
}
