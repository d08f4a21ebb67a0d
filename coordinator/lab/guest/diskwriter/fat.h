/* A FAT16 volume on a medium of zeros. Source: Microsoft, FAT: General Overview of On-Disk Format, 1.03. */
#ifndef LAB_FAT_H
#define LAB_FAT_H

#include <stdint.h>

/* Makes one of ``bytes`` at the beginning of ``fd``; 0, or -1 with errno. From 24 to 128 MiB. */
int make_fat(int fd, uint64_t bytes);

#endif
