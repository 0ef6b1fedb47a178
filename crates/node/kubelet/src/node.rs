//! The node's own object: registration, status and lease.
//!
//! Upstream counterparts: kubelet_node_status.go, pkg/kubelet/nodestatus, pkg/util/node lease. A status is written when
//! something in it changed, and every five minutes; in between the lease says that the node lives.
pub mod machine;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, NodeCondition, NodeSpec, NodeStatus};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use sampan_kinds::quantity::{self, Amount};
use sampan_kinds::version::GIT_VERSION;
use sampan_world::clock;
use serde_json::{Value, json};

use crate::node_services::NodeServices;
use crate::pressure::Pressure;
use crate::recorder::NORMAL;

const LEASES: &str = "kube-node-lease";
const MAX_IMAGES: usize = 50;

type Quantities = BTreeMap<String, Quantity>;

/// What the node has, and what pods may have of it.
pub fn capacity(services: &NodeServices) -> (Quantities, Quantities) {
    let config = &services.config;
    let mut capacity: Quantities = machine::capacity(&config.root_dir);
    capacity.insert("pods".into(), Quantity(config.max_pods.to_string()));
    let mut allocatable = capacity.clone();
    for (name, reserved) in &config.reserved {
        let there = allocatable.get(name).and_then(|q| quantity::parse(&q.0));
        let reserved = quantity::parse(reserved);
        if let (Some((there, format)), Some((reserved, _))) = (there, reserved) {
            let left = there.minus(reserved).max(Amount::ZERO);
            allocatable.insert(name.clone(), Quantity(quantity::canonical(left, format)));
        }
    }
    (capacity, allocatable)
}

fn labels(services: &NodeServices) -> BTreeMap<String, String> {
    let platform = services.runtime.platform();
    let mut labels = services.config.labels.clone();
    for prefix in ["kubernetes.io", "beta.kubernetes.io"] {
        labels.insert(format!("{prefix}/arch"), platform.architecture.clone());
        labels.insert(format!("{prefix}/os"), platform.os.clone());
    }
    labels.insert("kubernetes.io/hostname".into(), services.config.node_name.clone());
    labels
}

fn conditions(pressure: Pressure, old: Option<&NodeStatus>) -> Vec<NodeCondition> {
    let now = Time(clock::now_seconds());
    let condition = |kind: &str, is_true: bool, reason: &str, message: &str| {
        let status = if is_true { "True" } else { "False" };
        let before = old.and_then(|s| s.conditions.iter().flatten().find(|c| c.type_ == kind));
        let same = before.filter(|c| c.status == status);
        NodeCondition {
            type_: kind.into(),
            status: status.into(),
            reason: Some(reason.into()),
            message: Some(message.into()),
            last_heartbeat_time: Some(now.clone()),
            last_transition_time: same.and_then(|c| c.last_transition_time.clone()).or(Some(now.clone())),
        }
    };
    vec![
        match pressure.memory {
            true => condition(
                "MemoryPressure",
                true,
                "KubeletHasInsufficientMemory",
                "kubelet has insufficient memory available",
            ),
            false => condition(
                "MemoryPressure",
                false,
                "KubeletHasSufficientMemory",
                "kubelet has sufficient memory available",
            ),
        },
        match pressure.disk {
            true => condition("DiskPressure", true, "KubeletHasDiskPressure", "kubelet has disk pressure"),
            false => {
                condition("DiskPressure", false, "KubeletHasNoDiskPressure", "kubelet has no disk pressure")
            }
        },
        match pressure.pids {
            true => condition(
                "PIDPressure",
                true,
                "KubeletHasInsufficientPID",
                "kubelet has insufficient PID available",
            ),
            false => condition(
                "PIDPressure",
                false,
                "KubeletHasSufficientPID",
                "kubelet has sufficient PID available",
            ),
        },
        condition("Ready", true, "KubeletReady", "kubelet is posting ready status"),
    ]
}

async fn status(services: &NodeServices, pressure: Pressure, old: Option<&NodeStatus>) -> NodeStatus {
    let config = &services.config;
    let (capacity, allocatable) = capacity(services);
    *services.volumes.allocatable.write() = allocatable.clone();
    let platform = services.runtime.platform();
    let mut images = services.runtime.list_images().await.unwrap_or_default();
    images.sort_by_key(|image| std::cmp::Reverse(image.size_bytes));
    let images: Vec<Value> = images
        .into_iter()
        .take(MAX_IMAGES)
        .map(|image| {
            let names: Vec<String> = image.repo_digests.into_iter().chain(image.repo_tags).take(5).collect();
            json!({"names": names, "sizeBytes": image.size_bytes})
        })
        .collect();
    let mut addresses: Vec<Value> =
        config.host_ips().iter().map(|ip| json!({"type": "InternalIP", "address": ip.to_string()})).collect();
    addresses.push(json!({"type": "Hostname", "address": config.node_name}));
    let facts = machine::facts();
    let built = json!({
        "capacity": capacity,
        "allocatable": allocatable,
        "conditions": conditions(pressure, old),
        "addresses": addresses,
        "images": images,
        "daemonEndpoints": {"kubeletEndpoint": {"Port": config.api_port}},
        "runtimeHandlers": [{"name": "", "features": {"recursiveReadOnlyMounts": true, "userNamespaces": false}}],
        "features": {"supplementalGroupsPolicy": true},
        "nodeInfo": {
            "machineID": facts.machine_id, "systemUUID": facts.system_uuid, "bootID": facts.boot_id,
            "kernelVersion": facts.kernel, "osImage": facts.os_image, "operatingSystem": platform.os,
            "architecture": platform.architecture, "containerRuntimeVersion": services.runtime.version(),
            "kubeletVersion": GIT_VERSION, "kubeProxyVersion": "",
        },
    });
    serde_json::from_value(built).unwrap_or_default()
}

/// Makes the node's object where it is missing, and sets our labels.
async fn register(services: &NodeServices) -> Result<Node, kube::Error> {
    let api: Api<Node> = Api::all(services.client.clone());
    let name = &services.config.node_name;
    let wanted = labels(services);
    let status = status(services, Pressure::default(), None).await;
    let node = Node {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            labels: Some(wanted.clone()),
            annotations: Some(
                [("volumes.kubernetes.io/controller-managed-attach-detach".to_string(), "true".to_string())]
                    .into(),
            ),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            taints: Some(services.config.taints.clone()).filter(|t| !t.is_empty()),
            ..NodeSpec::default()
        }),
        status: Some(status),
    };
    match api.create(&PostParams::default(), &node).await {
        Ok(node) => Ok(node),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let there = api.get(name).await?;
            let missing: BTreeMap<&String, &String> =
                wanted.iter().filter(|(k, v)| there.labels().get(*k) != Some(v)).collect();
            if missing.is_empty() {
                return Ok(there);
            }
            let patch = json!({"metadata": {"labels": missing}});
            api.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await
        }
        Err(error) => Err(error),
    }
}

/// All but the heartbeats.
fn without_heartbeats(status: &NodeStatus) -> NodeStatus {
    let mut status = status.clone();
    status.conditions.iter_mut().flatten().for_each(|c| c.last_heartbeat_time = None);
    status
}

async fn write_status(
    services: &NodeServices,
    new: &NodeStatus,
    old: &NodeStatus,
) -> Result<(), kube::Error> {
    let mut value = serde_json::to_value(new).map_err(kube::Error::SerdeError)?;
    let is_moved = new.addresses != old.addresses;
    if let Some(status) = value.as_object_mut() {
        // a merge by type would keep what this node no longer has
        match status.get_mut("addresses").and_then(Value::as_array_mut) {
            Some(addresses) if is_moved => addresses.push(json!({"$patch": "replace"})),
            _ => drop(status.remove("addresses")),
        }
    }
    let api: Api<Node> = Api::all(services.client.clone());
    let patch = Patch::Strategic(json!({"status": value}));
    api.patch_status(&services.config.node_name, &PatchParams::default(), &patch).await.map(drop)
}

async fn renew(services: &NodeServices, node: &Node) -> Result<(), kube::Error> {
    let api: Api<Lease> = Api::namespaced(services.client.clone(), LEASES);
    let name = &services.config.node_name;
    let now = MicroTime(clock::now());
    let seconds = i32::try_from(services.config.lease_duration.as_secs()).unwrap_or(40);
    let patch = json!({"spec": {"renewTime": now, "holderIdentity": name, "leaseDurationSeconds": seconds}});
    match api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        other => return other.map(drop),
    }
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(LEASES.to_string()),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: name.clone(),
                uid: node.uid().unwrap_or_default(),
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(name.clone()),
            lease_duration_seconds: Some(seconds),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    };
    api.create(&PostParams::default(), &lease).await.map(drop)
}

/// Registers, then keeps status and lease fresh. Never returns.
pub async fn run(services: Arc<NodeServices>, mut sample: impl FnMut() -> Pressure) {
    let mut wait = Duration::from_millis(100);
    let node = loop {
        match register(&services).await {
            Ok(node) => break node,
            Err(error) => {
                tracing::info!(%error, "registering the node, will retry");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(Duration::from_secs(7));
            }
        }
    };
    services.recorder.node(NORMAL, "Starting", "Starting kubelet.");
    let mut ticks = tokio::time::interval(services.config.lease_duration / 4);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut written = node.status.clone().unwrap_or_default();
    let mut written_at = None;
    loop {
        ticks.tick().await;
        if let Err(error) = renew(&services, &node).await {
            tracing::debug!(%error, "renewing the node's lease");
        }
        // what the node controller wrote while we were away counts
        let there = services.this_node().and_then(|n| n.status.clone());
        let old = there.unwrap_or_else(|| written.clone());
        let new = status(&services, sample(), Some(&old)).await;
        let is_old = written_at
            .is_none_or(|at| clock::monotonic().duration_since(at) >= services.config.status_report_period);
        let is_ready =
            |s: &NodeStatus| s.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
        if !is_old && is_ready(&old) && without_heartbeats(&new) == without_heartbeats(&written) {
            continue;
        }
        match write_status(&services, &new, &written).await {
            Ok(()) => {
                written = new;
                written_at = Some(clock::monotonic());
            }
            Err(error) => tracing::debug!(%error, "writing the node's status"),
        }
    }
}
