//! Answers what only the outside of the emulated host knows: how much real CPU time each pCPU has had.

use std::fs;
use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use crate::channel::{Answer, Question, receive, send};

/// Serves the questions that come through `socket`. `threads` are the emulator threads of process `qemu`, one for
/// each pCPU.
pub(super) fn serve(socket: &Path, qemu: u32, threads: Vec<i32>) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    let mut questions = BufReader::new(stream.try_clone()?);
    thread::spawn(move || {
        while let Ok(Some(Question::CpuTimes)) = receive(&mut questions) {
            let times: Result<Vec<_>, _> = threads.iter().map(|thread| cpu_time(qemu, *thread)).collect();
            let answer = times.map_or_else(|e| Answer::Failed(e.to_string()), Answer::CpuTimes);
            if send(&mut stream, &answer).is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// Nanoseconds a thread has been on a CPU.
fn cpu_time(process: u32, thread: i32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/task/{thread}/schedstat"))?;
    let first = text.split_whitespace().next().and_then(|word| word.parse().ok());
    first.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "schedstat without a time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_cpu_time_grows_with_work() {
        let (process, thread) = (std::process::id(), nix::unistd::gettid().as_raw());
        let before = cpu_time(process, thread).expect("own schedstat");
        let mut sum = 0_u64;
        for number in 0..20_000_000_u64 {
            sum = std::hint::black_box(sum.wrapping_add(number));
        }
        let after = cpu_time(process, thread).expect("own schedstat");
        assert!(after > before, "{before} to {after}");
    }
}
