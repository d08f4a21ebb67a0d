/*
 * The memory map, in two copies: maps[map_version & 1] is in force, the other is where a publisher
 * builds the next. Readers copy a region out and look at the version again: the copy they read is
 * written only after the version has moved on. Who must not use an old map any longer is made to
 * say so; the argument is in attention.c.
 */
#include <sched.h>
#include <string.h>
#include <time.h>

#include "seg.h"

#define YIELDS 1000         /* then the publisher sleeps between looks */
#define NAP_NS 50000

int seg_map_find(const struct seg_header *seg, uint64_t gpa, struct map_region *out)
{
    for (;;) {
        uint64_t version = seg_load(&seg->map_version);
        const struct memory_map *map = &seg_maps(seg)[version & 1];
        int found = 0;
        uint32_t low = 0, high = map->count < SEG_MAX_REGIONS ? map->count : SEG_MAX_REGIONS;
        while (low < high) {
            uint32_t middle = (low + high) / 2;
            const struct map_region *r = &map->region[middle];
            if (gpa < r->gpa) {
                high = middle;
            } else if (gpa - r->gpa >= r->size) {
                low = middle + 1;
            } else {
                *out = *(const volatile struct map_region *)r;
                found = 1;
                break;
            }
        }
        atomic_thread_fence(memory_order_acquire);
        if (__atomic_load_n(&seg->map_version, __ATOMIC_RELAXED) == version) {
            return found;
        }
    }
}

static bool in_guest(const struct seg_header *seg, uint64_t offset, uint64_t size)
{
    uint64_t end = seg->guest + seg->guest_pages * SEG_PAGE;
    return offset % SEG_PAGE == 0 && offset >= seg->guest && offset <= end && size <= end - offset;
}

static bool well_formed(const struct seg_header *seg, const struct memory_map *map)
{
    uint64_t end = 0;
    if (map->count > SEG_MAX_REGIONS) {
        return false;
    }
    for (uint32_t i = 0; i < map->count; i++) {
        const struct map_region *r = &map->region[i];
        if (r->gpa < end || r->gpa % SEG_PAGE || r->size == 0 || r->size % SEG_PAGE || r->gpa + r->size < r->gpa) {
            return false;
        }
        if ((r->flags & REGION_READ && !in_guest(seg, r->read_offset, r->size)) ||
            (r->flags & REGION_WRITE && !in_guest(seg, r->write_offset, r->size)) ||
            (uint64_t)r->first_reg + r->regs > SEG_MAX_REGS || r->host >= SEG_MAX_HOSTS || r->device >= SEG_MAX_DEVICES) {
            return false;
        }
        end = r->gpa + r->size;
    }
    return true;
}

/* map_lock is held */
static void enforce(struct seg_header *seg, int32_t self)
{
    uint64_t version = seg->map_version + 1;
    seg_store_sc(&seg->map_version, version);
    for (uint32_t i = 0; i < seg->vcpus; i++) {
        if ((int32_t)i != self && !seg_load_sc(&seg_vcpu(seg, i)->parked)) {
            vcpu_attend(seg, i, ATTN_MAP);
        }
    }
    for (uint32_t i = 0; i < seg->vcpus; i++) {
        const struct vcpu_block *v = seg_vcpu(seg, i);
        if ((int32_t)i == self) {
            continue;
        }
        for (int looks = 0; !seg_load_sc(&v->parked) && seg_load_sc(&v->map_ack) < version; looks++) {
            if (looks < YIELDS) {
                sched_yield();
            } else {
                nanosleep(&(struct timespec){0, NAP_NS}, NULL);
            }
        }
    }
}

int seg_map_publish(struct seg_header *seg, const struct memory_map *map, int32_t self)
{
    if (!well_formed(seg, map)) {
        return -1;
    }
    seg_lock(&seg->map_lock);
    memcpy(&seg_maps(seg)[(seg->map_version + 1) & 1], map, sizeof *map);
    enforce(seg, self);
    seg_unlock(&seg->map_lock);
    return 0;
}

void seg_map_republish(struct seg_header *seg, int32_t self)
{
    seg_lock(&seg->map_lock);
    memcpy(&seg_maps(seg)[(seg->map_version + 1) & 1], &seg_maps(seg)[seg->map_version & 1], sizeof(struct memory_map));
    enforce(seg, self);
    seg_unlock(&seg->map_lock);
}
