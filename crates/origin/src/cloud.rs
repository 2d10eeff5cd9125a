//! S3 and GCS: their settings and credentials from the environment, where their SDKs look for them.

use std::{
    collections::BTreeMap, future::Future, path::PathBuf, pin::Pin, sync::Arc, time::Duration,
};

use object_store::{
    BackoffConfig, CredentialProvider, RetryConfig, StaticCredentialProvider,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsCredential, Checksum},
    gcp::{GoogleCloudStorage, GoogleCloudStorageBuilder, GoogleConfigKey},
};

use crate::{
    error::{NO_CREDENTIALS, OriginError},
    profile::Profile,
};

/// How often a single request is tried again by its client.
const REQUEST_RETRIES_MAX: usize = 4;

/// For how long it may be tried again.
const REQUEST_RETRY_TIMEOUT: Duration = Duration::from_secs(60);

/// The first pause of these and the longest one; they grow at random in between.
const REQUEST_PAUSE_MIN: Duration = Duration::from_millis(100);
const REQUEST_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Variables and their values.
pub(crate) type Environment = BTreeMap<String, String>;

fn request_retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: REQUEST_PAUSE_MIN,
            max_backoff: REQUEST_PAUSE_MAX,
            base: 2.0,
        },
        max_retries: REQUEST_RETRIES_MAX,
        retry_timeout: REQUEST_RETRY_TIMEOUT,
    }
}

/// Opens an S3 bucket. Credentials come from the first of these that is there: keys in the environment, a web
/// identity, a container's role, the SDK's files, the instance's role.
pub(crate) fn s3(bucket: &str, environment: &Environment) -> Result<AmazonS3, OriginError> {
    let get = |name: &str| environment.get(name).map(String::as_str).filter(|v| !v.is_empty());
    let mut builder = AmazonS3Builder::new();
    for (name, value) in environment.iter().filter(|(name, _)| name.starts_with("AWS_")) {
        if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>()
            && !value.is_empty()
        {
            builder = builder.with_config(key, value);
        }
    }
    if get("AWS_CHECKSUM_ALGORITHM").is_none()
        && get("AWS_REQUEST_CHECKSUM_CALCULATION").is_none_or(|when| when != "when_required")
    {
        // It costs nothing: the signature needs the same hash.
        builder = builder.with_checksum_algorithm(Checksum::SHA256);
    }
    let role = get("AWS_WEB_IDENTITY_TOKEN_FILE").is_some() && get("AWS_ROLE_ARN").is_some()
        || get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI").is_some()
        || get("AWS_CONTAINER_CREDENTIALS_FULL_URI").is_some();
    let keys = get("AWS_ACCESS_KEY_ID").is_some() || get("AWS_SECRET_ACCESS_KEY").is_some();
    let profile = Profile::load(environment)?;
    if get("AWS_REGION").or(get("AWS_DEFAULT_REGION")).is_none()
        && let Some(region) = &profile.region
    {
        builder = builder.with_region(region);
    }
    let mut endpoint =
        get("AWS_ENDPOINT_URL_S3").or(get("AWS_ENDPOINT_URL")).or(get("AWS_ENDPOINT"));
    if endpoint.is_none()
        && let Some(url) = &profile.endpoint_url
    {
        builder = builder.with_endpoint(url);
        endpoint = Some(url);
    }
    if endpoint.is_some_and(|url| url.starts_with("http://")) {
        // Who writes http:// means it.
        builder = builder.with_allow_http(true);
    }
    if let Some(url) = get("AWS_EC2_METADATA_SERVICE_ENDPOINT") {
        builder = builder.with_metadata_endpoint(url.trim_end_matches('/'));
    }
    if !keys && !role {
        if let Some((key_id, secret_key)) = profile.key {
            let credential = AwsCredential { key_id, secret_key, token: profile.token };
            builder = builder.with_credentials(Arc::new(StaticCredentialProvider::new(credential)));
        } else if get("AWS_EC2_METADATA_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true")) {
            builder = builder.with_credentials(Arc::new(Nobody));
        }
    }
    Ok(builder.with_bucket_name(bucket).with_retry(request_retries()).build()?)
}

/// Opens a GCS bucket. Credentials come from a service account's key or the application's default ones, else
/// from the instance.
pub(crate) fn gcs(
    bucket: &str,
    environment: &Environment,
) -> Result<GoogleCloudStorage, OriginError> {
    let mut builder = GoogleCloudStorageBuilder::new();
    for (name, value) in environment.iter().filter(|(name, _)| name.starts_with("GOOGLE_")) {
        if let Ok(key) = name.to_ascii_lowercase().parse::<GoogleConfigKey>()
            && !value.is_empty()
        {
            builder = builder.with_config(key, value);
        }
    }
    Ok(builder.with_bucket_name(bucket).with_retry(request_retries()).build()?)
}

/// The directory of the user that the process runs as.
pub(crate) fn home(environment: &Environment) -> Option<PathBuf> {
    environment.get("HOME").filter(|home| !home.is_empty()).map(PathBuf::from)
}

/// Has no credentials, and says so when it is asked.
#[derive(Debug)]
struct Nobody;

impl CredentialProvider for Nobody {
    type Credential = AwsCredential;

    fn get_credential<'a, 't>(
        &'a self,
    ) -> Pin<Box<dyn Future<Output = object_store::Result<Arc<AwsCredential>>> + Send + 't>>
    where
        'a: 't,
    {
        let none = object_store::Error::Generic { store: "S3", source: NO_CREDENTIALS.into() };
        Box::pin(async { Err(none) })
    }
}
