//! A real etcd for tests: started from the PATH on free ports of this machine, killed, started again.
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use sampan_store::{Etcd, Store};

/// Where Debian's package has put it.
fn program() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("etcd")).find(|p| p.is_file());
    found.expect("there is no `etcd` in the PATH, which this test needs (Debian's package: etcd-server)")
}

/// A port that no connection takes by chance while its member is down: below those for outgoing ones.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = std::process::id().wrapping_mul(61).wrapping_add(NEXT.fetch_add(1, Ordering::SeqCst));
        let port = u16::try_from(20_000 + number % 12_000).unwrap();
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// One member of an etcd, or all there is of it.
pub struct Member {
    name: String,
    pub port: u16,
    peer_port: u16,
    peers: String,
    scheme: &'static str,
    arguments: Vec<String>,
    folder: tempfile::TempDir,
    process: Option<Child>,
}

impl Member {
    /// An etcd of one member.
    pub fn start(arguments: &[&str]) -> Self {
        Self::cluster(1, "http", arguments).remove(0)
    }

    pub fn start_tls(arguments: &[&str]) -> Self {
        Self::cluster(1, "https", arguments).remove(0)
    }

    pub fn cluster(members: usize, scheme: &'static str, arguments: &[&str]) -> Vec<Self> {
        let ports: Vec<(u16, u16)> = (0..members).map(|_| (free_port(), free_port())).collect();
        let peers = ports.iter().enumerate().map(|(n, (_, peer))| format!("m{n}=http://127.0.0.1:{peer}"));
        let peers = peers.collect::<Vec<_>>().join(",");
        let member = |(n, (port, peer_port)): (usize, &(u16, u16))| {
            let mut member = Self {
                name: format!("m{n}"),
                port: *port,
                peer_port: *peer_port,
                peers: peers.clone(),
                scheme,
                arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
                folder: tempfile::tempdir().unwrap(),
                process: None,
            };
            member.run();
            member
        };
        ports.iter().enumerate().map(member).collect()
    }

    pub fn endpoint(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.port)
    }

    pub fn etcd(&self) -> Etcd {
        Etcd::new([self.endpoint()])
    }

    pub async fn connect(&self) -> Store {
        Store::connect(self.etcd()).await.unwrap()
    }

    pub fn run(&mut self) {
        let url = self.endpoint();
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let process = Command::new(program())
            .args(["--name", &self.name, "--initial-cluster", &self.peers])
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--logger", "zap", "--log-level", "error", "--log-outputs", "/dev/null"])
            .arg("--data-dir")
            .arg(self.folder.path().join("data"))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.process = Some(process.unwrap());
    }

    /// `kill -9`
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Loses all it had.
    pub fn wipe(&self) {
        std::fs::remove_dir_all(self.folder.path().join("data")).unwrap();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}
