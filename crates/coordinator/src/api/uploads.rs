//! Artifacts, and how operators bring their own.

use axum::extract::Request;
use schemars::JsonSchema;
use serde::Deserialize;
use shoal_client::types;
use shoal_origin::Check;
use shoal_proto::{
    AppName, ArtifactId, EncodingId,
    manifest::{INDEX_MAX_BYTES, PART_MAX_BYTES, PIECES_MAX},
};
use shoal_queue::{Artifact, Bell};

use super::{
    App, Args, BODY_TIMEOUT, Json, Place, Reply, Who, access::Principal, done, jobs::ListArgs,
    pages::Paging, whole,
};
use crate::{
    error::{ApiError, ApiResult},
    removal,
    state::{Shared, now_ms},
    uploads, view,
};

/// How many digits of the id a published artifact's name has.
const NAME_DIGITS: usize = 12;

pub(super) async fn list(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<ListArgs>,
) -> Reply<types::Page<types::Artifact>> {
    let paging = Paging::<(i64, String)>::of("artifacts", args.limit, args.cursor.as_deref())?;
    let apps = by.apps(args.app.as_ref())?;
    if let Some(app) = &args.app {
        shared.queue.app(app).await?;
    }
    let after = paging.after.as_ref().map(|(created, name)| (*created, name.as_str()));
    let rows = shared.queue.artifacts_page(apps.as_ref(), after, paging.wanted()).await?;
    let regions = shared.queue.regions().await?;
    let key = |row: &Artifact| (row.created_at_ms, row.name.clone());
    Ok(paging.page(rows, key, |row| view::artifact(row, &regions)))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OneArgs {
    /// Its name or its id.
    r#ref: String,
}

/// An artifact that the caller may see: bytes that several apps have are known by each one's name.
async fn visible(shared: &Shared, by: &Principal, reference: &str) -> ApiResult<Artifact> {
    let found = shared.queue.artifact(reference, None).await?;
    let refused = by.may(&found.app);
    for app in by.apps.iter().flatten().filter(|_| refused.is_err()) {
        let of_app = shared.queue.artifact(reference, Some(app)).await?;
        if of_app.app == *app {
            return Ok(of_app);
        }
    }
    refused.map(|()| found)
}

pub(super) async fn one(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<OneArgs>,
) -> Reply<types::Artifact> {
    let artifact = visible(&shared, &by, &args.r#ref).await?;
    let regions = shared.queue.regions().await?;
    Ok(axum::Json(view::artifact(artifact, &regions)))
}

pub(super) async fn state(
    shared: App,
    Place((artifact, encoding)): Place<(ArtifactId, EncodingId)>,
) -> Reply<types::UploadState> {
    let mut parts = shared.main.parts(&artifact, &encoding).await?;
    // An index that lacks parts is what a removal at the same moment may leave.
    let mut whole = matches!(shared.main.check(&artifact, &encoding).await, Ok(Check::Whole));
    if whole {
        // Who sends the index of what is damaged has its parts proved.
        whole = !shared.queue.is_main_damaged(&artifact, &encoding).await?;
    } else {
        // A part that its index has disproved is to be sent again.
        parts.retain(|number, _| !shared.part_hashes.is_bad(&encoding, *number));
    }
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
    Who(_, actor): Who,
    Place((artifact, encoding, object)): Place<(ArtifactId, EncodingId, String)>,
    request: Request,
) -> Reply<types::Done> {
    let hashes = &shared.part_hashes;
    if object == "index" {
        let bytes = whole(request.into_body(), INDEX_MAX_BYTES, BODY_TIMEOUT).await?;
        uploads::put_index(&shared.main, hashes, &artifact, &encoding, bytes).await?;
        if shared.queue.main_repaired((&artifact, &encoding), &actor, now_ms()).await? {
            shared.ring(Bell::Copies);
        }
        return Ok(done());
    }
    let number = part_number(&object).ok_or_else(|| {
        ApiError::invalid(format!(
            "'{object}' is not an object of an encoding: part-NNNNN or index"
        ))
    })?;
    if too_long(&request, PART_MAX_BYTES) {
        return Err(uploads::part_too_long());
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
    Who(by, actor): Who,
    Json(request): Json<types::PublishRequest>,
) -> Reply<types::Artifact> {
    by.may(&request.app)?;
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
