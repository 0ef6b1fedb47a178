//! The project's own chores: `cargo xtask tidy`, `cargo xtask conformance`, `cargo xtask release`.
mod conformance;
mod release;
mod tidy;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check what the compiler does not: headers, sizes, directions between crates, lists, formatting
    Tidy,
    /// Run a given build of upstream's e2e suite against a lab and record what passed
    Conformance(conformance::Args),
    /// Build static musl binaries for x86_64, aarch64 and armv7, and run each
    Release(release::Args),
}

fn main() -> std::process::ExitCode {
    let done = match Cli::parse().command {
        Command::Tidy => tidy::run(),
        Command::Conformance(args) => conformance::run(&args),
        Command::Release(args) => release::run(&args),
    };
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
