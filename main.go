// Command web is a product catalogue API over PostgreSQL with a Redis cache that never lies.
//
// Start with endpoints, below: it lists every route of the API, and each handler is one jump from there.
//
//	main.go      settings, routes, server and shutdown, errors, JSON, and the connections to PostgreSQL
//	products.go  the product: its rules, its SQL, its handlers
//	cache.go     Redis: how response bodies are cached so that no read returns stale data
//	health.go    what the service reports about itself and both servers; the commands health and ping
package main

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// The binary embeds the schema, so it needs only an empty database.
//
//go:embed schema.sql
var schema string

func main() { os.Exit(run(os.Args)) }

// run serves, or runs a subcommand, and returns the exit status: 2 for a usage error or a bad setting, and 1 for any
// other failure.
func run(args []string) int {
	if filepath.Base(args[0]) == "ping" { // the image has a link with this name
		args = append([]string{"web", "ping"}, args[1:]...)
	}
	cfg, err := configure(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.logLevel})))
	switch {
	case len(args) == 1:
		err = serve(ctx, cfg)
	case args[1] == "health" && len(args) == 2:
		err = healthCommand(cfg)
	case args[1] == "ping":
		err = pingCommand(ctx, cfg, args[2:])
	default:
		err = errUsage
	}
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, err)
	if errors.Is(err, errUsage) {
		return 2
	}
	return 1
}

var errUsage = errors.New("usage: web [health | ping [-c N] HOST[:PORT]]")

// ---------------------------------------------------------------- settings

// A config holds the settings, all from the environment.
type config struct {
	bindAddress, port                       string
	postgresHost, postgresPort, postgresDB  string
	postgresUser, postgresPassword, sslMode string
	redisHost, redisPort, redisPassword     string
	cacheTTL, drainTime                     time.Duration
	logLevel                                slog.Level
}

// settings reads environment variables and records the first fault: one line that names the variable and what it
// accepts. A fault never contains a password.
type settings struct {
	getenv func(string) string
	fault  error
}

// check returns a variable, or the fallback if it is empty. An invalid value is a fault: it is better to stop here with
// a clear message than to fail at the first request.
func (s *settings) check(name, fallback, accepts string, valid func(string) bool) string {
	value := cmp.Or(s.getenv(name), fallback)
	if !valid(value) && s.fault == nil {
		s.fault = fmt.Errorf("%s must be %s, not %q", name, accepts, value)
	}
	return value
}

// number returns a whole number from min to max.
func (s *settings) number(name, fallback string, min, max int) (n int) {
	s.check(name, fallback, fmt.Sprintf("a whole number from %d to %d", min, max), func(value string) bool {
		var err error
		n, err = strconv.Atoi(value)
		return err == nil && n >= min && n <= max
	})
	return n
}

// port returns a port as a string, which is what Go's network functions expect.
func (s *settings) port(name, fallback string) string {
	return strconv.Itoa(s.number(name, fallback, 1, 65535))
}

var hostName = regexp.MustCompile(`^[A-Za-z0-9_.-]*$`)

// host returns the name or address of a host. POSTGRES_HOST may also be the folder of a Unix socket.
func (s *settings) host(name, fallback string) string {
	return s.check(name, fallback, "the name or the IP address of a host", func(value string) bool {
		_, err := netip.ParseAddr(value)
		return err == nil || hostName.MatchString(value) || name == "POSTGRES_HOST" && filepath.IsAbs(value)
	})
}

// secret returns a password from the variable, or from the file that NAME_FILE names. Swarm provides secrets as files.
func (s *settings) secret(name string) string {
	value, file := s.getenv(name), s.getenv(name+"_FILE")
	if file == "" {
		return value
	}
	content, err := os.ReadFile(file)
	s.check(name+"_FILE", "", "a file that can be read", func(string) bool { return err == nil })
	s.check(name+"_FILE", "", "empty if "+name+" is set", func(string) bool { return value == "" })
	return strings.TrimRight(string(content), "\r\n")
}

var sslModes = []string{"disable", "prefer", "require", "verify-ca", "verify-full"}

// configure reads the settings. Its error is one line for the person who runs the program.
func configure(getenv func(string) string) (config, error) {
	s := &settings{getenv: getenv}
	cfg := config{
		bindAddress:      s.host("BIND_ADDRESS", ""), // empty: every address of the machine
		port:             s.port("PORT", "8000"),
		postgresHost:     s.host("POSTGRES_HOST", "localhost"),
		postgresPort:     s.port("POSTGRES_PORT", "5432"),
		postgresDB:       cmp.Or(getenv("POSTGRES_DB"), "products_db"),
		postgresUser:     cmp.Or(getenv("POSTGRES_USER"), "postgres"),
		postgresPassword: s.secret("POSTGRES_PASSWORD"),
		redisHost:        s.host("REDIS_HOST", "localhost"),
		redisPort:        s.port("REDIS_PORT", "6379"),
		redisPassword:    s.secret("REDIS_PASSWORD"),
		cacheTTL:         time.Duration(s.number("CACHE_TTL", "300", 1, 86400)) * time.Second,
		drainTime:        time.Duration(s.number("DRAIN_SECONDS", "2", 0, 300)) * time.Second,
	}
	accepts := "one of " + strings.Join(sslModes, ", ")
	cfg.sslMode = s.check("POSTGRES_SSLMODE", "prefer", accepts, func(value string) bool {
		return slices.Contains(sslModes, value)
	})
	s.check("LOG_LEVEL", "info", "one of debug, info, warn, error", func(value string) bool {
		return cfg.logLevel.UnmarshalText([]byte(value)) == nil
	})
	return cfg, s.fault
}

// ---------------------------------------------------------------- the server

const (
	drainLimit      = 5 * time.Second        // how long to wait, after drainTime, for new connections to stop
	quietTime       = 500 * time.Millisecond // with no new connection for this long, none is expected
	shutdownTimeout = 10 * time.Second       // after that, for requests in flight
)

// A server answers the API's requests. It holds everything that the handlers need: no connection is global.
type server struct {
	cfg           config
	db            *sql.DB // a pool, which connects on demand
	healthDB      *sql.DB // one connection: an exhausted pool is no reason to replace a replica
	cache         *cache
	largeAnswers  chan struct{} // a counting semaphore: see takeSlot
	largeRequests chan struct{} // another one
	started       time.Time
	stopping      atomic.Bool // every response now closes its connection
}

// newServer returns a server, which connects to PostgreSQL and Redis on demand. The caller must start cache.Run.
func newServer(cfg config) *server {
	mayPrepare := new(atomic.Bool)
	db := openDatabase(cfg, statementTimeout+500*time.Millisecond, poolSize, mayPrepare, statements...)
	return &server{
		cfg:           cfg,
		db:            db,
		healthDB:      openDatabase(cfg, healthTimeout, 1, mayPrepare),
		largeAnswers:  make(chan struct{}, maxLarge),
		largeRequests: make(chan struct{}, maxLarge),
		started:       time.Now(),
		cache: newCache(cacheConfig{
			db:            db,
			heartbeatDB:   openDatabase(cfg, heartbeatTimeout, 1, mayPrepare, selectGuards),
			mayPrepare:    mayPrepare,
			newListener:   func(f pq.EventCallbackType) *pq.Listener { return openListener(cfg, f) },
			applySchema:   func(ctx context.Context) error { return applySchema(ctx, cfg) },
			redisAddress:  net.JoinHostPort(cfg.redisHost, cfg.redisPort),
			redisPassword: cfg.redisPassword,
			ttl:           cfg.cacheTTL,
		}),
	}
}

// close closes the connections to PostgreSQL, except the heartbeat's and the listener's, which Run closes.
func (s *server) close() {
	_ = s.db.Close()
	_ = s.healthDB.Close()
}

// serve runs the service until the context ends, and then drains it. A load balancer learns only from /health that this
// replica is stopping, and sends requests until then. So the service keeps answering for a while. It ends when no new
// connections arrive.
func serve(ctx context.Context, cfg config) error {
	s := newServer(cfg)
	defer s.close()
	// Nearly all garbage comes from requests. Collecting it half as often costs only a few MiB.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200)
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(cfg.bindAddress, cfg.port))
	if err != nil {
		return err
	}
	// Requests in flight still need the cache's background work, so it stops after them.
	background, stop := context.WithCancel(context.Background())
	defer stop()
	go s.cache.Run(background)

	quiet := time.NewTimer(quietTime)
	// Without these limits, one client could hold a connection and its memory forever. The header must arrive within
	// ReadHeaderTimeout, and the whole request within ReadTimeout. If a client does not read its response, the server
	// gives up after WriteTimeout. Between requests, the server keeps a connection open for IdleTimeout.
	srv := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				quiet.Reset(quietTime)
			}
		},
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(listener) }()
	slog.Info("serving", "address", listener.Addr().String(), "version", version())
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	slog.Info("stopping")
	s.stopping.Store(true)
	time.Sleep(cfg.drainTime)
	// Closing the listener resets the connections in its queue, so wait until no new ones arrive.
	select {
	case <-quiet.C:
	case <-time.After(drainLimit):
	}
	last, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(last); err != nil {
		slog.Warn("shutdown cut off requests", "error", err)
	}
	return nil
}

// An endpoint is a route. Its handler either answers the request, or writes nothing and returns an error. So one
// function, respondError, turns all errors into responses.
type endpoint struct {
	pattern, about string
	handle         func(http.ResponseWriter, *http.Request) error
}

// endpoints returns every route of the API. GET / lists them.
func (s *server) endpoints() []endpoint {
	return []endpoint{
		{"GET /{$}", "this list", s.index},
		{"GET /health", "whether PostgreSQL and Redis are available", s.health},
		{"GET /services", "the state of each service", s.services},
		{"GET /stats", "figures of the cache, the catalogue and the pools", s.stats},
		{"GET /products", "all products; with category, limit or after, a page of them", s.listProducts},
		{"GET /products/{id}", "one product", s.getProduct},
		{"POST /products", "create a product", s.createProduct},
		{"PUT /products/{id}", "change the fields that are sent", s.updateProduct},
		{"DELETE /products/{id}", "delete a product", s.deleteProduct},
		{"DELETE /cache/clear", "empty the cache", s.clearCache},
	}
}

// handler routes requests, writes the access log, and turns every error into a response.
func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	for _, e := range s.endpoints() {
		mux.HandleFunc(e.pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := e.handle(w, r); err != nil {
				respondError(w, r, err)
			}
		})
	}
	browsers := http.NewCrossOriginProtection()
	log := func(rec *recorder, started time.Time) {
		if r := rec.request; slog.Default().Enabled(r.Context(), slog.LevelInfo) {
			slog.LogAttrs(r.Context(), slog.LevelInfo, "request",
				slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Int("status", rec.status),
				slog.Int("bytes", rec.bytes), slog.Duration("duration", time.Since(started)),
				slog.String("cache", rec.Header().Get("Cache-Status")))
		}
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Pass net/http's own ResponseWriter, not the recorder: only the former closes the connection of a client that
		// sends too much. With the recorder, that client would get its answer only after it had sent everything.
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		rec := &recorder{ResponseWriter: w, request: r}
		defer log(rec, time.Now()) // deferred, so that it also logs a handler's panic
		w.Header().Set("Cache-Control", "no-cache")
		if s.stopping.Load() {
			w.Header().Set("Connection", "close") // so that the client's next request can go to another replica
		}
		if err := browsers.Check(r); err != nil {
			respondError(rec, r, problemf(http.StatusForbidden, "a page of another site may not change anything here"))
		} else if mux.ServeHTTP(rec, r); rec.refused != 0 {
			detail := "%s %s is not an endpoint: GET / lists them"
			respondError(rec, r, problemf(rec.refused, detail, r.Method, r.URL.Path))
		}
	})
}

// A recorder is a ResponseWriter that notes what is sent, for the access log. It also discards the router's plain-text
// answer when no pattern matches, and respondError sends a problem instead. The header Allow, which the router sets
// with a 405, stays.
type recorder struct {
	http.ResponseWriter
	request                *http.Request
	status, bytes, refused int
}

func (rec *recorder) WriteHeader(status int) {
	unmatched := rec.request.Pattern == "" && (status == http.StatusNotFound || status == http.StatusMethodNotAllowed)
	if unmatched && rec.refused == 0 {
		rec.refused = status
		return
	}
	rec.status = status
	rec.ResponseWriter.WriteHeader(status)
}

func (rec *recorder) Write(b []byte) (int, error) {
	if rec.refused != 0 && rec.status == 0 {
		return len(b), nil
	}
	rec.status = cmp.Or(rec.status, http.StatusOK) // net/http sends this if a handler sets no status
	n, err := rec.ResponseWriter.Write(b)
	rec.bytes += n
	return n, err
}

// ---------------------------------------------------------------- errors and JSON

// A problem is an error for the client (RFC 9457). It is all that the client sees of an error. If a body breaks rules,
// Errors says what is wrong with each field.
type problem struct {
	Title  string            `json:"title"`
	Status int               `json:"status"`
	Detail string            `json:"detail"`
	Errors map[string]string `json:"errors,omitempty"`
}

func (p *problem) Error() string { return p.Detail }

// problemf returns a problem with a detail that is formatted as by fmt.Sprintf.
func problemf(status int, format string, args ...any) *problem {
	return &problem{Status: status, Detail: fmt.Sprintf(format, args...)}
}

// respondError turns an error into a response: a problem into itself, and errors with a known meaning into a problem.
// Every 503 has Retry-After, unless the change may have been made. Any other error is a bug, which respondError logs
// and hides from the client.
func respondError(w http.ResponseWriter, r *http.Request, err error) {
	p, ok := errors.AsType[*problem](err)
	switch {
	case ok:
	case errors.Is(err, errNotFound):
		p = problemf(http.StatusNotFound, "product %s does not exist", r.PathValue("id"))
	case errors.Is(err, context.Canceled) && r.Context().Err() != nil: // the client has left; only the log sees this
		p = problemf(499, "the client closed the connection")
	case errors.Is(err, errOutcomeUnknown):
		// A client that repeats a creation now would make a second product, so there is no Retry-After.
		slog.Warn("database unavailable, outcome unknown", "error", err)
		p = problemf(http.StatusServiceUnavailable,
			"database unavailable: the change may have been made; check before you repeat it")
	case isRefusal(err):
		p = problemf(http.StatusConflict, "a rule in the database does not allow this change")
	case unavailable(err):
		slog.Warn("database unavailable", "error", err)
		p = problemf(http.StatusServiceUnavailable, "database unavailable")
	default:
		slog.Error("internal error", "method", r.Method, "path", r.URL.Path, "error", err)
		p = problemf(http.StatusInternalServerError, "internal error")
	}
	if p.Status == http.StatusServiceUnavailable && !errors.Is(err, errOutcomeUnknown) {
		w.Header().Set("Retry-After", "1")
	}
	answer := *p // a copy, because several requests share a lookup's error
	answer.Title = http.StatusText(p.Status)
	body, _ := encode(answer) // strings always encode
	respond(w, p.Status, "application/problem+json", body)
}

// respond sends a whole body with its type and length.
func respond(w http.ResponseWriter, status int, mediaType string, body []byte) {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // an error means that the client has left
}

// respondJSON sends v as JSON. If encode fails, it sends nothing and returns the error.
func respondJSON(w http.ResponseWriter, status int, v any) error {
	body, err := encode(v)
	if err == nil {
		respond(w, status, "application/json", body)
	}
	return err
}

// encode returns v as a line of JSON.
func encode(v any) ([]byte, error) {
	var buf bytes.Buffer
	err := newEncoder(&buf).Encode(v)
	return buf.Bytes(), err
}

// newEncoder returns an encoder that does not escape <, > and &, because this JSON is never embedded in HTML.
func newEncoder(w io.Writer) *json.Encoder {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc
}

// ---------------------------------------------------------------- PostgreSQL

// poolSize is how many connections the pool may open. The heartbeat, /health and the listener have one each, 15 in
// total: PgBouncer's default of 20 suffices for one replica, and PostgreSQL's default of 100 for six. It does not
// grow with the processors: each connection may be reading an answer of maxAnswer bytes, and memory is limited.
const poolSize = 12

// dataSource returns lib/pq's connection string. None of libpq's own settings apply: dataSource unsets the environment
// variables PG… and SSLPG…, and disables the password file.
func dataSource(cfg config) string {
	for _, variable := range os.Environ() {
		name, _, _ := strings.Cut(variable, "=")
		if strings.HasPrefix(strings.TrimPrefix(name, "SSL"), "PG") {
			_ = os.Unsetenv(name)
		}
	}
	quote := strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace
	// The trigger in schema.sql recognizes the service's own writes by their application_name. With binary_parameters,
	// an unprepared query takes one round trip. The password file cannot exist: lib/pq warns about an unsuitable one.
	return fmt.Sprintf("application_name=desafio3 connect_timeout=2 binary_parameters=yes passfile=/dev/null/none"+
		" host='%s' port='%s' user='%s' password='%s' dbname='%s' sslmode='%s'",
		quote(cfg.postgresHost), cfg.postgresPort, quote(cfg.postgresUser), quote(cfg.postgresPassword),
		quote(cfg.postgresDB), cfg.sslMode)
}

// openDatabase returns a pool of at most size connections, which connects on demand. Every read from a connection ends
// after readTimeout. While mayPrepare is set, each connection prepares the statements once.
func openDatabase(cfg config, readTimeout time.Duration, size int, mayPrepare *atomic.Bool,
	statements ...string) *sql.DB {
	db := sql.OpenDB(connector{dataSource(cfg), readTimeout, mayPrepare, statements})
	// All open connections may stay idle, because opening one costs more than a statement.
	db.SetMaxOpenConns(size)
	db.SetMaxIdleConns(size)
	db.SetConnMaxIdleTime(time.Minute) // before a firewall drops the idle connection
	return db
}

// openListener returns a listener, which connects at once and reconnects until it is closed. The service's own
// notification arrives every second, so a connection that stays quiet for readTimeout is lost.
func openListener(cfg config, onEvent pq.EventCallbackType) *pq.Listener {
	d := &dialer{readTimeout: 2500 * time.Millisecond}
	return pq.NewDialListener(d, dataSource(cfg), heartbeat, heartbeat, onEvent)
}

// applySchema applies schema.sql. Its read timeout is long, because an index on a large table may take minutes.
func applySchema(ctx context.Context, cfg config) error {
	db := openDatabase(cfg, 10*time.Minute, 1, new(atomic.Bool))
	defer db.Close()
	_, err := db.ExecContext(ctx, schema)
	return err
}

// A dialer opens connections to PostgreSQL on which every read ends after readTimeout: a query's context cannot end a
// read from an unresponsive server. The dialer remembers its last connection.
type dialer struct {
	readTimeout time.Duration
	last        *timeoutConn
}

func (d *dialer) Dial(network, address string) (net.Conn, error) {
	return d.DialTimeout(network, address, d.readTimeout)
}

func (d *dialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	if d.last != nil {
		// With sslmode=prefer, if the server has no TLS, lib/pq connects again and leaves the first connection open.
		_ = d.last.Close()
	}
	conn, err := net.DialTimeout(network, address, timeout)
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		// This makes Close discard undelivered data. Otherwise the kernel would keep trying, and an abandoned statement
		// could reach PostgreSQL after its writer's mark has expired.
		_ = tcp.SetLinger(0)
	}
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	d.last = &timeoutConn{Conn: conn, readTimeout: d.readTimeout, raw: raw}
	return d.last, nil
}

// A timeoutConn is a connection on which every read ends after readTimeout.
type timeoutConn struct {
	net.Conn
	readTimeout time.Duration
	limit       time.Time // lib/pq's deadline while it connects
	raw         syscall.RawConn
	peeked      [1]byte
}

func (c *timeoutConn) SetDeadline(t time.Time) error {
	c.limit = t
	return c.Conn.SetDeadline(t)
}

func (c *timeoutConn) Read(b []byte) (int, error) {
	deadline := time.Now().Add(c.readTimeout)
	if !c.limit.IsZero() && c.limit.Before(deadline) {
		deadline = c.limit
	}
	if err := c.SetReadDeadline(deadline); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

// idle reports whether the connection is open and has no data to read. It peeks at the socket, without waiting and
// without a round trip.
func (c *timeoutConn) idle() bool {
	var peek error
	err := c.raw.Control(func(fd uintptr) {
		_, _, peek = syscall.Recvfrom(int(fd), c.peeked[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	})
	return err == nil && peek == syscall.EAGAIN
}

// errNotConnected says that connecting to PostgreSQL failed. Errors wrap it but include the reason only as text: lib/pq
// hides the type of some reasons, and all of them mean the same here.
var errNotConnected = errors.New("could not connect to PostgreSQL")

// A connector opens the connections of a pool.
type connector struct {
	dsn         string
	readTimeout time.Duration
	mayPrepare  *atomic.Bool // set while each connection is known to be one PostgreSQL session
	statements  []string
}

func (c connector) Driver() driver.Driver { return pq.Driver{} }

// Connect returns a connection on which PostgreSQL ends every statement that takes longer than statementTimeout.
func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	pqConnector, err := pq.NewConnector(c.dsn)
	if err != nil {
		return nil, err
	}
	d := &dialer{readTimeout: c.readTimeout} // one per connection, to learn its socket
	pqConnector.Dialer(d)
	conn, err := pqConnector.Connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", errNotConnected, err)
	}
	own := &preparedConn{pqConn: conn.(pqConn), connector: c, socket: d.last}
	// Not a connection parameter: PgBouncer refuses those that it does not know.
	setTimeout := fmt.Sprintf("SET statement_timeout = %d", statementTimeout.Milliseconds())
	_, err = own.ExecContext(context.Background(), setTimeout, nil)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("%w: %v", errNotConnected, err)
	}
	return own, nil
}

// A pqConn has the methods of lib/pq's connections that database/sql uses.
type pqConn interface {
	driver.Conn
	driver.ConnPrepareContext
	driver.QueryerContext
	driver.ExecerContext
	driver.SessionResetter
	driver.Validator
}

// A preparedConn is a connection that prepares its statements once, so that PostgreSQL does not parse and plan them for
// every request. Only statement_timeout ends a query that was sent: PostgreSQL then reports that nothing was
// changed. A context does not, because lib/pq would drop the connection and leave the outcome unknown.
type preparedConn struct {
	pqConn
	connector
	socket   *timeoutConn
	prepared map[string]driver.Stmt // by query
}

// ResetSession runs when database/sql takes a connection from the pool. It rejects a connection that died while idle
// (idle_session_timeout, a firewall, pg_terminate_backend), and database/sql takes another one. Unread data means death
// too: on an idle connection, it is usually PostgreSQL's last message.
func (c *preparedConn) ResetSession(ctx context.Context) error {
	if !c.socket.idle() {
		return driver.ErrBadConn
	}
	// Prepare here and not when a statement is sent: in between, a writer checks that its announcement is not too old. But
	// do not prepare behind a pooler in transaction mode. lib/pq names statements by number, so the pooler may switch to
	// a session that has a different statement under the same name.
	if c.prepared == nil && c.mayPrepare.Load() {
		c.prepared = map[string]driver.Stmt{}
		for _, query := range c.statements {
			stmt, err := c.pqConn.PrepareContext(context.WithoutCancel(ctx), query)
			if err != nil {
				return driver.ErrBadConn
			}
			c.prepared[query] = stmt
		}
	}
	return c.pqConn.ResetSession(ctx)
}

// QueryContext runs a query, prepared if possible. The error wraps errRepeat if PostgreSQL did not run it, because the
// table was altered after the query was prepared (0A000) or the query is no longer prepared (26000). database/sql then
// drops the connection.
func (c *preparedConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	ctx = context.WithoutCancel(ctx)
	stmt := c.prepared[query]
	if stmt == nil || !c.mayPrepare.Load() {
		return c.pqConn.QueryContext(ctx, query, args)
	}
	rows, err := stmt.(driver.StmtQueryContext).QueryContext(ctx, args)
	if pq.As(err, pqerror.FeatureNotSupported, pqerror.InvalidSQLStatementName) != nil {
		err = fmt.Errorf("%w: %w: %w", errRepeat, driver.ErrBadConn, err)
	}
	return rows, err
}

// classify interprets the error from scanning a statement's row. It returns errNotFound if there is no row. It wraps
// errUnchanged if PostgreSQL reports an ERROR, because it has rolled back. After FATAL, or if the connection is lost,
// the outcome is unknown.
func classify(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return errNotFound
	}
	if e := pq.As(err); e != nil && !e.Fatal() {
		return fmt.Errorf("%w: %w", errUnchanged, err)
	}
	return err
}

// isRefusal reports whether a rule in the database does not allow a change: a constraint, or a trigger that raises an
// exception. The schema's own rules are checked before, so the database's owner added this one, such as a foreign key.
func isRefusal(err error) bool {
	e := pq.As(err)
	return e != nil && (e.Code.Class() == pqerror.ClassIntegrityConstraintViolation || e.Code == pqerror.RaiseException)
}

// unavailable reports whether the error of a statement means "not now", rather than that the statement is wrong.
func unavailable(err error) bool {
	if e := pq.As(err); e != nil {
		switch e.Code.Class() {
		case pqerror.ClassConnectionException,
			pqerror.ClassTransactionRollback, // a deadlock, or a transaction that must be repeated
			pqerror.ClassInsufficientResources,
			pqerror.ClassObjectNotInPrerequisiteState, // a lock that cannot be acquired
			pqerror.ClassOperatorIntervention,         // shutting down, starting up, a statement that took too long
			pqerror.ClassSystemError:
			return true
		}
		return errors.Is(err, errRepeat) || pq.As(err,
			pqerror.UndefinedTable,                // the schema is not applied yet, or the table was dropped
			pqerror.ReadOnlySQLTransaction) != nil // a standby, after a failover
	}
	_, network := errors.AsType[net.Error](err)
	return network || slices.ContainsFunc([]error{context.DeadlineExceeded, errNotConnected, driver.ErrBadConn,
		sql.ErrConnDone, io.EOF, io.ErrUnexpectedEOF}, func(target error) bool { return errors.Is(err, target) })
}
