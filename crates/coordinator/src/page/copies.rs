//! Copies: how far each region's bucket is, and what is not whole somewhere.

use axum::{extract::Query, http::StatusCode};
use maud::{Markup, html};
use shoal_client::types::{Artifact, Halt, RegionReplication, Replication, ReplicationStatusPage};
use shoal_proto::{RegionName, state::ReplicationStatus};

use super::{
    Rows, Shown, Visit,
    html::{bar, bytes, copy_state, duration, live, state, time, took},
};

pub(super) async fn list(visit: Visit, Query(_): Query<Rows>) -> Shown {
    let page: ReplicationStatusPage = visit.api.get("/v1/replication").await?;
    let is_under_way = page.regions.values().any(|region| region.bytes_left > 0);
    let shown = html! {
        table {
            thead { tr { th { "Region" } th { "Copies" } th { "Left" } th { "Rate" } th { "Done in" } } }
            tbody { @for (name, region) in &page.regions { (self::region(name, region)) } }
        }
        h2 { "Not whole everywhere" }
        @if page.artifacts.is_empty() { p { "Nothing: all artifacts are whole in all buckets." } } @else {
            table .artifacts {
                thead { tr { th { "Artifact" } th { "Copies" } th { "Made (UTC)" } } }
                tbody { @for artifact in &page.artifacts {
                    tr .dim[!artifact.deployable] {
                        th scope="row" data-is="Artifact" { a href=(format!("/apps/{}", artifact.app)) { code { (artifact.name) } } }
                        td data-is="Copies" {
                            (copies(artifact))
                            @if let Some(reason) = &artifact.not_deployable_reason { span .reason { (reason) } }
                        }
                        td data-is="Made" { (time(artifact.created_at_ms)) }
                    }
                } }
            }
        }
    };
    let content = html! { h1 { "Copies" } (live(is_under_way, None, &shown)) };
    Ok(visit.shown(StatusCode::OK, "Copies", &content))
}

fn region(name: &RegionName, region: &RegionReplication) -> Markup {
    html! {
        tr .dim[region.drained] {
            th scope="row" data-is="Region" {
                (name) @if region.drained { " (out of service)" } @if region.observed { " (its store copies by itself)" }
                @if let Some(drain) = &region.drain { div .reason { (drained(drain)) } }
            }
            td data-is="Copies" { @for (status, count) in &region.copies { (state(status.as_str())) " " (count) " " } }
            td data-is="Left" { (bytes(region.bytes_left)) }
            td data-is="Rate" { (bytes(region.bytes_per_s)) "/s" }
            td data-is="Done in" { @if let Some(eta_s) = region.eta_s { (duration(eta_s)) } }
        }
    }
}

/// Who took it out of service, and why.
fn drained(drain: &Halt) -> String {
    let reason = drain.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    format!("by {}{reason}", drain.by)
}

/// Whether bytes of it are on their way.
pub(super) fn is_under_way(artifact: &Artifact) -> bool {
    artifact.replication.values().any(|copy| copy.status == ReplicationStatus::Copying)
}

/// An artifact's copies, by region.
pub(super) fn copies(artifact: &Artifact) -> Markup {
    html! {
        ul .copies { @for (region, copy) in &artifact.replication {
            li { b { (region) } " " (self::copy(copy, artifact.encoded_bytes, artifact.deployable)) }
        } }
    }
}

/// Its own reason is a part of what keeps the artifact from being deployed, and said there.
fn copy(copy: &Replication, whole: u64, deployable: bool) -> Markup {
    html! {
        (copy_state(copy.status)) " "
        @if copy.status == ReplicationStatus::Copying {
            (bytes(copy.bytes_done)) " of " (bytes(whole)) ", " (bytes(copy.bytes_per_s)) "/s"
            @if let Some(eta_s) = copy.eta_s { ", done in " (duration(eta_s)) }
            (bar(&[("COPYING", copy.bytes_done.min(whole))], whole, "copied"))
        }
        @if copy.status == ReplicationStatus::Complete { (took(copy.started_at_ms, copy.finished_at_ms)) }
        @if let Some(reason) = copy.reason.as_ref().filter(|_| deployable) { " " span .reason { (reason) } }
    }
}
