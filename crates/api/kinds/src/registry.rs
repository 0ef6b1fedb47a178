//! The list of built-in kinds: adding one is a file and a line here.
use crate::kind::Kind;

/// Declares kinds' modules and lists them. Order is discovery's order.
macro_rules! registry {
    ($($kind:path),* $(,)?) => {
        /// Every built-in kind.
        pub static KINDS: &[Kind] = &[$($kind),*];
    };
}

registry! {
    crate::core::v1::config_map::KIND,
    crate::core::v1::endpoints::KIND,
    crate::core::v1::event::KIND,
    crate::core::v1::limit_range::KIND,
    crate::core::v1::namespace::KIND,
    crate::core::v1::node::KIND,
    crate::core::v1::persistent_volume_claim::KIND,
    crate::core::v1::persistent_volume::KIND,
    crate::core::v1::pod::KIND,
    crate::core::v1::pod_template::KIND,
    crate::core::v1::replication_controller::KIND,
    crate::core::v1::resource_quota::KIND,
    crate::core::v1::secret::KIND,
    crate::core::v1::service_account::KIND,
    crate::core::v1::service::KIND,
    crate::apiregistration::v1::api_service::KIND,
    crate::apps::v1::controller_revision::KIND,
    crate::apps::v1::daemon_set::KIND,
    crate::apps::v1::deployment::KIND,
    crate::apps::v1::replica_set::KIND,
    crate::apps::v1::stateful_set::KIND,
    crate::events::v1::event::KIND,
    crate::autoscaling::v2::horizontal_pod_autoscaler::KIND,
    crate::autoscaling::v1::horizontal_pod_autoscaler::KIND,
    crate::batch::v1::cron_job::KIND,
    crate::batch::v1::job::KIND,
    crate::certificates::v1::certificate_signing_request::KIND,
    crate::networking::v1::ingress_class::KIND,
    crate::networking::v1::ingress::KIND,
    crate::networking::v1::ip_address::KIND,
    crate::networking::v1::network_policy::KIND,
    crate::networking::v1::service_cidr::KIND,
    crate::policy::v1::pod_disruption_budget::KIND,
    crate::rbac::v1::cluster_role_binding::KIND,
    crate::rbac::v1::cluster_role::KIND,
    crate::rbac::v1::role_binding::KIND,
    crate::rbac::v1::role::KIND,
    crate::storage::v1::csi_driver::KIND,
    crate::storage::v1::csi_node::KIND,
    crate::storage::v1::csi_storage_capacity::KIND,
    crate::storage::v1::storage_class::KIND,
    crate::storage::v1::volume_attachment::KIND,
    crate::storage::v1::volume_attributes_class::KIND,
    crate::admissionregistration::v1::mutating_admission_policy_binding::KIND,
    crate::admissionregistration::v1::mutating_admission_policy::KIND,
    crate::admissionregistration::v1::mutating_webhook_configuration::KIND,
    crate::admissionregistration::v1::validating_admission_policy_binding::KIND,
    crate::admissionregistration::v1::validating_admission_policy::KIND,
    crate::admissionregistration::v1::validating_webhook_configuration::KIND,
    crate::apiextensions::v1::custom_resource_definition::KIND,
    crate::scheduling::v1::priority_class::KIND,
    crate::coordination::v1::lease::KIND,
    crate::node::v1::runtime_class::KIND,
    crate::discovery::v1::endpoint_slice::KIND,
    crate::flowcontrol::v1::flow_schema::KIND,
    crate::flowcontrol::v1::priority_level_configuration::KIND,
    crate::resource::v1::device_class::KIND,
    crate::resource::v1::resource_claim_template::KIND,
    crate::resource::v1::resource_claim::KIND,
    crate::resource::v1::resource_slice::KIND,
    crate::upgrade::v1::plan::KIND,
}

/// The kind of that group, version and name.
pub fn find(group: &str, version: &str, kind: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|k| k.group == group && k.version == version && k.kind == kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names in the registry, with what belongs to each: change this list when a kind comes or goes.
    #[test]
    fn golden() {
        let mut seen = std::collections::BTreeSet::new();
        for kind in KINDS {
            assert!(seen.insert((kind.group, kind.version, kind.kind)), "{} is registered twice", kind.kind);
            assert_eq!(kind.columns.iter().filter(|c| c.format == "name").count(), 1, "{}", kind.kind);
            let row = (kind.row)(&serde_json::json!({}), jiff::Timestamp::UNIX_EPOCH);
            assert_eq!(row.len(), kind.columns.len(), "{}", kind.kind);
            let mut empty = serde_json::json!({"metadata": {}, "spec": {}, "status": {}});
            (kind.defaults)(&mut empty);
            let once = empty.clone();
            (kind.defaults)(&mut empty);
            assert_eq!(once, empty, "defaults of {} are not stable", kind.kind);
        }
        let core: Vec<&str> = KINDS.iter().filter(|k| k.group.is_empty()).map(|k| k.kind).collect();
        assert_eq!(
            core.join(" "),
            "ConfigMap Endpoints Event LimitRange Namespace Node PersistentVolumeClaim PersistentVolume Pod PodTemplate \
             ReplicationController ResourceQuota Secret ServiceAccount Service"
        );
    }
}
