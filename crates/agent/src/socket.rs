//! Watches what the kernel drops for want of room in the data plane's socket, and says what to raise.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use shoal_transport::{Endpoint, SocketBuffers};

use crate::metrics::Metrics;

/// How often the kernel's count is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How often the log says so at most: drops come in thousands, and the counter has them all.
const WARN_EVERY: Duration = Duration::from_secs(600);

/// Sets the gauges of the socket's buffers, and then counts its drops for ever.
pub(crate) async fn watch(endpoint: Endpoint, metrics: Arc<Metrics>) {
    let buffers = endpoint.socket_buffers();
    for (which, bytes) in [
        ("asked", buffers.asked_bytes),
        ("receive", buffers.receive_bytes),
        ("send", buffers.send_bytes),
    ] {
        metrics.udp_buffer_bytes.with_label_values(&[which]).set(bytes as i64);
    }
    let mut seen = 0;
    let mut warned: Option<Instant> = None;
    loop {
        let counting = endpoint.clone();
        // The table is a file of the kernel's, with a line for each socket of the machine.
        match tokio::task::spawn_blocking(move || counting.dropped_datagrams()).await {
            Ok(Ok(dropped)) if dropped > seen => {
                metrics.udp_dropped.inc_by(dropped - seen);
                seen = dropped;
                if warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY) {
                    warned = Some(Instant::now());
                    let advice = advice(&buffers);
                    tracing::warn!(
                        dropped,
                        advice,
                        "the kernel dropped packets: the UDP buffer was full"
                    );
                }
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "the kernel does not say what it dropped: not counted");
                return;
            }
            // The agent is stopping.
            Err(_) => return,
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What to do about drops.
fn advice(buffers: &SocketBuffers) -> String {
    match buffers.advice() {
        Some(settings) => {
            format!("raise the kernel's limits and restart the agent: sysctl -w {settings}")
        }
        None => "the buffer is as large as asked for: give the agent more CPU".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_is_a_command_only_where_one_helps() {
        let mut buffers =
            SocketBuffers { asked_bytes: 4096, receive_bytes: 4096, send_bytes: 4096 };
        assert!(advice(&buffers).contains("CPU"));
        buffers.receive_bytes = 1024;
        assert!(advice(&buffers).ends_with("sysctl -w net.core.rmem_max=4096"));
    }
}
