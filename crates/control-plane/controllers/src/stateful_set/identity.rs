//! Names, labels and claims of a StatefulSet's pods. Pure. Upstream counterpart:
//! pkg/controller/statefulset/stateful_set_utils.go.
use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimVolumeSource, Pod, Volume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::plan::{Revisions, takes_current_revision};
use crate::controller_ref::{controller_reference, name, namespace};
use crate::label_selector::labels_of;
use crate::pod_control::pod_from_template;
use crate::revision_history::REVISION_HASH_LABEL;

const POD_NAME: &str = "statefulset.kubernetes.io/pod-name";
const POD_INDEX: &str = "apps.kubernetes.io/pod-index";

/// The ordinal of a pod, when its name is one of the set's.
pub fn ordinal_in(set: &str, pod: &str) -> Option<i32> {
    let digits = pod.strip_prefix(set)?.strip_prefix('-')?;
    (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok()).flatten()
}

pub fn revision_of(pod: &Pod) -> &str {
    labels_of(&pod.metadata.labels).get(REVISION_HASH_LABEL).map(String::as_str).unwrap_or_default()
}

fn claim_name(template: &str, pod: &str) -> String {
    format!("{template}-{pod}")
}

fn claim_templates(set: &StatefulSet) -> &[PersistentVolumeClaim] {
    set.spec.as_ref().and_then(|s| s.volume_claim_templates.as_deref()).unwrap_or_default()
}

/// The claims that a pod of the set has.
pub fn claims(set: &StatefulSet, pod: &Pod) -> Vec<PersistentVolumeClaim> {
    let spec = set.spec.as_ref();
    let policy = spec.and_then(|s| s.persistent_volume_claim_retention_policy.as_ref());
    let goes_with_set = policy.and_then(|p| p.when_deleted.as_deref()) == Some("Delete");
    let make = |template: &PersistentVolumeClaim| {
        let mut claim = template.clone();
        claim.status = None;
        claim.metadata.name = Some(claim_name(name(template), name(pod)));
        claim.metadata.namespace = Some(namespace(set).to_string());
        let labels = claim.metadata.labels.get_or_insert_with(BTreeMap::new);
        labels.extend(spec.and_then(|s| s.selector.match_labels.clone()).unwrap_or_default());
        if goes_with_set {
            let owner =
                OwnerReference { controller: None, block_owner_deletion: None, ..controller_reference(set) };
            claim.metadata.owner_references = Some(vec![owner]);
        }
        claim
    };
    claim_templates(set).iter().map(make).collect()
}

/// Gives a pod the labels and volumes that its name calls for.
pub fn set_identity(set: &StatefulSet, pod: &mut Pod) {
    let pod_name = name(pod).to_string();
    let labels = pod.metadata.labels.get_or_insert_with(BTreeMap::new);
    labels.insert(POD_NAME.into(), pod_name.clone());
    if let Some(ordinal) = ordinal_in(name(set), &pod_name) {
        labels.insert(POD_INDEX.into(), ordinal.to_string());
    }
    let Some(spec) = pod.spec.as_mut() else { return };
    let templates = claim_templates(set);
    let mut volumes: Vec<Volume> = templates
        .iter()
        .map(|template| Volume {
            name: name(template).to_string(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim_name(name(template), &pod_name),
                read_only: Some(false),
            }),
            ..Volume::default()
        })
        .collect();
    // a claim replaces a volume of the template of the same name
    let own = spec.volumes.take().unwrap_or_default();
    volumes.extend(own.into_iter().filter(|v| templates.iter().all(|t| name(t) != v.name)));
    spec.volumes = (!volumes.is_empty()).then_some(volumes);
}

/// Whether a pod's labels and volumes are those that its name calls for.
pub fn matches(set: &StatefulSet, pod: &Pod) -> bool {
    let labels = labels_of(&pod.metadata.labels);
    let claimed = |template: &PersistentVolumeClaim| {
        let wanted = claim_name(name(template), name(pod));
        let mut volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        volumes.any(|v| {
            v.name == name(template)
                && v.persistent_volume_claim.as_ref().is_some_and(|c| c.claim_name == wanted)
        })
    };
    labels.get(POD_NAME).is_some_and(|n| n == name(pod)) && claim_templates(set).iter().all(claimed)
}

/// The pod of an ordinal, from the revision that the update strategy wants there.
pub fn new_pod(set: &StatefulSet, revisions: &Revisions, ordinal: i32) -> Pod {
    let (template, revision) = match takes_current_revision(set, ordinal) {
        true => (&revisions.current_template, &revisions.current),
        false => (&revisions.update_template, &revisions.update),
    };
    let mut pod = pod_from_template(set, template);
    let pod_name = format!("{}-{ordinal}", name(set));
    pod.metadata.generate_name = None;
    pod.metadata.name = Some(pod_name.clone());
    pod.metadata
        .labels
        .get_or_insert_with(BTreeMap::new)
        .insert(REVISION_HASH_LABEL.into(), revision.clone());
    if let Some(spec) = pod.spec.as_mut() {
        spec.hostname = Some(pod_name);
        spec.subdomain = set.spec.as_ref().and_then(|s| s.service_name.clone()).filter(|s| !s.is_empty());
    }
    set_identity(set, &mut pod);
    pod
}

#[cfg(test)]
mod tests {
    #[test]
    fn ordinals() {
        for (pod, expected) in
            [("web-0", Some(0)), ("web-12", Some(12)), ("web-", None), ("web-a", None), ("webs-1", None)]
        {
            assert_eq!(super::ordinal_in("web", pod), expected, "{pod}");
        }
    }
}
