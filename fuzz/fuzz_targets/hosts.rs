//! See `sampan_fuzz::hosts`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::hosts(data));
