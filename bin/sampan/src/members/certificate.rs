//! What an etcd member proves itself with: one certificate, for its clients and for the other members, of an authority
//! that is etcd's own.
//!
//! Upstream counterpart: K3s' pkg/daemons/control/deps (etcd's certificates). What stays true: nobody speaks to etcd who
//! has no certificate of that authority, which signs for members only; etcd reads the files with every handshake, so a
//! renewed one needs no restart. Deliberately different: one authority for clients and peers, and one certificate for all
//! three uses, as whoever may be a client may write everything anyway.
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sampan_pki::{Authority, Pair};
use sampan_store::Etcd;
use sampan_world::files::write_atomic;

use crate::bootstrap_data::EtcdAuthority;
use crate::certificate::files::{self, Kept};
use crate::certificate::server;

const STEM: &str = "member";
const AUTHORITY: &str = "server-ca.crt";
const AUTHORITY_KEY: &str = "server-ca.key";

/// The files below `<data-dir>/server/tls/etcd`.
pub struct Files(PathBuf);

impl Files {
    /// Of that `<data-dir>/server`.
    pub fn of(server: &Path) -> Self {
        Self(server.join("tls/etcd"))
    }

    pub fn folder(&self) -> &Path {
        &self.0
    }

    pub fn authority(&self) -> PathBuf {
        self.0.join(AUTHORITY)
    }

    pub fn certificate(&self) -> PathBuf {
        self.0.join(STEM).with_extension("crt")
    }

    pub fn key(&self) -> PathBuf {
        self.0.join(STEM).with_extension("key")
    }

    /// etcd at those endpoints, as this member reaches it.
    pub fn etcd(&self, endpoints: &[String]) -> Etcd {
        Etcd {
            ca_file: Some(self.authority()),
            cert_file: Some(self.certificate()),
            key_file: Some(self.key()),
            ..Etcd::new(endpoints.iter().cloned())
        }
    }

    /// The authority in these files, for who joins.
    pub fn shared(&self) -> Result<EtcdAuthority> {
        let read = |name: &str| {
            let path = self.0.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        Ok(EtcdAuthority { certificate: read(AUTHORITY)?, key: read(AUTHORITY_KEY)? })
    }

    /// Puts the cluster's authority in place.
    pub fn take(&self, authority: &EtcdAuthority) -> Result<()> {
        Authority::from_pem(&authority.certificate, &authority.key, "the authority of etcd's members")?;
        for (name, text, mode) in
            [(AUTHORITY_KEY, &authority.key, 0o600), (AUTHORITY, &authority.certificate, 0o644)]
        {
            let path = self.0.join(name);
            if std::fs::read_to_string(&path).ok().as_ref() != Some(text) {
                write_atomic(&path, text.as_bytes(), mode)
                    .with_context(|| format!("writing {}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// Makes the member's certificate, and makes it anew.
pub struct MemberCertificate {
    files: Files,
    authority: Authority,
    name: String,
    names: Vec<String>,
}

impl MemberCertificate {
    /// With the authority in `files`; a new one only where `may_begin`.
    pub fn open(
        files: Files,
        name: &str,
        address: IpAddr,
        may_begin: bool,
        lifetime_seconds: i64,
    ) -> Result<Self> {
        if !may_begin && !files.0.join(AUTHORITY_KEY).exists() {
            bail!(
                "{} is gone, without which nobody reaches this server's etcd: restore it from another server's folder, or \
                 empty the db folder and join again with --server",
                files.0.join(AUTHORITY_KEY).display()
            );
        }
        let authority = Authority::load_or_create(&files.0).context("the authority of etcd's members")?;
        let names = ["127.0.0.1", "localhost", name].map(str::to_string);
        let names = server::names(names.into_iter().chain([address.to_string()]));
        let authority = authority.with_lifetime(lifetime_seconds);
        Ok(Self { files, authority, name: name.to_string(), names })
    }

    pub fn files(&self) -> &Files {
        &self.files
    }

    pub fn kept(&self) -> Kept {
        Kept::new(files::ETCD, &self.files.0, STEM)
    }

    /// The certificate as it is, or a new one where that is due; whether it is new.
    pub fn renewed(&self) -> Result<(Pair, bool)> {
        let make = || self.authority.peer(&self.name, &self.names);
        server::renewed(&self.kept(), &self.authority, |have| have == self.names, make)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_joins_gets_the_same_authority() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let address = "10.0.0.1".parse().unwrap();
        let open = |folder: &Path, may_begin| {
            MemberCertificate::open(Files::of(folder), "a", address, may_begin, 86_400)
        };
        let error = open(two.path(), false).err().unwrap().to_string();
        assert!(error.contains("server-ca.key is gone"), "{error}");
        let first = open(one.path(), true).unwrap();
        assert!(first.renewed().unwrap().1 && !first.renewed().unwrap().1);
        std::fs::create_dir_all(Files::of(two.path()).folder()).unwrap();
        Files::of(two.path()).take(&first.files.shared().unwrap()).unwrap();
        let second = open(two.path(), false).unwrap();
        let (pair, _) = second.renewed().unwrap();
        assert!(first.authority.has_signed(&pair.certificates().unwrap()[0]));
        let told = sampan_pki::certificate::details(&pair.certificates().unwrap()[0]).unwrap();
        assert_eq!(told.usages, ["ClientAuth", "ServerAuth"]);
        assert_eq!(pair.subject().unwrap().names, ["10.0.0.1", "127.0.0.1", "a", "localhost"]);
        let other = EtcdAuthority { certificate: "x".to_string(), key: "y".to_string() };
        assert!(Files::of(two.path()).take(&other).is_err());
    }
}
