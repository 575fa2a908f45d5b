// SPDX-License-Identifier: Apache-2.0
// A program that lives on malloc and free: a table of blocks of mixed sizes, each step replaces some and writes to some.
// Run it with the C library's allocator, or with another one by LD_PRELOAD.  The number of steps is the first word of
// the shared file argv[2].
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define BLOCKS 60000

static uint64_t state = 88172645463325252ULL;
static uint64_t next(void) { state ^= state << 13; state ^= state >> 7; return state ^= state << 17; }

static size_t size_of(uint64_t r) {
  switch (r % 100) {
    case 0: return (16 << 10) + (r >> 40) % (16 << 10);
    case 1 ... 9: return 2048 + r % 6000;
    default: return 16 + r % 500;
  }
}

int main(int argc, char **argv) {
  if (argc != 3) { fprintf(stderr, "usage: churn MICROSECONDS COUNTER\n"); return 2; }
  int fd = open(argv[2], O_RDWR | O_CREAT, 0600);
  if (fd < 0 || ftruncate(fd, 4096)) { perror(argv[2]); return 1; }
  uint64_t *counter = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  static char *block[BLOCKS];
  static size_t size[BLOCKS];
  for (int n = 0; n < BLOCKS; n++) memset(block[n] = malloc(size[n] = size_of(next())), n, size[n]);
  struct timespec pause = {0, atol(argv[1]) * 1000L};
  for (;;) {
    for (int n = 0; n < 20; n++) {
      uint64_t at = next() % 8 ? next() % (BLOCKS / 8) : next() % BLOCKS;  // most of it in an eighth
      free(block[at]);
      size[at] = size_of(next());
      block[at] = malloc(size[at]);
      for (size_t k = 0; k + 8 <= size[at]; k += 8) memcpy(block[at] + k, (uint64_t[]){next()}, 8);
    }
    ++*counter;
    nanosleep(&pause, 0);
  }
}
