//! The node's side of `sampan image`: HTTP over a socket in its data folder that only root may open.
//!
//! Upstream counterpart: containerd's socket. It listens and costs nothing else until somebody asks. What comes in as an
//! archive goes to a file first, since an import reads it more than once; what is left of one is removed at the start.
use std::convert::Infallible;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use sampan_drivers::Runtime;
use sampan_drivers::runtime::Auth;
use sampan_image::layout::LayoutWriter;
use sampan_image::repack::Repacked;
use sampan_image::{Reference, copy, manifest};
use sampan_runtime::{ImageRecord, Node};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

pub const SOCKET: &str = "images.sock";
const INCOMING: &str = "incoming-";
const REQUESTS_MAX: usize = 8;
const BODY_MAX_BYTES: usize = 1 << 20;
const PIECE_BYTES: usize = 64 * 1024;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A question about images by name.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Question {
    pub image: String,
    /// Of `tag`.
    pub name: String,
    /// Of `pull`: user, password, identity token, registry token.
    pub auth: Option<[String; 4]>,
    /// Of `rm`.
    pub force: bool,
    /// Of `prune`.
    pub all: bool,
}

/// An image with its configuration.
#[derive(Serialize, Deserialize)]
pub struct Details {
    pub record: ImageRecord,
    pub config: serde_json::Value,
    pub manifest: serde_json::Value,
    pub users: Vec<String>,
}

/// Serves the node's images until the process ends. A node that can't is a node all the same.
pub fn start(node: Node, folder: &Path) {
    if let Err(error) = listen(node, folder) {
        tracing::warn!("`sampan image` will not reach this node: {error:#}");
    }
}

fn listen(node: Node, folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(INCOMING) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    let path = folder.join(SOCKET);
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&path, mode).with_context(|| path.display().to_string())?;
    let service = Arc::new(Service { node, folder: folder.to_path_buf() });
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(REQUESTS_MAX));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accepting on the socket for images");
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                    continue;
                }
            };
            let service = service.clone();
            tokio::spawn(async move {
                service.serve(stream).await;
                drop(place);
            });
        }
    });
    Ok(())
}

struct Service {
    node: Node,
    folder: PathBuf,
}

impl Service {
    async fn serve(self: Arc<Self>, stream: UnixStream) {
        let answer = service_fn(move |request: Request<Incoming>| {
            let this = self.clone();
            async move {
                let answer = this.answer(request).await.unwrap_or_else(|error| {
                    let text = Full::new(Bytes::from(format!("{error:#}")));
                    let mut failed = Response::new(text.map_err(|never| match never {}).boxed_unsync());
                    *failed.status_mut() = StatusCode::UNPROCESSABLE_ENTITY;
                    failed
                });
                Ok::<_, Infallible>(answer)
            }
        });
        let served =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
        if let Err(error) = served.await {
            tracing::debug!(%error, "a question about images broke off");
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>> {
        let path = request.uri().path().to_string();
        match (request.method(), path.as_str()) {
            (&Method::GET, "/images") => json(&self.node.image_records()),
            (&Method::POST, "/import") => json(&self.import(request.into_body()).await?),
            (&Method::POST, _) => {
                let body = Limited::new(request.into_body(), BODY_MAX_BYTES).collect().await;
                let body = body.map_err(|e| anyhow::anyhow!("the question: {e}"))?.to_bytes();
                self.ask(&path, serde_json::from_slice(&body).context("the question")?).await
            }
            _ => bail!("{path}: this node knows no such question; is it of the same version?"),
        }
    }

    async fn ask(&self, path: &str, question: Question) -> Result<Response<Body>> {
        match path {
            "/pull" => {
                let auth: Vec<Auth> = question.auth.into_iter().map(auth).collect();
                self.node.pull_image(&question.image, &auth).await?;
                json(&self.record(&question.image)?)
            }
            "/inspect" => json(&self.details(&question.image)?),
            "/tag" => {
                self.node.tag_image(&question.image, &question.name).await?;
                json(&())
            }
            "/remove" => {
                let record = self.record(&question.image)?;
                let users = self.node.image_users(&record.id);
                let last = record.tags.len() <= 1 || record.id.ends_with(&question.image);
                if let (false, true, Some(user)) = (question.force, last, users.first()) {
                    bail!("{}: container {user} is made from it; -f removes it anyway", question.image);
                }
                self.node.remove_image(&question.image).await?;
                json(&record)
            }
            "/prune" => json(&self.node.prune_images(question.all).await?),
            "/export" => self.export(question.image).await,
            _ => bail!("{path}: this node knows no such question; is it of the same version?"),
        }
    }

    fn record(&self, image: &str) -> Result<ImageRecord> {
        self.node.find_image(image).with_context(|| format!("{image} is not on this node"))
    }

    fn details(&self, image: &str) -> Result<Details> {
        let record = self.record(image)?;
        let files = self.node.image_files(image).with_context(|| format!("{image}: its files are gone"))?;
        let users = self.node.image_users(&record.id);
        let config = serde_json::from_slice(&files.config)?;
        Ok(Details { record, config, manifest: serde_json::from_slice(&files.manifest)?, users })
    }

    /// What was imported, and the images that had nothing for this node.
    async fn import(&self, mut body: Incoming) -> Result<Vec<ImageRecord>> {
        let name = format!("{INCOMING}{}.tar", sampan_world::random::suffix(8));
        let path = Doomed(self.folder.join(name));
        let mut file = tokio::fs::File::create(&path.0).await.context("keeping the archive")?;
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            file.write_all(&data).await.context("keeping the archive")?;
        }
        file.flush().await.context("keeping the archive")?;
        drop(file);
        let ids = self.node.import(&path.0).await?;
        Ok(ids.iter().filter_map(|id| self.node.find_image(id)).collect())
    }

    /// An OCI layout as it is made: one image, this node's platform.
    async fn export(&self, image: String) -> Result<Response<Body>> {
        let record = self.record(&image)?;
        let files = self.node.image_files(&image).with_context(|| format!("{image}: its files are gone"))?;
        let scratch = self.folder.clone();
        let repacked = tokio::task::spawn_blocking(move || {
            Repacked::new(&files.config, &files.layers, &scratch).map(|r| (r, files.names))
        });
        let (repacked, names) = repacked.await?.context("packing the image's layers")?;
        let plan = copy::plan(&repacked, manifest::OCI_MANIFEST, &repacked.manifest, &[]).await?;
        let names: Vec<Reference> = names.iter().filter_map(|n| Reference::parse(n).ok()).collect();
        let (near, far) = std::os::unix::net::UnixStream::pair()?;
        near.set_nonblocking(true)?;
        let runtime = tokio::runtime::Handle::current();
        std::thread::spawn(move || {
            let written = runtime.block_on(async {
                let mut layout = LayoutWriter::new(std::io::BufWriter::new(far), record.platform)?;
                layout.add(&repacked, &plan, &names, &copy::Quiet).await?;
                layout.finish()?.flush()?;
                Ok::<(), sampan_image::client::FetchError>(())
            });
            if let Err(error) = written {
                tracing::debug!(%error, "an export broke off");
            }
        });
        let near = UnixStream::from_std(near)?;
        let pieces = futures::stream::unfold(near, |mut near| async move {
            let mut piece = vec![0; PIECE_BYTES];
            match near.read(&mut piece).await {
                Ok(0) => None,
                Ok(n) => {
                    piece.truncate(n);
                    Some((Ok(Frame::data(Bytes::from(piece))), near))
                }
                Err(e) => Some((Err(e), near)),
            }
        });
        Ok(Response::new(StreamBody::new(pieces.boxed()).boxed_unsync()))
    }
}

fn auth([username, password, identity_token, registry_token]: [String; 4]) -> Auth {
    Auth { username, password, identity_token, registry_token }
}

fn json<T: Serialize>(value: &T) -> Result<Response<Body>> {
    let bytes = Bytes::from(serde_json::to_vec(value)?);
    Ok(Response::new(Full::new(bytes).map_err(|never| match never {}).boxed_unsync()))
}

/// A file that goes with this value.
struct Doomed(PathBuf);

impl Drop for Doomed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
