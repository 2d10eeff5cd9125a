//! What the kernel gives an endpoint's socket.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::UdpSocket;

use common::{Cluster, Peer};
use shoal_pki::Role;
use shoal_transport::EndpointConfig;

/// More than any kernel gives: its limit is an `int`, and the book keeping takes half of that.
const TOO_MUCH_BYTES: usize = 1 << 30;

fn peer(cluster: &Cluster, socket_buffer_bytes: usize) -> Peer {
    Peer::bind(&EndpointConfig { socket_buffer_bytes, ..cluster.config("m1", Role::Agent) })
}

#[tokio::test]
async fn an_endpoint_knows_what_it_was_given_and_what_to_raise() {
    let cluster = Cluster::new();
    let limit = |name: &str| -> usize {
        std::fs::read_to_string(format!("/proc/sys/net/core/{name}"))
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    let (receive, send) = (limit("rmem_max"), limit("wmem_max"));
    let modest = receive.min(send).min(100_000);
    let enough = peer(&cluster, modest).endpoint.socket_buffers();
    assert_eq!((enough.receive_bytes, enough.send_bytes), (modest, modest));
    assert_eq!(enough.advice(), None);
    let little = peer(&cluster, TOO_MUCH_BYTES).endpoint.socket_buffers();
    assert_eq!((little.receive_bytes, little.send_bytes), (receive, send));
    let advice = format!("net.core.rmem_max={0} net.core.wmem_max={0}", TOO_MUCH_BYTES);
    assert_eq!(little.advice(), Some(advice));
}

#[tokio::test]
async fn an_endpoint_counts_what_the_kernel_drops() {
    let cluster = Cluster::new();
    let peer = peer(&cluster, 8_192);
    assert_eq!(peer.endpoint.dropped_datagrams().unwrap(), 0);
    // This test's only thread is here: nobody reads meanwhile.
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..100 {
        socket.send_to(&[0; 1_000], peer.addr).unwrap();
    }
    let dropped = peer.endpoint.dropped_datagrams().unwrap();
    assert!((50..100).contains(&dropped), "{dropped}");
}
