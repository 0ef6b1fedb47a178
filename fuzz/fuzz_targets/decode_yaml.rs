//! See `sampan_fuzz::decode_yaml`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::decode_yaml(data));
