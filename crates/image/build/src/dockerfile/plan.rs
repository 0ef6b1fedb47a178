//! From the stages of a file to what a target needs: bases, `--from`, platforms, build arguments.
//!
//! Upstream counterpart: the first half of buildkit `dockerfile2llb/convert.go`. What stays true: a stage only ever
//! takes from stages before it, so file order is an order to build in. Deliberate differences: a stage's number works
//! wherever its name does; stage names in FROM are compared without regard to case, as `--from` does; build arguments
//! that nothing takes are reported, as the builder before BuildKit did.
use super::error::{similar, suggest};
use super::expand::{Expanded, Lexer};
use super::scope::{Environment, Shared, is_proxy};
use super::*;
use sampan_image::{Platform, Reference, platform};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Display;

/// What a build is asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub build_args: BTreeMap<String, String>,
    /// `--target`: a stage's name or number; the last stage otherwise.
    pub target: Option<String>,
    /// The platform that the image is built for.
    pub platform: Platform,
    /// The platform that builds.
    pub build_platform: Platform,
}

#[derive(Clone, Debug)]
pub struct Plan {
    /// All stages of the file; only those in `order` are needed.
    pub stages: Vec<PlannedStage>,
    /// The stage that becomes the image.
    pub target: usize,
    /// The needed stages in file order, so each comes after those that it needs.
    pub order: Vec<usize>,
    /// From SOURCE_DATE_EPOCH, given as build argument or global ARG.
    pub source_date_epoch_s: Option<i64>,
    pub warnings: Vec<Warning>,
    names: HashMap<String, usize>,
    global_args: BTreeSet<String>,
    shared: Arc<Shared>,
}

#[derive(Clone, Debug)]
pub struct PlannedStage {
    /// As after AS, or `stage-0`.
    pub name: String,
    pub base: Source,
    pub platform: Platform,
    /// With the ONBUILD triggers of its base ahead.
    pub instructions: Vec<Instruction>,
    /// The FROM line.
    pub text: String,
    pub at: Position,
    /// Stages that this one takes from: its base, `COPY --from`, `RUN --mount from=`.
    pub needs: Vec<usize>,
}

/// What FROM or `--from` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Scratch,
    Stage(usize),
    /// An image's reference as written, variables expanded.
    Image(String),
}

/// A `--from` that names a stage.
struct Edge {
    to: usize,
    at: Position,
    lines: (usize, usize),
    /// What to say when that stage comes too late.
    late: String,
}

impl Dockerfile {
    /// Resolves bases and sources, and which stages the target needs.
    pub fn plan(&self, options: &Options) -> Result<Plan, Error> {
        let globals = self.globals(options)?;
        let source_date_epoch_s = self.source_date_epoch(options, &globals)?;
        let build_args = options.build_args.clone();
        let shared = Arc::new(Shared { file: self.file.clone(), escape: self.escape, globals, build_args });
        let keys = self.global_args.iter().filter_map(|instruction| match &instruction.kind {
            Kind::Arg(definitions) => Some(definitions.iter().map(|d| d.key.clone())),
            _ => None,
        });
        let mut plan = Plan {
            stages: Vec::with_capacity(self.stages.len()),
            target: 0,
            order: Vec::new(),
            source_date_epoch_s,
            warnings: self.warnings.clone(),
            names: HashMap::new(),
            global_args: keys.flatten().collect(),
            shared,
        };
        for stage in &self.stages {
            plan.add(stage, options)?;
        }
        plan.target = plan.find_target(options.target.as_deref())?;
        plan.resolve()?;
        Ok(plan)
    }

    /// Predefined arguments and those ahead of the first FROM.
    fn globals(&self, options: &Options) -> Result<Environment, Error> {
        let target = options.target.as_deref().filter(|t| !t.is_empty());
        let target = target.or_else(|| self.stages.last()?.name.as_deref()).unwrap_or("default");
        let mut globals = Environment::default();
        let predefined = predefined(options, target);
        for (key, value) in &predefined {
            let value = options.build_args.get(key).unwrap_or(value);
            globals.set(key, value).map_err(|why| self.file.error_of_all(why))?;
        }
        for instruction in &self.global_args {
            let Kind::Arg(definitions) = &instruction.kind else { continue };
            for ArgDefinition { key, value } in definitions {
                let fail = |why: String| instruction.error(&self.file, value.as_ref().unwrap_or(key), why);
                let value = match (options.build_args.get(key), value) {
                    (Some(given), _) => given.clone(),
                    (None, Some(default)) => expand(&globals, self.escape, default).map_err(fail)?.text,
                    (None, None) => continue,
                };
                globals.set(key, &value).map_err(fail)?;
            }
        }
        Ok(globals)
    }

    fn source_date_epoch(&self, options: &Options, globals: &Environment) -> Result<Option<i64>, Error> {
        let key = "SOURCE_DATE_EPOCH";
        let value =
            options.build_args.get(key).map(String::as_str).or_else(|| globals.get(key)).unwrap_or_default();
        if value.is_empty() {
            return Ok(None);
        }
        let invalid =
            || self.file.error_of_all(format!("invalid {key}: {value}")).expecting("seconds since 1970");
        value.parse().map(Some).map_err(|_| invalid())
    }
}

/// ARGs that have values without being given any.
fn predefined(options: &Options, target: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for (prefix, given) in [("BUILD", &options.build_platform), ("TARGET", &options.platform)] {
        let given = platform::normalise(given);
        let parts = [
            ("PLATFORM", platform::format(&given)),
            ("OS", given.os),
            ("OSVERSION", String::new()),
            ("ARCH", given.architecture),
            ("VARIANT", given.variant.unwrap_or_default()),
        ];
        out.extend(parts.map(|(part, value)| (format!("{prefix}{part}"), value)));
    }
    out.push(("TARGETSTAGE".to_string(), target.to_string()));
    out
}

fn expand(globals: &Environment, escape: char, word: &str) -> Result<Expanded, String> {
    let lookup = |name: &str| globals.get(name).map(str::to_string);
    Lexer::new(escape, &lookup).expand(word)
}

impl Plan {
    /// What `--from` of COPY or of a mount names.
    pub fn source(&self, from: &str) -> Source {
        if let Some(index) = self.names.get(&from.to_lowercase()) {
            return Source::Stage(*index);
        }
        match from.parse::<usize>() {
            Ok(index) if index < self.stages.len() => Source::Stage(index),
            _ if from == "scratch" => Source::Scratch,
            _ => Source::Image(from.to_string()),
        }
    }

    /// The variables of a stage whose base has the environment `base_env`, `NAME=value` each; none for scratch. A stage
    /// on another stage begins with a clone of that one's.
    pub fn scope(&self, base_env: &[String]) -> Scope {
        Scope::new(self.shared.clone(), base_env)
    }

    /// Puts the ONBUILD triggers of a stage's base image ahead of its instructions. As they may take from stages that
    /// nothing needed so far, this is to be done for all of `order`, until it grows no more, before anything is built.
    pub fn onbuild(&mut self, stage: usize, triggers: &[String]) -> Result<(), Error> {
        let Some(planned) = self.stages.get(stage) else { return Ok(()) };
        let (file, at) = (self.shared.file.clone(), planned.at);
        self.bounded(planned.instructions.len() + triggers.len(), at)?;
        let read = triggers.iter().map(|text| onbuild::trigger(&file, at, '\\', text));
        let read: Vec<Instruction> = read.collect::<Result<_, _>>()?;
        self.stages[stage].instructions.splice(0..0, read);
        self.resolve()
    }

    /// An error of `instruction`, shown as those of the file itself are.
    pub fn error(&self, instruction: &Instruction, message: impl Display) -> Error {
        instruction.error(&self.shared.file, "", message)
    }

    /// An error of a stage's FROM line.
    pub fn base_error(&self, stage: &PlannedStage, message: impl Display) -> Error {
        self.shared.file.error(stage.at, (stage.at.line, stage.at.line), message)
    }

    /// The stage whose name `name` may have been meant to be; for images that are not found.
    pub fn similar_stage(&self, name: &str) -> Option<&str> {
        similar(name, self.names.keys().map(String::as_str))
    }

    /// Build arguments that no ARG takes.
    pub fn unused_build_args(&self) -> Vec<String> {
        let stages = self.order.iter().flat_map(|i| &self.stages[*i].instructions);
        let taken: BTreeSet<&str> = stages
            .filter_map(|instruction| match &instruction.kind {
                Kind::Arg(definitions) => Some(definitions.iter().map(|d| d.key.as_str())),
                _ => None,
            })
            .flatten()
            .collect();
        let given = self.shared.build_args.keys();
        let unused = given.filter(|key| {
            let global = self.global_args.contains(*key) || self.shared.globals.get(key).is_some();
            let special = is_proxy(key) || *key == "SOURCE_DATE_EPOCH" || key.starts_with("BUILDKIT_");
            !global && !special && !taken.contains(key.as_str())
        });
        unused.cloned().collect()
    }

    fn add(&mut self, stage: &Stage, options: &Options) -> Result<(), Error> {
        let index = self.stages.len();
        let file = self.shared.file.clone();
        let expanded = self.expand_from(stage, &stage.base)?;
        let fail = |message: String| {
            let error = file.error(stage.line.find(&stage.base), (stage.at.line, stage.at.line), message);
            match expanded.undefined.first() {
                Some(name) => {
                    error.expecting(format!("ARG {name}=VALUE ahead of it, or --build-arg {name}=VALUE"))
                }
                None => error,
            }
        };
        if expanded.text.is_empty() {
            return Err(fail(format!("base name ({}) should not be blank", stage.base)));
        }
        let base = self.source(&expanded.text);
        let mut instructions = Vec::new();
        match &base {
            Source::Stage(base) => {
                for instruction in &self.stages[*base].instructions {
                    if let Kind::Onbuild(text) = &instruction.kind {
                        instructions.push(onbuild::trigger(&file, stage.at, self.shared.escape, text)?);
                    }
                }
            }
            Source::Image(name) => {
                let invalid = |why| format!("failed to parse stage name {name:?}: {why}");
                Reference::parse(name).map_err(|why| fail(invalid(why)))?;
            }
            Source::Scratch => {}
        }
        let target = platform::normalise(&options.platform);
        let platform = match (&stage.platform, &base) {
            (_, Source::Stage(base)) => self.stages[*base].platform.clone(),
            (Some(given), Source::Image(_)) => self.platform(stage, given)?,
            _ => target,
        };
        self.bounded(instructions.len() + stage.instructions.len(), stage.at)?;
        instructions.extend(stage.instructions.iter().cloned());
        let name = stage.name.clone().unwrap_or_else(|| format!("stage-{index}"));
        self.name(stage, index);
        let (text, at, needs) = (stage.text.clone(), stage.at, Vec::new());
        self.stages.push(PlannedStage { name, base, platform, instructions, text, at, needs });
        Ok(())
    }

    fn name(&mut self, stage: &Stage, index: usize) {
        let Some(name) = &stage.name else { return };
        let at = Some(stage.line.find(""));
        if name == "scratch" || name == "context" {
            let message = format!("Stage name should not use the same name as reserved stage {name:?}");
            self.warnings.push(Warning { at, message });
        }
        if self.names.insert(name.clone(), index).is_some() {
            let message = format!("Duplicate stage name {name:?}, stage names should be unique");
            self.warnings.push(Warning { at, message });
        }
    }

    fn expand_from(&mut self, stage: &Stage, word: &str) -> Result<Expanded, Error> {
        let fail = |why| self.shared.file.error(stage.line.find(word), (stage.at.line, stage.at.line), why);
        let expanded = expand(&self.shared.globals, self.shared.escape, word).map_err(fail)?;
        for name in expanded.undefined.iter().filter(|name| !self.global_args.contains(*name)) {
            let message = format!("FROM argument '{name}' is not declared");
            let message = suggest(message, name, self.shared.globals.keys());
            self.warnings.push(Warning { at: Some(stage.line.find(name)), message });
        }
        Ok(expanded)
    }

    /// `--platform` of FROM.
    fn platform(&mut self, stage: &Stage, given: &str) -> Result<Platform, Error> {
        const ARCHITECTURES: [&str; 12] = [
            "386", "amd64", "arm", "arm64", "loong64", "mips64", "mips64le", "ppc64", "ppc64le", "riscv64",
            "s390x", "wasm",
        ];
        let expanded = self.expand_from(stage, given)?.text;
        let fail = |message: String| {
            let error =
                self.shared.file.error(stage.line.find(given), (stage.at.line, stage.at.line), message);
            error.expecting("OS/ARCHITECTURE[/VARIANT], such as linux/arm64 or linux/arm/v7")
        };
        if expanded.is_empty() {
            return Err(fail(format!("empty platform value from expression {given}")));
        }
        match expanded.split('/').next().unwrap_or_default() {
            os @ ("windows" | "darwin" | "freebsd" | "wasi" | "wasip1") => {
                Err(fail(format!("failed to parse platform {given}: {os:?}: only Linux images are built")))
            }
            _ => {
                match platform::parse(&expanded).filter(|p| ARCHITECTURES.contains(&p.architecture.as_str()))
                {
                    Some(platform) => Ok(platform),
                    None => Err(fail(format!(
                        "failed to parse platform {given}: {expanded:?}: unknown operating system or architecture"
                    ))),
                }
            }
        }
    }

    fn find_target(&self, target: Option<&str>) -> Result<usize, Error> {
        let Some(target) = target.filter(|t| !t.is_empty()) else { return Ok(self.stages.len() - 1) };
        let index = || target.parse::<usize>().ok().filter(|index| *index < self.stages.len());
        self.names.get(&target.to_lowercase()).copied().or_else(index).ok_or_else(|| {
            let message = format!("target stage {target:?} could not be found");
            let names = || self.stages.iter().map(|stage| stage.name.as_str());
            let error = self.shared.file.error_of_all(suggest(message, target, names()));
            error.expecting(names().collect::<Vec<_>>().join(", "))
        })
    }

    fn bounded(&self, instructions: usize, at: Position) -> Result<(), Error> {
        match instructions > limits::INSTRUCTIONS {
            true => {
                let message = format!("more than {} instructions with ONBUILD's", limits::INSTRUCTIONS);
                Err(self.shared.file.error(at, (at.line, at.line), message))
            }
            false => Ok(()),
        }
    }

    /// What each stage needs, and which ones the target does.
    fn resolve(&mut self) -> Result<(), Error> {
        let mut edges = Vec::with_capacity(self.stages.len());
        for index in 0..self.stages.len() {
            edges.push(self.edges(index)?);
        }
        for (index, edges) in edges.iter().enumerate() {
            let mut needs: BTreeSet<usize> = edges.iter().map(|edge| edge.to).collect();
            if let Source::Stage(base) = &self.stages[index].base {
                needs.insert(*base);
            }
            self.stages[index].needs = needs.into_iter().collect();
        }
        let needed = self.reach(self.target);
        for (index, edges) in edges.iter().enumerate() {
            for edge in edges.iter().filter(|edge| edge.to >= index) {
                let name = &self.stages[index].name;
                if self.reach(edge.to).contains(&index) {
                    let message = format!("circular dependency detected on stage: {name}");
                    return Err(self.shared.file.error(edge.at, edge.lines, message));
                }
                if needed.contains(&index) {
                    return Err(self.shared.file.error(edge.at, edge.lines, &edge.late));
                }
            }
        }
        self.order = needed.into_iter().collect();
        self.warnings.retain(|warning| warning.at.is_some());
        let unused = self.unused_build_args();
        if !unused.is_empty() {
            let message = format!("One or more build-args [{}] were not consumed", unused.join(" "));
            self.warnings.push(Warning { at: None, message });
        }
        Ok(())
    }

    /// A stage and all that it needs.
    fn reach(&self, from: usize) -> BTreeSet<usize> {
        let mut reached = BTreeSet::from([from]);
        let mut open = vec![from];
        while let Some(index) = open.pop() {
            open.extend(self.stages[index].needs.iter().filter(|need| reached.insert(**need)));
        }
        reached
    }

    fn edges(&self, index: usize) -> Result<Vec<Edge>, Error> {
        let mut edges = Vec::new();
        let stage = &self.stages[index];
        for instruction in &stage.instructions {
            let mut add = |from: &str, late: String| -> Result<(), Error> {
                let fail = |message: String| instruction.error(&self.shared.file, from, message);
                match self.source(from) {
                    Source::Stage(to) => {
                        let lines = (instruction.at.line, instruction.end_line);
                        edges.push(Edge { to, at: instruction.line.find(from), lines, late });
                    }
                    Source::Image(name) if name.parse::<i64>().is_ok() => {
                        return Err(fail(format!("invalid stage index {name}")));
                    }
                    Source::Image(name) => {
                        let invalid = |why| format!("failed to parse stage name {name:?}: {why}");
                        Reference::parse(&name).map_err(|why| fail(invalid(why)))?;
                    }
                    Source::Scratch => {}
                }
                Ok(())
            };
            match &instruction.kind {
                Kind::Copy(copy) => {
                    let Some(from) = &copy.from else { continue };
                    self.no_variables(instruction, from)?;
                    let name = &stage.name;
                    add(
                        from,
                        format!(
                            "cannot copy from stage {from:?}, it needs to be defined before current stage {name:?}"
                        ),
                    )?;
                }
                Kind::Run(run) => {
                    for flag in &run.mount_flags {
                        let from = mount::from(flag);
                        let fail = |bad: mount::BadMount| {
                            instruction.error(&self.shared.file, "--mount", bad.message)
                        };
                        let Some(from) = from.map_err(fail)? else { continue };
                        let late = "stage needs to be defined before current command";
                        add(&from, format!("cannot mount from stage {from:?}, {late}"))?;
                    }
                }
                _ => {}
            }
        }
        Ok(edges)
    }

    fn no_variables(&self, instruction: &Instruction, from: &str) -> Result<(), Error> {
        let fail = |message: String| instruction.error(&self.shared.file, from, message);
        let expanded = expand(&Environment::default(), self.shared.escape, from).map_err(fail)?;
        match expanded.text == from {
            true => Ok(()),
            false => Err(fail(
                "variable expansion is not supported for --from, define a new stage with FROM using ARG from global \
                 scope as a workaround"
                    .to_string(),
            )),
        }
    }
}
