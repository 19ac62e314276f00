package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
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
	last := answer{}
	eventually(s.t, "health says "+want, func() bool {
		last = s.send("GET", "/health", "")
		if last.took > 2*time.Second {
			s.t.Errorf("/health took %v", last.took)
		}
		return last.status == code && strings.HasPrefix(last.body, want)
	})
}

// everything uses every endpoint as if nothing were wrong, but for /cache/clear, and returns the slowest answer.
func (s *testServer) everything() (slowest time.Duration) {
	s.t.Helper()
	path := pathOf(s.create(`{"name":"a","price":1}`))
	for _, get := range []string{"/", "/services", "/stats", "/products", "/products?limit=5", path} {
		slowest = max(slowest, s.want(200, "GET", get, "").took)
	}
	return max(slowest, s.want(200, "PUT", path, `{"stock":7}`).took, s.want(204, "DELETE", path, "").took)
}

// TestRedisFails lets Redis fill up, stops it, silences it, and brings it back; all but /cache/clear works all the time.
func TestRedisFails(t *testing.T) {
	s := startAlone(t)
	back := func(within time.Duration) {
		t.Helper()
		if took := s.awaitHit("/products"); took > within {
			t.Errorf("the cache was in use again only after %v", took)
		}
		s.wantHealth(200, "healthy", "connected", "connected")
		s.want(200, "DELETE", "/cache/clear", "")
	}
	back(2 * time.Second)

	s.redis.do("CONFIG", "SET", "maxmemory", "1")
	s.everything()
	s.wantSource(bypass, "/products")
	s.redis.do("CONFIG", "SET", "maxmemory", "0")
	back(2 * time.Second)

	s.redis.kill()
	s.everything()
	s.wantHealth(200, "degraded", "connected", "disconnected")
	s.wantSource(bypass, "/products")
	s.want(503, "DELETE", "/cache/clear", "")
	s.redis.start()
	back(settleTime + 3*time.Second)

	s.redis.signal(syscall.SIGSTOP)
	// Whoever comes first waits for Redis once, and not for longer than a command may take.
	if took := s.want(200, "GET", "/products", "").took; took > redisTimeout+redisTimeout/2 {
		t.Errorf("the first request took %v", took)
	}
	if slowest := s.everything(); slowest >= redisTimeout {
		t.Errorf("a request waited for the silent Redis: %v", slowest)
	}
	s.wantHealth(200, "degraded", "connected", "disconnected")
	s.want(503, "DELETE", "/cache/clear", "")
	s.redis.signal(syscall.SIGCONT)
	back(2 * time.Second)
}

// wantBypass gives the service time to win trust in a Redis, and checks that everything works without it.
func (s *testServer) wantBypass() {
	s.t.Helper()
	for range 3 {
		time.Sleep(2 * heartbeat)
		if slowest := s.everything(); slowest > 2*time.Second {
			s.t.Errorf("a request took %v", slowest)
		}
		s.wantSource(bypass, "/products")
	}
}

// TestRedisUnfit gives the service Redis servers that it cannot use: everything works without them. Once they are
// mended, they are used.
func TestRedisUnfit(t *testing.T) {
	_, cfg := alone(t)
	applySchema(t.Context(), startReplica(t, cfg).db)
	master, _ := startRedis(t, cfg)
	for _, c := range []struct{ unfit, mended string }{
		{"CONFIG SET maxmemory-policy allkeys-lru", "CONFIG SET maxmemory-policy noeviction"},
		{"CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"},
		{"REPLICAOF 127.0.0.1 " + master.port, "REPLICAOF NO ONE"},
	} {
		t.Run(c.unfit, func(t *testing.T) {
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
		old, port := listen(t) // a Redis 6 as far as INFO goes
		go func() {
			for {
				conn, err := old.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					for lines := bufio.NewScanner(conn); lines.Scan(); {
						if strings.EqualFold(lines.Text(), "INFO") {
							info := "redis_version:6.2.14\r\nrun_id:old\r\nuptime_in_seconds:1000\r\n"
							fmt.Fprintf(conn, "$%d\r\n%s\r\n", len(info), info)
						}
					}
				}()
			}
		}()
		cfg := cfg
		cfg.redisPort = port
		startReplica(t, cfg).wantBypass()
	})
	t.Run("password", func(t *testing.T) {
		locked, cfg := startRedis(t, cfg)
		locked.do("CONFIG", "SET", "requirepass", "secret")
		startReplica(t, cfg).wantBypass()
		file := filepath.Join(t.TempDir(), "password")
		check(os.WriteFile(file, []byte("secret\n"), 0o600))
		startProcess(t, cfg, "REDIS_PASSWORD=", "REDIS_PASSWORD_FILE="+file).awaitHit("/products")
	})
}

// TestPostgresFails stops PostgreSQL and starts it again: errors that say so at once, then back by itself.
func TestPostgresFails(t *testing.T) {
	cfg := withDatabase(t, testConfig(t))
	s := startServer(t, cfg)
	path := pathOf(s.create(`{"name":"a","price":1}`))
	s.wantSource(miss, path)
	s.wantSource(hit, path)

	t.Cleanup(func() { postgres(t, startPostgres) }) // does nothing where it runs
	postgres(t, stopPostgres)
	eventually(t, "trust has ended", func() bool { return !s.cache.trusted() })
	for _, c := range []struct{ method, path, body string }{
		{"GET", "/products", ""}, {"GET", path, ""}, {"GET", "/products?limit=1", ""}, {"GET", "/stats", ""},
		{"POST", "/products", `{"name":"b","price":1}`}, {"PUT", path, `{"stock":1}`}, {"DELETE", path, ""},
	} {
		a := s.want(503, c.method, c.path, c.body)
		if !strings.Contains(a.body, "database unavailable") || a.header.Get("Retry-After") == "" || a.took > time.Second {
			t.Errorf("%s %s: %v %s after %v", c.method, c.path, a.header, a.body, a.took)
		}
	}
	s.want(200, "GET", "/", "")
	s.want(200, "GET", "/services", "")
	s.wantHealth(503, "unhealthy", "disconnected", "connected")

	postgres(t, startPostgres)
	back := time.Now()
	eventually(t, "a write works", func() bool { return s.send("PUT", path, `{"stock":2}`).status == 200 })
	s.awaitHit(path)
	if took := time.Since(back); took > 2*time.Second {
		t.Errorf("back only after %v", took)
	}
	s.wantHealth(200, "healthy", "connected", "connected")
	if body := s.send("GET", path, "").body; !strings.Contains(body, `"stock":2`) {
		t.Errorf("read %s", body)
	}
}

// TestPostgresSilent lets a whole PostgreSQL be a port that accepts and never answers.
func TestPostgresSilent(t *testing.T) {
	t.Parallel()
	_, cfg := startRedis(t, testConfig(t))
	_, cfg.postgresPort = listen(t)
	s := startReplica(t, cfg)
	wantAllUnavailable(t, s)
	s.wantHealth(503, "unhealthy", "disconnected", "connected")
}

// TestPostgresFallsSilent stops a PostgreSQL in use as SIGSTOP does, by a proxy that passes nothing on any more.
func TestPostgresFallsSilent(t *testing.T) {
	_, behind := alone(t)
	proxy := startProxy(t, net.JoinHostPort(behind.postgresHost, behind.postgresPort), nil)
	cfg := behind
	cfg.postgresPort = proxy.port
	s := startServer(t, cfg)
	s.everything()
	proxy.silent.Store(true)
	wantAllUnavailable(t, s)
	s.wantHealth(503, "unhealthy", "disconnected", "connected")
	proxy.silent.Store(false)
	// The keys of the writes whose outcome nobody knows stay empty until their marks expire; a new product has none.
	var created answer
	eventually(t, "a write works", func() bool {
		created = s.send("POST", "/products", `{"name":"b","price":1}`)
		return created.status == 201
	})
	s.awaitHit(created.header.Get("Location"))
	// What was never acknowledged may have happened, but not twice.
	var doubles int
	if err := psql(t, behind).QueryRow(`SELECT count(*) - count(DISTINCT name) FROM products WHERE name LIKE 'silent%'`).Scan(&doubles); err != nil || doubles > 0 {
		t.Errorf("%d products were created twice, %v", doubles, err)
	}
}

// wantAllUnavailable sends what needs PostgreSQL, all at once, and wants 503 within 6 seconds.
func wantAllUnavailable(t *testing.T, s *testServer) {
	t.Helper()
	var all sync.WaitGroup
	for i := range 60 { // more than the pool has connections
		all.Go(func() {
			method, path, body := "GET", []string{"/products", "/products/1", "/products?limit=1", "/stats"}[i%4], ""
			switch i % 5 {
			case 0:
				method, path, body = "POST", "/products", fmt.Sprintf(`{"name":"silent%d","price":1}`, i)
			case 1:
				method, path, body = "PUT", "/products/1", `{"stock":1}`
			}
			a, err := s.trySend(method, path, body)
			if err != nil || a.status != 503 || a.took > 6*time.Second || a.header.Get("Retry-After") == "" {
				t.Errorf("%s %s: %d after %v, %v %s", method, path, a.status, a.took, err, a.body)
			}
		})
	}
	all.Wait()
}

// A server without TLS says so, and the connection on which it does is closed before another one is made in the clear.
func TestNoConnectionLeftWithoutTLS(t *testing.T) {
	cfg := testConfig(t)
	server, port := listen(t)
	cfg.postgresSSLMode, cfg.postgresPort = "prefer", port
	db, _, err := openDatabase(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	go func() { _ = db.Ping() }() // fails when the server is closed
	conn := must(server.Accept())
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(conn, make([]byte, 8)); err != nil { // an SSLRequest
		t.Fatal(err)
	}
	must(conn.Write([]byte("N")))
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection was not closed: %v", err)
	}
}

// TestPoolExhausted holds every connection: requests end in bounded time with a clear status.
func TestPoolExhausted(t *testing.T) {
	s := startAlone(t)
	for range poolSize() {
		conn := must(s.db.Conn(t.Context()))
		defer conn.Close()
	}
	wantAllUnavailable(t, s)
}

// TestLockedRow holds a row's lock in another session: the statement times out, and the cache is in use again. A
// change that waits for the lock and gets it is younger than the one it waited for.
func TestLockedRow(t *testing.T) {
	s := startAlone(t)
	db := psql(t, s.cfg)
	path := pathOf(s.create(`{"name":"a","price":1}`))
	tx := lock(db, `SELECT FROM products FOR UPDATE`)
	if a := s.want(503, "PUT", path, `{"stock":5}`); a.took > 6*time.Second {
		t.Errorf("it took %v", a.took)
	}
	check(tx.Commit())
	if body := s.want(200, "GET", path, "").body; !strings.Contains(body, `"stock":0`) {
		t.Errorf("read %s", body)
	}

	tx = lock(db, `SELECT FROM products FOR UPDATE`)
	var second sync.WaitGroup
	var changed product
	second.Go(func() {
		a, err := s.trySend("PUT", path, `{"stock":6}`)
		if err != nil || json.Unmarshal([]byte(a.body), &changed) != nil || changed.Stock != 6 {
			t.Errorf("%s %v", a.body, err)
		}
	})
	eventually(t, "a statement waits", func() bool { return waiting(db) == 1 })
	var first time.Time
	check(tx.QueryRow(`UPDATE products SET updated_at = clock_timestamp() RETURNING updated_at`).Scan(&first))
	check(tx.Commit())
	second.Wait()
	if changed.UpdatedAt.Before(first) {
		t.Errorf("updated at %v, after an update at %v", changed.UpdatedAt, first)
	}
	if body := s.want(200, "GET", path, "").body; !strings.Contains(body, `"stock":6`) {
		t.Errorf("read %s", body)
	}
}

// TestServersMissingAtStart starts the service before there is a Redis or a database.
func TestServersMissingAtStart(t *testing.T) {
	t.Parallel()
	r, cfg := startRedis(t, testConfig(t))
	r.kill()
	db := psql(t, cfg)
	password := filepath.Join(t.TempDir(), "password")
	check(os.WriteFile(password, []byte(cfg.postgresPassword+"\n"), 0o600))
	cfg.postgresDB = fmt.Sprintf("late_%d", os.Getpid())
	p := startProcess(t, cfg, "POSTGRES_PASSWORD=", "POSTGRES_PASSWORD_FILE="+password)
	p.wantHealth(503, "unhealthy", "disconnected", "disconnected")
	p.want(503, "GET", "/products", "")
	mustExec(t, db, "CREATE DATABASE "+cfg.postgresDB)
	t.Cleanup(func() { mustExec(t, db, "DROP DATABASE "+cfg.postgresDB+" WITH (FORCE)") })
	p.wantHealth(200, "degraded", "connected", "disconnected")
	p.wantSource(bypass, "/products")
	r.start()
	p.wantHealth(200, "healthy", "connected", "connected")
	p.awaitHit("/products")

	if out, err := webCommand([]string{"health"}, p.env).CombinedOutput(); err != nil {
		t.Errorf("web health: %v %s", err, out)
	}
	p.kill()
	if err := webCommand([]string{"health"}, p.env).Run(); err == nil {
		t.Error("web health succeeds without a service")
	}
}

// TestShutdown ends the service under load. It goes on for as long as a balancer may still send requests to it, then
// takes no more, and finishes what is in flight: nobody sees a connection break, and it exits with 0.
func TestShutdown(t *testing.T) {
	_, cfg := alone(t)
	p := startProcess(t, cfg)
	p.wantHealth(200, "healthy", "connected", "connected")
	const body = `{"name":"slow","price":1}`
	slow := must(net.Dial("tcp", strings.TrimPrefix(p.url, "http://")))
	defer slow.Close()
	fmt.Fprintf(slow, "POST /products HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body[:9])
	var clients sync.WaitGroup
	var acknowledged atomic.Int64
	var balancerKnows atomic.Bool
	for range 8 {
		clients.Go(func() {
			for last := (answer{}); ; {
				if balancerKnows.Load() {
					if !last.closes {
						t.Error("the last answer leaves the connection open")
					}
					return
				}
				var err error
				if last, err = p.trySend("POST", "/products", `{"name":"p","price":1}`); err != nil || last.status != 201 {
					t.Errorf("%d %v", last.status, err)
					return
				}
				acknowledged.Add(1)
			}
		})
	}
	eventually(t, "the clients are at work", func() bool { return acknowledged.Load() > 100 })
	check(p.cmd.Process.Signal(syscall.SIGTERM))
	time.Sleep(drainTime - 500*time.Millisecond)
	balancerKnows.Store(true)
	clients.Wait()
	eventually(t, "no connection is accepted", func() bool {
		_, err := p.trySend("GET", "/", "")
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	fmt.Fprint(slow, body[9:])
	if line, err := bufio.NewReader(slow).ReadString('\n'); !strings.Contains(line, " 201 ") {
		t.Errorf("in flight: %q %v", line, err)
	}
	if err := <-p.ended; err != nil {
		t.Errorf("exit: %v", err)
	}
	var n int64
	if err := psql(t, cfg).QueryRow(`SELECT count(*) FROM products`).Scan(&n); err != nil || n != acknowledged.Load()+1 {
		t.Errorf("%d rows for %d acknowledged, %v", n, acknowledged.Load()+1, err)
	}
}

// TestSlowClients sends a byte at a time, huge headers, and opens thousands of connections that say nothing.
func TestSlowClients(t *testing.T) {
	_, cfg := alone(t)
	p := startProcess(t, cfg, "LOG_LEVEL=warn")
	p.wantHealth(200, "healthy", "connected", "connected")
	address := strings.TrimPrefix(p.url, "http://")
	dial := func() net.Conn {
		conn := must(net.Dial("tcp", address))
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	// The drip goes on for longer than any timeout; the server must end it.
	drip := func(conn net.Conn, head string) time.Duration {
		began := time.Now()
		fmt.Fprint(conn, head)
		closed := make(chan struct{})
		go func() { _, _ = io.Copy(io.Discard, conn); close(closed) }()
		for byteASecond := time.Tick(time.Second); time.Since(began) < 20*time.Second; {
			select {
			case <-closed:
				return time.Since(began)
			case <-byteASecond:
				fmt.Fprint(conn, "a")
			}
		}
		return time.Since(began)
	}
	var clients sync.WaitGroup
	header, body := dial(), dial()
	clients.Go(func() {
		if took := drip(header, "GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "); took > 8*time.Second {
			t.Errorf("a slow header was read for %v", took)
		}
	})
	clients.Go(func() {
		if took := drip(body, "POST /products HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"); took > 13*time.Second {
			t.Errorf("a slow body was read for %v", took)
		}
	})
	// A body that takes longer than a request may has its whole time afterwards: it is not changed and then refused.
	late := dial()
	clients.Go(func() {
		const text = `{"name":"late","price":1}`
		fmt.Fprintf(late, "POST /products HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(text), text[:9])
		time.Sleep(6 * time.Second)
		fmt.Fprint(late, text[9:])
		if line, err := bufio.NewReader(late).ReadString('\n'); !strings.Contains(line, " 201 ") {
			t.Errorf("a late body: %q %v", line, err)
		}
	})
	for range 5000 {
		dial()
	}
	if a := p.want(200, "GET", "/products", ""); a.took > time.Second {
		t.Errorf("with 5,000 idle connections a request took %v", a.took)
	}
	large := dial()
	go fmt.Fprintf(large, "GET / HTTP/1.1\r\nHost: x\r\nX-Large: %s\r\n\r\n", strings.Repeat("a", 64<<10)) // fails when the server has enough
	if line, err := bufio.NewReader(large).ReadString('\n'); !strings.Contains(line, " 431 ") {
		t.Errorf("huge headers: %q %v", line, err)
	}
	clients.Wait()
	if a := p.want(200, "GET", "/products", ""); !strings.Contains(a.body, `"count":1`) {
		t.Errorf("one slow client's product was acknowledged, but there is: %s", a.body)
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
	doubts := s.cache.doubts.Load()
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
			conn := must(net.Dial("tcp", strings.TrimPrefix(s.url, "http://")))
			fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: leaves\r\n\r\n", request)
			conn.Close()
		}
		eventually(t, "all have arrived", func() bool { return arrived.Load() == begun+100 })
		s.want(200, "GET", "/products", "")
	}
	eventually(t, "half of the clients have left before", func() bool { return left.Load() >= 198 })
	if n := s.cache.doubts.Load() - doubts; n > 0 {
		t.Errorf("%d doubts", n)
	}
	s.wantHealth(200, "healthy", "connected", "connected")
}

// TestAlteredTable changes the type of a column under statements that are prepared already.
func TestAlteredTable(t *testing.T) {
	s := startAlone(t)
	for _, kind := range []string{"bigint", "integer"} {
		for range 2 * poolSize() { // not cached
			s.want(200, "GET", "/products?limit=1", "")
		}
		mustExec(t, psql(t, s.cfg), "ALTER TABLE products ALTER stock TYPE "+kind)
	}
	s.want(200, "GET", "/products?limit=1", "")
}

// TestUnspeakableRow has a row of somebody else's that JSON cannot express: an error, and the service goes on.
func TestUnspeakableRow(t *testing.T) {
	s := startAlone(t)
	path := pathOf(s.create(`{"name":"a","price":1}`))
	mustExec(t, psql(t, s.cfg), "UPDATE products SET created_at = '10001-01-01'")
	for _, path := range []string{path, "/products", "/products?limit=1"} {
		eventually(t, "an error", func() bool { return s.send("GET", path, "").status == 500 })
		s.want(500, "GET", path, "")
	}
	if _, err := psql(t, s.cfg).Exec("UPDATE products SET price = 'NaN'"); err == nil {
		t.Error("PostgreSQL takes a price that is not a number")
	}
	s.want(204, "DELETE", path, "")
	s.want(200, "GET", "/products", "")
}

// TestBadConfiguration names the variable in one line, without a password, and exits with 2.
func TestBadConfiguration(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, value, says string }{
		{"PORT", "http", "from 1 to 65535"}, {"PORT", "70000", "from 1 to 65535"}, {"POSTGRES_PORT", "-1", "from 1 to 65535"},
		{"REDIS_PORT", "6379x", "from 1 to 65535"}, {"CACHE_TTL", "0", "from 1 to 86400"}, {"CACHE_TTL", "5m", "from 1 to 86400"},
		{"POSTGRES_SSLMODE", "maybe", "verify-full"}, {"LOG_LEVEL", "loud", "debug, info, warn, error"},
		{"POSTGRES_HOST", "bad host", "bad host"}, {"POSTGRES_HOST", "[::1", "[::1"},
		{"POSTGRES_PASSWORD_FILE", "/dev/null", "POSTGRES_PASSWORD"}, {"REDIS_PASSWORD_FILE", "/nowhere", "/nowhere"},
	} {
		out, err := webCommand(nil, []string{"POSTGRES_PASSWORD=hush", c.name + "=" + c.value}).CombinedOutput()
		exit, _ := errors.AsType[*exec.ExitError](err)
		if exit == nil || exit.ExitCode() != 2 || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), c.name) ||
			!strings.Contains(string(out), c.says) || strings.Contains(string(out), "hush") {
			t.Errorf("%s=%s: %v %s", c.name, c.value, err, out)
		}
	}
}

// TestUnixSocket connects to the socket in a folder, as libpq does.
func TestUnixSocket(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t)
	cfg.postgresHost = t.TempDir()
	socket := must(net.Listen("unix", cfg.postgresHost+"/.s.PGSQL."+cfg.postgresPort))
	defer socket.Close()
	startReplica(t, cfg)
	_ = socket.(*net.UnixListener).SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := socket.Accept(); err != nil {
		t.Error(err)
	}
}

// TestPing is `web ping`, and the same under the name of ping.
func TestPing(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t)
	link := t.TempDir() + "/ping"
	check(os.Symlink(os.Args[0], link))
	for _, c := range []struct {
		exit int
		args []string
		says string
	}{
		{0, []string{os.Args[0], "ping", "-c", "1", cfg.postgresHost}, "1 tries, 1 connected"},
		{0, []string{link, "-c", "2", net.JoinHostPort(cfg.redisHost, cfg.redisPort)}, "2 tries, 2 connected"},
		{1, []string{link, "-c", "1", "127.0.0.1:1"}, "1 tries, 0 connected"},
		{2, []string{link, "somewhere"}, "HOST:PORT"},
		{2, []string{link}, "usage"},
		{2, []string{os.Args[0], "serve"}, "usage"},
	} {
		cmd := webCommand(c.args[1:], nil)
		cmd.Path, cmd.Args[0] = c.args[0], c.args[0]
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != c.exit || !strings.Contains(string(out), c.says) {
			t.Errorf("%v: %v %s", c.args, err, out)
		}
	}
}

// TestHerd sends a thousand requests at a time, and keeps PostgreSQL from answering before all have arrived. They cost
// two queries at most, which PostgreSQL counts, hit or miss; so does an error that they share, for the race detector to
// watch.
func TestHerd(t *testing.T) {
	cfg := withDatabase(t, testConfig(t))
	redis := startProxy(t, net.JoinHostPort(cfg.redisHost, cfg.redisPort), nil)
	cfg.redisPort = redis.port
	s := startServer(t, cfg)
	path := pathOf(s.create(`{"name":"a","price":1}`))
	db := psql(t, cfg)
	// Every query of the list, or of the one product, calls nextval once. That needs no extension.
	mustExec(t, db, `CREATE SEQUENCE asked`)
	mustExec(t, db, `ALTER TABLE products RENAME TO stored`)
	mustExec(t, db, `CREATE VIEW products AS SELECT id, name || CASE nextval('asked') WHEN 0 THEN '' ELSE '' END AS name, description, price, stock, category, created_at, updated_at FROM stored`)
	var arrived atomic.Int64
	s.serveThrough(func(*http.Request) { arrived.Add(1) })
	all := func(status int, path string) (wait func()) {
		var readers sync.WaitGroup
		for range 1000 {
			readers.Go(func() {
				if a, err := s.trySend("GET", path, ""); err != nil || a.status != status {
					t.Errorf("%d %s %v", a.status, a.body, err)
				}
			})
		}
		return readers.Wait
	}
	all(200, "/")() // opens the connections beforehand: a statement waits for a lock for 2 s only
	herd := func(status int, path string) {
		t.Helper()
		arrived.Store(0)
		mustExec(t, db, `SELECT setval('asked', 1)`)
		tx := lock(db, `LOCK TABLE stored`)
		wait := all(status, path)
		eventually(t, "all requests have arrived", func() bool { return arrived.Load() == 1000 })
		check(tx.Commit())
		wait()
		var asked int
		if err := db.QueryRow(`SELECT last_value - 1 FROM asked`).Scan(&asked); err != nil || asked > 2 || status == 200 && asked < 1 {
			t.Errorf("%d queries for 1,000 requests of %s, %v", asked, path, err)
		}
	}
	herd(200, "/products")
	herd(200, path)
	herd(404, "/products/7")
	redis.lead("")
	eventually(t, "the cache is not trusted", func() bool { return !s.cache.trusted() })
	herd(200, "/products")
}
