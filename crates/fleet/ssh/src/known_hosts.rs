//! known_hosts: which key a host is known by. Upstream counterpart: OpenSSH's hostfile.c, sshd(8) SSH_KNOWN_HOSTS FILE FORMAT.
//!
//! Names may be hashed, patterns may have wildcards and be negated, ports other than 22 stand as `[host]:port`, keys may
//! be revoked. What stays true: a key of a type that the host is known by is right or it has changed, there is nothing
//! in between. Deliberate difference: `@cert-authority` lines are passed over, as no host certificates are asked for.
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Files larger than this are not known_hosts.
const MAX_BYTES: u64 = 16 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Names {
    Hashed { salt: Vec<u8>, hash: Vec<u8> },
    Patterns(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    file: PathBuf,
    line: usize,
    revoked: bool,
    names: Names,
    kind: String,
    blob: String,
}

/// Where an entry stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub file: PathBuf,
    pub line: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Known,
    /// No key of this type is known; `others` says that one of another type is.
    Unknown {
        others: bool,
    },
    Changed(Place),
    Revoked(Place),
}

#[derive(Clone, Debug, Default)]
pub struct KnownHosts {
    entries: Vec<Entry>,
}

/// What a host is listed as.
pub fn listed_name(host: &str, port: u16) -> String {
    let host = host.to_lowercase();
    if port == 22 { host } else { format!("[{host}]:{port}") }
}

impl KnownHosts {
    /// Reads all `files`; one that is not there is empty.
    pub fn load(files: &[PathBuf]) -> io::Result<Self> {
        let mut entries = Vec::new();
        for path in files {
            match fs::metadata(path) {
                Ok(found) if found.len() > MAX_BYTES => {
                    return Err(io::Error::other(format!("{} is too large", path.display())));
                }
                Ok(_) => entries.extend(parse(path, &String::from_utf8_lossy(&fs::read(path)?))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
            }
        }
        Ok(Self { entries })
    }

    pub fn check(&self, host: &str, port: u16, kind: &str, blob: &str) -> Verdict {
        let name = listed_name(host, port);
        let about: Vec<&Entry> = self.entries.iter().filter(|e| e.names.fit(&name)).collect();
        let place = |e: &Entry| Place { file: e.file.clone(), line: e.line };
        let same = |e: &&&Entry| e.kind == kind && e.blob == blob;
        if let Some(entry) = about.iter().filter(same).find(|e| e.revoked) {
            return Verdict::Revoked(place(entry));
        }
        let mut good = about.iter().filter(|e| !e.revoked);
        if good.clone().any(|e| same(&e)) {
            return Verdict::Known;
        }
        match good.clone().find(|e| e.kind == kind) {
            Some(entry) => Verdict::Changed(place(entry)),
            None => Verdict::Unknown { others: good.next().is_some() },
        }
    }

    /// The types of key that the host is known by: to be asked for first.
    pub fn kinds(&self, host: &str, port: u16) -> Vec<String> {
        let name = listed_name(host, port);
        let about = self.entries.iter().filter(|e| !e.revoked && e.names.fit(&name));
        about.map(|e| e.kind.clone()).collect()
    }
}

/// Adds a host to a file, which is made when it is not there.
pub fn remember(file: &Path, host: &str, port: u16, kind: &str, blob: &str) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    if let Some(folder) = file.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    // a line of somebody else's that lacks its end must not swallow ours
    let ends_open = fs::read(file).is_ok_and(|b| b.last().is_some_and(|last| *last != b'\n'));
    let mut out = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(file)?;
    let start = if ends_open { "\n" } else { "" };
    out.write_all(format!("{start}{} {kind} {blob}\n", listed_name(host, port)).as_bytes())
}

fn parse(file: &Path, text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut fields = line.split_ascii_whitespace().peekable();
        let marker = fields.next_if(|f| f.starts_with('@'));
        if marker.is_some_and(|m| m != "@revoked") {
            continue;
        }
        let (Some(names), Some(kind), Some(blob)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let Some(names) = Names::parse(names) else { continue };
        entries.push(Entry {
            file: file.to_path_buf(),
            line: index + 1,
            revoked: marker.is_some(),
            names,
            kind: kind.to_string(),
            blob: blob.to_string(),
        });
    }
    entries
}

impl Names {
    fn parse(text: &str) -> Option<Self> {
        let Some(hashed) = text.strip_prefix("|1|") else {
            return Some(Self::Patterns(text.split(',').map(str::to_lowercase).collect()));
        };
        let (salt, hash) = hashed.split_once('|')?;
        Some(Self::Hashed { salt: STANDARD.decode(salt).ok()?, hash: STANDARD.decode(hash).ok()? })
    }

    fn fit(&self, name: &str) -> bool {
        match self {
            Self::Hashed { salt, hash } => {
                let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, salt);
                ring::hmac::verify(&key, name.as_bytes(), hash).is_ok()
            }
            Self::Patterns(patterns) => {
                let negated = patterns.iter().filter_map(|p| p.strip_prefix('!'));
                patterns.iter().any(|p| !p.starts_with('!') && fits(p.as_bytes(), name.as_bytes()))
                    && !negated.into_iter().any(|p| fits(p.as_bytes(), name.as_bytes()))
            }
        }
    }
}

/// `*` and `?`, in time linear in both.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((after, seen)) => {
                    star = Some((after, seen + 1));
                    (p, n) = (after, seen + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(text: &str) -> KnownHosts {
        KnownHosts { entries: parse(Path::new("/k"), text) }
    }

    fn at(line: usize) -> Place {
        Place { file: "/k".into(), line }
    }

    #[test]
    fn verdicts() {
        let text = "# comment\n\n\
            pi,10.0.0.5 ssh-ed25519 AAAA pi's\n\
            [pi]:2222 ssh-ed25519 BBBB\n\
            *.lan,!bad.lan ecdsa-sha2-nistp256 CCCC\n\
            @revoked pi ssh-rsa DDDD\n\
            @cert-authority * ssh-ed25519 EEEE\n\
            short line\n\
            |1|not base64|x ssh-ed25519 FFFF\n";
        let known = known(text);
        use Verdict::*;
        for (host, port, kind, blob, want) in [
            ("pi", 22, "ssh-ed25519", "AAAA", Known),
            ("PI", 22, "ssh-ed25519", "AAAA", Known),
            ("10.0.0.5", 22, "ssh-ed25519", "AAAA", Known),
            ("pi", 22, "ssh-ed25519", "XXXX", Changed(at(3))),
            ("pi", 22, "ecdsa-sha2-nistp256", "XXXX", Unknown { others: true }),
            ("pi", 2222, "ssh-ed25519", "BBBB", Known),
            ("pi", 2222, "ssh-ed25519", "AAAA", Changed(at(4))),
            ("pi", 2200, "ssh-ed25519", "AAAA", Unknown { others: false }),
            ("a.lan", 22, "ecdsa-sha2-nistp256", "CCCC", Known),
            ("a.lan", 22, "ecdsa-sha2-nistp256", "XXXX", Changed(at(5))),
            ("bad.lan", 22, "ecdsa-sha2-nistp256", "CCCC", Unknown { others: false }),
            ("pi", 22, "ssh-rsa", "DDDD", Revoked(at(6))),
            ("elsewhere", 22, "ssh-ed25519", "EEEE", Unknown { others: false }),
        ] {
            assert_eq!(known.check(host, port, kind, blob), want, "{host}:{port} {kind} {blob}");
        }
        assert_eq!(known.kinds("pi", 22), ["ssh-ed25519"]);
    }

    #[test]
    fn hashed_names() {
        let salt = [7_u8; 20];
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, &salt);
        let hash = ring::hmac::sign(&key, b"[10.0.0.9]:2222");
        let line =
            format!("|1|{}|{} ssh-ed25519 HHHH", STANDARD.encode(salt), STANDARD.encode(hash.as_ref()));
        let known = known(&line);
        assert_eq!(known.check("10.0.0.9", 2222, "ssh-ed25519", "HHHH"), Verdict::Known);
        assert_eq!(known.check("10.0.0.9", 2222, "ssh-ed25519", "IIII"), Verdict::Changed(at(1)));
        assert_eq!(known.check("10.0.0.9", 22, "ssh-ed25519", "HHHH"), Verdict::Unknown { others: false });
    }

    #[test]
    fn wildcards_end() {
        assert!(fits(b"*", b"") && fits(b"a*c?", b"abbbcd") && !fits(b"a?", b"a"));
        let long = vec![b'a'; 20_000];
        assert!(!fits(b"*a*a*a*a*b", &long));
    }

    #[test]
    fn remembered_hosts_are_known() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("new/known_hosts");
        remember(&file, "10.0.0.1", 22, "ssh-ed25519", "AAAA").unwrap();
        fs::write(&file, fs::read_to_string(&file).unwrap().trim_end()).unwrap();
        remember(&file, "10.0.0.1", 2222, "ssh-ed25519", "BBBB").unwrap();
        let known = KnownHosts::load(&[file.clone(), folder.path().join("none")]).unwrap();
        assert_eq!(known.check("10.0.0.1", 22, "ssh-ed25519", "AAAA"), Verdict::Known);
        assert_eq!(known.check("10.0.0.1", 2222, "ssh-ed25519", "BBBB"), Verdict::Known);
        let place = Place { file, line: 2 };
        assert_eq!(known.check("10.0.0.1", 2222, "ssh-ed25519", "CCCC"), Verdict::Changed(place));
    }
}
