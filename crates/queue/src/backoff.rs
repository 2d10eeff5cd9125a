//! How long a job waits before another attempt.

/// How long a job waits before another attempt: not at all before its second one, since what failed is most often one
/// worker; then longer each time, since it is not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    /// Before the third attempt, in milliseconds; doubled with each one after it.
    pub first_ms: u64,
    /// At most, in milliseconds.
    pub max_ms: u64,
    /// 0 to 1, drawn anew for each call: takes off up to half, so that jobs that failed together do not come back
    /// together.
    pub random: f64,
}

impl Backoff {
    /// How long to wait after `attempt` has ended, in milliseconds.
    #[must_use]
    pub fn after(&self, attempt: u32) -> u64 {
        let Some(doublings) = attempt.checked_sub(2) else { return 0 };
        // 2^63 of anything is beyond every maximum.
        let factor = 1_u64 << doublings.min(62);
        let longest = self.first_ms.saturating_mul(factor).min(self.max_ms);
        (longest as f64 * (1.0 - self.random.clamp(0.0, 1.0) / 2.0)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_with_the_third_attempt_and_has_an_end() {
        let slow = Backoff { first_ms: 10, max_ms: 300, random: 0.0 };
        let waits: Vec<_> = [0, 1, 2, 3, 4, 6, 7, 100, u32::MAX].map(|at| slow.after(at)).into();
        assert_eq!(waits, [0, 0, 10, 20, 40, 160, 300, 300, 300]);
        let half = Backoff { random: 1.0, ..slow };
        assert_eq!([half.after(1), half.after(2), half.after(9)], [0, 5, 150]);
    }
}
