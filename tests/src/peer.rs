//! Other programs that speak to registries, and registries for them to speak to.
//!
//! Registries listen on 127.0.0.1 and end with their value; every case has its own home, so that nobody's `docker login`
//! plays a part.
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cluster::Space;
use crate::image::{Entry, digest, layer};
use crate::process::{Ran, run};
use crate::{seconds, wait_for};

/// Machines as ELF headers name them.
pub const AMD64: u16 = 62;
pub const ARM64: u16 = 183;

/// A user `user` with the password `secret`.
pub const HTPASSWD: &str = "user:$2b$05$kvoflfB1aUsZDQFYrOCIVeyDy/7CYmm/d7t/6HAe8yPGJ/dAkve.C";

/// docker-registry on a free port; it ends with this value.
pub struct Peer {
    pub host: String,
    child: Child,
    _folder: TempDir,
}

impl Peer {
    pub fn start(auth: Option<&str>) -> Result<Peer> {
        let folder = tempfile::tempdir()?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let host = format!("127.0.0.1:{port}");
        let mut config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nhttp: {{addr: '{host}'}}\n\
             storage: {{filesystem: {{rootdirectory: '{}'}}, delete: {{enabled: true}}}}\n",
            folder.path().join("data").display()
        );
        if let Some(line) = auth {
            let path = folder.path().join("htpasswd");
            std::fs::write(&path, format!("{line}\n"))?;
            config.push_str(&format!("auth: {{htpasswd: {{realm: r, path: '{}'}}}}\n", path.display()));
        }
        let path = folder.path().join("config.yml");
        std::fs::write(&path, config)?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&path);
        Peer::run(command, host, folder).context("docker-registry: Debian's package of that name has it")
    }

    /// Our own, which knows where an upload stands after it broke; docker-registry 2 forgets it then.
    pub fn ours(space: &Space, args: &[String]) -> Result<Peer> {
        let folder = tempfile::tempdir()?;
        let host = format!("127.0.0.1:{}", TcpListener::bind("127.0.0.1:0")?.local_addr()?.port());
        let mut command = Command::new(&space.cluster.sampan);
        command.args(["registry", "serve"]).args(args).env("REGISTRY_HTTP_ADDR", &host);
        command.env("REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY", folder.path());
        Peer::run(command, host, folder)
    }

    fn run(mut command: Command, host: String, folder: TempDir) -> Result<Peer> {
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let peer = Peer { host, child, _folder: folder };
        wait_for("the registry", seconds(20), || {
            Ok(TcpStream::connect(&peer.host).map(drop).map_err(|e| e.to_string()))
        })?;
        Ok(peer)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A user's home, with the commands run in it.
pub struct Home {
    sampan: PathBuf,
    folder: TempDir,
}

impl Home {
    pub fn new(space: &Space) -> Result<Home> {
        Ok(Home { sampan: space.cluster.sampan.clone(), folder: tempfile::tempdir()? })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Result<Ran> {
        let mut command = Command::new(program);
        command.args(args).env("HOME", self.folder.path()).current_dir(self.folder.path());
        command.env_remove("XDG_STATE_HOME").env_remove("DOCKER_CONFIG").env_remove("SAMPAN_MANIFESTS");
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.folder.path().display()));
        run(&mut command, b"", seconds(60))
    }

    pub fn sampan(&self, args: &[&str]) -> Result<Ran> {
        self.command(&self.sampan, args)
    }

    pub fn skopeo(&self, args: &[&str]) -> Result<String> {
        self.command("skopeo", &[&["--insecure-policy"], args].concat())?.ok()
    }

    /// What a registry has under a name, as it is.
    pub fn raw(&self, name: &str) -> Result<Value> {
        let name = format!("docker://{name}");
        Ok(serde_json::from_str(&self.skopeo(&["inspect", "--raw", "--tls-verify=false", &name])?)?)
    }

    /// Pushes an image of one platform by skopeo, as Docker or OCI has it.
    pub fn push(&self, name: &str, archive: &Path, arch: &str, format: &str) -> Result<()> {
        let from = format!("oci-archive:{}", archive.display());
        let to = format!("docker://{name}");
        let args = [
            "--override-arch",
            arch,
            "copy",
            "-q",
            "--dest-tls-verify=false",
            "--format",
            format,
            &from,
            &to,
        ];
        self.skopeo(&args).map(drop)
    }

    /// An archive of an image whose configuration says `arch` and whose shell is a program for `machine`.
    pub fn archive(&self, arch: &str, machine: u16, payload: &[u8]) -> Result<PathBuf> {
        let mut shell = b"\x7fELF\x02\x01\x01".to_vec();
        shell.resize(18, 0);
        shell.extend(machine.to_le_bytes());
        shell.resize(64, 0);
        let tar = layer(&[
            Entry::Folder("bin/", 0o755),
            Entry::Link("bin/sh", "busybox"),
            Entry::File("bin/busybox", 0o755, &shell),
            Entry::File("payload", 0o644, payload),
            Entry::File("arch", 0o644, arch.as_bytes()),
        ])?;
        let path = self.path(&format!("{arch}-{machine}-{}.tar", payload.len()));
        let kinds = ["layer.v1.tar", "config.v1+json", "manifest.v1+json"];
        let [layer_type, config_type, type_] = kinds.map(|k| format!("application/vnd.oci.image.{k}"));
        let mut blobs = BTreeMap::new();
        let mut add = |bytes: Vec<u8>, media_type: &str| {
            let described = json!({"mediaType": media_type, "digest": digest(&bytes), "size": bytes.len()});
            blobs.insert(digest(&bytes), bytes);
            described
        };
        let config = json!({"architecture": arch, "os": "linux", "config": {"Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(&tar)]}});
        let layers = json!([add(tar, &layer_type)]);
        let config = add(config.to_string().into_bytes(), &config_type);
        let manifest = json!({"schemaVersion": 2, "mediaType": type_, "config": config, "layers": layers});
        let mut top = add(manifest.to_string().into_bytes(), &type_);
        top["platform"] = json!({"os": "linux", "architecture": arch});
        let index = json!({"schemaVersion": 2, "manifests": [top]}).to_string();
        let mut out = tar::Builder::new(std::fs::File::create(&path)?);
        let mut file = |name: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            out.append_data(&mut header, name, bytes)
        };
        file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        file("index.json", index.as_bytes())?;
        for (digest, bytes) in &blobs {
            file(&format!("blobs/{}", digest.replacen(':', "/", 1)), bytes)?;
        }
        out.finish()?;
        Ok(path)
    }
}

/// Docker's command line client: this machine's, or out of Debian's package.
pub fn docker() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if let Some(found) = std::env::split_paths(&path).map(|p| p.join("docker")).find(|p| p.is_file()) {
        return Ok(found);
    }
    let folder = crate::cluster::target_folder()?.join("tmp/docker");
    let program = folder.join("usr/bin/docker");
    if program.exists() {
        return Ok(program);
    }
    std::fs::create_dir_all(&folder)?;
    let script = "get() { apt-get -qq download docker-cli || apt-get -qq download docker.io; }
        get || { apt-get -qq update; get; }; for p in docker*.deb; do dpkg-deb -x $p .; done";
    let ran = run(Command::new("sh").args(["-ec", script]).current_dir(&folder), b"", seconds(120))?;
    ensure!(program.exists(), "no docker on this machine, and Debian's package did not come: {}", ran.text());
    Ok(program)
}

/// A way to `to` where connections break after `after` bytes, whichever way those go, until `breaks` of them did.
pub fn bad_line(to: &str, after: usize, breaks: usize) -> Result<(String, Arc<AtomicUsize>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (host, to) = (listener.local_addr()?.to_string(), to.to_string());
    let broken = Arc::new(AtomicUsize::new(0));
    let count = broken.clone();
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(far) = TcpStream::connect(&to) else { continue };
            for (mut from, mut into) in
                [(near.try_clone(), far.try_clone()), (far.try_clone(), near.try_clone())]
                    .into_iter()
                    .filter_map(|(a, b)| Some((a.ok()?, b.ok()?)))
            {
                let count = count.clone();
                std::thread::spawn(move || {
                    let (mut buffer, mut through) = (vec![0; 16 * 1024], 0);
                    while let Ok(n @ 1..) = from.read(&mut buffer) {
                        through += n;
                        let breaks = through > after && count.fetch_add(1, Ordering::SeqCst) < breaks;
                        if breaks || into.write_all(&buffer[..n]).is_err() {
                            break;
                        }
                    }
                    let _ = from.shutdown(std::net::Shutdown::Both);
                    let _ = into.shutdown(std::net::Shutdown::Both);
                });
            }
        }
    });
    Ok((host, broken))
}
