//! `--on-cluster`: each platform is built on a node that runs it natively, what no node runs is built here.
//!
//! The context and the options go to the node's kubelet through the API server ([`served`](super::served)); a node answers
//! with an OCI layout. What stays true: the image is the same whoever builds it, one manifest a platform, put together
//! here. Deliberately so: nodes pull base images with their own credentials.
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::ListParams;
use sampan_build::{Built, BuiltImage, Kind, Options, Progress};
use sampan_image::archive::Archive;
use sampan_image::{Platform, platform};

use super::served::{ARCHIVE, Asked, DONE, FAILED, Line, PROGRESS};
use super::{Here, told};

/// A context is sent in one piece.
const CONTEXT_MAX_BYTES: usize = 512 << 20;
const FRAME_MAX_BYTES: usize = 1 << 20;

/// What was built, what it took here, and where the nodes' blobs lie: they go with the last.
pub type Collected = (Built, Option<Here>, Option<Scratch>);

/// Builds on the nodes that fit, the rest here (`here` is opened only for that).
pub async fn build(
    kubeconfig: &Path,
    options: Options,
    progress: Arc<dyn Progress>,
    here: impl FnOnce() -> Result<Here>,
) -> Result<Collected> {
    let text = std::fs::read_to_string(kubeconfig)
        .with_context(|| format!("reading {} (--kubeconfig names another)", kubeconfig.display()))?;
    let client = crate::node::client_of_kubeconfig(&text).await?;
    let nodes =
        Api::<Node>::all(client.clone()).list(&ListParams::default()).await.context("listing the nodes")?;
    let offered: Vec<(String, Platform)> = nodes.items.iter().filter_map(ready).collect();
    let (remote, local) = assign(&options.platforms, &offered);
    for (node, platforms) in &remote {
        progress.tell(0, Kind::Output, &format!("{} on node {node}", platform::list(platforms)));
    }
    if !local.is_empty() {
        progress.tell(
            0,
            Kind::Output,
            &format!("{} here: no node of the cluster runs it", platform::list(&local)),
        );
    }
    let folder = Scratch::new()?;
    let context = match remote.is_empty() {
        true => Vec::new(),
        false => {
            let mut sent = Bounded(Vec::new());
            sampan_build::send_context(&options.context, options.ignore.as_ref(), &mut sent)?;
            sent.0
        }
    };
    let asked = remote.iter().map(|(node, platforms)| {
        let names = platforms.iter().map(platform::format).collect();
        let question = question(&Asked::new(&options, names), &context);
        let told = Prefixed { node: node.clone(), out: progress.clone() };
        let (client, folder) = (client.clone(), folder.0.clone());
        async move {
            let image = ask(&client, node, question?, &told, &folder).await;
            image.with_context(|| format!("building on node {node}"))
        }
    });
    let answers = futures::future::join_all(asked).await;
    let mut images: Vec<BuiltImage> = Vec::new();
    for answer in answers {
        images.extend(answer?);
    }
    let mut opened = None;
    if !local.is_empty() {
        let here = here()?;
        let options = Options { platforms: local, ..options.clone() };
        images.extend(here.build(options, progress).await.map_err(told)?.images);
        opened = Some(here);
    }
    let mut ordered = Vec::new();
    for wanted in &options.platforms {
        let name = platform::format(wanted);
        let at = images.iter().position(|i| platform::format(&i.platform) == name);
        ordered.push(images.swap_remove(at.with_context(|| format!("no node gave an image for {name}"))?));
    }
    Ok((Built::new(ordered, &options.index_annotations), opened, Some(folder)))
}

/// A node that can be asked, and what it runs.
fn ready(node: &Node) -> Option<(String, Platform)> {
    let conditions = node.status.as_ref()?.conditions.as_deref().unwrap_or_default();
    conditions.iter().find(|c| c.type_ == "Ready" && c.status == "True")?;
    let labels = node.metadata.labels.clone().unwrap_or_default();
    Some((node.metadata.name.clone()?, sampan_drivers::platform::of_node(&labels)?))
}

/// Which node builds what, and what none does. Of nodes that fit equally the one with the least to do is taken.
fn assign(
    wanted: &[Platform],
    nodes: &[(String, Platform)],
) -> (Vec<(String, Vec<Platform>)>, Vec<Platform>) {
    let (mut remote, mut local): (Vec<(String, Vec<Platform>)>, Vec<Platform>) = Default::default();
    for one in wanted {
        let busy = |name: &String| remote.iter().find(|(n, _)| n == name).map_or(0, |(_, p)| p.len());
        let fitting = nodes.iter().filter_map(|(name, machine)| {
            let same = platform::normalise(machine).architecture == platform::normalise(one).architecture;
            same.then(|| platform::rank(machine, one)).flatten().map(|rank| (rank, busy(name), name))
        });
        match fitting.min() {
            None => local.push(one.clone()),
            Some((_, _, name)) => match remote.iter_mut().find(|(n, _)| n == name) {
                Some((_, platforms)) => platforms.push(one.clone()),
                None => remote.push((name.clone(), vec![one.clone()])),
            },
        }
    }
    (remote, local)
}

fn question(asked: &Asked, context: &[u8]) -> Result<Vec<u8>> {
    let asked = serde_json::to_vec(asked)?;
    let mut question = Vec::with_capacity(8 + asked.len() + context.len());
    question.extend((asked.len() as u64).to_be_bytes());
    question.extend(asked);
    question.extend(context);
    Ok(question)
}

/// Has a node build, and takes its images.
async fn ask(
    client: &kube::Client,
    node: &str,
    question: Vec<u8>,
    progress: &dyn Progress,
    folder: &Path,
) -> Result<Vec<BuiltImage>> {
    let request = http::Request::post(format!("/api/v1/nodes/{node}/proxy{}", sampan_kubelet::api::BUILD))
        .header(http::header::CONTENT_TYPE, "application/octet-stream")
        .body(kube::client::Body::from(question))?;
    let response = client.send(request).await.context("asking the API server")?;
    let status = response.status();
    let mut body = response.into_body();
    if !status.is_success() {
        let text = body.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        bail!("{status}: {}; is the node of this version?", String::from_utf8_lossy(&text));
    }
    let path = folder.join(format!("{node}.tar"));
    let mut archive = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
    let (mut pending, mut done) = (Vec::new(), false);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.context("the node's answer")?.into_data() else { continue };
        pending.extend_from_slice(&data);
        while let Some((kind, content)) = take(&mut pending)? {
            match kind {
                PROGRESS => {
                    let line: Line = serde_json::from_slice(&content).context("a line of progress")?;
                    progress.tell(line.number, line.kind, &line.text);
                }
                ARCHIVE => archive.write_all(&content).context("keeping the node's image")?,
                FAILED => bail!("{}", String::from_utf8_lossy(&content)),
                DONE => done = true,
                _ => {}
            }
        }
    }
    if !done {
        bail!("the node's answer broke off");
    }
    drop(archive);
    images(&path, folder)
}

/// A frame, once it is whole.
fn take(pending: &mut Vec<u8>) -> Result<Option<(u8, Vec<u8>)>> {
    let Some((kind, length)) =
        pending.split_first().and_then(|(k, rest)| Some((*k, *rest.first_chunk::<4>()?)))
    else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(length) as usize;
    if length > FRAME_MAX_BYTES {
        bail!("a frame of {length} bytes");
    }
    if pending.len() < 5 + length {
        return Ok(None);
    }
    let content = pending[5..5 + length].to_vec();
    pending.drain(..5 + length);
    Ok(Some((kind, content)))
}

/// What the archive holds, its blobs in files of their own.
fn images(path: &Path, folder: &Path) -> Result<Vec<BuiltImage>> {
    let mut archive = Archive::open(path)?;
    let mut found = Vec::new();
    for manifest in archive.images()?.into_iter().flat_map(|i| i.manifests) {
        let mut blobs = HashMap::new();
        for layer in &manifest.manifest.layers {
            let to = folder.join(layer.digest.replace(':', "-"));
            let mut file = std::fs::File::create(&to).with_context(|| to.display().to_string())?;
            std::io::copy(&mut archive.blob(&layer.digest)?, &mut file).context("keeping a layer")?;
            blobs.insert(layer.digest.clone(), to);
        }
        found.push(BuiltImage {
            platform: manifest.platform.clone(),
            layers: Vec::new(),
            config: archive.read(&manifest.manifest.config.digest)?.into(),
            manifest: manifest.bytes.into(),
            blobs,
        });
    }
    Ok(found)
}

/// Says which node a line is from; its steps are numbered by itself.
struct Prefixed {
    node: String,
    out: Arc<dyn Progress>,
}

impl Progress for Prefixed {
    fn tell(&self, number: usize, kind: Kind, text: &str) {
        self.out.tell(number, kind, &format!("{}: {text}", self.node));
    }
}

struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > CONTEXT_MAX_BYTES {
            let text = format!(
                "the build context is larger than {CONTEXT_MAX_BYTES} bytes; leave more out in .dockerignore"
            );
            return Err(std::io::Error::other(text));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A folder for what nodes send.
pub struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch> {
        let path = std::env::temp_dir().join(format!("sampan-build-{}", sampan_world::random::suffix(8)));
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&path).with_context(|| path.display().to_string())?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_go_where_they_are_native() {
        let parse = |n: &str| platform::parse(n).unwrap();
        let nodes: Vec<(String, Platform)> =
            [("a", "amd64"), ("b", "arm64"), ("c", "arm64"), ("d", "arm/v7")]
                .map(|(n, p)| (n.to_string(), parse(p)))
                .into();
        let wanted: Vec<Platform> =
            ["linux/arm64", "linux/amd64", "linux/arm/v7", "linux/arm/v6", "linux/s390x"].map(parse).into();
        let (remote, local) = assign(&wanted, &nodes);
        let shown: Vec<String> = remote.iter().map(|(n, p)| format!("{n}={}", platform::list(p))).collect();
        assert_eq!(shown, ["b=linux/arm64", "a=linux/amd64", "d=linux/arm/v6, linux/arm/v7"]);
        assert_eq!(local, [parse("linux/s390x")]);
    }

    #[test]
    fn frames_come_in_pieces() {
        let mut pending = vec![b'p', 0, 0, 0, 2, b'h'];
        assert!(take(&mut pending).unwrap().is_none());
        pending.extend([b'i', b'd', 0, 0, 0, 0]);
        assert_eq!(take(&mut pending).unwrap(), Some((b'p', b"hi".to_vec())));
        assert_eq!(take(&mut pending).unwrap(), Some((b'd', vec![])));
        assert!(pending.is_empty());
        assert!(take(&mut vec![b't', 255, 0, 0, 0]).is_err());
    }
}
