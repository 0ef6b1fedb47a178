//! A binary tried out, under user emulation where it is for another machine: its version, and images between an archive
//! and a registry that the same binary serves.
//!
//! What needs a node (`image import`, `ls`) cannot be tried so: user emulation has no namespaces, netlink or seccomp. It
//! is `make test-vm`'s.
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Says which version the binary is; an error says what does not work.
pub fn run(emulator: Option<&str>, binary: &Path) -> Result<String> {
    let bytes = std::fs::read(binary).with_context(|| format!("reading {}", binary.display()))?;
    ensure!(
        !contains(&bytes, b"ld-musl-") && !contains(&bytes, b"/ld-linux"),
        "{} is not static",
        binary.display()
    );
    ensure!(contains(&bytes, b"sampan-release:v"), "{} does not say which release it is", binary.display());
    drop(bytes);
    let folder = tempfile::tempdir()?;
    let tried = Tried { emulator, binary, folder: folder.path() };
    let version = tried.output(&["--version"])?;
    ensure!(version.starts_with("sampan "), "{} says {version:?}", binary.display());
    tried.images().with_context(|| format!("the image commands of {}", binary.display()))?;
    Ok(version.trim().to_string())
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

struct Tried<'a> {
    emulator: Option<&'a str>,
    binary: &'a Path,
    folder: &'a Path,
}

/// Ended with the value, whatever happened; it can go on telling what it does.
struct Served(Child, Option<BufReader<ChildStderr>>);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Tried<'_> {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = match self.emulator {
            Some(emulator) => {
                let mut command = Command::new(emulator);
                command.arg(self.binary);
                command
            }
            None => Command::new(self.binary),
        };
        command.args(args).current_dir(self.folder).env("HOME", self.folder);
        command
    }

    fn output(&self, args: &[&str]) -> Result<String> {
        super::output(&mut self.command(args)).with_context(|| args.join(" "))
    }

    /// An archive's image into a registry, looked at there, and out again.
    fn images(&self) -> Result<()> {
        let digest = write_layout(&self.folder.join("image"))?;
        let (_served, address) = self.serve()?;
        let image = format!("{address}/trial/box:1");
        let copied = self.output(&["image", "copy", "--insecure", "oci:image", &image])?;
        ensure!(copied.contains(&digest), "copied as {copied:?}, not {digest}");
        let shown = self.output(&["image", "inspect", "--remote", "--insecure", &image])?;
        ensure!(shown.contains("trial-label"), "inspect shows {shown}");
        self.output(&["image", "export", "--insecure", "--output", "out.tar", &image])?;
        let archive = std::fs::read(self.folder.join("out.tar"))?;
        ensure!(
            contains(&archive, digest.trim_start_matches("sha256:").as_bytes()),
            "{digest} is not in the archive"
        );
        let list = format!("{address}/trial/list:1");
        self.output(&["manifest", "create", "--insecure", &list, &image])?;
        let pushed = self.output(&["manifest", "push", "--insecure", &list])?;
        ensure!(pushed.contains("sha256:"), "manifest push says {pushed:?}");
        Ok(())
    }

    fn serve(&self) -> Result<(Served, String)> {
        // free at this moment, and nobody else asks for it
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let address = format!("127.0.0.1:{port}");
        let args =
            ["registry", "serve", "--http-addr", &address, "--storage-filesystem-rootdirectory", "registry"];
        let mut child = self.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let mut told = BufReader::new(child.stderr.take().context("its standard error")?);
        let mut served = Served(child, None);
        let (mut said, mut line) = (String::new(), String::new());
        while told.read_line(&mut line)? > 0 {
            if line.contains("the registry serves") {
                served.1 = Some(told);
                return Ok((served, address));
            }
            said.push_str(&line);
            line.clear();
        }
        anyhow::bail!("registry serve ended: {said}")
    }
}

/// A small image as an OCI layout; says its digest.
fn write_layout(folder: &Path) -> Result<String> {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs)?;
    let put = |bytes: &[u8]| -> Result<String> {
        let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        std::fs::write(blobs.join(&hex), bytes)?;
        Ok(format!("sha256:{hex}"))
    };
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(5);
    header.set_mode(0o644);
    layer.append_data(&mut header, "hello", &b"hello"[..])?;
    let layer = layer.into_inner()?;
    let layer_digest = put(&layer)?;
    let config = json!({"architecture": "arm64", "os": "linux", "config": {"Labels": {"trial-label": "yes"}},
        "rootfs": {"type": "layers", "diff_ids": [layer_digest]}});
    let config = serde_json::to_vec(&config)?;
    let described =
        |media: &str, digest: &str, size: usize| json!({"mediaType": media, "digest": digest, "size": size});
    let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described("application/vnd.oci.image.config.v1+json", &put(&config)?, config.len()),
        "layers": [described("application/vnd.oci.image.layer.v1.tar", &layer_digest, layer.len())]});
    let manifest = serde_json::to_vec(&manifest)?;
    let digest = put(&manifest)?;
    let mut entry: Value = described("application/vnd.oci.image.manifest.v1+json", &digest, manifest.len());
    entry["annotations"] = json!({"org.opencontainers.image.ref.name": "1"});
    std::fs::write(
        folder.join("index.json"),
        serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [entry]}))?,
    )?;
    std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(digest)
}
