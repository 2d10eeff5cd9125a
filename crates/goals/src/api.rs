//! etcd's JSON: what is sent and what comes back, as far as it is used. Bytes are base64, 64-bit numbers are texts, and
//! what is zero is left out.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Bytes as base64.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Blob(pub(crate) Vec<u8>);

impl From<&str> for Blob {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        BASE64.decode(text.as_bytes()).map(Self).map_err(D::Error::custom)
    }
}

/// A number that is a text; a plain one is understood, too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Long(pub(crate) u64);

impl Serialize for Long {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Long {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(u64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(number) => Ok(Self(number)),
            Either::Text(text) => text.parse().map(Self).map_err(D::Error::custom),
        }
    }
}

/// Which etcd answers, and where it stands.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Header {
    pub(crate) cluster_id: Long,
    pub(crate) revision: Long,
}

/// A key and its value.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct KeyValue {
    pub(crate) key: Blob,
    pub(crate) value: Blob,
    pub(crate) mod_revision: Long,
}

#[derive(Debug, Serialize)]
pub(crate) struct RangeRequest {
    pub(crate) key: Blob,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) range_end: Option<Blob>,
    pub(crate) limit: Long,
    pub(crate) min_mod_revision: Long,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RangeResponse {
    pub(crate) header: Header,
    pub(crate) kvs: Vec<KeyValue>,
    pub(crate) more: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct DeleteRequest {
    pub(crate) key: Blob,
    pub(crate) range_end: Blob,
}

#[derive(Debug, Deserialize)]
pub(crate) struct DeleteResponse {}

/// One comparison of a transaction.
#[derive(Debug, Serialize)]
pub(crate) struct Compare {
    pub(crate) key: Blob,
    pub(crate) target: &'static str,
    pub(crate) result: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<Long>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) value: Option<Blob>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mod_revision: Option<Long>,
}

#[derive(Debug, Serialize)]
pub(crate) struct PutRequest {
    pub(crate) key: Blob,
    pub(crate) value: Blob,
}

#[derive(Debug, Serialize)]
pub(crate) enum Op {
    #[serde(rename = "request_put")]
    Put(PutRequest),
    #[serde(rename = "request_range")]
    Range(RangeRequest),
    #[serde(rename = "request_txn")]
    Txn(TxnRequest),
}

#[derive(Debug, Serialize)]
pub(crate) struct TxnRequest {
    pub(crate) compare: Vec<Compare>,
    pub(crate) success: Vec<Op>,
    pub(crate) failure: Vec<Op>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TxnResponse {
    pub(crate) succeeded: bool,
    pub(crate) responses: Vec<OpResponse>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct OpResponse {
    pub(crate) response_range: Option<RangeResponse>,
    pub(crate) response_txn: Option<TxnResponse>,
}

#[derive(Debug, Serialize)]
pub(crate) struct WatchRequest {
    pub(crate) create_request: WatchCreate,
}

#[derive(Debug, Serialize)]
pub(crate) struct WatchCreate {
    pub(crate) key: Blob,
    pub(crate) range_end: Blob,
    pub(crate) start_revision: Long,
    pub(crate) filters: [&'static str; 1],
    pub(crate) progress_notify: bool,
    pub(crate) fragment: bool,
}

/// A line of a watch's answer.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WatchLine {
    Result(WatchResponse),
    Error(serde_json::Value),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct WatchResponse {
    pub(crate) header: Header,
    pub(crate) created: bool,
    pub(crate) canceled: bool,
    pub(crate) compact_revision: Long,
    pub(crate) cancel_reason: String,
    pub(crate) fragment: bool,
    pub(crate) events: Vec<WatchEvent>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct WatchEvent {
    pub(crate) kv: KeyValue,
}

#[derive(Debug, Serialize)]
pub(crate) struct AuthRequest<'a> {
    pub(crate) name: &'a str,
    pub(crate) password: &'a str,
}

#[derive(Debug, Deserialize)]
pub(crate) struct AuthResponse {
    pub(crate) token: String,
}

/// How the gateway says no: gRPC's code and a line. Releases differ in which of the two texts they send.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Refusal {
    pub(crate) code: u32,
    pub(crate) message: String,
    pub(crate) error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_texts_and_bytes_base64() {
        let text = r#"{"header":{"cluster_id":"9","revision":3},"kvs":[{"key":"aw==","mod_revision":"3"}]}"#;
        let answer: RangeResponse = serde_json::from_str(text).unwrap();
        assert_eq!((answer.header.cluster_id, answer.header.revision), (Long(9), Long(3)));
        assert_eq!(answer.kvs[0].key, Blob::from("k"));
        assert!(!answer.more);
        let put = Op::Put(PutRequest { key: "k".into(), value: "v".into() });
        let put = serde_json::to_string(&put).unwrap();
        assert_eq!(put, r#"{"request_put":{"key":"aw==","value":"dg=="}}"#);
    }

    #[test]
    fn a_watch_that_is_compacted_says_so() {
        let line = r#"{"result":{"header":{},"canceled":true,"compact_revision":"3"}}"#;
        match serde_json::from_str(line).unwrap() {
            WatchLine::Result(answer) => assert_eq!(answer.compact_revision, Long(3)),
            line => panic!("{line:?}"),
        }
        serde_json::from_str::<WatchLine>(r#"{"error":{"grpc_code":14}}"#).unwrap();
    }
}
