//! Builds: the newest ones, and one with its attempts and its log.

use std::collections::BTreeSet;

use axum::{
    body::Body,
    extract::{Query, State},
    http::{HeaderValue, Method, StatusCode, header},
    response::{IntoResponse as _, Redirect, Response},
};
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::json;
use shoal_client::types::{Job, Page as Items};

use super::{
    Page, Place, Pressed, Rows, Shown, Visit,
    call::Refusal,
    html::{button, job_state, live, more, state, time, took, wrong},
};

/// How much of a log one answer carries, in bytes, as the API has it.
const LOG_MAX_BYTES: usize = 1 << 20;

pub(super) async fn list(visit: Visit, Query(rows): Query<Rows>) -> Shown {
    let jobs: Items<Job> = visit.api.get(&rows.of("/v1/jobs")).await?;
    let is_under_way = jobs.items.iter().any(|job| !job.status.is_terminal());
    let path = rows.app.as_ref().map_or("/builds".into(), |app| format!("/builds?app={app}"));
    let list = html! { (table(&jobs.items)) (more(&path, jobs.next_cursor.as_deref())) };
    let content = html! {
        h1 { "Builds" @if let Some(app) = &rows.app { " of " a href=(format!("/apps/{app}")) { (app) } } }
        (live(is_under_way, rows.app.as_ref(), &list))
    };
    Ok(visit.shown(StatusCode::OK, "Builds", &content))
}

/// Builds, a row each.
pub(super) fn table(jobs: &[Job]) -> Markup {
    html! {
        @if jobs.is_empty() { p { "None yet." } } @else {
            table {
                thead { tr { th { "Build" } th { "App" } th { "Commit" } th { "State" } th { "Asked for (UTC)" } th { "By" } th { "Took" } } }
                tbody { @for job in jobs {
                    tr {
                        th scope="row" data-is="Build" { a href=(format!("/jobs/{}", job.id)) { (job.id) } }
                        td data-is="App" { a href=(format!("/apps/{}", job.app)) { (job.app) } }
                        td data-is="Commit" { code title=(job.commit) { (job.commit.short()) } }
                        td data-is="State" { (job_state(job.status)) @if let Some(reason) = &job.reason { " " span .reason { (reason) } } }
                        td data-is="Asked for" { (time(job.created_at_ms)) }
                        td data-is="By" { (job.requested_by) }
                        td data-is="Took" { (took(job.started_at_ms, job.finished_at_ms)) }
                    }
                } }
            }
        }
    }
}

#[derive(Deserialize, Default)]
pub(super) struct LogArgs {
    #[serde(default)]
    offset: u64,
}

pub(super) async fn one(
    visit: Visit,
    Place(job): Place<i64>,
    Query(args): Query<LogArgs>,
) -> Shown {
    shown(&visit, job, args.offset, None).await
}

/// What of a log's bytes is whole characters, where nothing but its end is cut.
fn whole(bytes: &[u8]) -> &[u8] {
    let cut = bytes.utf8_chunks().last().map_or(0, |last| {
        // A character that is cut is at most three bytes, and the beginning of one.
        let rest = last.invalid();
        let is_begun = str::from_utf8(rest).is_err_and(|error| error.error_len().is_none());
        if is_begun { rest.len() } else { 0 }
    });
    &bytes[..bytes.len() - cut]
}

async fn shown(visit: &Visit, id: i64, offset: u64, failed: Option<&Refusal>) -> Shown {
    // First the job, then its log: a job that has ended says no more, so the log is then all there is.
    let job: Job = visit.api.get(&format!("/v1/jobs/{id}")).await?;
    let log = visit.api.bytes(&format!("/v1/jobs/{id}/log?offset={offset}"), LOG_MAX_BYTES).await?;
    let has_ended = job.status.is_terminal();
    let shown = if has_ended && log.len() < LOG_MAX_BYTES { &log[..] } else { whole(&log) };
    let next = offset + shown.len() as u64;
    let state = html! {
        (summary(&job))
        @if !has_ended && visit.may(&Method::POST, "/v1/jobs/{job}/cancel", Some(&job.app)) {
            div .buttons {
                @if job.cancel_requested { p { "It is being stopped." } } @else {
                    (button(visit, &format!("/jobs/{id}"), "cancel", "Cancel", &format!("Cancel build {id}"), &[]))
                }
            }
        }
        (attempts(&job))
    };
    let content = html! {
        h1 { "Build " (id) " of " a href=(format!("/apps/{}", job.app)) { (job.app) } }
        (wrong(failed.map(|refusal| refusal.message.as_str())))
        (live(!has_ended, Some(&job.app), &state))
        h2 { "Log" }
        (elsewhere(visit, &job, offset == 0 && log.is_empty()))
        @if offset > 0 { p { a href=(format!("/jobs/{id}")) { "From its beginning" } } }
        pre #log tabindex="0" aria-label="The build's log" data-log=(format!("/jobs/{id}/log")) data-offset=(next) {
            (String::from_utf8_lossy(shown))
        }
        @if log.len() >= LOG_MAX_BYTES { noscript { p { a href=(format!("/jobs/{id}?offset={next}")) { "What follows" } } } }
    };
    let code = failed.map_or(StatusCode::OK, |refusal| refusal.status);
    Ok(visit.shown(code, &format!("Build {id}"), &content))
}

fn summary(job: &Job) -> Markup {
    html! {
        p .summary #state data-ended[job.status.is_terminal()] {
            (job_state(job.status)) " " code { (job.name) } " by " b { (job.requested_by) } ", " (time(job.created_at_ms)) " UTC"
            @if job.finished_at_ms.is_some() { ", took " (took(job.started_at_ms, job.finished_at_ms)) }
        }
        dl .facts {
            dt { "Commit" } dd { code { (job.commit) } }
            dt { "Attempt" } dd { (job.attempt) " of at most " (job.max_attempts) }
            @if let Some(until) = job.eligible_at_ms { dt { "Waits until" } dd { (time(until)) " UTC" } }
            @if let Some(artifact) = &job.artifact { dt { "Artifact" } dd { code { (artifact) } } }
        }
        @if let Some(reason) = &job.reason { p .reason { (reason) } }
    }
}

/// Which other coordinators have some of the log: each keeps what workers sent to it.
fn elsewhere(visit: &Visit, job: &Job, is_empty: bool) -> Markup {
    let here = visit.desk.shared.machine();
    let others: BTreeSet<&str> = job
        .attempts
        .iter()
        .flat_map(|attempt| &attempt.log_at)
        .map(String::as_str)
        .filter(|name| *name != here.as_str())
        .collect();
    let names = others.into_iter().collect::<Vec<_>>().join(", ");
    html! {
        @if !names.is_empty() {
            p #elsewhere .reason {
                @if is_empty { "It lies with another coordinator, " } @else { "Some of it lies with another coordinator, " }
                b { (names) } ", through which the worker spoke: look at this build there. This is " (here) "."
            }
        }
    }
}

fn attempts(job: &Job) -> Markup {
    html! {
        @if !job.attempts.is_empty() {
            table {
                thead { tr { th { "Attempt" } th { "Worker" } th { "Outcome" } th { "Took" } th { "Reason" } } }
                tbody { @for attempt in &job.attempts {
                    tr {
                        th scope="row" data-is="Attempt" { (attempt.attempt) }
                        td data-is="Worker" { (attempt.worker) }
                        td data-is="Outcome" { (state(attempt.outcome.as_deref().unwrap_or("runs"))) }
                        td data-is="Took" { (took(Some(attempt.started_at_ms), attempt.finished_at_ms)) }
                        td data-is="Reason" { (attempt.reason.as_deref().unwrap_or_default()) }
                    }
                } }
            }
        }
    }
}

/// What follows of a log, for the script.
pub(super) async fn log(
    visit: Visit,
    Place(job): Place<i64>,
    Query(args): Query<LogArgs>,
) -> Shown {
    let path = format!("/v1/jobs/{job}/log?offset={}", args.offset);
    let bytes = visit.api.bytes(&path, LOG_MAX_BYTES).await?;
    let mut response = Response::new(Body::from(bytes));
    let kind = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

pub(super) async fn act(State(_): Page, Place(id): Place<i64>, pressed: Pressed) -> Shown {
    let path = format!("/v1/jobs/{id}/cancel");
    let done = match pressed.fields.r#do.as_str() {
        "cancel" => pressed.visit.api.post::<Job>(&path, &pressed.key(), &json!({})).await,
        other => Err(Refusal::new(StatusCode::BAD_REQUEST, format!("no button says '{other}'"))),
    };
    match done {
        Ok(job) => Ok(Redirect::to(&format!("/jobs/{}", job.id)).into_response()),
        Err(refusal) if refusal.status == StatusCode::UNAUTHORIZED => Err(refusal),
        Err(refusal) => shown(&pressed.visit, id, 0, Some(&refusal)).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_that_is_not_all_there_waits_for_its_rest() {
        assert_eq!(whole("grün".as_bytes()), "grün".as_bytes());
        assert_eq!(whole(&"grün".as_bytes()[..3]), b"gr");
        // What will never be a character is shown as it is.
        assert_eq!(whole(b"a\xff"), b"a\xff");
        assert_eq!(whole(b"a\xffb"), b"a\xffb");
        assert_eq!(whole(b""), b"");
    }
}
