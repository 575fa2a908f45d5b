// SPDX-License-Identifier: Apache-2.0
// The same workload as workload_python.py, in JavaScript: /step?n=K and /state, "count x sum bad".
"use strict";
const http = require("http");
const N = 1 << 18;
const MULTIPLIER = 6364136223846793005n, INCREMENT = 1442695040888963407n;
const table = new BigUint64Array(N);
const strings = new Map();
let count = 0, x = 1n, bad = 0;

function step(n) {
  for (let i = 0; i < n; i++) {
    x = BigInt.asUintN(64, x * MULTIPLIER + INCREMENT);
    const at = Number((x >> 33n) % BigInt(N));
    table[at] = BigInt.asUintN(64, table[at] + x);
    count++;
    strings.set(count, x.toString());
  }
}

function show() {
  let sum = 0n;
  for (let i = 0; i < N; i++) if (table[i]) sum = BigInt.asUintN(64, sum + table[i] * BigInt(i + 1));
  if (strings.size !== count || (count && strings.get(count) !== x.toString())) bad++;
  return `${count} ${x} ${sum} ${bad}`;
}

setInterval(() => { if (JSON.parse(JSON.stringify([...Array(1000).keys()])).length !== 1000) bad++; }, 5);
http.createServer((request, response) => {
  const match = /^\/step\?n=(\d+)/.exec(request.url);
  if (match) step(Number(match[1]));
  response.setHeader("Connection", "close");
  response.end(show());
}).listen(Number(process.argv[2]), "127.0.0.1");
