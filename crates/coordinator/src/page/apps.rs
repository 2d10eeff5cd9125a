//! Apps: all of them, and one with its builds, artifacts and present rollout.

use axum::{
    extract::{Query, State},
    http::{Method, StatusCode},
    response::{IntoResponse as _, Redirect},
};
use maud::{Markup, html};
use shoal_client::types::{
    App, AppStatus, Artifact, BuildRequest, DeployRequest, Job, Machine, Page as Items, Rollout,
};
use shoal_proto::AppName;

use super::{
    Page, Place, Pressed, Rows, Shown, Visit, builds,
    call::Refusal,
    copies,
    html::{button, bytes, hidden, live, more, rollout_state, time, wrong},
    rollouts,
};

pub(super) async fn list(visit: Visit, Query(rows): Query<Rows>) -> Shown {
    let apps: Items<AppStatus> = visit.api.get(&rows.of("/v1/status")).await?;
    let is_under_way =
        apps.items.iter().flat_map(|app| &app.rollout).any(|rollout| !rollout.status.is_terminal());
    let table = html! {
        @if apps.items.is_empty() {
            p { "No apps yet: an admin registers one with " code { "shoal app set NAME" } "." }
        } @else {
            table {
                thead { tr { th { "App" } th { "Goal" } th { "Rollout" } th { "Machines" } th { "Since (UTC)" } } }
                tbody { @for app in &apps.items { (row(app)) } }
            }
            (more("/", apps.next_cursor.as_deref()))
        }
    };
    let content = html! { h1 { "Apps" } (live(is_under_way, None, &table)) };
    Ok(visit.shown(StatusCode::OK, "Apps", &content))
}

fn row(status: &AppStatus) -> Markup {
    html! {
        tr {
            th scope="row" data-is="App" { a href=(format!("/apps/{}", status.app)) { (status.app) } }
            @match &status.rollout {
                Some(rollout) => {
                    td data-is="Goal" { code { (rollout.artifact_name) } }
                    td data-is="Rollout" { a href=(format!("/rollouts/{}", rollout.id)) { (rollout_state(rollout.status)) } }
                    td data-is="Machines" { (rollouts::overall(rollout)) }
                    td data-is="Since" { (time(rollout.created_at_ms)) }
                }
                None => { td data-is="Goal" { "never deployed" } td {} td {} td {} }
            }
        }
    }
}

pub(super) async fn one(visit: Visit, Place(app): Place<AppName>) -> Shown {
    shown(&visit, &app, None, "").await
}

/// The view of an app; with what went wrong when a button was pressed, and the commit that was typed.
async fn shown(visit: &Visit, name: &AppName, failed: Option<&Refusal>, commit: &str) -> Shown {
    let (api, rows) = (&visit.api, Rows { app: Some(name.clone()), ..Rows::default() });
    let app: App = api.get(&format!("/v1/apps/{name}")).await?;
    let status: Items<AppStatus> = api.get(&rows.of("/v1/status")).await?;
    let artifacts: Items<Artifact> = api.get(&rows.of("/v1/artifacts")).await?;
    let jobs: Items<Job> = api.get(&rows.of("/v1/jobs")).await?;
    let rollout = status.items.into_iter().next().and_then(|status| status.rollout);
    let machines: Items<Machine> = api.get(&rollouts::failed(name)).await?;

    let is_under_way = rollout.iter().any(|rollout| !rollout.status.is_terminal())
        || jobs.items.iter().any(|job| !job.status.is_terminal())
        || artifacts.items.iter().any(copies::is_under_way);
    let state = html! {
        section aria-labelledby="rollout" {
            h2 #rollout { "Rollout" }
            @match &rollout {
                Some(rollout) => {
                    (rollouts::summary(rollout))
                    (rollouts::buttons(visit, rollout))
                    (rollouts::regions(rollout))
                    (rollouts::failures(&machines, rollout))
                }
                None => p { "Nothing was deployed yet." }
            }
        }
        section aria-labelledby="artifacts" {
            h2 #artifacts { "Artifacts" }
            (self::artifacts(visit, name, &artifacts.items, rollout.as_ref()))
        }
        section aria-labelledby="builds" {
            h2 #builds { "Builds" }
            (builds::table(&jobs.items))
            (more(&format!("/builds?app={name}"), jobs.next_cursor.as_deref()))
            p { a href=(format!("/history?app={name}")) { "The history of " (name) } }
        }
    };
    let content = html! {
        h1 { (name) }
        (wrong(failed.map(|refusal| refusal.message.as_str())))
        (facts(&app))
        @if !app.repository.is_empty() && visit.may(&Method::POST, "/v1/jobs", Some(name)) {
            (build_form(visit, name, commit))
        }
        (live(is_under_way, Some(name), &state))
    };
    let code = failed.map_or(StatusCode::OK, |refusal| refusal.status);
    Ok(visit.shown(code, name.as_str(), &content))
}

fn facts(app: &App) -> Markup {
    html! {
        dl .facts {
            @if app.repository.is_empty() { dt { "Repository" } dd { "none: it is published to" } } @else {
                dt { "Repository" } dd { code { (app.repository) } }
                dt { "Build" } dd { code { (app.build_command) } " leaves " code { (app.output) } }
            }
            dt { "Machines" } dd { @if app.selector.is_empty() { "all" } @else { code { (app.selector) } } }
            dt { "Rollouts" } dd {
                @for wave in &app.plan.waves_permille { (f64::from(*wave) / 10.0) " %, " }
                "at most " (f64::from(app.plan.max_failed_permille) / 10.0) " % may fail"
            }
        }
    }
}

fn build_form(visit: &Visit, app: &AppName, commit: &str) -> Markup {
    html! {
        form .build method="post" action=(format!("/apps/{app}")) {
            (hidden(visit))
            input type="hidden" name="do" value="build";
            label for="commit" { "Commit" }
            input #commit name="commit" value=(commit) required pattern="[0-9a-fA-F]{40}" maxlength="40" size="44"
                spellcheck="false" autocomplete="off" placeholder="its 40 hex digits" title="The 40 hex digits of a commit";
            button #build { "Build" }
        }
    }
}

/// Artifacts with their copies; what cannot be deployed yet is greyed out, with the reason.
fn artifacts(visit: &Visit, app: &AppName, list: &[Artifact], rollout: Option<&Rollout>) -> Markup {
    let may = visit.may(&Method::POST, "/v1/deployments", Some(app));
    let goal = rollout.map(|rollout| rollout.artifact_name.as_str());
    html! {
        @if list.is_empty() { p { "None yet: build a commit." } } @else {
            table .artifacts {
                thead { tr { th { "Artifact" } th { "Stored" } th { "Copies" } th { "Made (UTC)" } th { "Deploy" } } }
                tbody { @for artifact in list {
                    tr .dim[!artifact.deployable] {
                        th scope="row" data-is="Artifact" {
                            @match artifact.job {
                                Some(job) => a href=(format!("/jobs/{job}")) { code { (artifact.name) } },
                                None => code { (artifact.name) },
                            }
                        }
                        td data-is="Stored" { (bytes(artifact.encoded_bytes)) " of " (bytes(artifact.size_bytes)) }
                        td data-is="Copies" { (copies::copies(artifact)) }
                        td data-is="Made" { (time(artifact.created_at_ms)) }
                        td data-is="Deploy" {
                            @if !artifact.deployable {
                                @if may { button disabled { "Deploy" } " " }
                                span .reason { (artifact.not_deployable_reason.as_deref().unwrap_or("not deployable")) }
                            } @else if goal == Some(artifact.name.as_str()) {
                                span .goal { "is the goal" }
                            } @else if may {
                                (button(visit, &format!("/apps/{app}"), "deploy", "Deploy",
                                    &format!("Deploy {}", artifact.name), &[("artifact", &artifact.name)]))
                            } @else { "deployable" }
                        }
                    }
                } }
            }
        }
    }
}

pub(super) async fn act(State(_): Page, Place(app): Place<AppName>, pressed: Pressed) -> Shown {
    let typed = pressed.fields.commit.clone().unwrap_or_default();
    match done(&app, &pressed).await {
        Ok(to) => Ok(Redirect::to(&to).into_response()),
        Err(refusal) if refusal.status == StatusCode::UNAUTHORIZED => Err(refusal),
        Err(refusal) => shown(&pressed.visit, &app, Some(&refusal), typed.trim()).await,
    }
}

/// Does what a button says, and says where to look next.
async fn done(app: &AppName, pressed: &Pressed) -> Result<String, Refusal> {
    let (api, fields, key) = (&pressed.visit.api, &pressed.fields, pressed.key());
    let app = app.clone();
    match fields.r#do.as_str() {
        "build" => {
            let wrong = |error: shoal_proto::ids::InvalidId| {
                Refusal::new(StatusCode::BAD_REQUEST, error.to_string())
            };
            let commit =
                fields.commit.as_deref().unwrap_or_default().trim().parse().map_err(wrong)?;
            let job: Job = api.post("/v1/jobs", &key, &BuildRequest::new(app, commit)).await?;
            Ok(format!("/jobs/{}", job.id))
        }
        "deploy" => {
            let request =
                DeployRequest { app, artifact: fields.artifact.clone().unwrap_or_default() };
            let rollout: Rollout = api.post("/v1/deployments", &key, &request).await?;
            Ok(format!("/rollouts/{}", rollout.id))
        }
        other => Err(Refusal::new(StatusCode::BAD_REQUEST, format!("no button says '{other}'"))),
    }
}
