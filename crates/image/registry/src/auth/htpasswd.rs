//! Users and bcrypt hashes in a file, as `htpasswd -B` writes it; whoever is in it may do everything.
//!
//! Upstream counterpart: distribution's `registry/auth/htpasswd`, which takes bcrypt only, too. The file is read again
//! when it changes. A right answer is remembered for a while: bcrypt takes long on small machines by design.
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{AuthError, credentials, quoted};
use crate::digest::{Algorithm, Digest};
use crate::error::RegistryError;

const REMEMBERED: Duration = Duration::from_secs(300);
const REMEMBERED_MAX: usize = 256;
/// Checked at once; more wait. A flood of guesses must not take the whole machine.
const CHECKS_MAX: usize = 2;
const FILE_MAX_BYTES: u64 = 4 << 20;
/// Checked for users that don't exist, so that the time taken tells nothing: bcrypt of nothing in particular.
const NOBODY: &str = "$2b$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW";

struct Users {
    modified: Option<SystemTime>,
    hashes: Arc<HashMap<String, String>>,
}

pub struct Htpasswd {
    realm: String,
    path: PathBuf,
    users: Mutex<Users>,
    /// Digests of what was right, and until when that counts.
    remembered: Mutex<HashMap<Digest, Instant>>,
    salt: [u8; 32],
    checks: Semaphore,
}

impl Htpasswd {
    pub fn open(realm: &str, path: PathBuf) -> Result<Htpasswd, AuthError> {
        let mut salt = [0; 32];
        sampan_world::random::fill(&mut salt);
        let users = Mutex::new(Users { modified: None, hashes: Arc::default() });
        let (remembered, checks) = (Mutex::default(), Semaphore::new(CHECKS_MAX));
        let htpasswd = Htpasswd { realm: quoted(realm), path, users, remembered, salt, checks };
        htpasswd.load()?;
        Ok(htpasswd)
    }

    fn load(&self) -> Result<Arc<HashMap<String, String>>, AuthError> {
        let file = || self.path.display().to_string();
        let failed = |e: std::io::Error| AuthError::File { file: file(), message: e.to_string() };
        let metadata = std::fs::metadata(&self.path).map_err(failed)?;
        let modified = metadata.modified().ok();
        let mut users = self.users.lock();
        if users.modified.is_some() && users.modified == modified {
            return Ok(users.hashes.clone());
        }
        if metadata.len() > FILE_MAX_BYTES {
            return Err(AuthError::File { file: file(), message: "is too large".into() });
        }
        let text = std::fs::read_to_string(&self.path).map_err(failed)?;
        users.hashes = Arc::new(parse(&text, &file())?);
        users.modified = modified;
        Ok(users.hashes.clone())
    }

    pub(super) async fn authorize(&self, headers: &HeaderMap) -> Result<(), RegistryError> {
        let challenge =
            || RegistryError::Unauthorized { challenge: format!("Basic realm=\"{}\"", self.realm) };
        let decoded = credentials(headers, "basic").and_then(|c| STANDARD.decode(c).ok());
        let decoded = decoded.and_then(|c| String::from_utf8(c).ok()).ok_or_else(challenge)?;
        let (user, password) = decoded.split_once(':').ok_or_else(challenge)?;
        let hashes = match self.load() {
            Ok(hashes) => hashes,
            Err(error) => {
                tracing::error!(%error, "the users can't be read; those known before still count");
                self.users.lock().hashes.clone()
            }
        };
        let hash = hashes.get(user).map_or(NOBODY, String::as_str).to_string();
        let known = hashes.contains_key(user);
        let key = [&self.salt[..], hash.as_bytes(), b"\0", decoded.as_bytes()].concat();
        let key = Digest::of(Algorithm::Sha256, &key);
        if self.remembered.lock().get(&key).is_some_and(|until| *until > Instant::now()) {
            return Ok(());
        }
        let password = password.to_string();
        let Ok(_place) = self.checks.acquire().await else { return Err(challenge()) };
        let check = move || bcrypt::verify(password.as_bytes(), &hash).unwrap_or(false);
        let right = tokio::task::spawn_blocking(check).await.unwrap_or(false);
        if !right || !known {
            tracing::warn!(user = user.chars().take(64).collect::<String>(), "wrong user or password");
            return Err(challenge());
        }
        let mut remembered = self.remembered.lock();
        if remembered.len() >= REMEMBERED_MAX {
            remembered.clear();
        }
        remembered.insert(key, Instant::now() + REMEMBERED);
        Ok(())
    }
}

fn parse(text: &str, file: &str) -> Result<HashMap<String, String>, AuthError> {
    let mut users = HashMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((user, hash)) = line.split_once(':') else {
            let message = format!("line {}: expected user:hash", number + 1);
            return Err(AuthError::File { file: file.to_string(), message });
        };
        if hash.starts_with("$2") {
            users.insert(user.to_string(), hash.to_string());
        } else {
            tracing::warn!(
                file,
                line = number + 1,
                user,
                "not a bcrypt hash (htpasswd -B); the user is ignored"
            );
        }
    }
    Ok(users)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(user: &str, password: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let value = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        headers.insert(http::header::AUTHORIZATION, value.parse().unwrap());
        headers
    }

    #[tokio::test]
    async fn passwords_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("htpasswd");
        let hash = bcrypt::hash("secret", 4).unwrap();
        std::fs::write(&path, format!("# users\n\nme:{hash}\nold:{{SHA}}x\n")).unwrap();
        let htpasswd = Htpasswd::open("the \"realm\"", path.clone()).unwrap();
        for _ in 0..2 {
            htpasswd.authorize(&headers("me", "secret")).await.unwrap();
        }
        for wrong in
            [headers("me", "Secret"), headers("you", "secret"), headers("old", "x"), HeaderMap::new()]
        {
            let Err(RegistryError::Unauthorized { challenge }) = htpasswd.authorize(&wrong).await else {
                panic!("let in");
            };
            assert_eq!(challenge, "Basic realm=\"the realm\"");
        }
        // the constant is a hash that bcrypt takes its time for
        assert!(bcrypt::verify(b"x", NOBODY).is_ok());
        std::fs::write(&path, format!("you:{hash}")).unwrap();
        let later = SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        assert!(htpasswd.authorize(&headers("me", "secret")).await.is_err());
        htpasswd.authorize(&headers("you", "secret")).await.unwrap();
        assert!(parse("nonsense", "f").is_err());
    }
}
