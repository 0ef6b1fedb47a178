//! Builds for others: what a node does when somebody's `sampan image build --on-cluster` asks for its platform.
//!
//! The request comes through the API server to the kubelet's API, which hands it to [`on_node`]; who may ask is decided by
//! RBAC on `nodes/proxy`. The build is a process of its own (`sampan image build-served`), so nothing of it stays in the
//! node, and when the asker goes away it is killed with its steps. Request: the length of [`Asked`] (8 bytes, big-endian),
//! that as JSON, the context as a tar. Answer: frames of a letter, a length (4 bytes, big-endian) and content.
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::StreamExt;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use sampan_build::dockerfile::Network;
use sampan_build::store::CGROUP_ROOT;
use sampan_build::{BuildError, Kind, Options, Progress};
use sampan_image::layout::LayoutWriter;
use sampan_image::{copy, platform};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use super::{Access, Here, Node};

const ASKED_MAX_BYTES: u64 = 16 << 20;
const PIECE_BYTES: usize = 64 * 1024;
/// Builds of one node at a time.
const AT_ONCE: usize = 2;

pub const PROGRESS: u8 = b'p';
pub const FAILED: u8 = b'e';
pub const ARCHIVE: u8 = b't';
pub const DONE: u8 = b'd';

type Body = UnsyncBoxBody<Bytes, std::io::Error>;
type Answer = std::pin::Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// The options that go with a context.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Asked {
    pub dockerfile_name: String,
    pub dockerfile: Vec<u8>,
    pub platforms: Vec<String>,
    pub build_args: BTreeMap<String, String>,
    pub target: Option<String>,
    pub no_cache: bool,
    pub pull: bool,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub secrets: BTreeMap<String, Vec<u8>>,
    pub without_network: bool,
    pub add_hosts: Vec<(String, IpAddr)>,
}

/// A line of progress.
#[derive(Serialize, Deserialize)]
pub struct Line {
    pub number: usize,
    pub kind: Kind,
    pub text: String,
}

impl Asked {
    pub fn new(options: &Options, platforms: Vec<String>) -> Asked {
        let o = options.clone();
        Asked {
            dockerfile_name: o.dockerfile_name,
            dockerfile: o.dockerfile,
            platforms,
            build_args: o.build_args,
            target: o.target,
            no_cache: o.no_cache,
            pull: o.pull,
            labels: o.labels,
            annotations: o.annotations,
            secrets: o.secrets,
            without_network: o.network == Network::None,
            add_hosts: o.add_hosts,
        }
    }

    fn options(self, context: PathBuf) -> Result<Options> {
        let parse = |name: &String| platform::parse(name).with_context(|| format!("platform {name}"));
        Ok(Options {
            context,
            dockerfile_name: self.dockerfile_name,
            dockerfile: self.dockerfile,
            // what is left out was not sent
            ignore: None,
            platforms: self.platforms.iter().map(parse).collect::<Result<_>>()?,
            build_args: self.build_args,
            target: self.target,
            no_cache: self.no_cache,
            pull: self.pull,
            labels: self.labels,
            annotations: self.annotations,
            index_annotations: BTreeMap::new(),
            secrets: self.secrets,
            network: if self.without_network { Network::None } else { Network::Default },
            add_hosts: self.add_hosts,
            exe: std::env::current_exe().context("finding this program")?,
            cgroup_root: CGROUP_ROOT.into(),
        })
    }
}

/// `sampan image build-served`
#[derive(clap::Args)]
pub struct Served {
    #[command(flatten)]
    node: Node,
    #[command(flatten)]
    access: Access,
}

/// Frames on standard output, from the build's thread and from this one.
#[derive(Clone)]
struct Frames(Arc<Mutex<std::io::Stdout>>);

impl Frames {
    fn send(&self, kind: u8, content: &[u8]) -> std::io::Result<()> {
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let length = u32::try_from(content.len()).map_err(std::io::Error::other)?;
        out.write_all(&[kind])?;
        out.write_all(&length.to_be_bytes())?;
        out.write_all(content)?;
        out.flush()
    }
}

impl Progress for Frames {
    fn tell(&self, number: usize, kind: Kind, text: &str) {
        let line = Line { number, kind, text: text.to_string() };
        if let Ok(bytes) = serde_json::to_vec(&line) {
            let _ = self.send(PROGRESS, &bytes);
        }
    }
}

/// An archive in frames.
struct Archive(Frames);

impl Write for Archive {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = bytes.len().min(PIECE_BYTES);
        self.0.send(ARCHIVE, &bytes[..n])?;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The process that builds: all that goes wrong is told in a frame.
pub async fn run(args: Served) -> Result<()> {
    let frames = Frames(Arc::new(Mutex::new(std::io::stdout())));
    match serve(&args, &frames).await {
        Ok(()) => frames.send(DONE, &[]).context("answering"),
        Err(error) => frames.send(FAILED, format!("{error:#}").as_bytes()).context("answering"),
    }
}

async fn serve(args: &Served, frames: &Frames) -> Result<()> {
    let here = Here::open(&args.node, &args.access)?;
    let mut stdin = std::io::stdin().lock();
    let mut length = [0; 8];
    stdin.read_exact(&mut length).context("the question")?;
    let length = u64::from_be_bytes(length);
    if length > ASKED_MAX_BYTES {
        bail!("a question of {length} bytes");
    }
    let mut asked = vec![0; usize::try_from(length)?];
    stdin.read_exact(&mut asked).context("the question")?;
    let asked: Asked = serde_json::from_slice(&asked).context("the question")?;
    let context = here.scratch.place("context");
    std::fs::create_dir(&context).context("keeping the context")?;
    sampan_build::receive_context(&mut stdin, &context)?;
    drop(stdin);
    let options = asked.options(context)?;
    let built = here.build(options, Arc::new(frames.clone())).await.map_err(|error| match error {
        BuildError::Step { error, output } if !output.is_empty() => {
            anyhow::anyhow!("{error}\n------\n{}\n------", output.join("\n"))
        }
        other => other.into(),
    })?;
    let plan = copy::plan(&built, built.media_type, &built.top, &[]).await?;
    let out = std::io::BufWriter::with_capacity(PIECE_BYTES, Archive(frames.clone()));
    let mut layout = LayoutWriter::new(out, sampan_build::machine_platform())?;
    layout.add(&built, &plan, &[], &copy::Quiet).await?;
    layout.finish()?;
    here.close()
}

/// What the kubelet's API does with such a request.
pub fn on_node(data_dir: PathBuf, registries: PathBuf) -> impl Fn(Request<Incoming>) -> Answer + Send + Sync {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    move |request| {
        let (places, data_dir, registries) = (places.clone(), data_dir.clone(), registries.clone());
        Box::pin(async move {
            let Ok(place) = places.try_acquire_owned() else {
                let text = format!("this node does {AT_ONCE} builds already");
                return said(StatusCode::TOO_MANY_REQUESTS, text);
            };
            let mut command = match crate::node_upgrade::program() {
                Ok(program) => tokio::process::Command::new(program),
                Err(error) => return said(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")),
            };
            command.args(["image", "build-served", "--data-dir"]).arg(data_dir);
            command.arg("--private-registry").arg(registries);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    return said(StatusCode::INTERNAL_SERVER_ERROR, format!("starting the build: {error}"));
                }
            };
            let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
            let (Some(mut stdin), Some(stdout)) = (stdin, stdout) else {
                return said(StatusCode::INTERNAL_SERVER_ERROR, "the build has no streams".into());
            };
            let mut body = request.into_body();
            tokio::spawn(async move {
                while let Some(Ok(frame)) = body.frame().await {
                    let Ok(data) = frame.into_data() else { continue };
                    if stdin.write_all(&data).await.is_err() {
                        return;
                    }
                }
            });
            let pieces =
                futures::stream::unfold((stdout, child, place), |(mut stdout, child, place)| async move {
                    let mut piece = vec![0; PIECE_BYTES];
                    match stdout.read(&mut piece).await {
                        Ok(0) => None,
                        Ok(n) => {
                            piece.truncate(n);
                            Some((Ok(Frame::data(Bytes::from(piece))), (stdout, child, place)))
                        }
                        Err(e) => Some((Err(e), (stdout, child, place))),
                    }
                });
            Response::new(StreamBody::new(pieces.boxed()).boxed_unsync())
        })
    }
}

fn said(code: StatusCode, text: String) -> Response<Body> {
    let mut response =
        Response::new(Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = code;
    response
}
