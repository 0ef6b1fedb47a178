//! EXPOSE's ports, STOPSIGNAL's signals and HEALTHCHECK's durations.
//!
//! Upstream counterparts: buildkit `dockerfile2llb/convert_expose.go`, moby/sys `signal`, Go's `time.ParseDuration`.

/// `8000-8002/udp` as `8000/udp`, `8001/udp`, `8002/udp`. Addresses and host ports before are checked and dropped, as
/// upstream does.
pub(super) fn expose(text: &str) -> Result<Vec<String>, String> {
    let mut parts = text.rsplitn(3, ':');
    let container = parts.next().unwrap_or_default();
    let host = parts.next().unwrap_or_default();
    let address = parts.next().unwrap_or_default();
    let (ports, protocol) = container.split_once('/').unwrap_or((container, ""));
    if ports.is_empty() {
        return Err(format!("invalid port: {text:?}: no port specified"));
    }
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "" => "tcp".to_string(),
        known @ ("tcp" | "udp" | "sctp") => known.to_string(),
        _ => return Err(format!("invalid port: {text:?}: invalid proto: {protocol}")),
    };
    let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
    if !bare.is_empty() && bare.parse::<std::net::IpAddr>().is_err() {
        return Err(format!("invalid IP address: {address}"));
    }
    let (first, last) = range(ports).ok_or_else(|| format!("invalid containerPort: {ports}"))?;
    if !host.is_empty() {
        let (host_first, host_last) = range(host).ok_or_else(|| format!("invalid hostPort: {host}"))?;
        if last != first && last - first != host_last - host_first {
            return Err(format!("invalid ranges specified for container and host Ports: {ports} and {host}"));
        }
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

fn range(text: &str) -> Option<(u16, u16)> {
    let port =
        |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u16>().ok()).flatten();
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    (first <= last).then_some((first, last))
}

const SIGNALS: [&str; 35] = [
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL", "PIPE",
    "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU",
    "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ", "RTMIN",
];

/// A signal's number or name, with or without SIG.
pub(super) fn is_signal(text: &str) -> bool {
    if let Ok(number) = text.parse::<u32>() {
        return (1..=64).contains(&number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |prefix: &str, max: u32| {
        name.strip_prefix(prefix).and_then(|n| n.parse::<u32>().ok()).is_some_and(|n| (1..=max).contains(&n))
    };
    SIGNALS.contains(&name) || name == "RTMAX" || offset("RTMIN+", 15) || offset("RTMAX-", 14)
}

/// `1m30.5s` in nanoseconds.
pub(super) fn duration_ns(text: &str) -> Result<i64, String> {
    let invalid = || format!("time: invalid duration {text:?}");
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    let mut total: f64 = 0.0;
    if rest.is_empty() {
        return Err(invalid());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().map_err(|_| invalid())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let unit_ns = match &rest[..letters] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            "" => return Err(format!("time: missing unit in duration {text:?}")),
            unit => return Err(format!("time: unknown unit {unit:?} in duration {text:?}")),
        };
        total += number * unit_ns;
        rest = &rest[letters..];
    }
    if total >= i64::MAX as f64 {
        return Err(invalid());
    }
    Ok(if negative { -total } else { total }.round() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_spelled_out() {
        for (text, wanted) in [
            ("80", Ok(vec!["80/tcp"])),
            ("53/UDP", Ok(vec!["53/udp"])),
            ("8000-8002", Ok(vec!["8000/tcp", "8001/tcp", "8002/tcp"])),
            ("127.0.0.1:8080:80", Ok(vec!["80/tcp"])),
            ("[::1]:8080:80", Ok(vec!["80/tcp"])),
            ("8080-8090:80", Ok(vec!["80/tcp"])),
            (
                "8080-8081:80-82",
                Err("invalid ranges specified for container and host Ports: 80-82 and 8080-8081"),
            ),
            ("web", Err("invalid containerPort: web")),
            ("+80", Err("invalid containerPort: +80")),
            ("80-70", Err("invalid containerPort: 80-70")),
            ("65536", Err("invalid containerPort: 65536")),
            ("/tcp", Err("invalid port: \"/tcp\": no port specified")),
            ("80/icmp", Err("invalid port: \"80/icmp\": invalid proto: icmp")),
            ("a:1:80", Err("invalid IP address: a")),
        ] {
            let wanted =
                wanted.map(|ports| ports.iter().map(|p| p.to_string()).collect()).map_err(String::from);
            assert_eq!(expose(text), wanted, "{text}");
        }
    }

    #[test]
    fn signals_and_durations() {
        for signal in ["SIGTERM", "term", "9", "SIGRTMIN+3", "RTMAX-1", "SIGCLD"] {
            assert!(is_signal(signal), "{signal}");
        }
        for signal in ["", "0", "65", "SIGNOPE", "-1", "RTMIN+99"] {
            assert!(!is_signal(signal), "{signal}");
        }
        for (text, wanted) in [
            ("1m30.5s", Ok(90_500_000_000)),
            ("5ms", Ok(5_000_000)),
            ("0", Ok(0)),
            ("-1s", Ok(-1_000_000_000)),
            ("5", Err("time: missing unit in duration \"5\"")),
            ("5d", Err("time: unknown unit \"d\" in duration \"5d\"")),
            ("s", Err("time: invalid duration \"s\"")),
            ("", Err("time: invalid duration \"\"")),
            ("9999999999h", Err("time: invalid duration \"9999999999h\"")),
        ] {
            assert_eq!(duration_ns(text), wanted.map_err(String::from), "{text}");
        }
    }
}
