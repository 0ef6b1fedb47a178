//! Files that come into folders, by inotify: how a running server or agent hears of what a command put there.
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

pub struct FolderChanges(AsyncFd<OwnedFd>);

impl FolderChanges {
    /// Watches folders that are there; what was in them before is not told.
    pub fn of(folders: &[&Path]) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        for folder in folders {
            // what is written atomically is moved; what a person copies is created and written
            inotify::add_watch(&fd, *folder, WatchFlags::MOVED_TO | WatchFlags::CLOSE_WRITE)?;
        }
        Ok(Self(registered(fd)?))
    }

    /// Waits until something came.
    pub async fn next(&self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        self.0.readable().await?.clear_ready();
        while rustix::io::read(self.0.get_ref(), &mut buffer).is_ok_and(|n| n > 0) {}
        Ok(())
    }
}

#[allow(unsafe_code)]
fn registered(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` owns its descriptor, and nothing exchanges it inside the `AsyncFd`.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tells_of_new_files() {
        let folder = std::env::temp_dir().join(format!("sampan-changes-{}", sampan_world::random::suffix(8)));
        std::fs::create_dir(&folder).unwrap();
        let changes = FolderChanges::of(&[&folder]).unwrap();
        let soon = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, changes.next()).await.is_err());
        sampan_world::files::write_atomic(&folder.join("a.renew"), b"", 0o600).unwrap();
        changes.next().await.unwrap();
        assert!(tokio::time::timeout(soon, changes.next()).await.is_err(), "told once");
        assert!(FolderChanges::of(&[&folder.join("nothing")]).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
