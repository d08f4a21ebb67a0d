#include "content.h"

uint64_t drawn(uint64_t n)
{
    uint64_t z = n * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* No two words of a disk are alike, whenever they were written: 32 bits of round, 8 of place, 15 of block, 9 of index. */
static uint64_t word_of(uint32_t round, unsigned place, unsigned block, unsigned index)
{
    return (uint64_t)round << 32 | (uint64_t)(place & 0xff) << 24 | (block & 0x7fff) << 9 | index;
}

void fill(uint64_t *data, uint32_t round, unsigned place, unsigned first, unsigned blocks)
{
    for (unsigned i = 0; i < blocks * BLOCK_WORDS; i++)
        data[i] = word_of(round, place, first + i / BLOCK_WORDS, i % BLOCK_WORDS);
}

size_t wrong(const uint64_t *data, uint32_t round, unsigned place, unsigned block)
{
    size_t count = 0;
    for (unsigned i = 0; i < BLOCK_WORDS; i++)
        for (uint64_t other = data[i] ^ word_of(round, place, block, i); other; other >>= 8)
            count += (other & 0xff) != 0;
    return count;
}
