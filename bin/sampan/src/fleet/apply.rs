//! `sampan apply`: a list of hosts made a cluster, several at a time.
//!
//! Upstream counterpart: running the script of `k3sup plan`. What stays true: all machines are looked at and judged
//! before anything is changed on one; servers are made one by one, and are Ready before an agent is told to join.
use std::sync::Arc;

use anyhow::{Result, anyhow};
use futures::StreamExt;
use sampan_fleet::service::Role;
use sampan_fleet::{Ask, HostEntry};

use super::access::{Way, ask};
use super::datastore::kept_token;
use super::install;
use super::node::{self, Prepared, Setup, Wanted};
use super::plan::ListedCluster;
use super::{Unfit, Usage, join, tell};
use crate::certificate::server::new_secret;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    list: ListedCluster,
    #[command(flatten)]
    setup: Setup,
    /// Secret that nodes join with (default: one is made up)
    #[arg(long)]
    token: Option<String>,
    /// Machines worked on at a time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: u8,
}

struct Member<'a> {
    entry: &'a HostEntry,
    way: Way,
    wanted: Wanted,
}

pub async fn run(args: &Args) -> Result<()> {
    args.setup.note_k3s_flags();
    let start = sampan_world::clock::monotonic();
    let plan = args.list.read()?;
    let (servers, agents) = plan.roles(args.list.layout.servers);
    let Some(first) = servers.first().copied() else {
        return Err(Usage("no host of the list is a server".to_string()).into());
    };
    args.list.layout.check(servers.len())?;
    let mut members = Vec::new();
    // the tokens are not known yet; what matters here is whether the arguments are right
    let placeholder = args.token.as_deref().unwrap_or("token");
    for entry in &servers {
        let wanted = server(args, entry, first, 6443, Some(placeholder))?;
        members.push(Member { entry, way: args.list.access.way_of(entry)?, wanted });
    }
    for entry in agents {
        let wanted = agent(args, entry, first, 6443, "token")?;
        members.push(Member { entry, way: args.list.access.way_of(entry)?, wanted });
    }
    let ask = ask();
    let prepared = prepare(args, &members, &ask).await?;
    let alone = prepared.len() == 1;
    let sent = each(args, prepared.iter().map(|p| node::send(p, &args.setup, alone))).await;
    let sent = all_or_first(sent)?;

    let token = servers_token(args, &prepared[0]).await?;
    let mut first_settled: Option<node::Settled> = None;
    // one by one: the first makes the cluster, and each is Ready before the next begins
    for ((prepared, member), sent) in prepared.iter().zip(&members).zip(&sent).take(servers.len()) {
        let port = first_settled.as_ref().map_or(6443, |settled| settled.effective.port);
        let wanted = server(args, member.entry, first, port, token.as_deref())?;
        let settled = node::settle(prepared, &wanted, &args.setup, *sent).await?;
        if first_settled.is_none() {
            let path = &settled.effective.kubeconfig;
            install::fetch(&prepared.host, path, first.target(), &args.list.out, false).await?;
            first_settled = Some(settled);
        }
    }
    let Some(settled) = first_settled else { return Err(anyhow!("no server was set up")) };
    let path = format!("{}/server/node-token", settled.effective.data_dir);
    let token = node::read_root(&prepared[0].host, &path).await?;
    let (port, token) = (settled.effective.port, token.trim());
    let rest = prepared.iter().zip(&members).zip(&sent).skip(servers.len());
    let joined = each(
        args,
        rest.map(|((prepared, member), sent)| async move {
            let wanted = agent(args, member.entry, first, port, token)?;
            node::settle(prepared, &wanted, &args.setup, *sent).await
        }),
    )
    .await;
    let count = all_or_first(joined)?.len() + servers.len();
    eprintln!("{count} nodes are set up, in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// What servers are given as their token: as asked for, as the first has it, or, where several need one, made up. `None`
/// leaves it to the server.
async fn servers_token(args: &Args, first: &Prepared) -> Result<Option<String>> {
    if args.token.is_some() || !needs_token(args) {
        return Ok(args.token.clone());
    }
    let there = node::look(&first.host, &Wanted::nothing_new(Role::Server)).await?;
    if let Some(token) = kept_token(&first.host, &there).await? {
        return Ok(Some(token));
    }
    Ok(Some(new_secret()))
}

/// Whether the servers are told one token, which the owner need not have chosen.
fn needs_token(args: &Args) -> bool {
    args.list.layout.datastore.is_given() || args.list.layout.cluster
}

fn server(
    args: &Args,
    entry: &HostEntry,
    first: &HostEntry,
    port: u16,
    token: Option<&str>,
) -> Result<Wanted> {
    let layout = &args.list.layout;
    let token = token.filter(|_| args.token.is_some() || needs_token(args)).map(String::from);
    let mut flags = layout.server_flags(entry, token);
    let joins = layout.has_members() && entry.target() != first.target();
    flags.cluster &= !joins;
    let mut wanted = flags.wanted(entry.target())?;
    if joins {
        let url = crate::join::url_of(first.target(), port);
        wanted.config.push(("server".to_string(), url.into()));
        wanted.check()?;
    }
    Ok(wanted)
}

fn agent(args: &Args, entry: &HostEntry, server: &HostEntry, port: u16, token: &str) -> Result<Wanted> {
    let extra_args = args.list.layout.extra_args(entry, &args.list.layout.agent_extra_args);
    join::wanted(&crate::join::url_of(server.target(), port), token, &extra_args)
}

/// Several at a time, answers in order.
async fn each<T>(
    args: &Args,
    works: impl Iterator<Item = impl Future<Output = Result<T>>>,
) -> Vec<Result<T>> {
    futures::stream::iter(works).buffered(usize::from(args.parallel)).collect().await
}

async fn prepare(args: &Args, members: &[Member<'_>], ask: &Arc<dyn Ask>) -> Result<Vec<Prepared>> {
    let works = members.iter().map(|m| node::prepare(&m.way, &m.wanted, &args.setup, ask));
    let prepared = each(args, works).await;
    let failed = prepared.iter().filter(|p| p.is_err()).count();
    if failed > 0 {
        eprintln!("{failed} of {} machines are not fit; nothing was installed on any", members.len());
    }
    let prepared = all_or_first(prepared)?;
    let mut names = std::collections::BTreeMap::new();
    for (prepared, member) in prepared.iter().zip(members) {
        let own = prepared.host.facts.name.clone().unwrap_or_default().to_lowercase();
        let name = member.entry.node_name.clone().unwrap_or(own);
        if let Some(other) = names.insert(name.clone(), member.way.name.clone()) {
            let text =
                format!("{other} and {} are both called {name}: give one a node-name", member.way.name);
            // their own configuration may say otherwise
            if member.entry.extra_args.is_none() {
                tell(&member.way.name, &format!("warning: {text}"));
            } else {
                return Err(Unfit(text).into());
            }
        }
    }
    Ok(prepared)
}

/// All, or the first error after the others were told.
fn all_or_first<T>(results: Vec<Result<T>>) -> Result<Vec<T>> {
    let (mut good, mut first) = (Vec::new(), None);
    for result in results {
        match result {
            Ok(value) => good.push(value),
            Err(error) => match first {
                None => first = Some(error),
                Some(_) => eprintln!("sampan: {error:#}"),
            },
        }
    }
    match first {
        None => Ok(good),
        Some(error) if error.to_string().is_empty() => Err(anyhow!("a machine failed")),
        Some(error) => Err(error),
    }
}
