//! What an endpoint is told, and the QUIC settings that follow from it.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use aws_lc_rs::hmac;
use quinn::{
    MtuDiscoveryConfig, TransportConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use quinn_proto::HashedConnectionIdGenerator;
use shoal_pki::{ClientAuth, Credentials};
use shoal_proto::peer::{VERSIONS, alpn};

use crate::{
    buffers::{Drops, SocketBuffers},
    congestion::Congestion,
    error::TransportError,
    socket::{self, Bound},
};

/// The largest UDP payload that a path of jumbo frames, 9,000 bytes, carries over IPv4. It is looked for on every path:
/// where it is not found, that cost a few probes, and where it is, bare QUIC needs 0.6 of the CPU for a byte (the
/// benchmark `limits`: 1.56 s a GB, 2.65 at 1,472 bytes).
const MTU_JUMBO_BYTES: u16 = 8_972;

/// A connection may send this many of the largest packets before anything was acknowledged. quinn's own 12,000 bytes do
/// not hold a probe for jumbo frames and a packet beside it: then even a close waits for what may never be acknowledged.
const INITIAL_WINDOW_PACKETS: u64 = 4;

/// The smallest UDP payload that QUIC works with.
const MTU_MIN_BYTES: u16 = 1_200;

/// The largest UDP payload that may be asked for: IPv4 carries no more.
const MTU_MAX_BYTES: u16 = 65_507;

/// A stream may have this many bytes on the way: 4 MiB cover 10 Gbit/s at 3 ms.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;

/// The share of the receive budget that each connection has at least, in bytes. It is what a new
/// connection begins with, and enough for control messages and requests.
pub(crate) const WINDOW_MIN_BYTES: u64 = 64 << 10;

/// The share of the receive budget that each connection has at most, in bytes: 10 Gbit/s at 6 ms.
pub(crate) const WINDOW_MAX_BYTES: u64 = 8 << 20;

/// Bytes that may wait for their acknowledgement on one connection. They lie in the piece that is being
/// sent, which its sender holds anyway; this only bounds what congestion control may use.
const SEND_WINDOW_BYTES: u64 = 16 << 20;

/// Questions of one peer that are open at a time; the next ones wait at the peer. More than a fetcher keeps in
/// flight, few enough that one peer cannot fill a process.
const REQUESTS_PER_CONNECTION: u32 = 64;

/// A quiet connection to a region process is probed this often. An agent at rest polls every 45 s at most and so is never quiet for as
/// long; one that is told to poll more seldom keeps its connection, and its place in what lies between (a NAT forgets after
/// some minutes, Linux's after 120 s).
const REGION_KEEP_ALIVE: Duration = Duration::from_secs(60);

/// A connection to a region process over which nothing came for this long is gone. Whoever asks sees sooner that nobody answers.
const REGION_IDLE_TIMEOUT: Duration = Duration::from_secs(150);

/// The UDP payload of an Ethernet frame over IPv4: what a region process sends is small, and quinn keeps room for ten of the
/// largest packets for each connection.
const MTU_ETHERNET_BYTES: u16 = 1_472;

/// Handshakes that wait to be begun; further ones are refused, and dialled again by their diallers.
const HANDSHAKES_WAITING_MAX: usize = 1_024;

/// Bytes kept for a handshake that waits, and for all of them: a ClientHello fits into two packets.
const HANDSHAKE_BYTES: u64 = 16 << 10;
const HANDSHAKES_BYTES: u64 = 4 << 20;

/// How an endpoint is set up.
#[derive(Debug, Clone)]
pub struct EndpointConfig {
    /// The UDP address to listen on and to dial from; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Who the process is and whom it believes, at each handshake anew.
    pub credentials: Credentials,
    /// The protocol versions that it speaks, newest first. A connection has the newest that both ends speak.
    pub versions: Vec<u16>,
    /// Connections at a time; a further peer is closed with
    /// [`CloseReason::Full`](shoal_proto::peer::CloseReason::Full).
    pub max_connections: usize,
    /// Largest UDP payload to look for, in bytes, 1,200-65,507. Connections begin with 1,200 and
    /// search up to it; 8,972, the default, suits jumbo frames over IPv4.
    pub mtu_max: u16,
    /// Bytes that may have arrived without having been read, over all connections. A slow reader costs
    /// up to twice this in memory, because packets are kept whole.
    pub receive_budget_bytes: u64,
    /// Size asked of the kernel for the socket's buffers, in bytes each.
    pub socket_buffer_bytes: usize,
    /// A quiet connection is probed this often; none: the other end sees to it.
    pub keep_alive: Option<Duration>,
    /// A connection from which nothing came for this long is gone, by the shorter time of both ends.
    pub idle_timeout: Duration,
    /// The same two for connections that this side dials to region processes ([`Endpoint::connect_any`](crate::Endpoint::connect_any)).
    pub region_keep_alive: Duration,
    /// See [`Self::region_keep_alive`].
    pub region_idle_timeout: Duration,
}

impl EndpointConfig {
    /// The defaults.
    #[must_use]
    pub fn new(listen: SocketAddr, credentials: Credentials) -> Self {
        Self {
            listen,
            credentials,
            versions: VERSIONS.to_vec(),
            max_connections: 256,
            mtu_max: MTU_JUMBO_BYTES,
            receive_budget_bytes: 32 << 20,
            socket_buffer_bytes: 4 << 20,
            keep_alive: Some(Duration::from_secs(4)),
            idle_timeout: Duration::from_secs(12),
            region_keep_alive: REGION_KEEP_ALIVE,
            region_idle_timeout: REGION_IDLE_TIMEOUT,
        }
    }

    /// The defaults of a region process, to which many machines are connected that ask something now and then: it probes nobody, and
    /// keeps as little for each as it can.
    #[must_use]
    pub fn of_region(listen: SocketAddr, credentials: Credentials) -> Self {
        Self {
            keep_alive: None,
            idle_timeout: REGION_IDLE_TIMEOUT,
            mtu_max: MTU_ETHERNET_BYTES,
            ..Self::new(listen, credentials)
        }
    }

    /// A bare QUIC endpoint with these settings: what an [`Endpoint`](crate::Endpoint) works with, and what it can be
    /// measured against.
    ///
    /// # Errors
    /// As [`Endpoint::bind`](crate::Endpoint::bind).
    pub fn bare(&self) -> Result<quinn::Endpoint, TransportError> {
        self.open(Arc::default()).map(|opened| opened.quinn)
    }

    /// Opens the socket, and QUIC on it, which yields to other traffic while the flag says so.
    pub(crate) fn open(&self, yields: Arc<AtomicBool>) -> Result<Opened, TransportError> {
        let Quic { endpoint, server, client, regions, asking } = self.quic(yields.clone())?;
        let failed = |error| TransportError::Listen { addr: self.listen, error };
        let Bound { socket, buffers, drops } = socket::bind(self).map_err(failed)?;
        let socket = socket::wrap(socket, yields).map_err(failed)?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let mut quinn =
            quinn::Endpoint::new_with_abstract_socket(endpoint, Some(server), socket, runtime)
                .map_err(failed)?;
        quinn.set_default_client_config(client);
        Ok(Opened { quinn, buffers, drops, regions, asking })
    }

    /// The QUIC settings of both directions.
    fn quic(&self, yields: Arc<AtomicBool>) -> Result<Quic, TransportError> {
        if !(MTU_MIN_BYTES..=MTU_MAX_BYTES).contains(&self.mtu_max) {
            return Err(TransportError::Config(format!(
                "mtu_max is {}: use {MTU_MIN_BYTES}-{MTU_MAX_BYTES}",
                self.mtu_max
            )));
        }
        if self.versions.is_empty() {
            return Err(TransportError::Config("versions is empty: name at least one".into()));
        }
        let transport =
            Arc::new(self.transport(yields.clone(), self.keep_alive, self.idle_timeout)?);
        let (keep_alive, idle) = (Some(self.region_keep_alive), self.region_idle_timeout);
        let of_regions = Arc::new(self.transport(yields, keep_alive, idle)?);
        let names: Vec<_> = self.versions.iter().map(|version| alpn(*version)).collect();
        let names: Vec<_> = names.iter().map(String::as_bytes).collect();

        let tls = shoal_pki::server_config(&self.credentials, &names, ClientAuth::Required)?;
        let tls = QuicServerConfig::try_from(tls).map_err(no_initial_suite)?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls));
        server
            .transport_config(transport.clone())
            .max_incoming(HANDSHAKES_WAITING_MAX)
            .incoming_buffer_size(HANDSHAKE_BYTES)
            .incoming_buffer_size_total(HANDSHAKES_BYTES);

        let tls = shoal_pki::client_config(&self.credentials, &names)?;
        let tls = QuicClientConfig::try_from(tls).map_err(no_initial_suite)?;
        let mut client = quinn::ClientConfig::new(Arc::new(tls));
        client.transport_config(transport.clone());
        let mut regions = client.clone();
        regions.transport_config(of_regions);
        let tls = shoal_pki::asking_config(&self.credentials, &names)?;
        let tls = QuicClientConfig::try_from(tls).map_err(no_initial_suite)?;
        let mut asking = quinn::ClientConfig::new(Arc::new(tls));
        asking.transport_config(transport);

        Ok(Quic { endpoint: self.endpoint()?, server, client, regions, asking })
    }

    fn transport(
        &self,
        yields: Arc<AtomicBool>,
        keep_alive: Option<Duration>,
        idle_timeout: Duration,
    ) -> Result<TransportConfig, TransportError> {
        let idle = idle_timeout.try_into().map_err(|_| {
            TransportError::Config(format!("idle_timeout of {idle_timeout:?} is too long"))
        })?;
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(self.mtu_max);
        let initial_window = INITIAL_WINDOW_PACKETS * u64::from(self.mtu_max);
        let congestion = Congestion { yields, initial_window };
        let mut transport = TransportConfig::default();
        transport
            .max_concurrent_bidi_streams(VarInt::from_u32(REQUESTS_PER_CONNECTION))
            // The control stream.
            .max_concurrent_uni_streams(VarInt::from_u32(1))
            .max_idle_timeout(Some(idle))
            .keep_alive_interval(keep_alive)
            .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
            // Raised to its share of the budget once the peer is known.
            .receive_window(VarInt::from_u32(WINDOW_MIN_BYTES as u32))
            .send_window(SEND_WINDOW_BYTES)
            // A piece that is whole can be passed on, two halves cannot.
            .send_fairness(false)
            .mtu_discovery_config(Some(mtu))
            .congestion_controller_factory(Arc::new(congestion))
            .datagram_receive_buffer_size(None);
        Ok(transport)
    }

    /// Keys of stateless resets and connection ids follow from the identity: a peer whose connection a
    /// restart has ended is told so by the new process, instead of waiting for its idle timeout.
    fn endpoint(&self) -> Result<quinn::EndpointConfig, TransportError> {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, &self.credentials.identity().ed25519_seed());
        let derive = |purpose: &[u8]| hmac::sign(&secret, purpose);
        let reset = hmac::Key::new(hmac::HMAC_SHA256, derive(b"shoal quic reset v1").as_ref());
        let mut id_key = [0; 8];
        id_key.copy_from_slice(&derive(b"shoal quic connection id v1").as_ref()[..8]);
        let id_key = u64::from_le_bytes(id_key);

        let mut endpoint = quinn::EndpointConfig::new(Arc::new(ResetKey(reset)));
        endpoint.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
        endpoint
            .max_udp_payload_size(self.mtu_max.max(1_472))
            .map_err(|error| TransportError::Config(error.to_string()))?;
        Ok(endpoint)
    }
}

/// QUIC on its socket, and what the kernel gave that.
pub(crate) struct Opened {
    pub(crate) quinn: quinn::Endpoint,
    pub(crate) buffers: SocketBuffers,
    pub(crate) drops: Drops,
    /// For connections to region processes.
    pub(crate) regions: quinn::ClientConfig,
    /// For questions to whoever answers.
    pub(crate) asking: quinn::ClientConfig,
}

/// The key of stateless resets. quinn has such a type of its own, but which library's key it takes hangs on
/// the features that other crates of the build turn on.
struct ResetKey(hmac::Key);

impl quinn::crypto::HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(hmac::sign(&self.0, data).as_ref());
    }

    fn signature_len(&self) -> usize {
        hmac::HMAC_SHA256.digest_algorithm().output_len()
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), quinn::crypto::CryptoError> {
        hmac::verify(&self.0, data, signature).map_err(|_| quinn::crypto::CryptoError)
    }
}

/// The settings in quinn's terms.
struct Quic {
    endpoint: quinn::EndpointConfig,
    server: quinn::ServerConfig,
    client: quinn::ClientConfig,
    regions: quinn::ClientConfig,
    asking: quinn::ClientConfig,
}

fn no_initial_suite(error: quinn::crypto::rustls::NoInitialCipherSuite) -> TransportError {
    TransportError::Config(error.to_string())
}
