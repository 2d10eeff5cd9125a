//! Artifacts, and how operators bring their own.

use axum::extract::Request;
use serde::Deserialize;
use shoal_client::types;
use shoal_origin::Check;
use shoal_proto::{
    AppName, ArtifactId, EncodingId,
    manifest::{INDEX_MAX_BYTES, PART_MAX_BYTES, PIECES_MAX},
};
use shoal_queue::Bell;

use super::{App, Args, Json, Place, Reply, Who, done, jobs::ListArgs, limited, whole};
use crate::{error::ApiError, removal, state::now_ms, uploads, view};

/// How many digits of the id a published artifact's name has.
const NAME_DIGITS: usize = 12;

pub(super) async fn list(shared: App, Args(args): Args<ListArgs>) -> Reply<Vec<types::Artifact>> {
    if let Some(app) = &args.app {
        shared.queue.app(app).await?;
    }
    let artifacts = shared.queue.artifacts(args.app.as_ref(), limited(args.limit)).await?;
    let regions = shared.queue.regions().await?;
    let list = artifacts.into_iter().map(|artifact| view::artifact(artifact, &regions));
    Ok(axum::Json(list.collect()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OneArgs {
    r#ref: String,
}

pub(super) async fn one(shared: App, Args(args): Args<OneArgs>) -> Reply<types::Artifact> {
    let artifact = shared.queue.artifact(&args.r#ref, None).await?;
    let regions = shared.queue.regions().await?;
    Ok(axum::Json(view::artifact(artifact, &regions)))
}

pub(super) async fn state(
    shared: App,
    Place((artifact, encoding)): Place<(ArtifactId, EncodingId)>,
) -> Reply<types::UploadState> {
    let mut parts = shared.main.parts(&artifact, &encoding).await?;
    // An index that lacks parts is what a removal at the same moment may leave.
    let whole = matches!(shared.main.check(&artifact, &encoding).await, Ok(Check::Whole));
    // A part that its index has disproved is to be sent again.
    parts.retain(|number, _| !shared.part_hashes.is_bad(&encoding, *number));
    Ok(axum::Json(types::UploadState { parts, whole }))
}

/// The number of the part that an object's name names.
fn part_number(object: &str) -> Option<u32> {
    let digits = object.strip_prefix("part-")?;
    let number = digits.parse().ok()?;
    // One spelling a part, and no more parts than pieces.
    (format!("{number:05}") == digits && number < PIECES_MAX).then_some(number)
}

fn too_long(request: &Request, limit: u64) -> bool {
    let length = request.headers().get(axum::http::header::CONTENT_LENGTH);
    let length = length.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    length.is_some_and(|length| length > limit)
}

pub(super) async fn put(
    shared: App,
    Place((artifact, encoding, object)): Place<(ArtifactId, EncodingId, String)>,
    request: Request,
) -> Reply<serde_json::Value> {
    let hashes = &shared.part_hashes;
    if object == "index" {
        let bytes = whole(request.into_body(), INDEX_MAX_BYTES).await?;
        uploads::put_index(&shared.main, hashes, &artifact, &encoding, bytes).await?;
        return Ok(done());
    }
    let number = part_number(&object).ok_or_else(|| {
        ApiError::invalid(format!(
            "'{object}' is not an object of an encoding: part-NNNNN or index"
        ))
    })?;
    if too_long(&request, PART_MAX_BYTES) {
        return Err(ApiError::too_long(format!("a part is at most {PART_MAX_BYTES} bytes")));
    }
    let body = request.into_body();
    uploads::put_part(&shared.main, hashes, &artifact, &encoding, number, body).await?;
    Ok(done())
}

fn published_name(app: &AppName, artifact: &ArtifactId) -> String {
    let id = artifact.to_string();
    format!("{app}/b3-{}", &id[..NAME_DIGITS])
}

pub(super) async fn publish(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::PublishRequest>,
) -> Reply<types::Artifact> {
    // First the app: the other check reads a bucket.
    shared.queue.app(&request.app).await?;
    let (artifact, encoding) = (&request.artifact, &request.encoding);
    let seen = removal::generation(&shared, artifact, encoding).await?;
    let stored = uploads::stored(&shared.main, &request.artifact, &request.encoding).await?;
    let name = published_name(&request.app, &request.artifact);
    let regions = shared.region_names();
    let queue = &shared.queue;
    let stored = (&stored, Some(seen));
    let published =
        queue.publish_seen(&request.app, &name, stored, &regions, &actor, now_ms()).await?;
    shared.ring(Bell::Copies);
    tracing::info!(name, by = actor.name, "artifact published");
    let regions: Vec<_> = queue.regions().await?;
    Ok(axum::Json(view::artifact(published, &regions)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_have_one_spelling() {
        assert_eq!(part_number("part-00000"), Some(0));
        assert_eq!(part_number("part-00123"), Some(123));
        for wrong in
            ["part-", "part-1", "part-+0001", "part-000001", "part-99999", "parts", "Index"]
        {
            assert_eq!(part_number(wrong), None, "{wrong}");
        }
    }
}
