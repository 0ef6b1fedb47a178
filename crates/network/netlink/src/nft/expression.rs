//! The expressions that rules are made of; a rule is a list of them, which ends where one does not match.
use super::{Element, Set, Verdict};
use crate::message::Message;

/// A 4-byte register, 0 to 15. Values longer than 4 bytes take the next ones too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register(pub u8);

impl Register {
    fn number(self) -> u32 {
        8 + u32::from(self.0)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression {
    SourceIp(Register),
    DestinationIp(Register),
    DestinationPort(Register),
    Protocol(Register),
    Mark(Register),
    SetMark(Register),
    InputName(Register),
    OutputName(Register),
    /// Bits of connection tracking's state: 2 established, 4 related, 8 new (1 invalid).
    ConnectionState(Register),
    /// The kernel's type of the destination (2 is local), or of the source.
    AddressType {
        of_source: bool,
        into: Register,
    },
    /// `and` and `xor` over as many bytes as the two have.
    Bits {
        register: Register,
        and: Vec<u8>,
        xor: Vec<u8>,
    },
    /// Goes on when the register's first bytes are these, or are not.
    Compare {
        register: Register,
        equal: bool,
        with: Vec<u8>,
    },
    /// A random number below the bound.
    Random {
        below: u32,
        into: Register,
    },
    /// Goes on when the set has what is in the register, or has it not.
    InSet {
        set: String,
        key: Register,
        inverted: bool,
    },
    /// The same in a set of the rule's own.
    InOwnSet {
        set: Set,
        elements: Vec<Element>,
        key: Register,
    },
    /// Goes on with the map's value when it has the key.
    FromMap {
        map: String,
        key: Register,
        into: Register,
    },
    FromOwnMap {
        map: Set,
        elements: Vec<Element>,
        key: Register,
        into: Register,
    },
    /// Ends with the verdict that the map has for the key.
    VerdictFrom {
        map: String,
        key: Register,
    },
    /// Puts key and value into a dynamic map, or makes the element young again.
    Remember {
        map: String,
        key: Register,
        value: Register,
        seconds: u32,
    },
    Verdict(Verdict),
    /// Translates the destination to the address, and the port in the register after it.
    Dnat {
        address: Register,
        port: Register,
    },
    Masquerade,
    /// ICMP port unreachable.
    Reject,
}

/// The `nft` idioms that take several expressions.
pub mod matches {
    use super::{Expression, Register};
    use crate::Cidr;

    const SCRATCH: Register = Register(0);

    fn in_range(load: Expression, range: Cidr, equal: bool) -> Vec<Expression> {
        let mask = !(u32::from(range.last()) ^ u32::from(range.network()));
        vec![
            load,
            Expression::Bits { register: SCRATCH, and: mask.to_be_bytes().to_vec(), xor: vec![0; 4] },
            Expression::Compare { register: SCRATCH, equal, with: range.network().octets().to_vec() },
        ]
    }

    pub fn source(range: Cidr, equal: bool) -> Vec<Expression> {
        in_range(Expression::SourceIp(SCRATCH), range, equal)
    }

    pub fn destination(range: Cidr, equal: bool) -> Vec<Expression> {
        in_range(Expression::DestinationIp(SCRATCH), range, equal)
    }

    /// The destination, or the source, is an address of this machine.
    pub fn local(of_source: bool) -> Vec<Expression> {
        const LOCAL: u32 = 2;
        vec![
            Expression::AddressType { of_source, into: SCRATCH },
            Expression::Compare { register: SCRATCH, equal: true, with: LOCAL.to_ne_bytes().to_vec() },
        ]
    }

    pub fn new_connection() -> Vec<Expression> {
        const NEW: u32 = 8;
        vec![
            Expression::ConnectionState(SCRATCH),
            Expression::Bits { register: SCRATCH, and: NEW.to_ne_bytes().to_vec(), xor: vec![0; 4] },
            Expression::Compare { register: SCRATCH, equal: false, with: vec![0; 4] },
        ]
    }

    /// `bit` of the packet's mark is set.
    pub fn mark(bit: u32) -> Vec<Expression> {
        vec![
            Expression::Mark(SCRATCH),
            Expression::Bits { register: SCRATCH, and: bit.to_ne_bytes().to_vec(), xor: vec![0; 4] },
            Expression::Compare { register: SCRATCH, equal: false, with: vec![0; 4] },
        ]
    }

    /// Sets or clears `bit` of the packet's mark.
    pub fn set_mark(bit: u32, set: bool) -> Vec<Expression> {
        let xor = if set { bit } else { 0 };
        vec![
            Expression::Mark(SCRATCH),
            Expression::Bits {
                register: SCRATCH,
                and: (!bit).to_ne_bytes().to_vec(),
                xor: xor.to_ne_bytes().to_vec(),
            },
            Expression::SetMark(SCRATCH),
        ]
    }

    /// Interface names that start so.
    pub fn interface_prefix(load: fn(Register) -> Expression, prefix: &str) -> Vec<Expression> {
        let with = prefix.as_bytes().to_vec();
        vec![load(SCRATCH), Expression::Compare { register: SCRATCH, equal: true, with }]
    }
}

fn payload(m: &mut Message, base: u32, offset: u32, bytes: u32, into: Register) {
    m.put_be32(1, into.number()).put_be32(2, base).put_be32(3, offset).put_be32(4, bytes);
}

fn value(m: &mut Message, kind: u16, bytes: &[u8]) {
    m.nest(kind, |m| {
        m.put(1, bytes);
    });
}

const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
const MARK: u32 = 3;

impl Expression {
    /// The set that exists only for this rule.
    pub(super) fn own_set(&self) -> Option<(&Set, &[Element])> {
        match self {
            Self::InOwnSet { set, elements, .. } => Some((set, elements)),
            Self::FromOwnMap { map, elements, .. } => Some((map, elements)),
            _ => None,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::SourceIp(_) | Self::DestinationIp(_) | Self::DestinationPort(_) => "payload",
            Self::Protocol(_)
            | Self::Mark(_)
            | Self::SetMark(_)
            | Self::InputName(_)
            | Self::OutputName(_) => "meta",
            Self::ConnectionState(_) => "ct",
            Self::AddressType { .. } => "fib",
            Self::Bits { .. } => "bitwise",
            Self::Compare { .. } => "cmp",
            Self::Random { .. } => "numgen",
            Self::InSet { .. }
            | Self::InOwnSet { .. }
            | Self::FromMap { .. }
            | Self::FromOwnMap { .. }
            | Self::VerdictFrom { .. } => "lookup",
            Self::Remember { .. } => "dynset",
            Self::Verdict(_) => "immediate",
            Self::Dnat { .. } => "nat",
            Self::Masquerade => "masq",
            Self::Reject => "reject",
        }
    }

    pub(super) fn put(&self, message: &mut Message, own_set: Option<u32>) {
        message.put_str(1, self.name());
        message.nest(2, |m| self.put_data(m, own_set));
    }

    fn put_data(&self, m: &mut Message, own_set: Option<u32>) {
        let lookup = |m: &mut Message, set: &str, key: Register, into: Option<u32>| {
            m.put_str(1, set).put_be32(2, key.number());
            if let Some(into) = into {
                m.put_be32(3, into);
            }
            if let Some(id) = own_set {
                m.put_be32(4, id);
            }
        };
        let meta = |m: &mut Message, register: Register, key: u32| {
            m.put_be32(1, register.number()).put_be32(2, key);
        };
        match self {
            Self::SourceIp(into) => payload(m, NETWORK, 12, 4, *into),
            Self::DestinationIp(into) => payload(m, NETWORK, 16, 4, *into),
            Self::DestinationPort(into) => payload(m, TRANSPORT, 2, 2, *into),
            Self::Mark(into) => meta(m, *into, MARK),
            Self::InputName(into) => meta(m, *into, 6),
            Self::OutputName(into) => meta(m, *into, 7),
            Self::Protocol(into) => meta(m, *into, 16),
            Self::SetMark(from) => {
                m.put_be32(2, MARK).put_be32(3, from.number());
            }
            Self::ConnectionState(into) => meta(m, *into, 0),
            Self::AddressType { of_source, into } => {
                m.put_be32(1, into.number()).put_be32(2, 3).put_be32(3, if *of_source { 1 } else { 2 });
            }
            Self::Bits { register, and, xor } => {
                let length = u32::try_from(and.len()).unwrap_or_default();
                m.put_be32(1, register.number()).put_be32(2, register.number()).put_be32(3, length);
                value(m, 4, and);
                value(m, 5, xor);
            }
            Self::Compare { register, equal, with } => {
                m.put_be32(1, register.number()).put_be32(2, u32::from(!equal));
                value(m, 3, with);
            }
            Self::Random { below, into } => {
                m.put_be32(1, into.number()).put_be32(2, *below).put_be32(3, 1).put_be32(4, 0);
            }
            Self::InSet { set, key, inverted } => {
                lookup(m, set, *key, None);
                if *inverted {
                    m.put_be32(5, 1);
                }
            }
            Self::InOwnSet { key, .. } => lookup(m, "__set%d", *key, None),
            Self::FromMap { map, key, into } => lookup(m, map, *key, Some(into.number())),
            Self::FromOwnMap { key, into, .. } => lookup(m, "__map%d", *key, Some(into.number())),
            Self::VerdictFrom { map, key } => lookup(m, map, *key, Some(0)),
            Self::Remember { map, key, value, seconds } => {
                m.put_str(1, map).put_be32(3, 1).put_be32(4, key.number()).put_be32(5, value.number());
                m.put_be64(6, u64::from(*seconds) * 1000);
            }
            Self::Verdict(verdict) => {
                m.put_be32(1, 0).nest(2, |m| verdict.put(m));
            }
            Self::Dnat { address, port } => {
                m.put_be32(1, 1).put_be32(2, 2).put_be32(3, address.number()).put_be32(5, port.number());
            }
            Self::Masquerade => {
                const FULLY_RANDOM: u32 = 0x10;
                m.put_be32(1, FULLY_RANDOM);
            }
            Self::Reject => {
                const PORT_UNREACHABLE: u8 = 3;
                m.put_be32(1, 0).put_u8(2, PORT_UNREACHABLE);
            }
        }
    }
}
