//! Pushes a list: first what its repository does not have of the members, then the list.
//!
//! Upstream counterpart: docker/cli's `cli/command/manifest/push.go`. A member of another repository of the same registry
//! is mounted, blob by blob, where the registry allows that; else, and from other registries, it is copied.
use bytes::Bytes;
use sampan_image::copy::{self, Report};
use sampan_image::source::Repository;
use sampan_image::{Client, Reference};

use crate::{ManifestError, PendingList};

/// The digest that the list was pushed with; `said` is told of every member that was brought.
pub async fn push(
    client: &Client,
    target: &Reference,
    list: &PendingList,
    report: &dyn Report,
    said: &mut dyn FnMut(String),
) -> Result<String, ManifestError> {
    let (media_type, text) = list.document()?;
    for member in &list.members {
        let name = Reference::parse(&member.name)
            .map_err(|error| ManifestError::Image { name: member.name.clone(), error })?;
        if (&name.registry, &name.repository) == (&target.registry, &target.repository) {
            continue;
        }
        let pinned = Reference { digest: Some(member.digest.clone()), ..name.clone() };
        let source = Repository { client, reference: &pinned, auth: &[] };
        let bytes = Bytes::from(member.raw.clone());
        let plan = copy::plan(&source, &member.media_type, &bytes, &[]).await;
        let plan = plan.map_err(|e| ManifestError::of(&name, e))?;
        let place = Reference { tag: None, digest: Some(member.digest.clone()), ..target.clone() };
        let digest = copy::push(client, &source, &plan, &place, &[], report).await;
        let digest = digest.map_err(|e| ManifestError::of(&place, e))?;
        said(format!("Pushed ref {place} with digest: {digest}"));
    }
    let pushed = client.put_manifest(target, media_type, &Bytes::from(text), &[]).await;
    pushed.map_err(|e| ManifestError::of(target, e))
}
