//! Bytes as hexadecimal text: a third of what JSON's arrays of numbers take, and what a person
//! expects who looks at a registry.

use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

pub(super) fn serialize<S: Serializer>(
    bytes: &impl AsRef<[u8]>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let digit = |n: u8| char::from(b"0123456789abcdef"[usize::from(n & 15)]);
    let bytes = bytes.as_ref();
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        text.extend([digit(byte >> 4), digit(*byte)]);
    }
    serializer.serialize_str(&text)
}

pub(super) fn deserialize<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<Vec<u8>>,
{
    let text = String::deserialize(deserializer)?;
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |c: u8| char::from(c).to_digit(16).and_then(|n| u8::try_from(n).ok());
    let byte = |&[high, low]: &[u8; 2]| Some(digit(high)? << 4 | digit(low)?);
    let bytes: Option<Vec<u8>> =
        if rest.is_empty() { pairs.iter().map(byte).collect() } else { None };
    let bytes = bytes.ok_or_else(|| D::Error::custom("no hexadecimal bytes"))?;
    let n_bytes = bytes.len();
    T::try_from(bytes).map_err(|_| D::Error::custom(format!("{n_bytes} bytes are too many or few")))
}
