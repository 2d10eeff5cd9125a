//! How a process that is behind comes to newer trust: who is said to go by it is asked, one at a time.

use std::{
    collections::VecDeque,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::membership::Membership;

/// How long nobody is asked after an answer that led nowhere: what somebody says of its bundle proves nothing.
const PAUSE: Duration = Duration::from_secs(1);

/// How many are kept to be asked; of more, those heard first are forgotten.
const KEPT_MAX: usize = 16;

/// Who may have newer trust. One who passed on that there is some may not have it yet, and those who are heard while it is asked
/// may be the only ones who have: they are asked next.
pub struct CatchUp<P> {
    membership: Arc<Membership>,
    asked: Mutex<Asked<P>>,
}

struct Asked<P> {
    under_way: bool,
    /// Whom to ask next, once each, and the number of the bundle it was said to have.
    next: VecDeque<(P, u64)>,
}

impl<P: Clone + PartialEq + Send + 'static> CatchUp<P> {
    /// Nobody is asked before somebody is heard.
    #[must_use]
    pub fn new(membership: Arc<Membership>) -> Self {
        let asked = Asked { under_way: false, next: VecDeque::new() };
        Self { membership, asked: Mutex::new(asked) }
    }

    fn asked(&self) -> MutexGuard<'_, Asked<P>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `peer` is said to have the bundle of this number. If that is newer, `ask` gets the bundles after the number it is
    /// given, with the name of who sent them; none: no answer, which it waits for as long as it likes.
    pub fn heard<F>(
        self: &Arc<Self>,
        peer: &P,
        number: u64,
        ask: impl Fn(P, u64) -> F + Send + 'static,
    ) where
        F: Future<Output = Option<(Vec<Vec<u8>>, String)>> + Send,
    {
        if number <= self.membership.trust().number() {
            return;
        }
        let mut asked = self.asked();
        asked.next.retain(|(kept, _)| kept != peer);
        if asked.next.len() == KEPT_MAX {
            asked.next.pop_front();
        }
        asked.next.push_back((peer.clone(), number));
        if std::mem::replace(&mut asked.under_way, true) {
            return;
        }
        drop(asked);
        let this = self.clone();
        tokio::spawn(async move {
            while let Some((peer, number)) = this.next() {
                let answer = ask(peer, this.membership.trust().number());
                if let Some((bundles, from)) = answer.await {
                    this.take(bundles, from).await;
                }
                if this.membership.trust().number() < number {
                    tokio::time::sleep(PAUSE.mul_f64(rand::random_range(0.5..1.5))).await;
                }
            }
        });
    }

    /// Whom to ask now: who has nothing newer any more is not.
    fn next(&self) -> Option<(P, u64)> {
        let held = self.membership.trust().number();
        let mut asked = self.asked();
        asked.next.retain(|(_, number)| *number > held);
        let next = asked.next.pop_front();
        asked.under_way = next.is_some();
        next
    }

    async fn take(&self, bundles: Vec<Vec<u8>>, from: String) {
        let membership = self.membership.clone();
        // It is synced to the disk.
        let take = move || (membership.take_trust(&bundles, &from), from);
        if let Ok((taken, from)) = tokio::task::spawn_blocking(take).await {
            tracing::debug!(?taken, from, "asked for trust");
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_pki::GoalSigner;
    use tokio::{sync::Semaphore, time::timeout};

    use super::*;
    use crate::membership::tests::Cluster;

    #[tokio::test]
    async fn who_is_heard_while_another_is_asked_is_asked_next_and_once() {
        let signer = GoalSigner::create(1).unwrap();
        let mut cluster = Cluster::new(&signer);
        let second = cluster.next(&signer, |_| {});
        let membership = Arc::new(cluster.load());
        let mut changes = membership.watch();
        let catch_up = Arc::new(CatchUp::new(membership.clone()));
        let (questions, mut asked) = tokio::sync::mpsc::unbounded_channel();
        let within = Duration::from_secs(20);
        let answers = Arc::new(Semaphore::new(0));
        let ask = {
            let answers = answers.clone();
            move |peer: &'static str, after| {
                questions.send((peer, after)).unwrap();
                let (answers, second) = (answers.clone(), second.clone());
                async move {
                    answers.acquire().await.unwrap().forget();
                    let has = peer == "the source" || peer == "another source";
                    Some((if has { vec![second] } else { vec![] }, peer.into()))
                }
            }
        };
        catch_up.heard(&"nobody new", 1, ask.clone());
        catch_up.heard(&"hearsay", 2, ask.clone());
        assert_eq!(timeout(within, asked.recv()).await, Ok(Some(("hearsay", 1))));
        for peer in ["the source", "another source", "the source"] {
            catch_up.heard(&peer, 2, ask.clone());
        }
        answers.add_permits(2);
        assert_eq!(timeout(within, asked.recv()).await, Ok(Some(("another source", 1))));
        changes.changed().await.unwrap();
        assert_eq!(membership.trust().number(), 2);
        // Nobody is asked for what is there, and what is newer yet is asked for again.
        catch_up.heard(&"the source", 2, ask.clone());
        catch_up.heard(&"a third", 3, ask);
        assert_eq!(timeout(within, asked.recv()).await, Ok(Some(("a third", 2))));
        assert!(asked.is_empty());
    }
}
