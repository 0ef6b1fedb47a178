//! The project's own chores: `cargo xtask tidy`, `cargo xtask conformance`.
mod conformance;
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
}

fn main() -> std::process::ExitCode {
    let done = match Cli::parse().command {
        Command::Tidy => tidy::run(),
        Command::Conformance(args) => conformance::run(&args),
    };
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
