/*
 * How processes get a vCPU's attention, how it sleeps, and how it promises to keep its hands off
 * guest memory for a while (parking). Three arguments of the same form (Dekker: each side writes its
 * own word, then reads the other's, all in one total order, seq_cst) carry everything here.
 *
 * 1. No lost wake-up. Sender: ORs a bit into `attention`, then reads `sleeping`. Sleeper: writes
 *    sleeping = 1, then reads `attention`. One of the two reads comes last and sees the other's
 *    write: either the sleeper sees the bit and does not sleep, or the sender sees sleeping = 1 and
 *    calls FUTEX_WAKE. That the wake-up may come before the wait does no harm: the kernel compares
 *    the word with 0 under its own lock, and a sleeper only ever waits on the value 0, which any
 *    sender's OR changes. (Waiting on another value would lose a second sender's same bit.)
 *    The sleeper must therefore clear bits first and look at what they announce afterwards.
 *
 * 2. No stale map. Publisher: writes map_version, then reads `parked`. vCPU: writes parked = 0, then
 *    reads map_version. Either the publisher sees parked = 0 and waits for map_ack, which the vCPU
 *    writes at its next look at `attention`, with no translation left; or the vCPU sees the new
 *    version before it touches memory. A parked vCPU holds no translation that it uses without
 *    looking, so it need not be woken.
 *
 * 3. World stop. Stopper: makes itself world.owner, then reads every `parked`. vCPU: writes
 *    parked = 0, then reads world.owner. Either the stopper sees 0 and waits until the vCPU, drawn by
 *    ATTN_WORLD, has parked; or the vCPU sees the owner and parks again. Two stoppers: the one whose
 *    compare-and-swap fails parks like everybody else.
 */
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "seg.h"

#define SPINS 200 /* before the processor is given away: the other side may wait for this very core */

long seg_futex(uint32_t *word, int op, uint32_t value, const void *timeout)
{
    return syscall(SYS_futex, word, op, value, timeout, NULL, FUTEX_BITSET_MATCH_ANY);
}

#define LOCK_WAITED 1u /* somebody sleeps on the word; above it the PID of who holds it, 0 = nobody */

/* No process of a machine is forked from one that has held a lock, so the number is its own for good. */
static uint32_t lock_mine(void)
{
    static uint32_t mine;
    if (!mine) {
        mine = (uint32_t)getpid() << 1;
    }
    return mine;
}

void seg_lock(uint32_t *word)
{
    uint32_t mine = lock_mine(), seen = 0;
    for (int i = 0; i < SPINS; i++) {
        seen = 0;
        if (__atomic_compare_exchange_n(word, &seen, mine, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
            return;
        }
        seg_pause();
    }
    for (;;) {
        seen = 0; /* who has slept takes it as waited for: others may sleep as well */
        if (__atomic_compare_exchange_n(word, &seen, mine | LOCK_WAITED, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
            return;
        }
        if (seen & LOCK_WAITED || __atomic_compare_exchange_n(word, &seen, seen | LOCK_WAITED, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
            seg_futex(word, FUTEX_WAIT, seen | LOCK_WAITED, NULL);
        }
    }
}

void seg_unlock(uint32_t *word)
{
    if (seg_swap(word, 0) & LOCK_WAITED) {
        seg_futex(word, FUTEX_WAKE, 1, NULL);
    }
}

static bool lock_break(uint32_t *word, uint32_t pid)
{
    if (!pid || seg_load_sc(word) >> 1 != pid) {
        return false;
    }
    seg_store_sc(word, 0);
    seg_futex(word, FUTEX_WAKE, INT32_MAX, NULL);
    return true;
}

void seg_break_locks(struct seg_header *seg, uint32_t pid)
{
    struct code_log *log = seg_code(seg);
    bool code = false;
    lock_break(&seg->map_lock, pid); /* what it was building is built anew by whoever publishes next */
    for (uint32_t i = 0; i < SEG_PAGE_LOCKS; i++) {
        code |= lock_break(&log->page_lock[i], pid);
    }
    if (code) { /* an event may be drawn and not filled, or not drawn: every reader has fallen behind and drops all */
        seg_add(&log->head, SEG_CODE_SLOTS + 1);
        vcpu_attend_all(seg, ATTN_CODE);
    }
    if (lock_break(&seg_fabric(seg)->lock, pid)) {
        fabric_resolve(seg); /* a level may have risen and not been looked at; edges are sent before they are noted */
    }
}

void vcpu_attend(struct seg_header *seg, uint32_t vcpu, uint32_t bits)
{
    struct vcpu_block *v = seg_vcpu(seg, vcpu);
    seg_or(&v->attention, bits);
    if (seg_load_sc(&v->sleeping)) {
        seg_futex(&v->attention, FUTEX_WAKE, 1, NULL);
    }
}

void vcpu_attend_all(struct seg_header *seg, uint32_t bits)
{
    for (uint32_t i = 0; i < seg->vcpus; i++) {
        vcpu_attend(seg, i, bits);
    }
}

void seg_call(struct seg_header *seg, uint32_t vcpu)
{
    seg_add(&seg_vcpu(seg, vcpu)->commands, 1);
    vcpu_attend(seg, vcpu, ATTN_CONTROL);
}

uint32_t vcpu_take_attention(struct seg_header *seg, uint32_t vcpu) { return seg_swap(&seg_vcpu(seg, vcpu)->attention, 0); }

int vcpu_sleep(struct seg_header *seg, uint32_t vcpu, uint64_t wake_ns)
{
    struct vcpu_block *v = seg_vcpu(seg, vcpu);
    vcpu_park(seg, vcpu);
    seg_store_sc(&v->sleeping, 1);
    while (seg_load_sc(&v->attention) == 0 && (wake_ns == SEG_NO_OFFSET || guest_now(seg) < wake_ns)) {
        uint64_t host_ns = guest_host_deadline(seg, wake_ns);
        struct timespec until = {(time_t)(host_ns / 1000000000u), (long)(host_ns % 1000000000u)};
        seg_futex(&v->attention, FUTEX_WAIT_BITSET, 0, host_ns == SEG_NO_OFFSET ? NULL : &until);
    }
    seg_store(&v->sleeping, 0);
    return vcpu_unpark(seg, vcpu);
}

void vcpu_park(struct seg_header *seg, uint32_t vcpu) { seg_store_sc(&seg_vcpu(seg, vcpu)->parked, 1); }

int vcpu_unpark(struct seg_header *seg, uint32_t vcpu)
{
    struct vcpu_block *v = seg_vcpu(seg, vcpu);
    for (;;) {
        seg_store_sc(&v->parked, 0);
        uint32_t owner = seg_load_sc(&seg->world.owner);
        if (owner == 0 || owner == vcpu + 1) {
            return seg_load_sc(&seg->map_version) != v->map_ack;
        }
        seg_store_sc(&v->parked, 1);
        seg_futex(&seg->world.owner, FUTEX_WAIT, owner, NULL);
    }
}

void vcpu_map_ack(struct seg_header *seg, uint32_t vcpu)
{
    /* No translation is left here, which is right for any version. */
    seg_store_sc(&seg_vcpu(seg, vcpu)->map_ack, seg_load_sc(&seg->map_version));
}

int seg_world_stop(struct seg_header *seg, uint32_t vcpu)
{
    for (;;) {
        uint32_t seen = 0;
        if (__atomic_compare_exchange_n(&seg->world.owner, &seen, vcpu + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
            break;
        }
        vcpu_park(seg, vcpu);
        if (vcpu_unpark(seg, vcpu)) {
            return 0;
        }
    }
    for (uint32_t i = 0; i < seg->vcpus; i++) {
        struct vcpu_block *v = seg_vcpu(seg, i);
        if (i == vcpu || seg_load_sc(&v->parked)) {
            continue;
        }
        vcpu_attend(seg, i, ATTN_WORLD);
        for (int spins = 0; !seg_load_sc(&v->parked); spins++) {
            spins < SPINS ? seg_pause() : (void)sched_yield();
        }
    }
    return 1;
}

void seg_world_resume(struct seg_header *seg, uint32_t vcpu)
{
    uint32_t mine = vcpu + 1;
    if (__atomic_compare_exchange_n(&seg->world.owner, &mine, 0, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        seg_futex(&seg->world.owner, FUTEX_WAKE, INT32_MAX, NULL);
    }
}

void vcpu_lost(struct seg_header *seg, uint32_t vcpu)
{
    struct vcpu_block *v = seg_vcpu(seg, vcpu);
    seg_store_sc(&v->sleeping, 0u);
    seg_store_sc(&v->commands, 0u);
    vcpu_park(seg, vcpu); /* nothing of it will touch guest memory again: who waits for a map or for the world need not */
    seg_world_resume(seg, vcpu);
}
