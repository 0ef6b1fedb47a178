//! `sampan image`: images on this node, in registries and in archives.
//!
//! Upstream counterparts: `ctr images`, `crictl`, `docker image`, `docker build` and `skopeo`, whose words are kept where they agree. What
//! concerns the node's own images is asked of the node that runs here, over a socket in its data folder ([`node`]);
//! registries and archives need no node at all.
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

pub mod build;
mod bundle;
mod node;
mod platforms;
pub mod progress;
pub mod registry;
pub mod service;

use registry::Access;

#[derive(Subcommand)]
pub enum Command {
    /// Build an image from a Dockerfile, for one platform or several
    Build(Box<build::Build>),
    /// Build for somebody else: what a node starts
    #[command(hide = true)]
    BuildServed(build::served::Served),
    /// Pull images onto this node
    Pull {
        #[command(flatten)]
        node: Node,
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
    },
    /// Push an image of this node, or what an archive holds, to a registry
    Push(bundle::Push),
    /// Import archives (OCI layouts, docker save) onto this node
    Import {
        #[command(flatten)]
        node: Node,
        /// Archives, plain or compressed, or folders with an OCI layout; - is standard input
        #[arg(value_name = "ARCHIVE", required = true)]
        archives: Vec<PathBuf>,
    },
    /// Put images, all their platforms, into one archive that imports anywhere
    Export(bundle::Export),
    /// List the images of this node
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        node: Node,
        /// Ids only
        #[arg(short, long)]
        quiet: bool,
        /// Print JSON
        #[arg(short, long, value_parser = ["json"])]
        output: Option<String>,
    },
    /// Remove images from this node
    Rm {
        #[command(flatten)]
        node: Node,
        /// Also those that containers are made from
        #[arg(short, long)]
        force: bool,
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
    },
    /// Show an image of this node, or of a registry
    Inspect {
        #[command(flatten)]
        node: Node,
        #[command(flatten)]
        access: Access,
        /// Ask the registry, not this node
        #[arg(long)]
        remote: bool,
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
    },
    /// Remove images of this node that no container is made from
    Prune {
        #[command(flatten)]
        node: Node,
        /// All of them, not only those without a name
        #[arg(short, long)]
        all: bool,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
        /// Remove what builds keep, not images
        #[arg(long, conflicts_with = "all")]
        build_cache: bool,
    },
    /// Copy an image, all its platforms, from a registry or an archive to a registry
    Copy(bundle::Copy),
    /// Give an image of this node another name
    Tag {
        #[command(flatten)]
        node: Node,
        #[arg(value_name = "IMAGE")]
        image: String,
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Show which nodes of the cluster can run an image, and why others cannot
    Platforms(platforms::Platforms),
}

/// The node that is asked.
#[derive(Args)]
pub struct Node {
    /// Where the node keeps everything
    #[arg(short, long, default_value = "/var/lib/sampan")]
    data_dir: PathBuf,
}

pub fn run(command: Command) -> Result<()> {
    sampan_telemetry::init("warn");
    crate::runtime()?.block_on(async {
        match command {
            Command::Build(args) => build::run(*args).await,
            Command::BuildServed(args) => build::served::run(args).await,
            Command::Pull { node, images } => node::pull(&node, &images).await,
            Command::Push(args) => bundle::push(args).await,
            Command::Import { node, archives } => node::import(&node, &archives).await,
            Command::Export(args) => bundle::export(args).await,
            Command::Ls { node, quiet, output } => node::list(&node, quiet, output.is_some()).await,
            Command::Rm { node, force, images } => node::remove(&node, force, &images).await,
            Command::Inspect { access, remote: true, images, .. } => bundle::inspect(&access, &images).await,
            Command::Inspect { node, images, .. } => node::inspect(&node, &images).await,
            Command::Prune { node, build_cache: true, .. } => build::prune(&node.data_dir),
            Command::Prune { node, all, force, .. } => node::prune(&node, all, force).await,
            Command::Copy(args) => bundle::copy(args).await,
            Command::Tag { node, image, name } => node::tag(&node, &image, &name).await,
            Command::Platforms(args) => platforms::run(args).await,
        }
    })
}

/// Columns, two spaces apart.
pub fn table(head: &[&str], rows: Vec<Vec<String>>) {
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(c, w)| format!("{c:<w$}")).collect();
        println!("{}", padded.join("  ").trim_end());
    };
    line(&mut head.iter().copied());
    for row in &rows {
        line(&mut row.iter().map(String::as_str));
    }
}
