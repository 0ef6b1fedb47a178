//! See `sampan_fuzz::apply`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::apply(data));
