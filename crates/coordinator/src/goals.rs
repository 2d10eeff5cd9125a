//! Making and signing goals.

use shoal_client::types;
use shoal_proto::{
    AppName, ArtifactId, EncodingId, Revision, codec,
    goal::{GOAL_MAX_BYTES, Goal, Selector},
    manifest::PieceSize,
};
use shoal_queue::{
    Actor, Bell, Choice, GoalDraft, QueueError, Result, Rollout, SealedGoal, Targets,
};

use crate::state::{Shared, hex, now_ms};

/// An artifact is a program, or data that may be read by all.
const FILE_MODE: u32 = 0o755;

/// The parts of a goal that come from the app; the others are as small as they get.
pub(crate) fn of_app(
    shared: &Shared,
    app: &types::App,
    selector: Selector,
    rollback: bool,
) -> Goal {
    let mut plan = app.plan.clone();
    plan.rollback = rollback;
    Goal {
        cluster: shared.membership.trust().cluster().into(),
        app: app.name.clone(),
        revision: Revision::default(),
        selector,
        regions: Vec::new(),
        artifact: ArtifactId::EMPTY,
        size_bytes: 0,
        piece_size: PieceSize::MIN,
        encoding: EncodingId([0; 32]),
        file_mode: FILE_MODE,
        activation: app.activation.clone(),
        health: app.health.clone(),
        plan,
        priority: app.priority,
        machines_estimate: 0,
        issued_at_ms: 0,
    }
}

/// Signs the goal of a draft.
fn seal(
    shared: &Shared,
    draft: &GoalDraft<'_>,
    (app, selector): (&types::App, &Selector),
    targets: Targets,
    rollback: bool,
) -> Result<SealedGoal> {
    let refused = QueueError::Refused;
    let stored = &draft.artifact.stored;
    let largest = targets.values().max().copied().unwrap_or_default();
    let piece_size = PieceSize::from_bytes(stored.piece_size_bytes).ok_or_else(|| {
        QueueError::Corrupt(format!("pieces of {} bytes", stored.piece_size_bytes))
    })?;
    let goal = Goal {
        revision: draft.revision,
        artifact: stored.artifact,
        size_bytes: stored.size_bytes,
        piece_size,
        encoding: stored.encoding,
        machines_estimate: u32::try_from(largest).unwrap_or(u32::MAX),
        issued_at_ms: u64::try_from(now_ms()).unwrap_or_default(),
        ..of_app(shared, app, selector.clone(), rollback)
    };
    let signed = shared.signer()?.sign_goal(&goal).map_err(|error| refused(error.to_string()))?;
    let bytes =
        codec::encode(&signed, GOAL_MAX_BYTES).map_err(|error| refused(error.to_string()))?;
    Ok(SealedGoal { signed: hex(&bytes), selector: selector.to_string(), plan: goal.plan, targets })
}

fn read_app(spec: &str) -> Result<(types::App, Selector)> {
    let app: types::App =
        serde_json::from_str(spec).map_err(|error| QueueError::Corrupt(error.to_string()))?;
    let selector = app.selector.parse().map_err(QueueError::Corrupt)?;
    Ok((app, selector))
}

/// Gives an app its next goal, and wakes all who wait for it.
pub(crate) async fn set(
    shared: &Shared,
    app: &AppName,
    choice: &Choice,
    rollback: bool,
    actor: &Actor,
) -> Result<Rollout> {
    if let Some(why) = shared.recovering() {
        return Err(QueueError::Conflict(why));
    }
    shared.registry.refresh(&shared.queue).await?;
    let (_, selector) = read_app(&shared.queue.app(app).await?.spec)?;
    let targets = shared.registry.targets(&selector).await;
    let sealer = |draft: &GoalDraft<'_>| {
        let (app, now_selects) = read_app(&draft.app.spec)?;
        if now_selects != selector {
            let text = format!("{} was changed at this moment: deploy again", app.name);
            return Err(QueueError::Conflict(text));
        }
        seal(shared, draft, (&app, &selector), targets, rollback)
    };
    let rollout = shared.queue.set_goal(app, choice, rollback, sealer, actor, now_ms()).await?;
    let kind = if rollback { "rollback" } else { "deploy" };
    shared.metrics.goals.with_label_values(&[kind]).inc();
    shared.ring(Bell::Goals);
    shared.ring(Bell::Rollouts);
    tracing::info!(
        app = %rollout.app, revision = %rollout.revision, artifact = rollout.artifact_name,
        by = actor.name, kind, "goal set"
    );
    Ok(rollout)
}
