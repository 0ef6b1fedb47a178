//! pods/log, exec, attach and portforward: passed on to the kubelet of the pod's node.
//!
//! Upstream counterparts: pkg/registry/core/pod/rest/{log,subresources}.go, pkg/registry/core/pod/strategy.go.
use http::Response;
use sampan_drivers::Target;
use sampan_kinds::{ErrorList, FieldError, Path};
use serde_json::Value;

use crate::admit::{self, Operation};
use crate::body::{self, Body};
use crate::call::{Call, FieldValidation, WriteOptions};
use crate::proxy::{self, Destination};
use crate::query::Query;
use crate::reply;
use crate::rest::subresource::log_socket;
use crate::status::{Result, Status};
use crate::write::text;

pub async fn serve(call: &Call, body: Body) -> Result<Response<Body>> {
    let pod = call.present().await?.value(&call.resource.storage)?;
    let options = WriteOptions {
        dry_run: false,
        validation: FieldValidation::Ignore,
        manager: String::new(),
        force: None,
    };
    let subresource = call.info.subresource.as_str();
    if subresource != "log" {
        admit::validate(call, Operation::Connect, subresource, Some(&pod), None, &options).await?;
    }
    let (namespace, name) = (call.info.namespace.as_str(), call.info.name.as_str());
    let node = text(&pod, "/spec/nodeName");
    let path = match subresource {
        "log" => {
            let container = container(&pod, call.query.get("container"))?;
            let query = log_query(call)?;
            if node.is_empty() {
                return match log_socket::is_wanted(&call.parts.headers) {
                    true => log_socket::answer(call, reply::text(200, "")),
                    false => Ok(reply::text(200, "")),
                };
            }
            with_query(format!("/containerLogs/{namespace}/{name}/{container}"), &query)
        }
        "portforward" => with_query(format!("/portForward/{namespace}/{name}"), &stream_query(call)),
        verb => {
            let container = container(&pod, call.query.get("container"))?;
            with_query(format!("/{verb}/{namespace}/{name}/{container}"), &stream_query(call))
        }
    };
    if node.is_empty() {
        return Err(Status::bad_request(format!("pod {name} does not have a host assigned")));
    }
    let (node, target) = (node.to_string(), Target::Kubelet);
    let to = Destination { host: node.clone(), node, target, path, tls: false, prefix: None };
    if subresource != "log" {
        return proxy::forward(call, to, body).await;
    }
    let wants_socket = log_socket::is_wanted(&call.parts.headers);
    let log = proxy::forward(call, to, body::empty()).await?;
    if wants_socket { log_socket::answer(call, log) } else { Ok(log) }
}

fn with_query(path: String, query: &str) -> String {
    if query.is_empty() { path } else { format!("{path}?{query}") }
}

/// The container that is meant: the one that is named, else the only one, else the default one's annotation.
fn container<'a>(pod: &'a Value, named: &'a str) -> Result<&'a str> {
    let name = text(pod, "/metadata/name");
    let names = |list: &str| -> Vec<&'a str> {
        let list = pod.pointer(&format!("/spec/{list}")).and_then(Value::as_array).into_iter().flatten();
        list.filter_map(|container| container.get("name")?.as_str()).collect()
    };
    let main = names("containers");
    let all: Vec<&str> =
        names("initContainers").into_iter().chain(main.clone()).chain(names("ephemeralContainers")).collect();
    if !named.is_empty() {
        return match all.contains(&named) {
            true => Ok(named),
            false => Err(Status::bad_request(format!("container {named} is not valid for pod {name}"))),
        };
    }
    match main.as_slice() {
        [only] => Ok(only),
        [] => Err(Status::bad_request(format!("a container name must be specified for pod {name}"))),
        _ => Err(Status::bad_request(format!(
            "a container name must be specified for pod {name}, choose one of: [{}]",
            all.join(" ")
        ))),
    }
}

/// The log's options, checked, as the kubelet takes them.
fn log_query(call: &Call) -> Result<String> {
    let query = &call.query;
    let mut errors = ErrorList::new();
    let negative = "must be greater than or equal to 0";
    for (field, least, why) in [
        ("tailLines", 0, negative),
        ("limitBytes", 1, "must be greater than 0"),
        ("sinceSeconds", 1, "must be greater than 0"),
    ] {
        if let Some(value) = query.integer(field)?.filter(|value| *value < least) {
            errors.push(FieldError::invalid(&Path::new(field), value, why));
        }
    }
    if query.has("sinceSeconds") && query.has("sinceTime") {
        let detail = "at most one of `sinceTime` or `sinceSeconds` may be specified";
        errors.push(FieldError::forbidden(&Path::new(""), detail));
    }
    let stream = query.get("stream");
    if !matches!(stream, "" | "All" | "Stdout" | "Stderr") {
        let supported = ["All", "Stderr", "Stdout"];
        errors.push(FieldError::not_supported(&Path::new("stream"), stream, &supported));
    } else if matches!(stream, "Stdout" | "Stderr") && query.has("tailLines") {
        let detail = "`tailLines` and specific `stream` are mutually exclusive for now";
        errors.push(FieldError::forbidden(&Path::new(""), detail));
    }
    if !errors.is_empty() {
        return Err(Status::invalid("", "PodLogOptions", &call.info.name, &errors));
    }
    let known = ["tailLines", "limitBytes", "sinceSeconds", "sinceTime", "stream"];
    let mut pairs: Vec<(&str, &str)> =
        query.pairs().filter(|(field, value)| known.contains(field) && !value.is_empty()).collect();
    for flag in ["follow", "previous", "timestamps"] {
        if query.flag(flag) {
            pairs.push((flag, "true"));
        }
    }
    Ok(Query::encode(pairs))
}

/// The options of exec, attach and port-forward, in the kubelet's names.
fn stream_query(call: &Call) -> String {
    let query = &call.query;
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    if call.info.subresource == "portforward" {
        pairs.extend(query.all("ports").map(|port| ("port", port)));
        return Query::encode(pairs);
    }
    let defaults_on = |name: &str| query.optional_flag(name).unwrap_or(false);
    for (ours, kubelets) in [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")] {
        if defaults_on(ours) {
            pairs.push((kubelets, "1"));
        }
    }
    pairs.extend(query.all("command").map(|word| ("command", word)));
    Query::encode(pairs)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn containers_are_chosen_as_upstream_does() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {
            "containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]}});
        assert_eq!(container(&pod, "i").unwrap(), "i");
        let message = |named| container(&pod, named).unwrap_err().0.message;
        assert_eq!(message("x"), "container x is not valid for pod p");
        assert_eq!(message(""), "a container name must be specified for pod p, choose one of: [i a b]");
    }
}
