//! A registry in the lab's hub that serves what it is told to, broken or not.
//!
//! It runs as a thread of the test whose network namespace is the hub's; nothing of it is reachable from the machine.
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::image::{Image, digest};

/// The hub's address in every lab.
const ADDRESS: &str = "10.64.0.1:5000";
/// Nothing listens there.
const NOWHERE: &str = "10.64.0.1:5001";
const MAX_REQUEST_BYTES: u64 = 64 * 1024;

type Blobs = Arc<Mutex<BTreeMap<String, (String, Vec<u8>)>>>;

/// The paths it answers; it goes on until the test ends.
pub struct Registry {
    answers: Blobs,
}

impl Registry {
    /// registries.yaml of the lab's nodes.
    pub fn mirrors() -> String {
        format!(
            "mirrors:\n  registry.lab:5000:\n    endpoint: ['http://{ADDRESS}']\n  \
             down.lab:5000:\n    endpoint: ['http://{NOWHERE}']\n"
        )
    }

    pub fn start(hub_pid: u64) -> Result<Self> {
        let answers = Blobs::default();
        let served = answers.clone();
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let listener = listen(hub_pid);
            let failed = listener.as_ref().err().map(|e| format!("{e:#}"));
            let _ = tell.send(failed);
            for stream in listener.iter().flat_map(TcpListener::incoming).flatten() {
                let served = served.clone();
                std::thread::spawn(move || {
                    let _ = answer(stream, &served);
                });
            }
        });
        match told.recv()? {
            None => Ok(Self { answers }),
            Some(error) => Err(anyhow!("the registry in the hub: {error}")),
        }
    }

    /// Answers GET and HEAD of `path` with these bytes.
    pub fn serve(&self, path: &str, content_type: &str, bytes: &[u8]) {
        if let Ok(mut answers) = self.answers.lock() {
            answers.insert(path.to_string(), (content_type.to_string(), bytes.to_vec()));
        }
    }

    /// Serves an image as `registry.lab:5000/REPOSITORY:1`.
    pub fn push(&self, repository: &str, image: &Image) -> Result<()> {
        let manifest = image.blobs.get(&image.manifest).context("the manifest")?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        for tag in ["1", image.manifest.as_str()] {
            self.serve(&format!("/v2/{repository}/manifests/{tag}"), kind, manifest);
        }
        for (digest, bytes) in &image.blobs {
            self.serve(&format!("/v2/{repository}/blobs/{digest}"), "application/octet-stream", bytes);
        }
        Ok(())
    }

    /// Serves what an OCI archive with one index holds as `registry.lab:5000/REPOSITORY:latest`.
    pub fn push_archive(&self, repository: &str, archive: &Path) -> Result<()> {
        let mut tar = tar::Archive::new(std::fs::File::open(archive)?);
        let (mut files, mut top) = (Vec::new(), None);
        for entry in tar.entries()? {
            let mut entry = entry?;
            let name = entry.path()?.display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            if name == "index.json" {
                let index: serde_json::Value = serde_json::from_slice(&bytes)?;
                top = index["manifests"][0]["digest"].as_str().map(str::to_string);
            } else if name.starts_with("blobs/") {
                files.push(bytes);
            }
        }
        let top = top.context("an index.json")?;
        for bytes in files {
            let digest = digest(&bytes);
            let parsed: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
            let kind = parsed.as_ref().and_then(|v| v["mediaType"].as_str());
            if let Some(kind) = kind {
                self.serve(&format!("/v2/{repository}/manifests/{digest}"), kind, &bytes);
                if digest == top {
                    self.serve(&format!("/v2/{repository}/manifests/latest"), kind, &bytes);
                }
            }
            self.serve(&format!("/v2/{repository}/blobs/{digest}"), "application/octet-stream", &bytes);
        }
        Ok(())
    }
}

fn listen(hub_pid: u64) -> Result<TcpListener> {
    let net = std::fs::File::open(format!("/proc/{hub_pid}/ns/net"))?;
    setns(net, CloneFlags::CLONE_NEWNET).context("entering the hub's network")?;
    TcpListener::bind(ADDRESS).context(ADDRESS)
}

/// HTTP/1.1, one request a connection.
fn answer(stream: TcpStream, answers: &Blobs) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?.take(MAX_REQUEST_BYTES));
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    let found = answers.lock().ok().and_then(|a| a.get(path).cloned());
    let (status, kind, body) = match (path, found) {
        ("/v2/" | "/v2", _) => ("200 OK", "application/json".to_string(), b"{}".to_vec()),
        (_, Some((kind, body))) => ("200 OK", kind, body),
        (_, None) => {
            let code = if path.contains("/manifests/") { "MANIFEST_UNKNOWN" } else { "BLOB_UNKNOWN" };
            let body = format!(r#"{{"errors":[{{"code":"{code}","message":"{code}"}}]}}"#);
            ("404 Not Found", "application/json".to_string(), body.into_bytes())
        }
    };
    let mut stream = stream;
    let digest = digest(&body);
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nDocker-Content-Digest: {digest}\r\n\
         Docker-Distribution-API-Version: registry/2.0\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    if method != "HEAD" {
        stream.write_all(&body)?;
    }
    stream.flush()?;
    Ok(())
}
