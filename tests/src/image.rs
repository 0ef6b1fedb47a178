//! Images made at test time: one static busybox, and broken variants of it.
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What pods of the tests run.
pub const BOX: &str = "sampan.test/box:1";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// An image of one platform: blobs by digest, and the manifest among them.
#[derive(Clone)]
pub struct Image {
    pub name: String,
    pub blobs: BTreeMap<String, Vec<u8>>,
    pub manifest: String,
    pub layer: String,
}

/// An entry of a layer.
pub enum Entry<'a> {
    Folder(&'a str, u32),
    File(&'a str, u32, &'a [u8]),
    Link(&'a str, &'a str),
}

pub fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().fold("sha256:".to_string(), |text, byte| text + &format!("{byte:02x}"))
}

pub fn own_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A tar written by hand where need be: `tar::Builder` refuses `..`, which is the point of one test.
pub fn layer(entries: &[Entry<'_>]) -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        let (path, mode, data, kind) = match entry {
            Entry::Folder(path, mode) => (path, *mode, &b""[..], tar::EntryType::Directory),
            Entry::File(path, mode, data) => (path, *mode, *data, tar::EntryType::Regular),
            Entry::Link(path, target) => {
                header.set_link_name_literal(target)?;
                (path, 0o777, &b""[..], tar::EntryType::Symlink)
            }
        };
        let name = &mut header.as_old_mut().name;
        let bytes = path.as_bytes();
        name.get_mut(..bytes.len()).context("a short path")?.copy_from_slice(bytes);
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data)?;
    }
    Ok(builder.into_inner()?)
}

impl Image {
    /// An image of one layer, given as tar, for this machine.
    pub fn new(name: &str, tar: &[u8], run: Value) -> Result<Self> {
        Self::of_arch(own_arch(), name, tar, run)
    }

    pub fn of_arch(arch: &str, name: &str, tar: &[u8], run: Value) -> Result<Self> {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(tar)?;
        let packed = packed.finish()?;
        let mut blobs = BTreeMap::new();
        let mut add = |bytes: Vec<u8>, media_type: &str| {
            let descriptor = json!({"mediaType": media_type, "digest": digest(&bytes), "size": bytes.len()});
            blobs.insert(digest(&bytes), bytes);
            descriptor
        };
        let layer = digest(&packed);
        let layers = json!([add(packed, LAYER)]);
        let config = json!({
            "architecture": arch, "os": "linux", "config": run,
            "rootfs": {"type": "layers", "diff_ids": [digest(tar)]},
        });
        let config = add(config.to_string().into_bytes(), CONFIG);
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        let manifest = manifest.to_string().into_bytes();
        let top = digest(&manifest);
        add(manifest, MANIFEST);
        Ok(Self { name: name.to_string(), blobs, manifest: top, layer })
    }

    /// As an OCI archive.
    pub fn write_archive(&self, path: &Path) -> Result<()> {
        let manifest = self.blobs.get(&self.manifest).context("the manifest")?;
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": MANIFEST, "digest": self.manifest, "size": manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": self.name, "io.containerd.image.name": self.name},
        }]});
        let mut tar = tar::Builder::new(std::fs::File::create(path)?);
        let mut add = |name: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, bytes)
        };
        add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        add("index.json", index.to_string().as_bytes())?;
        for (digest, bytes) in &self.blobs {
            add(&format!("blobs/{}", digest.replacen(':', "/", 1)), bytes)?;
        }
        tar.finish()?;
        Ok(())
    }
}

/// [`BOX`]: busybox with all its applets, running nothing by itself.
pub fn box_image() -> Result<Image> {
    Image::new(BOX, &box_layer()?, json!({"Env": ["PATH=/bin"], "Cmd": ["sleep", "100000"]}))
}

pub fn box_layer() -> Result<Vec<u8>> {
    let program = std::fs::read(busybox()?)?;
    let applets = std::process::Command::new(busybox()?).arg("--list").output()?.stdout;
    let applets = String::from_utf8(applets)?;
    let links: Vec<String> =
        applets.lines().filter(|a| *a != "busybox").map(|a| format!("bin/{a}")).collect();
    let mut entries: Vec<Entry<'_>> =
        ["bin/", "etc/", "proc/", "sys/", "dev/", "root/"].map(|f| Entry::Folder(f, 0o755)).into();
    entries.push(Entry::Folder("tmp/", 0o1777));
    entries.push(Entry::File("bin/busybox", 0o755, &program));
    entries.push(Entry::File(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:\n",
    ));
    entries.push(Entry::File("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n"));
    // not a program of any machine
    entries.push(Entry::File(
        "bin/foreign",
        0o755,
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xf7\x00nothing",
    ));
    entries.extend(links.iter().map(|l| Entry::Link(l, "busybox")));
    layer(&entries)
}

/// A busybox of this machine that needs no library.
fn busybox() -> Result<PathBuf> {
    let places = ["/bin/busybox", "/usr/bin/busybox", "/usr/local/bin/busybox"].map(PathBuf::from);
    if let Some(found) = places.iter().find(|p| std::fs::read(p).is_ok_and(|b| is_static(&b))) {
        return Ok(found.clone());
    }
    from_debian()
}

/// Out of Debian's package, as the examples' images are made; kept for the next run.
fn from_debian() -> Result<PathBuf> {
    let folder =
        std::env::current_exe()?.ancestors().nth(3).context("the target folder")?.join("tmp/busybox");
    let program = ["bin/busybox", "usr/bin/busybox"].map(|p| folder.join(p));
    if let Some(found) = program.iter().find(|p| p.exists()) {
        return Ok(found.clone());
    }
    std::fs::create_dir_all(&folder)?;
    let script = "apt-get -qq download busybox-static || { apt-get -qq update && apt-get -qq download busybox-static; }
        dpkg-deb -x busybox-static_*.deb .";
    let ran = std::process::Command::new("sh").args(["-ec", script]).current_dir(&folder).output()?;
    match program.iter().find(|p| p.exists()) {
        Some(found) => Ok(found.clone()),
        None => bail!(
            "no static busybox on this machine, and Debian's busybox-static did not come: {}",
            String::from_utf8_lossy(&ran.stderr)
        ),
    }
}

/// An ELF program without an interpreter (PT_INTERP), 64-bit or 32-bit, little-endian.
fn is_static(bytes: &[u8]) -> bool {
    let number = |at: usize, size: usize| -> Option<usize> {
        let field = bytes.get(at..at + size)?;
        Some(field.iter().rev().fold(0, |n, b| n << 8 | usize::from(*b)))
    };
    let parse = || -> Option<bool> {
        if bytes.get(..4)? != b"\x7fELF" {
            return None;
        }
        let wide = *bytes.get(4)? == 2;
        let (offset, size, count) = match wide {
            true => (number(32, 8)?, number(54, 2)?, number(56, 2)?),
            false => (number(28, 4)?, number(42, 2)?, number(44, 2)?),
        };
        Some((0..count).all(|i| number(offset + i * size, 4) != Some(3)))
    };
    parse().unwrap_or(false)
}
