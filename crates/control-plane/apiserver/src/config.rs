//! What an API server is made of.
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use http::{Request, Response};
use sampan_drivers::Dialer;
use sampan_pki::ServiceAccountKey;
use sampan_store::Store;
use serde_json::{Value, json};
use tower::util::BoxCloneSyncService;

use crate::body::Body;

/// Routes besides the API's, such as the endpoint that agents connect to. Asked before anything else, for the paths
/// under [`Config::extra_prefixes`]; it does its own authentication.
pub type ExtraRouter = BoxCloneSyncService<Request<Body>, Response<Body>, std::convert::Infallible>;

/// A range of addresses: services get theirs from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    pub address: IpAddr,
    pub prefix: u8,
}

impl Cidr {
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= bits).then_some(Self { address, prefix })
    }

    /// The first address and how many there are (at most 2^16 for IPv6, as upstream).
    pub fn span(&self) -> (u128, u128) {
        let (value, bits) = match self.address {
            IpAddr::V4(v4) => (u128::from(u32::from(v4)), 32),
            IpAddr::V6(v6) => (u128::from(v6), 128),
        };
        let host = bits - u32::from(self.prefix);
        let size = if host >= 128 { u128::MAX } else { 1u128 << host };
        let base = value & !(size - 1);
        (base, if self.address.is_ipv6() { size.min(1 << 16) } else { size })
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        let (base, _) = self.span();
        let host = if self.address.is_ipv4() { 32 } else { 128 } - u32::from(self.prefix);
        let shift = |value: u128| value.checked_shr(host).unwrap_or(0);
        match (self.address, address) {
            (IpAddr::V4(_), IpAddr::V4(v4)) => shift(u128::from(u32::from(v4))) == shift(base),
            (IpAddr::V6(_), IpAddr::V6(v6)) => shift(u128::from(v6)) == shift(base),
            _ => false,
        }
    }

    pub fn nth(&self, n: u128) -> IpAddr {
        let value = self.span().0 + n;
        match self.address {
            IpAddr::V4(_) => IpAddr::V4((value as u32).into()),
            IpAddr::V6(_) => IpAddr::V6(value.into()),
        }
    }
}

/// What `/version` says.
#[derive(Clone, Debug)]
pub struct VersionInfo {
    pub major: String,
    pub minor: String,
    pub git_version: String,
    pub git_commit: String,
    pub build_date: String,
}

impl VersionInfo {
    pub fn value(&self) -> Value {
        let arch = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        json!({
            "major": self.major, "minor": self.minor,
            "emulationMajor": self.major, "emulationMinor": self.minor,
            "minCompatibilityMajor": self.major, "minCompatibilityMinor": self.minor,
            "gitVersion": self.git_version, "gitCommit": self.git_commit, "gitTreeState": "clean",
            "buildDate": self.build_date, "goVersion": "go1.25.0", "compiler": "gc",
            "platform": format!("linux/{arch}"),
        })
    }
}

impl Default for VersionInfo {
    fn default() -> Self {
        Self {
            major: "1".into(),
            minor: "36".into(),
            git_version: sampan_kinds::version::GIT_VERSION.into(),
            git_commit: "0000000000000000000000000000000000000000".into(),
            build_date: "1970-01-01T00:00:00Z".into(),
        }
    }
}

/// Documents for `/.well-known/openid-configuration` and `/openid/v1/jwks`.
#[derive(Clone, Debug)]
pub struct OpenId {
    pub configuration: Value,
    /// Its keys are told as they are when asked for.
    pub keys: Arc<ServiceAccountKey>,
}

/// How an API server is made.
#[derive(Clone)]
pub struct Config {
    pub store: Store,
    /// How nodes are reached; without it logs, exec and their like answer 503.
    pub dialer: Option<Arc<dyn Dialer>>,
    /// The primary service range, and one of the other family.
    pub service_cidrs: Vec<Cidr>,
    pub node_ports: RangeInclusive<u16>,
    pub version: VersionInfo,
    pub openid: Option<OpenId>,
    /// Where clients outside reach this server: the endpoint of the `kubernetes` service.
    pub advertise: Option<std::net::SocketAddr>,
    pub extra: Option<ExtraRouter>,
    pub extra_prefixes: Vec<String>,
    /// Reads and writes in flight at once, before 429 (upstream: 400 and 200).
    pub reads_max: usize,
    pub writes_max: usize,
}

impl Config {
    pub fn new(store: Store) -> Self {
        Self {
            store,
            dialer: None,
            service_cidrs: vec![Cidr { address: IpAddr::from([10, 43, 0, 0]), prefix: 16 }],
            node_ports: 30000..=32767,
            version: VersionInfo::default(),
            openid: None,
            advertise: None,
            extra: None,
            extra_prefixes: Vec::new(),
            reads_max: 400,
            writes_max: 200,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let cidr = Cidr::parse("10.43.0.0/16").unwrap();
        assert_eq!((cidr.nth(1), cidr.span().1), (IpAddr::from([10, 43, 0, 1]), 65536));
        assert!(cidr.contains([10, 43, 9, 9].into()) && !cidr.contains([10, 44, 0, 0].into()));
        let six = Cidr::parse("fd00::/108").unwrap();
        assert_eq!(six.nth(2).to_string(), "fd00::2");
        assert!(Cidr::parse("10.0.0.0/33").is_none());
    }
}
