//! Images between registries and archives: `copy`, `export`, `push`, and `inspect --remote`.
//!
//! Upstream counterparts: skopeo copy, docker save. An archive is written beside its place and moved there when it is
//! whole; images in it are exact copies, with all platforms unless some are asked for.
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use http_body_util::BodyExt;
use sampan_image::archive::{Archive, ArchiveImage};
use sampan_image::copy::{self, Plan};
use sampan_image::layout::LayoutWriter;
use sampan_image::manifest::{Document, ImageConfig};
use sampan_image::source::{Repository, Source};
use sampan_image::{Client, Platform, Reference, platform};
use serde_json::json;

use super::Node;
use super::progress::{Bars, bytes as count};
use super::registry::{Access, advice, platforms};

#[derive(Args)]
pub struct Copy {
    #[command(flatten)]
    access: Access,
    /// Only these platforms, OS/ARCH[/VARIANT] (default: all)
    #[arg(long, value_delimiter = ',')]
    platform: Vec<String>,
    /// Image of a registry, or oci-archive:FILE[@IMAGE], docker-archive:FILE[@IMAGE], oci:FOLDER[@IMAGE]
    #[arg(value_name = "SOURCE")]
    source: String,
    /// What it is called in the registry it goes to
    #[arg(value_name = "TARGET")]
    target: String,
}

#[derive(Args)]
pub struct Push {
    #[command(flatten)]
    node: Node,
    #[command(flatten)]
    access: Access,
    /// Push what this archive holds: the images named, or all of them
    #[arg(long, value_name = "ARCHIVE")]
    from: Option<PathBuf>,
    /// Push into another registry, keeping repositories and tags
    #[arg(long, value_name = "HOST[:PORT]", requires = "from")]
    to_registry: Option<String>,
    #[arg(value_name = "IMAGE", required_unless_present = "from")]
    images: Vec<String>,
}

#[derive(Args)]
pub struct Export {
    #[command(flatten)]
    node: Node,
    #[command(flatten)]
    access: Access,
    /// Where to write the archive; - is standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Only these platforms, OS/ARCH[/VARIANT] (default: all)
    #[arg(long, value_delimiter = ',', conflicts_with = "from_node")]
    platform: Vec<String>,
    /// Take the image as this node has it, without asking its registry (layers are packed anew: the digest differs)
    #[arg(long)]
    from_node: bool,
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
}

/// Where `copy` takes an image from.
enum Place {
    Registry(Reference),
    Archive(Archive, Box<ArchiveImage>),
}

pub async fn copy(args: Copy) -> Result<()> {
    let target = Reference::parse(&args.target)?;
    let (client, wanted) = (args.access.client()?, platforms(&args.platform)?);
    let digest = match place(&args.source)? {
        Place::Registry(source) => {
            let repository = Repository { client: &client, reference: &source, auth: &[] };
            let plan = remote(&client, &source, &wanted).await?;
            send(&client, &repository, &plan, &target).await?
        }
        Place::Archive(archive, image) => {
            let plan = archived(&archive, &image, &wanted).await?;
            send(&client, &archive, &plan, &target).await?
        }
    };
    println!("{target}: {digest}");
    Ok(())
}

fn place(text: &str) -> Result<Place> {
    let prefixes = ["oci-archive:", "docker-archive:", "oci:"];
    let Some(rest) = prefixes.iter().find_map(|p| text.strip_prefix(p)) else {
        return Ok(Place::Registry(Reference::parse(text)?));
    };
    let (path, wanted) = match rest.split_once('@') {
        Some((path, name)) => (path, Some(Reference::parse(name)?)),
        None => (rest, None),
    };
    let mut archive = Archive::open(Path::new(path))?;
    let mut images = archive.images().with_context(|| path.to_string())?;
    let at = match &wanted {
        Some(name) => images.iter().position(|i| i.names.contains(name)),
        None if images.len() == 1 => Some(0),
        None => None,
    };
    let Some(at) = at else {
        let names: Vec<String> =
            images.iter().flat_map(|i| i.names.iter().map(ToString::to_string)).collect();
        bail!("{path} holds {}; say which with {text}@IMAGE", names.join(", "));
    };
    Ok(Place::Archive(archive, Box::new(images.swap_remove(at))))
}

async fn remote(client: &Client, name: &Reference, wanted: &[Platform]) -> Result<Plan> {
    let found = client.resolve(name, &[]).await.map_err(advice).with_context(|| name.to_string())?;
    let pinned = Reference { digest: Some(found.digest), ..name.clone() };
    let source = Repository { client, reference: &pinned, auth: &[] };
    let plan = copy::plan(&source, &found.media_type, &found.bytes, wanted).await;
    plan.map_err(advice).with_context(|| name.to_string())
}

async fn archived(archive: &Archive, image: &ArchiveImage, wanted: &[Platform]) -> Result<Plan> {
    // What an old docker archive holds has a manifest only since it was read.
    let bytes = match image.manifests.iter().find(|m| m.digest == image.digest) {
        Some(m) => m.bytes.clone(),
        None => archive.read(&image.digest)?,
    };
    let plan = copy::plan(archive, "", &bytes.into(), wanted).await.map_err(advice)?;
    if plan.platforms().is_empty() {
        bail!("nothing of {} is in the archive", image.digest);
    }
    Ok(plan)
}

async fn send(client: &Client, source: &dyn Source, plan: &Plan, target: &Reference) -> Result<String> {
    if !plan.left_out.is_empty() {
        eprintln!("{target}: without {}", plan.left_out.join(", "));
    }
    let bars = Bars::new();
    let digest = copy::push(client, source, plan, target, &[], &bars).await;
    bars.end();
    digest.map_err(advice).with_context(|| target.to_string())
}

pub async fn push(args: Push) -> Result<()> {
    let client = args.access.client()?;
    let Some(path) = &args.from else {
        for image in &args.images {
            let target = Reference::parse(image)?;
            let packed = received(args.node.export(image).await?).await?;
            let mut archive = Archive::open(&packed.0)?;
            let Some(found) = archive.images()?.into_iter().next() else { bail!("{image}: nothing to push") };
            let plan = archived(&archive, &found, &[]).await?;
            println!("{target}: {}", send(&client, &archive, &plan, &target).await?);
        }
        return Ok(());
    };
    let mut archive = Archive::open(path)?;
    let images = archive.images().with_context(|| path.display().to_string())?;
    let mut wanted: Vec<Reference> =
        args.images.iter().map(|n| Reference::parse(n)).collect::<Result<_, _>>()?;
    for image in &images {
        for name in &image.names {
            if !args.images.is_empty() && !wanted.contains(name) {
                continue;
            }
            wanted.retain(|w| w != name);
            let mut target = Reference { digest: None, ..name.clone() };
            if let Some(host) = &args.to_registry {
                target = Reference::parse(&format!("{host}/{}", without_registry(&target)))?;
            }
            let plan = archived(&archive, image, &[]).await?;
            println!("{target}: {}", send(&client, &archive, &plan, &target).await?);
        }
    }
    if let Some(missing) = wanted.first() {
        bail!("{missing} is not in {}", path.display());
    }
    if images.iter().all(|i| i.names.is_empty()) {
        bail!(
            "the images in {} have no names; `sampan image copy oci-archive:FILE TARGET` gives one",
            path.display()
        );
    }
    Ok(())
}

fn without_registry(name: &Reference) -> String {
    let tag = name.tag.as_ref().map(|t| format!(":{t}")).unwrap_or_default();
    format!("{}{tag}", name.repository)
}

pub async fn export(args: Export) -> Result<()> {
    let wanted = platforms(&args.platform)?;
    let output = Output::create(&args.output)?;
    let machine = platform::normalise(&Platform {
        os: "linux".into(),
        architecture: std::env::consts::ARCH.into(),
        variant: None,
    });
    let client = args.access.client()?;
    let mut layout = LayoutWriter::new(output, machine)?;
    let bars = Bars::new();
    for image in &args.images {
        let name = Reference::parse(image)?;
        if args.from_node {
            let packed = received(args.node.export(image).await?).await?;
            let mut archive = Archive::open(&packed.0)?;
            for found in archive.images()? {
                let plan = archived(&archive, &found, &[]).await?;
                layout.add(&archive, &plan, std::slice::from_ref(&name), &bars).await.map_err(fetch)?;
            }
            continue;
        }
        let plan = remote(&client, &name, &wanted).await?;
        let source = Repository { client: &client, reference: &name, auth: &[] };
        let added = layout.add(&source, &plan, std::slice::from_ref(&name), &bars).await;
        added.map_err(fetch).with_context(|| name.to_string())?;
        if args.output.as_os_str() != "-" {
            let size = count(plan.size_bytes());
            bars.print(&format!("{name}: {} ({size})", platform::list(&plan.platforms())));
        }
    }
    bars.end();
    layout.finish().map_err(fetch)?.commit()
}

pub(super) fn fetch(error: sampan_image::client::FetchError) -> anyhow::Error {
    use sampan_image::client::FetchError;
    match error {
        FetchError::Image(e) => advice(e),
        FetchError::Sink(e) => anyhow::Error::from(e).context("writing the archive"),
    }
}

/// An archive that is in its place only when it is whole.
pub(super) enum Output {
    Stdout(std::io::Stdout),
    File { file: std::io::BufWriter<std::fs::File>, temporary: Scratch, path: PathBuf },
}

impl Output {
    pub(super) fn create(path: &Path) -> Result<Output> {
        if path.as_os_str() == "-" {
            if std::io::IsTerminal::is_terminal(&std::io::stdout()) {
                bail!("an archive is nothing for a terminal; name a file with -o, or pipe it");
            }
            return Ok(Output::Stdout(std::io::stdout()));
        }
        let temporary = Scratch(path.with_extension(format!("{}.part", sampan_world::random::suffix(6))));
        let file = std::fs::File::create(&temporary.0)
            .with_context(|| format!("writing {}", temporary.0.display()))?;
        Ok(Output::File { file: std::io::BufWriter::new(file), temporary, path: path.to_path_buf() })
    }

    pub(super) fn commit(self) -> Result<()> {
        match self {
            Output::Stdout(mut out) => out.flush()?,
            Output::File { file, temporary, path } => {
                let file = file.into_inner().context("writing the archive")?;
                file.sync_all().context("writing the archive")?;
                std::fs::rename(&temporary.0, &path).with_context(|| path.display().to_string())?;
            }
        }
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Output::Stdout(out) => out.write(bytes),
            Output::File { file, .. } => file.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Output::Stdout(out) => out.flush(),
            Output::File { file, .. } => file.flush(),
        }
    }
}

/// A file that goes with this value, unless it was renamed.
pub(super) struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A node's answer in a file: archives are read from any place.
async fn received(mut body: hyper::body::Incoming) -> Result<Scratch> {
    let name = format!("sampan-{}.tar", sampan_world::random::suffix(8));
    let path = Scratch(std::env::temp_dir().join(name));
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&path.0);
    let mut file = file.with_context(|| path.0.display().to_string())?;
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.context("what the node sent")?.into_data() {
            file.write_all(&data).with_context(|| path.0.display().to_string())?;
        }
    }
    Ok(path)
}

/// An OCI layout's folder as the tar that a node takes.
pub fn folder_as_tar(folder: &Path) -> Result<impl Read + Send + Unpin + use<>> {
    let (near, far) = std::os::unix::net::UnixStream::pair()?;
    if !folder.join("index.json").is_file() {
        bail!("{} is no OCI layout: it has no index.json", folder.display());
    }
    let folder = folder.to_path_buf();
    std::thread::spawn(move || {
        let mut tar = tar::Builder::new(std::io::BufWriter::new(far));
        // What breaks off here is an archive without its end, which the node refuses.
        let _ = tar.append_dir_all("", &folder).and_then(|()| tar.finish());
    });
    Ok(near)
}

/// What a registry has under a name.
pub async fn inspect(access: &Access, images: &[String]) -> Result<()> {
    let client = access.client()?;
    let mut shown = Vec::new();
    for image in images {
        let name = Reference::parse(image)?;
        let plan = remote(&client, &name, &[]).await?;
        let Some(top) = plan.top() else { continue };
        let mut builds = Vec::new();
        for (document, m) in plan.documents.iter().filter_map(|d| Some((d, d.manifest.as_ref()?))) {
            let platform = document.platform.as_ref().map(platform::format);
            let config = client.small_blob(&name, &m.config, &[]).await.map_err(advice)?;
            let run = ImageConfig::parse(&config).ok().and_then(|c| c.config);
            builds.push(json!({
                "Platform": platform,
                "Digest": document.digest,
                "MediaType": document.media_type,
                "Id": m.config.digest,
                "Size": m.layers.iter().map(|l| l.size).sum::<u64>() + m.config.size,
                "Config": run,
                "Layers": m.layers,
            }));
        }
        let kind = match sampan_image::manifest::parse(&top.media_type, &top.bytes)? {
            Document::Index(_) => "index",
            Document::Manifest(_) => "manifest",
        };
        shown.push(json!({"Name": name.to_string(), "Digest": top.digest, "MediaType": top.media_type,
            "Kind": kind, "Images": builds}));
    }
    println!("{}", serde_json::to_string_pretty(&shown)?);
    Ok(())
}
