//! A whole build: every platform, the stages that each needs, and the image that comes of it.
//!
//! Upstream counterpart: BuildKit's solver, where this knows one order only: platforms one after the other, stages as the
//! plan has them. Stages that are built for the machine itself (`--platform=$BUILDPLATFORM`) are shared between target
//! platforms by the cache: their steps have the same keys. What stays true: whether each platform's programs can run
//! here is known before the first of them does.
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;
use sampan_image::{Client, Platform, Reference, platform};
use tokio::runtime::Handle;

use crate::base::Bases;
use crate::context::Context;
use crate::dockerfile::{self, Dockerfile, Kind, Plan, Source};
use crate::emulation::{machine_platform, runnable};
use crate::error::{BuildError, refused};
use crate::image::Image;
use crate::options::{Cancel, LocalImages, Options};
use crate::output::{Built, BuiltImage};
use crate::overlay;
use crate::progress::{Progress, Reporter};
use crate::stage::Stage;
use crate::store::{ImageRecord, Scratch, Store};

/// What all steps share.
pub struct Builder<'a> {
    pub options: &'a Options,
    pub store: &'a Store,
    pub scratch: &'a Scratch,
    pub context: &'a Context,
    pub bases: Bases<'a>,
    pub runtime: Handle,
    pub reporter: Reporter,
    pub cancel: &'a Cancel,
    /// Keys of steps that this build made: its later platforms take them even with `--no-cache`.
    pub fresh: HashSet<String>,
    warned: Mutex<HashSet<String>>,
}

/// One target platform's build.
pub struct Work {
    pub plan: Plan,
    pub platform: Platform,
    pub stages: HashMap<usize, Stage>,
}

/// What a build needs besides its options.
pub struct Means<'a> {
    pub store: &'a Store,
    pub scratch: &'a Scratch,
    pub client: &'a Client,
    pub local: Option<&'a dyn LocalImages>,
    /// Not of the thread that builds: that one waits for it.
    pub runtime: Handle,
    pub progress: Arc<dyn Progress>,
    pub cancel: &'a Cancel,
}

/// Builds all platforms. Blocking; to be called on a thread of its own, which gets a mount namespace of its own.
pub fn build(options: &Options, means: Means<'_>) -> Result<Built, BuildError> {
    let reporter = Reporter::new(means.progress.clone());
    let task = reporter.begin(&format!("[internal] load build definition from {}", options.dockerfile_name));
    let parsed = Dockerfile::parse(&options.dockerfile_name, &options.dockerfile);
    let dockerfile = match parsed {
        Ok(dockerfile) => dockerfile,
        Err(error) => {
            task.failed(&error.message());
            return Err(error.into());
        }
    };
    task.done();
    let mut plans = Vec::new();
    for platform in &options.platforms {
        plans.push((platform.clone(), plan(options, &dockerfile, platform)?));
    }
    for (_, plan) in &plans {
        check_platforms(plan)?;
    }
    overlay::own_namespace()?;
    let context = Context::open(&options.context, options.ignore.as_ref())?;
    let mut builder = Builder {
        options,
        store: means.store,
        scratch: means.scratch,
        context: &context,
        bases: Bases {
            store: means.store,
            scratch: means.scratch,
            client: means.client,
            local: means.local,
            runtime: means.runtime.clone(),
            pull: options.pull,
            reporter: reporter.clone(),
            cancel: means.cancel,
            known: HashMap::new(),
        },
        runtime: means.runtime,
        reporter,
        cancel: means.cancel,
        fresh: HashSet::new(),
        warned: Mutex::default(),
    };
    let mut images = Vec::new();
    for (platform, plan) in plans {
        images.push(builder.platform(platform, plan)?);
    }
    Ok(Built::new(images, &options.index_annotations))
}

fn plan(options: &Options, dockerfile: &Dockerfile, platform: &Platform) -> Result<Plan, BuildError> {
    Ok(dockerfile.plan(&dockerfile::Options {
        build_args: options.build_args.clone(),
        target: options.target.clone(),
        platform: platform.clone(),
        build_platform: machine_platform(),
    })?)
}

/// Whether every needed stage that runs something can.
fn check_platforms(plan: &Plan) -> Result<(), BuildError> {
    for index in &plan.order {
        let stage = &plan.stages[*index];
        let run = stage.instructions.iter().find(|i| matches!(i.kind, Kind::Run(_)));
        if let Some(run) = run {
            runnable(&stage.platform).map_err(|why| plan.error(run, why))?;
        }
    }
    Ok(())
}

/// As BuildKit names a stage's platform: `linux/amd64->linux/arm64` where it is built for another.
fn shown(platform: &Platform, target: &Platform) -> String {
    let (platform, target) = (platform::format(platform), platform::format(target));
    if platform == target { platform } else { format!("{platform}->{target}") }
}

/// Whether an instruction is a step, and counted as one.
fn is_step(kind: &Kind) -> bool {
    matches!(kind, Kind::Run(_) | Kind::Copy(_) | Kind::Add(_) | Kind::Workdir(_))
}

impl Builder<'_> {
    /// Says something once, however often it is the case.
    pub fn warn_once(&self, text: &str) {
        if self.warned.lock().insert(text.to_string()) {
            self.reporter.warn(text);
        }
    }

    fn warn_about(&self, warning: &dockerfile::Warning) {
        let place = match warning.at {
            Some(at) => format!("{}:{at}: ", self.options.dockerfile_name),
            None => String::new(),
        };
        self.warn_once(&format!("{place}{}", warning.message));
    }

    fn platform(&mut self, platform: Platform, plan: Plan) -> Result<BuiltImage, BuildError> {
        let mut work = Work { plan, platform, stages: HashMap::new() };
        self.prepare_bases(&mut work)?;
        check_platforms(&work.plan)?;
        for warning in &work.plan.warnings {
            self.warn_about(warning);
        }
        for index in work.plan.order.clone() {
            let stage = self.stage(&mut work, index)?;
            work.stages.insert(index, stage);
        }
        let epoch = work.plan.source_date_epoch_s;
        let Some(stage) = work.stages.get(&work.plan.target) else {
            return Err(refused("the target stage was not built"));
        };
        let mut image = stage.image.clone();
        image.set_platform(&work.platform);
        let labels = self.options.labels.iter();
        image.add_labels(labels.map(|(k, v)| (k.as_str(), v.as_str())));
        let config = image.config(&stage.layers, epoch);
        let manifest = crate::image::manifest(&config, &stage.layers, &self.options.annotations);
        let paths = stage.layers.iter().map(|l| (l.digest.clone(), self.store.blob_path(&l.digest)));
        Ok(BuiltImage {
            platform: work.platform.clone(),
            blobs: paths.collect(),
            layers: stage.layers.clone(),
            config: config.into(),
            manifest: manifest.into(),
        })
    }

    /// Pulls the bases of all needed stages. Their triggers may need further ones.
    fn prepare_bases(&mut self, work: &mut Work) -> Result<(), BuildError> {
        let mut done = HashSet::new();
        while let Some(index) = work.plan.order.iter().copied().find(|i| !done.contains(i)) {
            done.insert(index);
            let stage = &work.plan.stages[index];
            let Source::Image(name) = &stage.base else { continue };
            let (name, platform) = (name.clone(), stage.platform.clone());
            let total = 1 + stage.instructions.iter().filter(|i| is_step(&i.kind)).count();
            let shown = format!("[{} {} 1/{total}] FROM", shown(&platform, &work.platform), stage.name);
            let base = self.bases.get(&name, &platform, &shown).map_err(|e| match e {
                BuildError::Image { name, source } => {
                    let hint = work.plan.similar_stage(&name);
                    let hint = hint.map_or(String::new(), |h| format!("; is stage {h:?} meant?"));
                    let stage = &work.plan.stages[index];
                    work.plan.base_error(stage, format!("{name}: {source}{hint}")).into()
                }
                other => other,
            })?;
            let triggers = base.image.clone().take_triggers();
            if !triggers.is_empty() {
                work.plan.onbuild(index, &triggers)?;
            }
        }
        Ok(())
    }

    fn stage(&mut self, work: &mut Work, index: usize) -> Result<Stage, BuildError> {
        let planned = work.plan.stages[index].clone();
        let shown_platform = shown(&planned.platform, &work.platform);
        let mut stage = match &planned.base {
            Source::Scratch => {
                let image = Image::scratch(&planned.platform);
                let scope = work.plan.scope(&image.env());
                Stage { image, layers: Vec::new(), scope, platform: planned.platform.clone() }
            }
            Source::Stage(base) => match work.stages.get(base) {
                Some(base) => Stage { image: base.image.as_base(), ..base.clone() },
                None => return Err(refused(format!("stage {} is not built", planned.name))),
            },
            Source::Image(name) => {
                let base = self.bases.get(name, &planned.platform, "FROM")?;
                let mut image = base.image.clone();
                image.take_triggers();
                let scope = work.plan.scope(&image.env());
                Stage { image, layers: base.layers.clone(), scope, platform: planned.platform.clone() }
            }
        };
        let total = 1 + planned.instructions.iter().filter(|i| is_step(&i.kind)).count();
        let mut number = 1;
        for instruction in &planned.instructions {
            if is_step(&instruction.kind) {
                number += 1;
            }
            let shown = format!("[{shown_platform} {} {number}/{total}]", planned.name);
            let expanded = stage.scope.evaluate(instruction)?;
            for warning in stage.scope.take_warnings() {
                self.warn_about(&warning);
            }
            self.instruction(work, &mut stage, &expanded, &shown)?;
            if stage.layers.len() > sampan_image::manifest::LAYERS_MAX {
                let message = format!("more than {} layers", sampan_image::manifest::LAYERS_MAX);
                return Err(work.plan.error(instruction, message).into());
            }
        }
        Ok(stage)
    }
}

/// Remembers what was built under its names, for later builds' FROM.
pub fn remember(store: &Store, built: &Built, names: &[Reference]) -> Result<(), BuildError> {
    for image in &built.images {
        let (manifest, config) = (store.keep_document(&image.manifest)?, store.keep_document(&image.config)?);
        for name in names {
            store.put_image(&ImageRecord {
                name: name.to_string(),
                platform: image.platform.clone(),
                built: true,
                manifest: manifest.clone(),
                config: config.clone(),
                layers: image.layers.clone(),
            })?;
        }
    }
    Ok(())
}
