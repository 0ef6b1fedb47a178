//! EndpointSlices of services with a selector. Upstream counterpart: pkg/controller/endpointslice and
//! staging/src/k8s.io/endpointslice.
//!
//! What stays true: slices that need no change are not written; a new endpoint goes into a slice that is written
//! anyway before a new slice is made. Deliberate difference: no topology hints and no trigger-time annotation.
pub mod plan;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use sampan_client::informer::key;
use sampan_client::{Event, Informer, WorkQueue};

use self::plan::{Desired, Plan, Template};
use crate::controller::{Controller, Descriptor, Key, SyncResult, run};
use crate::controller_ref::{controller_reference, is_deleting, name, namespace, uid};
use crate::endpoints::HEADLESS;
use crate::expectations::Expectations;
use crate::label_selector::{Labels, contains_all, labels_of};
use crate::service_endpoints::{
    belongs, find_port, hostname_in, ips_of_family, is_headless, selector_of, touched,
};
use crate::{Scope, api_error, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "endpointslice-controller",
    service_account: "endpointslice-controller",
    component: "endpoint-slice-controller",
    build: |scope| run(EndpointSliceController::new(&scope)),
};

pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const CONTROLLER: &str = "endpointslice-controller.k8s.io";
const MAX_ENDPOINTS: usize = 100;

struct EndpointSliceController {
    writer: SliceWriter,
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    queue: WorkQueue<Key>,
}

/// Writes plans; knows which of its own creations are not observed yet.
pub(crate) struct SliceWriter {
    pub client: Client,
    pub expectations: Expectations,
}

impl SliceWriter {
    pub(crate) async fn apply(&self, key: &Key, plan: Plan) -> SyncResult {
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &key.0);
        if !plan.create.is_empty() {
            self.expectations.expect(key, plan.create.len(), []);
        }
        let mut failed = None;
        for slice in plan.create {
            if let Err(e) = api.create(&PostParams::default(), &slice).await {
                self.expectations.creation_observed(key);
                failed = failed.or(Some(e).filter(|e| !api_error::is_namespace_terminating(e)));
            }
        }
        for slice in plan.update {
            if let Err(e) = api.replace(name(&slice), &PostParams::default(), &slice).await {
                failed = failed.or(Some(e));
            }
        }
        for slice in plan.delete {
            let deleted = api.delete(&slice, &DeleteParams::default()).await;
            if let Err(e) = api_error::found(deleted) {
                failed = failed.or(Some(e));
            }
        }
        failed.map_or(Ok(()), |e| Err(e.into()))
    }

    /// Accounts for a slice that appeared; the service's key that it belongs to.
    pub(crate) fn observed(&self, event: &Event<'_, EndpointSlice>, controller: &str) -> Option<Key> {
        let slice = event.object();
        let labels = labels_of(&slice.metadata.labels);
        let old_labels = match event {
            Event::Updated { old, .. } => labels_of(&old.metadata.labels),
            _ => labels,
        };
        let ours = |l: &Labels| l.get(MANAGED_BY).is_some_and(|m| m == controller);
        if !ours(labels) && !ours(old_labels) {
            return None;
        }
        let service = labels.get(SERVICE_NAME).or_else(|| old_labels.get(SERVICE_NAME))?;
        let key = (namespace(&**slice).to_string(), service.clone());
        if matches!(event, Event::Added(_)) {
            self.expectations.creation_observed(&key);
        }
        Some(key)
    }
}

/// The slices that `controller` keeps for a service.
pub(crate) fn slices_of(
    slices: &Informer<EndpointSlice>,
    key: &Key,
    controller: &str,
) -> Vec<Arc<EndpointSlice>> {
    let mut found = slices.list_in(&key.0);
    found.retain(|s| {
        let labels = labels_of(&s.metadata.labels);
        labels.get(SERVICE_NAME) == Some(&key.1) && labels.get(MANAGED_BY).is_some_and(|m| m == controller)
    });
    found
}

impl EndpointSliceController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            writer: SliceWriter { client: scope.client.clone(), expectations: Expectations::default() },
            services: scope.informers.of(),
            slices: scope.informers.of(),
            pods: scope.informers.of(),
            nodes: scope.informers.of(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.services.on_event(move |event| me.queue.add(key(&**event.object())));
        let me = this.clone();
        this.pods
            .on_event(move |event| touched(&me.services, event).into_iter().for_each(|k| me.queue.add(k)));
        let me = this.clone();
        this.slices.on_event(move |event| {
            if let Some(key) = me.writer.observed(event, CONTROLLER) {
                me.queue.add(key);
            }
        });
        this
    }

    fn endpoint(&self, pod: &Pod, service: &Service, addresses: Vec<String>) -> Endpoint {
        let serving = pod_state::is_ready(pod);
        let terminating = is_deleting(pod);
        let publish_all = service.spec.as_ref().and_then(|s| s.publish_not_ready_addresses) == Some(true);
        let node = Some(pod_state::node_name(pod).to_string()).filter(|n| !n.is_empty());
        let zone = node.as_ref().and_then(|n| self.nodes.get("", n));
        let zone = zone.and_then(|n| n.metadata.labels.as_ref()?.get("topology.kubernetes.io/zone").cloned());
        Endpoint {
            addresses,
            conditions: Some(EndpointConditions {
                ready: Some(publish_all || (serving && !terminating)),
                serving: Some(serving),
                terminating: Some(terminating),
            }),
            target_ref: Some(ObjectReference {
                kind: Some("Pod".into()),
                namespace: pod.metadata.namespace.clone(),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
                ..ObjectReference::default()
            }),
            node_name: node,
            zone: zone.filter(|z| !z.is_empty()),
            hostname: hostname_in(pod, service),
            ..Endpoint::default()
        }
    }

    /// The endpoints that a service should have in one family, by their ports.
    fn desired(&self, service: &Service, pods: &[Arc<Pod>], is_v6: bool) -> Vec<Desired> {
        let mut by_ports: BTreeMap<String, Desired> = BTreeMap::new();
        for pod in pods.iter().filter(|p| belongs(p, true)) {
            let addresses = ips_of_family(pod, is_v6);
            if addresses.is_empty() {
                continue;
            }
            let ports = ports(service, pod);
            let id = serde_json::to_string(&ports).unwrap_or_default();
            let desired = by_ports.entry(id).or_insert_with(|| Desired { ports, endpoints: Vec::new() });
            desired.endpoints.push(self.endpoint(pod, service, addresses));
        }
        by_ports.into_values().collect()
    }
}

fn ports(service: &Service, pod: &Pod) -> Vec<EndpointPort> {
    let ports = service.spec.iter().flat_map(|s| s.ports.iter().flatten());
    let port = |p: &k8s_openapi::api::core::v1::ServicePort| {
        Some(EndpointPort {
            name: Some(p.name.clone().unwrap_or_default()),
            port: Some(find_port(pod, p)?),
            protocol: Some(p.protocol.clone().unwrap_or_else(|| "TCP".into())),
            app_protocol: p.app_protocol.clone(),
        })
    };
    ports.filter_map(port).collect()
}

/// The families that a service has slices for.
fn families(service: &Service) -> Vec<bool> {
    let spec = service.spec.as_ref();
    let families = spec.and_then(|s| s.ip_families.as_deref()).unwrap_or_default();
    if !families.is_empty() {
        return families.iter().map(|f| f == "IPv6").collect();
    }
    match spec.and_then(|s| s.cluster_ip.as_deref()).filter(|ip| !ip.is_empty() && *ip != "None") {
        Some(ip) => vec![ip.contains(':')],
        None => vec![false, true],
    }
}

/// The labels that a service's slices have.
fn slice_labels(service: &Service) -> Labels {
    let mut labels = labels_of(&service.metadata.labels).clone();
    labels.remove(HEADLESS);
    if is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    labels.insert(SERVICE_NAME.into(), name(service).to_string());
    labels.insert(MANAGED_BY.into(), CONTROLLER.into());
    labels
}

impl Controller for EndpointSliceController {
    type Key = Key;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.services.synced().await;
        self.slices.synced().await;
        self.pods.synced().await;
        self.nodes.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.services.list().iter().map(|s| key(&**s)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(service) = self.services.get(&key.0, &key.1) else {
            // the garbage collector takes the slices, which the service owns
            self.writer.expectations.forget(&key);
            return Ok(());
        };
        let Some(selector) = selector_of(&service) else { return Ok(()) };
        if is_deleting(&*service) || !self.writer.expectations.satisfied(&key) {
            return Ok(());
        }
        let mut pods = self.pods.list_in(&key.0);
        pods.retain(|p| contains_all(selector, labels_of(&p.metadata.labels)));
        let mut existing = slices_of(&self.slices, &key, CONTROLLER);
        existing.retain(|s| !is_deleting(&**s));
        let families = families(&service);
        let mut plan = Plan::default();
        for is_v6 in families {
            let family = if is_v6 { "IPv6" } else { "IPv4" };
            let (own, rest) = existing.into_iter().partition(|s| s.address_type == family);
            existing = rest;
            let template = Template {
                namespace: key.0.clone(),
                generate_name: format!("{}-", key.1),
                address_type: family.into(),
                labels: slice_labels(&service),
                annotations: None,
                owner: controller_reference(&*service),
                max_endpoints: MAX_ENDPOINTS,
                keep_one: true,
            };
            plan.add(plan::plan(&template, self.desired(&service, &pods, is_v6), own));
        }
        // families that the service no longer has
        plan.delete.extend(existing.iter().map(|s| name(&**s).to_string()));
        tracing::trace!(service = uid(&*service), "endpoint slices planned");
        self.writer.apply(&key, plan).await
    }
}
