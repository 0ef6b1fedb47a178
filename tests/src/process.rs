//! Running a program with an end to how long it may take.
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// What a program left behind.
pub struct Ran {
    pub command: String,
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// Its output, when it succeeded.
    pub fn ok(self) -> Result<String> {
        match self.code {
            0 => Ok(self.out),
            _ => bail!("{} ended with {}:\n{}{}", self.command, self.code, self.out, self.err),
        }
    }

    /// It must have failed, with `want` in what it said.
    pub fn refused(self, want: &str) -> Result<()> {
        if self.code == 0 {
            bail!("{} should have failed with {want:?}, but said:\n{}", self.command, self.text());
        }
        crate::has(&self.text(), want).context(self.command)
    }

    pub fn text(&self) -> String {
        format!("{}{}", self.out, self.err)
    }
}

/// Runs `command` with `input`; after `limit` it is killed, and its exit code is that of timeout(1), 124.
pub fn run(command: &mut Command, input: &[u8], limit: Duration) -> Result<Ran> {
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let shown = words.iter().map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {shown}"))?;
    let stdin = child.stdin.take();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || {
        // a program that does not read to the end is no failure of this thread
        let _ = stdin.map(|mut s| s.write_all(&input));
    });
    let (out, err) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let start = sampan_world::clock::monotonic();
    let code = loop {
        if let Some(status) = child.try_wait()? {
            break status.code().unwrap_or(128);
        }
        if start.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            break 124;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    drop(feeder);
    Ok(Ran { command: shown, code, out: out.text(), err: err.text() })
}

/// What a program prints, read as it comes.
struct Reader {
    thread: std::thread::JoinHandle<()>,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Reader {
    /// All of it. A process that was started in the background may hold the pipe open: its end is not waited for long.
    fn text(self) -> String {
        for _ in 0..50 {
            if self.thread.is_finished() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.bytes.lock().map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }
}

fn reader(from: Option<impl Read + Send + 'static>) -> Reader {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let into = bytes.clone();
    let thread = std::thread::spawn(move || {
        let Some(mut from) = from else { return };
        let mut buffer = [0; 16 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if let Ok(mut bytes) = into.lock() {
                bytes.extend_from_slice(&buffer[..count]);
            }
        }
    });
    Reader { thread, bytes }
}
