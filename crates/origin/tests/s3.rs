//! What only S3 can get wrong: answers that lie, servers that are away, credentials that do not do. The server is
//! real, the lies are a proxy's in front of it.
#![allow(clippy::unwrap_used)]

mod suite {
    mod place;
    pub(crate) use self::place::{Place, TWO_PARTS_BYTES};
}

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use shoal_origin::{Bucket, Check, OriginError, PutPart, UrlReader};
use shoal_test_s3::{
    BUCKET, CONTAINER_TOKEN, Fault, Key, READER, Roles, Server, WRITER, environment,
};

use suite::{Place, TWO_PARTS_BYTES};

/// Each lie that a range's answer can be caught at by itself.
const LIES: [Fault; 8] = [
    Fault::Whole,
    Fault::OtherRange,
    Fault::Short,
    Fault::ShortUntold,
    Fault::BrokenOff,
    Fault::HangUp,
    Fault::HangUpAfter,
    Fault::SlowDown,
];

/// A small artifact: one piece in one part.
const SMALL_BYTES: usize = 100_000;

const VALID: Duration = Duration::from_secs(600);

fn open(server: &Server, address: &str, key: Key) -> Bucket {
    Bucket::open_in(address, server.environment(key)).unwrap()
}

/// An error is one line that names no key.
fn assert_clear(error: &OriginError, says: &str) {
    let line = error.to_string();
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.contains(says), "{line}");
    for secret in [WRITER.0, WRITER.1, READER.0, READER.1, "X-Amz-Signature", "X-Amz-Credential"] {
        assert!(!line.contains(secret), "{line}");
    }
    assert!(!format!("{error:?}").contains("X-Amz-Signature"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lie_about_a_range_is_asked_for_again() {
    let it = Place::s3(TWO_PARTS_BYTES);
    it.upload().await.unwrap();
    let layout = it.index.layout();
    for lie in LIES {
        it.proxy().next(1, lie, |method, path| method == "GET" && path.contains("part-"));
        let pieces = it.main.read_pieces(&it.artifact, &it.encoding, &layout, 1, 1).await;
        let pieces = pieces.unwrap_or_else(|error| panic!("{lie:?}: {error}"));
        assert!(*pieces[0] == *it.piece(1), "{lie:?}");
        assert_eq!(it.proxy().left(), 0, "{lie:?} was told");
    }
    // A whole copy through all of them.
    for lie in LIES {
        it.proxy().next(1, lie, |method, path| method == "GET" && path.contains("part-"));
    }
    it.copy().await.unwrap();
    assert_eq!(it.proxy().left(), 0);
    it.verify(&it.regional).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lie_that_goes_on_is_an_error() {
    let it = Place::s3(SMALL_BYTES);
    it.upload().await.unwrap();
    let layout = it.index.layout();
    let url = sign(&it, VALID).await;
    let reader = UrlReader::new().unwrap();
    for (lie, says) in [(Fault::Whole, "range"), (Fault::Short, "bytes"), (Fault::SlowDown, "503")]
    {
        it.proxy().next(1_000, lie, |method, path| method == "GET" && path.contains("part-"));
        let read = it.main.read_pieces(&it.artifact, &it.encoding, &layout, 0, 1);
        let (direct, by_url) = tokio::join!(read, reader.read(&url, &layout[0]));
        assert_clear(&direct.unwrap_err(), if lie == Fault::SlowDown { "SlowDown" } else { says });
        assert_clear(&by_url.unwrap_err(), says);
        // It was asked for more than once, and not for ever.
        let asked = 1_000 - it.proxy().left();
        assert!((4..=60).contains(&asked), "{lie:?}: asked {asked} times");
        it.proxy().behave();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_under_the_right_range_are_copied_nowhere() {
    let it = Place::s3(TWO_PARTS_BYTES);
    it.upload().await.unwrap();
    for lie in [Fault::Shifted, Fault::CorruptAnswer] {
        it.proxy().next(1, lie, |method, path| method == "GET" && path.contains("part-00000"));
        let error = it.copy().await.unwrap_err();
        assert!(matches!(error, OriginError::Mismatch { part: 0, .. }), "{lie:?}: {error}");
        let there = it.regional.parts(&it.artifact, &it.encoding).await.unwrap();
        assert!(!there.contains_key(&0), "{there:?}");
        assert_eq!(it.regional.index(&it.artifact, &it.encoding).await.unwrap(), None);
    }
    it.copy().await.unwrap();
    it.verify(&it.regional).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_survive_what_the_way_does_to_them() {
    let it = Place::s3(TWO_PARTS_BYTES);
    let faults = [
        // The server compares what it gets with the signature and the checksum.
        (Fault::CorruptUpload, "part-00001"),
        (Fault::SlowDown, "part-00001"),
        (Fault::HangUp, "part-00001"),
        (Fault::SlowDown, "uploads"),
        (Fault::SlowDown, "partNumber=3"),
        (Fault::HangUp, "partNumber=2"),
        (Fault::SlowDown, "list-type"),
        (Fault::SlowDown, "index"),
    ];
    for (fault, what) in faults {
        it.proxy().next(1, fault, move |method, path| {
            let reads = method == "GET" || method == "HEAD";
            path.contains(what) && (!reads || what == "list-type")
        });
    }
    it.upload().await.unwrap();
    assert_eq!(it.proxy().left(), 0, "all of them came about");
    it.verify(&it.main).await.unwrap();
    // Written, and the answer lost: it is found there.
    let it = Place::s3(SMALL_BYTES);
    for what in ["part-00000", "index"] {
        it.proxy().next(1, Fault::HangUpAfter, move |method, path| {
            method == "PUT" && path.contains(what)
        });
    }
    it.upload().await.unwrap();
    assert_eq!(it.proxy().left(), 0);
    it.verify(&it.main).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slower_writer_of_a_long_part_leaves_it_as_it_is() {
    let it = Place::s3(TWO_PARTS_BYTES);
    let bytes =
        |from: usize, to: usize| Ok::<_, OriginError>(Bytes::copy_from_slice(&it.raw[from..to]));
    let put = |stream| {
        let expect = Some(it.index.parts[0]);
        it.main.put_part(&it.artifact, &it.encoding, 0, expect, Box::pin(stream))
    };
    let (begun, go_on) = (tokio::sync::Notify::new(), tokio::sync::Notify::new());
    let (begun, go_on) = (&begun, &go_on);
    let first = stream::once(async move { bytes(0, 20 << 20) });
    let rest = stream::once(async move {
        begun.notify_one();
        go_on.notified().await;
        bytes(20 << 20, 64 << 20)
    });
    let slow = put(first.chain(rest).boxed());
    let fast = async {
        begun.notified().await;
        let written = put(stream::iter([bytes(0, 64 << 20)]).boxed()).await;
        go_on.notify_one();
        written
    };
    let (slow, fast) = tokio::join!(slow, fast);
    let written = PutPart::Written(it.index.parts[0]);
    assert_eq!((slow.unwrap(), fast.unwrap()), (written, written));
    let seen = it.server().take_seen();
    let ended = |method: &str| {
        let of =
            seen.iter().filter(|seen| seen.method == method && seen.query.contains("uploadId="));
        of.count()
    };
    assert_eq!((ended("POST"), ended("DELETE")), (1, 1), "one is completed, the other given up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_without_conditions_is_written_once_all_the_same() {
    let it = Place::s3(SMALL_BYTES);
    it.proxy().next(1_000, Fault::NotImplemented, |method, path| {
        method == "PUT" && path.contains("part-00000")
    });
    // It refuses as long as the condition is there.
    let put = |bytes: Vec<u8>| {
        let stream = stream::iter([Ok::<_, OriginError>(Bytes::from(bytes))]);
        it.main.put_part(&it.artifact, &it.encoding, 0, Some(it.index.parts[0]), stream)
    };
    let refused = put(it.raw.clone()).await.unwrap_err();
    assert_clear(&refused, "NotImplemented");
    it.proxy().behave();
    let _ = it.server().take_seen();
    assert_eq!(put(it.raw.clone()).await.unwrap(), PutPart::Written(it.index.parts[0]));
    let looked = it.server().take_seen().iter().filter(|seen| seen.method == "HEAD").count();
    assert!(looked >= 2, "from now on it looks before it writes");
    assert_eq!(put(it.raw.clone()).await.unwrap(), PutPart::Present);
    it.upload().await.unwrap();
    it.verify(&it.main).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checksum_is_stored_with_what_goes_up_at_once() {
    let it = Place::s3(SMALL_BYTES);
    it.upload().await.unwrap();
    let kept: Vec<String> = std::fs::read_dir(it.server().dir())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(".internal.json"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    let with_sum = kept.iter().filter(|text| text.contains("sha256")).count();
    assert_eq!(with_sum, 2, "the part and the index: {kept:?}");
}

/// The URL of the first piece.
async fn sign(it: &Place, valid: Duration) -> String {
    let layout = it.index.layout();
    let urls = it.main.sign_pieces(&it.artifact, &it.encoding, &layout, (0, 1), valid).await;
    urls.unwrap().pop().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_gives_its_piece_and_nothing_else() {
    let it = Place::s3(TWO_PARTS_BYTES);
    it.upload().await.unwrap();
    let layout = it.index.layout();
    let signed = it.main.sign_pieces(&it.artifact, &it.encoding, &layout, (2, 3), VALID).await;
    let urls = signed.unwrap();
    let reader = UrlReader::new().unwrap();
    assert_eq!(urls.len(), 3);
    for (piece, url) in (2..).zip(&urls) {
        assert!(url.len() < 1_024, "{} bytes", url.len());
        let read = reader.read(url, &layout[piece as usize]).await.unwrap();
        assert!(*read == *it.piece(piece), "piece {piece}");
    }
    // Another range of the same part.
    let other = reader.read(&urls[0], &layout[1]).await.unwrap_err();
    assert_clear(&other, "403");
    // Another object.
    let moved = urls[0].replace("part-00000", "part-00001");
    assert_clear(&reader.read(&moved, &layout[2]).await.unwrap_err(), "403");
    // What its answer says is looked at, as for who has credentials.
    for lie in LIES {
        it.proxy().next(1, lie, |method, path| method == "GET" && path.contains("part-"));
        let read = reader.read(&urls[0], &layout[2]).await;
        assert!(*read.unwrap() == *it.piece(2), "{lie:?}");
        assert_eq!(it.proxy().left(), 0);
    }
    // It is over after a while.
    let short = sign(&it, Duration::from_secs(1)).await;
    let start = std::time::Instant::now();
    let refused = loop {
        match reader.read(&short, &layout[0]).await {
            Err(error) => break error,
            Ok(_) => assert!(start.elapsed() < Duration::from_secs(60), "it never ends"),
        }
    };
    assert_clear(&refused, "expired");
    let nonsense = reader.read("no url?X-Amz-Signature=1", &layout[0]).await.unwrap_err();
    assert_clear(&nonsense, "none");
    assert_clear(
        &reader.read("http://127.0.0.1:1/x?X-Amz-Signature=1", &layout[0]).await.unwrap_err(),
        "127.0.0.1",
    );
    // A directory has none.
    let it = Place::directory(SMALL_BYTES);
    let layout = it.index.layout();
    let none = it.main.sign_pieces(&it.artifact, &it.encoding, &layout, (0, 1), VALID).await;
    assert!(!it.main.signs() && matches!(none, Err(OriginError::NoUrls { .. })), "{none:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_only_read_reads_and_signs() {
    let it = Place::s3(SMALL_BYTES);
    it.upload().await.unwrap();
    let address = format!("s3://{BUCKET}/main");
    let reader = open(it.server(), &address, READER);
    assert_eq!(reader.check(&it.artifact, &it.encoding).await.unwrap(), Check::Whole);
    reader.verify(&it.artifact, &it.encoding).await.unwrap();
    let layout = it.index.layout();
    let urls =
        reader.sign_pieces(&it.artifact, &it.encoding, &layout, (0, 1), VALID).await.unwrap();
    let read = UrlReader::new().unwrap().read(&urls[0], &layout[0]).await.unwrap();
    assert!(*read == *it.raw);
    let elsewhere = open(it.server(), &format!("s3://{BUCKET}/other"), READER);
    let cut = it.cut();
    let upload = elsewhere.upload(&cut, &it.index, &it.bytes, &it.encoding, |_| {}).await;
    let error = upload.unwrap_err();
    assert!(matches!(error, OriginError::Denied { .. }) && !error.is_transient(), "{error}");
    assert_clear(&error, "AccessDenied");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_said_in_a_line() {
    let it = Place::s3(SMALL_BYTES);
    it.upload().await.unwrap();
    let address = format!("s3://{BUCKET}/main");
    for (key, says) in
        [(("shoal-nobody", WRITER.1), "account"), ((WRITER.0, "wrong"), "SignatureDoesNotMatch")]
    {
        let bucket = open(it.server(), &address, key);
        let error = bucket.index(&it.artifact, &it.encoding).await.unwrap_err();
        assert!(matches!(error, OriginError::Denied { .. }) && !error.is_transient(), "{error}");
        assert_clear(&error, says);
        assert!(matches!(bucket.probe().await, Err(OriginError::Denied { .. })));
    }
    let nowhere = open(it.server(), "s3://nowhere/main", WRITER);
    let error = nowhere.probe().await.unwrap_err();
    assert!(matches!(error, OriginError::NoBucket { .. }), "{error}");
    assert_clear(&error, "no bucket s3://nowhere/main");
    let cut = it.cut();
    let upload = nowhere.upload(&cut, &it.index, &it.bytes, &it.encoding, |_| {}).await;
    assert!(matches!(upload, Err(OriginError::NoBucket { .. })), "{upload:?}");

    let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
    let nobody = [
        pair("AWS_ENDPOINT_URL", &it.server().endpoint()),
        pair("AWS_EC2_METADATA_DISABLED", "true"),
    ];
    let nobody = Bucket::open_in(&address, nobody).unwrap();
    let error = nobody.index(&it.artifact, &it.encoding).await.unwrap_err();
    assert!(matches!(error, OriginError::NoCredentials { .. }) && !error.is_transient(), "{error}");
    assert_clear(&error, "no credentials for s3://shoal/main");
    let layout = it.index.layout();
    let signed = nobody.sign_pieces(&it.artifact, &it.encoding, &layout, (0, 1), VALID).await;
    assert!(matches!(signed, Err(OriginError::NoCredentials { .. })), "{signed:?}");
    // Half a key is a mistake, at once.
    let half = Bucket::open_in(&address, [pair("AWS_ACCESS_KEY_ID", "x")]).unwrap_err();
    assert_clear(&half, "SecretAccessKey");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_away_is_waited_for_a_little() {
    let it = Place::s3(SMALL_BYTES);
    // Nobody listens on it: it was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let away = environment(&format!("http://{free}"), WRITER);
    let away = Bucket::open_in("s3://shoal/main", away).unwrap();
    let error = away.index(&it.artifact, &it.encoding).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert_clear(&error, &free.to_string());
    // One that comes back in time is not noticed: 503 is tried again after a pause.
    it.proxy().next(3, Fault::SlowDown, |_, _| true);
    it.upload().await.unwrap();
    it.verify(&it.main).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_come_from_the_files_of_the_sdk() {
    let it = Place::s3(SMALL_BYTES);
    it.upload().await.unwrap();
    let home = it.dir.path().join("home");
    std::fs::create_dir_all(home.join(".aws")).unwrap();
    let (key, secret) = READER;
    std::fs::write(
        home.join(".aws/credentials"),
        format!("[ops]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"),
    )
    .unwrap();
    std::fs::write(
        home.join(".aws/config"),
        format!("[profile ops]\nregion = us-east-1\nendpoint_url = {}\n", it.server().endpoint()),
    )
    .unwrap();
    let environment = [("HOME", home.to_str().unwrap()), ("AWS_PROFILE", "ops")];
    let environment = environment.map(|(name, value)| (name.to_string(), value.to_string()));
    let bucket = Bucket::open_in("s3://shoal/main", environment).unwrap();
    assert_eq!(bucket.check(&it.artifact, &it.encoding).await.unwrap(), Check::Whole);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_come_from_the_role_of_an_instance_or_a_container() {
    let it = Place::s3(SMALL_BYTES);
    it.upload().await.unwrap();
    let roles = Roles::start(READER).unwrap();
    let token = it.dir.path().join("token");
    std::fs::write(&token, CONTAINER_TOKEN).unwrap();
    let container = format!("{}/container", roles.endpoint());
    let instance = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", roles.endpoint())];
    let container = [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", container),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token.display().to_string()),
    ];
    for role in [instance.as_slice(), container.as_slice()] {
        let endpoint = [("AWS_ENDPOINT_URL", it.server().endpoint())];
        let environment = endpoint.iter().chain(role);
        let environment = environment.map(|(name, value)| (name.to_string(), value.clone()));
        let bucket = Bucket::open_in("s3://shoal/main", environment).unwrap();
        assert_eq!(bucket.check(&it.artifact, &it.encoding).await.unwrap(), Check::Whole);
        let layout = it.index.layout();
        let urls = bucket.sign_pieces(&it.artifact, &it.encoding, &layout, (0, 1), VALID).await;
        let url = urls.unwrap().pop().unwrap();
        assert!(url.contains("X-Amz-Security-Token=session"), "temporary keys come with a token");
        let read = UrlReader::new().unwrap().read(&url, &layout[0]).await.unwrap();
        assert!(*read == *it.raw);
    }
    // Nobody there: an instance without the service, and not for ever.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = [
        ("AWS_ENDPOINT_URL".to_string(), it.server().endpoint()),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT".to_string(), format!("http://{free}")),
    ];
    let bucket = Bucket::open_in("s3://shoal/main", nobody).unwrap();
    let error = bucket.index(&it.artifact, &it.encoding).await.unwrap_err();
    assert!(matches!(error, OriginError::NoCredentials { .. }), "{error}");
    assert_clear(&error, "no credentials for");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_is_cleared_and_what_is_beside_it_stays() {
    let it = Place::s3(SMALL_BYTES);
    it.upload().await.unwrap();
    it.copy().await.unwrap();
    it.regional.clear().await.unwrap();
    it.regional.clear().await.unwrap();
    assert_eq!(it.check(&it.regional).await, Check::Absent);
    assert_eq!(it.check(&it.main).await, Check::Whole);
    // Never a bucket as a whole, nor a directory.
    let server = Server::start().unwrap();
    let whole = open(&server, &format!("s3://{BUCKET}"), WRITER);
    let dir = tempfile::tempdir().unwrap();
    let directory = Bucket::open(dir.path().to_str().unwrap()).unwrap();
    for bucket in [whole, directory] {
        assert_clear(&bucket.clear().await.unwrap_err(), "under a prefix");
    }
}
