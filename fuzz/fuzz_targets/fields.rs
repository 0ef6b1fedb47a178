//! See `sampan_fuzz::fields`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::fields(data));
