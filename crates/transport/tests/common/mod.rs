//! A cluster of endpoints on loopback.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::{net::SocketAddr, time::Duration};

use shoal_pki::{
    CertificateAuthority, Credentials, GoalSigner, Identity, IssueRequest, Role, Trust,
};
use shoal_proto::{
    AppName, ArtifactId, MachineName, NodeId, PieceIndex, RegionName, Revision, codec,
    peer::{PeerAddr, PeerMessage, StreamRequest},
    trust::{TRUST_MAX_BYTES, TrustBundle},
};
use shoal_transport::{Connection, Endpoint, EndpointConfig, Incoming};
use tokio::{sync::mpsc, time::timeout};

/// What must happen happens far sooner; a test that waits this long has failed.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub const CLUSTER: &str = "reef";

pub struct Cluster {
    pub ca: CertificateAuthority,
    signer: GoalSigner,
    pub trust: Trust,
}

impl Cluster {
    pub fn new() -> Self {
        let ca = CertificateAuthority::create(CLUSTER).unwrap();
        let signer = GoalSigner::create(1).unwrap();
        let bundle = TrustBundle {
            cluster: CLUSTER.into(),
            number: 1,
            ca_certificates: vec![ca.cert_der().to_vec()],
            goal_keys: vec![signer.public()],
            revoked: vec![],
        };
        let signed = signer.sign_trust(&bundle).unwrap();
        let trust = Trust::from_signed(&codec::encode(&signed, TRUST_MAX_BYTES).unwrap()).unwrap();
        Self { ca, signer, trust }
    }

    /// The next trust, after something was done to the present one.
    pub fn next_trust(&self, change: impl FnOnce(&mut TrustBundle)) -> Trust {
        let mut bundle = self.trust.bundle().clone();
        bundle.number += 1;
        change(&mut bundle);
        let signed = self.signer.sign_trust(&bundle).unwrap();
        Trust::from_signed(&codec::encode(&signed, TRUST_MAX_BYTES).unwrap()).unwrap()
    }

    pub fn identity(&self, machine: &str, role: Role) -> Identity {
        let issued = self
            .ca
            .issue(&IssueRequest {
                machine: MachineName::new(machine).unwrap(),
                region: Some(RegionName::new("eu").unwrap()),
                role,
                hosts: vec![],
                days: 1,
            })
            .unwrap();
        Identity::from_pem(&issued.cert_pem, &issued.key_pem).unwrap()
    }

    pub fn config(&self, machine: &str, role: Role) -> EndpointConfig {
        let identity = self.identity(machine, role);
        EndpointConfig::new(loopback(), Credentials::new(identity, self.trust.clone()))
    }

    pub fn peer(&self, machine: &str) -> Peer {
        Peer::bind(&self.config(machine, Role::Agent))
    }

    /// Two peers, the first one of the lesser node id.
    pub fn pair(&self) -> (Peer, Peer) {
        let (one, two) = (self.peer("m1"), self.peer("m2"));
        if one.node < two.node { (one, two) } else { (two, one) }
    }
}

pub fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// An endpoint and what comes to it.
pub struct Peer {
    pub endpoint: Endpoint,
    pub incoming: mpsc::Receiver<Incoming>,
    pub node: NodeId,
    pub addr: SocketAddr,
}

impl Peer {
    pub fn bind(config: &EndpointConfig) -> Self {
        let (endpoint, incoming) = Endpoint::bind(config).unwrap();
        let addr = endpoint.local_addr();
        Self { endpoint, incoming, node: config.credentials.identity().member().node, addr }
    }

    pub async fn connect(&self, other: &Self) -> Connection {
        within(self.endpoint.connect(other.addr, other.node)).await.unwrap()
    }

    pub async fn next(&mut self) -> Incoming {
        within(self.incoming.recv()).await.expect("the endpoint is gone")
    }

    pub async fn connected(&mut self) -> Connection {
        match self.next().await {
            Incoming::Connected(connection) => connection,
            other => panic!("not connected: {other:?}"),
        }
    }

    pub async fn message(&mut self) -> PeerMessage {
        match self.next().await {
            Incoming::Message(_, message) => message,
            other => panic!("no message: {other:?}"),
        }
    }

    pub async fn request(&mut self) -> shoal_transport::IncomingRequest {
        match self.next().await {
            Incoming::Request(request) => request,
            other => panic!("no request: {other:?}"),
        }
    }

    pub async fn closed(&mut self) -> (Connection, String) {
        match self.next().await {
            Incoming::Closed(connection, reason) => (connection, reason),
            other => panic!("not closed: {other:?}"),
        }
    }

    /// No connection is left, once what ends has ended.
    pub async fn alone(&self) {
        until(|| self.endpoint.connections().is_empty()).await;
    }
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future).await.expect("it takes too long")
}

/// Waits until `condition` holds.
pub async fn until(condition: impl Fn() -> bool) {
    within(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

pub fn hello(number: u64) -> PeerMessage {
    let addr = loopback();
    PeerMessage::Hello {
        me: PeerAddr {
            node: NodeId([1; 32]),
            machine: MachineName::new("m1").unwrap(),
            zone: "a".into(),
            data: addr,
            gossip: addr,
        },
        revisions: vec![(AppName::new("web").unwrap(), Revision { epoch: 0, number })],
    }
}

pub fn piece(index: u32) -> StreamRequest {
    StreamRequest::Piece { artifact: ArtifactId([3; 32]), piece: PieceIndex(index) }
}

/// Bytes that no mistake in order or length leaves equal.
pub fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}
