// SPDX-License-Identifier: Apache-2.0
//
// bench_target DIRECTORY MEGABYTES thp|4k
//
// Holds that much incompressible anonymous memory and obeys lines from DIRECTORY/cmd, answering on DIRECTORY/rep:
//   dirty PERMILLE SEED [BYTES]
//                         write 8 (or so many) bytes to that share of the pages, scattered; answers nanoseconds taken
//   work SECONDS_MS SEED  write to random pages for so long; answers writes done
//   sum                   a checksum of all memory
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static uint64_t next(uint64_t *x)
{
	*x ^= *x << 13;
	*x ^= *x >> 7;
	*x ^= *x << 17;
	return *x;
}

int main(int argc, char **argv)
{
	char path[512], line[128], answer[64];
	if (argc < 4)
		return 2;
	size_t size = (size_t)atol(argv[2]) << 20, nr_pages = size / 4096;
	char *raw = mmap(NULL, size + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *memory = (char *)(((uintptr_t)raw + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
	madvise(memory, size, argv[3][0] == 't' ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	uint64_t x = 88172645463325252ULL;
	for (size_t i = 0; i < size / 8; i++)
		((uint64_t *)memory)[i] = next(&x);
	snprintf(path, sizeof path, "%s/cmd", argv[1]);
	int in = open(path, O_RDONLY);
	snprintf(path, sizeof path, "%s/rep", argv[1]);
	int out = open(path, O_WRONLY);
	for (;;) {
		size_t n = 0;
		while (n < sizeof line - 1 && read(in, line + n, 1) == 1 && line[n] != '\n')
			n++;
		if (n == 0)
			return 0;
		line[n] = 0;
		unsigned long a = 0, b = 1, bytes = 8, result = 0;
		char verb[16] = "";
		sscanf(line, "%15s %lu %lu %lu", verb, &a, &b, &bytes);
		uint64_t start = now();
		x = b * 0x9E3779B97F4A7C15ULL + 1;
		if (!strcmp(verb, "dirty")) {
			// an odd stride visits every page once: exactly the share asked for, scattered
			size_t stride = (size_t)(nr_pages * 0.381966) | 1, at = b % nr_pages;
			for (size_t i = 0; i < nr_pages * a / 1000; i++, at = (at + stride) % nr_pages)
				for (size_t word = 0; word < bytes / 8 && word < 512; word++)
					((volatile uint64_t *)(memory + at * 4096))[word] = next(&x);
			result = now() - start;
		} else if (!strcmp(verb, "work")) {
			uint64_t end = start + a * 1000000ULL;
			while (now() < end)
				for (int i = 0; i < 256; i++, result++)
					((volatile uint64_t *)(memory + next(&x) % nr_pages * 4096))[1] = x;
		} else if (!strcmp(verb, "sum")) {
			for (size_t i = 0; i < size / 8; i++)
				result = result * 31 + ((uint64_t *)memory)[i];
			result >>= 8;
		}
		int len = snprintf(answer, sizeof answer, "%lu\n", result);
		if (write(out, answer, len) != len)
			return 0;
	}
}
