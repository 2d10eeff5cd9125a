//! Uploads, publishing, replication, and what may be deployed.

use std::fs;

use bytes::Bytes;
use shoal_client::types::{HaltRequest, PublishRequest, Region, RegionReplication};
use shoal_proto::state::{ReplicationStatus, TokenRole};

use crate::harness::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_uploaded_published_and_copied() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let cut = cut(1, 5);
    let (artifact, encoding) = (&cut.artifact, &cut.encoding);
    let request = PublishRequest {
        app: "web".parse().unwrap(),
        artifact: cut.artifact,
        encoding: cut.encoding,
    };
    let early = refusal(operator.publish(&request).await);
    assert_eq!((early.0, early.1.as_str()), (409, "not_whole"));
    // The index before its part.
    let early = refusal(operator.upload(artifact, encoding, "index", cut.index.clone()).await);
    assert!(early.0 == 409 && early.2.contains("part-00000"), "{early:?}");
    assert!(operator.upload_state(artifact, encoding).await.unwrap().parts.is_empty());

    operator.upload(artifact, encoding, "part-00000", cut.part.clone()).await.unwrap();
    let state = operator.upload_state(artifact, encoding).await.unwrap();
    assert_eq!((state.parts[&0], state.whole), (cut.part.len() as u64, false));
    operator.upload(artifact, encoding, "index", cut.index.clone()).await.unwrap();
    operator.upload(artifact, encoding, "index", cut.index.clone()).await.unwrap();
    assert!(operator.upload_state(artifact, encoding).await.unwrap().whole);
    let over = refusal(operator.upload(artifact, encoding, "part-00000", cut.part.clone()).await);
    assert_eq!(over.0, 409, "a whole encoding is never written over");

    let published = operator.publish(&request).await.unwrap();
    assert_eq!(published.name, format!("web/b3-{}", &artifact.to_string()[..12]));
    assert_eq!(published.size_bytes, cut.part.len() as u64);
    let again = operator.publish(&request).await.unwrap();
    assert_eq!(
        (again.name, again.created_at_ms),
        (published.name.clone(), published.created_at_ms)
    );
    let whole = deployable(&operator, &published.name).await;
    assert_eq!(whole.replication_status, ReplicationStatus::Complete);
    let eu = &whole.replication[&"eu".parse().unwrap()];
    assert_eq!((eu.status, eu.bytes_done > 0), (ReplicationStatus::Complete, true));
    assert_eq!(operator.artifact(&artifact.to_string()).await.unwrap().name, published.name);
    assert_eq!(operator.artifacts(None, 10).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_is_not_what_the_index_says_is_found_and_sent_again() {
    let mut cluster = Cluster::start().await;
    for restarted in [false, true] {
        let operator = cluster.operator();
        operator.set_app(&app("web", "")).await.unwrap();
        // Longer than what is read back at once.
        let cut = cut(7 + u8::from(restarted), 40);
        let (artifact, encoding) = (&cut.artifact, &cut.encoding);
        let mut wrong = cut.part.to_vec();
        *wrong.last_mut().unwrap() ^= 1;
        operator.upload(artifact, encoding, "part-00000", Bytes::from(wrong)).await.unwrap();
        if restarted {
            // Nothing of the upload is remembered: the part is read back.
            cluster.stop().await;
            cluster.run().await;
        }
        let operator = cluster.operator();
        let refused =
            refusal(operator.upload(artifact, encoding, "index", cut.index.clone()).await);
        assert!(
            refused.2.contains("not what the index says, the first is part-00000"),
            "{refused:?}"
        );
        let state = operator.upload_state(artifact, encoding).await.unwrap();
        assert!(!state.whole && state.parts.is_empty(), "it is to be sent again");
        upload(&operator, &cut).await;
        assert!(operator.upload_state(artifact, encoding).await.unwrap().whole);
    }
    // A right part is read back as right.
    let cut = cut(9, 40);
    let part = cut.part.clone();
    cluster.operator().upload(&cut.artifact, &cut.encoding, "part-00000", part).await.unwrap();
    cluster.stop().await;
    cluster.run().await;
    let index = cut.index.clone();
    cluster.operator().upload(&cut.artifact, &cut.encoding, "index", index).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_uploads_are_refused() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    let (one, two) = (cut(1, 1), cut(2, 1));
    let (artifact, encoding) = (&one.artifact, &one.encoding);
    for object in ["part-1", "part-99999", "indexes", "..%2Findex"] {
        let refused = refusal(operator.upload(artifact, encoding, object, Bytes::new()).await);
        assert_eq!((refused.0, refused.1.as_str()), (400, "invalid"), "{object}");
    }
    let other = refusal(operator.upload(artifact, encoding, "index", two.index.clone()).await);
    assert_eq!(other.0, 400);
    let other = refusal(operator.upload(&two.artifact, encoding, "index", one.index.clone()).await);
    assert_eq!(other.0, 400);
    let long = vec![0u8; (5 << 20) + 1];
    let long = refusal(operator.upload(artifact, encoding, "index", long).await);
    assert_eq!((long.0, long.1.as_str()), (413, "too_long"));
    let long = vec![0u8; (64 << 20) + 1];
    let long = refusal(operator.upload(artifact, encoding, "part-00000", long).await);
    assert_eq!((long.0, long.1.as_str()), (413, "too_long"));
    let state = operator.upload_state(artifact, encoding).await.unwrap();
    assert!(state.parts.is_empty() && !state.whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_in_every_region_in_service_is_not_deployed() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    operator.set_app(&app("api", "")).await.unwrap();
    // The bucket of `us` takes nothing.
    let block = cluster.path("us").join("artifacts");
    fs::write(&block, b"in the way").unwrap();
    let published = publish(&operator, "web", &cut(1, 2)).await;
    let name = published.name;
    let us = &"us".parse().unwrap();
    let failed = wait_for("the copy into us to fail", async || {
        let artifact = operator.artifact(&name).await.unwrap();
        let states = artifact.replication.values().map(|copy| copy.status).collect::<Vec<_>>();
        let want = [ReplicationStatus::Complete, ReplicationStatus::Failed];
        if states == want { Ok(artifact) } else { Err(artifact) }
    })
    .await;
    assert!(!failed.deployable);
    assert_eq!(failed.replication_status, ReplicationStatus::Failed);
    assert!(failed.replication[us].reason.is_some());
    let (status, code, text) = refusal(deploy(&operator, "web", &name).await);
    assert_eq!((status, code.as_str()), (409, "not_deployable"));
    assert!(text.contains("us (") && !text.contains("eu ("), "{text}");
    assert!(text.contains("shoal drain us"), "{text}");

    // Out of service it holds nothing up; back in service it is caught up with.
    let request = HaltRequest { reason: Some(" flood ".into()) };
    let drained = operator.drain_region(us, &request).await.unwrap();
    let why = drained.drain.unwrap();
    assert!(drained.drained && why.reason.as_deref() == Some("flood"), "{why:?}");
    let shown = operator.replication(None, 10).await.unwrap();
    assert_eq!(shown.regions[us].drain.as_ref(), Some(&why));
    assert!(shown.regions.values().all(|region| !region.copies.is_empty()));
    // Who may see another app sees nothing of what all have.
    let bound = cluster.token("bound", TokenRole::Viewer, Some("api")).await;
    let seen = cluster.by_token(&bound).replication(None, 10).await.unwrap();
    assert!(seen.artifacts.is_empty() && seen.regions[us].drained);
    let hidden = |of: &RegionReplication| of.copies.is_empty() && of.drain.is_none();
    assert!(seen.regions.values().all(hidden), "{:?}", seen.regions);
    // A release before says nothing, or null.
    for body in ["", "null", "{}"] {
        let url = format!("{}/v1/regions/us/drain", cluster.url());
        let request = cluster.raw(shoal_pki::Role::Operator).post(url).body(body);
        let region: Region = request.send().await.unwrap().json().await.unwrap();
        assert_eq!(region.drain.unwrap().reason, None, "'{body}'");
    }
    assert!(operator.artifact(&name).await.unwrap().deployable);
    deploy(&operator, "web", &name).await.unwrap();
    fs::remove_file(&block).unwrap();
    assert!(!operator.undrain_region(us).await.unwrap().drained);
    deployable(&operator, &name).await;
    deploy(&operator, "web", &name).await.unwrap();

    let (status, _, text) = refusal(deploy(&operator, "api", &name).await);
    assert!(status == 409 && text.contains("an artifact of web, not of api"), "{text}");
    let (status, _, text) = refusal(deploy(&operator, "nobody", &name).await);
    assert!(status == 404 && text.contains("shoal app set nobody"), "{text}");
    let (status, _, text) = refusal(deploy(&operator, "web", "web/none-1").await);
    assert!(status == 404 && text.contains("shoal artifacts"), "{text}");
    let unknown =
        refusal(operator.drain_region(&"mars".parse().unwrap(), &HaltRequest::default()).await);
    assert_eq!(unknown.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_under_way_go_on_after_a_restart() {
    let mut cluster = Cluster::start().await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let block = cluster.path("us").join("artifacts");
    fs::write(&block, b"in the way").unwrap();
    let name = publish(&operator, "web", &cut(1, 2)).await.name;
    cluster.stop().await;
    fs::remove_file(&block).unwrap();
    cluster.run().await;
    deployable(&cluster.operator(), &name).await;
}
