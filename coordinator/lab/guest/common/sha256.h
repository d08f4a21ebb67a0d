/* SHA-256 (FIPS 180-4) of data whose length is a multiple of 64 bytes. */
#ifndef LAB_SHA256_H
#define LAB_SHA256_H

#include <stddef.h>
#include <stdint.h>

struct sha256 {
    uint32_t state[8];
    uint64_t bytes;
};

void sha256_begin(struct sha256 *sha);
void sha256_add(struct sha256 *sha, const uint8_t *data, size_t bytes);
/* 64 hexadecimal digits and a zero. */
void sha256_end(struct sha256 *sha, char *hex);

#endif
