//! Files that come into folders and go from them, by inotify: how a running server or agent hears of what a command or a
//! person put there. What happens while nobody waits is told to the next who does.
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

/// What is written atomically is moved; what a person copies is created and written.
pub const ARRIVALS: WatchFlags = WatchFlags::MOVED_TO.union(WatchFlags::CLOSE_WRITE);
pub const REMOVALS: WatchFlags = WatchFlags::MOVED_FROM.union(WatchFlags::DELETE);

pub struct FolderChanges(AsyncFd<OwnedFd>);

impl FolderChanges {
    /// Watches folders that are there; what was in them before is not told.
    pub fn of(folders: &[&Path], what: WatchFlags) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        for folder in folders {
            inotify::add_watch(&fd, *folder, what)?;
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
        let changes = FolderChanges::of(&[&folder], ARRIVALS).unwrap();
        let soon = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, changes.next()).await.is_err());
        sampan_world::files::write_atomic(&folder.join("a.renew"), b"", 0o600).unwrap();
        changes.next().await.unwrap();
        assert!(tokio::time::timeout(soon, changes.next()).await.is_err(), "told once");
        assert!(FolderChanges::of(&[&folder.join("nothing")], ARRIVALS).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
