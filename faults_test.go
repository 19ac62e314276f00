package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
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
	p := s.create(`{"name":"a","price":1}`)
	path := fmt.Sprintf("/products/%d", p.ID)
	for _, c := range []struct {
		status             int
		method, path, body string
	}{
		{200, "GET", "/", ""}, {200, "GET", "/services", ""}, {200, "GET", "/stats", ""}, {200, "GET", "/products", ""},
		{200, "GET", "/products?limit=5", ""}, {200, "GET", path, ""}, {200, "PUT", path, `{"stock":7}`}, {204, "DELETE", path, ""},
	} {
		slowest = max(slowest, s.want(c.status, c.method, c.path, c.body).took)
	}
	return slowest
}

// TestRedisFails stops Redis, silences it, and brings it back; all but /cache/clear works all the time.
func TestRedisFails(t *testing.T) {
	r, cfg := startRedis(t, withDatabase(t, testConfig(t)))
	s := startServer(t, cfg)
	back := func() {
		t.Helper()
		began := time.Now()
		eventually(t, "the cache is in use again", func() bool { return s.send("GET", "/products", "").header.Get("Cache-Status") == string(hit) })
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("the cache was in use again only after %v", took)
		}
		s.wantHealth(200, "healthy", "connected", "connected")
		s.want(200, "DELETE", "/cache/clear", "")
	}
	back()

	r.kill()
	s.everything()
	s.wantHealth(200, "degraded", "connected", "disconnected")
	s.wantSource(bypass, "/products")
	s.want(503, "DELETE", "/cache/clear", "")
	r.start()
	back()

	r.signal(syscall.SIGSTOP)
	// Whoever comes first waits for Redis once, and not for longer than a command may take.
	if took := s.want(200, "GET", "/products", "").took; took > redisTimeout+redisTimeout/2 {
		t.Errorf("the first request took %v", took)
	}
	if slowest := s.everything(); slowest > redisDialTimeout {
		t.Errorf("a request waited for the silent Redis: %v", slowest)
	}
	s.wantHealth(200, "degraded", "connected", "disconnected")
	s.want(503, "DELETE", "/cache/clear", "")
	r.signal(syscall.SIGCONT)
	back()
}

// TestRedisUnfit gives the service Redis servers that it cannot use: everything works without them.
func TestRedisUnfit(t *testing.T) {
	cfg := withDatabase(t, testConfig(t))
	applySchema(t.Context(), startReplica(t, cfg).db)
	old := listen(t) // a Redis 6 as far as INFO goes
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
						info := "redis_version:6.2.14\r\nrun_id:old\r\n"
						fmt.Fprintf(conn, "$%d\r\n%s\r\n", len(info), info)
					}
				}
			}()
		}
	}()
	oldConfig := cfg
	_, oldConfig.redisPort, _ = net.SplitHostPort(old.Addr().String())
	oldConfig.redisHost = "127.0.0.1"
	_, locked := startRedis(t, cfg, "--requirepass", "secret")
	_, evicting := startRedis(t, cfg, "--maxmemory-policy", "allkeys-lru")
	_, full := startRedis(t, cfg, "--maxmemory", "1", "--maxmemory-policy", "noeviction")
	master, _ := startRedis(t, cfg)
	_, replica := startRedis(t, cfg, "--replicaof", "127.0.0.1 "+master.port)
	for name, cfg := range map[string]config{"version 6": oldConfig, "password": locked, "evicts marks": evicting, "full": full, "read-only replica": replica} {
		t.Run(name, func(t *testing.T) {
			s := startReplica(t, cfg)
			for range 3 {
				<-time.After(heartbeat) // a whole beat in which it might win trust
				if slowest := s.everything(); slowest > 2*time.Second {
					t.Errorf("a request took %v", slowest)
				}
				s.wantSource(bypass, "/products")
			}
		})
	}
	locked.redisPassword = "secret"
	s := startServer(t, locked)
	s.wantSource(miss, "/products")
	s.wantSource(hit, "/products")
}

// TestRedisFillsUp sets a limit while the service trusts its cache.
func TestRedisFillsUp(t *testing.T) {
	r, cfg := startRedis(t, withDatabase(t, testConfig(t)))
	s := startServer(t, cfg)
	s.wantSource(miss, "/products")
	r.do("CONFIG", "SET", "maxmemory", "1")
	s.everything()
	s.wantSource(bypass, "/products")
	r.do("CONFIG", "SET", "maxmemory", "0")
	eventually(t, "the cache is in use again", func() bool { return s.send("GET", "/products", "").header.Get("Cache-Status") == string(hit) })
}

// TestPostgresFails stops PostgreSQL and starts it again: errors that say so at once, then back by itself.
func TestPostgresFails(t *testing.T) {
	cfg := withDatabase(t, testConfig(t))
	s := startServer(t, cfg)
	p := s.create(`{"name":"a","price":1}`)
	path := fmt.Sprintf("/products/%d", p.ID)
	s.wantSource(miss, path)
	s.wantSource(hit, path)

	started := true
	t.Cleanup(func() {
		if !started {
			startPostgres(t, cfg)
		}
	})
	postgres(t, "stop_postgres", "immediate")
	started = false
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

	startPostgres(t, cfg)
	started = true
	back := time.Now()
	eventually(t, "a write works", func() bool { return s.send("PUT", path, `{"stock":2}`).status == 200 })
	eventually(t, "the cache is in use", func() bool { return s.send("GET", path, "").header.Get("Cache-Status") == string(hit) })
	if took := time.Since(back); took > 2*time.Second {
		t.Errorf("back only after %v", took)
	}
	s.wantHealth(200, "healthy", "connected", "connected")
	if body := s.send("GET", path, "").body; !strings.Contains(body, `"stock":2`) {
		t.Errorf("read %s", body)
	}
}

func startPostgres(t testing.TB, cfg config) {
	postgres(t, "start_postgres", cfg.postgresPort, "-c", "fsync=off")
}

// TestPostgresSilent lets a whole PostgreSQL be a port that accepts and never answers.
func TestPostgresSilent(t *testing.T) {
	l := listen(t)
	cfg := testConfig(t)
	cfg.postgresHost = "127.0.0.1"
	_, cfg.postgresPort, _ = net.SplitHostPort(l.Addr().String())
	s := startReplica(t, cfg)
	wantAllUnavailable(t, s)
	s.wantHealth(503, "unhealthy", "disconnected", "connected")
}

// TestPostgresFallsSilent stops a PostgreSQL in use as SIGSTOP does, by a proxy that passes nothing on any more.
func TestPostgresFallsSilent(t *testing.T) {
	cfg := withDatabase(t, testConfig(t))
	var silent atomic.Bool
	behind := cfg
	cfg.postgresHost, cfg.postgresPort = "127.0.0.1", proxy(t, net.JoinHostPort(cfg.postgresHost, cfg.postgresPort), &silent)
	s := startServer(t, cfg)
	s.everything()
	silent.Store(true)
	wantAllUnavailable(t, s)
	s.wantHealth(503, "unhealthy", "disconnected", "connected")
	silent.Store(false)
	// The keys of the writes whose outcome nobody knows stay empty until their marks expire; a new product has none.
	var created answer
	eventually(t, "a write works", func() bool {
		created = s.send("POST", "/products", `{"name":"b","price":1}`)
		return created.status == 201
	})
	eventually(t, "the cache is in use", func() bool {
		return s.send("GET", created.header.Get("Location"), "").header.Get("Cache-Status") == string(hit)
	})
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

// proxy passes connections on to an address until it is told to be silent: then bytes stay where they are.
func proxy(t testing.TB, address string, silent *atomic.Bool) (port string) {
	t.Helper()
	l := listen(t)
	pass := func(to, from net.Conn) {
		defer to.Close()
		defer from.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := from.Read(buf)
			for silent.Load() {
				<-time.After(10 * time.Millisecond)
			}
			if _, failed := to.Write(buf[:n]); err != nil || failed != nil {
				return
			}
		}
	}
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", address)
			if err != nil {
				client.Close()
				continue
			}
			go pass(server, client)
			go pass(client, server)
		}
	}()
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port
}

// A server without TLS says so, and the connection on which it does is closed before another one is made in the clear.
func TestNoConnectionLeftWithoutTLS(t *testing.T) {
	server := listen(t)
	cfg := testConfig(t)
	cfg.postgresSSLMode = "prefer"
	cfg.postgresHost, cfg.postgresPort, _ = net.SplitHostPort(server.Addr().String())
	db, _, err := openDatabase(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	go func() { _ = db.Ping() }() // fails when the server is closed
	conn, err := server.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(conn, make([]byte, 8)); err != nil { // an SSLRequest
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("N")); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection was not closed: %v", err)
	}
}

// TestPoolExhausted holds every connection: requests end in bounded time with a clear status.
func TestPoolExhausted(t *testing.T) {
	s := startServer(t, withDatabase(t, testConfig(t)))
	for range poolSize() {
		conn, err := s.db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	wantAllUnavailable(t, s)
}

// TestLockedRow holds a row's lock in another session: the statement times out, and the cache is in use again.
func TestLockedRow(t *testing.T) {
	cfg := withDatabase(t, testConfig(t))
	s := startServer(t, cfg)
	p := s.create(`{"name":"a","price":1}`)
	path := fmt.Sprintf("/products/%d", p.ID)
	tx, err := psql(t, cfg).Begin()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(`UPDATE products SET stock = 9`); err != nil {
		t.Fatal(err)
	}
	if a := s.want(503, "PUT", path, `{"stock":5}`); a.took > 6*time.Second {
		t.Errorf("it took %v", a.took)
	}
	if body := s.want(200, "GET", path, "").body; !strings.Contains(body, `"stock":0`) {
		t.Errorf("read %s", body)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other session's change is seen", func() bool { return strings.Contains(s.send("GET", path, "").body, `"stock":9`) })
	s.want(200, "PUT", path, `{"stock":5}`)
	if body := s.want(200, "GET", path, "").body; !strings.Contains(body, `"stock":5`) {
		t.Errorf("read %s", body)
	}
}

// A process is the real binary.
type process struct {
	*testServer
	cmd    *exec.Cmd
	stderr *bytes.Buffer
	ended  chan error
}

// startProcess starts the binary on a free port, in check.sh's environment with what is added to it.
func startProcess(t testing.TB, env ...string) *process {
	t.Helper()
	port := freePort(t)
	p := &process{&testServer{t: t, url: "http://127.0.0.1:" + port}, exec.Command(binary(t)), new(bytes.Buffer), make(chan error, 1)}
	p.cmd.Env = append(append(os.Environ(), "PORT="+port), env...)
	p.cmd.Stderr = p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.ended <- p.cmd.Wait() }()
	t.Cleanup(func() { _ = p.cmd.Process.Kill() })
	eventually(t, "the service listens", func() bool { _, err := p.trySend("GET", "/", ""); return err == nil })
	return p
}

// TestServersMissingAtStart starts the service before there is a Redis or a database.
func TestServersMissingAtStart(t *testing.T) {
	cfg := testConfig(t)
	r, withRedis := startRedis(t, cfg)
	r.kill()
	name := fmt.Sprintf("late_%d", os.Getpid())
	p := startProcess(t, "POSTGRES_DB="+name, "REDIS_PORT="+withRedis.redisPort)
	p.wantHealth(503, "unhealthy", "disconnected", "disconnected")
	p.want(503, "GET", "/products", "")
	db := psql(t, cfg)
	mustExec(t, db, "CREATE DATABASE "+name)
	t.Cleanup(func() { mustExec(t, db, "DROP DATABASE "+name+" WITH (FORCE)") })
	p.wantHealth(200, "degraded", "connected", "disconnected")
	p.wantSource(bypass, "/products")
	r.start()
	p.wantHealth(200, "healthy", "connected", "connected")
	eventually(t, "the cache is in use", func() bool { return p.send("GET", "/products", "").header.Get("Cache-Status") == string(hit) })

	health := exec.Command(p.cmd.Path, "health")
	health.Env = p.cmd.Env
	if out, err := health.CombinedOutput(); err != nil {
		t.Errorf("web health: %v %s", err, out)
	}
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.ended
	health = exec.Command(p.cmd.Path, "health")
	health.Env = p.cmd.Env
	if err := health.Run(); err == nil {
		t.Error("web health succeeds without a service")
	}
}

// TestShutdown ends the service under load: whatever it has accepted it answers, and it exits with 0.
func TestShutdown(t *testing.T) {
	cfg := withDatabase(t, testConfig(t))
	p := startProcess(t, "POSTGRES_DB="+cfg.postgresDB)
	p.wantHealth(200, "healthy", "connected", "connected")
	// Writes wait for this lock, so some are in flight for certain when the signal comes.
	tx, err := psql(t, cfg).Begin()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(`LOCK TABLE products IN EXCLUSIVE MODE`); err != nil {
		t.Fatal(err)
	}
	var clients sync.WaitGroup
	var acknowledged, cut atomic.Int64
	for i := range 8 {
		clients.Go(func() {
			a, err := p.trySend("POST", "/products", fmt.Sprintf(`{"name":"p%d","price":1}`, i))
			if err != nil || a.status != 201 {
				cut.Add(1)
				t.Errorf("in flight: %d %v", a.status, err)
			} else {
				acknowledged.Add(1)
			}
		})
	}
	eventually(t, "8 statements wait", func() bool {
		var n int
		err := psql(t, cfg).QueryRow(`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`).Scan(&n)
		return err == nil && n == 8
	})
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no new connection is accepted", func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	clients.Wait()
	if err := <-p.ended; err != nil {
		t.Errorf("exit: %v\n%s", err, p.stderr)
	}
	var n int64
	if err := psql(t, cfg).QueryRow(`SELECT count(*) FROM products`).Scan(&n); err != nil || n != acknowledged.Load() {
		t.Errorf("%d rows for %d acknowledged, %v", n, acknowledged.Load(), err)
	}
}

// TestSlowClients sends a byte at a time, huge headers, and opens thousands of connections that say nothing.
func TestSlowClients(t *testing.T) {
	cfg := withDatabase(t, testConfig(t))
	p := startProcess(t, "POSTGRES_DB="+cfg.postgresDB, "LOG_LEVEL=warn")
	p.wantHealth(200, "healthy", "connected", "connected")
	address := strings.TrimPrefix(p.url, "http://")
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
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
		<-time.After(requestTimeout + time.Second)
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
	if a, err := p.trySend("GET", "/", "", "X-Large", strings.Repeat("a", 64<<10)); err == nil && a.status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("huge headers: %d", a.status)
	}
	clients.Wait()
	if a := p.want(200, "GET", "/products", ""); !strings.Contains(a.body, `"count":1`) {
		t.Errorf("one slow client's product was acknowledged, but there is: %s", a.body)
	}
}

// TestClientsThatLeave closes connections before the answer: no client may end the trust in the cache by that.
func TestClientsThatLeave(t *testing.T) {
	s := startServer(t, withDatabase(t, testConfig(t)))
	doubts := s.cache.doubts.Load()
	for _, request := range []string{"GET /health", "GET /stats", "GET /products", "DELETE /cache/clear"} {
		for range 100 {
			conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: x\r\n\r\n", request)
			conn.Close()
		}
		s.want(200, "GET", "/products", "")
	}
	if n := s.cache.doubts.Load() - doubts; n > 0 {
		t.Errorf("%d doubts", n)
	}
	s.wantHealth(200, "healthy", "connected", "connected")
}

// TestAlteredTable changes the type of a column under statements that are prepared already.
func TestAlteredTable(t *testing.T) {
	s := startServer(t, withDatabase(t, testConfig(t)))
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
	s := startServer(t, withDatabase(t, testConfig(t)))
	p := s.create(`{"name":"a","price":1}`)
	path := fmt.Sprintf("/products/%d", p.ID)
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

// TestListenerWithoutRedis: while there is no Redis, the listener's connection is still looked after.
func TestListenerWithoutRedis(t *testing.T) {
	be := newBench(t)
	be.redis.kill()
	listeners := func() (pids string) {
		if err := psql(t, be.cfg).QueryRow(`SELECT coalesce(string_agg(pid::text, ' ' ORDER BY pid), '') FROM pg_stat_activity
			WHERE datname = current_database() AND query IN ('', 'LISTEN "products"')`).Scan(&pids); err != nil {
			t.Error(err)
		}
		return pids
	}
	before := listeners()
	<-time.After(3 * time.Second) // longer than it waits for an answer
	if after := listeners(); before == "" || after != before {
		t.Errorf("the listeners were %q and are %q", before, after)
	}
}

// TestBadConfiguration names the variable and exits with 2.
func TestBadConfiguration(t *testing.T) {
	program := binary(t)
	for _, c := range []struct{ name, value, says string }{
		{"PORT", "http", "from 1 to 65535"}, {"PORT", "70000", "from 1 to 65535"}, {"POSTGRES_PORT", "-1", "from 1 to 65535"},
		{"REDIS_PORT", "6379x", "from 1 to 65535"}, {"CACHE_TTL", "0", "from 1 to 86400"}, {"CACHE_TTL", "5m", "from 1 to 86400"},
		{"POSTGRES_SSLMODE", "maybe", "verify-full"}, {"LOG_LEVEL", "loud", "debug, info, warn or error"},
	} {
		cmd := exec.Command(program)
		cmd.Env = append(os.Environ(), c.name+"="+c.value)
		out, err := cmd.CombinedOutput()
		exit, _ := errors.AsType[*exec.ExitError](err)
		if exit == nil || exit.ExitCode() != 2 || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), c.name) || !strings.Contains(string(out), c.says) || !strings.Contains(string(out), c.value) {
			t.Errorf("%s=%s: %v %s", c.name, c.value, err, out)
		}
	}
}

// TestPing is `web ping`, and the same under the name of ping.
func TestPing(t *testing.T) {
	program := binary(t)
	cfg := testConfig(t)
	link := t.TempDir() + "/ping"
	if err := os.Symlink(program, link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		exit int
		args []string
		says string
	}{
		{0, []string{program, "ping", "-c", "1", cfg.postgresHost}, "1 tries, 1 connected"},
		{0, []string{link, "-c", "2", net.JoinHostPort(cfg.redisHost, cfg.redisPort)}, "2 tries, 2 connected"},
		{1, []string{link, "-c", "1", "127.0.0.1:1"}, "1 tries, 0 connected"},
		{2, []string{link, "somewhere"}, "HOST:PORT"},
		{2, []string{link}, "usage"},
		{2, []string{program, "serve"}, "usage"},
	} {
		cmd := exec.Command(c.args[0], c.args[1:]...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != c.exit || !strings.Contains(string(out), c.says) {
			t.Errorf("%v: %v %s", c.args, err, out)
		}
	}
}

// herd sends a thousand requests, and keeps PostgreSQL from answering any before all have arrived.
func (s *testServer) herd(status int, path, words string) {
	s.t.Helper()
	var arrived atomic.Int64
	handler := s.handler()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == path {
			arrived.Add(1)
		}
		handler.ServeHTTP(w, r)
	}))
	defer web.Close()
	s.url = web.URL
	all := func(status int, path, words string) (wait func()) {
		var readers sync.WaitGroup
		for range 1000 {
			readers.Go(func() {
				if a, err := s.trySend("GET", path, ""); err != nil || a.status != status || !strings.Contains(a.body, words) {
					s.t.Errorf("%d %s %v", a.status, a.body, err)
				}
			})
		}
		return readers.Wait
	}
	all(200, "/", "")() // opens the connections beforehand: a statement waits for a lock for 5 s only
	tx, err := psql(s.t, s.cfg).Begin()
	if err != nil {
		s.t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`LOCK TABLE products`); err != nil {
		s.t.Fatal(err)
	}
	wait := all(status, path, words)
	eventually(s.t, "all requests have arrived", func() bool { return arrived.Load() == 1000 })
	if err := tx.Commit(); err != nil {
		s.t.Fatal(err)
	}
	wait()
}

// TestColdListCountsQueries counts in PostgreSQL itself what a herd on the cold list costs.
func TestColdListCountsQueries(t *testing.T) {
	s := startServer(t, withDatabase(t, testConfig(t)))
	db := psql(t, s.cfg)
	// Every query of the list calls nextval once, for its only row. That needs no extension.
	mustExec(t, db, `INSERT INTO products (name, price) VALUES ('a', 1)`)
	mustExec(t, db, `CREATE SEQUENCE asked`)
	mustExec(t, db, `ALTER TABLE products RENAME TO stored`)
	mustExec(t, db, `CREATE VIEW products AS SELECT id, name || CASE nextval('asked') WHEN 0 THEN '' ELSE '' END AS name, description, price, stock, category, created_at, updated_at FROM stored`)
	s.herd(200, "/products", `"count":1`)
	var queries int
	if err := db.QueryRow(`SELECT last_value FROM asked`).Scan(&queries); err != nil || queries < 1 || queries > 2 {
		t.Errorf("%d queries for 1,000 requests, %v", queries, err)
	}
}

// TestSharedError gives one lookup's error to a thousand requests, for the race detector to watch.
func TestSharedError(t *testing.T) {
	startServer(t, withDatabase(t, testConfig(t))).herd(404, "/products/7", "product 7 does not exist")
}
