//! Addresses and CIDRs in fields: strict since 1.36, with upstream's messages.
//!
//! Upstream counterpart: k8s.io/apimachinery/pkg/util/validation/ip.go with StrictIPCIDRValidation on. Values that
//! the stored object already holds stay allowed.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::field::{ErrorList, FieldError, Path};

/// Parses as upstream's sloppy parser does: leading zeros in IPv4 are decimal.
pub fn parse_ip(value: &str) -> Option<IpAddr> {
    if value.contains(':') {
        return value
            .parse::<Ipv6Addr>()
            .ok()
            .map(|ip| ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4));
    }
    let mut octets = [0u8; 4];
    let mut parts = value.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        *octet = part.parse::<u32>().ok().and_then(|n| u8::try_from(n).ok())?;
    }
    parts.next().is_none().then(|| IpAddr::V4(Ipv4Addr::from(octets)))
}

/// Parses `address/bits`; the address is not masked.
pub fn parse_cidr(value: &str) -> Option<(IpAddr, u8)> {
    let (address, bits) = value.split_once('/')?;
    let address = parse_ip(address)?;
    if bits.is_empty() || !bits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let bits: u8 = bits.parse().ok()?;
    (bits <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, bits))
}

/// The network's own address.
pub fn masked(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from(u32::from(ip) & mask))
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from(u128::from(ip) & mask))
        }
    }
}

fn is_mapped(value: &str) -> bool {
    value.parse::<Ipv6Addr>().is_ok_and(|ip| ip.to_ipv4_mapped().is_some())
}

/// An IP address in a field that older releases checked loosely.
pub fn validate_ip(path: &Path, value: &str, stored: &[String]) -> ErrorList {
    if stored.iter().any(|s| s == value) {
        return Vec::new();
    }
    if parse_ip(value).is_none() {
        let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
        return vec![FieldError::invalid(path, value, detail)];
    }
    if value.parse::<IpAddr>().is_err() {
        return vec![FieldError::invalid(path, value, "must not have leading 0s")];
    }
    if is_mapped(value) {
        return vec![FieldError::invalid(path, value, "must not be an IPv4-mapped IPv6 address")];
    }
    Vec::new()
}

/// An IP address in a new field: valid and in canonical form.
pub fn validate_canonical_ip(path: &Path, value: &str) -> ErrorList {
    let errors = validate_ip(path, value, &[]);
    match parse_ip(value) {
        Some(ip) if errors.is_empty() && ip.to_string() != value => {
            vec![FieldError::invalid(path, value, format!("must be in canonical form (\"{ip}\")"))]
        }
        _ => errors,
    }
}

/// A CIDR in a field that older releases checked loosely.
pub fn validate_cidr(path: &Path, value: &str, stored: &[String]) -> ErrorList {
    if stored.iter().any(|s| s == value) {
        return Vec::new();
    }
    let Some((address, bits)) = parse_cidr(value) else {
        let detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
        return vec![FieldError::invalid(path, value, detail)];
    };
    let (text, bits_text) = value.split_once('/').unwrap_or_default();
    if text.parse::<IpAddr>().is_err() || (bits_text.len() > 1 && bits_text.starts_with('0')) {
        return vec![FieldError::invalid(path, value, "must not have leading 0s in IP or prefix length")];
    }
    if is_mapped(text) {
        return vec![FieldError::invalid(path, value, "must not have an IPv4-mapped IPv6 address")];
    }
    if masked(address, bits) != address {
        return vec![FieldError::invalid(path, value, "must not have bits set beyond the prefix length")];
    }
    Vec::new()
}

/// Exactly one address of each family.
pub fn is_dual_stack<'a>(values: impl IntoIterator<Item = &'a str>) -> bool {
    let families: Vec<bool> = values.into_iter().filter_map(parse_ip).map(|ip| ip.is_ipv4()).collect();
    families.contains(&true) && families.contains(&false)
}

/// An address that endpoints may have.
pub fn validate_endpoint_ip(value: &str, path: &Path) -> ErrorList {
    let Some(ip) = parse_ip(value) else {
        return vec![FieldError::invalid(path, value, "must be a valid IP address")];
    };
    let mut errors = Vec::new();
    let mut refuse = |detail: String| errors.push(FieldError::invalid(path, value, detail));
    if ip.is_unspecified() {
        refuse(format!("may not be unspecified ({value})"));
    }
    if ip.is_loopback() {
        refuse("may not be in the loopback range (127.0.0.0/8, ::1/128)".to_string());
    }
    let (link_local, link_local_multicast) = match ip {
        IpAddr::V4(ip) => (ip.is_link_local(), ip.octets()[..3] == [224, 0, 0]),
        IpAddr::V6(ip) => (ip.is_unicast_link_local(), ip.segments()[0] & 0xff0f == 0xff02),
    };
    if link_local {
        refuse("may not be in the link-local range (169.254.0.0/16, fe80::/10)".to_string());
    }
    if link_local_multicast {
        refuse("may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)".to_string());
    }
    errors
}

/// Warnings for an address that works but should be written otherwise.
pub fn ip_warnings(path: &Path, value: &str) -> Option<String> {
    let ip = parse_ip(value)?;
    if value.parse::<IpAddr>().is_err() || is_mapped(value) {
        return Some(format!("{path}: non-standard IP address \"{value}\" is invalid: use \"{ip}\""));
    }
    (ip.is_ipv6() && ip.to_string() != value).then(|| {
        format!("{path}: IPv6 address \"{value}\" should be in RFC 5952 canonical format (\"{ip}\")")
    })
}

/// Warnings for a CIDR that works but should be written otherwise.
pub fn cidr_warnings(path: &Path, value: &str) -> Vec<String> {
    let Some((address, bits)) = parse_cidr(value) else { return Vec::new() };
    let network = masked(address, bits);
    let mut warnings = Vec::new();
    if network != address {
        let full = if address.is_ipv4() { 32 } else { 128 };
        warnings.push(format!(
            "{path}: CIDR value \"{value}\" is ambiguous in this context (should be \"{network}/{bits}\" or \
             \"{address}/{full}\"?)"
        ));
    }
    let text = value.split_once('/').map_or(value, |(address, _)| address);
    if text.parse::<IpAddr>().is_err() || is_mapped(text) {
        warnings.push(format!(
            "{path}: non-standard CIDR value \"{value}\" is invalid: use \"{network}/{bits}\""
        ));
    }
    if warnings.is_empty() && address.is_ipv6() && format!("{address}/{bits}") != value {
        warnings.push(format!(
            "{path}: IPv6 CIDR value \"{value}\" should be in RFC 5952 canonical format (\"{address}/{bits}\")"
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_addresses_and_cidrs() {
        let path = Path::new("ip");
        let detail = |errors: ErrorList| errors.first().map(|e| e.detail.clone()).unwrap_or_default();
        for (value, want) in [
            ("10.0.0.1", ""),
            ("::1", ""),
            ("10.0.0.01", "must not have leading 0s"),
            ("::ffff:10.0.0.1", "must not be an IPv4-mapped IPv6 address"),
            ("10.0.0", "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"),
        ] {
            assert_eq!(detail(validate_ip(&path, value, &[])), want, "{value}");
        }
        for (value, want) in [
            ("10.0.0.0/8", ""),
            ("0.0.0.0/0", ""),
            ("10.0.0.1/8", "must not have bits set beyond the prefix length"),
            ("10.0.0.0/08", "must not have leading 0s in IP or prefix length"),
            ("10.0.0.0/33", "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"),
        ] {
            assert_eq!(detail(validate_cidr(&path, value, &[])), want, "{value}");
        }
        assert!(validate_ip(&path, "01.0.0.1", &["01.0.0.1".to_string()]).is_empty());
        assert_eq!(validate_endpoint_ip("127.0.0.1", &path).len(), 1);
        assert_eq!(validate_endpoint_ip("169.254.1.1", &path).len(), 1);
    }
}
