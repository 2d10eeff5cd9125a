//! A region process's calls: goals down, reports up. The region is the certificate's.

use std::collections::BTreeSet;

use axum::http::StatusCode;
use shoal_client::types;
use shoal_pki::Member;
use shoal_proto::{RegionName, goal::check_label};
use shoal_queue::{Bell, MachineSeen, StateSeen, WaveSeen};

use super::{App, Args, Batch, Peer, Reply, done};
use crate::{
    error::{ApiError, ApiResult},
    state::{Shared, bell, now_ms},
};

/// The longest text of a machine that is kept, such as its version or address, in bytes.
const TEXT_MAX_BYTES: usize = 255;

/// The most waves of a batch.
const WAVES_MAX: usize = 1_000;

/// The most labels of a machine.
const LABELS_MAX: usize = 64;

/// The caller's region, if the configuration has it, and notes that its process is alive.
pub(super) async fn region_of(shared: &Shared, member: &Member) -> ApiResult<RegionName> {
    let forbidden = |text: String| ApiError::new(StatusCode::FORBIDDEN, "forbidden", text);
    let region = member.region.clone().ok_or_else(|| {
        forbidden("your certificate names no region: issue one with --region".into())
    })?;
    if !shared.buckets.contains_key(&region) {
        return Err(forbidden(format!(
            "region '{region}' is not in the coordinator's configuration: add it under [[regions]]"
        )));
    }
    if shared.is_seen_due(&region, &member.machine) {
        shared.queue.region_process_seen(&region, &member.machine, now_ms()).await?;
    }
    Ok(region)
}

pub(super) async fn goals(
    shared: App,
    Peer(member): Peer,
    Args(query): Args<types::GoalsQuery>,
) -> Reply<types::GoalsReply> {
    let region = region_of(&shared, &member).await?;
    shared.epoch_told(&region, query.highest_epoch);
    let after = i64::try_from(query.after).unwrap_or(i64::MAX);
    let poll = shared.long_poll(query.wait_s);
    let found = loop {
        let bell = bell(&shared.goals_moved);
        let found = shared.queue.goals_after(after).await?;
        if found.cursor != after || !poll.wait(bell).await {
            break found;
        }
    };
    Ok(axum::Json(types::GoalsReply {
        cursor: u64::try_from(found.cursor).unwrap_or_default(),
        goals: found.signed,
        halted: found.halted,
    }))
}

fn before(now_ms: i64, age_ms: u64) -> i64 {
    now_ms.saturating_sub(i64::try_from(age_ms).unwrap_or(i64::MAX)).max(0)
}

fn check_machine(machine: &types::MachineSeen) -> Result<(), String> {
    let texts = [&machine.zone, &machine.version, &machine.address];
    if texts.iter().any(|text| text.len() > TEXT_MAX_BYTES) || machine.labels.len() > LABELS_MAX {
        return Err(format!(
            "machine {}: texts are at most {TEXT_MAX_BYTES} bytes, labels at most {LABELS_MAX}",
            machine.name
        ));
    }
    machine
        .labels
        .iter()
        .try_for_each(|(key, value)| check_label(key).and_then(|()| check_label(value)))
}

/// Reads which waves a region process has opened.
fn waves(opened: Vec<types::WaveOpened>, now_ms: i64) -> Result<Vec<WaveSeen>, String> {
    if opened.len() > WAVES_MAX {
        return Err(format!("a batch tells of {WAVES_MAX} waves at most"));
    }
    let seen = |wave: types::WaveOpened| match wave.open_permille {
        1..=1_000 => Ok(WaveSeen {
            app: wave.app,
            revision: wave.revision,
            open_permille: wave.open_permille,
            opened_at_ms: before(now_ms, wave.age_ms),
        }),
        _ => Err(format!("open_permille of {} is not 1 to 1000", wave.app)),
    };
    opened.into_iter().map(seen).collect()
}

pub(super) async fn reports(
    shared: App,
    Peer(member): Peer,
    Batch(batch): Batch<types::RegionReports>,
) -> Reply<types::Done> {
    let region = region_of(&shared, &member).await?;
    let now = now_ms();
    let waves = waves(batch.waves, now).map_err(ApiError::invalid)?;
    let mut machines = Vec::with_capacity(batch.machines.len());
    let trust = shared.membership.trust();
    let revoked =
        |machine: &types::MachineSeen| machine.node.is_some_and(|node| trust.is_revoked(&node));
    let gone: BTreeSet<_> =
        batch.machines.iter().filter(|machine| revoked(machine)).map(|m| m.name.clone()).collect();
    for machine in batch.machines.into_iter().filter(|machine| !gone.contains(&machine.name)) {
        check_machine(&machine).map_err(ApiError::invalid)?;
        machines.push(MachineSeen {
            name: machine.name,
            zone: machine.zone,
            labels: machine.labels,
            version: machine.version,
            address: machine.address,
            node: machine.node,
            last_seen_ms: before(now, machine.age_ms),
        });
    }
    let believed = batch.reports.into_iter().filter(|seen| !gone.contains(&seen.machine));
    let states = believed.map(|seen| StateSeen {
        machine: seen.machine,
        state_at_ms: before(now, seen.report.age_ms),
        report: seen.report,
    });
    let states: Vec<_> = states.collect();
    // Before the reports: of machines that these waves let activate.
    if shared.queue.keep_waves(&region, &member.machine, &waves).await? > 0 {
        shared.ring(Bell::Events);
    }
    let kept = shared.queue.keep_reports(&region, &machines, &states).await?;
    let count = |result, count| {
        shared.metrics.reports.with_label_values(&[region.as_str(), result]).inc_by(count);
    };
    count("new", kept);
    count("stale", (states.len() as u64).saturating_sub(kept));
    shared.ring(Bell::Rollouts);
    Ok(done())
}
