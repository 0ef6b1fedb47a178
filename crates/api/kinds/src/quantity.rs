//! Amounts of resources, exact to a nano unit, for comparing and adding; reading and writing is the schema's.
//!
//! Upstream counterpart: k8s.io/apimachinery/pkg/api/resource. What stays true: an [`Amount`] compares and adds exactly;
//! [`canonical`] writes what upstream's `Quantity.String` would. Values beyond 2^63 units saturate, as upstream's do.
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

pub use sampan_schema::quantity::Format;

/// An amount in billionths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Amount(i128);

const NANO: i128 = 1_000_000_000;

impl Amount {
    pub const ZERO: Self = Self(0);
    /// One unit.
    pub const ONE: Self = Self(NANO);

    /// So many whole units.
    pub fn units(units: i64) -> Self {
        Self(i128::from(units) * NANO)
    }
    /// Whole units, rounded up: upstream's `Value`.
    pub fn value(self) -> i64 {
        i64::try_from(ceil_div(self.0, NANO)).unwrap_or(if self.0 < 0 { i64::MIN } else { i64::MAX })
    }
    /// Thousandths, rounded up: upstream's `MilliValue`.
    pub fn milli_value(self) -> i64 {
        i64::try_from(ceil_div(self.0, NANO / 1000)).unwrap_or(if self.0 < 0 { i64::MIN } else { i64::MAX })
    }
    /// True where it is a whole number, judged by thousandths as upstream does.
    pub fn is_whole(self) -> bool {
        self.milli_value() % 1000 == 0
    }
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

/// Amounts by resource name.
pub type ResourceList = BTreeMap<String, Amount>;

fn ceil_div(value: i128, by: i128) -> i128 {
    value.div_euclid(by) + i128::from(value.rem_euclid(by) != 0)
}

/// Reads a quantity; `None` where it is malformed.
pub fn parse(text: &str) -> Option<(Amount, Format)> {
    let quantity = sampan_schema::quantity::parse(text).ok()?;
    Some((Amount(quantity.nano_value()), quantity.format))
}

/// Writes an amount as upstream's `Quantity.String` does.
pub fn canonical(amount: Amount, format: Format) -> String {
    match sampan_schema::quantity::parse(&format!("{}n", amount.0)) {
        Ok(mut quantity) => {
            quantity.format = format;
            quantity.to_string()
        }
        // Only a sum beyond what a quantity can hold gets here.
        Err(_) => format!("{}n", amount.0),
    }
}

/// The amount of a quantity that the schema has already accepted.
pub fn amount(quantity: &Quantity) -> Amount {
    parse(&quantity.0).map(|(amount, _)| amount).unwrap_or_default()
}

/// A quantity as messages show it.
pub fn text(quantity: &Quantity) -> String {
    parse(&quantity.0).map_or_else(|| quantity.0.clone(), |(amount, format)| canonical(amount, format))
}

/// Upstream's SetDefaults_ResourceList: rounds up to thousandths.
pub fn round_up_to_milli(list: Option<&mut serde_json::Value>) {
    for value in list.and_then(|l| l.as_object_mut()).into_iter().flat_map(|l| l.values_mut()) {
        let Some((amount, format)) = value.as_str().and_then(parse) else { continue };
        if amount.0 % (NANO / 1000) != 0 {
            let rounded = Amount(ceil_div(amount.0, NANO / 1000) * (NANO / 1000));
            *value = canonical(rounded, format).into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_as_upstream() {
        let cases = [
            ("0", 0, "0"),
            ("1", 1000, "1"),
            ("100m", 100, "100m"),
            ("1.5", 1500, "1500m"),
            ("0.1Ki", 102_400, "102400m"),
            ("1Ki", 1_024_000, "1Ki"),
            ("1024Mi", 1_073_741_824_000, "1Gi"),
            ("1000k", 1_000_000_000, "1M"),
            ("1e3", 1_000_000, "1e3"),
            ("-1", -1000, "-1"),
            ("1500m", 1500, "1500m"),
            ("512", 512_000, "512"),
            (".5", 500, "500m"),
            ("100Ki", 102_400_000, "100Ki"),
            ("1.5Gi", 1_610_612_736_000, "1536Mi"),
        ];
        for (text, milli, written) in cases {
            let (amount, format) = parse(text).unwrap();
            assert_eq!(amount.milli_value(), milli, "{text}");
            assert_eq!(canonical(amount, format), written, "{text}");
        }
        assert_eq!(parse("1n").unwrap().0.milli_value(), 1);
        for bad in ["", "a", "1x", "1Kii"] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn rounds_up_to_thousandths() {
        let mut list = serde_json::json!({"cpu": "1u", "memory": "1Mi"});
        round_up_to_milli(Some(&mut list));
        assert_eq!(list, serde_json::json!({"cpu": "1m", "memory": "1Mi"}));
    }
}
