//! A container's file system: overlay, kernel file systems, volumes, devices, masks, and the pivot into it.
//!
//! Upstream counterpart: runc's `rootfs_linux.go`. Everything is mounted in the container's own mount namespace: when
//! the container is gone so are its mounts, whatever was killed. Targets inside the image are resolved with openat2
//! (RESOLVE_IN_ROOT), so that a symlink in an image never leads a mount out of it.
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode as NixMode, SFlag, mknod};
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};

use crate::spec::{ContainerSpec, MountSpec};

const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const NODES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

type Result<T> = std::result::Result<T, String>;

fn none() -> Option<&'static str> {
    None
}

fn do_mount(
    source: Option<&Path>,
    target: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<()> {
    mount(source, target, kind, flags, data).map_err(|e| {
        let from = source.map_or(String::new(), |s| format!("{} ", s.display()));
        format!("mounting {from}to {}: {}", target.display(), e.desc())
    })
}

/// Builds the file system of `spec` below `folder` and makes it this process's root.
pub fn enter(spec: &ContainerSpec, folder: &Path) -> Result<()> {
    let root_path = folder.join("rootfs");
    detach_from_host(spec, &root_path)?;
    mount_overlay(spec, folder, &root_path)?;
    let root = Root::open(&root_path)?;
    kernel_mounts(spec, &root)?;
    for volume in &spec.mounts {
        mount_volume(&root, volume).map_err(|e| format!("mount {}: {e}", volume.target))?;
    }
    devices(spec, &root)?;
    pivot(&root)?;
    if !spec.privileged && spec.masked_paths {
        mask()?;
    }
    if spec.readonly_rootfs {
        remount(Path::new("/"), MsFlags::MS_RDONLY)?;
    }
    Ok(())
}

/// What is mounted from here on stays ours, unless a volume says `Bidirectional`.
fn detach_from_host(spec: &ContainerSpec, root: &Path) -> Result<()> {
    if !spec.mounts.iter().any(|m| m.propagation == "shared") {
        return do_mount(None, Path::new("/"), none(), MsFlags::MS_SLAVE | MsFlags::MS_REC, none());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| e.to_string())?;
    let points = mounts.lines().filter_map(|l| l.split(' ').nth(4)).map(Path::new);
    let parent = points.filter(|p| root.starts_with(p)).max_by_key(|p| p.as_os_str().len());
    do_mount(None, parent.unwrap_or(Path::new("/")), none(), MsFlags::MS_PRIVATE, none())
}

fn mount_overlay(spec: &ContainerSpec, folder: &Path, root: &Path) -> Result<()> {
    // Names relative to the layers' folder, since all options must fit into one page.
    std::env::set_current_dir(&spec.layers_folder).map_err(|e| format!("layers: {e}"))?;
    let (upper, work) = (folder.join("upper"), folder.join("work"));
    let mut options =
        format!("lowerdir={},upperdir={},workdir={}", spec.layers.join(":"), upper.display(), work.display());
    if spec.plain_upper {
        options.push_str(&plain_overlay_options());
    }
    do_mount(Some(Path::new("overlay")), root, Some("overlay"), MsFlags::empty(), Some(&options))?;
    std::env::set_current_dir("/").map_err(|e| e.to_string())
}

/// Turns off what would make files of the upper folder point into lower ones, where the kernel knows of it.
pub fn plain_overlay_options() -> String {
    let known = |name: &&str| Path::new("/sys/module/overlay/parameters").join(name).exists();
    ["redirect_dir", "metacopy"].iter().filter(|n| known(n)).map(|n| format!(",{n}=off")).collect()
}

struct Root {
    fd: OwnedFd,
}

/// A place in the container, by descriptor: nobody can exchange it for a symlink.
struct Place(OwnedFd);

impl Place {
    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

impl Root {
    fn open(path: &Path) -> Result<Root> {
        let fd = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Root { fd })
    }

    fn find(&self, path: &Path) -> io::Result<Place> {
        let relative = path.strip_prefix("/").unwrap_or(path);
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        let fd = openat2(
            &self.fd,
            relative,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT,
        )?;
        Ok(Place(fd))
    }

    /// Finds a folder, making what is missing.
    fn folder(&self, path: &Path) -> io::Result<Place> {
        if let Ok(found) = self.find(path) {
            return Ok(found);
        }
        let Some((parent, name)) = path.parent().zip(path.file_name()) else { return self.find(path) };
        let parent = self.folder(parent)?;
        match mkdirat(&parent.0, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => self.find(path),
            Err(e) => Err(e.into()),
        }
    }

    /// Finds a file, making an empty one if it is missing.
    fn file(&self, path: &Path) -> io::Result<Place> {
        if let Ok(found) = self.find(path) {
            return Ok(found);
        }
        let Some((parent, name)) = path.parent().zip(path.file_name()) else { return self.find(path) };
        let parent = self.folder(parent)?;
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&parent.0, name, flags, Mode::from_raw_mode(0o644))?;
        self.find(path)
    }

    fn mount(&self, target: &str, kind: &str, flags: MsFlags, data: Option<&str>) -> Result<()> {
        let place = self.folder(Path::new(target)).map_err(|e| format!("{target}: {e}"))?;
        do_mount(Some(Path::new(kind)), &place.path(), Some(kind), flags, data)
            .map_err(|e| format!("{target}: {e}"))
    }
}

fn kernel_mounts(spec: &ContainerSpec, root: &Root) -> Result<()> {
    let closed = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    root.mount("/proc", "proc", closed, none())?;
    let dev = MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME;
    root.mount("/dev", "tmpfs", dev, Some("mode=755,size=65536k"))?;
    let pts = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    root.mount("/dev/pts", "devpts", pts, Some("newinstance,ptmxmode=0666,mode=0620,gid=5"))?;
    let shm = root.folder(Path::new("/dev/shm")).map_err(|e| format!("/dev/shm: {e}"))?;
    do_mount(Some(&spec.shm), &shm.path(), none(), MsFlags::MS_BIND, none())?;
    // Kernels without POSIX message queues do without.
    let _ = root.mount("/dev/mqueue", "mqueue", closed, none());
    let sys = if spec.privileged { closed } else { closed | MsFlags::MS_RDONLY };
    if root.mount("/sys", "sysfs", sys, none()).is_err() {
        // sysfs belongs to the network namespace: with the host's it can only be bound.
        let place = root.folder(Path::new("/sys")).map_err(|e| format!("/sys: {e}"))?;
        do_mount(Some(Path::new("/sys")), &place.path(), none(), MsFlags::MS_BIND | MsFlags::MS_REC, none())?;
    }
    cgroup_mounts(spec, root, closed)
}

fn cgroup_mounts(spec: &ContainerSpec, root: &Root, closed: MsFlags) -> Result<()> {
    let readonly = if spec.privileged { MsFlags::empty() } else { MsFlags::MS_RDONLY };
    if spec.cgroup_namespace {
        return root.mount("/sys/fs/cgroup", "cgroup2", closed | readonly, none());
    }
    // A read-only sysfs still has the folder to mount on.
    root.mount("/sys/fs/cgroup", "tmpfs", closed, Some("mode=755,size=64k"))?;
    for (controller, group) in &spec.cgroup_v1 {
        let target = format!("/sys/fs/cgroup/{controller}");
        let place = root.folder(Path::new(&target)).map_err(|e| format!("{target}: {e}"))?;
        do_mount(Some(group), &place.path(), none(), MsFlags::MS_BIND, none())?;
        let place = root.find(Path::new(&target)).map_err(|e| e.to_string())?;
        remount(&place.path(), closed | readonly)?;
    }
    let place = root.find(Path::new("/sys/fs/cgroup")).map_err(|e| e.to_string())?;
    if spec.privileged { Ok(()) } else { remount(&place.path(), closed | readonly) }
}

/// Changes a mount's flags, keeping those that it has.
fn remount(target: &Path, flags: MsFlags) -> Result<()> {
    let mut all = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    if let Ok(stat) = nix::sys::statvfs::statvfs(target) {
        use nix::sys::statvfs::FsFlags;
        for (theirs, ours) in [
            (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
            (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
            (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
            (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        ] {
            if stat.flags().contains(theirs) {
                all |= ours;
            }
        }
    }
    do_mount(None, target, none(), all, none())
}

fn mount_volume(root: &Root, volume: &MountSpec) -> Result<()> {
    let text = |e: io::Error| e.to_string();
    let metadata = fs::metadata(&volume.source).map_err(|e| format!("{}: {e}", volume.source.display()))?;
    let target = Path::new("/").join(&volume.target);
    let place = if metadata.is_dir() { root.folder(&target) } else { root.file(&target) }.map_err(text)?;
    do_mount(Some(&volume.source), &place.path(), none(), MsFlags::MS_BIND | MsFlags::MS_REC, none())?;
    // What is there now lies on top of what was opened.
    let place = root.find(&target).map_err(text)?;
    let propagation = match volume.propagation.as_str() {
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        _ => MsFlags::MS_PRIVATE,
    };
    do_mount(None, &place.path(), none(), propagation | MsFlags::MS_REC, none())?;
    if volume.recursive_readonly {
        return crate::shim::readonly_recursively(&place.0)
            .map_err(|e| format!("making it recursively read-only: {e}"));
    }
    if volume.readonly { remount(&place.path(), MsFlags::MS_RDONLY) } else { Ok(()) }
}

fn devices(spec: &ContainerSpec, root: &Root) -> Result<()> {
    let mask = nix::sys::stat::umask(NixMode::empty());
    for (name, major, minor) in NODES {
        make_node(
            root,
            &format!("/dev/{name}"),
            Path::new("/dev").join(name).as_path(),
            major,
            minor,
            0o666,
        )?;
    }
    if spec.privileged {
        all_host_devices(root, Path::new("/dev"), 0)?;
    }
    for device in &spec.devices {
        let metadata =
            fs::metadata(&device.source).map_err(|e| format!("device {}: {e}", device.source.display()))?;
        copy_node(root, &device.target, &device.source, &metadata)?;
    }
    nix::sys::stat::umask(mask);
    let dev = root.find(Path::new("/dev")).map_err(|e| e.to_string())?;
    for (target, name) in [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
        ("/proc/kcore", "core"),
        ("pts/ptmx", "ptmx"),
    ] {
        match rustix::fs::symlinkat(target, &dev.0, name) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(format!("/dev/{name}: {e}")),
        }
    }
    Ok(())
}

fn copy_node(root: &Root, target: &str, source: &Path, metadata: &fs::Metadata) -> Result<()> {
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    make_node(root, target, source, u64::from(major), u64::from(minor), metadata.mode() & 0o777)
}

fn make_node(root: &Root, target: &str, source: &Path, major: u64, minor: u64, mode: u32) -> Result<()> {
    let failed = |e: String| format!("device {target}: {e}");
    let path = Path::new(target);
    let Some((parent, name)) = path.parent().zip(path.file_name()) else { return Ok(()) };
    let parent = root.folder(parent).map_err(|e| failed(e.to_string()))?;
    let kind = match fs::metadata(source) {
        Ok(m) if m.file_type().is_block_device() => SFlag::S_IFBLK,
        _ => SFlag::S_IFCHR,
    };
    let at = parent.path().join(name);
    let device = nix::sys::stat::makedev(major, minor);
    match mknod(&at, kind, NixMode::from_bits_truncate(mode), device) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        // Where the node itself runs in a container: bind the one that is there.
        Err(_) => {
            let place = root.file(path).map_err(|e| failed(e.to_string()))?;
            do_mount(Some(source), &place.path(), none(), MsFlags::MS_BIND, none())
        }
    }
}

fn all_host_devices(root: &Root, folder: &Path, depth: u32) -> Result<()> {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(metadata) = entry.metadata() else { continue };
        let kind = metadata.file_type();
        if kind.is_dir() && depth < 4 && !["pts", "shm", "mqueue", "fd"].iter().any(|n| path.ends_with(n)) {
            all_host_devices(root, &path, depth + 1)?;
        } else if (kind.is_block_device() || kind.is_char_device())
            && path != Path::new("/dev/console")
            && path != Path::new("/dev/ptmx")
        {
            copy_node(root, &path.to_string_lossy(), &path, &metadata)?;
        }
    }
    Ok(())
}

fn pivot(root: &Root) -> Result<()> {
    let failed = |what: &str, e: nix::errno::Errno| format!("{what}: {}", e.desc());
    // The overlay lies on the folder that was opened before it was mounted or on itself; the descriptor says which.
    nix::unistd::fchdir(&root.fd).map_err(|e| failed("entering the root", e))?;
    nix::unistd::pivot_root(".", ".").map_err(|e| failed("pivot_root", e))?;
    // So that letting the host's tree go here doesn't reach the host.
    mount(none(), ".", none(), MsFlags::MS_SLAVE | MsFlags::MS_REC, none())
        .map_err(|e| failed("old root", e))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(|e| failed("leaving the old root", e))?;
    nix::unistd::chdir("/").map_err(|e| failed("chdir /", e))
}

fn mask() -> Result<()> {
    for path in MASKED {
        let path = Path::new(path);
        let Ok(metadata) = fs::metadata(path) else { continue };
        if metadata.is_dir() {
            do_mount(Some(Path::new("tmpfs")), path, Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0k"))?;
        } else {
            do_mount(Some(Path::new("/dev/null")), path, none(), MsFlags::MS_BIND, none())?;
        }
    }
    for path in READONLY.iter().map(Path::new).filter(|p| p.exists()) {
        do_mount(Some(path), path, none(), MsFlags::MS_BIND | MsFlags::MS_REC, none())?;
        remount(path, MsFlags::MS_RDONLY)?;
    }
    Ok(())
}
