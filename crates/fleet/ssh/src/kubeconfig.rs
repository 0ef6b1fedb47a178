//! The cluster's kubeconfig on the owner's machine: renamed, pointed at the server, merged into what is there.
//!
//! Upstream counterpart: k3sup's rewriteKubeconfig and mergeConfigs. Deliberate differences: names are set in the
//! structure rather than replaced in the text; merging needs no kubectl; a cluster that is installed again replaces its
//! old entries, since the old certificates are of no use.
use std::path::{Path, PathBuf};

use serde_yaml_ng::{Mapping, Value};

#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    #[error("{what} is no kubeconfig: {message}")]
    Format { what: String, message: String },
    #[error("{path}: {source}", path = path.display())]
    File { path: PathBuf, source: std::io::Error },
}

fn parse(what: &str, text: &str) -> Result<Mapping, KubeconfigError> {
    let bad = |message: String| KubeconfigError::Format { what: what.to_string(), message };
    match serde_yaml_ng::from_str(text) {
        Ok(Value::Mapping(map)) => Ok(map),
        Ok(Value::Null) => Ok(Mapping::new()),
        Ok(_) => Err(bad("it is another kind of YAML".to_string())),
        Err(error) => Err(bad(error.to_string())),
    }
}

fn print(map: &Mapping) -> Result<String, KubeconfigError> {
    serde_yaml_ng::to_string(map)
        .map_err(|e| KubeconfigError::Format { what: "the result".to_string(), message: e.to_string() })
}

/// The server's own kubeconfig for use from elsewhere: its one context, cluster and user called `context`.
pub fn rewrite(text: &str, host: &str, context: &str) -> Result<String, KubeconfigError> {
    let mut map = parse("the server's kubeconfig", text)?;
    let name = Value::from(context);
    for list in ["clusters", "users", "contexts"] {
        for entry in map.get_mut(list).and_then(Value::as_sequence_mut).into_iter().flatten() {
            if let Some(entry) = entry.as_mapping_mut() {
                entry.insert("name".into(), name.clone());
                if let Some(context) = entry.get_mut("context").and_then(Value::as_mapping_mut) {
                    context.insert("cluster".into(), name.clone());
                    context.insert("user".into(), name.clone());
                }
                if let Some(cluster) = entry.get_mut("cluster").and_then(Value::as_mapping_mut) {
                    let server = cluster.get("server").and_then(Value::as_str).unwrap_or_default();
                    let moved = with_host(server, host);
                    cluster.insert("server".into(), moved.into());
                }
            }
        }
    }
    map.insert("current-context".into(), name);
    print(&map)
}

/// Puts `host` for the loopback address of a URL.
fn with_host(server: &str, host: &str) -> String {
    let host =
        if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_string() };
    for own in ["127.0.0.1", "localhost", "[::1]"] {
        if let Some(rest) = server.strip_prefix("https://").and_then(|s| s.strip_prefix(own)) {
            return format!("https://{host}{rest}");
        }
    }
    server.to_string()
}

/// Both in one: entries of `new` replace those of the same name, the current context stays when there is one.
pub fn merge(there: &str, new: &str) -> Result<String, KubeconfigError> {
    let mut map = parse("the file to merge into", there)?;
    let new = parse("the new kubeconfig", new)?;
    for (key, value) in &new {
        let name = key.as_str().unwrap_or_default();
        match value {
            Value::Sequence(entries) if ["clusters", "users", "contexts"].contains(&name) => {
                if !matches!(map.get(key), Some(Value::Sequence(_))) {
                    map.insert(key.clone(), Value::Sequence(Vec::new()));
                }
                let Some(list) = map.get_mut(key).and_then(Value::as_sequence_mut) else { continue };
                for entry in entries {
                    match list.iter_mut().find(|old| old.get("name") == entry.get("name")) {
                        Some(old) => *old = entry.clone(),
                        None => list.push(entry.clone()),
                    }
                }
            }
            _ => {
                let unset = map.get(key).is_none_or(|v| v.is_null() || v.as_str() == Some(""));
                if unset {
                    map.insert(key.clone(), value.clone());
                }
            }
        }
    }
    print(&map)
}

/// Writes the kubeconfig, private to the owner; merged with what is there when `merging`.
pub fn save(path: &Path, new: &str, merging: bool) -> Result<(), KubeconfigError> {
    let failed = |source| KubeconfigError::File { path: path.to_path_buf(), source };
    let text = match std::fs::read_to_string(path) {
        Ok(there) if merging => merge(&there, new)?,
        Err(e) if merging && e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => new.to_string(),
    };
    if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    sampan_world::files::write_atomic(path, text.as_bytes(), 0o600).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "apiVersion: v1\nkind: Config\nclusters:\n- name: default\n  cluster: {server: 'https://127.0.0.1:6443', certificate-authority-data: ZGVmYXVsdA==}\n\
        users:\n- name: default\n  user: {client-key-data: MTI3LjAuMC4x}\ncontexts:\n- name: default\n  context: {cluster: default, user: default}\ncurrent-context: default\n";

    fn value(text: &str) -> Value {
        serde_yaml_ng::from_str(text).unwrap()
    }

    #[test]
    fn rewritten() {
        let text = value(&rewrite(OWN, "10.0.0.5", "home").unwrap());
        assert_eq!(text["clusters"][0]["cluster"]["server"], "https://10.0.0.5:6443");
        assert_eq!(text["clusters"][0]["cluster"]["certificate-authority-data"], "ZGVmYXVsdA==");
        assert_eq!(text["contexts"][0]["context"]["user"], "home");
        assert_eq!((&text["users"][0]["name"], &text["current-context"]), (&value("home"), &value("home")));
        for (server, host, want) in [
            ("https://127.0.0.1:6443", "fd00::1", "https://[fd00::1]:6443"),
            ("https://localhost:7443", "pi.lan", "https://pi.lan:7443"),
            ("https://10.0.0.9:6443", "pi.lan", "https://10.0.0.9:6443"),
        ] {
            assert_eq!(with_host(server, host), want);
        }
        assert!(rewrite("- a", "x", "y").is_err());
    }

    #[test]
    fn merged() {
        let home = rewrite(OWN, "10.0.0.5", "home").unwrap();
        let both = merge(&rewrite(OWN, "10.0.0.6", "work").unwrap(), &home).unwrap();
        let names = |text: &str, list: &str| -> Vec<String> {
            let all = value(text)[list].as_sequence().cloned().unwrap_or_default();
            all.iter().map(|e| e["name"].as_str().unwrap().to_string()).collect()
        };
        for list in ["clusters", "users", "contexts"] {
            assert_eq!(names(&both, list), ["work", "home"], "{list}");
        }
        assert_eq!(value(&both)["current-context"], "work");
        // installed again at another address: its entries are replaced
        let moved = merge(&both, &rewrite(OWN, "10.0.0.7", "home").unwrap()).unwrap();
        assert_eq!(names(&moved, "clusters"), ["work", "home"]);
        assert_eq!(value(&moved)["clusters"][1]["cluster"]["server"], "https://10.0.0.7:6443");
        assert_eq!(value(&merge("", &home).unwrap()), value(&home));
        assert!(merge("a: [", &home).is_err());
        let sparse =
            merge("apiVersion: v1\nkind: Config\nclusters: null\ncurrent-context: ''\n", &home).unwrap();
        assert_eq!(value(&sparse)["current-context"], "home");
    }
}
