//! The `used` of ResourceQuotas, counted anew. Upstream counterpart: pkg/controller/resourcequota.
//!
//! What stays true: what an object costs is `sampan_kinds::quota`'s to say, here as in admission. Admission charges a
//! write before its object is there to be counted, so a quota is only counted again when its limits change or when
//! something that it counts goes or shrinks, never because it was charged. Deliberate differences: kinds other than
//! pods and services are watched (metadata only) as long as a quota names them, not always; a count that changed the
//! status is repeated once after a moment, as it may have missed an object that was being written just then.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, ResourceQuota, ResourceQuotaStatus, Service};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{DynamicObject, ListParams, PostParams};
use kube::{Api, Client, Resource as _};
use parking_lot::Mutex;
use sampan_client::informer::key;
use sampan_client::reflector::{self, Following, Sink, Source};
use sampan_client::{Event, Informer, WorkQueue};
use sampan_kinds::quantity::{self, Amount, ResourceList};
use sampan_kinds::quota;
use sampan_world::clock;
use serde_json::Value;

use crate::controller::{Controller, Descriptor, Key, SyncError, SyncResult, run};
use crate::controller_ref::{is_deleting, name, namespace};
use crate::discovery::{self, Discovered};
use crate::{Scope, api_error, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "resourcequota-controller",
    service_account: "resourcequota-controller",
    component: "resourcequota-controller",
    build: |scope| run(ResourceQuotaController::new(&scope)),
};

/// Upstream's resync: what no event told is found by then.
const RESYNC: Duration = Duration::from_secs(300);
/// When a count that changed something is repeated.
const SETTLE: Duration = Duration::from_secs(5);
/// Kinds that quotas count under names without `count/`.
const PLAIN: [&str; 7] = [
    "configmaps",
    "persistentvolumeclaims",
    "pods",
    "replicationcontrollers",
    "resourcequotas",
    "secrets",
    "services",
];

/// (group, plural)
type Resource = (String, String);

struct ResourceQuotaController {
    client: Client,
    quotas: Informer<ResourceQuota>,
    pods: Informer<Pod>,
    services: Informer<Service>,
    /// Watches of what quotas name, beside pods and services; as many as there are kinds.
    monitors: Mutex<HashMap<Resource, (Arc<Discovered>, Following)>>,
    queue: WorkQueue<Key>,
}

/// Hears of objects of a kind that go; of the others nothing is kept.
struct Monitor {
    kind: Arc<Discovered>,
    quotas: Informer<ResourceQuota>,
    queue: WorkQueue<Key>,
    has_listed: AtomicBool,
}

impl Monitor {
    fn wake(&self, namespace: Option<&str>) {
        let resource = &self.kind.resource;
        wake(&self.quotas, &self.queue, &resource.plural, &resource.group, namespace);
    }
}

impl Sink for Monitor {
    fn begin(&self) {}

    fn apply(&self, object: &str) -> Result<Option<String>, serde_json::Error> {
        Ok(reflector::metadata(object)?.resource_version)
    }

    fn delete(&self, object: &str) -> Result<Option<String>, serde_json::Error> {
        let meta = reflector::metadata(object)?;
        self.wake(meta.namespace.as_deref());
        Ok(meta.resource_version)
    }

    fn complete(&self) {
        // what went while the watch was away was not told
        if self.has_listed.swap(true, Ordering::Relaxed) {
            self.wake(None);
        }
    }
}

impl ResourceQuotaController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            quotas: scope.informers.of(),
            pods: scope.informers.of(),
            services: scope.informers.of(),
            monitors: Mutex::default(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.quotas.on_event(move |event| {
            if limits_changed(event) {
                me.queue.add(key(&**event.object()));
            }
        });
        let me = this.clone();
        this.pods.on_event(move |event| {
            if pod_may_cost_less(event) {
                wake(&me.quotas, &me.queue, "pods", "", Some(namespace(&**event.object())));
            }
        });
        let me = this.clone();
        this.services.on_event(move |event| {
            if service_may_cost_less(event) {
                wake(&me.quotas, &me.queue, "services", "", Some(namespace(&**event.object())));
            }
        });
        this
    }

    /// The kind of a resource that a quota names, watched from now on; `None` when the API has no such.
    async fn watched(&self, resource: &Resource) -> Result<Option<Arc<Discovered>>, SyncError> {
        if let Some((kind, _)) = self.monitors.lock().get(resource) {
            return Ok(Some(kind.clone()));
        }
        let kinds = discovery::all(&self.client).await?;
        let is_it = |d: &Discovered| d.resource.group == resource.0 && d.resource.plural == resource.1;
        let Some(kind) = kinds.into_iter().find(|d| is_it(d) && d.namespaced && d.is_collectable()) else {
            return Ok(None);
        };
        let kind = Arc::new(kind);
        let mut monitors = self.monitors.lock();
        let (kind, _) =
            monitors.entry(resource.clone()).or_insert_with(|| (kind.clone(), self.monitor(kind)));
        Ok(Some(kind.clone()))
    }

    fn monitor(&self, kind: Arc<Discovered>) -> Following {
        let path = DynamicObject::url_path(&kind.resource, None);
        let source = Source { path, metadata_only: true, may_be_refused: true, ..Source::default() };
        let (quotas, queue) = (self.quotas.clone(), self.queue.clone());
        let monitor = Monitor { kind, quotas, queue, has_listed: AtomicBool::default() };
        reflector::start(self.client.clone(), source, Arc::new(monitor))
    }

    /// Ends the watches of kinds that no quota names any more.
    fn prune_monitors(&self) {
        let named: BTreeSet<Resource> = self.quotas.list().iter().flat_map(|q| resources_of(q)).collect();
        self.monitors.lock().retain(|resource, _| named.contains(resource));
    }

    /// Adds what the namespace's objects of a resource cost; false when there is no such resource.
    async fn count(
        &self,
        quota: &Value,
        resource: &Resource,
        used: &mut ResourceList,
    ) -> Result<bool, SyncError> {
        let space = quota["metadata"]["namespace"].as_str().unwrap_or_default();
        let mut tally = Tally { quota, resource, now: clock::now(), used };
        match (resource.0.as_str(), resource.1.as_str()) {
            ("", "pods") => {
                for pod in self
                    .pods
                    .list_in(space)
                    .iter()
                    .filter(|p| !pod_state::is_terminal(p) || counts_objects(quota))
                {
                    tally.add(&json(&**pod));
                }
            }
            ("", "services") => self.services.list_in(space).iter().for_each(|s| tally.add(&json(&**s))),
            (_, plural) => {
                let Some(kind) = self.watched(resource).await? else { return Ok(false) };
                let api: Api<DynamicObject> =
                    Api::namespaced_with(self.client.clone(), space, &kind.resource);
                if plural == "persistentvolumeclaims" {
                    let claims = api.list(&ListParams::default()).await?.items;
                    claims.iter().for_each(|claim| tally.add(&json(claim)));
                } else {
                    let count = api.list_metadata(&ListParams::default()).await?.items.len();
                    (0..count).for_each(|_| tally.add(&Value::Null));
                }
            }
        }
        Ok(true)
    }
}

/// Sums up what one resource's objects cost a quota.
struct Tally<'a> {
    quota: &'a Value,
    resource: &'a Resource,
    now: jiff::Timestamp,
    used: &'a mut ResourceList,
}

impl Tally<'_> {
    fn add(&mut self, object: &Value) {
        let (group, plural) = (&self.resource.0, &self.resource.1);
        if !quota::in_scope(self.quota, group, plural, object) {
            return;
        }
        for (name, amount) in quota::usage(group, plural, object, self.now) {
            let sum = self.used.entry(name).or_insert(Amount::ZERO);
            *sum = sum.plus(amount);
        }
    }
}

fn json(object: &impl serde::Serialize) -> Value {
    serde_json::to_value(object).unwrap_or_default()
}

/// Whether finished pods matter too, as `count/pods` counts whatever is stored.
fn counts_objects(quota: &Value) -> bool {
    quota.pointer("/spec/hard").and_then(|hard| hard.get("count/pods")).is_some()
}

fn limits(quota: &ResourceQuota) -> BTreeMap<String, Quantity> {
    quota.spec.as_ref().and_then(|s| s.hard.clone()).unwrap_or_default()
}

/// A change of the status is admission's charge or our own count.
fn limits_changed(event: &Event<'_, ResourceQuota>) -> bool {
    match event {
        Event::Updated { old, new } => limits(old) != limits(new),
        _ => true,
    }
}

fn pod_may_cost_less(event: &Event<'_, Pod>) -> bool {
    match event {
        Event::Added(_) => false,
        Event::Updated { old, new } => {
            pod_state::is_terminal(old) != pod_state::is_terminal(new) || old.spec != new.spec
        }
        Event::Deleted(_) => true,
    }
}

fn service_may_cost_less(event: &Event<'_, Service>) -> bool {
    match event {
        Event::Added(_) => false,
        Event::Updated { old, new } => old.spec != new.spec,
        Event::Deleted(_) => true,
    }
}

/// Has the namespace's quotas (all of them without one) that name the resource counted.
fn wake(
    quotas: &Informer<ResourceQuota>,
    queue: &WorkQueue<Key>,
    plural: &str,
    group: &str,
    namespace: Option<&str>,
) {
    let candidates = match namespace {
        Some(namespace) => quotas.list_in(namespace),
        None => quotas.list(),
    };
    let names_it = |q: &ResourceQuota| resources_of(q).iter().any(|(g, p)| g == group && p == plural);
    for quota in candidates.iter().filter(|q| names_it(q)) {
        queue.add(key(&**quota));
    }
}

/// The resources whose objects a quota counts.
fn resources_of(quota: &ResourceQuota) -> BTreeSet<Resource> {
    let hard = quota.spec.iter().flat_map(|s| s.hard.iter().flatten());
    let mut found = BTreeSet::new();
    for (name, _) in hard {
        match name.strip_prefix("count/") {
            Some(counted) => {
                let (plural, group) = counted.split_once('.').unwrap_or((counted, ""));
                found.insert((group.to_string(), plural.to_string()));
            }
            None => {
                let of = PLAIN.iter().filter(|plural| quota::is_about(name, "", plural));
                found.extend(of.map(|plural| (String::new(), (*plural).to_string())));
            }
        }
    }
    found
}

/// `used` for the resources of `hard` that something counts, written the way `hard` is.
fn status(
    hard: &BTreeMap<String, Quantity>,
    counted: &BTreeSet<Resource>,
    used: &ResourceList,
) -> ResourceQuotaStatus {
    let text = |(name, limit): (&String, &Quantity)| {
        if !counted.iter().any(|(group, plural)| quota::is_about(name, group, plural)) {
            return None;
        }
        let (_, format) = quantity::parse(&limit.0)?;
        let amount = used.get(name).copied().unwrap_or(Amount::ZERO);
        Some((name.clone(), Quantity(quantity::canonical(amount, format))))
    };
    ResourceQuotaStatus { hard: Some(hard.clone()), used: Some(hard.iter().filter_map(text).collect()) }
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
        self.prune_monitors();
        let Some(quota) = self.quotas.get(&key.0, &key.1).filter(|q| !is_deleting(&**q)) else {
            return Ok(());
        };
        let hard = limits(&quota);
        let value = json(&*quota);
        let (mut used, mut counted) = (ResourceList::new(), BTreeSet::new());
        for resource in resources_of(&quota) {
            if self.count(&value, &resource, &mut used).await? {
                counted.insert(resource);
            }
        }
        let status = status(&hard, &counted, &used);
        let mut again = RESYNC;
        if quota.status.as_ref() != Some(&status) {
            let api: Api<ResourceQuota> = Api::namespaced(self.client.clone(), &key.0);
            let changed = ResourceQuota { status: Some(status), ..(*quota).clone() };
            let written = api.replace_status(name(&*quota), &PostParams::default(), &changed).await;
            api_error::found(written)?;
            again = SETTLE;
        }
        self.queue.add_after(key, again);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn quota(hard: Value, scopes: Value) -> ResourceQuota {
        serde_json::from_value(json!({"metadata": {"name": "q", "namespace": "ns"},
            "spec": {"hard": hard, "scopes": scopes}}))
        .unwrap()
    }

    #[test]
    fn objects_are_summed_in_the_quotas_units() {
        let pods = [
            json!({"spec": {
                "initContainers": [{"name": "i", "resources": {"requests": {"cpu": "2"}}}],
                "containers": [{"name": "a", "resources": {"requests": {"cpu": "500m", "memory": "64Mi"}}},
                    {"name": "b", "resources": {"requests": {"cpu": "250m", "memory": "64Mi"}}}]}}),
            json!({"spec": {"activeDeadlineSeconds": 5, "containers": [{"name": "a", "resources":
                {"requests": {"cpu": "1", "example.com/dongle": "2"}}}]}}),
            json!({"spec": {"containers": [{"name": "a"}]}, "status": {"phase": "Succeeded"}}),
        ];
        let hard = json!({"pods": "5", "cpu": "4", "requests.memory": "1Gi", "count/pods": "9", "secrets": "3",
            "requests.example.com/dongle": "3", "count/things.example.com": "1"});
        let counted: BTreeSet<Resource> =
            [("".to_string(), "pods".to_string()), ("".to_string(), "secrets".to_string())].into();
        for (scopes, expected) in [
            (
                json!([]),
                json!({"count/pods": "3", "cpu": "3", "pods": "2", "requests.example.com/dongle": "2",
                    "requests.memory": "128Mi", "secrets": "0"}),
            ),
            (
                json!(["Terminating"]),
                json!({"count/pods": "1", "cpu": "1", "pods": "1", "requests.example.com/dongle": "2",
                    "requests.memory": "0", "secrets": "0"}),
            ),
        ] {
            let quota = quota(hard.clone(), scopes);
            let (value, mut used) = (json(&quota), ResourceList::new());
            let resource = (String::new(), "pods".to_string());
            let now = clock::now();
            let mut tally = Tally { quota: &value, resource: &resource, now, used: &mut used };
            pods.iter().for_each(|pod| tally.add(pod));
            let status = status(&limits(&quota), &counted, &used);
            assert_eq!(json(&status)["used"], expected);
        }
    }

    #[test]
    fn names_say_what_is_counted() {
        let cases = [
            ("limits.cpu", vec![("", "pods")]),
            ("requests.example.com/dongle", vec![("", "pods")]),
            ("services.nodeports", vec![("", "services")]),
            ("gold.storageclass.storage.k8s.io/requests.storage", vec![("", "persistentvolumeclaims")]),
            ("count/replicasets.apps", vec![("apps", "replicasets")]),
            ("count/secrets", vec![("", "secrets")]),
            ("secrets", vec![("", "secrets")]),
            ("example.com/dongle", vec![]),
        ];
        for (name, expected) in cases {
            let found = resources_of(&quota(json!({name: "1"}), json!([])));
            let found: Vec<_> = found.iter().map(|(g, p)| (g.as_str(), p.as_str())).collect();
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn only_what_lowers_usage_has_it_counted() {
        let before = quota(json!({"pods": "5"}), json!([]));
        let mut charged = before.clone();
        charged.status = serde_json::from_value(json!({"used": {"pods": "1"}})).unwrap();
        let raised = quota(json!({"pods": "6"}), json!([]));
        let changed = |new: &ResourceQuota| {
            limits_changed(&Event::Updated { old: &Arc::new(before.clone()), new: &Arc::new(new.clone()) })
        };
        assert_eq!((changed(&charged), changed(&raised)), (false, true));

        let pod = |phase: &str, deadline: Option<i64>| -> Arc<Pod> {
            let pod = json!({"spec": {"containers": [], "activeDeadlineSeconds": deadline}, "status": {"phase": phase}});
            Arc::new(serde_json::from_value(pod).unwrap())
        };
        let running = pod("Running", None);
        for (new, expected) in [
            (pod("Running", None), false),
            (pod("Pending", None), false),
            (pod("Failed", None), true),
            (pod("Running", Some(5)), true),
        ] {
            assert_eq!(pod_may_cost_less(&Event::Updated { old: &running, new: &new }), expected);
        }
        assert!(!pod_may_cost_less(&Event::Added(&running)));
        assert!(pod_may_cost_less(&Event::Deleted(&running)));
    }
}
