//! Layers put together: read-only to look into, writable to change.
//!
//! Upstream counterpart: containerd's overlayfs snapshotter. Everything is mounted in the mount namespace of the build's
//! own thread. Lower folders are named relative to the store's `layers`, since all options must fit into one page; the
//! thread's working directory is its own, see [`own_namespace`].
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::error::{BuildError, io_error, refused};
use crate::store::{Layer, Store};

/// Gives this thread mounts and a working directory that nobody else sees; they end with it.
pub fn own_namespace() -> Result<(), BuildError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(refused("building images needs root, since it mounts file systems; try sudo"));
    }
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| {
        refused(format!(
            "no mount namespace for the build: {}; is this a container without CAP_SYS_ADMIN?",
            e.desc()
        ))
    })?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .map_err(|e| refused(format!("leaving the machine's mounts: {}", e.desc())))
}

/// Goes with its value.
pub struct Mounted {
    path: PathBuf,
}

impl Mounted {
    /// Something that is mounted there already.
    pub fn at(path: PathBuf) -> Mounted {
        Mounted { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.path);
    }
}

fn overlay(store: &Store, at: PathBuf, options: &str) -> Result<Mounted, BuildError> {
    let mounting = || io_error(format!("mounting layers on {}", at.display()));
    fs::create_dir_all(&at).map_err(mounting())?;
    std::env::set_current_dir(store.layers_folder()).map_err(mounting())?;
    let mounted = mount(Some("overlay"), &at, Some("overlay"), MsFlags::empty(), Some(options));
    let _ = std::env::set_current_dir("/");
    match mounted {
        Ok(()) => Ok(Mounted { path: at }),
        Err(nix::errno::Errno::ENODEV) => {
            Err(refused("this kernel has no overlayfs (CONFIG_OVERLAY_FS), which builds need"))
        }
        Err(e) => Err(mounting()(io::Error::from(e))),
    }
}

/// Names of the layers, topmost first, as overlayfs wants them.
pub fn lower(layers: &[Layer]) -> Vec<String> {
    let mut names: Vec<String> = layers.iter().rev().map(|l| l.folder.clone()).collect();
    if names.is_empty() {
        names.push("empty".into());
    }
    names
}

/// Shows layers at `at`.
pub fn view(store: &Store, layers: &[Layer], at: PathBuf) -> Result<Mounted, BuildError> {
    let mut names = lower(layers);
    // without an upper folder there must be two
    names.push("empty".into());
    names.dedup();
    if names.len() == 1 {
        names.insert(0, ".empty".into());
        fs::create_dir_all(store.layers_folder().join(".empty"))
            .map_err(io_error("making an empty layer"))?;
    }
    overlay(store, at, &format!("lowerdir={}", names.join(":")))
}

/// A folder with `upper` and `work` for what is written over layers.
pub struct Upper {
    pub folder: PathBuf,
}

impl Upper {
    /// The root looks like the one below, since overlayfs shows the upper folder's.
    pub fn new(store: &Store, layers: &[Layer], folder: PathBuf) -> Result<Upper, BuildError> {
        let making = || io_error("making a writable layer");
        for name in ["upper", "work"] {
            fs::create_dir_all(folder.join(name)).map_err(making())?;
        }
        let upper = folder.join("upper");
        match layers.last() {
            Some(top) => same_folder(&store.layers_folder().join(&top.folder), &upper).map_err(making())?,
            None => fs::set_permissions(&upper, fs::Permissions::from_mode(0o755)).map_err(making())?,
        }
        Ok(Upper { folder })
    }

    pub fn path(&self) -> PathBuf {
        self.folder.join("upper")
    }

    pub fn mount(&self, store: &Store, layers: &[Layer]) -> Result<Mounted, BuildError> {
        let options = format!(
            "lowerdir={},upperdir={},workdir={}{}",
            lower(layers).join(":"),
            self.path().display(),
            self.folder.join("work").display(),
            sampan_runtime::plain_overlay_options()
        );
        overlay(store, self.folder.join("rootfs"), &options)
    }
}

impl Drop for Upper {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Gives `to` the owner, mode and time of `from`.
pub fn same_folder(from: &Path, to: &Path) -> io::Result<()> {
    let meta = fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    fs::File::open(to)?.set_modified(meta.modified()?)
}
