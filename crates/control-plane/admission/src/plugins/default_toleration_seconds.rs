//! DefaultTolerationSeconds: pods stay five minutes on a node that is not ready or cannot be reached.
//! Upstream counterpart: plugin/pkg/admission/defaulttolerationseconds.
use async_trait::async_trait;
use serde_json::{Value, json};

use crate::pod::items;
use crate::{Context, Operation, Plugin, Rejection, Request};

const TAINTS: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];
const SECONDS: i64 = 300;

struct DefaultTolerationSeconds;

pub fn new(_: &Context) -> Box<dyn Plugin> {
    Box::new(DefaultTolerationSeconds)
}

#[async_trait]
impl Plugin for DefaultTolerationSeconds {
    fn name(&self) -> &'static str {
        "DefaultTolerationSeconds"
    }

    fn handles(&self, operation: Operation, resource: &str, subresource: &str) -> bool {
        resource == "pods"
            && subresource.is_empty()
            && matches!(operation, Operation::Create | Operation::Update)
    }

    async fn admit(
        &self,
        request: &Request<'_>,
        pod: &mut Value,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        if !request.group.is_empty() || !pod["spec"].is_object() {
            return Ok(());
        }
        let spec = &mut pod["spec"];
        let text =
            |toleration: &Value, field: &str| toleration[field].as_str().unwrap_or_default().to_string();
        let missing: Vec<Value> = TAINTS
            .iter()
            .filter(|taint| {
                !items(spec, "tolerations").any(|t| {
                    (text(t, "key").is_empty() || text(t, "key") == **taint)
                        && matches!(text(t, "effect").as_str(), "" | "NoExecute")
                })
            })
            .map(|taint| {
                json!({"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": SECONDS})
            })
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        match spec.get_mut("tolerations").and_then(Value::as_array_mut) {
            Some(tolerations) => tolerations.extend(missing),
            None => spec["tolerations"] = missing.into(),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::tests::request;

    #[tokio::test]
    async fn adds_what_is_missing() {
        let cases = [
            (json!([]), 2),
            (json!([{"operator": "Exists"}]), 1),
            (json!([{"key": TAINTS[0], "operator": "Exists", "effect": "NoExecute"}]), 2),
            (json!([{"key": TAINTS[0], "operator": "Exists", "effect": "NoSchedule"}]), 3),
        ];
        for (tolerations, want) in cases {
            let mut pod = json!({"spec": {"tolerations": tolerations}});
            let request = request(Operation::Create, "pods", "ns", "p");
            DefaultTolerationSeconds.admit(&request, &mut pod, None).await.unwrap();
            assert_eq!(pod["spec"]["tolerations"].as_array().unwrap().len(), want, "{pod}");
        }
    }
}
