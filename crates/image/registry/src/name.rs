//! Names of repositories and tags, and the rule which of them are valid.
//!
//! Upstream counterpart: the OCI distribution spec, "Pulling manifests". What stays true: a valid name has no component
//! that starts with `_` or is `..`, so that keys made of it never leave their folder.

/// Clients limit `host/name` to 255.
const NAME_MAX_LENGTH: usize = 255;
const TAG_MAX_LENGTH: usize = 128;

/// Components of `[a-z0-9]+` joined by `.`, `_`, `__` or any number of `-`, themselves joined by `/`.
pub fn is_repository(name: &str) -> bool {
    name.len() <= NAME_MAX_LENGTH && !name.is_empty() && name.split('/').all(is_component)
}

fn is_component(component: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().copied().is_some_and(word) || !bytes.last().copied().is_some_and(word) {
        return false;
    }
    let mut separators = component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    separators.all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

pub fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= TAG_MAX_LENGTH
        && tag.as_bytes().first().copied().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_follow_the_spec() {
        for good in ["a", "library/busybox", "a.b/c_d/e__f/g---h", "0/1"] {
            assert!(super::is_repository(good), "{good}");
        }
        let long = "a/".repeat(128);
        for bad in [
            "", "/a", "a/", "a//b", "A", "a..b", "a._b", "a___b", "_a", "a_", "-a", "..", "a/../b", "ä",
            &long,
        ] {
            assert!(!super::is_repository(bad), "{bad}");
        }
        for good in ["latest", "_", "1.2-3_X", &"a".repeat(128)] {
            assert!(super::is_tag(good), "{good}");
        }
        for bad in ["", ".a", "-a", "a/b", "a:b", "..", &"a".repeat(129)] {
            assert!(!super::is_tag(bad), "{bad}");
        }
    }
}
