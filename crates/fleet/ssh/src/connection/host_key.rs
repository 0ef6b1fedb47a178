//! Judging a host's key: by a fingerprint that was given, by known_hosts, by asking.
use std::path::PathBuf;
use std::sync::Arc;

use russh::Preferred;
use russh::keys::{Algorithm, HashAlg, PublicKey};

use super::{Address, ConnectError};
use crate::known_hosts::{self, KnownHosts, Verdict};
use crate::prompt::Ask;

/// What is known of host keys.
#[derive(Clone, Debug, Default)]
pub struct HostKeys {
    /// The one known_hosts file; the user's and the system's when `None`.
    pub file: Option<PathBuf>,
    /// Hosts that are met for the first time are believed.
    pub accept_new: bool,
    /// The only key that is right, as `SHA256:…`.
    pub fingerprint: Option<String>,
}

impl HostKeys {
    fn files(&self) -> Vec<PathBuf> {
        if let Some(file) = &self.file {
            return vec![file.clone()];
        }
        let mut files = Vec::new();
        if let Some(folder) = ssh_folder() {
            files.extend(["known_hosts", "known_hosts2"].map(|name| folder.join(name)));
        }
        files.extend(["/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"].map(PathBuf::from));
        files
    }
}

/// `~/.ssh`.
pub fn ssh_folder() -> Option<PathBuf> {
    let home = std::env::var_os("HOME").filter(|h| !h.is_empty())?;
    Some(PathBuf::from(home).join(".ssh"))
}

#[derive(Clone)]
pub struct Judge {
    address: Address,
    how: HostKeys,
    known: Arc<KnownHosts>,
    ask: Arc<dyn Ask>,
}

impl Judge {
    pub fn new(address: &Address, how: &HostKeys, ask: Arc<dyn Ask>) -> Result<Self, ConnectError> {
        let known = KnownHosts::load(&how.files())
            .map_err(|source| ConnectError::KnownHosts { what: "reading known_hosts".to_string(), source })?;
        Ok(Self { address: address.clone(), how: how.clone(), known: Arc::new(known), ask })
    }

    /// The types of key to ask the host for: first those that it is known by, or every other would look changed.
    pub fn preferred(&self) -> Vec<Algorithm> {
        let kinds = self.known.kinds(&self.address.host, self.address.port);
        let is_known = |algorithm: &Algorithm| match algorithm {
            Algorithm::Rsa { .. } => kinds.iter().any(|k| k == "ssh-rsa"),
            other => kinds.iter().any(|k| k == other.as_str()),
        };
        let all = Preferred::DEFAULT.key;
        // SHA-1 signatures prove nothing
        let all = all.iter().filter(|a| !matches!(a, Algorithm::Rsa { hash: None })).cloned();
        let (mut first, rest): (Vec<_>, Vec<_>) = all.partition(is_known);
        first.extend(rest);
        first
    }

    pub fn may_ask(&self) -> bool {
        !self.how.accept_new && self.how.fingerprint.is_none()
    }

    /// Blocks while somebody is asked.
    pub fn judge(&self, key: &PublicKey) -> Result<(), ConnectError> {
        let (address, host, port) = (self.address.to_string(), &self.address.host, self.address.port);
        let fingerprint = key.fingerprint(HashAlg::Sha256).to_string();
        let line = key.to_openssh().unwrap_or_default();
        let mut fields = line.split(' ');
        let (kind, blob) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        if let Some(expected) = &self.how.fingerprint {
            let bare =
                |text: &str| text.trim().trim_start_matches("SHA256:").trim_end_matches('=').to_string();
            if bare(expected) == bare(&fingerprint) {
                return Ok(());
            }
            return Err(ConnectError::HostKeyNotExpected {
                address,
                fingerprint,
                expected: expected.clone(),
            });
        }
        let others = match self.known.check(host, port, kind, blob) {
            Verdict::Known => return Ok(()),
            Verdict::Changed(place) => {
                return Err(ConnectError::HostKeyChanged {
                    listed: known_hosts::listed_name(host, port),
                    address,
                    kind: kind.to_string(),
                    fingerprint,
                    place: Box::new(place),
                });
            }
            Verdict::Revoked(place) => {
                return Err(ConnectError::HostKeyRevoked { address, fingerprint, place: Box::new(place) });
            }
            Verdict::Unknown { others } => others,
        };
        // a host that is known by another type of key is not met for the first time
        if !self.how.accept_new || others {
            let warning = if others { "Keys of other types are known of it, but not this one. " } else { "" };
            let question = format!(
                "The host key of {host} (port {port}) is not known. It shows {kind} {fingerprint}\n{warning}Is that right, and to be remembered?"
            );
            match self.ask.confirm(&question) {
                Some(true) => {}
                Some(false) => return Err(ConnectError::HostKeyDeclined { address, fingerprint }),
                None => {
                    let kind = kind.trim_start_matches("ssh-").split('-').next().unwrap_or(kind).to_string();
                    return Err(ConnectError::HostKeyUnknown { address, kind, fingerprint });
                }
            }
        }
        let Some(file) = self.how.files().into_iter().next() else { return Ok(()) };
        known_hosts::remember(&file, host, port, kind, blob).map_err(|source| ConnectError::KnownHosts {
            what: format!("remembering the host key in {}", file.display()),
            source,
        })
    }
}
