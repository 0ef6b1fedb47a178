//! The binary for a machine: this program itself where the architecture is the same, else one that lies beside it, as a
//! file of its own or in a release's bundle.
//!
//! The bundle is a plain tar archive with the binaries and their digests in `SHA256SUMS`. What stays true: a binary is read
//! from where it stands in the bundle, nothing is unpacked; what the bundle's own digests contradict is not used.
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use sampan_kinds::upgrade::release::Release;
use sha2::{Digest, Sha256};

/// A release in one file.
pub const BUNDLE: &str = "sampan-bundle.tar";
/// The digests within, as sha256sum writes them.
const SUMS: &str = "SHA256SUMS";
/// A bundle has a handful of members.
const MAX_MEMBERS: usize = 64;
const MAX_SUMS_BYTES: u64 = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    #[error(
        "there is no sampan for {arch} to send: this one is for {own}, and {looked} is not there, nor {BUNDLE} beside it \
         (--binary-dir names a release's bundle or the folder of its binaries)",
        looked = looked.display()
    )]
    Missing { arch: String, own: String, looked: PathBuf },
    #[error("there is no {name} in {bundle}", bundle = bundle.display())]
    NotInBundle { name: String, bundle: PathBuf },
    #[error("{path}: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is for {found}, not for {wanted}", path = path.display())]
    OtherArchitecture { path: PathBuf, found: String, wanted: String },
    #[error("{name} in {bundle} is damaged: its SHA-256 is {got}, not {want}", bundle = bundle.display())]
    Damaged { name: String, bundle: PathBuf, got: String, want: String },
}

/// A binary that can be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    /// The file that it is, or that it is in.
    pub path: PathBuf,
    /// Where it begins there.
    pub offset: u64,
    pub size_bytes: u64,
    pub arch: String,
    /// Hexadecimal SHA-256.
    pub digest: String,
    /// The release, as nodes show it; `None` where the file does not say.
    pub release: Option<String>,
}

impl Binary {
    /// The bytes, and no more.
    pub fn open(&self) -> std::io::Result<std::io::Take<File>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        Ok(file.take(self.size_bytes))
    }
}

/// This program's architecture in Kubernetes' words.
pub fn own_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// What an ELF file is made for, from its header.
pub fn elf_architecture(header: &[u8]) -> Option<&'static str> {
    if header.get(..4)? != b"\x7fELF" {
        return None;
    }
    match (header.get(4)?, u16::from_le_bytes([*header.get(18)?, *header.get(19)?])) {
        (2, 62) => Some("amd64"),
        (2, 183) => Some("arm64"),
        (1, 40) => Some("arm"),
        _ => Some("another machine"),
    }
}

/// Where a binary stands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    path: PathBuf,
    /// Offset, size and stated digest, for one in a bundle.
    member: Option<(u64, u64, Option<String>)>,
}

/// Finds and reads the binary for `arch`: in `from` (a bundle, or a folder of binaries or with a bundle), else
/// `sampan-ARCH` beside this program (`own`), this program, or a bundle beside it.
pub fn find(arch: &str, from: Option<&Path>, own: &Path) -> Result<Binary, BinaryError> {
    let name = format!("sampan-{arch}");
    if let Some(bundle) = from.filter(|from| from.is_file()) {
        let place = in_bundle(bundle, &name)?;
        let missing = || BinaryError::NotInBundle { name: name.clone(), bundle: bundle.to_path_buf() };
        return read_once(&place.ok_or_else(missing)?, arch);
    }
    let folder = from.or(own.parent()).unwrap_or(Path::new("."));
    let (looked, bundle) = (folder.join(&name), folder.join(BUNDLE));
    if looked.is_file() {
        return read_once(&Place { path: looked, member: None }, arch);
    }
    let own_fits = arch == own_architecture();
    if own_fits && from.is_none() {
        return read_once(&Place { path: own.to_path_buf(), member: None }, arch);
    }
    if bundle.is_file()
        && let Some(place) = in_bundle(&bundle, &name)?
    {
        return read_once(&place, arch);
    }
    if own_fits {
        return read_once(&Place { path: own.to_path_buf(), member: None }, arch);
    }
    Err(BinaryError::Missing { arch: arch.to_string(), own: own_architecture().to_string(), looked })
}

/// All binaries of a folder, files and members of bundles, each with why it cannot be used where it cannot.
pub fn list(folder: &Path, architectures: &[&str]) -> Vec<Result<Binary, BinaryError>> {
    let mut found = Vec::new();
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    names.sort();
    for path in names.into_iter().filter(|path| path.is_file()).take(MAX_MEMBERS) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        if name.ends_with(".tar") {
            match members(&path) {
                Ok(places) => {
                    for arch in architectures {
                        if let Some(place) = places.get(&format!("sampan-{arch}")) {
                            found.push(read_once(place, arch));
                        }
                    }
                }
                Err(error) => found.push(Err(error)),
            }
        } else if let Some(arch) = architectures.iter().find(|arch| name == format!("sampan-{arch}")) {
            found.push(read_once(&Place { path, member: None }, arch));
        }
    }
    found
}

/// Another program for `arch` in that folder, by the name `NAME-ARCH`; `None` when it is not there.
pub fn beside(folder: &Path, name: &str, arch: &str) -> Option<Result<Binary, BinaryError>> {
    let path = folder.join(format!("{name}-{arch}"));
    path.is_file().then(|| read_once(&Place { path, member: None }, arch))
}

/// This program.
pub fn own(path: &Path) -> Result<Binary, BinaryError> {
    read_once(&Place { path: path.to_path_buf(), member: None }, own_architecture())
}

fn in_bundle(bundle: &Path, name: &str) -> Result<Option<Place>, BinaryError> {
    Ok(members(bundle)?.remove(name))
}

/// The files of a bundle by name.
fn members(bundle: &Path) -> Result<BTreeMap<String, Place>, BinaryError> {
    let failed = |source| BinaryError::Read { path: bundle.to_path_buf(), source };
    let mut archive = tar::Archive::new(BufReader::new(File::open(bundle).map_err(failed)?));
    let (mut places, mut sums) = (BTreeMap::new(), BTreeMap::new());
    for entry in archive.entries_with_seek().map_err(failed)?.take(MAX_MEMBERS) {
        let mut entry = entry.map_err(failed)?;
        let path = entry.path().map_err(failed)?.into_owned();
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
        if name == SUMS {
            let mut text = String::new();
            (&mut entry).take(MAX_SUMS_BYTES).read_to_string(&mut text).map_err(failed)?;
            sums = parse_sums(&text);
        } else if entry.header().entry_type().is_file() {
            places.insert(name, (entry.raw_file_position(), entry.size()));
        }
    }
    let place = |(name, (offset, size)): (String, (u64, u64))| {
        let sum = sums.get(&name).cloned();
        (name, Place { path: bundle.to_path_buf(), member: Some((offset, size, sum)) })
    };
    Ok(places.into_iter().map(place).collect())
}

/// Digests by name, of lines as sha256sum writes them.
fn parse_sums(text: &str) -> BTreeMap<String, String> {
    let line = |line: &str| {
        let (digest, name) = line.split_once(char::is_whitespace)?;
        Some((name.trim_start_matches([' ', '*']).to_string(), digest.to_ascii_lowercase()))
    };
    text.lines().filter_map(line).collect()
}

/// Several machines at a time want the same binary: it is read once, and again when its file has changed.
fn read_once(place: &Place, arch: &str) -> Result<Binary, BinaryError> {
    static KNOWN: Mutex<Vec<(Place, u64, Option<SystemTime>, Binary)>> = Mutex::new(Vec::new());
    const MAX_KNOWN: usize = 32;
    let metadata = std::fs::metadata(&place.path);
    let metadata = metadata.map_err(|source| BinaryError::Read { path: place.path.clone(), source })?;
    let (size, changed) = (metadata.len(), metadata.modified().ok());
    let mut known = KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let same = |(p, s, c, b): &&(Place, u64, Option<SystemTime>, Binary)| {
        (p, *s, *c, b.arch.as_str()) == (place, size, changed, arch)
    };
    if let Some((.., binary)) = known.iter().find(same) {
        return Ok(binary.clone());
    }
    let binary = read(place, size, arch)?;
    known.retain(|(p, ..)| p != place);
    if known.len() >= MAX_KNOWN {
        known.remove(0);
    }
    known.push((place.clone(), size, changed, binary.clone()));
    Ok(binary)
}

fn read(place: &Place, file_bytes: u64, arch: &str) -> Result<Binary, BinaryError> {
    let path = &place.path;
    let failed = |source| BinaryError::Read { path: path.clone(), source };
    let (offset, size_bytes, stated) = place.member.clone().unwrap_or((0, file_bytes, None));
    let mut binary = Binary {
        path: path.clone(),
        offset,
        size_bytes,
        arch: arch.to_string(),
        digest: String::new(),
        release: None,
    };
    let mut file = binary.open().map_err(failed)?;
    let mut hash = Sha256::new();
    // the end of one piece is looked through again with the next, so that no mark is cut
    const OVERLAP: usize = 256;
    let mut buffer = vec![0; OVERLAP + 256 * 1024];
    let (mut kept, mut total) = (0, 0_u64);
    loop {
        let count = file.read(&mut buffer[kept..]).map_err(failed)?;
        if total == 0 {
            let found = elf_architecture(&buffer[..count]).unwrap_or("no machine: it is no ELF file");
            if found != arch {
                let (found, wanted) = (found.to_string(), arch.to_string());
                return Err(BinaryError::OtherArchitecture { path: path.clone(), found, wanted });
            }
        }
        if count == 0 {
            break;
        }
        total += count as u64;
        hash.update(&buffer[kept..kept + count]);
        let end = kept + count;
        if binary.release.is_none() {
            binary.release = Release::in_program(&buffer[..end]);
        }
        let from = end.saturating_sub(OVERLAP);
        buffer.copy_within(from..end, 0);
        kept = end - from;
    }
    if total != size_bytes {
        let short = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        return Err(failed(short));
    }
    binary.digest = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    match stated {
        Some(want) if want != binary.digest => Err(BinaryError::Damaged {
            name: format!("sampan-{arch}"),
            bundle: path.clone(),
            got: binary.digest,
            want,
        }),
        _ => Ok(binary),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(class: u8, machine: u16) -> Vec<u8> {
        let mut header = vec![0; 64];
        header[..4].copy_from_slice(b"\x7fELF");
        header[4] = class;
        header[18..20].copy_from_slice(&machine.to_le_bytes());
        header
    }

    #[test]
    fn the_right_binary() {
        let folder = tempfile::tempdir().unwrap();
        let own = std::env::current_exe().unwrap();
        let found = find(own_architecture(), None, &own).unwrap();
        assert_eq!(found.path, own);
        assert_eq!(found.size_bytes, std::fs::metadata(&own).unwrap().len());
        assert!(matches!(find("s390x", None, &own), Err(BinaryError::Missing { .. })));
        std::fs::write(folder.path().join("sampan-arm"), elf(1, 40)).unwrap();
        let arm = find("arm", Some(folder.path()), &own).unwrap();
        assert_eq!(arm.digest.len(), 64);
        std::fs::write(folder.path().join("etcd-arm"), elf(1, 40)).unwrap();
        assert_eq!(beside(folder.path(), "etcd", "arm").unwrap().unwrap().size_bytes, 64);
        assert!(beside(folder.path(), "etcd", "arm64").is_none());
        std::fs::write(folder.path().join("sampan-arm64"), elf(2, 62)).unwrap();
        let wrong = find("arm64", Some(folder.path()), &own).unwrap_err().to_string();
        assert!(wrong.contains("is for amd64, not for arm64"), "{wrong}");
        std::fs::write(folder.path().join("sampan-arm64"), "#!/bin/sh").unwrap();
        assert!(matches!(
            find("arm64", Some(folder.path()), &own),
            Err(BinaryError::OtherArchitecture { .. })
        ));
    }

    /// A bundle whose arm64 binary has its mark across the border of two pieces that are read.
    fn bundle(path: &Path, damaged: bool) -> Vec<u8> {
        let mut arm64 = elf(2, 183);
        arm64.resize(256 * 1024 + 240, b'x');
        arm64.extend_from_slice(b"sampan-release:v1.37.0+sampan0.3.0\n");
        arm64.resize(700_000, b'y');
        let digest: String = Sha256::digest(&arm64).iter().map(|b| format!("{b:02x}")).collect();
        let sums = format!("{digest}  sampan-arm64\n");
        if damaged {
            arm64[5000] = 0;
        }
        let mut tar = tar::Builder::new(File::create(path).unwrap());
        for (name, bytes) in
            [("sampan-arm", &elf(1, 40)), ("sampan-arm64", &arm64), (SUMS, &sums.into_bytes())]
        {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o755);
            tar.append_data(&mut header, format!("sampan-0.3.0/{name}"), bytes.as_slice()).unwrap();
        }
        tar.finish().unwrap();
        arm64
    }

    #[test]
    fn out_of_a_bundle() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(BUNDLE);
        let arm64 = bundle(&path, false);
        let own = folder.path().join("sampan");
        for from in [Some(path.as_path()), Some(folder.path()), None] {
            let found = find("arm64", from, &own).unwrap();
            assert_eq!(found.release.as_deref(), Some("v1.37.0+sampan0.3.0"), "{from:?}");
            let mut bytes = Vec::new();
            found.open().unwrap().read_to_end(&mut bytes).unwrap();
            assert!(bytes == arm64, "{from:?}");
        }
        assert!(matches!(find("amd64", Some(&path), &own), Err(BinaryError::NotInBundle { .. })));
        let all = list(folder.path(), &["amd64", "arm64", "arm"]);
        let archs: Vec<&str> = all.iter().flatten().map(|b| b.arch.as_str()).collect();
        assert_eq!(archs, ["arm64", "arm"]);
        std::fs::remove_file(&path).unwrap();
        bundle(&path, true);
        assert!(matches!(find("arm64", Some(&path), &own), Err(BinaryError::Damaged { .. })));
        std::fs::write(&path, "no archive").unwrap();
        assert!(find("arm64", Some(&path), &own).is_err());
    }
}
