//! A container's environment. Upstream counterparts: kubelet_pods.go (makeEnvironmentVariables), pkg/kubelet/envvars.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, EnvVarSource, Pod, Service};
use kube::ResourceExt;
use sampan_volumes::{FetchError, VolumeHost, field_path};

use crate::config::KubeletConfig;
use crate::expansion;

type Variables = BTreeMap<String, String>;

/// What values come from besides the pod itself.
pub struct Sources<'a> {
    pub config: &'a KubeletConfig,
    pub volumes: &'a VolumeHost,
    pub pod_ips: &'a [IpAddr],
    pub services: &'a [Arc<Service>],
}

/// The environment, or why it cannot be made (`CreateContainerConfigError`).
pub async fn environment(
    pod: &Pod,
    container: &Container,
    sources: &Sources<'_>,
) -> Result<Vec<(String, String)>, String> {
    let links = pod.spec.as_ref().and_then(|s| s.enable_service_links).unwrap_or(true);
    let services = service_variables(sources.services, &pod.namespace().unwrap_or_default(), links);
    let mut env = from_objects(pod, container, sources).await?;
    let mut order = Vec::new();
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (_, Some(source)) => match value_from(pod, container, source, sources).await? {
                Some(value) => value,
                None => continue,
            },
            (Some(text), None) => {
                let lookup = |name: &str| env.get(name).or_else(|| services.get(name)).cloned();
                expansion::expand(text, lookup, &mut Vec::new())
            }
            (None, None) => String::new(),
        };
        order.retain(|n| *n != variable.name);
        order.push(variable.name.clone());
        env.insert(variable.name.clone(), value);
    }
    let mut result: Vec<(String, String)> =
        services.into_iter().filter(|(name, _)| !env.contains_key(name)).collect();
    result.extend(env.iter().filter(|(name, _)| !order.contains(name)).map(|(n, v)| (n.clone(), v.clone())));
    result.extend(order.into_iter().filter_map(|name| env.get(&name).cloned().map(|v| (name, v))));
    Ok(result)
}

fn missing_is_fine<T>(got: Result<T, FetchError>, is_optional: bool) -> Result<Option<T>, String> {
    match got {
        Ok(object) => Ok(Some(object)),
        Err(FetchError::NotFound { .. }) if is_optional => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

async fn from_objects(pod: &Pod, container: &Container, sources: &Sources<'_>) -> Result<Variables, String> {
    let (namespace, objects) = (pod.namespace().unwrap_or_default(), &sources.volumes.objects);
    let mut env = Variables::new();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        let mut take = |key: &str, value: String| {
            // what cannot be a variable's name is left out
            if !key.is_empty() && !key.contains('=') {
                env.insert(format!("{prefix}{key}"), value);
            }
        };
        if let Some(r) = &source.config_map_ref {
            let object = objects.config_map(&namespace, &r.name).await;
            if let Some(object) = missing_is_fine(object, r.optional.unwrap_or(false))? {
                object.data.iter().flatten().for_each(|(k, v)| take(k, v.clone()));
            }
        }
        if let Some(r) = &source.secret_ref {
            let object = objects.secret(&namespace, &r.name).await;
            if let Some(object) = missing_is_fine(object, r.optional.unwrap_or(false))? {
                object
                    .data
                    .iter()
                    .flatten()
                    .for_each(|(k, v)| take(k, String::from_utf8_lossy(&v.0).into_owned()));
            }
        }
    }
    Ok(env)
}

async fn value_from(
    pod: &Pod,
    container: &Container,
    source: &EnvVarSource,
    sources: &Sources<'_>,
) -> Result<Option<String>, String> {
    let (namespace, objects) = (pod.namespace().unwrap_or_default(), &sources.volumes.objects);
    if let Some(field) = &source.field_ref {
        return pod_field(pod, &field.field_path, sources).map(Some);
    }
    if let Some(selector) = &source.resource_field_ref {
        let named = selector.container_name.as_deref().filter(|n| !n.is_empty());
        let spec = pod.spec.as_ref();
        let mut all =
            spec.into_iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
        let of = match named {
            Some(name) => {
                all.find(|c| c.name == name).ok_or_else(|| format!("container {name} not found"))?
            }
            None => container,
        };
        return field_path::resource(pod, of, selector, &sources.volumes.allocatable.read()).map(Some);
    }
    if let Some(r) = &source.config_map_key_ref {
        let is_optional = r.optional.unwrap_or(false);
        let object = missing_is_fine(objects.config_map(&namespace, &r.name).await, is_optional)?;
        let Some(object) = object else { return Ok(None) };
        return match object.data.as_ref().and_then(|d| d.get(&r.key)) {
            Some(value) => Ok(Some(value.clone())),
            None if is_optional => Ok(None),
            None => Err(format!("couldn't find key {} in ConfigMap {namespace}/{}", r.key, r.name)),
        };
    }
    if let Some(r) = &source.secret_key_ref {
        let is_optional = r.optional.unwrap_or(false);
        let object = missing_is_fine(objects.secret(&namespace, &r.name).await, is_optional)?;
        let Some(object) = object else { return Ok(None) };
        return match object.data.as_ref().and_then(|d| d.get(&r.key)) {
            Some(value) => Ok(Some(String::from_utf8_lossy(&value.0).into_owned())),
            None if is_optional => Ok(None),
            None => Err(format!("couldn't find key {} in Secret {namespace}/{}", r.key, r.name)),
        };
    }
    if source.file_key_ref.is_some() {
        return Err("fileKeyRef is not supported by this node yet".to_string());
    }
    Ok(Some(String::new()))
}

fn pod_field(pod: &Pod, path: &str, sources: &Sources<'_>) -> Result<String, String> {
    let spec = pod.spec.as_ref();
    let join = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let host_ips = sources.config.host_ips();
    Ok(match path {
        "spec.nodeName" => spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => spec.and_then(|s| s.service_account_name.clone()).unwrap_or_default(),
        "status.hostIP" => host_ips.first().map(ToString::to_string).unwrap_or_default(),
        "status.hostIPs" => join(&host_ips),
        "status.podIP" => sources.pod_ips.first().map(ToString::to_string).unwrap_or_default(),
        "status.podIPs" => join(sources.pod_ips),
        path => field_path::metadata(pod, path).ok_or_else(|| format!("unsupported fieldPath: {path}"))?,
    })
}

/// The variables that tell of the services of the pod's namespace and of the API's.
fn service_variables(services: &[Arc<Service>], namespace: &str, links: bool) -> Variables {
    let mut variables = Variables::new();
    let is_api = |s: &Service| s.namespace().as_deref() == Some("default") && s.name_any() == "kubernetes";
    let mut chosen: Vec<&Arc<Service>> = services
        .iter()
        .filter(|s| is_api(s) || links && s.namespace().as_deref() == Some(namespace))
        .collect();
    // the pod's own namespace wins
    chosen.sort_by_key(|s| s.namespace().as_deref() == Some(namespace));
    for service in chosen {
        let Some(spec) = &service.spec else { continue };
        let ip = spec.cluster_ip.as_deref().unwrap_or_default();
        let ports = spec.ports.as_deref().unwrap_or_default();
        let Some(first) = ports.first() else { continue };
        if ip.is_empty() || ip == "None" {
            continue;
        }
        let upper = |text: &str| text.to_uppercase().replace('-', "_");
        let shown = if ip.contains(':') { format!("[{ip}]") } else { ip.to_string() };
        let name = upper(&service.name_any());
        variables.insert(format!("{name}_SERVICE_HOST"), ip.to_string());
        variables.insert(format!("{name}_SERVICE_PORT"), first.port.to_string());
        for (i, port) in ports.iter().enumerate() {
            if let Some(port_name) = port.name.as_deref().filter(|n| !n.is_empty()) {
                variables.insert(format!("{name}_SERVICE_PORT_{}", upper(port_name)), port.port.to_string());
            }
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let url = format!("{}://{shown}:{}", protocol.to_lowercase(), port.port);
            if i == 0 {
                variables.insert(format!("{name}_PORT"), url.clone());
            }
            let prefix = format!("{name}_PORT_{}_{protocol}", port.port);
            variables.insert(prefix.clone(), url);
            variables.insert(format!("{prefix}_PROTO"), protocol.to_lowercase());
            variables.insert(format!("{prefix}_PORT"), port.port.to_string());
            variables.insert(format!("{prefix}_ADDR"), ip.to_string());
        }
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn services_become_variables() {
        let service = |ns: &str, name: &str, ip: &str| {
            Arc::new(
                serde_json::from_value::<Service>(json!({"metadata": {"namespace": ns, "name": name},
                    "spec": {"clusterIP": ip, "ports": [{"port": 80, "name": "a-b"}]}}))
                .unwrap(),
            )
        };
        let all = [
            service("default", "kubernetes", "10.0.0.1"),
            service("ns", "my-web", "10.0.0.2"),
            service("ns", "headless", "None"),
            service("other", "x", "10.0.0.3"),
        ];
        let with = service_variables(&all, "ns", true);
        assert_eq!(with["MY_WEB_SERVICE_HOST"], "10.0.0.2");
        assert_eq!(with["MY_WEB_SERVICE_PORT_A_B"], "80");
        assert_eq!(with["MY_WEB_PORT"], "tcp://10.0.0.2:80");
        assert_eq!(with["MY_WEB_PORT_80_TCP_ADDR"], "10.0.0.2");
        assert_eq!(with.len(), 2 * 8);
        let without = service_variables(&all, "ns", false);
        assert_eq!((without.len(), without["KUBERNETES_SERVICE_HOST"].as_str()), (8, "10.0.0.1"));
    }
}
