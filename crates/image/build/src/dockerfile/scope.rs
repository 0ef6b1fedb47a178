//! The variables of a stage, and instructions with their words expanded.
//!
//! Upstream counterpart: `dispatch`, `dispatchArg` and `dispatchEnv` in buildkit `dockerfile2llb/convert.go`. As there,
//! ARG and ENV share one namespace in which the later wins, only ENV reaches the image's config, and a stage built on
//! another inherits both.
use super::error::{Error, File, Warning, suggest};
use super::expand::{Expanded, Lexer};
use super::{
    Add, ArgDefinition, Copy, Instruction, KeyValue, Kind, Mount, Run, Sources, limits, mount, ports,
};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// What containers get as PATH when an image says nothing.
pub(super) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What all stages of a plan share.
#[derive(Debug)]
pub(super) struct Shared {
    pub file: Arc<File>,
    pub escape: char,
    /// Predefined arguments and those ahead of the first FROM.
    pub globals: Environment,
    pub build_args: BTreeMap<String, String>,
}

/// Variables in the order in which they were first set.
#[derive(Clone, Debug, Default)]
pub(super) struct Environment {
    entries: Vec<(String, String)>,
    index: HashMap<String, usize>,
    size_bytes: usize,
}

impl Environment {
    pub fn get(&self, key: &str) -> Option<&str> {
        self.index.get(key).map(|i| self.entries[*i].1.as_str())
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(key, _)| key.as_str())
    }

    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let old = self.get(key).map_or(0, str::len);
        self.size_bytes = self.size_bytes + value.len() - old;
        if self.size_bytes > limits::ENVIRONMENT_SIZE_BYTES {
            return Err(format!("the environment is larger than {} bytes", limits::ENVIRONMENT_SIZE_BYTES));
        }
        match self.index.get(key) {
            Some(i) => self.entries[*i].1 = value.to_string(),
            None => {
                self.index.insert(key.to_string(), self.entries.len());
                self.entries.push((key.to_string(), value.to_string()));
            }
        }
        Ok(())
    }
}

/// The variables of one stage as its instructions pass. A clone is what a stage built on this one begins with.
#[derive(Clone, Debug)]
pub struct Scope {
    shared: Arc<Shared>,
    /// ENV and ARG.
    visible: Environment,
    /// ENV alone.
    image: Environment,
    /// Names of ARGs, in order of first appearance.
    args: Vec<String>,
    warnings: Vec<Warning>,
}

impl Scope {
    /// `base_env` is `NAME=value` each, as an image's config has it.
    pub(super) fn new(shared: Arc<Shared>, base_env: &[String]) -> Scope {
        let mut image = Environment::default();
        for entry in base_env {
            let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
            // A base that is too large for this is refused by the first ENV or ARG.
            let _ = image.set(key, value);
        }
        if image.get("PATH").is_none() {
            let _ = image.set("PATH", DEFAULT_PATH);
        }
        Scope { shared, visible: image.clone(), image, args: Vec::new(), warnings: Vec::new() }
    }

    /// The image's environment.
    pub fn image_env(&self) -> &[(String, String)] {
        &self.image.entries
    }

    /// What RUN's processes see, proxies aside.
    pub fn run_env(&self) -> &[(String, String)] {
        &self.visible.entries
    }

    /// Proxies given as build arguments. They are for RUN's processes as well, but change nothing about what a step
    /// gives, so they belong to no key of the cache.
    pub fn proxy_env(&self) -> Vec<(String, String)> {
        let proxies = self.shared.build_args.iter().filter(|(key, _)| is_proxy(key));
        let both = proxies.flat_map(|(key, value)| {
            [(key.to_ascii_uppercase(), value.clone()), (key.to_ascii_lowercase(), value.clone())]
        });
        let unique: BTreeMap<String, String> =
            both.filter(|(key, _)| self.visible.get(key).is_none()).collect();
        unique.into_iter().collect()
    }

    /// The stage's ARGs with the values that they have now, as history entries of RUN show them.
    pub fn build_args(&self) -> Vec<(String, String)> {
        let value = |key: &String| self.visible.get(key).unwrap_or_default().to_string();
        self.args.iter().map(|key| (key.clone(), value(key))).collect()
    }

    /// What was odd since the last call.
    pub fn take_warnings(&mut self) -> Vec<Warning> {
        std::mem::take(&mut self.warnings)
    }

    /// The instruction with its words expanded as Docker does for its kind. ARG and ENV take effect for those after it.
    pub fn evaluate(&mut self, instruction: &Instruction) -> Result<Instruction, Error> {
        let kind = match &instruction.kind {
            Kind::Add(add) => Kind::Add(self.add(instruction, add)?),
            Kind::Arg(definitions) => Kind::Arg(self.arg(instruction, definitions)?),
            Kind::Copy(copy) => Kind::Copy(self.copy(instruction, copy)?),
            Kind::Env(pairs) => Kind::Env(self.env(instruction, pairs)?),
            Kind::Expose(words) => Kind::Expose(self.expose(instruction, words)?),
            Kind::Label(pairs) => Kind::Label(self.pairs(instruction, pairs)?),
            Kind::Run(run) => Kind::Run(self.run(instruction, run)?),
            Kind::StopSignal(signal) => Kind::StopSignal(self.stop_signal(instruction, signal)?),
            Kind::User(user) => Kind::User(self.word(instruction, user)?),
            Kind::Volume(paths) => Kind::Volume(self.volumes(instruction, paths)?),
            Kind::Workdir(path) => Kind::Workdir(self.word(instruction, path)?),
            unexpanded @ (Kind::Cmd(_)
            | Kind::Entrypoint(_)
            | Kind::Healthcheck(_)
            | Kind::Maintainer(_)
            | Kind::Onbuild(_)
            | Kind::Shell(_)) => unexpanded.clone(),
        };
        Ok(Instruction { kind, ..instruction.clone() })
    }

    fn add(&mut self, at: &Instruction, add: &Add) -> Result<Add, Error> {
        Ok(Add {
            sources: self.sources(at, &add.sources)?,
            chown: self.optional(at, &add.chown)?,
            chmod: self.optional(at, &add.chmod)?,
            checksum: self.optional(at, &add.checksum)?,
            ..add.clone()
        })
    }

    fn copy(&mut self, at: &Instruction, copy: &Copy) -> Result<Copy, Error> {
        Ok(Copy {
            sources: self.sources(at, &copy.sources)?,
            chown: self.optional(at, &copy.chown)?,
            chmod: self.optional(at, &copy.chmod)?,
            ..copy.clone()
        })
    }

    fn sources(&mut self, at: &Instruction, sources: &Sources) -> Result<Sources, Error> {
        let mut expanded = sources.clone();
        for path in &mut expanded.paths {
            *path = self.word(at, path)?;
        }
        expanded.destination = self.word(at, &sources.destination)?;
        for file in expanded.inline.iter_mut().filter(|file| file.expand) {
            // Contents keep their quotes, and are escaped as a shell's heredoc is whatever the file's escape is.
            let outcome =
                self.expanded(&file.contents, |lexer| Lexer { escape: '\\', skip_quotes: true, ..lexer });
            let outcome = outcome.map_err(|why| self.error(at, "<<", why))?;
            self.report(at, &outcome);
            file.contents = outcome.text;
        }
        Ok(expanded)
    }

    fn arg(&mut self, at: &Instruction, definitions: &[ArgDefinition]) -> Result<Vec<ArgDefinition>, Error> {
        let mut out = Vec::with_capacity(definitions.len());
        for ArgDefinition { key, value } in definitions {
            let value = match (self.shared.build_args.get(key), value) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => Some(self.word(at, default)?),
                (None, None) => self.shared.globals.get(key).map(str::to_string),
            };
            if let Some(value) = &value {
                self.visible.set(key, value).map_err(|why| self.error(at, key, why))?;
            }
            if !self.args.contains(key) {
                self.args.push(key.clone());
            }
            out.push(ArgDefinition { key: key.clone(), value });
        }
        Ok(out)
    }

    fn env(&mut self, at: &Instruction, pairs: &[KeyValue]) -> Result<Vec<KeyValue>, Error> {
        // All values see what was before the instruction.
        let pairs = self.pairs(at, pairs)?;
        for KeyValue { key, value } in &pairs {
            let set = self.visible.set(key, value).and_then(|()| self.image.set(key, value));
            set.map_err(|why| self.error(at, key, why))?;
        }
        Ok(pairs)
    }

    fn pairs(&mut self, at: &Instruction, pairs: &[KeyValue]) -> Result<Vec<KeyValue>, Error> {
        let mut out = Vec::with_capacity(pairs.len());
        for pair in pairs {
            out.push(KeyValue { key: self.word(at, &pair.key)?, value: self.word(at, &pair.value)? });
        }
        Ok(out)
    }

    fn expose(&mut self, at: &Instruction, words: &[String]) -> Result<Vec<String>, Error> {
        let mut out = Vec::new();
        for word in words {
            let expanded = self.expanded(word, |lexer| lexer).map_err(|why| self.error(at, word, why))?;
            self.report(at, &expanded);
            for port in &expanded.words {
                out.extend(ports::expose(port).map_err(|why| self.error(at, word, why))?);
                if out.len() > limits::PORTS {
                    return Err(self.error(at, word, format!("more than {} ports", limits::PORTS)));
                }
            }
        }
        Ok(out)
    }

    fn run(&mut self, at: &Instruction, run: &Run) -> Result<Run, Error> {
        let mut mounts: Vec<Mount> = Vec::with_capacity(run.mount_flags.len());
        for flag in &run.mount_flags {
            let mut undefined = Expanded::default();
            let read = mount::parse(flag, &mut |value| {
                let expanded = self.expanded(value, |lexer| lexer)?;
                undefined.undefined.extend(expanded.undefined);
                Ok(expanded.text)
            });
            mounts.push(read.map_err(|bad| self.error(at, "--mount", bad.message))?);
            self.report(at, &undefined);
        }
        Ok(Run { mounts, ..run.clone() })
    }

    fn stop_signal(&mut self, at: &Instruction, signal: &str) -> Result<String, Error> {
        let expanded = self.word(at, signal)?;
        match ports::is_signal(&expanded) {
            true => Ok(expanded),
            false => Err(self.error(at, signal, format!("invalid signal: {expanded}"))),
        }
    }

    fn volumes(&mut self, at: &Instruction, paths: &[String]) -> Result<Vec<String>, Error> {
        let mut out = Vec::with_capacity(paths.len());
        for path in paths {
            let expanded = self.word(at, path)?;
            if expanded.is_empty() {
                return Err(self.error(at, path, "VOLUME specified can not be an empty string"));
            }
            out.push(expanded);
        }
        Ok(out)
    }

    fn optional(&mut self, at: &Instruction, word: &Option<String>) -> Result<Option<String>, Error> {
        word.as_ref().map(|word| self.word(at, word)).transpose().map(|word| word.filter(|w| !w.is_empty()))
    }

    fn word(&mut self, at: &Instruction, word: &str) -> Result<String, Error> {
        let expanded = self.expanded(word, |lexer| lexer).map_err(|why| self.error(at, word, why))?;
        self.report(at, &expanded);
        Ok(expanded.text)
    }

    fn expanded(
        &self,
        word: &str,
        with: impl for<'l> Fn(Lexer<'l>) -> Lexer<'l>,
    ) -> Result<Expanded, String> {
        let lookup = |name: &str| self.visible.get(name).map(str::to_string);
        with(Lexer::new(self.shared.escape, &lookup)).expand(word)
    }

    fn report(&mut self, at: &Instruction, expanded: &Expanded) {
        for name in &expanded.undefined {
            if self.args.contains(name) || self.warnings.len() >= limits::WARNINGS {
                continue;
            }
            let message = format!("Usage of undefined variable '${name}'");
            let suggestion = suggest(String::new(), name, self.visible.keys()).replace("mean ", "mean $");
            let warning = Warning { at: Some(at.line.find(name)), message: message + &suggestion };
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
    }

    /// An error at `word`, which is as the line has it.
    fn error(&self, at: &Instruction, word: &str, message: impl std::fmt::Display) -> Error {
        at.error(&self.shared.file, word, message)
    }
}

impl Instruction {
    pub(super) fn error(&self, file: &File, word: &str, message: impl std::fmt::Display) -> Error {
        file.error(self.line.find(word), (self.at.line, self.end_line), message)
    }
}

/// Build arguments that reach RUN without any ARG.
pub(super) fn is_proxy(key: &str) -> bool {
    let proxies = ["http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"];
    proxies.iter().any(|proxy| key.eq_ignore_ascii_case(proxy))
}
