//! nodes/proxy, pods/proxy and services/proxy: any path of a kubelet, a pod or a service.
//!
//! Upstream counterparts: pkg/registry/core/{node,pod,service}/…/proxy, pkg/registry/core/service/storage.
use std::net::IpAddr;

use http::{HeaderValue, Response, header};
use sampan_drivers::Target;
use sampan_world::random;
use serde_json::Value;

use crate::body::{self, Body};
use crate::call::Call;
use crate::proxy::{self, Destination};
use crate::reply;
use crate::status::{Result, Status};
use crate::write::text;

pub async fn serve(call: &Call, body: Body) -> Result<Response<Body>> {
    let path = rest_of_path(call);
    if path.is_empty() && matches!(call.info.verb.as_str(), "get") {
        // Relative links of the proxied page need the slash.
        let mut response = reply::bytes(301, "text/plain; charset=utf-8", body::empty());
        let query = call.parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        if let Ok(location) = HeaderValue::from_str(&format!("{}/{query}", call.parts.uri.path())) {
            response.headers_mut().insert(header::LOCATION, location);
        }
        return Ok(response);
    }
    let query = call.parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let prefix = call.parts.uri.path().strip_suffix(path.as_str()).unwrap_or_default().to_string();
    let path = format!("{}{query}", if path.is_empty() { "/" } else { &path });
    let mut to = match call.resource.name.as_str() {
        "nodes" => node(call, path).await?,
        "pods" => pod(call, path).await?,
        _ => service(call, path).await?,
    };
    to.prefix = Some(prefix);
    proxy::forward(call, to, body).await
}

/// What follows `/proxy`, as the client wrote it.
fn rest_of_path(call: &Call) -> String {
    let path = call.parts.uri.path();
    // The path is …/<resource>/<name>/proxy<rest>.
    let before = call.info.parts.len().min(3);
    let root = if call.info.group.is_empty() { 2 } else { 3 };
    let namespace = if call.resource.namespaced { 2 } else { 0 };
    let skip = root + namespace + before;
    let mut at = 0;
    for _ in 0..skip {
        match path[at + 1..].find('/') {
            Some(next) => at += 1 + next,
            None => return String::new(),
        }
    }
    path[at..].to_string()
}

/// `name`, `name:port` or `scheme:name:port`.
fn split_id(id: &str) -> Option<(&str, &str, &str)> {
    let parts: Vec<&str> = id.split(':').collect();
    match parts.as_slice() {
        [name] => Some(("", *name, "")),
        [name, port] => Some(("", *name, *port)),
        [scheme @ ("" | "http" | "https"), name, port] => Some((*scheme, *name, *port)),
        _ => None,
    }
    .filter(|(_, name, _)| !name.is_empty())
}

async fn node(call: &Call, path: String) -> Result<Destination> {
    let invalid = || Status::bad_request(format!("invalid node request {:?}", call.info.name));
    let (_, name, port) = split_id(&call.info.name).ok_or_else(invalid)?;
    let found = call.on("", "v1", "nodes", name)?.present().await?;
    let node = found.value(&call.resource.storage)?;
    let kubelet =
        node.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64).unwrap_or(10250);
    if port.is_empty() || port.parse() == Ok(kubelet) {
        let target = Target::Kubelet;
        return Ok(Destination {
            node: name.into(),
            target,
            host: name.into(),
            path,
            tls: false,
            prefix: None,
        });
    }
    let port: u16 = port.parse().map_err(|_| invalid())?;
    let addresses = node.pointer("/status/addresses").and_then(Value::as_array).into_iter().flatten();
    let ip = addresses
        .into_iter()
        .find(|address| text(address, "/type") == "InternalIP")
        .and_then(|address| text(address, "/address").parse::<IpAddr>().ok())
        .ok_or_else(|| Status::bad_request("address not allowed"))?;
    Ok(tcp(name, ip, port, path, ""))
}

async fn pod(call: &Call, path: String) -> Result<Destination> {
    let invalid = || Status::bad_request(format!("invalid pod request {:?}", call.info.name));
    let (scheme, name, port) = split_id(&call.info.name).ok_or_else(invalid)?;
    let pod = call.on("", "v1", "pods", name)?.present().await?.value(&call.resource.storage)?;
    let first = || {
        let containers = pod.pointer("/spec/containers").and_then(Value::as_array).into_iter().flatten();
        containers.into_iter().find_map(|c| c.pointer("/ports/0/containerPort").and_then(Value::as_u64))
    };
    let port = match port {
        "" => first().unwrap_or(80).try_into().map_err(|_| invalid())?,
        port => port.parse().map_err(|_| invalid())?,
    };
    let not_allowed = || Status::bad_request("address not allowed");
    let ip: IpAddr = text(&pod, "/status/podIP").parse().map_err(|_| not_allowed())?;
    if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
        return Err(not_allowed());
    }
    Ok(tcp(text(&pod, "/spec/nodeName"), ip, port, path, scheme))
}

async fn service(call: &Call, path: String) -> Result<Destination> {
    let invalid = || Status::bad_request(format!("invalid service request {:?}", call.info.name));
    let (scheme, name, port) = split_id(&call.info.name).ok_or_else(invalid)?;
    let mut port_name = port.to_string();
    let services = call.on("", "v1", "services", name)?;
    let service = services.present().await?.value(&services.resource.storage)?;
    if let Ok(number) = port.parse::<u64>() {
        let ports = service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten();
        let declared = ports.into_iter().find(|p| p.get("port").and_then(Value::as_u64) == Some(number));
        let missing = || Status::unavailable(format!("no service port {number} found for service {name:?}"));
        port_name = text(declared.ok_or_else(missing)?, "/name").to_string();
    }
    let none = |what: &str| Status::unavailable(format!("no endpoints available for service {what:?}"));
    let slices = call.on("discovery.k8s.io", "v1", "endpointslices", "")?;
    let cache = slices.cache().await?;
    call.server.caches.catch_up().await?;
    let prefix = slices.resource.storage.namespace_prefix(&call.info.namespace);
    let mut found: Vec<(String, IpAddr, u16)> = Vec::new();
    for object in call.server.caches.snapshot(&cache, &prefix, None).objects {
        let slice = object.value(&slices.resource.storage)?;
        let of =
            slice.pointer("/metadata/labels").and_then(|labels| labels.get("kubernetes.io/service-name"));
        if of.and_then(Value::as_str) != Some(name) {
            continue;
        }
        let ports = slice.get("ports").and_then(Value::as_array).into_iter().flatten();
        let number = ports
            .into_iter()
            .find(|port| text(port, "/name") == port_name)
            .and_then(|port| u16::try_from(port.get("port")?.as_u64()?).ok());
        let Some(number) = number else { continue };
        for endpoint in slice.get("endpoints").and_then(Value::as_array).into_iter().flatten() {
            let ready = endpoint.pointer("/conditions/ready").and_then(Value::as_bool).unwrap_or(true);
            let address = text(endpoint, "/addresses/0").parse::<IpAddr>().ok();
            if let (true, Some(ip)) = (ready, address) {
                found.push((text(endpoint, "/nodeName").to_string(), ip, number));
            }
        }
    }
    if found.is_empty() {
        return Err(none(&call.info.name));
    }
    let (node, ip, port) = found.swap_remove(random::below(found.len() as u64) as usize);
    Ok(tcp(&node, ip, port, path, scheme))
}

/// Backends behind TLS have certificates that nobody here could check; as upstream, nobody does.
fn tcp(node: &str, ip: IpAddr, port: u16, path: String, scheme: &str) -> Destination {
    let address = std::net::SocketAddr::new(ip, port);
    Destination {
        node: node.to_string(),
        target: Target::Tcp(address),
        host: address.to_string(),
        path,
        tls: scheme == "https",
        prefix: None,
    }
}
