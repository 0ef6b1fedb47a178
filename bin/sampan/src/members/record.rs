//! What a data folder says of its etcd member, and whether that goes with the flags.
//!
//! Upstream counterpart: K3s' pkg/etcd (`IsInitialized`, the `name` file) and pkg/cluster/managed.go. What stays true: a
//! folder belongs to one cluster; what a member once was, a start without flags is again; flags that would begin or join
//! another cluster are refused before anything runs.
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sampan_world::files;
use serde::{Deserialize, Serialize};

use super::MemberArgs;
use crate::datastore::{Datastore, RECORD, SQLITE, recorded_endpoints};

pub const CLIENT_PORT: u16 = 2379;
pub const PEER_PORT: u16 = 2380;
/// Where a server finds its own member.
pub const LOCAL: &str = "https://127.0.0.1:2379";
const MEMBER: &str = "db/member.json";

/// How a server comes to have its member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// It makes the first one.
    First,
    /// It asks that server.
    Join(String),
    /// It has it.
    Again,
}

/// The file that outlives the process; it is written before the member is known to anybody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    pub address: IpAddr,
    /// Client URLs of the other members, as they were when last seen.
    #[serde(default)]
    pub others: Vec<String>,
}

impl Record {
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(MEMBER);
        match std::fs::read(&path) {
            Ok(text) => {
                let read = serde_json::from_slice(&text);
                read.map(Some).with_context(|| format!("{} cannot be read", path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    /// Writes it, where it is another one.
    pub fn write(&self, folder: &Path) -> Result<()> {
        if Self::read(folder).ok().flatten().as_ref() == Some(self) {
            return Ok(());
        }
        let path = folder.join(MEMBER);
        files::write_atomic(&path, &serde_json::to_vec(self)?, 0o600)
            .with_context(|| format!("writing {}", path.display()))
    }

    pub fn peer_url(&self) -> String {
        url(self.address, PEER_PORT)
    }

    pub fn client_url(&self) -> String {
        url(self.address, CLIENT_PORT)
    }
}

fn url(address: IpAddr, port: u16) -> String {
    format!("https://{}", std::net::SocketAddr::new(address, port))
}

/// The member's own data.
pub fn data(folder: &Path) -> PathBuf {
    folder.join("db/etcd")
}

/// Whether etcd has begun to be a member here.
pub fn has_begun(folder: &Path) -> bool {
    data(folder).join("member").exists()
}

/// What is to be done; `None`: this server has no member.
pub fn way(folder: &Path, args: &MemberArgs, datastore: Option<&Datastore>) -> Result<Option<Way>> {
    let (record, path) = (Record::read(folder)?, folder.join(RECORD));
    let asked = match (args.cluster_init, &args.server) {
        (true, Some(_)) => bail!(
            "--cluster-init begins a cluster, --server joins one: give one of them (a server that is a member already \
             needs neither)"
        ),
        (true, None) => Some(("--cluster-init", Way::First)),
        (false, Some(url)) => {
            crate::join::address_of(url)?;
            Some(("--server", Way::Join(url.clone())))
        }
        (false, None) => None,
    };
    if datastore.is_some() {
        if record.is_some() || has_begun(folder) {
            bail!(
                "this server is a member of its cluster's etcd ({}): leave --datastore-endpoint out",
                data(folder).display()
            );
        }
        if let Some((flag, _)) = asked {
            bail!("{flag} is for servers that run etcd themselves; it does not go with --datastore-endpoint");
        }
        return Ok(None);
    }
    if has_begun(folder) {
        return match record {
            Some(_) => Ok(Some(Way::Again)),
            None => bail!("{} has lost {MEMBER}: join again with an empty db folder", folder.display()),
        };
    }
    if let Some((flag, way)) = asked {
        if folder.join(SQLITE).exists() {
            bail!(
                "{} holds a cluster already, and {flag} would put this machine into another one: its pods would end. Go on \
                 without the flag, or move that file away (with those beside it)",
                folder.join(SQLITE).display()
            );
        }
        let known = recorded_endpoints(&path);
        let is_other = path.exists() && known != LOCAL;
        if is_other || (path.exists() && way == Way::First) {
            let place =
                if is_other { format!("in the datastore {known}") } else { "on etcd members".to_string() };
            bail!(
                "this server's cluster is {place}, and {flag} would put this machine into another one: its pods would end. \
                 If that is wanted, remove {}; to be a member again, give --server https://ANOTHER-SERVER:6443",
                path.display()
            );
        }
        return Ok(Some(way));
    }
    if record.is_some() || recorded_endpoints(&path) == LOCAL {
        bail!(
            "this server is to be a member of its cluster's etcd, and {} holds none: give --server \
             https://ANOTHER-SERVER:6443 and --token to join (again). To begin an empty cluster instead, which ends this \
             machine's pods, remove {} and {}",
            data(folder).display(),
            folder.join("db").display(),
            path.display()
        );
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(cluster_init: bool, server: Option<&str>) -> MemberArgs {
        MemberArgs { cluster_init, server: server.map(str::to_string), ..MemberArgs::default() }
    }

    #[test]
    fn a_folder_and_flags() {
        let url = "https://a:6443";
        let join = Way::Join(url.to_string());
        let (none, first, joining) = (args(false, None), args(true, None), args(false, Some(url)));
        // files in the folder, flags, and what comes of them
        let member = r#"{"name":"a","address":"10.0.0.1"}"#;
        let local = r#"{"endpoints":["https://127.0.0.1:2379"],"files":"x"}"#;
        let external = r#"{"endpoints":["http://e:2379"],"files":"x"}"#;
        let begun = || vec![(MEMBER, member), ("db/etcd/member/x", "")];
        let cases: Vec<(Vec<(&str, &str)>, &MemberArgs, Result<Option<Way>, &str>)> = vec![
            (vec![], &none, Ok(None)),
            (vec![], &first, Ok(Some(Way::First))),
            (vec![], &joining, Ok(Some(join.clone()))),
            (begun(), &none, Ok(Some(Way::Again))),
            (begun(), &first, Ok(Some(Way::Again))),
            (begun(), &joining, Ok(Some(Way::Again))),
            // a join that was broken off
            (vec![(MEMBER, member)], &joining, Ok(Some(join.clone()))),
            (vec![(MEMBER, member)], &none, Err("give --server https://ANOTHER-SERVER:6443")),
            (vec![("db/etcd/member/x", "")], &none, Err("has lost db/member.json")),
            // its db folder was emptied
            (vec![(RECORD, local)], &joining, Ok(Some(join))),
            (vec![(RECORD, local)], &first, Err("is on etcd members, and --cluster-init")),
            (vec![(RECORD, local)], &none, Err("give --server")),
            (vec![(RECORD, external)], &joining, Err("in the datastore http://e:2379, and --server")),
            (vec![(RECORD, external)], &none, Ok(None)),
            (vec![(SQLITE, "")], &first, Err("holds a cluster already, and --cluster-init")),
            (vec![(SQLITE, "")], &joining, Err("holds a cluster already, and --server")),
            (vec![(SQLITE, "")], &none, Ok(None)),
        ];
        for (there, args, want) in cases {
            let folder = tempfile::tempdir().unwrap();
            for (name, text) in &there {
                let path = folder.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            match (way(folder.path(), args, None), want) {
                (Ok(got), Ok(want)) => assert_eq!(got, want, "{there:?}"),
                (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{there:?}: {error}"),
                (got, want) => panic!("{there:?} {args:?}: {got:?}, not {want:?}"),
            }
        }
        assert!(way(Path::new("/none"), &args(true, Some(url)), None).is_err());
        assert!(way(Path::new("/none"), &args(false, Some("http://x")), None).is_err());
    }

    #[test]
    fn what_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("db")).unwrap();
        assert_eq!(Record::read(folder.path()).unwrap(), None);
        let address = "fd00::1".parse().unwrap();
        let record = Record { name: "a".to_string(), address, others: vec!["https://b:2379".to_string()] };
        record.write(folder.path()).unwrap();
        assert_eq!(Record::read(folder.path()).unwrap(), Some(record.clone()));
        assert_eq!(record.peer_url(), "https://[fd00::1]:2380");
        std::fs::write(folder.path().join(MEMBER), "{").unwrap();
        assert!(Record::read(folder.path()).is_err());
    }
}
