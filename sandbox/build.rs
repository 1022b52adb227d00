//! Builds the holder, a static program without any library, which `src/holder.rs` carries in itself.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=holder/holder.rs");
    let env = |name: &str| {
        std::env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for build scripts"))
    };
    let out = Path::new(&env("OUT_DIR")).join("holder");
    let target = env("TARGET");
    // With glibc rustc links by its own lld, which `-Clink-self-contained=no` hides from it.
    let linker: &[&str] = match &*target {
        "x86_64-unknown-linux-gnu" => &["-Clinker-features=-lld"],
        _ => &[],
    };
    let status = Command::new(env("RUSTC"))
        .args(linker)
        .args([
            "--edition=2024",
            "--crate-name=holder",
            "--crate-type=bin",
            "holder/holder.rs",
        ])
        .args(["--target", &target])
        .args([
            "-Copt-level=s",
            "-Cpanic=abort",
            "-Cstrip=symbols",
            "-Crelocation-model=static",
        ])
        .args([
            "-Clink-self-contained=no",
            "-Clinker=cc",
            "-Ctarget-feature=+crt-static",
        ])
        .args([
            "-Clink-arg=-nostartfiles",
            "-Clink-arg=-nostdlib",
            "-Clink-arg=-static",
            "-Clink-arg=-no-pie",
        ])
        .args([
            "-Clink-arg=-Wl,--build-id=none",
            "-Clink-arg=-Wl,-z,noseparate-code",
        ])
        .arg("-o")
        .arg(&out)
        .status()
        .expect("run rustc for the holder");
    assert!(
        status.success(),
        "rustc could not build holder/holder.rs: {status}"
    );
}
