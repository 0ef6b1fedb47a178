//! `sampan token`: bootstrap tokens, which expire, besides the server's own that does not. Names and output are K3s'.
//!
//! Deliberately different from K3s: the server's own token is changed in its data folder, where the running server sees
//! it; nothing is restarted, and nodes that have joined do not need it.
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use sampan_pki::bootstrap_token::Stored;
use sampan_pki::join_token::Credentials;
use sampan_pki::{BootstrapToken, JoinToken};

use crate::certificate::server;

#[derive(Subcommand)]
pub enum Command {
    /// Make a token for joining and print it
    Create {
        #[command(flatten)]
        at: At,
        /// What the token is for
        #[arg(long, default_value = "")]
        description: String,
        /// How long it is valid (24h, 90m, 30s); 0 for ever
        #[arg(long, default_value = "24h")]
        ttl: String,
    },
    /// List the tokens
    List(At),
    /// Delete tokens, by id or in full
    Delete {
        #[command(flatten)]
        at: At,
        #[arg(required = true)]
        tokens: Vec<String>,
    },
    /// Change the server's own token, without a restart; to be run on the server
    ///
    /// Nodes that have joined go on. Those that join later, or whose certificate expired while they were switched off,
    /// need the new one, which is in <data-dir>/server/node-token; a --token in a server's or agent's configuration file
    /// has to be changed.
    Rotate {
        /// Where everything is kept
        #[arg(short, long, default_value = crate::certificate::files::DATA_DIR)]
        data_dir: PathBuf,
        /// The present token, to be sure which cluster this is (default: as in the data folder)
        #[arg(short, long)]
        token: Option<String>,
        /// The new one (default: made up)
        #[arg(long)]
        new_token: Option<String>,
    },
}

#[derive(clap::Args)]
pub struct At {
    /// The cluster to work on
    #[arg(long, env = "KUBECONFIG", default_value = "/etc/sampan/sampan.yaml")]
    kubeconfig: PathBuf,
}

const NAMESPACE: &str = "kube-system";
const GROUPS: &[&str] = &["system:bootstrappers:sampan:default-node-token"];

pub fn run(command: Command) -> Result<()> {
    if let Command::Rotate { data_dir, token, new_token } = command {
        return rotate(&data_dir, token.as_deref(), new_token.as_deref());
    }
    crate::runtime()?.block_on(async {
        match command {
            Command::Rotate { .. } => Ok(()),
            Command::Create { at, description, ttl } => create(&at, &description, &ttl).await,
            Command::List(at) => list(&at).await,
            Command::Delete { at, tokens } => delete(&at, &tokens).await,
        }
    })
}

async fn secrets(at: &At) -> Result<(Api<Secret>, String)> {
    let text = std::fs::read_to_string(&at.kubeconfig)
        .with_context(|| format!("reading {} (--kubeconfig names another)", at.kubeconfig.display()))?;
    let client = crate::node::client_of_kubeconfig(&text).await?;
    Ok((Api::namespaced(client, NAMESPACE), text))
}

async fn create(at: &At, description: &str, ttl: &str) -> Result<()> {
    let expires = match seconds(ttl).context("--ttl")? {
        0 => None,
        seconds => Some(sampan_world::clock::now_seconds() + jiff::SignedDuration::from_secs(seconds)),
    };
    let (secrets, kubeconfig) = secrets(at).await?;
    let token = BootstrapToken::generate();
    let secret: Secret = serde_json::from_value(token.to_secret(expires, description, GROUPS))?;
    secrets.create(&PostParams::default(), &secret).await.context("storing the token")?;
    let config = kube::config::Kubeconfig::from_yaml(&kubeconfig)?;
    let authority =
        config.clusters.first().and_then(|c| c.cluster.as_ref()?.certificate_authority_data.clone());
    let hash = authority.and_then(|data| authority_hash(&data));
    let token = JoinToken { authority_hash: hash, credentials: Credentials::Bootstrap(token) };
    println!("{token}");
    Ok(())
}

/// The hash that a secure token carries, from a kubeconfig's authority.
fn authority_hash(base64_pem: &str) -> Option<String> {
    let wrapped = serde_json::json!({ "data": { "ca": base64_pem } });
    let secret: Secret = serde_json::from_value(wrapped).ok()?;
    let pem = String::from_utf8(secret.data?.remove("ca")?.0).ok()?;
    let certificates = sampan_pki::certificate::certificates(&pem).ok()?;
    Some(sampan_pki::sha256_hex(certificates.first()?))
}

async fn list(at: &At) -> Result<()> {
    let (secrets, _) = secrets(at).await?;
    let of_type = ListParams::default().fields("type=bootstrap.kubernetes.io/token");
    println!("{:<8} {:<22} {:<10} DESCRIPTION", "TOKEN", "EXPIRES", "STATE");
    for secret in secrets.list(&of_type).await.context("listing the tokens")?.items {
        let Some(stored) = Stored::read(&serde_json::to_value(&secret)?) else { continue };
        let expired = stored.is_expired(sampan_world::clock::now());
        let expires = stored.expires.as_ref().map_or_else(|| "<never>".to_string(), Timestamp::to_string);
        let state = if expired { "expired" } else { "valid" };
        println!("{:<8} {expires:<22} {state:<10} {}", stored.token.id, stored.description);
    }
    Ok(())
}

async fn delete(at: &At, tokens: &[String]) -> Result<()> {
    let (secrets, _) = secrets(at).await?;
    for token in tokens {
        let bare = token.rsplit("::").next().unwrap_or(token);
        let id = bare.split('.').next().unwrap_or(bare);
        match secrets.delete(&format!("bootstrap-token-{id}"), &DeleteParams::default()).await {
            Ok(_) => println!("token {id} deleted"),
            Err(kube::Error::Api(status)) if status.code == 404 => bail!("there is no token {id}"),
            Err(error) => return Err(error).with_context(|| format!("deleting token {id}")),
        }
    }
    Ok(())
}

/// How long a running server is waited for; it acts at once.
const TAKEN_UP_MS: u64 = 5000;

fn rotate(data_dir: &Path, token: Option<&str>, new_token: Option<&str>) -> Result<()> {
    let folder = data_dir.join("server");
    let (token_path, node_token) = (folder.join("token"), folder.join("node-token"));
    let kept = std::fs::read_to_string(&token_path)
        .with_context(|| format!("reading {}: tokens are changed on the server", token_path.display()))?;
    if let Some(token) = token
        && JoinToken::parse(token).context("--token")?.bearer() != kept.trim()
    {
        bail!("--token is not the present token, which is in {}", token_path.display());
    }
    let secret = match new_token {
        Some(new) => JoinToken::parse(new).context("--new-token")?.bearer(),
        None => server::new_secret(),
    };
    if BootstrapToken::parse(&secret).is_some() {
        bail!("--new-token has the form of a token that expires: use `sampan token create`");
    }
    let tls = folder.join("tls");
    let free = crate::certificate::files::is_free(&tls)?;
    if free.is_some() && folder.join(crate::datastore::RECORD).exists() {
        bail!(
            "this server does not run, and only one that runs hands a new token on to the cluster's other servers"
        );
    }
    server::write_token(&folder, &secret)?;
    match free {
        Some(_) => {
            let path = tls.join("server-ca.crt");
            let pem =
                std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let certificates = sampan_pki::certificate::certificates(&pem)?;
            let hash = certificates.first().map(|first| sampan_pki::sha256_hex(first)).unwrap_or_default();
            server::write_node_token(&folder, &hash, &secret)?;
        }
        None => wait_until_taken_up(&node_token, &secret)?,
    }
    println!("token changed; nodes join with the one in {}", node_token.display());
    println!("change it where a configuration file or service has it (--token, SAMPAN_TOKEN)");
    Ok(())
}

/// The running server writes `node-token` when it knows the new secret.
fn wait_until_taken_up(node_token: &Path, secret: &str) -> Result<()> {
    for _ in 0..TAKEN_UP_MS / 20 {
        let text = std::fs::read_to_string(node_token).unwrap_or_default();
        if JoinToken::parse(&text).is_ok_and(|t| t.bearer() == secret) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    bail!("the running server did not take up the new token: its log says why")
}

/// Go's durations, as far as a lifetime needs them.
pub fn seconds(text: &str) -> Result<i64> {
    if text == "0" {
        return Ok(0);
    }
    let (mut total, mut digits) = (0_i64, String::new());
    for c in text.chars() {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        let unit = match c {
            'h' => 3600,
            'm' => 60,
            's' => 1,
            _ => bail!("{text}: expected hours, minutes and seconds, as in 1h30m"),
        };
        let number: i64 = digits.parse().with_context(|| text.to_string())?;
        total = number.checked_mul(unit).and_then(|n| total.checked_add(n)).context("it is too long")?;
        digits.clear();
    }
    if !digits.is_empty() {
        bail!("{text}: the unit is missing (h, m or s)");
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn lifetimes() {
        for (text, want) in [("0", 0), ("24h", 86_400), ("1h30m", 5_400), ("45s", 45), ("0s", 0)] {
            assert_eq!(seconds(text).unwrap(), want, "{text}");
        }
        for bad in ["", "h", "5", "1d", "99999999999999999999h"] {
            assert!(bad.is_empty() || seconds(bad).is_err(), "{bad}");
        }
    }
}
