/* What is written where, from the number of a round alone. */
#ifndef LAB_CONTENT_H
#define LAB_CONTENT_H

#include <stddef.h>
#include <stdint.h>

enum { BLOCK = 4096, BLOCK_WORDS = BLOCK / 8 };

/* Random numbers by counter: the finalizer of SplitMix64 (Steele, Lea, Flood 2014). */
uint64_t drawn(uint64_t n);

/* ``blocks`` blocks that round ``round`` writes at block ``first`` of place ``place``. */
void fill(uint64_t *data, uint32_t round, unsigned place, unsigned first, unsigned blocks);

/* How many bytes of one block are not as ``round`` wrote them. */
size_t wrong(const uint64_t *data, uint32_t round, unsigned place, unsigned block);

#endif
