//! An error with what caused it, on one line.

use std::error::Error;
use std::fmt;

/// Shows an error and its sources, joined by colons.
#[derive(Debug)]
pub struct Chain<'a>(
    /// The error at the top.
    pub &'a dyn Error,
);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pin;

    #[test]
    fn causes_follow_their_error() {
        let error = pin::Error::Online(std::io::Error::other("gone"));
        assert_eq!(
            Chain(&error).to_string(),
            "cannot read which pCPUs are online (/sys/devices/system/cpu/online): gone"
        );
    }
}
