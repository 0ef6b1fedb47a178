//! DNS messages (RFC 1035, 2782, 6891): reading queries, writing answers, walking through others' answers.
//!
//! What stays true: no input makes this panic, read past its end or loop.
use std::net::IpAddr;

pub const A: u16 = 1;
pub const NS: u16 = 2;
pub const CNAME: u16 = 5;
pub const SOA: u16 = 6;
pub const PTR: u16 = 12;
pub const TXT: u16 = 16;
pub const AAAA: u16 = 28;
pub const SRV: u16 = 33;
const OPT: u16 = 41;
pub const ANY: u16 = 255;
const CLASS_IN: u16 = 1;

pub const NO_ERROR: u8 = 0;
pub const FORMAT_ERROR: u8 = 1;
pub const SERVER_FAILURE: u8 = 2;
pub const NAME_ERROR: u8 = 3;
pub const NOT_IMPLEMENTED: u8 = 4;
pub const REFUSED: u8 = 5;

pub const HEADER_BYTES: usize = 12;
/// Without EDNS; and the most that is sent in one datagram.
const PLAIN_BYTES: usize = 512;
const MAX_DATAGRAM_BYTES: usize = 1232;

/// A question and what goes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    pub id: u16,
    recursion_desired: bool,
    /// Labels in lower case, from the left.
    pub name: Vec<String>,
    pub kind: u16,
    /// The question's bytes as they came, to be sent back.
    pub question: Vec<u8>,
    edns_bytes: Option<u16>,
}

/// Why a message is no query that can be answered: the code to answer with, if it can be answered at all.
pub struct Unreadable(pub Option<Vec<u8>>);

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A name at `at`, and where what follows it begins.
fn read_name(bytes: &[u8], at: usize) -> Option<(Vec<String>, usize)> {
    const MAX_POINTERS: usize = 16;
    let (mut labels, mut position, mut end, mut pointers, mut total) = (Vec::new(), at, None, 0, 0);
    loop {
        let length = usize::from(*bytes.get(position)?);
        match length {
            0 => return Some((labels, end.unwrap_or(position + 1))),
            1..=63 => {
                let label = bytes.get(position + 1..position + 1 + length)?;
                total += length + 1;
                if total > 254 {
                    return None;
                }
                // any byte is allowed in a label; names of the cluster are ASCII
                labels.push(label.iter().map(|b| char::from(b.to_ascii_lowercase())).collect());
                position += length + 1;
            }
            192.. => {
                end = end.or(Some(position + 2));
                position = usize::from(u16_at(bytes, position)? & 0x3fff);
                pointers += 1;
                if pointers > MAX_POINTERS {
                    return None;
                }
            }
            _ => return None,
        }
    }
}

impl Query {
    pub fn read(bytes: &[u8]) -> Result<Self, Unreadable> {
        let header = bytes.get(..HEADER_BYTES).ok_or(Unreadable(None))?;
        if header[2] & 0x80 != 0 {
            // an answer: answering those would make loops
            return Err(Unreadable(None));
        }
        let refuse = |code: u8| {
            let mut answer = vec![0; HEADER_BYTES];
            answer[..2].copy_from_slice(&header[..2]);
            answer[2] = 0x80 | (header[2] & 0x79);
            answer[3] = code;
            Unreadable(Some(answer))
        };
        if header[2] & 0x78 != 0 {
            return Err(refuse(NOT_IMPLEMENTED));
        }
        Self::read_question(bytes).ok_or_else(|| refuse(FORMAT_ERROR))
    }

    fn read_question(bytes: &[u8]) -> Option<Self> {
        if u16_at(bytes, 4)? != 1 {
            return None;
        }
        let (name, end) = read_name(bytes, HEADER_BYTES)?;
        let (kind, class) = (u16_at(bytes, end)?, u16_at(bytes, end + 2)?);
        if class != CLASS_IN && class != ANY {
            return None;
        }
        let records =
            usize::from(u16_at(bytes, 6)?) + usize::from(u16_at(bytes, 8)?) + usize::from(u16_at(bytes, 10)?);
        let edns = records_at(bytes, end + 4, records).find(|r| r.kind == OPT).map(|r| r.class);
        Some(Self {
            id: u16_at(bytes, 0)?,
            recursion_desired: bytes.get(2)? & 1 != 0,
            name,
            kind,
            question: bytes.get(HEADER_BYTES..end + 4)?.to_vec(),
            edns_bytes: edns,
        })
    }

    /// How long an answer in a datagram may be.
    pub fn limit(&self) -> usize {
        self.edns_bytes.map_or(PLAIN_BYTES, |n| usize::from(n).clamp(PLAIN_BYTES, MAX_DATAGRAM_BYTES))
    }
}

/// A record of somebody's message.
pub struct Record<'a> {
    name: Vec<String>,
    pub kind: u16,
    class: u16,
    pub ttl: u32,
    data: &'a [u8],
    data_at: usize,
}

fn records_at(bytes: &[u8], mut at: usize, count: usize) -> impl Iterator<Item = Record<'_>> {
    (0..count).map_while(move |_| {
        let (name, end) = read_name(bytes, at)?;
        let length = usize::from(u16_at(bytes, end + 8)?);
        let data_at = end + 10;
        let data = bytes.get(data_at..data_at + length)?;
        at = data_at + length;
        Some(Record {
            name,
            kind: u16_at(bytes, end)?,
            class: u16_at(bytes, end + 2)?,
            ttl: u32_at(bytes, end + 4)?,
            data,
            data_at,
        })
    })
}

/// The answers and authorities of a message.
pub fn records(bytes: &[u8]) -> impl Iterator<Item = Record<'_>> {
    let start = read_name(bytes, HEADER_BYTES).map_or(bytes.len(), |(_, end)| end + 4);
    let count = |at| usize::from(u16_at(bytes, at).unwrap_or_default());
    records_at(bytes, start, count(6) + count(8))
}

/// The addresses and further names that another server's answer has.
pub fn chased(bytes: &[u8]) -> Vec<Answer> {
    let read = |r: Record<'_>| {
        let data = match r.kind {
            A => Data::Address(IpAddr::from(<[u8; 4]>::try_from(r.data).ok()?)),
            AAAA => Data::Address(IpAddr::from(<[u8; 16]>::try_from(r.data).ok()?)),
            CNAME => Data::Name(CNAME, read_name(bytes, r.data_at)?.0),
            _ => return None,
        };
        Some(Answer { name: r.name, ttl: r.ttl, data })
    };
    records(bytes).filter_map(read).collect()
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    Address(IpAddr),
    /// CNAME, PTR or NS.
    Name(u16, Vec<String>),
    Service {
        port: u16,
        target: Vec<String>,
    },
    Text(String),
    Authority {
        zone: Vec<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub name: Vec<String>,
    pub ttl: u32,
    pub data: Data,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub code: u8,
    pub authoritative: bool,
    pub answers: Vec<Answer>,
    pub authorities: Vec<Answer>,
    pub additional: Vec<Answer>,
}

fn put_name(out: &mut Vec<u8>, name: &[String]) {
    for label in name {
        // what was read as one char a byte is written so
        let bytes: Vec<u8> = label.chars().map(|c| u8::try_from(c).unwrap_or(b'?')).take(63).collect();
        out.push(bytes.len() as u8);
        out.extend(bytes);
    }
    out.push(0);
}

impl Answer {
    fn put(&self, out: &mut Vec<u8>, question: &[String]) {
        if self.name == question {
            out.extend([0xc0, HEADER_BYTES as u8]);
        } else {
            put_name(out, &self.name);
        }
        let (kind, mut data) = (self.kind(), Vec::new());
        match &self.data {
            Data::Address(IpAddr::V4(ip)) => data.extend(ip.octets()),
            Data::Address(IpAddr::V6(ip)) => data.extend(ip.octets()),
            Data::Name(_, name) => put_name(&mut data, name),
            Data::Service { port, target } => {
                // priority 0, weight 100, as upstream's records have
                data.extend([0, 0, 0, 100]);
                data.extend(port.to_be_bytes());
                put_name(&mut data, target);
            }
            Data::Text(text) => {
                let text: Vec<u8> = text.bytes().take(255).collect();
                data.push(text.len() as u8);
                data.extend(text);
            }
            Data::Authority { zone } => {
                for host in ["ns.dns", "hostmaster"] {
                    put_name(&mut data, &[labels(host), zone.clone()].concat());
                }
                for number in [1u32, 7200, 1800, 86400, self.ttl] {
                    data.extend(number.to_be_bytes());
                }
            }
        }
        out.extend(kind.to_be_bytes());
        out.extend(CLASS_IN.to_be_bytes());
        out.extend(self.ttl.to_be_bytes());
        out.extend(u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
        out.extend(data);
    }

    pub fn kind(&self) -> u16 {
        match &self.data {
            Data::Address(IpAddr::V4(_)) => A,
            Data::Address(IpAddr::V6(_)) => AAAA,
            Data::Name(kind, _) => *kind,
            Data::Service { .. } => SRV,
            Data::Text(_) => TXT,
            Data::Authority { .. } => SOA,
        }
    }
}

impl Reply {
    pub fn failure(code: u8) -> Self {
        Self { code, ..Self::default() }
    }

    /// The answer's bytes; over `limit` the client is told to ask again by TCP.
    pub fn write(&self, query: &Query, limit: usize) -> Vec<u8> {
        let whole = self.write_all(query, true, false);
        if whole.len() <= limit {
            return whole;
        }
        // what is only additional may go without a word
        let needed = self.write_all(query, false, false);
        if needed.len() <= limit {
            needed
        } else {
            Self { answers: vec![], authorities: vec![], ..self.clone() }.write_all(query, false, true)
        }
    }

    fn write_all(&self, query: &Query, with_additional: bool, truncated: bool) -> Vec<u8> {
        let mut out = Vec::with_capacity(PLAIN_BYTES);
        out.extend(query.id.to_be_bytes());
        let (authoritative, cut) = (u8::from(self.authoritative) << 2, u8::from(truncated) << 1);
        out.push(0x80 | authoritative | cut | u8::from(query.recursion_desired));
        out.push(0x80 | self.code);
        let additional = if with_additional { &self.additional[..] } else { &[] };
        let counts = [
            1,
            self.answers.len(),
            self.authorities.len(),
            additional.len() + usize::from(query.edns_bytes.is_some()),
        ];
        for count in counts {
            out.extend(u16::try_from(count).unwrap_or(u16::MAX).to_be_bytes());
        }
        out.extend(&query.question);
        for answer in self.answers.iter().chain(&self.authorities).chain(additional) {
            answer.put(&mut out, &query.name);
        }
        if query.edns_bytes.is_some() {
            out.extend([0, 0, OPT as u8]);
            out.extend((MAX_DATAGRAM_BYTES as u16).to_be_bytes());
            out.extend([0; 6]);
        }
        out
    }
}

/// A query of our own.
pub fn question(id: u16, name: &[String], kind: u16) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(id.to_be_bytes());
    out.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    put_name(&mut out, name);
    out.extend(kind.to_be_bytes());
    out.extend(CLASS_IN.to_be_bytes());
    out
}

/// `a.b.` as labels.
pub fn labels(name: &str) -> Vec<String> {
    name.trim_end_matches('.').split('.').filter(|l| !l.is_empty()).map(str::to_ascii_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes() {
        let bytes = question(7, &labels("Web.default"), A);
        let query = Query::read(&bytes).ok().unwrap();
        assert_eq!((query.id, query.kind, query.name.join(".")), (7, A, "web.default".to_string()));
        assert_eq!(query.limit(), 512);
        let address =
            |n: u8| Answer { name: query.name.clone(), ttl: 5, data: Data::Address([10, 0, 0, n].into()) };
        let reply = Reply { authoritative: true, answers: (0..3).map(address).collect(), ..Reply::default() };
        let written = reply.write(&query, 512);
        assert_eq!(chased(&written), reply.answers);
        let many = Reply { answers: (0..100).map(address).collect(), ..Reply::default() };
        let cut = many.write(&query, 512);
        assert!(cut.len() < 512 && cut[2] & 2 != 0, "truncated");
        assert!(Query::read(&written).is_err(), "answers are no queries");
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let whole = question(7, &labels("web.default.svc.cluster.local"), SRV);
        let mut state = 1u64;
        for round in 0..200_000usize {
            let mut bytes = whole.clone();
            for _ in 0..1 + round % 6 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (state >> 33) as usize % bytes.len();
                bytes[at] = (state >> 20) as u8;
            }
            bytes.truncate(bytes.len() - round % bytes.len() / 2);
            let _ = chased(&bytes);
            if let Ok(query) = Query::read(&bytes) {
                let name = query.name.clone();
                let data = Data::Service { port: 1, target: name.clone() };
                Reply { answers: vec![Answer { name, ttl: 1, data }], ..Reply::default() }.write(&query, 512);
            }
        }
        // a pointer to itself
        let mut bytes = whole;
        bytes[12] = 0xc0;
        bytes[13] = 12;
        assert!(Query::read(&bytes).is_err());
    }
}
