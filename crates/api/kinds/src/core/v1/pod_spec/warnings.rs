//! Warnings about pods and templates that work, but hardly as meant.
//!
//! Upstream counterpart: pkg/api/pod/warnings.go. Left out: overlapping paths within a volume.
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, NodeSelectorTerm, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::visit_containers;
use crate::field::Path;
use crate::ip::ip_warnings;
use crate::object::or_empty;
use crate::quantity::{amount, text};

const DEPRECATED_LABELS: &[(&str, &str)] = &[
    ("app.kubernetes.io/created-by", "deprecated since v1.9"),
    ("beta.kubernetes.io/arch", "deprecated since v1.14; use \"kubernetes.io/arch\" instead"),
    (
        "beta.kubernetes.io/instance-type",
        "deprecated since v1.17; use \"node.kubernetes.io/instance-type\" instead",
    ),
    ("beta.kubernetes.io/os", "deprecated since v1.14; use \"kubernetes.io/os\" instead"),
    (
        "failure-domain.beta.kubernetes.io/region",
        "deprecated since v1.17; use \"topology.kubernetes.io/region\" instead",
    ),
    (
        "failure-domain.beta.kubernetes.io/zone",
        "deprecated since v1.17; use \"topology.kubernetes.io/zone\" instead",
    ),
    ("node-role.kubernetes.io/master", "use \"node-role.kubernetes.io/control-plane\" instead"),
    (
        "scheduler.alpha.kubernetes.io/preferAvoidPods",
        "deprecated since v1.22; use Taints and Tolerations instead",
    ),
];
const DEPRECATED_ANNOTATIONS: &[(&str, &str)] = &[
    (
        "scheduler.alpha.kubernetes.io/critical-pod",
        "non-functional in v1.16+; use the \"priorityClassName\" field instead",
    ),
    ("security.alpha.kubernetes.io/sysctls", "non-functional in v1.11+; use the \"sysctls\" field instead"),
    (
        "security.alpha.kubernetes.io/unsafe-sysctls",
        "non-functional in v1.11+; use the \"sysctls\" field instead",
    ),
];

fn deprecated(label: &str) -> Option<&'static str> {
    DEPRECATED_LABELS.iter().find(|(key, _)| *key == label).map(|(_, message)| *message)
}

/// All warnings; `path` is the template's place, empty for a Pod.
pub fn warnings(spec: &PodSpec, meta: &ObjectMeta, path: &Path) -> Vec<String> {
    let mut out = Vec::new();
    let at = path.child("spec");
    for key in spec.node_selector.iter().flatten().map(|(key, _)| key) {
        out.extend(deprecated(key).map(|m| format!("{}: {m}", at.child("nodeSelector").key(key))));
    }
    node_affinity(spec, &at, &mut out);
    for (i, constraint) in spec.topology_spread_constraints.iter().flatten().enumerate() {
        let at = at.child("topologySpreadConstraints").index(i);
        if let Some(message) = deprecated(&constraint.topology_key) {
            out.push(format!("{}: {} is {message}", at.child("topologyKey"), constraint.topology_key));
        }
        null_selector(constraint.label_selector.is_none(), &at, &mut out);
    }
    let annotations = path.child("metadata").child("annotations");
    for (key, message) in DEPRECATED_ANNOTATIONS {
        if meta.annotations.as_ref().is_some_and(|a| a.contains_key(*key)) {
            out.push(format!("{}: {message}", annotations.key(key)));
        }
    }
    volumes(spec, &at, &mut out);
    let mut seen = BTreeSet::new();
    for (i, alias) in spec.host_aliases.iter().flatten().enumerate() {
        if !seen.insert(&alias.ip) {
            out.push(format!(
                "{}: duplicate ip \"{}\"",
                at.child("hostAliases").index(i).child("ip"),
                alias.ip
            ));
        }
    }
    let mut seen = BTreeSet::new();
    for (i, secret) in spec.image_pull_secrets.iter().flatten().enumerate() {
        let at = at.child("imagePullSecrets").index(i).child("name");
        if !seen.insert(&secret.name) {
            out.push(format!("{at}: duplicate name \"{}\"", secret.name));
        }
        if secret.name.is_empty() {
            out.push(format!("{at}: invalid empty name \"\""));
        }
    }
    visit_containers(spec, &at, |container, at| container_warnings(container, at, &mut out));
    ports(spec, &at, &mut out);
    if spec.termination_grace_period_seconds.is_some_and(|s| s < 0) {
        let at = at.child("terminationGracePeriodSeconds");
        out.push(format!("{at}: must be >= 0; negative values are invalid and will be treated as 1"));
    }
    pod_affinity(spec, &at, &mut out);
    let nameservers = spec.dns_config.as_ref().and_then(|c| c.nameservers.as_deref()).unwrap_or_default();
    for (i, nameserver) in nameservers.iter().enumerate() {
        out.extend(ip_warnings(&at.child("dnsConfig").child("nameservers").index(i), nameserver));
    }
    for (i, alias) in spec.host_aliases.iter().flatten().enumerate() {
        out.extend(ip_warnings(&at.child("hostAliases").index(i).child("ip"), &alias.ip));
    }
    out
}

fn null_selector(missing: bool, path: &Path, out: &mut Vec<String>) {
    if missing {
        out.push(format!("{}: a null labelSelector results in matching no pod", path.child("labelSelector")));
    }
}

fn node_affinity(spec: &PodSpec, path: &Path, out: &mut Vec<String>) {
    let Some(node) = spec.affinity.as_ref().and_then(|a| a.node_affinity.as_ref()) else { return };
    let at = path.child("affinity").child("nodeAffinity");
    let mut term = |term: &NodeSelectorTerm, at: Path| {
        for (i, expression) in term.match_expressions.iter().flatten().enumerate() {
            if let Some(message) = deprecated(&expression.key) {
                let at = at.child("matchExpressions").index(i).child("key");
                out.push(format!("{at}: {} is {message}", expression.key));
            }
        }
    };
    if let Some(selector) = &node.required_during_scheduling_ignored_during_execution {
        let at = at.child("requiredDuringSchedulingIgnoredDuringExecution").child("nodeSelectorTerms");
        selector.node_selector_terms.iter().enumerate().for_each(|(i, t)| term(t, at.index(i)));
    }
    let at = at.child("preferredDuringSchedulingIgnoredDuringExecution");
    let preferred = node.preferred_during_scheduling_ignored_during_execution.iter().flatten();
    preferred.enumerate().for_each(|(i, t)| term(&t.preference, at.index(i).child("preference")));
}

fn pod_affinity(spec: &PodSpec, path: &Path, out: &mut Vec<String>) {
    let Some(affinity) = &spec.affinity else { return };
    let both = [
        (
            "podAffinity",
            affinity.pod_affinity.as_ref().map(|a| {
                (
                    &a.required_during_scheduling_ignored_during_execution,
                    &a.preferred_during_scheduling_ignored_during_execution,
                )
            }),
        ),
        (
            "podAntiAffinity",
            affinity.pod_anti_affinity.as_ref().map(|a| {
                (
                    &a.required_during_scheduling_ignored_during_execution,
                    &a.preferred_during_scheduling_ignored_during_execution,
                )
            }),
        ),
    ];
    for (key, terms) in both {
        let Some((required, preferred)) = terms else { continue };
        let at = path.child("affinity").child(key);
        for (i, term) in required.iter().flatten().enumerate() {
            let at = at.child("requiredDuringSchedulingIgnoredDuringExecution").index(i);
            null_selector(term.label_selector.is_none(), &at, out);
        }
        for (i, term) in preferred.iter().flatten().enumerate() {
            let at =
                at.child("preferredDuringSchedulingIgnoredDuringExecution").index(i).child("podAffinityTerm");
            null_selector(term.pod_affinity_term.label_selector.is_none(), &at, out);
        }
    }
}

fn volumes(spec: &PodSpec, path: &Path, out: &mut Vec<String>) {
    for (i, v) in spec.volumes.iter().flatten().enumerate() {
        let deprecated = [
            (
                "photonPersistentDisk",
                v.photon_persistent_disk.is_some(),
                "deprecated in v1.11, non-functional in v1.16+",
            ),
            ("gitRepo", v.git_repo.is_some(), "deprecated in v1.11, and disabled by default in v1.33+"),
            ("scaleIO", v.scale_io.is_some(), "deprecated in v1.16, non-functional in v1.22+"),
            ("flocker", v.flocker.is_some(), "deprecated in v1.22, non-functional in v1.25+"),
            ("storageOS", v.storageos.is_some(), "deprecated in v1.22, non-functional in v1.25+"),
            ("quobyte", v.quobyte.is_some(), "deprecated in v1.22, non-functional in v1.25+"),
            ("glusterfs", v.glusterfs.is_some(), "deprecated in v1.25, non-functional in v1.26+"),
            ("cephfs", v.cephfs.is_some(), "deprecated in v1.28, non-functional in v1.31+"),
            ("rbd", v.rbd.is_some(), "deprecated in v1.28, non-functional in v1.31+"),
        ];
        for (key, _, message) in deprecated.iter().filter(|(_, set, _)| *set) {
            out.push(format!("{}: {message}", path.child("volumes").index(i).child(key)));
        }
    }
}

fn container_warnings(container: &Container, path: &Path, out: &mut Vec<String>) {
    for (list, name) in [
        ("limits", "memory"),
        ("requests", "memory"),
        ("limits", "ephemeral-storage"),
        ("requests", "ephemeral-storage"),
    ] {
        let resources = container.resources.as_ref();
        let list_of =
            resources.and_then(|r| if list == "limits" { r.limits.as_ref() } else { r.requests.as_ref() });
        if let Some(value) = list_of.and_then(|l| l.get(name)).filter(|v| !amount(v).is_whole()) {
            let at = path.child("resources").child(list).key(name);
            out.push(format!(
                "{at}: fractional byte value \"{}\" is invalid, must be an integer",
                text(value)
            ));
        }
    }
    let mut seen = BTreeSet::new();
    for (i, variable) in container.env.iter().flatten().enumerate() {
        if seen.insert(variable.name.as_str()) {
            continue;
        }
        let reference = format!("$({})", variable.name);
        let value = or_empty(&variable.value);
        if variable.value_from.is_some() || value == reference || !value.contains(&reference) {
            out.push(format!(
                "{}: hides previous definition of \"{}\", which may be dropped when using apply",
                path.child("env").index(i),
                variable.name
            ));
        }
    }
}

fn ports(spec: &PodSpec, path: &Path, out: &mut Vec<String>) {
    type Seen = BTreeMap<String, Vec<(Path, String, i32)>>;
    let (mut seen, mut named) = (Seen::new(), BTreeMap::<String, Path>::new());
    let mut by_name = Vec::new();
    visit_containers(spec, path, |container, at| {
        for (i, port) in container.ports.iter().flatten().enumerate() {
            let here = at.child("ports").index(i);
            let (host_ip, host_port) = (or_empty(&port.host_ip), port.host_port.unwrap_or_default());
            if !host_ip.is_empty() && host_port == 0 {
                out.push(format!("{here}: hostIP set without hostPort"));
            }
            let others =
                seen.entry(format!("{}/{}", port.container_port, or_empty(&port.protocol))).or_default();
            for (other, other_ip, other_port) in others.iter() {
                let what = if host_ip == other_ip && host_port == *other_port {
                    "duplicate"
                } else if host_port == 0 || *other_port == 0 {
                    "overlapping"
                } else if host_port == *other_port && host_ip.is_empty() != other_ip.is_empty() {
                    "dangerously ambiguous"
                } else {
                    continue;
                };
                out.push(format!("{here}: {what} port definition with {other}"));
            }
            others.push((here.clone(), host_ip.to_string(), host_port));
            let name = or_empty(&port.name);
            if !name.is_empty() {
                match named.get(name) {
                    Some(other) => by_name.push(format!(
                        "{here}: duplicate port name \"{name}\" with {other}, services and probes that select ports by \
                         name will use {other}"
                    )),
                    None => drop(named.insert(name.to_string(), here)),
                }
            }
        }
    });
    out.extend(by_name);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_main_ones() {
        let spec: PodSpec = serde_json::from_value(json!({
            "nodeSelector": {"beta.kubernetes.io/os": "linux"},
            "containers": [{"name": "a", "env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}],
                "ports": [{"containerPort": 80, "protocol": "TCP"}, {"containerPort": 80, "protocol": "TCP"}]}],
        }))
        .unwrap();
        assert_eq!(
            warnings(&spec, &ObjectMeta::default(), &Path::new("")),
            [
                "spec.nodeSelector[beta.kubernetes.io/os]: deprecated since v1.14; use \"kubernetes.io/os\" instead",
                "spec.containers[0].env[1]: hides previous definition of \"A\", which may be dropped when using apply",
                "spec.containers[0].ports[1]: duplicate port definition with spec.containers[0].ports[0]",
            ]
        );
    }
}
