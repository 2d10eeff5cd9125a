//! The swarm: its protocols put together, its listener, its form of addresses.

use std::net::{IpAddr, SocketAddr};

use futures::StreamExt;
use libp2p::{
    Multiaddr, Swarm, SwarmBuilder, connection_limits,
    gossipsub::{self, MessageAuthenticity},
    identify,
    identity::Keypair,
    multiaddr::Protocol,
    request_response::{self, ProtocolSupport},
    swarm::{NetworkBehaviour, SwarmEvent},
};
use shoal_pki::Identity;

use crate::{
    gate::Gate,
    gossip::GossipError,
    membership::MembershipCodec,
    settings::{
        CONNECT_MAX, IDLE_MAX, MEMBERSHIP, gossipsub_config, limits, membership_config, quic_config,
    },
};

#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    pub(crate) limits: connection_limits::Behaviour,
    pub(crate) gossip: Gate<gossipsub::Behaviour>,
    pub(crate) membership: request_response::Behaviour<MembershipCodec>,
    pub(crate) identify: identify::Behaviour,
}

pub(crate) fn start_error(error: impl std::fmt::Display) -> GossipError {
    GossipError::Start(error.to_string())
}

/// The error at the bottom of a chain: libp2p's own say nothing.
fn root(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Puts the protocols together.
pub(crate) fn build(identity: &Identity, max_peers: u32) -> Result<Swarm<Behaviour>, GossipError> {
    let keys = Keypair::ed25519_from_bytes(identity.ed25519_seed()).map_err(start_error)?;
    let gossip = gossipsub::Behaviour::new(
        MessageAuthenticity::Anonymous,
        gossipsub_config().map_err(start_error)?,
    )
    .map_err(start_error)?;
    let membership = request_response::Behaviour::with_codec(
        MembershipCodec,
        [(MEMBERSHIP, ProtocolSupport::Full)],
        membership_config(),
    );
    let agent = format!("shoal/{}", env!("CARGO_PKG_VERSION"));
    let identify = identify::Behaviour::new(
        identify::Config::new("/shoal/1".into(), keys.public())
            .with_agent_version(agent)
            .with_cache_size(0),
    );
    let behaviour = Behaviour {
        limits: connection_limits::Behaviour::new(limits(max_peers)),
        gossip: Gate::new(gossip),
        membership,
        identify,
    };
    let built = SwarmBuilder::with_existing_identity(keys)
        .with_tokio()
        .with_quic_config(quic_config)
        .with_behaviour(|_| behaviour)
        .map_err(start_error)?
        // Links outside the mesh are idle, and are kept.
        .with_swarm_config(|config| config.with_idle_connection_timeout(IDLE_MAX))
        .build();
    Ok(built)
}

/// Listens, and tells on which port.
pub(crate) async fn listen_on(
    swarm: &mut Swarm<Behaviour>,
    listen: SocketAddr,
) -> Result<SocketAddr, GossipError> {
    let failed = |reason: String| GossipError::Listen { addr: listen, reason };
    swarm.listen_on(multiaddr(listen)).map_err(|error| failed(root(&error)))?;
    let listening = async {
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::NewListenAddr { address, .. } => {
                    // A wildcard is reported as each interface's address; the port is the same.
                    if let Some(addr) = socket_addr(&address) {
                        return Ok(SocketAddr::new(listen.ip(), addr.port()));
                    }
                }
                SwarmEvent::ListenerError { error, .. } => return Err(failed(error.to_string())),
                SwarmEvent::ListenerClosed { reason, .. } => {
                    return Err(failed(format!("closed: {reason:?}")));
                }
                _ => {}
            }
        }
    };
    match tokio::time::timeout(CONNECT_MAX, listening).await {
        Ok(result) => result,
        Err(_) => Err(failed("no answer from the network".into())),
    }
}

pub(crate) fn multiaddr(addr: SocketAddr) -> Multiaddr {
    let ip = match addr.ip() {
        IpAddr::V4(ip) => Protocol::Ip4(ip),
        IpAddr::V6(ip) => Protocol::Ip6(ip),
    };
    Multiaddr::empty().with(ip).with(Protocol::Udp(addr.port())).with(Protocol::QuicV1)
}

/// The address in `/ip4/…/udp/…/quic-v1`; none for any other form, or one that cannot be dialed.
pub(crate) fn socket_addr(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    let Protocol::Udp(port) = parts.next()? else { return None };
    let quic = matches!(parts.next()?, Protocol::QuicV1);
    (quic && !ip.is_unspecified() && port != 0).then(|| SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_there_and_back() {
        for text in ["127.0.0.1:4001", "[2001:db8::1]:9"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(socket_addr(&multiaddr(addr)), Some(addr));
        }
        for text in ["/ip4/0.0.0.0/udp/1/quic-v1", "/ip4/1.2.3.4/tcp/1", "/dns4/x/udp/1/quic-v1"] {
            assert_eq!(socket_addr(&text.parse().unwrap()), None, "{text}");
        }
    }
}
