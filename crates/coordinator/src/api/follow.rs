//! What starts by itself: whose pushes build an app, and whether its main branch is deployed.

use shoal_client::types::{self, AutoDeploySwitch};
use shoal_proto::AppName;
use shoal_queue::{Bell, PushSource};

use super::{App, Json, Place, Reply, Who, apps, done, webhooks};
use crate::{
    error::{ApiError, ApiResult},
    hooks::canonical,
    state::{Shared, now_ms},
};

/// The longest name of a branch or a repository, in bytes.
const NAME_MAX_BYTES: usize = 1_000;

/// Whose secret an app's is.
pub(super) fn owner(app: &AppName) -> String {
    format!("push {app}")
}

fn view(app: &types::App, source: PushSource) -> types::PushSettings {
    let own = || canonical(&app.repository);
    let repository = Some(source.repository).filter(|text| !text.is_empty()).unwrap_or_else(own);
    types::PushSettings {
        app: source.app,
        branch: source.branch,
        repository,
        updated_at_ms: source.updated_at_ms,
    }
}

pub(super) async fn set_push(
    shared: App,
    Who(by, actor): Who,
    Place(name): Place<AppName>,
    Json(request): Json<types::PushRequest>,
) -> Reply<types::PushSettings> {
    by.may(&name)?;
    let app = apps::get(&shared, &name).await?;
    if app.repository.trim().is_empty() {
        return Err(ApiError::conflict(format!(
            "{name} has no repository to build from: set one with shoal app set {name} --repository URL"
        )));
    }
    let repository = request.repository.unwrap_or_default();
    let branch = request.branch.trim();
    if branch.is_empty() || branch.starts_with("refs/") {
        return Err(ApiError::invalid(format!(
            "'{branch}' is no branch: give its short name, such as main"
        )));
    }
    if branch.len() > NAME_MAX_BYTES || repository.len() > NAME_MAX_BYTES {
        return Err(ApiError::invalid(format!("a name is longer than {NAME_MAX_BYTES} bytes")));
    }
    // Checked as a secret, and kept as it is written: forges sign with the text.
    let secret = request.secret.trim();
    webhooks::secret(secret)?;
    let sealed = shared.secrets.seal(&owner(&name), secret.as_bytes());
    let sealed = sealed.map_err(|error| ApiError::internal(error.to_string()))?;
    let repository =
        if repository.trim().is_empty() { String::new() } else { canonical(&repository) };
    let updated_at_ms = now_ms();
    let source = PushSource { app: name, repository, branch: branch.into(), sealed, updated_at_ms };
    shared.queue.set_push(&source, &actor).await?;
    tracing::info!(app = %source.app, branch = source.branch, by = actor.name, "pushes start builds");
    Ok(axum::Json(view(&app, source)))
}

pub(super) async fn push(
    shared: App,
    Who(by, _): Who,
    Place(name): Place<AppName>,
) -> Reply<types::PushSettings> {
    by.may(&name)?;
    let app = apps::get(&shared, &name).await?;
    let source = shared.queue.push_source(&name).await?;
    Ok(axum::Json(view(&app, source)))
}

pub(super) async fn unset_push(
    shared: App,
    Who(by, actor): Who,
    Place(name): Place<AppName>,
) -> Reply<types::Done> {
    by.may(&name)?;
    shared.queue.app(&name).await?;
    shared.queue.unset_push(&name, &actor, now_ms()).await?;
    Ok(done())
}

async fn state(shared: &Shared, app: AppName) -> ApiResult<types::AutoDeploy> {
    let auto = shared.queue.auto_deploy(&app).await?;
    let suspended = auto.as_ref().and_then(|auto| auto.suspended.clone());
    Ok(types::AutoDeploy {
        app,
        on: auto.is_some(),
        after_job: auto.map(|auto| auto.after_job),
        suspended: suspended.map(|suspended| types::Halt {
            reason: Some(suspended.reason),
            by: suspended.by,
            at_ms: suspended.at_ms,
        }),
    })
}

pub(super) async fn auto_deploy(
    shared: App,
    Who(by, _): Who,
    Place(name): Place<AppName>,
) -> Reply<types::AutoDeploy> {
    by.may(&name)?;
    state(&shared, name).await.map(axum::Json)
}

pub(super) async fn set_auto_deploy(
    shared: App,
    Who(by, actor): Who,
    Place(name): Place<AppName>,
    Json(request): Json<types::AutoDeployRequest>,
) -> Reply<types::AutoDeploy> {
    by.may(&name)?;
    let now_ms = now_ms();
    match request.set {
        AutoDeploySwitch::On => shared.queue.set_auto_deploy(&name, true, &actor, now_ms).await?,
        AutoDeploySwitch::Off => shared.queue.set_auto_deploy(&name, false, &actor, now_ms).await?,
        AutoDeploySwitch::Resume => shared.queue.resume_auto_deploy(&name, &actor, now_ms).await?,
    }
    tracing::info!(app = %name, set = ?request.set, by = actor.name, "auto_deploy set");
    shared.ring(Bell::Events);
    state(&shared, name).await.map(axum::Json)
}
