//! What servers that share a datastore have in common besides it: the certificate authority, the service account keys,
//! the token, and the settings that must be equal. It lies in the datastore, sealed with the token.
//!
//! Upstream counterparts: K3s' pkg/cluster/{bootstrap,storage}.go. What stays true: there is one key, so of servers that
//! start at the same moment one makes the cluster and the others take what it made. A server's files and the datastore
//! are compared with what both last agreed on; the side that changed wins, and when both did, the datastore, with the
//! files kept aside. So a command on one server (`certificate rotate-ca`, `token rotate`) reaches all, live, and one on a
//! stopped server when that starts. Deliberately different from K3s: no clocks are compared; the key is not named after
//! the token, so that two tokens cannot make two clusters; a new token is handed on, sealed with the one before, for an
//! hour.
mod envelope;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sampan_pki::{JoinToken, rotation};
use sampan_store::{Entry, Store, Write, WriteError};
use sampan_world::{clock, files};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use self::envelope::{Envelope, Files, Handover, Shared, check_settings};
pub use self::envelope::{EtcdAuthority, Settings};
use crate::certificate::server::{kept_token, write_token};
use crate::datastore::RECORD;

pub const KEY: &str = "/sampan/bootstrap";
/// Others write the key, too; who loses so often gives up until the next pass.
const ROUNDS: usize = 8;
/// After the datastore's watch ended.
const RETRY: Duration = Duration::from_secs(5);

/// What the files and the datastore last agreed on.
#[derive(Clone)]
struct Agreed {
    /// The key's.
    revision: u64,
    /// Of the files; `None`: nothing was agreed on yet.
    digest: Option<String>,
    token: String,
}

/// The file that outlives the process: [`RECORD`].
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    endpoints: Vec<String>,
    files: String,
}

pub struct BootstrapData {
    store: Store,
    /// `<data-dir>/server`
    folder: PathBuf,
    endpoints: Vec<String>,
    agreed: tokio::sync::Mutex<Agreed>,
    /// The key's, as agreed: what need not be told of.
    known_revision: AtomicU64,
    changed: Notify,
}

/// Which side is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    None,
    /// What the datastore says goes into the folder.
    Folder,
    /// What the folder says goes into the datastore.
    Datastore,
    /// The folder never agreed with this datastore.
    Foreign,
}

fn side<T: PartialEq + ?Sized>(folder: Option<&T>, datastore: &T, agreed: Option<&T>) -> Side {
    match (folder, agreed) {
        (None, _) => Side::Folder,
        (Some(folder), _) if folder == datastore => Side::None,
        (_, None) => Side::Foreign,
        (Some(folder), Some(agreed)) if folder != agreed && datastore == agreed => Side::Datastore,
        // also when both changed
        _ => Side::Folder,
    }
}

/// What a look at both sides says is to be done.
struct Verdict {
    /// The key's new value.
    write: Option<Vec<u8>>,
    take_files: bool,
    take_token: bool,
    files: Files,
    token: String,
}

const OTHER_TOKEN: &str = "the datastore holds a cluster whose token is another (bootstrap data already found and \
                           encrypted with different token): give --token as the cluster's other servers have it; after \
                           `sampan token rotate`, the new one";

/// The tokens to try: the one given, and the one that an earlier start left; an error where there is none.
pub fn candidates(folder: &Path, given: Option<&str>) -> Result<Vec<String>> {
    let given = given.map(|given| JoinToken::parse(given).context("--token")).transpose()?;
    let mut tokens: Vec<String> = given.iter().map(JoinToken::bearer).collect();
    if let Some(kept) = kept_token(folder)
        && !tokens.contains(&kept)
    {
        tokens.push(kept);
    }
    match tokens.is_empty() {
        true => bail!(
            "--datastore-endpoint needs --token (or SAMPAN_TOKEN): a secret of your own choice, the same for all servers, \
             that seals the keys they share"
        ),
        false => Ok(tokens),
    }
}

impl BootstrapData {
    /// Brings the folder and the datastore together: makes the cluster's keys, or takes those that are there.
    pub async fn join(
        store: &Store,
        folder: &Path,
        endpoints: &[String],
        given: Option<&str>,
        own: &Settings,
        etcd: Option<&EtcdAuthority>,
    ) -> Result<Arc<Self>> {
        let tls = folder.join("tls");
        rotation::install(&tls, clock::now()).context("ending the replacement of the authority")?;
        let tokens = candidates(folder, given)?;
        for _ in 0..ROUNDS {
            let (entry, _) = store.get(KEY, None).await.context("reading the bootstrap data")?;
            let Some(entry) = entry else {
                Self::begin(store, folder, &tokens, own, etcd).await?;
                continue;
            };
            let token = {
                let (tokens, own) = (tokens.clone(), own.clone());
                let given = given.map(JoinToken::parse).transpose().context("--token")?;
                let admitting = move || admitted(&entry.value, &tokens, given.as_ref(), &own);
                tokio::task::spawn_blocking(admitting).await??.0
            };
            write_token(folder, &token)?;
            let record: Option<Record> =
                std::fs::read(folder.join(RECORD)).ok().and_then(|text| serde_json::from_slice(&text).ok());
            let this = Arc::new(Self {
                store: store.clone(),
                folder: folder.to_path_buf(),
                endpoints: endpoints.to_vec(),
                agreed: tokio::sync::Mutex::new(Agreed {
                    revision: 0,
                    digest: record.map(|record| record.files),
                    token,
                }),
                known_revision: AtomicU64::new(0),
                changed: Notify::new(),
            });
            this.reconcile().await?;
            return Ok(this);
        }
        bail!("the datastore's bootstrap data keeps changing")
    }

    /// The first server: offers the files that it has, or new ones. Somebody else may be faster.
    async fn begin(
        store: &Store,
        folder: &Path,
        tokens: &[String],
        own: &Settings,
        etcd: Option<&EtcdAuthority>,
    ) -> Result<()> {
        let (tls, record) = (folder.join("tls"), folder.join(RECORD));
        if record.exists() {
            bail!(
                "this server's cluster was in a datastore before, and this one holds none. To begin an empty cluster in it, \
                 which ends this machine's pods, remove {}",
                record.display()
            );
        }
        if tokens.len() > 1 {
            bail!("--token differs from the one that this server used before: give that one, or none");
        }
        let Some(token) = tokens.first().cloned() else { return Ok(()) };
        let (settings, etcd) = (own.clone(), etcd.cloned());
        let bytes = tokio::task::spawn_blocking(move || {
            let files = match Files::read(&tls)? {
                Some(files) => files,
                None => Files::make(&tls)?,
            };
            Envelope::seal(&token, &Shared { files, settings, etcd }, None)?.bytes()
        });
        match store.write(Write::create(KEY, bytes.await??)).await {
            Ok(_) => tracing::info!("this server makes the cluster"),
            Err(WriteError::Conflict { .. }) => tracing::info!("another server makes the cluster"),
            Err(error) => return Err(error).context("writing the bootstrap data"),
        }
        Ok(())
    }

    /// Brings what changed on one side to the other; true when files here were written.
    pub async fn reconcile(&self) -> Result<bool> {
        let mut agreed = self.agreed.lock().await;
        for _ in 0..ROUNDS {
            let (entry, _) = self.store.get(KEY, None).await.context("reading the bootstrap data")?;
            let folder = self.folder.clone();
            let before = agreed.clone();
            let judged = entry.clone();
            let verdict =
                tokio::task::spawn_blocking(move || judge(&folder, judged.as_ref(), &before)).await??;
            let Some(verdict) = verdict else { return Ok(false) };
            let revision = match (&verdict.write, &entry) {
                (Some(bytes), Some(entry)) => {
                    let write = Write::update(KEY, entry.mod_revision, bytes.clone());
                    match self.store.write(write).await {
                        Ok(revision) => revision,
                        Err(WriteError::Conflict { .. }) => continue,
                        Err(error) => return Err(error).context("writing the bootstrap data"),
                    }
                }
                (_, entry) => entry.as_ref().map_or(0, |entry| entry.mod_revision),
            };
            let next =
                Agreed { revision, digest: Some(verdict.files.digest()), token: verdict.token.clone() };
            let (folder, endpoints) = (self.folder.clone(), self.endpoints.clone());
            let took = tokio::task::spawn_blocking(move || take(&folder, endpoints, &verdict)).await??;
            *agreed = next;
            self.known_revision.store(revision, Ordering::Relaxed);
            return Ok(took);
        }
        bail!("the datastore's bootstrap data keeps changing")
    }

    /// Tells [`Self::changed`] of other servers' changes, for as long as the process lives.
    pub async fn follow(&self) {
        let mut key = self.store.follow(KEY);
        loop {
            match key.next().await {
                Ok(entry) => {
                    let revision = entry.map_or(0, |entry| entry.mod_revision);
                    if revision != self.known_revision.load(Ordering::Relaxed) {
                        self.changed.notify_one();
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "following the bootstrap data");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// The sealed data as it lies in the datastore.
    pub async fn sealed(&self) -> Result<Option<bytes::Bytes>> {
        let (entry, _) = self.store.get(KEY, None).await.context("reading the bootstrap data")?;
        Ok(entry.map(|entry| entry.value))
    }

    /// Where the cluster is, as this server knows it.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// Waits until another server changed something.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// The token, of those, that opens it. One that was given must be it, and what it says of the authority must be true; the
/// settings must be the cluster's.
fn admitted(
    value: &[u8],
    tokens: &[String],
    given: Option<&JoinToken>,
    own: &Settings,
) -> Result<(String, Shared)> {
    let envelope = Envelope::read(value)?;
    for token in tokens {
        let Some(shared) = envelope.open(token)? else { continue };
        if let Some(given) = given {
            if given.bearer() != *token {
                bail!(
                    "--token differs from the cluster's. If that was changed by `sampan token rotate`, give the new one, \
                     or none, here or in the configuration file"
                );
            }
            if given.trusted(&shared.files.authority)?.is_none() {
                bail!("--token names another certificate authority than the datastore's cluster has");
            }
        }
        check_settings(own, &shared.settings)?;
        return Ok((token.clone(), shared));
    }
    bail!(OTHER_TOKEN)
}

/// What a server that is to run an etcd member needs of the sealed data: the authority of the members.
pub fn for_member(value: &[u8], given: &JoinToken, own: &Settings) -> Result<EtcdAuthority> {
    let (_, shared) = admitted(value, &[given.bearer()], Some(given), own)?;
    shared.etcd.context("the cluster's bootstrap data holds no authority of etcd's members")
}

/// What is to be done; `None` when there is nothing.
fn judge(folder: &Path, entry: Option<&Entry>, agreed: &Agreed) -> Result<Option<Verdict>> {
    let tls = folder.join("tls");
    let here = Files::read(&tls)?;
    let digest = here.as_ref().map(Files::digest);
    let kept = kept_token(folder);
    let Some(entry) = entry else { bail!("the datastore's bootstrap data is gone") };
    let envelope = Envelope::read(&entry.value)?;
    let is_quiet = entry.mod_revision == agreed.revision
        && digest.is_some()
        && digest == agreed.digest
        && kept.as_ref() == Some(&agreed.token);
    if is_quiet && !envelope.is_overdue(clock::now()) {
        return Ok(None);
    }
    let (shared, sealed_with) = open_with(&envelope, agreed, kept.as_deref())?;
    let theirs = shared.files.digest();
    let of_files = side(digest.as_deref(), theirs.as_str(), agreed.digest.as_deref());
    let of_token = side(kept.as_deref(), sealed_with.as_str(), Some(agreed.token.as_str()));
    if of_files == Side::Foreign {
        bail!(
            "{} holds the certificate authority of another cluster than the datastore: move that folder away, or use \
             another --data-dir",
            tls.display()
        );
    }
    if of_files == Side::Folder && digest.is_some() && digest != agreed.digest {
        tracing::warn!(
            "certificates or keys changed here and on another server at once: the other's are used, these are kept beside {}",
            tls.display()
        );
    }
    let files = match (&here, of_files) {
        (Some(here), Side::Datastore) => here.clone(),
        _ => shared.files.clone(),
    };
    let token = match (&kept, of_token) {
        (Some(kept), Side::Datastore) => kept.clone(),
        _ => sealed_with.clone(),
    };
    let write = if token != sealed_with {
        let handover = Some(Handover::new(&sealed_with, &token)?);
        Some(Envelope::seal(&token, &Shared { files: files.clone(), ..shared }, handover)?)
    } else if of_files == Side::Datastore {
        let handover = envelope.handover.clone().filter(|_| !envelope.is_overdue(clock::now()));
        Some(Envelope::seal(&token, &Shared { files: files.clone(), ..shared }, handover)?)
    } else if envelope.is_overdue(clock::now()) {
        Some(Envelope { handover: None, ..envelope })
    } else {
        None
    };
    let (take_files, take_token) = (of_files == Side::Folder, of_token == Side::Folder);
    Ok(Some(Verdict { write: write.map(|w| w.bytes()).transpose()?, take_files, take_token, files, token }))
}

/// What is sealed, and with which token.
fn open_with(envelope: &Envelope, agreed: &Agreed, kept: Option<&str>) -> Result<(Shared, String)> {
    let mut tokens = vec![agreed.token.clone()];
    tokens.extend(kept.map(str::to_string).filter(|kept| *kept != agreed.token));
    for token in &tokens {
        if let Some(shared) = envelope.open(token)? {
            return Ok((shared, token.clone()));
        }
    }
    if let Some(next) = envelope.handed_over(&agreed.token)?
        && let Some(shared) = envelope.open(&next)?
    {
        return Ok((shared, next));
    }
    bail!(OTHER_TOKEN)
}

/// Does what the verdict says to the folder; true when the files there changed.
fn take(folder: &Path, endpoints: Vec<String>, verdict: &Verdict) -> Result<bool> {
    if verdict.take_files {
        verdict.files.install(&folder.join("tls"))?;
    }
    if verdict.take_token {
        write_token(folder, &verdict.token)?;
    }
    if verdict.write.is_some() {
        tracing::info!("the other servers are given what changed here: keys, certificates or the token");
    }
    let record = Record { endpoints, files: verdict.files.digest() };
    let path = folder.join(RECORD);
    let present: Option<Record> =
        std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
    if present.as_ref() != Some(&record) {
        files::write_atomic(&path, &serde_json::to_vec(&record)?, 0o600)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(verdict.take_files || verdict.take_token)
}

#[cfg(test)]
mod tests {
    use sampan_pki::Authority;

    use super::envelope::HANDOVER_S;
    use super::*;

    fn settings(cidr: &str) -> Settings {
        [("--cluster-cidr", cidr), ("--cluster-domain", "cluster.local")]
            .map(|(flag, value)| (flag.to_string(), value.to_string()))
            .into()
    }

    #[test]
    fn the_side_that_changed_wins() {
        let cases = [
            (None, "b", None, Side::Folder),
            (None, "b", Some("a"), Side::Folder),
            (Some("a"), "a", None, Side::None),
            (Some("b"), "b", Some("a"), Side::None),
            (Some("a"), "b", None, Side::Foreign),
            (Some("a"), "b", Some("a"), Side::Folder),
            (Some("b"), "a", Some("a"), Side::Datastore),
            (Some("b"), "c", Some("a"), Side::Folder),
        ];
        for (folder, datastore, agreed, want) in cases {
            assert_eq!(side(folder, datastore, agreed), want, "{folder:?} {datastore} {agreed:?}");
        }
    }

    #[test]
    fn settings_must_be_the_clusters() {
        check_settings(&settings("10.42.0.0/16"), &settings("10.42.0.0/16")).unwrap();
        // what an older server did not know of
        check_settings(&settings("10.42.0.0/16"), &Settings::new()).unwrap();
        let error = check_settings(&settings("10.1.0.0/16"), &settings("10.42.0.0/16")).unwrap_err();
        assert!(
            error.to_string().contains("--cluster-cidr is 10.1.0.0/16 here and 10.42.0.0/16 in the cluster")
        );
        assert!(error.to_string().starts_with("critical configuration value mismatch between servers"));
    }

    fn entry(value: Vec<u8>, revision: u64) -> Entry {
        Entry { key: KEY.into(), value: value.into(), mod_revision: revision, create_revision: 1 }
    }

    /// One server's folder, as after its start.
    struct Server {
        folder: tempfile::TempDir,
        agreed: Agreed,
    }

    impl Server {
        fn new(token: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            std::fs::create_dir(folder.path().join("tls")).unwrap();
            write_token(folder.path(), token).unwrap();
            Self { folder, agreed: Agreed { revision: 0, digest: None, token: token.to_string() } }
        }

        fn files(&self) -> Option<Files> {
            Files::read(&self.folder.path().join("tls")).unwrap()
        }

        /// What `reconcile` does, with `key` for the datastore; tells whether it was written.
        fn reconcile(&mut self, key: &mut Entry) -> Result<bool> {
            let Some(verdict) = judge(self.folder.path(), Some(key), &self.agreed)? else { return Ok(false) };
            if let Some(bytes) = &verdict.write {
                *key = entry(bytes.clone(), key.mod_revision + 1);
            }
            let (revision, digest) = (key.mod_revision, Some(verdict.files.digest()));
            self.agreed = Agreed { revision, digest, token: verdict.token.clone() };
            take(self.folder.path(), vec!["http://a:2379".to_string()], &verdict).unwrap();
            Ok(verdict.write.is_some())
        }

        /// Another authority, as `certificate rotate-ca` puts it in place.
        fn rotate(&self) {
            let tls = self.folder.path().join("tls");
            let present = Authority::load_or_create(&tls).unwrap();
            let new = rotation::Replacement::generate(&present, false).unwrap();
            new.checked(&tls, "x", false, clock::now()).unwrap().stage(&tls).unwrap();
            rotation::install(&tls, clock::now()).unwrap();
        }
    }

    #[test]
    fn servers_come_to_have_the_same() {
        let (mut a, mut b) = (Server::new("t"), Server::new("t"));
        let made = Files::make(&a.folder.path().join("tls")).unwrap();
        assert!(a.files().is_none(), "nobody uses them yet");
        let shared = Shared { files: made.clone(), settings: settings("10.42.0.0/16"), etcd: None };
        let mut key = entry(Envelope::seal("t", &shared, None).unwrap().bytes().unwrap(), 5);
        for server in [&mut a, &mut b] {
            assert!(!server.reconcile(&mut key).unwrap());
            assert!(server.files() == Some(made.clone()) && server.folder.path().join(RECORD).exists());
            assert!(judge(server.folder.path(), Some(&key), &server.agreed).unwrap().is_none(), "quiet");
        }
        // a new authority on one reaches the other
        a.rotate();
        assert!(a.reconcile(&mut key).unwrap() && !b.reconcile(&mut key).unwrap());
        assert!(a.files() == b.files() && a.files() != Some(made.clone()));
        // and a new token, which the other does not know
        write_token(a.folder.path(), "new").unwrap();
        assert!(a.reconcile(&mut key).unwrap() && !b.reconcile(&mut key).unwrap());
        assert_eq!(kept_token(b.folder.path()).as_deref(), Some("new"));
        let envelope = Envelope::read(&key.value).unwrap();
        assert!(envelope.open("t").unwrap().is_none());
        assert_eq!(envelope.open("new").unwrap().unwrap().settings, settings("10.42.0.0/16"));
        // after an hour nobody is handed it any more
        let mut late = envelope.clone();
        late.handover.as_mut().unwrap().since =
            clock::now() - jiff::SignedDuration::from_secs(HANDOVER_S + 60);
        let mut key = entry(late.bytes().unwrap(), 9);
        assert!(b.reconcile(&mut key).unwrap());
        assert!(Envelope::read(&key.value).unwrap().handover.is_none());
        let mut away = Server::new("t");
        let error = away.reconcile(&mut key).unwrap_err().to_string();
        assert!(error.contains("encrypted with different token"), "{error}");
        // a folder of another cluster is left alone
        let mut foreign = Server::new("new");
        let other = Files::make(&foreign.folder.path().join("tls")).unwrap();
        other.install(&foreign.folder.path().join("tls")).unwrap();
        let error = foreign.reconcile(&mut key).unwrap_err().to_string();
        assert!(error.contains("of another cluster") && foreign.files() == Some(other), "{error}");
    }

    #[test]
    fn who_may_join() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::make(folder.path()).unwrap();
        let mut shared = Shared { files, settings: settings("10.42.0.0/16"), etcd: None };
        let good = JoinToken::parse("good").unwrap();
        let of_member = |shared: &Shared| {
            let value = Envelope::seal("good", shared, None).unwrap().bytes().unwrap();
            for_member(&value, &good, &settings("10.42.0.0/16"))
                .map(|etcd| etcd.key)
                .map_err(|e| e.to_string())
        };
        assert!(of_member(&shared).unwrap_err().contains("no authority of etcd's members"));
        shared.etcd = Some(EtcdAuthority { certificate: "c".to_string(), key: "k".to_string() });
        assert_eq!(of_member(&shared).unwrap(), "k");
        let key = entry(Envelope::seal("good", &shared, None).unwrap().bytes().unwrap(), 1);
        let join = |tokens: &[&str], given: Option<&str>, cidr: &str| {
            let tokens: Vec<String> = tokens.iter().map(|t| (*t).to_string()).collect();
            let given = given.map(|given| JoinToken::parse(given).unwrap());
            let admitted = admitted(&key.value, &tokens, given.as_ref(), &settings(cidr));
            admitted.map(|(token, _)| token).map_err(|e| e.to_string())
        };
        assert_eq!(join(&["good"], Some("good"), "10.42.0.0/16").unwrap(), "good");
        assert_eq!(join(&["good"], None, "10.42.0.0/16").unwrap(), "good");
        let named = format!("K10{}::server:good", "0".repeat(64));
        let refused = [
            (join(&["bad"], Some("bad"), "10.42.0.0/16"), "encrypted with different token"),
            (join(&["bad", "good"], Some("bad"), "10.42.0.0/16"), "--token differs from the cluster's"),
            (join(&["good"], Some("good"), "10.1.0.0/16"), "mismatch"),
            (join(&["good"], Some(&named), "10.42.0.0/16"), "another certificate authority"),
        ];
        for (result, want) in refused {
            let error = result.unwrap_err();
            assert!(error.contains(want), "{error} / {want}");
        }
        let error = candidates(folder.path(), None).unwrap_err().to_string();
        assert!(error.contains("needs --token"), "{error}");
        assert!(Envelope::read(b"{}").is_err() && Envelope::read(br#"{"version":2,"sealed":""}"#).is_err());
    }
}
