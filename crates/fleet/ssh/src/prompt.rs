//! Asking the owner at the terminal: secrets without echo, and yes or no.
use std::fs::File;
use std::io::{BufRead, BufReader, Write};

use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

/// A password or passphrase; it is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// Somebody who can be asked. `None` says that nobody is there. Called from threads that may block.
pub trait Ask: Send + Sync {
    fn secret(&self, prompt: &str) -> Option<Secret>;
    fn confirm(&self, question: &str) -> Option<bool>;
}

/// For runs without anybody watching.
pub struct Nobody;

impl Ask for Nobody {
    fn secret(&self, _: &str) -> Option<Secret> {
        None
    }
    fn confirm(&self, _: &str) -> Option<bool> {
        None
    }
}

/// The controlling terminal, whatever standard input is.
pub struct Terminal {
    /// One question at a time, also from several connections.
    turn: std::sync::Mutex<()>,
}

impl Terminal {
    /// `None` when there is no terminal, or nobody to look at what is asked.
    pub fn open() -> Option<Self> {
        let watched = rustix::termios::isatty(rustix::stdio::stderr());
        (watched && tty().is_some()).then(|| Self { turn: std::sync::Mutex::new(()) })
    }

    fn line(&self, prompt: &str, echo: bool) -> Option<String> {
        let _turn = self.turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut tty = tty()?;
        let before = tcgetattr(&tty).ok()?;
        if !echo {
            let mut silent = before.clone();
            silent.local_modes.remove(LocalModes::ECHO);
            silent.local_modes.insert(LocalModes::ECHONL);
            tcsetattr(&tty, OptionalActions::Flush, &silent).ok()?;
        }
        let asked = tty.write_all(prompt.as_bytes()).and_then(|()| tty.flush());
        let mut line = String::new();
        let read = asked.and_then(|()| BufReader::new(&tty).read_line(&mut line));
        let _ = tcsetattr(&tty, OptionalActions::Now, &before);
        match read {
            Ok(1..) => Some(line.trim_end_matches(['\r', '\n']).to_string()),
            _ => None,
        }
    }
}

fn tty() -> Option<File> {
    File::options().read(true).write(true).open("/dev/tty").ok()
}

impl Ask for Terminal {
    fn secret(&self, prompt: &str) -> Option<Secret> {
        self.line(&format!("{prompt}: "), false).map(Secret)
    }

    fn confirm(&self, question: &str) -> Option<bool> {
        for _ in 0..3 {
            let answer = self.line(&format!("{question} [yes/no] "), true)?;
            match answer.trim().to_lowercase().as_str() {
                "yes" | "y" => return Some(true),
                "no" | "n" => return Some(false),
                _ => {}
            }
        }
        Some(false)
    }
}
