//! Logs for the person at the keyboard, and supervised tasks.
use std::future::Future;
use std::io::IsTerminal;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

/// Starts logging to stderr: plain when piped, `SAMPAN_LOG` or `filter` choose what (`info`, `sampan_kubelet=debug`).
pub fn init(filter: &str) {
    let filter = EnvFilter::try_from_env("SAMPAN_LOG").unwrap_or_else(|_| EnvFilter::new(filter));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .try_init();
}

const FIRST_DELAY: Duration = Duration::from_millis(200);
const MAX_DELAY: Duration = Duration::from_secs(60);

/// Runs `task` for as long as the process lives: when it panics or returns it is started again, with back-off, and the
/// node lives on.
pub fn supervise<F, Fut>(name: &'static str, task: F) -> tokio::task::JoinHandle<()>
where
    F: Fn() -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        let mut delay = FIRST_DELAY;
        let mut starts = 0_u64;
        loop {
            let began = sampan_world::clock::monotonic();
            let ended = tokio::spawn(task()).await;
            starts += 1;
            let why = match ended {
                Ok(()) => "returned".to_string(),
                Err(e) if e.is_cancelled() => return,
                Err(e) => format!("panicked: {e}"),
            };
            if began.elapsed() > MAX_DELAY {
                delay = FIRST_DELAY;
            }
            tracing::error!(
                task = name,
                starts,
                "{name} {why}; starting it again in {} ms",
                delay.as_millis()
            );
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(MAX_DELAY);
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test(start_paused = true)]
    async fn a_panicking_task_is_started_again() {
        let runs = Arc::new(AtomicU32::new(0));
        let seen = runs.clone();
        let task = super::supervise("test", move || {
            let seen = seen.clone();
            async move {
                if seen.fetch_add(1, Ordering::SeqCst) < 3 {
                    panic!("on purpose");
                }
                std::future::pending::<()>().await;
            }
        });
        tokio::time::sleep(std::time::Duration::from_secs(30)).await;
        assert_eq!(runs.load(Ordering::SeqCst), 4);
        task.abort();
    }
}
