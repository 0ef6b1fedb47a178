//! See `sampan_fuzz::image_manifest`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::image_manifest(data));
