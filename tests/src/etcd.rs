//! An etcd in the lab's hub: Debian's own, with its data in memory. `ETCD` names another program than the one in the PATH.
use std::path::Path;

use anyhow::{Context, Result};
use sampan_pki::Authority;

use crate::process::Ran;
use crate::{Cluster, seconds, wait_for};

/// Where servers in the lab find it.
pub const ENDPOINT: &str = "http://10.64.0.1:2379";
pub const TLS_ENDPOINT: &str = "https://10.64.0.1:2379";
/// Where it tells its health without a certificate.
const METRICS: &str = "http://127.0.0.1:2381";

pub fn program() -> String {
    std::env::var("ETCD").unwrap_or_else(|_| "etcd".to_string())
}

fn script(endpoint: &str, more: &str) -> String {
    let program = program();
    format!(
        "command -v {program} >/dev/null || {{ echo 'there is no etcd: install etcd-server' >&2; exit 1; }}\n\
         mkdir -p /run/etcd\n\
         setsid {program} --data-dir /run/etcd/data --listen-client-urls {endpoint} --advertise-client-urls {endpoint} \
         --listen-peer-urls http://127.0.0.1:2380 --listen-metrics-urls {METRICS} {more} </dev/null >>/run/etcd/log 2>&1 &\n\
         echo $! >/run/etcd/pid\n"
    )
}

/// Starts it, with the data that it had. `exec` runs a command in the hub.
pub fn start(exec: impl Fn(&[&str]) -> Result<Ran>) -> Result<()> {
    run(exec, &script(ENDPOINT, ""))
}

/// Starts it at [`TLS_ENDPOINT`], where it wants a certificate of its clients. What they need is made in `tmp`, the hub's
/// /tmp: etcd-ca.crt, etcd-client.crt and etcd-client.key.
pub fn start_tls(exec: impl Fn(&[&str]) -> Result<Ran>, tmp: &Path) -> Result<()> {
    let authority = Authority::load_or_create(&tmp.join("etcd-authority"))?;
    std::fs::write(tmp.join("etcd-ca.crt"), authority.certificate_pem())?;
    authority.server("etcd", &["10.64.0.1".to_string()])?.save(&tmp.join("etcd-server"))?;
    authority.client("sampan", &[])?.save(&tmp.join("etcd-client"))?;
    let tls = "--client-cert-auth --trusted-ca-file /tmp/etcd-ca.crt --cert-file /tmp/etcd-server.crt \
               --key-file /tmp/etcd-server.key";
    run(exec, &script(TLS_ENDPOINT, tls))
}

fn run(exec: impl Fn(&[&str]) -> Result<Ran>, script: &str) -> Result<()> {
    exec(&["sh", "-c", script])?.ok().context("etcd: Debian's package etcd-server has it")?;
    wait_for("etcd", seconds(20), || {
        let [python, flag, program] = crate::fetch(&format!("{METRICS}/health"));
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
