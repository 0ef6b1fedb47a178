//! Private keys: files of OpenSSH, PKCS#8 and PKCS#1, with or without a passphrase; and what an agent holds.
//!
//! A key with a passphrase that the agent holds too is used from there, so that nobody is asked in vain.
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::{AgentClient, AgentStream};
use russh::keys::{PrivateKey, PublicKey};

use crate::prompt::{Ask, Secret};

/// The files that are tried when none is named, as OpenSSH does.
pub const DEFAULT_NAMES: &[&str] = &["id_ed25519", "id_ecdsa", "id_rsa"];
const MAX_BYTES: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("the SSH key {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is a public key; name the private one, {private}", path = path.display(), private = path.with_extension("").display())]
    Public { path: PathBuf },
    #[error("{path} is no SSH private key that can be read: {message}", path = path.display())]
    Format { path: PathBuf, message: String },
    #[error(
        "the SSH key {path} has a passphrase, and nobody is here to be asked for it: set SAMPAN_SSH_KEY_PASSPHRASE, or add the key to an agent",
        path = path.display()
    )]
    NeedsPassphrase { path: PathBuf },
    #[error("wrong passphrase for the SSH key {path}", path = path.display())]
    WrongPassphrase { path: PathBuf },
}

/// A key file that was read, perhaps still locked.
pub struct KeyFile {
    pub path: PathBuf,
    text: String,
    /// What the file itself or the one beside it ending in `.pub` says.
    pub public: Option<PublicKey>,
    pub locked: bool,
}

impl KeyFile {
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Read { path: path.to_path_buf(), source };
        let size_bytes = std::fs::metadata(path).map_err(failed)?.len();
        let bad = |message: &str| KeyError::Format { path: path.to_path_buf(), message: message.to_string() };
        if size_bytes > MAX_BYTES {
            return Err(bad("it is too large"));
        }
        let bytes = std::fs::read(path).map_err(failed)?;
        let text = String::from_utf8(bytes).map_err(|_| bad("it is not text"))?;
        if PublicKey::from_openssh(text.trim()).is_ok() {
            return Err(KeyError::Public { path: path.to_path_buf() });
        }
        let own = PrivateKey::from_openssh(&text).ok();
        let beside = || {
            let mut name = path.as_os_str().to_owned();
            name.push(".pub");
            PublicKey::from_openssh(std::fs::read_to_string(name).ok()?.trim()).ok()
        };
        let locked = match russh::keys::decode_secret_key(&text, None) {
            Ok(_) => false,
            Err(russh::keys::Error::KeyIsEncrypted) => true,
            Err(_) if own.as_ref().is_some_and(PrivateKey::is_encrypted) => true,
            Err(_) if text.contains("ENCRYPTED") => true,
            Err(error) => return Err(bad(&error.to_string())),
        };
        let public = own.map(|k| k.public_key().clone()).or_else(beside);
        Ok(Self { path: path.to_path_buf(), text, public, locked })
    }

    /// The key itself. A passphrase that was given is tried first, then somebody is asked.
    pub fn unlock(&self, given: Option<&Secret>, ask: &dyn Ask) -> Result<Arc<PrivateKey>, KeyError> {
        let decode = |passphrase: Option<&str>| russh::keys::decode_secret_key(&self.text, passphrase);
        if !self.locked {
            return decode(None)
                .map(Arc::new)
                .map_err(|e| KeyError::Format { path: self.path.clone(), message: e.to_string() });
        }
        let wrong = || KeyError::WrongPassphrase { path: self.path.clone() };
        if let Some(given) = given {
            return decode(Some(given.reveal())).map(Arc::new).map_err(|_| wrong());
        }
        for _ in 0..3 {
            let prompt = format!("Passphrase of {}", self.path.display());
            let Some(passphrase) = ask.secret(&prompt) else {
                return Err(KeyError::NeedsPassphrase { path: self.path.clone() });
            };
            if let Ok(key) = decode(Some(passphrase.reveal())) {
                return Ok(Arc::new(key));
            }
        }
        Err(wrong())
    }
}

/// The agent of `SSH_AUTH_SOCK`, and the keys it holds.
pub struct Agent {
    pub client: AgentClient<Box<dyn AgentStream + Send + Unpin>>,
    pub keys: Vec<PublicKey>,
}

impl Agent {
    /// `None` when there is no agent, or it holds nothing.
    pub async fn open() -> Option<Self> {
        let mut client = AgentClient::connect_env().await.ok()?.dynamic();
        let identities = client.request_identities().await.ok()?;
        let key = |identity| match identity {
            AgentIdentity::PublicKey { key, .. } => Some(key),
            AgentIdentity::Certificate { .. } => None,
        };
        let keys: Vec<PublicKey> = identities.into_iter().filter_map(key).collect();
        (!keys.is_empty()).then_some(Self { client, keys })
    }

    pub fn holds(&self, key: &PublicKey) -> bool {
        self.keys.iter().any(|k| k.key_data() == key.key_data())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::Nobody;
    use std::fs;
    use std::process::Command;

    fn made(folder: &Path, name: &str, args: &[&str]) -> PathBuf {
        let path = folder.join(name);
        let status = Command::new("ssh-keygen").args(["-q", "-f"]).arg(&path).args(args).status().unwrap();
        assert!(status.success());
        path
    }

    #[test]
    fn keys_of_ssh_keygen() {
        let folder = tempfile::tempdir().unwrap();
        let kinds: [(&str, &[&str]); 5] = [
            ("ed", &["-t", "ed25519", "-N", ""]),
            ("ec", &["-t", "ecdsa", "-N", ""]),
            ("rsa", &["-t", "rsa", "-b", "2048", "-N", ""]),
            ("pem", &["-t", "rsa", "-b", "2048", "-m", "PEM", "-N", ""]),
            ("pkcs8", &["-t", "rsa", "-b", "2048", "-m", "PKCS8", "-N", ""]),
        ];
        for (name, args) in kinds {
            let key = KeyFile::read(&made(folder.path(), name, args)).unwrap();
            assert!(!key.locked && key.public.is_some(), "{name}");
            key.unlock(None, &Nobody).unwrap();
        }
        let locked: [(&str, &[&str]); 2] = [
            ("ed-locked", &["-t", "ed25519", "-N", "secret", "-a", "4"]),
            ("pkcs8-locked", &["-t", "rsa", "-b", "2048", "-m", "PKCS8", "-N", "secret"]),
        ];
        for (name, args) in locked {
            let key = KeyFile::read(&made(folder.path(), name, args)).unwrap();
            assert!(key.locked && key.public.is_some(), "{name}");
            key.unlock(Some(&Secret::new("secret")), &Nobody).unwrap();
            let wrong = key.unlock(Some(&Secret::new("other")), &Nobody).map(|_| ()).unwrap_err();
            assert!(matches!(wrong, KeyError::WrongPassphrase { .. }), "{name}: {wrong}");
            let alone = key.unlock(None, &Nobody).map(|_| ()).unwrap_err();
            assert!(matches!(alone, KeyError::NeedsPassphrase { .. }), "{name}: {alone}");
        }
        let public = KeyFile::read(&folder.path().join("ed.pub")).map(|_| ()).unwrap_err();
        assert!(matches!(public, KeyError::Public { .. }), "{public}");
        let garbage = folder.path().join("garbage");
        fs::write(&garbage, "hello").unwrap();
        assert!(matches!(KeyFile::read(&garbage).map(|_| ()), Err(KeyError::Format { .. })));
        assert!(matches!(KeyFile::read(&folder.path().join("none")).map(|_| ()), Err(KeyError::Read { .. })));
    }
}
