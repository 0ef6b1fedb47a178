//! SPDY/3.1 frames as Kubernetes' clients write them.
//!
//! Upstream counterpart: vendor/github.com/moby/spdystream/spdy. Header blocks of a direction share one zlib stream, so
//! every block is inflated, wanted or not. Lengths are checked before anything is kept.
//!
//! Deliberately different: our own header blocks are stored, not deflated (they are a handful of bytes, and it saves a
//! compressor per connection); a reader sees the same zlib stream. CREDENTIAL is not known, as upstream.
use flate2::{Decompress, FlushDecompress, Status};

/// The largest control frame that is taken.
pub const CONTROL_BYTES_MAX: usize = 64 * 1024;
const BLOCK_BYTES_MAX: usize = 256 * 1024;
const HEADERS_MAX: usize = 100;

pub const FLAG_FIN: u8 = 1;
pub const REFUSED_STREAM: u32 = 3;
pub const CANCEL: u32 = 5;
pub const PROTOCOL_ERROR: u32 = 1;

const VERSION: u16 = 3;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpdyError {
    #[error("SPDY version {0}")]
    Version(u16),
    #[error("SPDY control frame of type {kind} with {length} bytes")]
    Length { kind: u16, length: usize },
    #[error("SPDY header block: {0}")]
    Headers(&'static str),
    #[error("SPDY stream 0")]
    ZeroStream,
}

/// Lowercase names; several values of a name are parted by NUL, as on the wire.
pub type Headers = Vec<(String, String)>;

pub fn header<'a>(headers: &'a Headers, name: &str) -> &'a str {
    let found = headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value.split('\0').next().unwrap_or_default()).unwrap_or_default()
}

/// The eight bytes that every frame begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    Data { id: u32, is_last: bool, length: usize },
    Control { kind: u16, flags: u8, length: usize },
}

impl Head {
    pub const BYTES: usize = 8;

    pub fn parse(bytes: [u8; Self::BYTES]) -> Result<Self, SpdyError> {
        let word = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let length = u32::from_be_bytes([0, bytes[5], bytes[6], bytes[7]]) as usize;
        if word & 0x8000_0000 == 0 {
            let is_last = bytes[4] & FLAG_FIN != 0;
            return if word == 0 {
                Err(SpdyError::ZeroStream)
            } else {
                Ok(Self::Data { id: word, is_last, length })
            };
        }
        let (version, kind) = ((word >> 16) as u16 & 0x7fff, word as u16);
        if version != VERSION {
            return Err(SpdyError::Version(version));
        }
        if length > CONTROL_BYTES_MAX {
            return Err(SpdyError::Length { kind, length });
        }
        Ok(Self::Control { kind, flags: bytes[4], length })
    }
}

/// What a control frame says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    SynStream {
        id: u32,
        is_last: bool,
        headers: Headers,
    },
    SynReply {
        id: u32,
        is_last: bool,
        headers: Headers,
    },
    Reset {
        id: u32,
        status: u32,
    },
    Settings(Vec<(u32, u32)>),
    Ping(u32),
    GoAway {
        last_id: u32,
    },
    Headers {
        id: u32,
        is_last: bool,
        headers: Headers,
    },
    WindowUpdate {
        id: u32,
        delta: u32,
    },
    /// Of a type that is not known: skipped.
    Unknown(u16),
}

/// Reads control frames; holds what the header blocks of a connection share.
pub struct Decoder {
    inflate: Decompress,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { inflate: Decompress::new(true) }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

impl Decoder {
    pub fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Control, SpdyError> {
        let short = SpdyError::Length { kind, length: payload.len() };
        let first = |at| word(payload, at);
        let is_last = flags & FLAG_FIN != 0;
        let id = |at| match first(at).map(|w| w & 0x7fff_ffff) {
            Some(0) => Err(SpdyError::ZeroStream),
            Some(id) => Ok(id),
            None => Err(SpdyError::Length { kind, length: payload.len() }),
        };
        Ok(match kind {
            SYN_STREAM => {
                let headers = self.headers(payload.get(10..).ok_or(short)?)?;
                Control::SynStream { id: id(0)?, is_last, headers }
            }
            SYN_REPLY => {
                let headers = self.headers(payload.get(4..).ok_or(short)?)?;
                Control::SynReply { id: id(0)?, is_last, headers }
            }
            HEADERS => {
                let headers = self.headers(payload.get(4..).ok_or(short)?)?;
                Control::Headers { id: id(0)?, is_last, headers }
            }
            RST_STREAM => Control::Reset { id: id(0)?, status: first(4).ok_or(short)? },
            SETTINGS => {
                let count = first(0).ok_or(short.clone_length())? as usize;
                if count > payload.len().saturating_sub(4) / 8 {
                    return Err(short);
                }
                let setting = |i: usize| Some((first(4 + i * 8)? & 0x00ff_ffff, first(8 + i * 8)?));
                Control::Settings((0..count).filter_map(setting).collect())
            }
            PING => Control::Ping(first(0).ok_or(short)?),
            GOAWAY => Control::GoAway { last_id: first(0).ok_or(short)? & 0x7fff_ffff },
            WINDOW_UPDATE => {
                // stream 0 is the connection's own window
                let id = first(0).ok_or(short.clone_length())? & 0x7fff_ffff;
                Control::WindowUpdate { id, delta: first(4).ok_or(short)? & 0x7fff_ffff }
            }
            other => Control::Unknown(other),
        })
    }

    fn headers(&mut self, block: &[u8]) -> Result<Headers, SpdyError> {
        let plain = self.inflate(block)?;
        parse_headers(&plain)
    }

    fn inflate(&mut self, mut block: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let mut plain = Vec::with_capacity(512);
        loop {
            if plain.len() == plain.capacity() {
                if plain.len() >= BLOCK_BYTES_MAX {
                    return Err(SpdyError::Headers("too long"));
                }
                plain.reserve(plain.len());
            }
            let before = (self.inflate.total_in(), plain.len());
            let result = self.inflate.decompress_vec(block, &mut plain, FlushDecompress::Sync);
            let taken = (self.inflate.total_in() - before.0) as usize;
            block = block.get(taken..).unwrap_or_default();
            match result {
                Ok(Status::StreamEnd) => return Err(SpdyError::Headers("the zlib stream ended")),
                Ok(_) if plain.len() == plain.capacity() => {}
                Ok(_) if block.is_empty() => return Ok(plain),
                Ok(_) if taken == 0 && plain.len() == before.1 => {
                    return Err(SpdyError::Headers("not whole"));
                }
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    let set = self.inflate.set_dictionary(&dictionary());
                    set.map_err(|_| SpdyError::Headers("unknown dictionary"))?;
                }
                Err(_) => return Err(SpdyError::Headers("not zlib")),
            }
        }
    }
}

impl SpdyError {
    fn clone_length(&self) -> Self {
        match self {
            Self::Length { kind, length } => Self::Length { kind: *kind, length: *length },
            _ => Self::ZeroStream,
        }
    }
}

fn parse_headers(plain: &[u8]) -> Result<Headers, SpdyError> {
    let short = || SpdyError::Headers("cut short");
    let count = word(plain, 0).ok_or_else(short)? as usize;
    if count > HEADERS_MAX {
        return Err(SpdyError::Headers("too many"));
    }
    let mut at = 4;
    let mut text = || {
        let length = word(plain, at).ok_or_else(short)? as usize;
        let bytes = at.checked_add(4 + length).and_then(|end| plain.get(at + 4..end)).ok_or_else(short)?;
        at += 4 + length;
        String::from_utf8(bytes.to_vec()).map_err(|_| SpdyError::Headers("not UTF-8"))
    };
    (0..count).map(|_| Ok((text()?.to_ascii_lowercase(), text()?))).collect()
}

/// Writes frames; knows whether the zlib stream of our header blocks has begun.
#[derive(Default)]
pub struct Encoder {
    has_begun: bool,
}

fn control(out: &mut Vec<u8>, kind: u16, flags: u8, length: usize) {
    out.extend_from_slice(&(0x8000 | VERSION).to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&((u32::from(flags) << 24) | (length as u32 & 0x00ff_ffff)).to_be_bytes());
}

impl Encoder {
    pub fn syn_reply(&mut self, out: &mut Vec<u8>, id: u32, headers: &Headers) {
        let block = self.block(headers);
        control(out, SYN_REPLY, 0, 4 + block.len());
        out.extend_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&block);
    }

    /// A stored block, then an empty one: what zlib calls a sync flush, at which readers stop.
    fn block(&mut self, headers: &Headers) -> Vec<u8> {
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        }
        let mut block = Vec::with_capacity(plain.len() + 16);
        if !std::mem::replace(&mut self.has_begun, true) {
            block.extend_from_slice(&[0x78, 0x01]);
        }
        for part in plain.chunks(usize::from(u16::MAX)).chain([&[][..]]) {
            let length = part.len() as u16;
            block.push(0);
            block.extend_from_slice(&length.to_le_bytes());
            block.extend_from_slice(&(!length).to_le_bytes());
            block.extend_from_slice(part);
        }
        block
    }
}

pub fn data(out: &mut Vec<u8>, id: u32, is_last: bool, bytes: &[u8]) {
    let flags = if is_last { u32::from(FLAG_FIN) << 24 } else { 0 };
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&(flags | (bytes.len() as u32 & 0x00ff_ffff)).to_be_bytes());
    out.extend_from_slice(bytes);
}

pub fn reset(out: &mut Vec<u8>, id: u32, status: u32) {
    control(out, RST_STREAM, 0, 8);
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&status.to_be_bytes());
}

pub fn ping(out: &mut Vec<u8>, id: u32) {
    control(out, PING, 0, 4);
    out.extend_from_slice(&id.to_be_bytes());
}

pub fn go_away(out: &mut Vec<u8>, last_id: u32) {
    control(out, GOAWAY, 0, 8);
    out.extend_from_slice(&last_id.to_be_bytes());
    out.extend_from_slice(&0_u32.to_be_bytes());
}

/// The protocol's dictionary: words with their lengths before them, then text.
fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1423);
    for word in WORDS {
        bytes.extend_from_slice(&(word.len() as u32).to_be_bytes());
        bytes.extend_from_slice(word.as_bytes());
    }
    bytes.extend_from_slice(TAIL.as_bytes());
    bytes
}

#[rustfmt::skip]
const WORDS: [&str; 65] = [
    "options", "head", "post", "put", "delete", "trace", "accept", "accept-charset", "accept-encoding",
    "accept-language", "accept-ranges", "age", "allow", "authorization", "cache-control", "connection",
    "content-base", "content-encoding", "content-language", "content-length", "content-location",
    "content-md5", "content-range", "content-type", "date", "etag", "expect", "expires", "from", "host",
    "if-match", "if-modified-since", "if-none-match", "if-range", "if-unmodified-since", "last-modified",
    "location", "max-forwards", "pragma", "proxy-authenticate", "proxy-authorization", "range", "referer",
    "retry-after", "server", "te", "trailer", "transfer-encoding", "upgrade", "user-agent", "vary", "via",
    "warning", "www-authenticate", "method", "get", "status", "200 OK", "version", "HTTP/1.1", "url",
    "public", "set-cookie", "keep-alive", "origin",
];

const TAIL: &str = concat!(
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Au",
    "thoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidd",
    "en404 Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr Ma",
    "y Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,imag",
    "e/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicpri",
    "vatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.",
);

#[cfg(test)]
pub mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    /// What a client of SPDY writes: deflated header blocks with the dictionary.
    pub struct Client {
        deflate: Compress,
    }

    impl Default for Client {
        fn default() -> Self {
            let mut deflate = Compress::new(Compression::best(), true);
            deflate.set_dictionary(&dictionary()).unwrap();
            Self { deflate }
        }
    }

    impl Client {
        pub fn syn_stream(&mut self, out: &mut Vec<u8>, id: u32, headers: &[(&str, &str)]) {
            let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
            for text in headers.iter().flat_map(|(name, value)| [name, value]) {
                plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
                plain.extend_from_slice(text.as_bytes());
            }
            let mut block = Vec::with_capacity(plain.len() + 256);
            self.deflate.compress_vec(&plain, &mut block, FlushCompress::Sync).unwrap();
            control(out, SYN_STREAM, 0, 10 + block.len());
            out.extend_from_slice(&id.to_be_bytes());
            out.extend_from_slice(&[0; 6]);
            out.extend_from_slice(&block);
        }
    }

    pub fn frames(decoder: &mut Decoder, mut bytes: &[u8]) -> (Vec<(u32, bool, Vec<u8>)>, Vec<Control>) {
        let (mut datas, mut controls) = (Vec::new(), Vec::new());
        while bytes.len() >= 8 {
            let head = Head::parse(bytes[..8].try_into().unwrap()).unwrap();
            bytes = &bytes[8..];
            let length = match head {
                Head::Data { id, is_last, length } => {
                    datas.push((id, is_last, bytes[..length].to_vec()));
                    length
                }
                Head::Control { kind, flags, length } => {
                    controls.push(decoder.control(kind, flags, &bytes[..length]).unwrap());
                    length
                }
            };
            bytes = &bytes[length..];
        }
        assert!(bytes.is_empty());
        (datas, controls)
    }

    #[test]
    fn header_blocks_share_one_stream_and_the_dictionary_is_the_protocols() {
        let adler = dictionary().iter().fold((1_u32, 0_u32), |(a, b), byte| {
            let a = (a + u32::from(*byte)) % 65521;
            (a, (b + a) % 65521)
        });
        assert_eq!((adler.1 << 16) | adler.0, 0xe3c6_a7c2);
        let (mut client, mut out) = (Client::default(), Vec::new());
        let long = "x".repeat(5000);
        for (id, kind) in [(1, "error"), (3, "stdout"), (5, long.as_str())] {
            client.syn_stream(&mut out, id, &[("streamtype", kind), ("port", "80")]);
        }
        let (_, controls) = frames(&mut Decoder::default(), &out);
        for (control, kind) in controls.iter().zip(["error", "stdout", &long]) {
            let Control::SynStream { headers, .. } = control else { panic!("{control:?}") };
            assert_eq!((header(headers, "streamType"), header(headers, "port")), (kind, "80"));
        }
        assert_eq!(controls.len(), 3);
    }

    #[test]
    fn what_is_written_is_read() {
        let (mut encoder, mut out) = (Encoder::default(), Vec::new());
        encoder.syn_reply(&mut out, 1, &Headers::new());
        encoder.syn_reply(&mut out, 3, &vec![("a".into(), "b".repeat(70_000))]);
        data(&mut out, 1, false, b"hello");
        data(&mut out, 1, true, b"");
        reset(&mut out, 3, CANCEL);
        ping(&mut out, 7);
        go_away(&mut out, 3);
        let mut at = 0;
        // the long one is past what a reader of ours takes in one frame
        let (mut decoder, mut seen) = (Decoder::default(), Vec::new());
        while at < out.len() {
            let length = u32::from_be_bytes([0, out[at + 5], out[at + 6], out[at + 7]]) as usize;
            if out[at] & 0x80 != 0 {
                let payload = &out[at + 8..at + 8 + length];
                seen.push(decoder.control(out[at + 3].into(), out[at + 4], payload).unwrap());
            }
            at += 8 + length;
        }
        assert_eq!(seen[0], Control::SynReply { id: 1, is_last: false, headers: vec![] });
        assert_eq!(
            seen[1],
            Control::SynReply { id: 3, is_last: false, headers: vec![("a".into(), "b".repeat(70_000))] }
        );
        assert_eq!(
            seen[2..],
            [Control::Reset { id: 3, status: CANCEL }, Control::Ping(7), Control::GoAway { last_id: 3 }]
        );
    }

    #[test]
    fn bad_bytes_are_errors_never_panics() {
        assert_eq!(Head::parse([0; 8]), Err(SpdyError::ZeroStream));
        assert_eq!(Head::parse([0x80, 2, 0, 1, 0, 0, 0, 0]), Err(SpdyError::Version(2)));
        assert!(Head::parse([0x80, 3, 0, 1, 0, 0xff, 0, 0]).is_err());
        let (mut client, mut good) = (Client::default(), Vec::new());
        client.syn_stream(&mut good, 1, &[("streamtype", "data"), ("port", "80"), ("requestid", "0")]);
        let mut seed = 0x9e37_79b9_u64;
        for round in 0..20_000 {
            let mut bytes = good[8..].to_vec();
            for _ in 0..1 + round % 8 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (seed >> 33) as usize % bytes.len();
                bytes[at] = (seed >> 17) as u8;
            }
            bytes.truncate(((seed >> 40) as usize % bytes.len()).max(1));
            for kind in
                [SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE, 77]
            {
                if kind == SYN_STREAM || round % 10 == 0 {
                    let _ = Decoder::default().control(kind, seed as u8, &bytes);
                }
            }
        }
        // a block that inflates without end
        let mut deflate = Compress::new(Compression::best(), true);
        let mut block = vec![0; 10];
        block.reserve(8000);
        deflate.compress_vec(&vec![0; 2_000_000], &mut block, FlushCompress::Sync).unwrap();
        let result = Decoder::default().control(SYN_STREAM, 0, &block);
        assert_eq!(result, Err(SpdyError::Headers("too long")));
    }
}
