//! See `sampan_fuzz::image_json`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::image_json(data));
