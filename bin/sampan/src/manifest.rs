//! `sampan manifest`: `docker manifest`'s commands, flags and output, and what its users miss.
//!
//! Upstream counterpart: docker/cli, cli/command/manifest. Deliberate differences, besides those of sampan-manifests:
//! warnings go to standard error, `ls` shows what is pending, `push --from` needs no pending list at all.
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use sampan_image::{Client, Reference};
use sampan_manifests::{Checks, Given, ManifestError, Member, PendingList, Store, inspect, inspect_list};
use sampan_manifests::{inspect_member, push, resolve};

use crate::image::progress::Bars;
use crate::image::registry::Access;

#[derive(Subcommand)]
pub enum Command {
    /// Create a local manifest list for annotating and pushing to a registry
    Create(Create),
    /// Add additional information to a local image manifest
    Annotate(Annotate),
    /// Display an image manifest, or manifest list
    Inspect(Inspect),
    /// Push a manifest list to a repository
    Push(Push),
    /// Delete one or more manifest lists from local storage
    Rm {
        #[arg(value_name = "MANIFEST_LIST", required = true)]
        lists: Vec<String>,
    },
    /// List the manifest lists that are kept locally
    #[command(visible_alias = "list")]
    Ls {
        /// Names only
        #[arg(short, long)]
        quiet: bool,
    },
}

#[derive(Args)]
pub struct Create {
    /// Amend an existing manifest list
    #[arg(short, long)]
    amend: bool,
    /// Do not look into the images for what machines their programs are made
    #[arg(long)]
    no_check: bool,
    #[command(flatten)]
    access: Access,
    #[arg(value_name = "MANIFEST_LIST")]
    list: String,
    #[arg(value_name = "MANIFEST", required = true)]
    manifests: Vec<String>,
}

#[derive(Args)]
pub struct Annotate {
    /// Set operating system
    #[arg(long, default_value = "", hide_default_value = true)]
    os: String,
    /// Set architecture
    #[arg(long, default_value = "", hide_default_value = true)]
    arch: String,
    /// Set architecture variant
    #[arg(long, default_value = "", hide_default_value = true)]
    variant: String,
    /// Set operating system version
    #[arg(long, default_value = "", hide_default_value = true)]
    os_version: String,
    /// Set operating system feature
    #[arg(long, value_delimiter = ',', action = clap::ArgAction::Append)]
    os_features: Vec<String>,
    #[arg(value_name = "MANIFEST_LIST")]
    list: String,
    #[arg(value_name = "MANIFEST")]
    manifest: String,
}

#[derive(Args)]
pub struct Inspect {
    /// Output additional info including layers and platform
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    access: Access,
    #[arg(value_name = "[MANIFEST_LIST] MANIFEST", required = true, num_args = 1..=2)]
    names: Vec<String>,
}

#[derive(Args)]
pub struct Push {
    /// Remove the local manifest list after push
    #[arg(short, long)]
    purge: bool,
    /// Make the list from these images and push it at once; nothing is kept locally
    #[arg(long, value_name = "MANIFEST,…", value_delimiter = ',', conflicts_with = "purge")]
    from: Vec<String>,
    /// With --from: do not look into the images for what machines their programs are made
    #[arg(long, requires = "from")]
    no_check: bool,
    #[command(flatten)]
    access: Access,
    #[arg(value_name = "MANIFEST_LIST")]
    list: String,
}

pub fn run(command: Command) -> Result<()> {
    sampan_telemetry::init("warn");
    crate::runtime()?.block_on(async {
        match command {
            Command::Create(args) => create(args).await,
            Command::Annotate(args) => annotate(args),
            Command::Inspect(args) => show(args).await,
            Command::Push(args) => send(args).await,
            Command::Rm { lists } => remove(&lists),
            Command::Ls { quiet } => list(quiet),
        }
    })
}

fn parse(name: &str) -> Result<Reference> {
    Ok(Reference::parse(name)?)
}

fn warn(warnings: Vec<String>) {
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
}

/// All members, asked of their registries one after the other, with what is odd about them.
async fn members(client: &Client, names: &[String], no_check: bool) -> Result<Vec<Member>> {
    let checks = if no_check { Checks::None } else { Checks::Programs };
    let mut members = Vec::new();
    for name in names.iter().map(|n| n.trim()).filter(|n| !n.is_empty()) {
        let member = resolve(client, &parse(name)?, checks).await?;
        warn(member.contradictions());
        members.push(member);
    }
    Ok(members)
}

async fn create(args: Create) -> Result<()> {
    let list = &args.list;
    let target =
        Reference::parse(list).with_context(|| format!("error parsing name for manifest list {list}"))?;
    let store = Store::of_user()?;
    if store.find(&target)?.is_some() && !args.amend {
        bail!("refusing to amend an existing manifest list with no --amend flag");
    }
    let members = members(&args.access.client()?, &args.manifests, args.no_check).await?;
    let _lock = store.lock()?;
    let pending = match store.find(&target)? {
        Some(mut pending) => {
            members.into_iter().for_each(|m| pending.put(m));
            pending
        }
        None => PendingList::new(target.to_string(), members),
    };
    store.save(&target, &pending)?;
    println!("Created manifest list {target}");
    Ok(())
}

fn annotate(args: Annotate) -> Result<()> {
    let (list, manifest) = (&args.list, &args.manifest);
    let target = Reference::parse(list)
        .with_context(|| format!("annotate: error parsing name for manifest list {list}"))?;
    let image = Reference::parse(manifest)
        .with_context(|| format!("annotate: error parsing name for manifest {manifest}"))?;
    let store = Store::of_user()?;
    let _lock = store.lock()?;
    let missing = || format!("manifest for image {manifest} does not exist in {list}");
    let Some(mut pending) = store.find(&target)? else { bail!(missing()) };
    let name = image.to_string();
    let member = pending.members.iter_mut().find(|m| m.name == name).with_context(missing)?;
    let given = Given {
        os: args.os,
        arch: args.arch,
        variant: args.variant,
        os_version: args.os_version,
        os_features: args.os_features,
    };
    let said = given != Given::default();
    let warnings = member.annotate(&given)?;
    store.save(&target, &pending)?;
    if said {
        warn(warnings);
    }
    Ok(())
}

async fn show(args: Inspect) -> Result<()> {
    let name = parse(args.names.last().map_or("", String::as_str))?;
    let store = Store::of_user()?;
    if args.names.len() == 2 {
        let list = parse(&args.names[0])?;
        let missing = || ManifestError::NotPending { name: name.to_string() };
        let pending = store.find(&list)?.ok_or_else(missing)?;
        let text = name.to_string();
        let member = pending.members.iter().find(|m| m.name == text).ok_or_else(missing)?;
        println!("{}", inspect_member(member, args.verbose)?);
        return Ok(());
    }
    if let Some(pending) = store.find(&name)? {
        println!("{}", inspect_list(&pending, args.verbose)?);
        return Ok(());
    }
    println!("{}", inspect(&args.access.client()?, &name, args.verbose).await?);
    Ok(())
}

async fn send(args: Push) -> Result<()> {
    let target = parse(&args.list)?;
    let client = args.access.client()?;
    let store = Store::of_user()?;
    let pending = match args.from.is_empty() {
        true => store.get(&target)?,
        false => PendingList::new(target.to_string(), members(&client, &args.from, args.no_check).await?),
    };
    if pending.members.is_empty() {
        bail!("{target} not found");
    }
    let bars = Bars::new();
    let digest = push(&client, &target, &pending, &bars, &mut |line| bars.print(&line)).await;
    bars.end();
    println!("{}", digest?);
    if args.purge {
        store.remove(&target)?;
    }
    Ok(())
}

/// Removes what it can, and fails when one of them was not there.
fn remove(lists: &[String]) -> Result<()> {
    let store = Store::of_user()?;
    let _lock = store.lock()?;
    let removed = |list: &String| parse(list).and_then(|name| Ok(store.remove(&name)?));
    let errors: Vec<String> =
        lists.iter().filter_map(|l| removed(l).err()).map(|e| format!("{e:#}")).collect();
    if errors.is_empty() {
        return Ok(());
    }
    bail!(errors.join("\n"))
}

fn list(quiet: bool) -> Result<()> {
    let lists = Store::of_user()?.list()?;
    if quiet {
        lists.iter().for_each(|l| println!("{}", l.name));
        return Ok(());
    }
    let rows = lists.iter().map(|l| {
        let platforms: Vec<String> =
            l.members.iter().map(|m| sampan_image::platform::format(&m.platform().platform())).collect();
        let platforms = platforms.join(", ");
        vec![l.name.clone(), l.members.len().to_string(), l.created_at.to_string(), platforms]
    });
    crate::image::table(&["MANIFEST LIST", "IMAGES", "CREATED", "PLATFORMS"], rows.collect());
    Ok(())
}
