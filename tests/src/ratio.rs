//! Side-by-side figures of two cases of one run.

use serde::{Deserialize, Serialize};

use crate::result::CaseKey;
use crate::statistics::median;

/// One figure of one case over the same figure of another, measured in one run; `what` says whether in alternation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ratio {
    /// The figure, in words.
    pub what: String,
    /// Key of the case above the line.
    pub of: String,
    /// Key of the case below the line.
    pub to: String,
    /// Median over the pairs.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Ratio {
    /// Pairs the i-th measurement of one case with the i-th of the other, as they alternated.
    pub fn of_pairs(what: &str, of: (&CaseKey, &[f64]), to: (&CaseKey, &[f64])) -> Option<Self> {
        let pairs: Vec<f64> = of.1.iter().zip(to.1).filter(|(_, b)| **b != 0.0).map(|(a, b)| a / b).collect();
        Some(Self {
            what: what.to_owned(),
            of: of.0.to_string(),
            to: to.0.to_string(),
            median: median(&pairs)?,
            min: pairs.iter().copied().fold(f64::INFINITY, f64::min),
            max: pairs.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::tests::key;

    #[test]
    fn ratio_pairs_the_alternations() {
        let ratio =
            Ratio::of_pairs("throughput", (&key(), &[2.0, 3.0, 5.0]), (&key(), &[1.0, 2.0, 2.0])).unwrap();
        assert_eq!((ratio.median, ratio.min, ratio.max), (2.0, 1.5, 2.5));
        assert!(Ratio::of_pairs("throughput", (&key(), &[]), (&key(), &[])).is_none());
    }
}
