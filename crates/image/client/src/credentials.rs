//! Credentials as `docker login` keeps them: `~/.docker/config.json` and the programs that it names.
//!
//! Upstream counterparts: docker/cli's `config/configfile` and `config/credentials`; docker-credential-helpers'
//! protocol (the registry's address on standard input, JSON on standard output). A registry in `credHelpers` is asked of
//! that helper, else `credsStore` is, else `auths` is read. Deliberate difference: an entry of `auths` may name a
//! repository's first parts too, as podman writes them; the longest that fits wins.
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use sampan_drivers::runtime::Auth;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex;

#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    #[error("{path}: {message}")]
    File { path: String, message: String },
    #[error("{path}: auths entry {key:?} is not base64 of user:password; log in to it again")]
    Entry { path: String, key: String },
    #[error("credentials of {registry}: docker-credential-{helper}: {source}; is it installed and in PATH?")]
    Missing { helper: String, registry: String, source: std::io::Error },
    #[error("credentials of {registry}: docker-credential-{helper}: {message}")]
    Helper { helper: String, registry: String, message: String },
}

/// How long a helper may take: it may ask its user for a password.
const HELPER_LIMIT: Duration = Duration::from_secs(60);
const ANSWER_MAX_BYTES: usize = 64 * 1024;
const HUB: [&str; 4] =
    ["https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io"];

/// Where credentials are looked up; each registry's are asked for once.
#[derive(Clone, Default)]
pub struct Keychain {
    file: Arc<ConfigFile>,
    found: Arc<Mutex<HashMap<String, Option<Auth>>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ConfigFile {
    #[serde(skip)]
    path: PathBuf,
    auths: BTreeMap<String, Entry>,
    #[serde(rename = "credsStore")]
    store: String,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

impl Keychain {
    /// `$DOCKER_CONFIG/config.json`, or `~/.docker/config.json`; none there is no error.
    pub fn from_home() -> Result<Keychain, CredentialError> {
        let folder = std::env::var_os("DOCKER_CONFIG").filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker"));
        match folder.or_else(home) {
            Some(folder) => Keychain::from_file(&folder.join("config.json")),
            None => Ok(Keychain::default()),
        }
    }

    pub fn from_file(path: &Path) -> Result<Keychain, CredentialError> {
        let failed = |message: String| CredentialError::File { path: path.display().to_string(), message };
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Keychain::default()),
            Err(e) => return Err(failed(e.to_string())),
        };
        let mut file: ConfigFile = serde_json::from_slice(&bytes).map_err(|e| failed(e.to_string()))?;
        file.path = path.to_path_buf();
        Ok(Keychain { file: Arc::new(file), found: Arc::default() })
    }

    /// What there is for a registry (`host[:port]`) and a repository of it.
    pub async fn auth(&self, host: &str, repository: &str) -> Result<Option<Auth>, CredentialError> {
        let names = if HUB.contains(&host) { HUB.to_vec() } else { vec![host] };
        let helper = names.iter().find_map(|n| self.file.helpers.get(*n)).filter(|h| !h.is_empty());
        let Some(helper) = helper.or((!self.file.store.is_empty()).then_some(&self.file.store)) else {
            return self.file.entry(&names, repository);
        };
        let mut found = self.found.lock().await;
        if let Some(known) = found.get(host) {
            return Ok(known.clone());
        }
        let registry = if HUB.contains(&host) { HUB[0] } else { host };
        let answer = match ask(helper, registry).await {
            // Docker Desktop leaves a credsStore behind; what needs no password still works, as docker has it.
            Err(error @ CredentialError::Missing { .. }) if *helper == self.file.store => {
                tracing::warn!(%error, "going on without credentials");
                None
            }
            other => other?,
        };
        found.insert(host.to_string(), answer.clone());
        Ok(answer)
    }
}

impl ConfigFile {
    fn entry(&self, names: &[&str], repository: &str) -> Result<Option<Auth>, CredentialError> {
        let mut best: Option<(usize, &String, &Entry)> = None;
        for (key, entry) in &self.auths {
            let bare = key.strip_prefix("https://").or(key.strip_prefix("http://")).unwrap_or(key);
            let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
            let path = path.trim_end_matches('/');
            // docker's old addresses carry the API's version
            let path = if path == "v1" || path == "v2" { "" } else { path };
            let fits = path.is_empty()
                || repository.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
            if names.contains(&host) && fits && best.is_none_or(|(length, ..)| path.len() >= length) {
                best = Some((path.len(), key, entry));
            }
        }
        let Some((_, key, entry)) = best else { return Ok(None) };
        let mut auth = Auth {
            username: entry.username.clone(),
            password: entry.password.clone(),
            identity_token: entry.identitytoken.clone(),
            registry_token: entry.registrytoken.clone(),
        };
        if !entry.auth.is_empty() {
            let decoded = base64::engine::general_purpose::STANDARD.decode(entry.auth.trim()).ok();
            let decoded = decoded.and_then(|d| String::from_utf8(d).ok());
            let Some((username, password)) = decoded.as_deref().and_then(|d| d.split_once(':')) else {
                return Err(CredentialError::Entry {
                    path: self.path.display().to_string(),
                    key: key.clone(),
                });
            };
            auth.username = username.to_string();
            auth.password = password.trim_end_matches('\0').to_string();
        }
        let empty = [&auth.username, &auth.identity_token, &auth.registry_token].iter().all(|t| t.is_empty());
        Ok((!empty).then_some(auth))
    }
}

/// `docker-credential-HELPER get`
async fn ask(helper: &str, registry: &str) -> Result<Option<Auth>, CredentialError> {
    let failed = |message: String| CredentialError::Helper {
        helper: helper.to_string(),
        registry: registry.to_string(),
        message,
    };
    if helper.contains('/') {
        return Err(failed("a helper's name is no path".into()));
    }
    let mut child = tokio::process::Command::new(format!("docker-credential-{helper}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| CredentialError::Missing {
            helper: helper.into(),
            registry: registry.into(),
            source,
        })?;
    if let Some(mut input) = child.stdin.take() {
        // A helper that doesn't read is judged by its answer.
        let _ = input.write_all(registry.as_bytes()).await;
    }
    let output = match tokio::time::timeout(HELPER_LIMIT, child.wait_with_output()).await {
        Ok(output) => output.map_err(|e| failed(e.to_string()))?,
        Err(_) => return Err(failed(format!("no answer within {} s", HELPER_LIMIT.as_secs()))),
    };
    let text = String::from_utf8_lossy(&output.stdout[..output.stdout.len().min(ANSWER_MAX_BYTES)]);
    if !output.status.success() {
        let none = ["credentials not found", "no credentials server URL"];
        return match none.iter().any(|n| text.contains(n)) {
            true => Ok(None),
            false => Err(failed(format!("{} ({})", text.trim(), output.status))),
        };
    }
    let answer: HelperAnswer = serde_json::from_str(&text).map_err(|e| failed(e.to_string()))?;
    if answer.secret.is_empty() && answer.username.is_empty() {
        return Ok(None);
    }
    Ok(Some(match answer.username.as_str() {
        "<token>" => Auth { identity_token: answer.secret, ..Auth::default() },
        _ => Auth { username: answer.username, password: answer.secret, ..Auth::default() },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn entries_are_found_as_docker_writes_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "aHViOnB3"},
            "r.example:5000": {"auth": "bWU6cGE6c3M="},
            "r.example:5000/team/": {"username": "team", "password": "x"},
            "https://old.example/v2/": {"identitytoken": "T"},
            "bad.example": {"auth": "%%"},
            "empty.example": {}
        }}"#;
        std::fs::write(file.path(), text).unwrap();
        let keys = Keychain::from_file(file.path()).unwrap();
        for (host, repository, wanted) in [
            ("registry-1.docker.io", "library/x", Some("hub:pw:")),
            ("r.example:5000", "a/b", Some("me:pa:ss:")),
            ("r.example:5000", "team/b", Some("team:x:")),
            ("r.example:5000", "teammates/b", Some("me:pa:ss:")),
            ("old.example", "x", Some("::T")),
            ("empty.example", "x", None),
            ("other.example", "x", None),
        ] {
            let got = keys.auth(host, repository).await.unwrap();
            let got = got.map(|a| format!("{}:{}:{}", a.username, a.password, a.identity_token));
            assert_eq!(got.as_deref(), wanted, "{host}/{repository}");
        }
        let error = keys.auth("bad.example", "x").await.unwrap_err().to_string();
        assert!(error.contains("bad.example") && error.contains("log in"), "{error}");
        std::fs::write(file.path(), "{").unwrap();
        assert!(Keychain::from_file(file.path()).is_err());
    }

    #[tokio::test]
    async fn a_missing_helper_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"credHelpers": {"r.example": "nowhere-to-be-found"}}"#).unwrap();
        let keys = Keychain::from_file(file.path()).unwrap();
        assert!(keys.auth("other.example", "x").await.unwrap().is_none());
        let error = keys.auth("r.example", "x").await.unwrap_err().to_string();
        assert!(error.contains("docker-credential-nowhere-to-be-found") && error.contains("PATH"), "{error}");
    }
}
