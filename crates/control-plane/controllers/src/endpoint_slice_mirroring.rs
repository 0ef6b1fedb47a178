//! Mirrors Endpoints that people keep by hand, for services without a selector, to EndpointSlices.
//! Upstream counterpart: pkg/controller/endpointslicemirroring.
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{EndpointAddress, EndpointSubset, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use sampan_client::informer::key;
use sampan_client::{Informer, WorkQueue};

use crate::Scope;
use crate::controller::{Controller, Descriptor, Key, SyncResult, run};
use crate::controller_ref::{controller_reference, is_deleting, name};
use crate::endpoint_slice::plan::{Desired, Plan, Template, plan};
use crate::endpoint_slice::{MANAGED_BY, SERVICE_NAME, SliceWriter, slices_of};
use crate::expectations::Expectations;
use crate::label_selector::labels_of;

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "endpointslice-mirroring-controller",
    service_account: "endpointslicemirroring-controller",
    component: "endpointslicemirroring-controller",
    build: |scope| run(MirroringController::new(&scope)),
};

const CONTROLLER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
/// Addresses of a subset that are mirrored at most.
const MAX_PER_SUBSET: usize = 1000;
const MAX_PER_SLICE: usize = 1000;
/// Annotations that are not handed on.
const NOT_COPIED: [&str; 2] =
    ["endpoints.kubernetes.io/last-change-trigger-time", "kubectl.kubernetes.io/last-applied-configuration"];

struct MirroringController {
    writer: SliceWriter,
    services: Informer<Service>,
    endpoints: Informer<Endpoints>,
    slices: Informer<EndpointSlice>,
    queue: WorkQueue<Key>,
}

impl MirroringController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            writer: SliceWriter { client: scope.client.clone(), expectations: Expectations::default() },
            services: scope.informers.of(),
            endpoints: scope.informers.of(),
            slices: scope.informers.of(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.services.on_event(move |event| me.queue.add(key(&**event.object())));
        let me = this.clone();
        this.endpoints.on_event(move |event| me.queue.add(key(&**event.object())));
        let me = this.clone();
        this.slices.on_event(move |event| {
            if let Some(key) = me.writer.observed(event, CONTROLLER) {
                me.queue.add(key);
            }
        });
        this
    }

    /// The Endpoints of that key, when they are to be mirrored.
    fn mirrored(&self, key: &Key) -> Option<Arc<Endpoints>> {
        let service = self.services.get(&key.0, &key.1).filter(|s| !is_deleting(&**s))?;
        let has_selector =
            service.spec.as_ref().and_then(|s| s.selector.as_ref()).is_some_and(|s| !s.is_empty());
        let endpoints = self.endpoints.get(&key.0, &key.1).filter(|e| !is_deleting(&**e))?;
        let skipped = labels_of(&endpoints.metadata.labels).get(SKIP_MIRROR).is_some_and(|v| v == "true");
        let is_lock = endpoints.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(LEADER));
        (!has_selector && !skipped && !is_lock).then_some(endpoints)
    }
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(ready), serving: None, terminating: None }),
        hostname: address.hostname.clone(),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

/// The endpoints of the subsets in one family, those with the same ports together.
fn desired(subsets: &[EndpointSubset], is_v6: bool) -> Vec<Desired> {
    let mut by_ports: BTreeMap<String, Desired> = BTreeMap::new();
    for subset in subsets {
        let ready = subset.addresses.iter().flatten().map(|a| endpoint(a, true));
        let not_ready = subset.not_ready_addresses.iter().flatten().map(|a| endpoint(a, false));
        let all = ready.chain(not_ready).take(MAX_PER_SUBSET);
        let endpoints: Vec<Endpoint> = all.filter(|e| e.addresses[0].contains(':') == is_v6).collect();
        if endpoints.is_empty() {
            continue;
        }
        let port = |p: &k8s_openapi::api::core::v1::EndpointPort| EndpointPort {
            name: Some(p.name.clone().unwrap_or_default()),
            port: Some(p.port),
            protocol: p.protocol.clone(),
            app_protocol: p.app_protocol.clone(),
        };
        let ports: Vec<EndpointPort> = subset.ports.iter().flatten().map(port).collect();
        let id = serde_json::to_string(&ports).unwrap_or_default();
        let group = by_ports.entry(id).or_insert_with(|| Desired { ports, endpoints: Vec::new() });
        group.endpoints.extend(endpoints);
    }
    by_ports.into_values().collect()
}

impl Controller for MirroringController {
    type Key = Key;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.services.synced().await;
        self.endpoints.synced().await;
        self.slices.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.endpoints.list().iter().map(|e| key(&**e)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let mut existing = slices_of(&self.slices, &key, CONTROLLER);
        existing.retain(|s| !is_deleting(&**s));
        let Some(endpoints) = self.mirrored(&key) else {
            let delete = existing.iter().map(|s| name(&**s).to_string()).collect();
            self.writer.expectations.forget(&key);
            return self.writer.apply(&key, Plan { delete, ..Plan::default() }).await;
        };
        if !self.writer.expectations.satisfied(&key) {
            return Ok(());
        }
        let mut labels = labels_of(&endpoints.metadata.labels).clone();
        labels.insert(SERVICE_NAME.into(), key.1.clone());
        labels.insert(MANAGED_BY.into(), CONTROLLER.into());
        let mut annotations = endpoints.metadata.annotations.clone().unwrap_or_default();
        annotations.retain(|k, _| !NOT_COPIED.contains(&k.as_str()));
        let mut planned = Plan::default();
        let subsets = endpoints.subsets.as_deref().unwrap_or_default();
        for family in ["IPv4", "IPv6"] {
            let template = Template {
                namespace: key.0.clone(),
                generate_name: format!("{}-", key.1),
                address_type: family.into(),
                labels: labels.clone(),
                annotations: (!annotations.is_empty()).then(|| annotations.clone()),
                owner: controller_reference(&*endpoints),
                max_endpoints: MAX_PER_SLICE,
                keep_one: false,
            };
            let own = existing.iter().filter(|s| s.address_type == family).cloned().collect();
            planned.add(plan(&template, desired(subsets, family == "IPv6"), own));
        }
        self.writer.apply(&key, planned).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subsets_split_by_family_and_join_by_ports() {
        let subsets: Vec<EndpointSubset> = serde_json::from_value(serde_json::json!([
            {"addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "ports": [{"port": 80}]},
            {"notReadyAddresses": [{"ip": "10.0.0.2"}], "ports": [{"port": 80}]},
        ]))
        .unwrap();
        let v4 = desired(&subsets, false);
        assert_eq!((v4.len(), v4[0].endpoints.len()), (1, 2));
        assert_eq!(v4[0].endpoints[1].conditions.as_ref().unwrap().ready, Some(false));
        assert_eq!(desired(&subsets, true)[0].endpoints.len(), 1);
    }
}
