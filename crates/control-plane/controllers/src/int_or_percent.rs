//! Numbers that may be percentages. Upstream counterpart: apimachinery util/intstr.
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// The number, or the percentage of `total`, rounded up or down; `None` when it is neither.
pub fn scaled(value: &IntOrString, total: i32, round_up: bool) -> Option<i32> {
    match value {
        IntOrString::Int(n) => Some(*n),
        IntOrString::String(s) => {
            let percent: i64 = s.strip_suffix('%')?.parse().ok()?;
            let product = percent * i64::from(total);
            let scaled = if round_up {
                product.div_euclid(100) + i64::from(product.rem_euclid(100) != 0)
            } else {
                product.div_euclid(100)
            };
            i32::try_from(scaled).ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_round_as_asked() {
        let cases = [
            ("25%", 10, true, Some(3)),
            ("25%", 10, false, Some(2)),
            ("100%", 7, false, Some(7)),
            ("x", 1, true, None),
        ];
        for (s, total, up, expected) in cases {
            assert_eq!(scaled(&IntOrString::String(s.into()), total, up), expected, "{s}");
        }
        assert_eq!(scaled(&IntOrString::Int(4), 1, true), Some(4));
    }
}
