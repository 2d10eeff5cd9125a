//! The way of a commit to every machine, of which the swarm is one part: what the other parts take is given.

use serde::{Deserialize, Serialize};

use crate::units::{Part, Rate, Seconds};

/// What the parts around the swarm take: the `[pipeline]` section of a scenario file. Every key is required,
/// because each is a claim that the file has to give the reason for.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pipeline {
    /// Until a waiting worker has the job.
    job_wait: Seconds,
    /// Build, cut into pieces, store in the main bucket.
    build: Seconds,
    /// Regions that the artifact is copied to, all at once.
    regions: u32,
    /// What the main bucket gives out, to all regions together.
    main_line: Rate,
    /// What one region's copy gets at most.
    region_line: Rate,
    /// The part of those that a copy reaches.
    reached: Part,
    /// Until the coordinator has seen that every region's copy is complete.
    replication_wait: Seconds,
    /// Until the region has the new goal.
    goal_poll: Seconds,
    /// Switch over, start, health check, report.
    activation: Seconds,
}

/// One part of the pipeline.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Step {
    pub(crate) part: &'static str,
    #[serde(rename = "s")]
    pub(crate) seconds: f64,
}

impl Pipeline {
    /// All parts in order, when the swarm brings `bytes` to every machine in `swarm_s` seconds.
    pub(crate) fn steps(&self, bytes: u64, swarm_s: f64) -> Vec<Step> {
        let step = |part, seconds| Step { part, seconds };
        vec![
            step("queue", self.job_wait.0),
            step("build", self.build.0),
            step("replication", self.copy_s(bytes) + self.replication_wait.0),
            step("goal", self.goal_poll.0),
            step("swarm", swarm_s),
            step("activation", self.activation.0),
        ]
    }

    /// All regions are copied to at once, and share the main bucket's line evenly.
    fn copy_s(&self, bytes: u64) -> f64 {
        let share = self.main_line.0 as f64 / f64::from(self.regions.max(1));
        let rate = share.min(self.region_line.0 as f64) * self.reached.0;
        bytes as f64 * 8.0 / rate
    }
}

/// What all parts take together.
pub(crate) fn total_s(steps: &[Step]) -> f64 {
    steps.iter().map(|step| step.seconds).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_add_up() {
        let pipeline = Pipeline {
            job_wait: Seconds(5.0),
            build: Seconds(900.0),
            regions: 10,
            main_line: Rate(5_000_000_000),
            region_line: Rate(1_000_000_000),
            reached: Part(0.8),
            replication_wait: Seconds(2.0),
            goal_poll: Seconds(3.0),
            activation: Seconds(10.0),
        };
        // Ten regions share 5 Gbit/s: 0.4 Gbit/s reach each.
        let steps = pipeline.steps(10_000_000_000, 90.0);
        let seconds: Vec<f64> = steps.iter().map(|step| step.seconds).collect();
        assert_eq!(seconds, [5.0, 900.0, 202.0, 3.0, 90.0, 10.0]);
        assert_eq!(total_s(&steps), 1210.0);
        // Two regions have more of it than their own lines take.
        let two = Pipeline { regions: 2, ..pipeline };
        assert_eq!(two.steps(10_000_000_000, 90.0)[2].seconds, 102.0);
    }
}
