//! The membership exchange: each side shows its certificate, the other says whether it does.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{PeerId, StreamProtocol, identity::PublicKey, request_response};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shoal_pki::{Member, Role, Trust};
use shoal_proto::{NodeId, RegionName, codec};

/// The longest message: a certificate is below 2 KiB.
const MESSAGE_MAX_BYTES: usize = 8 << 10;

/// "This is who I am."
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Show {
    /// The certificate, DER.
    pub(crate) certificate: Vec<u8>,
}

/// What the other says to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// A member.
    Welcome,
    /// A member, but there is no room; try elsewhere.
    Full,
    /// Not a member, and why.
    Refused(String),
}

/// The exchange on a stream: one message each way, ended by the end of the stream.
#[derive(Debug, Clone, Default)]
pub(crate) struct MembershipCodec;

async fn read<M: DeserializeOwned>(io: &mut (impl AsyncRead + Unpin + Send)) -> io::Result<M> {
    let mut bytes = Vec::new();
    io.take(MESSAGE_MAX_BYTES as u64 + 1).read_to_end(&mut bytes).await?;
    codec::decode(&bytes, MESSAGE_MAX_BYTES).map_err(io::Error::other)
}

async fn write<M: Serialize + Sync>(
    io: &mut (impl AsyncWrite + Unpin + Send),
    message: &M,
) -> io::Result<()> {
    let bytes = codec::encode(message, MESSAGE_MAX_BYTES).map_err(io::Error::other)?;
    io.write_all(&bytes).await
}

impl request_response::Codec for MembershipCodec {
    type Protocol = StreamProtocol;
    type Request = Show;
    type Response = Answer;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Show>
    where
        T: AsyncRead + Unpin + Send,
    {
        read(io).await
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Answer>
    where
        T: AsyncRead + Unpin + Send,
    {
        read(io).await
    }

    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        show: Show,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write(io, &show).await
    }

    async fn write_response<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        answer: Answer,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write(io, &answer).await
    }
}

/// The Ed25519 key in a peer's id; none for other kinds of key.
pub(crate) fn node_of(peer: &PeerId) -> Option<NodeId> {
    // A short key is in the id as it is (multihash "identity"); a longer one only as its hash, which
    // does not decode.
    let key = PublicKey::try_decode_protobuf(peer.as_ref().digest()).ok()?;
    Some(NodeId(key.try_into_ed25519().ok()?.to_bytes()))
}

/// The peer id of a node; none when its bytes are no key.
pub(crate) fn peer_of(node: &NodeId) -> Option<PeerId> {
    let key = libp2p::identity::ed25519::PublicKey::try_from_bytes(&node.0).ok()?;
    Some(PeerId::from_public_key(&key.into()))
}

/// Checks that `certificate` makes the holder of `node` a member of this region's gossip.
pub(crate) fn check(
    trust: &Trust,
    region: &RegionName,
    node: &NodeId,
    certificate: &[u8],
) -> Result<Member, String> {
    let member = trust.verify_certificate(certificate).map_err(|error| error.to_string())?;
    if member.node != *node {
        return Err("the certificate is of another key".into());
    }
    if member.cluster != trust.cluster() {
        return Err(format!("a certificate of cluster {}", member.cluster));
    }
    if !matches!(member.role, Role::Agent | Role::Region) {
        return Err(format!("a certificate of role {}", member.role));
    }
    match &member.region {
        Some(theirs) if theirs == region => Ok(member),
        Some(theirs) => Err(format!("of region {theirs}, not {region}")),
        None => Err("a certificate without a region".into()),
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    #[test]
    fn a_node_and_its_peer_id_name_each_other() {
        let pair = Keypair::ed25519_from_bytes([7; 32]).unwrap();
        let peer = PeerId::from_public_key(&pair.public());
        let node = node_of(&peer).unwrap();
        assert_eq!(node.0, pair.try_into_ed25519().unwrap().public().to_bytes());
        assert_eq!(peer_of(&node), Some(peer));
        assert_eq!(node_of(&PeerId::random()), None, "a hash, not a key");
    }
}
