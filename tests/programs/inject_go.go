// SPDX-License-Identifier: Apache-2.0
// A Go program: goroutines that sleep, spin, talk over channels and collect garbage, checking themselves.
package main

import (
	"encoding/binary"
	"os"
	"runtime"
	"syscall"
	"time"
)

func main() {
	file, err := os.OpenFile(os.Args[1], os.O_RDWR, 0)
	if err != nil {
		os.Exit(3)
	}
	shm, err := syscall.Mmap(int(file.Fd()), 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		os.Exit(3)
	}
	put := func(at int, value uint64) { binary.LittleEndian.PutUint64(shm[at:], value) }
	var errors uint64
	numbers := make(chan int)
	go func() {
		for n := 0; ; n++ {
			numbers <- n
		}
	}()
	go func() {
		for {
			junk := make([]byte, 1<<16)
			junk[len(junk)-1] = 1
			runtime.KeepAlive(junk)
			time.Sleep(200 * time.Microsecond)
		}
	}()
	put(0, 1)
	for n := uint64(0); ; n++ {
		start := time.Now()
		time.Sleep(2 * time.Millisecond)
		if time.Since(start) < 2*time.Millisecond {
			errors++
		}
		for k := 0; k < 100; k++ {
			if <-numbers != int(n)*100+k {
				errors++
			}
		}
		put(16, errors)
		put(8, n+1)
		if binary.LittleEndian.Uint64(shm[24+256:]) != 0 {
			return
		}
	}
}
