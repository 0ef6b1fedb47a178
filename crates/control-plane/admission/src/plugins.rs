//! The list of plugins: adding one is a file and a line here. The order is upstream's
//! (pkg/kubeapiserver/options/plugins.go).
use crate::{Context, Plugin};

/// Declares the plugins' modules and lists their constructors.
macro_rules! registry {
    ($($module:ident),* $(,)?) => {
        $(pub mod $module;)*

        /// Every plugin's constructor, in order.
        pub static PLUGINS: &[fn(&Context) -> Box<dyn Plugin>] = &[$($module::new),*];
    };
}

registry! {
    namespace_lifecycle,
    limit_ranger,
    service_account,
    node_restriction,
    taint_nodes_by_condition,
    priority,
    default_toleration_seconds,
    default_storage_class,
    default_ingress_class,
    runtime_class,
    resource_quota,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{Operation, Request};
    use http::Response;
    use http_body_util::BodyExt;
    use kube::client::Body;
    use parking_lot::Mutex;
    use sampan_client::{Identity, Informers, in_process};
    use serde_json::{Value, json};
    use std::collections::HashMap;
    use std::convert::Infallible;
    use std::sync::{Arc, LazyLock};

    static USER: LazyLock<Identity> = LazyLock::new(|| Identity::new("user", &[]));

    /// A request as `user` makes it; `resource` may have a subresource.
    pub fn request<'a>(
        operation: Operation,
        resource: &'a str,
        namespace: &'a str,
        name: &'a str,
    ) -> Request<'a> {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let (group, kind) = match resource {
            "pods" => ("", "Pod"),
            "namespaces" => ("", "Namespace"),
            "nodes" => ("", "Node"),
            "ingresses" => ("networking.k8s.io", "Ingress"),
            _ => ("", ""),
        };
        let user = &*USER;
        Request {
            operation,
            group,
            version: "v1",
            resource,
            subresource,
            kind,
            namespace,
            name,
            dry_run: false,
            user,
        }
    }

    /// Objects by the path that they are read at.
    #[derive(Clone, Default)]
    pub struct Cluster(Arc<Mutex<HashMap<String, Value>>>);

    impl Cluster {
        pub fn put(&self, path: &str, object: Value) {
            self.0.lock().insert(path.to_string(), object);
        }

        pub fn context(&self) -> Context {
            let objects = self.0.clone();
            let router = tower::service_fn(move |request: http::Request<Body>| {
                let found = objects.lock().get(request.uri().path()).cloned();
                async move {
                    let (code, body) = match found {
                        Some(object) => (200, object),
                        None => (
                            404,
                            json!({"kind": "Status", "status": "Failure", "code": 404, "reason": "NotFound"}),
                        ),
                    };
                    let body = Body::from(body.to_string().into_bytes())
                        .map_err(|e| Box::new(e) as _)
                        .boxed_unsync();
                    Ok::<_, Infallible>(Response::builder().status(code).body(body).unwrap())
                }
            });
            let router = in_process::Router::new(router);
            Context::new(Informers::new(in_process::client(router, Identity::loopback(), "test")))
        }
    }

    #[tokio::test]
    async fn the_order_is_upstreams() {
        let chain = crate::Chain::new(&Cluster::default().context());
        let want = [
            "NamespaceLifecycle",
            "LimitRanger",
            "ServiceAccount",
            "NodeRestriction",
            "TaintNodesByCondition",
            "Priority",
            "DefaultTolerationSeconds",
            "DefaultStorageClass",
            "DefaultIngressClass",
            "RuntimeClass",
            "ResourceQuota",
        ];
        assert_eq!(chain.names(), want);
    }
}
