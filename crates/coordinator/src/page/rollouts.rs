//! A rollout: how far it is in each region, and which machines failed.

use axum::{
    extract::State,
    http::{Method, StatusCode},
    response::{IntoResponse as _, Redirect},
};
use maud::{Markup, html};
use serde_json::json;
use shoal_client::types::{Machine, Page as Items, RollbackRequest, Rollout};
use shoal_proto::{
    AppName,
    state::{MachineState, RolloutStatus},
};

use super::{
    Page, Place, Pressed, ROWS, Shown, Visit,
    call::Refusal,
    html::{bar, button, live, rollout_state, state, time, took, wrong},
};

pub(super) async fn one(visit: Visit, Place(id): Place<i64>) -> Shown {
    shown(&visit, id, None).await
}

async fn shown(visit: &Visit, id: i64, failed: Option<&Refusal>) -> Shown {
    let rollout: Rollout = visit.api.get(&format!("/v1/rollouts/{id}")).await?;
    let machines: Items<Machine> = visit.api.get(&self::failed(&rollout.app)).await?;
    let state = html! {
        (summary(&rollout))
        (buttons(visit, &rollout))
        (regions(&rollout))
        (failures(&machines, &rollout))
    };
    let content = html! {
        h1 { "Rollout " (id) " of " a href=(format!("/apps/{}", rollout.app)) { (rollout.app) } }
        (wrong(failed.map(|refusal| refusal.message.as_str())))
        (live(!rollout.status.is_terminal(), Some(&rollout.app), &state))
    };
    let code = failed.map_or(StatusCode::OK, |refusal| refusal.status);
    Ok(visit.shown(code, &format!("Rollout {id}"), &content))
}

/// The call of the API for the machines that failed an app.
pub(super) fn failed(app: &AppName) -> String {
    format!("/v1/machines?app={app}&failed=true&limit={ROWS}")
}

fn count(rollout: &Rollout, wanted: impl Fn(MachineState) -> bool) -> u64 {
    let states = rollout.regions.values().flat_map(|region| &region.states);
    states.filter(|(state, _)| wanted(**state)).map(|(_, count)| count).sum()
}

/// All machines of a rollout, in a bar and in words.
pub(super) fn overall(rollout: &Rollout) -> Markup {
    let whole: u64 = rollout.regions.values().map(|region| region.machines).sum();
    let active = count(rollout, MachineState::is_success);
    let failed = count(rollout, MachineState::is_failure);
    let text = match failed {
        0 => format!("{active} of {whole} active"),
        _ => format!("{active} of {whole} active, {failed} failed"),
    };
    html! { (bar(&[("ACTIVE", active), ("FAILED", failed)], whole, &text)) span .count { (text) } }
}

pub(super) fn summary(rollout: &Rollout) -> Markup {
    html! {
        p .summary {
            (rollout_state(rollout.status)) " "
            a href=(format!("/rollouts/{}", rollout.id)) { @if rollout.rollback { "Back to " } code { (rollout.artifact_name) } }
            " by " b { (rollout.requested_by) } ", " (time(rollout.created_at_ms)) " UTC"
            @if rollout.finished_at_ms.is_some() { ", took " (took(Some(rollout.created_at_ms), rollout.finished_at_ms)) }
        }
        @if let Some(reason) = &rollout.reason { p .reason { (reason) } }
    }
}

/// What may be done about a rollout.
pub(super) fn buttons(visit: &Visit, rollout: &Rollout) -> Markup {
    let action = format!("/rollouts/{}", rollout.id);
    let app = Some(&rollout.app);
    html! {
        div .buttons {
            @if visit.may(&Method::POST, "/v1/rollbacks", app) {
                (button(visit, &action, "rollback", "Roll back", &format!("Roll {} back to what it ran before", rollout.app), &[]))
            }
            @if rollout.status == RolloutStatus::Running && visit.may(&Method::POST, "/v1/rollouts/{rollout}/pause", app) {
                (button(visit, &action, "pause", "Pause", &format!("Pause rollout {}", rollout.id), &[]))
            }
            @if rollout.status == RolloutStatus::Paused && visit.may(&Method::POST, "/v1/rollouts/{rollout}/resume", app) {
                (button(visit, &action, "resume", "Go on", &format!("Let rollout {} go on", rollout.id), &[]))
            }
            @if !rollout.status.is_terminal() && visit.may(&Method::POST, "/v1/rollouts/{rollout}/cancel", app) {
                (button(visit, &action, "cancel", "Cancel", &format!("Cancel rollout {}", rollout.id), &[]))
            }
        }
    }
}

/// How far it is in each region.
pub(super) fn regions(rollout: &Rollout) -> Markup {
    html! {
        table .regions {
            thead { tr { th { "Region" } th { "Machines" } th { "States" } th { "Pieces" } th { "From the bucket" } } }
            tbody { @for (name, region) in &rollout.regions {
                @let shares: Vec<_> = region.states.iter().map(|(state, count)| (state.as_str(), *count)).collect();
                tr {
                    th scope="row" data-is="Region" { (name) }
                    td data-is="Machines" { (region.machines) }
                    td data-is="States" {
                        (bar(&shares, region.machines, &format!("machines of {name} by state")))
                        @for (is, count) in &region.states { (state(is.as_str())) " " (count) " " }
                        @if let Some(open) = region.open_permille {
                            span .reason { (f64::from(open) / 10.0) " % of the ranks may activate" }
                        }
                    }
                    td data-is="Pieces" { @if region.pieces_total > 0 { (region.pieces * 100 / region.pieces_total) " %" } @else { "–" } }
                    td data-is="Bucket" { (format!("{:.2} copies", region.origin_copies)) }
                }
            } }
        }
    }
}

/// The machines that failed the app, each with its reason.
pub(super) fn failures(machines: &Items<Machine>, rollout: &Rollout) -> Markup {
    let unreachable = count(rollout, |state| state == MachineState::Unreachable);
    let rows = machines.items.iter().flat_map(|machine| {
        let apps = machine
            .apps
            .iter()
            .filter(|app| app.report.app == rollout.app && app.report.revision == rollout.revision);
        apps.map(move |app| (machine, app))
    });
    let rows: Vec<_> = rows.collect();
    html! {
        @if unreachable > 0 {
            p .reason { (unreachable) " did not report by the deadline: " code { "shoal machines" } " says when each was last heard of." }
        }
        @if !rows.is_empty() {
            h3 { "Failed machines" }
            table .failures {
                thead { tr { th { "Machine" } th { "Region" } th { "State" } th { "Reason" } } }
                tbody { @for (machine, app) in rows {
                    tr {
                        th scope="row" data-is="Machine" { (machine.name) }
                        td data-is="Region" { (machine.region) }
                        td data-is="State" { (state(app.report.state.as_str())) }
                        td data-is="Reason" { (app.report.reason.as_deref().unwrap_or("it gave none")) }
                    }
                } }
            }
            @if machines.next_cursor.is_some() {
                p { "And more: " code { "shoal machines --app " (rollout.app) " --failed" } " lists all." }
            }
        }
    }
}

pub(super) async fn act(State(_): Page, Place(id): Place<i64>, pressed: Pressed) -> Shown {
    match done(id, &pressed).await {
        Ok(to) => Ok(Redirect::to(&to).into_response()),
        Err(refusal) if refusal.status == StatusCode::UNAUTHORIZED => Err(refusal),
        Err(refusal) => shown(&pressed.visit, id, Some(&refusal)).await,
    }
}

/// Does what a button says, and says where to look next.
async fn done(id: i64, pressed: &Pressed) -> Result<String, Refusal> {
    let (api, key) = (&pressed.visit.api, pressed.key());
    let rollout: Rollout = match pressed.fields.r#do.as_str() {
        "rollback" => {
            let of: Rollout = api.get(&format!("/v1/rollouts/{id}")).await?;
            let request = RollbackRequest { app: of.app, artifact: None };
            api.post("/v1/rollbacks", &key, &request).await?
        }
        verb @ ("pause" | "resume") => {
            api.post(&format!("/v1/rollouts/{id}/{verb}"), &key, &json!({})).await?
        }
        "cancel" => api.post(&format!("/v1/rollouts/{id}/cancel"), &key, &json!({})).await?,
        other => {
            return Err(Refusal::new(StatusCode::BAD_REQUEST, format!("no button says '{other}'")));
        }
    };
    Ok(format!("/rollouts/{}", rollout.id))
}
