//! Writing images into one tar that is an OCI layout and what `docker load` takes at the same time.
//!
//! Upstream counterparts: containerd's `images/archive` exporter, whose two annotations for names these are; moby's
//! tarexport for manifest.json. Blobs are written as they come, each once, and checked on the way: an archive with a
//! wrong byte is never finished. Docker knows one platform a name there, so it gets that of this machine when there is.
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::sync::atomic::Ordering;
use std::time::Duration;

use http_body_util::BodyExt;
use sampan_drivers::runtime::{ImageError, Platform};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::client::{FetchError, Pushed};
use crate::copy::{Plan, Planned, Report};
use crate::manifest::{Descriptor, OCI_INDEX, hex_digest};
use crate::platform;
use crate::reference::Reference;
use crate::source::Source;

const ATTEMPTS: u32 = 5;
const STALL: Duration = Duration::from_secs(30);
const BLOCK_BYTES: u64 = 512;

pub struct LayoutWriter<W: Write> {
    out: W,
    written: BTreeSet<String>,
    index: Vec<Value>,
    docker: Vec<Value>,
    machine: Platform,
}

impl<W: Write> LayoutWriter<W> {
    /// `machine` is for whom docker's part is.
    pub fn new(out: W, machine: Platform) -> Result<LayoutWriter<W>, FetchError> {
        let mut writer =
            LayoutWriter { out, written: BTreeSet::new(), index: Vec::new(), docker: Vec::new(), machine };
        writer.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(writer)
    }

    /// Adds an image under `names`.
    pub async fn add(
        &mut self,
        source: &dyn Source,
        plan: &Plan,
        names: &[Reference],
        report: &dyn Report,
    ) -> Result<(), FetchError> {
        for blob in &plan.blobs {
            let done = report.begin(blob);
            if !self.written.insert(blob.digest.clone()) {
                done.store(blob.size, Ordering::Relaxed);
                report.end(blob, Pushed::Existed);
                continue;
            }
            self.header(&blob_name(&blob.digest), blob.size)?;
            self.blob(source, blob, &done).await?;
            self.pad(blob.size)?;
            report.end(blob, Pushed::Uploaded);
        }
        for document in &plan.documents {
            if self.written.insert(document.digest.clone()) {
                self.file(&blob_name(&document.digest), &document.bytes)?;
            }
        }
        let Some(top) = plan.top() else { return Ok(()) };
        for name in names {
            self.index.push(entry(top, Some(name)));
        }
        if names.is_empty() {
            self.index.push(entry(top, None));
        }
        self.docker.extend(self.for_docker(plan, names));
        Ok(())
    }

    /// Writes what lists the images; the archive is whole then.
    pub fn finish(mut self) -> Result<W, FetchError> {
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self.index}).to_string();
        self.file("index.json", index.as_bytes())?;
        let docker = Value::Array(std::mem::take(&mut self.docker)).to_string();
        self.file("manifest.json", docker.as_bytes())?;
        self.out.write_all(&[0; 2 * BLOCK_BYTES as usize])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn for_docker(&self, plan: &Plan, names: &[Reference]) -> Option<Value> {
        let images: Vec<(&Planned, &Platform)> =
            plan.documents.iter().filter_map(|d| Some((d, d.platform.as_ref()?))).collect();
        let chosen = platform::choose(&self.machine, images.iter().map(|(_, p)| *p)).unwrap_or(0);
        let manifest = images.get(chosen)?.0.manifest.as_ref()?;
        let tags: Vec<String> = names.iter().filter(|n| n.tag.is_some()).map(docker_name).collect();
        let layers: Vec<String> = manifest.layers.iter().map(|l| blob_name(&l.digest)).collect();
        Some(json!({"Config": blob_name(&manifest.config.digest), "RepoTags": tags, "Layers": layers}))
    }

    /// A blob's bytes, begun again where they broke off.
    async fn blob(
        &mut self,
        source: &dyn Source,
        blob: &Descriptor,
        done: &std::sync::atomic::AtomicU64,
    ) -> Result<(), FetchError> {
        let (mut hash, mut at, mut failures) = (Sha256::new(), 0u64, 0);
        while at < blob.size {
            let before = at;
            let failure = match source.open(blob, at).await {
                Err(e @ ImageError::Unavailable(_)) => e,
                Err(e) => return Err(e.into()),
                Ok(mut body) => loop {
                    match tokio::time::timeout(STALL, body.frame()).await {
                        Err(_) => break ImageError::Unavailable(format!("{} stopped coming", blob.digest)),
                        Ok(None) => {
                            let short = format!("{} ended after {at} of {} bytes", blob.digest, blob.size);
                            break ImageError::Unavailable(short);
                        }
                        Ok(Some(Err(e))) => break ImageError::Unavailable(format!("{}: {e}", blob.digest)),
                        Ok(Some(Ok(frame))) => {
                            let Ok(data) = frame.into_data() else { continue };
                            if at + data.len() as u64 > blob.size {
                                let long = format!("{} is longer than its {} bytes", blob.digest, blob.size);
                                return Err(ImageError::Invalid(long).into());
                            }
                            hash.update(&data);
                            self.out.write_all(&data)?;
                            at += data.len() as u64;
                            done.store(at, Ordering::Relaxed);
                            if at == blob.size {
                                break ImageError::Unavailable(String::new());
                            }
                        }
                    }
                },
            };
            if at < blob.size {
                failures = if at > before { 1 } else { failures + 1 };
                if failures >= ATTEMPTS {
                    return Err(failure.into());
                }
                tokio::time::sleep(Duration::from_millis(250) * 2u32.pow(failures)).await;
            }
        }
        let got = hex_digest(&hash.finalize());
        if got != blob.digest {
            let message = format!("blob {}: its bytes have digest {got}", blob.digest);
            return Err(ImageError::Invalid(message).into());
        }
        Ok(())
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.header(name, bytes.len() as u64)?;
        self.out.write_all(bytes)?;
        self.pad(bytes.len() as u64)
    }

    fn header(&mut self, name: &str, size: u64) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_path(name)?;
        header.set_size(size);
        header.set_mode(0o644);
        header.set_cksum();
        self.out.write_all(header.as_bytes())
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let rest = (BLOCK_BYTES - size % BLOCK_BYTES) % BLOCK_BYTES;
        self.out.write_all(&[0; BLOCK_BYTES as usize][..rest as usize])
    }
}

fn blob_name(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

/// Docker's own short spelling: `docker load` shows it as it is written.
fn docker_name(name: &Reference) -> String {
    let full = name.to_string();
    let short = full.strip_prefix("docker.io/library/").or_else(|| full.strip_prefix("docker.io/"));
    short.unwrap_or(&full).to_string()
}

fn entry(top: &Planned, name: Option<&Reference>) -> Value {
    let mut entry = json!({"mediaType": top.media_type, "digest": top.digest, "size": top.bytes.len()});
    if let Some(name) = name {
        let mut annotations = json!({"io.containerd.image.name": name.to_string()});
        if let Some(tag) = &name.tag {
            annotations["org.opencontainers.image.ref.name"] = json!(tag);
        }
        entry["annotations"] = annotations;
    }
    entry
}
