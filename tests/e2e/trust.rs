//! Membership over time: machines that join and are revoked, certificates that renew, keys that are replaced.

use std::{fs, path::Path, process::Command, time::Instant};

use shoal_pki::{Identity, issuer_of};
use shoal_proto::state::MachineState;

use crate::harness::{Cluster, Process, SHOAL, Shape, client, plain_app, wait_for};

/// Slow enough that a fetch of 16 MiB is still under way when something happens to it.
const SLOW: &str = "down_limit = \"3MB/s\"\n";

fn identity(dir: &Path) -> Identity {
    read_identity(&dir.join("identity"))
}

fn read_identity(dir: &Path) -> Identity {
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
    Identity::from_pem(&read("identity.pem"), &read("identity.key")).unwrap()
}

fn trust_number(process: &Process) -> u64 {
    let bytes = fs::read(process.dir.join("identity/trust.bin")).unwrap();
    shoal_pki::Trust::from_signed(&bytes).unwrap().number()
}

fn status(cluster: &Cluster) -> serde_json::Value {
    serde_json::from_str(&cluster.shoal(&["pki", "status", "--json"])).unwrap()
}

async fn fetches(cluster: &Cluster, machine: &str) {
    cluster
        .machine_reports(machine, "data", "under way", |seen| {
            seen.report.state == MachineState::Fetching && seen.report.progress.pieces > 0
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_revoked_in_a_swarm_is_cut_off_and_the_others_finish() {
    let shape = Shape { agents: 5, agent_extra: SLOW.into(), ..Shape::default() };
    let mut cluster = Cluster::start(shape).await;
    cluster.set_app(&plain_app("data")).await;
    let artifact = cluster.publish("data", &cluster.random_file("file", 16 << 20, 1)).await;
    let rollout = cluster.deploy("data", &artifact.name).await;
    for machine in ["m1", "m3", "m5"] {
        fetches(&cluster, machine).await;
    }
    let start = Instant::now();
    cluster.shoal(&["pki", "revoke", "m3"]);
    wait_for("m3 to lose its region processes", async || {
        let log = cluster.agents[2].log();
        if log.matches("lost the region process").count() >= 2 { Ok(()) } else { Err(log.len()) }
    })
    .await;
    println!(
        "cut off by both region processes {:.1} s after the revocation",
        start.elapsed().as_secs_f64()
    );
    for at in [0, 1, 3, 4] {
        wait_for("the others to go by the new trust", async || {
            if trust_number(&cluster.agents[at]) == 2 { Ok(()) } else { Err(at) }
        })
        .await;
    }
    let ended = cluster.rollout_succeeds(rollout.id).await;
    let machines = cluster.client.machines(None, None).await.unwrap();
    let names: Vec<_> = machines.iter().map(|machine| machine.name.as_str()).collect();
    assert_eq!(names, ["m1", "m2", "m4", "m5"], "{ended:?}");
    assert!(!cluster.current_path("m3", "data").exists(), "it finished without neighbours");
    // It does not come back, with whatever it has on its disk: it ends if it has heard of it itself, else others refuse it.
    let (dir, before) = (cluster.agents[2].dir.clone(), cluster.agents[2].log().len());
    cluster.agents[2].kill();
    cluster.agents[2] = Process::start("agent", "m3", &dir);
    wait_for("it to be refused", async || {
        let ended = cluster.agents[2].ended();
        let log = cluster.agents[2].log();
        let last = &log[before..];
        match ended {
            Some(status) if status.success() || !last.contains("is revoked") => {
                panic!("it ended with {status}: {last}")
            }
            Some(_) => Ok(()),
            None if last.contains("no connection to the region process") => Ok(()),
            None => Err(last.len()),
        }
    })
    .await;
    assert_eq!(cluster.client.machines(None, None).await.unwrap().len(), 4);
    assert!(cluster.shoal_fails(&["pki", "revoke", "m3"]).contains("revoked already"));
    assert!(cluster.shoal_fails(&["pki", "revoke", "m9"]).contains("--node"));
    // A new goal reaches all that are left.
    let next = cluster.publish("data", &cluster.random_file("next", 1 << 20, 2)).await;
    let rollout = cluster.deploy("data", &next.name).await;
    cluster.rollout_succeeds(rollout.id).await;
}

/// Runs `shoal join` for an agent in `dir`.
fn join(cluster: &Cluster, dir: &Path, name: &str, token: &str, ca_hash: &str) -> (bool, String) {
    fs::write(cluster.root().join("token"), token).unwrap();
    let output = Command::new(SHOAL)
        .args(["join", "--coordinator", &format!("https://{}", cluster.api)])
        .args(["--ca-hash", ca_hash, "--name", name, "--advertise", "127.0.0.1"])
        .arg("--token-file")
        .arg(cluster.root().join("token"))
        .arg("--dir")
        .arg(dir)
        .arg("--data-dir")
        .arg(dir.join("data"))
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap().trim().into())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_machine_joins_with_a_token_and_gets_the_goal() {
    let cluster = Cluster::start(Shape { agents: 1, ..Shape::default() }).await;
    cluster.set_app(&plain_app("data")).await;
    let artifact = cluster.publish("data", &cluster.random_file("file", 1 << 20, 1)).await;
    let rollout = cluster.deploy("data", &artifact.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    wait_for("the coordinator to know where the region processes are", async || {
        let regions = &status(&cluster)["regions"]["r1"];
        let all = regions.as_object().is_some_and(|regions| regions.len() == 2);
        if all { Ok(()) } else { Err(regions.clone()) }
    })
    .await;
    let create = ["join-token", "create", "--role", "agent", "--region", "r1", "--zone", "b"];
    let made = cluster.shoal(&[&create[..], &["--label", "half=odd", "--json"]].concat());
    let made: serde_json::Value = serde_json::from_str(&made).unwrap();
    let (token, hash) = (made["token"].as_str().unwrap(), made["ca_hash"].as_str().unwrap());
    assert!(
        !fs::read(cluster.root().join("coordinator/data/shoal.sqlite"))
            .unwrap()
            .windows(token.len())
            .any(|bytes| bytes == token.as_bytes()),
        "it is stored hashed"
    );
    let dir = cluster.root().join("m7");
    // Another CA than the one that was said: the token is not even sent.
    let other = format!("blake3:{}", "0".repeat(64));
    let (ok, said) = join(&cluster, &dir, "m7", token, &other);
    assert!(!ok && said.contains("no CA of this hash"), "{said}");
    let (ok, said) = join(&cluster, &dir, "m7", "shoal-join-wrong", hash);
    assert!(!ok && said.contains("shoal join-token create"), "{said}");
    // A name that is another machine's.
    let (ok, said) = join(&cluster, &dir, "m1", token, hash);
    assert!(!ok && said.contains("shoal pki revoke m1"), "{said}");
    let (ok, said) = join(&cluster, &dir, "m7", token, hash);
    assert!(ok, "{said}");
    // Once.
    let (ok, said) = join(&cluster, &cluster.root().join("m8"), "m8", token, hash);
    assert!(!ok && said.contains("used up"), "{said}");
    let (ok, said) = join(&cluster, &dir, "m7", token, hash);
    assert!(!ok && said.contains("has a certificate already"), "{said}");
    assert_eq!(cluster.shoal(&["join-token", "list"]).trim(), "no join tokens");

    // The configuration is ready; a test only adds what a machine of its own needs not say.
    let config = fs::read_to_string(dir.join("agent.toml")).unwrap();
    let bucket = cluster.bucket(0);
    let more = format!(
        "listen = \"127.0.0.1:0\"\ngossip_listen = \"127.0.0.1:0\"\nreserve_free_mib = 64\nbucket = \"{}\"\n",
        bucket.display()
    );
    fs::write(
        dir.join("config.toml"),
        config.replace("\n[labels]", &format!("\n{more}\n[labels]")),
    )
    .unwrap();
    let mut agent = Process::start("agent", "m7", &dir);
    agent.address("data").await;
    cluster.machines_known(2).await;
    let seen = cluster.machine_is("m7", "data", MachineState::Active).await;
    assert_eq!(seen.report.artifact, artifact.artifact);
    let machine = cluster.machine("m7").await;
    assert_eq!(machine.zone, "b");
    assert_eq!(machine.labels.get("half").map(String::as_str), Some("odd"));
    assert_eq!(cluster.current("m7", "data"), cluster.current("m1", "data"));
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_renew_by_themselves() {
    let shape = Shape {
        agents: 1,
        workers: 1,
        region_processes: 1,
        life_s: 12,
        coordinator_extra: "certificate_life_s = 12\n".into(),
        ..Shape::default()
    };
    let cluster = Cluster::start(shape).await;
    let all = [&cluster.coordinator, &cluster.regions[0], &cluster.agents[0], &cluster.workers[0]];
    let mut issued: Vec<_> =
        all.iter().map(|process| identity(&process.dir).not_after_s()).collect();
    // Twice: what was renewed renews again.
    for round in 1..=2 {
        for (process, before) in all.iter().zip(&mut issued) {
            *before = wait_for(&format!("renewal {round} of {}", process.name), async || {
                let held = identity(&process.dir);
                if held.not_after_s() > *before { Ok(held.not_after_s()) } else { Err(*before) }
            })
            .await;
        }
    }
    // The keys are the same, so the machine is.
    assert_eq!(cluster.client.machines(None, None).await.unwrap().len(), 1);
    cluster.set_app(&plain_app("data")).await;
    let artifact = cluster.publish("data", &cluster.random_file("file", 1 << 20, 1)).await;
    let rollout = cluster.deploy("data", &artifact.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    for process in all {
        assert!(!process.log().contains("cannot renew"), "{}", process.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ca_is_replaced_while_a_rollout_runs() {
    let shape = Shape { life_s: 3_600, agent_extra: SLOW.into(), ..Shape::default() };
    let mut cluster = Cluster::start(shape).await;
    cluster.set_app(&plain_app("data")).await;
    let artifact = cluster.publish("data", &cluster.random_file("file", 24 << 20, 1)).await;
    let rollout = cluster.deploy("data", &artifact.name).await;
    fetches(&cluster, "m1").await;

    // One machine is off from before the new CA is made until all others have its certificates. It says so as it ends: one that
    // falls silent is counted until its connections are over.
    assert!(cluster.agents[1].stop().await.success());
    let new = cluster.root().join("new-ca");
    cluster.shoal(&["pki", "rotate-ca", "begin", "--out", new.to_str().unwrap()]);
    let early = cluster.shoal_fails(&["pki", "rotate-ca", "finish"]);
    assert!(early.contains("ca_key"), "{early}");
    fs::copy(new.join("ca.key"), cluster.coordinator.dir.join("ca.key")).unwrap();
    wait_for("the operator to have a certificate of the new CA", async || {
        cluster.shoal(&["pki", "refresh"]);
        let held = issuer_of(read_identity(&cluster.root().join("operator")).certificate_der());
        let first = issuer_of(identity(&cluster.agents[1].dir).certificate_der());
        if held == first { Err(held) } else { Ok(()) }
    })
    .await;
    let cas = status(&cluster)["cas"].clone();
    let newest = cas[1].as_str().unwrap().to_string();
    let renewed = async |cluster: &Cluster| {
        let status = status(cluster);
        let processes = status["regions"]["r1"].as_object().unwrap();
        let told: Vec<_> = processes.values().map(|standing| standing["issuers"].clone()).collect();
        let done = told.iter().all(|issuers| {
            issuers
                .as_object()
                .is_some_and(|all| all.keys().all(|id| *id == newest) && all.len() == 1)
        });
        if done { Ok(()) } else { Err(told) }
    };
    let all = "all machines to have certificates of the new CA";
    wait_for(all, async || renewed(&cluster).await).await;
    cluster.restart_agent(1).await;
    wait_for("the machine that was off to have one, too", async || {
        let held = issuer_of(identity(&cluster.agents[1].dir).certificate_der());
        if held == u64::from_str_radix(&newest, 16).ok() { Ok(()) } else { Err(held) }
    })
    .await;
    let old = cluster.root().join("old");
    cluster.keys.issue(&old, shoal_pki::Role::Operator, "eve", None);
    wait_for("the CA to be replaced", async || {
        // The coordinator's and the region processes' own certificates are renewed within seconds.
        let own = [&cluster.coordinator, &cluster.regions[0], &cluster.regions[1]];
        let id = |process: &&Process| issuer_of(identity(&process.dir).certificate_der());
        if own.iter().all(|process| id(process) == u64::from_str_radix(&newest, 16).ok()) {
            Ok(())
        } else {
            Err("not yet")
        }
    })
    .await;
    // The machine that was off was connected with its old one for a moment, and is counted so until its regions say otherwise.
    wait_for(all, async || renewed(&cluster).await).await;
    let done = cluster.shoal(&["pki", "rotate-ca", "finish"]);
    assert!(done.contains("the new CA alone"), "{done}");
    cluster.client = client(&cluster.root().join("operator"), cluster.api);
    cluster.rollout_succeeds(rollout.id).await;
    fs::copy(cluster.root().join("operator/trust.bin"), old.join("trust.bin")).unwrap();
    assert!(client(&old, cluster.api).apps().await.is_err(), "the old CA's word still counts");
    // And the next one works with the new CA alone.
    let next = cluster.publish("data", &cluster.random_file("next", 1 << 20, 2)).await;
    let rollout = cluster.deploy("data", &next.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    assert_eq!(status(&cluster)["cas"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_goal_key_is_replaced_while_a_rollout_runs() {
    let shape = Shape { agent_extra: SLOW.into(), ..Shape::default() };
    let mut cluster = Cluster::start(shape).await;
    cluster.set_app(&plain_app("data")).await;
    let artifact = cluster.publish("data", &cluster.random_file("file", 16 << 20, 1)).await;
    let rollout = cluster.deploy("data", &artifact.name).await;
    fetches(&cluster, "m1").await;
    let goal = cluster.agents[0].data_dir().join("goals/data.goal");
    let signed_before = fs::read(&goal).unwrap();

    let new = cluster.root().join("new-goal-key");
    cluster.shoal(&["pki", "rotate-goal-key", "begin", "--out", new.to_str().unwrap()]);
    let early = cluster.shoal_fails(&["pki", "rotate-goal-key", "finish"]);
    assert!(early.contains("still signs with goal key 1"), "{early}");
    fs::rename(new.join("goal.key"), cluster.coordinator.dir.join("goal.key")).unwrap();
    wait_for("all machines to know the new key", async || {
        let told = cluster.shoal(&["pki", "status"]);
        if told.contains("go by trust 2") && !told.contains("go by trust 1") {
            Ok(())
        } else {
            Err(told)
        }
    })
    .await;
    cluster.shoal(&["pki", "rotate-goal-key", "finish"]);
    wait_for("the machines to have their goals signed anew", async || {
        if fs::read(&goal).unwrap() == signed_before { Err("the old one") } else { Ok(()) }
    })
    .await;
    cluster.rollout_succeeds(rollout.id).await;
    // A machine and a region process that start again go on from their files.
    cluster.restart_agent(0).await;
    assert!(!cluster.agents[0].log().contains("goal file is not valid"));
    cluster.machine_is("m1", "data", MachineState::Active).await;
    let next = cluster.publish("data", &cluster.random_file("next", 1 << 20, 2)).await;
    let rollout = cluster.deploy("data", &next.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    // What is signed with the old key counts no more, for anybody.
    fs::write(cluster.coordinator.dir.join("goal.key"), cluster.keys.signer.to_pem().unwrap())
        .unwrap();
    let refused = cluster.shoal_fails(&["deploy", "data", &artifact.name]);
    assert!(refused.contains("does not know the goal key"), "{refused}");
}
