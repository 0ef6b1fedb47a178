//! `sampan image build`: an image from a Dockerfile, for one platform or several.
//!
//! Upstream counterparts: docker/buildx' `build` command, its flags and `--output`; docker's `--iidfile`. The build itself
//! is [`sampan_build`]'s; here is where its inputs come from and where its image goes: to this machine's node, to a
//! registry, to files. What stays true: what can be known to fail is told before anything is built.
use std::collections::BTreeMap;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use http_body_util::BodyExt;
use sampan_build::dockerfile::Network;
use sampan_build::store::{CGROUP_ROOT, Scratch, Store};
use sampan_build::{BuildError, Built, Cancel, Exported, Kind, LocalImages, Means, Options, Progress};
use sampan_image::layout::LayoutWriter;
use sampan_image::{Client, Platform, Reference, copy, platform};
use serde_json::json;

use super::Node;
use super::bundle::{Output as File, fetch};
use super::progress::Bars;
use super::registry::{Access, advice, platforms};

mod cluster;
mod flags;
pub mod served;

use flags::{Output, host, ignore_file, output, pairs, secret};

/// How long an interrupted build may take to put things away.
const PATIENCE: Duration = Duration::from_secs(10);
const DOCKERFILE_MAX_BYTES: u64 = 4 << 20;
const STACK_BYTES: usize = 16 << 20;

#[derive(Args)]
pub struct Build {
    #[command(flatten)]
    node: Node,
    #[command(flatten)]
    access: Access,
    /// Name of the image, may be repeated
    #[arg(short, long = "tag", value_name = "NAME")]
    tags: Vec<String>,
    /// The Dockerfile (default: DIR/Dockerfile); - is standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Platforms to build for, OS/ARCH[/VARIANT] (default: this machine's)
    #[arg(long, value_delimiter = ',')]
    platform: Vec<String>,
    /// Value of an ARG, NAME=VALUE, or NAME to take it from the environment
    #[arg(long = "build-arg", value_name = "NAME[=VALUE]")]
    build_args: Vec<String>,
    /// Stage to build (default: the last)
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Do every step anew
    #[arg(long)]
    no_cache: bool,
    /// Ask registries for base images, also for what was built here
    #[arg(long)]
    pull: bool,
    /// Push the image to its registry, all platforms under one name
    #[arg(long)]
    push: bool,
    /// Put the image into this machine's node (default, where nothing else is asked for)
    #[arg(long)]
    load: bool,
    /// Where the result goes: type=oci|docker|tar|local,dest=PATH, type=image,push=true, or a folder
    #[arg(short, long = "output", value_name = "OUTPUT")]
    outputs: Vec<String>,
    /// Label of the image, NAME=VALUE
    #[arg(long = "label", value_name = "NAME=VALUE")]
    labels: Vec<String>,
    /// Annotation of the manifests, NAME=VALUE, or index:NAME=VALUE for the index
    #[arg(long = "annotation", value_name = "NAME=VALUE")]
    annotations: Vec<String>,
    /// Secret for RUN --mount=type=secret: id=NAME,src=FILE or id=NAME,env=VARIABLE
    #[arg(long = "secret", value_name = "SECRET")]
    secrets: Vec<String>,
    /// Network of RUN: the machine's, or none
    #[arg(long, default_value = "default", value_parser = ["default", "host", "none"])]
    network: String,
    /// How progress is shown
    #[arg(long, default_value = "auto", value_parser = ["auto", "plain", "tty", "quiet"])]
    progress: String,
    /// Print the image's id only
    #[arg(short, long)]
    quiet: bool,
    /// Write the image's id to a file
    #[arg(long, value_name = "FILE")]
    iidfile: Option<PathBuf>,
    /// Write what was built, as JSON, to a file
    #[arg(long, value_name = "FILE")]
    metadata_file: Option<PathBuf>,
    /// Further name in /etc/hosts of RUN, NAME:ADDRESS
    #[arg(long = "add-host", value_name = "NAME:ADDRESS")]
    add_hosts: Vec<String>,
    /// Build each platform on a node of the cluster that runs it natively, the others here
    #[arg(long)]
    on_cluster: bool,
    /// The cluster of --on-cluster
    #[arg(long, env = "KUBECONFIG", default_value = "/etc/sampan/sampan.yaml")]
    kubeconfig: PathBuf,
    /// List of what the image is made of: not made here
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    sbom: Option<String>,
    /// Statement of how the image was made: not made here
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    provenance: Option<String>,
    /// Folder that COPY takes from
    #[arg(value_name = "DIR")]
    context: PathBuf,
}

pub async fn run(args: Build) -> Result<()> {
    let outputs = args.outputs()?;
    let tags: Vec<Reference> = args.tags.iter().map(|t| Reference::parse(t)).collect::<Result<_, _>>()?;
    if let Some(pinned) = tags.iter().find(|t| t.digest.is_some()) {
        bail!("-t {pinned}: a digest can't be given as a name");
    }
    if outputs.contains(&Output::Push) && tags.is_empty() {
        bail!("--push needs a name to push to; give one with -t");
    }
    if outputs.contains(&Output::Load) {
        args.node
            .check()
            .await
            .context("the image is to be loaded into this machine's node; or give --push or -o")?;
    }
    let options = args.options()?;
    let client = args.access.client()?;
    let progress: Arc<dyn Progress> = Arc::new(Lines { quiet: args.quiet || args.progress == "quiet" });
    let (built, here, _received) = match args.on_cluster {
        true => {
            cluster::build(&args.kubeconfig, options, progress, || Here::open(&args.node, &args.access))
                .await?
        }
        false => {
            let here = Here::open(&args.node, &args.access)?;
            (here.build(options, progress).await.map_err(told)?, Some(here), None)
        }
    };
    let built = Arc::new(built);
    if let Some(here) = here.as_ref().filter(|_| !args.on_cluster) {
        sampan_build::remember(&here.store, &built, &tags)?;
    }
    for output in &outputs {
        args.deliver(output, &built, &tags, here.as_ref(), &client).await?;
    }
    args.tell(&built, &tags)?;
    here.map_or(Ok(()), Here::close)
}

/// What a build on this machine needs.
struct Here {
    store: Arc<Store>,
    scratch: Arc<Scratch>,
    client: Arc<Client>,
    local: Arc<NodeImages>,
}

impl Here {
    fn open(node: &Node, access: &Access) -> Result<Here> {
        if !nix::unistd::geteuid().is_root() {
            bail!("building images needs root, since it mounts file systems; try sudo");
        }
        let store = Arc::new(Store::open(&node.data_dir.join("build"), CGROUP_ROOT)?);
        Ok(Here {
            scratch: Arc::new(store.scratch()?),
            store,
            client: Arc::new(access.client()?),
            local: Arc::new(NodeImages(Node { data_dir: node.data_dir.clone() })),
        })
    }

    /// Builds; when it is interrupted the process ends.
    async fn build(&self, options: Options, progress: Arc<dyn Progress>) -> Result<Built, BuildError> {
        let (store, scratch, client) = (self.store.clone(), self.scratch.clone(), self.client.clone());
        let (local, cancel) = (self.local.clone(), Arc::new(Cancel::default()));
        let (stop, runtime) = (cancel.clone(), tokio::runtime::Handle::current());
        let mut built = std::pin::pin!(on_thread(move || {
            let means = Means {
                store: &store,
                scratch: &scratch,
                client: &client,
                local: Some(&*local),
                runtime,
                progress,
                cancel: &cancel,
            };
            sampan_build::build(&options, means)
        }));
        tokio::select! {
            built = &mut built => built.unwrap_or(Err(BuildError::Cancelled)),
            () = crate::node::wait_for_end() => {
                stop.cancel();
                // its mounts end with its thread, its processes with the step; the rest are groups and a folder
                let _ = tokio::time::timeout(PATIENCE, &mut built).await;
                sampan_runtime::remove_step_groups(CGROUP_ROOT, &self.scratch.id);
                let path = self.scratch.path.clone();
                let put_away = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(path));
                let _ = tokio::time::timeout(PATIENCE, put_away).await;
                eprintln!("sampan: the build was interrupted");
                std::process::exit(130);
            }
        }
    }

    /// Puts away what the build needed, and what the store keeps too much of.
    fn close(self) -> Result<()> {
        drop(self.scratch);
        self.store.collect(self.store.default_limit_bytes(), false)?;
        Ok(())
    }
}

/// A thread of its own: it gets mounts of its own.
async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (tell, told) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("build".into()).stack_size(STACK_BYTES);
    thread.spawn(move || drop(tell.send(work()))).context("starting the build's thread")?;
    told.await.context("the build broke off")
}

/// An error with what a failed step said last.
fn told(error: BuildError) -> anyhow::Error {
    match error {
        BuildError::Step { error, output } => {
            if !output.is_empty() {
                eprintln!("------\n{}\n------", output.join("\n"));
            }
            error.into()
        }
        BuildError::Image { name, source } => advice(source).context(name),
        other => other.into(),
    }
}

impl Build {
    fn outputs(&self) -> Result<Vec<Output>> {
        for (flag, given) in [("sbom", &self.sbom), ("provenance", &self.provenance)] {
            if given.as_deref().is_some_and(|g| g != "false") {
                bail!("--{flag}: attestations are not made here; leave it out, or give --{flag}=false");
            }
        }
        let mut outputs: Vec<Output> = self.outputs.iter().map(|o| output(o)).collect::<Result<_>>()?;
        if self.push {
            outputs.push(Output::Push);
        }
        if self.load || outputs.is_empty() {
            outputs.push(Output::Load);
        }
        let files = |o: &Output| matches!(o, Output::Tar(_) | Output::Folder(_));
        if self.on_cluster && outputs.iter().any(files) {
            bail!(
                "--on-cluster: files stay on the nodes; take the image with --push, --load, -o type=oci or type=docker"
            );
        }
        let standard = |o: &&Output| matches!(o, Output::Archive(p) | Output::Tar(p) if p.as_os_str() == "-");
        if outputs.iter().filter(standard).count() > 0 {
            if outputs.iter().filter(standard).count() > 1 {
                bail!("only one output can go to standard output");
            }
            if std::io::stdout().is_terminal() {
                bail!("an archive is nothing for a terminal; name a file with dest=, or pipe it");
            }
        }
        Ok(outputs)
    }

    fn options(&self) -> Result<Options> {
        let context = self.context.canonicalize();
        let context = context.with_context(|| format!("build context {}", self.context.display()))?;
        if !context.is_dir() {
            bail!("build context {}: a folder is needed; unpack archives first", self.context.display());
        }
        let (dockerfile_name, dockerfile, path) = self.dockerfile(&context)?;
        let wanted = match self.platform.as_slice() {
            [] => vec![sampan_build::machine_platform()],
            names => platforms(names)?,
        };
        let mut unique: Vec<Platform> = Vec::new();
        for one in wanted {
            if !unique.contains(&one) {
                unique.push(one);
            }
        }
        let (index, manifests): (Vec<_>, Vec<_>) = pairs("annotation", &self.annotations, false)?
            .into_iter()
            .partition(|(k, _)| k.starts_with("index:"));
        if let Some((key, _)) = manifests.iter().find(|(k, _)| {
            k.starts_with("manifest-descriptor")
                || k.starts_with("index-descriptor")
                || k.starts_with("manifest[")
        }) {
            bail!("--annotation {key}: only manifests and indexes as a whole can be annotated");
        }
        Ok(Options {
            ignore: ignore_file(&context, path.as_deref())?,
            context,
            dockerfile_name,
            dockerfile,
            platforms: unique,
            build_args: self.build_args()?,
            target: self.target.clone(),
            no_cache: self.no_cache,
            pull: self.pull,
            labels: pairs("label", &self.labels, true)?,
            annotations: manifests
                .into_iter()
                .map(|(k, v)| (k.trim_start_matches("manifest:").into(), v))
                .collect(),
            index_annotations: index
                .into_iter()
                .map(|(k, v)| (k.trim_start_matches("index:").into(), v))
                .collect(),
            secrets: self.secrets.iter().map(|s| secret(s)).collect::<Result<_>>()?,
            network: match self.network.as_str() {
                "none" => Network::None,
                "host" => Network::Host,
                _ => Network::Default,
            },
            add_hosts: self.add_hosts.iter().map(|h| host(h)).collect::<Result<_>>()?,
            exe: std::env::current_exe().context("finding this program")?,
            cgroup_root: CGROUP_ROOT.into(),
        })
    }

    /// Its name for messages, its text, and where it lies when it is a file.
    fn dockerfile(&self, context: &Path) -> Result<(String, Vec<u8>, Option<PathBuf>)> {
        if self.file.as_deref() == Some(Path::new("-")) {
            let mut text = Vec::new();
            std::io::stdin()
                .take(DOCKERFILE_MAX_BYTES)
                .read_to_end(&mut text)
                .context("reading standard input")?;
            return Ok(("Dockerfile".into(), text, None));
        }
        let path = match &self.file {
            Some(path) => path.clone(),
            None => {
                let names = ["Dockerfile", "dockerfile"].map(|n| context.join(n));
                names.iter().find(|p| p.is_file()).unwrap_or(&names[0]).clone()
            }
        };
        let file = std::fs::File::open(&path);
        let file = file.with_context(|| format!("{}; name the Dockerfile with -f", path.display()))?;
        let mut text = Vec::new();
        file.take(DOCKERFILE_MAX_BYTES).read_to_end(&mut text).with_context(|| path.display().to_string())?;
        let name = path.file_name().map_or("Dockerfile".into(), |n| n.to_string_lossy().into_owned());
        Ok((name, text, Some(path)))
    }

    fn build_args(&self) -> Result<BTreeMap<String, String>> {
        let mut all = BTreeMap::new();
        // as buildx does: reproducible builds need not say it twice
        if let Ok(epoch) = std::env::var("SOURCE_DATE_EPOCH") {
            all.insert("SOURCE_DATE_EPOCH".into(), epoch);
        }
        for given in &self.build_args {
            match given.split_once('=') {
                Some((name, value)) => drop(all.insert(name.to_string(), value.to_string())),
                None => {
                    if let Ok(value) = std::env::var(given) {
                        all.insert(given.clone(), value);
                    }
                }
            }
        }
        if all.contains_key("") {
            bail!("--build-arg: NAME=VALUE expected");
        }
        Ok(all)
    }

    async fn deliver(
        &self,
        output: &Output,
        built: &Arc<Built>,
        tags: &[Reference],
        here: Option<&Here>,
        client: &Client,
    ) -> Result<()> {
        let plan = copy::plan(&**built, built.media_type, &built.top, &[]).await?;
        match output {
            Output::Nothing => Ok(()),
            Output::Push => {
                for target in tags {
                    let bars = Bars::new();
                    let pushed = copy::push(client, &**built, &plan, target, &[], &bars).await;
                    bars.end();
                    pushed.map_err(advice).with_context(|| format!("pushing {target}"))?;
                }
                Ok(())
            }
            Output::Archive(path) => {
                let mut layout = LayoutWriter::new(File::create(path)?, sampan_build::machine_platform())?;
                layout.add(&**built, &plan, tags, &copy::Quiet).await.map_err(fetch)?;
                layout.finish().map_err(fetch)?.commit()
            }
            Output::Load => self.load(built, plan, tags).await,
            Output::Tar(path) => {
                let Some(here) = here else { return Ok(()) };
                let mut out = File::create(path)?;
                let (built, store, scratch) = (built.clone(), here.store.clone(), here.scratch.clone());
                on_thread(move || {
                    built.export_files(&store, &scratch, Exported::Tar(&mut out))?;
                    out.flush()?;
                    out.commit()
                })
                .await?
            }
            Output::Folder(path) => {
                let Some(here) = here else { return Ok(()) };
                let path = std::path::absolute(path).context("the folder to export to")?;
                let (built, store, scratch) = (built.clone(), here.store.clone(), here.scratch.clone());
                let done = on_thread(move || built.export_files(&store, &scratch, Exported::Folder(&path)));
                Ok(done.await??)
            }
        }
    }

    /// Into this machine's node: written as it is read there.
    async fn load(&self, built: &Arc<Built>, plan: copy::Plan, tags: &[Reference]) -> Result<()> {
        let (near, far) = std::os::unix::net::UnixStream::pair()?;
        let (built, tags) = (built.clone(), tags.to_vec());
        let runtime = tokio::runtime::Handle::current();
        let writing = on_thread(move || {
            runtime.block_on(async {
                let machine = sampan_build::machine_platform();
                let mut layout = LayoutWriter::new(std::io::BufWriter::new(far), machine)?;
                layout.add(&*built, &plan, &tags, &copy::Quiet).await?;
                layout.finish()?.flush()?;
                Ok::<(), sampan_image::client::FetchError>(())
            })
        });
        let taking = self.node.import_from(near);
        let (written, taken) = tokio::join!(writing, taking);
        let taken = taken.context("loading the image into the node")?;
        written?.map_err(fetch)?;
        if taken.is_empty() {
            eprintln!("sampan: nothing of the image is for this node; it keeps what platforms there are");
        }
        Ok(())
    }

    /// Prints and writes what was built.
    fn tell(&self, built: &Built, tags: &[Reference]) -> Result<()> {
        if let Some(path) = &self.iidfile {
            std::fs::write(path, built.id()).with_context(|| path.display().to_string())?;
        }
        if let Some(path) = &self.metadata_file {
            let names: Vec<String> = tags.iter().map(ToString::to_string).collect();
            let mut about = json!({
                "containerimage.digest": built.digest(),
                "containerimage.descriptor": {"mediaType": built.media_type, "digest": built.digest(), "size": built.top.len()},
                "image.name": names.join(","),
            });
            if let [one] = built.images.as_slice() {
                about["containerimage.config.digest"] = sampan_image::manifest::digest(&one.config).into();
            }
            let text = serde_json::to_string_pretty(&about)?;
            std::fs::write(path, text).with_context(|| path.display().to_string())?;
        }
        let to_stdout = |o: &String| {
            output(o).is_ok_and(|o| matches!(o, Output::Archive(p) | Output::Tar(p) if p.as_os_str() == "-"))
        };
        if self.outputs.iter().any(to_stdout) {
            return Ok(());
        }
        if self.quiet {
            println!("{}", built.id());
            return Ok(());
        }
        let built_for: Vec<Platform> = built.images.iter().map(|i| i.platform.clone()).collect();
        let shown = platform::list(&built_for);
        match tags {
            [] => println!("{} for {shown}", built.digest()),
            tags => tags.iter().for_each(|t| println!("{t}: {} for {shown}", built.digest())),
        }
        Ok(())
    }
}

/// Frees what builds keep, or as much of it as no build that runs needs.
pub fn prune(data_dir: &Path) -> Result<()> {
    let folder = data_dir.join("build");
    if !folder.is_dir() {
        println!("0 steps, 0 B freed");
        return Ok(());
    }
    let freed = Store::open(&folder, CGROUP_ROOT)?.collect(0, true)?;
    println!("{} steps and images, {} freed", freed.entries, super::progress::bytes(freed.size_bytes));
    Ok(())
}

/// One line each, on standard error.
struct Lines {
    quiet: bool,
}

impl Progress for Lines {
    fn tell(&self, number: usize, kind: Kind, text: &str) {
        if !self.quiet {
            eprintln!("{}", sampan_build::plain(number, kind, text));
        }
    }
}

/// The node that runs here, for bases that only it has.
struct NodeImages(Node);

#[async_trait::async_trait]
impl LocalImages for NodeImages {
    async fn export(&self, name: &Reference, archive: &Path) -> std::io::Result<bool> {
        let Ok(mut body) = self.0.export(&name.to_string()).await else { return Ok(false) };
        let mut file = std::fs::File::create(archive)?;
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => {
                    if let Ok(data) = frame.into_data() {
                        file.write_all(&data)?;
                    }
                }
                Err(e) => return Err(std::io::Error::other(e)),
            }
        }
        Ok(true)
    }
}
