//! History: a row for each build and deployment, from the commit to the machines.

use axum::{extract::Query, http::StatusCode};
use maud::{Markup, html};
use shoal_client::types::{HistoryEntry, Page as Items};

use super::{
    Rows, Shown, Visit,
    html::{copy_state, duration, job_state, live, more, rollout_state, time},
};

pub(super) async fn list(visit: Visit, Query(rows): Query<Rows>) -> Shown {
    let entries: Items<HistoryEntry> = visit.api.get(&rows.of("/v1/history")).await?;
    let path = rows.app.as_ref().map_or("/history".into(), |app| format!("/history?app={app}"));
    let is_under_way = entries.items.iter().any(|entry| {
        entry.build.as_ref().is_some_and(|build| !build.status.is_terminal())
            || entry.rollout.as_ref().is_some_and(|rollout| !rollout.status.is_terminal())
    });
    let table = html! {
        @if entries.items.is_empty() { p { "Nothing yet." } } @else {
            table {
                thead { tr {
                    th { "App" } th { "Commit" } th { "Build" } th { "Copies" } th { "Rollout" } th { "Machines" } th { "Asked for (UTC)" }
                } }
                tbody { @for entry in &entries.items { (row(entry)) } }
            }
            (more(&path, entries.next_cursor.as_deref()))
        }
    };
    let content = html! {
        h1 { "History" @if let Some(app) = &rows.app { " of " a href=(format!("/apps/{app}")) { (app) } } }
        (live(is_under_way, rows.app.as_ref(), &table))
    };
    Ok(visit.shown(StatusCode::OK, "History", &content))
}

fn reason(reason: Option<&String>) -> Markup {
    html! { @if let Some(reason) = reason { " " span .reason { (reason) } } }
}

fn row(entry: &HistoryEntry) -> Markup {
    let built =
        entry.build.as_ref().map(|build| (build.created_at_ms, build.requested_by.as_str()));
    let deployed = entry.rollout.as_ref();
    let deployed = deployed.map(|rollout| (rollout.created_at_ms, rollout.requested_by.as_str()));
    html! {
        tr {
            th scope="row" data-is="App" { a href=(format!("/apps/{}", entry.app)) { (entry.app) } }
            td data-is="Commit" {
                @match &entry.commit {
                    Some(commit) => code title=(commit) { (commit.short()) },
                    None => code { (entry.name) },
                }
            }
            td data-is="Build" { @match &entry.build {
                Some(build) => {
                    a href=(format!("/jobs/{}", build.job)) { (job_state(build.status)) }
                    @if let Some(seconds) = build.seconds { " " (duration(seconds)) }
                    (reason(build.reason.as_ref()))
                }
                None => "published",
            } }
            td data-is="Copies" { @if let Some(copies) = &entry.replication {
                (copy_state(copies.status)) @if let Some(seconds) = copies.seconds { " " (duration(seconds)) }
            } }
            td data-is="Rollout" { @if let Some(rollout) = &entry.rollout {
                a href=(format!("/rollouts/{}", rollout.id)) { (rollout_state(rollout.status)) }
                @if rollout.rollback { " back" }
                @if let Some(seconds) = rollout.seconds { " " (duration(seconds)) }
                (reason(rollout.reason.as_ref()))
            } }
            td data-is="Machines" { @if let Some(rollout) = &entry.rollout {
                (rollout.machines_ok) " of " (rollout.machines)
                @if rollout.machines_failed > 0 { ", " (rollout.machines_failed) " failed" }
            } }
            td data-is="Asked for" {
                @if let Some((at_ms, by)) = built { div { "build: " (time(at_ms)) " by " (by) } }
                @if let Some((at_ms, by)) = deployed { div { "rollout: " (time(at_ms)) " by " (by) } }
            }
        }
    }
}
