//! Where things are kept: docker-registry's own layout, so that its data can be served as it lies and the other way
//! round. Referrers have a folder of their own, which docker-registry does not look at.
//!
//! Upstream counterpart: distribution's `registry/storage/paths.go`, below `docker/registry/v2`.
use crate::digest::{Algorithm, Digest};

pub const REPOSITORIES: &str = "repositories";
pub const BLOBS: &str = "blobs";
pub const LINK: &str = "link";
pub const DATA: &str = "data";

pub fn blob_folder(digest: &Digest) -> String {
    format!("{BLOBS}/{}/{}/{}", digest.algorithm().name(), &digest.hex()[..2], digest.hex())
}

pub fn blob(digest: &Digest) -> String {
    format!("{}/{DATA}", blob_folder(digest))
}

pub fn repository(name: &str) -> String {
    format!("{REPOSITORIES}/{name}")
}

pub fn manifests(name: &str) -> String {
    format!("{REPOSITORIES}/{name}/_manifests")
}

pub fn layers(name: &str, algorithm: Algorithm) -> String {
    format!("{REPOSITORIES}/{name}/_layers/{}", algorithm.name())
}

pub fn layer_folder(name: &str, digest: &Digest) -> String {
    format!("{}/{}", layers(name, digest.algorithm()), digest.hex())
}

pub fn layer(name: &str, digest: &Digest) -> String {
    format!("{}/{LINK}", layer_folder(name, digest))
}

pub fn revisions(name: &str, algorithm: Algorithm) -> String {
    format!("{}/revisions/{}", manifests(name), algorithm.name())
}

pub fn revision_folder(name: &str, digest: &Digest) -> String {
    format!("{}/{}", revisions(name, digest.algorithm()), digest.hex())
}

pub fn revision(name: &str, digest: &Digest) -> String {
    format!("{}/{LINK}", revision_folder(name, digest))
}

pub fn tags(name: &str) -> String {
    format!("{}/tags", manifests(name))
}

/// Inside the folder of a tag: the file that makes it exist.
pub const TAG_CURRENT: &str = "current/link";

pub fn tag_folder(name: &str, tag: &str) -> String {
    format!("{}/{tag}", tags(name))
}

pub fn tag(name: &str, tag: &str) -> String {
    format!("{}/{TAG_CURRENT}", tag_folder(name, tag))
}

/// docker-registry keeps the history of a tag here, and reads it when it collects garbage.
pub fn tag_index(name: &str, tag: &str, digest: &Digest) -> String {
    format!("{}/index/{}/{}/{LINK}", tag_folder(name, tag), digest.algorithm().name(), digest.hex())
}

pub fn referrers_root(name: &str) -> String {
    format!("{}/referrers", manifests(name))
}

pub fn referrers(name: &str, subject: &Digest) -> String {
    format!("{}/{}-{}", referrers_root(name), subject.algorithm().name(), subject.hex())
}

pub fn referrer(name: &str, subject: &Digest, manifest: &Digest) -> String {
    format!("{}/{}-{}", referrers(name, subject), manifest.algorithm().name(), manifest.hex())
}

/// The digest behind `sha256-…`.
pub fn dashed(text: &str) -> Option<Digest> {
    let (algorithm, hex) = text.split_once('-')?;
    Digest::new(Algorithm::from_name(algorithm)?, hex)
}

pub fn uploads(name: &str) -> String {
    format!("{REPOSITORIES}/{name}/_uploads")
}

pub fn upload_folder(name: &str, id: &str) -> String {
    format!("{}/{id}", uploads(name))
}

pub fn upload(name: &str, id: &str) -> String {
    format!("{}/{DATA}", upload_folder(name, id))
}
