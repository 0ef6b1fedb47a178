//! See `sampan_fuzz::dockerfile`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::dockerfile(data));
