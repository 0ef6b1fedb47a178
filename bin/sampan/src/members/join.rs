//! Becoming a member: what a server asks of one that is there, and how etcd's members take it in.
//!
//! Upstream counterparts: K3s' pkg/cluster/bootstrap.go (`ClientAccessInfo`, the bootstrap request) and pkg/etcd (`Join`).
//! What stays true: nothing is sent before the first server has proved that it is the one that the token names; what it
//! sends is sealed with the token; the new member has no vote until it has all data, so a join that breaks off costs the
//! others nothing, and is begun again where it stopped. Deliberately different: a member that is known by this name or
//! address and has begun is not removed for the new one, that is left to the owner; the one that joins sees to its vote
//! itself, so nobody looks for learners all the time.
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http::{Request, StatusCode, header};
use sampan_pki::{Credentials, JoinToken};
use sampan_store::{Member, Members, MembersError};
use sampan_world::clock;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::certificate::Files;
use super::program::Running;
use super::record::Record;
use crate::bootstrap_data::{self, BootstrapData, EtcdAuthority, Settings};
use crate::join;

/// For servers that have the servers' token.
pub const PATH: &str = "/v1-sampan/bootstrap";
/// A server that is not there yet, and one that has to wait for its turn, waits so long.
const PATIENCE: Duration = Duration::from_secs(300);
const RETRY: Duration = Duration::from_millis(500);
const TELL: Duration = Duration::from_secs(10);

/// Where a server keeps its cluster, for one that wants to join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    Sqlite,
    /// An etcd that the owner runs.
    Etcd,
    Members,
}

/// What a server answers one that wants to join.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Offer {
    pub place: Place,
    /// Of an etcd that the owner runs, or of the members that have a vote.
    #[serde(default)]
    pub endpoints: Vec<String>,
    /// As it lies in the datastore.
    #[serde(default)]
    pub sealed: String,
}

/// What this server tells those that want to join.
pub struct Offers {
    pub shared: Option<Arc<BootstrapData>>,
    /// Where it runs etcd itself.
    pub members: Option<Members>,
}

impl Offers {
    pub async fn offer(&self) -> Result<Offer> {
        let nothing = Offer { place: Place::Sqlite, endpoints: Vec::new(), sealed: String::new() };
        match (&self.shared, &self.members) {
            (None, _) => Ok(nothing),
            (Some(shared), None) => {
                Ok(Offer { place: Place::Etcd, endpoints: shared.endpoints().to_vec(), ..nothing })
            }
            (Some(shared), Some(members)) => {
                let sealed = shared.sealed().await?.context("the datastore's bootstrap data is gone")?;
                let sealed = String::from_utf8(sealed.to_vec()).context("the bootstrap data")?;
                let voters = members.list().await?.into_iter().filter(|member| !member.is_learner);
                let endpoints = voters.flat_map(|member| member.client_urls).collect();
                Ok(Offer { place: Place::Members, endpoints, sealed })
            }
        }
    }
}

/// The server says that it cannot answer now.
#[derive(Debug, thiserror::Error)]
#[error("{server} cannot answer yet: {message}")]
struct NotYet {
    server: String,
    message: String,
}

/// What the first server has given.
pub struct Admitted {
    pub authority: EtcdAuthority,
    /// Client URLs of the members.
    pub endpoints: Vec<String>,
}

/// Asks the server at `url` until it answers.
pub async fn ask(url: &str, token: &JoinToken, own: &Settings) -> Result<Admitted> {
    if matches!(token.credentials, Credentials::Bootstrap(_)) {
        bail!("--token: one of `sampan token create` lets agents join, not servers: give the servers' own");
    }
    let mut waiting = Waiting::new();
    let offer = loop {
        match offered(url, token).await {
            Ok(offer) => break offer,
            Err(error) if join::may_pass(&error) || error.is::<NotYet>() => waiting.again(&error).await?,
            Err(error) => return Err(error),
        }
    };
    match offer.place {
        Place::Members => {}
        Place::Sqlite => bail!(
            "{url} keeps its cluster in SQLite, which no other server can join: begin a cluster with --cluster-init on an \
             empty data folder, or give all servers one --datastore-endpoint"
        ),
        Place::Etcd => bail!(
            "{url} keeps its cluster in the etcd {0}: give this server --datastore-endpoint {0} instead of --server",
            offer.endpoints.join(",")
        ),
    }
    let (own, given, sealed) = (own.clone(), token.clone(), offer.sealed);
    let opening = move || bootstrap_data::for_member(sealed.as_bytes(), &given, &own);
    let authority = tokio::task::spawn_blocking(opening).await??;
    Ok(Admitted { authority, endpoints: offer.endpoints })
}

async fn offered(url: &str, token: &JoinToken) -> Result<Offer> {
    let offered = join::fetch_authority(url).await?;
    let trusted = token.trusted(&offered).with_context(|| format!("the certificate authority of {url}"))?;
    let Some(trusted) = trusted else {
        bail!("{url} is not the server that the token was made for: its certificate authority differs");
    };
    let request = Request::get(PATH).header(header::AUTHORIZATION, format!("Bearer {}", token.bearer()));
    let (code, body) = join::send(url, Some(&trusted), None, request, Vec::new()).await?;
    let message = || join::message(&body);
    match code {
        StatusCode::OK => serde_json::from_slice(&body).with_context(|| format!("the answer of {url}")),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => bail!(
            "{url} does not know the token: give --token as the cluster's other servers have it \
             (<data-dir>/server/node-token there); after `sampan token rotate`, the new one"
        ),
        code if code.is_server_error() => Err(NotYet { server: url.to_string(), message: message() }.into()),
        code => bail!("{url} answered {code}: {}", message()),
    }
}

/// What the members' list says of a server that wants to be one.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    Unknown,
    /// It was added and has not begun.
    Added(u64),
    /// Somebody of that name or address is a member.
    Taken(String),
}

fn standing(members: &[Member], own: &Record) -> Standing {
    let peer = own.peer_url();
    let advice = |name: &str| {
        format!(
            "If that was this machine and its data is gone, `kubectl delete node {name}` removes the member; then start \
             this server again"
        )
    };
    for member in members {
        let is_here = member.peer_urls.contains(&peer);
        if is_here && member.name.is_empty() {
            return Standing::Added(member.id);
        }
        if is_here {
            let Member { name, .. } = member;
            return Standing::Taken(format!(
                "{peer} is the address of the member {name} already. {}",
                advice(name)
            ));
        }
        if member.name == own.name {
            let at = member.peer_urls.join(",");
            return Standing::Taken(format!(
                "a member is called {} already, at {at}: take another --node-name. {}",
                own.name,
                advice(&own.name)
            ));
        }
    }
    Standing::Unknown
}

/// `NAME=URL` of all, with commas. One that has not begun has no name yet.
fn initial_cluster(members: &[Member], own: &Record) -> String {
    let peer = own.peer_url();
    let name = |member: &Member| match member.name.as_str() {
        _ if member.peer_urls.contains(&peer) => own.name.clone(),
        "" => format!("member-{:x}", member.id),
        name => name.to_string(),
    };
    let pairs = members.iter().flat_map(|m| m.peer_urls.iter().map(move |url| format!("{}={url}", name(m))));
    pairs.collect::<Vec<_>>().join(",")
}

/// Has the members take this server in, without a vote; what its etcd is to be told of them.
pub async fn be_added(members: &Members, own: &Record) -> Result<String> {
    let mut waiting = Waiting::new();
    loop {
        let error = match members.list().await {
            Ok(all) => match standing(&all, own) {
                Standing::Added(id) => {
                    tracing::info!(id = format!("{id:x}"), "the members know this server already");
                    return Ok(initial_cluster(&all, own));
                }
                Standing::Taken(why) => bail!(why),
                Standing::Unknown => match members.add_learner(&own.peer_url()).await {
                    Ok((member, all)) => {
                        tracing::info!(
                            id = format!("{:x}", member.id),
                            "the members have taken this server in"
                        );
                        return Ok(initial_cluster(&all, own));
                    }
                    Err(error) => error,
                },
            },
            Err(error) => error,
        };
        match is_passing(&error) {
            true => waiting.again(&anyhow::Error::new(error)).await?,
            false => return Err(error).context("becoming a member"),
        }
    }
}

/// Whether waiting may help: nobody answers, or others have to come or go first.
fn is_passing(error: &MembersError) -> bool {
    let words = ["too many learner", "unhealthy cluster", "not enough started members", "no leader"];
    match error {
        MembersError::Unreachable { .. } | MembersError::Unanswered { .. } => true,
        MembersError::Refused { .. } => {
            words.iter().any(|words| error.says(words))
                || error.says("request timed out")
                || error.says("leader changed")
        }
    }
}

/// Gives this server its vote, once its etcd has all data.
pub async fn be_promoted(members: &Members, own: &Record, running: &Running) -> Result<()> {
    let mut waiting = Waiting::new();
    loop {
        let promoted = async {
            let all = members.list().await?;
            let own_one = all.iter().find(|member| member.peer_urls.contains(&own.peer_url()));
            match own_one {
                None => Ok(false),
                Some(member) if !member.is_learner => Ok(true),
                Some(member) => members.promote(member.id).await.map(|()| true),
            }
        };
        let error = tokio::select! {
            done = promoted => match done {
                Ok(true) => {
                    tracing::info!("this server's etcd has its vote");
                    return Ok(());
                }
                Ok(false) => bail!("the members do not know this server ({}) any more", own.peer_url()),
                Err(error) => error,
            },
            state = running.ended(3) => bail!("etcd ends again and again: {}", state.words),
        };
        let is_behind = error.says("in sync with leader") || error.says("not ready");
        match is_behind || is_passing(&error) {
            true => waiting.again(&anyhow::Error::new(error)).await?,
            false => return Err(error).context("giving this server's etcd its vote"),
        }
    }
}

/// Waits between attempts, and says so from time to time.
pub struct Waiting {
    begun: Instant,
    told: Option<Instant>,
}

impl Waiting {
    pub fn new() -> Self {
        Self { begun: clock::monotonic(), told: None }
    }

    /// Waits a little; an error when that has lasted too long.
    pub async fn again(&mut self, error: &anyhow::Error) -> Result<()> {
        let now = clock::monotonic();
        if now.saturating_duration_since(self.begun) >= PATIENCE {
            bail!("{error:#} (waited for {} s)", PATIENCE.as_secs());
        }
        // what passes at once is not worth a line
        let since = self.told.unwrap_or(self.begun);
        if now.saturating_duration_since(since) >= TELL {
            tracing::warn!("waiting: {error:#}");
            self.told = Some(now);
        }
        tokio::time::sleep(RETRY).await;
        Ok(())
    }
}

/// Client URLs of the others, as this member's record keeps them.
pub fn others(members: &[Member], own: &Record) -> Vec<String> {
    let is_other = |m: &&Member| !m.peer_urls.contains(&own.peer_url()) && !m.is_learner;
    let mut all: Vec<String> = members.iter().filter(is_other).flat_map(|m| m.client_urls.clone()).collect();
    all.sort();
    all.dedup();
    all
}

/// The members, by way of those endpoints.
pub fn members_at(folder: &Path, endpoints: &[String]) -> Result<Members> {
    Ok(Members::new(&Files::of(folder).etcd(endpoints))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, name: &str, ip: &str, is_learner: bool) -> Member {
        Member {
            id,
            name: name.to_string(),
            peer_urls: vec![format!("https://{ip}:2380")],
            client_urls: if name.is_empty() { Vec::new() } else { vec![format!("https://{ip}:2379")] },
            is_learner,
        }
    }

    #[test]
    fn who_may_be_added() {
        let own = Record { name: "b".to_string(), address: "10.0.0.2".parse().unwrap(), others: Vec::new() };
        let first = member(1, "a", "10.0.0.1", false);
        assert_eq!(standing(std::slice::from_ref(&first), &own), Standing::Unknown);
        // broken off after it was added
        let all = [first.clone(), member(2, "", "10.0.0.2", true), member(0x3f, "", "10.0.0.3", true)];
        assert_eq!(standing(&all, &own), Standing::Added(2));
        assert_eq!(
            initial_cluster(&all, &own),
            "a=https://10.0.0.1:2380,b=https://10.0.0.2:2380,member-3f=https://10.0.0.3:2380"
        );
        assert_eq!(others(&all, &own), ["https://10.0.0.1:2379"]);
        for (taken, want) in [
            (member(2, "b", "10.0.0.9", false), "a member is called b already, at https://10.0.0.9:2380"),
            (
                member(2, "c", "10.0.0.2", false),
                "https://10.0.0.2:2380 is the address of the member c already",
            ),
            (member(2, "b", "10.0.0.2", false), "kubectl delete node b"),
        ] {
            let Standing::Taken(why) = standing(&[first.clone(), taken], &own) else { panic!("{want}") };
            assert!(why.contains(want), "{why}");
        }
    }

    #[test]
    fn what_passes() {
        let refused = |detail: &str| MembersError::Refused { endpoints: "e".into(), detail: detail.into() };
        for (error, want) in [
            (refused("etcdserver: too many learner members in cluster"), true),
            (refused("etcdserver: unhealthy cluster"), true),
            (refused("etcdserver: re-configuration failed due to not enough started members"), true),
            (refused("etcdserver: Peer URLs already exists"), false),
            (MembersError::Unreachable { endpoints: "e".into(), detail: "x".into() }, true),
        ] {
            assert_eq!(is_passing(&error), want, "{error}");
        }
    }

    #[test]
    fn an_offer_as_it_travels() {
        let text = r#"{"place":"members","endpoints":["https://a:2379"],"sealed":"s"}"#;
        let offer: Offer = serde_json::from_str(text).unwrap();
        assert_eq!(offer.place, Place::Members);
        assert_eq!(serde_json::to_string(&offer).unwrap(), text);
        assert!(serde_json::from_str::<Offer>(r#"{"place":"sqlite"}"#).is_ok());
    }
}
