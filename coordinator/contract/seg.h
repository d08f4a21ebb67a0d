/*
 * The contract as C files include it: layout, prototypes, and where things are in a mapped segment.
 */
#ifndef ATOLL_SEG_H
#define ATOLL_SEG_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "segment.h"
#include "fabric.h"

/* Words of the segment are plain integers so that Python can read the layout; C gives them their order here. */
#define seg_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define seg_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define seg_load_sc(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define seg_store_sc(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
#define seg_or(p, v) __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST)
#define seg_and(p, v) __atomic_fetch_and((p), (v), __ATOMIC_SEQ_CST)
#define seg_add(p, v) __atomic_fetch_add((p), (v), __ATOMIC_SEQ_CST)
#define seg_swap(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
#define seg_count(p) __atomic_store_n((p), *(p) + 1, __ATOMIC_RELAXED) /* a counter with one writer */

static inline void *seg_at(const struct seg_header *seg, uint64_t offset) { return (char *)(uintptr_t)seg + offset; }

static inline struct vcpu_block *seg_vcpu(const struct seg_header *seg, uint32_t i)
{
    return seg_at(seg, seg->vcpu_offset + seg->vcpu_stride * i);
}

static inline struct host_block *seg_host(const struct seg_header *seg, uint32_t i)
{
    return seg_at(seg, seg->host_offset + seg->host_stride * i);
}

static inline uint16_t *seg_ports(const struct seg_header *seg) { return seg_at(seg, seg->ports_offset); }
static inline struct reg_desc *seg_regs(const struct seg_header *seg) { return seg_at(seg, seg->regs_offset); }
static inline uint64_t *seg_shadows(const struct seg_header *seg) { return seg_at(seg, seg->shadow_offset); }
static inline struct memory_map *seg_maps(const struct seg_header *seg) { return seg_at(seg, seg->maps_offset); }
static inline struct fabric *seg_fabric(const struct seg_header *seg) { return seg_at(seg, seg->fabric_offset); }
static inline struct code_log *seg_code(const struct seg_header *seg) { return seg_at(seg, seg->code_offset); }
static inline uint8_t *seg_dirty(const struct seg_header *seg) { return seg_at(seg, seg->dirty_offset); }
static inline uint64_t *seg_code_masks(const struct seg_header *seg) { return seg_at(seg, seg->code_mask_offset); }

static inline void seg_pause(void) { __builtin_ia32_pause(); }

/* ---- attention.c: not for Python ---- */
long seg_futex(uint32_t *word, int op, uint32_t value, const void *timeout);
/* A lock word: 0 free, else the PID of who holds it << 1, bit 0: waited for. Held for nanoseconds. */
void seg_lock(uint32_t *word);
void seg_unlock(uint32_t *word);

#endif
