//! The default roles and bindings, and keeping them.
//!
//! Upstream counterparts: plugin/pkg/auth/authorizer/rbac/bootstrappolicy, pkg/registry/rbac/rest/storage_rbac.go and
//! component-helpers auth/rbac/reconciliation. What stays true: reconciliation only adds (rules, subjects, labels) and
//! leaves alone what is annotated with autoupdate "false". Deliberately different: aggregated roles are created with
//! their rules at once, and nothing is kept in memory after the start.
use std::collections::HashMap;

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use kube::Client;
use serde_json::{Map, Value, json};

use super::{aggregation, escalation};

const POLICY: &str = include_str!("bootstrap_policy.txt");
const GROUP: &str = "rbac.authorization.k8s.io";
const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";
const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];
/// Writes under way at once: enough that the store commits many of them together.
const CONCURRENT_WRITES: usize = 48;
const ATTEMPTS: usize = 3;

/// The rules of the node authorizer: those of the cluster role system:node.
pub fn node_rules() -> Vec<PolicyRule> {
    let role =
        objects().into_iter().find(|o| o["kind"] == "ClusterRole" && o["metadata"]["name"] == "system:node");
    role.and_then(|mut role| serde_json::from_value(role["rules"].take()).ok()).unwrap_or_default()
}

/// All default objects.
pub fn objects() -> Vec<Value> {
    let mut objects: Vec<Value> = Vec::new();
    for line in POLICY.lines().filter(|l| !l.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["clusterrole", name, labels @ ..] => {
                let mut role = object("ClusterRole", "", name);
                for label in labels {
                    role["metadata"]["labels"][*label] = json!("true");
                }
                role["rules"] = json!([]);
                objects.push(role);
            }
            ["role", namespace, name] => {
                let mut role = object("Role", namespace, name);
                role["rules"] = json!([]);
                objects.push(role);
            }
            ["clusterrolebinding", name, role, subjects @ ..] => {
                objects.push(binding("ClusterRole", "", name, role, subjects));
            }
            ["rolebinding", namespace, name, role, subjects @ ..] => {
                objects.push(binding("Role", namespace, name, role, subjects));
            }
            words => {
                if let Some(role) = objects.last_mut() {
                    add_rule(role, words);
                }
            }
        }
    }
    objects
}

fn object(kind: &str, namespace: &str, name: &str) -> Value {
    let mut object = json!({
        "apiVersion": format!("{GROUP}/v1"),
        "kind": kind,
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
            "annotations": {AUTOUPDATE: "true"},
        },
    });
    if !namespace.is_empty() {
        object["metadata"]["namespace"] = json!(namespace);
    }
    object
}

fn add_rule(role: &mut Value, words: &[&str]) {
    let list = |text: &str| -> Value {
        text.split(',').map(|one| if one == "core" { "" } else { one }).collect::<Vec<_>>().into()
    };
    let rule = match words {
        ["aggregate", label] => {
            let selectors = &mut role["aggregationRule"]["clusterRoleSelectors"];
            if !selectors.is_array() {
                *selectors = json!([]);
            }
            if let Some(selectors) = selectors.as_array_mut() {
                selectors.push(json!({"matchLabels": {*label: "true"}}));
            }
            return;
        }
        ["url", verbs, paths] => json!({"verbs": list(verbs), "nonResourceURLs": list(paths)}),
        [verbs, groups, resources] => {
            json!({"verbs": list(verbs), "apiGroups": list(groups), "resources": list(resources)})
        }
        [verbs, groups, resources, names] => json!({
            "verbs": list(verbs), "apiGroups": list(groups), "resources": list(resources), "resourceNames": list(names),
        }),
        _ => return,
    };
    if let Some(rules) = role["rules"].as_array_mut() {
        rules.push(rule);
    }
}

fn binding(role_kind: &str, namespace: &str, name: &str, role: &str, subjects: &[&str]) -> Value {
    let kind = if namespace.is_empty() { "ClusterRoleBinding" } else { "RoleBinding" };
    let mut binding = object(kind, namespace, name);
    binding["roleRef"] = json!({"apiGroup": GROUP, "kind": role_kind, "name": role});
    let subjects: Vec<Value> = subjects
        .iter()
        .filter_map(|subject| match subject.split_once(':')? {
            ("user", name) => Some(json!({"apiGroup": GROUP, "kind": "User", "name": name})),
            ("group", name) => Some(json!({"apiGroup": GROUP, "kind": "Group", "name": name})),
            (_, account) => {
                let (namespace, name) = account.split_once('/')?;
                Some(json!({"kind": "ServiceAccount", "name": name, "namespace": namespace}))
            }
        })
        .collect();
    if !subjects.is_empty() {
        binding["subjects"] = subjects.into();
    }
    binding
}

/// Creates the system's namespaces and what is missing of the default policy, and adds what is missing in parts.
/// Reads four lists and writes nothing when there is nothing to do.
pub async fn ensure(client: &Client) -> Result<(), kube::Error> {
    let namespaces = list(client, "/api/v1/namespaces").await?;
    stream::iter(
        NAMESPACES.iter().filter(|name| !namespaces.contains_key(&(String::new(), (**name).to_string()))),
    )
    .map(|name| async move {
        let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        create(client, "/api/v1/namespaces", &body).await.map(|_| ())
    })
    .buffer_unordered(CONCURRENT_WRITES)
    .try_collect::<()>()
    .await?;

    let mut stored = HashMap::new();
    for resource in ["clusterroles", "roles", "clusterrolebindings", "rolebindings"] {
        stored.insert(resource, list(client, &format!("/apis/{GROUP}/v1/{resource}")).await?);
    }
    let stored = &stored;
    stream::iter(with_aggregated_rules(objects()))
        .map(|wanted| async move {
            let key = (text(&wanted, "namespace"), text(&wanted, "name"));
            let found = stored.get(resource_of(&wanted)).and_then(|all| all.get(&key));
            ensure_one(client, &wanted, found).await
        })
        .buffer_unordered(CONCURRENT_WRITES)
        .try_collect::<()>()
        .await
}

/// `admin` takes from `edit`, which takes from `view`: goes on until nothing changes, at most once a level.
fn with_aggregated_rules(mut objects: Vec<Value>) -> Vec<Value> {
    const LEVELS: usize = 4;
    for _ in 0..LEVELS {
        let roles: Vec<ClusterRole> = objects
            .iter()
            .filter(|o| o["kind"] == "ClusterRole")
            .filter_map(|o| serde_json::from_value(o.clone()).ok())
            .collect();
        let mut changed = false;
        for object in objects.iter_mut().filter(|o| o.get("aggregationRule").is_some()) {
            let name = text(object, "name");
            let role = roles.iter().find(|r| r.metadata.name.as_deref() == Some(name.as_str()));
            if let Some(rules) = role.and_then(|role| aggregation::aggregate(role, roles.iter())) {
                object["rules"] = serde_json::to_value(rules).unwrap_or_default();
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    objects
}

async fn ensure_one(client: &Client, wanted: &Value, found: Option<&Value>) -> Result<(), kube::Error> {
    let namespace = text(wanted, "namespace");
    let within = if namespace.is_empty() { String::new() } else { format!("namespaces/{namespace}/") };
    let all = format!("/apis/{GROUP}/v1/{within}{}", resource_of(wanted));
    let one = format!("{all}/{}", text(wanted, "name"));
    let mut found = found.cloned();
    for _ in 0..ATTEMPTS {
        let Some(current) = found else {
            match create(client, &all, wanted).await? {
                true => return Ok(()),
                false => found = Some(get(client, &one).await?),
            }
            continue;
        };
        if current.get("roleRef") != wanted.get("roleRef") && is_updated_by_us(&current) {
            // a binding's role cannot be changed
            send(client, "DELETE", &one, &json!({})).await?;
            found = None;
            continue;
        }
        let Some(changed) = reconcile(&current, wanted) else { return Ok(()) };
        match send(client, "PUT", &one, &changed).await {
            Ok(_) => return Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => found = Some(get(client, &one).await?),
            Err(error) => return Err(error),
        }
    }
    tracing::warn!(object = one, "another writer keeps changing a default role or binding");
    Ok(())
}

fn is_updated_by_us(found: &Value) -> bool {
    found["metadata"]["annotations"].get(AUTOUPDATE).and_then(Value::as_str) != Some("false")
}

/// `found` with what it lacks of `wanted`; `None` when it lacks nothing or must be left alone.
pub fn reconcile(found: &Value, wanted: &Value) -> Option<Value> {
    if !is_updated_by_us(found) {
        return None;
    }
    let mut merged = found.clone();
    for map in ["labels", "annotations"] {
        for (key, value) in wanted["metadata"][map].as_object().into_iter().flatten() {
            if found["metadata"][map].get(key).is_none() {
                if !merged["metadata"][map].is_object() {
                    merged["metadata"][map] = Value::Object(Map::new());
                }
                merged["metadata"][map][key] = value.clone();
            }
        }
    }
    let extend = |merged: &mut Value, pointer: &str, list: &str| {
        let present = found.pointer(pointer).and_then(Value::as_array).cloned().unwrap_or_default();
        let added = wanted.pointer(pointer).and_then(Value::as_array).into_iter().flatten();
        let mut all = present.clone();
        all.extend(added.filter(|one| !present.contains(one)).cloned());
        if all.len() > present.len() {
            match list {
                "clusterRoleSelectors" => merged["aggregationRule"][list] = all.into(),
                _ => merged[list] = all.into(),
            }
        }
    };
    extend(&mut merged, "/subjects", "subjects");
    match wanted.get("aggregationRule") {
        Some(_) => extend(&mut merged, "/aggregationRule/clusterRoleSelectors", "clusterRoleSelectors"),
        None if found["rules"] != wanted["rules"] => {
            let rules = |of: &Value| {
                serde_json::from_value::<Vec<PolicyRule>>(of["rules"].clone()).unwrap_or_default()
            };
            let mut all = rules(found);
            let missing = escalation::uncovered(&all, &rules(wanted));
            if !missing.is_empty() {
                all.extend(missing);
                merged["rules"] = serde_json::to_value(all).unwrap_or_default();
            }
        }
        None => {}
    }
    (merged != *found).then_some(merged)
}

fn resource_of(object: &Value) -> &'static str {
    match object["kind"].as_str() {
        Some("ClusterRole") => "clusterroles",
        Some("Role") => "roles",
        Some("ClusterRoleBinding") => "clusterrolebindings",
        _ => "rolebindings",
    }
}

fn text(object: &Value, field: &str) -> String {
    object["metadata"][field].as_str().unwrap_or_default().to_string()
}

async fn list(client: &Client, path: &str) -> Result<HashMap<(String, String), Value>, kube::Error> {
    let mut list = get(client, path).await?;
    let items = match list["items"].take() {
        Value::Array(items) => items,
        _ => Vec::new(),
    };
    Ok(items.into_iter().map(|o| ((text(&o, "namespace"), text(&o, "name")), o)).collect())
}

async fn get(client: &Client, path: &str) -> Result<Value, kube::Error> {
    client.request(request("GET", path, Vec::new())?).await
}

/// False when it is there already.
async fn create(client: &Client, path: &str, body: &Value) -> Result<bool, kube::Error> {
    match send(client, "POST", path, body).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

async fn send(client: &Client, method: &str, path: &str, body: &Value) -> Result<Value, kube::Error> {
    let body = serde_json::to_vec(body).map_err(kube::Error::SerdeError)?;
    client.request(request(method, path, body)?).await
}

fn request(method: &str, path: &str, body: Vec<u8>) -> Result<http::Request<Vec<u8>>, kube::Error> {
    http::Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body)
        .map_err(kube::Error::HttpError)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(kind: &str, name: &str) -> Value {
        let all = with_aggregated_rules(objects());
        all.into_iter().find(|o| o["kind"] == kind && o["metadata"]["name"] == name).unwrap()
    }

    #[test]
    fn is_read_whole() {
        let all = objects();
        let count = |kind: &str| all.iter().filter(|o| o["kind"] == kind).count();
        assert!(count("ClusterRole") > 60 && count("ClusterRoleBinding") > 50, "{}", all.len());
        assert_eq!((count("Role"), count("RoleBinding")), (7, 7));
        assert_eq!(
            find("ClusterRole", "cluster-admin")["rules"],
            json!([{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}, {"verbs": ["*"], "nonResourceURLs": ["*"]}])
        );
        assert_eq!(find("ClusterRoleBinding", "cluster-admin")["subjects"][0]["name"], "system:masters");
        let basic = find("ClusterRole", "system:basic-user");
        assert_eq!(basic["rules"][0]["apiGroups"][0], "authorization.k8s.io");
        let admin = find("ClusterRole", "admin");
        assert_eq!(admin["aggregationRule"]["clusterRoleSelectors"].as_array().map(Vec::len), Some(1));
        assert!(admin["rules"].as_array().unwrap().len() > 10, "admin comes with its rules");
        for object in &all {
            for rule in object["rules"].as_array().into_iter().flatten() {
                serde_json::from_value::<PolicyRule>(rule.clone()).unwrap();
            }
        }
        assert!(node_rules().len() > 15);
    }

    #[test]
    fn reconciliation_only_adds() {
        let wanted = find("ClusterRole", "system:kube-scheduler");
        assert_eq!(reconcile(&wanted, &wanted), None);
        let mut found = wanted.clone();
        found["rules"].as_array_mut().unwrap().remove(0);
        found["rules"]
            .as_array_mut()
            .unwrap()
            .push(json!({"verbs": ["x"], "apiGroups": [""], "resources": ["y"]}));
        found["metadata"]["labels"] = json!({"mine": "1"});
        let merged = reconcile(&found, &wanted).unwrap();
        assert_eq!(merged["metadata"]["labels"]["mine"], "1");
        assert_eq!(merged["metadata"]["labels"]["kubernetes.io/bootstrapping"], "rbac-defaults");
        assert!(merged["rules"].as_array().unwrap().iter().any(|r| r["verbs"][0] == "x"));
        assert_eq!(reconcile(&merged, &wanted), None);
        found["metadata"]["annotations"][AUTOUPDATE] = json!("false");
        assert_eq!(reconcile(&found, &wanted), None);

        let wanted = find("ClusterRoleBinding", "system:discovery");
        let mut found = wanted.clone();
        found["subjects"] = json!([]);
        assert_eq!(reconcile(&found, &wanted).unwrap()["subjects"], wanted["subjects"]);
    }
}
