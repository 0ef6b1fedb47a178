//! Blobs on their way: bars on a terminal, a line each where the output is no terminal.
//!
//! All of it goes to standard error. Bars are drawn by a thread that ends with the last of them.
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use sampan_image::client::Pushed;
use sampan_image::copy::Report;
use sampan_image::manifest::Descriptor;

const DRAWN_EVERY: Duration = Duration::from_millis(120);
const WIDTH: usize = 28;
/// More than are ever on their way at once.
const BARS_MAX: usize = 16;

struct Bar {
    digest: String,
    size: u64,
    done: Arc<AtomicU64>,
}

#[derive(Default)]
struct Screen {
    bars: Vec<Bar>,
    /// Lines that the last drawing took.
    drawn: usize,
}

pub struct Bars {
    screen: Arc<Mutex<Screen>>,
    ended: Arc<AtomicBool>,
    painter: Mutex<Option<JoinHandle<()>>>,
    is_terminal: bool,
}

impl Bars {
    pub fn new() -> Bars {
        let is_terminal = std::io::stderr().is_terminal();
        let bars =
            Bars { screen: Arc::default(), ended: Arc::default(), painter: Mutex::default(), is_terminal };
        if is_terminal {
            let (screen, ended) = (bars.screen.clone(), bars.ended.clone());
            let painter = std::thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    draw(&mut lock(&screen), &[]);
                    std::thread::sleep(DRAWN_EVERY);
                }
            });
            *lock(&bars.painter) = Some(painter);
        }
        bars
    }

    /// A line for standard output, kept apart from the bars.
    pub fn print(&self, line: &str) {
        let mut screen = lock(&self.screen);
        if self.is_terminal {
            wipe(&mut screen);
        }
        println!("{line}");
    }

    /// Takes the bars away.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(painter) = lock(&self.painter).take() {
            let _ = painter.join();
            wipe(&mut lock(&self.screen));
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Report for Bars {
    fn begin(&self, blob: &Descriptor) -> Arc<AtomicU64> {
        let done = Arc::new(AtomicU64::new(0));
        let bar = Bar { digest: blob.digest.clone(), size: blob.size, done: done.clone() };
        lock(&self.screen).bars.push(bar);
        done
    }

    fn end(&self, blob: &Descriptor, how: Pushed) {
        let word = match how {
            Pushed::Existed => "already there",
            Pushed::Mounted => "mounted",
            Pushed::Uploaded => "copied",
        };
        let line = format!("{} {} {word}", short(&blob.digest), bytes(blob.size));
        let mut screen = lock(&self.screen);
        if let Some(at) = screen.bars.iter().position(|b| b.digest == blob.digest) {
            screen.bars.remove(at);
        }
        match self.is_terminal {
            true => draw(&mut screen, &[line]),
            false => eprintln!("{line}"),
        }
    }
}

fn wipe(screen: &mut Screen) {
    let mut out = std::io::stderr().lock();
    if screen.drawn > 0 {
        let _ = write!(out, "\x1b[{}A\x1b[J", screen.drawn);
    }
    screen.drawn = 0;
}

fn draw(screen: &mut Screen, lines: &[String]) {
    wipe(screen);
    let mut out = std::io::stderr().lock();
    for line in lines {
        let _ = writeln!(out, "{line}");
    }
    for bar in screen.bars.iter().take(BARS_MAX) {
        let _ = writeln!(out, "{}", line(&bar.digest, bar.size, bar.done.load(Ordering::Relaxed)));
    }
    screen.drawn = screen.bars.len().min(BARS_MAX);
    let _ = out.flush();
}

fn line(digest: &str, size: u64, done: u64) -> String {
    let full = (done.min(size) * WIDTH as u64).checked_div(size).unwrap_or(WIDTH as u64) as usize;
    let bar = format!("{}{}", "=".repeat(full), " ".repeat(WIDTH - full));
    format!("{} [{bar}] {} of {}", short(digest), bytes(done), bytes(size))
}

pub fn short(digest: &str) -> &str {
    digest.strip_prefix("sha256:").and_then(|d| d.get(..12)).unwrap_or(digest)
}

pub fn bytes(count: u64) -> String {
    let (mut value, mut unit) = (count as f64, "B");
    for next in ["kB", "MB", "GB", "TB"] {
        if value < 1000.0 {
            break;
        }
        (value, unit) = (value / 1000.0, next);
    }
    match unit {
        "B" => format!("{count} B"),
        _ if value < 10.0 => format!("{value:.2} {unit}"),
        _ if value < 100.0 => format!("{value:.1} {unit}"),
        _ => format!("{value:.0} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_and_numbers() {
        assert_eq!(
            ["0 B", "999 B", "1.00 kB", "12.3 MB", "4.00 GB"].map(String::from),
            [bytes(0), bytes(999), bytes(1000), bytes(12_300_000), bytes(4_000_000_000)]
        );
        let digest = format!("sha256:{}", "a".repeat(64));
        assert_eq!(
            line(&digest, 100, 50),
            format!("aaaaaaaaaaaa [{}{}] 50 B of 100 B", "=".repeat(14), " ".repeat(14))
        );
        assert!(line(&digest, 0, 0).contains(&"=".repeat(WIDTH)));
    }
}
