//! The lab's wires: a bridge in the hub, a veth pair a node, made over netlink from inside the namespaces.
use std::fs::File;
use std::future::Future;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;

use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::LabError;

/// The hub's address on the bridge; nodes follow from `.11`.
pub const HUB: Ipv4Addr = Ipv4Addr::new(10, 64, 0, 1);
pub const PREFIX_BITS: u8 = 24;
const BRIDGE: &str = "lab0";

/// The address of the node with that index.
pub fn node_ip(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 64, 0, 11 + u8::try_from(index).unwrap_or(200))
}

/// The hub's end of that node's wire.
pub fn port_name(index: usize) -> String {
    format!("n{index}")
}

/// Runs `work` on a thread of its own inside the network namespace of `pid`.
fn inside<F, Fut, T>(pid: i32, work: F) -> Result<T, LabError>
where
    F: FnOnce(Handle) -> Fut + Send + 'static,
    Fut: Future<Output = Result<T, rtnetlink::Error>>,
    T: Send + 'static,
{
    let thread = std::thread::spawn(move || {
        let path = format!("/proc/{pid}/ns/net");
        let net = File::open(&path).map_err(LabError::file(path))?;
        setns(net.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|e| LabError::failed("entering a node's network", e))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(LabError::os("starting a runtime"))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(LabError::os("opening netlink"))?;
            tokio::spawn(connection);
            work(handle).await.map_err(|e| LabError::failed("configuring the lab's network", e))
        })
    });
    thread
        .join()
        .unwrap_or_else(|_| Err(LabError::failed("configuring the lab's network", "the thread died")))
}

async fn index(handle: &Handle, name: &str) -> Result<u32, rtnetlink::Error> {
    let mut links = handle.link().get().match_name(name.to_string()).execute();
    match links.try_next().await? {
        Some(link) => Ok(link.header.index),
        None => Err(rtnetlink::Error::RequestFailed),
    }
}

async fn up(handle: &Handle, name: &str) -> Result<u32, rtnetlink::Error> {
    let link = index(handle, name).await?;
    handle.link().set(LinkUnspec::new_with_index(link).up().build()).execute().await?;
    Ok(link)
}

/// Makes the bridge.
pub fn make_hub(hub: i32) -> Result<(), LabError> {
    inside(hub, |handle| async move {
        up(&handle, "lo").await?;
        handle.link().add(LinkBridge::new(BRIDGE).build()).execute().await?;
        let bridge = up(&handle, BRIDGE).await?;
        handle.address().add(bridge, HUB.into(), PREFIX_BITS).execute().await
    })
}

/// Wires a node to the bridge. Its default route ends at the hub, which forwards nothing.
pub fn wire(hub: i32, node: i32, number: usize) -> Result<(), LabError> {
    let port = port_name(number);
    inside(hub, move |handle| async move {
        let peer = format!("{port}p");
        handle.link().add(LinkVeth::new(&port, &peer).build()).execute().await?;
        let bridge = index(&handle, BRIDGE).await?;
        let near = index(&handle, &port).await?;
        handle.link().set(LinkUnspec::new_with_index(near).controller(bridge).up().build()).execute().await?;
        let far = index(&handle, &peer).await?;
        let pid = u32::try_from(node).unwrap_or_default();
        handle
            .link()
            .set(LinkUnspec::new_with_index(far).name("eth0".to_string()).setns_by_pid(pid).build())
            .execute()
            .await
    })?;
    inside(node, move |handle| async move {
        up(&handle, "lo").await?;
        let eth0 = up(&handle, "eth0").await?;
        handle.address().add(eth0, node_ip(number).into(), PREFIX_BITS).execute().await?;
        let default = RouteMessageBuilder::<Ipv4Addr>::new().gateway(HUB).build();
        handle.route().add(default).execute().await
    })
}

/// Cuts a node's wire, or heals it.
pub fn set_wire(hub: i32, number: usize, connected: bool) -> Result<(), LabError> {
    let port = port_name(number);
    inside(hub, move |handle| async move {
        let link = index(&handle, &port).await?;
        let message = LinkUnspec::new_with_index(link);
        let message = if connected { message.up() } else { message.down() };
        handle.link().set(message.build()).execute().await
    })
}
