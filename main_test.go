package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// TestMain refuses to run against servers that scripts/check.sh has not started: the tests stop them and empty them.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_DIR") == "" {
		fmt.Println("These tests need a PostgreSQL and a Redis of their own: run ./scripts/check.sh")
		os.Exit(1)
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(io.Discard, nil)))
	transport := http.DefaultTransport.(*http.Transport) // keeps the connections of a herd
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost = 0, 1000
	os.Exit(m.Run())
}

// testConfig is the configuration that check.sh puts into the environment.
func testConfig(t testing.TB) config {
	t.Helper()
	cfg, err := configure(os.Getenv)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// withDatabase returns cfg with a database of its own, which is dropped when the test ends, and an empty Redis: the
// test before may have left marks that have not expired.
func withDatabase(t testing.TB, cfg config) config {
	t.Helper()
	conn, err := redis.Dial("tcp", net.JoinHostPort(cfg.redisHost, cfg.redisPort))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Do("FLUSHALL"); err != nil {
		t.Fatal(err)
	}
	admin := psql(t, cfg)
	name := fmt.Sprintf("test_%d_%d", os.Getpid(), databases.Add(1))
	mustExec(t, admin, "CREATE DATABASE "+name)
	t.Cleanup(func() { mustExec(t, admin, "DROP DATABASE "+name+" WITH (FORCE)") })
	cfg.postgresDB = name
	return cfg
}

var databases atomic.Int64

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

// A testServer is the service in this process, behind a real port.
type testServer struct {
	*server
	t   testing.TB
	url string
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
	db, dsn, err := openDatabase(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{cfg: cfg, db: db, cache: newCache(cfg, db, dsn), started: time.Now()}
	ctx, cancel := context.WithCancel(context.Background())
	go s.cache.Run(ctx)
	web := httptest.NewServer(s.handler())
	t.Cleanup(func() { web.Close(); cancel(); db.Close() })
	return &testServer{s, t, web.URL}
}

// eventually waits until a condition holds, and fails the test when it does not within 10 seconds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// An answer is a response that was read whole.
type answer struct {
	status int
	header http.Header
	body   string
	took   time.Duration
}

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
func (s *testServer) trySend(method, path, body string, headers ...string) (answer, error) {
	r, err := http.NewRequest(method, s.url+path, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	began := time.Now()
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return answer{response.StatusCode, response.Header, string(text), time.Since(began)}, err
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
func (s *testServer) create(body string) product {
	s.t.Helper()
	var p product
	if err := json.Unmarshal([]byte(s.want(201, "POST", "/products", body).body), &p); err != nil {
		s.t.Fatal(err)
	}
	return p
}

// wantSource checks the Cache-Status of a read, and returns the body.
func (s *testServer) wantSource(from source, path string) string {
	s.t.Helper()
	a := s.want(200, "GET", path, "")
	if got := a.header.Get("Cache-Status"); got != string(from) {
		s.t.Errorf("GET %s: Cache-Status %q, want %q", path, got, from)
	}
	return a.body
}

// A redisServer is a Redis of the test's own, which it may kill, silence and bring back.
type redisServer struct {
	t    testing.TB
	dir  string
	port string
	args []string
	cmd  *exec.Cmd
}

// startRedis starts a Redis and returns a configuration that uses it.
func startRedis(t testing.TB, cfg config, args ...string) (*redisServer, config) {
	t.Helper()
	r := &redisServer{t: t, dir: t.TempDir(), port: freePort(t), args: args}
	r.start()
	t.Cleanup(r.kill)
	cfg.redisHost, cfg.redisPort = "127.0.0.1", r.port
	return r, cfg
}

// listen takes a port of 127.0.0.1 until the test ends.
func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// freePort returns a port of 127.0.0.1 that nobody listens on now.
func freePort(t testing.TB) string {
	t.Helper()
	l := listen(t)
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func (r *redisServer) start() {
	r.t.Helper()
	program, err := exec.LookPath("redis-server")
	if err != nil {
		if program, err = exec.LookPath("valkey-server"); err != nil {
			r.t.Fatal(err)
		}
	}
	r.cmd = exec.Command(program, append([]string{"--port", r.port, "--bind", "127.0.0.1", "--dir", r.dir, "--save", ""}, r.args...)...)
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	eventually(r.t, "redis answers", func() bool {
		conn, err := net.Dial("tcp", "127.0.0.1:"+r.port)
		if err != nil {
			return false
		}
		defer conn.Close()
		fmt.Fprint(conn, "PING\r\n")
		reply := make([]byte, 64)
		n, _ := conn.Read(reply)
		return bytes.HasPrefix(reply[:n], []byte("+PONG")) || bytes.HasPrefix(reply[:n], []byte("-NOAUTH"))
	})
}

func (r *redisServer) kill() {
	if r.cmd != nil {
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait()
		r.cmd = nil
	}
}

func (r *redisServer) signal(sig syscall.Signal) {
	r.t.Helper()
	if err := r.cmd.Process.Signal(sig); err != nil {
		r.t.Fatal(err)
	}
}

// do runs a command on a connection that the service does not know.
func (r *redisServer) do(command string, args ...any) any {
	r.t.Helper()
	conn, err := redis.Dial("tcp", "127.0.0.1:"+r.port)
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	reply, err := conn.Do(command, args...)
	if err != nil {
		r.t.Fatalf("%s: %v", command, err)
	}
	return reply
}

// postgres runs a function of scripts/lib.sh on the PostgreSQL that check.sh has started for the tests.
func postgres(t testing.TB, function string, args ...string) {
	t.Helper()
	script := `source scripts/lib.sh; f=$1; shift; "$f" "$TEST_DIR" "$@"`
	out, err := exec.Command("bash", append([]string{"-c", script, "bash", function}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", function, err, out)
	}
}

// binary builds the service, with flags of go build, and returns its path.
func binary(t testing.TB, flags ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "web")
	if out, err := exec.Command("go", append([]string{"build", "-o", path}, flags...)...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}
