//! The grammar of sub-options: `key=value,key=value`, as Cloud Hypervisor writes them.
//!
//! A value may hold commas inside brackets (`affinity=[0@[0,2],1@[1]]`). Each option type takes the keys it knows
//! out of a [`SubOptions`] and calls [`SubOptions::finish`], so a key nobody took is an error that lists the known ones.

use std::collections::BTreeMap;
use std::str::FromStr;

/// What can be wrong with the text of an option.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An entry without `=`.
    #[error("`{0}` is not of the form key=value")]
    NotKeyValue(String),
    /// A bracket is opened and not closed, or the other way round.
    #[error("the brackets in `{0}` do not match")]
    Brackets(String),
    /// The same key twice.
    #[error("`{0}` is given twice")]
    Duplicate(String),
    /// A key this option does not have.
    #[error("unknown sub-option `{key}`; known are: {known}")]
    Unknown {
        /// The key as given.
        key: String,
        /// The keys the option has, for the message.
        known: String,
    },
    /// What must be given.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A value that does not parse.
    #[error("`{key}={value}`: {reason}")]
    Value {
        /// The key as given.
        key: String,
        /// The value as given.
        value: String,
        /// What was expected.
        reason: String,
    },
}

/// The key and value pairs of one option, each to be taken once.
#[derive(Debug)]
pub struct SubOptions {
    pairs: BTreeMap<String, String>,
    known: Vec<&'static str>,
}

impl SubOptions {
    /// Splits `text` at the commas that are outside brackets.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut pairs = BTreeMap::new();
        for entry in split_outside_brackets(text)? {
            let (key, value) = entry.split_once('=').ok_or_else(|| Error::NotKeyValue(entry.to_owned()))?;
            if pairs.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(Error::Duplicate(key.to_owned()));
            }
        }
        Ok(Self { pairs, known: Vec::new() })
    }

    /// Takes the value of `key`, parsed by its type; `None` if the key is not there.
    pub fn take<T>(&mut self, key: &'static str) -> Result<Option<T>, Error>
    where
        T: FromStr,
        T::Err: ToString,
    {
        self.take_with(key, |value| value.parse().map_err(|error: T::Err| error.to_string()))
    }

    /// Takes the value of `key`, parsed by `parse`; `None` if the key is not there.
    pub fn take_with<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, Error> {
        self.known.push(key);
        let Some(value) = self.pairs.remove(key) else { return Ok(None) };
        match parse(&value) {
            Ok(parsed) => Ok(Some(parsed)),
            Err(reason) => Err(Error::Value { key: key.to_owned(), value, reason }),
        }
    }

    /// Takes an `on`/`off` (or `true`/`false`) switch.
    pub fn take_switch(&mut self, key: &'static str) -> Result<Option<bool>, Error> {
        self.take_with(key, |value| match value {
            "on" | "true" => Ok(true),
            "off" | "false" => Ok(false),
            _ => Err("expected on or off".to_owned()),
        })
    }

    /// Says which key is left that nobody took.
    pub fn finish(self) -> Result<(), Error> {
        match self.pairs.into_keys().next() {
            None => Ok(()),
            Some(key) => Err(Error::Unknown { key, known: self.known.join(", ") }),
        }
    }
}

/// Splits at commas that are not inside `[` `]`.
pub(crate) fn split_outside_brackets(text: &str) -> Result<Vec<&str>, Error> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0usize, 0);
    for (index, character) in text.char_indices() {
        match character {
            '[' => depth += 1,
            ']' => depth = depth.checked_sub(1).ok_or_else(|| Error::Brackets(text.to_owned()))?,
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    if depth != 0 {
        return Err(Error::Brackets(text.to_owned()));
    }
    if start < text.len() {
        parts.push(&text[start..]);
    }
    Ok(parts)
}

/// A size in bytes: a number with an optional suffix K, M, G or T (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(
    /// The size in bytes.
    pub u64,
);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected a size such as 512M or 2G".to_owned();
        let (digits, shift) = match text.char_indices().last().ok_or_else(expected)? {
            (index, 'K' | 'k') => (&text[..index], 10),
            (index, 'M' | 'm') => (&text[..index], 20),
            (index, 'G' | 'g') => (&text[..index], 30),
            (index, 'T' | 't') => (&text[..index], 40),
            _ => (text, 0),
        };
        let number: u64 = digits.parse().map_err(|_| expected())?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| "that is more than 64 bits of bytes".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_inside_brackets_do_not_split() {
        let mut options = SubOptions::parse("boot=2,affinity=[0@[0,2],1@[1]]").unwrap();
        assert_eq!(options.take::<u32>("boot").unwrap(), Some(2));
        assert_eq!(options.take::<String>("affinity").unwrap().as_deref(), Some("[0@[0,2],1@[1]]"));
        options.finish().unwrap();
    }

    #[test]
    fn an_unknown_key_names_the_known_ones() {
        let mut options = SubOptions::parse("size=1G,sise=2G").unwrap();
        options.take::<ByteSize>("size").unwrap();
        assert_eq!(options.finish().unwrap_err().to_string(), "unknown sub-option `sise`; known are: size");
    }

    #[test]
    fn malformed_lists_are_refused() {
        assert!(matches!(SubOptions::parse("size"), Err(Error::NotKeyValue(_))));
        assert!(matches!(SubOptions::parse("a=[1"), Err(Error::Brackets(_))));
        assert!(matches!(SubOptions::parse("a=1]"), Err(Error::Brackets(_))));
        assert!(matches!(SubOptions::parse("a=1,a=2"), Err(Error::Duplicate(_))));
    }

    #[test]
    fn sizes_have_binary_suffixes_and_do_not_overflow() {
        assert_eq!("512M".parse(), Ok(ByteSize(512 << 20)));
        assert_eq!("4096".parse(), Ok(ByteSize(4096)));
        for bad in ["", "M", "12Q", "-1M", "99999999999T"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }
}
