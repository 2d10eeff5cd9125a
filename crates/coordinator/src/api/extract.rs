//! How requests are read and answers written; whatever is wrong is told in the one shape of errors.

use std::{error::Error as _, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{
        FromRequest, FromRequestParts, Path, Query, Request, path::ErrorKind,
        rejection::PathRejection,
    },
    http::{StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use crate::error::{ApiError, ApiResult};

/// The longest JSON body of a request, in bytes.
pub(super) const JSON_MAX_BYTES: usize = 1 << 20;

/// The longest batch of reports, in bytes: about 30,000 machines with a state each.
const REPORTS_MAX_BYTES: usize = 16 << 20;

/// How long a body may take to come: 16 MiB at 5 Mbit/s. Uploads have a rule of their own.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A JSON body.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> ApiResult<Self> {
        json(request.into_body(), JSON_MAX_BYTES).await.map(Self)
    }
}

/// A JSON body that may be left out, or null, as releases before sent it.
pub(super) struct Spare<T>(pub(super) Option<T>);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Spare<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> ApiResult<Self> {
        let body = whole(request.into_body(), JSON_MAX_BYTES, BODY_TIMEOUT).await?;
        if body.is_empty() || body.trim_ascii() == b"null" {
            return Ok(Self(None));
        }
        parse(&body).map(|it| Self(Some(it)))
    }
}

/// A JSON body that may be as long as a batch of reports.
pub(super) struct Batch<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Batch<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> ApiResult<Self> {
        json(request.into_body(), REPORTS_MAX_BYTES).await.map(Self)
    }
}

/// Reads a body whole, up to a limit in bytes and in time.
pub(super) async fn whole(body: Body, limit: usize, within: Duration) -> ApiResult<Bytes> {
    let incomplete =
        |text: String| ApiError::new(StatusCode::REQUEST_TIMEOUT, "incomplete_body", text);
    let read = tokio::time::timeout(within, Limited::new(body, limit).collect()).await;
    let read = read
        .map_err(|_| incomplete(format!("the body was not there after {} s", within.as_secs())))?;
    match read {
        Ok(read) => Ok(read.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(ApiError::too_long(format!("the body is longer than {limit} bytes")))
        }
        Err(error) => Err(incomplete(error.to_string())),
    }
}

/// Refuses a body where none is taken; what clients send for none is as good: `{}`, or null.
pub(super) async fn bodiless(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let body = match whole(body, JSON_MAX_BYTES, BODY_TIMEOUT).await {
        Ok(body) => body,
        Err(error) => return error.into_response(),
    };
    let is_spare = body.trim_ascii().is_empty()
        || match serde_json::from_slice(&body) {
            Ok(serde_json::Value::Null) => true,
            Ok(serde_json::Value::Object(fields)) => fields.is_empty(),
            _ => false,
        };
    if !is_spare {
        return ApiError::invalid("wrong body: this call takes none").into_response();
    }
    next.run(Request::from_parts(parts, Body::empty())).await
}

/// Whether a text somewhere in a JSON value, its keys included, has a NUL.
fn has_nul(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::String(text) => text.contains('\0'),
        serde_json::Value::Array(list) => list.iter().any(has_nul),
        serde_json::Value::Object(map) => {
            map.iter().any(|(key, value)| key.contains('\0') || has_nul(value))
        }
        _ => false,
    }
}

/// Reads a body as JSON.
async fn json<T: DeserializeOwned>(body: Body, limit: usize) -> ApiResult<T> {
    parse(&whole(body, limit, BODY_TIMEOUT).await?)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> ApiResult<T> {
    let wrong = |error: serde_json::Error| {
        let text = error.to_string();
        // The place in a body that a program wrote helps nobody.
        let text = text.split(" at line ").next().unwrap_or_default();
        ApiError::invalid(format!("wrong body: {text}"))
    };
    // Of an array fields without their names would be taken.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(ApiError::invalid("wrong body: give a JSON object"));
    }
    // A NUL is written so in JSON, and PostgreSQL keeps it in no text. Few bodies have it, so few are read twice.
    if bytes.windows(6).any(|part| part == b"\\u0000") {
        let value = serde_json::from_slice(bytes).map_err(wrong)?;
        if has_nul(&value) {
            return Err(ApiError::invalid("wrong body: a text has a NUL character: leave it out"));
        }
    }
    serde_json::from_slice(bytes).map_err(wrong)
}

/// The query string.
pub(super) struct Args<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Args<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> ApiResult<Self> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        query.map(|Query(args)| Self(args)).map_err(|error| {
            // The innermost says which one is wrong, and how.
            let text = error.source().map_or_else(|| error.body_text(), ToString::to_string);
            ApiError::invalid(format!("wrong query: {}", in_words(&text)))
        })
    }
}

/// What Rust says of numbers, in words of the API.
fn in_words(text: &str) -> String {
    let words = [
        ("invalid digit found in string", "it is not a whole number"),
        ("cannot parse integer from empty string", "it is empty: give a whole number"),
        ("number too large to fit in target type", "it is too large"),
        ("number too small to fit in target type", "it is too small"),
        ("provided string was not `true` or `false`", "give true or false"),
    ];
    words.iter().fold(text.into(), |text: String, (rust, word)| text.replace(rust, word))
}

fn wrong_path(error: PathRejection) -> String {
    let PathRejection::FailedToDeserializePathParams(error) = error else {
        return error.body_text();
    };
    let text = error.body_text();
    match error.into_kind() {
        // All that is no text is a number.
        ErrorKind::ParseError { value, .. }
        | ErrorKind::ParseErrorAtKey { value, .. }
        | ErrorKind::ParseErrorAtIndex { value, .. } => {
            format!("'{value}' in the address is not a number, or too large")
        }
        ErrorKind::DeserializeError { message, .. } | ErrorKind::Message(message) => message,
        ErrorKind::InvalidUtf8InPathParam { .. } => "the address is not UTF-8".into(),
        _ => text,
    }
}

/// The path's variables.
pub(super) struct Place<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Place<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> ApiResult<Self> {
        let path = Path::<T>::from_request_parts(parts, state).await;
        path.map(|Path(place)| Self(place)).map_err(|error| ApiError::invalid(wrong_path(error)))
    }
}

/// An answer in JSON.
pub(super) type Reply<T> = ApiResult<axum::Json<T>>;

/// The answer to what needs none: `{}`.
pub(super) fn done() -> axum::Json<shoal_client::types::Done> {
    axum::Json(shoal_client::types::Done {})
}

/// An answer of plain bytes.
pub(super) struct Raw(pub(super) Vec<u8>);

impl IntoResponse for Raw {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.0));
        let kind = header::HeaderValue::from_static("application/octet-stream");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

/// An answer in JSON, or that there is nothing (204).
pub(super) struct Maybe<T>(pub(super) Option<T>);

impl<T: serde::Serialize> IntoResponse for Maybe<T> {
    fn into_response(self) -> Response {
        match self.0 {
            Some(answer) => axum::Json(answer).into_response(),
            None => StatusCode::NO_CONTENT.into_response(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_nul_is_refused_wherever_it_is() {
        let read =
            async |text: &'static str| json::<serde_json::Value>(Body::from(text), 100).await;
        for wrong in [r#"{"a": "x\u0000"}"#, r#"{"a": ["\u0000"]}"#, r#"{"\u0000": 1}"#] {
            assert!(read(wrong).await.is_err(), "{wrong}");
        }
        // A backslash and five letters is no NUL.
        assert!(read(r#"{"a": "\\u0000"}"#).await.is_ok());
    }
}
