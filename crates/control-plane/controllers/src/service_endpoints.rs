//! What Endpoints and EndpointSlices share: which pods a service has, and at which ports.
//! Upstream counterpart: staging/src/k8s.io/endpointslice/util.
use k8s_openapi::api::core::v1::{Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sampan_client::informer::key;
use sampan_client::{Event, Informer};

use crate::controller::Key;
use crate::controller_ref::{is_deleting, namespace};
use crate::label_selector::{Labels, contains_all, labels_of};
use crate::pod_state;

/// The selector of a service that has one and is not an alias.
pub fn selector_of(service: &Service) -> Option<&Labels> {
    let spec = service.spec.as_ref()?;
    let is_alias = spec.type_.as_deref() == Some("ExternalName");
    spec.selector.as_ref().filter(|s| !is_alias && !s.is_empty())
}

fn ips(pod: &Pod) -> Vec<&str> {
    let Some(status) = &pod.status else { return Vec::new() };
    let all: Vec<&str> = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).collect();
    if all.is_empty() { status.pod_ip.as_deref().into_iter().collect() } else { all }
}

/// The pod's addresses of one family.
pub fn ips_of_family(pod: &Pod, is_v6: bool) -> Vec<String> {
    ips(pod)
        .into_iter()
        .filter(|ip| !ip.is_empty() && ip.contains(':') == is_v6)
        .map(str::to_string)
        .collect()
}

fn dns_name(pod: &Pod) -> (Option<&str>, Option<&str>) {
    let spec = pod.spec.as_ref();
    (spec.and_then(|s| s.hostname.as_deref()), spec.and_then(|s| s.subdomain.as_deref()))
}

/// The host name that the pod has under the service.
pub fn hostname_in(pod: &Pod, service: &Service) -> Option<String> {
    let (hostname, subdomain) = dns_name(pod);
    let hostname = hostname.filter(|h| !h.is_empty())?;
    (subdomain == service.metadata.name.as_deref()).then(|| hostname.to_string())
}

/// Whether a pod has a place among the endpoints.
pub fn belongs(pod: &Pod, include_terminating: bool) -> bool {
    !pod_state::is_terminal(pod) && !ips(pod).is_empty() && (include_terminating || !is_deleting(pod))
}

/// The port of the pod that a service's port leads to.
pub fn find_port(pod: &Pod, port: &ServicePort) -> Option<i32> {
    match port.target_port.as_ref() {
        None => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(wanted)) => {
            let spec = pod.spec.as_ref()?;
            let sidecars = spec.init_containers.iter().flatten();
            let sidecars = sidecars.filter(|c| c.restart_policy.as_deref() == Some("Always"));
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let mut ports = spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
            let same = ports.find(|p| {
                p.name.as_ref() == Some(wanted) && p.protocol.as_deref().unwrap_or("TCP") == protocol
            });
            same.map(|p| p.container_port)
        }
    }
}

fn relevant(pod: &Pod) -> impl PartialEq + '_ {
    let state = (is_deleting(pod), pod_state::is_ready(pod), pod_state::is_terminal(pod));
    (state, ips(pod), dns_name(pod), pod_state::node_name(pod), labels_of(&pod.metadata.labels))
}

/// The services whose endpoints a pod's change touches.
pub fn touched(services: &Informer<Service>, event: &Event<'_, Pod>) -> Vec<Key> {
    let pod = event.object();
    let mut labels = vec![labels_of(&pod.metadata.labels)];
    if let Event::Updated { old, new } = event {
        if relevant(old) == relevant(new) {
            return Vec::new();
        }
        labels.push(labels_of(&old.metadata.labels));
    }
    let selects =
        |s: &Service| selector_of(s).is_some_and(|wanted| labels.iter().any(|l| contains_all(wanted, l)));
    services.list_in(namespace(&**pod)).iter().filter(|s| selects(s)).map(|s| key(&**s)).collect()
}

pub fn is_headless(service: &Service) -> bool {
    let ip = service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()).unwrap_or_default();
    ip.is_empty() || ip == "None"
}
