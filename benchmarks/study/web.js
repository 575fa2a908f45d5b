// SPDX-License-Identifier: Apache-2.0
// The same server as web.py.
"use strict";
const cache = new Map();
let count = 0;
require("http").createServer((request, response) => {
  count++;
  const [path, key] = request.url.split("?k=");
  let body;
  if (path === "/count") body = String(count);
  else if (path === "/put") {
    cache.set(key, { key, n: count, words: Array.from({ length: 20 }, (_, n) => `${key}-${n}`) });
    body = "ok";
  } else body = JSON.stringify(cache.get(key) || {});
  response.end(body);
}).listen(Number(process.argv[2]), "127.0.0.1");
