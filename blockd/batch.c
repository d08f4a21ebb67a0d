/* See batch.h. System calls: preadv2(2), pwrite(2), posix_fadvise(2). */
#define _GNU_SOURCE
#include "batch.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* NBD protocol, "Transmission phase"; coordinator/contract/nbd.py has the same numbers. */
enum {
    REQUEST_MAGIC = 0x25609513,
    SIMPLE_REPLY_MAGIC = 0x67446698,
    STRUCTURED_REPLY_MAGIC = 0x668E33EF,
    COMMAND_READ = 0,
    COMMAND_WRITE = 1,
    CHUNK_DONE = 1,
    CHUNK_NONE = 0,
    CHUNK_OFFSET_DATA = 1,
    REQUEST_SIZE = 28,
    SIMPLE_SIZE = 16,
    CHUNK_SIZE = 20,
    OFFSET_SIZE = 8,
};

/* "Cluster mapping" */
#define COPIED (1ULL << 63)
#define COMPRESSED (1ULL << 62)
#define ZERO 1ULL
#define OFFSET 0x00FFFFFFFFFFFE00ULL

static uint16_t get16(const uint8_t *at)
{
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return be16toh(value);
}

static uint32_t get32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return be32toh(value);
}

static uint64_t get64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return be64toh(value);
}

static uint8_t *put16(uint8_t *at, uint16_t value)
{
    value = htobe16(value);
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

static uint8_t *put32(uint8_t *at, uint32_t value)
{
    value = htobe32(value);
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

static uint8_t *put64(uint8_t *at, uint64_t value)
{
    value = htobe64(value);
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

/* ---- planning ------------------------------------------------------------------------------------- */
/* The segments of the request being planned: from first to next. */
struct place {
    struct batch_segment *segments;
    uint32_t first, next;
};

/* False when there is no room for one more. */
static bool add(struct place *place, uint64_t host, uint32_t length, bool zero)
{
    if (place->next > place->first) {
        struct batch_segment *last = &place->segments[place->next - 1];
        if (last->zero == zero && (zero || last->host + last->length == host)) {
            last->length += length;
            return true;
        }
    }
    if (place->next == BATCH_SEGMENTS)
        return false;
    place->segments[place->next++] = (struct batch_segment){host, length, zero};
    return true;
}

/* Where one part of a cluster lies. False when that is not plain. */
static bool locate(const struct batch_tables *map, struct place *place, uint64_t offset, uint32_t length,
                   bool writes)
{
    uint64_t cluster = offset >> map->cluster_bits;
    uint64_t index = cluster >> map->table_bits;
    uint64_t inside = offset & ((1ULL << map->cluster_bits) - 1);
    if (index >= map->l1_size)
        return false;
    const uint64_t *table = (const uint64_t *)(uintptr_t)map->tables[index];
    if (!table)
        return !writes && !map->backed && !(map->l1[index] & OFFSET) && add(place, 0, length, true);
    uint64_t entry = table[cluster & ((1ULL << map->table_bits) - 1)];
    if (writes) {
        /* both tables and the cluster belong to the active disk alone */
        bool in_place = (entry & (COPIED | COMPRESSED | ZERO)) == COPIED && map->l1[index] & COPIED;
        return in_place && add(place, (entry & OFFSET) + inside, length, false);
    }
    if (entry & COMPRESSED)
        return false;
    if (entry & ZERO && map->zero_flag)
        return add(place, 0, length, true);
    if (entry & map->allocated)
        return add(place, (entry & OFFSET) + inside, length, false);
    return !map->backed && add(place, 0, length, true);
}

static bool locate_all(const struct batch_tables *map, struct place *place, uint64_t offset, uint32_t length,
                       bool writes)
{
    if (!map)
        return add(place, offset, length, false);
    while (length) {
        uint64_t rest = (1ULL << map->cluster_bits) - (offset & ((1ULL << map->cluster_bits) - 1));
        uint32_t piece = length < rest ? length : (uint32_t)rest;
        if (!locate(map, place, offset, piece, writes))
            return false;
        offset += piece;
        length -= piece;
    }
    return true;
}

static uint32_t reply_size(const struct batch *batch, const struct batch_request *request)
{
    if (request->writes)
        return batch->structured ? CHUNK_SIZE : SIMPLE_SIZE;
    return (batch->structured ? CHUNK_SIZE + OFFSET_SIZE : SIMPLE_SIZE) + request->length;
}

/* The request at this place of the input, and where the next one is; 0 when it is not whole, or more than a
 * read or write of bytes of the disk. */
static uint32_t parse(const struct batch *batch, uint32_t at, struct batch_request *request)
{
    if (batch->end - at < REQUEST_SIZE)
        return 0;
    const uint8_t *head = batch->input + at;
    uint16_t flags = get16(head + 4), command = get16(head + 6);
    *request = (struct batch_request){
        .cookie = get64(head + 8),
        .offset = get64(head + 16),
        .length = get32(head + 24),
        .payload = at + REQUEST_SIZE,
        .writes = command == COMMAND_WRITE,
    };
    if (get32(head) != REQUEST_MAGIC || flags || (command != COMMAND_READ && command != COMMAND_WRITE))
        return 0;
    if (!request->length || request->length > batch->size || request->offset > batch->size - request->length)
        return 0;
    if (!request->writes)
        return request->payload;
    if (request->offset < batch->writes_from || batch->end - request->payload < request->length)
        return 0;
    return request->payload + request->length;
}

uint32_t batch_plan(struct batch *batch, const struct batch_tables *tables)
{
    uint32_t at = batch->begin;
    struct place place = {batch->segments, 0, 0};
    batch->planned = 0;
    while (batch->planned < BATCH_REQUESTS) {
        struct batch_request *request = &batch->requests[batch->planned];
        uint32_t next = parse(batch, at, request);
        if (!next || (!request->writes && request->length > batch->output_size))
            break;
        place.first = place.next;
        if (!locate_all(tables, &place, request->offset, request->length, request->writes))
            break;
        request->segments = place.next - place.first;
        at = next;
        batch->planned++;
    }
    return batch->planned;
}

uint32_t batch_peek(struct batch *batch)
{
    uint32_t at = batch->begin;
    batch->planned = 0;
    while (batch->planned < BATCH_REQUESTS && (at = parse(batch, at, &batch->requests[batch->planned])))
        batch->planned++;
    return batch->planned;
}

/* ---- moving bytes --------------------------------------------------------------------------------- */
/* Let the kernel fetch at once what all requests from this one on will read: the first of them was not in
 * memory, and one after the other each would wait for the disk. */
static void announce(const struct batch *batch, uint32_t number, const struct batch_segment *segment)
{
    for (; number < batch->planned; segment += batch->requests[number++].segments)
        if (!batch->requests[number].writes)
            for (uint32_t n = 0; n < batch->requests[number].segments; n++)
                if (!segment[n].zero)
                    posix_fadvise(batch->fd, (off_t)segment[n].host, segment[n].length, POSIX_FADV_WILLNEED);
}

/* False when not all could be read. With *eager, whatever is not in memory is announced first. */
static bool read_all(const struct batch *batch, uint32_t number, const struct batch_segment *segment,
                     uint8_t *to, bool *eager)
{
    for (uint32_t n = 0; n < batch->requests[number].segments; n++) {
        uint64_t host = segment[n].host;
        uint32_t rest = segment[n].length;
        if (segment[n].zero) {
            memset(to, 0, rest);
            to += rest;
            continue;
        }
        while (rest) {
            struct iovec vector = {to, rest};
            ssize_t got = preadv2(batch->fd, &vector, 1, (off_t)host, *eager ? RWF_NOWAIT : 0);
            if (got <= 0 && *eager) {
                if (got < 0 && errno == EAGAIN)
                    announce(batch, number, segment);
                *eager = false;
                continue;
            }
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0)
                return false;
            to += got;
            host += (uint64_t)got;
            rest -= (uint32_t)got;
        }
    }
    return true;
}

static bool write_all(const struct batch *batch, const struct batch_request *request,
                      const struct batch_segment *segment)
{
    const uint8_t *from = batch->input + request->payload;
    for (uint32_t n = 0; n < request->segments; n++) {
        uint64_t host = segment[n].host;
        uint32_t rest = segment[n].length;
        while (rest) {
            ssize_t put = pwrite(batch->fd, from, rest, (off_t)host);
            if (put < 0 && errno == EINTR)
                continue;
            if (put <= 0)
                return false;
            from += put;
            host += (uint64_t)put;
            rest -= (uint32_t)put;
        }
    }
    return true;
}

static void put_head(const struct batch *batch, const struct batch_request *request, uint8_t *to)
{
    if (!batch->structured) {
        put64(put32(put32(to, SIMPLE_REPLY_MAGIC), 0), request->cookie);
        return;
    }
    to = put16(put32(to, STRUCTURED_REPLY_MAGIC), CHUNK_DONE);
    to = put64(put16(to, request->writes ? CHUNK_NONE : CHUNK_OFFSET_DATA), request->cookie);
    to = put32(to, request->writes ? 0 : OFFSET_SIZE + request->length);
    if (!request->writes)
        put64(to, request->offset);
}

uint32_t batch_run(struct batch *batch)
{
    const struct batch_segment *segment = batch->segments;
    bool eager = batch->planned > 1;
    batch->reads = batch->read_bytes = batch->writes = batch->write_bytes = 0;
    batch->done = 0;
    for (uint32_t number = 0; number < batch->planned && batch->ready < batch->enough; number++) {
        const struct batch_request *request = &batch->requests[number];
        uint8_t *reply = batch->output + batch->ready;
        uint32_t size = reply_size(batch, request);
        if (size > batch->output_size - batch->ready)
            break;
        if (request->writes) {
            if (!write_all(batch, request, segment))
                break;
            batch->writes++;
            batch->write_bytes += request->length;
            batch->begin = request->payload + request->length;
        } else {
            if (!read_all(batch, number, segment, reply + (size - request->length), &eager))
                break;
            batch->reads++;
            batch->read_bytes += request->length;
            batch->begin = request->payload;
        }
        put_head(batch, request, reply);
        batch->ready += size;
        segment += request->segments;
        batch->done++;
    }
    return batch->done;
}
