//! Servers that keep their cluster in etcd members of their own: each runs the `etcd` program as its child.
//!
//! Upstream counterparts: K3s' `--cluster-init`, `--server` and `--cluster-reset`, pkg/etcd, pkg/cluster/managed.go. What
//! stays true: a server uses its own member only; the members' data is below `<data-dir>/server/db/etcd` and nowhere else;
//! without these flags, and without that folder, nothing of this runs. Everything above the datastore is as with an etcd
//! that the owner runs ([`crate::datastore`]). Deliberately different from K3s: etcd is a program of its own, which the
//! machine has or is given; no snapshots are taken or restored.
pub mod certificate;
pub mod join;
mod program;
mod record;
pub mod removal;
mod reset;

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use sampan_pki::JoinToken;
use sampan_store::Members;
use sampan_world::random;

use self::certificate::{Files, MemberCertificate};
pub use self::program::end_left_over;
use self::program::{Initial, Program, Running};
use self::record::LOCAL;
pub use self::record::Way;
use self::record::{Record, has_begun};
use crate::bootstrap_data::Settings;
use crate::certificate::files::is_free;
use crate::certificate::server::{kept_token, new_secret, write_token};
use crate::datastore::Datastore;
use crate::server::make_private;

/// How often etcd may end while it is waited for the first time.
const FALSE_STARTS: u32 = 3;
const RETRY: Duration = Duration::from_millis(200);

#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Several servers, with etcd members of their own")]
pub struct MemberArgs {
    /// Begin a cluster that other servers can join: it is kept in etcd members, one a server, which the servers run
    /// themselves. The program `etcd` is needed
    #[arg(long)]
    pub cluster_init: bool,
    /// Server of such a cluster to join as another one, https://HOST:6443; once this server is a member, without effect
    #[arg(short, long, env = "SAMPAN_URL")]
    pub server: Option<String>,
    /// The program `etcd`, 3.4 or later (default: the one in the PATH)
    #[arg(long)]
    pub etcd: Option<PathBuf>,
    /// Forget all other members and make this server's data the whole of the cluster's, then end: for when most of the
    /// members are lost for good
    #[arg(long)]
    pub cluster_reset: bool,
}

/// Who a server is among the members.
pub struct Own<'a> {
    /// `<data-dir>/server`
    pub folder: &'a Path,
    pub name: String,
    pub address: IpAddr,
    pub token: Option<&'a str>,
    /// What must be equal on all servers.
    pub settings: &'a Settings,
    pub certificate_lifetime_seconds: i64,
    pub is_debugged: bool,
}

/// What is to be done, if anything: see [`record::way`].
pub fn way(folder: &Path, args: &MemberArgs, datastore: Option<&Datastore>) -> Result<Option<Way>> {
    record::way(folder, args, datastore)
}

/// This server's member, running.
pub struct Member {
    folder: PathBuf,
    record: Record,
    pub certificate: Arc<MemberCertificate>,
    running: Running,
    /// Nobody else starts an etcd on this data while it lives.
    _held: OwnedFd,
}

/// This member is none any more.
#[derive(Debug, thiserror::Error)]
#[error(
    "this server's etcd was removed from the cluster, as when its Node is deleted: to join again, empty {db} and start with \
     --server https://ANOTHER-SERVER:6443", db = .0.display()
)]
pub struct Removed(PathBuf);

impl Member {
    /// Has this server be a member, and waits until its etcd answers with the others' agreement.
    pub async fn start(args: &MemberArgs, way: &Way, own: &Own<'_>) -> Result<Self> {
        let held = hold(own.folder)?;
        let folder = own.folder.to_path_buf();
        tokio::task::spawn_blocking(move || end_left_over(&folder)).await??;
        let path = program::find(args.etcd.as_deref())?;
        if *way != Way::Again {
            program::check_version(&path).await?;
        }
        let (record, initial, certificate) = match way {
            Way::First => first(own)?,
            Way::Join(url) => joining(own, url).await?,
            Way::Again => again(own)?,
        };
        certificate.renewed()?;
        certificate.kept().answer_request();
        let initial = match initial {
            // the members are asked with the certificate that is there by now
            None => {
                let members = join::members_at(own.folder, &record.others)?;
                Initial::Existing(join::be_added(&members, &record).await?)
            }
            Some(initial) => initial,
        };
        let folder = own.folder.to_path_buf();
        let program = Program::new(path, &folder, &record, &initial, own.is_debugged);
        let running = program.keep();
        let mut this = Self { folder, record, certificate: Arc::new(certificate), running, _held: held };
        match this.ready().await {
            Ok(()) => Ok(this),
            Err(error) => {
                this.end().await;
                Err(error)
            }
        }
    }

    /// This server's member, alone.
    pub fn local(&self) -> Result<Members> {
        join::members_at(&self.folder, &[LOCAL.to_string()])
    }

    /// Where the store is.
    pub fn datastore(&self) -> Datastore {
        let files = self.certificate.files();
        Datastore::of_member(LOCAL, files.authority(), files.certificate(), files.key())
    }

    /// Waits until etcd answers, has its vote, and knows a leader.
    async fn ready(&mut self) -> Result<()> {
        let members = self.local()?;
        let mut waiting = join::Waiting::new();
        loop {
            let status = tokio::select! {
                status = members.status() => status,
                state = self.running.ended(FALSE_STARTS) => {
                    if state.is_removed {
                        return Err(self.removed().into());
                    }
                    bail!("etcd does not run: {} (ports 2379 and 2380 are taken?)", state.words)
                }
            };
            match status {
                Ok(status) if status.is_learner && !self.record.others.is_empty() => {
                    let others = join::members_at(&self.folder, &self.record.others)?;
                    join::be_promoted(&others, &self.record, &self.running).await?;
                }
                Ok(status) => {
                    tracing::info!(
                        version = status.version,
                        data_bytes = status.db_size_bytes,
                        leads = self.leads(&members, status.leader).await,
                        "this server's etcd is ready"
                    );
                    return Ok(());
                }
                Err(error) => {
                    // it is there at once, unless other members have to come first
                    let context = "etcd begins (more than half of the members are needed)";
                    waiting.again(&anyhow!(error).context(context)).await?;
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Whether it leads; and what it knows of the others is kept for a start without them.
    async fn leads(&mut self, members: &Members, leader: u64) -> bool {
        let Ok(all) = members.list().await else { return false };
        self.record.others = join::others(&all, &self.record);
        if let Err(error) = self.record.write(&self.folder) {
            tracing::warn!("{error:#}");
        }
        all.iter().any(|member| member.id == leader && member.peer_urls.contains(&self.record.peer_url()))
    }

    /// The member's number, as etcd has it.
    pub async fn id(&self) -> Result<u64> {
        let all = self.local()?.list().await?;
        let peer = self.record.peer_url();
        let own = all.into_iter().find(|member| member.peer_urls.contains(&peer));
        own.map(|member| member.id).with_context(|| format!("etcd knows no member at {peer}"))
    }

    fn removed(&self) -> Removed {
        Removed(self.folder.join("db"))
    }

    /// Waits until the cluster has removed this member.
    pub async fn gone(&self) -> Removed {
        self.running.removed().await;
        self.removed()
    }

    pub async fn end(self) {
        self.running.end().await;
    }
}

fn hold(folder: &Path) -> Result<OwnedFd> {
    let db = folder.join("db");
    for path in [db.clone(), Files::of(folder).folder().to_path_buf()] {
        make_private(&path)?;
    }
    is_free(&db)?.with_context(|| format!("another server uses {}", db.display()))
}

type Beginning = (Record, Option<Initial>, MemberCertificate);

fn certificate(own: &Own<'_>, may_begin: bool) -> Result<MemberCertificate> {
    let files = Files::of(own.folder);
    MemberCertificate::open(files, &own.name, own.address, may_begin, own.certificate_lifetime_seconds)
}

/// The first member's start; a token is made up where none is given.
fn first(own: &Own<'_>) -> Result<Beginning> {
    if own.token.is_none() && kept_token(own.folder).is_none() {
        write_token(own.folder, &new_secret())?;
    }
    let certificate = certificate(own, true)?;
    let record = Record { name: own.name.clone(), address: own.address, others: Vec::new() };
    record.write(own.folder)?;
    Ok((record, Some(Initial::New(format!("sampan-{}", random::suffix(8)))), certificate))
}

/// What the first server gives; the members are to be asked yet.
async fn joining(own: &Own<'_>, url: &str) -> Result<Beginning> {
    let kept = kept_token(own.folder);
    let Some(token) = own.token.or(kept.as_deref()) else {
        bail!("--server {url} needs --token: <data-dir>/server/node-token of that server has it")
    };
    let token = JoinToken::parse(token).context("--token")?;
    let admitted = join::ask(url, &token, own.settings).await?;
    let files = Files::of(own.folder);
    files.take(&admitted.authority)?;
    let record = Record { name: own.name.clone(), address: own.address, others: admitted.endpoints };
    record.write(own.folder)?;
    Ok((record, None, certificate(own, false)?))
}

/// A member that was one before.
fn again(own: &Own<'_>) -> Result<Beginning> {
    let Some(record) = Record::read(own.folder)? else { bail!("what this server's member was is not known") };
    if record.address != own.address {
        bail!(
            "this server is a member of its cluster's etcd as {}, and its address is {} now: give --node-ip {0}; or start \
             it with --cluster-reset, when it is the only server; or delete its Node, empty the db folder and join again",
            record.address,
            own.address
        );
    }
    Ok((record, Some(Initial::Again), certificate(own, false)?))
}

/// Makes this machine's data the whole of the cluster's: `--cluster-reset`.
pub async fn reset(args: &MemberArgs, own: &Own<'_>) -> Result<()> {
    if !has_begun(own.folder) {
        bail!(
            "--cluster-reset is for a server that is a member of its cluster's etcd; {} holds none",
            record::data(own.folder).display()
        );
    }
    let held = hold(own.folder).context("--cluster-reset needs the server stopped")?;
    let folder = own.folder.to_path_buf();
    tokio::task::spawn_blocking(move || end_left_over(&folder)).await??;
    reset::run(args, own).await?;
    drop(held);
    Ok(())
}
