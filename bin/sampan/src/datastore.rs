//! Where a server's cluster is kept: SQLite in its data folder, or an etcd that several servers share.
//!
//! Upstream counterparts: K3s' `--datastore-endpoint` and its neighbours, pkg/cluster/storage.go. What stays true: a data
//! folder belongs to one cluster in one place. A server whose flags name another place than its folder does not start:
//! it would begin an empty cluster, and its node would end the pods that nobody there knows. Deliberately different from
//! K3s: SQLite and etcd only, and nothing is moved from one to the other. (Of an etcd that servers run themselves:
//! [`crate::members`].)
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sampan_store::{Etcd, Store};

/// Beside `db`, in the data folder's `server`: says that the cluster is in an etcd, and how it stood there.
pub const RECORD: &str = "datastore.json";
pub const SQLITE: &str = "db/state.db";
/// An etcd that does not answer is asked again for so long: machines that start together need not do so in order.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(clap::Args)]
#[command(next_help_heading = "Datastore")]
pub struct DatastoreArgs {
    /// etcd that keeps the cluster, http(s)://HOST:2379, several with commas; any number of servers with the same
    /// --token share it (default: SQLite in the data folder, for one server)
    #[arg(long, env = "SAMPAN_DATASTORE_ENDPOINT")]
    datastore_endpoint: Option<String>,
    /// Certificate authority of that etcd (PEM)
    #[arg(long, env = "SAMPAN_DATASTORE_CAFILE")]
    datastore_cafile: Option<PathBuf>,
    /// Certificate that this server shows it
    #[arg(long, env = "SAMPAN_DATASTORE_CERTFILE")]
    datastore_certfile: Option<PathBuf>,
    /// Key of that certificate
    #[arg(long, env = "SAMPAN_DATASTORE_KEYFILE")]
    datastore_keyfile: Option<PathBuf>,
}

/// An etcd, as the flags name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datastore {
    pub endpoints: Vec<String>,
    cafile: Option<PathBuf>,
    certfile: Option<PathBuf>,
    keyfile: Option<PathBuf>,
}

impl DatastoreArgs {
    /// What the flags say; `None` is SQLite.
    pub fn parse(&self) -> Result<Option<Datastore>> {
        let files = [
            ("--datastore-cafile", &self.datastore_cafile),
            ("--datastore-certfile", &self.datastore_certfile),
            ("--datastore-keyfile", &self.datastore_keyfile),
        ];
        let given = self.datastore_endpoint.as_deref().map(str::trim).filter(|text| !text.is_empty());
        let Some(text) = given else {
            if let Some((flag, _)) = files.iter().find(|(_, path)| path.is_some()) {
                bail!("{flag} goes with --datastore-endpoint, which is missing");
            }
            return Ok(None);
        };
        let endpoints = endpoints(text)?;
        if self.datastore_certfile.is_some() != self.datastore_keyfile.is_some() {
            bail!("--datastore-certfile and --datastore-keyfile go together, one is missing");
        }
        for (flag, path) in files {
            let Some(path) = path else { continue };
            if !endpoints.iter().all(|e| e.starts_with("https://")) {
                bail!("{flag} is for endpoints that begin with https://, not for {}", endpoints.join(","));
            }
            std::fs::File::open(path).with_context(|| format!("{flag} {}", path.display()))?;
        }
        Ok(Some(Datastore {
            endpoints,
            cafile: self.datastore_cafile.clone(),
            certfile: self.datastore_certfile.clone(),
            keyfile: self.datastore_keyfile.clone(),
        }))
    }
}

fn endpoints(text: &str) -> Result<Vec<String>> {
    const THERE_IS: &str = "etcd is what there is: http://HOST:2379 or https://HOST:2379, several with commas; without \
                            the flag the cluster is kept in SQLite in the data folder";
    let mut endpoints: Vec<String> = Vec::new();
    for one in text.split(',').map(str::trim).filter(|one| !one.is_empty()) {
        let scheme = one.split_once("://").map_or("", |(scheme, _)| scheme);
        let uri: Option<http::Uri> = one.parse().ok();
        let host = uri.as_ref().and_then(http::Uri::host).unwrap_or_default();
        let has_path = uri.as_ref().is_some_and(|uri| !matches!(uri.path(), "" | "/"));
        match scheme {
            "http" | "https" if !host.is_empty() && !has_path => {}
            "http" | "https" => bail!("--datastore-endpoint {one}: expected {scheme}://HOST:2379"),
            "mysql" | "postgres" | "postgresql" | "nats" | "sqlite" => {
                bail!("--datastore-endpoint: {scheme} is not there; {THERE_IS}")
            }
            _ => bail!("--datastore-endpoint {one}: {THERE_IS}"),
        }
        let one = one.trim_end_matches('/');
        if !endpoints.iter().any(|known| known == one) {
            endpoints.push(one.to_string());
        }
    }
    match endpoints.is_empty() {
        true => bail!("--datastore-endpoint names nothing: {THERE_IS}"),
        false => Ok(endpoints),
    }
}

/// Refuses a folder whose cluster is elsewhere than the flags say.
pub fn check_folder(folder: &Path, datastore: Option<&Datastore>) -> Result<()> {
    let (sqlite, record) = (folder.join(SQLITE), folder.join(RECORD));
    match datastore {
        Some(_) if sqlite.exists() => bail!(
            "{} holds a cluster already, and --datastore-endpoint would put this machine into another one: its pods would \
             end. Go on without the flag, or move that file away (with those beside it)",
            sqlite.display()
        ),
        None if record.exists() => bail!(
            "this server's cluster is in the datastore {}: give --datastore-endpoint. To begin an empty cluster in SQLite \
             instead, which ends this machine's pods, remove {}",
            recorded_endpoints(&record),
            record.display()
        ),
        _ => Ok(()),
    }
}

/// Where that record says that the cluster is; empty where there is none.
pub fn recorded_endpoints(record: &Path) -> String {
    let text = std::fs::read(record).unwrap_or_default();
    let value: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let all = value["endpoints"].as_array().into_iter().flatten().filter_map(|e| e.as_str());
    all.collect::<Vec<_>>().join(",")
}

impl Datastore {
    /// The etcd that a server runs itself.
    pub fn of_member(endpoint: &str, cafile: PathBuf, certfile: PathBuf, keyfile: PathBuf) -> Self {
        Self {
            endpoints: vec![endpoint.to_string()],
            cafile: Some(cafile),
            certfile: Some(certfile),
            keyfile: Some(keyfile),
        }
    }

    /// Connects, and waits for an etcd that does not answer yet.
    pub async fn connect(&self) -> Result<Store> {
        let etcd = Etcd {
            ca_file: self.cafile.clone(),
            cert_file: self.certfile.clone(),
            key_file: self.keyfile.clone(),
            connect_wait: PATIENCE,
            ..Etcd::new(self.endpoints.iter().cloned())
        };
        Ok(Store::connect(etcd).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(endpoint: Option<&str>, files: [Option<&str>; 3]) -> DatastoreArgs {
        let [ca, cert, key] = files.map(|path| path.map(PathBuf::from));
        DatastoreArgs {
            datastore_endpoint: endpoint.map(str::to_string),
            datastore_cafile: ca,
            datastore_certfile: cert,
            datastore_keyfile: key,
        }
    }

    #[test]
    fn what_the_flags_may_say() {
        let none = [None, None, None];
        assert_eq!(args(None, none).parse().unwrap(), None);
        let two = args(Some("http://a:2379, http://[fd00::1]:2379/,http://a:2379"), none).parse().unwrap();
        assert_eq!(two.unwrap().endpoints, ["http://a:2379", "http://[fd00::1]:2379"]);
        let here = "/proc/self/exe";
        assert!(args(Some("https://a:2379"), [Some(here); 3]).parse().unwrap().is_some());
        let refused = [
            (args(Some("mysql://u:p@tcp(h)/k"), none), "mysql is not there; etcd is what there is"),
            (args(Some("postgres://h/k"), none), "postgres is not there"),
            (args(Some("nats://h"), none), "nats is not there"),
            (args(Some("sqlite://x"), none), "in SQLite in the data folder"),
            (args(Some("a:2379"), none), "a:2379: etcd is what there is"),
            (args(Some("http://"), none), "expected http://HOST:2379"),
            (args(Some("http://a:2379/k3s"), none), "expected http://HOST:2379"),
            (args(Some(","), none), "names nothing"),
            (args(None, [Some(here), None, None]), "--datastore-cafile goes with --datastore-endpoint"),
            (args(Some("https://a"), [None, Some(here), None]), "go together"),
            (args(Some("http://a"), [Some(here), None, None]), "begin with https://"),
            (args(Some("https://a"), [Some("/nowhere/ca"), None, None]), "--datastore-cafile /nowhere/ca"),
        ];
        for (args, want) in refused {
            let error = format!("{:#}", args.parse().unwrap_err());
            assert!(error.contains(want), "{error} / {want}");
        }
    }

    #[test]
    fn a_folder_belongs_to_one_cluster() {
        let folder = tempfile::tempdir().unwrap();
        let datastore = args(Some("http://a:2379"), [None, None, None]).parse().unwrap();
        check_folder(folder.path(), None).unwrap();
        check_folder(folder.path(), datastore.as_ref()).unwrap();
        std::fs::create_dir(folder.path().join("db")).unwrap();
        std::fs::write(folder.path().join(SQLITE), "").unwrap();
        check_folder(folder.path(), None).unwrap();
        let error = check_folder(folder.path(), datastore.as_ref()).unwrap_err().to_string();
        assert!(error.contains("holds a cluster already"), "{error}");
        std::fs::remove_file(folder.path().join(SQLITE)).unwrap();
        std::fs::write(folder.path().join(RECORD), r#"{"endpoints":["http://a:2379"]}"#).unwrap();
        check_folder(folder.path(), datastore.as_ref()).unwrap();
        let error = check_folder(folder.path(), None).unwrap_err().to_string();
        assert!(error.contains("in the datastore http://a:2379: give --datastore-endpoint"), "{error}");
    }
}
