// SPDX-License-Identifier: Apache-2.0
// The same server as web.py.

import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.atomic.AtomicLong;

public class Web {
    static final ConcurrentHashMap<String, List<String>> cache = new ConcurrentHashMap<>();
    static final AtomicLong count = new AtomicLong();

    static String answer(String path, String query) {
        long n = count.incrementAndGet();
        if (path.equals("/count")) return String.valueOf(n);
        String key = query == null ? "" : query.substring(2);
        if (path.equals("/put")) {
            List<String> words = new ArrayList<>();
            for (int i = 0; i < 20; i++) words.add(key + "-" + i);
            cache.put(key, words);
            return "ok";
        }
        return String.join(",", cache.getOrDefault(key, List.of()));
    }

    public static void main(String[] args) throws Exception {
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", Integer.parseInt(args[0])), 0);
        server.createContext("/", exchange -> {
            byte[] body = answer(exchange.getRequestURI().getPath(), exchange.getRequestURI().getQuery()).getBytes();
            exchange.sendResponseHeaders(200, body.length == 0 ? -1 : body.length);
            if (body.length > 0) exchange.getResponseBody().write(body);
            exchange.close();
        });
        server.setExecutor(Executors.newFixedThreadPool(2));
        server.start();
    }
}
