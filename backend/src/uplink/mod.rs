//! Where frames go to and come from: a TAP device, or one of the test uplinks.
//!
//! An uplink is opened once for the life of the program, as one [`Pair`] a queue pair; each pair belongs to the poll
//! thread of its queue pair for the time of a session.

pub mod batch;
pub mod pair;
pub mod tap;

use std::sync::Arc;

use crate::cli::UplinkKind;
use pair::{Generator, Loop};

pub use pair::Pair;
pub use tap::Tap;

/// The device-wide side of an uplink: what is set by features, not by frames.
#[derive(Clone)]
pub struct Offloads(Option<Arc<Tap>>);

impl Offloads {
    /// Whether the uplink completes checksums and cuts segments.
    pub fn is_supported(&self) -> bool {
        self.0.is_some()
    }

    /// Tells the uplink what the driver can take.
    pub fn negotiated(&self, features: u64) {
        if let Some(tap) = &self.0
            && let Err(error) = tap.negotiated(features)
        {
            tracing::error!("{error}");
        }
    }
}

/// Opens the uplink for `queue_pairs` pairs.
pub fn open(kind: &UplinkKind, queue_pairs: usize) -> Result<(Offloads, Vec<Pair>), tap::Error> {
    let of = |make: &dyn Fn() -> Pair| (Offloads(None), (0..queue_pairs).map(|_| make()).collect());
    Ok(match kind {
        UplinkKind::Tap(name) => {
            let (tap, pairs) = Tap::open(name, queue_pairs)?;
            (Offloads(Some(Arc::new(tap))), pairs.into_iter().map(Box::new).map(Pair::Tap).collect())
        }
        UplinkKind::Null => of(&|| Pair::Null),
        UplinkKind::Loop => of(&|| Pair::Loop(Loop::default())),
        UplinkKind::Generator { size } => of(&|| Pair::Generator(Generator::new(*size))),
    })
}
