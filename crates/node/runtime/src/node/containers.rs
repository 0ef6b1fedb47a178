//! Containers: what the image and the pod say, resolved into a specification for the shim.
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sampan_drivers::runtime::{
    ContainerConfig, ContainerState, ImageError, NamespaceMode, Propagation, RuntimeError, Seccomp,
    SecurityContext,
};
use sampan_image::manifest::RunConfig;

use super::connection::{Connection, ask};
use super::{ContainerRecord, Node, SandboxRecord, failed, io_failed, new_id, write_json};
use crate::cgroups::{self, DeviceRule};
use crate::spec::{ContainerSpec, DeviceSpec, MountSpec, PidMode, ProcessSpec, Request, UserSpec};
use crate::{capabilities, seccomp};

/// After SIGKILL only the kernel can hold a process up.
const KILL: Duration = Duration::from_secs(120);

impl Node {
    pub(super) fn make_container(
        &self,
        sandbox_id: &str,
        config: &ContainerConfig,
    ) -> Result<String, RuntimeError> {
        let sandbox = self.sandbox(sandbox_id)?;
        let missing = |source| RuntimeError::Image { image: config.image.clone(), source };
        let image = self.inner.images.find(&config.image_id).ok_or_else(|| {
            missing(ImageError::NotFound(format!("{} is not on this node", config.image_id)))
        })?;
        let run = self
            .inner
            .images
            .config(&image)
            .ok_or_else(|| missing(ImageError::Invalid("its configuration is lost".into())))?;
        let id = new_id();
        let folder = self.container_folder(sandbox_id, &id);
        let made = (|| {
            fs::create_dir_all(folder.join("rootfs")).map_err(io_failed("making a container"))?;
            let layers = self.make_upper(&folder, &image.layers)?;
            let spec = self.container_spec(&id, &sandbox, config, &run, layers.clone(), &folder)?;
            self.make_group(&sandbox, &id, config, &spec)?;
            write_json(&folder.join("spec.json"), &spec)?;
            let stop_signal =
                config.stop_signal.clone().or(run.stop_signal).unwrap_or_else(|| "SIGTERM".into());
            let record = ContainerRecord {
                id: id.clone(),
                sandbox_id: sandbox_id.to_string(),
                config: config.clone(),
                created_at: sampan_world::clock::now(),
                layers,
                stop_signal,
                started: None,
                exit: None,
            };
            write_json(&folder.join("container.json"), &record)?;
            self.inner.state.lock().containers.insert(id.clone(), record);
            Ok(())
        })();
        if made.is_err() {
            self.inner.cgroups.remove(&sandbox.group(&id));
            let _ = fs::remove_dir_all(&folder);
        }
        made.map(|()| id)
    }

    /// The writable layer; its root looks like the image's, since overlayfs shows the upper folder's.
    fn make_upper(&self, folder: &Path, layers: &[String]) -> Result<Vec<String>, RuntimeError> {
        let making = || io_failed("making a writable layer");
        let (upper, work) = (folder.join("upper"), folder.join("work"));
        fs::create_dir(&upper).map_err(making())?;
        fs::create_dir(&work).map_err(making())?;
        let mut layers: Vec<String> = layers.iter().rev().cloned().collect();
        let base = self.inner.images.content.layers_folder();
        match layers.first() {
            Some(top) => {
                let root = fs::metadata(base.join(top)).map_err(making())?;
                fs::set_permissions(&upper, fs::Permissions::from_mode(root.mode() & 0o7777))
                    .map_err(making())?;
                std::os::unix::fs::chown(&upper, Some(root.uid()), Some(root.gid())).map_err(making())?;
            }
            None => {
                // `FROM scratch` with nothing in it.
                layers.push("empty".into());
                fs::create_dir_all(base.join("empty")).map_err(making())?;
            }
        }
        Ok(layers)
    }

    fn container_spec(
        &self,
        id: &str,
        sandbox: &SandboxRecord,
        config: &ContainerConfig,
        run: &RunConfig,
        layers: Vec<String>,
        folder: &Path,
    ) -> Result<ContainerSpec, RuntimeError> {
        let (cgroups, group) = (&self.inner.cgroups, sandbox.group(id));
        let security = &config.security;
        let shm = match sandbox.config.ipc {
            NamespaceMode::Node => PathBuf::from("/dev/shm"),
            _ => self.sandbox_folder(&sandbox.id).join("shm"),
        };
        let mounts = config.mounts.iter().map(|m| MountSpec {
            source: m.host_path.clone(),
            target: m.container_path.clone(),
            readonly: m.readonly,
            recursive_readonly: m.recursive_readonly,
            propagation: match m.propagation {
                Propagation::Private => "private",
                Propagation::HostToContainer => "slave",
                Propagation::Bidirectional => "shared",
            }
            .into(),
        });
        let devices = config
            .devices
            .iter()
            .map(|d| DeviceSpec { source: d.host_path.clone(), target: d.container_path.clone() });
        let log_path = sandbox.config.log_directory.join(&config.log_path);
        if let Some(parent) = log_path.parent() {
            fs::create_dir_all(parent).map_err(io_failed("making the log folder"))?;
        }
        Ok(ContainerSpec {
            process: self.process_spec(config, run, sandbox, &group, folder)?,
            layers_folder: self.inner.images.content.layers_folder(),
            layers,
            readonly_rootfs: security.readonly_rootfs,
            plain_upper: false,
            mounts: mounts.collect(),
            devices: devices.collect(),
            privileged: security.privileged,
            masked_paths: security.masked_paths,
            shm,
            pid: match sandbox.config.pid {
                NamespaceMode::Container => PidMode::Container,
                NamespaceMode::Pod => PidMode::Pod,
                NamespaceMode::Node => PidMode::Node,
            },
            cgroup_namespace: cgroups.is_v2(),
            cgroup_v1: cgroups.v1_folders(&group),
            oom_file: cgroups.oom_file(&group),
            cgroup_procs: cgroups.procs_files(&group),
            log_path,
            stdin: config.stdin,
            stdin_once: config.stdin_once,
        })
    }

    fn process_spec(
        &self,
        config: &ContainerConfig,
        run: &RunConfig,
        sandbox: &SandboxRecord,
        group: &str,
        folder: &Path,
    ) -> Result<ProcessSpec, RuntimeError> {
        let security = &config.security;
        let mut args = config.command.clone();
        if args.is_empty() {
            args = run.entrypoint.clone().unwrap_or_default();
            if config.args.is_empty() {
                args.extend(run.cmd.clone().unwrap_or_default());
            }
        }
        args.extend(config.args.iter().cloned());
        if args.is_empty() {
            return Err(failed("no command specified"));
        }
        let mut env = run.env.clone().unwrap_or_default();
        if !sandbox.config.hostname.is_empty() {
            env.push(format!("HOSTNAME={}", sandbox.config.hostname));
        }
        env.extend(config.env.iter().map(|(name, value)| format!("{name}={value}")));
        let capabilities =
            capabilities::set(security.privileged, &security.add_capabilities, &security.drop_capabilities)
                .map_err(failed)?;
        let id = |n: i64| u32::try_from(n).map_err(|_| failed(format!("user or group {n} is out of range")));
        let cwd = config.working_dir.clone().filter(|w| !w.is_empty()).or_else(|| run.working_dir.clone());
        Ok(ProcessSpec {
            args,
            env,
            cwd: cwd.unwrap_or_default(),
            tty: config.tty,
            user: UserSpec {
                image: run.user.clone().unwrap_or_default(),
                uid: security.run_as_user.map(id).transpose()?,
                gid: security.run_as_group.map(id).transpose()?,
                supplemental: security
                    .supplemental_groups
                    .iter()
                    .map(|g| id(*g))
                    .collect::<Result<_, _>>()?,
                strict: security.supplemental_groups_strict,
            },
            capabilities,
            no_new_privileges: security.no_new_privileges,
            seccomp: self.compile_seccomp(security, capabilities, folder)?,
            oom_score_adj: config.resources.oom_score_adj,
            cgroup_procs: self.inner.cgroups.procs_files(group),
        })
    }

    fn compile_seccomp(
        &self,
        security: &SecurityContext,
        capabilities: u64,
        folder: &Path,
    ) -> Result<Option<PathBuf>, RuntimeError> {
        let text = |e: seccomp::SeccompError| failed(e.to_string());
        if security.privileged {
            return Ok(None);
        }
        // The machine's, not the node's: on a foreign node the filter meets the emulator's calls.
        let machine = std::env::consts::ARCH;
        let profile = match &security.seccomp {
            Seccomp::Unconfined => return Ok(None),
            Seccomp::RuntimeDefault => seccomp::default_profile(machine, capabilities),
            Seccomp::Localhost(path) => seccomp::read_profile(path).map_err(text)?,
        };
        let program = seccomp::assemble(&profile, &seccomp::abis(machine).map_err(text)?).map_err(text)?;
        let bytes: Vec<u8> = program.iter().flat_map(|i| i.to_le_bytes()).collect();
        let path = folder.join("seccomp.bpf");
        fs::write(&path, bytes).map_err(io_failed("writing a seccomp filter"))?;
        Ok(Some(path))
    }

    fn make_group(
        &self,
        sandbox: &SandboxRecord,
        id: &str,
        config: &ContainerConfig,
        spec: &ContainerSpec,
    ) -> Result<(), RuntimeError> {
        let (cgroups, group) = (&self.inner.cgroups, sandbox.group(id));
        cgroups.create(&group).map_err(io_failed("making a cgroup"))?;
        cgroups.limit(&group, &config.resources).map_err(io_failed("setting limits"))?;
        if spec.privileged {
            return Ok(());
        }
        let rules = device_rules(config)?;
        if let Err(error) = cgroups.restrict_devices(&group, &rules) {
            tracing::warn!(container = id, %error, "device access is not restricted");
        }
        Ok(())
    }

    pub(super) async fn run_container(&self, id: &str) -> Result<(), RuntimeError> {
        let record = self.container(id)?;
        if record.state() != ContainerState::Created {
            return Err(failed(format!("container {id} was started before")));
        }
        let request = Request::Start { id: id.to_string() };
        let answer = ask(&self.sandbox_folder(&record.sandbox_id), &request).await;
        self.reread(&record.sandbox_id, id);
        self.announce(&record.sandbox_id);
        answer.map(|_| ())
    }

    pub(super) async fn end_container(&self, id: &str, grace_seconds: i64) -> Result<(), RuntimeError> {
        let Ok(record) = self.container(id) else { return Ok(()) };
        if record.state() != ContainerState::Running {
            return Ok(());
        }
        let folder = self.sandbox_folder(&record.sandbox_id);
        let ended = |s: &super::State| s.containers.get(id).is_none_or(|c| c.exit.is_some());
        if grace_seconds > 0 {
            let signal = signal_number(&record.stop_signal).unwrap_or(libc::SIGTERM);
            let _ = ask(&folder, &Request::Kill { id: id.to_string(), signal }).await;
            let grace = Duration::from_secs(u64::try_from(grace_seconds).unwrap_or(0));
            if self.wait_until(grace, ended).await {
                return Ok(());
            }
        }
        let _ = ask(&folder, &Request::Kill { id: id.to_string(), signal: libc::SIGKILL }).await;
        match self.wait_until(KILL, ended).await {
            true => Ok(()),
            false => Err(failed(format!("container {id} does not end"))),
        }
    }

    pub(super) async fn delete_container(&self, id: &str) -> Result<(), RuntimeError> {
        let Ok(record) = self.container(id) else { return Ok(()) };
        self.end_container(id, 0).await?;
        let folder = self.container_folder(&record.sandbox_id, id);
        let group = self.sandbox(&record.sandbox_id).map(|s| s.group(id));
        let cgroups = self.inner.cgroups.clone();
        let removed = tokio::task::spawn_blocking(move || {
            if let Ok(group) = group {
                cgroups.kill(&group);
                cgroups.remove(&group);
            }
            // Without its record it is rubbish, whatever happens next.
            let _ = fs::remove_file(folder.join("container.json"));
            fs::remove_dir_all(&folder)
        });
        let removed = removed.await.map_err(|e| failed(e.to_string()))?;
        self.inner.state.lock().containers.remove(id);
        match removed {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(io_failed(format!("removing container {id}"))(e))
            }
            _ => Ok(()),
        }
    }

    /// How to run a command in a container: as its first process, but for the command.
    pub(super) fn exec_spec(
        &self,
        id: &str,
        command: &[String],
        tty: bool,
    ) -> Result<(PathBuf, ProcessSpec), RuntimeError> {
        let record = self.container(id)?;
        if record.state() != ContainerState::Running {
            return Err(failed(format!("container {id} is not running")));
        }
        let folder = self.container_folder(&record.sandbox_id, id);
        let spec: ContainerSpec =
            super::read_json(&folder.join("spec.json")).ok_or_else(|| failed("spec.json can't be read"))?;
        let mut process = spec.process;
        process.args = command.to_vec();
        process.tty = tty;
        Ok((self.sandbox_folder(&record.sandbox_id), process))
    }

    pub(super) async fn open_exec(
        &self,
        id: &str,
        command: &[String],
        tty: bool,
        kill_on_close: bool,
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<(Connection, Vec<std::os::fd::OwnedFd>), RuntimeError> {
        let (sandbox, process) = self.exec_spec(id, command, tty)?;
        let request = Request::Exec { id: id.to_string(), process: Box::new(process), kill_on_close };
        let mut connection = Connection::open(&sandbox, &request, fds).await?;
        let (_, fds) = connection.next().await?;
        Ok((connection, fds))
    }
}

/// What every container may use, and the devices that it was given.
fn device_rules(config: &ContainerConfig) -> Result<Vec<DeviceRule>, RuntimeError> {
    let rule = |kind, major, minor, access: &str| DeviceRule { kind, major, minor, access: access.into() };
    let mut rules = cgroups::standard_devices();
    for device in &config.devices {
        let at = device.host_path.display().to_string();
        let metadata = fs::metadata(&device.host_path).map_err(io_failed(format!("device {at}")))?;
        let kind =
            if std::os::unix::fs::FileTypeExt::is_block_device(&metadata.file_type()) { 'b' } else { 'c' };
        let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        let access = if device.permissions.is_empty() { "rwm" } else { &device.permissions };
        rules.push(rule(kind, i64::from(major), i64::from(minor), access));
    }
    Ok(rules)
}

/// `SIGTERM`, `TERM` or `15`; also `SIGRTMIN+3`.
fn signal_number(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = bare.strip_prefix("RTMIN") {
        return Some(34 + offset.trim_start_matches('+').parse::<i32>().unwrap_or(0));
    }
    format!("SIG{bare}").parse::<nix::sys::signal::Signal>().ok().map(|s| s as i32)
}
