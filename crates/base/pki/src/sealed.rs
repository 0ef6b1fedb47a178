//! What a secret seals: bytes that lie where others may read them, and that only who has the secret reads or changes.
//!
//! Upstream counterpart: K3s' pkg/cluster/encrypt.go. What stays true: the key comes from the secret by
//! PBKDF2-HMAC-SHA256 and a salt of its own, the bytes are AES-256-GCM's, and everything in front of them is
//! authenticated with them, so that nobody weakens it. Deliberately different from K3s: more rounds, which are written in
//! front, and SHA-256.
//!
//! The form: version (1 byte), rounds (4, big endian), salt (16), nonce (12), the sealed bytes and their tag.
use std::num::NonZeroU32;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::pbkdf2;

const VERSION: u8 = 1;
/// Some tens of milliseconds on a small board: it is paid at a start, and when something changed.
const ROUNDS: NonZeroU32 = NonZeroU32::MIN.saturating_add(99_999);
/// More would keep a server busy for minutes.
const MAX_ROUNDS: u32 = 10_000_000;
const SALT_LENGTH: usize = 16;
const HEAD_LENGTH: usize = 1 + 4 + SALT_LENGTH + NONCE_LEN;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("it is not what this version of Sampan seals")]
    Malformed,
    #[error("it was sealed with another secret, or changed since")]
    Secret,
    #[error("it cannot be sealed")]
    Seal,
}

/// Seals `plain`: no two results are the same.
pub fn seal(secret: &str, plain: &[u8]) -> Result<Vec<u8>, SealError> {
    let mut sealed = Vec::with_capacity(HEAD_LENGTH + plain.len() + AES_256_GCM.tag_len());
    sealed.push(VERSION);
    sealed.extend_from_slice(&ROUNDS.get().to_be_bytes());
    let mut random = [0; SALT_LENGTH + NONCE_LEN];
    // ring's generator, not the seeded one of simulations: a nonce must not come twice
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut random)
        .map_err(|_| SealError::Seal)?;
    sealed.extend_from_slice(&random);
    let (salt, nonce) = random.split_at(SALT_LENGTH);
    let key = key(secret, ROUNDS, salt)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SealError::Seal)?;
    let head = sealed.clone();
    let mut body = plain.to_vec();
    key.seal_in_place_append_tag(nonce, Aad::from(&head), &mut body).map_err(|_| SealError::Seal)?;
    sealed.append(&mut body);
    Ok(sealed)
}

/// What [`seal`] was given.
pub fn open(secret: &str, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
    let (head, body) = sealed.split_at_checked(HEAD_LENGTH).ok_or(SealError::Malformed)?;
    let (version, rest) = head.split_first().ok_or(SealError::Malformed)?;
    let (rounds, rest) = rest.split_first_chunk::<4>().ok_or(SealError::Malformed)?;
    let (salt, nonce) = rest.split_at(SALT_LENGTH);
    let rounds = u32::from_be_bytes(*rounds);
    let rounds = NonZeroU32::new(rounds).filter(|rounds| rounds.get() <= MAX_ROUNDS);
    let (VERSION, Some(rounds)) = (*version, rounds) else { return Err(SealError::Malformed) };
    let key = key(secret, rounds, salt)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SealError::Malformed)?;
    let mut body = body.to_vec();
    let plain = key.open_in_place(nonce, Aad::from(head), &mut body).map_err(|_| SealError::Secret)?;
    Ok(plain.to_vec())
}

fn key(secret: &str, rounds: NonZeroU32, salt: &[u8]) -> Result<LessSafeKey, SealError> {
    let mut bytes = [0; 32];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, salt, secret.as_bytes(), &mut bytes);
    UnboundKey::new(&AES_256_GCM, &bytes).map(LessSafeKey::new).map_err(|_| SealError::Seal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_secret_opens_it_and_only_whole() {
        let plain = b"the authority's key".as_slice();
        let sealed = seal("s3cret", plain).unwrap();
        assert_ne!(sealed, seal("s3cret", plain).unwrap(), "salt and nonce are its own");
        assert_eq!(open("s3cret", &sealed).unwrap(), plain);
        assert!(!sealed.windows(plain.len()).any(|w| w == plain));
        assert_eq!(open("s3cret ", &sealed), Err(SealError::Secret));
        assert_eq!(open("", &sealed), Err(SealError::Secret));
        // a bit anywhere: version, rounds, salt, nonce, body, tag
        for at in [4, 5, 21, HEAD_LENGTH, sealed.len() - 1] {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(open("s3cret", &changed), Err(SealError::Secret), "{at}");
        }
        for (at, byte) in [(0, 2), (1, 0xff)] {
            let mut changed = sealed.clone();
            changed[at] = byte;
            assert_eq!(open("s3cret", &changed), Err(SealError::Malformed), "{at}");
        }
        for short in [0, 1, HEAD_LENGTH - 1] {
            assert_eq!(open("s3cret", &sealed[..short]), Err(SealError::Malformed));
        }
        assert_eq!(open("s3cret", &sealed[..HEAD_LENGTH]), Err(SealError::Secret));
    }
}
