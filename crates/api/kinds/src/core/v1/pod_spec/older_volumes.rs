//! Volume sources of storage systems: network file systems, block devices, clouds, CSI.
//!
//! Upstream counterpart: validateNFSVolumeSource and its like in validation.go.
use k8s_openapi::api::core::v1::{AzureDiskVolumeSource, ISCSIVolumeSource, Volume};

use super::volumes::local_descending_path;
use crate::field::{ErrorList, FieldError, Path};
use crate::names;
use crate::object::or_empty;

const PARTITION: &str = "must be between 0 and 255, inclusive";

/// Checks a volume whose first source is `source`; false where the source isn't of this file.
pub fn validate(volume: &Volume, source: &str, path: &Path, errors: &mut ErrorList) -> bool {
    let at = match source {
        "gcePersistentDisk" => path.child("persistentDisk"),
        "cephFS" => path.child("cephfs"),
        other => path.child(other),
    };
    match source {
        "gitRepo" => volume.git_repo.iter().for_each(|s| {
            required(s.repository.is_empty(), &at, "repository", errors);
            local_descending_path(or_empty(&s.directory), &at.child("directory"), errors);
        }),
        "gcePersistentDisk" => volume.gce_persistent_disk.iter().for_each(|s| {
            required(s.pd_name.is_empty(), &at, "pdName", errors);
            partition(s.partition, &at, errors);
        }),
        "awsElasticBlockStore" => volume.aws_elastic_block_store.iter().for_each(|s| {
            required(s.volume_id.is_empty(), &at, "volumeID", errors);
            partition(s.partition, &at, errors);
        }),
        "nfs" => volume.nfs.iter().for_each(|s| {
            required(s.server.is_empty(), &at, "server", errors);
            required(s.path.is_empty(), &at, "path", errors);
            if !s.path.starts_with('/') {
                let detail = "must be an absolute path";
                errors.push(FieldError::invalid(&at.child("path"), s.path.as_str(), detail));
            }
        }),
        "iscsi" => volume.iscsi.iter().for_each(|s| {
            iscsi(s, &at, errors);
            if s.initiator_name.is_some() && volume.name.len() + 1 + s.target_portal.len() > 64 {
                let detail = "Total length of <volume name>:<iscsi.targetPortal> must be under 64 characters if \
                              iscsi.initiatorName is specified.";
                errors.push(FieldError::invalid(&path.child("name"), volume.name.as_str(), detail));
            }
        }),
        "glusterfs" => volume.glusterfs.iter().for_each(|s| {
            required(s.endpoints.is_empty(), &at, "endpoints", errors);
            required(s.path.is_empty(), &at, "path", errors);
        }),
        "flocker" => volume.flocker.iter().for_each(|s| {
            let (name, uuid) = (or_empty(&s.dataset_name), or_empty(&s.dataset_uuid));
            if name.is_empty() && uuid.is_empty() {
                let detail = "one of datasetName and datasetUUID is required";
                errors.push(FieldError::required(&at, detail));
            }
            if !name.is_empty() && !uuid.is_empty() {
                let detail = "datasetName and datasetUUID can not be specified simultaneously";
                errors.push(FieldError::invalid(&at, "resource", detail));
            }
            if name.contains('/') {
                errors.push(FieldError::invalid(&at.child("datasetName"), name, "must not contain '/'"));
            }
        }),
        "rbd" => volume.rbd.iter().for_each(|s| {
            required(s.monitors.is_empty(), &at, "monitors", errors);
            required(s.image.is_empty(), &at, "image", errors);
        }),
        "cinder" => volume.cinder.iter().for_each(|s| {
            required(s.volume_id.is_empty(), &at, "volumeID", errors);
            required(s.secret_ref.as_ref().is_some_and(|r| r.name.is_empty()), &at, "secretRef.name", errors);
        }),
        "cephFS" => volume.cephfs.iter().for_each(|s| required(s.monitors.is_empty(), &at, "monitors", errors)),
        "quobyte" => volume.quobyte.iter().for_each(|s| {
            let pairs = "must be a host:port pair or multiple pairs separated by commas";
            let registry = at.child("registry");
            if s.registry.is_empty() {
                errors.push(FieldError::required(&registry, pairs));
            } else if or_empty(&s.tenant).len() >= 65 {
                let detail = "must be a UUID and may not exceed a length of 64 characters";
                errors.push(FieldError::required(&at.child("tenant"), detail));
            } else if s.registry.split(',').any(|pair| pair.rsplit_once(':').is_none()) {
                errors.push(FieldError::invalid(&registry, s.registry.as_str(), pairs));
            }
            if s.volume.is_empty() {
                errors.push(FieldError::required(&at.child("volume"), ""));
            }
        }),
        "fc" => volume.fc.iter().for_each(|s| {
            let wwns = s.target_wwns.as_deref().unwrap_or_default();
            let wwids = s.wwids.as_deref().unwrap_or_default();
            let at_wwns = at.child("targetWWNs");
            if wwns.is_empty() && wwids.is_empty() {
                let detail = "must specify either targetWWNs or wwids, but not both";
                errors.push(FieldError::required(&at_wwns, detail));
            }
            if !wwns.is_empty() && !wwids.is_empty() {
                let detail = "targetWWNs and wwids can not be specified simultaneously";
                errors.push(FieldError::invalid(&at_wwns, wwns.to_vec(), detail));
            }
            match s.lun {
                None if !wwns.is_empty() => {
                    let detail = "lun is required if targetWWNs is specified";
                    errors.push(FieldError::required(&at.child("lun"), detail));
                }
                Some(lun) if !wwns.is_empty() && !(0..=255).contains(&lun) => {
                    errors.push(FieldError::invalid(&at.child("lun"), lun, PARTITION));
                }
                _ => {}
            }
        }),
        "flexVolume" => volume.flex_volume.iter().for_each(|s| {
            required(s.driver.is_empty(), &at, "driver", errors);
            for key in s.options.iter().flatten().map(|(key, _)| key) {
                let namespace = format!(".{}", key.split('/').next().unwrap_or_default().to_lowercase());
                if namespace.ends_with(".kubernetes.io") || namespace.ends_with(".k8s.io") {
                    let detail = "kubernetes.io and k8s.io namespaces are reserved";
                    let at = at.child("options").key(key);
                    errors.push(FieldError::invalid(&at, key.as_str(), detail));
                }
            }
        }),
        "azureFile" => volume.azure_file.iter().for_each(|s| {
            required(s.secret_name.is_empty(), &at, "secretName", errors);
            required(s.share_name.is_empty(), &at, "shareName", errors);
        }),
        "vsphereVolume" => {
            volume.vsphere_volume.iter().for_each(|s| required(s.volume_path.is_empty(), &at, "volumePath", errors));
        }
        "photonPersistentDisk" => {
            volume.photon_persistent_disk.iter().for_each(|s| required(s.pd_id.is_empty(), &at, "pdID", errors));
        }
        "portworxVolume" => {
            volume.portworx_volume.iter().for_each(|s| required(s.volume_id.is_empty(), &at, "volumeID", errors));
        }
        "azureDisk" => volume.azure_disk.iter().for_each(|s| azure_disk(s, &at, errors)),
        "storageos" => volume.storageos.iter().for_each(|s| {
            let (name, namespace) = (or_empty(&s.volume_name), or_empty(&s.volume_namespace));
            required(name.is_empty(), &at, "volumeName", errors);
            for (key, value) in [("volumeName", name), ("volumeNamespace", namespace)] {
                if !value.is_empty() {
                    errors.extend(FieldError::invalid_each(&at.child(key), value, names::dns1123_label(value)));
                }
            }
            if s.secret_ref.as_ref().is_some_and(|r| r.name.is_empty()) {
                errors.push(FieldError::required(&at.child("secretRef").child("name"), ""));
            }
        }),
        "scaleIO" => volume.scale_io.iter().for_each(|s| {
            required(s.gateway.is_empty(), &at, "gateway", errors);
            required(s.system.is_empty(), &at, "system", errors);
            required(or_empty(&s.volume_name).is_empty(), &at, "volumeName", errors);
        }),
        "csi" => volume.csi.iter().for_each(|s| {
            validate_csi_driver_name(&s.driver, &at.child("driver"), errors);
            if let Some(secret) = &s.node_publish_secret_ref {
                if secret.name.is_empty() {
                    errors.push(FieldError::required(&at.child("nodePublishSecretRef").child("name"), ""));
                } else {
                    let messages = names::dns1123_subdomain(&secret.name);
                    errors.extend(FieldError::invalid_each(&at.child("name"), &secret.name, messages));
                }
            }
        }),
        _ => return false,
    }
    true
}

fn required(missing: bool, path: &Path, key: &str, errors: &mut ErrorList) {
    if missing {
        errors.push(FieldError::required(&path.child(key), ""));
    }
}

fn partition(partition: Option<i32>, path: &Path, errors: &mut ErrorList) {
    if let Some(number) = partition.filter(|p| !(0..=255).contains(p)) {
        errors.push(FieldError::invalid(&path.child("partition"), number, PARTITION));
    }
}

/// A CSI driver's name.
pub fn validate_csi_driver_name(name: &str, path: &Path, errors: &mut ErrorList) {
    if name.is_empty() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    if name.len() > 63 {
        errors.push(FieldError::too_long(path, 63));
    }
    errors.extend(FieldError::invalid_each(path, name, names::dns1123_subdomain(&name.to_lowercase())));
}

fn iscsi(source: &ISCSIVolumeSource, path: &Path, errors: &mut ErrorList) {
    if source.target_portal.is_empty() {
        errors.push(FieldError::required(&path.child("targetPortal"), ""));
    }
    if source.iqn.is_empty() {
        errors.push(FieldError::required(&path.child("iqn"), ""));
    } else {
        qualified_iscsi_name(&source.iqn, &path.child("iqn"), errors);
    }
    if !(0..=255).contains(&source.lun) {
        errors.push(FieldError::invalid(&path.child("lun"), source.lun, PARTITION));
    }
    let chap = source.chap_auth_discovery == Some(true) || source.chap_auth_session == Some(true);
    if chap && source.secret_ref.is_none() {
        errors.push(FieldError::required(&path.child("secretRef"), ""));
    }
    if let Some(initiator) = &source.initiator_name {
        qualified_iscsi_name(initiator, &path.child("initiatorname"), errors);
    }
}

/// `iqn.YYYY-MM.reversed.domain[:any]`, `eui.` and 16 hex digits, `naa.` and 32 of them.
fn qualified_iscsi_name(name: &str, path: &Path, errors: &mut ErrorList) {
    let hex = |text: &str, length: usize| text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit());
    let valid = match name.get(..3) {
        Some("iqn") => is_iqn(name),
        Some("eui") => name.strip_prefix("eui.").is_some_and(|rest| hex(rest, 16)),
        Some("naa") => name.strip_prefix("naa.").is_some_and(|rest| hex(rest, 32)),
        _ => {
            let detail = "must be valid format starting with iqn, eui, or naa";
            errors.push(FieldError::invalid(path, name, detail));
            return;
        }
    };
    if !valid {
        errors.push(FieldError::invalid(path, name, "must be valid format"));
    }
}

fn is_iqn(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("iqn.") else { return false };
    let Some((date, domain)) = rest.split_once('.') else { return false };
    let date = date.split_once('-').is_some_and(|(year, month)| {
        year.len() == 4 && month.len() == 2 && (year.bytes().chain(month.bytes())).all(|b| b.is_ascii_digit())
    });
    let domain = domain.split(':').next().unwrap_or_default();
    date && !domain.is_empty()
        && domain.split('.').all(|label| {
            label.starts_with(|c: char| c.is_ascii_alphanumeric())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
}

fn azure_disk(disk: &AzureDiskVolumeSource, path: &Path, errors: &mut ErrorList) {
    for (key, value) in [("diskName", &disk.disk_name), ("diskURI", &disk.disk_uri)] {
        if value.is_empty() {
            errors.push(FieldError::required(&path.child(key), ""));
        }
    }
    let modes = ["None", "ReadOnly", "ReadWrite"];
    if let Some(mode) = disk.caching_mode.as_deref().filter(|m| !modes.contains(m)) {
        errors.push(FieldError::not_supported(&path.child("cachingMode"), mode, &modes));
    }
    let kinds = ["Dedicated", "Managed", "Shared"];
    let Some(kind) = disk.kind.as_deref() else { return };
    if !kinds.contains(&kind) {
        errors.push(FieldError::not_supported(&path.child("kind"), kind, &kinds));
    }
    let (prefix, form) = match kind {
        "Managed" => (
            "/subscriptions/",
            "/subscriptions/{sub-id}/resourcegroups/{group-name}/providers/microsoft.compute/disks/{disk-id}",
        ),
        _ => ("https://", "https://{account-name}.blob.core.windows.net/{container-name}/{disk-name}.vhd"),
    };
    if !disk.disk_uri.starts_with(prefix) {
        let at = path.child("diskURI");
        errors.push(FieldError::not_supported(&at, disk.disk_uri.as_str(), &[form]));
    }
}
