//! The `used` of ResourceQuotas, computed anew. Upstream counterpart: pkg/controller/resourcequota.
//!
//! Pods and services are followed by events; other counted kinds are listed (metadata only) when the quota changes and
//! every five minutes while there is such a quota, as upstream's full resync does.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{
    Container, PersistentVolumeClaim, Pod, ResourceQuota, ResourceQuotaSpec, ResourceQuotaStatus, Service,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{DynamicObject, ListParams, PostParams};
use kube::{Api, Client};
use sampan_client::informer::key;
use sampan_client::{Event, Informer, WorkQueue};
use sampan_kinds::quantity::{self, Amount};

use crate::controller::{Controller, Descriptor, Key, SyncError, SyncResult, run};
use crate::controller_ref::{is_deleting, name, namespace};
use crate::{Scope, discovery, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "resourcequota-controller",
    service_account: "resourcequota-controller",
    component: "resourcequota-controller",
    build: |scope| run(ResourceQuotaController::new(&scope)),
};

const RESYNC: Duration = Duration::from_secs(300);
/// Kinds that have a short name in quotas.
const COUNTED: [(&str, &str); 6] = [
    ("configmaps", "configmaps"),
    ("secrets", "secrets"),
    ("replicationcontrollers", "replicationcontrollers"),
    ("resourcequotas", "resourcequotas"),
    ("persistentvolumeclaims", "persistentvolumeclaims"),
    ("count/pods", "pods"),
];

type Usage = BTreeMap<String, Amount>;

struct ResourceQuotaController {
    client: Client,
    quotas: Informer<ResourceQuota>,
    pods: Informer<Pod>,
    services: Informer<Service>,
    queue: WorkQueue<Key>,
}

impl ResourceQuotaController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            quotas: scope.informers.of(),
            pods: scope.informers.of(),
            services: scope.informers.of(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.quotas.on_event(move |event| me.queue.add(key(&**event.object())));
        let me = this.clone();
        this.pods.on_event(move |event| match event {
            Event::Updated { old, new }
                if pod_state::is_terminal(old) == pod_state::is_terminal(new) && old.spec == new.spec => {}
            _ => me.wake(namespace(&**event.object())),
        });
        let me = this.clone();
        this.services.on_event(move |event| me.wake(namespace(&**event.object())));
        this
    }

    fn wake(&self, namespace: &str) {
        for quota in self.quotas.list_in(namespace) {
            self.queue.add(key(&*quota));
        }
    }

    /// Counts objects of kinds that no informer follows; tells whether there were any such.
    async fn count_others(
        &self,
        namespace: &str,
        hard: &[&String],
        used: &mut Usage,
    ) -> Result<bool, SyncError> {
        let resource_of = |name: &str| -> Option<(String, String)> {
            if let Some((_, plural)) = COUNTED.iter().find(|(short, _)| *short == name) {
                return Some(((*plural).to_string(), String::new()));
            }
            let counted = name.strip_prefix("count/")?;
            let (plural, group) = counted.split_once('.').unwrap_or((counted, ""));
            Some((plural.to_string(), group.to_string()))
        };
        let wanted: Vec<_> = hard.iter().filter_map(|n| Some((n.to_string(), resource_of(n)?))).collect();
        let storage = hard.iter().any(|n| *n == "requests.storage");
        if wanted.is_empty() && !storage {
            return Ok(false);
        }
        let kinds = if wanted.is_empty() { Vec::new() } else { discovery::all(&self.client).await? };
        for (resource, (plural, group)) in wanted {
            let kind = kinds.iter().find(|k| k.resource.plural == plural && k.resource.group == group);
            let Some(kind) = kind.filter(|k| k.namespaced) else { continue };
            let api: Api<DynamicObject> =
                Api::namespaced_with(self.client.clone(), namespace, &kind.resource);
            let count = api.list_metadata(&ListParams::default()).await?.items.len();
            used.insert(resource, Amount::units(count as i64));
        }
        if storage {
            let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace);
            let mut sum = Amount::units(0);
            for claim in api.list(&ListParams::default()).await?.items {
                let requests =
                    claim.spec.and_then(|s| s.resources).and_then(|r| r.requests).unwrap_or_default();
                sum = requests.get("storage").map_or(sum, |q| sum.plus(quantity::amount(q)));
            }
            used.insert("requests.storage".into(), sum);
        }
        Ok(true)
    }
}

/// Whether a quota counts a pod, by its scopes. Unknown scopes count nothing.
fn in_scope(spec: &ResourceQuotaSpec, pod: &Pod) -> bool {
    let pod_spec = pod.spec.as_ref();
    let terminating = pod_spec.and_then(|s| s.active_deadline_seconds).is_some();
    let best_effort = pod.status.as_ref().and_then(|s| s.qos_class.as_deref()) == Some("BestEffort");
    let class = pod_spec.and_then(|s| s.priority_class_name.as_deref()).unwrap_or_default();
    let scope = |name: &str| match name {
        "Terminating" => terminating,
        "NotTerminating" => !terminating,
        "BestEffort" => best_effort,
        "NotBestEffort" => !best_effort,
        "PriorityClass" => !class.is_empty(),
        _ => false,
    };
    let selected = spec.scope_selector.iter().flat_map(|s| s.match_expressions.iter().flatten()).all(|e| {
        let values = e.values.as_deref().unwrap_or_default();
        match (e.scope_name.as_str(), e.operator.as_str()) {
            ("PriorityClass", "In") => values.iter().any(|v| v == class),
            ("PriorityClass", "NotIn") => values.iter().all(|v| v != class),
            ("PriorityClass", "DoesNotExist") => class.is_empty(),
            (name, "Exists") => scope(name),
            _ => false,
        }
    });
    selected && spec.scopes.iter().flatten().all(|s| scope(s))
}

/// What a pod uses: the sum of its containers, or the largest init container, and its overhead.
fn pod_usage(pod: &Pod) -> Usage {
    let mut usage = Usage::new();
    let Some(spec) = &pod.spec else { return usage };
    let is_sidecar = |c: &&Container| c.restart_policy.as_deref() == Some("Always");
    let init: Vec<&Container> = spec.init_containers.iter().flatten().collect();
    for prefix in ["requests.", "limits."] {
        let of = |c: &Container| -> BTreeMap<String, Quantity> {
            let resources = c.resources.clone().unwrap_or_default();
            if prefix == "requests." { resources.requests } else { resources.limits }.unwrap_or_default()
        };
        let mut sums = Usage::new();
        for container in spec.containers.iter().chain(init.iter().copied().filter(is_sidecar)) {
            add(&mut sums, &of(container));
        }
        for container in init.iter().filter(|c| !is_sidecar(c)) {
            for (resource, quantity) in of(container) {
                let amount = quantity::amount(&quantity);
                let most = sums.entry(resource).or_insert(amount);
                *most = (*most).max(amount);
            }
        }
        if let Some(overhead) = &spec.overhead {
            add(&mut sums, overhead);
        }
        usage.extend(sums.into_iter().map(|(resource, amount)| (format!("{prefix}{resource}"), amount)));
    }
    for short in ["cpu", "memory", "ephemeral-storage"] {
        if let Some(amount) = usage.get(&format!("requests.{short}")).copied() {
            usage.insert(short.into(), amount);
        }
    }
    usage
}

fn add(sums: &mut Usage, quantities: &BTreeMap<String, Quantity>) {
    for (resource, quantity) in quantities {
        let sum = sums.entry(resource.clone()).or_insert(Amount::units(0));
        *sum = sum.plus(quantity::amount(quantity));
    }
}

fn count_pods(spec: &ResourceQuotaSpec, pods: &[Arc<Pod>], used: &mut Usage) {
    for pod in pods.iter().filter(|p| !pod_state::is_terminal(p) && in_scope(spec, p)) {
        let mut usage = pod_usage(pod);
        usage.insert("pods".into(), Amount::units(1));
        for (resource, amount) in usage {
            let sum = used.entry(resource).or_insert(Amount::units(0));
            *sum = sum.plus(amount);
        }
    }
}

fn count_services(services: &[Arc<Service>], used: &mut Usage) {
    let (mut node_ports, mut balancers) = (0, 0);
    for service in services {
        let Some(spec) = &service.spec else { continue };
        let ports = spec.ports.as_ref().map_or(0, Vec::len) as i64;
        match spec.type_.as_deref() {
            Some("NodePort") => node_ports += ports,
            Some("LoadBalancer") => {
                balancers += 1;
                node_ports +=
                    spec.ports.iter().flatten().filter(|p| p.node_port.unwrap_or(0) != 0).count() as i64;
            }
            _ => {}
        }
    }
    used.insert("services".into(), Amount::units(services.len() as i64));
    used.insert("count/services".into(), Amount::units(services.len() as i64));
    used.insert("services.nodeports".into(), Amount::units(node_ports));
    used.insert("services.loadbalancers".into(), Amount::units(balancers));
}

/// `used` for exactly the resources of `hard`, written the way `hard` is.
fn status(hard: &BTreeMap<String, Quantity>, used: &Usage) -> ResourceQuotaStatus {
    let text = |(resource, limit): (&String, &Quantity)| {
        let format = quantity::parse(&limit.0).map(|(_, format)| format);
        let amount = used.get(resource).copied().unwrap_or(Amount::units(0));
        let text = format.map_or_else(|| "0".to_string(), |f| quantity::canonical(amount, f));
        (resource.clone(), Quantity(text))
    };
    ResourceQuotaStatus { hard: Some(hard.clone()), used: Some(hard.iter().map(text).collect()) }
}

impl Controller for ResourceQuotaController {
    type Key = Key;
    const WORKERS: usize = 1;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.quotas.synced().await;
        self.pods.synced().await;
        self.services.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.quotas.list().iter().map(|q| key(&**q)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(quota) = self.quotas.get(&key.0, &key.1).filter(|q| !is_deleting(&**q)) else {
            return Ok(());
        };
        let Some(spec) = &quota.spec else { return Ok(()) };
        let hard = spec.hard.clone().unwrap_or_default();
        let mut used = Usage::new();
        count_pods(spec, &self.pods.list_in(&key.0), &mut used);
        count_services(&self.services.list_in(&key.0), &mut used);
        let names: Vec<&String> = hard.keys().collect();
        let others = self.count_others(&key.0, &names, &mut used).await?;
        let status = status(&hard, &used);
        if quota.status.as_ref() != Some(&status) {
            let api: Api<ResourceQuota> = Api::namespaced(self.client.clone(), &key.0);
            let changed = ResourceQuota { status: Some(status), ..(*quota).clone() };
            api.replace_status(name(&*quota), &PostParams::default(), &changed).await?;
        }
        if others {
            self.queue.add_after(key, RESYNC);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pods_are_summed_in_the_quotas_units() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {
            "initContainers": [{"name": "i", "resources": {"requests": {"cpu": "2"}}}],
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "500m", "memory": "64Mi"}}},
                {"name": "b", "resources": {"requests": {"cpu": "250m", "memory": "64Mi"}}}]}}))
        .unwrap();
        let hard: BTreeMap<String, Quantity> =
            [("pods", "5"), ("cpu", "4"), ("requests.memory", "1Gi"), ("secrets", "3")]
                .iter()
                .map(|(k, v)| ((*k).to_string(), Quantity((*v).to_string())))
                .collect();
        let mut used = Usage::new();
        let spec = ResourceQuotaSpec { hard: Some(hard.clone()), ..ResourceQuotaSpec::default() };
        count_pods(&spec, &[Arc::new(pod.clone())], &mut used);
        let used = status(&hard, &used).used.unwrap();
        let text = |k: &str| used[k].0.as_str();
        assert_eq!(
            (text("pods"), text("cpu"), text("requests.memory"), text("secrets")),
            ("1", "2", "128Mi", "0")
        );
        let scoped = ResourceQuotaSpec { scopes: Some(vec!["Terminating".into()]), ..spec };
        assert!(!in_scope(&scoped, &pod));
    }
}
