/*
 * Parking: a vCPU's promise not to touch guest memory, given while it waits for anything. What it must
 * look at before it goes on, and why nobody is missed: coordinator/contract/attention.c.
 */
#include <time.h>

#include "io.h"
#include "api.h"
#include "mem.h"

static uint64_t host_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void core_attend(struct cpu *c, uint32_t bits) { vcpu_attend(c->seg, c->index, bits); }

void core_park(struct cpu *c) { vcpu_park(c->seg, c->index); }

void core_map_changed(struct cpu *c)
{
    mmu_flush(c, true);
    vcpu_map_ack(c->seg, c->index);
}

void core_unpark(struct cpu *c)
{
    if (vcpu_unpark(c->seg, c->index)) {
        core_map_changed(c);
    }
}

void core_world_wait(struct cpu *c)
{
    core_park(c);
    core_unpark(c);
}

void core_sleep(struct cpu *c, uint64_t wake_ns)
{
    uint64_t begin = host_ns();
    if (vcpu_sleep(c->seg, c->index, wake_ns)) {
        core_map_changed(c);
    }
    __atomic_store_n(&c->s.halt_ns, c->s.halt_ns + (host_ns() - begin), __ATOMIC_RELAXED);
}

void world_stop(struct cpu *c)
{
    while (!seg_world_stop(c->seg, c->index)) {
        core_map_changed(c);
    }
    c->world_held = true;
}

void world_resume(struct cpu *c)
{
    seg_world_resume(c->seg, c->index);
    c->world_held = false;
}
