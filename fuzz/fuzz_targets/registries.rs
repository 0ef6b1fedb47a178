//! See `sampan_fuzz::registries`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::registries(data));
