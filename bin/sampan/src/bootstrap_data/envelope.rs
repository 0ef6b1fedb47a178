//! What lies in the datastore for all servers: the cluster's keys and settings, sealed with the token.
//!
//! Upstream counterpart: K3s' pkg/bootstrap and pkg/cluster/encrypt.go. What stays true: who has not the token sees nothing
//! of it and cannot change it unseen; what an earlier version wrote can be read.
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::Timestamp;
use sampan_pki::sealed::{self, SealError};
use sampan_pki::{Authority, ServiceAccountKey, rotation};
use sampan_world::{clock, random};
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;
/// A server that was away for longer has to be given the new token.
pub(super) const HANDOVER_S: i64 = 3600;

/// The files that all servers have in common; PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Files {
    pub(super) authority: String,
    authority_key: String,
    account_keys: String,
}

/// Settings that must be equal, by their flags.
pub type Settings = BTreeMap<String, String>;

/// What is sealed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shared {
    #[serde(flatten)]
    pub(super) files: Files,
    pub(super) settings: Settings,
    /// Where the servers run etcd themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) etcd: Option<EtcdAuthority>,
}

/// The authority of etcd's members and their clients, PEM. It stays the same for as long as the cluster lives.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EtcdAuthority {
    pub certificate: String,
    pub key: String,
}

/// What lies in the datastore.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Envelope {
    pub(super) version: u32,
    pub(super) sealed: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) handover: Option<Handover>,
}

/// The token that sealed it, sealed with the one before.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Handover {
    pub(super) since: Timestamp,
    sealed: String,
}

impl Files {
    /// Those in `tls`; `None` unless all are there.
    pub(super) fn read(tls: &Path) -> Result<Option<Self>> {
        let mut texts = Vec::new();
        for name in ["server-ca.crt", "server-ca.key", "service-account.key"] {
            match std::fs::read_to_string(tls.join(name)) {
                Ok(text) => texts.push(text),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error).with_context(|| tls.join(name).display().to_string()),
            }
        }
        let mut texts = texts.into_iter();
        let (Some(authority), Some(authority_key), Some(account_keys)) =
            (texts.next(), texts.next(), texts.next())
        else {
            return Ok(None);
        };
        Ok(Some(Self { authority, authority_key, account_keys }))
    }

    /// New ones, which nobody uses yet.
    pub(super) fn make(tls: &Path) -> Result<Self> {
        let folder = tls.join(format!(".first-{}", random::suffix(8)));
        let made = (|| {
            Authority::load_or_create(&folder)?;
            ServiceAccountKey::load_or_create(&folder.join("service-account.key"))?;
            Self::read(&folder)?.context("the cluster's new keys are gone")
        })();
        let _ = std::fs::remove_dir_all(&folder);
        made
    }

    /// Puts them in place; what was there is kept beside `tls`.
    pub(super) fn install(&self, tls: &Path) -> Result<()> {
        // nothing that cannot be used is put in place
        Authority::from_pem(&self.authority, &self.authority_key, "the datastore's certificate authority")?;
        let replacement = rotation::Replacement {
            authority: Some((self.authority.clone(), self.authority_key.clone())),
            account_keys: Some(self.account_keys.clone()),
        };
        replacement.stage(tls)?;
        if let Some(backup) = rotation::install(tls, clock::now())? {
            // empty where there was nothing
            let _ = std::fs::remove_dir(backup);
        }
        Ok(())
    }

    pub(super) fn digest(&self) -> String {
        let all = [&self.authority, &self.authority_key, &self.account_keys];
        let digests: String = all.map(|text| sampan_pki::sha256_hex(text.as_bytes())).concat();
        sampan_pki::sha256_hex(digests.as_bytes())
    }
}

impl Envelope {
    pub(super) fn seal(token: &str, shared: &Shared, handover: Option<Handover>) -> Result<Self> {
        let sealed = BASE64.encode(sealed::seal(token, &serde_json::to_vec(shared)?)?);
        Ok(Self { version: VERSION, sealed, handover })
    }

    pub(super) fn read(bytes: &[u8]) -> Result<Self> {
        let wrong = "the datastore's bootstrap data cannot be read";
        let envelope: Self = serde_json::from_slice(bytes).context(wrong)?;
        if envelope.version != VERSION {
            bail!("{wrong}: it is of version {}; this program knows {VERSION}", envelope.version);
        }
        Ok(envelope)
    }

    /// `None` when the token is another.
    pub(super) fn open(&self, token: &str) -> Result<Option<Shared>> {
        let plain = opened(token, &self.sealed)?;
        plain.map(|plain| Ok(serde_json::from_slice(&plain)?)).transpose()
    }

    /// The present token, for who has the one before.
    pub(super) fn handed_over(&self, before: &str) -> Result<Option<String>> {
        let Some(handover) = &self.handover else { return Ok(None) };
        Ok(opened(before, &handover.sealed)?.and_then(|plain| String::from_utf8(plain).ok()))
    }

    pub(super) fn is_overdue(&self, now: Timestamp) -> bool {
        self.handover.as_ref().is_some_and(|h| (now.as_second() - h.since.as_second()).abs() > HANDOVER_S)
    }

    pub(super) fn bytes(&self) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }
}

impl Handover {
    pub(super) fn new(before: &str, token: &str) -> Result<Self> {
        let sealed = BASE64.encode(sealed::seal(before, token.as_bytes())?);
        Ok(Self { since: clock::now_seconds(), sealed })
    }
}

fn opened(secret: &str, text: &str) -> Result<Option<Vec<u8>>> {
    match sealed::open(secret, &BASE64.decode(text).context("the datastore's bootstrap data")?) {
        Ok(plain) => Ok(Some(plain)),
        Err(SealError::Secret) => Ok(None),
        Err(error) => Err(error).context("the datastore's bootstrap data"),
    }
}

/// Refuses settings that differ from the cluster's.
pub(super) fn check_settings(own: &Settings, cluster: &Settings) -> Result<()> {
    let differing: Vec<String> = own
        .iter()
        .filter_map(|(flag, own)| {
            let cluster = cluster.get(flag).filter(|cluster| *cluster != own)?;
            Some(format!("{flag} is {own} here and {cluster} in the cluster"))
        })
        .collect();
    match differing.is_empty() {
        true => Ok(()),
        false => bail!(
            "critical configuration value mismatch between servers: {}. Servers that share a datastore need the same",
            differing.join("; ")
        ),
    }
}
