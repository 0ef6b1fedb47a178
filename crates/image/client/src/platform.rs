//! Which of an image's platforms a machine runs, and which of those it runs best.
//!
//! Upstream counterpart: containerd's `platforms.Only`. A 64-bit arm machine also takes arm v8 … v5, an arm v7 one
//! v6 and v5; amd64 takes lower micro-architecture levels. Deliberate difference: amd64 does not fall back to 386.
use sampan_drivers::runtime::Platform;

/// Spelling as containerd normalises it: `x86_64` is amd64, `armhf` is arm/v7, arm64/v8 is arm64, arm is arm/v7.
pub fn normalise(platform: &Platform) -> Platform {
    let given = platform.variant.clone().filter(|v| !v.is_empty());
    let (architecture, variant) = match platform.architecture.to_ascii_lowercase().as_str() {
        "x86_64" | "x86-64" | "amd64" => ("amd64".to_string(), given.filter(|v| v != "v1")),
        "i386" | "i686" | "386" => ("386".to_string(), None),
        "aarch64" | "arm64" => ("arm64".to_string(), given.filter(|v| v != "8" && v != "v8")),
        "armhf" => ("arm".to_string(), Some("v7".to_string())),
        "armel" => ("arm".to_string(), Some("v6".to_string())),
        "arm" => {
            let variant = given.unwrap_or_else(|| "v7".to_string());
            let variant = if variant.starts_with('v') { variant } else { format!("v{variant}") };
            ("arm".to_string(), Some(variant))
        }
        other => (other.to_string(), given),
    };
    let os = if platform.os.is_empty() { "linux".to_string() } else { platform.os.to_ascii_lowercase() };
    Platform { os, architecture, variant }
}

/// How well an image of platform `image` suits a `machine`: lower is better, `None` is not at all.
pub fn rank(machine: &Platform, image: &Platform) -> Option<u32> {
    let machine = normalise(machine);
    let image = normalise(image);
    if machine.os != image.os {
        return None;
    }
    let level = |p: &Platform, default: u32| {
        let variant = p.variant.as_deref().unwrap_or("");
        variant.strip_prefix('v').and_then(|v| v.split('.').next()?.parse().ok()).unwrap_or(default)
    };
    match (machine.architecture.as_str(), image.architecture.as_str()) {
        ("arm64", "arm64") => level(&machine, 8).checked_sub(level(&image, 8)),
        // An arm64 machine's 32-bit side is arm v8.
        ("arm64", "arm") => 8u32.checked_sub(level(&image, 7)).map(|d| 100 + d),
        ("arm", "arm") => level(&machine, 7).checked_sub(level(&image, 7)),
        ("amd64", "amd64") => level(&machine, 1).checked_sub(level(&image, 1)),
        (m, i) if m == i => (machine.variant == image.variant || image.variant.is_none()).then_some(0),
        _ => None,
    }
}

/// The index of the best of `platforms` for `machine`; the first of equals.
pub fn choose<'a>(machine: &Platform, platforms: impl IntoIterator<Item = &'a Platform>) -> Option<usize> {
    let ranked = platforms.into_iter().enumerate().filter_map(|(i, p)| Some((rank(machine, p)?, i)));
    ranked.min().map(|(_, i)| i)
}

/// `linux/arm/v7`
pub fn format(platform: &Platform) -> String {
    let platform = normalise(platform);
    match &platform.variant {
        Some(v) => format!("{}/{}/{v}", platform.os, platform.architecture),
        None => format!("{}/{}", platform.os, platform.architecture),
    }
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

/// For messages: `linux/amd64, linux/arm64`.
pub fn list(platforms: &[Platform]) -> String {
    let mut names: Vec<String> = platforms.iter().map(format).collect();
    names.sort();
    names.dedup();
    if names.is_empty() { "no platform".to_string() } else { names.join(", ") }
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
