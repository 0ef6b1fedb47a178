//! What the servers of one cluster have in common: the datastore, the token, and the flags that must be equal.
//!
//! Upstream counterparts: k3sup's `install --datastore` and `join --server`. What stays true: TLS files go to the machine
//! with the configuration that names them, readable by root only; a server that joins is like the first in all that must
//! be equal, and the first is only read. Deliberate difference: k3sup joins servers by embedded etcd only.
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{ArgAction, ArgMatches, Command};
use sampan_fleet::Host;
use sampan_fleet::service::{DATASTORE, Role, Written};
use sampan_pki::{Credentials, JoinToken};
use serde_yaml_ng::Value;

use super::effective::Effective;
use super::node::{self, Wanted};
use super::{Unfit, Usage, access};

/// Where several servers keep the cluster.
#[derive(Clone, Default, clap::Args)]
#[command(next_help_heading = "Datastore")]
pub struct DatastoreFlags {
    /// etcd that keeps the cluster, http(s)://HOST:2379, several with commas; all servers share it
    #[arg(long, alias = "datastore-endpoint")]
    pub datastore: Option<String>,
    /// Certificate authority of that etcd; a file here, which is copied to the server, as the next two are
    #[arg(long)]
    pub datastore_cafile: Option<PathBuf>,
    /// Certificate that servers show it
    #[arg(long)]
    pub datastore_certfile: Option<PathBuf>,
    /// Key of that certificate
    #[arg(long)]
    pub datastore_keyfile: Option<PathBuf>,
}

/// The flags that name a file, and the file's place on a server.
const FILES: [(&str, &str); 3] = [
    ("datastore-cafile", "ca.crt"),
    ("datastore-certfile", "client.crt"),
    ("datastore-keyfile", "client.key"),
];
const ENDPOINT: &str = "datastore-endpoint";
/// Besides the datastore's, flags that must be equal on all servers.
const EQUAL: [&str; 8] = [
    "cluster-cidr",
    "service-cidr",
    "service-node-port-range",
    "cluster-dns",
    "cluster-domain",
    "embedded-registry",
    "https-listen-port",
    "disable",
];
pub const SEVERAL: &str = "servers run an etcd together with --cluster, or share one that is there: name it with \
     --datastore http://HOST:2379, and give --token; one server needs neither";
/// Where a server runs a member of its cluster's etcd.
const MEMBER: &str = "server/db/member.json";

impl DatastoreFlags {
    pub fn is_given(&self) -> bool {
        self.datastore.as_deref().is_some_and(|endpoint| !endpoint.is_empty())
    }

    /// Names and values, as they were given.
    pub fn given(&self) -> Vec<(&'static str, String)> {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let all = [
            ("datastore", self.datastore.clone()),
            ("datastore-cafile", path(&self.datastore_cafile)),
            ("datastore-certfile", path(&self.datastore_certfile)),
            ("datastore-keyfile", path(&self.datastore_keyfile)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Reads the files; `None` without the flag.
    pub fn read(&self) -> Result<Option<Datastore>> {
        let paths = [&self.datastore_cafile, &self.datastore_certfile, &self.datastore_keyfile];
        let Some(endpoint) = self.datastore.as_ref().filter(|_| self.is_given()) else {
            return match FILES.iter().zip(paths).find(|(_, path)| path.is_some()) {
                Some(((flag, _), _)) => {
                    Err(Usage(format!("--{flag} goes with --datastore, which is missing")).into())
                }
                None => Ok(None),
            };
        };
        let is_etcd = |one: &str| one.trim().starts_with("http://") || one.trim().starts_with("https://");
        if !endpoint.split(',').all(is_etcd) {
            let text =
                "--datastore: expected the etcd's http://HOST:2379 or https://HOST:2379, several with commas";
            return Err(Usage(text.to_string()).into());
        }
        let mut files = Vec::new();
        for ((flag, _), path) in FILES.into_iter().zip(paths) {
            let Some(path) = path.as_deref().map(access::expand) else { continue };
            let text = std::fs::read_to_string(&path);
            files.push((flag, text.with_context(|| format!("--{flag}: reading {}", path.display()))?));
        }
        Ok(Some(Datastore { endpoint: endpoint.clone(), files }))
    }
}

/// A datastore, as a server is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datastore {
    endpoint: String,
    /// Flag and content of its TLS files.
    files: Vec<(&'static str, String)>,
}

impl Datastore {
    /// Has a server use it.
    pub fn put(&self, wanted: &mut Wanted) {
        wanted.config.push((ENDPOINT.to_string(), self.endpoint.as_str().into()));
        for (flag, text) in &self.files {
            let Some((_, name)) = FILES.iter().find(|(known, _)| known == flag) else { continue };
            let path = format!("{DATASTORE}/{name}");
            wanted.config.push(((*flag).to_string(), path.as_str().into()));
            wanted.files.push(Written { path, mode: "600", text: text.clone() });
        }
    }
}

/// How a server that joins comes to the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entrance {
    /// Where the cluster is kept.
    Datastore(Datastore),
    /// URL of a server that runs an etcd member, as the new one is to.
    Members(String),
}

impl Entrance {
    fn put(&self, wanted: &mut Wanted) {
        match self {
            Self::Datastore(datastore) => datastore.put(wanted),
            Self::Members(url) => wanted.config.push(("server".to_string(), url.as_str().into())),
        }
    }
}

/// What a server that joins takes over from one that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Common {
    pub entrance: Entrance,
    pub token: String,
    pub equal: Vec<(String, Value)>,
}

impl Common {
    /// Has a server be of that cluster.
    pub fn put(&self, wanted: &mut Wanted) {
        wanted.config.push(("token".to_string(), self.token.as_str().into()));
        wanted.config.extend(self.equal.iter().cloned());
        self.entrance.put(wanted);
    }

    /// What the server on `host` was given, in its configuration or on its command line. `url` is where others reach its
    /// API on a port.
    pub async fn of_server(host: &Host, url: impl FnOnce(u16) -> String) -> Result<Self> {
        if !host.facts.services.contains(Role::Server.service()) {
            return Err(Unfit(format!("{}: no server is installed there", host.name)).into());
        }
        let running = Wanted {
            extra_args: node::running_args(host, Role::Server).await?,
            ..Wanted::nothing_new(Role::Server)
        };
        let effective = node::look(host, &running).await?;
        let text = |name: &str| {
            let found = effective.given.iter().find(|(given, _)| given == name);
            found.and_then(|(_, value)| value.as_str()).filter(|text| !text.is_empty())
        };
        let entrance = match text(ENDPOINT) {
            Some(endpoint) => {
                let mut files = Vec::new();
                for (flag, _) in FILES {
                    if let Some(path) = text(flag) {
                        files.push((flag, node::read_root(host, path).await?));
                    }
                }
                Entrance::Datastore(Datastore { endpoint: endpoint.to_string(), files })
            }
            None if is_member(host, &effective.data_dir).await? => Entrance::Members(url(effective.port)),
            None => {
                let text = format!(
                    "--server: {} keeps its cluster in SQLite, which no other server can share; several {SEVERAL} for the \
                     first, too",
                    host.name
                );
                return Err(Usage(text).into());
            }
        };
        let token = kept_token(host, &effective).await?;
        let token = token.with_context(|| format!("{}: the server has no token yet", host.name))?;
        let equal = effective.given.iter().filter(|(name, _)| EQUAL.contains(&name.as_str())).cloned();
        Ok(Self { entrance, token: servers_token(&token)?, equal: equal.collect() })
    }
}

/// Whether the server on `host` runs a member of its cluster's etcd.
pub async fn is_member(host: &Host, data_dir: &str) -> Result<bool> {
    let path = format!("{data_dir}/{MEMBER}");
    let said = host.root("looking for an etcd member", "[ ! -e \"$1\" ] || echo yes", &[&path]).await?;
    Ok(said.contains("yes"))
}

/// The token that a server has, or was given for its first start. The one that it has may be a later one.
pub async fn kept_token(host: &Host, effective: &Effective) -> Result<Option<String>> {
    let path = format!("{}/server/token", effective.data_dir);
    let kept = host.root("reading the token", "[ ! -e \"$1\" ] || cat \"$1\"", &[&path]).await?;
    if !kept.trim().is_empty() {
        return Ok(Some(kept.trim().to_string()));
    }
    let given = effective.given.iter().find(|(flag, _)| flag == "token");
    Ok(given.and_then(|(_, token)| token.as_str()).map(String::from))
}

/// The secret of a server's token or node-token, which servers are given.
pub fn servers_token(text: &str) -> Result<String> {
    let parsed = JoinToken::parse(text).map_err(|error| Usage(format!("the servers' token: {error}")))?;
    match parsed.credentials {
        Credentials::Secret { secret, .. } => Ok(secret),
        Credentials::Bootstrap(_) => {
            let text =
                "a token of `sampan token create` lets agents join, not servers: give the server's own";
            Err(Usage(text.to_string()).into())
        }
    }
}

/// The flags that were given on a command line (or in a configuration made one), not those of the environment here.
pub fn given(command: &Command, matches: &ArgMatches) -> Vec<(String, Value)> {
    use clap::parser::ValueSource;
    let mut all = Vec::new();
    for arg in command.get_arguments() {
        let (id, Some(name)) = (arg.get_id().as_str(), arg.get_long()) else { continue };
        if matches.value_source(id) != Some(ValueSource::CommandLine) {
            continue;
        }
        let values = matches.get_raw(id).into_iter().flatten();
        let mut values: Vec<Value> = values.map(|v| v.to_string_lossy().as_ref().into()).collect();
        let value = match arg.get_action() {
            ArgAction::SetTrue => Some(Value::Bool(true)),
            ArgAction::Append => Some(Value::Sequence(values)),
            _ => values.pop(),
        };
        all.extend(value.map(|value| (name.to_string(), value)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datastore_with_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| Some(folder.path().join(name));
        for name in ["a", "b", "c"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let mut flags = DatastoreFlags {
            datastore: Some("https://e1:2379,https://e2:2379".to_string()),
            datastore_cafile: at("a"),
            datastore_certfile: at("b"),
            datastore_keyfile: at("c"),
        };
        let mut wanted = Wanted::nothing_new(Role::Server);
        flags.read().unwrap().unwrap().put(&mut wanted);
        let config: Vec<String> =
            wanted.config.iter().map(|(k, v)| format!("{k}={}", v.as_str().unwrap())).collect();
        assert_eq!(
            config,
            [
                "datastore-endpoint=https://e1:2379,https://e2:2379",
                "datastore-cafile=/etc/sampan/datastore/ca.crt",
                "datastore-certfile=/etc/sampan/datastore/client.crt",
                "datastore-keyfile=/etc/sampan/datastore/client.key",
            ]
        );
        let files: Vec<_> = wanted.files.iter().map(|f| (f.path.as_str(), f.mode, f.text.as_str())).collect();
        assert_eq!(files[0], ("/etc/sampan/datastore/ca.crt", "600", "a"));
        assert_eq!(files.len(), 3);
        flags.datastore_cafile = at("missing");
        assert!(format!("{:#}", flags.read().unwrap_err()).contains("--datastore-cafile: reading"));
        flags.datastore = None;
        assert!(flags.read().unwrap_err().is::<Usage>());
        flags.datastore = Some("mysql://x".to_string());
        assert!(flags.read().unwrap_err().to_string().contains("expected the etcd's"));
        assert_eq!(DatastoreFlags::default().read().unwrap(), None);
    }

    #[test]
    fn a_token_for_servers() {
        let node_token = format!("K10{}::node:s3cret\n", "a".repeat(64));
        assert_eq!(servers_token(&node_token).unwrap(), "s3cret");
        assert_eq!(servers_token("plain").unwrap(), "plain");
        assert!(servers_token("abcdef.0123456789abcdef").unwrap_err().is::<Usage>());
        assert!(servers_token(" ").is_err());
    }
}
