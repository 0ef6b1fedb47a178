//! `sampan certificate check`: how certificates stand, in K3s' forms.
use std::fmt::Write;

use anyhow::{Result, bail};
use jiff::Timestamp;
use sampan_pki::certificate::{certificates, details, subject};
use sampan_pki::renewal::{Standing, standing};
use sampan_world::clock;
use serde::Serialize;

use super::Output;
use super::files::Kept;

const DAY_SECONDS: i64 = 24 * 60 * 60;

/// A line of the answer; the names of K3s' JSON, and two more.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Line {
    filename: String,
    path: String,
    subject: String,
    issuer: String,
    usages: Vec<String>,
    #[serde(serialize_with = "as_text")]
    expiry_time: Timestamp,
    /// Nanoseconds, as Go has it.
    residual_time: i64,
    days_left: i64,
    status: &'static str,
    #[serde(skip)]
    standing: Standing,
}

fn as_text<S: serde::Serializer>(time: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(time)
}

pub fn run(kept: &[Kept], output: Output) -> Result<()> {
    let now = clock::now();
    let mut lines = Vec::new();
    for one in kept {
        let text = match std::fs::read_to_string(&one.path) {
            Ok(text) => text,
            Err(error) => bail!("{}: {error}", one.path.display()),
        };
        lines.extend(read(one, &text, now)?);
    }
    print!("{}", shown(&lines, output)?);
    let expired: Vec<&str> =
        lines.iter().filter(|l| l.standing == Standing::Expired).map(|l| l.path.as_str()).collect();
    match expired.is_empty() {
        true => Ok(()),
        false => bail!("expired: {}", expired.join(", ")),
    }
}

fn read(kept: &Kept, text: &str, now: Timestamp) -> Result<Vec<Line>> {
    let path = kept.path.display().to_string();
    let unreadable = || anyhow::anyhow!("{path}: a certificate cannot be read");
    let mut lines = Vec::new();
    let all = certificates(text).map_err(|e| anyhow::anyhow!("{path}: {e}"))?;
    for one in &all {
        let (who, more) = subject(one).zip(details(one)).ok_or_else(unreadable)?;
        // what a server presents besides its own is told with the authority
        if more.is_authority && kept.service != super::files::AUTHORITY {
            continue;
        }
        let standing = standing(one, now).ok_or_else(unreadable)?;
        let left = who.not_after.as_second() - now.as_second();
        lines.push(Line {
            filename: kept.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            path: path.clone(),
            subject: who.common_name,
            issuer: more.issuer,
            usages: more.usages,
            expiry_time: if standing == Standing::NotYetValid { more.not_before } else { who.not_after },
            residual_time: left.saturating_mul(1_000_000_000),
            days_left: left.div_euclid(DAY_SECONDS),
            status: standing.as_str(),
            standing,
        });
    }
    Ok(lines)
}

fn shown(lines: &[Line], output: Output) -> Result<String> {
    let mut text = String::new();
    match output {
        Output::Json => {
            text = serde_json::to_string(&serde_json::json!({ "Certificates": lines }))? + "\n";
        }
        Output::Text => lines.iter().try_for_each(|line| writeln!(text, "{}", sentence(line)))?,
        Output::Table => {
            let head =
                ["FILENAME", "SUBJECT", "USAGES", "EXPIRES", "RESIDUAL TIME", "STATUS"].map(String::from);
            let rule = head.each_ref().map(|cell| "-".repeat(cell.len()));
            let rows: Vec<[String; 6]> = [head, rule].into_iter().chain(lines.iter().map(cells)).collect();
            let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            let widths: Vec<usize> = (0..5).map(width).collect();
            for row in &rows {
                let padded = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}   "));
                writeln!(text, "{}{}", padded.collect::<String>(), row[5])?;
            }
        }
    }
    Ok(text)
}

fn sentence(line: &Line) -> String {
    let Line { filename, subject, expiry_time, days_left, .. } = line;
    let usages = line.usages.join(",");
    let about = format!("{filename}: certificate {subject} ({usages})");
    match line.standing {
        Standing::Ok => format!("{about} is ok, expires at {expiry_time}, {days_left} days left"),
        Standing::Warning => format!("WARNING {about} will expire in {days_left} days at {expiry_time}"),
        Standing::Expired => format!("EXPIRED {about} expired at {expiry_time}"),
        Standing::NotYetValid => format!("WARNING {about} is not valid before {expiry_time}"),
    }
}

fn cells(line: &Line) -> [String; 6] {
    [
        line.filename.clone(),
        line.subject.clone(),
        line.usages.join(","),
        line.expiry_time.strftime("%b %d, %Y %H:%M UTC").to_string(),
        residual(line.residual_time / 1_000_000_000),
        line.status.to_string(),
    ]
}

/// As Go's humanize has it: the largest unit, rounded down.
fn residual(seconds: i64) -> String {
    let units = [
        ("year", 365 * DAY_SECONDS),
        ("month", 30 * DAY_SECONDS),
        ("week", 7 * DAY_SECONDS),
        ("day", DAY_SECONDS),
    ];
    let units = units.into_iter().chain([("hour", 3600), ("minute", 60), ("second", 1)]);
    let found = units.map(|(unit, length)| (unit, seconds.abs() / length)).find(|(_, count)| *count > 0);
    let Some((unit, count)) = found else { return "now".to_string() };
    let plural = if count == 1 { "" } else { "s" };
    let past = if seconds < 0 { " ago" } else { "" };
    format!("{count} {unit}{plural}{past}")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn tells_file_subject_usages_expiry_and_status() {
        let folder = std::env::temp_dir().join(format!("sampan-check-{}", sampan_world::random::suffix(8)));
        let authority = sampan_pki::Authority::load_or_create(&folder).unwrap();
        let pair = authority.client("system:admin", &["system:masters"]).unwrap();
        let kept = Kept::new("admin", Path::new("/d"), "client-admin");
        let now = clock::now();
        let later = |days: i64| now + jiff::SignedDuration::from_hours(24 * days);
        for (at, status, table, text) in [
            (now, "OK", "1 year", "is ok, expires at"),
            (later(300), "WARNING", "2 months", "WARNING client-admin.crt"),
            (later(400), "EXPIRED", "1 month ago", "EXPIRED client-admin.crt"),
        ] {
            let at = at - jiff::SignedDuration::from_secs(if status == "OK" { 5 } else { 0 });
            let lines = read(&kept, &pair.certificate_pem, at).unwrap();
            let json: serde_json::Value =
                serde_json::from_str(&shown(&lines, Output::Json).unwrap()).unwrap();
            let first = &json["Certificates"][0];
            assert_eq!(first["Status"], status);
            assert_eq!(
                (&first["Filename"], &first["Subject"]),
                (&"client-admin.crt".into(), &"system:admin".into())
            );
            assert_eq!(first["Usages"], serde_json::json!(["ClientAuth"]));
            let rows = shown(&lines, Output::Table).unwrap();
            let row = rows.lines().nth(2).unwrap();
            assert!(rows.starts_with("FILENAME           SUBJECT") && row.ends_with(status), "{rows}");
            assert!(row.contains(table), "{row}");
            assert!(shown(&lines, Output::Text).unwrap().contains(text));
        }
        assert!(read(&kept, "rubbish", now).unwrap_err().to_string().contains("/d/client-admin.crt"));
        // the chain that a server presents is not its own
        let served = format!("{}{}", pair.certificate_pem, authority.certificate_pem());
        assert_eq!(read(&kept, &served, now).unwrap().len(), 1);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn residual_times() {
        for (seconds, want) in [
            (0, "now"),
            (1, "1 second"),
            (3600 * 5, "5 hours"),
            (DAY_SECONDS * 13, "1 week"),
            (-DAY_SECONDS * 60, "2 months ago"),
            (DAY_SECONDS * 3649, "9 years"),
        ] {
            assert_eq!(residual(seconds), want);
        }
    }
}
