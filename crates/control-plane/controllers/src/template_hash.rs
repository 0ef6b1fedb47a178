//! The pod-template-hash. Upstream counterpart: pkg/controller/controller_utils.go (ComputeHash), util/hash.
//!
//! Deliberate difference: upstream hashes Go's dump of the struct, we its JSON. Only equality matters, and a hash that
//! meets an object of other content is avoided through `collisionCount`, in both.
use serde::Serialize;

const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

fn fnv32a(bytes: &[u8], mut hash: u32) -> u32 {
    for byte in bytes {
        hash ^= u32::from(*byte);
        hash = hash.wrapping_mul(0x0100_0193);
    }
    hash
}

/// Each character mapped to one that cannot spell a bad word.
pub fn safe_encode(text: &str) -> String {
    text.bytes().map(|b| ALPHABET[b as usize % ALPHABET.len()] as char).collect()
}

/// The hash of `object` and the collision count.
pub fn compute<T: Serialize>(object: &T, collision_count: Option<i32>) -> String {
    let json = serde_json::to_vec(object).unwrap_or_default();
    let mut hash = fnv32a(&json, 0x811c_9dc5);
    if let Some(count) = collision_count {
        hash = fnv32a(&count.to_le_bytes(), hash);
    }
    safe_encode(&hash.to_string())
}

#[cfg(test)]
mod tests {
    #[test]
    fn is_deterministic_and_heeds_collisions() {
        assert_eq!(super::fnv32a(b"foobar", 0x811c_9dc5), 0xbf9c_f968);
        let a = super::compute(&"template", None);
        assert_eq!(a, super::compute(&"template", None));
        assert_ne!(a, super::compute(&"template", Some(0)));
        assert!(a.len() <= 10);
    }
}
