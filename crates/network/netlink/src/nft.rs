//! nftables: tables, chains, sets, maps and rules, changed in one transaction. Upstream counterpart: libnftnl as the
//! `nft` program uses it.
//!
//! A [`Batch`] holds for one table; either all of it happens or nothing. Within a batch: chains and sets first, then
//! rules and elements that name them. Only what the planes need is here, for IPv4.
mod expression;

use std::net::Ipv4Addr;

use crate::message::{APPEND, CREATE, Message};
use crate::socket::{Error, Socket};

pub use expression::{Expression, Register, matches};

const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = SUBSYSTEM;
const DELTABLE: u16 = SUBSYSTEM | 2;
const NEWCHAIN: u16 = SUBSYSTEM | 3;
const DELCHAIN: u16 = SUBSYSTEM | 5;
const NEWRULE: u16 = SUBSYSTEM | 6;
const DELRULE: u16 = SUBSYSTEM | 8;
const NEWSET: u16 = SUBSYSTEM | 9;
const DELSET: u16 = SUBSYSTEM | 11;
const NEWSETELEM: u16 = SUBSYSTEM | 12;
const DELSETELEM: u16 = SUBSYSTEM | 14;
/// nfgenmsg of NFPROTO_IPV4.
const IPV4: [u8; 4] = [2, 0, 0, 0];
/// An attribute holds 64 KiB, and an element takes up to some 100 bytes.
const ELEMENTS_A_MESSAGE: usize = 400;

const VERDICT_TYPE: u32 = 0xffff_ff00;

/// The parts that keys and values are made of. In a concatenation each takes whole 4-byte words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Ipv4,
    Protocol,
    Port,
    /// What `numgen` gives.
    Number,
}

impl Part {
    /// The type's number, which only `nft list` looks at.
    fn number(self) -> u32 {
        match self {
            Self::Number => 4,
            Self::Ipv4 => 7,
            Self::Protocol => 12,
            Self::Port => 13,
        }
    }

    fn bytes(self) -> u32 {
        match self {
            Self::Number | Self::Ipv4 => 4,
            Self::Protocol => 1,
            Self::Port => 2,
        }
    }
}

fn type_of(parts: &[Part]) -> (u32, u32) {
    match parts {
        [one] => (one.number(), one.bytes()),
        many => (many.iter().fold(0, |t, p| t << 6 | p.number()), u32::try_from(many.len()).unwrap_or(1) * 4),
    }
}

/// The bytes of a concatenation.
pub mod key {
    use super::Ipv4Addr;

    pub fn ip_protocol_port(ip: Ipv4Addr, protocol: u8, port: u16) -> Vec<u8> {
        [&ip.octets()[..], &protocol_port(protocol, port)].concat()
    }

    pub fn protocol_port(protocol: u8, port: u16) -> Vec<u8> {
        let port = port.to_be_bytes();
        vec![protocol, 0, 0, 0, port[0], port[1], 0, 0]
    }

    pub fn ip_port(ip: Ipv4Addr, port: u16) -> Vec<u8> {
        let port = port.to_be_bytes();
        [&ip.octets()[..], &[port[0], port[1], 0, 0]].concat()
    }

    pub fn ip_ip(ip: Ipv4Addr, other: Ipv4Addr) -> Vec<u8> {
        [ip.octets(), other.octets()].concat()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
}

impl Verdict {
    fn put(&self, message: &mut Message) {
        let (code, chain) = match self {
            Self::Drop => (0, None),
            Self::Accept => (1, None),
            Self::Jump(chain) => (-3, Some(chain)),
            Self::Goto(chain) => (-4, Some(chain)),
            Self::Return => (-5, None),
        };
        // NFTA_DATA_VERDICT
        message.nest(2, |m| {
            m.put(1, &i32::to_be_bytes(code));
            if let Some(chain) = chain {
                m.put_str(2, chain);
            }
        });
    }
}

/// What a map leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Bytes(Vec<u8>),
    Verdict(Verdict),
}

impl Value {
    fn put(&self, message: &mut Message) {
        match self {
            Self::Bytes(bytes) => {
                message.put(1, bytes);
            }
            Self::Verdict(verdict) => verdict.put(message),
        }
    }
}

/// What a map's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    Verdicts,
    Of(&'static [Part]),
}

/// A set, or a map when it has values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    pub name: String,
    pub key: &'static [Part],
    pub values: Option<Values>,
    /// Filled by rules, each element for so long: (seconds, most elements).
    pub dynamic: Option<(u32, u32)>,
}

impl Set {
    pub fn new(name: &str, key: &'static [Part]) -> Self {
        Self { name: name.to_string(), key, values: None, dynamic: None }
    }

    pub fn map(name: &str, key: &'static [Part], values: Values) -> Self {
        Self { values: Some(values), ..Self::new(name, key) }
    }
}

/// (key, value for a map).
pub type Element = (Vec<u8>, Option<Value>);

/// Where the kernel enters a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    pub kind: ChainKind,
    pub at: HookPoint,
    pub priority: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainKind {
    Filter,
    Nat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPoint {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// Changes to one table of family `ip`, made together.
pub struct Batch {
    table: String,
    messages: Vec<Message>,
    anonymous: u32,
}

impl Batch {
    pub fn new(table: &str) -> Self {
        let begin = Message::new(BATCH_BEGIN, 0, &[0, 0, 0, 10]);
        Self { table: table.to_string(), messages: vec![begin], anonymous: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.messages.len() == 1
    }

    fn message(&mut self, kind: u16, flags: u16) -> &mut Message {
        let mut message = Message::new(kind, flags, &IPV4);
        message.put_str(1, &self.table);
        let index = self.messages.len();
        self.messages.push(message);
        &mut self.messages[index]
    }

    /// Makes the table anew and empty, whether it is there or not.
    pub fn replace_table(&mut self) -> &mut Self {
        self.message(NEWTABLE, CREATE);
        self.delete_table();
        self.message(NEWTABLE, CREATE);
        self
    }

    pub fn add_table(&mut self) -> &mut Self {
        self.message(NEWTABLE, CREATE);
        self
    }

    pub fn delete_table(&mut self) -> &mut Self {
        self.message(DELTABLE, 0);
        self
    }

    pub fn add_chain(&mut self, name: &str, hook: Option<Hook>) -> &mut Self {
        let message = self.message(NEWCHAIN, CREATE);
        message.put_str(3, name);
        if let Some(hook) = hook {
            message.nest(4, |m| {
                m.put_be32(1, hook.at as u32).put(2, &hook.priority.to_be_bytes());
            });
            let kind = match hook.kind {
                ChainKind::Filter => "filter",
                ChainKind::Nat => "nat",
            };
            message.put_str(7, kind);
        }
        self
    }

    /// Takes all rules out of a chain.
    pub fn flush_chain(&mut self, name: &str) -> &mut Self {
        self.message(DELRULE, 0).put_str(2, name);
        self
    }

    /// Deletes a chain that nothing leads to any more.
    pub fn delete_chain(&mut self, name: &str) -> &mut Self {
        self.flush_chain(name);
        self.message(DELCHAIN, 0).put_str(3, name);
        self
    }

    pub fn add_set(&mut self, set: &Set) -> &mut Self {
        let id = self.next_id();
        self.put_set(set, id, 0);
        self
    }

    fn next_id(&mut self) -> u32 {
        self.anonymous += 1;
        self.anonymous
    }

    fn put_set(&mut self, set: &Set, id: u32, flags: u32) {
        const MAP: u32 = 0x8;
        const TIMEOUT: u32 = 0x10;
        const DYNAMIC: u32 = 0x20;
        let (key_type, key_bytes) = type_of(set.key);
        let mut flags = flags;
        flags |= if set.values.is_some() { MAP } else { 0 };
        flags |= if set.dynamic.is_some() { TIMEOUT | DYNAMIC } else { 0 };
        // the flag for concatenations is not set: kernels before 5.6 refuse it, and only ranges need it
        let message = self.message(NEWSET, CREATE);
        message.put_str(2, &set.name).put_be32(3, flags).put_be32(4, key_type).put_be32(5, key_bytes);
        match set.values {
            None => {}
            Some(Values::Verdicts) => {
                message.put_be32(6, VERDICT_TYPE).put_be32(7, 0);
            }
            Some(Values::Of(parts)) => {
                let (value_type, value_bytes) = type_of(parts);
                message.put_be32(6, value_type).put_be32(7, value_bytes);
            }
        }
        message.put_be32(10, id);
        if let Some((seconds, most)) = set.dynamic {
            message.put_be64(11, u64::from(seconds) * 1000);
            message.nest(9, |m| {
                m.put_be32(1, most);
            });
        }
    }

    /// Deletes a set that no rule looks at any more.
    pub fn delete_set(&mut self, name: &str) -> &mut Self {
        self.message(DELSET, 0).put_str(2, name);
        self
    }

    pub fn add_elements(&mut self, set: &str, elements: &[Element]) -> &mut Self {
        self.put_elements(NEWSETELEM, set, None, elements);
        self
    }

    pub fn delete_elements(&mut self, set: &str, elements: &[Element]) -> &mut Self {
        self.put_elements(DELSETELEM, set, None, elements);
        self
    }

    fn put_elements(&mut self, kind: u16, set: &str, id: Option<u32>, elements: &[Element]) {
        let flags = if kind == NEWSETELEM { CREATE } else { 0 };
        for part in elements.chunks(ELEMENTS_A_MESSAGE) {
            let message = self.message(kind, flags);
            message.put_str(2, set);
            if let Some(id) = id {
                message.put_be32(4, id);
            }
            message.nest(3, |m| {
                for (key, value) in part {
                    m.nest(1, |m| {
                        m.nest(1, |m| {
                            m.put(1, key);
                        });
                        if let Some(value) = value {
                            m.nest(2, |m| value.put(m));
                        }
                    });
                }
            });
        }
    }

    /// Appends a rule to a chain.
    pub fn add_rule(&mut self, chain: &str, rule: &[Expression]) -> &mut Self {
        const ANONYMOUS: u32 = 0x1;
        const CONSTANT: u32 = 0x2;
        // sets of the rule's own come before it, known by their numbers in this batch
        let mut ids = Vec::new();
        for set in rule.iter().filter_map(Expression::own_set) {
            let name = if set.0.values.is_some() { "__map%d" } else { "__set%d" };
            let id = self.next_id();
            self.put_set(&Set { name: name.to_string(), ..set.0.clone() }, id, ANONYMOUS | CONSTANT);
            self.put_elements(NEWSETELEM, name, Some(id), set.1);
            ids.push(id);
        }
        let mut ids = ids.into_iter();
        let message = self.message(NEWRULE, CREATE | APPEND);
        message.put_str(2, chain);
        message.nest(4, |m| {
            for expression in rule {
                let id = expression.own_set().and_then(|_| ids.next());
                m.nest(1, |m| expression.put(m, id));
            }
        });
        self
    }

    /// The messages as they would be sent.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Makes the changes, all or none, in the calling thread's network namespace.
    pub fn commit(mut self) -> Result<(), Error> {
        if self.is_empty() {
            return Ok(());
        }
        self.messages.push(Message::new(BATCH_END, 0, &[0, 0, 0, 10]));
        Socket::netfilter()?.transaction("changing nftables", &self.messages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_take_whole_words() {
        let ip = Ipv4Addr::new(10, 43, 0, 1);
        assert_eq!(key::ip_protocol_port(ip, 6, 443), [10, 43, 0, 1, 6, 0, 0, 0, 1, 0xbb, 0, 0]);
        assert_eq!(type_of(&[Part::Ipv4, Part::Protocol, Part::Port]), ((7 << 12) | (12 << 6) | 13, 12));
        assert_eq!(type_of(&[Part::Port]), (13, 2));
    }

    #[test]
    fn a_verdict_rule_in_bytes() {
        let mut batch = Batch::new("t");
        batch.add_rule("c", &[Expression::Verdict(Verdict::Drop)]);
        #[rustfmt::skip]
        let golden = [
            88, 0, 0, 0, 6, 10, 1, 12, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0,
            6, 0, 1, 0, b't', 0, 0, 0,
            6, 0, 2, 0, b'c', 0, 0, 0,
            52, 0, 4, 0x80, 48, 0, 1, 0x80,
            14, 0, 1, 0, b'i', b'm', b'm', b'e', b'd', b'i', b'a', b't', b'e', 0, 0, 0,
            28, 0, 2, 0x80,
            8, 0, 1, 0, 0, 0, 0, 0,
            16, 0, 2, 0x80, 12, 0, 2, 0x80, 8, 0, 1, 0, 0, 0, 0, 0,
        ];
        let bytes = batch.messages()[1].finish(1, 0);
        assert_eq!(bytes.len(), usize::from(bytes[0]));
        assert_eq!(bytes, golden);
    }
}
