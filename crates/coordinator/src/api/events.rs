//! Events: the stream, and the newest ones.

use std::collections::BTreeSet;

use axum::{
    body::Body,
    extract::FromRequestParts,
    http::{HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::Deserialize;
use shoal_client::types;
use shoal_proto::AppName;
use shoal_queue::{EventFilter, EventKind};

use super::{App, Args, Reply, Who, access::Principal, pages::Paging};
use crate::{
    error::{ApiError, ApiResult},
    events::{self, Follow},
    state::Shared,
};

/// What a reader that comes again says it has.
const LAST: &str = "last-event-id";

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StreamArgs {
    /// Only of this app.
    app: Option<AppName>,
    /// Only of these types, separated by commas.
    #[serde(rename = "type")]
    kinds: Option<String>,
    /// The same as the header, for those who cannot set one.
    #[schemars(range(min = 0))]
    after: Option<i64>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RecentArgs {
    /// Only of this app.
    app: Option<AppName>,
    /// Only of these types, separated by commas.
    #[serde(rename = "type")]
    kinds: Option<String>,
    /// How many rows at most, 1 to 1000; 100 when nothing is said.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// What a reader that comes again has already.
pub(super) struct LastEventId(Option<i64>);

impl<S: Send + Sync> FromRequestParts<S> for LastEventId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> ApiResult<Self> {
        let Some(last) = parts.headers.get(LAST) else { return Ok(Self(None)) };
        let last = last.to_str().ok().and_then(|text| text.trim().parse().ok());
        let wrong = || ApiError::invalid("Last-Event-ID is no event's number: leave it out");
        last.ok_or_else(wrong).map(|last| Self(Some(last)))
    }
}

/// An answer that goes on.
pub(super) struct Stream(Response);

impl IntoResponse for Stream {
    fn into_response(self) -> Response {
        self.0
    }
}

/// Reads the names of kinds.
pub(super) fn kinds<'a>(names: impl Iterator<Item = &'a str>) -> ApiResult<Vec<EventKind>> {
    let named = |name: &str| {
        EventKind::named(name).ok_or_else(|| {
            let all: Vec<_> = EventKind::ALL.iter().map(|kind| kind.as_str()).collect();
            let name: String = name.chars().take(100).collect();
            ApiError::invalid(format!("no event type '{name}': there are {}", all.join(", ")))
        })
    };
    names.map(str::trim).map(named).collect()
}

async fn filter(
    shared: &Shared,
    by: &Principal,
    app: Option<AppName>,
    names: Option<String>,
) -> ApiResult<EventFilter> {
    let apps: Option<BTreeSet<AppName>> = by.apps(app.as_ref())?;
    if let Some(app) = &app {
        shared.queue.app(app).await?;
    }
    let kinds = kinds(names.iter().flat_map(|names| names.split(',')))?;
    Ok(EventFilter { apps, kinds })
}

pub(super) async fn stream(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<StreamArgs>,
    LastEventId(last): LastEventId,
) -> ApiResult<Stream> {
    let filter = filter(&shared, &by, args.app, args.kinds).await?;
    let after = last.or(args.after);
    if after.is_some_and(|after: i64| after < 0) {
        return Err(ApiError::invalid("an event's number is 0 or more"));
    }
    let place = shared.streams.clone().try_acquire_owned().map_err(|_| {
        let text = format!(
            "{} streams of events are open here: ask another coordinator, or close one",
            events::STREAMS_MAX
        );
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "busy", text)
    })?;
    let follow = Follow { filter, after };
    let stream = events::stream(shared.0.clone(), follow, place).await?;
    let mut response = Response::new(Body::from_stream(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // A proxy that gathers answers would hold events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(Stream(response))
}

pub(super) async fn recent(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<RecentArgs>,
) -> Reply<types::Page<types::Event>> {
    let paging = Paging::of("events", args.limit, args.cursor.as_deref())?;
    let filter = filter(&shared, &by, args.app, args.kinds).await?;
    let newest = shared.queue.newest_events(&filter, paging.after, paging.wanted()).await?;
    Ok(paging.page(newest, |event| event.seq, events::told))
}
