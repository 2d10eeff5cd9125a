//! Ranges by URL: signed by who holds credentials, read by who holds none.

use std::{ops::Range, time::Duration};

use bytes::{Bytes, BytesMut};
use object_store::signer::{HeaderName, HeaderValue, Method, SignedUrlOptions};
use reqwest::{StatusCode, header};
use shoal_proto::{ArtifactId, EncodingId, manifest::Location};

use crate::{bucket::Bucket, error::OriginError, read::GET_MAX_BYTES, retry::retried};

/// How long a connection to a bucket may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a bucket may say nothing in the middle of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

impl Bucket {
    /// Whether [`Bucket::sign_pieces`] can do anything at all: not of a directory.
    #[must_use]
    pub fn signs(&self) -> bool {
        self.signer().is_some()
    }

    /// One URL for each of the pieces `first..first + count`, by which its stored bytes, and no others, can be read
    /// without credentials for as long as `valid` says, by the clocks of this machine and the store. Sends nothing
    /// (on GCS without a service account's key: one request for each). `layout` is
    /// [`shoal_proto::manifest::EncodingIndex::layout`]. The URLs are secrets.
    ///
    /// # Errors
    /// [`OriginError::NoUrls`], [`OriginError::NoSuchPieces`], [`OriginError::NoCredentials`],
    /// [`OriginError::Store`].
    pub async fn sign_pieces(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        layout: &[Location],
        (first, count): (u32, u32),
        valid: Duration,
    ) -> Result<Vec<String>, OriginError> {
        let signer =
            self.signer().ok_or_else(|| OriginError::NoUrls { bucket: self.url().into() })?;
        let wanted = (first as usize).checked_add(count as usize);
        let wanted = wanted.and_then(|end| layout.get(first as usize..end));
        let no_such = OriginError::NoSuchPieces { first, count, pieces: layout.len() };
        let wrong =
            |reason: &str| OriginError::Settings { name: self.url().into(), reason: reason.into() };
        let mut urls = Vec::with_capacity(count as usize);
        for place in wanted.ok_or(no_such)? {
            let key = self.part_key(artifact, encoding, place.part);
            // Without it the URL would give away the whole part.
            let range = HeaderValue::from_str(&range_header(&range_of(place)));
            let range = range.map_err(|_| wrong("a range that is no header"))?;
            let range_name = HeaderName::from_static("range");
            let options = SignedUrlOptions::new().with_signed_header(range_name, range);
            let url = signer.signed_url_opts(Method::GET, &key, valid, &options).await;
            urls.push(url.map_err(|error| self.error(&key, error))?.into());
        }
        Ok(urls)
    }
}

/// The bytes of a piece in its part.
fn range_of(place: &Location) -> Range<u64> {
    place.offset..place.offset + u64::from(place.len)
}

fn range_header(range: &Range<u64>) -> String {
    format!("bytes={}-{}", range.start, range.end.saturating_sub(1))
}

/// Reads ranges by URLs that others have signed. Clones share their connections.
#[derive(Debug, Clone)]
pub struct UrlReader(reqwest::Client);

impl UrlReader {
    /// A reader without any credentials.
    ///
    /// # Errors
    /// [`OriginError::Url`] when TLS cannot be set up.
    pub fn new() -> Result<Self, OriginError> {
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            // A signature is for one host and one path.
            .redirect(reqwest::redirect::Policy::none())
            .build();
        client.map(Self).map_err(|error| failed("TLS", error, false))
    }

    /// The stored bytes of the piece at `place`, by the URL that was signed for it. An answer that is not exactly this
    /// range is an error; what may go better is tried again. The piece is not verified here.
    ///
    /// # Errors
    /// [`OriginError::WrongRange`], [`OriginError::Url`]; neither repeats the URL.
    pub async fn read(&self, url: &str, place: &Location) -> Result<Bytes, OriginError> {
        let range = &range_of(place);
        let parsed = reqwest::Url::parse(url).ok().filter(|url| url.has_host());
        let host =
            parsed.as_ref().and_then(|url| url.host_str()).unwrap_or("the bucket").to_string();
        let wrong = |reason: &str| OriginError::Url {
            host: host.clone(),
            reason: reason.into(),
            transient: false,
        };
        let url = parsed.ok_or_else(|| wrong("was given a URL that is none"))?;
        if range.is_empty() || u64::from(place.len) > GET_MAX_BYTES {
            return Err(wrong("was given a piece of no possible length"));
        }
        let (url, host) = (&url, host.as_str());
        retried("read by URL", || async move { self.get(url, host, range).await }).await
    }

    async fn get(
        &self,
        url: &reqwest::Url,
        host: &str,
        range: &Range<u64>,
    ) -> Result<Bytes, OriginError> {
        let request = self.0.get(url.clone()).header(header::RANGE, range_header(range));
        let mut answer = request.send().await.map_err(|error| failed(host, error, true))?;
        let got = |got: String| OriginError::WrongRange {
            key: url.path().trim_start_matches('/').into(),
            asked: range.clone(),
            got,
        };
        let status = answer.status();
        if status != StatusCode::PARTIAL_CONTENT {
            if status.is_success() {
                return Err(got(format!("an answer that is no range ({status})")));
            }
            let again = status.is_server_error()
                || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status);
            let reason = match status {
                StatusCode::FORBIDDEN => {
                    format!("{status}: the URL has expired, or who signed it may not read this")
                }
                _ => status.to_string(),
            };
            return Err(OriginError::Url { host: host.into(), reason, transient: again });
        }
        let told = answer.headers().get(header::CONTENT_RANGE);
        let told = told.and_then(|told| told.to_str().ok()).unwrap_or("no range").to_string();
        let right = told.strip_prefix("bytes ").and_then(|rest| rest.split_once('/'));
        let right = right.and_then(|(bytes, _)| bytes.split_once('-')).is_some_and(|(from, to)| {
            from.parse() == Ok(range.start) && to.parse() == Ok(range.end - 1)
        });
        if !right {
            return Err(got(told));
        }
        let len = range.end - range.start;
        if let Some(other) = answer.content_length().filter(|other| *other != len) {
            return Err(got(format!("{other} bytes")));
        }
        let mut bytes = BytesMut::with_capacity(len as usize);
        while let Some(chunk) = answer.chunk().await.map_err(|error| failed(host, error, true))? {
            if (bytes.len() + chunk.len()) as u64 > len {
                return Err(got(format!("more than {len} bytes")));
            }
            bytes.extend_from_slice(&chunk);
        }
        if bytes.len() as u64 != len {
            return Err(got(format!("{} bytes", bytes.len())));
        }
        Ok(bytes.freeze())
    }
}

/// A client's error without the URL, and with its causes.
fn failed(host: &str, error: reqwest::Error, transient: bool) -> OriginError {
    let error = error.without_url();
    let mut reason = error.to_string();
    let mut at = std::error::Error::source(&error);
    while let Some(error) = at {
        reason = format!("{reason}: {error}");
        at = error.source();
    }
    OriginError::Url { host: host.into(), reason, transient }
}
