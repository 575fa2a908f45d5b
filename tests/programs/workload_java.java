// SPDX-License-Identifier: Apache-2.0
// The same workload as workload_python.py, in Java: /step?n=K and /state, "count x sum bad".

import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.HashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.atomic.AtomicInteger;

public class WorkloadJava {
    static final int N = 1 << 18;
    static final long[] table = new long[N];
    static final HashMap<Long, Long> history = new HashMap<>();
    static final AtomicInteger bad = new AtomicInteger();
    static long count = 0, x = 1;

    static synchronized String serve(String query) {
        int n = query == null ? 0 : Integer.parseInt(query.substring(2));
        for (int i = 0; i < n; i++) {
            x = x * 6364136223846793005L + 1442695040888963407L;
            table[(int) ((x >>> 33) % N)] += x;
            count++;
            history.put(count, x);
        }
        long sum = 0;
        for (int i = 0; i < N; i++) sum += table[i] * (i + 1);
        if (history.size() != count || (count > 0 && history.get(count) != x)) bad.incrementAndGet();
        return count + " " + Long.toUnsignedString(x) + " " + Long.toUnsignedString(sum) + " " + bad;
    }

    static void worker() {
        while (true) {
            long sum = 0;
            int[] data = new int[10000];
            for (int i = 0; i < data.length; i++) data[i] = i;
            for (int value : data) sum += value;
            if (sum != 49995000) bad.incrementAndGet();
            try { Thread.sleep(2); } catch (InterruptedException e) { bad.incrementAndGet(); }
        }
    }

    public static void main(String[] args) throws Exception {
        for (int i = 0; i < 2; i++) {
            Thread thread = new Thread(WorkloadJava::worker);
            thread.setDaemon(true);
            thread.start();
        }
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", Integer.parseInt(args[0])), 16);
        server.createContext("/", exchange -> {
            byte[] body = serve(exchange.getRequestURI().getQuery()).getBytes();
            exchange.getResponseHeaders().add("Connection", "close");
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        server.setExecutor(Executors.newFixedThreadPool(2));
        server.start();
    }
}
