//! `sampan ready`: waits until a cluster's nodes are Ready. Upstream counterpart: k3sup's cmd/ready.go, without kubectl.
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::ServiceAccount;
use sampan_fleet::ready::Cluster;

use super::Usage;

#[derive(clap::Args)]
pub struct Args {
    /// How often to look
    #[arg(long, default_value_t = 25)]
    attempts: u32,
    /// How long to wait in between: 2s, 500ms, 1m
    #[arg(long, default_value = "2s", value_parser = duration)]
    pause: Duration,
    /// The kubeconfig
    #[arg(long, default_value = "$HOME/.kube/config")]
    kubeconfig: String,
    /// Its context
    #[arg(long, default_value = "default")]
    context: String,
    /// Say nothing
    #[arg(long)]
    quiet: bool,
}

/// Go's durations, one unit.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 = digits.parse().map_err(|_| format!("{text}: expected a number and ms, s or m"))?;
    let seconds = match &text[digits.len()..] {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        _ => return Err(format!("{text}: the unit is missing (ms, s or m)")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|e| format!("{text}: {e}"))
}

/// `$NAME` and `${NAME}`, as Go's os.ExpandEnv.
fn expand(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let (name, tail) = match after.strip_prefix('{').and_then(|a| a.split_once('}')) {
            Some(found) => found,
            None => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                after.split_at(end)
            }
        };
        out.push_str(&std::env::var(name).unwrap_or_default());
        rest = tail;
    }
    out + rest
}

pub async fn run(args: &Args) -> Result<()> {
    if args.kubeconfig.is_empty() || args.context.is_empty() {
        return Err(Usage("kubeconfig and context cannot be empty".to_string()).into());
    }
    let path = expand(&args.kubeconfig);
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let cluster = Cluster::direct(&text, Some(&args.context)).await?;
    let say = |text: String| {
        if !args.quiet {
            println!("{text}");
        }
    };
    let mut last = String::new();
    for attempt in 1..=args.attempts {
        say(format!("Checking for nodes to be ready: {attempt}/{}", args.attempts));
        match look(&cluster).await {
            Ok(count) => {
                say(format!("All {count} node(s) are ready"));
                return Ok(());
            }
            Err(why) => last = why,
        }
        tokio::time::sleep(args.pause).await;
    }
    bail!("not ready after {} attempts: {last}", args.attempts)
}

/// All nodes Ready, and the default service account there, without which no pod is made.
async fn look(cluster: &Cluster) -> Result<usize, String> {
    let nodes = cluster.nodes().await.map_err(|e| e.to_string())?;
    if nodes.is_empty() {
        return Err("there is no node yet".to_string());
    }
    if let Some((name, Err(why))) = nodes.iter().find(|(_, ready)| ready.is_err()) {
        return Err(format!("node {name}: {why}"));
    }
    let accounts = kube::Api::<ServiceAccount>::namespaced(cluster.client.clone(), "default");
    match accounts.get_opt("default").await {
        Ok(Some(_)) => Ok(nodes.len()),
        Ok(None) => Err("the default service account is not there yet".to_string()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_variables() {
        for (text, want) in [("2s", 2000), ("500ms", 500), ("1.5s", 1500), ("1m", 60_000)] {
            assert_eq!(duration(text).unwrap().as_millis(), want, "{text}");
        }
        for bad in ["", "2", "s", "2h", "-1s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        let home = std::env::var("HOME").unwrap_or_default();
        assert_eq!(expand("$HOME/.kube/config"), format!("{home}/.kube/config"));
        assert_eq!(expand("${HOME}x$NO_SUCH_THING_y/"), format!("{home}x/"));
        assert_eq!(expand("/a/b"), "/a/b");
    }
}
