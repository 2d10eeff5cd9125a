//! Apps.

use shoal_client::types;
use shoal_proto::{
    AppName, ArtifactId, EncodingId, Revision,
    goal::{Goal, Selector},
    manifest::PieceSize,
};
use shoal_queue::AppRow;

use super::{App, Args, Json, PageArgs, Place, Reply, Who, pages::Paging};
use crate::{
    config::ATTEMPTS_MAX,
    error::{ApiError, ApiResult},
    goals,
    state::{Shared, now_ms},
};

/// The longest time that a build may be given, in seconds: a day.
const BUILD_TIMEOUT_MAX_S: u32 = 86_400;

/// The longest time that a rollout may be given, in seconds: 30 days.
const DEADLINE_MAX_S: u32 = 30 * 86_400;

/// The most waves of a plan.
const WAVES_MAX: usize = 32;

pub(super) fn read(row: &AppRow) -> ApiResult<types::App> {
    serde_json::from_str(&row.spec).map_err(|error| {
        ApiError::internal(format!("app {} cannot be read from the database: {error}", row.name))
    })
}

pub(super) async fn get(shared: &Shared, name: &AppName) -> ApiResult<types::App> {
    read(&shared.queue.app(name).await?)
}

fn check_plan(app: &types::App) -> Result<(), String> {
    let plan = &app.plan;
    let waves = &plan.waves_permille;
    if waves.len() > WAVES_MAX {
        return Err(format!("plan.waves_permille has more than {WAVES_MAX} waves"));
    }
    if waves.iter().any(|wave| *wave == 0 || *wave > 1_000)
        || !waves.windows(2).all(|pair| pair[0] < pair[1])
    {
        return Err("plan.waves_permille must rise from above 0 to at most 1000".into());
    }
    if plan.max_failed_permille > 1_000 {
        return Err("plan.max_failed_permille is in thousandths: at most 1000".into());
    }
    if plan.deadline_s == 0 || plan.deadline_s > DEADLINE_MAX_S {
        return Err(format!("plan.deadline_s must be 1 to {DEADLINE_MAX_S}"));
    }
    if plan.rollback {
        return Err("plan.rollback is not set on an app: shoal rollback sets it".into());
    }
    Ok(())
}

fn check_build(app: &types::App) -> Result<(), String> {
    let given =
        [&app.repository, &app.build_command, &app.output].map(|text| !text.trim().is_empty());
    if given.contains(&true) && given.contains(&false) {
        return Err(
            "repository, build_command and output belong together: give all three, or none for \
                    an app that is only published to"
                .into(),
        );
    }
    for (key, text) in [("repository", &app.repository), ("output", &app.output)] {
        if text.contains(char::is_control) {
            return Err(format!("{key} '{}' has control characters in it", text.escape_debug()));
        }
    }
    let output = std::path::Path::new(&app.output);
    let within =
        |part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir);
    if !output.components().all(within) {
        return Err(format!("output '{}' must be a path within the checkout", app.output));
    }
    if app.repository.starts_with('-') {
        return Err(format!("'{}' is not a repository: give a URL or a path", app.repository));
    }
    if app.build_timeout_s == 0 || app.build_timeout_s > BUILD_TIMEOUT_MAX_S {
        return Err(format!("build_timeout_s must be 1 to {BUILD_TIMEOUT_MAX_S}"));
    }
    if app.max_attempts.is_some_and(|attempts| !(1..=ATTEMPTS_MAX).contains(&attempts)) {
        return Err(format!("max_attempts must be 1 to {ATTEMPTS_MAX}"));
    }
    if app.piece_size_bytes.is_some_and(|bytes| PieceSize::from_bytes(bytes).is_none()) {
        return Err("piece_size_bytes must be a power of two from 256 KiB to 16 MiB".into());
    }
    Ok(())
}

/// Checks an app, and that a goal made of it can be sent at all.
fn check(shared: &Shared, app: &types::App) -> ApiResult<()> {
    check_plan(app).and_then(|()| check_build(app)).map_err(ApiError::invalid)?;
    let selector: Selector = app.selector.parse().map_err(ApiError::invalid)?;
    // As long as a goal of this app ever gets.
    let longest = Goal {
        artifact: ArtifactId::EMPTY,
        size_bytes: u64::MAX,
        piece_size: PieceSize::MAX,
        encoding: EncodingId([0; 32]),
        revision: Revision { epoch: u32::MAX, number: u64::MAX },
        machines_estimate: u32::MAX,
        issued_at_ms: u64::MAX,
        ..goals::of_app(shared, app, selector, true)
    };
    shared.signer()?.sign_goal(&longest).map_err(|error| ApiError::invalid(error.to_string()))?;
    Ok(())
}

pub(super) async fn set(
    shared: App,
    Who(by, actor): Who,
    Place(name): Place<AppName>,
    Json(app): Json<types::App>,
) -> Reply<types::App> {
    by.may(&name)?;
    if app.name != name {
        return Err(ApiError::invalid(format!(
            "the body is about {}, the path about {name}",
            app.name
        )));
    }
    check(&shared, &app)?;
    let spec =
        serde_json::to_string(&app).map_err(|error| ApiError::internal(error.to_string()))?;
    shared.queue.set_app(&AppRow { name, spec }, &actor, now_ms()).await?;
    Ok(axum::Json(app))
}

pub(super) async fn list(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<PageArgs>,
) -> Reply<types::Page<types::App>> {
    let paging = Paging::<String>::of("apps", args.limit, args.cursor.as_deref())?;
    let after = paging.after.as_deref().unwrap_or_default();
    let rows = shared.queue.apps_page(by.apps.as_ref(), after, paging.wanted()).await?;
    let apps = rows.iter().map(read).collect::<ApiResult<Vec<_>>>()?;
    Ok(paging.page(apps, |app| app.name.to_string(), |app| app))
}

pub(super) async fn one(
    shared: App,
    Who(by, _): Who,
    Place(name): Place<AppName>,
) -> Reply<types::App> {
    by.may(&name)?;
    get(&shared, &name).await.map(axum::Json)
}
