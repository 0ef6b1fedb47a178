//! What was written over layers becomes a layer of its own.
//!
//! Upstream counterpart: containerd's overlay differ. The tar is that of [`sampan_image::repack`] (sorted, whiteouts,
//! attributes, links), packed by gzip without a name or a time, so the same files give the same bytes. With
//! SOURCE_DATE_EPOCH younger times become that, in the folder too: later steps see what the tar says.
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use sampan_image::manifest::hex_digest;
use sampan_image::repack::repack;
use sha2::{Digest, Sha256};

use crate::error::{BuildError, io_error};
use crate::store::{GZIP_LAYER, Layer, Scratch, Store, folder_name};

const DEPTH_MAX: usize = 512;

/// Digests what goes through.
struct Digesting<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[derive(Default)]
struct Seen {
    entries: u64,
    bytes: u64,
}

/// The layer that `upper` makes over `below`; `None` when nothing was written.
pub fn commit(
    store: &Store,
    scratch: &Scratch,
    below: &[Layer],
    upper: &Path,
    epoch_s: Option<i64>,
) -> Result<Option<Layer>, BuildError> {
    let packing = |e: io::Error| store.io("packing a layer".into(), e);
    let mut seen = Seen::default();
    settle(upper, epoch_s, 0, &mut seen).map_err(io_error("reading what a step wrote"))?;
    if seen.entries == 0 {
        return Ok(None);
    }
    let blob = scratch.blob().map_err(packing)?;
    let packed = GzEncoder::new(io::BufWriter::with_capacity(128 * 1024, blob), Compression::default());
    let mut plain = Digesting { inner: packed, hash: Sha256::new() };
    repack(upper, &mut plain).map_err(packing)?;
    let diff_id = hex_digest(&plain.hash.finalize());
    let blob = plain.inner.finish().and_then(|buffered| buffered.into_inner().map_err(|e| e.into_error()));
    let blob = blob.map_err(packing)?;
    let layer = Layer {
        folder: folder_name(below, &diff_id),
        diff_id,
        digest: blob.digest(),
        size_bytes: blob.size_bytes(),
        media_type: GZIP_LAYER.into(),
        unpacked_bytes: seen.bytes,
    };
    store.keep_layer(&layer, &blob.path, upper)?;
    Ok(Some(layer))
}

/// Counts what is there, and makes no time younger than `epoch_s`.
fn settle(folder: &Path, epoch_s: Option<i64>, depth: usize, seen: &mut Seen) -> io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(io::Error::other("folders nested too deep"));
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let meta = fs::symlink_metadata(&path)?;
        seen.entries += 1;
        seen.bytes += meta.blocks() * 512;
        if meta.is_dir() {
            settle(&path, epoch_s, depth + 1, seen)?;
        }
        if let Some(epoch) =
            epoch_s.filter(|e| meta.mtime() > *e || (meta.mtime() == *e && meta.mtime_nsec() > 0))
        {
            let time = Timespec { tv_sec: epoch, tv_nsec: 0 };
            let times = Timestamps { last_access: time, last_modification: time };
            utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_give_the_same_layer() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), "none-such").unwrap();
        let scratch = store.scratch().unwrap();
        let mut digests = Vec::new();
        for time in [1_700_000_000, 1_800_000_000] {
            let upper = scratch.place("upper");
            fs::create_dir_all(upper.join("a")).unwrap();
            fs::write(upper.join("a/old"), "x").unwrap();
            fs::write(upper.join("a/new"), "y").unwrap();
            let set = |name: &str, s: i64| {
                let time = Timespec { tv_sec: s, tv_nsec: 5 };
                let times = Timestamps { last_access: time, last_modification: time };
                utimensat(CWD, upper.join(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
            };
            set("a/old", 1000);
            set("a/new", time);
            set("a", time);
            let layer = commit(&store, &scratch, &[], &upper, Some(1_600_000_000)).unwrap().unwrap();
            assert!(store.has_layer(&layer));
            let meta = fs::metadata(store.layers_folder().join(&layer.folder).join("a/new")).unwrap();
            assert_eq!(meta.mtime(), 1_600_000_000);
            let meta = fs::metadata(store.layers_folder().join(&layer.folder).join("a/old")).unwrap();
            assert_eq!(meta.mtime(), 1000);
            digests.push((layer.digest, layer.diff_id));
        }
        assert_eq!(digests[0], digests[1]);
        let empty = scratch.place("upper");
        fs::create_dir(&empty).unwrap();
        assert!(commit(&store, &scratch, &[], &empty, None).unwrap().is_none());
    }
}
