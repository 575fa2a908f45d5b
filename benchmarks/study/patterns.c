// SPDX-License-Identifier: Apache-2.0
// Mappings made beside clean ones, a step at each line on stdin or each N milliseconds.
//
//   pair    [!SD][SD]        a new mapping behind a clean one
//   triple  [!SD][SD][!SD]   a new mapping in the hole between two clean ones
//   chain   [!SD][SD][SD]... a clean one grows by one neighbour after the other
//   heap    brk              the heap grows by a little
//
// Each step writes one page of the old memory, and the new memory whole.  The number of steps so far is the first
// word of the shared file argv[3], for a throughput probe.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define OLD 4096UL  // pages of each old mapping: 16 MiB
#define NEW 16UL
#define SLOTS 16

static char *base = (char *)0x700000000000;
static uint64_t *counter;

static char *map(char *at, unsigned long pages) {
  char *found = mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (found == MAP_FAILED) { perror("mmap"); exit(1); }
  return found;
}

static void fill(char *at, unsigned long pages, uint64_t seed) {
  for (unsigned long page = 0; page < pages; page++)
    for (unsigned long n = 0; n < PAGE / 8; n++)
      ((uint64_t *)(at + page * PAGE))[n] = (seed += 0x9e3779b97f4a7c15) ^ seed >> 29;
}

int main(int argc, char **argv) {
  if (argc != 4) { fprintf(stderr, "usage: patterns pair|triple|chain|heap MILLISECONDS COUNTER\n"); return 2; }
  int fd = open(argv[3], O_RDWR | O_CREAT, 0600);
  if (fd < 0 || ftruncate(fd, PAGE)) { perror(argv[3]); return 1; }
  counter = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  const char *kind = argv[1];
  struct timespec pause = {atoi(argv[2]) / 1000, atoi(argv[2]) % 1000 * 1000000L};
  int triple = !strcmp(kind, "triple"), chain = !strcmp(kind, "chain"), heap = !strcmp(kind, "heap");
  // slots of [old][room][old], far from one another
  unsigned long stride = (2 * OLD + NEW * SLOTS + 4096) * PAGE;
  int nr_slots = heap ? 0 : 4;
  for (int slot = 0; slot < nr_slots; slot++) {
    fill(map(base + slot * stride, OLD), OLD, slot + 1);
    if (triple) fill(map(base + slot * stride + (OLD + NEW) * PAGE, OLD), OLD, slot + 101);
  }
  char *first = heap ? sbrk(4 * OLD * PAGE) : 0;
  if (heap) fill(first, 4 * OLD, 7);
  for (uint64_t step = 0;; step++) {
    int slot = nr_slots ? step % nr_slots : 0;
    char *old = base + slot * stride, *room = old + OLD * PAGE;
    unsigned long link = chain ? step / 4 % SLOTS : 0;
    if (heap) {
      fill(sbrk(NEW * PAGE), NEW, step);
      first[step * 7919 % (4 * OLD) * PAGE] = step;
      if (step % 256 == 255) sbrk(-256 * (long)(NEW * PAGE));
    } else {
      if (chain ? link == 0 : 1) munmap(room, (chain ? SLOTS : 1) * NEW * PAGE);
      fill(map(room + link * NEW * PAGE, NEW), NEW, step);
      old[step * 7919 % OLD * PAGE] = step;
    }
    counter[0] = step + 1;
    nanosleep(&pause, 0);
  }
}
