//! The binary for a machine: this program itself where the architecture is the same, else one that lies beside it.
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use sha2::{Digest, Sha256};

#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    #[error(
        "there is no sampan for {arch} to send: this one is for {own}, and {looked} is not there (--binary-dir names the folder of a release's binaries)",
        looked = looked.display()
    )]
    Missing { arch: String, own: String, looked: PathBuf },
    #[error("{path}: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is for {found}, not for {wanted}", path = path.display())]
    OtherArchitecture { path: PathBuf, found: String, wanted: String },
}

/// A binary that can be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    pub path: PathBuf,
    pub arch: String,
    pub size_bytes: u64,
    /// Hexadecimal SHA-256.
    pub digest: String,
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

/// Finds and reads the binary for `arch`: this program (`own`), `sampan-ARCH` in `folder`, or beside this program.
pub fn find(arch: &str, folder: Option<&Path>, own: &Path) -> Result<Binary, BinaryError> {
    let name = format!("sampan-{arch}");
    let beside = own.parent().map(|p| p.join(&name));
    let looked = folder.map(|f| f.join(&name)).or(beside).unwrap_or_else(|| PathBuf::from(&name));
    let path = match looked.is_file() {
        true => looked,
        false if arch == own_architecture() => own.to_path_buf(),
        false => {
            let own = own_architecture().to_string();
            return Err(BinaryError::Missing { arch: arch.to_string(), own, looked });
        }
    };
    // several machines at a time want the same one: it is read once
    static KNOWN: Mutex<Vec<Binary>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let size_bytes = std::fs::metadata(&path).map(|m| m.len()).unwrap_or_default();
    if let Some(found) = known.iter().find(|b| b.path == path && b.size_bytes == size_bytes && b.arch == arch)
    {
        return Ok(found.clone());
    }
    let found = read(&path, arch)?;
    known.push(found.clone());
    Ok(found)
}

fn read(path: &Path, arch: &str) -> Result<Binary, BinaryError> {
    let failed = |source| BinaryError::Read { path: path.to_path_buf(), source };
    let mut file = File::open(path).map_err(failed)?;
    let (mut hash, mut size_bytes) = (Sha256::new(), 0);
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = file.read(&mut buffer).map_err(failed)?;
        if size_bytes == 0 {
            let found = elf_architecture(&buffer[..count]).unwrap_or("no machine: it is no ELF file");
            if found != arch {
                let (found, wanted) = (found.to_string(), arch.to_string());
                return Err(BinaryError::OtherArchitecture { path: path.to_path_buf(), found, wanted });
            }
        }
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        size_bytes += count as u64;
    }
    let digest = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    Ok(Binary { path: path.to_path_buf(), arch: arch.to_string(), size_bytes, digest })
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
        std::fs::write(folder.path().join("sampan-arm64"), elf(2, 62)).unwrap();
        let wrong = find("arm64", Some(folder.path()), &own).unwrap_err().to_string();
        assert!(wrong.contains("is for amd64, not for arm64"), "{wrong}");
        std::fs::write(folder.path().join("sampan-arm64"), "#!/bin/sh").unwrap();
        assert!(matches!(
            find("arm64", Some(folder.path()), &own),
            Err(BinaryError::OtherArchitecture { .. })
        ));
    }
}
