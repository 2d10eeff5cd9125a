//! Events: the stream, and the newest ones.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use serde::Deserialize;
use shoal_client::types;
use shoal_proto::AppName;
use shoal_queue::{EventFilter, EventKind};

use super::{App, Args, Reply, limited};
use crate::{
    error::{ApiError, ApiResult},
    events::{self, Follow},
    state::Shared,
};

/// What a reader that comes again says it has.
const LAST: &str = "last-event-id";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StreamArgs {
    app: Option<AppName>,
    #[serde(rename = "type")]
    kinds: Option<String>,
    /// The same as the header, for those who cannot set one.
    after: Option<i64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecentArgs {
    app: Option<AppName>,
    #[serde(rename = "type")]
    kinds: Option<String>,
    limit: Option<u32>,
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
    names.map(str::trim).filter(|name| !name.is_empty()).map(named).collect()
}

async fn filter(
    shared: &Shared,
    app: Option<AppName>,
    names: Option<String>,
) -> ApiResult<EventFilter> {
    if let Some(app) = &app {
        shared.queue.app(app).await?;
    }
    let kinds = kinds(names.unwrap_or_default().split(','))?;
    Ok(EventFilter { app, kinds })
}

pub(super) async fn stream(
    shared: App,
    Args(args): Args<StreamArgs>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let filter = filter(&shared, args.app, args.kinds).await?;
    let after = match headers.get(LAST) {
        Some(last) => {
            let last = last.to_str().ok().and_then(|text| text.trim().parse().ok());
            let wrong = || ApiError::invalid("Last-Event-ID is no event's number: leave it out");
            Some(last.ok_or_else(wrong)?)
        }
        None => args.after,
    };
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
    Ok(response)
}

pub(super) async fn recent(shared: App, Args(args): Args<RecentArgs>) -> Reply<Vec<types::Event>> {
    let filter = filter(&shared, args.app, args.kinds).await?;
    let newest = shared.queue.newest_events(&filter, limited(args.limit)).await?;
    Ok(axum::Json(newest.into_iter().map(events::told).collect()))
}
