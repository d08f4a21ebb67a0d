/*
 * What a guest that knows KVM finds here: kvmclock, wall clock, steal time, hypercalls. Source: see kvm.h.
 *
 * kvmclock: guest time is a fixed multiple of the TSC and both stand still together, so a page, once written, stays right for
 * ever and is the same for all vCPUs (those whose TSC_ADJUST differs have another origin).
 */
#include "kvm.h"

#include "apic.h"
#include "desc.h"

enum { MSR_WALL_CLOCK = 0x4b564d00, MSR_SYSTEM_TIME, MSR_ASYNC_PF, MSR_STEAL_TIME, MSR_PV_EOI };
enum { HC_VAPIC_POLL_IRQ = 1, HC_KICK_CPU = 5, HC_SEND_IPI = 10 };
#define KVM_ENABLE 1u
#define KVM_EPERM 1
#define KVM_ENOSYS 1000
#define NS_PER_S 1000000000ull

struct pvclock {
    uint32_t version, pad;
    uint64_t tsc_timestamp, system_time;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags;
    uint8_t pad2[2];
};
#define PVCLOCK_TSC_STABLE 1u

struct wall_clock { uint32_t version, seconds, nanoseconds; };

struct steal_time {
    uint64_t steal;
    uint32_t version, flags;
    uint8_t preempted;
    uint8_t pad[47];
};
#define PREEMPTED 1u
#define PREEMPTED_FLUSH_TLB 2u
_Static_assert(sizeof(struct pvclock) == 32 && sizeof(struct steal_time) == 64, "layouts of msr.rst");

/* A structure of n bytes of guest memory; it never crosses a page where msr.rst demands its alignment. */
static void *guest_struct(struct cpu *c, uint64_t gpa, unsigned n)
{
    return (gpa & (SEG_PAGE - 1)) + n <= SEG_PAGE ? phys_ptr(c, gpa, true) : NULL;
}

/* ns = (ticks << shift) * mul >> 32 (shift < 0: to the right), with mul in 2^31 to 2^32 */
static void time_scale(uint64_t khz, uint32_t *mul, int8_t *shift)
{
    uint64_t hz = khz * 1000;
    int s = 0;
    while ((s < 0 ? hz >> -s : hz << s) > 2 * NS_PER_S) {
        s--;
    }
    while ((s < 0 ? hz >> -s : hz << s) <= NS_PER_S && s < 31) {
        s++;
    }
    unsigned __int128 ns = (unsigned __int128)NS_PER_S << 32;
    *mul = (uint32_t)((s < 0 ? ns << -s : ns >> s) / hz);
    *shift = (int8_t)s;
}

static void write_clock(struct cpu *c)
{
    uint64_t msr = ARCH(c)->kvm_system_time;
    struct pvclock *p = msr & KVM_ENABLE ? guest_struct(c, msr & ~1ull, sizeof *p) : NULL;
    if (!p) {
        return;
    }
    uint32_t version = (p->version & ~1u) + 2;
    struct pvclock now = {.version = version, .tsc_timestamp = ARCH(c)->tsc_adjust, .flags = PVCLOCK_TSC_STABLE};
    time_scale(c->seg->time.tsc_khz ? c->seg->time.tsc_khz : 1, &now.tsc_to_system_mul, &now.tsc_shift);
    __atomic_store_n(&p->version, version - 1, __ATOMIC_RELEASE); /* odd: being written */
    atomic_thread_fence(memory_order_seq_cst);
    memcpy(&p->pad, &now.pad, sizeof now - sizeof now.version);
    __atomic_store_n(&p->version, version, __ATOMIC_RELEASE);
    phys_written(c, p, sizeof *p);
}

static void write_wall_clock(struct cpu *c, uint64_t gpa)
{
    struct wall_clock *p = guest_struct(c, gpa, sizeof *p);
    if (!p) {
        return;
    }
    uint64_t wall = c->seg->time.wall_ns;
    uint32_t version = (p->version & ~1u) + 2;
    *p = (struct wall_clock){version, (uint32_t)(wall / NS_PER_S), (uint32_t)(wall % NS_PER_S)};
    phys_written(c, p, sizeof *p);
}

static struct steal_time *steal_page(struct cpu *c)
{
    uint64_t msr = ARCH(c)->kvm_steal_time;
    return msr & KVM_ENABLE ? guest_struct(c, msr & ~0x3full, sizeof(struct steal_time)) : NULL;
}

void kvm_refresh(struct cpu *c) { write_clock(c); }

void kvm_sleeping(struct cpu *c)
{
    struct steal_time *p = steal_page(c);
    if (p) {
        __atomic_store_n(&p->preempted, PREEMPTED, __ATOMIC_SEQ_CST);
        phys_written(c, p, sizeof *p);
    }
}

void kvm_running(struct cpu *c)
{
    struct steal_time *p = steal_page(c);
    if (p) {
        uint8_t was = __atomic_exchange_n(&p->preempted, 0, __ATOMIC_SEQ_CST);
        phys_written(c, p, sizeof *p);
        if (was & PREEMPTED_FLUSH_TLB) {
            mmu_flush(c, true);
        }
    }
}

bool kvm_kicked(struct cpu *c) { return seg_load(&c->s.posted_kick) && seg_swap(&c->s.posted_kick, 0); }

/* ---- EOI by clearing a bit of memory: bit 0 of a word, set with the interrupt where an EOI would have nothing else to do.
 * Settled before anything that depends on what is in service: apic_update() sees to it. ---- */

static uint32_t *eoi_word(struct cpu *c)
{
    uint64_t msr = ARCH(c)->kvm_pv_eoi;
    return msr & KVM_ENABLE ? guest_struct(c, msr & ~3ull, 4) : NULL;
}

void kvm_eoi_offer(struct cpu *c)
{
    uint32_t *word = ARCH(c)->kvm_pv_eoi & KVM_ENABLE && apic_pv_eoi_fits(c) ? eoi_word(c) : NULL;
    if (word) {
        *word |= 1;
        phys_written(c, word, 4);
        c->sys.eoi_offered = true;
    }
}

void kvm_eoi_settle(struct cpu *c)
{
    uint32_t *word = eoi_word(c);
    c->sys.eoi_offered = false;
    if (!word) {
        return;
    }
    bool done = !(*word & 1);
    *word &= ~1u;
    phys_written(c, word, 4);
    if (done) {
        apic_eoi(c);
    }
}

/* ---- MSRs ---- */

bool kvm_msr_read(struct cpu *c, uint32_t index, uint64_t *value)
{
    const struct cpu_arch *a = ARCH(c);
    switch (index) {
    case MSR_WALL_CLOCK: *value = a->kvm_wall_clock; return true;
    case MSR_SYSTEM_TIME: *value = a->kvm_system_time; return true;
    case MSR_STEAL_TIME: *value = a->kvm_steal_time; return true;
    case MSR_PV_EOI: *value = a->kvm_pv_eoi; return true;
    default: return false; /* asynchronous page faults are not offered */
    }
}

bool kvm_msr_write(struct cpu *c, uint32_t index, uint64_t value)
{
    struct cpu_arch *a = ARCH(c);
    struct steal_time *p;
    switch (index) {
    case MSR_WALL_CLOCK:
        a->kvm_wall_clock = value;
        write_wall_clock(c, value);
        return true;
    case MSR_SYSTEM_TIME:
        a->kvm_system_time = value;
        write_clock(c);
        return true;
    case MSR_STEAL_TIME:
        if (value & 0x3e) {
            return false;
        }
        a->kvm_steal_time = value;
        p = steal_page(c);
        if (p) {
            p->steal = 0; /* the host's scheduler is not asked: see docs/quirks.md */
            p->version = (p->version & ~1u) + 2;
            p->preempted = 0;
            phys_written(c, p, sizeof *p);
        }
        return true;
    case MSR_PV_EOI:
        if (value & 2) {
            return false;
        }
        if (c->sys.eoi_offered) {
            kvm_eoi_settle(c);
        }
        a->kvm_pv_eoi = value;
        return true;
    default: return false;
    }
}

/* ---- hypercalls ---- */

static struct vcpu_block *vcpu_of_apic_id(struct cpu *c, uint32_t id, uint32_t *index)
{
    for (uint32_t i = 0; i < c->seg->vcpus; i++) {
        struct vcpu_block *v = seg_vcpu(c->seg, i);
        if (seg_load(&v->apic_id) == id) {
            *index = i;
            return v;
        }
    }
    return NULL;
}

/* Ends the target's HLT whatever its IF is, or its next one */
static void kick(struct cpu *c, uint32_t apic_id)
{
    uint32_t index;
    struct vcpu_block *v = vcpu_of_apic_id(c, apic_id, &index);
    if (v) {
        seg_store_sc(&v->posted_kick, 1u);
        vcpu_attend(c->seg, index, ATTN_IRQ);
    }
}

/* Bit i of low and high: the vCPU with APIC ID base + i. Returns how many took it. */
static uint64_t send_ipis(struct cpu *c, uint64_t low, uint64_t high, uint64_t base, uint64_t icr)
{
    uint64_t taken = 0;
    unsigned per_word = mode_64(c) ? 64 : 32;
    unsigned mode = (icr >> 8) & 7;
    if (mode != DELIVER_FIXED && mode != DELIVER_NMI) {
        return (uint64_t)-(int64_t)KVM_ENOSYS;
    }
    for (unsigned i = 0; i < 2 * per_word; i++) {
        uint64_t word = i < per_word ? low : high;
        uint32_t index;
        if (word >> i % per_word & 1 && vcpu_of_apic_id(c, (uint32_t)(base + i), &index)) {
            fabric_post(c->seg, index, mode, icr & 0xff, 0);
            taken++;
        }
    }
    return taken;
}

static void hypercall(struct cpu *c)
{
    uint64_t mask = mode_64(c) ? UINT64_MAX : 0xffffffffu;
    uint64_t b = GPR(c, RBX) & mask, x = GPR(c, RCX) & mask, d = GPR(c, RDX) & mask, s = GPR(c, RSI) & mask;
    uint64_t result = 0;
    if (ARCH(c)->cpl) {
        result = (uint64_t)-(int64_t)KVM_EPERM;
    } else {
        switch (GPR(c, RAX) & mask) {
        case HC_VAPIC_POLL_IRQ: break;
        case HC_KICK_CPU: kick(c, (uint32_t)x); break;
        case HC_SEND_IPI: result = send_ipis(c, b, x, d, s); break;
        default: result = (uint64_t)-(int64_t)KVM_ENOSYS;
        }
    }
    GPR(c, RAX) = result & mask;
}

void op_hypercall(struct cpu *c, const struct uop *u)
{
    hypercall(c);
    NEXT(c, u);
}
