//! Netlink sockets: requests with their acknowledgements, dumps, events; and doing so in another network namespace.
//!
//! What stays true: every wait is bounded, and an error answered by the kernel names what was asked for.
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

use crate::message::{ACK, DUMP, Message, Received, received, u32_at};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The kernel answers at once; this bounds a wait for an answer that was lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest datagram that the kernel sends for a dump.
const BUFFER_BYTES: usize = 32 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("netlink: {what}: {error}")]
    Refused { what: &'static str, error: io::Error },
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    #[error("network namespace {path}: {error}")]
    Namespace { path: String, error: io::Error },
}

impl Error {
    /// Whether the kernel answered that the thing is there already.
    pub fn exists(&self) -> bool {
        self.is(rustix::io::Errno::EXIST)
    }

    /// Whether the kernel answered that there is no such thing.
    pub fn is_missing(&self) -> bool {
        [
            rustix::io::Errno::NOENT,
            rustix::io::Errno::SRCH,
            rustix::io::Errno::NODEV,
            rustix::io::Errno::ADDRNOTAVAIL,
        ]
        .into_iter()
        .any(|e| self.is(e))
    }

    fn is(&self, errno: rustix::io::Errno) -> bool {
        matches!(self, Self::Refused { error, .. } if error.raw_os_error() == Some(errno.raw_os_error()))
    }
}

/// A socket in the calling thread's network namespace.
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// For links, addresses, routes and neighbours.
    pub fn route() -> Result<Self, Error> {
        Self::open(None, 0)
    }

    /// For nftables and connection tracking.
    pub fn netfilter() -> Result<Self, Error> {
        Self::open(Some(netlink::NETFILTER), 0)
    }

    fn open(protocol: Option<rustix::net::Protocol>, groups: u32) -> Result<Self, Error> {
        let fd =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)
                .map_err(io::Error::from)?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, groups)).map_err(io::Error::from)?;
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))
            .map_err(io::Error::from)?;
        Ok(Self { fd, sequence: 0 })
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Error> {
        if bytes.len() > 100 * 1024 {
            // needs CAP_NET_ADMIN, as everything here does
            sockopt::set_socket_send_buffer_size_force(&self.fd, bytes.len() * 2).map_err(io::Error::from)?;
        }
        rustix::net::sendto(&self.fd, bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))
            .map_err(io::Error::from)?;
        Ok(())
    }

    fn receive<'a>(&self, buffer: &'a mut [u8]) -> Result<&'a [u8], Error> {
        loop {
            match rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::empty()) {
                Ok((_, count)) => return Ok(&buffer[..count]),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::Socket(error.into())),
            }
        }
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.sequence
    }

    /// Sends one message and waits for its acknowledgement.
    pub fn request(&mut self, what: &'static str, message: &Message) -> Result<(), Error> {
        let sequence = self.next_sequence();
        self.send(&message.finish(sequence, ACK))?;
        self.acknowledged(what, sequence)
    }

    /// Waits for the acknowledgement of `sequence`; an error for any message before it is an error too.
    fn acknowledged(&mut self, what: &'static str, sequence: u32) -> Result<(), Error> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            for message in received(self.receive(&mut buffer)?) {
                if message.kind != NLMSG_ERROR {
                    continue;
                }
                check(what, message)?;
                if message.sequence == sequence {
                    return Ok(());
                }
            }
        }
    }

    /// Sends messages that the kernel takes as one transaction; the last one but one acknowledges for all.
    pub(crate) fn transaction(&mut self, what: &'static str, messages: &[Message]) -> Result<(), Error> {
        let Some(last) = messages.len().checked_sub(2) else { return Ok(()) };
        let mut bytes = Vec::with_capacity(messages.iter().map(Message::len).sum());
        let mut awaited = 0;
        for (index, message) in messages.iter().enumerate() {
            let sequence = self.next_sequence();
            if index == last {
                awaited = sequence;
            }
            bytes.extend_from_slice(&message.finish(sequence, if index == last { ACK } else { 0 }));
        }
        self.send(&bytes)?;
        self.acknowledged(what, awaited)
    }

    /// Asks for one object.
    pub fn get<T>(
        &mut self,
        what: &'static str,
        message: &Message,
        read: impl Fn(Received<'_>) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let sequence = self.next_sequence();
        self.send(&message.finish(sequence, 0))?;
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            if let Some(message) = received(self.receive(&mut buffer)?).find(|m| m.sequence == sequence) {
                if message.kind == NLMSG_ERROR {
                    check(what, message)?;
                }
                return Ok(read(message));
            }
        }
    }

    /// Asks for all objects of a kind; `read` picks those that matter.
    pub fn dump<T>(
        &mut self,
        what: &'static str,
        message: &Message,
        mut read: impl FnMut(Received<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let sequence = self.next_sequence();
        self.send(&message.finish(sequence, DUMP))?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut found = Vec::new();
        loop {
            for message in received(self.receive(&mut buffer)?).filter(|m| m.sequence == sequence) {
                match message.kind {
                    NLMSG_ERROR => check(what, message)?,
                    NLMSG_DONE => return Ok(found),
                    _ => found.extend(read(message)),
                }
            }
        }
    }
}

fn check(what: &'static str, message: Received<'_>) -> Result<(), Error> {
    match u32_at(message.payload, 0).unwrap_or_default() as i32 {
        0 => Ok(()),
        code => Err(Error::Refused { what, error: io::Error::from_raw_os_error(code.saturating_neg()) }),
    }
}

/// A non-blocking socket that tells of links going up and down, and of IPv4 addresses and routes coming and going. Reading
/// gives datagrams for [`received`]; `ENOBUFS` says that some were lost.
pub fn link_events() -> Result<OwnedFd, Error> {
    const LINK: u32 = 1;
    const IPV4_ADDRESS: u32 = 0x10;
    const IPV4_ROUTE: u32 = 0x40;
    let socket = Socket::open(None, LINK | IPV4_ADDRESS | IPV4_ROUTE)?;
    rustix::io::ioctl_fionbio(&socket.fd, true).map_err(io::Error::from)?;
    Ok(socket.fd)
}

/// Runs `work` inside the network namespace at `path`, on a thread of its own that ends with it.
pub fn inside<T: Send>(path: &Path, work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    let failed = |error: io::Error| Error::Namespace { path: path.display().to_string(), error };
    let namespace = File::open(path).map_err(failed)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let network = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(namespace.as_fd(), network)
                .map_err(|e| Error::Namespace { path: path.display().to_string(), error: e.into() })?;
            work()
        });
        thread.join().unwrap_or_else(|_| Err(failed(io::Error::other("the thread inside it died"))))
    })
}
