//! Lists in pages: how many, from where on, and what to ask for next.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Serialize, de::DeserializeOwned};
use shoal_client::types::Page;

use crate::error::{ApiError, ApiResult};

/// How many rows a page has when nobody says.
const LIMIT: u32 = 100;

/// The most rows of a page.
pub(super) const LIMIT_MAX: u32 = 1_000;

/// A page that is asked for. The cursor is the key of the last row of the page before, so rows that come and go meanwhile
/// move nothing; it is opaque to callers, and good for the list that gave it only.
pub(super) struct Paging<K> {
    list: &'static str,
    /// The key behind which it begins; none: at the beginning.
    pub(super) after: Option<K>,
    limit: u32,
}

impl<K: Serialize + DeserializeOwned> Paging<K> {
    /// Reads what a request says.
    ///
    /// # Errors
    /// 400 when the limit is 0 or the cursor none of this list.
    pub(super) fn of(
        list: &'static str,
        limit: Option<u32>,
        cursor: Option<&str>,
    ) -> ApiResult<Self> {
        let limit = limit.unwrap_or(LIMIT);
        if !(1..=LIMIT_MAX).contains(&limit) {
            return Err(ApiError::invalid(format!("limit must be 1 to {LIMIT_MAX}")));
        }
        let read = |text: &str| {
            let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
            let (of, key): (String, K) = serde_json::from_slice(&bytes).ok()?;
            (of == list).then_some(key)
        };
        let after = cursor.map(|text| {
            read(text).ok_or_else(|| {
                ApiError::invalid(
                    "this cursor is none of this list: give next_cursor as it was answered",
                )
            })
        });
        Ok(Self { list, after: after.transpose()?, limit })
    }

    /// How many rows to read: one more than the page has, which tells whether there is another page.
    pub(super) fn wanted(&self) -> u32 {
        self.limit + 1
    }

    /// The page of the rows that were read.
    pub(super) fn page<R, T>(
        &self,
        mut rows: Vec<R>,
        key: impl Fn(&R) -> K,
        show: impl FnMut(R) -> T,
    ) -> axum::Json<Page<T>> {
        let is_more = rows.len() > self.limit as usize;
        rows.truncate(self.limit as usize);
        let last = rows.last().filter(|_| is_more).map(key);
        let next_cursor = last.and_then(|key| {
            // Numbers and texts are always JSON.
            let text = serde_json::to_vec(&(self.list, key)).ok()?;
            Some(URL_SAFE_NO_PAD.encode(text))
        });
        axum::Json(Page { items: rows.into_iter().map(show).collect(), next_cursor })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_says_where_the_next_one_begins() {
        let first = Paging::<i64>::of("rows", Some(2), None).unwrap();
        assert_eq!(first.wanted(), 3);
        let page = first.page(vec![5, 6, 7], |row| *row, |row| row).0;
        assert_eq!(page.items, [5, 6]);
        let cursor = page.next_cursor.unwrap();
        let next = Paging::<i64>::of("rows", Some(2), Some(&cursor)).unwrap();
        assert_eq!(next.after, Some(6));
        assert!(next.page(vec![7, 8], |row| *row, |row| row).0.next_cursor.is_none());
        assert!(Paging::<i64>::of("others", None, Some(&cursor)).is_err());
        assert!(Paging::<String>::of("rows", None, Some(&cursor)).is_err());
        for wrong in ["", "x", "%%%", "bnVsbA"] {
            assert!(Paging::<i64>::of("rows", None, Some(wrong)).is_err(), "{wrong}");
        }
        for limit in [0, LIMIT_MAX + 1] {
            assert!(Paging::<i64>::of("rows", Some(limit), None).is_err());
        }
    }
}
