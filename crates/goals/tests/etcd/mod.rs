//! What only etcd can show: compaction, kills, restores, logins, TLS, several endpoints.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use serde_json::json;
use shoal_goals::{EtcdStore, GoalStore as _, GoalWatch as _, GoalsError, Put, WatchTimes};
use shoal_test_etcd::{Place, Server};

use crate::suite::{entry, put, revisions, told, until};

/// A watch that asks by itself only after an hour: what it tells in a test it was told.
const NEVER: WatchTimes =
    WatchTimes { poll: Duration::from_secs(3_600), relist: Duration::from_secs(3_600) };

fn open(server: &Server) -> EtcdStore {
    EtcdStore::open(&server.url(), "test").unwrap()
}

/// A stream ends, etcd is compacted, and goals changed that nobody told of.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_was_compacted_away_relists() {
    let mut server = Server::start().await.unwrap();
    let store = EtcdStore::open_with(&server.url(), "test", NEVER).unwrap();
    put(&store, "a", 1, 1).await;
    let away = told(&mut store.watch(None)).await.cursor;
    for number in 2..=20 {
        put(&store, "a", 1, number).await;
        put(&store, "b", 1, number).await;
    }
    server.compact().await.unwrap();
    put(&store, "c", 1, 1).await;
    let mut watch = store.watch(Some(away));
    let changes = told(&mut watch).await;
    assert!(changes.complete, "the way from there is gone");
    let want = [("a", (1, 20)), ("b", (1, 20)), ("c", (1, 1))].map(|(a, r)| (a.to_string(), r));
    assert_eq!(revisions(&changes.entries), BTreeMap::from(want));
    // And it goes on by its stream.
    put(&store, "c", 1, 2).await;
    assert_eq!(revisions(&told(&mut watch).await.entries)["c"], (1, 2));

    // The same to a watch whose stream broke, with etcd compacted before it could go on.
    server.kill().unwrap();
    let waits = tokio::spawn(async move { until_ok(&mut watch).await });
    server.start_again().await.unwrap();
    put(&store, "c", 1, 3).await;
    server.compact().await.unwrap();
    assert_eq!(revisions(&waits.await.unwrap())["c"], (1, 3));
}

/// The next goals, with errors on the way.
async fn until_ok(watch: &mut shoal_goals::EtcdWatch) -> Vec<shoal_goals::Entry> {
    let start = Instant::now();
    loop {
        match watch.next().await {
            Ok(changes) if !changes.entries.is_empty() => return changes.entries,
            Ok(_) => {}
            Err(error) => {
                assert!(start.elapsed() < Duration::from_secs(60), "{error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_acknowledged_is_lost_when_etcd_is_killed() {
    const WRITERS: usize = 4;
    const KILLS: usize = 4;
    let mut server = Server::start().await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged = Arc::new(AtomicBool::new(false));
    let mut writers = tokio::task::JoinSet::new();
    for at in 0..WRITERS {
        let (store, stop) = (open(&server), stop.clone());
        let acknowledged = acknowledged.clone();
        writers.spawn(async move {
            let (app, mut number, mut last) = (format!("app-{at}"), 1, 0);
            while !stop.load(Ordering::Relaxed) {
                match store.put(&entry(&app, 1, number)).await {
                    // Known: the call before had got through after all.
                    Ok(Put::Written | Put::Known) => {
                        last = number;
                        number += 1;
                        acknowledged.store(true, Ordering::Relaxed);
                    }
                    Ok(Put::Stale(stored)) => panic!("{app} went past {number}: {stored:?}"),
                    Err(GoalsError::Unreachable { .. }) => {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            (app, last)
        });
    }
    let (watcher, done) = (open(&server), stop.clone());
    let watching = tokio::spawn(async move {
        let mut watch = watcher.watch(None);
        let mut seen = BTreeMap::new();
        while !done.load(Ordering::Relaxed) {
            let next = tokio::time::timeout(Duration::from_millis(200), watch.next()).await;
            match next {
                Ok(Ok(changes)) => {
                    for (app, revision) in revisions(&changes.entries) {
                        let old = seen.insert(app.clone(), revision);
                        assert!(old.is_none_or(|old| old <= revision), "{app} went back");
                    }
                }
                Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(_) => {}
            }
        }
        (watch, seen)
    });
    for _ in 0..KILLS {
        // Killed while all of them write.
        acknowledged.store(false, Ordering::Relaxed);
        let start = Instant::now();
        while !acknowledged.load(Ordering::Relaxed) {
            assert!(start.elapsed() < Duration::from_secs(60), "nobody can write");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        server.kill().unwrap();
        server.start_again().await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let mut want = BTreeMap::new();
    while let Some(ended) = writers.join_next().await {
        let (app, last) = ended.unwrap();
        assert!(last > 0, "{app} was never written");
        want.insert(app, (1, last));
    }
    let (mut watch, seen) = watching.await.unwrap();
    let listed = revisions(&open(&server).list().await.unwrap().entries);
    for (app, last) in &want {
        assert!(listed[app] >= *last, "{app}: acknowledged {last:?}, found {:?}", listed[app]);
        assert!(seen.get(app).is_none_or(|seen| *seen <= listed[app]));
    }
    // The watch that lived through it all comes to the same end.
    for app in want.keys() {
        put(&open(&server), app, 2, 1).await;
    }
    let want = want.into_keys().map(|app| (app, (2, 1))).collect();
    until(&mut watch, &want).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_hangs_is_an_error_and_then_goes_on() {
    let mut server = Server::start().await.unwrap();
    let times = WatchTimes { poll: Duration::from_millis(200), ..NEVER };
    let store = EtcdStore::open_with(&server.url(), "test", times).unwrap();
    let mut watch = store.watch(None);
    told(&mut watch).await;
    server.hold().unwrap();
    let error = store.put(&entry("a", 1, 1)).await.unwrap_err();
    assert!(matches!(error, GoalsError::Unreachable { .. }), "{error}");
    // The watch notices by its poll: the stream itself would be silent for as long.
    let error = watch.next().await.unwrap_err();
    assert!(matches!(error, GoalsError::Unreachable { .. }), "{error}");
    server.go().unwrap();
    // What hung may have got through.
    let again = store.put(&entry("a", 1, 1)).await.unwrap();
    assert!(matches!(again, Put::Written | Put::Known), "{again:?}");
    until(&mut watch, &BTreeMap::from([("a".to_string(), (1, 1))])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_lost_its_data_is_noticed_and_filled_again() {
    let mut server = Server::start().await.unwrap();
    let times = WatchTimes { poll: Duration::from_millis(100), relist: Duration::from_millis(300) };
    let store = EtcdStore::open_with(&server.url(), "test", times).unwrap();
    for number in 1..=5 {
        put(&store, "a", 1, number).await;
    }
    let mut watch = store.watch(None);
    let before = told(&mut watch).await;
    server.empty().unwrap();
    server.start_again().await.unwrap();
    // Its cursor is of a future that this etcd has not seen.
    let changes = store.changes(before.cursor).await.unwrap();
    assert!(changes.complete && changes.entries.is_empty());
    put(&store, "b", 1, 1).await;
    until(&mut watch, &BTreeMap::from([("b".to_string(), (1, 1))])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_that_are_no_goals_are_ignored_and_replaced() {
    let mut server = Server::start().await.unwrap();
    let store = open(&server);
    let key = |app: &str| format!("{}{app}", store.prefix());
    // Greater than any rank, less than any, another app's, and one that lies about its revision.
    put(&store, "other", 1, 1).await;
    let ask = json!({ "key": BASE64.encode(key("other")) });
    let other = server.call("kv/range", &ask).await.unwrap()["kvs"][0]["value"]
        .as_str()
        .unwrap()
        .to_string();
    let other = BASE64.decode(other).unwrap();
    let mut lies = other.clone();
    lies[0] = b'9';
    server.put(&key("a"), b"zzz").await.unwrap();
    server.put(&key("b"), b"").await.unwrap();
    server.put(&key("c"), &other).await.unwrap();
    server.put(&key("d"), &lies).await.unwrap();
    let listed = store.list().await.unwrap();
    assert_eq!(revisions(&listed.entries).into_keys().collect::<Vec<_>>(), ["other"]);
    for app in ["a", "b", "c", "d"] {
        put(&store, app, 1, 1).await;
        assert_eq!(store.put(&entry(app, 1, 1)).await.unwrap(), Put::Known);
    }
    assert_eq!(store.list().await.unwrap().entries.len(), 5);
    // A key that is taken away is no goal taken back, and may be written again.
    let mut watch = store.watch(None);
    told(&mut watch).await;
    server.call("kv/deleterange", &json!({ "key": BASE64.encode(key("a")) })).await.unwrap();
    put(&store, "a", 1, 1).await;
    assert_eq!(told(&mut watch).await.entries, [entry("a", 1, 1)]);
    server.kill().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_goal_that_nobody_believes_is_written_over_and_no_other() {
    let place = Place::create().await.unwrap();
    let store = EtcdStore::open(place.url(), "test").unwrap();
    let (forged, real) = (entry("a", 9, 9), entry("a", 1, 1));
    put(&store, "a", 9, 9).await;
    assert!(!store.put_over(&real, &entry("a", 9, 8)).await.unwrap(), "another one is there");
    assert!(matches!(store.put(&real).await.unwrap(), Put::Stale(_)));
    assert!(store.put_over(&real, &forged).await.unwrap());
    assert_eq!(store.list().await.unwrap().entries, [real]);
    // Only this cluster's are cleared.
    let other = EtcdStore::open(place.url(), "test-2").unwrap();
    put(&other, "a", 1, 1).await;
    store.clear().await.unwrap();
    assert_eq!(store.list().await.unwrap().entries, []);
    assert_eq!(other.list().await.unwrap().entries.len(), 1);
    place.remove().await.unwrap();
}

/// The address of a cluster: that of all its members.
fn address(members: &[Server]) -> String {
    let hosts: Vec<_> = members.iter().map(|member| member.url().replace("etcd://", "")).collect();
    format!("etcd://{}", hosts.join(","))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cluster_goes_on_without_any_one_of_its_members() {
    let mut members = Server::start_cluster(3).await.unwrap();
    let store = EtcdStore::open(&address(&members), "test").unwrap();
    let mut watch = EtcdStore::open_with(&address(&members), "test", NEVER).unwrap().watch(None);
    for (member, number) in members.iter_mut().zip(1..) {
        member.kill().unwrap();
        // The one that led may have been it: until there is another, nothing is written.
        let start = Instant::now();
        loop {
            match store.put(&entry("a", 1, number)).await {
                Ok(Put::Written | Put::Known) => break,
                Ok(stale) => panic!("{stale:?}"),
                Err(error) => assert!(start.elapsed() < Duration::from_secs(60), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Its stream was with the one that is gone, or is not: it is told without asking by itself.
        let told = until_ok(&mut watch).await;
        assert_eq!(told.last().unwrap(), &entry("a", 1, number), "without member {number}");
        member.start_again().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_member_that_lost_the_others_is_an_error_and_not_silence() {
    let mut members = Server::start_cluster(3).await.unwrap();
    let store = EtcdStore::open_with(&address(&members), "test", NEVER).unwrap();
    put(&store, "a", 1, 1).await;
    // The stream is with the first one, which stays.
    let mut watch = store.watch(None);
    told(&mut watch).await;
    put(&store, "a", 1, 2).await;
    assert_eq!(told(&mut watch).await.entries, [entry("a", 1, 2)]);
    members[1..].iter_mut().for_each(|member| member.kill().unwrap());
    let error = watch.next().await.unwrap_err();
    assert!(matches!(error, GoalsError::Unreachable { .. }), "{error}");
    let error = store.put(&entry("a", 1, 3)).await.unwrap_err();
    assert!(matches!(error, GoalsError::Unreachable { .. }), "{error}");
    members[1..].iter_mut().for_each(|member| member.run_again().unwrap());
    let start = Instant::now();
    while let Err(error) = store.put(&entry("a", 1, 3)).await {
        assert!(start.elapsed() < Duration::from_secs(60), "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(until_ok(&mut watch).await.last().unwrap(), &entry("a", 1, 3));
}

/// An address where nobody listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_endpoint_takes_over() {
    let place = Place::create().await.unwrap();
    let with_dead = place.url().replacen("etcd://", &format!("etcd://{},", nobody()), 1);
    let store = EtcdStore::open(&with_dead, "test").unwrap();
    put(&store, "a", 1, 1).await;
    let mut watch = store.watch(None);
    assert_eq!(told(&mut watch).await.entries, [entry("a", 1, 1)]);
    put(&store, "a", 1, 2).await;
    assert_eq!(told(&mut watch).await.entries, [entry("a", 1, 2)]);
    // None that lives: an error that names the address.
    let dead = nobody();
    let store = EtcdStore::open(&format!("etcd://{dead}"), "test").unwrap();
    let error = store.list().await.unwrap_err().to_string();
    assert!(error.contains(&dead) && error.contains("refused"), "{error}");
    place.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_no_etcd_is_named() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let served = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 4_096]).await.unwrap();
        let answer =
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\nConnection: close\r\n\r\nnope\n";
        stream.write_all(answer).await.unwrap();
    });
    let store = EtcdStore::open(&format!("etcd://{addr}"), "test").unwrap();
    let error = store.list().await.unwrap_err().to_string();
    assert!(error.contains("gRPC gateway") && error.contains("nope"), "{error}");
    served.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn users_log_in_and_again_after_a_restart() {
    let mut server = Server::start().await.unwrap();
    for (path, body) in [
        ("auth/user/add", json!({ "name": "root", "password": "p:w" })),
        ("auth/user/grant", json!({ "user": "root", "role": "root" })),
        ("auth/user/add", json!({ "name": "shoal", "password": "s@c/ret" })),
        ("auth/role/add", json!({ "name": "goals" })),
        (
            "auth/role/grant",
            json!({ "name": "goals", "perm": { "permType": "READWRITE",
                "key": BASE64.encode("/mine/"), "range_end": BASE64.encode("/mine0") } }),
        ),
        ("auth/user/grant", json!({ "user": "shoal", "role": "goals" })),
        ("auth/enable", json!({})),
    ] {
        server.call(path, &body).await.unwrap();
    }
    let at = server.url().replace("etcd://", "");
    let file = server.dir().join("password");
    std::fs::write(&file, "s@c/ret\n").unwrap();
    let store = |login: &str, rest: &str| {
        EtcdStore::open(&format!("etcd://{login}{at}/{rest}"), "test").unwrap()
    };
    let good = store("shoal:s%40c%2Fret@", "mine");
    put(&good, "a", 1, 1).await;
    let by_file = store("shoal@", &format!("mine?password_file={}", file.display()));
    assert_eq!(by_file.list().await.unwrap().entries.len(), 1);
    let mut watch = good.watch(None);
    told(&mut watch).await;

    let refused = async |store: EtcdStore| match store.list().await.unwrap_err() {
        GoalsError::Refused { message } => message,
        error => panic!("{error}"),
    };
    assert!(refused(store("shoal:wrong@", "mine")).await.contains("invalid user ID or password"));
    assert!(refused(store("", "mine")).await.contains("user name is empty"));
    assert!(refused(store("shoal:s%40c%2Fret@", "theirs")).await.contains("permission denied"));

    // etcd forgets the tokens that it gave.
    server.kill().unwrap();
    server.start_again().await.unwrap();
    put(&good, "a", 1, 2).await;
    until(&mut watch, &BTreeMap::from([("a".to_string(), (1, 2))])).await;
}

/// A CA, and certificates of it for the server and for a client, in files.
fn certificates(dir: &Path) -> anyhow::Result<()> {
    let mut params = CertificateParams::new(vec![])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    std::fs::write(dir.join("ca.pem"), ca.pem())?;
    let other = rcgen::generate_simple_self_signed(vec!["other".into()])?;
    std::fs::write(dir.join("other.pem"), other.cert.pem())?;
    for name in ["server", "client"] {
        let mut params = CertificateParams::new(vec![])?;
        params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
        let key = KeyPair::generate()?;
        std::fs::write(dir.join(format!("{name}.pem")), params.signed_by(&key, &ca)?.pem())?;
        std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_checked_both_ways() {
    let flags = ["--cert-file", "DIR/server.pem", "--key-file", "DIR/server.key"];
    let server = Server::start_tls(&flags, certificates).await.unwrap();
    let dir = server.dir();
    let file = |name: &str| dir.join(name).display().to_string();
    let url = server.url();
    let store = EtcdStore::open(&format!("{url}/x?ca={}", file("ca.pem")), "test").unwrap();
    put(&store, "a", 1, 1).await;
    let mut watch = store.watch(None);
    assert_eq!(told(&mut watch).await.entries, [entry("a", 1, 1)]);
    // Signed by somebody else.
    let wrong = EtcdStore::open(&format!("{url}/x?ca={}", file("other.pem")), "test").unwrap();
    let error = wrong.list().await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    for (query, word) in
        [("ca=/nowhere", "/nowhere"), (&*format!("ca={}", file("ca.key")), "ca.key")]
    {
        let error = EtcdStore::open(&format!("{url}?{query}"), "test").err().unwrap().to_string();
        assert!(error.contains(word) && error.lines().count() == 1, "{error}");
    }
    drop(watch);

    // A server that wants to see the client's certificate, too.
    let client_auth =
        [&flags[..], &["--client-cert-auth", "--trusted-ca-file", "DIR/ca.pem"]].concat();
    let server = Server::start_tls(&client_auth, certificates).await.unwrap();
    let (dir, url) = (server.dir(), server.url());
    let file = |name: &str| dir.join(name).display().to_string();
    let query = format!("{url}/x?ca={}", file("ca.pem"));
    let nobody = EtcdStore::open(&query, "test").unwrap();
    assert!(matches!(nobody.list().await, Err(GoalsError::Unreachable { .. })));
    let query = format!("{query}&cert={}&key={}", file("client.pem"), file("client.key"));
    let store = EtcdStore::open(&query, "test").unwrap();
    put(&store, "a", 1, 1).await;
    assert_eq!(told(&mut store.watch(None)).await.entries, [entry("a", 1, 1)]);
}
