//! Randomness: UIDs, name suffixes, key material.
//!
//! [`seed`] makes all of it but [`fill`] (key material) repeatable, for simulations.
use std::sync::Mutex;

static SEEDED: Mutex<Option<u64>> = Mutex::new(None);

/// The alphabet of upstream's `rand.String` (k8s.io/apimachinery/pkg/util/rand): no vowels, no look-alikes.
const ALPHANUMS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Makes everything but key material follow from `seed`.
pub fn seed(seed: u64) {
    *SEEDED.lock().unwrap_or_else(|e| e.into_inner()) = Some(seed);
}

/// 64 random bits; not for key material.
pub fn u64() -> u64 {
    let mut seeded = SEEDED.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(state) = seeded.as_mut() {
        // SplitMix64
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        return z ^ (z >> 31);
    }
    drop(seeded);
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// A number in `0..bound` (0 when `bound` is 0).
pub fn below(bound: u64) -> u64 {
    if bound == 0 { 0 } else { u64() % bound }
}

/// Key material from the operating system.
///
/// # Panics
/// When the operating system has no randomness to give: nothing secure could go on.
pub fn fill(bytes: &mut [u8]) {
    #[expect(clippy::disallowed_methods, reason = "the one place that asks the machine")]
    if let Err(e) = getrandom::fill(bytes) {
        panic!("the operating system gives no random bytes: {e}");
    }
}

/// A version 4 UUID, as `metadata.uid` has it.
pub fn uuid() -> String {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&u64().to_le_bytes());
    bytes[8..].copy_from_slice(&u64().to_le_bytes());
    uuid::Builder::from_random_bytes(bytes).into_uuid().to_string()
}

/// `n` characters for generated names.
pub fn suffix(n: usize) -> String {
    (0..n).map(|_| ALPHANUMS[below(ALPHANUMS.len() as u64) as usize] as char).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_use_the_upstream_alphabet() {
        let s = super::suffix(200);
        assert_eq!(s.len(), 200);
        assert!(s.bytes().all(|b| super::ALPHANUMS.contains(&b)), "{s}");
        assert_eq!(super::uuid().len(), 36);
    }
}
