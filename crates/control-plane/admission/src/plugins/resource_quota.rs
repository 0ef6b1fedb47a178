//! ResourceQuota: a write that would take the namespace beyond a quota is refused, others are charged to it.
//! Upstream counterpart: k8s.io/apiserver/pkg/admission/plugin/resourcequota.
//!
//! What stays true: a charge is in the quota's status before the object is stored; what then fails is given back when
//! the quota controller counts again. Deliberately different: writes that are charged go one after the other and read
//! the quotas past the informer, so there is no cache of quotas just updated; a namespace of whose quotas the informer
//! knows none has none.
use async_trait::async_trait;
use k8s_openapi::api::core::v1::ResourceQuota as Quota;
use sampan_client::Informer;
use sampan_kinds::quantity::{Amount, ResourceList, canonical, parse};
use sampan_kinds::quota;
use sampan_world::clock;
use serde_json::Value;
use tokio::sync::Mutex;

use crate::{Context, Operation, Plugin, Rejection, Request};

/// Attempts at charging while the quota controller writes too.
const ATTEMPTS: usize = 4;
/// Core resources that never count.
const IGNORED: [&str; 3] = ["events", "bindings", "namespaces"];
const IGNORED_GROUPS: [&str; 3] = ["authentication.k8s.io", "authorization.k8s.io", "events.k8s.io"];

struct ResourceQuota {
    context: Context,
    quotas: Informer<Quota>,
    turn: Mutex<()>,
}

pub fn new(context: &Context) -> Box<dyn Plugin> {
    Box::new(ResourceQuota {
        quotas: context.informers.of(),
        context: context.clone(),
        turn: Mutex::default(),
    })
}

#[async_trait]
impl Plugin for ResourceQuota {
    fn name(&self) -> &'static str {
        "ResourceQuota"
    }

    fn handles(&self, operation: Operation, resource: &str, subresource: &str) -> bool {
        match (resource, subresource) {
            ("pods", "" | "resize") | ("persistentvolumeclaims", "" | "status") | ("services", "") => {
                matches!(operation, Operation::Create | Operation::Update)
            }
            (_, "") => operation == Operation::Create,
            _ => false,
        }
    }

    async fn validate(
        &self,
        request: &Request<'_>,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<(), Rejection> {
        let ignored = (request.group.is_empty() && IGNORED.contains(&request.resource))
            || IGNORED_GROUPS.contains(&request.group);
        let Some(object) = object.filter(|_| !request.namespace.is_empty() && !ignored) else {
            return Ok(());
        };
        if request.operation == Operation::Update && !may_cost_more(request, object, old) {
            return Ok(());
        }
        if self.quotas.list_in(request.namespace).is_empty() {
            return Ok(());
        }
        let _turn = self.turn.lock().await;
        for _ in 0..ATTEMPTS {
            let mut charged = true;
            for quota in self.present(request.namespace).await? {
                let Some(used) = charge(request, &quota, object, old).map_err(Rejection::forbidden)? else {
                    continue;
                };
                if !request.dry_run && !self.write(request.namespace, quota, used).await? {
                    charged = false;
                    break;
                }
            }
            if charged {
                return Ok(());
            }
        }
        Err(Rejection::Internal("the namespace's quotas keep changing, try again".to_string()))
    }
}

/// Whether an update can matter to any quota.
fn may_cost_more(request: &Request<'_>, object: &Value, old: Option<&Value>) -> bool {
    let Some(old) = old else { return true };
    match (request.resource, request.subresource) {
        ("pods", "") => quota::is_terminating(object) != quota::is_terminating(old),
        _ => {
            let now = clock::now();
            let usage = |object| quota::usage(request.group, request.resource, object, now);
            usage(object) != usage(old)
        }
    }
}

impl ResourceQuota {
    async fn present(&self, namespace: &str) -> Result<Vec<Value>, Rejection> {
        let path = format!("/api/v1/namespaces/{namespace}/resourcequotas");
        let list = self.context.get(&path).await?.unwrap_or_default();
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// False when another writer was faster.
    async fn write(&self, namespace: &str, mut quota: Value, used: Value) -> Result<bool, Rejection> {
        let internal = |e: &dyn std::fmt::Display| Rejection::Internal(e.to_string());
        let name = quota["metadata"]["name"].as_str().unwrap_or_default().to_string();
        quota["apiVersion"] = "v1".into();
        quota["kind"] = "ResourceQuota".into();
        quota["status"]["used"] = used;
        let body = serde_json::to_vec(&quota).map_err(|e| internal(&e))?;
        let path = format!("/api/v1/namespaces/{namespace}/resourcequotas/{name}/status");
        let request = http::Request::put(path)
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|e| internal(&e))?;
        match self.context.client.request::<Value>(request).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
            Err(error) => Err(internal(&error)),
        }
    }
}

/// The quota's `used` with the write charged to it; `None` when the quota isn't about it, and why not as an error.
fn charge(
    request: &Request<'_>,
    stored: &Value,
    object: &Value,
    old: Option<&Value>,
) -> Result<Option<Value>, String> {
    let (group, resource) = (request.group, request.resource);
    let name = stored["metadata"]["name"].as_str().unwrap_or_default();
    let counted = quota::counted(stored, group, resource);
    if counted.is_empty() || !quota::in_scope(stored, group, resource, object) {
        return Ok(None);
    }
    if request.group.is_empty()
        && resource == "pods"
        && let Some(missing) = quota::missing_requests(object, &counted)
    {
        return Err(format!("failed quota: {name}: must specify {missing}"));
    }
    let (hard, used) = (&stored["status"]["hard"], &stored["status"]["used"]);
    if counted.iter().any(|name| used.get(name).is_none()) {
        let mut names = counted;
        names.sort_unstable();
        return Err(format!("status unknown for quota: {name}, resources: {}", names.join(",")));
    }
    let now = clock::now();
    let mut delta = quota::usage(group, resource, object, now);
    if let Some(negative) = negative(&delta) {
        return Err(format!("quota usage is negative for resource(s): {negative}"));
    }
    // What the object cost before has been paid, if to this quota.
    if let Some(old) = old.filter(|old| quota::in_scope(stored, group, resource, old)) {
        for (name, amount) in quota::usage(group, resource, old, now) {
            if let Some(left) = delta.get_mut(&name) {
                *left = left.minus(amount).max(Amount::ZERO);
            }
        }
    }
    delta.retain(|name, amount| *amount > Amount::ZERO && counted.contains(name));
    if delta.is_empty() {
        return Ok(None);
    }
    let read = |list: &Value, name: &str| parse(list[name].as_str().unwrap_or("0")).unwrap_or(ZERO);
    let mut after = used.clone();
    let mut exceeded: Vec<[String; 3]> = Vec::new();
    for (resource, amount) in &delta {
        let ((used, format), (hard, of_hard)) = (read(used, resource), read(hard, resource));
        let sum = used.plus(*amount);
        if sum > hard {
            let line = |amount, format| format!("{resource}={}", canonical(amount, format));
            exceeded.push([line(*amount, of_hard), line(used, format), line(hard, of_hard)]);
        }
        let format = if used == Amount::ZERO { of_hard } else { format };
        after[resource] = canonical(sum, format).into();
    }
    if exceeded.is_empty() {
        return Ok(Some(after));
    }
    let column = |at: usize| exceeded.iter().map(|line| line[at].as_str()).collect::<Vec<_>>().join(",");
    let (requested, used, limited) = (column(0), column(1), column(2));
    Err(format!("exceeded quota: {name}, requested: {requested}, used: {used}, limited: {limited}"))
}

const ZERO: (Amount, sampan_kinds::quantity::Format) =
    (Amount::ZERO, sampan_kinds::quantity::Format::DecimalSi);

fn negative(usage: &ResourceList) -> Option<String> {
    let names = usage.iter().filter(|(_, amount)| **amount < Amount::ZERO).map(|(name, _)| name.as_str());
    let names: Vec<&str> = names.collect();
    (!names.is_empty()).then(|| names.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::tests::request;
    use serde_json::json;

    #[test]
    fn charges_and_refuses_in_upstreams_words() {
        let create = request(Operation::Create, "pods", "ns", "p");
        let pod = |cpu: &str| json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu, "memory": "1Gi"}}}]}});
        let quota = json!({"metadata": {"name": "q"}, "spec": {},
            "status": {"hard": {"requests.cpu": "1", "pods": "5", "services": "3"},
                "used": {"requests.cpu": "500m", "pods": "1", "services": "0"}}});
        let cases = [
            (pod("250m"), Ok(Some(json!({"requests.cpu": "750m", "pods": "2", "services": "0"})))),
            (
                pod("600m"),
                Err(
                    "exceeded quota: q, requested: requests.cpu=600m, used: requests.cpu=500m, limited: requests.cpu=1",
                ),
            ),
            (
                json!({"spec": {"containers": [{"name": "c"}]}}),
                Err("failed quota: q: must specify requests.cpu for: c"),
            ),
        ];
        for (pod, want) in cases {
            assert_eq!(charge(&create, &quota, &pod, None), want.map_err(String::from));
        }
        let mut unknown = quota.clone();
        unknown["status"]["used"] = json!({});
        assert_eq!(
            charge(&create, &unknown, &pod("1m"), None),
            Err("status unknown for quota: q, resources: pods,requests.cpu".to_string())
        );
        let secret = request(Operation::Create, "secrets", "ns", "s");
        assert_eq!(charge(&secret, &quota, &json!({}), None), Ok(None));
        let update = request(Operation::Update, "services", "ns", "s");
        let service = |kind: &str| json!({"spec": {"type": kind, "ports": [{"port": 1}]}});
        assert_eq!(charge(&update, &quota, &service("NodePort"), Some(&service("ClusterIP"))), Ok(None));
    }
}
