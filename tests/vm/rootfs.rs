//! Root file systems of virtual machines: Debian's packages by mmdebstrap, kept in the target folder.
//!
//! What is in them is what an owner would find: stock kernel, systemd, OpenSSH, sudo, nothing of ours. An image is built
//! anew only when there is none of this recipe; runs write to an overlay of it. A foreign architecture's packages are
//! configured by qemu-user through binfmt.
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sampan_tests::process::run;
use sampan_tests::seconds;

/// What a machine is made of.
#[derive(Debug)]
pub struct Recipe {
    pub arch: &'static str,
    pub suite: &'static str,
    pub kernel: &'static str,
    pub host: &'static str,
    pub ip: &'static str,
    pub user: &'static str,
    /// Of login and sudo; where there is none, a key is all there is, and sudo asks nothing.
    pub password: Option<&'static str>,
    /// The kernel's command line in `/boot/firmware/cmdline.txt`, as on a Raspberry Pi.
    pub has_firmware: bool,
}

/// A recipe as files.
#[derive(Clone)]
pub struct Rootfs {
    folder: PathBuf,
}

const PACKAGES: &str =
    "systemd-sysv,udev,dbus,libpam-systemd,openssh-server,sudo,kmod,iproute2,nftables,procps,busybox-static";
/// To be raised when this file changes in another way what it makes.
const VERSION: u32 = 1;
const DISK_SIZE: &str = "3G";
/// Packages of a foreign architecture take a quarter of an hour of one processor.
const BUILD_LIMIT_S: u64 = 3600;
const MIRROR: &str = "http://deb.debian.org/debian";

/// The initial RAM disk holds what this machine needs, as on a machine that was installed; the emulated processor
/// unpacks it for a second, not for ten.
const BEFORE_PACKAGES: &str = r#"mkdir -p "$1/etc/initramfs-tools/conf.d"
printf 'MODULES=list\nCOMPRESS=gzip\nCOMPRESSLEVEL=1\n' >"$1/etc/initramfs-tools/conf.d/vm"
printf 'virtio_pci\nvirtio_blk\nvirtio_net\next4\ncrc32c_generic\n' >"$1/etc/initramfs-tools/modules""#;

impl Recipe {
    fn name(&self) -> String {
        let all = format!("{VERSION} {PACKAGES} {BEFORE_PACKAGES} {self:?} {}", self.setup(""));
        let digest = sampan_tests::image::digest(all.as_bytes());
        format!("{}-{}-{}", self.suite, self.arch, &digest["sha256:".len()..][..12])
    }

    /// What the installer of a machine would have asked for.
    fn setup(&self, public_key: &str) -> String {
        let Self { host, ip, user, .. } = self;
        let sudo = if self.password.is_some() { "ALL" } else { "NOPASSWD: ALL" };
        let password = self.password.map(|p| format!("echo '{user}:{p}' | chpasswd")).unwrap_or_default();
        let firmware = match self.has_firmware {
            true => {
                "mkdir -p /boot/firmware\necho 'LABEL=firmware /boot/firmware ext4 defaults,x-systemd.device-timeout=600 0 0' >>/etc/fstab"
            }
            false => "",
        };
        format!(
            r#"set -e
echo {host} >/etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 {host}\n' >/etc/hosts
rm -f /etc/resolv.conf && echo 'nameserver 10.64.0.1' >/etc/resolv.conf
echo 'LABEL=root / ext4 defaults,x-systemd.device-timeout=600 0 1' >/etc/fstab
{firmware}
useradd -m -s /bin/bash {user}
{password}
echo '{user} ALL=(ALL:ALL) {sudo}' >/etc/sudoers.d/90-first-user
chmod 440 /etc/sudoers.d/90-first-user
install -d -m 700 -o {user} -g {user} /home/{user}/.ssh
echo '{public_key}' >/home/{user}/.ssh/authorized_keys
chown {user}: /home/{user}/.ssh/authorized_keys
printf '[Match]\nName=e*\n[Network]\nAddress={ip}/24\nGateway=10.64.0.1\n' >/etc/systemd/network/10-wire.network
systemctl enable systemd-networkd.service ssh.service
for timer in apt-daily apt-daily-upgrade dpkg-db-backup e2scrub_all fstrim; do systemctl disable $timer.timer || true; done
"#
        )
    }

    /// The image, built if there is none.
    pub fn rootfs(&self, all: &Path) -> Result<Rootfs> {
        let name = self.name();
        let rootfs = Rootfs { folder: all.join(&name) };
        if rootfs.folder.exists() {
            return Ok(rootfs);
        }
        println!(
            "building the root file system {name}: once, some minutes; a foreign one a quarter of an hour"
        );
        let start = sampan_world::clock::monotonic();
        std::fs::create_dir_all(all)?;
        self.forget_others(all)?;
        let part = all.join(format!("{name}.part"));
        std::fs::create_dir(&part)?;
        let built = self.build(&part);
        let _ = std::fs::remove_dir_all(part.join("tree"));
        built.with_context(|| format!("building {name}"))?;
        std::fs::rename(&part, &rootfs.folder)?;
        println!("built {name} in {:.0} s", start.elapsed().as_secs_f32());
        Ok(rootfs)
    }

    /// Images of earlier recipes, and what a killed build left.
    fn forget_others(&self, all: &Path) -> Result<()> {
        let kind = format!("{}-", self.arch);
        for entry in std::fs::read_dir(all)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.split_once('-').is_some_and(|(_, rest)| rest.starts_with(&kind)) {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }

    fn build(&self, folder: &Path) -> Result<()> {
        let tree = folder.join("tree");
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "sampan-test", "-f"]).arg(folder.join("key"));
        run(&mut keygen, b"", seconds(20))?.ok()?;
        let key = std::fs::read_to_string(folder.join("key.pub"))?;
        let setup = folder.join("setup");
        std::fs::write(&setup, self.setup(key.trim()))?;
        // in a mount namespace of its own: what it mounts is never seen by who clears up
        let mut command = Command::new("unshare");
        command.args(["--mount", "mmdebstrap"]);
        command.args([
            "--quiet",
            "--mode=root",
            "--variant=minbase",
            "--format=directory",
            "--skip=output/dev,check/qemu",
        ]);
        command.arg(format!("--architectures={}", self.arch));
        command.arg(format!("--include={PACKAGES},{}", self.kernel));
        command.arg("--aptopt=APT::Install-Recommends \"false\"");
        for kept_out in ["man", "doc", "locale", "info", "lintian"] {
            command.arg(format!("--dpkgopt=path-exclude=/usr/share/{kept_out}/*"));
        }
        command.arg(format!("--essential-hook={BEFORE_PACKAGES}"));
        command.arg(format!("--customize-hook=chroot \"$1\" /bin/sh <'{}'", setup.display()));
        command.args([self.suite, &tree.display().to_string(), MIRROR]);
        command.env("TMPDIR", folder);
        run(&mut command, b"", seconds(BUILD_LIMIT_S))?.ok()?;
        for (from, to) in [("vmlinuz", "vmlinuz"), ("initrd.img", "initrd.img"), ("bin/busybox", "busybox")] {
            copy_one(&tree, from, &folder.join(to))?;
        }
        let mut make = Command::new("mke2fs");
        make.args(["-q", "-t", "ext4", "-L", "root", "-d"])
            .arg(&tree)
            .arg(folder.join("disk"))
            .arg(DISK_SIZE);
        run(&mut make, b"", seconds(300))?.ok()?;
        Ok(())
    }
}

/// A file of the tree; symbolic links are followed as if the tree were the root.
fn copy_one(tree: &Path, name: &str, to: &Path) -> Result<()> {
    let mut at = PathBuf::from("/").join(name);
    for _ in 0..4 {
        let Ok(link) = std::fs::read_link(tree.join(at.strip_prefix("/")?)) else { break };
        at = at.parent().unwrap_or(Path::new("/")).join(link);
    }
    let from = tree.join(at.strip_prefix("/")?);
    ensure!(from.is_file(), "there is no {}", from.display());
    std::fs::copy(&from, to).with_context(|| from.display().to_string())?;
    Ok(())
}

impl Rootfs {
    pub fn disk(&self) -> PathBuf {
        self.folder.join("disk")
    }
    pub fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }
    pub fn initrd(&self) -> PathBuf {
        self.folder.join("initrd.img")
    }
    /// A program of this architecture that needs no library.
    pub fn busybox(&self) -> PathBuf {
        self.folder.join("busybox")
    }
    pub fn key(&self) -> PathBuf {
        self.folder.join("key")
    }
}
