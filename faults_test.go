package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// wantHealth waits until /health says a status with the words given for the database and the cache.
func (s *testServer) wantHealth(code int, status, database, cache string) {
	s.t.Helper()
	want := fmt.Sprintf(`{"status":%q,"database":%q,"cache":%q,`, status, database, cache)
	eventually(s.t, "health says "+want, func() bool {
		a := must(s.send("GET", "/health", ""))
		within(s.t, a.took, 2*time.Second, "GET /health")
		return a.status == code && strings.HasPrefix(a.body, want)
	})
}

// everything uses every endpoint as if nothing were wrong, but for /cache/clear, and returns the slowest answer.
func (s *testServer) everything() (slowest time.Duration) {
	path := s.create(`{"name":"a","price":1}`)
	for _, get := range []string{"/", "/services", "/stats", "/products", "/products?limit=5", path} {
		slowest = max(slowest, s.want(200, "GET", get, "").took)
	}
	return max(slowest, s.want(200, "PUT", path, `{"stock":7}`).took, s.want(204, "DELETE", path, "").took)
}

// TestRedisFails lets Redis fill up, stops it, silences it, and brings it back. All but /cache/clear always works.
func TestRedisFails(t *testing.T) {
	s := startAlone(t)
	back := func(limit time.Duration) {
		t.Helper()
		within(t, s.awaitHit("/products", ""), limit, "the return of the cache")
		s.wantHealth(200, "healthy", "connected", "connected")
		s.want(200, "DELETE", "/cache/clear", "")
	}
	gone := func() {
		t.Helper()
		s.wantHealth(200, "degraded", "connected", "disconnected")
		s.read("/products", "", bypass)
		s.want(503, "DELETE", "/cache/clear", "")
	}
	back(2 * time.Second)

	s.redis.do("CONFIG SET maxmemory 1")
	s.everything()
	s.read("/products", "", bypass)
	s.redis.do("CONFIG SET maxmemory 0")
	back(2 * time.Second)

	s.redis.kill()
	s.everything()
	gone()
	// Without Redis the listener's connection is still checked, and kept.
	before := ask[int](s.psql, `SELECT min(pid) `+listeners)
	time.Sleep(3 * time.Second) // longer than it waits for an answer
	equal(t, "who listens", ask[int](s.psql, `SELECT min(pid) `+listeners), before)
	s.redis.launch()
	back(settleTime + 3*time.Second)

	s.redis.signal(syscall.SIGSTOP)
	// The first request waits for Redis once, and not for longer than a command may take.
	within(t, s.want(200, "GET", "/products", "").took, redisTimeout+redisTimeout/2, "the first request")
	within(t, s.everything(), redisTimeout, "a request that had no need to wait for the silent Redis")
	gone()
	s.redis.signal(syscall.SIGCONT)
	back(2 * time.Second)
}

// TestUnusualRedis has a Redis that lacks memory, then one that cannot write its snapshot, then one that holds very many
// other keys. The service uses each of them.
func TestUnusualRedis(t *testing.T) {
	s := startAlone(t)
	must(s.db.Exec(insertLarge, 2000))
	info := func(section, field string) string {
		return infoField(string(s.redis.do("INFO", section).([]byte)), field)
	}

	// It has no memory for the list: that is no reason to doubt what it holds.
	s.awaitHit("/products/1", "")
	epoch := s.cache.trust.epoch.Load()
	s.redis.do("CONFIG SET maxmemory", must(strconv.Atoi(info("memory", "used_memory")))+1<<20)
	for range 5 {
		s.read("/products", `"next":"/products?after=`)
	}
	s.redis.do("CONFIG SET maxmemory 0")
	s.read("/products/1", "", hit)
	equal(t, "the epoch", s.cache.trust.epoch.Load(), epoch)

	// It cannot write its snapshot, because a directory has the file's name. With a setting that every way to start Redis
	// has, the cache stays in use.
	for _, file := range []string{"docker-compose.yml", "docker-stack.yml", "scripts/lib.sh"} {
		setting := regexp.MustCompile(`--stop-writes-on-bgsave-error\W+no\b`)
		expect(t, setting.Match(must(os.ReadFile(file))), "Redis refuses writes as %s starts it", file)
	}
	check(os.Mkdir(folder+"/"+s.redis.port, 0o700))
	s.redis.do("CONFIG SET save", "3600 1")
	s.redis.do("CONFIG SET stop-writes-on-bgsave-error no")
	s.redis.do("BGSAVE")
	eventually(t, "the snapshot has failed", func() bool { return info("persistence", "rdb_last_bgsave_status") == "err" })
	s.everything()
	s.read("/products", "", miss)
	s.read("/products", "", hit)

	// It holds very many keys of others: to clear the cache is bounded and uses no more connections. Redis must never be
	// busy for as long as redisTimeout.
	for i := range 300 {
		s.redis.do("EVAL", `for i = 1, 1000 do redis.call('SET', 'other:' .. ARGV[1] .. ':' .. i, '') end`, 0, i)
	}
	s.cache.trust.distrust(errors.New("the test says so"))
	within(t, s.awaitHit("/products/1", ""), 5*time.Second, "the return of the cache")
	concurrently(20, func(int) {
		a, err := s.send("DELETE", "/cache/clear", "")
		expect(t, err == nil && (a.status == 200 || a.status == 503), "clearing: %d %v", a.status, err)
		within(t, a.took, 6*time.Second, "clearing")
	})()
	clients := string(s.redis.do("CLIENT LIST").([]byte))
	expect(t, strings.Count(clients, "\n") <= 2, "more connections than the service's and this one:\n%s", clients)
	expect(t, s.redis.do("DBSIZE").(int64) >= 300_000, "keys of others are gone")
}

// TestRedisUnfit gives the service Redis servers that it cannot use: everything works without them. Once they are
// mended, they are used.
func TestRedisUnfit(t *testing.T) {
	own := alone(t)
	startServer(t, own)
	const version6 = "version 6"
	for unfit, mended := range map[string]string{
		"CONFIG SET maxmemory-policy allkeys-lru": "CONFIG SET maxmemory-policy noeviction",
		"CONFIG SET maxmemory 1":                  "CONFIG SET maxmemory 0",
		"REPLICAOF 127.0.0.1 " + own.redisPort:    "REPLICAOF NO ONE",
		"CONFIG SET requirepass secret":           "", // only who knows the password can mend that
		version6:                                  "",
	} {
		t.Run(unfit, func(t *testing.T) {
			t.Parallel()
			own := own.withNewRedis(t)
			if unfit != version6 {
				own.redis.do(unfit)
			}
			startProxy(t, &own.redisPort, func(data []byte) {
				if i := bytes.Index(data, []byte("redis_version:")); i >= 0 && unfit == version6 {
					copy(data[i:], "redis_version:6.")
				}
			})
			s := startReplica(t, own)
			for range 3 {
				time.Sleep(2 * heartbeat) // time to win trust
				within(t, s.everything(), 2*time.Second, "a request")
				s.read("/products", "", bypass)
			}
			if mended != "" {
				s.redis.do(mended)
				s.awaitHit("/products", "")
			}
		})
	}
}

// TestSlowRedis has a Redis that takes 300 ms for an answer: slow, but right.
func TestSlowRedis(t *testing.T) {
	own := alone(t)
	own.redis.do("CONFIG SET requirepass secret")
	own.redisPassword = "secret"
	startProxy(t, &own.redisPort, func([]byte) { time.Sleep(150 * time.Millisecond) }) // each way
	s := startServer(t, own)
	path := s.create(`{"name":"a","price":1}`)
	for stock := range 3 {
		s.want(200, "PUT", path, fmt.Sprintf(`{"stock":%d}`, stock))
		s.read(path, stockIs(stock))
	}
	s.awaitHit(path, "")
}

// TestPostgresFails stops PostgreSQL and starts it again: errors that say so at once, then back by itself.
func TestPostgresFails(t *testing.T) {
	s := startServer(t, ownServers(t))
	path := s.create(`{"name":"a","price":1}`)
	s.awaitHit(path, "")

	t.Cleanup(startPostgres) // also if the test fails before that
	pgCtl(nil, "stop", "-m", "immediate")
	eventually(t, "trust has ended", func() bool { return !s.cache.Trusted() })
	wantAllUnavailable(t, s, time.Second)
	s.want(200, "GET", "/", "")
	s.want(200, "GET", "/services", "")
	s.wantHealth(503, "unhealthy", "disconnected", "connected")

	startPostgres()
	back := time.Now()
	eventually(t, "a write works", func() bool { return must(s.send("PUT", path, `{"stock":2}`)).status == 200 })
	s.awaitHit(path, "")
	within(t, time.Since(back), 2*time.Second, "the return")
	s.wantHealth(200, "healthy", "connected", "connected")
	s.read(path, `"stock":2`)
}

// TestPostgresSilent has a PostgreSQL that accepts connections and does not answer, since the start of the service or
// later, as after a SIGSTOP: a proxy passes nothing on.
func TestPostgresSilent(t *testing.T) {
	twice(t, "since the start", func(t *testing.T, sinceStart bool) {
		own := alone(t)
		proxy := startProxy(t, &own.postgresPort, nil)
		proxy.pause(sinceStart)
		s := startReplica(t, own)
		if !sinceStart {
			s.awaitHit("/products", "")
			s.everything()
			proxy.pause(true)
		}
		wantAllUnavailable(t, s, 6*time.Second)
		s.wantHealth(503, "unhealthy", "disconnected", "connected")
		proxy.pause(false)
		// The keys of the writes whose outcome nobody knows stay empty until their marks expire; a new product has none.
		path := ""
		eventually(t, "a write works", func() bool {
			path = must(s.send("POST", "/products", `{"name":"b","price":1}`)).header.Get("Location")
			return path != ""
		})
		s.awaitHit(path, "")
		// What was never acknowledged may have happened, but not twice.
		more := ask[int](s.psql, `SELECT count(*) - count(DISTINCT name) FROM products WHERE name LIKE 'silent%'`)
		equal(t, "products that were created twice", more, 0)
	})
}

// wantAllUnavailable sends what needs PostgreSQL, all at once, and wants an error that says so, within a limit.
func wantAllUnavailable(t *testing.T, s *testServer, limit time.Duration) {
	requests := []struct{ method, path, body string }{
		{"GET", "/products", ""}, {"GET", "/products/1", ""}, {"GET", "/products?limit=1", ""}, {"GET", "/stats", ""},
		{"POST", "/products", `{"name":"silent#","price":1}`}, {"PUT", "/products/1", `{"stock":1}`},
		{"DELETE", "/products/1", ""},
	}
	concurrently(10*len(requests), func(i int) { // more than the pool has connections
		c := requests[i%len(requests)]
		a := s.want(503, c.method, c.path, strings.Replace(c.body, "#", strconv.Itoa(i), 1))
		within(t, a.took, limit, c.method+" "+c.path)
		a.contains("database unavailable")
		known := !strings.Contains(a.body, "may have been made")
		equal(t, "whether the outcome is known and Retry-After is sent", a.header.Get("Retry-After") != "", known)
	})()
}

// TestPoolExhausted holds every connection: requests end in bounded time with a clear status.
func TestPoolExhausted(t *testing.T) {
	s := startAlone(t)
	defer s.takePool()()
	s.wantHealth(200, "healthy", "connected", "connected")
	wantAllUnavailable(t, s, 6*time.Second)
}

// TestServerWithoutTLS answers like a server without TLS: the service closes its first connection. Other tests show
// that it connects again in the clear, because their PostgreSQL has no TLS. Here the next connections get an answer
// that is not PostgreSQL's, and the service says that the database is unavailable.
func TestServerWithoutTLS(t *testing.T) {
	own := servers{config: testConfig()}
	server := must(net.Listen("tcp", "127.0.0.1:0"))
	defer server.Close()
	_, own.postgresPort, _ = net.SplitHostPort(server.Addr().String())
	s := startReplica(t, own)
	first := must(server.Accept())
	defer first.Close()
	check(first.SetDeadline(time.Now().Add(5 * time.Second)))
	must(io.ReadFull(first, make([]byte, 8))) // an SSLRequest
	must(first.Write([]byte("N")))
	_, err := first.Read(make([]byte, 1))
	expect(t, err != nil && !errors.Is(err, os.ErrDeadlineExceeded), "the first connection was left open: %v", err)
	go func() {
		for conn, err := server.Accept(); err == nil; conn, err = server.Accept() {
			_, _ = conn.Write([]byte("X\x00\x00\x00\x04"))
		}
	}()
	wantAllUnavailable(t, s, 6*time.Second)
}

// TestServersMissingAtStart starts the service before there is a Redis or a database.
func TestServersMissingAtStart(t *testing.T) {
	own := alone(t)
	own.redis.kill()
	db := psql(t, testConfig())
	must(db.Exec("DROP DATABASE " + own.postgresDB))
	p := startProcess(t, os.Args[0], own.config)
	p.wantHealth(503, "unhealthy", "disconnected", "disconnected")
	p.want(503, "GET", "/products", "")
	must(db.Exec("CREATE DATABASE " + own.postgresDB))
	p.wantHealth(200, "degraded", "connected", "disconnected")
	p.read("/products", "", bypass)
	own.redis.launch()
	p.wantHealth(200, "healthy", "connected", "connected")
	p.awaitHit("/products", "")

	wantExit(t, 0, "^200 OK\n$", p.path, append(p.env, "BIND_ADDRESS=0.0.0.0"), "health")
	p.kill()
	wantExit(t, 1, "connection refused", p.path, p.env, "health")
}

// TestDrain ends the service under load. From SIGTERM on /health says so, and each answer closes its connection. The
// service answers for as long as it is told and while new connections arrive, then takes no more, and finishes what is
// in flight: nobody sees a connection break, and it exits with 0.
func TestDrain(t *testing.T) {
	own := alone(t)
	p := startProcess(t, os.Args[0], own.config, "DRAIN_SECONDS=1")
	p.wantHealth(200, "healthy", "connected", "connected")
	endPost := p.beginPost()
	var created atomic.Int64
	var balancerKnows atomic.Bool
	wait := concurrently(8, func(int) {
		last := answer{}
		for !balancerKnows.Load() && !t.Failed() {
			last = p.want(201, "POST", "/products", `{"name":"p","price":1}`)
			created.Add(1)
		}
		equal(t, "whether the last answer closes the connection", last.closes, true)
	})
	eventually(t, "the clients are at work", func() bool { return created.Load() > 100 })
	p.signal(syscall.SIGTERM)
	began := time.Now()
	p.wantHealth(503, "stopping", "connected", "connected")
	time.Sleep(3 * time.Second) // longer than DRAIN_SECONDS, but new connections keep arriving
	balancerKnows.Store(true)
	wait()
	eventually(t, "no connection is accepted", func() bool {
		time.Sleep(quietTime + 100*time.Millisecond) // each try is a new connection, for which the service goes on
		_, err := p.send("GET", "/", "")
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	endPost()
	equal(t, "the exit", p.Wait(), nil)
	within(t, time.Since(began), 6*time.Second, "the shutdown")
	equal(t, "rows", ask[int64](own.psql, `SELECT count(*) FROM products`), created.Load()+1)
}

// TestSlowClients sends a byte at a time, huge headers, and opens thousands of connections that say nothing.
func TestSlowClients(t *testing.T) {
	p := startProcess(t, os.Args[0], alone(t).config, "LOG_LEVEL=warn")
	p.wantHealth(200, "healthy", "connected", "connected")
	var clients sync.WaitGroup
	slowly := func(head string, limit time.Duration) {
		conn, began := p.dial(head), time.Now()
		clients.Go(func() {
			_, _ = io.Copy(io.Discard, conn) // until the server closes the connection
			took := time.Since(began)
			expect(t, took >= 4*time.Second && took <= limit, "a byte a second was read for %v after %q", took, head)
		})
		go func() {
			for err := error(nil); err == nil; time.Sleep(time.Second) {
				_, err = fmt.Fprint(conn, "a")
			}
		}()
	}
	slowly("GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", 8*time.Second)
	slowly(postHeader+"Content-Length: 1000\r\n\r\n", 13*time.Second)
	// A body that takes longer than a request may has its whole time afterwards: it is not changed and then refused.
	time.AfterFunc(6*time.Second, p.beginPost())
	for range 5000 {
		p.dial("")
	}
	p.want(200, "GET", "/products", "") // until here the server has accepted them all
	within(t, p.want(200, "GET", "/products", "").took, time.Second, "a request with 5,000 idle connections")
	large := p.dial("")
	go fmt.Fprintf(large, "GET / HTTP/1.1\r\nHost: x\r\nX-Large: %s\r\n\r\n", strings.Repeat("a", 64<<10))
	wantStatus(t, large, 431)
	clients.Wait()
	p.want(200, "GET", "/products", "").contains(`"count":1`) // the product of the slow client that was told so
}

const postHeader = "POST /products HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

// dial opens a connection, for 20 seconds at most, and sends a text.
func (s *testServer) dial(text string) net.Conn {
	conn := must(net.Dial("tcp", strings.TrimPrefix(s.url, "http://")))
	s.t.Cleanup(func() { conn.Close() })
	check(conn.SetDeadline(time.Now().Add(20 * time.Second)))
	must(fmt.Fprint(conn, text))
	return conn
}

// wantStatus reads the first line of an answer.
func wantStatus(t testing.TB, conn net.Conn, status int) {
	t.Helper()
	line, err := bufio.NewReader(conn).ReadString('\n')
	expect(t, strings.HasPrefix(line, fmt.Sprint("HTTP/1.1 ", status)), "got %q %v, want %d", line, err, status)
}

// beginPost sends a part of a new product. What it returns sends the rest, and wants the product to be created.
func (s *testServer) beginPost() (end func()) {
	const body = `{"name":"slow","price":1}`
	conn := s.dial(fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", postHeader, len(body), body[:9]))
	return func() {
		must(fmt.Fprint(conn, body[9:]))
		wantStatus(s.t, conn, 201)
	}
}

// TestClientsThatLeave has clients that leave before or during their requests. None ends the trust in the cache. A
// large body waits until one of those that are being received ends.
func TestClientsThatLeave(t *testing.T) {
	s := startAlone(t)
	handler, epoch := s.handler(), s.cache.trust.epoch.Load()
	for _, request := range []string{"GET /health", "GET /stats", "GET /products", "DELETE /cache/clear"} {
		method, path, _ := strings.Cut(request, " ")
		concurrently(100, func(i int) {
			ctx, leave := context.WithCancel(t.Context())
			time.AfterFunc(time.Duration(i)*100*time.Microsecond, leave)
			if i%2 == 0 {
				leave()
			}
			handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, method, path, nil))
		})()
		s.want(200, "GET", "/products", "")
	}
	equal(t, "the epoch", s.cache.trust.epoch.Load(), epoch)
	s.wantHealth(200, "healthy", "connected", "connected")

	for range maxLarge {
		s.largeRequests <- struct{}{} // a client sends a large body, until it leaves
	}
	s.create(`{"name":"small","price":1}`)
	time.AfterFunc(time.Second, func() { <-s.largeRequests })
	took := s.want(201, "POST", "/products", strings.Repeat(" ", largeRequest)+`{"name":"large","price":1}`).took
	expect(t, took > time.Second/2, "a large body was received after %v, although too many others were", took)
}

// TestUnitSettings sets variables to what the service must refuse. The error names the variable in one line, and never
// contains a password. A password may be in a file.
func TestUnitSettings(t *testing.T) {
	for _, c := range []struct{ name, value, says string }{
		{"PORT", "http", "from 1 to 65535"}, {"PORT", "70000", "from 1 to 65535"}, {"POSTGRES_PORT", "-1", "from 1 to 65535"},
		{"REDIS_PORT", "6379x", "from 1 to 65535"},
		{"CACHE_TTL", "0", "from 1 to 86400"}, {"CACHE_TTL", "5m", "from 1 to 86400"},
		{"POSTGRES_SSLMODE", "maybe", "verify-full"}, {"LOG_LEVEL", "loud", "debug, info, warn, error"},
		{"POSTGRES_HOST", "bad host", "bad host"}, {"POSTGRES_HOST", "[::1", "[::1"},
		{"POSTGRES_PASSWORD_FILE", "/dev/null", "POSTGRES_PASSWORD"}, {"REDIS_PASSWORD_FILE", "/nowhere", "/nowhere"},
	} {
		environment := map[string]string{"POSTGRES_PASSWORD": "hush", c.name: c.value}
		_, err := configure(func(name string) string { return environment[name] })
		text := fmt.Sprint(err)
		clear := strings.Contains(text, c.name) && strings.Contains(text, c.says) && !strings.Contains(text, "\n")
		expect(t, clear && !strings.Contains(text, "hush"), "%s=%s: %s", c.name, c.value, text)
	}
	file := t.TempDir() + "/password"
	check(os.WriteFile(file, []byte("secret\n"), 0o600))
	files := map[string]string{"POSTGRES_PASSWORD_FILE": file, "REDIS_PASSWORD_FILE": file}
	cfg := must(configure(func(name string) string { return files[name] }))
	equal(t, "the passwords", cfg.postgresPassword+" "+cfg.redisPassword, "secret secret")
}

// TestPing runs `web ping`, also under the name of ping, and other command lines.
func TestPing(t *testing.T) {
	own := alone(t)
	web, ping := os.Args[0], t.TempDir()+"/ping"
	check(os.Symlink(web, ping))
	redis := []string{"REDIS_PORT=" + own.redisPort}
	wantExit(t, 0, "1 tries, 1 connected", web, redis, "ping", "-c", "1", own.redisHost)
	wantExit(t, 0, "2 tries, 2 connected", ping, nil, "-c", "2", own.redisHost+":"+own.redisPort)
	wantExit(t, 1, "1 tries, 0 connected", ping, nil, "-c", "1", "127.0.0.1:1")
	wantExit(t, 2, "HOST:PORT", ping, nil, "somewhere")
	wantExit(t, 2, "usage", ping, nil)
	wantExit(t, 2, "usage", web, nil, "serve")
	wantExit(t, 2, "^PORT must be .*\n$", web, []string{"PORT=http"})

	const interrupt = `"$0" -c 100 "$1" & sleep 2; kill $!; wait $!` // after one try, two or three
	tries := `try=(1 .*\n1 tries, 1|2 .*\n2 tries, 2|3 .*\n3 tries, 3) connected\n$`
	wantExit(t, 0, tries, "sh", redis, "-c", interrupt, ping, own.redisHost)
}

// A waiter is the context of a request, and counts how often somebody waits for its end: cache.Get does so once.
type waiter struct {
	context.Context
	count *atomic.Int64
}

func (w waiter) Done() <-chan struct{} {
	w.count.Add(1)
	return w.Context.Done()
}

// TestHerd sends a thousand requests for each key, and holds the query until all of them wait for a lookup. They
// cost at most two queries, and each learns where its answer came from. They share an error, too. The request that
// started the first lookup gives up: the lookup outlives it, and fills the key.
func TestHerd(t *testing.T) {
	s := startAlone(t)
	herd := func(key string, failure error, want source) {
		var queries, waiting atomic.Int64
		allWait := make(chan bool)
		ctx, giveUp := context.WithCancel(t.Context())
		query := func(context.Context) ([]byte, error) {
			queries.Add(1)
			giveUp()
			<-allWait
			return []byte(key), failure
		}
		_, _, err := s.cache.Get(ctx, key, query)
		equal(t, "the error of the request that gave up", err, context.Canceled)
		wait := concurrently(1000, func(int) {
			body, from, err := s.cache.Get(waiter{t.Context(), &waiting}, key, query)
			ok := err == failure && (err != nil || string(body) == key) && from == want
			expect(t, ok, "%s: got %q %q %v, want %q %v", key, body, from, err, want, failure)
		})
		eventually(t, "all requests wait in cache.Get", func() bool { return waiting.Load() == 1000 })
		close(allWait)
		wait()
		expect(t, queries.Load() <= 2, "%d queries for 1,000 requests of %s", queries.Load(), key)
	}
	herd("products:1", nil, hit)
	herd("products:2", errNotFound, miss)
	s.redis.kill()
	eventually(t, "trust has ended", func() bool { return !s.cache.Trusted() })
	herd("products:3", nil, bypass)
}
