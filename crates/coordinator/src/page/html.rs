//! What all views are made of. Everything that comes from outside is a text that `maud` escapes.

use axum::response::Html;
use bytesize::ByteSize;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use shoal_proto::{
    AppName,
    state::{JobStatus, ReplicationStatus, RolloutStatus},
};
use shoal_queue::EventKind;

use super::Visit;

/// How often a view that shows something under way is looked at anew, in milliseconds.
const FAST_MS: u32 = 1_500;

/// How often any other is.
const SLOW_MS: u32 = 15_000;

/// A whole page.
pub(super) fn page(title: &str, visit: Option<&Visit>, content: &Markup) -> Html<String> {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " · Shoal" }
                link rel="icon" href="/static/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href="/static/page.css";
                script src="/static/page.js" defer {}
                (content.refresh())
            }
            body {
                a .skip href="#content" { "To the content" }
                header {
                    a .brand href="/" { "Shoal" }
                    @if let Some(visit) = visit {
                        nav aria-label="Views" {
                            a href="/" { "Apps" }
                            a href="/builds" { "Builds" }
                            a href="/copies" { "Copies" }
                            a href="/history" { "History" }
                        }
                        (who(visit))
                    }
                }
                main #content tabindex="-1" { (content) }
            }
        }
    };
    Html(page.into_string())
}

/// Without scripts a view is loaded anew as a whole, and less often than its parts are with them. One where something is
/// typed is not: that would be lost.
trait Refresh {
    fn refresh(&self) -> Markup;
}

impl Refresh for Markup {
    fn refresh(&self) -> Markup {
        html! {
            @if self.0.contains(LIVE) && !self.0.contains(TYPED) { noscript { meta http-equiv="refresh" content="10"; } }
        }
    }
}

/// What marks a view where something is typed.
const TYPED: &str = "<label";

/// What marks the part of a view that keeps itself up to date.
const LIVE: &str = "data-every=";

/// The part of a view that keeps itself up to date: each time something happens, to one app or to any, and every so often.
pub(super) fn live(is_under_way: bool, app: Option<&AppName>, content: &Markup) -> Markup {
    let every_ms = if is_under_way { FAST_MS } else { SLOW_MS };
    let events = app.map_or("/live".into(), |app| format!("/live?app={app}"));
    let kinds = EventKind::ALL.iter().map(|kind| kind.as_str()).collect::<Vec<_>>().join(" ");
    html! { div #live data-every=(every_ms) data-events=(events) data-kinds=(kinds) { (content) } }
}

fn who(visit: &Visit) -> Markup {
    html! {
        form .who method="post" action="/logout" {
            span {
                b { (visit.who.name) } " · " (visit.who.role)
                @if let Some(apps) = &visit.who.apps {
                    " · bound to "
                    @for (at, app) in apps.iter().enumerate() { @if at > 0 { ", " } (app) }
                }
                " · cluster " (visit.who.cluster)
            }
            (hidden(visit))
            button { "Log out" }
        }
    }
}

/// What every form says: the session's word, and a key that makes pressing twice the same as pressing once.
pub(super) fn hidden(visit: &Visit) -> Markup {
    html! {
        input type="hidden" name="word" value=(visit.session.word);
        input type="hidden" name="key" value=(visit.key);
    }
}

/// A button that does something, in a form of its own.
pub(super) fn button(
    visit: &Visit,
    action: &str,
    what: &str,
    text: &str,
    label: &str,
    more: &[(&str, &str)],
) -> Markup {
    let id = more.iter().fold(what.to_string(), |id, (_, value)| format!("{id}-{value}"));
    html! {
        form .do method="post" action=(action) {
            (hidden(visit))
            input type="hidden" name="do" value=(what);
            @for (name, value) in more { input type="hidden" name=(name) value=(value); }
            button #(id) .(what) aria-label=(label) { (text) }
        }
    }
}

/// What went wrong, in the API's own line.
pub(super) fn wrong(message: Option<&str>) -> Markup {
    html! { @if let Some(message) = message { p .wrong role="alert" { (message) } } }
}

/// A time, in UTC.
pub(super) fn time(at_ms: i64) -> Markup {
    let since = std::time::Duration::from_millis(u64::try_from(at_ms).unwrap_or_default());
    let text = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + since).to_string();
    let shown = text.replace('T', " ").replace('Z', "");
    html! { time datetime=(text) { (shown) } }
}

/// How long something took.
pub(super) fn took(from_ms: Option<i64>, to_ms: Option<i64>) -> Markup {
    let seconds = from_ms.zip(to_ms).map(|(from, to)| (to - from).max(0) as f64 / 1_000.0);
    html! { @if let Some(seconds) = seconds { (duration(seconds)) } }
}

/// A duration in words.
pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1}\u{a0}s"),
        s if s < 120.0 => format!("{s:.0}\u{a0}s"),
        s if s < 7_200.0 => format!("{:.0}\u{a0}min", s / 60.0),
        s => format!("{:.1}\u{a0}h", s / 3_600.0),
    }
}

pub(super) fn bytes(bytes: u64) -> String {
    ByteSize::b(bytes).display().si().to_string()
}

/// How a state looks, whatever it is a state of.
fn look(state: &str) -> &'static str {
    match state {
        "SUCCEEDED" | "COMPLETE" | "ACTIVE" | "succeeded" => "good",
        "FAILED" | "ROLLED_BACK" | "UNREACHABLE" | "failed" | "lost" => "bad",
        "QUEUED" | "PENDING" | "WAITING" | "CANCELLED" | "SUPERSEDED" | "cancelled" => "quiet",
        _ => "busy",
    }
}

/// A state's name, in its colour.
pub(super) fn state(state: impl AsRef<str>) -> Markup {
    let text = state.as_ref();
    html! { span .state .(look(text)) { (text) } }
}

pub(super) fn job_state(status: JobStatus) -> Markup {
    state(status.as_str())
}

pub(super) fn rollout_state(status: RolloutStatus) -> Markup {
    state(status.as_str())
}

pub(super) fn copy_state(status: ReplicationStatus) -> Markup {
    state(status.as_str())
}

/// Shares of a whole as one bar, in hundredths; `label` says them in words.
pub(super) fn bar(parts: &[(&str, u64)], whole: u64, label: &str) -> Markup {
    let mut at = 0.0;
    html! {
        svg .bar viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label=(label) {
            rect width="100" height="6" class="rest" {}
            @for (name, count) in parts {
                @let width = if whole == 0 { 0.0 } else { 100.0 * *count as f64 / whole as f64 };
                @if width > 0.0 { rect x=(format!("{at:.2}")) width=(format!("{width:.2}")) height="6" class=(look(name)) {} }
                ({ at += width; PreEscaped("") })
            }
        }
    }
}

/// A link to the next rows, if there are any.
pub(super) fn more(path: &str, cursor: Option<&str>) -> Markup {
    let mark = if path.contains('?') { '&' } else { '?' };
    html! {
        @if let Some(cursor) = cursor { p { a href=(format!("{path}{mark}cursor={cursor}")) { "Older ones" } } }
    }
}
