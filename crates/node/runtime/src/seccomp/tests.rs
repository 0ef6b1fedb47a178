//! Filters run by a small BPF machine, so that the verdicts are checked without installing anything.
use super::assemble::Program;
use super::*;

/// What the program says to a call.
fn run(program: &Program, audit: u32, number: u32, arguments: &[u64]) -> u32 {
    let load = |offset: u32| match offset {
        0 => number,
        4 => audit,
        n => {
            let value = arguments.get((n as usize - 16) / 8).copied().unwrap_or(0);
            if n % 8 == 0 { value as u32 } else { (value >> 32) as u32 }
        }
    };
    let (mut at, mut a) = (0usize, 0u32);
    loop {
        let i = program[at];
        let (code, jt, jf, k) = ((i >> 48) as u16, (i >> 40) as u8, (i >> 32) as u8, i as u32);
        let mut jump = |yes: bool| at += usize::from(if yes { jt } else { jf });
        match code {
            0x20 => a = load(k),
            0x54 => a &= k,
            0x05 => at += k as usize,
            0x15 => jump(a == k),
            0x25 => jump(a > k),
            0x35 => jump(a >= k),
            0x06 => return k,
            other => panic!("code {other:#x}"),
        }
        at += 1;
    }
}

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const ENOSYS: u32 = 0x0005_0026;

#[test]
fn the_default_profile_says_what_upstreams_says() {
    let filter = |caps| assemble(&default_profile("x86_64", caps), &abis("x86_64").unwrap()).unwrap();
    let plain = filter(0);
    let admin = filter(1 << crate::capabilities::number("CAP_SYS_ADMIN").unwrap());
    const A: u32 = 0xc000_003e;
    const I: u32 = 0x4000_0003;
    for (program, audit, number, arguments, wanted) in [
        (&plain, A, 0, &[][..], ALLOW), // read
        (&plain, A, 165, &[], EPERM),   // mount
        (&admin, A, 165, &[], ALLOW),
        (&plain, A, 272, &[], EPERM),           // unshare
        (&plain, A, 56, &[0x0120_0011], ALLOW), // clone, as fork does
        (&plain, A, 56, &[0x1000_0000], EPERM), // clone(CLONE_NEWUSER)
        (&admin, A, 56, &[0x1000_0000], ALLOW),
        (&plain, A, 435, &[], ENOSYS), // clone3
        (&admin, A, 435, &[], ALLOW),
        (&plain, A, 41, &[2], ALLOW),  // socket(AF_INET)
        (&plain, A, 41, &[40], EPERM), // socket(AF_VSOCK)
        (&plain, A, 41, &[38], EPERM),
        (&plain, A, 41, &[44], ALLOW),
        (&plain, A, 135, &[0xffff_ffff], ALLOW), // personality
        (&plain, A, 135, &[0x0040_0000], EPERM),
        (&plain, A, 135, &[0x1_0000_0000], EPERM),
        (&plain, A, 5000, &[], EPERM),
        (&plain, A, 0x4000_0000, &[], ALLOW), // x32's read
        (&plain, A, 0x4000_0000 | 165, &[], EPERM),
        (&plain, I, 3, &[], ALLOW),                  // i386's read
        (&plain, I, 21, &[], EPERM),                 // i386's mount
        (&plain, I, 102, &[], ALLOW),                // socketcall
        (&plain, 0xc000_00b7, 63, &[], 0x8000_0000), // another machine's
    ] {
        let got = run(program, audit, number, arguments);
        assert_eq!(got, wanted, "{audit:#x} {number} {arguments:x?}: {got:#x}");
    }
    assert!(plain.len() < 4096, "{}", plain.len());
    let arm = assemble(&default_profile("aarch64", 0), &abis("aarch64").unwrap()).unwrap();
    assert_eq!(run(&arm, 0xc000_00b7, 63, &[]), ALLOW);
    assert_eq!(run(&arm, 0xc000_00b7, 40, &[]), EPERM);
    assert_eq!(run(&arm, 0x4000_0028, 0xf0005, &[]), ALLOW);
}

#[test]
fn comparisons_are_right_at_their_edges() {
    let big = 0x1_0000_0005u64;
    for (compare, value, holds, fails) in [
        (Compare::Eq, big, vec![big], vec![5, big + 1, big + (1 << 32)]),
        (Compare::Ne, big, vec![5, big + 1, big + (1 << 32)], vec![big]),
        (Compare::Lt, big, vec![0, big - 1, 0xffff_ffff], vec![big, big + 1, 2 << 32]),
        (Compare::Le, big, vec![0, big], vec![big + 1, 2 << 32]),
        (Compare::Gt, big, vec![big + 1, 2 << 32], vec![big, 0, 0xffff_ffff]),
        (Compare::Ge, big, vec![big, 2 << 32], vec![big - 1, 0xffff_ffff]),
        (Compare::Masked(0xf_0000_000f), 0x1_0000_0005, vec![big, big + 0x10], vec![5, big + 1]),
    ] {
        let rule = Rule {
            names: vec!["read".into()],
            action: Action::Allow,
            conditions: vec![
                Condition { argument: 1, compare, value },
                Condition { argument: 2, compare: Compare::Eq, value: 7 },
            ],
        };
        let profile = Profile { default: Action::Errno(1), rules: vec![rule] };
        let program = assemble(&profile, &abis("x86_64").unwrap()).unwrap();
        let verdict = |v: u64, second: u64| run(&program, 0xc000_003e, 0, &[0, v, second]);
        for v in holds {
            assert_eq!(verdict(v, 7), ALLOW, "{compare:?} {v:#x}");
            assert_eq!(verdict(v, 8), EPERM, "{compare:?} {v:#x}");
        }
        for v in fails {
            assert_eq!(verdict(v, 7), EPERM, "{compare:?} {v:#x}");
        }
    }
}
