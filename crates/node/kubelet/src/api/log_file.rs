//! A container's log file: lines as the runtime writes them, read from a place near the end, and followed.
//!
//! Upstream counterpart: k8s.io/cri-client/pkg/logs. A line is `<time> <stream> <tags> <text>`; tag `P` says that the
//! next line goes on with it. Tailing counts lines of the file, parts included, and only the newest file is read, as
//! upstream. Following waits for inotify and the runtime's events, where upstream looks every second.
use std::io::SeekFrom;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use rustix::fs::inotify;
use sampan_drivers::Runtime;
use sampan_drivers::runtime::{ContainerState, PodEvent};
use tokio::fs::File;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncSeekExt, BufReader};
use tokio::sync::mpsc;

const CHUNK_BYTES: usize = 16 * 1024;
const BLOCK_BYTES: u64 = 4096;
/// A longer line is none of the runtime's, and is skipped.
const LINE_BYTES_MAX: usize = 256 * 1024;
/// How often the container is looked at where the runtime tells no events.
const WITHOUT_EVENTS: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub tail_lines: Option<u64>,
    pub limit_bytes: Option<u64>,
    pub since: Option<Timestamp>,
    pub follow: bool,
    pub timestamps: bool,
    /// Only this one.
    pub source: Option<Source>,
}

/// One line of the file. A part of a line has no newline at its end.
#[derive(Debug, PartialEq, Eq)]
pub struct Line<'a> {
    pub time: Timestamp,
    pub source: Source,
    pub text: &'a [u8],
}

impl<'a> Line<'a> {
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let time = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
        let source = match parts.next()? {
            b"stdout" => Source::Stdout,
            b"stderr" => Source::Stderr,
            _ => return None,
        };
        let is_part = parts.next()?.split(|byte| *byte == b':').next() == Some(b"P");
        let text = parts.next()?;
        let text = if is_part { text.strip_suffix(b"\n").unwrap_or(text) } else { text };
        Some(Self { time, source, text })
    }
}

/// Chooses lines, and writes them as the client wants them.
struct Printer {
    options: Options,
    left_bytes: u64,
    left_lines: u64,
    is_line_start: bool,
}

impl Printer {
    fn new(options: Options) -> Self {
        let left_lines = match options.tail_lines {
            Some(lines) if !options.follow => lines,
            _ => u64::MAX,
        };
        Self { left_bytes: options.limit_bytes.unwrap_or(u64::MAX), left_lines, options, is_line_start: true }
    }

    fn is_done(&self) -> bool {
        self.left_bytes == 0 || self.left_lines == 0
    }

    fn print(&mut self, line: &[u8], out: &mut BytesMut) {
        let Some(line) = Line::parse(line) else {
            tracing::debug!("a line of a container's log is not in the runtime's format");
            return;
        };
        let is_young = self.options.since.is_none_or(|since| line.time >= since);
        if is_young && self.options.source.is_none_or(|source| source == line.source) {
            if self.options.timestamps && self.is_line_start {
                let time = line.time.strftime("%Y-%m-%dT%H:%M:%S.%9fZ ").to_string();
                self.put(time.as_bytes(), out);
            }
            self.put(line.text, out);
        }
        self.left_lines = self.left_lines.saturating_sub(1);
        self.is_line_start = line.text.is_empty() || line.text.ends_with(b"\n");
    }

    fn put(&mut self, bytes: &[u8], out: &mut BytesMut) {
        let n = self.left_bytes.min(bytes.len() as u64) as usize;
        out.extend_from_slice(&bytes[..n]);
        self.left_bytes -= n as u64;
    }
}

/// Where the last `lines` lines begin; what has no newline yet is not counted.
async fn tail_start(file: &mut File, lines: u64) -> std::io::Result<u64> {
    let mut right = file.seek(SeekFrom::End(0)).await?;
    let (mut seen, mut block) = (0, vec![0; BLOCK_BYTES as usize]);
    while right > 0 {
        let left = right.saturating_sub(BLOCK_BYTES);
        let block = &mut block[..(right - left) as usize];
        file.seek(SeekFrom::Start(left)).await?;
        file.read_exact(block).await?;
        for (i, _) in block.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            if seen == lines {
                return Ok(left + i as u64 + 1);
            }
            seen += 1;
        }
        right = left;
    }
    Ok(0)
}

/// Tells when the container's log or state may have changed.
struct Watch {
    inotify: AsyncFd<OwnedFd>,
    events: mpsc::Receiver<PodEvent>,
    has_events: bool,
    pod_uid: String,
}

enum Change {
    /// The log may have grown or been replaced.
    Log,
    /// The container may have ended, too.
    Container,
}

/// For inotify, whose descriptor is read by nobody else.
#[allow(unsafe_code)]
pub(crate) fn registered(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` owns its descriptor, and nothing exchanges it inside the `AsyncFd`.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

impl Watch {
    fn new(folder: &Path, runtime: &dyn Runtime, pod_uid: String) -> std::io::Result<Self> {
        use inotify::WatchFlags as On;
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let on = On::MODIFY | On::CREATE | On::MOVED_TO | On::MOVED_FROM | On::DELETE | On::CLOSE_WRITE;
        inotify::add_watch(&fd, folder, on)?;
        Ok(Self { inotify: registered(fd)?, events: runtime.events(), has_events: true, pod_uid })
    }

    async fn changed(&mut self) -> std::io::Result<Change> {
        loop {
            tokio::select! {
                ready = self.inotify.readable() => {
                    let mut guard = ready?;
                    let mut change = None;
                    let mut buffer = [std::mem::MaybeUninit::uninit(); 2048];
                    let mut reader = inotify::Reader::new(guard.get_inner(), &mut buffer);
                    loop {
                        match reader.next() {
                            // the runtime closes the log when the container ends
                            Ok(event) if event.events().contains(inotify::ReadFlags::CLOSE_WRITE) => {
                                change = Some(Change::Container);
                            }
                            Ok(_) => change = change.or(Some(Change::Log)),
                            Err(rustix::io::Errno::AGAIN) => break,
                            Err(rustix::io::Errno::INTR) => {}
                            Err(error) => return Err(error.into()),
                        }
                    }
                    guard.clear_ready();
                    if let Some(change) = change {
                        return Ok(change);
                    }
                }
                event = self.events.recv(), if self.has_events => match event {
                    Some(event) if event.pod_uid == self.pod_uid => return Ok(Change::Container),
                    Some(_) => {}
                    None => self.has_events = false,
                },
                () = tokio::time::sleep(WITHOUT_EVENTS), if !self.has_events => return Ok(Change::Container),
            }
        }
    }
}

/// Reads a log chunk by chunk; it is dropped when the client goes.
pub struct LogReader {
    path: PathBuf,
    file: BufReader<File>,
    inode: u64,
    printer: Printer,
    line: Vec<u8>,
    is_line_skipped: bool,
    watch: Option<Watch>,
    runtime: Arc<dyn Runtime>,
    container_id: String,
    /// Nothing more is written: what is there is the rest.
    has_ended: bool,
}

impl LogReader {
    pub async fn open(
        path: &Path,
        options: Options,
        runtime: Arc<dyn Runtime>,
        container_id: String,
        pod_uid: String,
    ) -> std::io::Result<Self> {
        let path = tokio::fs::canonicalize(path).await?;
        let mut file = File::open(&path).await?;
        let start = match options.tail_lines {
            Some(lines) => tail_start(&mut file, lines).await?,
            None => 0,
        };
        file.seek(SeekFrom::Start(start)).await?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        let watch = options.follow.then(|| Watch::new(folder, runtime.as_ref(), pod_uid)).transpose()?;
        let mut reader = Self {
            inode: file.metadata().await?.ino(),
            file: BufReader::with_capacity(CHUNK_BYTES, file),
            path,
            printer: Printer::new(options),
            line: Vec::new(),
            is_line_skipped: false,
            has_ended: watch.is_none(),
            watch,
            runtime,
            container_id,
        };
        reader.look().await;
        Ok(reader)
    }

    /// The next chunk; `None` at the end.
    pub async fn next(&mut self) -> std::io::Result<Option<Bytes>> {
        let mut out = BytesMut::new();
        loop {
            if self.printer.is_done() {
                return Ok(Some(out.freeze()).filter(|out| !out.is_empty()));
            }
            if self.fill(&mut out).await? {
                if out.len() >= CHUNK_BYTES {
                    return Ok(Some(out.freeze()));
                }
                continue;
            }
            // the file's end
            if !out.is_empty() {
                return Ok(Some(out.freeze()));
            }
            if self.reopen().await? {
                continue;
            }
            if self.has_ended {
                if self.line.is_empty() {
                    return Ok(None);
                }
                let line = std::mem::take(&mut self.line);
                self.printer.print(&line, &mut out);
                continue;
            }
            let Some(watch) = &mut self.watch else { return Ok(None) };
            if let Change::Container = watch.changed().await? {
                self.look().await;
            }
        }
    }

    /// Takes what is buffered or a block of the file; `false` at the end.
    async fn fill(&mut self, out: &mut BytesMut) -> std::io::Result<bool> {
        let available = self.file.fill_buf().await?;
        if available.is_empty() {
            return Ok(false);
        }
        let end = available.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
        let taken = end.unwrap_or(available.len());
        if self.line.len() + taken > LINE_BYTES_MAX {
            self.is_line_skipped = true;
            self.line.clear();
        }
        if !self.is_line_skipped {
            self.line.extend_from_slice(&available[..taken]);
        }
        self.file.consume(taken);
        if end.is_some() {
            if !std::mem::take(&mut self.is_line_skipped) {
                self.printer.print(&self.line, out);
            }
            self.line.clear();
        }
        Ok(true)
    }

    /// Whether the container has ended, if it is followed.
    async fn look(&mut self) {
        if self.has_ended {
            return;
        }
        match self.runtime.container_status(&self.container_id).await {
            Ok(container) => self.has_ended = container.state != ContainerState::Running,
            Err(sampan_drivers::runtime::RuntimeError::NotFound { .. }) => self.has_ended = true,
            // the runtime is away: containers run on without it
            Err(error) => tracing::debug!(%error, "looking at a followed container"),
        }
    }

    /// Goes on with the file that took this one's place, if one did.
    async fn reopen(&mut self) -> std::io::Result<bool> {
        if self.watch.is_none() {
            return Ok(false);
        }
        let inode = match tokio::fs::metadata(&self.path).await {
            Ok(metadata) => metadata.ino(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        // what was written to the old one between our last look and its end comes first
        if inode == self.inode || !self.file.fill_buf().await?.is_empty() {
            return Ok(inode != self.inode);
        }
        let file = match File::open(&self.path).await {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        self.inode = file.metadata().await?.ino();
        self.file = BufReader::with_capacity(CHUNK_BYTES, file);
        self.line.clear();
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
