//! One stage: its instructions carried out one after the other.
//!
//! Upstream counterpart: `dispatch*` in BuildKit's `dockerfile2llb/convert.go`; the words of history entries are its. An
//! instruction that touches files is a step: it has a key made of all that it depends on, and is done only when nothing
//! in the store has that key.
use std::fs::File;
use std::path::{Path, PathBuf};

use sampan_image::{Platform, platform};
use sha2::{Digest, Sha256};

use crate::build::{Builder, Work};
use crate::commit::commit;
use crate::copy::{self, ModeChange, Target};
use crate::dockerfile::{Add, Copy, Instruction, Kind, Network, Run, Scope, Script, Security, Source};
use crate::dockerignore::Ignore;
use crate::download::{self, Packed};
use crate::error::{BuildError, io_error, refused};
use crate::image::{Image, time};
use crate::overlay::{self, Mounted, Upper};
use crate::progress::Task;
use crate::rooted::{Root, absolute};
use crate::run::{self, Failure, Running, mount_key};
use crate::select::{Pick, Tree, Wanted, digest, select};
use crate::store::{Layer, Record, chain};

/// A stage as far as it is built.
#[derive(Clone)]
pub struct Stage {
    pub image: Image,
    pub layers: Vec<Layer>,
    pub scope: Scope,
    pub platform: Platform,
}

/// All that a step depends on, put together.
pub struct Key(Sha256);

impl Key {
    /// What every step depends on: its kind, the files so far, and the time that nothing may be younger than.
    pub fn new(kind: &str, layers: &[Layer], epoch_s: Option<i64>) -> Key {
        let mut key = Key(Sha256::new());
        key.add("1").add(kind).add(&chain(layers)).add(&format!("{epoch_s:?}"));
        key
    }

    pub fn add(&mut self, part: &str) -> &mut Key {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part.as_bytes());
        self
    }

    pub fn end(self) -> String {
        sampan_image::manifest::hex_digest(&self.0.finalize())
    }
}

/// Where COPY and ADD take from; mounts last as long as it.
enum From {
    Context,
    Layers { root: Root, chain: String, _view: Mounted },
}

/// A source that was found.
enum Found {
    Files(Vec<Pick>),
    /// A folder of the build's own: downloaded, or out of the Dockerfile.
    Own {
        root: Root,
        picks: Vec<Pick>,
        is_remote: bool,
    },
}

/// COPY and ADD in one.
struct Putting<'a> {
    paths: &'a [String],
    destination: String,
    chown: Option<&'a str>,
    chmod: Option<&'a str>,
    mode: Option<ModeChange>,
    parents: bool,
    exclude: Ignore,
    add: Option<&'a Add>,
}

impl Builder<'_> {
    /// Carries out one instruction, already expanded. `shown` begins the step's name.
    pub fn instruction(
        &mut self,
        work: &Work,
        stage: &mut Stage,
        instruction: &Instruction,
        shown: &str,
    ) -> Result<(), BuildError> {
        let epoch = work.plan.source_date_epoch_s;
        let done = match &instruction.kind {
            Kind::Run(run) => self.run(work, stage, run, &format!("{shown} {}", instruction.text)),
            Kind::Copy(copy) => self.copy(work, stage, copy, &format!("{shown} {}", instruction.text)),
            Kind::Add(add) => self.add(work, stage, add, &format!("{shown} {}", instruction.text)),
            Kind::Workdir(path) => self.workdir(work, stage, path, &format!("{shown} {}", instruction.text)),
            kind => {
                if let Some(entry) = configure(&mut stage.image, kind, &instruction.text) {
                    stage.image.add_history(&entry, false, epoch);
                }
                Ok(())
            }
        };
        done.map_err(|failure| match failure {
            Failure::Build(BuildError::Refused(message)) => work.plan.error(instruction, message).into(),
            Failure::Build(BuildError::Image { name, source }) => {
                let hint = work.plan.similar_stage(&name);
                let hint = hint.map_or(String::new(), |h| format!("; is stage {h:?} meant?"));
                work.plan.error(instruction, format!("{name}: {source}{hint}")).into()
            }
            Failure::Build(BuildError::Io { what, source }) => {
                work.plan.error(instruction, format!("{what}: {source}")).into()
            }
            Failure::Build(BuildError::NoSpace { what, .. }) => {
                self.store.io(what, rustix::io::Errno::NOSPC.into())
            }
            Failure::Build(error) => error,
            Failure::Exit { message, output } => {
                BuildError::Step { error: work.plan.error(instruction, message), output }
            }
        })
    }

    /// Takes a step from the cache, or makes it.
    fn step(
        &mut self,
        work: &Work,
        stage: &mut Stage,
        key: String,
        entry: &str,
        task: Task,
        make: impl FnOnce(&mut Self, &Stage, &Task) -> Result<Upper, Failure>,
    ) -> Result<(), Failure> {
        let epoch = work.plan.source_date_epoch_s;
        self.cancel.check()?;
        if let Some(record) = self.cached(&key) {
            apply(stage, record, entry, epoch);
            task.cached();
            return Ok(());
        }
        let made = make(self, stage, &task).and_then(|upper| {
            let layer = commit(self.store, self.scratch, &stage.layers, &upper.path(), epoch)?;
            let created = time(epoch.unwrap_or_else(|| sampan_world::clock::now().as_second()));
            let record = Record { layer, created };
            self.store.put_record(&key, &record)?;
            Ok(record)
        });
        match made {
            Ok(record) => {
                self.fresh.insert(key);
                apply(stage, record, entry, epoch);
                task.done();
                Ok(())
            }
            Err(failure) => {
                task.failed(&match &failure {
                    Failure::Build(e) => e.to_string(),
                    Failure::Exit { message, .. } => message.clone(),
                });
                Err(failure)
            }
        }
    }

    /// What an earlier step of this key made; with `--no-cache` one of this build only.
    fn cached(&self, key: &str) -> Option<Record> {
        let allowed = !self.options.no_cache || self.fresh.contains(key);
        allowed.then(|| self.store.record(key)).flatten()
    }

    fn run(&mut self, work: &Work, stage: &mut Stage, run: &Run, shown: &str) -> Result<(), Failure> {
        if run.security == Security::Insecure {
            return Err(
                refused("RUN --security=insecure is not supported: steps run without privileges").into()
            );
        }
        crate::emulation::runnable(&stage.platform).map_err(refused)?;
        let (script, network) = (
            run.script(),
            match run.network {
                Network::Default => self.options.network,
                given => given,
            },
        );
        let words = match &script {
            Script::Exec(words) => words.clone(),
            Script::Shell(text) => stage.image.shell(text),
            Script::File { name, .. } => vec![format!("/dev/pipes/{name}")],
        };
        if let Script::File { name, .. } = &script
            && !download::is_plain_name(name)
        {
            return Err(refused(format!("heredoc {name:?}: a file can't be called so")).into());
        }
        let mut sources = Vec::new();
        for mount in &run.mounts {
            sources.push(match run::source(&work.plan, mount) {
                Some(source) => Some(self.layers_of(work, stage, &source)?),
                None => None,
            });
        }
        let pair = |(k, v): &(String, String)| format!("{k}={v}");
        let mut env: Vec<String> = stage.scope.run_env().iter().map(pair).collect();
        let mut key = Key::new("run", &stage.layers, work.plan.source_date_epoch_s);
        key.add(&platform::format(&stage.platform)).add(&format!("{words:?} {script:?} {env:?}"));
        key.add(stage.image.user())
            .add(stage.image.workdir())
            .add(&format!("{network:?} {:?}", self.options.add_hosts));
        for (mount, layers) in run.mounts.iter().zip(&sources) {
            key.add(&mount_key(self, mount, layers.as_deref())?);
        }
        env.extend(stage.scope.proxy_env().iter().map(pair));
        let args: Vec<String> = stage.scope.build_args().iter().map(pair).collect();
        let entry = match args.as_slice() {
            [] => format!("RUN {}", words.join(" ")),
            args => format!("RUN |{} {} {}", args.len(), args.join(" "), words.join(" ")),
        };
        let task = self.reporter.begin(shown);
        self.step(work, stage, key.end(), &entry, task, |builder, stage, task| {
            let running = Running {
                script: &script,
                words,
                env,
                user: stage.image.user().into(),
                workdir: stage.image.workdir().into(),
                network,
                mounts: &run.mounts,
                sources,
                layers: &stage.layers,
            };
            run::run(builder, &running, task)
        })
    }

    /// The layers that a `--from` names.
    fn layers_of(&mut self, work: &Work, stage: &Stage, source: &Source) -> Result<Vec<Layer>, BuildError> {
        match source {
            Source::Scratch => Ok(Vec::new()),
            Source::Stage(index) => match work.stages.get(index) {
                Some(stage) => Ok(stage.layers.clone()),
                None => Err(refused("a stage that comes later")),
            },
            Source::Image(name) => {
                let shown = format!("[{} internal] load", platform::format(&stage.platform));
                Ok(self.bases.get(name, &work.platform, &shown)?.layers.clone())
            }
        }
    }

    fn from(&mut self, work: &Work, stage: &Stage, from: Option<&str>) -> Result<From, BuildError> {
        let Some(name) = from else { return Ok(From::Context) };
        let layers = self.layers_of(work, stage, &work.plan.source(name))?;
        let view = overlay::view(self.store, &layers, self.scratch.place("from"))?;
        let root = Root::open(view.path()).map_err(io_error(format!("--from={name}")))?;
        Ok(From::Layers { root, chain: chain(&layers), _view: view })
    }

    fn copy(&mut self, work: &Work, stage: &mut Stage, copy: &Copy, shown: &str) -> Result<(), Failure> {
        let putting = Putting {
            paths: &copy.sources.paths,
            destination: destination(&stage.image, &copy.sources.destination),
            chown: copy.chown.as_deref().filter(|c| !c.is_empty()),
            chmod: copy.chmod.as_deref().filter(|c| !c.is_empty()),
            mode: copy.chmod.as_deref().filter(|c| !c.is_empty()).map(ModeChange::parse).transpose()?,
            parents: copy.parents,
            exclude: Ignore::from_patterns(&copy.exclude).map_err(|e| refused(format!("--exclude: {e}")))?,
            add: None,
        };
        let from = self.from(work, stage, copy.from.as_deref())?;
        self.put(work, stage, &putting, &copy.sources.inline, from, shown)
    }

    fn add(&mut self, work: &Work, stage: &mut Stage, add: &Add, shown: &str) -> Result<(), Failure> {
        let putting = Putting {
            paths: &add.sources.paths,
            destination: destination(&stage.image, &add.sources.destination),
            chown: add.chown.as_deref().filter(|c| !c.is_empty()),
            chmod: add.chmod.as_deref().filter(|c| !c.is_empty()),
            mode: add.chmod.as_deref().filter(|c| !c.is_empty()).map(ModeChange::parse).transpose()?,
            parents: false,
            exclude: Ignore::from_patterns(&add.exclude).map_err(|e| refused(format!("--exclude: {e}")))?,
            add: Some(add),
        };
        self.put(work, stage, &putting, &add.sources.inline, From::Context, shown)
    }

    fn put(
        &mut self,
        work: &Work,
        stage: &mut Stage,
        putting: &Putting<'_>,
        inline: &[crate::dockerfile::InlineFile],
        from: From,
        shown: &str,
    ) -> Result<(), Failure> {
        let mut key = Key::new("put", &stage.layers, work.plan.source_date_epoch_s);
        let unpack = putting.add.map(|a| a.unpack);
        key.add(&putting.destination).add(&format!("{:?} {:?} {unpack:?}", putting.chown, putting.mode));
        let quick = self.quick_key(work, stage, putting, &from);
        let task = self.reporter.begin(shown);
        let entry = history(putting, inline);
        if let Some(record) = quick.as_ref().and_then(|quick| self.cached(quick)) {
            apply(stage, record, &entry, work.plan.source_date_epoch_s);
            task.cached();
            return Ok(());
        }
        let found = self.find(putting, inline, &from, &mut key, &task);
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                task.failed(&error.to_string());
                return Err(error.into());
            }
        };
        let key = key.end();
        self.step(work, stage, key.clone(), &entry, task, |builder, stage, _| {
            let upper = Upper::new(builder.store, &stage.layers, builder.scratch.place("step"))?;
            let mounted = upper.mount(builder.store, &stage.layers)?;
            builder.write(mounted.path(), putting, &from, &found)?;
            drop(mounted);
            Ok(upper)
        })?;
        if let (Some(quick), Some(record)) = (quick, self.store.record(&key)) {
            self.store.put_record(&quick, &record)?;
            self.fresh.insert(quick);
        }
        Ok(())
    }

    /// For files of other stages: known without reading them, when the whole stage is the same.
    fn quick_key(&self, work: &Work, stage: &Stage, putting: &Putting<'_>, from: &From) -> Option<String> {
        let From::Layers { chain, .. } = from else { return None };
        let mut key = Key::new("put-quick", &stage.layers, work.plan.source_date_epoch_s);
        key.add(chain).add(&putting.destination).add(&format!("{:?} {:?}", putting.chown, putting.mode));
        key.add(&format!("{:?} {} {:?}", putting.paths, putting.parents, putting.exclude));
        Some(key.end())
    }

    /// Finds all sources, and adds what they are worth to the key.
    fn find(
        &mut self,
        putting: &Putting<'_>,
        inline: &[crate::dockerfile::InlineFile],
        from: &From,
        key: &mut Key,
        task: &Task,
    ) -> Result<Vec<Found>, BuildError> {
        let wanted = Wanted { exclude: &putting.exclude, parents: putting.parents };
        let mut all = Vec::new();
        for path in putting.paths {
            if putting.add.is_some() && download::is_git(path) {
                return Err(refused(format!(
                    "{path}: ADD of git repositories is not supported; clone it in a RUN"
                )));
            }
            if let Some(add) = putting.add.filter(|_| download::is_url(path)) {
                let checksum = add.checksum.as_deref().filter(|c| !c.is_empty());
                let remote = download::fetch(self.store, self.scratch, &self.runtime, path, checksum)?;
                task.line(&format!("{path} {}", remote.digest));
                all.push(self.own(remote.folder, &remote.name, key, true)?);
                continue;
            }
            if putting.add.is_some_and(|a| a.checksum.as_deref().is_some_and(|c| !c.is_empty())) {
                return Err(refused("checksum requires HTTP(S) sources"));
            }
            let tree = self.tree(from);
            let picks = select(tree, path, &wanted)?;
            if picks.is_empty() {
                self.reporter.warn(&format!("{path} matches no file"));
            }
            key.add(&digest(tree, &picks)?);
            all.push(Found::Files(picks));
        }
        for file in inline {
            if !download::is_plain_name(&file.name) {
                return Err(refused(format!("heredoc {:?}: a file can't be called so", file.name)));
            }
            let folder = download::inline(self.scratch, &file.name, &file.contents, 0o644)?;
            all.push(self.own(folder, &file.name, key, false)?);
        }
        Ok(all)
    }

    fn own(&self, folder: PathBuf, name: &str, key: &mut Key, is_remote: bool) -> Result<Found, BuildError> {
        let root = Root::open(&folder).map_err(io_error(name))?;
        let none = Ignore::default();
        let tree = Tree { root: &root, ignore: None, is_context: true };
        // a name is no pattern
        let plain: String = name.chars().flat_map(|c| ['\\', c]).collect();
        let picks = select(tree, &plain, &Wanted { exclude: &none, parents: false })?;
        key.add(&digest(tree, &picks)?);
        Ok(Found::Own { root, picks, is_remote })
    }

    fn tree<'a>(&'a self, from: &'a From) -> Tree<'a> {
        match from {
            From::Context => self.context.tree(),
            From::Layers { root, .. } => Tree { root, ignore: None, is_context: false },
        }
    }

    /// Puts what was found into the image's files at `mounted`.
    fn write(
        &self,
        mounted: &Path,
        putting: &Putting<'_>,
        from: &From,
        found: &[Found],
    ) -> Result<(), BuildError> {
        let root = Root::open(mounted).map_err(io_error("the image's root"))?;
        let owner = putting.chown.map(|c| copy::owner(&root, c)).transpose()?;
        let target =
            Target { root: &root, destination: &putting.destination, owner, mode: putting.mode.as_ref() };
        for found in found {
            let (tree, picks, is_remote) = match found {
                Found::Files(picks) => (self.tree(from), picks, false),
                Found::Own { root, picks, is_remote } => {
                    (Tree { root, ignore: None, is_context: true }, picks, *is_remote)
                }
            };
            for pick in picks {
                self.cancel.check()?;
                if let Some(add) = putting.add
                    && add.unpack.unwrap_or(!is_remote)
                    && self.unpack(tree, pick, &target, add)?
                {
                    continue;
                }
                copy::copy(tree, pick, &target)?;
            }
        }
        Ok(())
    }

    /// ADD of an archive; `false` when it is none.
    fn unpack(
        &self,
        tree: Tree<'_>,
        pick: &Pick,
        target: &Target<'_>,
        add: &Add,
    ) -> Result<bool, BuildError> {
        let [item] = pick.items.as_slice() else { return Ok(false) };
        if pick.is_folder
            || rustix::fs::FileType::from_raw_mode(item.stat.st_mode) != rustix::fs::FileType::RegularFile
        {
            return Ok(false);
        }
        let name = pick.name.to_string_lossy();
        let open = || tree.root.file(&item.source).map_err(io_error(name.clone()));
        let file: File = match download::archive(open()?).map_err(io_error(name.clone()))? {
            None => return Ok(false),
            Some(Packed::Unreadable(kind)) => {
                let hint = if add.unpack == Some(true) { "" } else { ", or ADD it with --unpack=false" };
                return Err(refused(format!(
                    "{name} is packed by {kind}, which is not read here; repack it by gzip or zstd{hint}"
                )));
            }
            Some(_) => open()?,
        };
        let folder = download::unpack(self.store, self.scratch, file, &name)?;
        let root = Root::open(&folder).map_err(io_error(name.clone()))?;
        let tree = Tree { root: &root, ignore: None, is_context: false };
        let none = Ignore::default();
        for pick in select(tree, ".", &Wanted { exclude: &none, parents: false })? {
            copy::copy(tree, &pick, &Target { mode: None, ..*target })?;
        }
        let _ = std::fs::remove_dir_all(folder);
        Ok(true)
    }

    fn workdir(&mut self, work: &Work, stage: &mut Stage, path: &str, shown: &str) -> Result<(), Failure> {
        let path = absolute(stage.image.workdir(), path);
        stage.image.set_text("WorkingDir", &path);
        let entry = format!("WORKDIR {path}");
        if path == "/" {
            stage.image.add_history(&entry, false, work.plan.source_date_epoch_s);
            return Ok(());
        }
        let mut key = Key::new("workdir", &stage.layers, work.plan.source_date_epoch_s);
        key.add(&path).add(stage.image.user());
        let task = self.reporter.begin(shown);
        self.step(work, stage, key.end(), &entry, task, |builder, stage, _| {
            let upper = Upper::new(builder.store, &stage.layers, builder.scratch.place("step"))?;
            let mounted = upper.mount(builder.store, &stage.layers)?;
            let root = Root::open(mounted.path()).map_err(io_error("the image's root"))?;
            let owner = match stage.image.user() {
                "" => (0, 0),
                user => copy::owner(&root, user)?,
            };
            let real = root.resolve(Path::new(&path), true).map_err(io_error(path.clone()))?;
            copy::make_folders(&root, &real, owner, 0o755)?;
            Ok(upper)
        })
    }
}

/// Takes over what a step made.
fn apply(stage: &mut Stage, record: Record, entry: &str, epoch_s: Option<i64>) {
    stage.image.created = Some(record.created);
    stage.image.add_history(entry, record.layer.is_some(), epoch_s);
    stage.layers.extend(record.layer);
}

/// Absolute, with a slash at the end where it is a folder by its name.
fn destination(image: &Image, given: &str) -> String {
    let path = absolute(image.workdir(), given);
    let is_folder = given.is_empty() || given == "." || given.ends_with('/') || given.ends_with("/.");
    if is_folder && path != "/" { format!("{path}/") } else { path }
}

fn history(putting: &Putting<'_>, inline: &[crate::dockerfile::InlineFile]) -> String {
    let mut words = vec![if putting.add.is_some() { "ADD".to_string() } else { "COPY".into() }];
    if putting.parents {
        words.push("--parents".into());
    }
    words.extend(putting.chown.map(|c| format!("--chown={c}")));
    words.extend(putting.chmod.map(|c| format!("--chmod={c}")));
    words.extend(putting.paths.iter().cloned());
    words.extend(inline.iter().map(|f| format!("<<{}", f.name)));
    words.push(putting.destination.clone());
    words.join(" ")
}

fn quoted(words: &[String]) -> String {
    format!("[{}]", words.iter().map(|w| format!("{w:?}")).collect::<Vec<_>>().join(" "))
}

/// What changes the configuration only: the words of its history entry.
fn configure(image: &mut Image, kind: &Kind, text: &str) -> Option<String> {
    let pairs = |pairs: &[crate::dockerfile::KeyValue]| {
        pairs.iter().map(|p| format!(" {}={}", p.key, p.value)).collect::<String>()
    };
    Some(match kind {
        Kind::Arg(definitions) => {
            let one = |d: &crate::dockerfile::ArgDefinition| match &d.value {
                Some(value) => format!("{}={value}", d.key),
                None => d.key.clone(),
            };
            format!("ARG {}", definitions.iter().map(one).collect::<Vec<_>>().join(" "))
        }
        Kind::Env(all) => {
            image.set_env(all);
            format!("ENV{}", pairs(all))
        }
        Kind::Label(all) => {
            image.add_labels(all.iter().map(|l| (l.key.as_str(), l.value.as_str())));
            format!("LABEL{}", pairs(all))
        }
        Kind::Cmd(command) => format!("CMD {}", quoted(&image.set_cmd(command))),
        Kind::Entrypoint(command) => format!("ENTRYPOINT {}", quoted(&image.set_entrypoint(command))),
        Kind::Expose(ports) => {
            image.add_keys("ExposedPorts", ports);
            format!("EXPOSE [{}]", ports.join(" "))
        }
        Kind::Volume(paths) => {
            image.add_keys("Volumes", paths);
            format!("VOLUME [{}]", paths.join(" "))
        }
        Kind::User(user) => {
            image.set_text("User", user);
            format!("USER {user}")
        }
        Kind::StopSignal(signal) => {
            image.set_text("StopSignal", signal);
            format!("STOPSIGNAL {signal}")
        }
        Kind::Shell(words) => {
            image.set_shell(words);
            format!("SHELL [{}]", words.join(" "))
        }
        Kind::Maintainer(name) => {
            image.set_author(name);
            format!("MAINTAINER {name}")
        }
        Kind::Healthcheck(check) => {
            image.set_healthcheck(check);
            text.to_string()
        }
        Kind::Onbuild(trigger) => {
            image.add_trigger(trigger);
            return None;
        }
        Kind::Run(_) | Kind::Copy(_) | Kind::Add(_) | Kind::Workdir(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_follow_the_working_directory() {
        let of = sampan_image::platform::parse("linux/amd64").unwrap_or_else(crate::machine_platform);
        let mut image = Image::scratch(&of);
        for (workdir, given, wanted) in [
            ("/", "app", "/app"),
            ("/w", "app/", "/w/app/"),
            ("/w", ".", "/w/"),
            ("/w", "./", "/w/"),
            ("/w", "..", "/"),
            ("/w", "/", "/"),
            ("/w", "/a/.", "/a/"),
        ] {
            image.set_text("WorkingDir", workdir);
            assert_eq!(destination(&image, given), wanted, "{workdir} {given}");
        }
    }

    #[test]
    fn keys_tell_parts_apart() {
        let key = |parts: &[&str]| {
            let mut key = Key::new("x", &[], None);
            for part in parts {
                key.add(part);
            }
            key.end()
        };
        assert_ne!(key(&["a", "b"]), key(&["ab", ""]));
        assert_eq!(key(&["a"]), key(&["a"]));
        assert_ne!(Key::new("x", &[], Some(1)).end(), Key::new("x", &[], None).end());
    }
}
