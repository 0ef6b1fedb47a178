//! What a node's kubelet may do: only what the pods bound to it need.
//!
//! Upstream counterpart: plugin/pkg/auth/authorizer/node. Deliberately different: there is no graph. An index of the
//! pods of each node is kept, and a request is answered by looking at those pods, of which a node has a hundred or so.
//! Claims, volumes and attachments are looked up when a node asks for one, and their informers start then.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{EnvFromSource, EnvVar, PersistentVolume, Pod, PodSpec};
use k8s_openapi::api::rbac::v1::PolicyRule;
use k8s_openapi::api::resource::v1::ResourceSlice;
use k8s_openapi::api::storage::v1::VolumeAttachment;
use parking_lot::RwLock;
use sampan_client::informer::Key;
use sampan_client::{Event, Identity, Informer, Informers};

use super::{Attributes, Verdict, bootstrap_policy, rbac};

const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// The name of the node that `user` is; `None` for everybody else.
pub fn node_name(user: &Identity) -> Option<&str> {
    let name = user.username.strip_prefix("system:node:")?;
    user.is_in("system:nodes").then_some(name)
}

/// Decides for nodes.
#[derive(Clone)]
pub struct NodeAuthorizer {
    pods: Informer<Pod>,
    informers: Option<Informers>,
    pods_of: Arc<RwLock<BTreeMap<String, BTreeSet<Key>>>>,
    rules: Arc<Vec<PolicyRule>>,
}

impl NodeAuthorizer {
    pub fn new(informers: &Informers) -> Self {
        Self::over(informers.of(), Some(informers.clone()))
    }

    /// Without a cluster: for tests.
    pub fn detached() -> Self {
        Self::over(Informer::detached(), None)
    }

    fn over(pods: Informer<Pod>, informers: Option<Informers>) -> Self {
        let pods_of = Arc::new(RwLock::new(BTreeMap::<String, BTreeSet<Key>>::new()));
        let index = pods_of.clone();
        pods.on_event(move |event| {
            let pod = event.object();
            let Some(node) = pod.spec.as_ref().and_then(|s| s.node_name.clone()).filter(|n| !n.is_empty())
            else {
                return;
            };
            let key = sampan_client::informer::key(&**pod);
            let mut index = index.write();
            match event {
                Event::Deleted(_) => {
                    if let Some(keys) = index.get_mut(&node) {
                        keys.remove(&key);
                        if keys.is_empty() {
                            index.remove(&node);
                        }
                    }
                }
                Event::Added(_) | Event::Updated { .. } => {
                    index.entry(node).or_default().insert(key);
                }
            }
        });
        Self { pods, informers, pods_of, rules: Arc::new(bootstrap_policy::node_rules()) }
    }

    pub fn authorize(&self, asked: &Attributes) -> Verdict {
        let Some(node) = node_name(&asked.user) else { return Verdict::no_opinion("") };
        if !asked.resource_request {
            return self.by_rules(asked);
        }
        match (asked.api_group.as_str(), asked.resource.as_str()) {
            ("", "secrets" | "configmaps") => self.read_namespaced(node, asked),
            ("", "persistentvolumeclaims") if asked.subresource == "status" => match asked.verb.as_str() {
                "update" | "patch" => self.related(node, asked),
                _ => Verdict::no_opinion("can only get/update/patch this type"),
            },
            ("", "persistentvolumeclaims" | "persistentvolumes")
            | ("resource.k8s.io", "resourceclaims")
            | ("storage.k8s.io", "volumeattachments") => self.get(node, asked),
            ("", "serviceaccounts") => self.service_account(node, asked),
            ("coordination.k8s.io", "leases") => lease(node, asked),
            ("storage.k8s.io", "csinodes") => csi_node(node, asked),
            ("resource.k8s.io", "resourceslices") => self.resource_slice(node, asked),
            ("", "nodes") => own_node(node, asked),
            ("", "pods") => self.pod(node, asked),
            ("certificates.k8s.io", "podcertificaterequests") => Verdict::no_opinion(""),
            _ => self.by_rules(asked),
        }
    }

    fn by_rules(&self, asked: &Attributes) -> Verdict {
        match self.rules.iter().any(|rule| rbac::rule_allows(rule, asked)) {
            true => Verdict::allow(""),
            false => Verdict::no_opinion(""),
        }
    }

    fn get(&self, node: &str, asked: &Attributes) -> Verdict {
        if asked.verb != "get" {
            return Verdict::no_opinion("can only get individual resources of this type");
        }
        if !asked.subresource.is_empty() {
            return Verdict::no_opinion("cannot get subresource");
        }
        self.related(node, asked)
    }

    fn read_namespaced(&self, node: &str, asked: &Attributes) -> Verdict {
        if !matches!(asked.verb.as_str(), "get" | "list" | "watch") {
            return Verdict::no_opinion("can only read resources of this type");
        }
        if !asked.subresource.is_empty() {
            return Verdict::no_opinion("cannot read subresource");
        }
        if asked.namespace.is_empty() {
            return Verdict::no_opinion("can only read namespaced object of this type");
        }
        self.related(node, asked)
    }

    fn related(&self, node: &str, asked: &Attributes) -> Verdict {
        if asked.name.is_empty() {
            return Verdict::no_opinion("No Object name found");
        }
        match self.is_related(node, asked) {
            true => Verdict::allow(""),
            false => {
                Verdict::no_opinion(format!("no relationship found between node '{node}' and this object"))
            }
        }
    }

    fn service_account(&self, node: &str, asked: &Attributes) -> Verdict {
        if asked.verb == "get" && asked.subresource.is_empty() {
            return self.read_namespaced(node, asked);
        }
        if asked.verb != "create" || asked.name.is_empty() {
            return Verdict::no_opinion("can only create tokens for individual service accounts");
        }
        if asked.subresource != "token" {
            return Verdict::no_opinion("can only create token subresource of serviceaccount");
        }
        self.related(node, asked)
    }

    fn resource_slice(&self, node: &str, asked: &Attributes) -> Verdict {
        if !asked.subresource.is_empty() {
            return Verdict::no_opinion("cannot authorize ResourceSlice subresources");
        }
        match asked.verb.as_str() {
            // admission checks that the slice names the node
            "create" => Verdict::allow(""),
            "get" | "update" | "patch" | "delete" => self.related(node, asked),
            "watch" | "list" | "deletecollection" => match asked.field_selector.requires("spec.nodeName") {
                Some(name) if name == node => Verdict::allow(""),
                _ => Verdict::no_opinion(
                    "can only list/watch/deletecollection resourceslices with nodeName field selector",
                ),
            },
            _ => Verdict::no_opinion(
                "only the following verbs are allowed for a ResourceSlice: get, watch, list, create, update, patch, \
                 delete, deletecollection",
            ),
        }
    }

    fn pod(&self, node: &str, asked: &Attributes) -> Verdict {
        match (asked.subresource.as_str(), asked.verb.as_str()) {
            ("", "get") => self.get(node, asked),
            ("", "list" | "watch") => {
                if asked.field_selector.requires("spec.nodeName") == Some(node) {
                    return Verdict::allow("");
                }
                if !asked.name.is_empty() {
                    return self.related(node, asked);
                }
                Verdict::no_opinion("can only list/watch pods with spec.nodeName field selector")
            }
            // mirror pods, their status, evictions: admission checks that they are of this node
            ("", "create" | "delete") | ("status", "update" | "patch") | ("eviction", "create") => {
                Verdict::allow("")
            }
            _ => Verdict::no_opinion(""),
        }
    }

    /// Whether a pod of `node` leads to the object.
    fn is_related(&self, node: &str, asked: &Attributes) -> bool {
        let (namespace, name) = (asked.namespace.as_str(), asked.name.as_str());
        match asked.resource.as_str() {
            "pods" => self.any_pod(node, |pod| is_named(pod, namespace, name)),
            "secrets" => {
                self.any_pod(node, |pod| in_namespace(pod, namespace) && needs_secret(pod, name))
                    || self.any_volume(node, |volume| volume_needs_secret(volume, namespace, name))
            }
            "configmaps" => {
                self.any_pod(node, |pod| in_namespace(pod, namespace) && needs_config_map(pod, name))
            }
            "serviceaccounts" => self.any_pod(node, |pod| {
                let account = pod.spec.as_ref().and_then(|s| s.service_account_name.as_deref());
                in_namespace(pod, namespace) && !is_mirror(pod) && account == Some(name)
            }),
            "persistentvolumeclaims" => {
                self.any_pod(node, |pod| in_namespace(pod, namespace) && claims(pod).any(|c| c == name))
            }
            "persistentvolumes" => {
                self.any_volume(node, |volume| volume.metadata.name.as_deref() == Some(name))
            }
            "resourceclaims" => self
                .any_pod(node, |pod| in_namespace(pod, namespace) && resource_claims(pod).any(|c| c == name)),
            "volumeattachments" => self.informers.as_ref().is_some_and(|i| {
                i.of::<VolumeAttachment>().get("", name).is_some_and(|a| a.spec.node_name == node)
            }),
            "resourceslices" => self.informers.as_ref().is_some_and(|i| {
                let slice = i.of::<ResourceSlice>().get("", name);
                slice.is_some_and(|s| s.spec.node_name.as_deref() == Some(node))
            }),
            _ => false,
        }
    }

    fn any_pod(&self, node: &str, is: impl Fn(&Pod) -> bool) -> bool {
        let index = self.pods_of.read();
        let mut pods = index.get(node).into_iter().flatten().filter_map(|(ns, name)| self.pods.get(ns, name));
        pods.any(|pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node) && is(&pod))
    }

    /// Looks at the volumes bound to claims of the node's pods.
    fn any_volume(&self, node: &str, is: impl Fn(&PersistentVolume) -> bool) -> bool {
        let Some(informers) = &self.informers else { return false };
        informers.of::<PersistentVolume>().list().iter().any(|volume| {
            let claim = volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref());
            let Some((namespace, name)) = claim.and_then(|c| c.namespace.as_deref().zip(c.name.as_deref()))
            else {
                return false;
            };
            is(volume)
                && self.any_pod(node, |pod| in_namespace(pod, namespace) && claims(pod).any(|c| c == name))
        })
    }
}

fn lease(node: &str, asked: &Attributes) -> Verdict {
    if !matches!(asked.verb.as_str(), "get" | "create" | "update" | "patch" | "delete") {
        return Verdict::no_opinion("can only get, create, update, patch, or delete a node lease");
    }
    if asked.namespace != "kube-node-lease" {
        return Verdict::no_opinion("can only access leases in the \"kube-node-lease\" system namespace");
    }
    // on create the name is not known yet; admission checks it
    if asked.verb != "create" && asked.name != node {
        return Verdict::no_opinion("can only access node lease with the same name as the requesting node");
    }
    Verdict::allow("")
}

fn csi_node(node: &str, asked: &Attributes) -> Verdict {
    if !matches!(asked.verb.as_str(), "get" | "create" | "update" | "patch" | "delete") {
        return Verdict::no_opinion("can only get, create, update, patch, or delete a CSINode");
    }
    if !asked.subresource.is_empty() {
        return Verdict::no_opinion("cannot authorize CSINode subresources");
    }
    if asked.verb != "create" && asked.name != node {
        return Verdict::no_opinion("can only access CSINode with the same name as the requesting node");
    }
    Verdict::allow("")
}

fn own_node(node: &str, asked: &Attributes) -> Verdict {
    match (asked.subresource.as_str(), asked.verb.as_str(), asked.name.as_str()) {
        // admission checks that it is its own
        ("", "create" | "update" | "patch", _) | ("status", "update" | "patch", _) => Verdict::allow(""),
        ("", "get" | "list" | "watch", name) if name == node => Verdict::allow(""),
        ("", "get" | "list" | "watch", "") => {
            Verdict::no_opinion(format!("node '{node}' cannot read all nodes, only its own Node object"))
        }
        ("", "get" | "list" | "watch", name) => {
            Verdict::no_opinion(format!("node '{node}' cannot read '{name}', only its own Node object"))
        }
        _ => Verdict::no_opinion(""),
    }
}

fn in_namespace(pod: &Pod, namespace: &str) -> bool {
    pod.metadata.namespace.as_deref() == Some(namespace)
}

fn is_named(pod: &Pod, namespace: &str, name: &str) -> bool {
    in_namespace(pod, namespace) && pod.metadata.name.as_deref() == Some(name)
}

/// A node makes its mirror pods itself, so they must not give it anything.
fn is_mirror(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(MIRROR_ANNOTATION))
}

fn spec_of(pod: &Pod) -> Option<&PodSpec> {
    if is_mirror(pod) { None } else { pod.spec.as_ref() }
}

/// `env` and `envFrom` of all containers.
fn environments(spec: &PodSpec) -> impl Iterator<Item = (&[EnvVar], &[EnvFromSource])> {
    let inits = spec.init_containers.as_deref().unwrap_or_default();
    let ephemeral = spec.ephemeral_containers.as_deref().unwrap_or_default();
    inits
        .iter()
        .chain(&spec.containers)
        .map(|c| (c.env.as_deref().unwrap_or_default(), c.env_from.as_deref().unwrap_or_default()))
        .chain(
            ephemeral
                .iter()
                .map(|c| (c.env.as_deref().unwrap_or_default(), c.env_from.as_deref().unwrap_or_default())),
        )
}

fn needs_secret(pod: &Pod, name: &str) -> bool {
    let Some(spec) = spec_of(pod) else { return false };
    let pulls = spec.image_pull_secrets.iter().flatten().any(|s| s.name == name);
    let in_env = environments(spec).any(|(env, from)| {
        let env = env.iter().filter_map(|e| e.value_from.as_ref()?.secret_key_ref.as_ref());
        let from = from.iter().filter_map(|e| e.secret_ref.as_ref());
        env.map(|r| &r.name).chain(from.map(|r| &r.name)).any(|n| n == name)
    });
    pulls || in_env || spec.volumes.iter().flatten().any(|volume| volume_secrets(volume, name))
}

fn volume_secrets(volume: &k8s_openapi::api::core::v1::Volume, name: &str) -> bool {
    let is = |reference: Option<&str>| reference == Some(name);
    is(volume.secret.as_ref().and_then(|s| s.secret_name.as_deref()))
        || is(volume.azure_file.as_ref().map(|s| s.secret_name.as_str()))
        || is(volume.cephfs.as_ref().and_then(|s| s.secret_ref.as_ref()).map(|r| r.name.as_str()))
        || is(volume.cinder.as_ref().and_then(|s| s.secret_ref.as_ref()).map(|r| r.name.as_str()))
        || is(volume.flex_volume.as_ref().and_then(|s| s.secret_ref.as_ref()).map(|r| r.name.as_str()))
        || is(volume.rbd.as_ref().and_then(|s| s.secret_ref.as_ref()).map(|r| r.name.as_str()))
        || is(volume.scale_io.as_ref().map(|s| s.secret_ref.name.as_str()))
        || is(volume.iscsi.as_ref().and_then(|s| s.secret_ref.as_ref()).map(|r| r.name.as_str()))
        || is(volume.storageos.as_ref().and_then(|s| s.secret_ref.as_ref()).map(|r| r.name.as_str()))
        || is(volume.csi.as_ref().and_then(|s| s.node_publish_secret_ref.as_ref()).map(|r| r.name.as_str()))
        || volume
            .projected
            .iter()
            .flat_map(|p| p.sources.iter().flatten())
            .any(|source| is(source.secret.as_ref().map(|s| s.name.as_str())))
}

fn needs_config_map(pod: &Pod, name: &str) -> bool {
    let Some(spec) = spec_of(pod) else { return false };
    let in_env = environments(spec).any(|(env, from)| {
        let env = env.iter().filter_map(|e| e.value_from.as_ref()?.config_map_key_ref.as_ref());
        let from = from.iter().filter_map(|e| e.config_map_ref.as_ref());
        env.map(|r| &r.name).chain(from.map(|r| &r.name)).any(|n| n == name)
    });
    let in_volumes = spec.volumes.iter().flatten().any(|volume| {
        volume.config_map.as_ref().is_some_and(|c| c.name == name)
            || volume
                .projected
                .iter()
                .flat_map(|p| p.sources.iter().flatten())
                .any(|source| source.config_map.as_ref().is_some_and(|c| c.name == name))
    });
    in_env || in_volumes
}

fn claims(pod: &Pod) -> impl Iterator<Item = String> {
    let pod_name = pod.metadata.name.clone().unwrap_or_default();
    let volumes = spec_of(pod).and_then(|s| s.volumes.as_ref()).into_iter().flatten();
    volumes.filter_map(move |volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(claim), _) => Some(claim.claim_name.clone()),
        (None, Some(_)) => Some(format!("{pod_name}-{}", volume.name)),
        (None, None) => None,
    })
}

fn resource_claims(pod: &Pod) -> impl Iterator<Item = &str> {
    let named = spec_of(pod).and_then(|s| s.resource_claims.as_ref()).into_iter().flatten();
    let generated =
        pod.status.as_ref().and_then(|s| s.resource_claim_statuses.as_ref()).into_iter().flatten();
    let generated = generated.filter(|_| !is_mirror(pod));
    named
        .filter_map(|c| c.resource_claim_name.as_deref())
        .chain(generated.filter_map(|c| c.resource_claim_name.as_deref()))
}

/// The secrets that a CSI volume names for the node.
fn volume_needs_secret(volume: &PersistentVolume, namespace: &str, name: &str) -> bool {
    let Some(csi) = volume.spec.as_ref().and_then(|s| s.csi.as_ref()) else { return false };
    [&csi.node_publish_secret_ref, &csi.node_stage_secret_ref, &csi.node_expand_secret_ref]
        .into_iter()
        .flatten()
        .any(|r| r.namespace.as_deref() == Some(namespace) && r.name.as_deref() == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selector::FieldSelector;
    use serde_json::json;

    fn pod(value: serde_json::Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    fn authorizer() -> NodeAuthorizer {
        let pods = Informer::detached();
        let authorizer = NodeAuthorizer::over(pods.clone(), None);
        pods.put(pod(json!({
            "metadata": {"name": "p", "namespace": "ns"},
            "spec": {"nodeName": "a", "serviceAccountName": "sa", "imagePullSecrets": [{"name": "pull"}],
                "containers": [{"name": "c", "envFrom": [{"configMapRef": {"name": "env"}}],
                    "env": [{"name": "E", "valueFrom": {"secretKeyRef": {"name": "key", "key": "k"}}}]}],
                "volumes": [{"name": "v", "secret": {"secretName": "volume"}},
                    {"name": "e", "ephemeral": {}},
                    {"name": "p", "projected": {"sources": [{"configMap": {"name": "projected"}}]}}]},
        })));
        pods.put(pod(json!({
            "metadata": {"name": "mirror", "namespace": "ns", "annotations": {MIRROR_ANNOTATION: "x"}},
            "spec": {"nodeName": "a", "containers": [], "volumes": [{"name": "v", "secret": {"secretName": "stolen"}}]},
        })));
        authorizer
    }

    fn ask(verb: &str, group: &str, resource: &str, namespace: &str, name: &str) -> Attributes {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Attributes {
            user: Identity::new("system:node:a", &["system:nodes"]),
            verb: verb.into(),
            api_group: group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            namespace: namespace.into(),
            name: name.into(),
            resource_request: true,
            ..Attributes::default()
        }
    }

    #[test]
    fn nodes_reach_what_their_pods_need() {
        let authorizer = authorizer();
        let lease = "coordination.k8s.io";
        let cases = [
            (ask("get", "", "secrets", "ns", "pull"), true),
            (ask("watch", "", "secrets", "ns", "key"), true),
            (ask("get", "", "secrets", "ns", "volume"), true),
            (ask("get", "", "secrets", "other", "volume"), false),
            (ask("get", "", "secrets", "ns", "stolen"), false),
            (ask("update", "", "secrets", "ns", "key"), false),
            (ask("list", "", "secrets", "ns", ""), false),
            (ask("get", "", "configmaps", "ns", "env"), true),
            (ask("get", "", "configmaps", "ns", "projected"), true),
            (ask("get", "", "configmaps", "ns", "key"), false),
            (ask("get", "", "persistentvolumeclaims", "ns", "p-e"), true),
            (ask("create", "", "serviceaccounts/token", "ns", "sa"), true),
            (ask("create", "", "serviceaccounts/token", "ns", "default"), false),
            (ask("get", "", "pods", "ns", "p"), true),
            (ask("list", "", "pods", "", ""), false),
            (ask("update", "", "pods/status", "ns", "p"), true),
            (ask("get", "", "nodes", "", "a"), true),
            (ask("get", "", "nodes", "", "b"), false),
            (ask("update", lease, "leases", "kube-node-lease", "a"), true),
            (ask("update", lease, "leases", "kube-node-lease", "b"), false),
            (ask("update", lease, "leases", "ns", "a"), false),
            (ask("list", "", "services", "", ""), true),
            (ask("create", "", "services", "ns", ""), false),
        ];
        for (attributes, want) in cases {
            assert_eq!(authorizer.authorize(&attributes).is_allowed(), want, "{attributes}");
        }
        let mut own = ask("list", "", "pods", "", "");
        own.field_selector = FieldSelector::parse("spec.nodeName=a").unwrap();
        assert!(authorizer.authorize(&own).is_allowed());
        own.user = Identity::new("system:node:b", &["system:nodes"]);
        assert!(!authorizer.authorize(&own).is_allowed());
        own.user = Identity::new("system:node:a", &[]);
        assert!(!authorizer.authorize(&own).is_allowed(), "the name alone makes no node");
    }
}
