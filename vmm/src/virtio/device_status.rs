//! The one message of a session that the vhost crate has no call for: SET_STATUS, by which a backend that asked for it
//! learns of the driver. It goes over the crate's own connection, between two of its calls, which all wait for their answers.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::Error;
use vhost::vhost_user::message::{FrontendReq, VhostUserHeaderFlag};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
};

/// There is no driver, or none any more.
pub const RESET: u64 = 0;
/// A driver is ready and has set its rings up.
pub const READY: u64 = (VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK) as u64;

/// Version 1 of the protocol, in the header's flags.
const VERSION: u32 = 1;
/// Request, flags and size.
const HEADER: usize = 12;
/// The header and one 64-bit word.
const LENGTH: usize = HEADER + 8;

/// Tells the backend, and waits until it has understood if it gives acknowledgements.
pub fn set(mut stream: &UnixStream, status: u64, acknowledged: bool) -> Result<(), Error> {
    let wish = if acknowledged { VhostUserHeaderFlag::NEED_REPLY.bits() } else { 0 };
    stream.write_all(&message(VERSION | wish, status)).map_err(Error::SocketBroken)?;
    if !acknowledged {
        return Ok(());
    }
    let mut answer = [0; LENGTH];
    stream.read_exact(&mut answer).map_err(Error::SocketBroken)?;
    let (header, word) = answer.split_at(HEADER);
    if header != &message(VERSION | VhostUserHeaderFlag::REPLY.bits(), 0)[..HEADER] {
        return Err(Error::InvalidMessage);
    }
    if word == [0; LENGTH - HEADER] { Ok(()) } else { Err(Error::BackendInternalError) }
}

fn message(flags: u32, word: u64) -> [u8; LENGTH] {
    let mut message = [0; LENGTH];
    message[..4].copy_from_slice(&u32::from(FrontendReq::SET_STATUS).to_le_bytes());
    message[4..8].copy_from_slice(&flags.to_le_bytes());
    message[8..12].copy_from_slice(&8u32.to_le_bytes());
    message[12..].copy_from_slice(&word.to_le_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `set` makes of an answer.
    fn answered(answer: &[u8]) -> Result<(), Error> {
        let (frontend, mut backend) = UnixStream::pair().unwrap();
        backend.write_all(answer).unwrap();
        backend.shutdown(std::net::Shutdown::Write).unwrap();
        let result = set(&frontend, READY, true);
        let mut asked = [0; LENGTH];
        backend.read_exact(&mut asked).unwrap();
        assert_eq!(asked, message(0b1001, 0xf));
        result
    }

    #[test]
    fn an_answer_is_believed_only_if_it_is_one() {
        assert!(answered(&message(0b101, 0)).is_ok());
        assert!(matches!(answered(&message(0b101, u64::MAX)), Err(Error::BackendInternalError)));
        assert!(matches!(answered(&message(0b001, 0)), Err(Error::InvalidMessage)), "no reply");
        assert!(matches!(answered(&[0xff; LENGTH]), Err(Error::InvalidMessage)));
        assert!(matches!(answered(&message(0b101, 0)[..LENGTH - 1]), Err(Error::SocketBroken(_))));
    }

    #[test]
    fn nothing_is_waited_for_where_no_answer_is_given() {
        let (frontend, mut backend) = UnixStream::pair().unwrap();
        set(&frontend, RESET, false).unwrap();
        let mut asked = [0; LENGTH];
        backend.read_exact(&mut asked).unwrap();
        assert_eq!(asked, message(0b0001, 0));
    }
}
