//! resource.Quantity: fixed-point amounts with SI suffixes.
//!
//! Upstream: staging/src/k8s.io/apimachinery/pkg/api/resource/{quantity,suffix,amount}.go.
//!
//! What stays true: parsing rounds away from zero to whole nano units, binary amounts are capped at 2^63-1,
//! and `Display` gives the canonical form that upstream writes.
//! Deliberate difference: amounts are 128-bit counts of nano units; they saturate at 1e29, where upstream goes on with
//! big decimals.

use std::cmp::Ordering;
use std::fmt;

const NANO: i128 = 1_000_000_000;
/// A round number: what saturated reads the same when it is written and read again.
const MAX: i128 = 10_i128.pow(38);
const BINARY_MAX: i128 = i64::MAX as i128 * NANO;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// `12e6`
    DecimalExponent,
    /// `12Mi`
    BinarySi,
    /// `12M`
    #[default]
    DecimalSi,
}

/// An amount. Compares by amount alone: `1Ki` equals `1024`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quantity {
    nano: i128,
    pub format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    FormatWrong,
    #[error("unable to parse numeric part of quantity")]
    Numeric,
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

/// The pieces of a quantity's text.
struct Pieces<'a> {
    negative: bool,
    whole: &'a str,
    fraction: &'a str,
    suffix: &'a str,
}

pub fn parse(text: &str) -> Result<Quantity, QuantityError> {
    let pieces = split(text)?;
    let (base, exponent, format) = interpret(pieces.suffix).ok_or(QuantityError::Suffix)?;
    Ok(Quantity {
        nano: amount(&pieces, base, exponent, format),
        format: effective(format, &pieces, exponent),
    })
}

/// The text that upstream would write for this one after reading it.
pub fn canonical(text: &str) -> Result<String, QuantityError> {
    let quantity = parse(text)?;
    let pieces = split(text)?;
    let (_, exponent, format) = interpret(pieces.suffix).ok_or(QuantityError::Suffix)?;
    // Upstream keeps the text where a quick look says that it is canonical; with a fraction of three, six or
    // nine digits that look is wrong, and such texts stay as they were written.
    let digits = pieces.whole.len() + pieces.fraction.len();
    let scale = exponent - pieces.fraction.len() as i32;
    let quick = format != Format::BinarySi
        && !pieces.fraction.is_empty()
        && digits <= 18
        && scale >= -9
        && scale % 3 == 0
        && !pieces.fraction.ends_with("000")
        && !pieces.whole.is_empty();
    if quick { Ok(text.to_owned()) } else { Ok(quantity.to_string()) }
}

fn split(text: &str) -> Result<Pieces<'_>, QuantityError> {
    if text.is_empty() {
        return Err(QuantityError::FormatWrong);
    }
    let (negative, rest) = match text.as_bytes()[0] {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if rest.bytes().all(|byte| byte == b'0') {
        return Ok(Pieces { negative, whole: "", fraction: "", suffix: "" });
    }
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let rest = rest.trim_start_matches('0');
    let (whole, rest) = rest.split_at(digits(rest));
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits(rest)),
        None => ("", rest),
    };
    let letters = suffix.bytes().take_while(|byte| b"eEinumkKMGTP".contains(byte)).count();
    let tail = &suffix.as_bytes()[letters..];
    let tail = tail.strip_prefix(b"-").or_else(|| tail.strip_prefix(b"+")).unwrap_or(tail);
    if tail.iter().all(u8::is_ascii_digit) {
        Ok(Pieces { negative, whole, fraction, suffix })
    } else {
        Err(QuantityError::FormatWrong)
    }
}

/// Base, exponent and format of a suffix.
fn interpret(suffix: &str) -> Option<(i128, i32, Format)> {
    let decimal = |exponent| Some((10, exponent, Format::DecimalSi));
    let binary = |exponent| Some((2, exponent, Format::BinarySi));
    match suffix {
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "" => decimal(0),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        _ => {
            let number = suffix.strip_prefix(['e', 'E'])?;
            Some((10, number.parse().ok()?, Format::DecimalExponent))
        }
    }
}

fn power(base: i128, exponent: u32) -> i128 {
    base.checked_pow(exponent).unwrap_or(i128::MAX)
}

/// Nano units, rounded away from zero.
fn amount(pieces: &Pieces<'_>, base: i128, exponent: i32, format: Format) -> i128 {
    // Digits beyond what 128 bits hold only matter for whether the rounding goes up.
    let mut mantissa: i128 = 0;
    let mut dropped: i32 = 0;
    let mut inexact = false;
    for digit in pieces.whole.bytes().chain(pieces.fraction.bytes()).map(|byte| i128::from(byte - b'0')) {
        if mantissa < i128::MAX / 100 {
            mantissa = mantissa * 10 + digit;
        } else {
            dropped = dropped.saturating_add(1);
            inexact |= digit != 0;
        }
    }
    if mantissa == 0 {
        return 0;
    }
    let mut scale = dropped.saturating_sub(pieces.fraction.len() as i32).saturating_add(9);
    if base == 2 {
        // A fraction and a power of two: take common zeros out of the division first, so as not to overflow.
        let factor = power(2, exponent.unsigned_abs());
        match mantissa.checked_mul(factor) {
            Some(product) => mantissa = product,
            None if scale < 0 => {
                let divisor = power(10, scale.unsigned_abs());
                mantissa = (mantissa / divisor).saturating_add(1).saturating_mul(factor);
                scale = 0;
            }
            None => mantissa = i128::MAX,
        }
    } else {
        scale = scale.saturating_add(exponent);
    }
    let mut nano = if scale >= 0 {
        mantissa.saturating_mul(power(10, scale.unsigned_abs()))
    } else {
        let divisor = power(10, scale.unsigned_abs());
        let up = inexact || mantissa % divisor != 0;
        mantissa / divisor + i128::from(up)
    };
    if format == Format::BinarySi {
        nano = nano.min(BINARY_MAX);
    }
    nano = nano.min(MAX);
    if pieces.negative { -nano } else { nano }
}

/// A binary amount below one is written in decimal.
fn effective(format: Format, pieces: &Pieces<'_>, exponent: i32) -> Format {
    if format != Format::BinarySi {
        return format;
    }
    let nano = amount(pieces, 2, exponent, format);
    if nano != 0 && nano.abs() < NANO { Format::DecimalSi } else { format }
}

impl Quantity {
    pub const ZERO: Quantity = Quantity { nano: 0, format: Format::DecimalSi };

    pub fn from_value(value: i64, format: Format) -> Quantity {
        Quantity { nano: i128::from(value) * NANO, format }
    }

    pub fn from_milli(milli: i64, format: Format) -> Quantity {
        Quantity { nano: i128::from(milli) * (NANO / 1000), format }
    }

    /// Whole units, rounded away from zero, capped at the ends of i64.
    pub fn value(self) -> i64 {
        clamp(divide_up(self.nano, NANO))
    }

    /// Thousandths, rounded away from zero, capped at the ends of i64.
    pub fn milli_value(self) -> i64 {
        clamp(divide_up(self.nano, NANO / 1000))
    }

    pub fn nano_value(self) -> i128 {
        self.nano
    }

    pub fn is_zero(self) -> bool {
        self.nano == 0
    }

    /// -1, 0 or 1.
    pub fn sign(self) -> i32 {
        self.nano.signum() as i32
    }

    /// As upstream's Add: a zero takes over the other's format.
    pub fn saturating_add(self, other: Quantity) -> Quantity {
        let format = if self.is_zero() { other.format } else { self.format };
        Quantity { nano: self.nano.saturating_add(other.nano), format }
    }

    pub fn saturating_sub(self, other: Quantity) -> Quantity {
        let format = if self.is_zero() { other.format } else { self.format };
        Quantity { nano: self.nano.saturating_sub(other.nano), format }
    }

    pub fn saturating_mul(self, times: i64) -> Quantity {
        Quantity { nano: self.nano.saturating_mul(i128::from(times)), format: self.format }
    }
}

fn divide_up(nano: i128, unit: i128) -> i128 {
    nano / unit + nano.signum() * i128::from(nano % unit != 0)
}

fn clamp(number: i128) -> i64 {
    i64::try_from(number).unwrap_or(if number < 0 { i64::MIN } else { i64::MAX })
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Quantity) -> bool {
        self.nano == other.nano
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Quantity) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Quantity) -> Ordering {
        self.nano.cmp(&other.nano)
    }
}

impl std::str::FromStr for Quantity {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Quantity, QuantityError> {
        parse(text)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nano == 0 {
            return out.write_str("0");
        }
        if self.format == Format::BinarySi && self.nano.abs() >= 1024 * NANO {
            let mut number = divide_up(self.nano, NANO);
            let mut step = 0;
            while number % 1024 == 0 && step < 6 {
                number /= 1024;
                step += 1;
            }
            return write!(out, "{number}{}", ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][step]);
        }
        let mut number = self.nano;
        let mut exponent: i32 = -9;
        while number % 1000 == 0 && (exponent < 18 || self.format == Format::DecimalExponent) {
            number /= 1000;
            exponent += 3;
        }
        if self.format == Format::DecimalExponent {
            return if exponent == 0 { write!(out, "{number}") } else { write!(out, "{number}e{exponent}") };
        }
        let suffix = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"][((exponent + 9) / 3) as usize % 10];
        write!(out, "{number}{suffix}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_saturates_reads_the_same_again() {
        for text in ["4E747", "-4e747", "170141183460469231731687303715.884105727", "1e29", "99999E30"] {
            let written = canonical(text).unwrap();
            assert_eq!(canonical(&written).as_deref(), Ok(written.as_str()), "{text}");
        }
    }

    #[test]
    fn canonical_forms() {
        for (text, want) in [
            ("0", "0"),
            ("000", "0"),
            ("-0", "0"),
            ("0Ki", "0"),
            ("1000m", "1"),
            ("0.5", "500m"),
            ("1Ki", "1Ki"),
            ("1024Ki", "1Mi"),
            ("1024", "1024"),
            ("1000", "1k"),
            ("1500", "1500"),
            ("1.5Gi", "1536Mi"),
            ("1.9073486328125Mi", "2000000"),
            ("2000000", "2M"),
            ("0.5Ki", "512"),
            ("0.1Ki", "102400m"),
            ("0.0001Ki", "102400u"),
            ("12e6", "12e6"),
            ("1e3", "1e3"),
            ("1000e3", "1e6"),
            ("1E3", "1e3"),
            ("1E", "1E"),
            ("1000E", "1000E"),
            ("100m", "100m"),
            ("-1.5", "-1500m"),
            ("+3", "3"),
            ("0.0000000001", "1n"),
            ("1.0000000001", "1000000001n"),
            ("1.", "1"),
            (".5", "500m"),
            ("16Ei", "9223372036854775807"),
            ("123456789012345678901n", "123456789012345678901n"),
            ("1.005", "1.005"),
            ("2.50", "2500m"),
            ("1.1Mi", "1153434"),
            ("01", "1"),
            ("100000k", "100M"),
        ] {
            assert_eq!(canonical(text).as_deref(), Ok(want), "{text}");
        }
    }

    #[test]
    fn refused() {
        for (text, want) in [
            ("", QuantityError::FormatWrong),
            ("1.1.1", QuantityError::FormatWrong),
            (" 1", QuantityError::FormatWrong),
            ("1 ", QuantityError::FormatWrong),
            ("1ki", QuantityError::Suffix),
            ("1mm", QuantityError::Suffix),
            ("1e", QuantityError::Suffix),
            ("1eK", QuantityError::Suffix),
            ("abc", QuantityError::FormatWrong),
            ("1i", QuantityError::Suffix),
        ] {
            assert_eq!(parse(text).err(), Some(want), "{text:?}");
        }
    }

    #[test]
    fn values_round_up() {
        let get = |text: &str| parse(text).unwrap();
        assert_eq!((get("100m").value(), get("100m").milli_value()), (1, 100));
        assert_eq!((get("1.1").value(), get("-1.1").value(), get("1u").milli_value()), (2, -2, 1));
        assert_eq!(get("1Ei").milli_value(), i64::MAX);
        assert!(get("1Ki") > get("1k") && get("1Ki") == get("1024"));
        assert_eq!(get("1Gi").saturating_add(get("1Mi")).to_string(), "1025Mi");
        assert_eq!(get("0").saturating_add(get("1Ki")).saturating_add(get("1Ki")).to_string(), "2Ki");
        assert_eq!(get("2").saturating_sub(get("500m")).to_string(), "1500m");
    }
}
