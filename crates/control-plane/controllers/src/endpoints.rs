//! Endpoints of services with a selector. Upstream counterpart: pkg/controller/endpoint.
//!
//! Deliberate difference: the annotation with the time of the change that triggered an update, which only feeds
//! upstream's latency metric, is left out.
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, ObjectReference, Pod, Service,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use sampan_client::informer::key;
use sampan_client::{Event, Informer, WorkQueue};

use crate::controller::{Controller, Descriptor, Key, SyncResult, run};
use crate::controller_ref::{name, namespace};
use crate::events::EventRecorder;
use crate::label_selector::{Labels, contains_all, labels_of};
use crate::service_endpoints::{
    belongs, find_port, hostname_in, ips_of_family, is_headless, selector_of, touched,
};
use crate::{Scope, api_error, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "endpoints-controller",
    service_account: "endpoint-controller",
    component: "endpoint-controller",
    build: |scope| run(EndpointsController::new(&scope)),
};

const MAX_ADDRESSES: usize = 1000;
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
pub(crate) const HEADLESS: &str = "service.kubernetes.io/headless";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";

struct EndpointsController {
    client: Client,
    events: EventRecorder,
    services: Informer<Service>,
    endpoints: Informer<Endpoints>,
    pods: Informer<Pod>,
    queue: WorkQueue<Key>,
}

impl EndpointsController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            services: scope.informers.of(),
            endpoints: scope.informers.of(),
            pods: scope.informers.of(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.services.on_event(move |event| me.queue.add(key(&**event.object())));
        let me = this.clone();
        this.pods
            .on_event(move |event| touched(&me.services, event).into_iter().for_each(|k| me.queue.add(k)));
        let me = this.clone();
        this.endpoints.on_event(move |event| {
            if matches!(event, Event::Deleted(_)) {
                me.queue.add(key(&**event.object()));
            }
        });
        this
    }

    async fn write(&self, service: &Service, current: Option<&Endpoints>, wanted: &Endpoints) -> SyncResult {
        let api: Api<Endpoints> = Api::namespaced(self.client.clone(), namespace(service));
        let (result, verb) = match current {
            None => (api.create(&PostParams::default(), wanted).await, "Create"),
            Some(_) => (api.replace(name(service), &PostParams::default(), wanted).await, "Update"),
        };
        match result {
            Ok(_) => Ok(()),
            Err(e) if current.is_none() && api_error::is_namespace_terminating(&e) => Ok(()),
            Err(e) => {
                let what = format!("{}/{}: {}", namespace(service), name(service), api_error::message(&e));
                let message = match verb {
                    "Create" => format!("Failed to create endpoint for service {what}"),
                    _ => format!("Failed to update endpoint {what}"),
                };
                self.events.warning(wanted, &format!("FailedTo{verb}Endpoint"), message);
                Err(e.into())
            }
        }
    }
}

/// The pod's address in the service's first family.
fn address(pod: &Pod, service: &Service) -> Option<EndpointAddress> {
    let spec = service.spec.as_ref()?;
    let family = spec.ip_families.as_ref().and_then(|f| f.first().map(String::as_str));
    let is_v6 = match family {
        Some(family) => family == "IPv6",
        None => spec.cluster_ip.as_deref().is_some_and(|ip| ip.contains(':')),
    };
    Some(EndpointAddress {
        ip: ips_of_family(pod, is_v6).into_iter().next()?,
        hostname: hostname_in(pod, service),
        node_name: Some(pod_state::node_name(pod).to_string()).filter(|n| !n.is_empty()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
    })
}

/// The subsets: addresses with the same ports together, in a fixed order.
fn subsets(service: &Service, pods: &[Arc<Pod>]) -> Vec<EndpointSubset> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let publish_all = spec.publish_not_ready_addresses == Some(true);
    let ports = spec.ports.as_deref().unwrap_or_default();
    // by port: the addresses behind it by (address, pod), and whether they are ready
    type Addresses = BTreeMap<(String, Option<String>), (bool, EndpointAddress)>;
    let mut by_port: BTreeMap<String, (Option<EndpointPort>, Addresses)> = BTreeMap::new();
    for pod in pods.iter().filter(|p| belongs(p, publish_all)) {
        let Some(address) = address(pod, service) else { continue };
        let ready = publish_all || pod_state::is_ready(pod);
        let mut add = |port: Option<EndpointPort>| {
            let id = serde_json::to_string(&port).unwrap_or_default();
            let entry = by_port.entry(id).or_insert_with(|| (port, BTreeMap::new()));
            entry.1.insert((address.ip.clone(), pod.metadata.uid.clone()), (ready, address.clone()));
        };
        if ports.is_empty() && is_headless(service) {
            add(None);
        }
        for port in ports {
            let Some(number) = find_port(pod, port) else { continue };
            add(Some(EndpointPort {
                name: port.name.clone(),
                port: number,
                protocol: port.protocol.clone(),
                app_protocol: port.app_protocol.clone(),
            }));
        }
    }
    let mut subsets: BTreeMap<Vec<(String, Option<String>, bool)>, EndpointSubset> = BTreeMap::new();
    for (port, addresses) in by_port.into_values() {
        let id = addresses.iter().map(|((ip, uid), (ready, _))| (ip.clone(), uid.clone(), *ready)).collect();
        let subset = subsets.entry(id).or_insert_with(|| {
            let (ready, not_ready): (Vec<_>, Vec<_>) = addresses.into_values().partition(|(ready, _)| *ready);
            let list = |a: Vec<(bool, EndpointAddress)>| {
                (!a.is_empty()).then(|| a.into_iter().map(|(_, a)| a).collect::<Vec<_>>())
            };
            EndpointSubset { addresses: list(ready), not_ready_addresses: list(not_ready), ports: None }
        });
        if let Some(port) = port {
            subset.ports.get_or_insert_with(Vec::new).push(port);
        }
    }
    subsets.into_values().collect()
}

/// Shortens subsets to the limit, those that are not ready first; tells whether it did.
fn truncate(subsets: &mut [EndpointSubset]) -> bool {
    let total: usize = subsets
        .iter()
        .map(|s| {
            s.addresses.as_ref().map_or(0, Vec::len) + s.not_ready_addresses.as_ref().map_or(0, Vec::len)
        })
        .sum();
    if total <= MAX_ADDRESSES {
        return false;
    }
    let mut left = MAX_ADDRESSES;
    let mut cut = |list: &mut Option<Vec<EndpointAddress>>| {
        if let Some(addresses) = list {
            addresses.truncate(left);
            left -= addresses.len();
        }
        *list = list.take().filter(|a| !a.is_empty());
    };
    subsets.iter_mut().for_each(|s| cut(&mut s.addresses));
    subsets.iter_mut().for_each(|s| cut(&mut s.not_ready_addresses));
    true
}

/// The labels that a service's Endpoints have.
fn labels(service: &Service) -> Labels {
    let mut labels = labels_of(&service.metadata.labels).clone();
    labels.remove(HEADLESS);
    if is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    labels.insert(MANAGED_BY.into(), "endpoint-controller".into());
    labels
}

impl Controller for EndpointsController {
    type Key = Key;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.services.synced().await;
        self.endpoints.synced().await;
        self.pods.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        let is_lock = |e: &Endpoints| e.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(LEADER));
        let leftovers = self.endpoints.list();
        let leftovers = leftovers.iter().filter(|e| !is_lock(e)).map(|e| key(&**e));
        self.services.list().iter().map(|s| key(&**s)).chain(leftovers).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(service) = self.services.get(&key.0, &key.1) else {
            if self.endpoints.get(&key.0, &key.1).is_some() {
                let api: Api<Endpoints> = Api::namespaced(self.client.clone(), &key.0);
                api_error::found(api.delete(&key.1, &DeleteParams::default()).await)?;
            }
            return Ok(());
        };
        let Some(selector) = selector_of(&service) else { return Ok(()) };
        let mut pods = self.pods.list_in(&key.0);
        pods.retain(|p| contains_all(selector, labels_of(&p.metadata.labels)));
        let mut subsets = subsets(&service, &pods);
        let truncated = truncate(&mut subsets);
        let current = self.endpoints.get(&key.0, &key.1);
        let mut wanted = current.as_deref().cloned().unwrap_or_else(|| Endpoints {
            metadata: ObjectMeta {
                name: Some(key.1.clone()),
                namespace: Some(key.0.clone()),
                ..ObjectMeta::default()
            },
            subsets: None,
        });
        wanted.subsets = (!subsets.is_empty()).then_some(subsets);
        wanted.metadata.labels = Some(labels(&service));
        let mut annotations = wanted.metadata.annotations.take().unwrap_or_default();
        match truncated {
            true => drop(annotations.insert(OVER_CAPACITY.into(), "truncated".into())),
            false => drop(annotations.remove(OVER_CAPACITY)),
        }
        wanted.metadata.annotations = (!annotations.is_empty()).then_some(annotations);
        if current.as_deref() == Some(&wanted) {
            return Ok(());
        }
        self.write(&service, current.as_deref(), &wanted).await
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    pub(crate) fn pod_at(name: &str, ip: &str, ready: bool) -> Arc<Pod> {
        let mut pod = crate::pod_state::test_pod(name, "Running", "n1", ready);
        pod.spec = serde_json::from_value(json!({"nodeName": "n1",
            "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080, "protocol": "TCP"}]}]}))
        .unwrap();
        let status = pod.status.as_mut().unwrap();
        status.pod_ip = Some(ip.into());
        status.pod_ips = serde_json::from_value(json!([{"ip": ip}])).unwrap();
        Arc::new(pod)
    }

    pub(crate) fn service(ports: serde_json::Value) -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "s", "namespace": "ns", "uid": "s-uid", "labels": {"l": "v"}},
            "spec": {"selector": {"app": "a"}, "clusterIP": "10.0.0.1", "ipFamilies": ["IPv4"], "ports": ports},
        }))
        .unwrap()
    }

    #[test]
    fn pods_with_the_same_ports_share_a_subset() {
        let ports = json!([{"name": "a", "port": 80, "targetPort": "web", "protocol": "TCP"},
            {"name": "b", "port": 81, "targetPort": 9090, "protocol": "TCP"}]);
        let pods = [pod_at("x", "10.1.0.1", true), pod_at("y", "10.1.0.2", false)];
        let found = subsets(&service(ports), &pods);
        assert_eq!(found.len(), 1);
        let subset = &found[0];
        assert_eq!(subset.addresses.as_ref().unwrap()[0].ip, "10.1.0.1");
        assert_eq!(subset.not_ready_addresses.as_ref().unwrap()[0].ip, "10.1.0.2");
        let numbers: Vec<i32> = subset.ports.as_ref().unwrap().iter().map(|p| p.port).collect();
        assert_eq!(numbers, [8080, 9090]);
        assert!(subsets(&service(json!([{"port": 1, "targetPort": "nope"}])), &pods).is_empty());
    }
}
