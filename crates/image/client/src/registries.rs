//! registries.yaml: mirrors, credentials and TLS per registry.
//!
//! Upstream counterpart: K3s' `/etc/rancher/k3s/registries.yaml` (github.com/rancher/wharfie), same keys, same meaning:
//! a registry's endpoints are tried in order, then the registry itself; `*` stands for every registry (mirrors) or
//! host (configs) that isn't listed; `rewrite` changes the repository, for mirrors only.
use std::collections::BTreeMap;
use std::path::PathBuf;

use base64::Engine;
use regex::Regex;
use sampan_drivers::runtime::Auth;
use serde::Deserialize;

use crate::reference::{Reference, is_registry};

#[derive(Debug, thiserror::Error)]
pub enum RegistriesError {
    #[error("registries.yaml: {0}")]
    Syntax(#[from] serde_yaml_ng::Error),
    #[error("registries.yaml: rewrite {pattern:?} of mirror {mirror}: {message}")]
    Rewrite { mirror: String, pattern: String, message: String },
    #[error("registries.yaml: endpoint {endpoint:?} of mirror {mirror} is no http or https URL")]
    Endpoint { mirror: String, endpoint: String },
    #[error(
        "registries.yaml: {name:?} below mirrors is no registry's name; expected HOST, HOST:PORT or \"*\""
    )]
    Name { name: String },
    #[error("registries.yaml: unknown key {key:?}; expected mirrors and configs")]
    Key { key: String },
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Registries {
    mirrors: BTreeMap<String, Option<Mirror>>,
    configs: BTreeMap<String, Option<HostConfig>>,
    /// Whatever else stands there: a misspelt key would turn mirrors off without a word.
    #[serde(flatten)]
    rest: BTreeMap<String, serde_yaml_ng::Value>,
    /// Registries may be spoken to in plain HTTP, or with any certificate.
    #[serde(skip)]
    insecure: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Mirror {
    #[serde(alias = "endpoints")]
    endpoint: Vec<String>,
    #[serde(alias = "rewrites")]
    rewrite: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct HostConfig {
    auth: Option<AuthConfig>,
    tls: Option<Tls>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct AuthConfig {
    username: String,
    password: String,
    /// base64 of `username:password`
    auth: String,
    #[serde(alias = "identitytoken")]
    identity_token: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Tls {
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    pub insecure_skip_verify: bool,
}

/// One place to ask for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `https://host[:port]/v2`, without a slash at the end.
    pub url: String,
    /// `host[:port]`, the key of `configs`.
    pub host: String,
    pub repository: String,
    /// The registry that a mirror stands in for, sent as `?ns=`; `None` for the registry itself.
    pub mirror_of: Option<String>,
}

impl Registries {
    pub fn parse(yaml: &str) -> Result<Registries, RegistriesError> {
        if yaml.trim().is_empty() {
            return Ok(Registries::default());
        }
        let mut registries: Registries = serde_yaml_ng::from_str(yaml)?;
        // `auths` is K3s' older form of `configs`, which it reads no more
        if let Some(key) = std::mem::take(&mut registries.rest).into_keys().find(|key| key != "auths") {
            return Err(RegistriesError::Key { key });
        }
        for (name, mirror) in &registries.mirrors {
            if name != "*" && !is_registry(name) {
                return Err(RegistriesError::Name { name: name.clone() });
            }
            let Some(mirror) = mirror else { continue };
            for pattern in mirror.rewrite.keys() {
                Regex::new(pattern).map_err(|e| RegistriesError::Rewrite {
                    mirror: name.clone(),
                    pattern: pattern.clone(),
                    message: e.to_string(),
                })?;
            }
            if let Some(endpoint) = mirror.endpoint.iter().find(|e| split_endpoint(e, "").is_none()) {
                return Err(RegistriesError::Endpoint { mirror: name.clone(), endpoint: endpoint.clone() });
            }
        }
        Ok(registries)
    }

    /// Whether nodes hand each other images of this registry: `mirrors` lists it, with endpoints or without. What is
    /// on the loopback is another registry on each node.
    pub fn shares(&self, registry: &str) -> bool {
        let listed = self.mirrors.contains_key(registry) || self.mirrors.contains_key("*");
        listed && !is_loopback(registry)
    }

    pub fn shares_any(&self) -> bool {
        self.mirrors.keys().any(|registry| !is_loopback(registry))
    }

    /// `--insecure`: registries that are reached by no other way are reached without TLS or its verification.
    pub fn allow_insecure(mut self) -> Registries {
        self.insecure = true;
        self
    }

    /// Where `reference` is pushed to: the registry itself, never one of its mirrors.
    pub fn own_endpoints(&self, reference: &Reference) -> Vec<Endpoint> {
        let mut endpoints = self.endpoints(reference);
        endpoints.retain(|e| e.mirror_of.is_none());
        endpoints
    }

    /// Where to ask for `reference`, in order.
    pub fn endpoints(&self, reference: &Reference) -> Vec<Endpoint> {
        let registry = reference.registry.as_str();
        let mirror = self.mirrors.get(registry).or_else(|| self.mirrors.get("*")).and_then(Option::as_ref);
        let mut endpoints = Vec::new();
        if let Some(mirror) = mirror {
            let repository = rewrite(&mirror.rewrite, &reference.repository);
            for endpoint in &mirror.endpoint {
                let Some((url, host)) = split_endpoint(endpoint, registry) else { continue };
                let repository = repository.clone();
                endpoints.push(Endpoint { url, host, repository, mirror_of: Some(registry.to_string()) });
            }
        }
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        let own = Endpoint {
            url: format!("{}://{host}/v2", if is_loopback(host) { "http" } else { "https" }),
            host: host.to_string(),
            repository: reference.repository.clone(),
            mirror_of: None,
        };
        // A mirror entry may name the registry itself, for another scheme: then that is how it is reached.
        match endpoints.iter_mut().find(|e| e.host == own.host && e.repository == own.repository) {
            Some(same) => same.mirror_of = None,
            None => {
                let other = if own.url.starts_with("https") { "http" } else { "https" };
                let other = Endpoint { url: format!("{other}://{host}/v2"), ..own.clone() };
                endpoints.push(own);
                endpoints.extend(self.insecure.then_some(other));
            }
        }
        endpoints
    }

    fn config(&self, host: &str) -> Option<&HostConfig> {
        let alias = if host == "registry-1.docker.io" { "docker.io" } else { host };
        let found =
            self.configs.get(host).or_else(|| self.configs.get(alias)).or_else(|| self.configs.get("*"));
        found.and_then(Option::as_ref)
    }

    pub fn tls(&self, host: &str) -> Option<Tls> {
        let tls = self.config(host).and_then(|c| c.tls.clone());
        match self.insecure {
            true => Some(Tls { insecure_skip_verify: true, ..tls.unwrap_or_default() }),
            false => tls,
        }
    }

    pub fn auth(&self, host: &str) -> Option<Auth> {
        let config = self.config(host)?.auth.as_ref()?;
        let mut auth = Auth {
            username: config.username.clone(),
            password: config.password.clone(),
            identity_token: config.identity_token.clone(),
            registry_token: String::new(),
        };
        if auth.username.is_empty() && !config.auth.is_empty() {
            let decoded = base64::engine::general_purpose::STANDARD.decode(config.auth.trim()).ok()?;
            let decoded = String::from_utf8(decoded).ok()?;
            let (username, password) = decoded.split_once(':')?;
            auth.username = username.to_string();
            auth.password = password.trim_end_matches('\0').to_string();
        }
        Some(auth)
    }
}

fn rewrite(rules: &BTreeMap<String, String>, repository: &str) -> String {
    for (pattern, replacement) in rules {
        if let Ok(regex) = Regex::new(pattern)
            && regex.is_match(repository)
        {
            return regex.replace_all(repository, replacement.as_str()).into_owned();
        }
    }
    repository.to_string()
}

fn is_loopback(host: &str) -> bool {
    let name = if host.starts_with('[') { host } else { host.split(':').next().unwrap_or(host) };
    name == "localhost"
        || name.starts_with("[::1]")
        || name.parse::<std::net::Ipv4Addr>().is_ok_and(|a| a.is_loopback())
}

/// `(URL of the API's root, host)`; a path in the endpoint replaces `/v2`.
fn split_endpoint(endpoint: &str, registry: &str) -> Option<(String, String)> {
    let endpoint = endpoint.replace("$registry", registry);
    let (scheme, rest) = match endpoint.split_once("://") {
        Some((scheme, rest)) if scheme == "http" || scheme == "https" => {
            (scheme.to_string(), rest.to_string())
        }
        Some(_) => return None,
        None => {
            let host = endpoint.split('/').next().unwrap_or("");
            ((if is_loopback(host) { "http" } else { "https" }).to_string(), endpoint.clone())
        }
    };
    let (host, path) = rest.split_once('/').unwrap_or((rest.as_str(), ""));
    let path = path.trim_end_matches('/');
    if host.is_empty() || host.contains(char::is_whitespace) {
        return None;
    }
    let path = if path.is_empty() { "v2" } else { path };
    Some((format!("{scheme}://{host}/{path}"), host.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
mirrors:
  docker.io:
    endpoint: ["https://mirror.example:5000", "http://10.0.0.1/v2/hub/"]
    rewrite: {"^library/(.*)": "hub/$1"}
  plain.example:
    endpoint: ["http://plain.example"]
  "*":
    endpoint: ["http://all.example"]
configs:
  "mirror.example:5000":
    auth: {username: me, password: secret}
    tls: {ca_file: /ca.pem, insecure_skip_verify: true}
  docker.io:
    auth: {auth: bWU6cGFzcw==}
"#;

    #[test]
    fn endpoints_follow_the_file() {
        let registries = Registries::parse(FILE).unwrap();
        let urls = |image: &str| -> Vec<String> {
            let endpoints = registries.endpoints(&Reference::parse(image).unwrap());
            endpoints
                .iter()
                .map(|e| {
                    format!("{}/{}{}", e.url, e.repository, e.mirror_of.as_ref().map_or("", |_| " mirror"))
                })
                .collect()
        };
        assert_eq!(
            urls("busybox"),
            [
                "https://mirror.example:5000/v2/hub/busybox mirror",
                "http://10.0.0.1/v2/hub/hub/busybox mirror",
                "https://registry-1.docker.io/v2/library/busybox",
            ]
        );
        assert_eq!(urls("plain.example/x"), ["http://plain.example/v2/x"]);
        assert_eq!(urls("quay.io/x/y"), ["http://all.example/v2/x/y mirror", "https://quay.io/v2/x/y"]);
        assert_eq!(registries.auth("mirror.example:5000").unwrap().password, "secret");
        assert_eq!(registries.auth("registry-1.docker.io").unwrap().password, "pass");
        assert!(registries.tls("mirror.example:5000").unwrap().insecure_skip_verify);
        assert!(registries.auth("quay.io").is_none());
        let none = Registries::parse("").unwrap();
        assert_eq!(
            none.endpoints(&Reference::parse("localhost:5000/x").unwrap())[0].url,
            "http://localhost:5000/v2"
        );
        assert!(Registries::parse("mirrors: {a: {rewrite: {'(': x}}}").is_err());
        assert!(Registries::parse("mirrors: {a: {endpoint: ['ftp://x']}}").is_err());
    }

    #[test]
    fn what_is_listed_is_shared() {
        let shared = |yaml: &str, registry: &str| Registries::parse(yaml).unwrap().shares(registry);
        for (yaml, registry, wanted) in [
            ("mirrors: {docker.io: , ghcr.io: {}}", "docker.io", true),
            ("mirrors: {docker.io: , ghcr.io: {}}", "ghcr.io", true),
            ("mirrors: {docker.io: }", "quay.io", false),
            ("mirrors: {'*': }", "quay.io", true),
            ("mirrors: {'*': }", "localhost:5000", false),
            ("mirrors: {'r.example:5000': {endpoint: ['http://r.example:5000']}}", "r.example:5000", true),
            ("configs: {docker.io: {}}", "docker.io", false),
        ] {
            assert_eq!(shared(yaml, registry), wanted, "{yaml} {registry}");
        }
        assert!(!Registries::default().shares_any() && Registries::parse(FILE).unwrap().shares_any());
        for (bad, told) in [
            ("mirrors: {'https://docker.io': {}}", "https://docker.io"),
            ("mirrors: {'docker.io/library': {}}", "docker.io/library"),
            ("mirror: {docker.io: {}}", "unknown key \"mirror\""),
            ("mirrors: [docker.io]", "registries.yaml"),
            ("mirrors: {docker.io: [x]}", "registries.yaml"),
            ("mirrors:\n  docker.io:\n bad", "registries.yaml"),
        ] {
            let error = Registries::parse(bad).unwrap_err().to_string();
            assert!(error.contains(told), "{bad}: {error}");
        }
    }
}
