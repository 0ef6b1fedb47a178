//! Which images a node can run: one rule for the scheduler, the DaemonSet controller and the kubelet.
//!
//! Upstream counterpart: none in Kubernetes; the rule is containerd's `platforms.Only`. A 64-bit arm machine also takes
//! arm v8 … v5, an arm v7 one v6 and v5, amd64 takes lower micro-architecture levels but not 386. A node declares its
//! platform with the labels `kubernetes.io/os`, `kubernetes.io/arch` and, where it matters, [`ARM_VARIANT_LABEL`].
use std::collections::BTreeMap;
use std::fmt;

use crate::runtime::Platform;

/// The arm version that a 32-bit node implements: `v6` or `v7`. Without it a node is taken for `v7`.
pub const ARM_VARIANT_LABEL: &str = "sampan.io/arm-variant";

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// The platform that a node's labels declare; `None` where they do not say an architecture, which allows every image.
pub fn of_node(labels: &BTreeMap<String, String>) -> Option<Platform> {
    let architecture = labels.get("kubernetes.io/arch").filter(|a| !a.is_empty())?;
    let os = labels.get("kubernetes.io/os").map_or("linux", String::as_str);
    let variant = labels.get(ARM_VARIANT_LABEL).filter(|_| architecture == "arm").cloned();
    Some(normalise(&Platform { os: os.to_string(), architecture: architecture.clone(), variant }))
}

/// One spelling for each platform: `x86_64` is amd64, `armhf` is arm/v7, arm64/v8 is arm64, arm alone is arm/v7.
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

/// Whether an image built for `image` runs on a node of platform `node`.
pub fn runs_on(image: &Platform, node: &Platform) -> bool {
    let (image, node) = (normalise(image), normalise(node));
    if image.os != node.os {
        return false;
    }
    match (node.architecture.as_str(), image.architecture.as_str()) {
        ("arm64", "arm64") => level(&image, 8) <= level(&node, 8),
        ("arm64", "arm") => level(&image, 7) <= 8,
        ("arm", "arm") => level(&image, 7) <= level(&node, 7),
        ("amd64", "amd64") => level(&image, 1) <= level(&node, 1),
        (n, i) => n == i && (image.variant.is_none() || image.variant == node.variant),
    }
}

/// Whether one of the platforms that an image is built for runs on the node.
pub fn any_runs_on(images: &[Platform], node: &Platform) -> bool {
    images.iter().any(|image| runs_on(image, node))
}

/// For sentences: `linux/amd64, linux/arm64`, sorted and without repetition.
pub fn list(platforms: &[Platform]) -> String {
    let mut names: Vec<String> = platforms.iter().map(|p| normalise(p).to_string()).collect();
    names.sort();
    names.dedup();
    if names.is_empty() { "no platform".to_string() } else { names.join(", ") }
}

/// `v7` is 7; `v8.2` is 8.
fn level(platform: &Platform, default: u32) -> u32 {
    let variant = platform.variant.as_deref().and_then(|v| v.strip_prefix('v'));
    variant.and_then(|v| v.split('.').next()?.parse().ok()).unwrap_or(default)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_string);
        Platform {
            os: parts.next().unwrap_or_default(),
            architecture: parts.next().unwrap_or_default(),
            variant: parts.next(),
        }
    }

    #[test]
    fn machines_run_what_their_processor_can() {
        for (image, node, wanted) in [
            ("linux/amd64", "linux/amd64", true),
            ("linux/amd64/v3", "linux/amd64", false),
            ("linux/amd64", "linux/amd64/v3", true),
            ("linux/386", "linux/amd64", false),
            ("linux/arm64/v8", "linux/arm64", true),
            ("linux/amd64", "linux/arm64", false),
            ("linux/arm64", "linux/arm/v7", false),
            ("linux/arm/v7", "linux/arm64", true),
            ("linux/arm/v6", "linux/arm/v7", true),
            ("linux/arm/v7", "linux/arm/v6", false),
            ("linux/arm", "linux/arm", true),
            ("windows/amd64", "linux/amd64", false),
            ("linux/riscv64", "linux/riscv64", true),
        ] {
            assert_eq!(runs_on(&platform(image), &platform(node)), wanted, "{image} on {node}");
        }
    }

    #[test]
    fn labels_declare_a_nodes_platform() {
        let labels =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        assert_eq!(of_node(&labels(&[])), None);
        assert_eq!(of_node(&labels(&[("kubernetes.io/arch", "arm64")])), Some(platform("linux/arm64")));
        let v6 = labels(&[("kubernetes.io/arch", "arm"), (ARM_VARIANT_LABEL, "v6")]);
        assert_eq!(of_node(&v6).map(|p| p.to_string()), Some("linux/arm/v6".to_string()));
        assert_eq!(list(&[platform("linux/arm"), platform("linux/amd64")]), "linux/amd64, linux/arm/v7");
    }
}
