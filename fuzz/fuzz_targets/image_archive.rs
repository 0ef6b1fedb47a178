//! See `sampan_fuzz::image_archive`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::image_archive(data));
