//! The store's life: records lead to layers, the oldest go first, killed builds' folders go.
use std::time::SystemTime;

use super::*;

fn layer(name: &str, size: u64) -> Layer {
    Layer {
        diff_id: format!("sha256:{name}"),
        digest: format!("sha256:{name}"),
        size_bytes: size,
        media_type: GZIP_LAYER.into(),
        folder: name.into(),
        unpacked_bytes: size,
    }
}

fn keep(store: &Store, layer: &Layer) {
    fs::create_dir_all(store.layers_folder().join(&layer.folder)).unwrap();
    fs::write(store.blob_path(&layer.digest), "x").unwrap();
}

#[test]
fn the_least_recently_used_goes_first() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), "none-such").unwrap();
    let layers = ["a", "b", "c"].map(|n| layer(n, 10));
    for (at, layer) in layers.iter().enumerate() {
        keep(&store, layer);
        let record = Record { layer: Some(layer.clone()), created: String::new() };
        store.put_record(&layer.folder, &record).unwrap();
        let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(at as u64);
        File::open(store.record_path("cache", &layer.folder)).unwrap().set_modified(time).unwrap();
    }
    // asked for, so it is the youngest
    assert!(store.record("a").is_some());
    let freed = store.collect(45, true).unwrap();
    assert_eq!(freed, Freed { entries: 1, size_bytes: 20 });
    assert!(store.record("a").is_some() && store.record("c").is_some());
    assert!(store.record("b").is_none() && !store.has_layer(&layers[1]));
    let other = Store::open(folder.path(), "none-such").unwrap();
    assert!(store.collect(0, true).is_err(), "another build goes on");
    drop(other);
    assert_eq!(store.collect(0, true).unwrap().entries, 2);
    assert!(store.layers_folder().join("empty").is_dir());
    assert_eq!(fs::read_dir(store.folder.join("blobs")).unwrap().count(), 0);
}

#[test]
fn a_record_without_its_layer_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), "none-such").unwrap();
    let layer = layer("a", 1);
    store.put_record("k", &Record { layer: Some(layer.clone()), created: String::new() }).unwrap();
    assert!(store.record("k").is_none());
    keep(&store, &layer);
    assert!(store.record("k").is_some());
    assert_ne!(folder_name(&[], "sha256:x"), folder_name(&[layer], "sha256:x"));
}

#[test]
fn what_killed_builds_leave_goes() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), "none-such").unwrap();
    let living = store.scratch().unwrap();
    fs::create_dir_all(folder.path().join("work/dead/upper")).unwrap();
    fs::write(folder.path().join("work/dead/lock"), "").unwrap();
    let other = Store::open(folder.path(), "none-such").unwrap();
    assert!(living.path.is_dir() && !folder.path().join("work/dead").exists());
    let path = living.path.clone();
    drop((living, other));
    assert!(!path.exists());
}
