//! What the compiler does not check: file headers and sizes, the direction of dependencies between the planes, banned
//! file names, modules that no list names, formatting of every file under version control.
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Lines before a file's tests; the bound is about 500, with some room.
const MAX_LINES: usize = 650;
/// Which planes a plane may depend on, besides itself where it says so.
const DIRECTIONS: &[(&str, &[&str])] = &[
    ("base", &["base"]),
    ("api", &["api", "base"]),
    ("control-plane", &["api", "base"]),
    ("node", &["api", "base"]),
    ("network", &["api", "base"]),
    ("image", &["api", "base"]),
    ("storage", &["api", "base"]),
    ("fleet", &["api", "base"]),
];
/// Dependencies that the design names as exceptions: a crate, and what it may import of its own or another plane.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("sampan-apiserver", "sampan-store"),
    ("sampan-apiserver", "sampan-admission"),
    ("sampan-kubelet", "sampan-volumes"),
    // the runtime pulls through the one registry client
    ("sampan-runtime", "sampan-image"),
    ("sampan-manifests", "sampan-image"),
    // steps of a build run in the runtime's containers, over layers that the runtime unpacks
    ("sampan-build", "sampan-image"),
    ("sampan-build", "sampan-runtime"),
    // one small encoder of netlink messages for all that configures the kernel's network
    ("sampan-pods", "sampan-netlink"),
    ("sampan-services", "sampan-netlink"),
    ("sampan-dns", "sampan-netlink"),
];
const BANNED_NAMES: &[&str] = &["mod.rs", "utils.rs", "util.rs", "common.rs", "helpers.rs", "manager.rs"];

pub fn run() -> Result<()> {
    // asked when run, not when built: several checkouts may share one target folder
    let own = std::env::var_os("CARGO_MANIFEST_DIR").context("run it as `cargo xtask tidy`")?;
    let root = Path::new(&own).parent().context("xtask has a parent")?.to_path_buf();
    let files = rust_files(&root)?;
    let mut wrong = Vec::new();
    for file in &files {
        wrong.extend(check_file(&root, file)?);
    }
    wrong.extend(check_directions(&root)?);
    wrong.extend(check_formatting(&root, &files)?);
    for line in &wrong {
        eprintln!("tidy: {line}");
    }
    match wrong.len() {
        0 => {
            println!("tidy: {} files are in order", files.len());
            Ok(())
        }
        n => bail!("{n} things are out of order"),
    }
}

fn rust_files(root: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"])
        .current_dir(root)
        .output()
        .context("running git ls-files")?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().map(PathBuf::from).filter(|f| root.join(f).exists()).collect())
}

fn check_file(root: &Path, file: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(root.join(file)).with_context(|| file.display().to_string())?;
    let shown = file.display();
    let mut wrong = Vec::new();
    if !text.starts_with("//!") {
        wrong.push(format!(
            "{shown}: does not open with `//!`: purpose, upstream counterpart, what stays true"
        ));
    }
    let lines = text.lines().take_while(|l| !l.starts_with("#[cfg(test)]")).count();
    let is_test = file.components().any(|c| c.as_os_str() == "tests") || file.ends_with("tests.rs");
    if lines > MAX_LINES && !is_test {
        wrong.push(format!("{shown}: {lines} lines before its tests; split it (at most {MAX_LINES})"));
    }
    let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if BANNED_NAMES.contains(&name.as_str()) {
        wrong.push(format!("{shown}: `{name}` says nothing about what is in it"));
    }
    for (number, line) in text.lines().enumerate() {
        let todo = ["TO", "DO"].concat();
        if line.contains(&format!("{todo}:")) || line.contains(&format!("{todo} ")) {
            wrong.push(format!(
                "{shown}:{}: {todo}: do it, or write down in docs/ what is missing",
                number + 1
            ));
        }
    }
    Ok(wrong)
}

fn check_directions(root: &Path) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let crates: Vec<(String, String, String)> = manifests(root)?;
    let plane_of = |name: &str| crates.iter().find(|(n, _, _)| n == name).map(|(_, plane, _)| plane.clone());
    for (name, plane, manifest) in &crates {
        let Some((_, allowed)) = DIRECTIONS.iter().find(|(p, _)| p == plane) else {
            wrong.push(format!("crates/{plane}: no plane of that name in ARCHITECTURE.md"));
            continue;
        };
        let (mut in_dependencies, mut seen) = (false, BTreeSet::new());
        for line in manifest.lines() {
            if line.starts_with('[') {
                in_dependencies =
                    line.starts_with("[dependencies") || line.starts_with("[build-dependencies");
            }
            let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if !in_dependencies || !dependency.starts_with("sampan-") || !seen.insert(dependency) {
                continue;
            }
            let Some(target) = plane_of(dependency) else { continue };
            let excepted = EXCEPTIONS.contains(&(name.as_str(), dependency));
            if !allowed.contains(&target.as_str()) && !excepted {
                wrong.push(format!("{name} ({plane}) must not depend on {dependency} ({target})"));
            }
        }
    }
    Ok(wrong)
}

/// (package, plane, manifest) of every crate below crates/.
fn manifests(root: &Path) -> Result<Vec<(String, String, String)>> {
    let mut found = Vec::new();
    for plane in fs::read_dir(root.join("crates"))?.flatten() {
        for krate in fs::read_dir(plane.path())?.flatten() {
            let Ok(manifest) = fs::read_to_string(krate.path().join("Cargo.toml")) else { continue };
            let name = manifest.lines().find_map(|l| l.strip_prefix("name = ")).unwrap_or_default();
            found.push((
                name.trim_matches('"').to_string(),
                plane.file_name().to_string_lossy().into_owned(),
                manifest.clone(),
            ));
        }
    }
    found.sort();
    Ok(found)
}

/// rustfmt over every file: `cargo fmt` skips modules that a macro declares.
fn check_formatting(root: &Path, files: &[PathBuf]) -> Result<Vec<String>> {
    let output = Command::new("rustfmt")
        .args(["--check", "--edition", "2024", "-l", "--config", "skip_children=true"])
        .args(files)
        .current_dir(root)
        .output();
    let output = match output {
        Ok(output) if output.status.success() => return Ok(Vec::new()),
        // skip_children is not stable everywhere
        _ => Command::new("rustfmt")
            .args(["--check", "--edition", "2024", "-l"])
            .args(files)
            .current_dir(root)
            .output()
            .context("running rustfmt")?,
    };
    if output.status.success() {
        return Ok(Vec::new());
    }
    let listed =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok(listed.lines().take(20).map(|l| format!("not formatted: {l}")).collect())
}
