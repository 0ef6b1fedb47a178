//! NodeRestriction: a kubelet writes only its own node, and only pods that are on it.
//! Upstream counterpart: plugin/pkg/admission/noderestriction.
use std::collections::BTreeSet;

use async_trait::async_trait;
use serde_json::{Map, Value};

use crate::pod::{MIRROR_ANNOTATION, is_mirror, items, references};
use crate::{Context, Operation, Plugin, Rejection, Request};

const LABELS: [&str; 11] = [
    "kubernetes.io/hostname",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
    "beta.kubernetes.io/instance-type",
    "node.kubernetes.io/instance-type",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
];
const LABEL_NAMESPACES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];
const RESTRICTED: &str = "node-restriction.kubernetes.io";

struct NodeRestriction {
    context: Context,
}

pub fn new(context: &Context) -> Box<dyn Plugin> {
    Box::new(NodeRestriction { context: context.clone() })
}

#[async_trait]
impl Plugin for NodeRestriction {
    fn name(&self) -> &'static str {
        "NodeRestriction"
    }

    fn handles(&self, operation: Operation, _: &str, _: &str) -> bool {
        operation != Operation::Connect
    }

    async fn validate(
        &self,
        request: &Request<'_>,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<(), Rejection> {
        if !request.user.is_in("system:nodes") {
            return Ok(());
        }
        let Some(node) = request.user.username.strip_prefix("system:node:") else { return Ok(()) };
        if node.is_empty() {
            let words = format!("could not determine node from user {:?}", request.user.username);
            return Err(Rejection::forbidden(words));
        }
        let null = Value::Null;
        let (new, before) = (object.unwrap_or(&null), old.unwrap_or(&null));
        match (request.group, request.resource, request.subresource) {
            ("", "pods", "") => self.pod(node, request, new, before).await,
            ("", "pods", "status") => pod_status(node, request, new, before),
            ("", "pods", "eviction") => self.eviction(node, request).await,
            ("", "pods", subresource) => forbid(format!(
                "unexpected pod subresource {subresource:?}, only 'status' and 'eviction' are allowed"
            )),
            ("", "nodes", _) => own_node(node, request, new, before),
            ("", "persistentvolumeclaims", "status") => claim_status(node, request, new, before),
            ("", "persistentvolumeclaims", _) => forbid("may only update PVC status"),
            ("", "serviceaccounts", "token") => self.token(node, request, new).await,
            ("coordination.k8s.io", "leases", _) => lease(node, request, new),
            ("storage.k8s.io", "csinodes", _) => csi_node(node, request, new),
            ("resource.k8s.io", "resourceslices", _) => resource_slice(node, request, new),
            _ => Ok(()),
        }
    }
}

fn forbid(why: impl Into<String>) -> Result<(), Rejection> {
    Err(Rejection::forbidden(why))
}

impl NodeRestriction {
    async fn stored_pod(&self, namespace: &str, name: &str) -> Result<Value, Rejection> {
        let found = self.context.get(&format!("/api/v1/namespaces/{namespace}/pods/{name}")).await?;
        found.ok_or_else(|| Rejection::NotFound { resource: "pods", name: name.to_string() })
    }

    async fn pod(
        &self,
        node: &str,
        request: &Request<'_>,
        pod: &Value,
        old: &Value,
    ) -> Result<(), Rejection> {
        match request.operation {
            Operation::Create => self.create_pod(node, pod).await,
            Operation::Delete => {
                let stored = match old.is_null() {
                    true => &self.stored_pod(request.namespace, request.name).await?,
                    false => old,
                };
                match stored["spec"]["nodeName"] == node {
                    true => Ok(()),
                    false => {
                        forbid(format!("node {node:?} can only delete pods with spec.nodeName set to itself"))
                    }
                }
            }
            operation => forbid(format!(
                "unexpected operation {:?}, node {node:?} can only create and delete mirror pods",
                operation.name()
            )),
        }
    }

    async fn create_pod(&self, node: &str, pod: &Value) -> Result<(), Rejection> {
        if !is_mirror(pod) {
            return forbid(format!(
                "pod does not have {MIRROR_ANNOTATION:?} annotation, node {node:?} can only create mirror pods"
            ));
        }
        if pod["spec"]["nodeName"] != node {
            return forbid(format!("node {node:?} can only create pods with spec.nodeName set to itself"));
        }
        let owners: Vec<&Value> = items(&pod["metadata"], "ownerReferences").collect();
        let [owner] = owners.as_slice() else {
            return forbid(match owners.is_empty() {
                true => format!("node {node:?} can only create pods with an owner reference set to itself"),
                false => {
                    format!("node {node:?} can only create pods with a single owner reference set to itself")
                }
            });
        };
        if owner["apiVersion"] != "v1" || owner["kind"] != "Node" || owner["name"] != node {
            return forbid(format!(
                "node {node:?} can only create pods with an owner reference set to itself"
            ));
        }
        if owner["controller"] != true {
            return forbid(format!(
                "node {node:?} can only create pods with a controller owner reference set to itself"
            ));
        }
        if owner["blockOwnerDeletion"] == true {
            return forbid(format!("node {node:?} must not set blockOwnerDeletion on an owner reference"));
        }
        let Some(stored) = self.context.get(&format!("/api/v1/nodes/{node}")).await? else {
            return Err(Rejection::NotFound { resource: "nodes", name: node.to_string() });
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let (given, uid) = (text(&owner["uid"]), text(&stored["metadata"]["uid"]));
        if given != uid {
            return forbid(format!("node {node} UID mismatch: expected {given} got {uid}"));
        }
        let mut found = references(pod);
        if !text(&pod["spec"]["serviceAccountName"]).is_empty() {
            found.insert(0, "serviceaccounts");
        }
        match found.first() {
            Some(resource) => forbid(format!("node {node:?} can not create pods that reference {resource}")),
            None => Ok(()),
        }
    }

    async fn eviction(&self, node: &str, request: &Request<'_>) -> Result<(), Rejection> {
        if request.operation != Operation::Create {
            return forbid(format!("unexpected operation {}", request.operation.name()));
        }
        if request.name.is_empty() {
            return forbid("could not determine pod from request data");
        }
        let pod = self.stored_pod(request.namespace, request.name).await?;
        match pod["spec"]["nodeName"] == node {
            true => Ok(()),
            false => forbid(format!("node {node} can only evict pods with spec.nodeName set to itself")),
        }
    }

    async fn token(&self, node: &str, request: &Request<'_>, token: &Value) -> Result<(), Rejection> {
        let reference = &token["spec"]["boundObjectRef"];
        let text = |field: &str| reference[field].as_str().unwrap_or_default();
        if text("apiVersion") != "v1" || text("kind") != "Pod" || text("name").is_empty() {
            return forbid("node requested token not bound to a pod");
        }
        if text("uid").is_empty() {
            return forbid("node requested token with a pod binding without a uid");
        }
        let pod = self.stored_pod(request.namespace, text("name")).await?;
        if pod["metadata"]["uid"] != text("uid") {
            return forbid(format!(
                "the UID in the bound object reference ({}) does not match the UID in record. The object might have \
                 been deleted and then recreated",
                text("uid")
            ));
        }
        match pod["spec"]["nodeName"] == node {
            true => Ok(()),
            false => forbid("node requested token bound to a pod scheduled on a different node"),
        }
    }
}

fn pod_status(node: &str, request: &Request<'_>, pod: &Value, old: &Value) -> Result<(), Rejection> {
    if request.operation != Operation::Update {
        return forbid(format!("unexpected operation {:?}", request.operation.name()));
    }
    if old["spec"]["nodeName"] != node {
        return forbid(format!(
            "node {node:?} can only update pod status for pods with spec.nodeName set to itself"
        ));
    }
    if labels(pod) != labels(old) {
        return forbid(format!("node {node:?} cannot update labels through pod status"));
    }
    let same = |field: &str| pod["status"].get(field) == old["status"].get(field);
    if !same("resourceClaimStatuses") {
        return forbid(format!("node {node:?} cannot update resource claim statues"));
    }
    if !same("extendedResourceClaimStatus") {
        return forbid(format!("node {node:?} cannot update extended resource claim status"));
    }
    Ok(())
}

fn labels(object: &Value) -> Map<String, Value> {
    object["metadata"]["labels"].as_object().cloned().unwrap_or_default()
}

fn own_node(node: &str, request: &Request<'_>, new: &Value, old: &Value) -> Result<(), Rejection> {
    // on create the name may only be in the object
    let named = new["metadata"]["name"].as_str().filter(|_| request.name.is_empty()).unwrap_or(request.name);
    if named != node {
        return forbid(format!("node {node:?} is not allowed to modify node {named:?}"));
    }
    let absent = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    let differ = |a: &Value, b: &Value| a != b && !(absent(a) && absent(b));
    match request.operation {
        Operation::Create => {
            if !new["spec"]["configSource"].is_null() {
                return forbid(format!(
                    "node {node:?} is not allowed to create pods with a non-nil configSource"
                ));
            }
            let refused = forbidden_labels(&labels(new), &Map::new());
            match refused.is_empty() {
                true => Ok(()),
                false => {
                    forbid(format!("node {node:?} is not allowed to set the following labels: {refused}"))
                }
            }
        }
        Operation::Update => {
            let source = &new["spec"]["configSource"];
            if !source.is_null() && *source != old["spec"]["configSource"] {
                return forbid(format!(
                    "node {node:?} is not allowed to update configSource to a new non-nil configSource"
                ));
            }
            if differ(&new["spec"]["taints"], &old["spec"]["taints"]) {
                return forbid(format!("node {node:?} is not allowed to modify taints"));
            }
            if differ(&new["metadata"]["ownerReferences"], &old["metadata"]["ownerReferences"]) {
                return forbid(format!("node {node:?} is not allowed to modify ownerReferences"));
            }
            let refused = forbidden_labels(&labels(new), &labels(old));
            match refused.is_empty() {
                true => Ok(()),
                false => forbid(format!("is not allowed to modify labels: {refused}")),
            }
        }
        _ => Ok(()),
    }
}

/// The changed labels that a kubelet may not change, sorted and joined.
fn forbidden_labels(new: &Map<String, Value>, old: &Map<String, Value>) -> String {
    let within = |namespace: &str, of: &str| {
        namespace == of || namespace.strip_suffix(of).is_some_and(|rest| rest.ends_with('.'))
    };
    let forbidden = |label: &&str| {
        let namespace = label.split_once('/').map_or("", |(namespace, _)| namespace);
        let kubernetes = within(namespace, "kubernetes.io") || within(namespace, "k8s.io");
        let kubelet = LABELS.contains(label) || LABEL_NAMESPACES.iter().any(|of| within(namespace, of));
        within(namespace, RESTRICTED) || (kubernetes && !kubelet)
    };
    let changed = new.keys().chain(old.keys()).filter(|key| new.get(*key) != old.get(*key));
    let refused: BTreeSet<&str> = changed.map(String::as_str).filter(forbidden).collect();
    refused.into_iter().collect::<Vec<_>>().join(", ")
}

fn claim_status(node: &str, request: &Request<'_>, new: &Value, old: &Value) -> Result<(), Rejection> {
    if request.operation != Operation::Update {
        return forbid(format!("unexpected operation {:?}", request.operation.name()));
    }
    let strip = |claim: &Value| {
        let mut claim = claim.clone();
        for (part, fields) in [
            ("metadata", &["resourceVersion", "managedFields"][..]),
            ("status", &["capacity", "conditions", "allocatedResourceStatuses", "allocatedResources"][..]),
        ] {
            if let Some(part) = claim.get_mut(part).and_then(Value::as_object_mut) {
                fields.iter().for_each(|field| {
                    part.remove(*field);
                });
            }
        }
        claim
    };
    match strip(new) == strip(old) {
        true => Ok(()),
        false => forbid(format!(
            "node {node:?} is not allowed to update fields other than status.quantity and status.conditions"
        )),
    }
}

fn lease(node: &str, request: &Request<'_>, new: &Value) -> Result<(), Rejection> {
    if request.namespace != "kube-node-lease" {
        return forbid("can only access leases in the \"kube-node-lease\" system namespace");
    }
    let name = match request.operation {
        Operation::Create => new["metadata"]["name"].as_str().unwrap_or_default(),
        _ => request.name,
    };
    match name == node {
        true => Ok(()),
        false => forbid("can only access node lease with the same name as the requesting node"),
    }
}

fn csi_node(node: &str, request: &Request<'_>, new: &Value) -> Result<(), Rejection> {
    let name = match request.operation {
        Operation::Create => new["metadata"]["name"].as_str().unwrap_or_default(),
        _ => request.name,
    };
    match name == node {
        true => Ok(()),
        false => forbid("can only access CSINode with the same name as the requesting node"),
    }
}

fn resource_slice(node: &str, request: &Request<'_>, new: &Value) -> Result<(), Rejection> {
    match request.operation {
        Operation::Create if new["spec"]["nodeName"] != node => {
            forbid("can only create ResourceSlice with the same NodeName as the requesting node")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::tests::{Cluster, request};
    use sampan_client::Identity;
    use serde_json::json;

    #[tokio::test]
    async fn kubelets_write_their_own() {
        let cluster = Cluster::default();
        cluster.put("/api/v1/nodes/a", json!({"metadata": {"uid": "u"}}));
        cluster.put(
            "/api/v1/namespaces/ns/pods/p",
            json!({"metadata": {"uid": "pu"}, "spec": {"nodeName": "a"}}),
        );
        let plugin = new(&cluster.context());
        let (user, other) = (Identity::new("system:node:a", &["system:nodes"]), Identity::new("x", &[]));
        let owner =
            json!([{"apiVersion": "v1", "kind": "Node", "name": "a", "uid": "u", "controller": true}]);
        let mirror = json!({"metadata": {"annotations": {MIRROR_ANNOTATION: "x"}, "ownerReferences": owner},
            "spec": {"nodeName": "a", "containers": []}});
        let mut thief = mirror.clone();
        thief["spec"]["volumes"] = json!([{"name": "v", "secret": {"secretName": "s"}}]);
        let labelled = |label: &str| json!({"metadata": {"name": "a", "labels": {label: "1"}}});
        let token = |uid: &str| json!({"spec": {"boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": uid}}});
        let none = Value::Null;
        let plain = json!({"metadata": {"name": "a"}});
        let tainted = json!({"metadata": {"name": "a"}, "spec": {"taints": [{"key": "k"}]}});
        use Operation::{Create, Delete, Update};
        let cases = [
            (Create, "pods", "p", &mirror, &none, true),
            (Create, "pods", "p", &thief, &none, false),
            (Create, "pods", "p", &plain, &none, false),
            (Update, "pods", "p", &mirror, &mirror, false),
            (Delete, "pods", "p", &none, &mirror, true),
            (Delete, "pods", "p", &none, &plain, false),
            (Update, "pods/status", "p", &mirror, &mirror, true),
            (Update, "pods/status", "p", &mirror, &plain, false),
            (Create, "pods/eviction", "p", &none, &none, true),
            (Create, "pods/exec", "p", &none, &none, false),
            (Create, "nodes", "a", &labelled("kubernetes.io/arch"), &none, true),
            (Create, "nodes", "a", &labelled("mine"), &none, true),
            (Create, "nodes", "a", &labelled("node-role.kubernetes.io/control-plane"), &none, false),
            (Create, "nodes", "a", &labelled("node-restriction.kubernetes.io/x"), &none, false),
            (Update, "nodes", "a", &labelled("x.node.kubernetes.io/y"), &plain, true),
            (Update, "nodes", "a", &tainted, &plain, false),
            (Update, "nodes", "b", &plain, &plain, false),
            (Create, "serviceaccounts/token", "sa", &token("pu"), &none, true),
            (Create, "serviceaccounts/token", "sa", &token("x"), &none, false),
            (Create, "serviceaccounts/token", "sa", &none, &none, false),
        ];
        for (operation, resource, name, new, old, want) in cases {
            let mut asked = request(operation, resource, "ns", name);
            asked.user = &user;
            let (new_object, old_object) =
                (Some(new).filter(|v| !v.is_null()), Some(old).filter(|v| !v.is_null()));
            let got = plugin.validate(&asked, new_object, old_object).await;
            assert_eq!(got.is_ok(), want, "{operation:?} {resource} {new}: {got:?}");
            asked.user = &other;
            assert_eq!(plugin.validate(&asked, new_object, old_object).await, Ok(()));
        }
    }
}
