#define _GNU_SOURCE
#include "fat.h"

#include <string.h>
#include <unistd.h>

enum { SECTOR = 512, CLUSTER = 8, RESERVED = 8, ROOT_ENTRIES = 512, MEDIA = 0xf8 };

static void put(uint8_t *at, uint32_t value, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        at[i] = (uint8_t)(value >> 8 * i);
}

/* The FATs begin at a page, and so do the clusters where the FATs are whole pages: direct I/O reaches each. */
int make_fat(int fd, uint64_t bytes)
{
    static uint8_t sector[SECTOR];
    uint32_t sectors = (uint32_t)(bytes / SECTOR);
    uint32_t fat = ((sectors / CLUSTER + 2) * 2 + SECTOR - 1) / SECTOR;
    fat = (fat + 7) & ~7u;
    memcpy(sector, "\xeb\x3c\x90" "ATOLL   ", 11);
    put(sector + 11, SECTOR, 2);
    put(sector + 13, CLUSTER, 1);
    put(sector + 14, RESERVED, 2);
    put(sector + 16, 2, 1); /* FATs */
    put(sector + 17, ROOT_ENTRIES, 2);
    put(sector + 21, MEDIA, 1);
    put(sector + 22, fat, 2);
    put(sector + 24, 63, 2); /* sectors a track, heads */
    put(sector + 26, 16, 2);
    put(sector + 32, sectors, 4); /* more than 65535, or not: this field may be used for either */
    put(sector + 36, 0x80, 1);
    put(sector + 38, 0x29, 1);
    memcpy(sector + 43, "LAB        FAT16   ", 19);
    put(sector + 510, 0xaa55, 2);
    if (pwrite(fd, sector, SECTOR, 0) != SECTOR)
        return -1;
    memset(sector, 0, SECTOR);
    put(sector, 0xff00 | MEDIA, 2);
    put(sector + 2, 0xffff, 2);
    for (unsigned copy = 0; copy < 2; copy++)
        if (pwrite(fd, sector, SECTOR, (off_t)(RESERVED + copy * fat) * SECTOR) != SECTOR)
            return -1;
    return fsync(fd);
}
