/* Integer kernels: SHA-256 (FIPS 180-4), quicksort, indirect calls. */
#include <stddef.h>
#include <string.h>

#include "bench.h"

/* --- sha256: rotates, adds, loads; no branch to miss ------------------------------------------- */

enum { SHA_BYTES = 7 << 20 };

static uint8_t *message;
static uint32_t round_constant[64];

static uint32_t root_bits(unsigned prime) /* first 32 bits of the fraction of a prime's cube root */
{
    /* The largest x with x^3 <= prime * 2^96, by bisection; FIPS 180-4 section 4.2.2. */
    unsigned __int128 low = 0, high = (uint64_t)1 << 36;
    while (high - low > 1) {
        unsigned __int128 middle = (low + high) / 2;
        if (middle * middle * middle <= (unsigned __int128)prime << 96)
            low = middle;
        else
            high = middle;
    }
    return (uint32_t)low;
}

static void sha_setup(void)
{
    unsigned count = 0;
    for (unsigned candidate = 2; count < 64; candidate++) {
        unsigned divisor = 2;
        while (candidate % divisor)
            divisor++;
        if (divisor == candidate)
            round_constant[count++] = root_bits(candidate);
    }
    message = allocate(SHA_BYTES);
    uint64_t state = 1;
    for (uint32_t i = 0; i < SHA_BYTES; i++)
        message[i] = (uint8_t)next_random(&state);
}

static inline uint32_t rotate(uint32_t value, int count)
{
    return value >> count | value << (32 - count);
}

static void sha_block(uint32_t hash[8], const uint8_t *block)
{
    uint32_t w[64];
    for (int i = 0; i < 16; i++) {
        uint32_t word;
        memcpy(&word, block + 4 * i, 4);
        w[i] = __builtin_bswap32(word);
    }
    for (int i = 16; i < 64; i++) {
        uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = hash[0], b = hash[1], c = hash[2], d = hash[3];
    uint32_t e = hash[4], f = hash[5], g = hash[6], h = hash[7];
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + round_constant[i] + w[i];
        uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
        uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g; g = f; f = e; e = d + t1;
        d = c; c = b; b = a; a = t1 + t2;
    }
    hash[0] += a; hash[1] += b; hash[2] += c; hash[3] += d;
    hash[4] += e; hash[5] += f; hash[6] += g; hash[7] += h;
}

static uint64_t sha_run(void)
{
    uint32_t hash[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };
    for (uint32_t offset = 0; offset < SHA_BYTES; offset += 64)
        sha_block(hash, message + offset);
    return (uint64_t)hash[0] << 32 | hash[1];
}

/* --- qsort: calls, returns, branches that cannot be predicted ------------------------------------ */

enum { SORT_ITEMS = 1300000 };

static uint32_t *items, *shuffled;

static void sort_setup(void)
{
    items = allocate(SORT_ITEMS * sizeof *items);
    shuffled = allocate(SORT_ITEMS * sizeof *items);
    uint64_t state = 2;
    for (uint32_t i = 0; i < SORT_ITEMS; i++)
        shuffled[i] = (uint32_t)next_random(&state);
}

static int compare(const uint32_t *a, const uint32_t *b)
{
    return *a < *b ? -1 : *a > *b;
}

static int (*volatile compare_through)(const uint32_t *, const uint32_t *) = compare;

static void sort(uint32_t *first, uint32_t *last) /* both inclusive */
{
    while (first < last) {
        uint32_t pivot = first[(last - first) / 2], *left = first, *right = last;
        while (left <= right) {
            while (compare_through(left, &pivot) < 0)
                left++;
            while (compare_through(right, &pivot) > 0)
                right--;
            if (left <= right) {
                uint32_t other = *left;
                *left++ = *right;
                *right-- = other;
            }
        }
        sort(first, right);
        first = left;
    }
}

static uint64_t sort_run(void)
{
    memcpy(items, shuffled, SORT_ITEMS * sizeof *items);
    sort(items, items + SORT_ITEMS - 1);
    uint64_t check = 0;
    for (uint32_t i = 0; i < SORT_ITEMS; i++)
        check = mix(check, items[i]);
    return check;
}

/* --- icall: indirect calls, as interpreters and virtual methods make them ------------------------ */

enum { CALLS = 30000000 };

static uint64_t call_add(uint64_t x) { return x + 0x1234567; }
static uint64_t call_xor(uint64_t x) { return x ^ 0x5bd1e995; }
static uint64_t call_rotate(uint64_t x) { return x << 13 | x >> 51; }
static uint64_t call_multiply(uint64_t x) { return x * 0x100000001b3; }
static uint64_t call_shift(uint64_t x) { return x ^ x >> 7; }
static uint64_t call_subtract(uint64_t x) { return x - 0x7654321; }
static uint64_t call_not(uint64_t x) { return ~x; }
static uint64_t call_swap(uint64_t x) { return __builtin_bswap64(x); }

static uint64_t (*const volatile methods[])(uint64_t) = {
    call_add, call_xor, call_rotate, call_multiply, call_shift, call_subtract, call_not, call_swap,
};

static uint64_t call_run(void)
{
    uint64_t value = 1;
    for (uint32_t i = 0; i < CALLS; i++)
        value = methods[i * 5 % 8](value);
    return value;
}

const struct kernel integer_kernels[] = {
    {"sha256", "integer", sha_setup, sha_run},
    {"qsort", "calls, branches", sort_setup, sort_run},
    {"icall", "indirect calls", NULL, call_run},
    {0},
};
