//! What a server proves itself with: its authority, its certificates, its administrator's kubeconfig, its token; and
//! their renewal while it runs.
//!
//! Upstream counterparts: K3s' pkg/daemons/control/deps and dynamiclistener, kubelet's certificate manager. What stays
//! true: one pass over everything says what is to be done, and does it; it runs at the start, when something is due, when
//! a handshake finds the certificate due (the clock jumped), when a file came into the folder (a command asks), and
//! hourly. A pass that finds nothing to do writes nothing. What fails is tried again, the rest goes on. Where servers share
//! a datastore, each pass ends with comparing the folder with it ([`crate::bootstrap_data`]), and one begins when it
//! changed there.
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use sampan_apiserver::authn::Authenticator;
use sampan_client::Identity;
use sampan_pki::join_token::Credentials;
use sampan_pki::tls::LiveVerifier;
use sampan_pki::{Authority, JoinToken, LiveCertificate, Pair, ServiceAccountKey, rotation};
use sampan_world::clock;
use tokio::sync::{Notify, watch};

use super::files::{self, Kept};
use super::node_events::NodeEvents;
use crate::bootstrap_data::BootstrapData;
use crate::folder_changes::{ARRIVALS, FolderChanges};
use crate::members::certificate::MemberCertificate;
use crate::tunnel_endpoint::{JOIN_USER, JOINERS};

/// The longest time between two passes.
pub const LONGEST: Duration = Duration::from_secs(3600);
/// The shortest, however often it is asked for.
pub const SHORTEST: Duration = Duration::from_secs(1);
/// After a failure.
const RETRY: Duration = Duration::from_secs(60);
const SERVING: &str = "serving-apiserver";
const ADMIN: &str = "client-admin";

/// What the flags say.
pub struct Settings {
    /// `<data-dir>/server`
    pub folder: PathBuf,
    pub token: Option<String>,
    /// DNS names and addresses of the serving certificate.
    pub names: Vec<String>,
    /// The name of the server's own node, when it has one.
    pub node: Option<String>,
    pub kubeconfig: PathBuf,
    pub kubeconfig_mode: u32,
    /// The address in the kubeconfig.
    pub server: String,
    pub lifetime_seconds: i64,
    /// What other servers have in common with this one, where there may be some.
    pub shared: Option<Arc<BootstrapData>>,
    /// What this server's etcd member proves itself with, where it has one.
    pub member: Option<Arc<MemberCertificate>>,
}

pub struct ServerCertificates {
    settings: Settings,
    tls: PathBuf,
    authority: RwLock<Arc<Authority>>,
    bundle: watch::Sender<String>,
    ending: watch::Sender<bool>,
    pub account_key: Arc<ServiceAccountKey>,
    pub verifier: Arc<LiveVerifier>,
    pub serving: Arc<LiveCertificate>,
    node: Option<NodeCertificate>,
    token: RwLock<String>,
    /// What the kubeconfig was last written with.
    kubeconfig: Mutex<String>,
    wake: Arc<Notify>,
    _running: Vec<OwnedFd>,
}

/// What the server's own node shows other nodes. It is made anew at each start, and kept in memory only.
struct NodeCertificate {
    name: String,
    live: Arc<LiveCertificate>,
    present: Mutex<Pair>,
}

impl NodeCertificate {
    fn new(name: &str, authority: &Authority) -> Result<Self> {
        let pair = authority.kubelet_client(name)?;
        Ok(Self { name: name.to_string(), live: LiveCertificate::new(&pair)?, present: Mutex::new(pair) })
    }

    fn renew(&self, authority: &Authority) -> Result<Pair> {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        let is_own = present.certificates()?.first().is_some_and(|c| authority.has_signed(c));
        if !is_own || present.renew_at() <= clock::now() {
            *present = authority.kubelet_client(&self.name)?;
            self.live.replace(&present)?;
        }
        Ok(present.clone())
    }
}

/// What a pass did.
#[derive(Default)]
struct Pass {
    renewed: Vec<Kept>,
    failed: bool,
    /// Something is due that cannot be had better: its authority ends.
    is_futile: bool,
    next: Option<Timestamp>,
}

impl ServerCertificates {
    /// Makes what is missing, ends what was begun, and loads all.
    pub fn open(settings: Settings) -> Result<Arc<Self>> {
        let tls = settings.folder.join("tls");
        let member = settings.member.as_ref().map(|member| member.files().folder().to_path_buf());
        let running = [Some(tls.clone()), member].into_iter().flatten().map(|folder| files::hold(&folder));
        let running = running.collect::<Result<Vec<_>>>()?;
        rotation::install(&tls, clock::now()).context("ending the replacement of the authority")?;
        let authority = load_authority(&tls, settings.lifetime_seconds)?;
        let account_key = Arc::new(ServiceAccountKey::load_or_create(&tls.join("service-account.key"))?);
        let token = first_token(&settings.folder, settings.token.as_deref())?;
        let (serving, _) = serving(&tls, &authority, &settings.names)?;
        Kept::new(files::API_SERVER, &tls, SERVING).answer_request();
        let node = settings.node.as_deref().map(|name| NodeCertificate::new(name, &authority)).transpose()?;
        let this = Arc::new(Self {
            bundle: watch::channel(authority.certificate_pem().to_string()).0,
            ending: watch::channel(false).0,
            verifier: LiveVerifier::new(authority.trusted())?,
            serving: LiveCertificate::new(&serving)?,
            authority: RwLock::new(Arc::new(authority)),
            account_key,
            node,
            token: RwLock::new(token),
            kubeconfig: Mutex::default(),
            wake: Arc::new(Notify::new()),
            _running: running,
            settings,
            tls,
        });
        this.write_node_token()?;
        let wake = this.wake.clone();
        this.serving.on_due(move || wake.notify_one());
        Ok(this)
    }

    pub fn authority(&self) -> Arc<Authority> {
        self.authority.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the server's own node shows other nodes.
    pub fn node(&self) -> Option<Arc<LiveCertificate>> {
        self.node.as_ref().map(|node| node.live.clone())
    }

    /// All trusted certificates (PEM), and their changes.
    pub fn bundle(&self) -> watch::Receiver<String> {
        self.bundle.subscribe()
    }

    /// The tokens that nodes join with, as authentication knows them.
    pub fn static_tokens(&self) -> Vec<(String, Identity)> {
        let token = self.token.read().unwrap_or_else(PoisonError::into_inner).clone();
        vec![(token, Identity::new(JOIN_USER, &[JOINERS]))]
    }

    /// Waits until the bundle is another one than that of `known` (a SHA-256); `None` when it stays so for long, or the
    /// server ends.
    pub async fn other_bundle(&self, known: &str) -> Option<String> {
        let (mut bundle, mut ending) = (self.bundle(), self.ending.subscribe());
        let is_other = |pem: &String| sampan_pki::sha256_hex(pem.as_bytes()) != known;
        tokio::select! {
            found = bundle.wait_for(is_other) => found.ok().map(|pem| pem.clone()),
            _ = ending.wait_for(|ends| *ends) => None,
            () = tokio::time::sleep(LONGEST / 2) => None,
        }
    }

    /// Lets go of those who wait in [`Self::other_bundle`].
    pub fn end(&self) {
        self.ending.send_replace(true);
    }

    /// Writes the administrator's kubeconfig. Whoever sees it may take the API to be served.
    pub fn write_kubeconfig(&self) -> Result<()> {
        let authority = self.authority();
        let (pair, _) = self.admin(&authority)?;
        self.write_kubeconfig_of(&authority, &pair)?;
        Kept::new(files::ADMIN, &self.tls, ADMIN).answer_request();
        Ok(())
    }

    fn write_kubeconfig_of(&self, authority: &Authority, admin: &Pair) -> Result<()> {
        let path = &self.settings.kubeconfig;
        let server = &self.settings.server;
        let text = sampan_pki::kubeconfig::kubeconfig("default", server, authority.certificate_pem(), admin);
        let mut written = self.kubeconfig.lock().unwrap_or_else(PoisonError::into_inner);
        if *written == text {
            return Ok(());
        }
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        sampan_world::files::write_atomic(path, text.as_bytes(), self.settings.kubeconfig_mode)
            .with_context(|| format!("writing {}", path.display()))?;
        *written = text;
        Ok(())
    }

    fn admin(&self, authority: &Authority) -> Result<(Pair, bool)> {
        let kept = Kept::new(files::ADMIN, &self.tls, ADMIN);
        renewed(&kept, authority, |_| true, || authority.client("system:admin", &[Identity::MASTERS]))
    }

    /// Keeps all of it good for as long as the process lives.
    pub fn keep(
        self: &Arc<Self>,
        authenticator: Arc<Authenticator>,
        events: Option<NodeEvents>,
    ) -> Result<()> {
        let mut folders: Vec<&Path> = vec![&self.tls, &self.settings.folder];
        folders.extend(self.settings.member.as_ref().map(|member| member.files().folder()));
        let changes = FolderChanges::of(&folders, ARRIVALS);
        let changes = changes.with_context(|| format!("watching {}", self.tls.display()))?;
        let shared = Arc::new((self.clone(), authenticator, events, changes));
        sampan_telemetry::supervise("certificates", move || {
            let shared = shared.clone();
            async move {
                let (this, authenticator, events, changes) = &*shared;
                this.follow(authenticator, events.as_ref(), changes).await;
            }
        });
        if let Some(shared) = self.settings.shared.clone() {
            sampan_telemetry::supervise("bootstrap data", move || {
                let shared = shared.clone();
                async move { shared.follow().await }
            });
        }
        Ok(())
    }

    async fn follow(
        self: &Arc<Self>,
        authenticator: &Arc<Authenticator>,
        events: Option<&NodeEvents>,
        changes: &FolderChanges,
    ) {
        loop {
            let (this, authenticator) = (self.clone(), authenticator.clone());
            // files are synced to disk, which takes long on some
            let mut pass =
                tokio::task::spawn_blocking(move || this.pass(&authenticator)).await.unwrap_or_default();
            let is_taken = self.reconcile(&mut pass).await;
            if let Some(events) = events {
                pass.renewed.iter().for_each(|kept| events.renewed(kept));
                events.warn_of(&files::of(self.settings.folder.parent().unwrap_or(&self.settings.folder)));
            }
            if is_taken {
                // what came from another server is taken up at once
                continue;
            }
            let longest = if pass.failed { RETRY } else { LONGEST };
            let next = pass.next.map_or(longest, |next| until(next).min(longest));
            tokio::time::sleep(SHORTEST).await;
            tokio::select! {
                () = tokio::time::sleep(next) => {}
                // handshakes would tell again and again what cannot be helped
                () = self.wake.notified(), if !pass.is_futile => {}
                _ = changes.next() => {}
                () = self.changed_elsewhere() => {}
            }
        }
    }

    /// Brings the folder and the datastore together; true when files here were written.
    async fn reconcile(&self, pass: &mut Pass) -> bool {
        let Some(shared) = &self.settings.shared else { return false };
        match shared.reconcile().await {
            Ok(is_taken) => is_taken,
            Err(error) => {
                pass.note("what servers have in common", Err(error));
                false
            }
        }
    }

    async fn changed_elsewhere(&self) {
        match &self.settings.shared {
            Some(shared) => shared.changed().await,
            None => std::future::pending().await,
        }
    }

    fn pass(&self, authenticator: &Authenticator) -> Pass {
        let mut pass = Pass::default();
        pass.note("the authority", self.take_authority());
        let authority = self.authority();
        pass.note("the service account keys", self.account_key.reload().map(drop).map_err(Into::into));
        pass.note("the token", self.take_token(authenticator));
        pass.note("node-token", self.write_node_token());
        let serving = serving(&self.tls, &authority, &self.settings.names);
        if let Some(pair) = pass.take(Kept::new(files::API_SERVER, &self.tls, SERVING), serving) {
            pass.note("the API's certificate", self.serving.replace(&pair).map_err(Into::into));
        }
        if let Some(node) = &self.node {
            // in memory: nothing to tell of
            let renewed = node.renew(&authority).map(|pair| (pair, false));
            pass.take(Kept::new(files::KUBELET, &self.tls, "node"), renewed);
        }
        if let Some(member) = &self.settings.member {
            // etcd, and the store's connections to it, read the files when they next need them
            pass.take(member.kept(), member.renewed());
        }
        let admin = self.admin(&authority);
        if let Some(pair) = pass.take(Kept::new(files::ADMIN, &self.tls, ADMIN), admin) {
            pass.note("the kubeconfig", self.write_kubeconfig_of(&authority, &pair));
        }
        pass.renewed.iter().for_each(Kept::answer_request);
        pass
    }

    /// Puts a new authority in place that waits, and uses the one that is in place.
    fn take_authority(&self) -> Result<()> {
        if let Err(error) = rotation::install(&self.tls, clock::now()) {
            let staged = rotation::staged(&self.tls);
            let aside = self.tls.join("refused-authority");
            let _ = std::fs::remove_dir_all(&aside);
            std::fs::rename(&staged, &aside).with_context(|| format!("moving {} away", staged.display()))?;
            return Err(error).with_context(|| format!("refused, it is in {}", aside.display()));
        }
        let present = self.authority();
        let path = self.tls.join("server-ca.crt");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        if text == present.certificate_pem() {
            return Ok(());
        }
        let next = load_authority(&self.tls, self.settings.lifetime_seconds)?;
        self.verifier.replace(next.trusted())?;
        tracing::info!(hash = next.hash(), "another certificate authority signs from now on");
        self.bundle.send_replace(next.certificate_pem().to_string());
        *self.authority.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        Ok(())
    }

    /// Uses the token in the file.
    fn take_token(&self, authenticator: &Authenticator) -> Result<()> {
        let Some(kept) = kept_token(&self.settings.folder) else { return Ok(()) };
        let changed = *self.token.read().unwrap_or_else(PoisonError::into_inner) != kept;
        if changed {
            *self.token.write().unwrap_or_else(PoisonError::into_inner) = kept;
            authenticator.replace_static_tokens(self.static_tokens());
            tracing::info!("nodes join with another token from now on");
        }
        Ok(())
    }

    /// Writes the token, with the hash that lets agents trust this server, for copying.
    fn write_node_token(&self) -> Result<()> {
        let secret = self.token.read().unwrap_or_else(PoisonError::into_inner).clone();
        write_node_token(&self.settings.folder, &self.authority().hash(), &secret)
    }
}

impl Pass {
    fn note(&mut self, what: &str, done: Result<()>) {
        if let Err(error) = done {
            tracing::warn!("{what}: {error:#}; trying again");
            self.failed = true;
        }
    }

    fn take(&mut self, kept: Kept, made: Result<(Pair, bool)>) -> Option<Pair> {
        match made {
            Ok((pair, is_new)) => {
                let at = pair.renew_at();
                match at > clock::now() {
                    true => self.next = Some(self.next.map_or(at, |next| next.min(at))),
                    false => self.is_futile = true,
                }
                if is_new {
                    self.renewed.push(kept);
                }
                Some(pair)
            }
            Err(error) => {
                tracing::warn!("renewing {}: {error:#}; trying again", kept.service);
                self.failed = true;
                None
            }
        }
    }
}

/// How long until then, by the clock as it is.
pub fn until(then: Timestamp) -> Duration {
    let left = then.as_millisecond().saturating_sub(clock::now().as_millisecond());
    Duration::from_millis(u64::try_from(left).unwrap_or(0))
}

fn load_authority(tls: &Path, lifetime_seconds: i64) -> Result<Authority> {
    let authority = Authority::load_or_create(tls).context("the cluster's certificate authority")?;
    Ok(authority.with_lifetime(lifetime_seconds))
}

fn serving(tls: &Path, authority: &Authority, names: &[String]) -> Result<(Pair, bool)> {
    let kept = Kept::new(files::API_SERVER, tls, SERVING);
    renewed(&kept, authority, |have| have == names, || authority.server("sampan", names))
}

/// The pair that is kept, or a new one in its place when it is due, asked for, signed by another authority, or when
/// `fits` refuses its names; whether it is new. Who asked for it is answered by the caller, when it is used.
pub fn renewed(
    kept: &Kept,
    authority: &Authority,
    fits: impl Fn(&[String]) -> bool,
    make: impl FnOnce() -> Result<Pair, sampan_pki::PkiError>,
) -> Result<(Pair, bool)> {
    let stem = kept.path.with_extension("");
    let present = Pair::load(&stem);
    let why = match present.as_ref().and_then(|pair| Some((pair, pair.subject()?))) {
        None => "it was not there",
        Some(_) if kept.is_asked_for() => "it was asked for",
        Some((pair, _)) if !pair.certificates()?.first().is_some_and(|c| authority.has_signed(c)) => {
            "another authority signs"
        }
        Some((_, told)) if !fits(&told.names) => "its names changed",
        // what would end no later is not worth writing
        Some((pair, told))
            if pair.renew_at() <= clock::now() && authority.next_not_after() > told.not_after =>
        {
            "it was due"
        }
        Some((pair, _)) => return Ok((pair.clone(), false)),
    };
    let pair = make()?;
    pair.save(&stem)?;
    let until = pair.subject().map(|s| s.not_after.to_string()).unwrap_or_default();
    tracing::info!(service = kept.service, until, "certificate made: {why}");
    Ok((pair, true))
}

pub fn kept_token(folder: &Path) -> Option<String> {
    let text = std::fs::read_to_string(folder.join("token")).ok()?;
    Some(text.trim().to_string()).filter(|token| !token.is_empty())
}

/// The secret that nodes join with: as kept, as given, or made up.
fn first_token(folder: &Path, given: Option<&str>) -> Result<String> {
    let path = folder.join("token");
    let secret = match (given, kept_token(folder)) {
        (Some(given), kept) => {
            let given = JoinToken::parse(given).context("--token")?.bearer();
            if kept.is_some_and(|kept| kept != given) {
                bail!(
                    "--token differs from the one in {}. If it was changed by `sampan token rotate`, give the new one, \
                     or none, here or in the configuration file",
                    path.display()
                );
            }
            given
        }
        (None, Some(kept)) => return Ok(kept),
        (None, None) => new_secret(),
    };
    write_token(folder, &secret)?;
    Ok(secret)
}

pub fn new_secret() -> String {
    let mut bytes = [0; 16];
    sampan_world::random::fill(&mut bytes);
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn write_token(folder: &Path, secret: &str) -> Result<()> {
    write_if_other(&folder.join("token"), &format!("{secret}\n"))
}

pub fn write_node_token(folder: &Path, authority_hash: &str, secret: &str) -> Result<()> {
    let credentials = Credentials::Secret { user: "server".to_string(), secret: secret.to_string() };
    let secure = JoinToken::secure(authority_hash, credentials).to_string();
    write_if_other(&folder.join("node-token"), &format!("{secure}\n"))
}

fn write_if_other(path: &Path, text: &str) -> Result<()> {
    if std::fs::read_to_string(path).ok().as_deref() == Some(text) {
        return Ok(());
    }
    sampan_world::files::write_atomic(path, text.as_bytes(), 0o600)
        .with_context(|| format!("writing {}", path.display()))
}

/// Names as certificates have them: sorted, each once, addresses in their usual form.
pub fn names(all: impl IntoIterator<Item = String>) -> Vec<String> {
    let usual = |name: String| name.parse::<std::net::IpAddr>().map_or(name, |ip| ip.to_string());
    all.into_iter().map(usual).collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampan_apiserver::authn::{Options, ServiceAccountTokens};

    struct NoObjects;

    #[async_trait::async_trait]
    impl sampan_apiserver::authn::Lookup for NoObjects {
        async fn get(&self, _: &str, _: &str, _: &str) -> Result<Option<serde_json::Value>, String> {
            Ok(None)
        }
    }

    struct Server {
        data_dir: PathBuf,
        certificates: Arc<ServerCertificates>,
        authenticator: Authenticator,
    }

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.data_dir);
        }
    }

    fn open(data_dir: &Path, sans: &[&str]) -> Result<Arc<ServerCertificates>> {
        std::fs::create_dir_all(data_dir.join("server/tls"))?;
        ServerCertificates::open(Settings {
            folder: data_dir.join("server"),
            token: None,
            names: names(sans.iter().map(|s| (*s).to_string())),
            node: Some("n".to_string()),
            kubeconfig: data_dir.join("etc/kubeconfig"),
            kubeconfig_mode: 0o600,
            server: "https://127.0.0.1:6443".to_string(),
            lifetime_seconds: 365 * 86_400,
            shared: None,
            member: None,
        })
    }

    fn server() -> Server {
        let data_dir =
            std::env::temp_dir().join(format!("sampan-server-{}", sampan_world::random::suffix(8)));
        let certificates = open(&data_dir, &["localhost"]).unwrap();
        let lookup = Arc::new(NoObjects);
        let authenticator = Authenticator::new(Options {
            service_accounts: Arc::new(ServiceAccountTokens::new(
                certificates.account_key.clone(),
                lookup.clone(),
            )),
            client_verifier: certificates.verifier.clone(),
            lookup,
            static_tokens: certificates.static_tokens(),
            anonymous: true,
        });
        certificates.write_kubeconfig().unwrap();
        Server { data_dir, certificates, authenticator }
    }

    impl Server {
        fn read(&self, file: &str) -> String {
            std::fs::read_to_string(self.data_dir.join(file)).unwrap()
        }

        /// Runs a pass; tells the services renewed and whether the kubeconfig is another one.
        fn pass(&self) -> (Vec<&'static str>, bool) {
            let before = self.read("etc/kubeconfig");
            let pass = self.certificates.pass(&self.authenticator);
            assert!(!pass.failed);
            (pass.renewed.iter().map(|k| k.service).collect(), before != self.read("etc/kubeconfig"))
        }
    }

    #[tokio::test]
    async fn renews_what_is_due_and_writes_nothing_else() {
        let s = server();
        assert_eq!(s.pass(), (vec![], false));
        let written = |s: &Server| {
            let mut all: Vec<_> = std::fs::read_dir(s.data_dir.join("server/tls"))
                .unwrap()
                .map(|e| e.unwrap().metadata().unwrap().modified().unwrap())
                .collect();
            all.sort();
            all
        };
        let before = written(&s);
        assert_eq!((s.pass(), written(&s)), ((vec![], false), before));
        Kept::new(files::ADMIN, &s.data_dir.join("server/tls"), ADMIN).ask_for_renewal().unwrap();
        assert_eq!(s.pass(), (vec![files::ADMIN], true));
        assert_eq!(s.pass(), (vec![], false));
        // another name at a restart
        let again = open(&s.data_dir, &["localhost", "FD00::0001"]).unwrap();
        assert!(
            !s.read("server/tls/serving-apiserver.crt").is_empty()
                && again.settings.names == ["fd00::1", "localhost"]
        );
        let served = Pair::load(&s.data_dir.join("server/tls/serving-apiserver")).unwrap().subject().unwrap();
        assert_eq!(served.names, ["fd00::1", "localhost"]);
    }

    #[tokio::test]
    async fn takes_up_a_new_authority_and_token() {
        let s = server();
        let tls = s.data_dir.join("server/tls");
        let old = s.certificates.authority();
        let old_client = old.client("jane", &[]).unwrap().certificates().unwrap();
        let hash = sampan_pki::sha256_hex(old.certificate_pem().as_bytes());
        let new = rotation::Replacement::generate(&old, false).unwrap();
        new.checked(&tls, "x", false, clock::now()).unwrap().stage(&tls).unwrap();
        let (certificates, known) = (s.certificates.clone(), hash.clone());
        let waiting = tokio::spawn(async move { certificates.other_bundle(&known).await });
        assert_eq!(s.pass(), (vec![files::API_SERVER, files::ADMIN], true));
        assert_ne!(s.certificates.authority().hash(), old.hash());
        assert_eq!(waiting.await.unwrap().unwrap(), s.certificates.authority().certificate_pem());
        assert!(s.read("server/node-token").contains(&s.certificates.authority().hash()));
        let now = rustls::pki_types::UnixTime::now();
        use rustls::server::danger::ClientCertVerifier;
        s.certificates.verifier.verify_client_cert(&old_client[0], &[], now).unwrap();
        // what cannot be used is put aside
        std::fs::create_dir(rotation::staged(&tls)).unwrap();
        std::fs::write(rotation::staged(&tls).join("server-ca.crt"), "rubbish").unwrap();
        std::fs::write(rotation::staged(&tls).join("server-ca.key"), "rubbish").unwrap();
        assert!(s.certificates.pass(&s.authenticator).failed && tls.join("refused-authority").exists());
        assert_eq!(s.pass(), (vec![], false));

        write_token(&s.data_dir.join("server"), "fresh").unwrap();
        s.pass();
        assert!(s.read("server/node-token").ends_with("::server:fresh\n"));
        assert!(s.authenticator.by_token("fresh", &[]).await.unwrap().is_some());
        assert!(
            first_token(&s.data_dir.join("server"), Some("old"))
                .unwrap_err()
                .to_string()
                .contains("token rotate")
        );
        s.certificates.end();
        let bundle = sampan_pki::sha256_hex(s.certificates.authority().certificate_pem().as_bytes());
        assert_eq!(s.certificates.other_bundle(&bundle).await, None);
    }
}
