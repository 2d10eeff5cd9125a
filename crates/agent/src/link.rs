//! The agent's conversation with its region: polling goals, telling reports, hearing gossip.

use std::{sync::Arc, time::Duration};

use shoal_gossip::GossipEvent;
use shoal_proto::{
    goal::SignedGoal,
    gossip::GossipMessage,
    region::{OpenWave, RegionReply, RegionRequest},
};
use tokio::sync::mpsc;

use crate::{
    goals::{Accepted, Goals},
    machine::Machine,
    metrics::Metrics,
    regions::spread,
};

/// How long to wait after a poll that nobody answered.
const POLL_RETRY: Duration = Duration::from_secs(1);

/// How long reports are gathered before they go out.
const REPORT_GATHER: Duration = Duration::from_millis(100);

/// How long to wait after reports that nobody took, at first and at most.
const REPORT_RETRY_MIN: Duration = Duration::from_millis(500);
const REPORT_RETRY_MAX: Duration = Duration::from_secs(30);

/// How many apps are reported in one request: with their longest reasons they fit its limit.
const REPORTS_PER_REQUEST_MAX: usize = 200;

/// While something waits for its wave, the region is asked at least this often.
const WAVE_POLL: Duration = Duration::from_secs(2);

/// A region that says nothing sensible is asked again no sooner than this.
const POLL_FLOOR: Duration = Duration::from_millis(50);

/// Takes a goal and counts what became of it.
pub(crate) fn take_goal(goals: &Goals, metrics: &Metrics, signed: &SignedGoal, from: &str) {
    let result = match goals.accept(signed) {
        Accepted::Taken => "taken",
        Accepted::Old => "old",
        Accepted::NotForUs => "not_for_us",
        Accepted::Refused(reason) => {
            tracing::warn!(%from, %reason, "refused a goal");
            "refused"
        }
    };
    metrics.goals.with_label_values(&[result]).inc();
}

/// Polls for ever: the certain way in which a goal arrives.
pub(crate) async fn poll(machine: Arc<Machine>) {
    let mut wave_wanted = machine.wave_wanted.subscribe();
    loop {
        let request = RegionRequest::Poll {
            machine: machine.info.clone(),
            digest: machine.goals.digest(),
            reports_digest: machine.reports.digest(),
        };
        let reply = machine.regions.ask(&request).await;
        let (result, waves, after_ms, want_reports) = match reply {
            Ok(RegionReply::Unchanged { waves, poll_after_ms, want_reports }) => {
                ("unchanged", waves, poll_after_ms, want_reports)
            }
            Ok(RegionReply::Goals { goals, waves, poll_after_ms, want_reports }) => {
                tokio::task::block_in_place(|| {
                    for signed in &goals {
                        take_goal(&machine.goals, &machine.metrics, signed, "the region");
                    }
                });
                ("goals", waves, poll_after_ms, want_reports)
            }
            Ok(_) | Err(_) => {
                machine.metrics.polls.with_label_values(&["failed"]).inc();
                let pause =
                    if machine.regions.any_connected() { POLL_RETRY } else { POLL_RETRY / 4 };
                tokio::time::sleep(spread(pause)).await;
                continue;
            }
        };
        machine.metrics.polls.with_label_values(&[result]).inc();
        open_waves(&machine, waves);
        if want_reports {
            machine.reports.tell_again();
        }
        let after = machine
            .config
            .poll_s
            .map_or(Duration::from_millis(u64::from(after_ms)), Duration::from_secs_f64)
            .max(POLL_FLOOR);
        let waits =
            machine.reports.states().contains_key(&shoal_proto::state::MachineState::Verified);
        let after = if waits { after.min(WAVE_POLL) } else { after };
        tokio::select! {
            () = tokio::time::sleep(spread(after)) => {}
            // Something just came to wait for its wave. A whole fleet may have, at the same time.
            _ = wave_wanted.changed() => {
                let fleet = u64::from(*wave_wanted.borrow_and_update());
                let soon = Duration::from_millis(fleet).clamp(WAVE_POLL / 4, WAVE_POLL * 10);
                tokio::time::sleep(spread(soon).min(after)).await;
            }
        }
    }
}

fn open_waves(machine: &Machine, waves: Vec<OpenWave>) {
    machine.waves.send_if_modified(|open| {
        let mut changed = false;
        for wave in waves {
            let told = (wave.revision, wave.open_permille);
            // What was opened stays open: two region processes may differ for a moment.
            let newer = open.get(&wave.app).is_none_or(|known| told > *known);
            if newer {
                open.insert(wave.app, told);
                changed = true;
            }
        }
        changed
    });
}

/// Tells the region every state until it keeps it.
pub(crate) async fn report(machine: Arc<Machine>) {
    let mut retry = REPORT_RETRY_MIN;
    loop {
        let mut reports = machine.reports.pending();
        reports.truncate(REPORTS_PER_REQUEST_MAX);
        if reports.is_empty() {
            machine.reports.changed(REPORT_GATHER).await;
            continue;
        }
        let request =
            RegionRequest::Report { machine: machine.info.clone(), reports: reports.clone() };
        match machine.regions.ask(&request).await {
            Ok(RegionReply::Kept) => {
                machine.reports.kept(&reports);
                retry = REPORT_RETRY_MIN;
            }
            Ok(_) | Err(_) => {
                tokio::time::sleep(spread(retry)).await;
                retry = (retry * 2).min(REPORT_RETRY_MAX);
            }
        }
    }
}

/// Takes goals from the gossip topic: the fast way.
pub(crate) async fn gossip(machine: Arc<Machine>, mut events: mpsc::Receiver<GossipEvent>) {
    while let Some(event) = events.recv().await {
        match event {
            GossipEvent::Message { from, message: GossipMessage::Goal(signed) } => {
                let from = format!("gossip by {from}");
                tokio::task::block_in_place(|| {
                    take_goal(&machine.goals, &machine.metrics, &signed, &from);
                });
            }
            GossipEvent::Message { from, message: GossipMessage::Trust { number, hash } } => {
                machine.standing.gossiped(&machine.endpoint, &from, number, &hash);
            }
            GossipEvent::PeerVerified(member) => {
                tracing::debug!(machine = %member.machine, "gossip peer");
            }
            other => tracing::debug!(?other, "gossip"),
        }
    }
}
