//! ServiceAccount: pods run as one, and find its token where clients look for it.
//! Upstream counterpart: plugin/pkg/admission/serviceaccount.
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::ServiceAccount as Account;
use sampan_client::Informer;
use sampan_world::random;
use serde_json::{Value, json};

use crate::pod::{containers, is_mirror, items, references};
use crate::{Context, Operation, Plugin, Rejection, Request};

const DEFAULT: &str = "default";
const VOLUME_PREFIX: &str = "kube-api-access-";
const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const ENFORCE_ANNOTATION: &str = "kubernetes.io/enforce-mountable-secrets";
/// The lifetime that marks a token as one for old clients; see the TokenRequest endpoint.
const TOKEN_SECONDS: i64 = 3607;
/// The `default` account is made by a controller soon after its namespace: looked for this often, so long apart.
const DEFAULT_ATTEMPTS: usize = 20;
const DEFAULT_WAIT: Duration = Duration::from_millis(50);

struct ServiceAccount {
    context: Context,
    accounts: Informer<Account>,
}

pub fn new(context: &Context) -> Box<dyn Plugin> {
    Box::new(ServiceAccount { accounts: context.informers.of(), context: context.clone() })
}

#[async_trait]
impl Plugin for ServiceAccount {
    fn name(&self) -> &'static str {
        "ServiceAccount"
    }

    fn handles(&self, operation: Operation, resource: &str, subresource: &str) -> bool {
        resource == "pods"
            && matches!(
                (operation, subresource),
                (Operation::Create, "") | (Operation::Update, "ephemeralcontainers")
            )
    }

    async fn admit(
        &self,
        request: &Request<'_>,
        pod: &mut Value,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        if !request.group.is_empty() || request.operation != Operation::Create || is_mirror(pod) {
            return Ok(());
        }
        let spec = &mut pod["spec"];
        if spec["serviceAccountName"].as_str().unwrap_or_default().is_empty() {
            // clients that know only the old name
            let old =
                spec["serviceAccount"].as_str().filter(|s| !s.is_empty()).unwrap_or(DEFAULT).to_string();
            spec["serviceAccountName"] = json!(old);
        }
        let name = spec["serviceAccountName"].as_str().unwrap_or_default().to_string();
        spec["serviceAccount"] = json!(name);
        let account = self.account(request.namespace, &name).await?;
        let own = spec["automountServiceAccountToken"].as_bool();
        if own.or(account.automount_service_account_token).unwrap_or(true) {
            mount_token(spec);
        }
        if items(spec, "imagePullSecrets").next().is_none() {
            let secrets: Vec<Value> =
                account.image_pull_secrets.iter().flatten().map(|s| json!({"name": s.name})).collect();
            if !secrets.is_empty() {
                spec["imagePullSecrets"] = secrets.into();
            }
        }
        // what indexing made
        if let Some(spec) = spec.as_object_mut() {
            spec.retain(|_, value| !value.is_null());
        }
        Ok(())
    }

    async fn validate(
        &self,
        request: &Request<'_>,
        pod: Option<&Value>,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        let Some(pod) = pod.filter(|_| request.group.is_empty()) else { return Ok(()) };
        let name = pod["spec"]["serviceAccountName"].as_str().unwrap_or_default();
        if is_mirror(pod) && request.operation == Operation::Create {
            return validate_mirror(pod, name);
        }
        if name.is_empty() {
            let words =
                format!("no service account specified for pod {}/{}", request.namespace, request.name);
            return Err(Rejection::forbidden(words));
        }
        let account = self.account(request.namespace, name).await?;
        let annotations = account.metadata.annotations.as_ref();
        let enforced = annotations.and_then(|a| a.get(ENFORCE_ANNOTATION)).is_some_and(|v| is_true(v));
        match enforced {
            true => limit_references(&account, pod).map_err(Rejection::forbidden),
            false => Ok(()),
        }
    }
}

impl ServiceAccount {
    async fn account(&self, namespace: &str, name: &str) -> Result<Account, Rejection> {
        let attempts = if name == DEFAULT { DEFAULT_ATTEMPTS } else { 1 };
        for attempt in 0..attempts {
            if attempt > 0 {
                tokio::time::sleep(DEFAULT_WAIT).await;
            }
            if let Some(account) = self.accounts.get(namespace, name) {
                return Ok((*account).clone());
            }
            let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}");
            if let Some(account) = self.context.get(&path).await? {
                return serde_json::from_value(account).map_err(|e| Rejection::Internal(e.to_string()));
            }
        }
        Err(Rejection::forbidden(format!(
            "error looking up service account {namespace}/{name}: serviceaccount {name:?} not found"
        )))
    }
}

/// Go's strconv.ParseBool.
fn is_true(text: &str) -> bool {
    matches!(text, "1" | "t" | "T" | "true" | "TRUE" | "True")
}

fn validate_mirror(pod: &Value, account: &str) -> Result<(), Rejection> {
    if !account.is_empty() {
        return Err(Rejection::forbidden("a mirror pod may not reference service accounts"));
    }
    let found = references(pod);
    if found.contains(&"secrets") {
        return Err(Rejection::forbidden("a mirror pod may not reference secrets"));
    }
    if found.contains(&"serviceaccounts") {
        return Err(Rejection::forbidden("a mirror pod may not use ServiceAccountToken volume projections"));
    }
    Ok(())
}

/// Adds the volume with token, root certificate and namespace, and mounts it in all containers that mount nothing there.
fn mount_token(spec: &mut Value) {
    let present = items(spec, "volumes")
        .filter_map(|v| v["name"].as_str())
        .find(|name| name.starts_with(VOLUME_PREFIX))
        .map(str::to_string);
    let volume = present.clone().unwrap_or_else(|| format!("{VOLUME_PREFIX}{}", random::suffix(5)));
    let mount = json!({"name": volume, "readOnly": true, "mountPath": MOUNT_PATH});
    let mut mounted = false;
    for list in ["initContainers", "containers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            if items(container, "volumeMounts").any(|m| m["mountPath"] == MOUNT_PATH) {
                continue;
            }
            push(container, "volumeMounts", mount.clone());
            mounted = true;
        }
    }
    if mounted && present.is_none() {
        push(
            spec,
            "volumes",
            json!({"name": volume, "projected": {"defaultMode": 0o644, "sources": [
                {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [
                    {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}},
                ]}},
            ]}}),
        );
    }
}

fn push(object: &mut Value, list: &str, item: Value) {
    if !object[list].is_array() {
        object[list] = json!([]);
    }
    if let Some(list) = object[list].as_array_mut() {
        list.push(item);
    }
}

/// For accounts that list the secrets their pods may use.
fn limit_references(account: &Account, pod: &Value) -> Result<(), String> {
    let name = account.metadata.name.as_deref().unwrap_or_default();
    let allowed = |secret: &str| account.secrets.iter().flatten().any(|s| s.name.as_deref() == Some(secret));
    let tail = format!("is not allowed because service account {name} does not reference that secret");
    for volume in items(&pod["spec"], "volumes") {
        if let Some(secret) =
            volume.pointer("/secret/secretName").and_then(Value::as_str).filter(|s| !allowed(s))
        {
            return Err(format!("volume with secret.secretName=\"{secret}\" {tail}"));
        }
    }
    for container in containers(pod) {
        let container_name = container["name"].as_str().unwrap_or_default();
        for env in items(container, "env") {
            let secret = env.pointer("/valueFrom/secretKeyRef/name").and_then(Value::as_str);
            if let Some(secret) = secret.filter(|s| !allowed(s)) {
                let env = env["name"].as_str().unwrap_or_default();
                return Err(format!(
                    "container {container_name} with envVar {env} referencing secret.secretName=\"{secret}\" {tail}"
                ));
            }
        }
        for source in items(container, "envFrom") {
            let secret = source.pointer("/secretRef/name").and_then(Value::as_str);
            if let Some(secret) = secret.filter(|s| !allowed(s)) {
                return Err(format!(
                    "container {container_name} with envFrom referencing secret.secretName=\"{secret}\" {tail}"
                ));
            }
        }
    }
    for (i, reference) in items(&pod["spec"], "imagePullSecrets").enumerate() {
        let secret = reference["name"].as_str().unwrap_or_default();
        if !account.image_pull_secrets.iter().flatten().any(|s| s.name == secret) {
            return Err(format!(
                "imagePullSecrets[{i}].name=\"{secret}\" is not allowed because service account {name} does not \
                 reference that imagePullSecret"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::tests::{Cluster, request};

    #[tokio::test]
    async fn pods_get_an_account_and_its_token() {
        let cluster = Cluster::default();
        cluster.put(
            "/api/v1/namespaces/ns/serviceaccounts/default",
            json!({"metadata": {"name": "default", "namespace": "ns"}, "imagePullSecrets": [{"name": "pull"}]}),
        );
        let plugin = new(&cluster.context());
        let create = request(Operation::Create, "pods", "ns", "p");
        let mut pod = json!({"spec": {"containers": [
            {"name": "a"},
            {"name": "b", "volumeMounts": [{"name": "own", "mountPath": MOUNT_PATH}]},
        ]}});
        plugin.admit(&create, &mut pod, None).await.unwrap();
        let spec = &pod["spec"];
        assert_eq!(
            (&spec["serviceAccountName"], &spec["serviceAccount"]),
            (&json!("default"), &json!("default"))
        );
        assert_eq!(spec["imagePullSecrets"], json!([{"name": "pull"}]));
        let volume = spec["volumes"][0]["name"].as_str().unwrap();
        assert!(volume.starts_with(VOLUME_PREFIX));
        assert_eq!(spec["volumes"][0]["projected"]["sources"].as_array().map(Vec::len), Some(3));
        assert_eq!(spec["containers"][0]["volumeMounts"][0]["name"], volume);
        assert_eq!(spec["containers"][1]["volumeMounts"].as_array().map(Vec::len), Some(1));
        assert_eq!(plugin.validate(&create, Some(&pod), None).await, Ok(()));

        let mut off = json!({"spec": {"automountServiceAccountToken": false, "containers": [{"name": "a"}]}});
        plugin.admit(&create, &mut off, None).await.unwrap();
        assert_eq!(off["spec"].get("volumes"), None);

        let mut missing = json!({"spec": {"serviceAccountName": "foo", "containers": []}});
        let refused = plugin.admit(&create, &mut missing, None).await.unwrap_err();
        assert_eq!(
            refused.message(&create),
            r#"pods "p" is forbidden: error looking up service account ns/foo: serviceaccount "foo" not found"#
        );
        let mirror = json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": "x"}},
            "spec": {"serviceAccountName": "default"}});
        assert!(plugin.validate(&create, Some(&mirror), None).await.is_err());
    }
}
