package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
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

// TestMain is the service itself where DESAFIO3_RUN is set: that is how tests start it as a process, with the race
// detector exactly when they have it themselves. Else it runs the tests, which need servers that scripts/check.sh has
// started, since they stop them and empty them.
func TestMain(m *testing.M) {
	if os.Getenv("DESAFIO3_RUN") != "" {
		os.Exit(run(os.Args))
	}
	if os.Getenv("TEST_DIR") == "" {
		fmt.Println("These tests need a PostgreSQL and a Redis of their own: run ./scripts/check.sh")
		os.Exit(1)
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(io.Discard, nil)))
	flag.Parse()
	// Most tests wait most of the time, so more of them run at the same time than there are processors.
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		_ = parallel.Value.Set("8")
	}
	servers, err := os.MkdirTemp("", "redis")
	if err != nil {
		panic(err)
	}
	// The service does not use a Redis before it has been up for a while: these have been when a test takes one.
	if flag.Lookup("test.bench").Value.String() == "" {
		for range cap(stock) {
			r := &redisServer{dir: servers, port: freePort()}
			r.launch()
			stock <- r
		}
	}
	status := m.Run()
	for len(stock) > 0 {
		(<-stock).kill()
	}
	_ = os.RemoveAll(servers)
	os.Exit(status)
}

var (
	stock     = make(chan *redisServer, 50)
	databases atomic.Int64
	ports     atomic.Int64
	firstPort = rand.Int64N(10_000)
	client    = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 1000}}
)

// must returns a value that a test cannot do without.
func must[T any](value T, err error) T {
	check(err)
	return value
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

// testConfig is the configuration that check.sh puts into the environment.
func testConfig(t testing.TB) config {
	t.Helper()
	cfg := must(configure(os.Getenv))
	return cfg
}

// withDatabase returns cfg with a database of its own, which is dropped when the test ends, and an empty Redis: who
// used it before may have left marks that have not expired.
func withDatabase(t testing.TB, cfg config) config {
	t.Helper()
	conn := must(redis.Dial("tcp", net.JoinHostPort(cfg.redisHost, cfg.redisPort)))
	defer conn.Close()
	must(conn.Do("FLUSHALL"))
	admin := psql(t, cfg)
	name := fmt.Sprintf("test_%d_%d", os.Getpid(), databases.Add(1))
	mustExec(t, admin, "CREATE DATABASE "+name)
	t.Cleanup(func() { mustExec(t, admin, "DROP DATABASE "+name+" WITH (FORCE)") })
	cfg.postgresDB = name
	return cfg
}

// psql is a session like a person's: its application_name is not the service's.
func psql(t testing.TB, cfg config) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", fmt.Sprintf("host=%s port=%s user=%s password=%s dbname=%s sslmode=disable application_name=psql",
		cfg.postgresHost, cfg.postgresPort, cfg.postgresUser, cfg.postgresPassword, cfg.postgresDB))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func mustExec(t testing.TB, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.Exec(query, args...); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

// lock begins a transaction with a statement that takes a lock.
func lock(db *sql.DB, statement string) *sql.Tx {
	tx := must(db.Begin())
	must(tx.Exec(statement))
	return tx
}

// waiting returns how many statements wait for a lock in a database.
func waiting(db *sql.DB) (n int) {
	check(db.QueryRow(`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`).Scan(&n))
	return n
}

// A testServer is the service in this process, behind a real port.
type testServer struct {
	*server
	t         testing.TB
	url       string
	redis     *redisServer // where it is the test's own
	stopCache func()       // ends cache.Run
}

// alone returns a configuration with a database and a Redis of the test's own, so that it may run beside others.
func alone(t *testing.T) (*redisServer, config) {
	t.Helper()
	t.Parallel()
	r, cfg := startRedis(t, testConfig(t))
	return r, withDatabase(t, cfg)
}

// startAlone starts the service for a test that may run beside others.
func startAlone(t *testing.T) *testServer {
	t.Helper()
	r, cfg := alone(t)
	s := startServer(t, cfg)
	s.redis = r
	return s
}

// startServer starts the service and waits until it is ready and trusts its cache.
func startServer(t testing.TB, cfg config) *testServer {
	t.Helper()
	s := startReplica(t, cfg)
	applySchema(t.Context(), s.db)
	eventually(t, "the cache is trusted", s.cache.trusted)
	return s
}

// startReplica starts the service without waiting for anything.
func startReplica(t testing.TB, cfg config) *testServer {
	t.Helper()
	s := must(newServer(cfg))
	ctx, cancel := context.WithCancel(context.Background())
	go s.cache.Run(ctx)
	web := httptest.NewServer(s.handler())
	t.Cleanup(func() { web.Close(); cancel(); s.db.Close() })
	return &testServer{server: s, t: t, url: web.URL, stopCache: cancel}
}

// eventually waits until a condition holds, and fails the test when it does not within 15 seconds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for began := time.Now(); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > 15*time.Second {
			t.Fatalf("not within 15 s: %s", what)
		}
	}
}

// An answer is a response that was read whole.
type answer struct {
	status int
	header http.Header
	body   string
	closes bool // the connection
	took   time.Duration
}

func (a answer) source() source { return source(a.header.Get("Cache-Status")) }

// send makes a request; a body is sent as JSON. Headers come in pairs.
func (s *testServer) send(method, path, body string, headers ...string) answer {
	s.t.Helper()
	a, err := s.trySend(method, path, body, headers...)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

// trySend is send for the goroutines of a test, which may not end it.
func (s *testServer) trySend(method, path, body string, headers ...string) (a answer, err error) {
	began := time.Now()
	defer func() { a.took = time.Since(began) }()
	r, err := http.NewRequest(method, s.url+path, strings.NewReader(body))
	if err != nil {
		return a, err
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	response, err := client.Do(r)
	if err != nil {
		return a, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return answer{status: response.StatusCode, header: response.Header, body: string(text), closes: response.Close}, err
}

// want makes a request and fails the test unless the status is as given.
func (s *testServer) want(status int, method, path, body string, headers ...string) answer {
	s.t.Helper()
	a := s.send(method, path, body, headers...)
	if a.status != status {
		s.t.Fatalf("%s %s %s: got %d, want %d: %s", method, path, body, a.status, status, a.body)
	}
	if status >= 400 {
		wantProblem(s.t, a)
	}
	return a
}

// wantProblem checks that an error says what RFC 9457 wants, and nothing that it must not.
func wantProblem(t testing.TB, a answer) {
	t.Helper()
	var p problem
	if err := json.Unmarshal([]byte(a.body), &p); err != nil || p.Status != a.status || p.Title != http.StatusText(a.status) ||
		p.Detail == "" || a.header.Get("Content-Type") != "application/problem+json" {
		t.Errorf("not a problem: %d %v %s", a.status, a.header, a.body)
	}
	for _, secret := range []string{"pq:", "SELECT", "127.0.0.1", "goroutine", "dial tcp"} {
		if strings.Contains(a.body, secret) {
			t.Errorf("the error tells %q: %s", secret, a.body)
		}
	}
}

// create makes a product and returns it.
func (s *testServer) create(body string) (p product) {
	s.t.Helper()
	check(json.Unmarshal([]byte(s.want(201, "POST", "/products", body).body), &p))
	return p
}

func pathOf(p product) string { return fmt.Sprintf("/products/%d", p.ID) }

// wantSource checks the Cache-Status of a read, and returns the body.
func (s *testServer) wantSource(from source, path string) string {
	s.t.Helper()
	a := s.want(200, "GET", path, "")
	if a.source() != from {
		s.t.Errorf("GET %s: Cache-Status %q, want %q", path, a.source(), from)
	}
	return a.body
}

// awaitHit waits until the cache answers a read, and returns how long that took.
func (s *testServer) awaitHit(path string) time.Duration {
	s.t.Helper()
	began := time.Now()
	eventually(s.t, "a hit of "+path, func() bool { return s.send("GET", path, "").source() == hit })
	return time.Since(began)
}

// A process is the real service: this binary, as TestMain has it.
type process struct {
	*testServer
	env   []string
	log   string // a file
	cmd   *exec.Cmd
	ended chan error
}

// webCommand is a command line of the service, in check.sh's environment with what is added to it.
func webCommand(args, env []string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(append(os.Environ(), "DESAFIO3_RUN=1"), env...)
	return cmd
}

// startProcess starts the service on a free port and waits until it listens. No process may leave a data race or a
// panic in its log.
func startProcess(t testing.TB, cfg config, env ...string) *process {
	t.Helper()
	port := freePort()
	p := &process{testServer: &testServer{t: t, url: "http://127.0.0.1:" + port}, log: filepath.Join(t.TempDir(), "web.log")}
	p.env = append([]string{"PORT=" + port, "POSTGRES_SSLMODE=disable", "POSTGRES_HOST=" + cfg.postgresHost, "POSTGRES_PORT=" + cfg.postgresPort,
		"POSTGRES_DB=" + cfg.postgresDB, "REDIS_HOST=" + cfg.redisHost, "REDIS_PORT=" + cfg.redisPort}, env...)
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.ended
		log, err := os.ReadFile(p.log)
		if err != nil || t.Failed() || strings.Contains(string(log), "DATA RACE") || strings.Contains(string(log), "panic") {
			t.Errorf("the end of the log of %s: %v\n%s", p.url, err, log[max(0, len(log)-5000):])
		}
	})
	p.start()
	eventually(t, "the service listens", func() bool { _, err := p.trySend("GET", "/", ""); return err == nil })
	return p
}

func (p *process) start() {
	p.t.Helper()
	log := must(os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600))
	defer log.Close()
	p.cmd, p.ended = webCommand(nil, p.env), make(chan error, 1)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	check(p.cmd.Start())
	go func(cmd *exec.Cmd, ended chan error) { ended <- cmd.Wait(); close(ended) }(p.cmd, p.ended)
}

// kill ends the process without a warning.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// listen takes a port of 127.0.0.1 until the test ends.
func listen(t testing.TB) (l net.Listener, port string) {
	t.Helper()
	l = must(net.Listen("tcp", "127.0.0.1:0"))
	t.Cleanup(func() { l.Close() })
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return l, port
}

// freePort returns a port that nobody listens on, each only once, from below the range that outgoing connections use:
// a server may be stopped and started again there.
func freePort() string {
	for {
		port := fmt.Sprint(20_000 + (firstPort+ports.Add(1))%12_000)
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
}

// A redisServer is a Redis of a test's own, which it may kill, silence and bring back.
type redisServer struct {
	t         testing.TB
	dir, port string
	cmd       *exec.Cmd
}

// startRedis takes a Redis from the stock and returns a configuration that uses it.
func startRedis(t testing.TB, cfg config) (*redisServer, config) {
	t.Helper()
	r := <-stock
	r.t = t
	t.Cleanup(r.kill)
	r.awaitAnswer()
	cfg.redisHost, cfg.redisPort = "127.0.0.1", r.port
	return r, cfg
}

// launch starts it in its folder, and does not wait for it.
func (r *redisServer) launch() {
	program, err := exec.LookPath("redis-server")
	if err != nil {
		program = "valkey-server"
	}
	r.cmd = exec.Command(program, "--port", r.port, "--bind", "127.0.0.1", "--dir", r.dir, "--save", "", "--dbfilename", r.port)
	if err := r.cmd.Start(); err != nil {
		panic(err)
	}
}

// start starts it again.
func (r *redisServer) start() {
	r.t.Helper()
	r.launch()
	r.awaitAnswer()
}

func (r *redisServer) awaitAnswer() {
	r.t.Helper()
	eventually(r.t, "redis answers", func() bool {
		conn, err := redis.Dial("tcp", "127.0.0.1:"+r.port)
		if err != nil {
			return false
		}
		defer conn.Close()
		_, err = conn.Do("PING") // an error while it loads a snapshot
		return err == nil
	})
}

// dump is the file that SAVE writes.
func (r *redisServer) dump() string { return filepath.Join(r.dir, r.port) }

func (r *redisServer) kill() {
	if r.cmd != nil {
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait()
		r.cmd = nil
	}
}

func (r *redisServer) signal(sig syscall.Signal) {
	r.t.Helper()
	check(r.cmd.Process.Signal(sig))
}

// do runs a command on a connection that the service does not know.
func (r *redisServer) do(command string, args ...any) any {
	r.t.Helper()
	conn := must(redis.Dial("tcp", "127.0.0.1:"+r.port))
	defer conn.Close()
	return must(conn.Do(command, args...))
}

// postgres runs lines of bash with the functions of scripts/lib.sh, to stop and start the PostgreSQL that check.sh has
// started. A test that does so must not run beside others.
func postgres(t testing.TB, lines string) {
	t.Helper()
	cmd := exec.Command("bash", "-c", "set -euo pipefail; source scripts/lib.sh; "+lines)
	cmd.Stderr = os.Stderr // not a pipe: the server would keep it open
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v", lines, err)
	}
}

const (
	stopPostgres  = `stop_postgres "$TEST_DIR" immediate; `
	startPostgres = `start_postgres "$TEST_DIR" "$POSTGRES_PORT" -c fsync=off`
)

// A proxy stands between the service and a server. It can let connections fall silent, which keeps what is sent until
// they speak again, cut them, and lead new ones to another server.
type proxy struct {
	port   string
	delay  func()      // what happens before anything is passed on
	silent atomic.Bool // all connections, new ones, too

	mu     sync.Mutex
	target string // new connections lead there; "" refuses them
	links  map[*link]bool
}

type link struct {
	client, server net.Conn
	silent         atomic.Bool
}

func startProxy(t testing.TB, target string, delay func()) *proxy {
	t.Helper()
	l, port := listen(t)
	x := &proxy{port: port, delay: delay, target: target, links: map[*link]bool{}}
	t.Cleanup(func() { x.silent.Store(false); x.lead("") })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go x.serve(client)
		}
	}()
	return x
}

func (x *proxy) serve(client net.Conn) {
	x.mu.Lock()
	target := x.target
	server, err := net.Dial("tcp", target) // fails without a target
	if err != nil {
		x.mu.Unlock()
		client.Close()
		return
	}
	l := &link{client: client, server: server}
	x.links[l] = true
	x.mu.Unlock()
	go x.pass(l, client, server)
	x.pass(l, server, client)
	x.mu.Lock()
	delete(x.links, l)
	x.mu.Unlock()
}

// pass carries bytes until one side has closed the connection, and then closes the other.
func (x *proxy) pass(l *link, to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if x.delay != nil {
			x.delay()
		}
		for x.silent.Load() || l.silent.Load() {
			time.Sleep(5 * time.Millisecond)
		}
		if _, failed := to.Write(buf[:n]); err != nil || failed != nil {
			return
		}
	}
}

// lead closes the connections there are and leads new ones to a target, or refuses them when that is empty.
func (x *proxy) lead(target string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.target = target
	for l := range x.links {
		l.silent.Store(false)
		_, _ = l.client.Close(), l.server.Close()
	}
}

// cut closes the connections there are and refuses new ones until they are let through again.
func (x *proxy) cut() (mend func()) {
	x.mu.Lock()
	target := x.target
	x.mu.Unlock()
	x.lead("")
	return func() { x.lead(target) }
}

// silence lets the connections that there are now fall silent, but not new ones.
func (x *proxy) silence() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for l := range x.links {
		l.silent.Store(true)
	}
}
