//! An etcd in the lab's hub: Debian's own, with its data in memory. `ETCD` names another program than the one in the PATH.
use anyhow::{Context, Result};

use crate::process::Ran;
use crate::{Cluster, seconds, wait_for};

/// Where servers in the lab find it.
pub const ENDPOINT: &str = "http://10.64.0.1:2379";

pub fn program() -> String {
    std::env::var("ETCD").unwrap_or_else(|_| "etcd".to_string())
}

fn script() -> String {
    let program = program();
    format!(
        "command -v {program} >/dev/null || {{ echo 'there is no etcd: install etcd-server' >&2; exit 1; }}\n\
         mkdir -p /run/etcd\n\
         setsid {program} --data-dir /run/etcd/data --listen-client-urls {ENDPOINT} --advertise-client-urls {ENDPOINT} \
         --listen-peer-urls http://127.0.0.1:2380 </dev/null >>/run/etcd/log 2>&1 &\n\
         echo $! >/run/etcd/pid\n"
    )
}

/// Starts it, with the data that it had. `exec` runs a command in the hub.
pub fn start(exec: impl Fn(&[&str]) -> Result<Ran>) -> Result<()> {
    let script = script();
    exec(&["sh", "-c", &script])?.ok().context("etcd: Debian's package etcd-server has it")?;
    wait_for("etcd", seconds(20), || {
        let [python, flag, program] = crate::fetch(&format!("{ENDPOINT}/health"));
        let ran = exec(&[&python, &flag, &program])?;
        Ok(if ran.out.contains("true") { Ok(()) } else { Err(ran.text()) })
    })
}

/// As by a power cut.
pub fn kill(cluster: &Cluster) -> Result<()> {
    cluster.exec("hub", &["sh", "-c", "kill -9 $(cat /run/etcd/pid)"])?.ok().map(drop)
}

pub fn start_again(cluster: &Cluster) -> Result<()> {
    start(|command| cluster.exec("hub", command))
}
