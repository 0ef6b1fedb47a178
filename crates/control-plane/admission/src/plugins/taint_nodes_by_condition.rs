//! TaintNodesByCondition: a new node gets no pods until it says that it is ready.
//! Upstream counterpart: plugin/pkg/admission/nodetaint.
use async_trait::async_trait;
use serde_json::{Value, json};

use crate::pod::items;
use crate::{Context, Operation, Plugin, Rejection, Request};

const NOT_READY: &str = "node.kubernetes.io/not-ready";

struct TaintNodesByCondition;

pub fn new(_: &Context) -> Box<dyn Plugin> {
    Box::new(TaintNodesByCondition)
}

#[async_trait]
impl Plugin for TaintNodesByCondition {
    fn name(&self) -> &'static str {
        "TaintNodesByCondition"
    }

    fn handles(&self, operation: Operation, resource: &str, subresource: &str) -> bool {
        operation == Operation::Create && resource == "nodes" && subresource.is_empty()
    }

    async fn admit(
        &self,
        request: &Request<'_>,
        node: &mut Value,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        let spec = &mut node["spec"];
        let has = |spec: &Value| {
            items(spec, "taints").any(|t| t["key"] == NOT_READY && t["effect"] == "NoSchedule")
        };
        if !request.group.is_empty() || has(spec) {
            return Ok(());
        }
        let taint = json!({"key": NOT_READY, "effect": "NoSchedule"});
        match spec.get_mut("taints").and_then(Value::as_array_mut) {
            Some(taints) => taints.push(taint),
            None => spec["taints"] = json!([taint]),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::tests::request;

    #[tokio::test]
    async fn taints_once() {
        let mut node = json!({"metadata": {"name": "n"}});
        for _ in 0..2 {
            let request = request(Operation::Create, "nodes", "", "n");
            TaintNodesByCondition.admit(&request, &mut node, None).await.unwrap();
            assert_eq!(node["spec"]["taints"], json!([{"key": NOT_READY, "effect": "NoSchedule"}]));
        }
    }
}
