//! Whether an artifact may be deployed: one state and one reason, for the API and for who sets goals.

use shoal_proto::{
    RegionName,
    state::ReplicationStatus::{self, Complete, Copying, Failed, Pending},
};

use crate::{
    artifacts::{Artifact, Deleted},
    db::{Write, get, parsed, parsed_opt},
    error::Result,
    regions::Region,
};

/// The longest reason of one copy's failure that goes into the reason of the whole, in characters.
const REASON_MAX_CHARS: usize = 200;

/// How an artifact is in the regions that are in service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The state of all copies that count: the least advanced one.
    pub status: ReplicationStatus,
    /// Why it may not be deployed; none when it may.
    pub reason: Option<String>,
}

/// A copy that counts.
#[derive(Debug)]
pub(crate) struct Counts {
    pub(crate) region: RegionName,
    pub(crate) status: ReplicationStatus,
    pub(crate) reason: Option<String>,
    pub(crate) damaged: bool,
}

/// The state of all copies that count: the least advanced one.
fn overall(copies: &[Counts]) -> ReplicationStatus {
    let any = |status| copies.iter().any(|copy| copy.status == status);
    if any(Failed) {
        Failed
    } else if any(Copying) {
        Copying
    } else if any(Pending) {
        // Some are done and the others wait for their turn: under way.
        if any(Complete) { Copying } else { Pending }
    } else {
        Complete
    }
}

fn cut(text: &str) -> String {
    text.chars().take(REASON_MAX_CHARS).collect()
}

/// Judges an artifact by what became of it, of its objects in the main bucket, and of its copies that count.
pub(crate) fn judge(deleted: Option<&Deleted>, main: Option<&str>, copies: &[Counts]) -> Standing {
    let status = overall(copies);
    if let Some(deleted) = deleted {
        return Standing { status, reason: Some(deleted.to_string()) };
    }
    let mut reasons = Vec::new();
    if let Some(damage) = main {
        reasons.push(format!("the main bucket {}; it is being repaired", cut(damage)));
    }
    for copy in copies.iter().filter(|copy| copy.damaged) {
        let what = copy.reason.as_deref().unwrap_or("lost some of it");
        reasons.push(format!("region {} {}; it is being repaired", copy.region, cut(what)));
    }
    let missing: Vec<_> = copies
        .iter()
        .filter(|copy| copy.status != Complete && !copy.damaged)
        .map(|copy| match &copy.reason {
            Some(reason) => format!("{} ({}: {})", copy.region, copy.status, cut(reason)),
            None => format!("{} ({})", copy.region, copy.status),
        })
        .collect();
    if !missing.is_empty() {
        reasons.push(format!("not yet copied to: {}", missing.join(", ")));
    }
    // With a damaged main bucket it is not deployable without the region either.
    let first = copies.iter().find(|copy| copy.status != Complete && main.is_none());
    if let (Some(first), Some(last)) = (first, reasons.last_mut()) {
        last.push_str(&format!(
            "; wait until it is COMPLETE there, or take the region out of service with: shoal drain {}",
            first.region
        ));
    }
    Standing { status, reason: (!reasons.is_empty()).then(|| reasons.join("; ")) }
}

impl Artifact {
    /// How it is in the regions that are in service.
    #[must_use]
    pub fn standing(&self, regions: &[Region]) -> Standing {
        let in_service = regions.iter().filter(|region| region.drain.is_none());
        let copies: Vec<_> = in_service
            .map(|region| match self.copies.get(&region.name) {
                Some(copy) => Counts {
                    region: region.name.clone(),
                    status: copy.status,
                    reason: copy.reason.clone(),
                    damaged: copy.damaged_at_ms.is_some(),
                },
                None => Counts {
                    region: region.name.clone(),
                    status: Pending,
                    reason: None,
                    damaged: false,
                },
            })
            .collect();
        judge(self.deleted.as_ref(), self.main_damage.as_deref(), &copies)
    }
}

/// [`Artifact::standing`] in a transaction, as it is now.
pub(crate) async fn standing_in(tx: &mut Write, artifact: &Artifact) -> Result<Standing> {
    let rows = sqlx::query(
        "SELECT r.name AS region, c.status, c.reason, c.damaged_at, \
         (SELECT damage FROM encodings WHERE artifact = $1 AND encoding = $2) AS damage \
         FROM regions r LEFT JOIN replications c \
         ON c.region = r.name AND c.artifact = $1 AND c.encoding = $2 AND c.removing = 0 \
         WHERE r.configured = 1 AND r.drained = 0 ORDER BY r.name",
    )
    .bind(artifact.stored.artifact.to_string())
    .bind(artifact.stored.encoding.to_string())
    .fetch_all(&mut **tx)
    .await?;
    let mut copies = Vec::with_capacity(rows.len());
    for row in &rows {
        copies.push(Counts {
            region: parsed(row, "region")?,
            status: parsed_opt(row, "status")?.unwrap_or(Pending),
            reason: get(row, "reason")?,
            damaged: get::<Option<i64>>(row, "damaged_at")?.is_some(),
        });
    }
    let main: Option<String> = match rows.first() {
        Some(row) => get(row, "damage")?,
        // Without a region in service there is no row to say it.
        None => main_damage(tx, artifact).await?,
    };
    Ok(judge(artifact.deleted.as_ref(), main.as_deref(), &copies))
}

async fn main_damage(tx: &mut Write, artifact: &Artifact) -> Result<Option<String>> {
    let row = sqlx::query("SELECT damage FROM encodings WHERE artifact = $1 AND encoding = $2")
        .bind(artifact.stored.artifact.to_string())
        .bind(artifact.stored.encoding.to_string())
        .fetch_optional(&mut **tx)
        .await?;
    row.map_or(Ok(None), |row| get(&row, "damage"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(status: ReplicationStatus, reason: Option<&str>, damaged: bool) -> Counts {
        let region = RegionName::new("eu").unwrap();
        Counts { region, status, reason: reason.map(Into::into), damaged }
    }

    #[test]
    fn an_artifact_is_as_far_as_its_slowest_region() {
        let of = |states: &[ReplicationStatus]| {
            let copies: Vec<_> = states.iter().map(|status| copy(*status, None, false)).collect();
            judge(None, None, &copies).status
        };
        assert_eq!(of(&[Complete, Complete]), Complete);
        assert_eq!(of(&[Complete, Pending]), Copying);
        assert_eq!(of(&[Pending, Pending]), Pending);
        assert_eq!(of(&[Copying, Complete]), Copying);
        assert_eq!(of(&[Failed, Complete, Copying]), Failed);
        assert_eq!(of(&[]), Complete, "no region holds it up");
    }

    #[test]
    fn the_reason_says_which_bucket_and_what() {
        let reason = |main, copies: &[Counts]| judge(None, main, copies).reason;
        assert_eq!(reason(None, &[copy(Complete, None, false)]), None);
        let text = reason(None, &[copy(Pending, None, false)]).unwrap();
        assert!(text.contains("eu (PENDING)") && text.contains("shoal drain eu"), "{text}");
        let text = reason(None, &[copy(Failed, Some("lost part-00001"), true)]).unwrap();
        assert!(text.starts_with("region eu lost part-00001; it is being repaired"), "{text}");
        let text = reason(Some("lost its index"), &[copy(Complete, None, false)]).unwrap();
        assert_eq!(text, "the main bucket lost its index; it is being repaired");
        // Without the region it would not be deployable either.
        let text = reason(Some("lost its index"), &[copy(Failed, Some("lost part 1"), true)]);
        assert!(!text.unwrap().contains("shoal drain"));
    }
}
