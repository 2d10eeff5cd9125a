//! What the agent's metrics page shows.

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};
use shoal_process::Meters;

/// The agent's metrics; the names are documented in the README.
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    /// Stored piece bytes received, by `source` (`peer`, `origin`).
    pub(crate) received_bytes: IntCounterVec,
    /// Stored piece bytes sent to neighbours.
    pub(crate) sent_bytes: IntCounter,
    /// Fetches that ended, by `outcome`.
    pub(crate) fetches: IntCounterVec,
    /// Requests for pieces that were answered BUSY.
    pub(crate) busy: IntCounter,
    /// Neighbours connected.
    pub(crate) neighbours: IntGauge,
    /// Neighbours cut off for wrong pieces.
    pub(crate) banned: IntCounter,
    /// Goals that arrived, by `result` (`taken`, `old`, `not_for_us`, `refused`).
    pub(crate) goals: IntCounterVec,
    /// Polls of the region, by `result` (`goals`, `unchanged`, `failed`).
    pub(crate) polls: IntCounterVec,
    /// Apps by their machine state.
    pub(crate) apps: IntGaugeVec,
    /// Peers of the gossip mesh.
    pub(crate) gossip_peers: IntGauge,
    /// Bytes of the data plane's UDP buffers, by `which`: `asked` for, and given to `receive` and to `send`.
    pub(crate) udp_buffer_bytes: IntGaugeVec,
    /// Datagrams that the kernel dropped because the buffer was full.
    pub(crate) udp_dropped: IntCounter,
    /// Limits in force in bytes a second, 0 for none, by `way` (`up`, `down`, `origin`); so for the next two.
    pub(crate) limits: IntGaugeVec,
    /// Piece bytes that had to wait for a limit.
    pub(crate) held_back_bytes: IntCounterVec,
    /// For how long something had to wait for a limit.
    pub(crate) held_back_ms: IntCounterVec,
    /// Whether what is sent yields to other traffic: 1 or 0.
    pub(crate) scavenger: IntGauge,
}

impl Metrics {
    pub(crate) fn new() -> prometheus::Result<Self> {
        let meters = Meters::default();
        Ok(Self {
            received_bytes: meters.counters(
                "shoal_agent_received_bytes_total",
                "Stored piece bytes received, from neighbours (peer) or the bucket (origin).",
                "source",
            )?,
            sent_bytes: meters.counter(
                "shoal_agent_sent_bytes_total",
                "Stored piece bytes sent to neighbours.",
            )?,
            fetches: meters.counters(
                "shoal_agent_fetches_total",
                "Piece fetches that ended.",
                "outcome",
            )?,
            busy: meters.counter(
                "shoal_agent_busy_total",
                "Requests for pieces that were answered BUSY.",
            )?,
            neighbours: meters
                .gauge("shoal_agent_neighbours", "Neighbours connected on the data plane.")?,
            banned: meters
                .counter("shoal_agent_banned_total", "Neighbours cut off for wrong pieces.")?,
            goals: meters.counters(
                "shoal_agent_goals_total",
                "Goals that arrived, by what became of them.",
                "result",
            )?,
            polls: meters.counters("shoal_agent_polls_total", "Polls of the region.", "result")?,
            gossip_peers: meters
                .gauge("shoal_agent_gossip_peers", "Verified peers on the gossip plane.")?,
            udp_buffer_bytes: meters.gauges(
                "shoal_agent_udp_buffer_bytes",
                "UDP buffers of the data plane: asked for, and given to receive and send. Where less is given, raise \
                 net.core.rmem_max and net.core.wmem_max.",
                "which",
            )?,
            udp_dropped: meters.counter(
                "shoal_agent_udp_dropped_total",
                "Datagrams that the kernel dropped because the UDP buffer of the data plane was full.",
            )?,
            apps: meters.gauges(
                "shoal_agent_apps",
                "Apps by what this machine does about their goal.",
                "state",
            )?,
            limits: meters.gauges(
                "shoal_agent_limit_bytes_per_second",
                "Limits on piece bytes in force; 0 for none.",
                "way",
            )?,
            held_back_bytes: meters.counters(
                "shoal_agent_held_back_bytes_total",
                "Piece bytes that had to wait for a limit.",
                "way",
            )?,
            held_back_ms: meters.counters(
                "shoal_agent_held_back_milliseconds_total",
                "For how long something had to wait for a limit.",
                "way",
            )?,
            scavenger: meters
                .gauge("shoal_agent_scavenger", "Whether what is sent yields to other traffic.")?,
            registry: meters.registry,
        })
    }
}
