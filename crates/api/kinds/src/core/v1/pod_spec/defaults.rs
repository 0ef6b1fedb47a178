//! Defaults of a PodSpec, alone or in a template.
//!
//! Upstream counterpart: pkg/apis/core/v1/defaults.go and zz_generated.defaults.go, and of conversion.go the
//! mirroring of serviceAccount into serviceAccountName. What stays true: running them twice changes nothing.
use serde_json::{Value, json};

use crate::object::{child, default_absent, default_zero, is_unset, items_mut, text};
use crate::quantity::round_up_to_milli;

/// Sets what the client left out of a PodSpec.
pub fn defaults(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    default_zero(spec, "dnsPolicy", "ClusterFirst");
    default_zero(spec, "restartPolicy", "Always");
    child(spec, "securityContext");
    default_absent(spec, "terminationGracePeriodSeconds", 30);
    default_zero(spec, "schedulerName", "default-scheduler");
    mirror_service_account(spec);
    items_mut(spec, "/volumes").iter_mut().for_each(volume_defaults);
    for list in ["/initContainers", "/containers", "/ephemeralContainers"] {
        items_mut(spec, list).iter_mut().for_each(container_defaults);
    }
    round_up_to_milli(spec.get_mut("overhead"));
    resources_defaults(spec);
}

/// `serviceAccount` is the older name of `serviceAccountName`; both are always shown.
fn mirror_service_account(spec: &mut Value) {
    let name = [text(spec, "/serviceAccountName"), text(spec, "/serviceAccount")]
        .into_iter()
        .find(|name| !name.is_empty())
        .map(str::to_string);
    if let Some(name) = name {
        spec["serviceAccountName"] = name.clone().into();
        spec["serviceAccount"] = name.into();
    }
}

fn resources_defaults(holder: &mut Value) {
    if let Some(resources) = holder.get_mut("resources") {
        round_up_to_milli(resources.get_mut("limits"));
        round_up_to_milli(resources.get_mut("requests"));
    }
}

fn container_defaults(container: &mut Value) {
    let policy = pull_policy(text(container, "/image"));
    default_zero(container, "imagePullPolicy", policy);
    default_zero(container, "terminationMessagePath", "/dev/termination-log");
    default_zero(container, "terminationMessagePolicy", "File");
    for port in items_mut(container, "/ports") {
        default_zero(port, "protocol", "TCP");
    }
    for variable in items_mut(container, "/env") {
        field_ref_defaults(variable.pointer_mut("/valueFrom/fieldRef"));
        if let Some(key) = variable.pointer_mut("/valueFrom/fileKeyRef") {
            default_absent(key, "optional", false);
        }
    }
    resources_defaults(container);
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(probe) {
            probe_defaults(probe);
        }
    }
    for hook in ["/lifecycle/postStart/httpGet", "/lifecycle/preStop/httpGet"] {
        http_get_defaults(container.pointer_mut(hook));
    }
}

/// What an image is pulled by when nothing says so: always where its tag is `latest`, said or unsaid.
pub fn pull_policy(image: &str) -> &'static str {
    if tag_is_latest(image) { "Always" } else { "IfNotPresent" }
}

fn tag_is_latest(image: &str) -> bool {
    let (name, digest) = match image.split_once('@') {
        Some((name, _)) => (name, true),
        None => (image, false),
    };
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match name[last..].find(':') {
        Some(colon) => (&name[..last + colon], Some(&name[last + colon + 1..])),
        None => (name, None),
    };
    // A name that is no image reference has no tag at all upstream; validation judges it later.
    is_repository(name) && tag.map_or(!digest, |tag| tag == "latest")
}

fn is_repository(name: &str) -> bool {
    let path = match name.split_once('/') {
        Some((domain, path))
            if domain.contains(['.', ':']) || domain == "localhost" || domain.to_lowercase() != domain =>
        {
            path
        }
        _ => name,
    };
    path.split('/').all(|part| {
        let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        ends(part.chars().next())
            && ends(part.chars().next_back())
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
    })
}

fn probe_defaults(probe: &mut Value) {
    default_zero(probe, "timeoutSeconds", 1);
    default_zero(probe, "periodSeconds", 10);
    default_zero(probe, "successThreshold", 1);
    default_zero(probe, "failureThreshold", 3);
    http_get_defaults(probe.get_mut("httpGet"));
    if let Some(grpc) = probe.get_mut("grpc") {
        default_absent(grpc, "service", "");
    }
}

fn http_get_defaults(action: Option<&mut Value>) {
    if let Some(action) = action {
        default_zero(action, "path", "/");
        default_zero(action, "scheme", "HTTP");
    }
}

fn field_ref_defaults(reference: Option<&mut Value>) {
    if let Some(reference) = reference {
        default_zero(reference, "apiVersion", "v1");
    }
}

fn volume_defaults(volume: &mut Value) {
    let Some(fields) = volume.as_object() else { return };
    if fields.iter().all(|(key, value)| key == "name" || value.is_null()) {
        volume["emptyDir"] = json!({});
    }
    if let Some(image) = volume.get_mut("image") {
        let policy = pull_policy(text(image, "/reference"));
        default_zero(image, "pullPolicy", policy);
    }
    for (source, mode) in
        [("secret", 0o644), ("configMap", 0o644), ("downwardAPI", 0o644), ("projected", 0o644)]
    {
        if let Some(source) = volume.get_mut(source) {
            default_absent(source, "defaultMode", mode);
        }
    }
    for file in items_mut(volume, "/downwardAPI/items") {
        field_ref_defaults(file.get_mut("fieldRef"));
    }
    for source in items_mut(volume, "/projected/sources") {
        for file in items_mut(source, "/downwardAPI/items") {
            field_ref_defaults(file.get_mut("fieldRef"));
        }
        if let Some(token) = source.get_mut("serviceAccountToken") {
            default_absent(token, "expirationSeconds", 3600);
        }
    }
    if let Some(claim) = volume.pointer_mut("/ephemeral/volumeClaimTemplate/spec") {
        claim_spec_defaults(claim);
    }
    volume_source_defaults(volume);
}

/// Defaults of a PersistentVolumeClaim's spec, wherever it stands.
pub fn claim_spec_defaults(spec: &mut Value) {
    default_absent(spec, "volumeMode", "Filesystem");
    resources_defaults(spec);
}

/// Defaults of sources that Pods and PersistentVolumes have in common.
pub fn volume_source_defaults(source: &mut Value) {
    let zero: [(&str, &[(&str, &str)]); 3] = [
        ("iscsi", &[("iscsiInterface", "default")]),
        ("rbd", &[("pool", "rbd"), ("user", "admin"), ("keyring", "/etc/ceph/keyring")]),
        ("scaleIO", &[("storageMode", "ThinProvisioned"), ("fsType", "xfs")]),
    ];
    for (name, fields) in zero {
        if let Some(source) = source.get_mut(name) {
            fields.iter().for_each(|(key, value)| default_zero(source, key, *value));
        }
    }
    if let Some(host_path) = source.get_mut("hostPath") {
        default_absent(host_path, "type", "");
    }
    if let Some(disk) = source.get_mut("azureDisk") {
        default_absent(disk, "cachingMode", "ReadWrite");
        default_absent(disk, "fsType", "ext4");
        default_absent(disk, "readOnly", false);
        default_absent(disk, "kind", "Shared");
    }
}

/// Upstream's SetDefaults_Pod: what only a Pod gets, not a template. Run before [`defaults`].
pub fn pod_only_defaults(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    for list in ["/containers", "/initContainers"] {
        for container in items_mut(spec, list) {
            requests_from_limits(container);
        }
    }
    pod_level_defaults(spec);
    default_absent(spec, "enableServiceLinks", true);
    if !is_unset(spec.get("hostNetwork")) {
        for list in ["/containers", "/initContainers"] {
            for port in items_mut(spec, list).iter_mut().flat_map(|c| items_mut(c, "/ports")) {
                let container_port = port.get("containerPort").cloned().unwrap_or_default();
                default_zero(port, "hostPort", container_port);
            }
        }
    }
}

fn requests_from_limits(container: &mut Value) {
    let Some(limits) = container.pointer("/resources/limits").and_then(Value::as_object).cloned() else {
        return;
    };
    let requests = child(&mut container["resources"], "requests");
    for (name, limit) in limits {
        default_absent(requests, &name, limit);
    }
}

/// Upstream's defaultHugePagePodLimits and defaultPodRequests (PodLevelResources).
fn pod_level_defaults(spec: &mut Value) {
    use super::requests::{
        aggregate_container_limits, aggregate_container_requests, is_supported_pod_level_resource,
    };
    let set = |pointer: &str, spec: &Value| crate::object::count(spec, pointer) > 0;
    if !set("/resources/limits", spec) && !set("/resources/requests", spec) {
        return;
    }
    let Ok(typed) = crate::object::read(Some(spec), &crate::field::Path::new("spec")) else { return };
    let written = |amount| crate::quantity::canonical(amount, crate::quantity::Format::BinarySi);
    for (name, amount) in aggregate_container_limits(&typed) {
        let requested = spec.pointer("/resources/requests").is_some_and(|r| r.get(&name).is_some());
        if name.starts_with("hugepages-") && !requested {
            default_absent(child(&mut spec["resources"], "limits"), &name, written(amount));
        }
    }
    if !set("/resources/limits", spec) {
        return;
    }
    let limits = spec["resources"]["limits"].as_object().cloned().unwrap_or_default();
    let mut requests = spec.pointer("/resources/requests").cloned().unwrap_or_else(|| json!({}));
    for (name, amount) in aggregate_container_requests(&typed) {
        if name == "cpu" || name == "memory" {
            let format = match name.as_str() {
                "cpu" => crate::quantity::Format::DecimalSi,
                _ => crate::quantity::Format::BinarySi,
            };
            default_absent(&mut requests, &name, crate::quantity::canonical(amount, format));
        }
    }
    for (name, limit) in limits {
        if is_supported_pod_level_resource(&name) {
            default_absent(&mut requests, &name, limit);
        }
    }
    if crate::object::count(&requests, "") > 0 {
        spec["resources"]["requests"] = requests;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_spec_gets_upstreams_defaults() {
        let mut spec = json!({
            "serviceAccount": "sa",
            "containers": [{"name": "a", "image": "nginx", "ports": [{"containerPort": 80}],
                "livenessProbe": {"httpGet": {"port": 80}},
                "env": [{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}],
            "volumes": [{"name": "v"}, {"name": "s", "secret": {"secretName": "x"}},
                {"name": "h", "hostPath": {"path": "/"}},
                {"name": "p", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}],
        });
        defaults(&mut spec);
        let want = json!({
            "serviceAccount": "sa", "serviceAccountName": "sa",
            "dnsPolicy": "ClusterFirst", "restartPolicy": "Always", "securityContext": {},
            "terminationGracePeriodSeconds": 30, "schedulerName": "default-scheduler",
            "containers": [{"name": "a", "image": "nginx", "imagePullPolicy": "Always",
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "livenessProbe": {"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1,
                    "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3},
                "env": [{"name": "N", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}}]}],
            "volumes": [{"name": "v", "emptyDir": {}}, {"name": "s", "secret": {"secretName": "x", "defaultMode": 420}},
                {"name": "h", "hostPath": {"path": "/", "type": ""}},
                {"name": "p", "projected": {"defaultMode": 420,
                    "sources": [{"serviceAccountToken": {"path": "t", "expirationSeconds": 3600}}]}}],
        });
        assert_eq!(spec, want);
        defaults(&mut spec);
        assert_eq!(spec, want);
    }

    #[test]
    fn pull_policies() {
        for (image, want) in [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("nginx:1", "IfNotPresent"),
            ("r.io:5000/a/b", "Always"),
            ("r.io:5000/a/b:2", "IfNotPresent"),
            ("a@sha256:00", "IfNotPresent"),
            ("", "IfNotPresent"),
            ("UPPER/x y", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), want, "{image}");
        }
    }

    #[test]
    fn a_pods_requests_follow_its_limits() {
        let mut spec = json!({"hostNetwork": true, "containers": [{"name": "a", "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}}]});
        pod_only_defaults(&mut spec);
        assert_eq!(spec["containers"][0]["resources"]["requests"], json!({"cpu": "500m", "memory": "1Gi"}));
        assert_eq!(spec["containers"][0]["ports"][0]["hostPort"], 80);
        assert_eq!(spec["enableServiceLinks"], true);
        let mut spec = json!({"resources": {"limits": {"cpu": "2", "memory": "1Gi"}},
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "500m"}}}]});
        pod_only_defaults(&mut spec);
        assert_eq!(spec["resources"]["requests"], json!({"cpu": "500m", "memory": "1Gi"}));
    }
}
