//! Events about a node's certificates. Upstream counterpart: K3s' pkg/certmonitor, whose reasons these are, and one more
//! that tells what was renewed.
use k8s_openapi::api::core::v1::ObjectReference;
use sampan_controllers::events::{EventRecorder, NORMAL, WARNING};
use sampan_pki::certificate::{certificates, subject};
use sampan_pki::renewal::{Standing, standing};
use sampan_world::clock;

use super::files::{AUTHORITY, Kept};

const COMPONENT: &str = "sampan-cert-monitor";

pub struct NodeEvents {
    recorder: EventRecorder,
    node: ObjectReference,
}

impl NodeEvents {
    pub fn new(client: kube::Client, node: &str) -> Self {
        let node = ObjectReference {
            api_version: Some("v1".to_string()),
            kind: Some("Node".to_string()),
            name: Some(node.to_string()),
            // as the kubelet has it, so that `kubectl describe node` finds them
            uid: Some(node.to_string()),
            ..ObjectReference::default()
        };
        Self { recorder: EventRecorder::start(client, COMPONENT), node }
    }

    pub fn renewed(&self, kept: &Kept) {
        let message = format!("{}: renewed, {}", kept.service, kept.validity());
        self.recorder.record(self.node.clone(), NORMAL, "CertificateRenewed", message);
    }

    /// Records what of `kept` is near its end.
    pub fn warn_of(&self, kept: &[Kept]) {
        for (authorities, reason, advice) in [
            (false, "CertificateExpirationWarning", "Node certificates require attention"),
            (
                true,
                "CACertificateExpirationWarning",
                "Certificate Authority certificates require attention - plan `sampan certificate rotate-ca`",
            ),
        ] {
            let of_kind = kept.iter().filter(|k| (k.service == AUTHORITY) == authorities);
            let problems: Vec<String> = of_kind.filter_map(problem).collect();
            if !problems.is_empty() {
                let message = format!("{advice}: {}", problems.join(", "));
                tracing::warn!("{message}");
                self.recorder.record(self.node.clone(), WARNING, reason, message);
            }
        }
    }
}

/// What is wrong with the first certificate of a file; the rest of a bundle is of earlier authorities.
fn problem(kept: &Kept) -> Option<String> {
    let text = std::fs::read_to_string(&kept.path).ok()?;
    let first = certificates(&text).ok()?.into_iter().next()?;
    let who = subject(&first)?;
    let what = match standing(&first, clock::now())? {
        Standing::Ok => return None,
        Standing::Warning => "will expire",
        Standing::Expired => "expired",
        Standing::NotYetValid => "is not valid yet; it will expire",
    };
    let file = kept.path.file_name().unwrap_or_default().to_string_lossy();
    Some(format!("{}/{file}: certificate {} {what} at {}", kept.service, who.common_name, who.not_after))
}
