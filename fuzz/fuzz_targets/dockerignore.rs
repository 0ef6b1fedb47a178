//! See `sampan_fuzz::dockerignore`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::dockerignore(data));
