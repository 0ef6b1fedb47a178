//! PersistentVolume.
//!
//! Upstream counterpart: pkg/registry/core/persistentvolume, ValidatePersistentVolumeSpec in validation.go. Left out:
//! checks inside sources other than hostPath, local, nfs and csi; lastPhaseTransitionTime, which needs a clock.
use k8s_openapi::api::core::v1::PersistentVolumeSpec;
use serde_json::{Value, json};

use super::persistent_volume_claim::{access_modes, validate_access_modes};
use super::pod_spec::affinity::validate_node_selector;
use super::pod_spec::defaults::volume_source_defaults;
use super::pod_spec::older_volumes::validate_csi_driver_name;
use super::pod_spec::volumes::{path_no_backsteps, validate_host_path};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::FIELD_IMMUTABLE;
use crate::names;
use crate::object::{child, default_absent, default_zero, keep, or_empty, read, same_in, text};
use crate::quantity::{self, Amount, amount, round_up_to_milli};
use crate::table;

const SOURCES: &[&str] = &[
    "hostPath",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "glusterfs",
    "flocker",
    "nfs",
    "rbd",
    "quobyte",
    "cephfs",
    "iscsi",
    "cinder",
    "fc",
    "flexVolume",
    "azureFile",
    "vsphereVolume",
    "photonPersistentDisk",
    "portworxVolume",
    "azureDisk",
    "scaleIO",
    "local",
    "storageos",
    "csi",
];

fn defaults(object: &mut Value) {
    default_zero(child(object, "status"), "phase", "Pending");
    let spec = child(object, "spec");
    default_zero(spec, "persistentVolumeReclaimPolicy", "Retain");
    default_absent(spec, "volumeMode", "Filesystem");
    round_up_to_milli(spec.get_mut("capacity"));
    volume_source_defaults(spec);
}

fn validate(object: &Value) -> ErrorList {
    let path = Path::new("spec");
    let spec: PersistentVolumeSpec = match read(object.get("spec"), &path) {
        Ok(spec) => spec,
        Err(error) => return vec![error],
    };
    let mut errors = ErrorList::new();
    validate_access_modes(spec.access_modes.as_deref().unwrap_or_default(), "", &path, &mut errors);
    let capacity = spec.capacity.clone().unwrap_or_default();
    let at = path.child("capacity");
    if capacity.is_empty() {
        errors.push(FieldError::required(&at, ""));
    }
    if capacity.len() > 1 || !capacity.contains_key("storage") {
        errors.push(FieldError::not_supported(&at, json!(capacity), &["storage"]));
    }
    for (name, size) in capacity.iter().filter(|(_, size)| amount(size) <= Amount::ZERO) {
        let detail = "must be greater than zero";
        errors.push(FieldError::invalid(&at.key(name), quantity::text(size), detail));
    }
    let policies = ["Delete", "Recycle", "Retain"];
    if let Some(policy) = spec.persistent_volume_reclaim_policy.as_deref().filter(|p| !policies.contains(p)) {
        let at = path.child("persistentVolumeReclaimPolicy");
        errors.push(FieldError::not_supported(&at, policy, &policies));
    }
    if let Some(affinity) = &spec.node_affinity {
        let at = path.child("nodeAffinity").child("required");
        match &affinity.required {
            Some(selector) => validate_node_selector(selector, &at, &mut errors),
            None => errors.push(FieldError::required(&at, "must specify required node constraints")),
        }
    }
    validate_source(object, &spec, &path, &mut errors);
    let class = or_empty(&spec.storage_class_name);
    if !class.is_empty() {
        let at = path.child("storageClassName");
        errors.extend(FieldError::invalid_each(&at, class, names::dns1123_subdomain(class)));
    }
    if let Some(mode) = spec.volume_mode.as_deref().filter(|m| !["Block", "Filesystem"].contains(m)) {
        errors.push(FieldError::not_supported(&path.child("volumeMode"), mode, &["Block", "Filesystem"]));
    }
    errors
}

fn validate_source(object: &Value, spec: &PersistentVolumeSpec, path: &Path, errors: &mut ErrorList) {
    let source = object.get("spec");
    let mut set = SOURCES.iter().filter(|key| source.and_then(|s| s.get(key)).is_some_and(|s| !s.is_null()));
    if set.next().is_none() {
        errors.push(FieldError::required(path, "must specify a volume type"));
    }
    for more in set {
        errors.push(FieldError::forbidden(&path.child(more), "may not specify more than 1 volume type"));
    }
    if let Some(host_path) = &spec.host_path {
        validate_host_path(host_path, &path.child("hostPath"), errors);
        if host_path.path == "/" && spec.persistent_volume_reclaim_policy.as_deref() == Some("Recycle") {
            let detail = "may not be 'recycle' for a hostPath mount of '/'";
            errors.push(FieldError::forbidden(&path.child("persistentVolumeReclaimPolicy"), detail));
        }
    }
    if let Some(local) = &spec.local {
        let at = path.child("local").child("path");
        if local.path.is_empty() {
            errors.push(FieldError::required(&at, ""));
        } else {
            path_no_backsteps(&local.path, &at, errors);
        }
        if spec.node_affinity.is_none() {
            let detail = "Local volume requires node affinity";
            errors.push(FieldError::required(&path.child("nodeAffinity"), detail));
        }
    }
    if let Some(csi) = &spec.csi {
        let at = path.child("csi");
        validate_csi_driver_name(&csi.driver, &at.child("driver"), errors);
        if csi.volume_handle.is_empty() {
            errors.push(FieldError::required(&at.child("volumeHandle"), ""));
        }
    }
}

fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let mut errors = validate(new);
    if SOURCES.iter().any(|key| !same_in(new, old, &format!("/spec/{key}"))) {
        let at = Path::new("spec").child("persistentvolumesource");
        errors.push(FieldError::forbidden(&at, "spec.persistentvolumesource is immutable after creation"));
    }
    if !same_in(new, old, "/spec/volumeMode") {
        let mode = text(new, "/spec/volumeMode");
        errors.push(FieldError::invalid(&Path::new("volumeMode"), mode, FIELD_IMMUTABLE));
    }
    errors
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| object["status"] = json!({"phase": "Pending"}),
        prepare_update: |new, old| keep(new, old, "status"),
        validate,
        validate_update,
        warnings: |_, _| Vec::new(),
    },
    status: Some(Rest { prepare_update: |new, old| keep(new, old, "spec"), ..Rest::ANY }),
    columns: &[
        Column::NAME,
        Column::string("Capacity", "The volume's size."),
        Column::string("Access Modes", "How the volume may be mounted."),
        Column::string("Reclaim Policy", "What becomes of it when its claim goes."),
        Column::string("Status", "What has become of the volume."),
        Column::string("Claim", "The claim that is bound to it."),
        Column::string("StorageClass", "StorageClass of the pv"),
        Column::string("VolumeAttributesClass", "VolumeAttributesClass of the pv"),
        Column::string("Reason", "Why it is in this state."),
        Column::AGE,
        Column::string("VolumeMode", "Filesystem or Block.").wide(),
    ],
    row: |object, now| {
        let deleted = object.pointer("/metadata/deletionTimestamp").is_some_and(|t| !t.is_null());
        let unset = |pointer: &str| match text(object, pointer) {
            "" => Value::from("<unset>"),
            value => value.into(),
        };
        let claim = match object.pointer("/spec/claimRef") {
            Some(claim) if !claim.is_null() => {
                format!("{}/{}", text(claim, "/namespace"), text(claim, "/name"))
            }
            _ => String::new(),
        };
        vec![
            table::name(object),
            text(object, "/spec/capacity/storage").into(),
            access_modes(object, "/spec/accessModes").into(),
            text(object, "/spec/persistentVolumeReclaimPolicy").into(),
            if deleted { "Terminating".into() } else { text(object, "/status/phase").into() },
            claim.into(),
            text(object, "/spec/storageClassName").into(),
            unset("/spec/volumeAttributesClassName"),
            text(object, "/status/reason").into(),
            table::age(object, now),
            unset("/spec/volumeMode"),
        ]
    },
    ..Kind::plain("", "v1", "PersistentVolume")
};
