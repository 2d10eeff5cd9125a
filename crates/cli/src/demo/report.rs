//! The demo's end: one JSON object, or tables.

use std::collections::BTreeMap;

use serde::Serialize;
use shoal_client::types::{Artifact, Job, Replication, Rollout, RolloutRegion};
use shoal_proto::{
    ArtifactId, RegionName,
    state::{JobStatus, MachineState, ReplicationStatus},
};

use crate::show;

/// What the demo found, as `--json` prints it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Whether every agent runs the right bytes, and answers with the version where it can.
    pub(super) ok: bool,
    /// Hex BLAKE3, equal to b3sum of the file.
    pub(super) artifact: ArtifactId,
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) encoded_bytes: u64,
    pub(super) piece_size_bytes: u64,
    pub(super) pieces: u32,
    /// None when a file was published.
    pub(super) job: Option<JobReport>,
    pub(super) replication: BTreeMap<RegionName, ReplicationReport>,
    pub(super) regions: BTreeMap<RegionName, RegionReport>,
    pub(super) peer_bytes: u64,
    pub(super) wall_s: f64,
    pub(super) agent_peak_rss_anon_bytes_max: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct JobReport {
    pub(super) id: i64,
    pub(super) status: JobStatus,
    pub(super) queued_s: Option<f64>,
    pub(super) build_s: Option<f64>,
}

#[derive(Debug, Serialize)]
pub(super) struct ReplicationReport {
    pub(super) status: ReplicationStatus,
    /// From the artifact's existence in the main bucket to its copy's end.
    pub(super) seconds: Option<f64>,
}

#[derive(Debug, Serialize)]
pub(super) struct RegionReport {
    pub(super) machines: u64,
    pub(super) active: u64,
    pub(super) failed: u64,
    pub(super) origin_bytes: u64,
    pub(super) origin_copies: f64,
    /// From the deployment on.
    pub(super) first_active_s: Option<f64>,
    pub(super) last_active_s: Option<f64>,
}

/// One agent, for people.
#[derive(Debug)]
pub(super) struct AgentReport {
    pub(super) name: String,
    pub(super) region: RegionName,
    pub(super) zone: String,
    pub(super) state: Option<MachineState>,
    /// What was found when it was looked at: the hash of its file.
    pub(super) hash: Result<ArtifactId, String>,
    /// What its program said, and whether that is right; none when it was not asked.
    pub(super) answer: Option<Result<String, String>>,
    /// Whether all of it is as it should be.
    pub(super) ok: bool,
}

fn seconds(value: Option<f64>) -> String {
    value.map_or("-".into(), |seconds| format!("{seconds:.1} s"))
}

/// The first digits of a hash or SHA.
fn short(text: &str) -> &str {
    text.get(..12).unwrap_or(text)
}

/// The report as tables.
pub(super) fn tables(report: &Report, agents: &[AgentReport]) -> String {
    let mut machines = show::table(&["MACHINE", "REGION", "ZONE", "STATE", "B3SUM", "VERSION", ""]);
    for agent in agents {
        let version = match &agent.answer {
            None => "-".into(),
            Some(Ok(version)) => short(version).to_string(),
            Some(Err(error)) => error.clone(),
        };
        machines.add_row([
            agent.name.clone(),
            agent.region.to_string(),
            agent.zone.clone(),
            agent.state.map_or("no report".into(), |state| state.to_string()),
            match &agent.hash {
                Ok(hash) => short(&hash.to_string()).to_string(),
                Err(error) => error.clone(),
            },
            version,
            if agent.ok { "ok" } else { "WRONG" }.into(),
        ]);
    }
    let mut regions = show::table(&[
        "REGION",
        "REPLICATED",
        "MACHINES",
        "ACTIVE",
        "FAILED",
        "FROM BUCKET",
        "COPIES",
        "FIRST",
        "LAST",
    ]);
    for (name, region) in &report.regions {
        let copied = report.replication.get(name).and_then(|copy| copy.seconds);
        regions.add_row([
            name.to_string(),
            seconds(copied),
            region.machines.to_string(),
            region.active.to_string(),
            region.failed.to_string(),
            show::size(region.origin_bytes),
            format!("{:.2}", region.origin_copies),
            seconds(region.first_active_s),
            seconds(region.last_active_s),
        ]);
    }
    let mut lines = vec![
        format!("artifact   {} ({})", report.artifact, report.name),
        format!(
            "size       {}, stored {} in {} pieces of {}",
            show::size(report.size_bytes),
            show::size(report.encoded_bytes),
            report.pieces,
            show::size(report.piece_size_bytes)
        ),
    ];
    if let Some(job) = &report.job {
        let (queued, build) = (seconds(job.queued_s), seconds(job.build_s));
        lines.push(format!(
            "job        {} {}: queued {queued}, built in {build}",
            job.id, job.status
        ));
    }
    lines.push(format!("peers      {} from neighbours", show::size(report.peer_bytes)));
    lines.push(format!(
        "memory     {} at most in an agent",
        show::size(report.agent_peak_rss_anon_bytes_max)
    ));
    lines.push(format!("wall time  {:.1} s", report.wall_s));
    let regions = show::render(&regions, "");
    let machines = show::render(&machines, "");
    format!("\n{}\n\n{regions}\n\n{machines}\n", lines.join("\n"))
}

pub(super) fn job_report(job: &Job) -> JobReport {
    JobReport {
        id: job.id,
        status: job.status,
        queued_s: show::seconds_between(Some(job.created_at_ms), job.started_at_ms),
        build_s: show::seconds_between(job.started_at_ms, job.finished_at_ms),
    }
}

pub(super) fn replication_report(artifact: &Artifact) -> BTreeMap<RegionName, ReplicationReport> {
    let report = |copy: &Replication| ReplicationReport {
        status: copy.status,
        seconds: show::seconds_between(Some(artifact.created_at_ms), copy.finished_at_ms),
    };
    artifact.replication.iter().map(|(name, copy)| (name.clone(), report(copy))).collect()
}

pub(super) fn region_reports(rollout: &Rollout) -> BTreeMap<RegionName, RegionReport> {
    let report = |region: &RolloutRegion| {
        let count = |wanted: fn(MachineState) -> bool| {
            region.states.iter().filter(|(state, _)| wanted(**state)).map(|(_, count)| count).sum()
        };
        let since = |at| show::seconds_between(Some(rollout.created_at_ms), at);
        RegionReport {
            machines: region.machines,
            active: count(MachineState::is_success),
            failed: count(MachineState::is_failure),
            origin_bytes: region.origin_bytes,
            origin_copies: region.origin_copies,
            first_active_s: since(region.first_active_at_ms),
            last_active_s: since(region.last_active_at_ms),
        }
    };
    rollout.regions.iter().map(|(name, region)| (name.clone(), report(region))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_the_documented_fields() {
        let region = RegionName::new("region-1").unwrap();
        let report = Report {
            ok: true,
            artifact: ArtifactId::EMPTY,
            name: "demo/aaaaaaaaaaaa-1".into(),
            size_bytes: 1,
            encoded_bytes: 1,
            piece_size_bytes: 1,
            pieces: 1,
            job: Some(JobReport {
                id: 1,
                status: JobStatus::Succeeded,
                queued_s: Some(0.1),
                build_s: Some(1.0),
            }),
            replication: BTreeMap::from([(
                region.clone(),
                ReplicationReport { status: ReplicationStatus::Complete, seconds: Some(0.5) },
            )]),
            regions: BTreeMap::from([(
                region,
                RegionReport {
                    machines: 4,
                    active: 4,
                    failed: 0,
                    origin_bytes: 1,
                    origin_copies: 1.0,
                    first_active_s: Some(1.0),
                    last_active_s: Some(2.0),
                },
            )]),
            peer_bytes: 3,
            wall_s: 9.0,
            agent_peak_rss_anon_bytes_max: 1,
        };
        let value = serde_json::to_value(&report).unwrap();
        let keys = |value: &serde_json::Value| -> Vec<String> {
            value.as_object().unwrap().keys().cloned().collect()
        };
        let mut fields = keys(&value);
        fields.sort();
        let mut expected = [
            "ok",
            "artifact",
            "name",
            "size_bytes",
            "encoded_bytes",
            "piece_size_bytes",
            "pieces",
            "job",
            "replication",
            "regions",
            "peer_bytes",
            "wall_s",
            "agent_peak_rss_anon_bytes_max",
        ];
        expected.sort_unstable();
        assert_eq!(fields, expected);
        assert_eq!(keys(&value["job"]).len(), 4);
        assert_eq!(value["job"]["status"], "SUCCEEDED");
        assert_eq!(value["replication"]["region-1"]["status"], "COMPLETE");
        assert_eq!(keys(&value["regions"]["region-1"]).len(), 7);
        assert!(tables(&report, &[]).contains("1.00"));
    }
}
