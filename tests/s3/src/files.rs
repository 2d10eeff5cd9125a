//! `s3s-fs` with shorter names. It writes what it knows about an object into a file whose name holds the whole key
//! in base64, and Shoal's keys, with two hashes of 64 digits, make that longer than a name may be. So
//! a part of a key that is a hash goes to the disk with two characters for three of its digits, and what all keys have with fewer.

use s3s::{S3, S3Request, S3Response, S3Result, dto::*};
use s3s_fs::FileSystem;

/// How many hexadecimal digits a hash has.
const HASH_DIGITS: usize = 64;

/// How long it is on the disk, with its mark.
const SHORT_LEN: usize = 44;

const MARK: char = '~';

/// What each key has, and what it is on the disk: `~a`, and the digits of a part's number behind a mark.
const ARTIFACTS: (&str, &str) = ("artifacts", "~a");
const PART: &str = "part-";
const PART_DIGITS: usize = 5;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-";

fn is_number(text: &str) -> bool {
    text.len() == PART_DIGITS && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn shorten(part: &str) -> String {
    if part == ARTIFACTS.0 {
        return ARTIFACTS.1.into();
    }
    if let Some(number) = part.strip_prefix(PART).filter(|number| is_number(number)) {
        return format!("{MARK}{number}");
    }
    let digits: Option<Vec<u32>> = part.chars().map(|digit| digit.to_digit(16)).collect();
    let Some(digits) = digits.filter(|digits| digits.len() == HASH_DIGITS) else {
        return part.into();
    };
    let letter = |bits: u32| char::from(ALPHABET[(bits & 63) as usize]);
    let mut short = String::from(MARK);
    for three in digits.chunks(3) {
        let bits = three.iter().fold(0, |bits, digit| bits << 4 | digit);
        if three.len() == 3 {
            short.push(letter(bits >> 6));
        }
        short.push(letter(bits));
    }
    short
}

fn lengthen(part: &str) -> String {
    if part == ARTIFACTS.1 {
        return ARTIFACTS.0.into();
    }
    if let Some(number) = part.strip_prefix(MARK).filter(|number| is_number(number)) {
        return format!("{PART}{number}");
    }
    let Some(short) = part.strip_prefix(MARK).filter(|_| part.len() == SHORT_LEN) else {
        return part.into();
    };
    let value = |letter: &u8| ALPHABET.iter().position(|of| of == letter).unwrap_or(0);
    let digits = short.as_bytes().chunks(2).map(|two| match two {
        [high, low] => format!("{:03x}", value(high) << 6 | value(low)),
        one => format!("{:x}", one.first().map_or(0, value)),
    });
    digits.collect()
}

/// A key as it is on the disk.
pub(crate) fn on_disk(key: &str) -> String {
    key.split('/').map(shorten).collect::<Vec<_>>().join("/")
}

fn as_asked(key: &str) -> String {
    key.split('/').map(lengthen).collect::<Vec<_>>().join("/")
}

/// The store.
pub(crate) struct Files(pub(crate) FileSystem);

#[async_trait::async_trait]
impl S3 for Files {
    async fn get_object(
        &self,
        mut request: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        request.input.key = on_disk(&request.input.key);
        self.0.get_object(request).await
    }

    async fn head_object(
        &self,
        mut request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        request.input.key = on_disk(&request.input.key);
        self.0.head_object(request).await
    }

    async fn put_object(
        &self,
        mut request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        request.input.key = on_disk(&request.input.key);
        self.0.put_object(request).await
    }

    async fn create_multipart_upload(
        &self,
        mut request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let key = request.input.key.clone();
        request.input.key = on_disk(&key);
        let mut answer = self.0.create_multipart_upload(request).await?;
        answer.output.key = Some(key);
        Ok(answer)
    }

    async fn upload_part(
        &self,
        mut request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        request.input.key = on_disk(&request.input.key);
        self.0.upload_part(request).await
    }

    async fn complete_multipart_upload(
        &self,
        mut request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let key = request.input.key.clone();
        request.input.key = on_disk(&key);
        let mut answer = self.0.complete_multipart_upload(request).await?;
        answer.output.key = Some(key);
        Ok(answer)
    }

    async fn abort_multipart_upload(
        &self,
        mut request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        request.input.key = on_disk(&request.input.key);
        self.0.abort_multipart_upload(request).await
    }

    async fn delete_object(
        &self,
        mut request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        request.input.key = on_disk(&request.input.key);
        self.0.delete_object(request).await
    }

    async fn delete_objects(
        &self,
        mut request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        for object in &mut request.input.delete.objects {
            object.key = on_disk(&object.key);
        }
        let mut answer = self.0.delete_objects(request).await?;
        for object in answer.output.deleted.iter_mut().flatten() {
            object.key = object.key.as_deref().map(as_asked);
        }
        Ok(answer)
    }

    async fn list_objects_v2(
        &self,
        mut request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let prefix = request.input.prefix.take();
        request.input.prefix = prefix.as_deref().map(on_disk);
        let mut answer = self.0.list_objects_v2(request).await?;
        answer.output.prefix = prefix;
        for object in answer.output.contents.iter_mut().flatten() {
            object.key = object.key.as_deref().map(as_asked);
        }
        for common in answer.output.common_prefixes.iter_mut().flatten() {
            common.prefix = common.prefix.as_deref().map(as_asked);
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_keys_have_is_shortened_and_nothing_else() {
        let hash: String = (0..HASH_DIGITS).map(|at| format!("{:x}", (at * 7 + 3) % 16)).collect();
        let key = format!("demo/artifacts/{hash}/{hash}/part-00001");
        let short = on_disk(&key);
        let others = ARTIFACTS.0.len() - ARTIFACTS.1.len() + PART.len() - 1;
        assert_eq!(short.len(), key.len() - 2 * (HASH_DIGITS - SHORT_LEN) - others);
        assert_eq!(as_asked(&short), key);
        for plain in ["a/b/index", "~x/y", "part-1/~1", ""] {
            assert_eq!((on_disk(plain), as_asked(plain)), (plain.into(), plain.into()));
        }
    }
}
