//! Looking into pods as they come, before anything has read them into a struct.
use serde_json::Value;

pub const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

pub fn is_mirror(pod: &Value) -> bool {
    pod["metadata"]["annotations"].get(MIRROR_ANNOTATION).is_some()
}

/// The items of a list that may not be there.
pub fn items<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> {
    value.get(field).and_then(Value::as_array).into_iter().flatten()
}

/// All containers: init, ordinary, ephemeral.
pub fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers", "ephemeralContainers"]
        .into_iter()
        .flat_map(|list| items(&pod["spec"], list))
}

/// What a pod refers to besides its service account: "secrets", "configmaps", "persistentvolumeclaims", ….
pub fn references(pod: &Value) -> Vec<&'static str> {
    let mut found = Vec::new();
    if items(&pod["spec"], "imagePullSecrets").next().is_some() {
        found.push("secrets");
    }
    for container in containers(pod) {
        for (list, secret, config_map) in [
            ("env", "/valueFrom/secretKeyRef", "/valueFrom/configMapKeyRef"),
            ("envFrom", "/secretRef", "/configMapRef"),
        ] {
            for source in items(container, list) {
                if source.pointer(secret).is_some_and(|r| !r.is_null()) {
                    found.push("secrets");
                }
                if source.pointer(config_map).is_some_and(|r| !r.is_null()) {
                    found.push("configmaps");
                }
            }
        }
    }
    for volume in items(&pod["spec"], "volumes") {
        found.extend(volume_references(volume));
        for source in items(&volume["projected"], "sources") {
            found.extend(volume_references(source));
            if source.get("serviceAccountToken").is_some() {
                found.push("serviceaccounts");
            }
            if source.get("clusterTrustBundle").is_some() {
                found.push("clustertrustbundles");
            }
        }
    }
    if items(&pod["spec"], "resourceClaims").next().is_some() {
        found.push("resourceclaims");
    }
    found
}

/// What a volume, or a source of a projected one, refers to.
fn volume_references(volume: &Value) -> Vec<&'static str> {
    let mut found = Vec::new();
    let fields = volume.as_object().into_iter().flatten().filter(|(_, source)| !source.is_null());
    for (field, source) in fields {
        match field.as_str() {
            "secret" => found.push("secrets"),
            "configMap" => found.push("configmaps"),
            "persistentVolumeClaim" | "ephemeral" => found.push("persistentvolumeclaims"),
            "azureFile" => found.push("secrets"),
            _ if source.get("secretRef").is_some() || source.get("nodePublishSecretRef").is_some() => {
                found.push("secrets");
            }
            _ => {}
        }
    }
    found
}
