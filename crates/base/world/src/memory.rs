//! What of this program's code stays mapped.
//!
//! Pages of a program's file that were needed once, at start or for one request, count as this process's resident memory
//! until the kernel is short of it. Unmapping them costs a minor fault each when they are needed again, and what is left is
//! what an idle process really uses.
#![allow(unsafe_code)]
use std::ffi::c_void;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;

use rustix::mm::{Advice, madvise};

/// Unmaps the code and constants of this process; each page comes back from the page cache when it is touched. Says how many
/// bytes of address space that were.
pub fn unmap_idle_code() -> usize {
    let Ok(smaps) = File::open("/proc/self/smaps") else { return 0 };
    let mut unmapped = 0;
    for range in unchanged_file_mappings(BufReader::with_capacity(4096, smaps)) {
        // SAFETY: the mapping is of a file, cannot be written and has no page that differs from the file, so the kernel
        // reads the same bytes again on the next touch.
        if unsafe { madvise(range.start as *mut c_void, range.len(), Advice::LinuxDontNeed) }.is_ok() {
            unmapped += range.len();
        }
    }
    unmapped
}

/// Private mappings of a file without write permission and without a page of their own: code and constants, but not what
/// the loader has relocated and then protected.
fn unchanged_file_mappings(mut smaps: impl BufRead) -> Vec<Range<usize>> {
    let (mut found, mut candidate, mut line) = (Vec::new(), None, String::new());
    loop {
        line.clear();
        if smaps.read_line(&mut line).unwrap_or(0) == 0 {
            return found;
        }
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let (start, end) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16));
            let readable = words.next().is_some_and(|p| p.starts_with("r-") && p.ends_with('p'));
            let of_file = words.nth(3).is_some_and(|path| path.starts_with('/'));
            candidate = match (start, end) {
                (Ok(start), Ok(end)) if readable && of_file => Some(start..end),
                _ => None,
            };
        } else if first == "Anonymous:" && words.next() == Some("0") {
            found.extend(candidate.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unchanged_file_mappings() {
        let mapping = |range: &str, permissions: &str, path: &str, anonymous: u32| {
            format!("{range} {permissions} 00000000 fe:00 42 {path}\nRss: 8 kB\nAnonymous: {anonymous} kB\n")
        };
        let smaps = [
            mapping("1000-2000", "r-xp", "/usr/local/bin/sampan", 0),
            mapping("2000-3000", "r--p", "/usr/local/bin/sampan", 4),
            mapping("3000-4000", "rw-p", "/usr/local/bin/sampan", 0),
            mapping("4000-5000", "r--s", "/var/lib/sampan/shared", 0),
            mapping("5000-6000", "r--p", "[vvar]", 0),
            mapping("6000-7000", "r--p", "", 0),
            mapping("7000-9000", "r--p", "/usr/lib/libc.so.6", 0),
        ]
        .concat();
        assert_eq!(unchanged_file_mappings(smaps.as_bytes()), [0x1000..0x2000, 0x7000..0x9000]);
    }

    #[test]
    fn the_program_goes_on() {
        static CONSTANT: [u8; 8192] = [7; 8192];
        assert!(unmap_idle_code() > 0);
        assert_eq!(CONSTANT.iter().map(|b| u32::from(*b)).sum::<u32>(), 7 * 8192);
    }
}
