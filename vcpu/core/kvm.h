/* KVM's paravirtual interface: Linux Documentation/virt/kvm/x86/ msr.rst, hypercalls.rst, cpuid.rst. */
#ifndef ATOLL_KVM_H
#define ATOLL_KVM_H

#include "cpu.h"

#define KVM_MSR_FIRST 0x4b564d00u
#define KVM_MSR_LAST 0x4b564d04u
bool kvm_msr_read(struct cpu *c, uint32_t index, uint64_t *value);
bool kvm_msr_write(struct cpu *c, uint32_t index, uint64_t value);

/* The others are in system.h. */

#endif
