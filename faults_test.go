package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// wantHealth waits until /health says a status with the words given for the database and the cache.
func (s *testServer) wantHealth(code int, status, database, cache string) {
	s.t.Helper()
	want := fmt.Sprintf(`{"status":%q,"database":%q,"cache":%q,`, status, database, cache)
	eventually(s.t, "health says "+want, func() bool {
		a := s.send("GET", "/health", "")
		within(s.t, a.took, 2*time.Second, "GET /health")
		return a.status == code && strings.HasPrefix(a.body, want)
	})
}

// everything uses every endpoint as if nothing were wrong, but for /cache/clear, and returns the slowest answer.
func (s *testServer) everything() (slowest time.Duration) {
	s.t.Helper()
	path := s.create(`{"name":"a","price":1}`)
	for _, get := range []string{"/", "/services", "/stats", "/products", "/products?limit=5", path} {
		slowest = max(slowest, s.want(200, "GET", get, "").took)
	}
	return max(slowest, s.want(200, "PUT", path, `{"stock":7}`).took, s.want(204, "DELETE", path, "").took)
}

// TestRedisFails lets Redis fill up, stops it, silences it, and brings it back; all but /cache/clear works all the time.
func TestRedisFails(t *testing.T) {
	r, cfg := alone(t)
	s := startServer(t, cfg)
	back := func(limit time.Duration) {
		t.Helper()
		within(t, s.awaitHit("/products"), limit, "the return of the cache")
		s.wantHealth(200, "healthy", "connected", "connected")
		s.want(200, "DELETE", "/cache/clear", "")
	}
	gone := func() {
		t.Helper()
		s.wantHealth(200, "degraded", "connected", "disconnected")
		s.wantSource(bypass, "/products")
		s.want(503, "DELETE", "/cache/clear", "")
	}
	back(2 * time.Second)

	r.do("CONFIG", "SET", "maxmemory", "1")
	s.everything()
	s.wantSource(bypass, "/products")
	r.do("CONFIG", "SET", "maxmemory", "0")
	back(2 * time.Second)

	r.kill()
	s.everything()
	gone()
	r.start()
	back(settleTime + 3*time.Second)

	r.signal(syscall.SIGSTOP)
	// The first request waits for Redis once, and not for longer than a command may take.
	within(t, s.want(200, "GET", "/products", "").took, redisTimeout+redisTimeout/2, "the first request")
	within(t, s.everything(), redisTimeout, "a request that had no need to wait for the silent Redis")
	gone()
	r.signal(syscall.SIGCONT)
	back(2 * time.Second)
}

// wantBypass gives the service time to win trust in a Redis, and checks that everything works without it.
func (s *testServer) wantBypass() {
	s.t.Helper()
	for range 3 {
		time.Sleep(2 * heartbeat)
		within(s.t, s.everything(), 2*time.Second, "a request")
		s.wantSource(bypass, "/products")
	}
}

// TestRedisUnfit gives the service Redis servers that it cannot use: everything works without them. Once they are
// mended, they are used.
func TestRedisUnfit(t *testing.T) {
	_, cfg := alone(t)
	startServer(t, cfg)
	master, _ := startRedis(t, cfg)
	for _, c := range []struct{ unfit, mended string }{
		{"CONFIG SET maxmemory-policy allkeys-lru", "CONFIG SET maxmemory-policy noeviction"},
		{"CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"},
		{"REPLICAOF 127.0.0.1 " + master.port, "REPLICAOF NO ONE"},
	} {
		t.Run(c.unfit, func(t *testing.T) {
			t.Parallel()
			r, cfg := startRedis(t, cfg)
			tell := func(line string) {
				words := redis.Args{}.AddFlat(strings.Fields(line))
				r.do(words[0].(string), words[1:]...)
			}
			tell(c.unfit)
			s := startReplica(t, cfg)
			s.wantBypass()
			tell(c.mended)
			s.awaitHit("/products")
		})
	}
	t.Run("version 6", func(t *testing.T) {
		t.Parallel()
		r, cfg := startRedis(t, cfg)
		proxy := startProxy(t, "127.0.0.1:"+r.port, func(data []byte) {
			if i := bytes.Index(data, []byte("redis_version:")); i >= 0 {
				copy(data[i:], "redis_version:6.")
			}
		})
		cfg.redisPort = proxy.port
		startReplica(t, cfg).wantBypass()
	})
	t.Run("password", func(t *testing.T) {
		t.Parallel()
		locked, cfg := startRedis(t, cfg)
		locked.do("CONFIG", "SET", "requirepass", "secret")
		startReplica(t, cfg).wantBypass()
		file := filepath.Join(t.TempDir(), "password")
		check(os.WriteFile(file, []byte("secret\n"), 0o600))
		startProcess(t, os.Args[0], cfg, "REDIS_PASSWORD=", "REDIS_PASSWORD_FILE="+file).awaitHit("/products")
	})
}

// TestPostgresFails stops PostgreSQL and starts it again: errors that say so at once, then back by itself.
func TestPostgresFails(t *testing.T) {
	_, cfg := ownServers(t)
	s := startServer(t, cfg)
	path := s.create(`{"name":"a","price":1}`)
	s.wantSource(miss, path)
	s.wantSource(hit, path)

	t.Cleanup(startPostgres) // also if the test fails before that
	stopPostgres()
	eventually(t, "trust has ended", func() bool { return !s.cache.Trusted() })
	wantAllUnavailable(t, s, time.Second)
	s.want(200, "GET", "/", "")
	s.want(200, "GET", "/services", "")
	s.wantHealth(503, "unhealthy", "disconnected", "connected")

	startPostgres()
	back := time.Now()
	eventually(t, "a write works", func() bool { return s.send("PUT", path, `{"stock":2}`).status == 200 })
	s.awaitHit(path)
	within(t, time.Since(back), 2*time.Second, "the return")
	s.wantHealth(200, "healthy", "connected", "connected")
	s.send("GET", path, "").says(`"stock":2`)
}

// TestPostgresSilent has a PostgreSQL that accepts connections and does not answer, since the start of the service or
// later, as after a SIGSTOP: a proxy passes nothing on.
func TestPostgresSilent(t *testing.T) {
	twice(t, "since the start", func(t *testing.T, sinceStart bool) {
		_, behind := alone(t)
		proxy := startProxy(t, net.JoinHostPort(behind.postgresHost, behind.postgresPort), nil)
		cfg := behind
		cfg.postgresPort = proxy.port
		proxy.pause(sinceStart)
		s := startReplica(t, cfg)
		if !sinceStart {
			s.awaitSchema()
			s.awaitHit("/products")
			s.everything()
			proxy.pause(true)
		}
		wantAllUnavailable(t, s, 6*time.Second)
		s.wantHealth(503, "unhealthy", "disconnected", "connected")
		proxy.pause(false)
		s.awaitSchema()
		// The keys of the writes whose outcome nobody knows stay empty until their marks expire; a new product has none.
		path := ""
		eventually(t, "a write works", func() bool {
			path = s.send("POST", "/products", `{"name":"b","price":1}`).header.Get("Location")
			return path != ""
		})
		s.awaitHit(path)
		// What was never acknowledged may have happened, but not twice.
		more := ask[int](psql(t, behind), `SELECT count(*) - count(DISTINCT name) FROM products WHERE name LIKE 'silent%'`)
		equal(t, "products that were created twice", more, 0)
	})
}

// wantAllUnavailable sends what needs PostgreSQL, all at once, and wants an error that says so, within a limit.
func wantAllUnavailable(t *testing.T, s *testServer, limit time.Duration) {
	t.Helper()
	requests := []struct{ method, path, body string }{
		{"GET", "/products", ""}, {"GET", "/products/1", ""}, {"GET", "/products?limit=1", ""}, {"GET", "/stats", ""},
		{"POST", "/products", `{"name":"silent#","price":1}`}, {"PUT", "/products/1", `{"stock":1}`}, {"DELETE", "/products/1", ""},
	}
	concurrently(10*len(requests), func(i int) { // more than the pool has connections
		c := requests[i%len(requests)]
		a, err := s.trySend(c.method, c.path, strings.Replace(c.body, "#", strconv.Itoa(i), 1))
		if err != nil || a.status != 503 || a.took > limit ||
			(a.header.Get("Retry-After") == "") != strings.Contains(a.body, "may have been made") || !strings.Contains(a.body, "database unavailable") {
			t.Errorf("%s %s: %d after %v, %v %v %s", c.method, c.path, a.status, a.took, err, a.header, a.body)
		}
		wantProblem(t, a)
	})()
}

// A server without TLS says so: the next connection is in the clear, and the first one is closed.
// When that one is answered by something that is no PostgreSQL, the service says that there is none.
func TestServerWithoutTLS(t *testing.T) {
	cfg := testConfig()
	server, port := listen(t)
	cfg.sslMode, cfg.postgresPort = "prefer", port
	s := startReplica(t, cfg)
	accept := func() net.Conn {
		conn := must(server.Accept())
		t.Cleanup(func() { _ = conn.Close() })
		check(conn.SetDeadline(time.Now().Add(5 * time.Second)))
		return conn
	}
	first := accept()
	must(io.ReadFull(first, make([]byte, 8))) // an SSLRequest
	must(first.Write([]byte("N")))
	if _, err := first.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection without TLS was left open: %v", err)
	}
	startup := make([]byte, 8)
	must(io.ReadFull(accept(), startup))
	equal(t, "the version of the protocol", string(startup[4:]), "\x00\x03\x00\x00")
	go func() {
		for conn, err := server.Accept(); err == nil; conn, err = server.Accept() {
			_, _ = conn.Write([]byte("X\x00\x00\x00\x04"))
		}
	}()
	wantAllUnavailable(t, s, 6*time.Second)
}

// TestPoolExhausted holds every connection: requests end in bounded time with a clear status.
func TestPoolExhausted(t *testing.T) {
	s := startAlone(t)
	for range poolSize() {
		conn := must(s.db.Conn(t.Context()))
		defer conn.Close()
	}
	s.wantHealth(200, "healthy", "connected", "connected")
	wantAllUnavailable(t, s, 6*time.Second)
}

// TestLockedRow holds a row's lock in another session: the statement times out, and the cache is in use again. A
// change that waits for the lock and gets it is younger than the one it waited for.
func TestLockedRow(t *testing.T) {
	s := startAlone(t)
	db := psql(t, s.cfg)
	path := s.create(`{"name":"a","price":1}`)
	tx := lock(db, `SELECT FROM products FOR UPDATE`)
	within(t, s.want(503, "PUT", path, `{"stock":5}`).took, 6*time.Second, "the change of a locked row")
	check(tx.Commit())
	s.want(200, "GET", path, "").says(`"stock":0`)

	tx = lock(db, `SELECT FROM products FOR UPDATE`)
	var changed product
	wait := concurrently(1, func(int) {
		a, err := s.trySend("PUT", path, `{"stock":6}`)
		if err != nil || json.Unmarshal([]byte(a.body), &changed) != nil || changed.Stock != 6 {
			t.Errorf("%s %v", a.body, err)
		}
	})
	eventually(t, "a statement waits", func() bool {
		return ask[int](db, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`) == 1
	})
	first := ask[time.Time](tx, `UPDATE products SET updated_at = clock_timestamp() RETURNING updated_at`)
	check(tx.Commit())
	wait()
	if changed.UpdatedAt.Before(first) {
		t.Errorf("updated at %v, after an update at %v", changed.UpdatedAt, first)
	}
	s.want(200, "GET", path, "").says(`"stock":6`)
}

// TestServersMissingAtStart starts the service before there is a Redis or a database.
func TestServersMissingAtStart(t *testing.T) {
	r, cfg := alone(t)
	r.kill()
	db := psql(t, testConfig())
	must(db.Exec("DROP DATABASE " + cfg.postgresDB))
	password := filepath.Join(t.TempDir(), "password")
	check(os.WriteFile(password, []byte(cfg.postgresPassword+"\n"), 0o600))
	p := startProcess(t, os.Args[0], cfg, "POSTGRES_PASSWORD=", "POSTGRES_PASSWORD_FILE="+password)
	p.wantHealth(503, "unhealthy", "disconnected", "disconnected")
	p.want(503, "GET", "/products", "")
	must(db.Exec("CREATE DATABASE " + cfg.postgresDB))
	p.wantHealth(200, "degraded", "connected", "disconnected")
	p.wantSource(bypass, "/products")
	r.start()
	p.wantHealth(200, "healthy", "connected", "connected")
	p.awaitHit("/products")

	wantExit(t, 0, "", p.path, p.env, "health")
	p.kill()
	wantExit(t, 1, "connection refused", p.path, p.env, "health")
}

// TestShutdown ends the service under load. It goes on for as long as a balancer may still send requests to it, then
// takes no more, and finishes what is in flight: nobody sees a connection break, and it exits with 0.
func TestShutdown(t *testing.T) {
	_, cfg := alone(t)
	p := startProcess(t, os.Args[0], cfg)
	p.wantHealth(200, "healthy", "connected", "connected")
	endPost := p.beginPost()
	var acknowledged atomic.Int64
	var balancerKnows atomic.Bool
	wait := concurrently(8, func(int) {
		last := answer{}
		for !balancerKnows.Load() {
			var err error
			if last, err = p.trySend("POST", "/products", `{"name":"p","price":1}`); err != nil || last.status != 201 {
				t.Errorf("%d %v", last.status, err)
				return
			}
			acknowledged.Add(1)
		}
		equal(t, "whether the last answer closes the connection", last.closes, true)
	})
	eventually(t, "the clients are at work", func() bool { return acknowledged.Load() > 100 })
	p.signal(syscall.SIGTERM)
	time.Sleep(1500 * time.Millisecond)
	balancerKnows.Store(true)
	wait()
	eventually(t, "no connection is accepted", func() bool {
		_, err := p.trySend("GET", "/", "")
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	endPost()
	equal(t, "the exit", p.Wait(), nil)
	equal(t, "rows", ask[int64](psql(t, cfg), `SELECT count(*) FROM products`), acknowledged.Load()+1)
}

// TestSlowClients sends a byte at a time, huge headers, and opens thousands of connections that say nothing.
func TestSlowClients(t *testing.T) {
	_, cfg := alone(t)
	p := startProcess(t, os.Args[0], cfg, "LOG_LEVEL=warn")
	p.wantHealth(200, "healthy", "connected", "connected")
	var clients sync.WaitGroup
	slowly := func(head string, limit time.Duration) {
		conn, began := p.dial(head), time.Now()
		clients.Go(func() {
			_, _ = io.Copy(io.Discard, conn) // until the server closes the connection
			if took := time.Since(began); took < 4*time.Second || took > limit {
				t.Errorf("a byte a second was read for %v after %q", took, head)
			}
		})
		go func() {
			for err := error(nil); err == nil; time.Sleep(time.Second) {
				_, err = fmt.Fprint(conn, "a")
			}
		}()
	}
	slowly("GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", 8*time.Second)
	slowly("POST /products HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n",
		13*time.Second)
	// A body that takes longer than a request may has its whole time afterwards: it is not changed and then refused.
	endPost := p.beginPost()
	clients.Go(func() {
		time.Sleep(6 * time.Second)
		endPost()
	})
	for range 5000 {
		p.dial("")
	}
	within(t, p.want(200, "GET", "/products", "").took, time.Second, "a request with 5,000 idle connections")
	large := p.dial("")
	go fmt.Fprintf(large, "GET / HTTP/1.1\r\nHost: x\r\nX-Large: %s\r\n\r\n", strings.Repeat("a", 64<<10)) // fails when the server has enough
	if line, err := bufio.NewReader(large).ReadString('\n'); !strings.Contains(line, " 431 ") {
		t.Errorf("huge headers: %q %v", line, err)
	}
	clients.Wait()
	p.want(200, "GET", "/products", "").says(`"count":1`) // the product of the slow client that was told so
}

// dial opens a connection, for 20 seconds at most, and sends a text.
func (s *testServer) dial(text string) net.Conn {
	conn := must(net.Dial("tcp", strings.TrimPrefix(s.url, "http://")))
	s.t.Cleanup(func() { conn.Close() })
	check(conn.SetDeadline(time.Now().Add(20 * time.Second)))
	must(fmt.Fprint(conn, text))
	return conn
}

// beginPost sends a part of a new product. What it returns sends the rest, and wants the product to be created.
func (s *testServer) beginPost() (end func()) {
	const body = `{"name":"slow","price":1}`
	conn := s.dial(fmt.Sprintf("POST /products HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body[:9]))
	return func() {
		must(fmt.Fprint(conn, body[9:]))
		if line, err := bufio.NewReader(conn).ReadString('\n'); !strings.Contains(line, " 201 ") {
			s.t.Errorf("to a late body the answer is %q %v", line, err)
		}
	}
}

// serveThrough lets every request go through a function first.
func (s *testServer) serveThrough(first func(*http.Request)) {
	handler := s.handler()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		first(r)
		handler.ServeHTTP(w, r)
	}))
	s.t.Cleanup(web.Close)
	s.url = web.URL
}

// TestClientsThatLeave closes connections before the answer: no client may end the trust in the cache by that. Every
// second request begins only when its client has left for certain.
func TestClientsThatLeave(t *testing.T) {
	s := startAlone(t)
	epoch := s.cache.trust.epoch.Load()
	var arrived, left atomic.Int64
	s.serveThrough(func(r *http.Request) {
		if arrived.Add(1)%2 == 0 && r.Host == "leaves" {
			<-r.Context().Done()
			left.Add(1)
		}
	})
	for _, request := range []string{"GET /health", "GET /stats", "GET /products", "DELETE /cache/clear"} {
		begun := arrived.Load()
		for range 100 {
			s.dial(request + " HTTP/1.1\r\nHost: leaves\r\n\r\n").Close()
		}
		eventually(t, "all have arrived", func() bool { return arrived.Load() == begun+100 })
		s.want(200, "GET", "/products", "")
	}
	eventually(t, "half of the clients have left before", func() bool { return left.Load() >= 198 })
	equal(t, "the epoch", s.cache.trust.epoch.Load(), epoch)
	s.wantHealth(200, "healthy", "connected", "connected")
}

// TestBadConfiguration ends the process with a line, before it has started anything.
func TestBadConfiguration(t *testing.T) {
	t.Parallel()
	equal(t, "lines", strings.Count(wantExit(t, 2, "PORT must be", os.Args[0], []string{"PORT=http"}), "\n"), 1)
}

// TestUnixSocket connects to the socket in a folder, as libpq does.
func TestUnixSocket(t *testing.T) {
	t.Parallel()
	cfg := testConfig()
	cfg.postgresHost = t.TempDir()
	socket := must(net.Listen("unix", cfg.postgresHost+"/.s.PGSQL."+cfg.postgresPort))
	defer socket.Close()
	startReplica(t, cfg)
	check(socket.(*net.UnixListener).SetDeadline(time.Now().Add(10 * time.Second)))
	_, err := socket.Accept()
	equal(t, "the error of the socket", err, nil)
}

// TestPing is `web ping`, and the same under the name of ping.
func TestPing(t *testing.T) {
	_, cfg := alone(t)
	link := t.TempDir() + "/ping"
	check(os.Symlink(os.Args[0], link))
	wantExit(t, 0, "1 tries, 1 connected", os.Args[0], []string{"REDIS_PORT=" + cfg.redisPort}, "ping", "-c", "1", cfg.postgresHost)
	wantExit(t, 0, "2 tries, 2 connected", link, nil, "-c", "2", net.JoinHostPort(cfg.redisHost, cfg.redisPort))
	wantExit(t, 1, "1 tries, 0 connected", link, nil, "-c", "1", "127.0.0.1:1")
	wantExit(t, 2, "HOST:PORT", link, nil, "somewhere")
	wantExit(t, 2, "usage", link, nil)
	wantExit(t, 2, "usage", os.Args[0], nil, "serve")
}

// A waiter is the context of a request, and counts how often somebody waits for its end: Cache.Get does so once.
type waiter struct {
	context.Context
	count *atomic.Int64
}

func (w waiter) Done() <-chan struct{} {
	w.count.Add(1)
	return w.Context.Done()
}

// TestHerd sends a thousand requests, lets them go on at the same moment, and keeps PostgreSQL from answering before all
// wait for a lookup. They cost two queries at most, hit or miss, and each answer says where it came
// from; so does an error that they share, for the race detector to watch.
func TestHerd(t *testing.T) {
	_, cfg := ownServers(t)
	db := psql(t, cfg)
	redis := startProxy(t, net.JoinHostPort(cfg.redisHost, cfg.redisPort), nil)
	// A prepared statement is run by a message Bind that has its number after the portal's name, which is empty. The first
	// is the heartbeat's.
	var queries atomic.Int64
	postgres := startProxy(t, net.JoinHostPort(cfg.postgresHost, cfg.postgresPort), func(data []byte) {
		if len(data) > 0 && data[0] == 'B' && !bytes.Contains(data, []byte("heartbeat_")) {
			queries.Add(1)
		}
	})
	cfg.redisPort, cfg.postgresHost, cfg.postgresPort = redis.port, "127.0.0.1", postgres.port
	s := startServer(t, cfg)
	path := s.create(`{"name":"a","price":1}`)
	var arrived, waiting atomic.Int64
	var gate sync.RWMutex // to read a thousand requests can be so much work that Redis is heard too late meanwhile
	s.serveThrough(func(r *http.Request) {
		arrived.Add(1)
		gate.RLock()
		defer gate.RUnlock()
		*r = *r.WithContext(waiter{r.Context(), &waiting})
	})
	herd := func(status int, path string, sources ...source) {
		t.Helper()
		queries.Store(0)
		arrived.Store(0)
		waiting.Store(0)
		gate.Lock()
		wait := concurrently(1000, func(int) {
			if a, err := s.trySend("GET", path, ""); err != nil || a.status != status || !slices.Contains(sources, a.source()) {
				t.Errorf("%d %q %s %v", a.status, a.source(), a.body, err)
			}
		})
		eventually(t, "all requests are at the gate, and the cache is trusted or not", func() bool {
			return arrived.Load() == 1000 && s.cache.Trusted() != slices.Contains(sources, bypass)
		})
		tx := lock(db, `LOCK TABLE products`)
		gate.Unlock()
		eventually(t, "all requests wait in Cache.Get", func() bool { return waiting.Load() == 1000 })
		check(tx.Commit())
		wait()
		if n := queries.Load(); n > 2 || n < 1 {
			t.Errorf("%d queries for 1,000 requests of %s", n, path)
		}
	}
	herd(200, "/products", miss, hit)
	herd(200, path, miss, hit)
	herd(404, "/products/7", miss)
	redis.lead("")
	herd(200, "/products", bypass)
}
