//! What a release consists of besides its binaries: `SHA256SUMS`, as sha256sum writes it, and the bundle with everything,
//! from which `sampan install --binary-dir` and a server take the binary that fits.
//!
//! The bundle is a tar archive without compression, so that a binary is read from where it stands in it; the same
//! binaries make the same bundle, byte for byte.
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// As `sampan install` looks for it.
pub const BUNDLE: &str = "sampan-bundle.tar";
const SUMS: &str = "SHA256SUMS";

fn digest(path: &Path) -> Result<String> {
    let mut file = BufReader::new(File::open(path).with_context(|| format!("reading {}", path.display()))?);
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 256 * 1024]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Writes the digests beside the files, and gives them.
pub fn sums(dist: &Path, names: &[String]) -> Result<String> {
    let mut text = String::new();
    for name in names {
        text.push_str(&format!("{}  {name}\n", digest(&dist.join(name))?));
    }
    std::fs::write(dist.join(SUMS), &text)?;
    Ok(text)
}

/// Packs the files and their digests; the bundle takes its name when it is whole.
pub fn bundle(dist: &Path, names: &[String], sums: &str) -> Result<()> {
    let (path, part) = (dist.join(BUNDLE), dist.join(format!("{BUNDLE}.part")));
    let mut archive = tar::Builder::new(BufWriter::new(File::create(&part)?));
    let header = |size: u64, mode: u32| {
        let mut header = tar::Header::new_ustar();
        header.set_size(size);
        header.set_mode(mode);
        header.set_mtime(0);
        header
    };
    // first, so that it is there before what it speaks for
    archive.append_data(&mut header(sums.len() as u64, 0o644), SUMS, sums.as_bytes())?;
    for name in names {
        let file = File::open(dist.join(name))?;
        archive.append_data(&mut header(file.metadata()?.len(), 0o755), name, BufReader::new(file))?;
    }
    archive.into_inner()?.flush()?;
    std::fs::rename(&part, &path)?;
    println!("{}: {:.1} MB", path.display(), std::fs::metadata(&path)?.len() as f64 / 1e6);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_bundle_of_stand_ins() {
        let folder = tempfile::tempdir().unwrap();
        let dist = folder.path();
        let names = ["sampan-amd64", "sampan-arm64"].map(String::from);
        for (name, size) in names.iter().zip([70_000, 513]) {
            std::fs::write(dist.join(name), vec![name.len() as u8; size]).unwrap();
        }
        let text = sums(dist, &names).unwrap();
        bundle(dist, &names, &text).unwrap();
        let first = std::fs::read(dist.join(BUNDLE)).unwrap();
        bundle(dist, &names, &text).unwrap();
        assert!(first == std::fs::read(dist.join(BUNDLE)).unwrap(), "the same binaries make the same bundle");
        // the tools that everybody has agree
        let out = dist.join("out");
        std::fs::create_dir(&out).unwrap();
        let ran = |program: &str, args: &[&str]| {
            let status = Command::new(program)
                .args(args)
                .current_dir(&out)
                .stdout(std::process::Stdio::null())
                .status();
            assert!(status.unwrap().success(), "{program}");
        };
        ran("tar", &["-xf", "../sampan-bundle.tar"]);
        ran("sha256sum", &["--check", "--strict", "SHA256SUMS"]);
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(out.join("sampan-arm64")).unwrap().permissions().mode() & 0o777, 0o755);
    }
}
