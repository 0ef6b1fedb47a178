//! How commands reach registries: registries.yaml, `docker login`'s credentials, `--insecure`.
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sampan_image::{Client, Keychain, Platform, Registries, platform};

const REGISTRIES: &str = "/etc/sampan/registries.yaml";

#[derive(clap::Args)]
pub struct Access {
    /// Allow communication with an insecure registry
    #[arg(long)]
    pub insecure: bool,
    /// Mirrors and credentials of registries, as in K3s
    #[arg(long, value_name = "FILE", default_value = REGISTRIES)]
    private_registry: PathBuf,
}

impl Access {
    pub fn client(&self) -> Result<Client> {
        let registries = match crate::node::registries(&self.private_registry) {
            // The node's own file is root's; whoever can't read it does without.
            Err(_) if self.private_registry == Path::new(REGISTRIES) && !readable(Path::new(REGISTRIES)) => {
                Registries::default()
            }
            other => other?,
        };
        let registries = if self.insecure { registries.allow_insecure() } else { registries };
        Ok(Client::new(registries).with_keychain(keychain()?))
    }
}

fn readable(path: &Path) -> bool {
    std::fs::File::open(path).is_ok()
}

pub fn keychain() -> Result<Keychain> {
    Keychain::from_home().context("docker's credentials")
}

/// `linux/amd64,linux/arm/v7`
pub fn platforms(names: &[String]) -> Result<Vec<Platform>> {
    let mut wanted = Vec::new();
    for name in names {
        match platform::parse(name) {
            Some(found) => wanted.push(found),
            None => bail!("--platform {name}: expected OS/ARCH or OS/ARCH/VARIANT"),
        }
    }
    Ok(wanted)
}

/// What to do about errors of a registry, after what went wrong.
pub fn advice(error: sampan_image::ImageError) -> anyhow::Error {
    use sampan_image::ImageError::{Denied, NotFound, Unavailable};
    let text = error.to_string();
    let advice = match &error {
        Denied(_) => "give credentials with `docker login` or in registries.yaml",
        NotFound(_) => "check name and tag",
        Unavailable(_) if text.contains("InvalidContentType") || text.contains("corrupt") => {
            "the registry does not seem to speak TLS: --insecure allows plain HTTP"
        }
        Unavailable(_) if text.contains("certificate") => {
            "give its authority in registries.yaml, or --insecure"
        }
        Unavailable(_) => "check that the registry's address is right and that it runs",
        _ => return error.into(),
    };
    anyhow::anyhow!("{error}; {advice}")
}
