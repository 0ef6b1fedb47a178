//! Platforms as texts, and which of an image's a machine runs best. The rule itself is `sampan_drivers::platform`'s.
//!
//! Upstream counterpart: containerd's `platforms` package.
pub use sampan_drivers::platform::{list, normalise, rank};
use sampan_drivers::runtime::Platform;

/// The index of the best of `platforms` for `machine`; the first of equals.
pub fn choose<'a>(machine: &Platform, platforms: impl IntoIterator<Item = &'a Platform>) -> Option<usize> {
    let ranked = platforms.into_iter().enumerate().filter_map(|(i, p)| Some((rank(machine, p)?, i)));
    ranked.min().map(|(_, i)| i)
}

/// `linux/arm/v7`
pub fn format(platform: &Platform) -> String {
    normalise(platform).to_string()
}

/// Reads `linux/arm/v7`, `arm/v7` or `arm64`.
pub fn parse(text: &str) -> Option<Platform> {
    let parts: Vec<&str> = text.split('/').collect();
    let (os, rest) = match parts.as_slice() {
        ["linux", rest @ ..] => ("linux", rest),
        rest => ("linux", rest),
    };
    let (architecture, variant) = match rest {
        [a] => (*a, None),
        [a, v] => (*a, Some(v.to_string())),
        _ => return None,
    };
    (!architecture.is_empty())
        .then(|| normalise(&Platform { os: os.into(), architecture: architecture.into(), variant }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_choose_the_best_image_they_can_run() {
        let all = ["linux/arm/v5", "linux/arm/v6", "linux/arm/v7", "linux/arm64", "linux/amd64", "linux/386"];
        for (machine, offered, wanted) in [
            ("amd64", &all[..], Some("linux/amd64")),
            ("arm64", &all[..], Some("linux/arm64")),
            ("arm64", &all[..3], Some("linux/arm/v7")),
            ("arm64/v8", &["linux/arm64/v8"][..], Some("linux/arm64")),
            ("arm/v7", &all[..], Some("linux/arm/v7")),
            ("arm/v7", &all[..2], Some("linux/arm/v6")),
            ("arm/v6", &all[..], Some("linux/arm/v6")),
            ("arm/v6", &["linux/arm/v7"][..], None),
            ("arm/v6", &["linux/arm"][..], None),
            ("arm", &["linux/arm64"][..], None),
            ("amd64", &["linux/arm64", "linux/arm"][..], None),
            ("amd64", &["linux/amd64/v3"][..], None),
            ("amd64/v3", &["linux/amd64", "linux/amd64/v2"][..], Some("linux/amd64/v2")),
            ("x86_64", &["windows/amd64"][..], None),
        ] {
            let images: Vec<Platform> = offered
                .iter()
                .map(|p| match p.strip_prefix("windows/") {
                    Some(a) => Platform { os: "windows".into(), architecture: a.into(), variant: None },
                    None => parse(p).unwrap(),
                })
                .collect();
            let chosen = choose(&parse(machine).unwrap(), &images).map(|i| format(&images[i]));
            assert_eq!(chosen.as_deref(), wanted, "{machine} of {offered:?}");
        }
    }
}
