//! CPUID of each vCPU: what KVM supports, with the identity and topology of this vCPU written in.
//!
//! The topology is one package of N cores with one thread each; the local APIC id is the vCPU number. Linux reads it from
//! four places (leaf 1, leaf 4 or 0x8000001d, leaf 0xb or 0x1f, 0x8000001e and 0x80000008) and complains where they differ.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES_INTEL: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_EXTENDED_FEATURES: u32 = 0x8000_0001;
const LEAF_ADDRESS_SIZES: u32 = 0x8000_0008;
const LEAF_CACHES_AMD: u32 = 0x8000_001d;
const LEAF_TOPOLOGY_AMD: u32 = 0x8000_001e;

/// The first four letters of the vendor, in EBX of leaf 0.
const VENDOR_AMD: u32 = u32::from_le_bytes(*b"Auth");
const VENDOR_HYGON: u32 = u32::from_le_bytes(*b"Hygo");

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HYPER_THREADING: u32 = 1 << 28;
const ECX_CORE_LEGACY: u32 = 1 << 1;
const KVM_FEATURE_PV_EOI: u32 = 1 << 6;
const KVM_HINTS_REALTIME: u32 = 1;

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What of the machine shows in CPUID.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    /// vCPUs of the VM, the IVCPU included.
    pub vcpus: u8,
    /// Whether the guest may end interrupts without an exit (the paper's VMs could not).
    pub pv_eoi: bool,
    /// Whether every vCPU has a pCPU of its own, so that the guest may poll before it halts.
    pub dedicated: bool,
}

/// What can go wrong while CPUID is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM did not say what it supports.
    #[error("KVM does not say which CPUID it supports")]
    Supported(#[source] kvm_ioctls::Error),
    /// More leaves than the table of KVM takes.
    #[error("the CPUID table has more than {KVM_MAX_CPUID_ENTRIES} entries")]
    TooMany,
}

/// CPUID for the vCPUs of one VM.
#[derive(Debug)]
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    profile: Profile,
}

impl Template {
    /// Asks KVM what it supports and applies `profile`.
    pub fn new(kvm: &Kvm, profile: Profile) -> Result<Self, Error> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::Supported)?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self::from_entries(supported.as_slice().to_vec(), tsc_deadline, profile))
    }

    fn from_entries(mut entries: Vec<kvm_cpuid_entry2>, tsc_deadline: bool, profile: Profile) -> Self {
        let amd = entries.iter().any(|e| e.function == 0 && matches!(e.ebx, VENDOR_AMD | VENDOR_HYGON));
        let has_topology = entries.iter().any(|e| e.function == 0 && e.eax >= LEAF_TOPOLOGY);
        entries.retain(|e| !matches!(e.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2));
        for entry in &mut entries {
            apply_profile(entry, tsc_deadline, amd, profile);
        }
        if has_topology {
            entries.extend(topology_levels(profile.vcpus));
        }
        Self { entries, profile }
    }

    /// CPUID of the vCPU with this number.
    pub fn for_vcpu(&self, number: u8) -> Result<CpuId, Error> {
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            let id = u32::from(number);
            match entry.function {
                LEAF_FEATURES => entry.ebx = (entry.ebx & 0x00ff_ffff) | (id << 24),
                LEAF_TOPOLOGY => entry.edx = id,
                LEAF_TOPOLOGY_AMD => {
                    entry.eax = id;
                    // One thread a core: the core is the vCPU, and there is one node.
                    entry.ebx = id & 0xff;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        CpuId::from_entries(&entries).map_err(|_| Error::TooMany)
    }

    /// Bits of physical address the vCPUs have.
    pub fn physical_bits(&self) -> u8 {
        self.entries.iter().find(|e| e.function == LEAF_ADDRESS_SIZES).map_or(36, |e| e.eax as u8)
    }

    /// vCPUs the template is for.
    pub fn vcpus(&self) -> u8 {
        self.profile.vcpus
    }
}

fn apply_profile(entry: &mut kvm_cpuid_entry2, tsc_deadline: bool, amd: bool, profile: Profile) {
    let vcpus = u32::from(profile.vcpus);
    let several = vcpus > 1;
    match entry.function {
        LEAF_FEATURES => {
            entry.ecx |= ECX_HYPERVISOR;
            // KVM's own timer does TSC deadlines, but the supported CPUID does not list them.
            entry.ecx = with_bit(entry.ecx, ECX_TSC_DEADLINE, tsc_deadline);
            entry.edx = with_bit(entry.edx, EDX_HYPER_THREADING, several);
            entry.ebx = (entry.ebx & 0xff00_ffff) | (vcpus << 16);
        }
        LEAF_CACHES_INTEL if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { vcpus.next_power_of_two() - 1 } else { 0 };
            let cores = (vcpus.next_power_of_two() - 1).min(0x3f);
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores << 26);
        }
        LEAF_CACHES_AMD if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { vcpus - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
        }
        LEAF_EXTENDED_FEATURES => {
            entry.ecx = with_bit(entry.ecx, ECX_CORE_LEGACY, several && entry.ecx & ECX_CORE_LEGACY != 0)
        }
        LEAF_ADDRESS_SIZES if amd => {
            let id_bits = vcpus.next_power_of_two().trailing_zeros();
            entry.ecx = (entry.ecx & 0xffff_0000) | (id_bits << 12) | (vcpus - 1);
        }
        LEAF_KVM_FEATURES => {
            if !profile.pv_eoi {
                entry.eax &= !KVM_FEATURE_PV_EOI;
            }
            entry.edx = with_bit(entry.edx, KVM_HINTS_REALTIME, profile.dedicated);
        }
        _ => {}
    }
}

/// Leaf 0xb: a thread level with one, a core level with all, and the end.
fn topology_levels(vcpus: u8) -> [kvm_cpuid_entry2; 3] {
    let vcpus = u32::from(vcpus);
    let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: (kind << 8) | index,
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, vcpus.next_power_of_two().trailing_zeros(), vcpus, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

fn with_bit(value: u32, bit: u32, set: bool) -> u32 {
    if set { value | bit } else { value & !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    fn supported() -> Vec<kvm_cpuid_entry2> {
        vec![
            kvm_cpuid_entry2 { eax: 0x10, ebx: VENDOR_AMD, ..entry(0, 0) },
            kvm_cpuid_entry2 { ebx: 0x07ff_0800, ..entry(1, 0) },
            kvm_cpuid_entry2 { edx: 99, ..entry(LEAF_TOPOLOGY, 0) },
            kvm_cpuid_entry2 { edx: 99, ..entry(LEAF_TOPOLOGY_V2, 0) },
            kvm_cpuid_entry2 { eax: 0x0100_7efb, edx: 0, ..entry(LEAF_KVM_FEATURES, 0) },
            kvm_cpuid_entry2 { eax: 0x3028, ..entry(LEAF_ADDRESS_SIZES, 0) },
            kvm_cpuid_entry2 { eax: 9, ebx: 9, ecx: 9, ..entry(LEAF_TOPOLOGY_AMD, 0) },
            kvm_cpuid_entry2 { eax: 0x163, ..entry(LEAF_CACHES_AMD, 3) },
        ]
    }

    fn template(pv_eoi: bool, dedicated: bool) -> Template {
        Template::from_entries(supported(), true, Profile { vcpus: 3, pv_eoi, dedicated })
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_place_tells_the_same_apic_id() {
        let cpuid = template(true, false).for_vcpu(2).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).ebx, 0x0203_0800, "id 2 of 3, line size kept");
        assert_eq!(leaf(&cpuid, LEAF_TOPOLOGY_AMD, 0).eax, 2);
        for index in 0..3 {
            assert_eq!(leaf(&cpuid, LEAF_TOPOLOGY, index).edx, 2);
        }
        assert!(!cpuid.as_slice().iter().any(|e| e.function == LEAF_TOPOLOGY_V2));
    }

    #[test]
    fn three_vcpus_are_three_cores_of_one_package() {
        let cpuid = template(true, false).for_vcpu(0).unwrap();
        let core = leaf(&cpuid, LEAF_TOPOLOGY, 1);
        assert_eq!((core.eax, core.ebx, core.ecx), (2, 3, 0x201));
        assert_eq!(leaf(&cpuid, LEAF_ADDRESS_SIZES, 0).ecx, 0x2002);
        assert_eq!(leaf(&cpuid, LEAF_CACHES_AMD, 3).eax >> 14, 2, "the last cache is shared by all three");
        assert_ne!(leaf(&cpuid, 1, 0).edx & EDX_HYPER_THREADING, 0);
    }

    #[test]
    fn timer_and_kvm_hints_follow_the_profile() {
        let plain = template(true, false).for_vcpu(0).unwrap();
        assert_ne!(leaf(&plain, 1, 0).ecx & ECX_TSC_DEADLINE, 0);
        assert_ne!(leaf(&plain, LEAF_KVM_FEATURES, 0).eax & KVM_FEATURE_PV_EOI, 0);
        assert_eq!(leaf(&plain, LEAF_KVM_FEATURES, 0).edx & KVM_HINTS_REALTIME, 0);
        let paper = template(false, true).for_vcpu(0).unwrap();
        assert_eq!(leaf(&paper, LEAF_KVM_FEATURES, 0).eax, 0x0100_7efb & !KVM_FEATURE_PV_EOI);
        assert_ne!(leaf(&paper, LEAF_KVM_FEATURES, 0).edx & KVM_HINTS_REALTIME, 0);
        let no_deadline =
            Template::from_entries(supported(), false, Profile { vcpus: 1, pv_eoi: true, dedicated: false });
        assert_eq!(leaf(&no_deadline.for_vcpu(0).unwrap(), 1, 0).ecx & ECX_TSC_DEADLINE, 0);
    }

    #[test]
    fn a_cpu_without_the_topology_leaf_gets_none() {
        let mut entries = supported();
        entries[0].eax = 0xa;
        let template =
            Template::from_entries(entries, true, Profile { vcpus: 2, pv_eoi: true, dedicated: false });
        assert!(!template.for_vcpu(0).unwrap().as_slice().iter().any(|e| e.function == LEAF_TOPOLOGY));
        assert_eq!(template.physical_bits(), 0x28);
    }
}
