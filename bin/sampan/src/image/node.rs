//! Asking the node that runs here about its images.
use std::io::IsTerminal;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use sampan_image::source::FileBody;
use sampan_image::{Body, Reference, platform};
use sampan_runtime::ImageRecord;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::progress::{bytes as count, short};
use super::service::{Details, Question, SOCKET};
use super::{Node, registry, table};

impl Node {
    /// Sends a request; an answer that is an error becomes one.
    async fn send(&self, path: &str, body: Body, method: http::Method) -> Result<Incoming> {
        let socket = self.data_dir.join("agent").join(SOCKET);
        let stream = UnixStream::connect(&socket).await.map_err(|e| self.absent(&socket, &e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "node").body(body)?;
        let response = sender.send_request(request).await.context("asking the node")?;
        drop(sender);
        let status = response.status();
        let body = response.into_body();
        if !status.is_success() {
            let text = body.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
            connection.abort();
            bail!("{}", String::from_utf8_lossy(&text));
        }
        Ok(body)
    }

    fn absent(&self, socket: &Path, error: &std::io::Error) -> anyhow::Error {
        let socket = socket.display();
        if error.kind() == std::io::ErrorKind::PermissionDenied {
            return anyhow!("{socket}: {error}; images of the node are root's, try sudo");
        }
        let images = self.data_dir.join("agent/images");
        anyhow!(
            "no node runs here ({socket}: {error}); start `sampan server` or `sampan agent`, or name its --data-dir. \
             Archives in {} are imported when it starts",
            images.display()
        )
    }

    async fn ask<T: DeserializeOwned>(&self, path: &str, question: &Question) -> Result<T> {
        let body = self.send(path, full(serde_json::to_vec(question)?), http::Method::POST).await?;
        Ok(serde_json::from_slice(&body.collect().await?.to_bytes())?)
    }

    async fn records(&self) -> Result<Vec<ImageRecord>> {
        let body = self.send("/images", full(Vec::new()), http::Method::GET).await?;
        Ok(serde_json::from_slice(&body.collect().await?.to_bytes())?)
    }

    /// Whether there is a node to ask.
    pub async fn check(&self) -> Result<()> {
        self.records().await.map(drop)
    }

    /// Has the node take an archive as it is read.
    pub async fn import_from(
        &self,
        reader: impl std::io::Read + Send + Unpin + 'static,
    ) -> Result<Vec<ImageRecord>> {
        let body = self.send("/import", FileBody { reader }.boxed_unsync(), http::Method::POST).await?;
        Ok(serde_json::from_slice(&body.collect().await?.to_bytes())?)
    }

    /// An archive of one image of the node.
    pub async fn export(&self, image: &str) -> Result<Incoming> {
        let question = Question { image: image.to_string(), ..Question::default() };
        self.send("/export", full(serde_json::to_vec(&question)?), http::Method::POST).await
    }
}

fn full(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed_unsync()
}

fn about(image: &str) -> Question {
    Question { image: image.to_string(), ..Question::default() }
}

pub async fn pull(node: &Node, images: &[String]) -> Result<()> {
    let keychain = registry::keychain()?;
    for image in images {
        let reference = Reference::parse(image)?;
        let auth = keychain.auth(&reference.registry, &reference.repository).await?;
        let auth = auth.map(|a| [a.username, a.password, a.identity_token, a.registry_token]);
        if std::io::stderr().is_terminal() {
            eprintln!("pulling {reference}");
        }
        let question = Question { auth, ..about(&reference.to_string()) };
        let record: ImageRecord = node.ask("/pull", &question).await?;
        println!("{reference}: {} for {}", short(&record.id), platform::format(&record.platform));
    }
    Ok(())
}

pub async fn import(node: &Node, archives: &[std::path::PathBuf]) -> Result<()> {
    for archive in archives {
        let shown = archive.display();
        let reader: Box<dyn std::io::Read + Send + Unpin> = if archive.as_os_str() == "-" {
            Box::new(std::io::stdin())
        } else if archive.is_dir() {
            Box::new(super::bundle::folder_as_tar(archive)?)
        } else {
            Box::new(std::fs::File::open(archive).with_context(|| format!("opening {shown}"))?)
        };
        let records = node.import_from(reader).await.with_context(|| shown.to_string())?;
        if records.is_empty() {
            eprintln!("{shown}: nothing in it is for this node");
        }
        for record in records {
            let names = if record.tags.is_empty() { "<none>".to_string() } else { record.tags.join(", ") };
            println!("{names}: {} for {}", short(&record.id), platform::format(&record.platform));
        }
    }
    Ok(())
}

pub async fn list(node: &Node, quiet: bool, as_json: bool) -> Result<()> {
    let mut records = node.records().await?;
    records.sort_by(|a, b| a.tags.cmp(&b.tags));
    if as_json {
        println!("{}", serde_json::to_string_pretty(&records)?);
        return Ok(());
    }
    if quiet {
        records.iter().for_each(|r| println!("{}", r.id));
        return Ok(());
    }
    let mut rows = Vec::new();
    for record in &records {
        let names = if record.tags.is_empty() { vec!["<none>".to_string()] } else { record.tags.clone() };
        for name in names {
            rows.push(vec![
                name,
                short(&record.id).to_string(),
                platform::format(&record.platform),
                platform::list(&record.platforms),
                count(record.size_bytes),
            ]);
        }
    }
    table(&["IMAGE", "ID", "HERE", "BUILT FOR", "SIZE"], rows);
    Ok(())
}

pub async fn remove(node: &Node, force: bool, images: &[String]) -> Result<()> {
    let mut failed = Vec::new();
    for image in images {
        let question = Question { force, ..about(image) };
        match node.ask::<ImageRecord>("/remove", &question).await {
            Ok(_) => println!("removed {image}"),
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    bail!(failed.join("\n"))
}

pub async fn prune(node: &Node, all: bool, force: bool) -> Result<()> {
    if !force && std::io::stdin().is_terminal() {
        let which = if all { "all images" } else { "all images without a name" };
        eprint!("Remove {which} that no container is made from? [y/N] ");
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        if !line.trim().eq_ignore_ascii_case("y") {
            bail!("nothing was removed");
        }
    }
    let gone: Vec<ImageRecord> = node.ask("/prune", &Question { all, ..Question::default() }).await?;
    for record in &gone {
        println!("removed {} {}", short(&record.id), record.tags.join(", "));
    }
    println!("{} images, {} freed", gone.len(), count(gone.iter().map(|r| r.unpacked_bytes).sum()));
    Ok(())
}

pub async fn tag(node: &Node, image: &str, name: &str) -> Result<()> {
    node.ask::<()>("/tag", &Question { name: name.to_string(), ..about(image) }).await
}

/// As `docker image inspect` shows them, as far as a node knows.
pub async fn inspect(node: &Node, images: &[String]) -> Result<()> {
    let mut shown = Vec::new();
    for image in images {
        let details: Details = node.ask("/inspect", &about(image)).await?;
        shown.push(described(&details));
    }
    println!("{}", serde_json::to_string_pretty(&Value::Array(shown))?);
    Ok(())
}

fn described(details: &Details) -> Value {
    let (record, config) = (&details.record, &details.config);
    let platforms: Vec<String> = record.platforms.iter().map(platform::format).collect();
    json!({
        "Id": record.id,
        "RepoTags": record.tags,
        "RepoDigests": record.digests,
        "Created": config["created"],
        "Os": config["os"],
        "Architecture": config["architecture"],
        "Variant": config["variant"],
        "Config": config["config"],
        "RootFS": {"Type": "layers", "Layers": config["rootfs"]["diff_ids"]},
        "Size": record.size_bytes,
        "UnpackedSize": record.unpacked_bytes,
        "Manifest": details.manifest,
        "Platforms": platforms,
        "UsedBy": details.users,
    })
}
