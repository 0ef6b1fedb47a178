//! Device rules of cgroup v2: a small eBPF program, since v2 has no files for it.
//!
//! Upstream counterpart: runc's `devicefilter`. The context holds `access << 16 | type`, major and minor.
use super::DeviceRule;

const TYPE_BLOCK: i32 = 1;
const TYPE_CHAR: i32 = 2;

/// Kernel form of one instruction: code, registers, offset, constant.
fn op(code: u8, destination: u8, source: u8, offset: i16, constant: i32) -> u64 {
    u64::from(code)
        | u64::from(destination | source << 4) << 8
        | u64::from(offset as u16) << 16
        | u64::from(constant as u32) << 32
}

/// Allows what a rule allows, denies the rest.
pub(super) fn program(rules: &[DeviceRule]) -> Vec<u64> {
    const LOAD_WORD: u8 = 0x61;
    const MOVE_REGISTER: u8 = 0xbf;
    const MOVE: u8 = 0xb7;
    const AND: u8 = 0x57;
    const SHIFT_RIGHT: u8 = 0x77;
    const NOT_EQUAL: u8 = 0x55;
    const EXIT: u8 = 0x95;
    // r2 type, r3 access, r4 major, r5 minor
    let mut program = vec![
        op(LOAD_WORD, 2, 1, 0, 0),
        op(MOVE_REGISTER, 3, 2, 0, 0),
        op(AND, 2, 0, 0, 0xffff),
        op(SHIFT_RIGHT, 3, 0, 0, 16),
        op(LOAD_WORD, 4, 1, 4, 0),
        op(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules {
        let mask = rule.access.chars().fold(0, |m, c| {
            m | match c {
                'm' => 1,
                'r' => 2,
                'w' => 4,
                _ => 0,
            }
        });
        let mut tests = Vec::new();
        match rule.kind {
            'b' => tests.push((2, TYPE_BLOCK)),
            'c' => tests.push((2, TYPE_CHAR)),
            _ => {}
        }
        if rule.major >= 0 {
            tests.push((4, rule.major as i32));
        }
        if rule.minor >= 0 {
            tests.push((5, rule.minor as i32));
        }
        // Two instructions for the access (copy, mask off what is allowed, compare), then allow.
        let mut block =
            vec![op(MOVE_REGISTER, 6, 3, 0, 0), op(AND, 6, 0, 0, !mask), op(NOT_EQUAL, 6, 0, 2, 0)];
        block.extend([op(MOVE, 0, 0, 0, 1), op(EXIT, 0, 0, 0, 0)]);
        let count = tests.len();
        for (i, (register, value)) in tests.into_iter().enumerate() {
            let skip = (count - 1 - i + block.len()) as i16;
            program.push(op(NOT_EQUAL, register, 0, skip, value));
        }
        program.extend(block);
    }
    program.extend([op(MOVE, 0, 0, 0, 0), op(EXIT, 0, 0, 0, 0)]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_land_on_the_next_rule() {
        let rule = |minor| DeviceRule { kind: 'c', major: 1, minor, access: "rwm".into() };
        let program = program(&[rule(3), rule(5)]);
        let jumps: Vec<usize> = program
            .iter()
            .enumerate()
            .filter(|(_, i)| **i as u8 == 0x55)
            .map(|(at, i)| at + 1 + ((*i >> 16) as u16 as usize))
            .collect();
        assert_eq!(jumps, [14, 14, 14, 14, 22, 22, 22, 22]);
        assert_eq!(program.len(), 24);
    }
}
