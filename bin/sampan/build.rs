//! Links the program at a fixed address: relocating it at every start would dirty megabytes in each shim.
fn main() {
    println!("cargo:rustc-link-arg-bins=-no-pie");
    println!("cargo:rerun-if-changed=build.rs");
}
