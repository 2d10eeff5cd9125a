//! Events, webhooks, pushes, history.

use std::{collections::VecDeque, time::Duration};

use reqwest::Method;
use shoal_proto::AppName;

use super::{Client, ClientError, Result};
use crate::types::{
    AutoDeploy, AutoDeployRequest, Event, HistoryEntry, PushRequest, PushSettings, Webhook,
    WebhookDelivery, WebhookRequest,
};

/// A stream on which nothing comes for this long is dead: a coordinator sends a comment every 15 s.
const SILENCE_MAX: Duration = Duration::from_secs(45);

/// How long one stream is followed at most before a new one is asked for.
const STREAM_TIMEOUT: Duration = Duration::from_secs(86_400);

/// The longest event that is read, in bytes.
const FRAME_MAX_BYTES: usize = 64 << 10;

/// Which events are wanted.
#[derive(Debug, Clone, Default)]
pub struct EventQuery {
    /// Only of this app; none: of all.
    pub app: Option<AppName>,
    /// Only of these types; empty: of all.
    pub types: Vec<String>,
}

impl EventQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut query = Vec::new();
        query.extend(self.app.as_ref().map(|app| ("app", app.to_string())));
        if !self.types.is_empty() {
            query.push(("type", self.types.join(",")));
        }
        query
    }
}

/// What comes on a stream of events.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // One at a time, and nearly all are events.
pub enum Streamed {
    /// Something happened.
    Event(Event),
    /// The coordinator says something about the stream itself: a name such as `stream:gap`, and the text.
    Notice(String, String),
}

/// A stream of events.
pub struct EventStream {
    response: reqwest::Response,
    url: String,
    buffer: Vec<u8>,
    ready: VecDeque<Streamed>,
}

/// Reads one frame of a stream; none when it is a comment.
fn frame(text: &str) -> std::result::Result<Option<Streamed>, String> {
    let (mut name, mut data) = ("", String::new());
    for line in text.lines() {
        match line.split_once(':') {
            Some(("event", value)) => name = value.trim_start(),
            Some(("data", value)) => data.push_str(value.strip_prefix(' ').unwrap_or(value)),
            _ => {}
        }
    }
    if data.is_empty() {
        return Ok(None);
    }
    if name.starts_with("stream:") {
        return Ok(Some(Streamed::Notice(name.into(), data)));
    }
    let event = serde_json::from_str(&data).map_err(|error| error.to_string())?;
    Ok(Some(Streamed::Event(event)))
}

impl EventStream {
    /// What comes next; none when the stream has ended: ask for another one after the last event.
    ///
    /// # Errors
    /// [`ClientError`] when the connection broke, or what came is no event.
    pub async fn next(&mut self) -> Result<Option<Streamed>> {
        loop {
            if let Some(ready) = self.ready.pop_front() {
                return Ok(Some(ready));
            }
            let unexpected = |text| ClientError::Unexpected { url: self.url.clone(), text };
            let chunk = tokio::time::timeout(SILENCE_MAX, self.response.chunk())
                .await
                .map_err(|_| unexpected(format!("nothing came for {SILENCE_MAX:?}")))?;
            let chunk = chunk.map_err(|source| ClientError::unreached(&self.url, source))?;
            let Some(chunk) = chunk else { return Ok(None) };
            self.buffer.extend_from_slice(&chunk);
            while let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let rest = self.buffer.split_off(end + 2);
                let text = std::mem::replace(&mut self.buffer, rest);
                let text = String::from_utf8_lossy(&text);
                self.ready.extend(frame(&text).map_err(unexpected)?);
            }
            if self.buffer.len() > FRAME_MAX_BYTES {
                return Err(unexpected(format!("an event of more than {FRAME_MAX_BYTES} bytes")));
            }
        }
    }
}

impl Client {
    /// The newest events, newest first.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn events(&self, wanted: &EventQuery, limit: u32) -> Result<Vec<Event>> {
        self.list("v1/events/recent", wanted.pairs(), Some(limit)).await
    }

    /// Follows events: those after a number, or from now on.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn follow_events(
        &self,
        wanted: &EventQuery,
        after: Option<i64>,
    ) -> Result<EventStream> {
        let query = wanted.pairs();
        let build = |mut call: reqwest::RequestBuilder| {
            if let Some(after) = after {
                call = call.header("Last-Event-ID", after.to_string());
            }
            call.query(&query).timeout(STREAM_TIMEOUT)
        };
        let url = self.url().to_string();
        let response = self.send(Method::GET, "v1/events", build).await?;
        Ok(EventStream { response, url, buffer: Vec::new(), ready: VecDeque::new() })
    }

    /// Adds a webhook.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn add_webhook(&self, request: &WebhookRequest) -> Result<Webhook> {
        self.post("v1/webhooks", request).await
    }

    /// All webhooks.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn webhooks(&self) -> Result<Vec<Webhook>> {
        self.list("v1/webhooks", Vec::new(), None).await
    }

    /// Removes a webhook.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn remove_webhook(&self, id: i64) -> Result<()> {
        let path = format!("v1/webhooks/{id}");
        self.send(Method::DELETE, &path, |call| call).await.map(drop)
    }

    /// Sends a test message to a webhook now, once, and says how that went.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn test_webhook(&self, id: i64) -> Result<WebhookDelivery> {
        self.post(&format!("v1/webhooks/{id}/test"), &()).await
    }

    /// The newest messages to a webhook, newest first.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn webhook_deliveries(&self, id: i64, limit: u32) -> Result<Vec<WebhookDelivery>> {
        self.list(&format!("v1/webhooks/{id}/deliveries"), Vec::new(), Some(limit)).await
    }

    /// Lets pushes start builds of an app.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn set_push(&self, app: &AppName, request: &PushRequest) -> Result<PushSettings> {
        let path = format!("v1/apps/{app}/push");
        let response = self.send(Method::PUT, &path, |call| call.json(request)).await?;
        self.read(response).await
    }

    /// Lets none.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn unset_push(&self, app: &AppName) -> Result<()> {
        let path = format!("v1/apps/{app}/push");
        self.send(Method::DELETE, &path, |call| call).await.map(drop)
    }

    /// Whose pushes start builds of an app.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn push_settings(&self, app: &AppName) -> Result<PushSettings> {
        self.get(&format!("v1/apps/{app}/push"), &[]).await
    }

    /// Whether an app's main branch is deployed by itself.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn auto_deploy(&self, app: &AppName) -> Result<AutoDeploy> {
        self.get(&format!("v1/apps/{app}/auto-deploy"), &[]).await
    }

    /// Switches that on, off, or on again after an operator went back.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn set_auto_deploy(
        &self,
        app: &AppName,
        request: &AutoDeployRequest,
    ) -> Result<AutoDeploy> {
        self.post(&format!("v1/apps/{app}/auto-deploy"), request).await
    }

    /// Builds and deployments, newest first; of one app or of all.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn history(&self, app: Option<&AppName>, limit: u32) -> Result<Vec<HistoryEntry>> {
        let query = app.map(|app| ("app", app.to_string())).into_iter().collect();
        self.list("v1/history", query, Some(limit)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_events_notices_or_comments() {
        assert_eq!(frame(": \n"), Ok(None));
        let text = "event: stream:gap\ndata: {\"after\":1}\n";
        let notice = Streamed::Notice("stream:gap".into(), "{\"after\":1}".into());
        assert_eq!(frame(text), Ok(Some(notice)));
        let text = "id: 7\nevent: build:init\n\
                    data: {\"id\":7,\"type\":\"build:init\",\"at_ms\":1,\"app\":\"web\"}\n";
        let Ok(Some(Streamed::Event(event))) = frame(text) else { panic!("no event") };
        assert_eq!((event.id, event.kind.as_str()), (7, "build:init"));
        assert!(frame("data: {\"id\":7}\n").is_err());
    }
}
