//! For which machine a program is made: the first bytes of an ELF file.
//!
//! Upstream counterpart: the ELF specification's header, and GOARCH's names for its machines.

/// Enough of a file to tell.
pub(crate) const HEAD_BYTES: usize = 20;

/// The architecture as images name it; `None` when it is no ELF file, or of a machine without a name here.
pub(crate) fn architecture(head: &[u8]) -> Option<&'static str> {
    let head = head.get(..HEAD_BYTES)?;
    if !head.starts_with(b"\x7fELF") {
        return None;
    }
    let (wide, little) = (head[4] == 2, head[5] == 1);
    let machine = match little {
        true => u16::from_le_bytes([head[18], head[19]]),
        false => u16::from_be_bytes([head[18], head[19]]),
    };
    Some(match (machine, wide, little) {
        (3, ..) => "386",
        (62, ..) => "amd64",
        (40, ..) => "arm",
        (183, ..) => "arm64",
        (243, true, _) => "riscv64",
        (22, true, _) => "s390x",
        (21, _, true) => "ppc64le",
        (21, _, false) => "ppc64",
        (8, true, true) => "mips64le",
        (8, true, false) => "mips64",
        (8, false, true) => "mipsle",
        (8, false, false) => "mips",
        (258, true, _) => "loong64",
        _ => return None,
    })
}

#[cfg(test)]
pub(crate) fn head(machine: u16, wide: bool) -> Vec<u8> {
    let mut bytes = b"\x7fELF".to_vec();
    bytes.extend([if wide { 2 } else { 1 }, 1, 1]);
    bytes.resize(18, 0);
    bytes.extend(machine.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_have_their_names() {
        for (machine, wide, wanted) in
            [(62, true, Some("amd64")), (183, true, Some("arm64")), (40, false, Some("arm")), (9, true, None)]
        {
            assert_eq!(architecture(&head(machine, wide)), wanted);
        }
        let mut big = head(0, true);
        (big[5], big[18], big[19]) = (2, 0, 22);
        assert_eq!(architecture(&big), Some("s390x"));
        for bad in [&b""[..], b"#!/bin/sh\n and more of it", b"\x7fELF", &[0x7f; 19]] {
            assert_eq!(architecture(bad), None);
        }
    }
}
