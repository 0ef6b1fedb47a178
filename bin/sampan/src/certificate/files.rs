//! Which certificates a data folder holds, and how a command and the process that uses the folder meet there.
//!
//! Upstream counterpart: K3s' pkg/util/services. What stays true: who runs holds a shared lock of its folder, so a
//! command knows whether somebody will take up what it asks for; a request for renewal is an empty file beside the
//! certificate, which stays until there is a new one.
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, Mode, OFlags};
use sampan_pki::certificate::{certificates, subject};

pub const DATA_DIR: &str = "/var/lib/sampan";
pub const ADMIN: &str = "admin";
pub const API_SERVER: &str = "api-server";
pub const KUBELET: &str = "kubelet";
pub const ETCD: &str = "etcd";
pub const AUTHORITY: &str = "certificate-authority";
const SERVICES: [&str; 5] = [ADMIN, API_SERVER, KUBELET, ETCD, AUTHORITY];
/// Services of K3s that have no certificate here.
const IN_MEMORY: [&str; 5] =
    ["controller-manager", "scheduler", "kube-proxy", "cloud-controller", "supervisor"];

/// A certificate that is kept in a data folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    pub service: &'static str,
    /// The `.crt` file.
    pub path: PathBuf,
}

impl Kept {
    pub fn new(service: &'static str, folder: &Path, stem: &str) -> Self {
        Self { service, path: folder.join(format!("{stem}.crt")) }
    }

    pub fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    fn request(&self) -> PathBuf {
        self.path.with_extension("renew")
    }

    pub fn ask_for_renewal(&self) -> std::io::Result<()> {
        sampan_world::files::write_atomic(&self.request(), b"", 0o600)
    }

    pub fn is_asked_for(&self) -> bool {
        self.request().exists()
    }

    /// To be called once there is a new one.
    pub fn answer_request(&self) {
        if let Err(error) = std::fs::remove_file(self.request())
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.request().display(), %error, "the request for renewal stays");
        }
    }

    /// For people: until when it is good.
    pub fn validity(&self) -> String {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        let told = certificates(&text).ok().and_then(|all| subject(all.first()?));
        told.map_or_else(|| "it cannot be read".to_string(), |s| format!("expires {}", s.not_after))
    }
}

/// The certificates that are there.
pub fn of(data_dir: &Path) -> Vec<Kept> {
    let (tls, agent) = (data_dir.join("server/tls"), data_dir.join("agent"));
    let etcd = tls.join("etcd");
    let all = [
        Kept::new(AUTHORITY, &tls, "server-ca"),
        Kept::new(API_SERVER, &tls, "serving-apiserver"),
        Kept::new(ADMIN, &tls, "client-admin"),
        Kept::new(AUTHORITY, &etcd, "server-ca"),
        Kept::new(ETCD, &etcd, "member"),
        Kept::new(AUTHORITY, &agent, "server-ca"),
        Kept::new(KUBELET, &agent, "client-kubelet"),
    ];
    all.into_iter().filter(|kept| kept.path.exists()).collect()
}

/// Those of the services named, of all when none is.
pub fn chosen(data_dir: &Path, services: &[String]) -> Result<Vec<Kept>> {
    for service in services {
        if IN_MEMORY.contains(&service.as_str()) {
            bail!("--service {service}: it runs inside the server and has no certificate");
        }
        if !SERVICES.contains(&service.as_str()) {
            bail!("--service {service}: expected one of {}", SERVICES.join(", "));
        }
    }
    let all = of(data_dir);
    if all.is_empty() {
        bail!("{} holds no certificates (--data-dir names another place)", data_dir.display());
    }
    let wanted = |kept: &Kept| services.is_empty() || services.iter().any(|s| s == kept.service);
    let chosen: Vec<Kept> = all.into_iter().filter(wanted).collect();
    match chosen.is_empty() {
        true => bail!("{} holds no certificate of {}", data_dir.display(), services.join(", ")),
        false => Ok(chosen),
    }
}

/// Says that a process uses the folder, for as long as the result lives.
pub fn hold(folder: &Path) -> Result<OwnedFd> {
    let folder_fd = open(folder)?;
    rustix::fs::flock(&folder_fd, FlockOperation::LockShared)
        .with_context(|| format!("locking {}", folder.display()))?;
    Ok(folder_fd)
}

/// Something while which nobody can start to use the folder, when nobody does.
pub fn is_free(folder: &Path) -> Result<Option<OwnedFd>> {
    let folder_fd = open(folder)?;
    match rustix::fs::flock(&folder_fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(folder_fd)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("locking {}", folder.display())),
    }
}

fn open(folder: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::empty()).with_context(|| format!("opening {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_and_requests() {
        let folder = std::env::temp_dir().join(format!("sampan-kept-{}", sampan_world::random::suffix(8)));
        let (tls, agent) = (folder.join("server/tls"), folder.join("agent"));
        std::fs::create_dir_all(&tls).unwrap();
        std::fs::create_dir_all(&agent).unwrap();
        let services = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|n| (*n).to_string()).collect();
            chosen(&folder, &names).map(|all| all.iter().map(|k| k.service).collect::<Vec<_>>())
        };
        assert!(services(&[]).unwrap_err().to_string().contains("holds no certificates"));
        for file in ["server/tls/client-admin.crt", "agent/client-kubelet.crt", "agent/server-ca.crt"] {
            std::fs::write(folder.join(file), "").unwrap();
        }
        assert_eq!(services(&[]).unwrap(), [ADMIN, AUTHORITY, KUBELET]);
        assert_eq!(services(&["kubelet"]).unwrap(), [KUBELET]);
        assert!(services(&["api-server"]).unwrap_err().to_string().contains("no certificate of api-server"));
        assert!(services(&["scheduler"]).unwrap_err().to_string().contains("inside the server"));
        assert!(services(&["nonsense"]).unwrap_err().to_string().contains("expected one of admin"));

        let kept = Kept::new(ADMIN, &tls, "client-admin");
        assert!(!kept.is_asked_for());
        kept.ask_for_renewal().unwrap();
        assert!(kept.is_asked_for());
        kept.answer_request();
        assert!(!kept.is_asked_for());

        let held = hold(&tls).unwrap();
        assert!(is_free(&tls).unwrap().is_none() && is_free(&agent).unwrap().is_some());
        drop(held);
        assert!(is_free(&tls).unwrap().is_some());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
