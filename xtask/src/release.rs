//! `cargo xtask release`: one static musl binary for each machine that Sampan runs on, tried under emulation.
//!
//! C (SQLite, ring) is compiled and everything linked by zig, which cargo-zigbuild drives; both come from PyPI into the
//! target folder. armv7 musl has no ready-made std in every toolchain, so its std is built from rust-src.
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

#[derive(clap::Args)]
pub struct Args {
    /// Only this architecture: amd64, arm64 or arm
    #[arg(long)]
    only: Option<String>,
}

struct Target {
    /// Kubernetes' name for it, as in the file's name: `sampan install --binary-dir` looks for it.
    arch: &'static str,
    triple: &'static str,
    builds_std: bool,
    /// Runs its programs on a machine of another architecture.
    emulator: Option<&'static str>,
}

const TARGETS: &[Target] = &[
    Target { arch: "amd64", triple: "x86_64-unknown-linux-musl", builds_std: false, emulator: None },
    Target {
        arch: "arm64",
        triple: "aarch64-unknown-linux-musl",
        builds_std: false,
        emulator: Some("qemu-aarch64-static"),
    },
    Target {
        arch: "arm",
        triple: "armv7-unknown-linux-musleabihf",
        builds_std: true,
        emulator: Some("qemu-arm-static"),
    },
];

pub fn run(args: &Args) -> Result<()> {
    let chosen: Vec<&Target> =
        TARGETS.iter().filter(|t| args.only.as_deref().is_none_or(|only| only == t.arch)).collect();
    ensure!(
        !chosen.is_empty(),
        "--only {}: not one of amd64, arm64, arm",
        args.only.as_deref().unwrap_or("")
    );
    let folder = target_folder()?;
    let tools = tools(&folder)?;
    let dist = folder.join("dist");
    std::fs::create_dir_all(&dist)?;
    let mut sums = String::new();
    for (number, target) in chosen.iter().enumerate() {
        println!("building for {} ({} of {})", target.triple, number + 1, chosen.len());
        build(target, &tools)?;
        let built = folder.join(target.triple).join("release/sampan");
        let name = format!("sampan-{}", target.arch);
        let kept = dist.join(&name);
        std::fs::copy(&built, &kept).with_context(|| format!("keeping {}", built.display()))?;
        let version = try_out(target, &kept)?;
        let megabytes = std::fs::metadata(&kept)?.len() as f64 / 1e6;
        println!("{}: {megabytes:.1} MB, says {version:?}", kept.display());
        sums.push_str(&output(Command::new("sha256sum").arg(&name).current_dir(&dist))?);
    }
    std::fs::write(dist.join("sha256sums.txt"), sums)?;
    Ok(())
}

fn build(target: &Target, tools: &Path) -> Result<()> {
    let mut command = Command::new(tools.join("cargo-zigbuild"));
    command.args(["rustc", "--release", "--package", "sampan", "--bin", "sampan", "--target", target.triple]);
    if target.builds_std {
        quiet(Command::new("rustup").args(["component", "add", "rust-src"]))?;
        // build-std is the one thing here that stable compilers have only behind this variable
        command.args(["-Zbuild-std=std,panic_unwind"]).env("RUSTC_BOOTSTRAP", "1");
        // nor does rust-src bring the C library's start files, as ready-made targets do: they are zig's
        command.args(["--", "-Clink-self-contained=no"]);
    } else {
        quiet(Command::new("rustup").args(["target", "add", target.triple]))?;
    }
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", tools.display()));
    command.env("CARGO_ZIGBUILD_ZIG_PATH", tools.join("python-zig"));
    let status = command.status().context("running cargo zigbuild")?;
    ensure!(status.success(), "cargo zigbuild for {} failed (see above)", target.triple);
    Ok(())
}

/// What the binary says its version is, on this machine or under emulation; checks that it needs no loader.
fn try_out(target: &Target, binary: &Path) -> Result<String> {
    let header = std::fs::read(binary)?;
    ensure!(!contains(&header, b"ld-musl-"), "{} is not static", binary.display());
    let mut command = match target.emulator {
        Some(emulator) => {
            let mut command = Command::new(emulator);
            command.arg(binary);
            command
        }
        None => Command::new(binary),
    };
    let version = output(command.arg("--version"))?;
    ensure!(version.starts_with("sampan "), "{} says {version:?}", binary.display());
    Ok(version.trim().to_string())
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// The folder with zig and cargo-zigbuild, made on first use.
fn tools(folder: &Path) -> Result<PathBuf> {
    let venv = folder.join("release-tools");
    let bin = venv.join("bin");
    if !bin.join("cargo-zigbuild").exists() {
        println!("fetching zig and cargo-zigbuild into {}", venv.display());
        quiet(Command::new("python3").args(["-m", "venv"]).arg(&venv))
            .context("making a Python environment (Debian: apt-get install python3-venv)")?;
        quiet(Command::new(bin.join("pip")).args(["install", "--quiet", "ziglang", "cargo-zigbuild"]))?;
    }
    Ok(bin)
}

fn target_folder() -> Result<PathBuf> {
    let metadata = output(Command::new(cargo()).args(["metadata", "--format-version=1", "--no-deps"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("cargo metadata names no target_directory")
}

fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_string())
}

fn quiet(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.output().with_context(|| format!("running {program}"))?;
    if !done.status.success() {
        bail!("{program} failed: {}", String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}
