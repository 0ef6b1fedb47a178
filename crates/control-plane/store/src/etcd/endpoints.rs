//! The members of etcd: which one is asked, and the next one when it fails.
//!
//! Upstream counterpart: etcd's `client/v3` (its balancer and `retry_interceptor.go`).
//!
//! All requests go over one connection, to the member that last answered; a member that fails is left for the next
//! one. What stays true: a read is tried at the others within its time; a write is sent again only when it certainly
//! was not sent before. Members are told apart by nothing but their addresses: any of them answers for all.
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use sampan_pki::{LiveCertificate, Pair, certificate, tls};
use sampan_world::{clock, random};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::Etcd;
use super::grpc::{CallError, Connection, Target, UNAVAILABLE};
use crate::error::StoreError;

const PORT: u16 = 2379;
const CONNECT: Duration = Duration::from_secs(5);
/// A member has so long to answer a read.
const READ: Duration = Duration::from_secs(5);
/// A write takes etcd at most 5 s and two elections, then it says that it timed out; that answer is waited for.
const WRITE: Duration = Duration::from_secs(10);
/// After this no other member is asked.
const ALL: Duration = Duration::from_secs(10);
/// After no member could be connected to, nobody tries again for so long.
const FAILED: Duration = Duration::from_millis(300);
/// A member that is there and cannot serve (no leader, an election) is asked again after this.
const UNREADY: Duration = Duration::from_millis(150);
const ATTEMPTS: usize = 30;
/// What a member says that has not even looked at the request.
const NO_LEADER: &str = "etcdserver: no leader";

/// One member's address.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Address {
    https: bool,
    /// An IPv6 address has its brackets.
    host: String,
    port: u16,
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "http{}://{}:{}", if self.https { "s" } else { "" }, self.host, self.port)
    }
}

impl Address {
    fn parse(endpoint: &str) -> Result<Self, StoreError> {
        let wrong = |detail: &str| StoreError::Endpoint {
            // what looks like a password is not repeated
            endpoint: endpoint.rsplit('@').next().unwrap_or_default().to_owned(),
            detail: detail.to_owned(),
        };
        let uri: http::Uri = endpoint
            .parse()
            .map_err(|_| wrong("it is no URL; write http://HOST:2379 or https://HOST:2379"))?;
        let https = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(wrong("it has to begin with http:// or https://")),
        };
        let authority = uri.authority().ok_or_else(|| wrong("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong(
                "names and passwords are not supported; give a client certificate that etcd takes as a user",
            ));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong("it has to end after the port"));
        }
        if authority.host().is_empty() {
            return Err(wrong("it names no host"));
        }
        let port = match (authority.port_u16(), authority.as_str() == authority.host()) {
            (Some(port), _) => port,
            (None, true) => PORT,
            (None, false) => return Err(wrong("its port is no port")),
        };
        Ok(Self { https, host: authority.host().to_owned(), port })
    }
}

/// The files that TLS takes. They are read for each connection, so renewed ones serve the next.
#[derive(Debug, Clone, Default)]
struct TlsFiles {
    ca: Option<PathBuf>,
    pair: Option<(PathBuf, PathBuf)>,
}

impl TlsFiles {
    fn config(&self) -> Result<Arc<rustls::ClientConfig>, String> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|e| format!("{} cannot be read: {e}", path.display()))
        };
        let trusted = match &self.ca {
            Some(path) => certificate::certificates(&read(path)?)
                .map_err(|e| format!("{} holds no certificates: {e}", path.display()))?,
            None => {
                // systems carry certificates that rustls doesn't take; the others still serve
                let mut found = rustls_native_certs::load_native_certs().certs;
                found.retain(|one| rustls::RootCertStore::empty().add(one.clone()).is_ok());
                found
            }
        };
        let own = match &self.pair {
            None => None,
            Some((cert, key)) => {
                let pair = Pair { certificate_pem: read(cert)?, key_pem: read(key)? };
                let wrong = |e| format!("{} and {} do not serve: {e}", cert.display(), key.display());
                Some(LiveCertificate::new(&pair).map_err(wrong)?)
            }
        };
        let mut config = tls::client_config(&trusted, own).map_err(|e| e.to_string())?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

#[derive(Default)]
struct Slot {
    /// The member that is asked, or tried first.
    index: usize,
    /// Counts the connections, so that one failure is not blamed on the next.
    generation: u64,
    connection: Option<Connection>,
    failed: Option<(Instant, String)>,
}

/// The members, and the connection that requests go over.
pub(super) struct Endpoints {
    addresses: Vec<Address>,
    tls: TlsFiles,
    slot: Mutex<Slot>,
}

impl Endpoints {
    pub(super) fn new(etcd: &Etcd) -> Result<Self, StoreError> {
        let named = etcd.endpoints.iter().flat_map(|e| e.split(',')).map(str::trim).filter(|e| !e.is_empty());
        let addresses = named.map(Address::parse).collect::<Result<Vec<_>, _>>()?;
        let wrong =
            |endpoint: &str, detail: String| StoreError::Endpoint { endpoint: endpoint.into(), detail };
        if addresses.is_empty() {
            return Err(wrong("", "no endpoint of etcd is named".to_owned()));
        }
        let pair = match (&etcd.cert_file, &etcd.key_file) {
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (None, None) => None,
            _ => {
                let detail = "a client certificate takes both its file and its key's file";
                return Err(wrong(&addresses[0].to_string(), detail.to_owned()));
            }
        };
        let tls = TlsFiles { ca: etcd.ca_file.clone(), pair };
        if let Some(secure) = addresses.iter().find(|a| a.https) {
            tls.config().map_err(|e| wrong(&secure.to_string(), e))?;
        }
        // servers that know the same members spread over them
        let index = usize::try_from(random::below(addresses.len() as u64)).unwrap_or_default();
        Ok(Self { addresses, tls, slot: Mutex::new(Slot { index, ..Slot::default() }) })
    }

    pub(super) fn names(&self) -> String {
        self.addresses.iter().map(Address::to_string).collect::<Vec<_>>().join(", ")
    }

    pub(super) fn name(&self, index: usize) -> String {
        self.addresses[index % self.addresses.len()].to_string()
    }

    /// Where requests go now.
    pub(super) async fn index(&self) -> usize {
        self.slot.lock().await.index
    }

    /// A connection of one's own.
    pub(super) async fn open(&self, index: usize) -> Result<Connection, CallError> {
        let address = &self.addresses[index % self.addresses.len()];
        let tls = match address.https {
            true => Some(self.tls.config().map_err(CallError::Unsent)?),
            false => None,
        };
        let target = Target { host: &address.host, port: address.port, tls };
        let opened = timeout(CONNECT, Connection::open(target)).await;
        opened.unwrap_or_else(|_| {
            Err(CallError::Unsent(format!("no connection within {} s", CONNECT.as_secs())))
        })
    }

    /// The connection for requests: the one there is, or one to the first member that takes it.
    async fn connection(&self) -> Result<(Connection, u64), CallError> {
        let mut slot = self.slot.lock().await;
        if let Some(connection) = slot.connection.as_ref().filter(|c| !c.is_closed()) {
            return Ok((connection.clone(), slot.generation));
        }
        // those who waited for an attempt that failed do not all repeat it
        if let Some((at, why)) = &slot.failed
            && clock::monotonic().saturating_duration_since(*at) < FAILED
        {
            return Err(CallError::Unsent(why.clone()));
        }
        slot.connection = None;
        let mut failures = Vec::new();
        for step in 0..self.addresses.len() {
            let index = (slot.index + step) % self.addresses.len();
            match self.open(index).await {
                Ok(connection) => {
                    slot.index = index;
                    slot.generation += 1;
                    slot.failed = None;
                    slot.connection = Some(connection.clone());
                    return Ok((connection, slot.generation));
                }
                Err(e) => failures.push(format!("{}: {e}", self.name(index))),
            }
        }
        let why = failures.join("; ");
        slot.failed = Some((clock::monotonic(), why.clone()));
        Err(CallError::Unsent(why))
    }

    /// The next request goes to the next member.
    async fn leave(&self, generation: u64) {
        let mut slot = self.slot.lock().await;
        if slot.generation == generation && slot.connection.is_some() {
            slot.connection = None;
            slot.index = (slot.index + 1) % self.addresses.len();
        }
    }

    /// Asks for what can be asked for twice.
    pub(super) async fn read<A: Message + Default + Clone>(
        &self,
        path: &str,
        request: &impl Message,
    ) -> Result<A, CallError> {
        self.call(path, request, READ, |_| true).await
    }

    /// Sends what may be done once only.
    pub(super) async fn write<A: Message + Default + Clone>(
        &self,
        path: &str,
        request: &impl Message,
    ) -> Result<A, CallError> {
        self.call(path, request, WRITE, certainly_not_done).await
    }

    async fn call<A: Message + Default + Clone>(
        &self,
        path: &str,
        request: &impl Message,
        patience: Duration,
        again: impl Fn(&CallError) -> bool,
    ) -> Result<A, CallError> {
        let until = clock::monotonic() + ALL;
        let mut attempt = 0;
        loop {
            // when no member can be connected to, all have been tried
            let (connection, generation) = self.connection().await?;
            let error = match connection.unary(path, request, patience).await {
                Ok(answer) => return Ok(answer),
                Err(e) => e,
            };
            if !members_fault(&error) {
                return Err(error);
            }
            self.leave(generation).await;
            attempt += 1;
            if attempt >= ATTEMPTS || clock::monotonic() >= until || !again(&error) {
                return Err(error);
            }
            if attempt >= self.addresses.len() {
                sleep(UNREADY).await;
            }
        }
    }
}

/// Whether a request that failed so can be sent again, whatever it does.
fn certainly_not_done(error: &CallError) -> bool {
    match error {
        CallError::Unsent(_) => true,
        CallError::Unanswered(_) => false,
        CallError::Status { message, .. } => message == NO_LEADER,
    }
}

/// Whether another member might answer where this one did not.
fn members_fault(error: &CallError) -> bool {
    match error {
        CallError::Unsent(_) | CallError::Unanswered(_) => true,
        CallError::Status { code, .. } => *code == UNAVAILABLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (endpoint, want) in [
            ("http://a:2379", "http://a:2379"),
            ("https://a.example.org", "https://a.example.org:2379"),
            ("http://10.0.0.1:1/", "http://10.0.0.1:1"),
            ("https://[fd00::1]:2380", "https://[fd00::1]:2380"),
            ("http://[::1]", "http://[::1]:2379"),
            ("a:2379", "has to begin with http"),
            ("etcd://a:2379", "has to begin with http"),
            ("/var/run/etcd", "has to begin with http"),
            ("http://", "it is no URL"),
            ("http://a b:1", "it is no URL"),
            ("http://a:2379/x", "end after the port"),
            ("http://a:2379?x=y", "end after the port"),
            (
                "http://root:secret@a:2379",
                "the datastore endpoint a:2379 cannot be used: names and passwords",
            ),
        ] {
            match Address::parse(endpoint) {
                Ok(address) => assert_eq!(address.to_string(), want),
                Err(e) => {
                    let said = e.to_string();
                    assert!(said.contains(want) && !said.contains("secret"), "{endpoint}: {said}");
                }
            }
        }
        let port = Address::parse("http://a:70000");
        assert!(port.is_err(), "{port:?}");
    }

    #[test]
    fn endpoints_are_checked_before_anything_is_tried() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty.pem");
        std::fs::write(&empty, "").unwrap();
        let missing = folder.path().join("missing.pem");
        let said = |etcd: Etcd| Endpoints::new(&etcd).map(|e| e.names()).unwrap_or_else(|e| e.to_string());
        assert_eq!(
            said(Etcd::new(["http://a:1, http://b:2", "http://c"])),
            "http://a:1, http://b:2, http://c:2379"
        );
        assert!(said(Etcd::new([""])).contains("no endpoint"));
        let etcd = Etcd { cert_file: Some(missing.clone()), ..Etcd::new(["http://a:1"]) };
        assert!(said(etcd).contains("its key's file"));
        for (ca_file, want) in
            [(&missing, "missing.pem cannot be read"), (&empty, "empty.pem holds no certificates")]
        {
            let etcd = Etcd { ca_file: Some(ca_file.clone()), ..Etcd::new(["https://a:1"]) };
            assert!(said(etcd.clone()).contains(want), "{}", said(etcd));
        }
    }
}
