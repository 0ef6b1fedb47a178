//! What `fieldRef` and `resourceFieldRef` stand for, in files and in environment variables.
//!
//! Upstream counterpart: pkg/fieldpath/fieldpath.go and k8s.io/kubectl/pkg/util/resource (ExtractContainerResourceValue).
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use sampan_kinds::quantity;

type Quantities = BTreeMap<String, Quantity>;

/// The text of a metadata field; `None` where the path is not one.
pub fn metadata(pod: &Pod, path: &str) -> Option<String> {
    let meta = &pod.metadata;
    if let Some((map, key)) = path.strip_suffix(']').and_then(|p| p.split_once("['")) {
        let key = key.strip_suffix('\'')?;
        let map = match map {
            "metadata.annotations" => &meta.annotations,
            "metadata.labels" => &meta.labels,
            _ => return None,
        };
        return Some(map.as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default());
    }
    Some(match path {
        "metadata.annotations" => format_map(meta.annotations.as_ref()),
        "metadata.labels" => format_map(meta.labels.as_ref()),
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        _ => return None,
    })
}

fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> = map.into_iter().flatten().map(|(k, v)| format!("{k}={}", go_quote(v))).collect();
    lines.join("\n")
}

/// Go's `%q`.
fn go_quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\u{b}' => out.push_str("\\v"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The container's amount in units of the divisor, rounded up; limits that are not set are what the node can give.
pub fn resource(
    pod: &Pod,
    container: &Container,
    selector: &ResourceFieldSelector,
    allocatable: &Quantities,
) -> Result<String, String> {
    let (list, name) = selector
        .resource
        .split_once('.')
        .ok_or_else(|| format!("unsupported container resource : {}", selector.resource))?;
    let resources = container.resources.as_ref();
    let pod_level = pod.spec.as_ref().and_then(|s| s.resources.as_ref());
    let own = match list {
        "limits" => {
            let own = resources.and_then(|r| r.limits.as_ref()).and_then(|l| l.get(name));
            own.or_else(|| pod_level.and_then(|r| r.limits.as_ref()).and_then(|l| l.get(name)))
                .or_else(|| allocatable.get(name))
        }
        "requests" => resources.and_then(|r| r.requests.as_ref()).and_then(|l| l.get(name)),
        _ => return Err(format!("unsupported container resource : {}", selector.resource)),
    };
    let known = matches!(name, "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-");
    if !known {
        return Err(format!("unsupported container resource : {}", selector.resource));
    }
    let parse = |q: &Quantity| quantity::parse(&q.0).map(|(amount, _)| amount);
    let amount = own.and_then(parse).unwrap_or_default();
    let divisor = selector.divisor.as_ref().and_then(parse).unwrap_or_default();
    let (value, by) = if name == "cpu" {
        (amount.milli_value(), divisor.milli_value().max(0))
    } else {
        (amount.value(), divisor.value().max(0))
    };
    let by = if by == 0 { if name == "cpu" { 1000 } else { 1 } } else { by };
    Ok(((i128::from(value) + i128::from(by) - 1).div_euclid(i128::from(by))).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn metadata_fields() {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"b": "2", "a": "x\ny"}}}))
                .unwrap();
        let cases = [
            ("metadata.name", Some("n")),
            ("metadata.labels", Some("a=\"x\\ny\"\nb=\"2\"")),
            ("metadata.labels['b']", Some("2")),
            ("metadata.labels['c']", Some("")),
            ("metadata.annotations", Some("")),
            ("status.podIP", None),
        ];
        for (path, want) in cases {
            assert_eq!(metadata(&pod, path).as_deref(), want, "{path}");
        }
    }

    #[test]
    fn resources_are_rounded_up_and_default_to_the_node() {
        let container: Container = serde_json::from_value(
            json!({"name": "c", "resources": {"limits": {"cpu": "1250m"}, "requests": {"memory": "32Mi"}}}),
        )
        .unwrap();
        let node: Quantities = [("memory".to_string(), Quantity("1Gi".into()))].into();
        let cases = [
            ("limits.cpu", "0", "2"),
            ("limits.cpu", "1m", "1250"),
            ("requests.memory", "1Mi", "32"),
            ("limits.memory", "1Mi", "1024"),
            ("requests.cpu", "1", "0"),
        ];
        for (name, divisor, want) in cases {
            let selector = ResourceFieldSelector {
                resource: name.into(),
                divisor: Some(Quantity(divisor.into())),
                container_name: None,
            };
            assert_eq!(resource(&Pod::default(), &container, &selector, &node).unwrap(), want, "{name}");
        }
    }
}
