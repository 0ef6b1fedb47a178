//! An IPv4 range such as `10.42.0.0/16`.
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    network: u32,
    pub prefix_bits: u8,
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no IPv4 range")]
pub struct NotACidr(String);

impl Cidr {
    pub const fn new(ip: Ipv4Addr, prefix_bits: u8) -> Self {
        let prefix_bits = if prefix_bits > 32 { 32 } else { prefix_bits };
        Self { network: ip.to_bits() & mask(prefix_bits), prefix_bits }
    }

    /// The first address.
    pub fn network(&self) -> Ipv4Addr {
        self.network.into()
    }

    /// The last address.
    pub fn last(&self) -> Ipv4Addr {
        (self.network | !mask(self.prefix_bits)).into()
    }

    pub fn contains(&self, ip: Ipv4Addr) -> bool {
        u32::from(ip) & mask(self.prefix_bits) == self.network
    }
}

const fn mask(prefix_bits: u8) -> u32 {
    match u32::MAX.checked_shl(32 - prefix_bits as u32) {
        Some(mask) => mask,
        None => 0,
    }
}

impl FromStr for Cidr {
    type Err = NotACidr;

    fn from_str(text: &str) -> Result<Self, NotACidr> {
        let parsed = text.split_once('/').and_then(|(ip, bits)| {
            let bits = bits.parse().ok().filter(|b: &u8| *b <= 32)?;
            Some(Self::new(ip.parse().ok()?, bits))
        });
        parsed.ok_or_else(|| NotACidr(text.to_string()))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.prefix_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_contains() {
        let cidr: Cidr = "10.42.3.7/24".parse().unwrap();
        assert_eq!((cidr.to_string().as_str(), cidr.last()), ("10.42.3.0/24", Ipv4Addr::new(10, 42, 3, 255)));
        assert!(cidr.contains(cidr.last()) && !cidr.contains(Ipv4Addr::new(10, 42, 4, 0)));
        assert!("0.0.0.0/0".parse::<Cidr>().unwrap().contains(Ipv4Addr::new(1, 2, 3, 4)));
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "fd00::/8", "x/8"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }
}
