//! hostPath: a path of the node, of the type that the pod says.
//!
//! Upstream counterpart: pkg/volume/hostpath, whose messages these are.
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Volume;

use super::Plugin;
use crate::{Mounted, SetUp, VolumeError};

pub static PLUGIN: HostPath = HostPath;

pub struct HostPath;

#[async_trait]
impl Plugin for HostPath {
    fn name(&self) -> &'static str {
        "hostPath"
    }

    fn supports(&self, volume: &Volume) -> bool {
        volume.host_path.is_some()
    }

    async fn set_up(&self, set_up: &SetUp<'_>) -> Result<Mounted, VolumeError> {
        let Some(source) = &set_up.volume.host_path else {
            return Err(VolumeError::Invalid("spec does not reference an HostPath volume type".to_string()));
        };
        let path = Path::new(&source.path);
        if path.components().any(|c| matches!(c, std::path::Component::ParentDir)) {
            return Err(VolumeError::Invalid(format!(
                "invalid HostPath `{}`: must not contain '..'",
                source.path
            )));
        }
        check(path, source.type_.as_deref().unwrap_or_default())?;
        Ok(Mounted::at(path))
    }
}

fn check(path: &Path, kind: &str) -> Result<(), VolumeError> {
    let metadata = fs::metadata(path).ok();
    let is = |test: fn(&fs::FileType) -> bool| metadata.as_ref().is_some_and(|m| test(&m.file_type()));
    let (ok, what) = match kind {
        "" => {
            // as upstream's runtimes do: a missing path becomes a folder
            if metadata.is_none() && fs::symlink_metadata(path).is_err() {
                make_dir(path)?;
            }
            return Ok(());
        }
        "DirectoryOrCreate" if metadata.is_none() => return make_dir(path),
        "DirectoryOrCreate" | "Directory" => (is(fs::FileType::is_dir), "directory"),
        "FileOrCreate" if metadata.is_none() => return make_file(path),
        "FileOrCreate" | "File" => (is(fs::FileType::is_file), "file"),
        "Socket" => (is(fs::FileType::is_socket), "socket file"),
        "CharDevice" => (is(fs::FileType::is_char_device), "character device"),
        "BlockDevice" => (is(fs::FileType::is_block_device), "block device"),
        other => return Err(VolumeError::Invalid(format!("{other} is an invalid volume type"))),
    };
    match ok {
        true => Ok(()),
        false => Err(VolumeError::Invalid(format!(
            "hostPath type check failed: {} is not a {what}",
            path.display()
        ))),
    }
}

fn make_dir(path: &Path) -> Result<(), VolumeError> {
    fs::create_dir_all(path).map_err(VolumeError::io(format!("making {}", path.display())))
}

fn make_file(path: &Path) -> Result<(), VolumeError> {
    let made = fs::OpenOptions::new().create(true).append(true).open(path);
    made.and_then(|f| f.set_permissions(fs::Permissions::from_mode(0o644)))
        .map_err(VolumeError::io(format!("making {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_checked_with_upstreams_words() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let cases = [
            ("", "Directory", None),
            ("file", "File", None),
            ("made", "DirectoryOrCreate", None),
            ("made", "Directory", None),
            ("made.txt", "FileOrCreate", None),
            ("made.txt", "File", None),
            ("none", "Directory", Some("is not a directory")),
            ("file", "DirectoryOrCreate", Some("is not a directory")),
            ("made", "File", Some("is not a file")),
            ("file", "Socket", Some("is not a socket file")),
            ("file", "CharDevice", Some("is not a character device")),
            ("file", "BlockDevice", Some("is not a block device")),
            ("file", "Other", Some("is an invalid volume type")),
        ];
        for (path, kind, want) in cases {
            let got = check(&dir.path().join(path), kind);
            match want {
                None => assert!(got.is_ok(), "{path} {kind} {got:?}"),
                Some(text) => assert!(got.unwrap_err().to_string().contains(text), "{path} {kind}"),
            }
        }
    }
}
