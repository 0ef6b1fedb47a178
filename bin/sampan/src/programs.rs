//! The programs that a server has for its nodes: those in <data>/server/binaries, and its own.
//!
//! `GET /v1-sampan/programs` lists them, `GET /v1-sampan/programs/SHA256` is one of them; both are for nodes. What stays
//! true: nothing is read before somebody asks; then the folder is read again when it changes, and a program is sent from
//! where it lies, also out of a bundle.
use std::collections::BTreeSet;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, Once};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderValue, Response, header};
use sampan_apiserver::{Body, Status, body};
use sampan_fleet::binary::{self, Binary};
use sampan_kinds::upgrade::Program;
use sampan_kinds::upgrade::v1::plan::ARCHITECTURES;
use tokio::sync::watch;

use crate::folder_changes::{ARRIVALS, FolderChanges, REMOVALS};

pub const PATH: &str = "/v1-sampan/programs";

/// A bundle that is being copied changes many times.
const SETTLE: Duration = Duration::from_secs(1);
const CHUNK_BYTES: usize = 64 * 1024;

pub struct Programs {
    folder: PathBuf,
    /// `None` until the folder is read.
    found: watch::Sender<Option<Arc<Vec<Binary>>>>,
    started: Once,
    /// What was told of already.
    told: parking_lot::Mutex<BTreeSet<String>>,
}

impl Programs {
    pub fn new(folder: PathBuf) -> Result<Arc<Self>> {
        std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(Arc::new(Self {
            folder,
            found: watch::Sender::new(None),
            started: Once::new(),
            told: parking_lot::Mutex::default(),
        }))
    }

    fn found(self: &Arc<Self>) -> watch::Receiver<Option<Arc<Vec<Binary>>>> {
        self.started.call_once(|| {
            let this = self.clone();
            sampan_telemetry::supervise("programs", move || {
                let this = this.clone();
                async move { this.follow().await }
            });
        });
        self.found.subscribe()
    }

    /// What there is, now and after each change; nothing while the folder changes.
    pub fn watch(self: &Arc<Self>) -> watch::Receiver<Vec<Program>> {
        let (sender, receiver) = watch::channel(Vec::new());
        let mut found = self.found();
        tokio::spawn(async move {
            loop {
                let binaries = found.borrow_and_update().clone();
                sender.send_replace(binaries.iter().flat_map(|b| b.iter()).filter_map(program).collect());
                if found.changed().await.is_err() {
                    return;
                }
            }
        });
        receiver
    }

    async fn follow(self: Arc<Self>) {
        let changes = match FolderChanges::of(&[&self.folder], ARRIVALS | REMOVALS) {
            Ok(changes) => Some(changes),
            Err(error) => {
                tracing::warn!(folder = %self.folder.display(), "programs are read only once: {error}");
                None
            }
        };
        loop {
            let this = self.clone();
            if let Ok(list) = tokio::task::spawn_blocking(move || this.read()).await {
                self.found.send_replace(Some(Arc::new(list)));
            }
            match &changes {
                Some(changes) => drop(changes.next().await),
                None => std::future::pending().await,
            }
            // what is being written has neither its digest nor the one before
            self.found.send_replace(None);
            tokio::time::sleep(SETTLE).await;
        }
    }

    fn read(&self) -> Vec<Binary> {
        let mut list = binary::list(&self.folder, &ARCHITECTURES);
        if let Ok(own) = crate::node_upgrade::program() {
            list.push(binary::own(&own));
        }
        let mut told = self.told.lock();
        let mut good = Vec::new();
        for binary in list {
            match binary {
                Ok(binary) => good.push(binary),
                Err(error) => {
                    let text = error.to_string();
                    if told.len() < 100 && told.insert(text.clone()) {
                        tracing::warn!("a program that cannot be given to nodes: {text}");
                    }
                }
            }
        }
        good
    }

    /// Answers a node.
    pub async fn answer(self: &Arc<Self>, path: &str) -> Result<Response<Body>, Status> {
        let mut found = self.found();
        let binaries =
            found.wait_for(Option::is_some).await.map(|b| b.clone()).ok().flatten().unwrap_or_default();
        let digest = path.strip_prefix(PATH).unwrap_or_default().trim_start_matches('/');
        if digest.is_empty() {
            let list: Vec<Program> = binaries.iter().filter_map(program).collect();
            let text = serde_json::to_vec(&list).map_err(|e| Status::internal(e.to_string()))?;
            let mut response = Response::new(body::full(text));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            return Ok(response);
        }
        let binary = binaries.iter().find(|b| b.digest == digest);
        let binary = binary.ok_or_else(|| Status::bad_request(format!("there is no program {digest}")))?;
        let reader =
            binary.open().map_err(|e| Status::internal(format!("{}: {e}", binary.path.display())))?;
        let mut response = Response::new(body::stream(chunks(reader)));
        response.headers_mut().insert(header::CONTENT_LENGTH, binary.size_bytes.into());
        Ok(response)
    }
}

fn program(binary: &Binary) -> Option<Program> {
    Some(Program {
        arch: binary.arch.clone(),
        version: binary.release.clone()?,
        sha256: binary.digest.clone(),
        size_bytes: binary.size_bytes,
    })
}

/// Read as fast as it is taken. A read that fails ends it: the receiver misses bytes and notices.
fn chunks(mut reader: impl Read + Send + 'static) -> impl futures::Stream<Item = Bytes> + Send + 'static {
    let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(4);
    tokio::task::spawn_blocking(move || {
        loop {
            let mut buffer = vec![0; CHUNK_BYTES];
            match reader.read(&mut buffer) {
                Ok(count @ 1..) => {
                    buffer.truncate(count);
                    if sender.blocking_send(buffer.into()).is_err() {
                        return;
                    }
                }
                Ok(0) => return,
                Err(error) => return tracing::warn!(%error, "reading a program"),
            }
        }
    });
    futures::stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) })
}
