//! What the tests of containers stand on: a node in a folder of its own, an image of busybox, and what is asked of both.
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use sampan_drivers::Runtime;
use sampan_drivers::runtime::*;
use sampan_runtime::{Node, RuntimeOptions};

pub const LIMIT: Duration = Duration::from_secs(20);

/// A node in a folder, cleaned away with its cgroups.
pub struct Bench {
    pub folder: tempfile::TempDir,
    pub cgroup: String,
    pub image: String,
}

impl Bench {
    pub fn options(&self) -> RuntimeOptions {
        RuntimeOptions {
            data_dir: self.folder.path().join("agent"),
            run_dir: self.folder.path().join("run"),
            cgroup_root: self.cgroup.clone(),
            platform: Platform {
                os: "linux".into(),
                architecture: if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }.into(),
                variant: None,
            },
            registries: Default::default(),
            shim_exe: std::env::current_exe().unwrap(),
        }
    }

    pub async fn node(&self) -> Node {
        Node::open(self.options()).await.unwrap()
    }

    pub fn sandbox(&self, name: &str) -> SandboxConfig {
        SandboxConfig {
            namespace: "default".into(),
            name: name.into(),
            uid: format!("uid-{name}"),
            attempt: 0,
            hostname: name.into(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            log_directory: self.folder.path().join("logs").join(name),
            dns_servers: vec![],
            dns_searches: vec![],
            dns_options: vec![],
            host_network: false,
            pid: NamespaceMode::Container,
            ipc: NamespaceMode::Pod,
            sysctls: BTreeMap::new(),
            cgroup_parent: format!("kubepods/pod-{name}"),
            resources: Default::default(),
            seccomp: Seccomp::RuntimeDefault,
        }
    }

    pub fn container(&self, script: &str) -> ContainerConfig {
        ContainerConfig {
            name: "main".into(),
            attempt: 0,
            image_id: self.image.clone(),
            image: "test/busybox:1".into(),
            command: vec!["/bin/sh".into(), "-c".into(), script.into()],
            args: vec![],
            working_dir: None,
            env: vec![("GREETING".into(), "hello".into())],
            mounts: vec![],
            devices: vec![],
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            log_path: format!("main/{}.log", sampan_world::random::suffix(6)).into(),
            stdin: false,
            stdin_once: false,
            tty: false,
            resources: Resources::default(),
            security: SecurityContext {
                privileged: false,
                add_capabilities: vec![],
                drop_capabilities: vec![],
                run_as_user: None,
                run_as_group: None,
                supplemental_groups: vec![],
                supplemental_groups_strict: false,
                readonly_rootfs: false,
                no_new_privileges: false,
                seccomp: Seccomp::RuntimeDefault,
                masked_paths: true,
            },
            stop_signal: None,
        }
    }

    pub fn log(&self, pod: &str, config: &ContainerConfig) -> String {
        fs::read_to_string(self.folder.path().join("logs").join(pod).join(&config.log_path))
            .unwrap_or_default()
    }

    /// What a container printed, without the times.
    pub fn said(&self, pod: &str, config: &ContainerConfig) -> String {
        let lines = self.log(pod, config);
        lines.lines().map(|l| l.splitn(4, ' ').nth(3).unwrap_or("").to_string() + "\n").collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let sandboxes = self.folder.path().join("agent/runtime/sandboxes");
        for entry in fs::read_dir(sandboxes).into_iter().flatten().flatten() {
            if let Ok(pid) = fs::read_to_string(entry.path().join("shim.pid")) {
                let _ = Command::new("kill")
                    .args(["-9", pid.trim()])
                    .stderr(std::process::Stdio::null())
                    .status();
            }
            let _ = Command::new("umount")
                .arg("-l")
                .arg(entry.path().join("shm"))
                .stderr(std::process::Stdio::null())
                .status();
        }
        std::thread::sleep(Duration::from_millis(200));
        let find = format!(
            "find /sys/fs/cgroup -depth -type d -path '*/{}*' -exec rmdir {{}} + 2>/dev/null",
            self.cgroup
        );
        let _ = Command::new("sh").args(["-c", &find]).status();
    }
}

/// A docker archive with busybox in it.
pub fn write_image(path: &Path) {
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    let mut add = |name: &str, kind: tar::EntryType, mode: u32, body: &[u8], link: &str| {
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(body.len() as u64);
        if link.is_empty() {
            layer.append_data(&mut header.clone(), name, body).unwrap();
        } else {
            layer.append_link(&mut header.clone(), name, link).unwrap();
        }
    };
    for folder in ["bin/", "etc/", "tmp/", "home/"] {
        add(folder, tar::EntryType::Directory, 0o755, b"", "");
    }
    add("bin/busybox", tar::EntryType::Regular, 0o755, &fs::read("/bin/busybox").unwrap(), "");
    for name in [
        "sh", "cat", "echo", "sleep", "id", "ls", "hostname", "stty", "tail", "dd", "mount", "mknod", "head",
        "nc", "ps", "kill", "grep", "touch", "pwd", "seq", "unshare", "test",
    ] {
        add(&format!("bin/{name}"), tar::EntryType::Symlink, 0o777, b"", "busybox");
    }
    add(
        "etc/passwd",
        tar::EntryType::Regular,
        0o644,
        b"root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n",
        "",
    );
    add("etc/group", tar::EntryType::Regular, 0o644, b"root:x:0:\nweb:x:1000:\nvideo:x:44:web\n", "");
    let layer = layer.into_inner().unwrap();
    let id = sampan_image::manifest::digest(&layer);
    let arch = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let config = format!(
        r#"{{"architecture":"{arch}","os":"linux","config":{{"Env":["PATH=/bin"],"Cmd":["sh"]}},"rootfs":{{"diff_ids":["{id}"]}}}}"#
    );
    let mut tar = tar::Builder::new(fs::File::create(path).unwrap());
    let list = br#"[{"Config":"c.json","RepoTags":["test/busybox:1"],"Layers":["l.tar"]}]"#;
    for (name, bytes) in [("c.json", config.as_bytes()), ("l.tar", &layer[..]), ("manifest.json", list)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes).unwrap();
    }
    tar.finish().unwrap();
}

pub async fn wait_for(node: &Node, id: &str, state: ContainerState) -> Container {
    let end = Instant::now() + LIMIT;
    loop {
        let status = node.container_status(id).await.unwrap();
        if status.state == state {
            return status;
        }
        assert!(Instant::now() < end, "{state:?} awaited, is {status:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs a container to its end.
pub async fn run(bench: &Bench, node: &Node, sandbox: &str, config: &ContainerConfig) -> Container {
    let id = node.create_container(sandbox, config).await.unwrap();
    if let Err(e) = node.start_container(&id).await {
        panic!("{e}: {:?}", bench.log("", config));
    }
    wait_for(node, &id, ContainerState::Exited).await
}

pub async fn sh(node: &Node, id: &str, script: &str) -> (String, String, i32) {
    let command = ["/bin/sh".to_string(), "-c".into(), script.into()];
    let (out, err, code) = node.exec_sync(id, &command, LIMIT, 1 << 20).await.unwrap();
    (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), code)
}
