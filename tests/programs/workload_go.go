// SPDX-License-Identifier: Apache-2.0

// The same workload as workload_python.py, in Go: /step?n=K and /state, "count x sum bad".
package main

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const entries = 1 << 18

var (
	mutex   sync.Mutex
	table   [entries]uint64
	history = map[uint64]uint64{}
	count   uint64
	x       uint64 = 1
	bad     int64
)

func step(n int) {
	for i := 0; i < n; i++ {
		x = x*6364136223846793005 + 1442695040888963407
		table[(x>>33)%entries] += x
		count++
		history[count] = x
	}
}

func show() string {
	var sum uint64
	for i, value := range table {
		sum += value * uint64(i+1)
	}
	if uint64(len(history)) != count || (count > 0 && history[count] != x) {
		atomic.AddInt64(&bad, 1)
	}
	return fmt.Sprintf("%d %d %d %d", count, x, sum, atomic.LoadInt64(&bad))
}

func worker() {
	for {
		data := make([]int, 10000)
		for i := range data {
			data[i] = i
		}
		sum := 0
		for _, value := range data {
			sum += value
		}
		if sum != 49995000 {
			atomic.AddInt64(&bad, 1)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func main() {
	for i := 0; i < 3; i++ {
		go worker()
	}
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		mutex.Lock()
		defer mutex.Unlock()
		if n, err := strconv.Atoi(r.URL.Query().Get("n")); err == nil {
			step(n)
		}
		w.Header().Set("Connection", "close")
		fmt.Fprint(w, show())
	})
	panic(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}
