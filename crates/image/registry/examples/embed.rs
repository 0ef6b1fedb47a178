//! A registry inside another program: `cargo run --example embed -- DIR 127.0.0.1:5000`.
use std::sync::Arc;

use sampan_registry::storage::Disk;
use sampan_registry::{Options, Registry};

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(address)) = (args.next(), args.next()) else {
        return Err(std::io::Error::other("usage: embed DIR ADDRESS"));
    };
    let disk = Disk::open(folder.as_ref()).map_err(std::io::Error::other)?;
    disk.recover()?;
    let registry = Arc::new(Registry::new(Arc::new(disk), Options::default()));
    let listener = tokio::net::TcpListener::bind(address).await?;
    // or `registry.router()`, as a part of an HTTP server of the program's own
    let (_never, end) = tokio::sync::watch::channel(false);
    sampan_registry::serve::serve(registry, listener, None, end).await;
    Ok(())
}
