//! A virtual machine: qemu's emulation (TCG), with a wire to the lab's bridge and a disk that remembers.
//!
//! A thread starts qemu, and again whenever the guest reboots, as a machine's firmware does: what the kernel is told is
//! read each time from `cmdline.txt` of the firmware's disk, where there is one. Power can be cut. The wire is a tap
//! device in the hub's network namespace, which leads nowhere outside of this machine.
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sampan_tests::process::run;
use sampan_tests::seconds;

use crate::rootfs::{Recipe, Rootfs};

/// A guest that reboots over and over is not started for ever.
const MAX_BOOTS: usize = 12;

pub struct Machine {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    arch: &'static str,
    name: &'static str,
    hub_pid: u64,
    rootfs: Rootfs,
    folder: PathBuf,
    /// What the firmware adds or, on a machine without firmware, all but the console.
    cmdline: String,
    memory_mb: u32,
    number: u8,
    has_firmware: bool,
    child: Mutex<Option<Child>>,
    boots: AtomicUsize,
    ended: AtomicBool,
}

/// What a machine has.
pub struct Hardware {
    pub memory_mb: u32,
    /// Its number on the wire.
    pub number: u8,
    /// Words that the firmware gives the kernel before those of `cmdline.txt`.
    pub firmware_words: &'static str,
}

impl Machine {
    /// Plugs the machine in.
    pub fn start(
        recipe: &Recipe,
        rootfs: &Rootfs,
        hardware: &Hardware,
        hub_pid: u64,
        parent: &Path,
    ) -> Result<Self> {
        let folder = parent.join(recipe.host);
        std::fs::create_dir_all(&folder)?;
        let mut overlay = Command::new("qemu-img");
        overlay.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(rootfs.disk());
        run(overlay.arg(folder.join("disk.qcow2")), b"", seconds(20))?.ok()?;
        if recipe.has_firmware {
            make_firmware(&folder)?;
        }
        let tap = format!("vm{}", hardware.number);
        let script = format!("ip tuntap add dev {tap} mode tap && ip link set {tap} master lab0 up");
        run(&mut in_hub(hub_pid, &["sh", "-c", &script]), b"", seconds(10))?.ok().context("the wire")?;
        let shared = Arc::new(Shared {
            arch: recipe.arch,
            name: recipe.host,
            hub_pid,
            rootfs: rootfs.clone(),
            folder,
            cmdline: hardware.firmware_words.to_string(),
            memory_mb: hardware.memory_mb,
            number: hardware.number,
            has_firmware: recipe.has_firmware,
            child: Mutex::new(None),
            boots: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
        });
        let kept = shared.clone();
        let thread = std::thread::spawn(move || kept.keep_running());
        Ok(Self { shared, thread: Some(thread) })
    }

    pub fn boots(&self) -> usize {
        self.shared.boots.load(Ordering::SeqCst)
    }

    /// As if somebody pulled the plug, and put it back in.
    pub fn cut_power(&self) {
        self.shared.kill();
    }

    /// The end of what it printed on its serial line.
    pub fn console(&self, lines: usize) -> String {
        let bytes = std::fs::read(self.shared.folder.join("console.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        let all: Vec<&str> = text.lines().collect();
        format!("-- console of {}\n{}", self.shared.name, all[all.len().saturating_sub(lines)..].join("\n"))
    }

    /// The firmware's disk as it is now, below `/boot/firmware` in the machine.
    pub fn firmware_file(&self, name: &str) -> Result<String> {
        firmware_file(&self.shared.folder, name)
    }

    pub fn end(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.kill();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// A program in the hub's network, otherwise on this machine. It ends with the thread that starts it.
pub fn in_hub(hub_pid: u64, words: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["-t", &hub_pid.to_string(), "-n", "setpriv", "--pdeathsig", "KILL"]).args(words);
    command
}

fn firmware_file(folder: &Path, name: &str) -> Result<String> {
    let mut command = Command::new("debugfs");
    command.args(["-R", &format!("cat /{name}")]).arg(folder.join("firmware"));
    run(&mut command, b"", seconds(10))?.ok()
}

/// The small partition that a Raspberry Pi boots from.
fn make_firmware(folder: &Path) -> Result<()> {
    let tree = folder.join("firmware.d");
    std::fs::create_dir_all(&tree)?;
    std::fs::write(tree.join("cmdline.txt"), "console=tty1 root=LABEL=root rootfstype=ext4 rootwait\n")?;
    std::fs::write(tree.join("config.txt"), "arm_64bit=1\n")?;
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-O", "^has_journal", "-L", "firmware", "-d"]).arg(&tree);
    run(make.arg(folder.join("firmware")).arg("8M"), b"", seconds(10))?.ok().map(drop)
}

impl Shared {
    fn keep_running(&self) {
        while !self.ended.load(Ordering::SeqCst) && self.boots.load(Ordering::SeqCst) < MAX_BOOTS {
            if let Err(error) = self.boot() {
                println!("machine {}: {error:#}", self.name);
                return;
            }
        }
    }

    /// One life of qemu, until the guest reboots or power is cut.
    fn boot(&self) -> Result<()> {
        let mut qemu = self.qemu()?;
        let log = std::fs::File::create(self.folder.join("qemu.log"))?;
        qemu.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = qemu.spawn().context("starting qemu")?;
        let start = sampan_world::clock::monotonic();
        *self.locked() = Some(child);
        self.boots.fetch_add(1, Ordering::SeqCst);
        if self.ended.load(Ordering::SeqCst) {
            self.kill();
        }
        loop {
            if let Some(child) = self.locked().as_mut()
                && child.try_wait()?.is_some()
            {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        *self.locked() = None;
        let said = std::fs::read_to_string(self.folder.join("qemu.log")).unwrap_or_default();
        let ended = self.ended.load(Ordering::SeqCst);
        ensure!(ended || start.elapsed() > seconds(2), "qemu does not run: {said}");
        Ok(())
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn kill(&self) {
        if let Some(child) = self.locked().as_mut() {
            let _ = child.kill();
        }
    }

    fn qemu(&self) -> Result<Command> {
        let (program, board, console) = match self.arch {
            "amd64" => ("qemu-system-x86_64", ["-M", "q35", "-cpu", "max,la57=off"], "ttyS0"),
            _ => ("qemu-system-aarch64", ["-M", "virt", "-cpu", "cortex-a53"], "ttyAMA0"),
        };
        let own = match self.has_firmware {
            true => firmware_file(&self.folder, "cmdline.txt")?,
            false => "root=LABEL=root rw".to_string(),
        };
        // a Pi's own kernel has a word that undoes the firmware's; Debian's has not, so the firmware hears it here
        let firmware = if own.contains("cgroup_enable=memory") { "" } else { self.cmdline.as_str() };
        let append = format!("{firmware} {} console={console} net.ifnames=0", own.trim());
        let mut command = in_hub(self.hub_pid, &[program]);
        command.args(board).args([
            "-accel",
            "tcg,thread=multi",
            "-smp",
            "2",
            "-m",
            &self.memory_mb.to_string(),
        ]);
        // a guest's reboot is an exit: the firmware is this program
        command.args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "chardev:console",
            "-chardev",
        ]);
        let log = self.folder.join("console.log");
        command.arg(format!("file,id=console,append=on,path={}", log.display()));
        command.arg("-kernel").arg(self.rootfs.kernel()).arg("-initrd").arg(self.rootfs.initrd());
        command.args(["-append", &append]);
        for (file, format) in [("disk.qcow2", "qcow2"), ("firmware", "raw")] {
            let path = self.folder.join(file);
            if path.exists() {
                command.arg("-drive");
                command.arg(format!("file={},format={format},if=virtio,discard=unmap", path.display()));
            }
        }
        let number = self.number;
        command.arg("-netdev").arg(format!("tap,id=wire,ifname=vm{number},script=no,downscript=no"));
        let mac = format!("52:54:00:40:00:{number:02x}");
        command.arg("-device").arg(format!("virtio-net-pci,netdev=wire,mac={mac},romfile="));
        command.args(["-device", "virtio-rng-pci"]);
        Ok(command)
    }
}
