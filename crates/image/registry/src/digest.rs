//! Content digests: `sha256:…` and `sha512:…`, parsed, printed and computed.
//!
//! Upstream counterpart: `opencontainers/go-digest`. Hashing is ring's: its assembly is the fastest on boards without
//! SHA instructions too.
use std::fmt;
use std::str::FromStr;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    pub const ALL: [Algorithm; 2] = [Algorithm::Sha256, Algorithm::Sha512];

    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    pub fn from_name(name: &str) -> Option<Algorithm> {
        Algorithm::ALL.into_iter().find(|a| a.name() == name)
    }

    fn hex_length(self) -> usize {
        match self {
            Algorithm::Sha256 => 64,
            Algorithm::Sha512 => 128,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    hex: Box<str>,
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no sha256 or sha512 digest")]
pub struct InvalidDigest(pub String);

impl Digest {
    pub fn of(algorithm: Algorithm, bytes: &[u8]) -> Digest {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(bytes);
        hasher.finish()
    }

    pub fn new(algorithm: Algorithm, hex: &str) -> Option<Digest> {
        let valid = hex.len() == algorithm.hex_length()
            && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        valid.then(|| Digest { algorithm, hex: hex.into() })
    }

    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// The first 128 bits: enough to tell digests apart in large sets, at a fraction of the memory. Two digests with
    /// the same key would only keep a blob from being collected.
    pub fn key(&self) -> u128 {
        u128::from_str_radix(&self.hex[..32], 16).unwrap_or_default()
    }

    pub fn matches(&self, bytes: &[u8]) -> bool {
        Digest::of(self.algorithm, bytes) == *self
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Digest, InvalidDigest> {
        text.split_once(':')
            .and_then(|(name, hex)| Digest::new(Algorithm::from_name(name)?, hex))
            .ok_or_else(|| InvalidDigest(text.chars().take(160).collect()))
    }
}

/// A digest in the making.
#[derive(Clone)]
pub struct Hasher {
    algorithm: Algorithm,
    context: ring::digest::Context,
}

impl Hasher {
    pub fn new(algorithm: Algorithm) -> Hasher {
        let context = ring::digest::Context::new(match algorithm {
            Algorithm::Sha256 => &ring::digest::SHA256,
            Algorithm::Sha512 => &ring::digest::SHA512,
        });
        Hasher { algorithm, context }
    }

    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
    }

    pub fn finish(self) -> Digest {
        use fmt::Write;
        let value = self.context.finish();
        let mut hex = String::with_capacity(value.as_ref().len() * 2);
        for byte in value.as_ref() {
            let _ = write!(hex, "{byte:02x}");
        }
        Digest { algorithm: self.algorithm, hex: hex.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_parsed_strictly() {
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let digest: Digest = text.parse().unwrap();
        assert_eq!(digest, Digest::of(Algorithm::Sha256, b""));
        assert_eq!(digest.to_string(), text);
        assert_eq!(digest.key(), 0xe3b0_c442_98fc_1c14_9afb_f4c8_996f_b924);
        for bad in ["", "sha256", "sha256:", "md5:d41d8cd98f00b204e9800998ecf8427e", &text[..70]] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
        assert!(text.to_uppercase().parse::<Digest>().is_err());
        assert!(text.replace('e', "/").parse::<Digest>().is_err());
        assert_eq!(Digest::of(Algorithm::Sha512, b"").hex().len(), 128);
    }
}
