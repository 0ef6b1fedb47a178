//! Container logs in the CRI's format: `<time> <stream> <P|F> <text>`.
//!
//! Upstream counterpart: containerd's CRI logger: lines over 16 KiB are parted (`P`), and so is a last line without
//! its newline. A full disk loses lines, never blocks the container.
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub const LINE_MAX_BYTES: usize = 16 * 1024;

pub struct Log {
    file: Option<File>,
}

/// What one stream has said since its last newline.
#[derive(Default)]
pub struct Pending(Vec<u8>);

impl Log {
    pub fn open(path: &Path) -> io::Result<Log> {
        let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path)?;
        Ok(Log { file: Some(file) })
    }

    pub fn reopen(&mut self, path: &Path) -> io::Result<()> {
        *self = Log::open(path)?;
        Ok(())
    }

    /// Takes what was read from a stream.
    pub fn take(&mut self, stream: &str, pending: &mut Pending, bytes: &[u8]) {
        let mut out = Vec::new();
        split(stream, pending, bytes, &stamp(), &mut out);
        self.put(&out);
    }

    /// The stream has ended.
    pub fn end(&mut self, stream: &str, pending: &mut Pending) {
        let rest = std::mem::take(&mut pending.0);
        if !rest.is_empty() {
            let mut out = Vec::new();
            line(&stamp(), stream, 'P', &rest, &mut out);
            self.put(&out);
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.file {
            let _ = file.write_all(bytes);
        }
    }
}

fn line(stamp: &str, stream: &str, tag: char, text: &[u8], out: &mut Vec<u8>) {
    let mut head = String::with_capacity(64);
    let _ = write!(head, "{stamp} {stream} {tag} ");
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(text);
    out.push(b'\n');
}

fn split(stream: &str, pending: &mut Pending, mut bytes: &[u8], stamp: &str, out: &mut Vec<u8>) {
    while !bytes.is_empty() {
        let room = LINE_MAX_BYTES - pending.0.len();
        let newline = bytes.iter().take(room + 1).position(|b| *b == b'\n');
        let (text, tag, used) = match newline {
            Some(at) => (&bytes[..at], 'F', at + 1),
            None if bytes.len() > room => (&bytes[..room], 'P', room),
            None => {
                pending.0.extend_from_slice(bytes);
                return;
            }
        };
        if pending.0.is_empty() {
            line(stamp, stream, tag, text, out);
        } else {
            let mut whole = std::mem::take(&mut pending.0);
            whole.extend_from_slice(text);
            line(stamp, stream, tag, &whole, out);
        }
        bytes = &bytes[used..];
    }
}

/// Now, as RFC 3339 with nanoseconds. Through the world's clock, so that a lab's clock jumps show.
fn stamp() -> String {
    format!("{:.9}", sampan_world::clock::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parted_as_the_cri_wants() {
        let long = "x".repeat(LINE_MAX_BYTES);
        for (pieces, wanted) in [
            (vec!["a\nb\n".to_string()], "T s F a\nT s F b\n".to_string()),
            (vec!["a".into(), "b\n\n".into()], "T s F ab\nT s F \n".into()),
            (vec![format!("{long}\n")], format!("T s F {long}\n")),
            (vec![format!("{long}y\n")], format!("T s P {long}\nT s F y\n")),
            (vec![long.clone(), "\n".into()], format!("T s F {long}\n")),
            (vec![long.clone(), "y".into(), "\n".into()], format!("T s P {long}\nT s F y\n")),
            (vec![format!("{long}{long}z")], format!("T s P {long}\nT s P {long}\n")),
        ] {
            let (mut pending, mut out) = (Pending::default(), Vec::new());
            for piece in &pieces {
                split("s", &mut pending, piece.as_bytes(), "T", &mut out);
            }
            assert!(out == wanted.as_bytes(), "{:.60?} gave {:.80?}", pieces, String::from_utf8_lossy(&out));
        }
        assert_eq!(stamp().len(), "2016-10-06T00:17:09.669794202Z".len());
    }
}
