//! What every cluster has from the start: its namespaces, priority classes and the `kubernetes` service.
//!
//! Upstream counterparts: pkg/controlplane/controller/systemnamespaces, …/controller/kubernetesservice,
//! pkg/registry/scheduling/rest. All of it goes through the router, as any client's requests do. Several servers may do
//! it at the same moment: what another has made meanwhile is left as it is. Where they share a store, the endpoints of
//! the `kubernetes` service are [`crate::identity_lease`]'s.
use std::sync::Arc;

use http::{Method, Request};
use http_body_util::BodyExt;
use sampan_client::Identity;
use serde_json::{Value, json};

use crate::identity_lease::is_reachable;
use crate::status::{Result, Status};
use crate::{Server, body, handler};

const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

pub async fn run(server: &Arc<Server>) -> Result<()> {
    for name in NAMESPACES {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        ensure(server, "/api/v1/namespaces", name, &namespace).await?;
    }
    for (name, value, what) in [
        (
            "system-node-critical",
            2_000_001_000,
            "Used for system critical pods that must not be moved from their current node.",
        ),
        (
            "system-cluster-critical",
            2_000_000_000,
            "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
        ),
    ] {
        let class = json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name},
            "value": value, "description": what});
        ensure(server, "/apis/scheduling.k8s.io/v1/priorityclasses", name, &class).await?;
    }
    service_cidr(server).await?;
    kubernetes_service(server).await?;
    server.bootstrapped.get_or_init(|| ());
    Ok(())
}

/// The range that services' addresses are given from, as an object (upstream's
/// pkg/controlplane/controller/defaultservicecidr).
async fn service_cidr(server: &Arc<Server>) -> Result<()> {
    const PATH: &str = "/apis/networking.k8s.io/v1/servicecidrs";
    let cidrs = server.config.service_cidrs.iter();
    let cidrs: Vec<String> = cidrs.map(|cidr| format!("{}/{}", cidr.address, cidr.prefix)).collect();
    if cidrs.is_empty() {
        return Ok(());
    }
    let object = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}});
    ensure(server, PATH, "kubernetes", &object).await?;
    let path = format!("{PATH}/kubernetes");
    let (_, mut stored) = call(server, Method::GET, &path, None).await?;
    if stored.pointer("/status/conditions").and_then(Value::as_array).is_some_and(|c| !c.is_empty()) {
        return Ok(());
    }
    stored["status"] = json!({"conditions": [{"type": "Ready", "status": "True", "reason": "",
        "message": "Kubernetes default Service CIDR is ready",
        "lastTransitionTime": sampan_world::clock::now_seconds().to_string()}]});
    match call(server, Method::PUT, &format!("{path}/status"), Some(&stored)).await? {
        // 409: another server has just done it
        (200 | 409, _) => Ok(()),
        (_, body) => Err(failed(PATH, "kubernetes", &body)),
    }
}

/// The service that leads to this server, and where it leads.
async fn kubernetes_service(server: &Arc<Server>) -> Result<()> {
    let Some(cidr) = server.config.service_cidrs.first() else { return Ok(()) };
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let target = server.config.advertise.map_or(6443, |address| address.port());
    let service = json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": labels},
        "spec": {"clusterIP": cidr.nth(1).to_string(), "type": "ClusterIP", "sessionAffinity": "None",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": target}]}});
    ensure(server, "/api/v1/namespaces/default/services", "kubernetes", &service).await?;
    let Some(address) = server.config.advertise else { return Ok(()) };
    if !is_reachable(address) {
        tracing::warn!(
            %address,
            "pods cannot reach the API server at this address: the kubernetes service gets no endpoints"
        );
        return Ok(());
    }
    if server.config.store.is_shared() {
        return Ok(());
    }
    let ip = address.ip().to_string();
    let endpoints = json!({"apiVersion": "v1", "kind": "Endpoints",
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": [{"addresses": [{"ip": ip}], "ports": [{"name": "https", "port": target, "protocol": "TCP"}]}]});
    put(server, "/api/v1/namespaces/default/endpoints", "kubernetes", &endpoints).await?;
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": family,
        "endpoints": [{"addresses": [ip], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": target, "protocol": "TCP"}]});
    put(server, "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", "kubernetes", &slice).await
}

/// Creates the object unless it is there.
async fn ensure(server: &Arc<Server>, path: &str, name: &str, object: &Value) -> Result<()> {
    match call(server, Method::GET, &format!("{path}/{name}"), None).await? {
        (200, _) => Ok(()),
        _ => match call(server, Method::POST, path, Some(object)).await? {
            (201 | 409, _) => Ok(()),
            // what it wants may be taken by itself, made by another server meanwhile
            (_, body) => match call(server, Method::GET, &format!("{path}/{name}"), None).await? {
                (200, _) => Ok(()),
                _ => Err(failed(path, name, &body)),
            },
        },
    }
}

/// Creates the object, or replaces it where it is different.
async fn put(server: &Arc<Server>, path: &str, name: &str, object: &Value) -> Result<()> {
    ensure(server, path, name, object).await?;
    match call(server, Method::PUT, &format!("{path}/{name}"), Some(object)).await? {
        (200, _) => Ok(()),
        (_, body) => Err(failed(path, name, &body)),
    }
}

pub(crate) fn failed(path: &str, name: &str, body: &Value) -> Status {
    let message = body.get("message").and_then(Value::as_str).unwrap_or("");
    Status::internal(format_args!("{path}/{name}: {message}"))
}

pub(crate) async fn call(
    server: &Arc<Server>,
    method: Method,
    path: &str,
    object: Option<&Value>,
) -> Result<(u16, Value)> {
    let body = object.map_or_else(body::empty, |object| body::full(object.to_string()));
    let mut request = Request::new(body);
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().map_err(Status::internal)?;
    request
        .headers_mut()
        .insert(http::header::USER_AGENT, http::HeaderValue::from_static("sampan-apiserver"));
    request.extensions_mut().insert(Identity::loopback());
    let response = handler::handle(server.clone(), request).await;
    let code = response.status().as_u16();
    let bytes = response.into_body().collect().await.map_err(Status::internal)?.to_bytes();
    Ok((code, serde_json::from_slice(&bytes).unwrap_or_default()))
}
