//! ADD's sources that are no plain files: URLs, and archives to be unpacked.
//!
//! Upstream counterparts: BuildKit's `source/http` and the file backend's `unpack`. A URL's file gets the mode 0600 and
//! the time that the server says, as Docker has it. An archive is unpacked into a folder of the build's own, with all
//! the runtime does against hostile ones, and copied from there.
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use sampan_image::client::FetchError;
use sampan_image::download::download;
use tokio::runtime::Handle;

use crate::error::{BuildError, io_error, refused};
use crate::store::{Scratch, Store};

/// A URL's content in a folder of its own: the folder, and the file's name in it.
pub struct Remote {
    pub folder: PathBuf,
    pub name: String,
    pub digest: String,
}

pub fn is_url(source: &str) -> bool {
    source.starts_with("http://") || source.starts_with("https://")
}

/// What BuildKit takes for a repository.
pub fn is_git(source: &str) -> bool {
    let schemes = ["git://", "git@", "ssh://", "git+"];
    schemes.iter().any(|s| source.starts_with(s))
        || (is_url(source) && source.split('#').next().is_some_and(|s| s.ends_with(".git")))
}

/// Fetches a URL; `checksum` is `sha256:…`.
pub fn fetch(
    store: &Store,
    scratch: &Scratch,
    runtime: &Handle,
    url: &str,
    checksum: Option<&str>,
) -> Result<Remote, BuildError> {
    let writing = |e: io::Error| store.io(format!("downloading {url}"), e);
    if let Some(checksum) = checksum
        && !sampan_image::reference::is_digest(checksum)
    {
        return Err(refused(format!(
            "--checksum={checksum}: only sha256:… (64 hexadecimal digits) can be checked"
        )));
    }
    let mut blob = scratch.blob().map_err(writing)?;
    let answer = runtime.block_on(download(url, &mut blob)).map_err(|e| match e {
        FetchError::Image(e) => refused(e.to_string()),
        FetchError::Sink(e) => writing(e),
    })?;
    let digest = blob.digest();
    if let Some(wanted) = checksum.filter(|w| *w != digest) {
        return Err(refused(format!("{url}: its digest is {digest}, not the {wanted} that --checksum says")));
    }
    let path = url.split(['?', '#']).next().unwrap_or(url);
    let path =
        path.split_once("://").map_or("", |(_, rest)| rest.split_once('/').map_or("", |(_, path)| path));
    let last = path.rsplit('/').next().filter(|n| !n.is_empty() && *n != "." && *n != "..");
    let name = last.unwrap_or("__unnamed__").to_string();
    let folder = scratch.place("url");
    fs::create_dir(&folder).map_err(writing)?;
    let file = folder.join(&name);
    fs::rename(&blob.path, &file).map_err(writing)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).map_err(writing)?;
    let modified = answer.modified.as_deref().and_then(http_date).unwrap_or(Timestamp::UNIX_EPOCH);
    File::open(&file).and_then(|f| f.set_modified(modified.into())).map_err(writing)?;
    Ok(Remote { folder, name, digest })
}

/// `Wed, 21 Oct 2015 07:28:00 GMT`
fn http_date(text: &str) -> Option<Timestamp> {
    let text = text.trim().strip_suffix(" GMT")?;
    let (_, rest) = text.split_once(", ")?;
    let mut parts = rest.split(' ');
    let day: i8 = parts.next()?.parse().ok()?;
    let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let name = parts.next()?;
    let month = months.iter().position(|m| *m == name)? + 1;
    let year: i16 = parts.next()?.parse().ok()?;
    let time = parts.next()?;
    format!("{year:04}-{month:02}-{day:02}T{time}Z").parse().ok()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packed {
    Plain,
    Gzip,
    Zstd,
    /// Known, but nothing here reads it.
    Unreadable(&'static str),
}

/// Whether a file is an archive, by its first bytes; `None` is for all else.
pub fn archive(mut file: File) -> io::Result<Option<Packed>> {
    let mut head = [0; 512];
    let mut got = 0;
    while got < head.len() {
        match file.read(&mut head[got..])? {
            0 => break,
            n => got += n,
        }
    }
    let packed = match &head[..got] {
        [0x1f, 0x8b, ..] => Packed::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Packed::Zstd,
        [b'B', b'Z', b'h', ..] => return Ok(Some(Packed::Unreadable("bzip2"))),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => return Ok(Some(Packed::Unreadable("xz"))),
        _ => Packed::Plain,
    };
    io::Seek::seek(&mut file, io::SeekFrom::Start(0))?;
    let reader: Box<dyn Read> = match packed {
        Packed::Gzip => Box::new(flate2::read::MultiGzDecoder::new(file)),
        Packed::Zstd => match ruzstd::decoding::StreamingDecoder::new(io::BufReader::new(file)) {
            Ok(decoder) => Box::new(decoder),
            Err(_) => return Ok(None),
        },
        _ => Box::new(file),
    };
    // as upstream: it is one when its first entry can be read
    let mut tar = tar::Archive::new(reader.take(1 << 20));
    let first = tar.entries()?.next();
    Ok(matches!(first, Some(Ok(_))).then_some(packed))
}

/// Unpacks an archive below the build's folder.
pub fn unpack(store: &Store, scratch: &Scratch, file: File, name: &str) -> Result<PathBuf, BuildError> {
    let folder = scratch.place("unpacked");
    fs::create_dir(&folder).map_err(io_error("unpacking an archive"))?;
    let limits = sampan_runtime::Limits::default();
    match sampan_runtime::unpack(file, &folder, &[], &limits) {
        Ok(_) => Ok(folder),
        Err(sampan_runtime::UnpackError::NoSpace) => {
            Err(store.io(format!("unpacking {name}"), rustix::io::Errno::NOSPC.into()))
        }
        Err(sampan_runtime::UnpackError::Io(e)) if crate::error::is_full(&e) => {
            Err(store.io(format!("unpacking {name}"), e))
        }
        Err(e) => Err(refused(format!("{name}: {e}"))),
    }
}

/// A heredoc's file in a folder of its own.
pub fn inline(scratch: &Scratch, name: &str, contents: &str, mode: u32) -> Result<PathBuf, BuildError> {
    let writing = || io_error(format!("writing {name}"));
    let folder = scratch.place("inline");
    fs::create_dir(&folder).map_err(writing())?;
    let path = folder.join(name);
    fs::write(&path, contents).map_err(writing())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(writing())?;
    // the content is in the Dockerfile: it has no time of its own
    File::open(&path).and_then(|f| f.set_modified(std::time::SystemTime::UNIX_EPOCH)).map_err(writing())?;
    Ok(folder)
}

/// Names that heredocs may have: no path leads elsewhere.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name != "."
        && name != ".."
        && !name.contains('/')
        && Path::new(name).file_name().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn sources_are_told_apart() {
        for (source, git) in [
            ("https://example.com/a.tar.gz", false),
            ("https://github.com/o/r.git", true),
            ("https://github.com/o/r.git#main:sub", true),
            ("git@github.com:o/r", true),
            ("dir.git", false),
        ] {
            assert_eq!(is_git(source), git, "{source}");
        }
        let date = http_date("Wed, 21 Oct 2015 07:28:00 GMT").unwrap();
        assert_eq!(date.to_string(), "2015-10-21T07:28:00Z");
        assert!(http_date("yesterday").is_none());
        assert!(is_plain_name("EOF") && !is_plain_name("../x") && !is_plain_name(".."));
    }

    #[test]
    fn archives_are_known_by_their_bytes() {
        let of = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            io::Seek::seek(&mut file, io::SeekFrom::Start(0)).unwrap();
            archive(file).unwrap()
        };
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        tar.append_data(&mut header, "a", &b"x"[..]).unwrap();
        let plain = tar.into_inner().unwrap();
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&plain).unwrap();
        assert_eq!(of(&plain), Some(Packed::Plain));
        assert_eq!(of(&packed.finish().unwrap()), Some(Packed::Gzip));
        let mut text = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        text.write_all(b"only a packed text, no archive").unwrap();
        assert_eq!(of(&text.finish().unwrap()), None);
        assert_eq!(of(b"text"), None);
        assert_eq!(of(b""), None);
        assert_eq!(of(b"\xfd7zXZ\0..."), Some(Packed::Unreadable("xz")));
    }
}
