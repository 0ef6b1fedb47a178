//! From rules to BPF instructions.
//!
//! The program checks the architecture, then the call's number by binary search over ranges that share a verdict,
//! so that a filter of 350 calls costs about ten comparisons each call. Ranges with conditions jump to a block of their own.
use std::collections::BTreeMap;

use super::{Abi, Action, Compare, Condition, Profile, SeccompError, numbers};

/// Instructions, packed: code (16 bits), jump if true (8), jump if false (8), constant (32).
pub type Program = Vec<u64>;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const EQUAL: u16 = 0x15;
const GREATER: u16 = 0x25;
const GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;
const NUMBER_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;
const PROGRAM_MAX: usize = 4096;

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> u64 {
    u64::from(code) << 48 | u64::from(jt) << 40 | u64::from(jf) << 32 | u64::from(k)
}

/// What happens to one call: conditional verdicts in order, then the last word.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Verdict {
    conditional: Vec<(Vec<Condition>, Action)>,
    otherwise: Action,
}

/// Compiles `profile` for all of `abis`; calls of any other kill the process.
pub fn assemble(profile: &Profile, abis: &[Abi]) -> Result<Program, SeccompError> {
    let mut program = vec![instruction(LOAD, 0, 0, ARCH_OFFSET)];
    let mut audits: Vec<u32> = abis.iter().map(|a| a.audit).collect();
    audits.dedup();
    audits.sort_unstable();
    audits.dedup();
    for audit in audits {
        let mut verdicts = BTreeMap::new();
        for abi in abis.iter().filter(|a| a.audit == audit) {
            let known = numbers(*abi);
            for rule in &profile.rules {
                for name in &rule.names {
                    let Some(number) = known.get(name.as_str()) else { continue };
                    let entry = verdicts
                        .entry(number | abi.bit)
                        .or_insert_with(|| Verdict { conditional: Vec::new(), otherwise: profile.default });
                    // Rules that say what happens anyway add nothing; an unconditional one ends the matter.
                    if rule.conditions.is_empty() {
                        entry.otherwise = rule.action;
                        entry.conditional.retain(|(_, action)| *action != rule.action);
                    } else if entry.otherwise != rule.action {
                        entry.conditional.push((rule.conditions.clone(), rule.action));
                    }
                }
            }
        }
        let mut block = vec![instruction(LOAD, 0, 0, NUMBER_OFFSET)];
        block.extend(search(&ranges(&verdicts, profile.default)));
        // The block is longer than a conditional jump reaches.
        program.push(instruction(EQUAL, 1, 0, audit));
        program.push(instruction(JUMP, 0, 0, block.len() as u32));
        program.extend(block);
    }
    program.push(instruction(RETURN, 0, 0, Action::Kill.value()));
    if program.len() > PROGRAM_MAX {
        return Err(SeccompError::TooLong(format!("{} instructions, at most {PROGRAM_MAX}", program.len())));
    }
    Ok(program)
}

/// First number of each range with the verdict of all in it; the first range begins at 0.
fn ranges(verdicts: &BTreeMap<u32, Verdict>, default: Action) -> Vec<(u32, Verdict)> {
    let plain = Verdict { conditional: Vec::new(), otherwise: default };
    let mut ranges = vec![(0, plain.clone())];
    let mut push = |at: u32, verdict: &Verdict| {
        if let Some(last) = ranges.last_mut()
            && last.0 == at
        {
            last.1 = verdict.clone();
        } else if ranges.last().is_some_and(|l| l.1 != *verdict) {
            ranges.push((at, verdict.clone()));
        }
    };
    let mut next = 0;
    for (&number, verdict) in verdicts {
        if number > next {
            push(next, &plain);
        }
        push(number, verdict);
        next = number + 1;
    }
    push(next, &plain);
    ranges
}

/// Binary search; leaves return.
fn search(ranges: &[(u32, Verdict)]) -> Program {
    if let [(_, only)] = ranges {
        return leaf(only);
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let pivot = high.first().map_or(0, |r| r.0);
    let (low, high) = (search(low), search(high));
    let mut program = match u8::try_from(low.len()) {
        Ok(over) => vec![instruction(GREATER_OR_EQUAL, over, 0, pivot)],
        Err(_) => {
            vec![instruction(GREATER_OR_EQUAL, 0, 1, pivot), instruction(JUMP, 0, 0, low.len() as u32)]
        }
    };
    program.extend(low);
    program.extend(high);
    program
}

fn leaf(verdict: &Verdict) -> Program {
    let mut program = Vec::new();
    for (conditions, action) in &verdict.conditional {
        // From the last condition back: each false one jumps over the rest.
        let mut rest = vec![instruction(RETURN, 0, 0, action.value())];
        for condition in conditions.iter().rev() {
            let mut test = compare(condition, rest.len() as u8);
            test.extend(rest);
            rest = test;
        }
        program.extend(rest);
    }
    program.push(instruction(RETURN, 0, 0, verdict.otherwise.value()));
    program
}

/// Falls through when the condition holds, else jumps over what follows (`skip` instructions).
fn compare(condition: &Condition, skip: u8) -> Program {
    let offset = ARGUMENTS_OFFSET + 8 * u32::from(condition.argument);
    let (low_offset, high_offset) = (offset, offset + 4);
    let (low, high) = (condition.value as u32, (condition.value >> 32) as u32);
    let load_high = instruction(LOAD, 0, 0, high_offset);
    let load_low = instruction(LOAD, 0, 0, low_offset);
    match condition.compare {
        Compare::Eq => {
            vec![load_high, instruction(EQUAL, 0, skip + 2, high), load_low, instruction(EQUAL, 0, skip, low)]
        }
        Compare::Ne => {
            vec![load_high, instruction(EQUAL, 0, 2, high), load_low, instruction(EQUAL, skip, 0, low)]
        }
        Compare::Masked(mask) => vec![
            load_high,
            instruction(AND, 0, 0, (mask >> 32) as u32),
            instruction(EQUAL, 0, skip + 3, high),
            load_low,
            instruction(AND, 0, 0, mask as u32),
            instruction(EQUAL, 0, skip, low),
        ],
        // The high halves decide unless they are equal.
        Compare::Gt => vec![
            load_high,
            instruction(GREATER, 3, 0, high),
            instruction(EQUAL, 0, skip + 2, high),
            load_low,
            instruction(GREATER, 0, skip, low),
        ],
        Compare::Ge => vec![
            load_high,
            instruction(GREATER, 3, 0, high),
            instruction(EQUAL, 0, skip + 2, high),
            load_low,
            instruction(GREATER_OR_EQUAL, 0, skip, low),
        ],
        Compare::Lt => vec![
            load_high,
            instruction(GREATER, skip + 3, 0, high),
            instruction(EQUAL, 0, 2, high),
            load_low,
            instruction(GREATER_OR_EQUAL, skip, 0, low),
        ],
        Compare::Le => vec![
            load_high,
            instruction(GREATER, skip + 3, 0, high),
            instruction(EQUAL, 0, 2, high),
            load_low,
            instruction(GREATER, skip, 0, low),
        ],
    }
}
