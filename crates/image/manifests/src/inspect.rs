//! What an image is really made for: its configuration, and the programs in its layers.
//!
//! Upstream counterpart: none; docker believes the configuration. The program that the image starts is looked for, then
//! its shell, then any program; layers are read from the top, no further than needed and never beyond the bounds below.
//! What can't be found within them is not known, which is no error: the check is a service, not a gate.
use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read};

use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use sampan_image::manifest::{Descriptor, Manifest, RunConfig};
use sampan_image::source::Source;
use tokio::sync::mpsc;

use crate::elf;
use crate::list::Program;

/// What one image's check may cost.
const FETCH_MAX_BYTES: u64 = 24 << 20;
const UNPACK_MAX_BYTES: u64 = 512 << 20;
const ENTRIES_MAX: usize = 100_000;
const HOPS_MAX: usize = 16;
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SHELLS: [&str; 6] = ["bin/sh", "bin/busybox", "bin/bash", "bin/dash", "usr/bin/sh", "usr/bin/bash"];

/// What was seen in layers, the topmost of each name.
#[derive(Default)]
struct Seen {
    programs: HashMap<String, &'static str>,
    links: HashMap<String, String>,
    first: Option<String>,
    started: Vec<String>,
    entries: usize,
    unpacked: u64,
}

/// The program that tells what the image is for; `None` when none was found within bounds.
pub async fn program(source: &dyn Source, manifest: &Manifest, run: &RunConfig) -> Option<Program> {
    let mut seen = Seen { started: started(run), ..Seen::default() };
    let mut left = FETCH_MAX_BYTES;
    for layer in manifest.layers.iter().rev() {
        if left == 0 || seen.done() {
            break;
        }
        seen = scan_layer(source, layer, seen, &mut left).await;
    }
    seen.verdict()
}

/// The same of layers in memory, topmost first; what fuzzing drives.
pub fn program_in(run: &RunConfig, layers: &[&[u8]]) -> Option<Program> {
    let mut seen = Seen { started: started(run), ..Seen::default() };
    for layer in layers {
        let _ = seen.layer(*layer);
    }
    seen.verdict()
}

/// Where the program that the image starts may lie, without the slash.
fn started(run: &RunConfig) -> Vec<String> {
    let words = [&run.entrypoint, &run.cmd];
    let Some(word) = words.iter().find_map(|w| w.as_ref()?.first()) else { return Vec::new() };
    let bare = |path: String| path.trim_start_matches('/').to_string();
    if word.starts_with('/') {
        return vec![bare(word.clone())];
    }
    if word.contains('/') {
        let folder = run.working_dir.clone().unwrap_or_default();
        return vec![bare(format!("{folder}/{}", word.trim_start_matches("./")))];
    }
    let env = run.env.iter().flatten().find_map(|e| e.strip_prefix("PATH="));
    env.unwrap_or(DEFAULT_PATH).split(':').map(|folder| bare(format!("{folder}/{word}"))).collect()
}

async fn scan_layer(source: &dyn Source, layer: &Descriptor, seen: Seen, left: &mut u64) -> Seen {
    let Ok(mut body) = source.open(layer, 0).await else { return seen };
    let (sender, receiver) = mpsc::channel::<Bytes>(8);
    let scan = tokio::task::spawn_blocking(move || {
        let mut seen = seen;
        // A layer that ends early (we stop it) or is broken still told something.
        let _ = seen.layer(Pieces { receiver, piece: Bytes::new() });
        seen
    });
    while *left > 0 {
        let Some(Ok(frame)) = body.frame().await else { break };
        let Ok(data) = frame.into_data() else { continue };
        *left = left.saturating_sub(data.len() as u64);
        if sender.send(data).await.is_err() {
            break;
        }
    }
    drop(sender);
    scan.await.unwrap_or_default()
}

/// Bytes that come over a channel, read by a thread.
struct Pieces {
    receiver: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let n = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..n]);
        Ok(n)
    }
}

impl Seen {
    /// Goes through a layer until the program that is started was seen.
    fn layer(&mut self, reader: impl Read) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(64 * 1024, reader);
        let plain: Box<dyn Read + '_> = match reader.fill_buf()? {
            [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(
                ruzstd::decoding::StreamingDecoder::new(reader)
                    .map_err(|e| io::Error::other(e.to_string()))?,
            ),
            _ => Box::new(reader),
        };
        let bound = UNPACK_MAX_BYTES.saturating_sub(self.unpacked);
        let mut archive = tar::Archive::new(plain.take(bound));
        for entry in archive.entries()? {
            let mut entry = entry?;
            self.entries += 1;
            self.unpacked = self.unpacked.saturating_add(entry.size());
            if self.entries > ENTRIES_MAX {
                break;
            }
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let path = path.trim_start_matches("./").trim_matches('/').to_string();
            let kind = entry.header().entry_type();
            if kind.is_symlink() || kind.is_hard_link() {
                let to = String::from_utf8_lossy(&entry.link_name_bytes().unwrap_or_default()).into_owned();
                let to = if kind.is_hard_link() { format!("/{to}") } else { to };
                self.links.entry(path).or_insert(to);
            } else if kind.is_file() && !self.programs.contains_key(&path) && !self.links.contains_key(&path)
            {
                let mut head = [0; elf::HEAD_BYTES];
                if entry.read_exact(&mut head).is_err() {
                    continue;
                }
                if let Some(architecture) = elf::architecture(&head) {
                    if self.first.is_none() && entry.header().mode().is_ok_and(|m| m & 0o111 != 0) {
                        self.first = Some(path.clone());
                    }
                    self.programs.insert(path, architecture);
                }
            }
            if self.done() {
                break;
            }
        }
        Ok(())
    }

    fn done(&self) -> bool {
        self.started.iter().any(|p| self.find(p).is_some())
    }

    /// Follows links of the layers to a program.
    fn find(&self, path: &str) -> Option<(&String, &'static str)> {
        let mut path = path.to_string();
        for _ in 0..HOPS_MAX {
            if let Some((path, architecture)) = self.programs.get_key_value(&path) {
                return Some((path, architecture));
            }
            // The first part of the path that is a link, with what follows it.
            let ends = path.match_indices('/').map(|(i, _)| i).chain([path.len()]);
            let (end, to) = ends.filter_map(|i| Some((i, self.links.get(&path[..i])?))).next()?;
            let folder = path[..end].rfind('/').map_or("", |i| &path[..i]);
            let joined = match to.starts_with('/') {
                true => format!("{to}{}", &path[end..]),
                false => format!("{folder}/{to}{}", &path[end..]),
            };
            path = normal(&joined);
        }
        None
    }

    fn verdict(&self) -> Option<Program> {
        let shells = SHELLS.iter().map(|s| (*s).to_string());
        let named = self.started.iter().cloned().chain(shells).chain(self.first.clone());
        let (path, architecture) = named.into_iter().find_map(|p| self.find(&p))?;
        Some(Program { path: path.clone(), architecture: architecture.to_string() })
    }
}

/// Without `.` and `..`, which stop at the root.
fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(entries: &[(&str, Result<&[u8], &str>)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, what) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o755);
            match what {
                Ok(bytes) => {
                    header.set_size(bytes.len() as u64);
                    tar.append_data(&mut header, name, *bytes).unwrap();
                }
                Err(link) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_size(0);
                    tar.append_link(&mut header, name, link).unwrap();
                }
            }
        }
        tar.into_inner().unwrap()
    }

    fn verdict(run: &RunConfig, layers: &[Vec<u8>]) -> Option<(String, String)> {
        let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
        program_in(run, &layers).map(|p| (p.path, p.architecture))
    }

    #[test]
    fn the_program_that_is_started_decides() {
        let (arm, amd) = (elf::head(183, true), elf::head(62, true));
        let cmd = |words: &[&str]| RunConfig {
            cmd: Some(words.iter().map(|w| (*w).to_string()).collect()),
            ..RunConfig::default()
        };
        let found = |path: &str, arch: &str| Some((path.to_string(), arch.to_string()));
        let top = layer(&[("app/run", Ok(&arm))]);
        let base = layer(&[
            ("bin", Err("usr/bin")),
            ("usr/bin/qemu", Ok(&amd)),
            ("usr/bin/busybox", Ok(&arm)),
            ("usr/bin/sh", Err("/bin/busybox")),
            ("start", Ok(b"#!/bin/sh\necho a script, longer than a header\n")),
        ]);
        let both = [top, base];
        assert_eq!(verdict(&cmd(&["/app/run"]), &both), found("app/run", "arm64"));
        assert_eq!(verdict(&cmd(&["qemu", "x"]), &both), found("usr/bin/qemu", "amd64"));
        // a script: its shell is asked, over two links and a linked folder
        assert_eq!(verdict(&cmd(&["/start"]), &both), found("usr/bin/busybox", "arm64"));
        let loops = layer(&[("bin/sh", Err("bash")), ("bin/bash", Err("sh"))]);
        assert_eq!(verdict(&cmd(&["sh"]), &[loops]), None);
        assert_eq!(verdict(&cmd(&["sh"]), &[b"not a tar".to_vec()]), None);
    }
}
