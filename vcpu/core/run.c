/*
 * The run loop: what happens between instructions. Events in the order of SDM vol. 3 table 6-2: INIT and SIPI, traps of
 * the instruction before (debug_after), NMI, interrupts, instruction breakpoints (debug_before), then the instruction.
 *
 * Blocks run without coming back here until something asks for it: attention, the budget, an instruction that may have
 * changed mode or mapping. One instruction at a time runs while an interrupt shadow, TF or debug registers ask for it.
 */
#include "apic.h"
#include "api.h"
#include "block.h"
#include "flags.h"
#include "host.h"
#include "io.h"
#include "mem.h"
#include "system.h"

#include <time.h>

static bool flat(const struct cpu *c)
{
    const struct seg_reg *seg = c->s.arch.seg;
    if (!(seg[CS].attr & seg[SS].attr & 0x4000) || seg[CS].base | seg[DS].base | seg[ES].base | seg[SS].base) {
        return false;
    }
    /* P S W of the data segments, expand up */
    return (seg[CS].limit & seg[DS].limit & seg[ES].limit & seg[SS].limit) == UINT32_MAX &&
           (seg[DS].attr & seg[ES].attr & seg[SS].attr & 0x92) == 0x92 && !((seg[DS].attr | seg[ES].attr | seg[SS].attr) & 0x0c);
}

void mode_update(struct cpu *c)
{
    const struct cpu_arch *a = ARCH(c);
    uint32_t mode;
    if (a->efer & EFER_LMA && a->seg[CS].attr & 0x2000) {
        mode = MODE_64 | MODE_D;
    } else {
        mode = (a->seg[CS].attr & 0x4000 ? MODE_D : 0) | (flat(c) ? MODE_FLAT : 0);
    }
    c->mode = mode;
    if (!(mode & (MODE_64 | MODE_FLAT)) && (c->jump_cs_base != a->seg[CS].base || c->jump_cs_limit != a->seg[CS].limit)) {
        c->jump_cs_base = a->seg[CS].base; /* the jump cache knows blocks by rip alone */
        c->jump_cs_limit = a->seg[CS].limit;
        jump_cache_flush(c);
    }
    c->jump_key = c->jump_generation[a->cpl == 3] << 8 | mode | (a->cpl == 3 ? MODE_USER : 0);
}

static void account(struct cpu *c)
{
    __atomic_store_n(&c->s.instructions, c->s.instructions + (uint64_t)(c->budget_noted - c->budget), __ATOMIC_RELAXED);
    c->budget_noted = c->budget;
}

static void take_code_events(struct cpu *c)
{
    uint64_t page;
    int r;
    while ((r = seg_code_next(c->seg, &c->s.code_cursor, &page)) != 0) {
        if (r < 0) {
            blocks_drop_all(c);
        } else {
            blocks_drop_page(c, page);
        }
        c->s.code_events_seen++;
    }
}

/* Looks at everything that attention announces. Returns an exit, or EXIT_NONE. */
static int take_attention(struct cpu *c)
{
    uint32_t bits = vcpu_take_attention(c->seg, c->index);
    if (bits & ATTN_WORLD) {
        core_world_wait(c);
    }
    if (bits & ATTN_MAP) {
        core_map_changed(c);
    }
    if (bits & ATTN_TLB) {
        mmu_flush(c, true);
    }
    if (bits & ATTN_CODE) {
        take_code_events(c);
    }
    if (bits & ATTN_TIMER) {
        apic_timer_check(c);
    }
    if (bits & ATTN_IRQ) {
        apic_drain(c);
    }
    return bits & ATTN_CONTROL ? EXIT_CONTROL : EXIT_NONE;
}

static void take_init_sipi(struct cpu *c)
{
    uint32_t vector;
    if (unlikely(apic_take_init(c))) {
        core_reset(c, RESET_INIT);
    }
    if (ARCH(c)->activity == ACT_WAIT_SIPI && apic_take_sipi(c, &vector)) {
        core_sipi(c, vector);
    }
}

/* HLT and wait-for-SIPI: sleeps until something may end it. */
static void sleep_until_event(struct cpu *c)
{
    kvm_sleeping(c);
    fpu_park(c);
    c->s.place = PLACE_ASLEEP;
    core_sleep(c, apic_timer_due(c));
    c->s.place = PLACE_GUEST;
    fpu_unpark(c);
    kvm_running(c);
    apic_timer_check(c);
    apic_drain(c);
}

/* NMI, then interrupts, where nothing holds them back */
static void take_interrupts(struct cpu *c)
{
    struct cpu_arch *a = ARCH(c);
    if (unlikely(!(a->inhibit & INHIBIT_MOV_SS) && apic_take_nmi(c))) {
        deliver_interrupt(c, VEC_NMI, EVENT_NMI);
    } else if (c->intr_ready && a->rflags & FLAG_IF && !a->inhibit) {
        int vector = apic_ack(c);
        if (vector >= 0) {
            c->s.vectors[vector]++;
            deliver_interrupt(c, (unsigned)vector, EVENT_EXTERNAL);
            kvm_eoi_offer(c);
        }
    }
}

static void execute(struct cpu *c, struct block *b)
{
    c->block = b;
    ARCH(c)->rip = b->rip;
    c->budget -= b->count;
    b->u[0].fn(c, b->u);
}

static void execute_single(struct cpu *c)
{
    struct cpu_arch *a = ARCH(c);
    bool tf = a->rflags & FLAG_TF, debug = c->single;
    if (debug) {
        debug_before(c);
        a->rflags &= ~(uint64_t)FLAG_RF; /* an instruction that sets it (IRET) does so after this */
    }
    a->inhibit = 0;
    c->mode |= MODE_SINGLE;
    c->jump_key |= MODE_SINGLE;
    execute(c, block_lookup(c, a->rip));
    if ((tf || debug) && !(a->inhibit & INHIBIT_MOV_SS)) {
        debug_after(c, tf);
    }
}

/* Until an exit. Faults unwind to core_run() and start it again. */
static int loop(struct cpu *c)
{
    struct cpu_arch *a = ARCH(c);
    for (;;) {
        account(c);
        if (__atomic_load_n(&c->s.attention, __ATOMIC_RELAXED)) {
            int exit = take_attention(c);
            if (exit != EXIT_NONE) {
                return exit;
            }
        }
        if (unlikely(host_full(c))) {
            blocks_drop_all(c);
            host_reset(c);
        }
        take_init_sipi(c);
        if (unlikely(a->activity != ACT_RUNNING)) {
            if (a->activity == ACT_SHUTDOWN) {
                return EXIT_SHUTDOWN;
            }
            if (a->activity == ACT_HALTED && (apic_wakes(c) || kvm_kicked(c))) {
                a->activity = ACT_RUNNING;
            } else if (c->halt_exits) {
                a->activity = ACT_RUNNING;
                return EXIT_DEBUG;
            } else {
                sleep_until_event(c);
                continue;
            }
        }
        take_interrupts(c);
        if (c->budget <= 0) {
            return EXIT_BUDGET;
        }
        mode_update(c);
        if (unlikely(a->rflags & FLAG_RF && !c->single)) {
            a->rflags &= ~(uint64_t)FLAG_RF; /* no breakpoint to hold back: every IRET from a fault sets it */
        }
        if (unlikely(a->inhibit || a->rflags & FLAG_TF || c->single)) {
            execute_single(c);
            continue;
        }
        struct jump_entry *e = jump_slot(c, a->rip);
        if (e->key != c->jump_key || e->block->rip != a->rip) {
            struct block *b = block_lookup(c, a->rip);
            *e = (struct jump_entry){b, c->jump_key};
        }
        if (unlikely(e->block->count > c->budget)) { /* the rest of the budget, to the instruction */
            execute_single(c);
        } else {
            execute(c, e->block);
        }
    }
}

static uint64_t host_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int core_run(struct cpu *c, int64_t budget)
{
    c->run_started = host_ns();
    c->halt_before = c->s.halt_ns;
    c->budget = c->budget_noted = budget;
    c->s.exit_reason = EXIT_NONE;
    core_unpark(c);
    fpu_unpark(c);
    c->s.place = PLACE_GUEST;
    switch (setjmp(c->unwind)) {
    case UNWIND_FAULT:
    case UNWIND_TRAP:
        if (c->world_held) {
            world_resume(c);
        }
        fault_deliver(c);
        break;
    case UNWIND_RETRY: /* a device host holds the access, and the coordinator wants us */
        if (c->world_held) {
            world_resume(c);
        }
        break;
    default: break;
    }
    int exit = loop(c);
    fpu_park(c);
    if (c->sys.eoi_offered) {
        kvm_eoi_settle(c);
    }
    flags_get(c);
    c->s.place = PLACE_OUTSIDE;
    note_exit(c, ARCH(c)->rip, (unsigned)exit, NULL);
    core_park(c);
    c->s.run_ns += host_ns() - c->run_started - (c->s.halt_ns - c->halt_before);
    c->s.exit_reason = (uint32_t)exit;
    c->s.exits[exit]++;
    return exit;
}
