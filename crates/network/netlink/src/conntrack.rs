//! Tracked connections (ctnetlink): found by what they are translated to, and forgotten one by one.
//! Upstream counterpart: pkg/proxy/conntrack.
use std::net::Ipv4Addr;

use crate::message::{Message, attribute};
use crate::socket::{Error, Socket};

const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = 1;
const DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const NESTED: u16 = 1 << 15;
/// nfgenmsg of IPv4.
const HEADER: [u8; 4] = [2, 0, 0, 0];

/// A flow, as its first packet was sent and as its answers come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    pub protocol: u8,
    /// Where the first packet was sent to.
    pub to: (Ipv4Addr, u16),
    /// Where the answers come from: differs from `to` when the destination was translated.
    pub from: (Ipv4Addr, u16),
    tuple: Vec<u8>,
}

impl Socket {
    /// The IPv4 flows that `wanted` picks.
    pub fn flows(&mut self, wanted: impl Fn(&Flow) -> bool) -> Result<Vec<Flow>, Error> {
        let message = Message::new(SUBSYSTEM | GET, 0, &HEADER);
        self.dump("listing connections", &message, |m| read(m.payload.get(4..)?).filter(|f| wanted(f)))
    }

    pub fn forget(&mut self, flow: &Flow) -> Result<(), Error> {
        let mut message = Message::new(SUBSYSTEM | DELETE, 0, &HEADER);
        message.put(CTA_TUPLE_ORIG | NESTED, &flow.tuple);
        match self.request("forgetting a connection", &message) {
            Err(error) if error.is_missing() => Ok(()),
            other => other,
        }
    }
}

fn read(attributes: &[u8]) -> Option<Flow> {
    let original = attribute(attributes, CTA_TUPLE_ORIG)?;
    let reply = attribute(attributes, CTA_TUPLE_REPLY)?;
    let port = |tuple: &[u8], kind: u16| -> Option<u16> {
        Some(u16::from_be_bytes(attribute(attribute(tuple, 2)?, kind)?.try_into().ok()?))
    };
    let ip = |tuple: &[u8], kind: u16| -> Option<Ipv4Addr> {
        Some(<[u8; 4]>::try_from(attribute(attribute(tuple, 1)?, kind)?).ok()?.into())
    };
    Some(Flow {
        protocol: *attribute(attribute(original, 2)?, 1)?.first()?,
        to: (ip(original, 2)?, port(original, 3)?),
        from: (ip(reply, 1)?, port(reply, 2)?),
        tuple: original.to_vec(),
    })
}
