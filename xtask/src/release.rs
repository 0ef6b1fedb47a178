//! `cargo xtask release`: one static musl binary for each machine that Sampan runs on, tried under emulation, their
//! digests, and all of them in one bundle.
//!
//! C (SQLite, ring) is compiled and everything linked by zig, which cargo-zigbuild drives; both come from PyPI into the
//! target folder. armv7 musl has no ready-made std in every toolchain, so its std is built from rust-src.
mod package;
mod trial;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

#[derive(clap::Args)]
pub struct Args {
    /// Only this architecture: amd64, arm64 or arm
    #[arg(long)]
    only: Option<String>,
    /// Build nothing: try out and pack the binaries that lie in the target folder's dist
    #[arg(long)]
    pack: bool,
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
    let dist = folder.join("dist");
    std::fs::create_dir_all(&dist)?;
    if !args.pack {
        let tools = tools(&folder)?;
        for (number, target) in chosen.iter().enumerate() {
            println!("building for {} ({} of {})", target.triple, number + 1, chosen.len());
            build(target, &tools)?;
            let built = folder.join(target.triple).join("release/sampan");
            let kept = dist.join(target.file());
            std::fs::copy(&built, &kept).with_context(|| format!("keeping {}", built.display()))?;
        }
    }
    for target in &chosen {
        let binary = dist.join(target.file());
        let version = trial::run(target.emulator, &binary)?;
        let megabytes = std::fs::metadata(&binary)?.len() as f64 / 1e6;
        println!("{}: {megabytes:.1} MB, says {version:?}", binary.display());
    }
    // a bundle is whole or is not
    let names: Vec<String> =
        TARGETS.iter().map(Target::file).filter(|name| dist.join(name).exists()).collect();
    let sums = package::sums(&dist, &names)?;
    match names.len() == TARGETS.len() {
        true => package::bundle(&dist, &names, &sums)?,
        false => println!("no {}: of {} binaries there are {}", package::BUNDLE, TARGETS.len(), names.len()),
    }
    Ok(())
}

impl Target {
    fn file(&self) -> String {
        format!("sampan-{}", self.arch)
    }
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
