//! Names outside of the cluster: asked of the node's own resolvers, with a small cache. Upstream counterpart: CoreDNS'
//! forward and cache plugins.
//!
//! What stays true: a bounded number of questions at a time, each with bounded time; the cache never grows over its bound.
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use crate::wire::{self, HEADER_BYTES, Query};

const MAX_QUESTIONS: usize = 256;
const MAX_CACHED: usize = 512;
const MAX_CACHED_BYTES: usize = 1232;
const MAX_TTL: Duration = Duration::from_secs(30);
const TRY_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_RESOLVERS: usize = 3;

/// Name, type, and how long the answer may be.
type Asked = (Vec<String>, u16, usize);

pub struct Upstream {
    resolv_conf: PathBuf,
    /// Ours, which would ask us again.
    own: Vec<IpAddr>,
    questions: Semaphore,
    /// Answers, and until when they hold.
    cache: Mutex<HashMap<Asked, (Instant, Vec<u8>)>>,
}

impl Upstream {
    pub fn new(resolv_conf: PathBuf, own: Vec<IpAddr>) -> Self {
        Self { resolv_conf, own, questions: Semaphore::new(MAX_QUESTIONS), cache: Mutex::default() }
    }

    /// Read anew each time: it changes as the machine moves between networks.
    async fn resolvers(&self) -> Vec<SocketAddr> {
        let text = tokio::fs::read_to_string(&self.resolv_conf).await.unwrap_or_default();
        let addresses = text.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next()?.parse::<IpAddr>().ok()).flatten()
        });
        addresses.filter(|ip| !self.own.contains(ip)).take(MAX_RESOLVERS).map(|ip| (ip, 53).into()).collect()
    }

    /// The answer to `raw`, which reads as `query`; or the code to refuse it with.
    pub async fn ask(&self, query: &Query, raw: &[u8], by_tcp: bool) -> Result<Vec<u8>, u8> {
        let key = (query.name.clone(), query.kind, if by_tcp { usize::MAX } else { query.limit() });
        if let Some(answer) = self.cached(&key, query) {
            return Ok(answer);
        }
        let _permit = self.questions.try_acquire().map_err(|_| wire::SERVER_FAILURE)?;
        let resolvers = self.resolvers().await;
        if resolvers.is_empty() {
            return Err(wire::REFUSED);
        }
        let id = (sampan_world::random::u64() & 0xffff) as u16;
        let mut question = raw.to_vec();
        question[..2].copy_from_slice(&id.to_be_bytes());
        for resolver in resolvers {
            let asked = async {
                if by_tcp {
                    ask_by_tcp(resolver, &question).await
                } else {
                    ask_by_udp(resolver, &question, query).await
                }
            };
            if let Ok(Ok(mut answer)) = timeout(TRY_TIMEOUT, asked).await
                && is_answer(&answer, id, query)
            {
                answer[..2].copy_from_slice(&query.id.to_be_bytes());
                self.keep(key, &answer);
                return Ok(answer);
            }
        }
        Err(wire::SERVER_FAILURE)
    }

    fn cached(&self, key: &Asked, query: &Query) -> Option<Vec<u8>> {
        let cache = self.cache.lock();
        let (until, bytes) = cache.get(key)?;
        let mut answer = (*until > sampan_world::clock::monotonic()).then(|| bytes.clone())?;
        answer[..2].copy_from_slice(&query.id.to_be_bytes());
        // with the letters' case as it was asked this time
        answer.get_mut(HEADER_BYTES..HEADER_BYTES + query.question.len())?.copy_from_slice(&query.question);
        Some(answer)
    }

    fn keep(&self, key: Asked, answer: &[u8]) {
        let code = answer[3] & 0xf;
        let is_truncated = answer[2] & 2 != 0;
        let ttl = wire::records(answer).map(|r| r.ttl).min().unwrap_or(0);
        let ttl = Duration::from_secs(ttl.into()).min(MAX_TTL);
        let keepable = code == wire::NO_ERROR || code == wire::NAME_ERROR;
        if !keepable || is_truncated || ttl.is_zero() || answer.len() > MAX_CACHED_BYTES {
            return;
        }
        let now = sampan_world::clock::monotonic();
        let mut cache = self.cache.lock();
        if cache.len() >= MAX_CACHED {
            cache.retain(|_, (until, _)| *until > now);
            if cache.len() >= MAX_CACHED {
                cache.clear();
            }
        }
        cache.insert(key, (now + ttl, answer.to_vec()));
    }
}

/// Whether this answers that question: anyone could have sent it.
fn is_answer(answer: &[u8], id: u16, query: &Query) -> bool {
    let question = answer.get(HEADER_BYTES..HEADER_BYTES + query.question.len());
    answer.get(..2) == Some(&id.to_be_bytes()[..])
        && answer.get(2).is_some_and(|flags| flags & 0x80 != 0)
        && question.is_some_and(|q| q.eq_ignore_ascii_case(&query.question))
}

async fn ask_by_udp(resolver: SocketAddr, question: &[u8], query: &Query) -> std::io::Result<Vec<u8>> {
    const BUFFER_BYTES: usize = 4096;
    let any: IpAddr = if resolver.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(question).await?;
    let id = u16::from_be_bytes([question[0], question[1]]);
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = socket.recv(&mut buffer).await?;
        if is_answer(&buffer[..count], id, query) {
            buffer.truncate(count);
            return Ok(buffer);
        }
    }
}

async fn ask_by_tcp(resolver: SocketAddr, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(resolver).await?;
    let length = u16::try_from(question.len()).map_err(std::io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), question].concat()).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
