//! HTTPS connections that end when their caller's certificate no longer counts.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use shoal_pki::Trust;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::guests::Connection;

/// The open connections whose callers showed a certificate: one entry each, gone with it.
#[derive(Default)]
pub(crate) struct Members {
    open: Mutex<HashMap<u64, (Vec<u8>, CancellationToken)>>,
    next: AtomicU64,
}

impl Members {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (Vec<u8>, CancellationToken)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a guard on a connection whose caller showed `certificate`.
    pub(crate) fn guard(
        self: &Arc<Self>,
        stream: Connection,
        certificate: Option<Vec<u8>>,
    ) -> Guarded {
        let cut = CancellationToken::new();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some(certificate) = certificate {
            self.lock().insert(id, (certificate, cut.clone()));
        }
        Guarded { stream, cut: Box::pin(cut.cancelled_owned()), id, members: self.clone() }
    }

    /// Ends the connections that `trust` does not cover; how many.
    pub(crate) fn recheck(&self, trust: &Trust) -> usize {
        let open: Vec<_> = self.lock().values().cloned().collect();
        let gone = open.iter().filter(|(der, _)| trust.verify_certificate(der).is_err());
        gone.map(|(_, cut)| cut.cancel()).count()
    }
}

/// A connection that fails once it is cut.
pub(crate) struct Guarded {
    stream: Connection,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    id: u64,
    members: Arc<Members>,
}

impl Guarded {
    fn poll_cut(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.members.lock().remove(&self.id);
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_cut(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_cut(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_cut(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
