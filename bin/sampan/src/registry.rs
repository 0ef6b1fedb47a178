//! `sampan registry`: an OCI registry on this machine. Flags are docker-registry's configuration keys with dashes, and
//! its environment variables count too.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{ArgAction, Subcommand};
use sampan_registry::auth::token::{TokenAuth, TokenOptions};
use sampan_registry::auth::{AccessController, Htpasswd};
use sampan_registry::proxy::{Proxy, Upstream, UpstreamOptions};
use sampan_registry::serve::{TlsOptions, serve, tls};
use sampan_registry::storage::{Disk, S3, S3Options};
use sampan_registry::{CollectOptions, Options, Quota, Registry, Storage};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

#[derive(Subcommand)]
pub enum Command {
    /// Serve images: push, pull, referrers, deletion, with garbage collection while serving
    #[command(after_help = SERVE_HELP)]
    Serve(Box<ServeArgs>),
    /// Remove blobs that no manifest refers to, while no registry serves the directory
    #[command(after_help = COLLECT_HELP)]
    GarbageCollect(Box<CollectArgs>),
}

const SERVE_HELP: &str = "\
Data is kept as docker-registry keeps it: point --storage-filesystem-rootdirectory at its directory, and \
either program serves it.

Signals: TERM and INT end serving once requests are done; USR1 collects garbage now.

Examples:
  sampan registry serve --http-addr 127.0.0.1:5000
  sampan registry serve --http-tls-certificate tls.crt --http-tls-key tls.key --auth-htpasswd-path users
  sampan registry serve --proxy-remote-url https://registry-1.docker.io --proxy-ttl 168h";

const COLLECT_HELP: &str = "\
A registry that serves collects by itself (--garbage-collect-interval), and at once when it gets the \
signal USR1; this command is for directories that no registry serves.";

#[derive(clap::Args)]
pub struct StorageArgs {
    /// Directory of the images; docker-registry's own can be taken over as it is
    #[arg(long, env = "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY", value_name = "DIR")]
    #[arg(default_value = "/var/lib/sampan/registry", help_heading = "Storage")]
    storage_filesystem_rootdirectory: PathBuf,
    #[command(flatten)]
    s3: S3Args,
    /// Keep what nothing refers to for this long: pushes under way will need it
    #[arg(long, value_name = "AGE", default_value = "1h", value_parser = duration)]
    #[arg(help_heading = "Garbage collection")]
    garbage_collect_grace: Duration,
    /// Remove manifests too that no tag leads to, directly, through an index or as a subject
    #[arg(long, help_heading = "Garbage collection")]
    garbage_collect_delete_untagged: bool,
    /// Remove uploads that lay idle for this long
    #[arg(long, env = "REGISTRY_STORAGE_MAINTENANCE_UPLOADPURGING_AGE", value_name = "AGE")]
    #[arg(default_value = "168h", value_parser = duration, help_heading = "Garbage collection")]
    storage_maintenance_uploadpurging_age: Duration,
}

#[derive(clap::Args)]
pub struct S3Args {
    /// Keep the images in this S3 bucket instead; one registry at a time may write to it
    #[arg(long, env = "REGISTRY_STORAGE_S3_BUCKET", value_name = "NAME", help_heading = "Storage in S3")]
    storage_s3_bucket: Option<String>,
    /// Region of the bucket
    #[arg(long, env = "REGISTRY_STORAGE_S3_REGION", value_name = "NAME", default_value = "us-east-1")]
    #[arg(help_heading = "Storage in S3")]
    storage_s3_region: String,
    /// Server that speaks S3, where it isn't AWS: https://minio.example:9000
    #[arg(long, env = "REGISTRY_STORAGE_S3_REGIONENDPOINT", value_name = "URL")]
    #[arg(help_heading = "Storage in S3", requires = "storage_s3_bucket")]
    storage_s3_regionendpoint: Option<String>,
    /// Prefix of all keys in the bucket
    #[arg(long, env = "REGISTRY_STORAGE_S3_ROOTDIRECTORY", value_name = "PREFIX", default_value = "")]
    #[arg(help_heading = "Storage in S3")]
    storage_s3_rootdirectory: String,
    /// Access key; else that of AWS_ACCESS_KEY_ID
    #[arg(long, env = "REGISTRY_STORAGE_S3_ACCESSKEY", value_name = "KEY", help_heading = "Storage in S3")]
    storage_s3_accesskey: Option<String>,
    /// Secret key; else that of AWS_SECRET_ACCESS_KEY. The environment shows it to fewer than the command line
    #[arg(long, env = "REGISTRY_STORAGE_S3_SECRETKEY", hide_env_values = true, value_name = "KEY")]
    #[arg(help_heading = "Storage in S3")]
    storage_s3_secretkey: Option<String>,
    /// Trust these certificates (PEM) of the server, besides the system's
    #[arg(long, value_name = "FILE", help_heading = "Storage in S3", requires = "storage_s3_bucket")]
    storage_s3_ca_file: Option<PathBuf>,
}

impl S3Args {
    fn open(&self, bucket: &str) -> Result<S3> {
        let key = |flag: &Option<String>, variable: &str, name: &str| {
            let found = flag.clone().or_else(|| std::env::var(variable).ok());
            found.with_context(|| format!("an S3 bucket needs --{name} or {variable}"))
        };
        Ok(S3::new(S3Options {
            bucket: bucket.to_string(),
            region: self.storage_s3_region.clone(),
            region_endpoint: self.storage_s3_regionendpoint.clone().unwrap_or_default(),
            root_directory: self.storage_s3_rootdirectory.clone(),
            access_key: key(&self.storage_s3_accesskey, "AWS_ACCESS_KEY_ID", "storage-s3-accesskey")?,
            secret_key: key(&self.storage_s3_secretkey, "AWS_SECRET_ACCESS_KEY", "storage-s3-secretkey")?,
            session_token: std::env::var("AWS_SESSION_TOKEN").unwrap_or_default(),
            ca_file: self.storage_s3_ca_file.clone(),
        })?)
    }
}

impl StorageArgs {
    /// The storage, and what to call it.
    fn open(&self, read_only: bool) -> Result<(Arc<dyn Storage>, String)> {
        if let Some(bucket) = &self.s3.storage_s3_bucket {
            return Ok((Arc::new(self.s3.open(bucket)?), format!("the S3 bucket {bucket}")));
        }
        let root = &self.storage_filesystem_rootdirectory;
        let opened = if read_only { Disk::open_read_only(root) } else { Disk::open(root) };
        let disk =
            opened.context("opening the storage (--storage-filesystem-rootdirectory names another place)")?;
        if !read_only {
            disk.recover()
                .with_context(|| format!("clearing what an ended process left in {}", root.display()))?;
        }
        Ok((Arc::new(disk), root.display().to_string()))
    }

    fn collect(&self, interval: Option<Duration>) -> CollectOptions {
        CollectOptions {
            grace: self.garbage_collect_grace,
            interval,
            delete_untagged: self.garbage_collect_delete_untagged,
            upload_age: self.storage_maintenance_uploadpurging_age,
        }
    }
}

#[derive(clap::Args)]
pub struct CollectArgs {
    #[command(flatten)]
    storage: StorageArgs,
    /// Tell what would be removed, and remove nothing
    #[arg(short, long)]
    dry_run: bool,
}

#[derive(clap::Args)]
pub struct ServeArgs {
    /// Address to listen on; without a host, all of them
    #[arg(long, env = "REGISTRY_HTTP_ADDR", value_name = "[HOST]:PORT", default_value = ":5000")]
    #[arg(help_heading = "Listening")]
    http_addr: String,
    /// Serve TLS with this certificate (PEM, with its chain); read again when it changes
    #[arg(long, env = "REGISTRY_HTTP_TLS_CERTIFICATE", value_name = "FILE", requires = "http_tls_key")]
    #[arg(help_heading = "Listening")]
    http_tls_certificate: Option<PathBuf>,
    /// Private key of the certificate (PEM)
    #[arg(long, env = "REGISTRY_HTTP_TLS_KEY", value_name = "FILE", requires = "http_tls_certificate")]
    #[arg(help_heading = "Listening")]
    http_tls_key: Option<PathBuf>,
    /// Let only clients in with a certificate of this authority (PEM); may be given several times
    #[arg(long, value_name = "FILE", requires = "http_tls_certificate", help_heading = "Listening")]
    http_tls_clientcas: Vec<PathBuf>,
    /// Oldest version of TLS to speak
    #[arg(long, env = "REGISTRY_HTTP_TLS_MINIMUMTLS", value_name = "VERSION", default_value = "tls1.2")]
    #[arg(value_parser = ["tls1.2", "tls1.3"], help_heading = "Listening")]
    http_tls_minimumtls: String,

    #[command(flatten)]
    storage: StorageArgs,
    /// Refuse pushes and deletions
    #[arg(long, alias = "storage-maintenance-readonly-enabled")]
    #[arg(env = "REGISTRY_STORAGE_MAINTENANCE_READONLY_ENABLED", help_heading = "Storage")]
    read_only: bool,
    /// Allow deletion of tags, manifests and blobs
    #[arg(long, env = "REGISTRY_STORAGE_DELETE_ENABLED", value_name = "BOOL", default_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    #[arg(help_heading = "Storage")]
    storage_delete_enabled: bool,
    /// Accept manifests whose blobs or manifests are not there
    #[arg(long, env = "REGISTRY_VALIDATION_DISABLED", help_heading = "Storage")]
    validation_disabled: bool,
    /// Let all images together take no more than this (500MiB, 20GB)
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Storage")]
    quota: Option<u64>,
    /// Let each repository take no more than this; layers that repositories share count for each
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Storage")]
    quota_repository: Option<u64>,
    /// Collect garbage this often, while serving; 0 for only on the signal USR1
    #[arg(long, value_name = "INTERVAL", default_value = "24h", value_parser = duration)]
    #[arg(help_heading = "Garbage collection")]
    garbage_collect_interval: Duration,

    #[command(flatten)]
    auth: AuthArgs,
    #[command(flatten)]
    proxy: ProxyArgs,

    /// What to log: error, warn, info, debug (each request) or trace
    #[arg(long, env = "REGISTRY_LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    log_level: String,
}

#[derive(clap::Args)]
pub struct AuthArgs {
    /// Ask for a user and password of this file (htpasswd -B); read again when it changes
    #[arg(long, env = "REGISTRY_AUTH_HTPASSWD_PATH", value_name = "FILE")]
    #[arg(help_heading = "Authentication", conflicts_with = "auth_token_realm")]
    auth_htpasswd_path: Option<PathBuf>,
    /// Name that clients show when they ask for the password
    #[arg(
        long,
        env = "REGISTRY_AUTH_HTPASSWD_REALM",
        value_name = "NAME",
        default_value = "sampan registry"
    )]
    #[arg(help_heading = "Authentication")]
    auth_htpasswd_realm: String,
    /// Ask for a token of the server at this URL
    #[arg(long, env = "REGISTRY_AUTH_TOKEN_REALM", value_name = "URL", help_heading = "Authentication")]
    #[arg(requires_all = ["auth_token_service", "auth_token_issuer"])]
    auth_token_realm: Option<String>,
    /// Name of this registry in tokens: their audience
    #[arg(long, env = "REGISTRY_AUTH_TOKEN_SERVICE", value_name = "NAME", help_heading = "Authentication")]
    auth_token_service: Option<String>,
    /// Issuer that tokens must name
    #[arg(long, env = "REGISTRY_AUTH_TOKEN_ISSUER", value_name = "NAME", help_heading = "Authentication")]
    auth_token_issuer: Option<String>,
    /// Certificates or public keys (PEM) that tokens are signed with, themselves or through a chain
    #[arg(long, env = "REGISTRY_AUTH_TOKEN_ROOTCERTBUNDLE", value_name = "FILE")]
    #[arg(help_heading = "Authentication")]
    auth_token_rootcertbundle: Option<PathBuf>,
    /// JSON Web Key Set that tokens are signed with
    #[arg(long, env = "REGISTRY_AUTH_TOKEN_JWKS", value_name = "FILE", help_heading = "Authentication")]
    auth_token_jwks: Option<PathBuf>,
    /// Take only tokens signed this way (RS256, ES256, EdDSA, …); may be given several times
    #[arg(long, value_name = "ALGORITHM", value_delimiter = ',', help_heading = "Authentication")]
    auth_token_signingalgorithms: Vec<String>,
}

#[derive(clap::Args)]
pub struct ProxyArgs {
    /// Cache the registry at this URL: fetch, check and keep what is pulled; pushes are refused
    #[arg(long, alias = "proxy-remoteurl", env = "REGISTRY_PROXY_REMOTEURL", value_name = "URL")]
    #[arg(help_heading = "Pull-through cache", conflicts_with = "read_only")]
    proxy_remote_url: Option<String>,
    /// User at the registry that is cached
    #[arg(long, env = "REGISTRY_PROXY_USERNAME", value_name = "NAME", help_heading = "Pull-through cache")]
    #[arg(requires = "proxy_remote_url")]
    proxy_username: Option<String>,
    /// Password of that user; the environment shows it to fewer than the command line does
    #[arg(long, env = "REGISTRY_PROXY_PASSWORD", hide_env_values = true, value_name = "PASSWORD")]
    #[arg(help_heading = "Pull-through cache", requires = "proxy_username")]
    proxy_password: Option<String>,
    /// Trust these certificates (PEM) of the registry that is cached, besides the system's
    #[arg(long, value_name = "FILE", help_heading = "Pull-through cache", requires = "proxy_remote_url")]
    proxy_ca_file: Option<PathBuf>,
    /// Registry that clients mean by `?ns=`, as containerd tells mirrors; may be given several times (default: the host
    /// of --proxy-remote-url). Others are answered with 404, so that one mirror entry for all registries is safe
    #[arg(long, value_name = "REGISTRY", value_delimiter = ',', help_heading = "Pull-through cache")]
    #[arg(requires = "proxy_remote_url")]
    proxy_namespace: Vec<String>,
    /// Remove images that nobody pulled for this long; 0 for never
    #[arg(long, env = "REGISTRY_PROXY_TTL", value_name = "AGE", default_value = "168h", value_parser = duration)]
    #[arg(help_heading = "Pull-through cache")]
    proxy_ttl: Duration,
}

pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Serve(args) => {
            sampan_telemetry::init(&args.log_level);
            crate::runtime()?.block_on(serving(*args))
        }
        Command::GarbageCollect(args) => {
            sampan_telemetry::init("warn");
            crate::runtime()?.block_on(collect(*args))
        }
    }
}

async fn collect(args: CollectArgs) -> Result<()> {
    let root = &args.storage.storage_filesystem_rootdirectory;
    if args.storage.s3.storage_s3_bucket.is_none() && !root.is_dir() {
        bail!("{} is not there (--storage-filesystem-rootdirectory names another)", root.display());
    }
    let (storage, _) = args
        .storage
        .open(false)
        .context("a registry that serves the directory collects by itself, and at once on the signal USR1")?;
    let options = Options { collect: args.storage.collect(None), ..Options::default() };
    let collected = Registry::new(storage, options).collect(args.dry_run).await?;
    println!("{}{collected}", if args.dry_run { "dry run: " } else { "" });
    if collected.missing > 0 {
        bail!("{} blobs that manifests refer to are missing", collected.missing);
    }
    Ok(())
}

async fn serving(args: ServeArgs) -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (storage, place) = args.storage.open(args.read_only)?;
    let interval = Some(args.garbage_collect_interval).filter(|i| !i.is_zero() && !args.read_only);
    let options = Options {
        read_only: args.read_only,
        delete_enabled: args.storage_delete_enabled,
        validate: !args.validation_disabled,
        collect: args.storage.collect(interval),
        quota: Quota { total_bytes: args.quota, repository_bytes: args.quota_repository },
    };
    let mut registry = Registry::new(storage, options).with_access(access(&args.auth)?);
    if let Some(url) = args.proxy.proxy_remote_url {
        let upstream = Upstream::new(UpstreamOptions {
            url,
            username: args.proxy.proxy_username.unwrap_or_default(),
            password: args.proxy.proxy_password.unwrap_or_default(),
            ca_file: args.proxy.proxy_ca_file,
            namespaces: args.proxy.proxy_namespace,
        })
        .context("--proxy-remote-url")?;
        let ttl = Some(args.proxy.proxy_ttl).filter(|ttl| !ttl.is_zero());
        registry = registry.with_proxy(Proxy::new(upstream, ttl));
    }
    let tls = match (args.http_tls_certificate, args.http_tls_key) {
        (Some(certificate), Some(key)) => {
            let only_tls13 = args.http_tls_minimumtls == "tls1.3";
            Some(tls(TlsOptions {
                certificate,
                key,
                client_authorities: args.http_tls_clientcas,
                only_tls13,
            })?)
        }
        _ => None,
    };
    registry.start().await?;
    let registry = Arc::new(registry);
    let listener = listen(&args.http_addr).await?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    tracing::info!("the registry serves {place} at {scheme}://{}", listener.local_addr()?);
    if !args.read_only {
        let registry = registry.clone();
        sampan_telemetry::supervise("registry maintenance", move || {
            let registry = registry.clone();
            async move { registry.maintain().await }
        });
    }
    sampan_world::memory::unmap_idle_code();
    sampan_telemetry::supervise("idle memory", crate::node::unmap_idle_code);
    serve(registry.clone(), listener, tls, signals(registry)?).await;
    tracing::info!("ended");
    Ok(())
}

/// Becomes true on TERM or INT; USR1 starts a collection.
fn signals(registry: Arc<Registry>) -> Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let mut collect = signal(SignalKind::user_defined1())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => break,
                _ = int.recv() => break,
                _ = collect.recv() => registry.collect_soon(),
            }
        }
        let _ = sender.send(true);
    });
    Ok(receiver)
}

async fn listen(address: &str) -> Result<TcpListener> {
    let context = || format!("listening on {address} (--http-addr names another address)");
    let Some(port) = address.strip_prefix(':') else {
        return TcpListener::bind(address).await.with_context(context);
    };
    let port: u16 = port.parse().with_context(context)?;
    // one socket for both families, where the machine has IPv6
    match TcpListener::bind(SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port))).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind(SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, port)))
            .await
            .with_context(context),
    }
}

fn access(args: &AuthArgs) -> Result<AccessController> {
    if let Some(path) = &args.auth_htpasswd_path {
        return Ok(AccessController::Htpasswd(Htpasswd::open(&args.auth_htpasswd_realm, path.clone())?));
    }
    let Some(realm) = &args.auth_token_realm else { return Ok(AccessController::None) };
    let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    let options = TokenOptions {
        realm: realm.clone(),
        service: args.auth_token_service.clone().unwrap_or_default(),
        issuer: args.auth_token_issuer.clone().unwrap_or_default(),
        root_cert_bundle: args.auth_token_rootcertbundle.as_ref().map(read).transpose()?,
        jwks: args.auth_token_jwks.as_ref().map(read).transpose()?.map(String::from_utf8).transpose()?,
        signing_algorithms: args.auth_token_signingalgorithms.clone(),
    };
    Ok(AccessController::Token(TokenAuth::new(options)?))
}

/// `90s`, `30m`, `24h`, `7d`, or several of them as Go writes durations: `1h30m`.
fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let invalid = || format!("{text:?} is no duration such as 90s, 30m, 24h or 7d");
    let (mut rest, mut total) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(invalid)?;
        let number: u64 = rest[..digits].parse().map_err(|_| invalid())?;
        let unit = rest[digits..].find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len() - digits);
        let seconds = match &rest[digits..digits + unit] {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86400,
            _ => return Err(invalid()),
        };
        let part = number.checked_mul(seconds).ok_or_else(invalid)?;
        total = total.checked_add(Duration::from_secs(part)).ok_or_else(invalid)?;
        rest = &rest[digits + unit..];
    }
    if text.is_empty() { Err(invalid()) } else { Ok(total) }
}

/// `1000`, `500MB`, `20GiB`: B, and K, M, G, T in thousands or, with i, in 1024s.
fn size(text: &str) -> Result<u64, String> {
    let invalid = || format!("{text:?} is no size such as 500MiB or 20GB");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| invalid())?;
    let unit = text[digits..].trim().to_ascii_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let (prefix, base) = match unit.strip_suffix('i') {
        Some(prefix) => (prefix, 1024_u64),
        None => (unit, 1000),
    };
    let power = match (prefix, base) {
        ("", 1000) => 0,
        ("k", _) => 1,
        ("m", _) => 2,
        ("g", _) => 3,
        ("t", _) => 4,
        _ => return Err(invalid()),
    };
    number.checked_mul(base.pow(power)).ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_read_durations_and_sizes() {
        for (text, seconds) in [("0", 0), ("90s", 90), ("1h30m", 5400), ("7d", 604_800), ("168h", 604_800)] {
            assert_eq!(duration(text).unwrap().as_secs(), seconds);
        }
        for (text, bytes) in
            [("7", 7), ("7B", 7), ("2kB", 2000), ("2KiB", 2048), ("2Ki", 2048), ("20GB", 20_000_000_000)]
        {
            assert_eq!(size(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "h", "5", "5x", "-1h", "1.5h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        for bad in ["", "GB", "5x", "-1", "5i", "99999999999TiB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
