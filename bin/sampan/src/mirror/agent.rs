//! An agent's part in the mirror: it hears the server's setting, and reaches the server as its node.
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use futures::future::BoxFuture;
use http::HeaderMap;
use sampan_pki::LiveCertificate;
use tokio::sync::watch;

use super::{Membership, Remote, SETTING, Trust, Verifier};
use crate::join;

/// What the server may change while this node runs.
pub struct Setting {
    /// Where the next start finds it, before the server can be asked.
    path: PathBuf,
    enabled: watch::Sender<bool>,
}

/// The part of the node that joined from `folder`.
pub fn part(
    joined: &Arc<join::Membership>,
    own: &Arc<LiveCertificate>,
    folder: &Path,
) -> Result<(Arc<Setting>, Membership)> {
    let (sender, enabled) = watch::channel(joined.cluster.embedded_registry);
    let (host, port) = join::address_of(&joined.server)?;
    let dial = {
        let (joined, own) = (joined.clone(), own.clone());
        Box::new(move || {
            let (joined, own) = (joined.clone(), own.clone());
            Box::pin(async move { joined.connect(own, b"http/1.1").await }) as BoxFuture<'static, _>
        })
    };
    let rendezvous = Arc::new(Remote { dial, host: format!("{host}:{port}") });
    let trusting = joined.clone();
    let trust: Trust = Arc::new(move || -> Result<Verifier> {
        let trusted = sampan_pki::certificate::certificates(&trusting.trusted())?;
        Ok(sampan_pki::tls::client_verifier(&trusted)?)
    });
    let setting = Setting { path: folder.join("cluster.json"), enabled: sender };
    Ok((Arc::new(setting), Membership { enabled, rendezvous, own: own.clone(), trust }))
}

impl Setting {
    /// Follows what the server says when the tunnel connects.
    pub fn hear(&self, headers: &HeaderMap) -> Result<()> {
        let Some(told) = headers.get(SETTING).map(|told| told.as_bytes() == b"true") else { return Ok(()) };
        if *self.enabled.borrow() == told {
            return Ok(());
        }
        tracing::info!(embedded_registry = told, "the server's setting changed");
        let shown = || self.path.display().to_string();
        let mut cluster: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&self.path).with_context(shown)?).with_context(shown)?;
        cluster["embeddedRegistry"] = told.into();
        sampan_world::files::write_atomic(&self.path, &serde_json::to_vec(&cluster)?, 0o600)
            .with_context(shown)?;
        self.enabled.send_replace(told);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_is_heard_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cluster.json");
        let kept = |path: &Path| -> crate::join::Cluster {
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
        };
        // as earlier versions wrote it
        let text = r#"{"clusterCidr":"a","serviceCidr":"b","clusterDns":"c","clusterDomain":"d"}"#;
        std::fs::write(&path, text).unwrap();
        assert!(!kept(&path).embedded_registry);
        let (enabled, mut heard) = watch::channel(false);
        let setting = Setting { path: path.clone(), enabled };
        for (told, wanted, changed) in [
            (None, false, false),
            (Some("false"), false, false),
            (Some("true"), true, true),
            (Some("true"), true, false),
            (None, true, false),
            (Some("false"), false, true),
        ] {
            let headers = told.map(|told| (http::HeaderName::from_static(SETTING), told.parse().unwrap()));
            setting.hear(&headers.into_iter().collect()).unwrap();
            assert_eq!((*heard.borrow(), heard.has_changed().unwrap()), (wanted, changed), "{told:?}");
            heard.mark_unchanged();
            assert_eq!(kept(&path).embedded_registry, wanted);
        }
        assert_eq!(kept(&path).cluster_domain, "d");
    }
}
