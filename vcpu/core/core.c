/* A vCPU's address space: the segment, and in front of the private state the vCPU's own block of it. */
#include "apic_private.h"
#include "api.h"
#include "block.h"
#include "flags.h"
#include "host.h"
#include "mem.h"
#include "system.h"

#include <errno.h>
#include <stdio.h>
#include <sys/mman.h>

static char error[256];

const char *core_error(void) { return error; }

static struct cpu *fail(const char *what, int number)
{
    snprintf(error, sizeof error, "%s%s%s", what, number ? ": " : "", number ? strerror(number) : "");
    return NULL;
}

static uint8_t *map(void *at, uint64_t size, int flags, int fd, uint64_t offset)
{
    void *p = mmap(at, size, PROT_READ | PROT_WRITE, flags | (at ? MAP_FIXED : 0), fd, (off_t)offset);
    return p == MAP_FAILED ? NULL : p;
}

static struct cpu *prepare(struct cpu *c, uint8_t *base, uint32_t index, void *handle)
{
    struct seg_header *seg = (struct seg_header *)base;
    c->base = base;
    c->seg = seg;
    c->guest = base + seg->guest;
    c->dirty = base + seg->dirty_offset;
    c->code_mask = (uint64_t *)(base + seg->code_mask_offset);
    c->index = index;
    c->handle = handle;
    for (unsigned i = 0; i < SEG_MAX_HOSTS; i++) {
        c->doorbell[i] = -1;
    }
    c->s.code_cursor = seg_load_sc(&seg_code(seg)->head);
    c->s.place = PLACE_OUTSIDE; /* another process may have been this vCPU */
    ring_claimed(seg, index);
    if (host_lacks()) {
        return fail(host_lacks(), 0);
    }
    if (blocks_create(c) || !host_init(c)) {
        return fail("translated code", errno);
    }
    int r = seg_process_init();
    if (r) {
        return fail("membarrier", -r);
    }
    r = apic_timer_start(c);
    if (r) {
        return fail("APIC timer", -r);
    }
    core_state_changed(c);
    return c;
}

struct cpu *core_create(int fd, uint32_t index, void *handle)
{
    struct seg_header *seg = (struct seg_header *)map(NULL, SEG_PAGE, MAP_SHARED, fd, 0);
    if (!seg) {
        return fail("segment", errno);
    }
    struct seg_header head = *seg;
    munmap(seg, SEG_PAGE);
    if (head.magic != SEG_MAGIC || head.layout != SEG_LAYOUT) {
        return fail("segment of another version", 0);
    }
    if (index >= head.vcpus || head.vcpu_stride != sizeof((struct cpu *)0)->reserve) {
        return fail("segment without this vCPU", 0);
    }
    uint8_t *base = map(NULL, head.size, MAP_SHARED, fd, 0);
    uint8_t *c = base ? map(NULL, sizeof(struct cpu), MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : NULL;
    if (!c || !map(c, head.vcpu_stride, MAP_SHARED, fd, head.vcpu_offset + head.vcpu_stride * index)) {
        return fail("segment", errno);
    }
    return prepare((struct cpu *)c, base, index, handle);
}

void core_destroy(struct cpu *c)
{
    apic_timer_stop(c);
    host_free(c);
    blocks_destroy(c);
    munmap(c->base, c->seg->size);
    munmap(c, sizeof *c);
}

struct vcpu_block *core_block(struct cpu *c) { return &c->s; }
struct seg_header *core_segment(struct cpu *c) { return c->seg; }
uint8_t *core_base(struct cpu *c) { return c->base; }

void core_state_changed(struct cpu *c)
{
    c->s.lazy = LAZY_NONE;
    ARCH(c)->zero = 0;
    system_load(c);
    mode_update(c);
}

void core_hidden_get(const struct cpu *c, struct core_hidden *out)
{
    *out = (struct core_hidden){.lint0_seen = c->lint0_seen, .debug_hit = c->sys.debug_hit};
    memcpy(out->pdpte, c->sys.pdpte, sizeof out->pdpte);
}

void core_loaded(struct cpu *c, const struct core_hidden *hidden)
{
    core_state_changed(c);
    memcpy(c->sys.pdpte, hidden->pdpte, sizeof c->sys.pdpte);
    c->lint0_seen = hidden->lint0_seen;
    c->sys.debug_hit = hidden->debug_hit;
    blocks_drop_all(c); /* memory has other bytes, and nobody has told */
    apic_publish(c);
    apic_timer_arm(c);
    core_attend(c, ATTN_IRQ | ATTN_TIMER);
}

void core_cpuid(const struct cpu *c, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    struct cpuid_leaf l = cpuid_query(c, leaf, subleaf);
    memcpy(out, (uint32_t[]){l.eax, l.ebx, l.ecx, l.edx}, sizeof(uint32_t[4]));
}

uint64_t core_last_rflags(const struct vcpu_block *block)
{
    uint64_t flags = block->arch.rflags;
    return block->place == PLACE_OUTSIDE ? flags : (flags & ~(uint64_t)FLAGS_STATUS) | flags_status_slow((const struct cpu *)block);
}

void core_halt_exits(struct cpu *c, int on) { c->halt_exits = on; }
