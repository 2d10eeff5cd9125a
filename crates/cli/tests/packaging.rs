//! The example files that are shipped are ones that the processes take.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use serde::de::DeserializeOwned;

fn packaging(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../packaging").join(path)
}

#[derive(serde::Serialize)]
struct NoFlags {}

fn load<T: DeserializeOwned>(role: &str) -> T {
    let path = packaging(&format!("config/{role}.toml"));
    shoal_process::load_config(Some(&path), &NoFlags {}).unwrap_or_else(|error| panic!("{error:#}"))
}

#[test]
fn the_example_configurations_are_taken() {
    let coordinator: shoal_coordinator::Config = load("coordinator");
    assert_eq!(coordinator.regions.len(), 2);
    let worker: shoal_worker::Config = load("worker");
    assert_eq!(worker.build_user, "nobody");
    let region: shoal_region::Config = load("region");
    assert_eq!(region.coordinators, worker.coordinators);
    let agent: shoal_agent::Config = load("agent");
    assert_eq!(agent.labels["role"], "web");
    // It reads by URLs; the bucket that the comment names is its region's.
    assert_eq!(agent.bucket, None);
    let text = std::fs::read_to_string(packaging("config/agent.toml")).unwrap();
    assert!(text.contains(&format!("# bucket = \"{}\"", region.bucket)));
}

#[test]
fn each_unit_starts_its_process_with_its_configuration() {
    for role in ["coordinator", "worker", "region", "agent"] {
        let unit =
            std::fs::read_to_string(packaging(&format!("systemd/shoal-{role}.service"))).unwrap();
        let start = format!(
            "ExecStart=/usr/bin/shoal --log-format json {role} --config /etc/shoal/{role}.toml\n"
        );
        assert!(unit.contains(&start), "{role}: {unit}");
        for line in ["NoNewPrivileges=yes", "ProtectSystem=strict", "Restart=always"] {
            assert!(unit.lines().any(|found| found == line), "{role} lacks {line}");
        }
        // What ProtectSystem leaves writable is where the configuration says that the data goes.
        let config = std::fs::read_to_string(packaging(&format!("config/{role}.toml"))).unwrap();
        assert!(unit.contains(&format!("StateDirectory=shoal-{role}\n")));
        assert!(config.contains(&format!("data_dir = \"/var/lib/shoal-{role}\"")));
    }
}
