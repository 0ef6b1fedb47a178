//! A manifest list in the making: its members, what is said of their platforms, and its bytes.
//!
//! Upstream counterparts: docker/cli's `cli/manifest/types` and distribution's `manifestlist`. What stays true: the
//! bytes are those that docker pushes for the same members, so the digest is too: members in the order of docker's
//! file names for them, three spaces, Docker's or OCI's media type as the first member has it.
use jiff::Timestamp;
use sampan_image::manifest::{DOCKER_LIST, OCI_INDEX, OCI_MANIFEST};
use sampan_image::{Platform, platform};
use serde::{Deserialize, Serialize};

use crate::{ManifestError, json};

/// A platform as manifest lists write it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OsPlatform {
    pub architecture: String,
    pub os: String,
    #[serde(rename = "os.version", skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    #[serde(rename = "os.features", skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

impl OsPlatform {
    pub fn platform(&self) -> Platform {
        let variant = (!self.variant.is_empty()).then(|| self.variant.clone());
        Platform { os: self.os.clone(), architecture: self.architecture.clone(), variant }
    }
}

/// What `annotate` was told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Given {
    pub os: String,
    pub arch: String,
    pub variant: String,
    pub os_version: String,
    pub os_features: Vec<String>,
}

impl Given {
    /// What was told later stands; features add up.
    fn update(&mut self, later: &Given) {
        let set = |old: &mut String, new: &String| {
            if !new.is_empty() {
                old.clone_from(new);
            }
        };
        set(&mut self.os, &later.os);
        set(&mut self.arch, &later.arch);
        set(&mut self.variant, &later.variant);
        set(&mut self.os_version, &later.os_version);
        for feature in &later.os_features {
            if !self.os_features.contains(feature) {
                self.os_features.push(feature.clone());
            }
        }
    }
}

/// A program that was found in an image, and what it is made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    pub path: String,
    pub architecture: String,
}

/// An image of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// As docker writes it: in full, with tag or digest.
    pub name: String,
    pub media_type: String,
    pub digest: String,
    pub size: u64,
    /// The manifest's own text.
    pub raw: String,
    /// What its configuration says.
    pub guessed: OsPlatform,
    #[serde(default)]
    pub given: Given,
    #[serde(default)]
    pub program: Option<Program>,
}

impl Member {
    /// What the list says of it.
    pub fn platform(&self) -> OsPlatform {
        let (mut platform, given) = (self.guessed.clone(), &self.given);
        let set = |old: &mut String, new: &String| {
            if !new.is_empty() {
                old.clone_from(new);
            }
        };
        set(&mut platform.os, &given.os);
        set(&mut platform.architecture, &given.arch);
        set(&mut platform.variant, &given.variant);
        set(&mut platform.os_version, &given.os_version);
        for feature in &given.os_features {
            if !platform.os_features.contains(feature) {
                platform.os_features.push(feature.clone());
            }
        }
        platform
    }

    /// Adds to what is said of it; the warnings are for whoever said it.
    pub fn annotate(&mut self, given: &Given) -> Result<Vec<String>, ManifestError> {
        self.given.update(given);
        let platform = self.platform();
        if !is_supported(&platform.os, &platform.architecture) {
            return Err(ManifestError::Unsupported { os: given.os.clone(), arch: given.arch.clone() });
        }
        Ok(self.contradictions())
    }

    /// Where configuration and programs of the image say otherwise than the list.
    pub fn contradictions(&self) -> Vec<String> {
        let (said, guessed) = (self.platform(), &self.guessed);
        let mut found = Vec::new();
        let (list, own) = (platform::format(&said.platform()), platform::format(&guessed.platform()));
        if !guessed.architecture.is_empty() && list != own {
            found.push(format!("{}: its configuration says {own}, the list will say {list}", self.name));
        }
        let normal = platform::normalise(&said.platform()).architecture;
        if let Some(program) = &self.program
            && !said.architecture.is_empty()
            && !runs(&normal, &program.architecture)
        {
            found.push(format!(
                "{}: /{} in it is a program for {}, the list will say {list}; nodes of {list} could not run it",
                self.name, program.path, program.architecture
            ));
        }
        found
    }

    /// How docker names the file that it keeps the member in: what it sorts by.
    fn file_name(&self) -> String {
        self.name.replace(':', "-").replace('/', "_")
    }
}

/// A list that was not pushed yet, or was and is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PendingList {
    pub name: String,
    pub created_at: Timestamp,
    pub members: Vec<Member>,
}

impl PendingList {
    pub fn new(name: String, members: Vec<Member>) -> PendingList {
        let mut list =
            PendingList { name, created_at: sampan_world::clock::now_seconds(), members: Vec::new() };
        members.into_iter().for_each(|m| list.put(m));
        list
    }

    /// Adds a member, or replaces the one of that name; what was said of that still stands.
    pub fn put(&mut self, mut member: Member) {
        if let Some(at) = self.members.iter().position(|m| m.name == member.name) {
            let old = self.members.remove(at);
            let new = std::mem::take(&mut member.given);
            member.given = old.given;
            member.given.update(&new);
        }
        let place = self.members.partition_point(|m| m.file_name() < member.file_name());
        self.members.insert(place, member);
    }

    /// Media type and bytes, as they are pushed.
    pub fn document(&self) -> Result<(&'static str, String), ManifestError> {
        if let Some(member) = self.members.iter().find(|m| {
            let platform = m.platform();
            platform.os.is_empty() || platform.architecture.is_empty()
        }) {
            return Err(ManifestError::NoPlatform { name: member.name.clone() });
        }
        let entries = self.members.iter().map(|m| Entry {
            media_type: m.media_type.clone(),
            size: m.size,
            digest: m.digest.clone(),
            platform: m.platform(),
        });
        Ok(document(entries.collect()))
    }
}

/// A line of a list, in docker's order of keys.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    pub media_type: String,
    pub size: u64,
    pub digest: String,
    pub platform: OsPlatform,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct List {
    schema_version: u32,
    media_type: &'static str,
    manifests: Vec<Entry>,
}

pub(crate) fn document(manifests: Vec<Entry>) -> (&'static str, String) {
    let oci = manifests.first().is_some_and(|m| m.media_type == OCI_MANIFEST);
    let media_type = if oci { OCI_INDEX } else { DOCKER_LIST };
    let list = List { schema_version: 2, media_type, manifests };
    // Strings and numbers only: this cannot fail.
    let text = serde_json::to_string(&list).unwrap_or_default();
    (media_type, json::marshal_indent(&text, "   "))
}

/// Whether a node of that architecture runs such programs by itself.
fn runs(node: &str, program: &str) -> bool {
    node == program || matches!((node, program), ("arm64", "arm") | ("amd64", "386"))
}

/// Docker's list, and what Go has learnt since.
fn is_supported(os: &str, arch: &str) -> bool {
    let archs: &[&str] = match os {
        "linux" => &[
            "386", "amd64", "arm", "arm64", "loong64", "mips", "mipsle", "mips64", "mips64le", "ppc64",
            "ppc64le", "riscv64", "s390x",
        ],
        "darwin" => &["386", "amd64", "arm", "arm64"],
        "freebsd" => &["386", "amd64", "arm", "arm64"],
        "netbsd" | "openbsd" => &["386", "amd64", "arm", "arm64"],
        "dragonfly" | "solaris" => &["amd64"],
        "plan9" => &["386", "amd64"],
        "windows" => &["386", "amd64", "arm64"],
        _ => &[],
    };
    archs.contains(&arch)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn member(name: &str, arch: &str) -> Member {
        Member {
            name: name.into(),
            media_type: "application/vnd.docker.distribution.manifest.v2+json".into(),
            digest: format!("sha256:{}", "1".repeat(64)),
            size: 528,
            raw: "{}".into(),
            guessed: OsPlatform { architecture: arch.into(), os: "linux".into(), ..OsPlatform::default() },
            given: Given::default(),
            program: None,
        }
    }

    #[test]
    fn a_list_has_dockers_bytes() {
        let members = vec![member("r.example/x:b", "arm64"), member("r.example/x:a", "amd64")];
        let (media_type, text) = PendingList::new("r.example/x:l".into(), members).document().unwrap();
        assert_eq!(media_type, DOCKER_LIST);
        let digest = format!("sha256:{}", "1".repeat(64));
        let entry = |arch: &str| {
            format!(
                "      {{\n         \"mediaType\": \"application/vnd.docker.distribution.manifest.v2+json\",\n         \
                 \"size\": 528,\n         \"digest\": \"{digest}\",\n         \"platform\": {{\n            \
                 \"architecture\": \"{arch}\",\n            \"os\": \"linux\"\n         }}\n      }}"
            )
        };
        let wanted = format!(
            "{{\n   \"schemaVersion\": 2,\n   \"mediaType\": \"{DOCKER_LIST}\",\n   \"manifests\": [\n{},\n{}\n   ]\n}}",
            entry("amd64"),
            entry("arm64")
        );
        assert_eq!(text, wanted);
        let mut oci = member("a", "amd64");
        oci.media_type = OCI_MANIFEST.into();
        assert_eq!(PendingList::new("l".into(), vec![oci]).document().unwrap().0, OCI_INDEX);
        assert!(PendingList::new("l".into(), vec![member("a", "")]).document().is_err());
    }

    #[test]
    fn annotations_are_kept_and_contradictions_told() {
        let mut one = member("r.example/x:a", "arm64");
        one.program = Some(Program { path: "bin/sh".into(), architecture: "arm64".into() });
        let arm =
            Given { variant: "v8".into(), os_features: vec!["a".into(), "a".into()], ..Given::default() };
        assert!(one.annotate(&arm).unwrap().is_empty());
        assert_eq!(one.platform().os_features, ["a"]);
        let wrong = Given { arch: "amd64".into(), ..Given::default() };
        let told = one.annotate(&wrong).unwrap();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].contains("linux/arm64") && told[1].contains("/bin/sh"), "{told:?}");
        let nonsense = Given { arch: "foo".into(), ..Given::default() };
        let error = one.clone().annotate(&nonsense).unwrap_err().to_string();
        assert_eq!(error, "manifest entry for image has unsupported os/arch combination: /foo");
        // resolved again: the digest is new, what was said stands
        let mut list = PendingList::new("l".into(), vec![one]);
        let mut again = member("r.example/x:a", "arm64");
        again.size = 600;
        list.put(again);
        assert_eq!((list.members.len(), list.members[0].size), (1, 600));
        assert_eq!(list.members[0].platform().architecture, "amd64");
    }
}
