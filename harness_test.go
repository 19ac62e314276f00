package main

import (
	"bytes"
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
	"os/user"
	"path/filepath"
	"regexp"
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

// TestMain is the service itself if DESAFIO3_RUN is set: that is how tests start it as a process, with the race
// detector exactly when they have it themselves. Otherwise it runs the tests. They start their own servers, the first
// time that one is needed. With -short only the unit tests run, which need none.
func TestMain(m *testing.M) {
	if os.Getenv("DESAFIO3_RUN") != "" {
		os.Exit(run(os.Args))
	}
	check(flag.Set("test.parallel", "6")) // a default: most tests wait most of the time, on any number of processors
	flag.Parse()
	if names := flag.Lookup("test.run").Value; testing.Short() && names.String() == "" {
		check(names.Set("^(TestUnit|Fuzz)"))
	}
	slog.SetDefault(slog.New(slog.DiscardHandler))
	setEnvironment()
	input, end, err := os.Pipe()
	check(err)
	guard.Args, guard.Stdin, alive = append(guard.Args, folder), input, end
	guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	check(guard.Start())
	m.Run()
	check(alive.Close())
	_ = guard.Wait() // it kills itself, too
}

// setEnvironment replaces the developer's environment, in which there may be other servers and passwords. Only what Go
// needs and what these tests read themselves stays. The rest is the configuration of tests and children.
func setEnvironment() {
	kept := regexp.MustCompile(`^(PATH|HOME|GO\w*|PROMISE|HISTORY)$`)
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); !kept.MatchString(name) {
			check(os.Unsetenv(name))
		}
	}
	debian, homebrew := must(filepath.Glob("/usr/lib/postgresql/*/bin")), must(filepath.Glob("/*/*/opt/postgresql*/bin"))
	path := slices.Concat([]string{os.Getenv("PATH"), "/usr/sbin"}, debian, homebrew)
	// Everyone may enter /tmp, also the user postgres, and the path of a Unix socket there is short enough for macOS.
	folder = must(os.MkdirTemp("/tmp", "desafio3-"))
	for name, value := range map[string]string{
		"PATH": strings.Join(path, ":"), "TMPDIR": folder, "LC_ALL": "C", "POSTGRES_HOST": "127.0.0.1",
		"POSTGRES_PORT": freePort(), "POSTGRES_USER": "postgres", "POSTGRES_PASSWORD": "postgres123",
		"POSTGRES_DB": "postgres", "REDIS_HOST": "127.0.0.1", "REDIS_PORT": "1",
	} {
		check(os.Setenv(name, value))
	}
}

var (
	folder    string // for all files of these tests and their servers
	databases atomic.Int64
	ports     atomic.Int64
	block     net.Listener // on the first of this run's own ports
	alive     *os.File     // the other end of the guard's input
	// The guard ends what tests have started when this process has ended, also by a panic or a kill, after which no
	// clean-up runs. It is a shell whose input ends with this process. It stops PostgreSQL, whose processes leave the
	// guard's group. It removes the folder, again while something is still written there. Then it kills its group, which
	// each child joins.
	guard = exec.Command("sh", "-c", `cat
		while kill -QUIT $(head -n 1 "$0/data/postmaster.pid"); do sleep 0.1; done
		until rm -rf "$0"; do sleep 0.1; done
		kill -9 0`)
	client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 1000}}
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

// testConfig returns the configuration of a service at these tests' own PostgreSQL, and without a Redis.
func testConfig() config {
	makePostgres()
	return must(configure(os.Getenv))
}

// psql is a session like a person's: its application_name is not the service's.
func psql(t testing.TB, cfg config) *sql.DB {
	dsn := fmt.Sprintf("host=%s port=%s user=%s password=%s dbname=%s sslmode=disable application_name=psql",
		cfg.postgresHost, cfg.postgresPort, cfg.postgresUser, cfg.postgresPassword, cfg.postgresDB)
	db := must(sql.Open("postgres", dsn))
	t.Cleanup(func() { db.Close() })
	return db
}

// ask returns the one value that a query is answered with, on a connection of a pool or in a transaction.
func ask[T any](db interface{ QueryRow(string, ...any) *sql.Row }, query string, args ...any) (value T) {
	check(db.QueryRow(query, args...).Scan(&value))
	return value
}

// lock begins a transaction with a statement that takes a lock.
func lock(db *sql.DB, statement string) *sql.Tx {
	tx := must(db.Begin())
	must(tx.Exec(statement))
	return tx
}

// servers are what a test has of its own: a database and a Redis.
type servers struct {
	config // of a service that uses them
	redis  *redisServer
	psql   *sql.DB
	proxy  *proxy // of startTwo: before Redis
}

// A testServer is the service in this process, behind a real port.
type testServer struct {
	*server
	servers
	t         testing.TB
	url       string
	stopCache func() // ends cache.Run
}

// alone returns servers of the test's own, so that it may run beside others.
func alone(t *testing.T) servers {
	t.Parallel()
	return ownServers(t)
}

// ownServers does the same for a test that must not run beside others: one that stops PostgreSQL, for example. The
// database is dropped when the test ends.
func ownServers(t testing.TB) servers {
	reportStalls(t)
	own := servers{config: testConfig()}.withNewRedis(t)
	admin := psql(t, own.config)
	own.postgresDB = fmt.Sprintf("test_%d", databases.Add(1))
	must(admin.Exec("CREATE DATABASE " + own.postgresDB))
	t.Cleanup(func() { must(admin.Exec("DROP DATABASE " + own.postgresDB + " WITH (FORCE)")) })
	own.psql = psql(t, own.config)
	return own
}

// reportStalls measures ticks of 10 ms. If the test fails, it logs how late the latest tick was. The machine gave the
// test no processor for that long, so a missed time of the protocol may not be the service's fault.
func reportStalls(t testing.TB) {
	var longest atomic.Int64
	go func() {
		const tick = 10 * time.Millisecond
		for began := time.Now(); t.Context().Err() == nil; began = time.Now() {
			time.Sleep(tick)
			longest.Store(max(longest.Load(), int64(time.Since(began)-tick)))
		}
	}()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the machine's longest stall since this test began: %v", time.Duration(longest.Load()))
		}
	})
}

// startAlone starts the service for a test that may run beside others.
func startAlone(t *testing.T) *testServer { return startServer(t, alone(t)) }

// startServer starts the service and waits until it is ready and trusts its cache.
func startServer(t testing.TB, own servers) *testServer {
	s := startReplica(t, own)
	eventually(t, "the cache is trusted", s.cache.Trusted)
	return s
}

// startReplica starts the service without waiting for anything.
func startReplica(t testing.TB, own servers) *testServer {
	s := newServer(own.config)
	ctx, cancel := context.WithCancel(context.Background())
	wait := concurrently(1, func(int) { s.cache.Run(ctx) })
	stop := func() {
		cancel()
		wait() // a heartbeat that has begun may still use Redis
	}
	web := httptest.NewServer(s.handler())
	t.Cleanup(func() { web.Close(); stop(); s.close() })
	return &testServer{server: s, servers: own, t: t, url: web.URL, stopCache: stop}
}

// takePool takes every connection of the pool. What it returns gives them back.
func (s *testServer) takePool() (giveBack func()) {
	var conns []*sql.Conn
	for range poolSize {
		conns = append(conns, must(s.db.Conn(s.t.Context())))
	}
	return func() {
		for _, conn := range conns {
			check(conn.Close())
		}
	}
}

// eventually waits until a condition holds, and returns how long that took, which is at most a twentieth too much. It
// fails the test when the condition does not hold within 15 seconds.
func eventually(t testing.TB, what string, holds func() bool) (took time.Duration) {
	t.Helper()
	for began := time.Now(); !holds(); took = time.Since(began) {
		if took > 15*time.Second {
			t.Fatalf("not within 15 s: %s", what)
		}
		time.Sleep(min(took/20, 5*time.Millisecond))
	}
	return took
}

// expect fails the test unless a condition holds. The message says what was found instead.
func expect(t testing.TB, holds bool, message string, args ...any) {
	t.Helper()
	if !holds {
		t.Errorf(message, args...)
	}
}

// within fails the test if something took longer than its limit.
func within(t testing.TB, took, limit time.Duration, what string) {
	t.Helper()
	expect(t, took <= limit, "%s took %v, the limit is %v", what, took, limit)
}

// equal fails the test unless two values are the same.
func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	expect(t, got == want, "%s: got %v, want %v", what, got, want)
}

// concurrently calls f so many times at the same time, with 0, 1, 2 and so on. What it returns waits for all of them.
func concurrently(times int, f func(i int)) (wait func()) {
	var group sync.WaitGroup
	for i := range times {
		group.Go(func() { f(i) })
	}
	return group.Wait
}

// twice runs a test without and with something, both at the same time and beside other tests.
func twice(t *testing.T, something string, test func(t *testing.T, with bool)) {
	t.Parallel()
	for _, with := range []bool{false, true} {
		t.Run(fmt.Sprint(something, " ", with), func(t *testing.T) { test(t, with) })
	}
}

// An answer is a response that was read whole.
type answer struct {
	t      testing.TB
	status int
	header http.Header
	body   string
	closes bool // the connection
	took   time.Duration
}

func (a answer) source() source { return source(a.header.Get("Cache-Status")) }

// contains fails the test unless the body contains a text.
func (a answer) contains(text string) {
	a.t.Helper()
	expect(a.t, strings.Contains(a.body, text), "no %s in %s", text, a.body)
}

// send makes a request; a body is sent as JSON. Headers come in pairs.
func (s *testServer) send(method, path, text string, headers ...string) (answer, error) {
	began := time.Now()
	r := must(http.NewRequest(method, s.url+path, strings.NewReader(text)))
	if text != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	response, err := client.Do(r)
	if err != nil {
		return answer{took: time.Since(began)}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return answer{s.t, response.StatusCode, response.Header, string(body), response.Close, time.Since(began)}, err
}

// want makes a request and fails the test unless the status is as given. An error must be a problem of RFC 9457, and
// must not reveal internals.
func (s *testServer) want(status int, method, path, body string, headers ...string) answer {
	s.t.Helper()
	a := must(s.send(method, path, body, headers...))
	if a.status != status {
		s.t.Fatalf("%s %s %s: got %d, want %d: %s", method, path, body, a.status, status, a.body)
	}
	equal(s.t, "Cache-Control", a.header.Get("Cache-Control"), "no-cache")
	if status >= 400 {
		var p problem
		err := json.Unmarshal([]byte(a.body), &p)
		ok := err == nil && p.Status == status && p.Title == http.StatusText(status) && p.Detail != ""
		expect(s.t, ok && a.header.Get("Content-Type") == "application/problem+json", "%v %s", a.header, a.body)
		revealed := regexp.MustCompile(`pq:|SELECT|127\.0\.0\.1|goroutine|dial tcp`).FindString(a.body)
		equal(s.t, "what the error reveals", revealed, "")
	}
	return a
}

// create makes a product and returns its path.
func (s *testServer) create(body string) (path string) {
	s.t.Helper()
	return s.want(201, "POST", "/products", body).header.Get("Location")
}

// read fails the test unless the body of a path contains a text and, if sources are named, comes from one of them.
func (s *testServer) read(path, text string, sources ...source) answer {
	s.t.Helper()
	a := s.want(200, "GET", path, "")
	a.contains(text)
	ok := len(sources) == 0 || slices.Contains(sources, a.source())
	expect(s.t, ok, "%s: got %q, want one of %q", path, a.source(), sources)
	return a
}

// awaitHit reads until the cache answers, and returns how long that took. Each answer must contain the text. So errors
// are allowed only if it is empty.
func (s *testServer) awaitHit(path, text string) time.Duration {
	s.t.Helper()
	return eventually(s.t, "a hit of "+path, func() bool {
		a := must(s.send("GET", path, ""))
		a.contains(text)
		return a.source() == hit || s.t.Failed()
	})
}

// awaitText reads until the answer contains a text, and returns how long that took.
func (s *testServer) awaitText(path, text string) time.Duration {
	s.t.Helper()
	return eventually(s.t, text, func() bool { return strings.Contains(must(s.send("GET", path, "")).body, text) })
}

// A child is a process that a test starts, in the tests' environment with what is added to it. It is the service where
// the program is this binary, as TestMain has it. It ends when the test says so or, at the latest, with the guard.
type child struct{ *exec.Cmd }

func newChild(env []string, program string, args ...string) child {
	cmd := exec.Command(program, args...)
	cmd.Env = slices.Concat(os.Environ(), []string{"DESAFIO3_RUN=1"}, env)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: guard.Process.Pid}
	return child{cmd}
}

// unprivileged returns the child as one of the user postgres if the tests run as root, whom PostgreSQL and PgBouncer
// refuse.
func (c child) unprivileged() child {
	if os.Geteuid() == 0 {
		u := must(user.Lookup("postgres"))
		uid, gid := must(strconv.Atoi(u.Uid)), must(strconv.Atoi(u.Gid))
		c.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		check(os.Chown(folder, uid, gid))
		c.Dir = folder
	}
	return c
}

// kill ends it without a warning.
func (c child) kill() {
	_ = c.Process.Kill()
	_ = c.Wait() // an error where it has ended before
}

func (c child) signal(sig syscall.Signal) { check(c.Process.Signal(sig)) }

// A process is a program that serves HTTP.
type process struct {
	child
	*testServer
	path string
	env  []string
	log  *os.File
}

// startProcess starts a program on a free port. Its environment also has what libpq and HTTP clients read: the service
// ignores that. None may leave a data race or a panic in its log.
func startProcess(t testing.TB, path string, cfg config, env ...string) *process {
	port := freePort()
	p := &process{testServer: &testServer{t: t, url: "http://127.0.0.1:" + port}, path: path}
	p.env = append([]string{"PORT=" + port, "POSTGRES_SSLMODE=disable", "POSTGRES_PORT=" + cfg.postgresPort,
		"POSTGRES_DB=" + cfg.postgresDB, "REDIS_PORT=" + cfg.redisPort, "http_proxy=http://127.0.0.1:9",
		"PGHOSTADDR=192.0.2.1", "PGSSLROOTCERT=system", "PGSSLMODE=verify-full", "PGSERVICE=none", "PGTZ=Asia/Tokyo",
		"PGOPTIONS=-c search_path=none", "PGREQUIREAUTH=none", "PGTARGETSESSIONATTRS=standby"}, env...)
	p.log = must(os.Create(filepath.Join(t.TempDir(), "web.log")))
	t.Cleanup(func() {
		p.kill()
		check(p.log.Close())
		log := must(os.ReadFile(p.log.Name()))
		clean := !bytes.Contains(log, []byte("DATA RACE")) && !bytes.Contains(log, []byte("panic"))
		expect(t, clean && !t.Failed(), "the end of the log of %s:\n%s", p.url, log[max(0, len(log)-5000):])
	})
	p.start()
	return p
}

// start starts it, or starts it again, and waits until it listens.
func (p *process) start() {
	p.child = newChild(p.env, p.path)
	p.Stdout, p.Stderr = p.log, p.log
	check(p.Start())
	eventually(p.t, "the service listens", func() bool {
		_, err := p.send("GET", "/", "")
		return err == nil
	})
}

// wantExit runs a command line of the service to its end, and checks its exit status and what it prints.
func wantExit(t testing.TB, status int, prints, path string, env []string, args ...string) {
	t.Helper()
	cmd := newChild(env, path, args...)
	out, err := cmd.CombinedOutput()
	expect(t, cmd.ProcessState.ExitCode() == status && regexp.MustCompile(prints).Match(out), "%v: %v %s", args, err, out)
}

// freePort returns a port that nobody listens on, each only once as long as a run needs fewer than 400: a server may be
// stopped and started again there. Each run has a block of 400, below the range that outgoing connections use, since it
// listens on the first of them.
func freePort() string {
	for block == nil {
		block, _ = net.Listen("tcp", fmt.Sprint("127.0.0.1:", 20_000+400*rand.IntN(30)))
	}
	for {
		port := fmt.Sprint(block.Addr().(*net.TCPAddr).Port + 1 + int(ports.Add(1)%399))
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
}

// A redisServer is a Redis of a test's own, which it may kill, silence and bring back.
type redisServer struct {
	child
	port string
}

// stock holds a few Redis servers for the next tests. A service does not use a Redis before it has been up for a while,
// and these have been when a test takes one.
var stock = make(chan *redisServer, 12)

// withNewRedis returns the same servers, but with another Redis, from the stock.
func (own servers) withNewRedis(t testing.TB) servers {
	own.redis = <-stock
	own.redisPort = own.redis.port
	t.Cleanup(func() { own.redis.kill() })
	return own
}

// launch starts it and waits until it answers, which it does not do while it loads a snapshot.
func (r *redisServer) launch() {
	r.child = newChild(nil, program("redis-server", "valkey-server"),
		"--port", r.port, "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--dbfilename", r.port)
	check(r.Start())
	for range 3000 {
		if _, err := r.try("PING"); err == nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	panic("redis does not answer")
}

// restart kills it and starts it again, with what it saved last.
func (r *redisServer) restart() {
	r.kill()
	r.launch()
}

// do runs a command on a connection that the service does not know. Its words may be in one text.
func (r *redisServer) do(command string, args ...any) any { return must(r.try(command, args...)) }

func (r *redisServer) try(command string, args ...any) (any, error) {
	conn, err := redis.Dial("tcp", "127.0.0.1:"+r.port)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	words := redis.Args{}.AddFlat(strings.Fields(command)).Add(args...)
	return conn.Do(words[0].(string), words[1:]...)
}

// program returns the path of the first of these programs that is installed, or ends the tests.
func program(names ...string) string {
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	panic(strings.Join(names, " or ") + " is missing: install postgresql, redis and pgbouncer with apt-get or brew")
}

// makePostgres makes the tests' PostgreSQL, with a password, and starts it, if all servers are installed. From then on
// there is a stock of Redis servers.
var makePostgres = sync.OnceFunc(func() {
	program("pgbouncer")
	go func() {
		for {
			r := &redisServer{port: freePort()}
			r.launch()
			stock <- r
		}
	}()
	password := filepath.Join(folder, "password")
	check(os.WriteFile(password, []byte(os.Getenv("POSTGRES_PASSWORD")), 0o644))
	// Killed halfway, this would leave shared memory behind. So the guard waits for its end, too.
	options := "-U postgres -A scram-sha-256 --pwfile=" + password + " -E UTF8 --no-locale --no-sync"
	pgCtl([]*os.File{alive}, "init", "-o", options)
	startPostgres()
})

// startPostgres starts PostgreSQL, again if it runs, and returns when it answers. Its Unix socket is in the folder.
// Only benchmarks wait for the disk.
func startPostgres() {
	benchmark := flag.Lookup("test.bench").Value.String() != ""
	pgCtl(nil, "restart", "-m", "immediate", "-o", fmt.Sprintf("-h 127.0.0.1 -p %s -k %s -N 500 -c fsync=%t",
		os.Getenv("POSTGRES_PORT"), folder, benchmark))
}

// pgCtl runs PostgreSQL's own command to make, start or stop it, with files that it keeps open. A test that stops
// PostgreSQL must not run beside others.
func pgCtl(open []*os.File, args ...string) {
	log := filepath.Join(folder, "postgres.log") // of the server
	args = append(args, "-D", filepath.Join(folder, "data"), "-l", log)
	cmd := newChild(nil, program("pg_ctl"), args...).unprivileged()
	cmd.ExtraFiles = open
	if out, err := cmd.CombinedOutput(); err != nil {
		panic(fmt.Sprintf("pg_ctl %v: %v\n%s%s", args, err, out, must(os.ReadFile(log))))
	}
}

// behindPgBouncer returns the same servers, but with a PgBouncer between the service and PostgreSQL. The settings are
// added to those of Debian's package.
func (own servers) behindPgBouncer(t testing.TB, settings string) servers {
	port := freePort()
	file := filepath.Join(folder, "pgbouncer-"+port)
	check(os.WriteFile(file, fmt.Appendf(nil, `[databases]
		* = host=%s port=%s user=%s password=%s
		[pgbouncer]
		listen_addr = 127.0.0.1
		listen_port = %s
		unix_socket_dir =
		auth_type = any
		%s`, own.postgresHost, own.postgresPort, own.postgresUser, own.postgresPassword, port, settings), 0o644))
	c := newChild(nil, program("pgbouncer"), "-q", file).unprivileged()
	c.Stderr = os.Stderr
	check(c.Start())
	t.Cleanup(c.kill)
	own.postgresPort = port
	return own
}

// A proxy stands between the service and a server. It can let connections fall silent, which keeps what is sent until
// they speak again, cut them, and lead new ones to another server.
type proxy struct {
	target string
	ctx    context.Context      // ends with the test
	watch  func(data []byte)    // sees what is passed on; it may take its time, and change it
	line   atomic.Pointer[line] // of new connections
}

// A line is what connections share that were accepted between two changes of a proxy.
type line struct {
	context.Context // its end closes them
	cut             context.CancelFunc
	target          string // where they lead; "" refuses them
	silent          atomic.Bool
}

// startProxy starts a proxy before the server at a port of this machine, and replaces the port by its own.
func startProxy(t testing.TB, port *string, watch func(data []byte)) *proxy {
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	t.Cleanup(func() { l.Close() })
	x := &proxy{target: "127.0.0.1:" + *port, ctx: t.Context(), watch: watch}
	x.renew(x.target)
	go func() {
		for client, err := l.Accept(); err == nil; client, err = l.Accept() {
			go x.serve(client)
		}
	}()
	*port = fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
	return x
}

func (x *proxy) serve(client net.Conn) {
	defer client.Close()
	li := x.line.Load()
	server, err := net.Dial("tcp", li.target) // fails without a target
	if err != nil {
		return
	}
	context.AfterFunc(li, func() { _, _ = client.Close(), server.Close() })
	go x.pass(li, server, client)
	x.pass(li, client, server)
}

// pass carries bytes until one side has closed the connection, and then closes the other.
func (x *proxy) pass(li *line, to, from net.Conn) {
	defer to.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if x.watch != nil {
			x.watch(buf[:n])
		}
		for li.silent.Load() && li.Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
		if _, failed := to.Write(buf[:n]); err != nil || failed != nil {
			return
		}
	}
}

// renew begins a line to a target, and returns that of the connections there are.
func (x *proxy) renew(target string) (old *line) {
	ctx, cut := context.WithCancel(x.ctx)
	return x.line.Swap(&line{Context: ctx, cut: cut, target: target})
}

// lead closes the connections there are and leads new ones to a target, or refuses them when that is empty.
func (x *proxy) lead(target string) { x.renew(target).cut() }

// silence lets the connections that there are now fall silent, but not new ones.
func (x *proxy) silence() { x.renew(x.line.Load().target).silent.Store(true) }

// pause lets all connections fall silent, new ones, too, or lets them speak again.
func (x *proxy) pause(silent bool) { x.line.Load().silent.Store(silent) }
