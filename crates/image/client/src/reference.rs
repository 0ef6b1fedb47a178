//! Image names: `[registry[:port]/]path[:tag][@digest]`.
//!
//! Upstream counterpart: `distribution/reference` with its Docker normalisation: a name without a registry is
//! `docker.io`'s, a single path component there belongs to `library`, and a name with neither tag nor digest means
//! `latest`. Deliberate difference: only sha256 digests are taken, since only those can be verified here.
use std::fmt;

use sampan_drivers::runtime::ImageError;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    pub registry: String,
    pub repository: String,
    pub tag: Option<String>,
    /// `sha256:…`
    pub digest: Option<String>,
}

const DEFAULT_REGISTRY: &str = "docker.io";
/// Registry and repository together, as upstream bounds them.
const NAME_MAX_CHARS: usize = 255;

impl Reference {
    pub fn parse(text: &str) -> Result<Reference, ImageError> {
        let bad = |why: &str| ImageError::InvalidName(format!("{why}: {text:?}"));
        if text.is_empty() {
            return Err(bad("repository name must have at least one component"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) if is_digest(digest) => (rest, Some(digest.to_string())),
            Some(_) => return Err(bad("invalid reference format: unsupported digest")),
            None => (text, None),
        };
        let slash = rest.rfind('/').map_or(0, |i| i + 1);
        let (name, tag) = match rest[slash..].find(':') {
            // "localhost:5000" alone is a repository with a tag, as upstream has it.
            Some(i) => (&rest[..slash + i], Some(&rest[slash + i + 1..])),
            None => (rest, None),
        };
        if tag.is_some_and(|t| !is_tag(t)) {
            return Err(bad("invalid reference format: bad tag"));
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, path))
                if first.contains('.')
                    || first.contains(':')
                    || first == "localhost"
                    || first.chars().any(char::is_uppercase) =>
            {
                (first, path)
            }
            _ => (DEFAULT_REGISTRY, name),
        };
        if path.chars().any(char::is_uppercase) {
            return Err(bad("invalid reference format: repository name must be lowercase"));
        }
        if !is_registry(registry) || !path.split('/').all(is_component) {
            return Err(bad("invalid reference format"));
        }
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        let repository = match (registry, path.contains('/')) {
            (DEFAULT_REGISTRY, false) => format!("library/{path}"),
            _ => path.to_string(),
        };
        if registry.len() + 1 + repository.len() > NAME_MAX_CHARS {
            return Err(bad("repository name must not be more than 255 characters"));
        }
        let tag = match (tag, &digest) {
            (Some(t), _) => Some(t.to_string()),
            (None, Some(_)) => None,
            (None, None) => Some("latest".to_string()),
        };
        Ok(Reference { registry: registry.to_string(), repository, tag, digest })
    }

    /// `registry/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// What to ask the registry for: the digest where there is one.
    pub fn target(&self) -> &str {
        self.digest.as_deref().or(self.tag.as_deref()).unwrap_or("latest")
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// `sha256:` and 64 lower-case hexadecimal digits.
pub fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|h| h.len() == 64 && h.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=128).contains(&tag.len())
        && tag.bytes().enumerate().all(|(i, b)| word(b) || (i > 0 && matches!(b, b'.' | b'-')))
}

/// `host` or `host:port`.
pub fn is_registry(registry: &str) -> bool {
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((host, port)) if !host.is_empty() => {
                let hex = host.bytes().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.'));
                return hex && port.strip_prefix(':').map_or(port.is_empty(), is_port);
            }
            _ => return false,
        },
        None => registry.split_once(':').map_or((registry, None), |(h, p)| (h, Some(p))),
    };
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    host.split('.').all(label) && port.is_none_or(is_port)
}

fn is_port(port: &str) -> bool {
    !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())
}

/// Lower-case letters and digits, parted by one `.`, one or two `_`, or any number of `-`.
fn is_component(component: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().is_some_and(|b| alnum(*b)) || !bytes.last().is_some_and(|b| alnum(*b)) {
        return false;
    }
    component
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_normalised() {
        let d = format!("sha256:{}", "a".repeat(64));
        for (given, wanted) in [
            ("busybox", "docker.io/library/busybox:latest".to_string()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".into()),
            ("rancher/k3s", "docker.io/rancher/k3s:latest".into()),
            ("index.docker.io/x", "docker.io/library/x:latest".into()),
            ("localhost/x", "localhost/x:latest".into()),
            ("localhost:5000", "docker.io/library/localhost:5000".into()),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c".into()),
            ("[::1]:5000/a", "[::1]:5000/a:latest".into()),
            (
                "registry.k8s.io/e2e-test-images/agnhost:2.53",
                "registry.k8s.io/e2e-test-images/agnhost:2.53".into(),
            ),
            (&format!("x@{d}"), format!("docker.io/library/x@{d}")),
            (&format!("r.io/x:t@{d}"), format!("r.io/x:t@{d}")),
            ("a-b__c/e--f.g", "docker.io/a-b__c/e--f.g:latest".into()),
        ] {
            assert_eq!(Reference::parse(given).unwrap().to_string(), wanted, "{given}");
        }
    }

    #[test]
    fn bad_names_are_refused() {
        let long = "a".repeat(256);
        for bad in [
            "",
            " ",
            "Busybox",
            "r.io/X",
            "x:",
            "x:-a",
            "x@sha256:12",
            "x@md5:00",
            "a//b",
            "/a",
            "a/",
            "a___b",
            "a..b",
            "-a",
            "r.io:x/a",
            "x y",
            "http://r.io/x",
            "../../etc",
            "r.io/../x",
            "x:ta g",
            &long,
        ] {
            assert!(matches!(Reference::parse(bad), Err(ImageError::InvalidName(_))), "{bad:?}");
        }
    }
}
