//! A connection to a machine by SSH: the host key checked, the user let in, commands run, ports reached.
//!
//! Upstream counterparts: k3sup's pkg/operator/ssh_operator.go; OpenSSH's sshconnect2.c for the order of methods. What
//! stays true: nothing is sent to a host whose key was not judged right; at most [`MAX_KEYS`] keys are offered, since
//! servers end a connection after six failures. Deliberate difference from k3sup: it takes any host key.
mod authenticate;
mod channel;
mod host_key;

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use russh::client::{self, Handle};
use russh::keys::PublicKeyOrCertificate;
use tokio::net::TcpStream;

pub use channel::{Feed, Forwarded};
pub use host_key::HostKeys;

use crate::keys::KeyError;
use crate::known_hosts::Place;
use crate::prompt::{Ask, Secret};

/// Keys offered in one connection.
pub const MAX_KEYS: usize = 5;
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// For version and key exchange when nobody is asked anything, and when somebody may be.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);
const ASKING_LIMIT: Duration = Duration::from_secs(180);

/// `user@host:port`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    pub user: String,
    pub host: String,
    pub port: u16,
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match self.port {
            22 => write!(f, "{}@{host}", self.user),
            port => write!(f, "{}@{host}:{port}", self.user),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    /// `[user@]host[:port]`; the user is root when none is named.
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text}: expected [USER@]HOST[:PORT]");
        let (user, rest) = text.rsplit_once('@').unwrap_or(("root", text));
        let (host, port) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(bad)?;
                (host, port.strip_prefix(':').or(port.is_empty().then_some("22")).ok_or_else(bad)?)
            }
            // more than one colon is an IPv6 address without a port
            None if rest.matches(':').count() > 1 => (rest, "22"),
            None => rest.split_once(':').unwrap_or((rest, "22")),
        };
        let port = port.parse().map_err(|_| bad())?;
        if user.is_empty() || host.is_empty() || port == 0 {
            return Err(bad());
        }
        Ok(Self { user: user.to_string(), host: host.to_string(), port })
    }
}

/// How to be let in.
#[derive(Clone, Debug, Default)]
pub struct Login {
    /// The only key file that is tried; the usual ones when `None`.
    pub key: Option<PathBuf>,
    pub passphrase: Option<Secret>,
    pub password: Option<Secret>,
    pub host_keys: HostKeys,
    /// Machines on the way, nearest first; they are logged in to with the same keys.
    pub jumps: Vec<Address>,
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot reach {address}: {source}")]
    Unreachable { address: String, source: std::io::Error },
    #[error("cannot reach {address}: no answer within {seconds} s")]
    NoAnswer { address: String, seconds: u64 },
    #[error("cannot reach {address} by way of {jump}: {message}")]
    Jump { address: String, jump: String, message: String },
    #[error("{address} does not speak SSH as expected: {message}")]
    Protocol { address: String, message: String },
    #[error(
        "the host key of {address} HAS CHANGED: it shows {kind} {fingerprint}, but {file}, line {line}, has another. Somebody may be \
         between you and it, or it was set up anew; when you know which, remove that line: ssh-keygen -f {file} -R '{listed}'",
        file = place.file.display(), line = place.line
    )]
    HostKeyChanged { address: String, listed: String, kind: String, fingerprint: String, place: Box<Place> },
    #[error("the host key of {address}, {fingerprint}, is marked as revoked in {file}, line {line}", file = place.file.display(), line = place.line)]
    HostKeyRevoked { address: String, fingerprint: String, place: Box<Place> },
    #[error("the host key of {address} is {fingerprint}, not {expected} as given")]
    HostKeyNotExpected { address: String, fingerprint: String, expected: String },
    #[error(
        "the host key of {address}, {kind} {fingerprint}, is not known, and nobody is here to be asked: compare it with \
         `ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub` there and give --host-key {fingerprint}, or trust it at first sight with --accept-new-host-keys"
    )]
    HostKeyUnknown { address: String, kind: String, fingerprint: String },
    #[error("you did not accept the host key of {address}, {fingerprint}")]
    HostKeyDeclined { address: String, fingerprint: String },
    #[error("{what}: {source}")]
    KnownHosts { what: String, source: std::io::Error },
    #[error("{address} lets nobody in with {tried}; it takes {takes}")]
    Refused { address: String, tried: String, takes: String },
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("the connection to {address} is gone: {message}")]
    Lost { address: String, message: String },
}

impl ConnectError {
    /// A login that was refused, rather than a machine that is not there.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Key(_))
    }

    pub fn is_host_key(&self) -> bool {
        matches!(
            self,
            Self::HostKeyChanged { .. }
                | Self::HostKeyRevoked { .. }
                | Self::HostKeyNotExpected { .. }
                | Self::HostKeyUnknown { .. }
                | Self::HostKeyDeclined { .. }
        )
    }
}

/// russh calls this with the host's key; the verdict is kept here since russh's own errors say less.
pub struct Client {
    judge: host_key::Judge,
    verdict: Arc<Mutex<Option<ConnectError>>>,
}

impl client::Handler for Client {
    type Error = russh::Error;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        let (judge, key) = (self.judge.clone(), key.public_key());
        // it may ask at the terminal
        let judged = tokio::task::spawn_blocking(move || judge.judge(&key)).await;
        match judged {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) => {
                if let Ok(mut verdict) = self.verdict.lock() {
                    *verdict = Some(error);
                }
                Ok(false)
            }
            Err(_) => Ok(false),
        }
    }
}

/// A machine that lets us in.
pub struct Connection {
    pub address: Address,
    handle: Handle<Client>,
    /// The password that opened it, which often is the one for sudo.
    pub password: Option<Secret>,
    /// The way here; it ends with this.
    _way: Vec<Handle<Client>>,
}

impl Connection {
    pub async fn open(address: &Address, login: &Login, ask: Arc<dyn Ask>) -> Result<Self, ConnectError> {
        let mut way: Vec<(Address, Handle<Client>)> = Vec::new();
        let mut on_the_way = login.clone();
        on_the_way.host_keys.fingerprint = None;
        for jump in &login.jumps {
            let mut handle = hop(way.last(), jump, &on_the_way, ask.clone()).await?;
            authenticate::log_in(&mut handle, jump, &on_the_way, ask.as_ref()).await?;
            way.push((jump.clone(), handle));
        }
        let mut handle = hop(way.last(), address, login, ask.clone()).await?;
        let password = authenticate::log_in(&mut handle, address, login, ask.as_ref()).await?;
        let way = way.into_iter().map(|(_, handle)| handle).collect();
        Ok(Self { address: address.clone(), handle, password, _way: way })
    }

    pub fn is_closed(&self) -> bool {
        self.handle.is_closed()
    }

    pub async fn close(&self) {
        let _ = self.handle.disconnect(russh::Disconnect::ByApplication, "", "en").await;
    }
}

/// One connection further: from here, or from the last stop of the way.
async fn hop(
    last: Option<&(Address, Handle<Client>)>,
    to: &Address,
    login: &Login,
    ask: Arc<dyn Ask>,
) -> Result<Handle<Client>, ConnectError> {
    let Some((jump, way)) = last else {
        let target = (to.host.as_str(), to.port);
        let stream = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(target)).await;
        let stream = stream.map_err(|_| no_answer(to, CONNECT_LIMIT))?;
        let stream =
            stream.map_err(|source| ConnectError::Unreachable { address: to.to_string(), source })?;
        let _ = stream.set_nodelay(true);
        return handshake(stream, to, login, ask).await;
    };
    let failed =
        |message: String| ConnectError::Jump { address: to.to_string(), jump: jump.to_string(), message };
    let opened = way.channel_open_direct_tcpip(&to.host, u32::from(to.port), "127.0.0.1", 0);
    let opened = tokio::time::timeout(CONNECT_LIMIT, opened).await;
    let opened = opened.map_err(|_| failed(format!("no answer within {} s", CONNECT_LIMIT.as_secs())))?;
    let channel = opened.map_err(|e| failed(e.to_string()))?;
    handshake(channel.into_stream(), to, login, ask).await
}

fn no_answer(address: &Address, limit: Duration) -> ConnectError {
    ConnectError::NoAnswer { address: address.to_string(), seconds: limit.as_secs() }
}

async fn handshake<S>(
    stream: S,
    address: &Address,
    login: &Login,
    ask: Arc<dyn Ask>,
) -> Result<Handle<Client>, ConnectError>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let judge = host_key::Judge::new(address, &login.host_keys, ask)?;
    let mut config = client::Config {
        keepalive_interval: Some(Duration::from_secs(15)),
        keepalive_max: 4,
        nodelay: true,
        window_size: 8 << 20,
        ..client::Config::default()
    };
    config.preferred.key = judge.preferred().into();
    let limit = if judge.may_ask() { ASKING_LIMIT } else { HANDSHAKE_LIMIT };
    let verdict = Arc::new(Mutex::new(None));
    let handler = Client { judge, verdict: verdict.clone() };
    let connected =
        tokio::time::timeout(limit, client::connect_stream(Arc::new(config), stream, handler)).await;
    let judged = verdict.lock().ok().and_then(|mut v| v.take());
    match (judged, connected) {
        (Some(error), _) => Err(error),
        (None, Ok(Ok(handle))) => Ok(handle),
        (None, Err(_)) => Err(no_answer(address, limit)),
        (None, Ok(Err(error))) => {
            Err(ConnectError::Protocol { address: address.to_string(), message: error.to_string() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let address = |user: &str, host: &str, port| Address { user: user.into(), host: host.into(), port };
        for (text, want) in [
            ("pi@10.0.0.5", address("pi", "10.0.0.5", 22)),
            ("pi.lan:2222", address("root", "pi.lan", 2222)),
            ("a@b@host", address("a@b", "host", 22)),
            ("fd00::1", address("root", "fd00::1", 22)),
            ("me@[fd00::1]:2222", address("me", "fd00::1", 2222)),
            ("[fd00::1]", address("root", "fd00::1", 22)),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), want, "{text}");
        }
        for bad in ["", "@host", "host:", "host:x", "host:70000", "[fd00::1", "[fd00::1]22", "pi@", "h:0"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
        assert_eq!(address("me", "fd00::1", 2222).to_string(), "me@[fd00::1]:2222");
    }
}
