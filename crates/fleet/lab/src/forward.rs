//! `lab-forward PORT PID ADDRESS`: leads 127.0.0.1:PORT of the machine to an address inside the lab, and nothing back.
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;

use nix::sched::{CloneFlags, setns};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

use crate::LabError;

/// At most so many connections at a time; more wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 1024;

pub fn run(args: &[String]) -> Result<i32, LabError> {
    let [port, pid, address] = args else {
        return Err(LabError::failed("lab-forward", "needs PORT, PID and ADDRESS"));
    };
    let bad = |e: &dyn std::fmt::Display| LabError::failed("lab-forward", e);
    let port: u16 = port.parse().map_err(|e| bad(&e))?;
    let address: SocketAddr = address.parse().map_err(|e| bad(&e))?;
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .map_err(LabError::os(format!("listening on 127.0.0.1:{port}")))?;
    listener.set_nonblocking(true).map_err(LabError::os("the listener"))?;
    let port = listener.local_addr().map_err(LabError::os("the listener"))?.port();
    let path = format!("/proc/{pid}/ns/net");
    let net = File::open(&path).map_err(LabError::file(path))?;
    setns(net.as_fd(), CloneFlags::CLONE_NEWNET)
        .map_err(|e| LabError::failed("entering the lab's network", e))?;
    println!("{port}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(LabError::os("starting the forwarder"))?;
    runtime.block_on(serve(listener, address)).map_err(LabError::os("forwarding"))?;
    Ok(0)
}

async fn serve(listener: std::net::TcpListener, address: SocketAddr) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return Ok(()) };
        let (mut near, _) = listener.accept().await?;
        tokio::spawn(async move {
            let _slot = slot;
            near.set_nodelay(true).ok();
            if let Ok(mut far) = TcpStream::connect(address).await {
                far.set_nodelay(true).ok();
                let _ = copy_bidirectional(&mut near, &mut far).await;
            }
        });
    }
}
