//! When certificates are renewed, and how they stand.
//!
//! Upstream counterparts: client-go util/certificate (nextRotationDeadline: 70 to 90 % of the life) and K3s'
//! CertificateRenewDays (120 of 365). What stays true: when a certificate is due follows from the certificate alone, so
//! a restart changes nothing, and two that were issued together are not due together. Deliberately different from
//! upstream: earlier, at 55 to 65 % of the life, so that a healthy cluster never shows one with fewer than K3s' 120 days,
//! and a board that was switched off for a third of a year comes back with one that is still good.
use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::CertificateDer;

use crate::certificate::{Subject, details, subject};

/// Thousandths of the life after which it is due, and by how many more at most it is put off.
const FRACTION: i64 = 550;
const JITTER: i64 = 100;
/// An authority with fewer days left is to be replaced by its owner; nothing does it by itself.
pub const AUTHORITY_WARNING_DAYS: i64 = 365;
/// A year's certificate warns below 120 days, as in K3s; a shorter one below a third of its life.
const WARNING_SECONDS: i64 = 120 * 24 * 60 * 60;

/// When a certificate is to be renewed; `None` when it cannot be read.
pub fn renew_at(certificate: &CertificateDer<'_>) -> Option<Timestamp> {
    let told = subject(certificate)?;
    let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
    let jitter = digest.as_ref().first_chunk::<8>().map_or(0, |b| u64::from_be_bytes(*b) % JITTER as u64);
    Some(after(&told, FRACTION + i64::try_from(jitter).unwrap_or(0)))
}

fn after(told: &Subject, thousandths: i64) -> Timestamp {
    let life_ms = (told.not_after.as_second() - told.issued.as_second()).max(0).saturating_mul(1000);
    let spent = SignedDuration::from_millis(life_ms / 1000 * thousandths);
    told.issued.saturating_add(spent).unwrap_or(told.not_after)
}

/// How a certificate stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Ok,
    /// It should have been renewed by now.
    Warning,
    Expired,
    NotYetValid,
}

impl Standing {
    /// As K3s prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Expired => "EXPIRED",
            Self::NotYetValid => "NOT YET VALID",
        }
    }
}

/// How a certificate stands at `now`; `None` when it cannot be read.
pub fn standing(certificate: &CertificateDer<'_>, now: Timestamp) -> Option<Standing> {
    let (told, more) = (subject(certificate)?, details(certificate)?);
    let left = told.not_after.as_second() - now.as_second();
    let life = told.not_after.as_second() - told.issued.as_second();
    let warning = match more.is_authority {
        true => AUTHORITY_WARNING_DAYS * 24 * 60 * 60,
        false => WARNING_SECONDS.min(life / 3),
    };
    Some(match left {
        ..0 => Standing::Expired,
        _ if now < more.not_before => Standing::NotYetValid,
        left if left < warning => Standing::Warning,
        _ => Standing::Ok,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Authority;

    #[test]
    fn due_long_before_the_end_and_never_with_a_warning() {
        let folder = tempfile::tempdir().unwrap();
        for life in [365 * 86_400, 3600, 60] {
            let authority = Authority::load_or_create(folder.path()).unwrap().with_lifetime(life);
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..20 {
                let certificate = authority.client("u", &[]).unwrap().certificates().unwrap().remove(0);
                let (told, at) = (subject(&certificate).unwrap(), renew_at(&certificate).unwrap());
                assert_eq!(renew_at(&certificate).unwrap(), at, "it follows from the certificate");
                let spent = at.duration_since(told.issued).as_millis() as f64 / 1000.0 / life as f64;
                assert!((0.55..0.651).contains(&spent), "{spent} of {life} s");
                assert_eq!(standing(&certificate, at), Some(Standing::Ok));
                seen.insert(at);
            }
            assert!(seen.len() > 3, "jitter: {seen:?}");
        }
    }

    #[test]
    fn stands_as_k3s_says() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(folder.path()).unwrap();
        let leaf = authority.client("u", &[]).unwrap().certificates().unwrap().remove(0);
        let now = subject(&leaf).unwrap().issued;
        let days = |n: i64| now.checked_add(SignedDuration::from_hours(24 * n)).unwrap();
        for (certificate, day, want) in [
            (&leaf, 0, Standing::Ok),
            (&leaf, 244, Standing::Ok),
            (&leaf, 246, Standing::Warning),
            (&leaf, 366, Standing::Expired),
            (&leaf, -4000, Standing::NotYetValid),
            (&authority.trusted()[0], 366, Standing::Ok),
            (&authority.trusted()[0], 3650 - 360, Standing::Warning),
            (&authority.trusted()[0], 3651, Standing::Expired),
        ] {
            assert_eq!(standing(certificate, days(day)), Some(want), "day {day}");
        }
        assert_eq!(standing(&CertificateDer::from(vec![0x30]), now), None);
    }
}
