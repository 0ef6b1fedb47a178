//! See `sampan_fuzz::quantity_and_time`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sampan_fuzz::quantity_and_time(data));
