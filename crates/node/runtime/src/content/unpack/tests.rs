//! Layers as they should be, and as an attacker would make them.
use super::*;
use std::os::unix::fs::PermissionsExt;

type Entry = (&'static str, EntryType, &'static str);

fn tar_of(entries: &[Entry]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, kind, content) in entries {
        let mut header = tar::Header::new_gnu();
        // Set by hand: the builder itself refuses the names that are tried here.
        let bytes = name.as_bytes();
        header.as_old_mut().name[..bytes.len()].copy_from_slice(bytes);
        header.set_entry_type(*kind);
        header.set_mode(0o640);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000);
        let body = if matches!(kind, EntryType::Symlink | EntryType::Link) {
            header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
            &b""[..]
        } else {
            content.as_bytes()
        };
        header.set_size(body.len() as u64);
        header.set_cksum();
        tar.append(&header, body).unwrap();
    }
    tar.into_inner().unwrap()
}

fn apply(
    entries: &[Entry],
    parents: &[PathBuf],
    limits: &Limits,
) -> (tempfile::TempDir, Result<Unpacked, UnpackError>) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("layer")).unwrap();
    fs::write(folder.path().join("outside"), "safe").unwrap();
    let done = unpack(&tar_of(entries)[..], &folder.path().join("layer"), parents, limits);
    (folder, done)
}

#[test]
fn attacks_stay_inside() {
    use EntryType::{Directory, Link, Regular, Symlink};
    for entries in [
        &[("../outside", Regular, "bad")][..],
        &[("a/../../outside", Regular, "bad")],
        &[("/../outside", Regular, "bad")],
        &[("l", Symlink, ".."), ("l/outside", Regular, "bad")],
        &[("l", Symlink, "../.."), ("l/outside", Regular, "bad")],
        &[("d", Directory, ""), ("d/l", Symlink, "../../"), ("d/l/outside", Regular, "bad")],
        &[("outside", Symlink, "../outside"), ("outside", Regular, "bad")],
        &[("h", Link, "../outside"), ("h", Regular, "bad")],
        &[("l", Symlink, ".."), ("h", Link, "l/outside")],
        &[("l", Symlink, ".."), ("l/.wh.outside", Regular, "")],
        &[(".wh...", Regular, "")],
        &[("a/.wh..", Regular, "")],
    ] {
        let (folder, _) = apply(entries, &[], &Limits::default());
        let outside = fs::read_to_string(folder.path().join("outside")).unwrap();
        assert_eq!(outside, "safe", "{entries:?}");
        assert_eq!(fs::metadata(folder.path().join("outside")).unwrap().nlink(), 1, "{entries:?}");
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{entries:?}: {names:?}");
    }
}

#[test]
fn whiteouts_links_and_attributes() {
    use EntryType::{Directory, Link, Regular, Symlink};
    let below = tempfile::tempdir().unwrap();
    fs::create_dir(below.path().join("implied")).unwrap();
    fs::set_permissions(below.path().join("implied"), fs::Permissions::from_mode(0o1777)).unwrap();
    let entries = [
        ("d/", Directory, ""),
        ("d/f", Regular, "text"),
        ("d/g", Link, "d/f"),
        ("s", Symlink, "/etc/passwd"),
        ("d/.wh.gone", Regular, ""),
        ("d/.wh..wh..opq", Regular, ""),
        ("implied/new", Regular, "x"),
        ("d/f2", Regular, "one"),
        ("d/f2", Regular, "two"),
    ];
    let (folder, done) = apply(&entries, &[below.path().to_path_buf()], &Limits::default());
    let unpacked = done.unwrap();
    assert_eq!(unpacked.diff_id, sampan_image::manifest::digest(&tar_of(&entries)));
    let layer = folder.path().join("layer");
    assert_eq!(fs::read_to_string(layer.join("d/g")).unwrap(), "text");
    assert_eq!(fs::metadata(layer.join("d/f")).unwrap().nlink(), 2);
    assert_eq!(fs::read_to_string(layer.join("d/f2")).unwrap(), "two");
    assert_eq!(fs::metadata(layer.join("d/f")).unwrap().permissions().mode() & 0o7777, 0o640);
    assert_eq!(fs::metadata(layer.join("d")).unwrap().mtime(), 1_000);
    assert_eq!(fs::metadata(layer.join("implied")).unwrap().permissions().mode() & 0o7777, 0o1777);
    assert_eq!(fs::read_link(layer.join("s")).unwrap(), Path::new("/etc/passwd"));
    let gone = fs::symlink_metadata(layer.join("d/gone")).unwrap();
    assert!(gone.rdev() == 0 && gone.mode() & 0o170_000 == 0o020_000, "{gone:?}");
    let mut value = [0; 8];
    let n = rustix::fs::getxattr(layer.join("d"), "trusted.overlay.opaque", &mut value).unwrap();
    assert_eq!(&value[..n], b"y");
}

#[test]
fn bombs_are_stopped() {
    let limits = Limits { size_bytes: 1000, entries: 3, keep_free_bytes: 0 };
    let text: &'static str = Box::leak("x".repeat(1001).into_boxed_str());
    let (_f, done) = apply(&[("a", EntryType::Regular, text)], &[], &limits);
    assert!(done.is_err());
    let many = [
        ("a", EntryType::Regular, ""),
        ("b", EntryType::Regular, ""),
        ("c", EntryType::Regular, ""),
        ("d", EntryType::Regular, ""),
    ];
    let limits = Limits { size_bytes: 1 << 20, ..limits };
    assert!(matches!(apply(&many, &[], &limits).1, Err(UnpackError::TooMuch(_))));
}
