//! A disk without space: writes say so, reads go on, nothing acknowledged is lost, and space heals it.
//!
//! The test runs itself again in a mount namespace of its own, so its small disk goes away with it.
#![allow(clippy::unwrap_used, reason = "a test")]
use std::process::Command;

use sampan_store::{Options, Range, Store, StoreError, Write, WriteError};

const DISK: &str = "SAMPAN_STORE_TEST_DISK";

#[test]
fn a_full_disk_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let test = std::env::current_exe().unwrap();
    let ran = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg("mount -t tmpfs -o size=1m none \"$0\" || exit 77; exec \"$1\" on_a_small_disk --exact --nocapture")
        .args([folder.path(), test.as_path()])
        .env(DISK, folder.path())
        .output();
    match ran {
        Ok(ran) if ran.status.success() => {
            let out = String::from_utf8_lossy(&ran.stdout).into_owned();
            assert!(out.contains("survived"), "{out}");
        }
        Ok(ran)
            if ran.status.code() != Some(77)
                && !String::from_utf8_lossy(&ran.stderr).contains("unshare failed") =>
        {
            panic!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr))
        }
        _ => eprintln!("skipped: mounting takes root"),
    }
}

#[tokio::test]
async fn on_a_small_disk() {
    let Some(disk) = std::env::var_os(DISK) else { return };
    let path = std::path::Path::new(&disk).join("state.db");
    let options = Options::new(&path).deferred(["/lease/"]);
    let store = Store::open(options.clone()).unwrap();
    let mut kept = 0;
    let error = loop {
        match store.write(Write::create(format!("/p/{kept:04}"), vec![7; 8000])).await {
            Ok(_) => kept += 1,
            Err(e) => break e,
        }
        assert!(kept < 1000);
    };
    assert!(matches!(error, WriteError::Store(StoreError::Full { .. })), "{error}");
    assert!(kept > 20, "{kept}");
    let revision = store.revision();
    assert_eq!(store.count("/p/").await.unwrap(), kept);
    assert_eq!(store.range(Range::prefix("/p/").limit(5)).await.unwrap().entries.len(), 5);
    // What waits for the disk anyway still works, and opening it again for reading does too.
    store.write(Write::put("/lease/a", "1").deferred()).await.unwrap();
    assert!(store.flush().await.is_err() || store.stats().deferred_keys == 0);
    drop(store);
    let store = Store::open(options.clone()).unwrap();
    assert_eq!(store.count("/p/").await.unwrap(), kept);
    assert!(store.revision() >= revision);

    let grown = Command::new("mount").args(["-o", "remount,size=16m"]).arg(&disk).status().unwrap();
    assert!(grown.success());
    let next = store.write(Write::create("/p/next", vec![7; 8000])).await.unwrap();
    assert!(next > revision);
    drop(store);
    let store = Store::open(options).unwrap();
    assert_eq!(store.count("/p/").await.unwrap(), kept + 1);
    println!("survived");
}
