//! A new certificate authority in place of the old one, and new service account keys with it.
//!
//! Upstream counterparts: K3s' pkg/server/handlers/cert.go and contrib/util/rotate-default-ca-certs.sh. What stays true:
//! who trusts only the old authority trusts what the new one signs, and what the old one signed stays good until it
//! ends; both are tried out before anything is replaced, unless `force` gives both up. A crash at any point leaves the
//! old authority or the new one: what is to be put in place waits, whole, in a folder of its own until all of it is.
//! Deliberately different from K3s: there is one authority for servers and clients, the new one can be made here, and
//! earlier certificates and keys are kept for the owner who did not put them into his files.
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rustls::pki_types::UnixTime;
use sampan_world::{files, random};

use crate::authority::{io_error, read_optional};
use crate::certificate::{certificates, details, pem, subject};
use crate::{Authority, PkiError, keys, service_account_key, tls};

/// Certificates of a bundle; what came first goes first when it grows beyond.
const MAX_CERTIFICATES: usize = 12;
const MAX_KEYS: usize = 8;
const MAX_FILE_BYTES: usize = 256 * 1024;
const STAGED: &str = "new-authority";
const AUTHORITY: &str = "server-ca.crt";
const AUTHORITY_KEY: &str = "server-ca.key";
const ACCOUNT_KEYS: &str = "service-account.key";
/// The names that K3s gives them.
const ACCOUNT_KEYS_NAMES: [&str; 2] = [ACCOUNT_KEYS, "service.key"];

/// What is to be put in place; PEM.
pub struct Replacement {
    /// Bundle and key.
    pub authority: Option<(String, String)>,
    pub account_keys: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    #[error("{path}: {reason}")]
    File { path: String, reason: String },
    #[error("{0} holds neither server-ca.crt and server-ca.key nor service.key")]
    Nothing(String),
    #[error(
        "{path}: {subject} is no certificate authority (CA:TRUE and, where there is a key usage, keyCertSign)"
    )]
    NoAuthority { path: String, subject: String },
    #[error("{path}: {subject} {what}")]
    Dates { path: String, subject: String, what: String },
    #[error("what the new authority signs is not accepted by those who trust it: {0}")]
    Itself(String),
    #[error(
        "who trusts the present authority would not trust the new one: {0}. Nodes and kubeconfigs would have to be \
         given the new one by hand: have it signed by the present one, or say --force"
    )]
    Untrusted(String),
    #[error(transparent)]
    Pki(#[from] PkiError),
}

impl Replacement {
    /// A new authority, signed by the present one and by itself, and a new service account key.
    pub fn generate(present: &Authority, force: bool) -> Result<Self, RotationError> {
        let (key, own_pem) = Authority::unrelated()?;
        let mut bundle = own_pem.clone();
        if !force {
            bundle.push_str(&present.cross_sign(&own_pem, &key)?);
        }
        let account_key = rcgen::KeyPair::generate().map_err(|source| PkiError::Certificate {
            subject: "the service account key".to_string(),
            source,
        })?;
        let authority = Some((bundle, key.serialize_pem()));
        Ok(Self { authority, account_keys: Some(account_key.serialize_pem()) })
    }

    /// What an owner put into `folder`, or into `tls` in it as K3s has it.
    pub fn read(folder: &Path) -> Result<Self, RotationError> {
        let inner = folder.join("tls");
        let folder = if inner.is_dir() { inner } else { folder.to_path_buf() };
        let (bundle_path, key_path) = (folder.join(AUTHORITY), folder.join(AUTHORITY_KEY));
        let missing = |path: &Path, other: &Path| RotationError::File {
            path: path.display().to_string(),
            reason: format!("it is missing, {} is there", other.display()),
        };
        let authority = match (text(&bundle_path)?, text(&key_path)?) {
            (Some(bundle), Some(key)) => Some((bundle, key)),
            (None, None) => None,
            (None, Some(_)) => return Err(missing(&bundle_path, &key_path)),
            (Some(_), None) => return Err(missing(&key_path, &bundle_path)),
        };
        let mut account_keys = None;
        for name in ACCOUNT_KEYS_NAMES {
            if account_keys.is_none() {
                account_keys = text(&folder.join(name))?;
            }
        }
        if authority.is_none() && account_keys.is_none() {
            return Err(RotationError::Nothing(folder.display().to_string()));
        }
        Ok(Self { authority, account_keys })
    }

    /// Checks it against what is in place in `tls`, and adds what keeps the old valid. `source` is told in errors.
    pub fn checked(
        self,
        tls: &Path,
        source: &str,
        force: bool,
        now: Timestamp,
    ) -> Result<Self, RotationError> {
        let authority = match self.authority {
            None => None,
            Some((bundle, key)) => {
                let present = Authority::load_or_create(tls)?;
                Some(checked_authority(&present, &bundle, &key, source, force, now)?)
            }
        };
        let account_keys = match self.account_keys {
            None => None,
            Some(pem) => {
                let path = tls.join(ACCOUNT_KEYS);
                let present = read_optional(&path)?.unwrap_or_default();
                let kept = if force { "" } else { present.as_str() };
                Some(merged_keys(&pem, kept, source)?)
            }
        };
        Ok(Self { authority, account_keys })
    }

    /// Puts it, whole, beside what is in place, for [`install`].
    pub fn stage(&self, tls: &Path) -> Result<(), RotationError> {
        let temporary = tls.join(format!(".{STAGED}.{}", random::suffix(8)));
        fs::create_dir_all(&temporary).map_err(|e| io_error(&temporary, e))?;
        let written = (|| {
            if let Some((bundle, key)) = &self.authority {
                write(&temporary.join(AUTHORITY), bundle, 0o644)?;
                write(&temporary.join(AUTHORITY_KEY), key, 0o600)?;
            }
            if let Some(keys) = &self.account_keys {
                write(&temporary.join(ACCOUNT_KEYS), keys, 0o600)?;
            }
            let staged = staged(tls);
            if staged.exists() {
                fs::remove_dir_all(&staged).map_err(|e| io_error(&staged, e))?;
            }
            fs::rename(&temporary, &staged).map_err(|e| io_error(&staged, e))
        })();
        if written.is_err() {
            let _ = fs::remove_dir_all(&temporary);
        }
        Ok(written?)
    }
}

/// Where [`Replacement::stage`] puts it.
pub fn staged(tls: &Path) -> PathBuf {
    tls.join(STAGED)
}

/// Puts in place what waits in `tls`, with the old kept in a folder beside it; `None` when nothing waits. After a crash
/// it is done again from the beginning.
pub fn install(tls: &Path, now: Timestamp) -> Result<Option<PathBuf>, PkiError> {
    let staged = staged(tls);
    if !staged.is_dir() {
        return Ok(None);
    }
    let (bundle, key) =
        (read_optional(&staged.join(AUTHORITY))?, read_optional(&staged.join(AUTHORITY_KEY))?);
    if let (Some(bundle), Some(key)) = (&bundle, &key) {
        // nothing that cannot be loaded again is put in place
        Authority::from_pem(bundle, key, &staged.join(AUTHORITY).display().to_string())?;
    }
    let backup = tls.with_file_name(format!("tls-{}", now.as_second()));
    fs::create_dir_all(&backup).map_err(|e| io_error(&backup, e))?;
    // the key first: see `authority`. The certificate of a bundle without its key cannot be there.
    for (name, mode) in [(AUTHORITY_KEY, 0o600), (AUTHORITY, 0o644), (ACCOUNT_KEYS, 0o600)] {
        let Some(text) = read_optional(&staged.join(name))? else { continue };
        if let Some(old) = read_optional(&tls.join(name))?
            && !backup.join(name).exists()
        {
            write(&backup.join(name), &old, mode)?;
        }
        write(&tls.join(name), &text, mode)?;
    }
    let done = tls.join(format!(".{STAGED}.{}", random::suffix(8)));
    fs::rename(&staged, &done).map_err(|e| io_error(&staged, e))?;
    fs::remove_dir_all(&done).map_err(|e| io_error(&done, e))?;
    Ok(Some(backup))
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    files::write_atomic(path, text.as_bytes(), mode).map_err(|e| io_error(path, e))
}

fn text(path: &Path) -> Result<Option<String>, RotationError> {
    let wrong = |reason: String| RotationError::File { path: path.display().to_string(), reason };
    match fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(wrong(e.to_string())),
        Ok(bytes) if bytes.len() > MAX_FILE_BYTES => Err(wrong("it is too long for a PEM file".to_string())),
        Ok(bytes) => String::from_utf8(bytes).map(Some).map_err(|_| wrong("it is not PEM".to_string())),
    }
}

fn checked_authority(
    present: &Authority,
    bundle: &str,
    key: &str,
    source: &str,
    force: bool,
    now: Timestamp,
) -> Result<(String, String), RotationError> {
    let path = format!("{source}/{AUTHORITY}");
    let wrong = |reason: String| RotationError::File { path: path.clone(), reason };
    let mut all = certificates(bundle).map_err(|e| wrong(e.to_string()))?;
    for one in &all {
        let (Some(who), Some(more)) = (subject(one), details(one)) else {
            return Err(wrong("a certificate cannot be read".to_string()));
        };
        let (path, subject) = (path.clone(), format!("{:?}", who.common_name));
        if !more.is_authority {
            return Err(RotationError::NoAuthority { path, subject });
        }
        if who.not_after <= now {
            return Err(RotationError::Dates {
                path,
                subject,
                what: format!("expired at {}", who.not_after),
            });
        }
        if more.not_before > now {
            let what = format!("is not valid before {}", more.not_before);
            return Err(RotationError::Dates { path, subject, what });
        }
    }
    let pair = keys::read(key)
        .map_err(|reason| RotationError::File { path: format!("{source}/{AUTHORITY_KEY}"), reason })?;
    let key = pair.serialize_pem();
    if !force {
        let ends = |one| subject(one).is_some_and(|s| s.not_after > now);
        let earlier: Vec<_> =
            present.trusted().iter().filter(|one| ends(one) && !all.contains(one)).cloned().collect();
        all.extend(earlier);
        all.truncate(MAX_CERTIFICATES);
    }
    let bundle: String = all.iter().map(pem).collect();
    let new = Authority::from_parts(bundle.clone(), pair, &path)?;
    accepts(&new, &new, now).map_err(RotationError::Itself)?;
    if !force {
        accepts(present, &new, now).map_err(RotationError::Untrusted)?;
    }
    Ok((bundle, key))
}

/// Whether those who trust `trusted` accept what `signer` signs, with what it presents besides.
fn accepts(trusted: &Authority, signer: &Authority, now: Timestamp) -> Result<(), String> {
    let probe = signer.server("probe", &["localhost".to_string()]).map_err(|e| e.to_string())?;
    let chain = probe.certificates().map_err(|e| e.to_string())?;
    let (leaf, intermediates) = chain.split_first().ok_or("there is no certificate")?;
    let roots = tls::server_verifier(trusted.trusted()).map_err(|e| e.to_string())?;
    let name = rustls::pki_types::ServerName::try_from("localhost").map_err(|e| e.to_string())?;
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now.as_second().unsigned_abs()));
    roots.verify_server_cert(leaf, intermediates, &name, &[], now).map(drop).map_err(|e| e.to_string())
}

/// The new keys, then the present ones that are not among them.
fn merged_keys(new: &str, present: &str, source: &str) -> Result<String, RotationError> {
    let path = format!("{source}/service.key");
    let wrong = |reason: String| RotationError::File { path: path.clone(), reason };
    let mut ids = service_account_key::ids(new).map_err(wrong)?;
    let mut merged: Vec<String> =
        keys::read_all(new).map_err(wrong)?.iter().map(rcgen::KeyPair::serialize_pem).collect();
    if !present.is_empty() {
        let known = service_account_key::ids(present).map_err(wrong)?;
        for (id, key) in known.into_iter().zip(keys::read_all(present).map_err(wrong)?) {
            if !ids.contains(&id) {
                ids.push(id);
                merged.push(key.serialize_pem());
            }
        }
    }
    merged.truncate(MAX_KEYS);
    Ok(merged.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ServiceAccountKey;
    use sampan_world::clock;

    fn cluster() -> (tempfile::TempDir, PathBuf, Authority) {
        let folder = tempfile::tempdir().unwrap();
        let tls = folder.path().join("tls");
        let authority = Authority::load_or_create(&tls).unwrap();
        ServiceAccountKey::load_or_create(&tls.join(ACCOUNT_KEYS)).unwrap();
        (folder, tls, authority)
    }

    fn rotate(tls: &Path, force: bool) -> Authority {
        let present = Authority::load_or_create(tls).unwrap();
        let new = Replacement::generate(&present, force).unwrap();
        new.checked(tls, "DIR", force, clock::now()).unwrap().stage(tls).unwrap();
        let backup = install(tls, clock::now()).unwrap().unwrap();
        assert!(backup.join(AUTHORITY).exists() && install(tls, clock::now()).unwrap().is_none());
        Authority::load_or_create(tls).unwrap()
    }

    #[test]
    fn the_old_trust_the_new_and_the_other_way_round() {
        let (_folder, tls, first) = cluster();
        let account = ServiceAccountKey::load_or_create(&tls.join(ACCOUNT_KEYS)).unwrap();
        let token = account.sign(&serde_json::json!({})).unwrap();
        let second = rotate(&tls, false);
        let third = rotate(&tls, false);
        let now = clock::now();
        assert!(first.hash() != second.hash() && second.hash() != third.hash());
        for old in [&first, &second, &third] {
            accepts(old, &third, now).unwrap();
            accepts(&third, old, now).unwrap();
        }
        let (_other, _, stranger) = cluster();
        assert!(accepts(&stranger, &third, now).is_err() && accepts(&third, &stranger, now).is_err());
        assert!(account.reload().unwrap() && account.verify(&token).is_ok());
        // what is forced starts anew
        let fourth = rotate(&tls, true);
        assert_eq!(fourth.trusted().len(), 1);
        assert!(accepts(&third, &fourth, now).is_err() && accepts(&fourth, &third, now).is_err());
        account.reload().unwrap();
        assert!(account.verify(&token).is_err());
    }

    #[test]
    fn says_what_is_wrong() {
        let (folder, tls, present) = cluster();
        let (_other, stranger_tls, stranger) = cluster();
        let dir = folder.path().join("dir");
        fs::create_dir(&dir).unwrap();
        let stranger_key = fs::read_to_string(stranger_tls.join(AUTHORITY_KEY)).unwrap();
        let own_key = fs::read_to_string(tls.join(AUTHORITY_KEY)).unwrap();
        let leaf = present.client("leaf", &[]).unwrap();
        let try_it = |bundle: Option<&str>, key: Option<&str>, force: bool, now: Timestamp| {
            for (name, text) in [(AUTHORITY, bundle), (AUTHORITY_KEY, key)] {
                match text {
                    Some(text) => fs::write(dir.join(name), text).unwrap(),
                    None => drop(fs::remove_file(dir.join(name))),
                }
            }
            let checked = Replacement::read(&dir).and_then(|new| new.checked(&tls, "DIR", force, now));
            checked.err().map(|e| e.to_string()).unwrap_or_default()
        };
        let now = clock::now();
        let later = now + jiff::SignedDuration::from_hours(24 * 4000);
        let (own, other) = (present.certificate_pem(), stranger.certificate_pem());
        for (bundle, key, force, at, want) in [
            (None, None, false, now, "holds neither"),
            (Some(other), None, false, now, "server-ca.key: it is missing"),
            (None, Some(own_key.as_str()), false, now, "server-ca.crt: it is missing"),
            (Some(other), Some(own_key.as_str()), true, now, "does not belong to server-ca.key"),
            (
                Some(leaf.certificate_pem.as_str()),
                Some(leaf.key_pem.as_str()),
                true,
                now,
                "is no certificate authority",
            ),
            (Some("rubbish"), Some(own_key.as_str()), true, now, "there is none"),
            (Some(other), Some("rubbish"), true, now, "no private key"),
            (Some(other), Some(stranger_key.as_str()), false, now, "would not trust the new one"),
            (Some(other), Some(stranger_key.as_str()), true, later, "expired at"),
            (Some(other), Some(stranger_key.as_str()), true, now, ""),
            (Some(own), Some(own_key.as_str()), false, now, ""),
        ] {
            let told = try_it(bundle, key, force, at);
            assert!(told.contains(want) && told.is_empty() == want.is_empty(), "{want}: {told}");
        }
        // a crash while it is put in place: the beginning is done again
        let new = Replacement::generate(&present, false).unwrap();
        new.checked(&tls, "DIR", false, now).unwrap().stage(&tls).unwrap();
        let half = fs::read_to_string(staged(&tls).join(AUTHORITY_KEY)).unwrap();
        fs::write(tls.join(AUTHORITY_KEY), half).unwrap();
        assert!(Authority::load_or_create(&tls).is_err());
        install(&tls, now).unwrap().unwrap();
        accepts(&present, &Authority::load_or_create(&tls).unwrap(), now).unwrap();
    }
}
