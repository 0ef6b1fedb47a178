//! RUN: a program over the layers so far, and what it sees besides them.
//!
//! Upstream counterparts: BuildKit's `convert_runmount.go` and `executor`. The program runs in a container that the
//! runtime makes, as restricted as a pod's. Folders and files that mounts need and the image hasn't got are put into a
//! layer of their own between the image's and the writable one, so none of them is left in what the step makes. What
//! stays true: a secret is on no disk (it lies on a tmpfs), in no layer, no history and no key of the cache.
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::mount::{MsFlags, mount};
use sampan_runtime::{Step, StepMount};

use crate::build::Builder;
use crate::context::Context;
use crate::copy::{self, Target};
use crate::dockerfile::{Mount, MountType, Network, Script, Source};
use crate::dockerignore::Ignore;
use crate::error::{BuildError, io_error, refused};
use crate::overlay::{self, Mounted, Upper};
use crate::progress::Task;
use crate::rooted::{Root, absolute, is_folder};
use crate::select::{Wanted, select};
use crate::store::{CacheMount, Layer};

const HOSTNAME: &str = "buildkitsandbox";
const LINE_MAX_BYTES: u64 = 16 * 1024;
/// Lines of a failed step that its error shows.
const SHOWN_LINES: usize = 30;
const SYSTEM: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A RUN, with everything about it known.
pub struct Running<'a> {
    pub script: &'a Script,
    pub words: Vec<String>,
    pub env: Vec<String>,
    pub user: String,
    pub workdir: String,
    pub network: Network,
    pub mounts: &'a [Mount],
    /// Layers of the mounts' sources, where those are stages or images.
    pub sources: Vec<Option<Vec<Layer>>>,
    pub layers: &'a [Layer],
}

/// Why a step did not end well, with what it said last.
pub enum Failure {
    Build(BuildError),
    Exit { message: String, output: Vec<String> },
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Failure {
        Failure::Build(error)
    }
}

/// What mounts need as long as the step runs.
#[derive(Default)]
struct Prepared {
    mounts: Vec<StepMount>,
    env: Vec<String>,
    /// Targets with whether they are folders, for those that the image may lack.
    places: Vec<(String, bool)>,
    caches: Vec<CacheMount>,
    // these go last, and in this order
    mounted: Vec<Mounted>,
    uppers: Vec<Upper>,
}

impl Prepared {
    fn add(&mut self, source: PathBuf, target: String, readonly: bool) -> Result<(), BuildError> {
        let meta = fs::metadata(&source).map_err(io_error(source.display().to_string()))?;
        self.places.push((target.clone(), meta.is_dir()));
        self.mounts.push(StepMount { source, target, readonly });
        Ok(())
    }
}

/// Runs it; what it wrote is in the returned folder.
pub fn run(builder: &Builder<'_>, running: &Running<'_>, task: &Task) -> Result<Upper, Failure> {
    let upper = Upper::new(builder.store, running.layers, builder.scratch.place("step"))?;
    let mut prepared = Prepared::default();
    machine_files(builder, &upper.folder, &mut prepared)?;
    for (mount, layers) in running.mounts.iter().zip(&running.sources) {
        prepare(builder, running, mount, layers.as_deref(), &mut prepared)?;
    }
    let mut words = running.words.clone();
    if let Script::File { name, contents } = running.script {
        let folder = crate::download::inline(builder.scratch, name, contents, 0o755)?;
        let target = format!("/dev/pipes/{name}");
        prepared.mounts.push(StepMount { source: folder.join(name), target: target.clone(), readonly: true });
        words = vec![target];
    }
    let mut layers = overlay::lower(running.layers);
    if let Some(places) = missing_places(builder, running, &upper, &mut prepared)? {
        layers.insert(0, places.display().to_string());
    }
    let step = Step {
        folder: upper.folder.clone(),
        layers_folder: builder.store.layers_folder(),
        layers,
        args: words,
        env: running.env.iter().cloned().chain(prepared.env.clone()).collect(),
        cwd: running.workdir.clone(),
        user: running.user.clone(),
        mounts: prepared.mounts.clone(),
        host_network: running.network != Network::None,
        hostname: HOSTNAME.into(),
        cgroup_root: builder.options.cgroup_root.clone(),
        group: builder.scratch.id.clone(),
    };
    if let Some(warning) = step.prepare().map_err(|e| refused(e.to_string()))? {
        builder.warn_once(&warning);
    }
    let output = execute(builder, &step, task);
    step.remove_group();
    let output = output?;
    prepared.caches.iter().for_each(CacheMount::measure);
    builder.cancel.check()?;
    let ended = step.ended().map_err(|e| refused(e.to_string()));
    let went_well = matches!(&ended, Ok(ended) if ended.code == 0 && ended.error.is_none());
    if !went_well && builder.store.is_full() {
        return Err(builder.store.io("running a step".into(), rustix::io::Errno::NOSPC.into()).into());
    }
    let ended = ended?;
    let shown = running.words.iter().map(|w| w.replace('\n', " ")).collect::<Vec<_>>().join(" ");
    match (ended.code, ended.error) {
        (0, None) => Ok(upper),
        (_, Some(error)) => {
            let hint = match error.contains("exec format error") {
                true => "; it is a program for another machine, and no emulator takes it",
                false => "",
            };
            let message = format!("process \"{shown}\" could not be started: {error}{hint}");
            Err(Failure::Exit { message, output })
        }
        (code, None) => {
            let why = if code == 137 { " (killed, perhaps for want of memory)" } else { "" };
            let message =
                format!("process \"{shown}\" did not complete successfully: exit code: {code}{why}");
            Err(Failure::Exit { message, output })
        }
    }
}

/// Starts the step's process and tells what it says; its last lines.
fn execute(builder: &Builder<'_>, step: &Step, task: &Task) -> Result<Vec<String>, BuildError> {
    let starting = || io_error("starting a step");
    let (reader, writer) = io::pipe().map_err(starting())?;
    let mut command = step.command(&builder.options.exe);
    command.stdin(Stdio::null()).stdout(writer.try_clone().map_err(starting())?).stderr(writer);
    // the environment of whoever builds is not the step's
    command.env_clear().current_dir("/");
    let mut child = command.spawn().map_err(starting())?;
    // with it go our ends of the pipe
    drop(command);
    builder.cancel.set_child(Some(child.id()));
    let mut last: std::collections::VecDeque<String> = Default::default();
    let mut lines = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut lines).take(LINE_MAX_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        }
        let text = readable(&line);
        task.line(&text);
        last.push_back(text);
        if last.len() > SHOWN_LINES {
            last.pop_front();
        }
    }
    builder.cancel.set_child(None);
    child.wait().map_err(io_error("waiting for a step"))?;
    Ok(last.into())
}

/// A line without its end and without what would move the terminal's cursor.
fn readable(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_end_matches(['\n', '\r']);
    // what a progress bar shows at last
    let text = text.rsplit('\r').next().unwrap_or(text);
    text.chars().filter(|c| *c == '\t' || *c == '\x1b' || !c.is_control()).collect()
}

/// The machine's resolver, and names for the network.
fn machine_files(builder: &Builder<'_>, folder: &Path, prepared: &mut Prepared) -> Result<(), BuildError> {
    let writing = || io_error("writing a step's /etc/hosts");
    let mut hosts = format!("127.0.0.1\tlocalhost {HOSTNAME}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for (name, address) in &builder.options.add_hosts {
        hosts.push_str(&format!("{address}\t{name}\n"));
    }
    let resolv = fs::read("/etc/resolv.conf").unwrap_or_default();
    for (name, bytes) in [("hosts", hosts.as_bytes()), ("resolv.conf", &resolv)] {
        let path = folder.join(name);
        fs::write(&path, bytes).map_err(writing())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(writing())?;
        prepared.add(path, format!("/etc/{name}"), true)?;
    }
    Ok(())
}

fn prepare(
    builder: &Builder<'_>,
    running: &Running<'_>,
    mount: &Mount,
    layers: Option<&[Layer]>,
    prepared: &mut Prepared,
) -> Result<(), BuildError> {
    let target = absolute(&running.workdir, &mount.target);
    if target == "/" && !matches!(mount.kind, MountType::Secret | MountType::Ssh) {
        return Err(refused(format!("invalid mount target {:?}", mount.target)));
    }
    match mount.kind {
        MountType::Ssh => {
            Err(refused("RUN --mount=type=ssh is not supported; hand a key over with --mount=type=secret"))
        }
        MountType::Tmpfs => {
            let size = (mount.size_bytes > 0).then(|| format!(",size={}", mount.size_bytes));
            let at = tmpfs(builder, &format!("mode=1777{}", size.unwrap_or_default()), prepared)?;
            prepared.add(at, target, mount.read_only)
        }
        MountType::Secret => secret(builder, mount, target, prepared),
        MountType::Cache => {
            let cache = builder.store.cache_mount(&mount.id, mount.sharing, builder.cancel)?;
            if cache.is_new {
                fill_cache(builder, mount, layers, &cache.data)?;
            }
            let below = below(&cache.data, if layers.is_some() { "" } else { &mount.source })?;
            prepared.caches.push(cache);
            prepared.add(below, target, mount.read_only)
        }
        MountType::Bind => {
            let root = match layers {
                Some(layers) if mount.read_only => {
                    let view = overlay::view(builder.store, layers, builder.scratch.place("from"))?;
                    let path = view.path().to_path_buf();
                    prepared.mounted.push(view);
                    path
                }
                Some(layers) => {
                    let upper = Upper::new(builder.store, layers, builder.scratch.place("from"))?;
                    let view = upper.mount(builder.store, layers)?;
                    let path = view.path().to_path_buf();
                    prepared.mounted.push(view);
                    prepared.uppers.push(upper);
                    path
                }
                None => copy_of_context(builder.context, &mount.source, builder.scratch.place("context"))?,
            };
            let source = if layers.is_some() { below(&root, &mount.source)? } else { root };
            prepared.add(source, target, mount.read_only)
        }
    }
}

/// A path below a folder, which no symlink leads out of.
fn below(folder: &Path, source: &str) -> Result<PathBuf, BuildError> {
    let finding = || io_error(format!("mount source {source:?}"));
    let root = Root::open(folder).map_err(finding())?;
    let found = root.resolve(Path::new(source), true).map_err(finding())?;
    match root.stat(&found).map_err(finding())? {
        Some(_) => Ok(folder.join(found)),
        None => Err(refused(format!("mount source {source:?} not found"))),
    }
}

fn tmpfs(builder: &Builder<'_>, options: &str, prepared: &mut Prepared) -> Result<PathBuf, BuildError> {
    let at = builder.scratch.place("tmpfs");
    fs::create_dir(&at).map_err(io_error("mounting a tmpfs"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), &at, Some("tmpfs"), flags, Some(options))
        .map_err(|e| io_error("mounting a tmpfs")(e.into()))?;
    prepared.mounted.push(Mounted::at(at.clone()));
    Ok(at)
}

fn secret(
    builder: &Builder<'_>,
    mount: &Mount,
    target: String,
    prepared: &mut Prepared,
) -> Result<(), BuildError> {
    let Some(value) = builder.options.secrets.get(&mount.id) else {
        if mount.required {
            return Err(refused(format!(
                "secret {}: not found; give it with --secret id={},src=FILE",
                mount.id, mount.id
            )));
        }
        return Ok(());
    };
    if let Some(name) = &mount.env {
        prepared.env.push(format!("{name}={}", String::from_utf8_lossy(value)));
    }
    if mount.target.is_empty() {
        return Ok(());
    }
    let at = tmpfs(builder, "mode=0700,size=1m", prepared)?;
    let path = at.join("secret");
    let written = (|| {
        fs::write(&path, value)?;
        std::os::unix::fs::chown(&path, Some(mount.uid.unwrap_or(0)), Some(mount.gid.unwrap_or(0)))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mount.mode.unwrap_or(0o400)))
    })();
    written.map_err(io_error(format!("secret {}", mount.id)))?;
    prepared.add(path, target, true)
}

/// A cache mount's first content and owner.
fn fill_cache(
    builder: &Builder<'_>,
    mount: &Mount,
    layers: Option<&[Layer]>,
    data: &Path,
) -> Result<(), BuildError> {
    if let Some(layers) = layers {
        let view = overlay::view(builder.store, layers, builder.scratch.place("from"))?;
        let root = Root::open(view.path()).map_err(io_error("a cache mount's source"))?;
        copy_tree(crate::select::Tree { root: &root, ignore: None, is_context: false }, &mount.source, data)?;
    }
    let owned = std::os::unix::fs::chown(data, Some(mount.uid.unwrap_or(0)), Some(mount.gid.unwrap_or(0)));
    let mode = fs::Permissions::from_mode(mount.mode.unwrap_or(0o755));
    owned.and_then(|()| fs::set_permissions(data, mode)).map_err(io_error("a cache mount's owner"))
}

/// The part of the build context that is mounted, as `.dockerignore` leaves it.
fn copy_of_context(context: &Context, source: &str, at: PathBuf) -> Result<PathBuf, BuildError> {
    fs::create_dir(&at).map_err(io_error("copying the build context"))?;
    let tree = context.tree();
    let none = Ignore::default();
    let source = if source.is_empty() { "." } else { source };
    let picks = select(tree, source, &Wanted { exclude: &none, parents: false })?;
    let [pick] = picks.as_slice() else {
        return Err(refused(format!("mount source {source:?}: one file or folder is needed")));
    };
    let root = Root::open(&at).map_err(io_error("copying the build context"))?;
    copy::copy(tree, pick, &Target { root: &root, destination: "/", owner: None, mode: None })?;
    Ok(if pick.is_folder { at } else { at.join(&pick.name) })
}

fn copy_tree(tree: crate::select::Tree<'_>, source: &str, to: &Path) -> Result<(), BuildError> {
    let none = Ignore::default();
    let source = if source.is_empty() { "." } else { source };
    let root = Root::open(to).map_err(io_error(to.display().to_string()))?;
    for pick in select(tree, source, &Wanted { exclude: &none, parents: false })? {
        copy::copy(tree, &pick, &Target { root: &root, destination: "/", owner: None, mode: None })?;
    }
    Ok(())
}

/// Makes the layer with what mounts lie on and the image lacks, and says where in the image the mounts really go.
fn missing_places(
    builder: &Builder<'_>,
    running: &Running<'_>,
    upper: &Upper,
    prepared: &mut Prepared,
) -> Result<Option<PathBuf>, BuildError> {
    let looking = || io_error("looking for a mount's place");
    let view = overlay::view(builder.store, running.layers, upper.folder.join("view"))?;
    let root = Root::open(view.path()).map_err(looking())?;
    let places = upper.folder.join("places");
    fs::create_dir(&places).map_err(looking())?;
    overlay::same_folder(view.path(), &places).map_err(looking())?;
    let mut made = false;
    let wanted = SYSTEM.iter().map(|s| (s.to_string(), true)).chain(prepared.places.clone());
    for (target, folder) in wanted {
        if SYSTEM.iter().any(|s| target.strip_prefix(s).is_some_and(|rest| rest.starts_with('/'))) {
            continue;
        }
        let real = root.resolve(Path::new(&target), true).map_err(looking())?;
        let named = format!("/{}", real.display());
        prepared.mounts.iter_mut().filter(|m| m.target == target).for_each(|m| m.target.clone_from(&named));
        if root.stat(&real).map_err(looking())?.is_none() {
            make_place(&root, view.path(), &places, &real, folder)?;
            made = true;
        }
    }
    Ok(made.then_some(places))
}

fn make_place(root: &Root, view: &Path, places: &Path, path: &Path, folder: bool) -> Result<(), BuildError> {
    let making = || io_error(format!("making /{} to mount on", path.display()));
    let at = places.join(path);
    if let Some(above) = path.parent().filter(|p| !p.as_os_str().is_empty())
        && !places.join(above).is_dir()
    {
        make_place(root, view, places, above, true)?;
    }
    if at.exists() {
        return Ok(());
    }
    match root.stat(path).map_err(making())? {
        // a folder that the image has looks as it does there
        Some(stat) if is_folder(&stat) => {
            fs::create_dir(&at).map_err(making())?;
            overlay::same_folder(&view.join(path), &at).map_err(making())
        }
        Some(_) => Err(refused(format!("/{} is in the way of a mount", path.display()))),
        None if folder => {
            fs::create_dir(&at).map_err(making())?;
            fs::set_permissions(&at, fs::Permissions::from_mode(0o755)).map_err(making())
        }
        None => {
            let file = File::create(&at).map_err(making())?;
            file.set_permissions(fs::Permissions::from_mode(0o644)).map_err(making())
        }
    }
}

/// What a mount's source is worth in the key of the cache.
pub fn mount_key(
    builder: &Builder<'_>,
    mount: &Mount,
    layers: Option<&[Layer]>,
) -> Result<String, BuildError> {
    let from = match (mount.kind, layers) {
        (MountType::Bind, Some(layers)) => crate::store::chain(layers),
        (MountType::Bind, None) => {
            let source = if mount.source.is_empty() { "." } else { &mount.source };
            let none = Ignore::default();
            let picks = select(builder.context.tree(), source, &Wanted { exclude: &none, parents: false })?;
            crate::select::digest(builder.context.tree(), &picks)?
        }
        _ => String::new(),
    };
    Ok(format!(
        "{:?} {from} {:?} {:?} {} {} {:?} {:?}",
        mount.kind, mount.source, mount.target, mount.read_only, mount.size_bytes, mount.id, mount.env
    ))
}

/// Whether a mount takes from a stage or an image.
pub fn source(plan: &crate::dockerfile::Plan, mount: &Mount) -> Option<Source> {
    mount.from.as_deref().map(|from| plan.source(from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_fit_for_terminals() {
        for (given, wanted) in [
            (&b"plain\n"[..], "plain"),
            (b"10%\r50%\r100%\r\n", "100%"),
            (b"bell\x07 and \x1b[1mbold\x1b[0m\tx", "bell and \x1b[1mbold\x1b[0m\tx"),
            (b"\xff", "\u{fffd}"),
        ] {
            assert_eq!(readable(given), wanted);
        }
    }
}
