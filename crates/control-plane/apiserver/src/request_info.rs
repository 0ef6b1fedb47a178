//! What a request asks for, read from its method and path alone.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/endpoints/request/requestinfo.go.
use http::Method;

use crate::query::{Query, percent_decode};
use crate::selector::{FieldSelector, LabelSelector};

/// A request's verb and what it is about. For paths outside the API only `path` and `verb` are set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestInfo {
    pub is_resource: bool,
    pub path: String,
    /// `get`, `list`, `watch`, … for resources; the method in lower case otherwise.
    pub verb: String,
    pub group: String,
    pub version: String,
    pub namespace: String,
    pub resource: String,
    pub subresource: String,
    pub name: String,
    /// From the resource on: resource, name, subresource and what a proxied path has behind them.
    pub parts: Vec<String>,
    /// The path says `/watch/`, the deprecated way to ask for a watch.
    pub watch_by_path: bool,
    /// What a list, watch or deletecollection is limited to, for authorizers. Empty where it can't be read.
    pub field_selector: FieldSelector,
    pub label_selector: LabelSelector,
}

impl RequestInfo {
    pub fn parse(method: &Method, path: &str, query: &Query) -> Self {
        let mut info =
            Self { path: path.to_string(), verb: method.as_str().to_ascii_lowercase(), ..Self::default() };
        let trimmed = path.trim_matches('/');
        let split: Vec<String> = match trimmed {
            "" => Vec::new(),
            _ => trimmed.split('/').map(|part| percent_decode(part, false).into_owned()).collect(),
        };
        let mut parts = split.as_slice();
        if parts.len() < 3 {
            return info;
        }
        match parts[0].as_str() {
            "api" => parts = &parts[1..],
            "apis" if parts.len() >= 4 => {
                info.group = parts[1].clone();
                parts = &parts[2..];
            }
            _ => return info,
        }
        info.is_resource = true;
        info.version = parts[0].clone();
        parts = &parts[1..];
        if parts[0] == "watch" && parts.len() >= 2 {
            info.verb = "watch".into();
            info.watch_by_path = true;
            parts = &parts[1..];
        } else {
            info.verb = verb_of(method).into();
        }
        if parts[0] == "namespaces" && parts.len() > 1 {
            info.namespace = parts[1].clone();
            // A third part is a resource in the namespace, unless it is a subresource of the namespace itself.
            if parts.len() > 2 && !matches!(parts[2].as_str(), "status" | "finalize") {
                parts = &parts[2..];
            }
        }
        info.parts = parts.to_vec();
        info.resource = parts[0].clone();
        info.name = parts.get(1).cloned().unwrap_or_default();
        info.subresource = parts.get(2).cloned().unwrap_or_default();
        info.without_name(query);
        if matches!(info.verb.as_str(), "list" | "watch" | "deletecollection") {
            info.field_selector = FieldSelector::parse(query.get("fieldSelector")).unwrap_or_default();
            info.label_selector = LabelSelector::parse(query.get("labelSelector")).unwrap_or_default();
        }
        info
    }

    /// Without a name a get is a list or a watch, and a delete one of the collection.
    fn without_name(&mut self, query: &Query) {
        if !self.name.is_empty() {
            return;
        }
        if self.verb == "get" {
            self.verb = if query.flag("watch") { "watch" } else { "list" }.into();
            if let Ok(selector) = FieldSelector::parse(query.get("fieldSelector"))
                && let Some(name) = selector.requires("metadata.name")
                && is_path_segment(name)
            {
                self.name = name.to_string();
            }
        } else if self.verb == "delete" {
            self.verb = "deletecollection".into();
        }
    }

    /// `/livez`, `/api/v1`, …: the parts of a path outside resources.
    pub fn segments(&self) -> Vec<&str> {
        self.path.split('/').filter(|part| !part.is_empty()).collect()
    }

    /// Watches, proxies, logs and execs last long and count nowhere as in flight.
    pub fn is_long_running(&self) -> bool {
        self.verb == "watch"
            || matches!(self.subresource.as_str(), "proxy" | "attach" | "exec" | "log" | "portforward")
    }

    /// Whether the request may change anything.
    pub fn is_mutating(&self) -> bool {
        !matches!(self.verb.as_str(), "get" | "list" | "watch" | "head" | "options")
    }
}

fn verb_of(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::GET | Method::HEAD => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    }
}

fn is_path_segment(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '%'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_as_upstream_reads_them() {
        // method, path, verb, group, version, namespace, resource, subresource, name
        let cases = [
            ("GET", "/api/v1/namespaces", "list", "", "v1", "", "namespaces", "", ""),
            ("GET", "/api/v1/namespaces/a", "get", "", "v1", "a", "namespaces", "", "a"),
            ("PUT", "/api/v1/namespaces/a/finalize", "update", "", "v1", "a", "namespaces", "finalize", "a"),
            ("GET", "/api/v1/namespaces/a/pods", "list", "", "v1", "a", "pods", "", ""),
            ("GET", "/api/v1/namespaces/a/pods?watch=1", "watch", "", "v1", "a", "pods", "", ""),
            ("GET", "/api/v1/namespaces/a/pods/x/log", "get", "", "v1", "a", "pods", "log", "x"),
            ("GET", "/api/v1/watch/namespaces/a/pods", "watch", "", "v1", "a", "pods", "", ""),
            ("GET", "/api/v1/watch/namespaces/a/pods/x", "watch", "", "v1", "a", "pods", "", "x"),
            ("GET", "/api/v1/pods?fieldSelector=metadata.name%3Dx", "list", "", "v1", "", "pods", "", "x"),
            (
                "DELETE",
                "/apis/apps/v1/namespaces/a/deployments",
                "deletecollection",
                "apps",
                "v1",
                "a",
                "deployments",
                "",
                "",
            ),
            (
                "PATCH",
                "/apis/apps/v1/namespaces/a/deployments/d/scale",
                "patch",
                "apps",
                "v1",
                "a",
                "deployments",
                "scale",
                "d",
            ),
            ("GET", "/apis/apps/v1", "get", "", "", "", "", "", ""),
            ("GET", "/apis/apps/v1/deployments", "list", "apps", "v1", "", "deployments", "", ""),
            ("GET", "/healthz", "get", "", "", "", "", "", ""),
        ];
        for (method, uri, verb, group, version, namespace, resource, subresource, name) in cases {
            let (path, query) = uri.split_once('?').map_or((uri, None), |(p, q)| (p, Some(q)));
            let info = RequestInfo::parse(&method.parse().unwrap(), path, &Query::parse(query));
            let got = [
                &info.verb,
                &info.group,
                &info.version,
                &info.namespace,
                &info.resource,
                &info.subresource,
                &info.name,
            ];
            assert_eq!(got, [verb, group, version, namespace, resource, subresource, name], "{uri}");
            assert_eq!(info.is_resource, !resource.is_empty(), "{uri}");
            assert_eq!(info.field_selector.is_empty(), !uri.contains("fieldSelector"), "{uri}");
        }
    }
}
