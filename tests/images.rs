//! Images that cannot be had: what the registry serves is missing, wrong, cut short or hostile.
//!
//! Upstream counterpart: test/e2e_node/image_*; the hostile layers are containerd's and Docker's old advisories.
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use sampan_tests::image::{Entry, Image, box_image, box_layer, layer};
use sampan_tests::registry::Registry;
use sampan_tests::{Space, Suite, cases, has, seconds, wait_for};
use serde_json::json;

const REGISTRY: &str = "registry.lab:5000";

fn main() -> ExitCode {
    Suite::new("images", "amd64")
        .with_registry()
        .together(cases![
            pulled_and_run,
            pulled_by_digest,
            image_does_not_exist,
            registry_is_down,
            invalid_name,
            never_pulled,
            wrong_digest_of_a_layer,
            wrong_digest_of_the_manifest,
            truncated_layer,
            layer_is_no_archive,
            path_traversal,
            link_out_of_the_layer,
            manifest_is_nonsense,
            other_architecture_only,
            comes_back_after_failure,
        ])
        .alone(cases![no_space_left])
        .run()
}

fn registry(s: &Space) -> Result<&Registry> {
    s.cluster.registry.as_ref().context("the suite has a registry")
}

/// A pod of that image; `image` is what follows the registry's name.
fn pod(s: &Space, name: &str, image: &str, policy: &str) -> Result<()> {
    let body = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
        "terminationGracePeriodSeconds": 1, "restartPolicy": "Never",
        "containers": [{"name": "c", "image": image, "imagePullPolicy": policy, "command": ["sh", "-c", "echo ran; sleep 1000"]}]}});
    s.post(&s.path("pods"), &body)?.ok().map(drop)
}

/// The pod waits as upstream's would, and its events say `want`.
fn cannot_be_pulled(s: &Space, name: &str, want: &str) -> Result<()> {
    s.pod(name, seconds(40), |pod| {
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"];
        (waiting == "ErrImagePull" || waiting == "ImagePullBackOff").then_some(())
    })?;
    s.event(name, "Failed", "Error: ErrImagePull")?;
    let event = s.event(name, "Failed", "Failed to pull image")?;
    let message = event["message"].as_str().unwrap_or_default().to_lowercase();
    has(&message, want)?;
    ensure!(
        s.object(&format!("pods/{name}"))?["status"]["phase"] == "Pending",
        "it waits, it has not failed"
    );
    Ok(())
}

fn pulled_and_run(s: &Space) -> Result<()> {
    registry(s)?.push("good", &box_image()?)?;
    pod(s, "p", &format!("{REGISTRY}/good:1"), "Always")?;
    let status = s.running("p")?["status"].clone();
    let id = status["containerStatuses"][0]["imageID"].as_str().unwrap_or_default().to_string();
    ensure!(id.starts_with("registry.lab:5000/good@sha256:"), "{id}");
    s.event("p", "Pulled", "Successfully pulled image")?;
    has(&s.k(&["logs", "p"])?, "ran")?;
    let names = s.k(&["get", "node", "amd64", "-o", "jsonpath={.status.images[*].names}"]);
    wait_for("the node to name its image", seconds(20), || {
        let names = s.k(&["get", "node", "amd64", "-o", "jsonpath={.status.images[*].names}"])?;
        Ok(if names.contains("registry.lab:5000/good:1") { Ok(()) } else { Err(names) })
    })
    .context(format!("first seen: {names:?}"))
}

fn pulled_by_digest(s: &Space) -> Result<()> {
    let image = box_image()?;
    registry(s)?.push("by-digest", &image)?;
    pod(s, "p", &format!("{REGISTRY}/by-digest@{}", image.manifest), "IfNotPresent")?;
    s.running("p").map(drop)
}

fn image_does_not_exist(s: &Space) -> Result<()> {
    pod(s, "p", &format!("{REGISTRY}/none:1"), "IfNotPresent")?;
    cannot_be_pulled(s, "p", "not found")?;
    s.pod("p", seconds(30), |pod| {
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        let told = waiting["message"].as_str().is_some_and(|m| m.starts_with("Back-off pulling image"));
        (waiting["reason"] == "ImagePullBackOff" && told).then_some(())
    })?;
    s.event("p", "BackOff", "Back-off pulling image \"registry.lab:5000/none:1\"")?;
    // the same pod, once the image is there
    registry(s)?.push("none", &box_image()?)?;
    s.pod("p", seconds(60), |pod| (pod["status"]["phase"] == "Running").then_some(()))
}

fn registry_is_down(s: &Space) -> Result<()> {
    pod(s, "p", "down.lab:5000/any:1", "IfNotPresent")?;
    cannot_be_pulled(s, "p", "")?;
    let text = s.event("p", "Failed", "Failed to pull image")?["message"].to_string().to_lowercase();
    ensure!(
        text.contains("refused")
            || text.contains("unavailable")
            || text.contains("resolve")
            || text.contains("lookup"),
        "{text}"
    );
    Ok(())
}

fn invalid_name(s: &Space) -> Result<()> {
    pod(s, "p", "registry.lab:5000/UPPER:1", "IfNotPresent")?;
    s.pod("p", seconds(30), |pod| {
        (pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "InvalidImageName")
            .then_some(())
    })?;
    s.event("p", "InspectFailed", "couldn't parse image name")
        .or_else(|_| s.event("p", "Failed", "InvalidImageName"))
        .map(drop)
}

fn never_pulled(s: &Space) -> Result<()> {
    pod(s, "p", &format!("{REGISTRY}/absent:1"), "Never")?;
    s.event("p", "ErrImageNeverPull", "is not present with pull policy of Never").map(drop)
}

/// Serves `bytes` where the manifest says the box's layer is.
fn push_with_layer(s: &Space, repository: &str, change: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
    let mut image = box_image()?;
    let layer = image.layer.clone();
    // a layer of its own, so that no other image's is taken for it
    let tar = [layer_of_its_own(repository)?, box_layer()?].concat();
    if repository != "same" {
        image = Image::new(repository, &tar, json!({"Env": ["PATH=/bin"]}))?;
    }
    let layer = if image.blobs.contains_key(&layer) { layer } else { image.layer.clone() };
    change(image.blobs.get_mut(&layer).context("the layer")?);
    registry(s)?.push(repository, &image)
}

/// A first entry that makes the layer differ: a tar without its end, to be followed by another.
fn layer_of_its_own(name: &str) -> Result<Vec<u8>> {
    let mut tar = layer(&[Entry::File("unique", 0o644, name.as_bytes())])?;
    tar.truncate(1024);
    Ok(tar)
}

fn wrong_digest_of_a_layer(s: &Space) -> Result<()> {
    push_with_layer(s, "wrong-layer", |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
    })?;
    pod(s, "p", &format!("{REGISTRY}/wrong-layer:1"), "IfNotPresent")?;
    cannot_be_pulled(s, "p", "")?;
    nothing_is_left(s, "wrong-layer")
}

fn wrong_digest_of_the_manifest(s: &Space) -> Result<()> {
    let mut image = box_image()?;
    let name = image.manifest.clone();
    image.blobs.get_mut(&name).context("the manifest")?.push(b' ');
    registry(s)?.push("wrong-manifest", &image)?;
    pod(s, "p", &format!("{REGISTRY}/wrong-manifest@{name}"), "IfNotPresent")?;
    cannot_be_pulled(s, "p", "digest")
}

fn truncated_layer(s: &Space) -> Result<()> {
    push_with_layer(s, "truncated", |bytes| bytes.truncate(bytes.len() / 2))?;
    pod(s, "p", &format!("{REGISTRY}/truncated:1"), "IfNotPresent")?;
    cannot_be_pulled(s, "p", "")?;
    nothing_is_left(s, "truncated")
}

fn layer_is_no_archive(s: &Space) -> Result<()> {
    let image = Image::new(
        "x",
        b"this is not a tar, but long enough to be taken for one".repeat(40).as_slice(),
        json!({}),
    )?;
    registry(s)?.push("no-archive", &image)?;
    pod(s, "p", &format!("{REGISTRY}/no-archive:1"), "IfNotPresent")?;
    cannot_be_pulled(s, "p", "")
}

fn path_traversal(s: &Space) -> Result<()> {
    let up = "../".repeat(12);
    let (out, absolute) = (format!("{up}etc/escaped"), "/etc/escaped-absolute");
    let tar = layer(&[Entry::File(&out, 0o644, b"out"), Entry::File(absolute, 0o644, b"in")])?;
    registry(s)?.push(
        "traversal",
        &Image::new("x", &[chop(tar), box_layer()?].concat(), json!({"Env": ["PATH=/bin"]}))?,
    )?;
    pod(s, "p", &format!("{REGISTRY}/traversal:1"), "IfNotPresent")?;
    // refused, or kept inside the image: never on the node
    s.pod("p", seconds(40), |pod| {
        let refused = pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"].as_str();
        (pod["status"]["phase"] == "Running" || refused.is_some_and(|r| r.contains("Pull"))).then_some(())
    })?;
    for path in ["/etc/escaped", "/etc/escaped-absolute"] {
        ensure!(s.exec("amd64", &["test", "-e", path])?.code != 0, "{path} was written on the node");
        ensure!(!std::path::Path::new(path).exists(), "{path} was written on the machine");
    }
    Ok(())
}

/// A tar without the blocks that end it.
fn chop(mut tar: Vec<u8>) -> Vec<u8> {
    tar.truncate(tar.len() - 1024);
    tar
}

fn link_out_of_the_layer(s: &Space) -> Result<()> {
    let tar = layer(&[Entry::Link("out", "/etc"), Entry::File("out/escaped-by-link", 0o644, b"out")])?;
    registry(s)?.push(
        "link",
        &Image::new("x", &[chop(tar), box_layer()?].concat(), json!({"Env": ["PATH=/bin"]}))?,
    )?;
    pod(s, "p", &format!("{REGISTRY}/link:1"), "IfNotPresent")?;
    s.pod("p", seconds(40), |pod| {
        let refused = pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"].as_str();
        (pod["status"]["phase"] == "Running" || refused.is_some_and(|r| r.contains("Pull"))).then_some(())
    })?;
    ensure!(s.exec("amd64", &["test", "-e", "/etc/escaped-by-link"])?.code != 0, "written on the node");
    ensure!(!std::path::Path::new("/etc/escaped-by-link").exists(), "written on the machine");
    Ok(())
}

fn manifest_is_nonsense(s: &Space) -> Result<()> {
    let kind = "application/vnd.oci.image.manifest.v1+json";
    for (name, body) in [("text", "nonsense"), ("empty", "{}"), ("list", "[]"), ("deep", &"[".repeat(50_000))]
    {
        registry(s)?.serve(&format!("/v2/nonsense-{name}/manifests/1"), kind, body.as_bytes());
        pod(s, name, &format!("{REGISTRY}/nonsense-{name}:1"), "IfNotPresent")?;
    }
    registry(s)?.serve("/v2/nonsense-html/manifests/1", "text/html", b"<html>log in</html>");
    pod(s, "html", &format!("{REGISTRY}/nonsense-html:1"), "IfNotPresent")?;
    for name in ["text", "empty", "list", "deep", "html"] {
        cannot_be_pulled(s, name, "").context(name)?;
    }
    Ok(())
}

fn other_architecture_only(s: &Space) -> Result<()> {
    let image = box_image()?;
    let kind = "application/vnd.oci.image.index.v1+json";
    let size = image.blobs[&image.manifest].len();
    let manifest = json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": image.manifest, "size": size,
        "platform": {"os": "linux", "architecture": "s390x"}});
    let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": [manifest]}).to_string();
    registry(s)?.push("foreign", &image)?;
    registry(s)?.serve("/v2/foreign/manifests/1", kind, index.as_bytes());
    pod(s, "p", &format!("{REGISTRY}/foreign:1"), "IfNotPresent")?;
    // refused by the scheduler, which knows the platforms, or in the end by the node: with both named
    wait_for("an event that names the platforms", seconds(30), || {
        let list = s.object("events?fieldSelector=involvedObject.name=p")?.to_string();
        Ok(if list.contains("s390x") { Ok(()) } else { Err(list) })
    })
}

fn comes_back_after_failure(s: &Space) -> Result<()> {
    push_with_layer(s, "later", |bytes| bytes.truncate(100))?;
    pod(s, "p", &format!("{REGISTRY}/later:1"), "IfNotPresent")?;
    cannot_be_pulled(s, "p", "")?;
    push_with_layer(s, "later", |_| {})?;
    s.pod("p", seconds(60), |pod| (pod["status"]["phase"] == "Running").then_some(()))
}

/// The node claims no image that did not come whole.
fn nothing_is_left(s: &Space, repository: &str) -> Result<()> {
    let node = s.get("/api/v1/nodes/amd64")?.ok()?;
    ensure!(!node["status"]["images"].to_string().contains(repository), "{}", node["status"]["images"]);
    Ok(())
}

fn no_space_left(s: &Space) -> Result<()> {
    // a small file system under the node's images; the agent must be away meanwhile
    s.lab("stop", &["amd64"])?.ok()?;
    s.exec("amd64", &["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", "/var/lib/sampan/agent"])?.ok()?;
    s.lab("start", &["amd64"])?.ok()?;
    s.wait_until_served()?;
    let zeros = vec![0_u8; 80 << 20];
    let tar = layer(&[Entry::File("zeros", 0o644, &zeros)])?;
    registry(s)?.push("large", &Image::new("x", &tar, json!({}))?)?;
    pod(s, "p", &format!("{REGISTRY}/large:1"), "IfNotPresent")?;
    cannot_be_pulled(s, "p", "no space left")?;
    // and the node goes on: what fits still runs
    registry(s)?.push("small", &box_image()?)?;
    pod(s, "small", &format!("{REGISTRY}/small:1"), "IfNotPresent")?;
    s.running("small").map(drop)
}
