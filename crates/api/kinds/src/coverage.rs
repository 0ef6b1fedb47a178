//! Which kinds have upstream's whole validation, and what the others lack: docs/api.md, kept true by a test.
use crate::registry::KINDS;

/// What upstream checks and this crate doesn't, by group, version and kind. A registered kind that isn't here has the
/// whole validation.
pub const PARTIAL: &[(&str, &str)] = &[
    ("v1 PersistentVolume", "checks inside sources other than hostPath, local, nfs and csi"),
    ("v1 PersistentVolumeClaim", "the status subresource, the older storage class annotation"),
    ("v1 Pod", "the status of dynamic resource claims and of allocated resources"),
    ("v1 ResourceQuota", "which scope fits which resource, scope selectors"),
    (
        "admissionregistration.k8s.io/v1 MutatingAdmissionPolicy",
        "compiling expressions, patches of another type, wildcards in rules' resources",
    ),
    ("admissionregistration.k8s.io/v1 MutatingAdmissionPolicyBinding", "wildcards in rules' resources"),
    (
        "admissionregistration.k8s.io/v1 MutatingWebhookConfiguration",
        "compiling match conditions, wildcards in rules' resources, CA bundles, parts of URLs",
    ),
    (
        "admissionregistration.k8s.io/v1 ValidatingAdmissionPolicy",
        "compiling expressions, wildcards in rules' resources",
    ),
    ("admissionregistration.k8s.io/v1 ValidatingAdmissionPolicyBinding", "wildcards in rules' resources"),
    (
        "admissionregistration.k8s.io/v1 ValidatingWebhookConfiguration",
        "compiling match conditions, wildcards in rules' resources, CA bundles, parts of URLs",
    ),
    (
        "apiextensions.k8s.io/v1 CustomResourceDefinition",
        "structural schemas, their defaults and expressions, printer columns, selectable fields, API approval",
    ),
    ("autoscaling/v1 HorizontalPodAutoscaler", "nothing of its own: writes are checked as v2"),
    ("batch/v1 CronJob", "whether the time zone exists"),
    ("certificates.k8s.io/v1 CertificateSigningRequest", "the certificate's content"),
    (
        "flowcontrol.apiserver.k8s.io/v1 FlowSchema",
        "checks inside rules, the mandatory objects' fixed values",
    ),
    (
        "flowcontrol.apiserver.k8s.io/v1 PriorityLevelConfiguration",
        "bounds of queues and hands, the mandatory objects' fixed values",
    ),
    ("policy/v1 PodDisruptionBudget", "the form of status conditions"),
    ("resource.k8s.io/v1 DeviceClass", "selectors and configuration"),
    ("resource.k8s.io/v1 ResourceClaim", "selectors, constraints, configuration, the status"),
    ("resource.k8s.io/v1 ResourceClaimTemplate", "selectors, constraints, configuration"),
    (
        "resource.k8s.io/v1 ResourceSlice",
        "devices' attributes, counters and taints, where a pool's nodes are",
    ),
    ("storage.k8s.io/v1 VolumeAttachment", "checks inside an inline volume"),
];

/// The kind's group, version and name, as the tables have them.
fn title(group: &str, version: &str, kind: &str) -> String {
    if group.is_empty() { format!("{version} {kind}") } else { format!("{group}/{version} {kind}") }
}

/// The table of docs/api.md: every kind that is served and kept.
pub fn table() -> String {
    let mut rows = std::collections::BTreeMap::new();
    for fact in sampan_schema::resources() {
        let stored = fact.served_by_default && !fact.name.contains('/') && fact.verbs.contains(&"update");
        if stored {
            rows.insert((fact.group, fact.version, fact.kind), "schema and ObjectMeta only".to_string());
        }
    }
    for kind in KINDS {
        let title = title(kind.group, kind.version, kind.kind);
        let lacks = PARTIAL.iter().find(|(name, _)| *name == title).map(|(_, lacks)| lacks);
        let level = lacks.map_or_else(|| "full".to_string(), |lacks| format!("partial; lacks: {lacks}"));
        rows.insert((kind.group, kind.version, kind.kind), level);
    }
    let mut text = "| kind | validation |\n| --- | --- |\n".to_string();
    for ((group, version, kind), level) in rows {
        text.push_str(&format!("| {} | {level} |\n", title(group, version, kind)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Set `UPDATE_DOCS=1` to write the table instead of comparing it.
    #[test]
    fn the_document_says_what_is() {
        for (name, _) in PARTIAL {
            let known = KINDS.iter().any(|k| title(k.group, k.version, k.kind) == *name);
            assert!(known, "{name} is no registered kind");
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../docs/api.md");
        let document = std::fs::read_to_string(path).unwrap();
        let start = document.find("| kind |").unwrap();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, format!("{}{}", &document[..start], table())).unwrap();
            return;
        }
        assert_eq!(&document[start..], table(), "docs/api.md is stale: run this test with UPDATE_DOCS=1");
    }
}
