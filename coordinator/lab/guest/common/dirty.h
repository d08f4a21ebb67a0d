/* A thread that writes guest memory at a set rate. */
#ifndef LAB_DIRTY_H
#define LAB_DIRTY_H

/* Writes one word in each page of ``mib`` MiB, in turn, ``rate`` MiB of pages a second. */
void dirty_memory(unsigned mib, unsigned rate);

/* Fills ``mib`` MiB once, with what no zero page is. */
void fill_memory(unsigned mib);

#endif
