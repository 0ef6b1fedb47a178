//! The renewal of an agent's certificate while it runs.
//!
//! Upstream counterpart: kubelet's certificate manager (pkg/kubelet/certificate). What stays true: the server is asked
//! when the certificate is due, when a handshake finds it due (the clock jumped), when the server refuses it, when
//! another authority signs there, and when a command asks; no connection is cut for it. Deliberately different: no
//! CertificateSigningRequest, the join protocol does it, so that a node whose certificate has expired comes back by its
//! token in the same way.
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use http::Request;
use sampan_pki::{LiveCertificate, Pair};
use sampan_world::clock;
use tokio::sync::Notify;

use super::files::{self, Kept};
use super::node_events::NodeEvents;
use super::server::{LONGEST, SHORTEST, until};
use crate::agent_client::Transport;
use crate::folder_changes::{ARRIVALS, FolderChanges};
use crate::join::{self, Membership};

const FIRST_DELAY: Duration = Duration::from_secs(5);
const MAX_DELAY: Duration = Duration::from_secs(900);

pub struct AgentCertificate {
    folder: PathBuf,
    token: Option<String>,
    membership: Arc<Membership>,
    pub live: Arc<LiveCertificate>,
    kept: Kept,
    wanted: Arc<Wanted>,
    _running: OwnedFd,
}

/// Why a new certificate is wanted before the present one is due.
#[derive(Default)]
struct Wanted {
    is_refused: AtomicBool,
    authority_changed: AtomicBool,
    wake: Notify,
}

impl AgentCertificate {
    pub fn new(
        folder: PathBuf,
        token: Option<String>,
        membership: Arc<Membership>,
        pair: &Pair,
    ) -> Result<Arc<Self>> {
        let live = LiveCertificate::new(pair)?;
        let wanted = Arc::new(Wanted::default());
        let told = wanted.clone();
        live.on_due(move || told.wake.notify_one());
        let (kept, running) = (Kept::new(files::KUBELET, &folder, "client-kubelet"), files::hold(&folder)?);
        Ok(Arc::new(Self { folder, token, membership, live, kept, wanted, _running: running }))
    }

    /// To be called when the server does not accept the certificate.
    pub fn on_refused(&self) -> impl Fn() + Send + Sync + use<> {
        let wanted = self.wanted.clone();
        move || {
            wanted.is_refused.store(true, Ordering::SeqCst);
            wanted.wake.notify_one();
        }
    }

    /// Keeps the certificate good for as long as the process lives.
    pub fn keep(self: &Arc<Self>, transport: Arc<Transport>) -> Result<()> {
        let changes = FolderChanges::of(&[&self.folder], ARRIVALS);
        let changes = changes.with_context(|| format!("watching {}", self.folder.display()))?;
        let client = transport.client()?;
        let events = NodeEvents::new(client.clone(), &self.membership.node_name);
        let shared = Arc::new((self.clone(), transport, events, changes));
        sampan_telemetry::supervise("certificate", move || {
            let shared = shared.clone();
            async move { shared.0.follow(&shared.1, &shared.2, &shared.3).await }
        });
        let this = self.clone();
        sampan_telemetry::supervise("certificate authority", move || {
            let (this, client) = (this.clone(), client.clone());
            async move { this.follow_authority(&client).await }
        });
        Ok(())
    }

    async fn follow(&self, transport: &Transport, events: &NodeEvents, changes: &FolderChanges) {
        let mut delay = FIRST_DELAY;
        loop {
            let refused = self.wanted.is_refused.load(Ordering::SeqCst);
            let renewed = match self.reason() {
                None => Ok(None),
                Some(why) => self.renew(why).await.map(Some),
            };
            // a server that refuses each new one too is not asked ever faster
            let pause = if refused { delay } else { SHORTEST };
            let failed = renewed.is_err();
            let wait = match renewed {
                Ok(renewed) => {
                    delay = if refused { (delay * 2).min(MAX_DELAY) } else { FIRST_DELAY };
                    if renewed.is_some() {
                        transport.connect_anew();
                        events.renewed(&self.kept);
                    }
                    let due =
                        Pair::load(&self.kept.path.with_extension("")).map(|pair| until(pair.renew_at()));
                    // one that is due as soon as it comes has an authority that ends: asking more often won't help
                    due.filter(|due| !due.is_zero()).map_or(LONGEST, |due| due.min(LONGEST))
                }
                Err(error) => {
                    tracing::warn!(
                        "this node's certificate is not renewed: {error:#}; trying again in {} s",
                        delay.as_secs()
                    );
                    events.warn_of(std::slice::from_ref(&self.kept));
                    let wait = delay;
                    delay = (delay * 2).min(MAX_DELAY);
                    wait
                }
            };
            tokio::time::sleep(pause).await;
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // every request tells of a refusal: after a failure the delay counts
                () = self.wanted.wake.notified(), if !failed => {}
                _ = changes.next() => {}
            }
        }
    }

    fn reason(&self) -> Option<&'static str> {
        let pair = Pair::load(&self.kept.path.with_extension(""));
        match pair {
            _ if self.kept.is_asked_for() => Some("it was asked for"),
            _ if self.wanted.is_refused.load(Ordering::SeqCst) => Some("the server refused the present one"),
            _ if self.wanted.authority_changed.load(Ordering::SeqCst) => Some("another authority signs"),
            Some(pair) if pair.renew_at() > clock::now() => None,
            _ => Some("it was due"),
        }
    }

    async fn renew(&self, why: &str) -> Result<()> {
        let present = Pair::load(&self.kept.path.with_extension("")).and_then(|pair| pair.subject());
        let is_good = present.is_some_and(|s| s.not_after > clock::now());
        let own = is_good.then(|| self.live.clone());
        let pair = join::renew(&self.folder, &self.membership, own, self.token.as_deref()).await?;
        self.live.replace(&pair)?;
        self.wanted.is_refused.store(false, Ordering::SeqCst);
        self.wanted.authority_changed.store(false, Ordering::SeqCst);
        self.kept.answer_request();
        let until = pair.subject().map(|s| s.not_after.to_string()).unwrap_or_default();
        tracing::info!(service = self.kept.service, until, "certificate renewed: {why}");
        Ok(())
    }

    /// Asks the server for other authorities than those known here; it answers when there are.
    async fn follow_authority(&self, client: &kube::Client) {
        let mut delay = FIRST_DELAY;
        loop {
            let known = sampan_pki::sha256_hex(self.membership.trusted().as_bytes());
            let asked = Request::get(format!("{}?known={known}", join::AUTHORITY_CHANGES)).body(Vec::new());
            let Ok(request) = asked else { return };
            match client.request_text(request).await {
                Ok(pem) if pem.is_empty() || sampan_pki::sha256_hex(pem.as_bytes()) == known => {
                    delay = FIRST_DELAY;
                }
                Ok(_) => {
                    self.wanted.authority_changed.store(true, Ordering::SeqCst);
                    self.wanted.wake.notify_one();
                }
                Err(error) => tracing::debug!(%error, "asking for the certificate authority"),
            }
            // what the server said is acted on meanwhile; a server that is away is not asked often
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(MAX_DELAY);
        }
    }
}
