//! `sampan apply`: a list of hosts made a cluster, several at a time.
//!
//! Upstream counterpart: running the script of `k3sup plan`. What stays true: all machines are looked at and judged
//! before anything is changed on one; the server is Ready before an agent is told to join it.
use std::sync::Arc;

use anyhow::{Result, anyhow};
use futures::StreamExt;
use sampan_fleet::{Ask, HostEntry};

use super::access::{Way, ask};
use super::install;
use super::node::{self, Prepared, Setup, Wanted};
use super::plan::ListedCluster;
use super::{Unfit, Usage, join, tell};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    list: ListedCluster,
    #[command(flatten)]
    setup: Setup,
    /// Secret that nodes join with (default: the server makes one up)
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
    let Some((first, others)) = servers.split_first() else {
        return Err(Usage("no host of the list is a server".to_string()).into());
    };
    if !others.is_empty() {
        let text =
            format!("{} servers: this version has one server in a cluster (--servers 1)", servers.len());
        return Err(Usage(text).into());
    }
    let mut flags = args.list.layout.server_flags(first, false);
    flags.token.clone_from(&args.token);
    let mut members = vec![Member {
        entry: first,
        way: args.list.access.way_of(first)?,
        wanted: flags.wanted(first.target())?,
    }];
    for entry in agents {
        // the token is not known yet; what matters here is whether the arguments are right
        let wanted = agent(args, entry, first, 6443, "token")?;
        members.push(Member { entry, way: args.list.access.way_of(entry)?, wanted });
    }
    let ask = ask();
    let prepared = prepare(args, &members, &ask).await?;
    let alone = prepared.len() == 1;
    let sent = each(args, prepared.iter().map(|p| node::send(p, &args.setup, alone))).await;
    let sent = all_or_first(sent)?;

    let server = &prepared[0];
    let settled = node::settle(server, &members[0].wanted, &args.setup, sent[0]).await?;
    install::fetch(&server.host, &settled.effective.kubeconfig, first.target(), &args.list.out, false)
        .await?;
    let token =
        node::read_root(&server.host, &format!("{}/server/node-token", settled.effective.data_dir)).await?;
    let (port, token) = (settled.effective.port, token.trim());
    let rest = prepared.iter().zip(&members).zip(&sent).skip(1);
    let joined = each(
        args,
        rest.map(|((prepared, member), sent)| async move {
            let wanted = agent(args, member.entry, first, port, token)?;
            node::settle(prepared, &wanted, &args.setup, *sent).await
        }),
    )
    .await;
    let count = all_or_first(joined)?.len() + 1;
    eprintln!("{count} nodes are set up, in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn agent(args: &Args, entry: &HostEntry, server: &HostEntry, port: u16, token: &str) -> Result<Wanted> {
    let extra_args = args.list.layout.extra_args(entry, &args.list.layout.agent_extra_args);
    join::wanted(&join::url_of(server.target(), port), token, &extra_args)
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
