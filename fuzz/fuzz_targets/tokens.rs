//! See `sampan_fuzz::tokens`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::tokens(data));
