//! What a store holds of an app: its newest goal, and the number by which it is newer.

use shoal_proto::{
    AppName, Revision, codec,
    goal::{GOAL_MAX_BYTES, SignedGoal},
};

/// Digits of an epoch and of a number: those of the largest ones, so that texts compare as numbers do.
const EPOCH_DIGITS: usize = 10;
const NUMBER_DIGITS: usize = 20;

/// The longest value in etcd, in bytes: revision, a space, and the goal in hexadecimal.
const VALUE_MAX_BYTES: usize = EPOCH_DIGITS + NUMBER_DIGITS + 2 + 2 * GOAL_MAX_BYTES;

/// A goal in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Whose goal.
    pub app: AppName,
    /// Its number: what decides whether it is newer.
    pub revision: Revision,
    /// The goal as it travels. Its signature is for the reader to check.
    pub signed: SignedGoal,
}

impl Entry {
    /// Reads app and revision from a goal, unchecked.
    ///
    /// # Errors
    /// A line that says what is wrong with it.
    pub fn of(signed: SignedGoal) -> std::result::Result<Self, String> {
        let goal = signed.decode_unverified().map_err(|error| error.to_string())?;
        Ok(Self { app: goal.app, revision: goal.revision, signed })
    }

    /// Reads a goal from the hexadecimal of its encoding, as the coordinators' API and database have it.
    ///
    /// # Errors
    /// A line that says what is wrong with it.
    pub fn from_hex(text: &str) -> std::result::Result<Self, String> {
        if text.len() > 2 * GOAL_MAX_BYTES {
            return Err(format!("{} digits are no goal", text.len()));
        }
        let bytes = from_hex(text).ok_or("it is not in hexadecimal")?;
        Self::of(codec::decode(&bytes, GOAL_MAX_BYTES).map_err(|error| error.to_string())?)
    }

    /// What every value of a lower revision is less than, byte by byte, and no other.
    pub(crate) fn rank(&self) -> String {
        let Revision { epoch, number } = self.revision;
        format!("{epoch:0EPOCH_DIGITS$}.{number:0NUMBER_DIGITS$}")
    }

    /// The value of its key: readable with `etcdctl get`.
    pub(crate) fn value(&self) -> std::result::Result<String, String> {
        use std::fmt::Write as _;
        let bytes =
            codec::encode(&self.signed, GOAL_MAX_BYTES).map_err(|error| error.to_string())?;
        let mut value = self.rank();
        value.push(' ');
        for byte in bytes {
            // Writing to a String does not fail.
            let _ = write!(value, "{byte:02x}");
        }
        Ok(value)
    }

    /// Reads a value. What says it is of one app or revision and holds another one's goal is none.
    pub(crate) fn read(app: &str, value: &[u8]) -> std::result::Result<Self, String> {
        if value.len() > VALUE_MAX_BYTES {
            return Err(format!("{} bytes are no goal", value.len()));
        }
        let text = std::str::from_utf8(value).map_err(|_| "it is no text")?;
        let (rank, hex) = text.split_once(' ').ok_or("it has no revision before it")?;
        let entry = Self::from_hex(hex)?;
        if entry.app.as_str() != app {
            return Err(format!("it is a goal of {}", entry.app));
        }
        if entry.rank() != rank {
            return Err(format!("it says {rank} and is revision {}", entry.revision));
        }
        Ok(entry)
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| u8::try_from(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(epoch: u32, number: u64) -> Entry {
        let signed = SignedGoal { goal: vec![], key_id: 1, signature: vec![] };
        Entry { app: AppName::new("web").unwrap(), revision: Revision { epoch, number }, signed }
    }

    #[test]
    fn ranks_compare_as_revisions_do() {
        let all = [(0, 0), (0, 9), (0, 10), (1, 1), (9, u64::MAX), (10, 0), (u32::MAX, u64::MAX)];
        for pair in all.windows(2) {
            let [low, high] = [pair[0], pair[1]].map(|(epoch, number)| entry(epoch, number));
            assert!(low.rank() < high.rank() && low.revision < high.revision);
            // A value of the same revision is not less than its rank, one of a lower revision is.
            assert!(low.value().unwrap() < high.rank() && high.value().unwrap() > high.rank());
        }
    }

    #[test]
    fn what_is_no_goal_is_refused() {
        let long = vec![b'0'; VALUE_MAX_BYTES + 1];
        for value in [&b""[..], b"x", b"1 zz", b"1 0", b"\xff \xff", &long] {
            Entry::read("web", value).unwrap_err();
        }
    }
}
