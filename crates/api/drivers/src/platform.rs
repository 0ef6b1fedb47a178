//! Which images a node can run: one rule for the scheduler, the DaemonSet controller, the kubelet and the image client.
//!
//! Upstream counterpart: none in Kubernetes; the rule is containerd's `platforms.Only`. A 64-bit arm machine also takes
//! arm v8 … v5, an arm v7 one v6 and v5, amd64 takes lower micro-architecture levels but not 386. A node declares its
//! platform with the labels `kubernetes.io/os`, `kubernetes.io/arch` and, where it matters, [`ARM_VARIANT_LABEL`].
use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;

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

/// How well an image built for `image` suits a `machine`: lower is better, `None` is not at all.
pub fn rank(machine: &Platform, image: &Platform) -> Option<u32> {
    let (machine, image) = (normalise(machine), normalise(image));
    if machine.os != image.os {
        return None;
    }
    match (machine.architecture.as_str(), image.architecture.as_str()) {
        ("arm64", "arm64") => level(&machine, 8).checked_sub(level(&image, 8)),
        // an arm64 machine's 32-bit side is arm v8
        ("arm64", "arm") => 8u32.checked_sub(level(&image, 7)).map(|d| 100 + d),
        ("arm", "arm") => level(&machine, 7).checked_sub(level(&image, 7)),
        ("amd64", "amd64") => level(&machine, 1).checked_sub(level(&image, 1)),
        (m, i) => (m == i && (image.variant.is_none() || image.variant == machine.variant)).then_some(0),
    }
}

/// Whether an image built for `image` runs on a node of platform `node`.
pub fn runs_on(image: &Platform, node: &Platform) -> bool {
    rank(node, image).is_some()
}

/// Whether one of the platforms that an image is built for runs on the node.
pub fn any_runs_on(images: &[Platform], node: &Platform) -> bool {
    images.iter().any(|image| runs_on(image, node))
}

/// Whether each platform among `nodes` has one that holds the image, which then runs on all of them.
pub fn is_everywhere<'a>(nodes: impl IntoIterator<Item = (&'a Platform, bool)>) -> bool {
    let (mut with, mut without): (Vec<&Platform>, Vec<&Platform>) = (Vec::new(), Vec::new());
    for (platform, holds) in nodes {
        let list = if holds { &mut with } else { &mut without };
        if !list.contains(&platform) {
            list.push(platform);
        }
    }
    without.iter().all(|p| with.contains(p))
}

/// An image's name as nodes report what they hold: with its registry, and a digest or else a tag.
pub fn reported_name(image: &str) -> String {
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    let slash = name.rfind('/').map_or(0, |at| at + 1);
    let (name, tag) = match name[slash..].find(':') {
        Some(colon) => (&name[..slash + colon], &name[slash + colon + 1..]),
        None => (name, "latest"),
    };
    let (registry, path) = match name.split_once('/') {
        Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path),
        _ => ("docker.io", name),
    };
    let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
    let library = if registry == "docker.io" && !path.contains('/') { "library/" } else { "" };
    match digest {
        Some(digest) => format!("{registry}/{library}{path}@{digest}"),
        None => format!("{registry}/{library}{path}:{tag}"),
    }
}

/// An image of a pod, with what its registry may want to see.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageQuery {
    /// As the pod names it.
    pub image: String,
    /// The pod's namespace, where the pull secrets are.
    pub namespace: String,
    /// Names of the pod's `imagePullSecrets` (admission has added the service account's).
    pub pull_secrets: Vec<String>,
}

/// Tells which platforms images are built for.
#[async_trait]
pub trait Platforms: Send + Sync {
    /// The platforms of `query.image`; `None` where they cannot be known (registry down, access denied, no such image):
    /// then every node is as good.
    async fn lookup(&self, query: &ImageQuery) -> Option<Vec<Platform>>;
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

    #[test]
    fn what_a_node_of_each_platform_holds_is_everywhere() {
        let (amd64, arm64) = (platform("linux/amd64"), platform("linux/arm64"));
        for (nodes, wanted) in [
            (vec![(&amd64, true), (&amd64, false), (&arm64, true)], true),
            (vec![(&amd64, true), (&arm64, false)], false),
            (vec![(&amd64, false)], false),
        ] {
            assert_eq!(is_everywhere(nodes.clone()), wanted, "{nodes:?}");
        }
        for (image, reported) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/team/x:1", "docker.io/team/x:1"),
            ("reg:5000/x", "reg:5000/x:latest"),
            ("reg.example/a/b:1@sha256:12", "reg.example/a/b@sha256:12"),
            ("localhost/x:y", "localhost/x:y"),
        ] {
            assert_eq!(reported_name(image), reported);
        }
    }
}
