// Command web is a product catalogue API over PostgreSQL with a Redis cache that never lies.
//
// Where to begin: endpoints, below, lists all that the API answers, and each handler is one jump away.
//
//	main.go      settings, routes, the server and its end, errors, JSON, the connections to PostgreSQL
//	products.go  the product: its rules, its SQL, its handlers
//	cache.go     Redis: how bodies are cached so that nobody is ever given an old one
//	health.go    what the service says about itself and its servers, and the commands health and ping
package main

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lib/pq"
)

const (
	queryTimeout    = 2500 * time.Millisecond // until a connection of the pool is free and the statement sent
	drainTime       = 2 * time.Second         // for which a balancer may still send requests to a service that stops
	shutdownTimeout = 10 * time.Second        // for the requests in flight after that
)

// The binary carries the schema with it, so that an empty database is all it needs.
//
//go:embed schema.sql
var schema string

func main() { os.Exit(run(os.Args)) }

// run is the program: it serves, or is one of the subcommands, and returns the exit status: 2 for what its caller has to
// change, arguments or environment, and 1 for what went wrong.
func run(args []string) int {
	if filepath.Base(args[0]) == "ping" { // a link in the image
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
	err = errUsage
	switch {
	case len(args) == 1:
		err = serve(ctx, cfg)
	case args[1] == "health" && len(args) == 2:
		err = healthCommand(cfg)
	case args[1] == "ping":
		err = pingCommand(ctx, cfg, args[2:])
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

// errUsage is the error of arguments that make no sense.
var errUsage = errors.New("usage: web [health | ping [-c N] HOST[:PORT]]")

// A config holds the settings, all from the environment.
type config struct {
	bindAddress, port                                                      string
	postgresHost, postgresPort, postgresDB, postgresUser, postgresPassword string
	postgresSSLMode                                                        string
	redisHost, redisPort, redisPassword                                    string
	cacheTTL                                                               time.Duration
	logLevel                                                               slog.Level
}

// settings reads variables of the environment and keeps the first fault: one line that names the variable and says what
// it accepts. A password is never in it.
type settings struct {
	getenv func(string) string
	fault  error
}

// check returns a variable, or the fallback where it is empty. What is not ok is a fault. To stop here, with a clear word,
// is better than to start and to fail at the first request.
func (s *settings) check(name, fallback, accepts string, ok func(string) bool) string {
	value := cmp.Or(s.getenv(name), fallback)
	if s.fault == nil && !ok(value) {
		s.fault = fmt.Errorf("%s must be %s, not %q", name, accepts, value)
	}
	return value
}

// number returns a whole number from 1 to max.
func (s *settings) number(name, fallback string, max int) string {
	return s.check(name, fallback, fmt.Sprintf("a whole number from 1 to %d", max), func(value string) bool {
		n, err := strconv.Atoi(value)
		return err == nil && n >= 1 && n <= max
	})
}

// choice returns one of the words.
func (s *settings) choice(name, fallback string, words ...string) string {
	return s.check(name, fallback, "one of "+strings.Join(words, ", "), func(value string) bool {
		return slices.Contains(words, value)
	})
}

var hostName = regexp.MustCompile(`^[A-Za-z0-9_.-]*$`)

// host returns a host's name or address. PostgreSQL's may be the folder of its Unix socket.
func (s *settings) host(name, fallback string) string {
	return s.check(name, fallback, "the name or the IP address of a host", func(value string) bool {
		_, err := netip.ParseAddr(value)
		return err == nil || hostName.MatchString(value) || name == "POSTGRES_HOST" && filepath.IsAbs(value)
	})
}

// secret returns a password, or what is in the file that NAME_FILE names: this is how Swarm hands out its secrets.
func (s *settings) secret(name string) string {
	value, file := s.getenv(name), s.getenv(name+"_FILE")
	if file == "" {
		return value
	}
	content, err := os.ReadFile(file)
	s.check(name+"_FILE", "", "a file that can be read", func(string) bool { return err == nil })
	s.check(name+"_FILE", "", "empty where "+name+" is set", func(string) bool { return value == "" })
	return strings.TrimRight(string(content), "\r\n")
}

// configure reads the environment. Its error is for the person who set it.
func configure(getenv func(string) string) (config, error) {
	s := &settings{getenv: getenv}
	cfg := config{
		bindAddress:      s.host("BIND_ADDRESS", ""), // empty: all addresses of the machine
		port:             s.number("PORT", "8000", 65535),
		postgresHost:     s.host("POSTGRES_HOST", "localhost"),
		postgresPort:     s.number("POSTGRES_PORT", "5432", 65535),
		postgresDB:       cmp.Or(getenv("POSTGRES_DB"), "products_db"),
		postgresUser:     cmp.Or(getenv("POSTGRES_USER"), "postgres"),
		postgresPassword: s.secret("POSTGRES_PASSWORD"),
		postgresSSLMode:  s.choice("POSTGRES_SSLMODE", "prefer", "disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
		redisHost:        s.host("REDIS_HOST", "localhost"),
		redisPort:        s.number("REDIS_PORT", "6379", 65535),
		redisPassword:    s.secret("REDIS_PASSWORD"),
	}
	seconds, _ := strconv.Atoi(s.number("CACHE_TTL", "300", 86400))
	cfg.cacheTTL = time.Duration(seconds) * time.Second
	_ = cfg.logLevel.UnmarshalText([]byte(s.choice("LOG_LEVEL", "info", "debug", "info", "warn", "error")))
	return cfg, s.fault
}

// A server answers the API's requests. All that the handlers need is in it: there are no global connections.
type server struct {
	cfg      config
	db       *sql.DB // a pool, which connects when somebody needs a connection
	cache    *Cache
	started  time.Time
	stopping atomic.Bool // every answer now asks the client to close its connection
}

// newServer returns a server, which connects to PostgreSQL and Redis when it needs them. cache.Run must run.
func newServer(cfg config) (*server, error) {
	db, dsn, err := openDatabase(cfg)
	if err != nil {
		return nil, err
	}
	return &server{cfg: cfg, db: db, cache: newCache(cfg, db, dsn), started: time.Now()}, nil
}

// serve runs the service until the context ends. Then it goes on for drainTime: whoever balances the load between
// replicas hears only now that this one stops, and may have sent requests already. After that it takes no more, and
// finishes those in flight.
func serve(ctx context.Context, cfg config) error {
	s, err := newServer(cfg)
	if err != nil {
		return err
	}
	defer s.db.Close()
	// Nearly all memory is the garbage of requests. To collect it half as often as usual costs a few MiB.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200)
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(cfg.bindAddress, cfg.port))
	if err != nil {
		return err
	}
	// The requests in flight still need what runs in the background, so that stops after them.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	go applySchema(background, s.db)
	go s.cache.Run(background)

	// Without these limits one client could hold a connection, and the memory behind it, for ever. The header must have
	// arrived within ReadHeaderTimeout and the whole request within ReadTimeout; an answer that its client does not take is
	// given up after WriteTimeout. Between two requests a connection is kept open for IdleTimeout.
	srv := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
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
	<-time.After(drainTime)
	last, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(last); err != nil {
		slog.Warn("requests were cut off", "error", err)
	}
	return nil
}

// endpoints are all that the API answers; GET / lists them.
func (s *server) endpoints() []endpoint {
	return []endpoint{
		{"GET /{$}", "this list", s.index},
		{"GET /health", "whether PostgreSQL and Redis are there", s.health},
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

// An endpoint is a route. Its handler answers the request, or returns an error and has written nothing: so there is one
// place, respondError, where errors become responses.
type endpoint struct {
	pattern, about string
	handle         func(http.ResponseWriter, *http.Request) error
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
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		rec := &recorder{ResponseWriter: w, request: r}
		if s.stopping.Load() {
			w.Header().Set("Connection", "close") // the client's next request goes to another replica
		}
		if err := browsers.Check(r); err != nil {
			respondError(rec, r, &problem{Status: http.StatusForbidden, Detail: "a page of another site may not change anything here"})
		} else if mux.ServeHTTP(rec, r); rec.refused != 0 {
			respondError(rec, r, &problem{Status: rec.refused, Detail: fmt.Sprintf("%s %s is not an endpoint: GET / lists them", r.Method, r.URL.Path)})
		}
		if slog.Default().Enabled(r.Context(), slog.LevelInfo) {
			slog.LogAttrs(r.Context(), slog.LevelInfo, "request",
				slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Int("status", rec.status),
				slog.Int("bytes", rec.bytes), slog.Duration("duration", time.Since(began)),
				slog.String("cache", rec.Header().Get("Cache-Status")))
		}
	})
}

// A recorder is a ResponseWriter that notes what is sent, for the access log; every answer here begins with WriteHeader.
// It also holds back what the router itself answers when no pattern matches: that is plain text, and respondError says
// the same as a problem. The header Allow, which the router sets with a 405, stays.
type recorder struct {
	http.ResponseWriter
	request                *http.Request
	status, bytes, refused int
}

func (rec *recorder) WriteHeader(status int) {
	if rec.request.Pattern == "" && rec.refused == 0 && (status == http.StatusNotFound || status == http.StatusMethodNotAllowed) {
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
	n, err := rec.ResponseWriter.Write(b)
	rec.bytes += n
	return n, err
}

// A problem is an error for the client, as RFC 9457 has it. Nothing but what is in it is ever said to a client. Errors
// is for a body that breaks rules: what is wrong, by field.
type problem struct {
	Title  string            `json:"title"`
	Status int               `json:"status"`
	Detail string            `json:"detail"`
	Errors map[string]string `json:"errors,omitempty"`
}

func (p *problem) Error() string { return p.Detail }

// respondError is where errors become responses. A problem is sent as it is; a row that is not there is a product that
// does not exist; that PostgreSQL or Redis is unavailable is said without saying how; anything else is a bug, is
// logged, and remains hidden.
func respondError(w http.ResponseWriter, r *http.Request, err error) {
	p, ok := errors.AsType[*problem](err)
	switch {
	case ok:
	case errors.Is(err, sql.ErrNoRows): // only a statement about the product in the path can find nothing
		p = &problem{Status: http.StatusNotFound, Detail: fmt.Sprintf("product %s does not exist", r.PathValue("id"))}
	case r.Context().Err() != nil: // the client has gone away: nobody reads this
		p = &problem{Status: 499, Detail: "the client closed the connection"}
	case unavailable(err):
		slog.Warn("database unavailable", "error", err)
		p = &problem{Status: http.StatusServiceUnavailable, Detail: "database unavailable"}
	default:
		slog.Error("internal error", "method", r.Method, "path", r.URL.Path, "error", err)
		p = &problem{Status: http.StatusInternalServerError, Detail: "internal error"}
	}
	if p.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	answer := *p // a copy, since the error of a shared lookup goes to several requests
	answer.Title = http.StatusText(p.Status)
	body, _ := encode(answer) // texts can always be encoded
	respond(w, p.Status, "application/problem+json", body)
}

// respond sends a whole body, with its type and its length.
func respond(w http.ResponseWriter, status int, mediaType string, body []byte) {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // an error means that the client has gone
}

// respondJSON sends v as JSON. The error is encode's, and then nothing was sent.
func respondJSON(w http.ResponseWriter, status int, v any) error {
	body, err := encode(v)
	if err == nil {
		respond(w, status, "application/json", body)
	}
	return err
}

// encode returns v as a line of JSON. An error means that a row holds what JSON cannot express: somebody else than the
// service can put the year 10000 there.
func encode(v any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return buf.Bytes(), err
}

// badRequest returns the problem of a request that cannot be understood.
func badRequest(format string, args ...any) error {
	return &problem{Status: http.StatusBadRequest, Detail: fmt.Sprintf(format, args...)}
}

// poolSize is how many connections to PostgreSQL may be open: enough for what the processors can keep busy, and few
// enough for several replicas at one PostgreSQL.
func poolSize() int { return 4 + 4*runtime.GOMAXPROCS(0) }

// A dialer makes connections to PostgreSQL on which an answer must come within a time. The context of a query cannot end
// a read from a server that has fallen silent.
type dialer struct{ patience time.Duration }

func (d dialer) Dial(network, address string) (net.Conn, error) {
	return d.DialTimeout(network, address, d.patience)
}

func (d dialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	conn, err := net.DialTimeout(network, address, timeout)
	return &impatientConn{Conn: conn, patience: d.patience}, err
}

// An impatientConn is a connection of a dialer.
type impatientConn struct {
	net.Conn
	patience time.Duration
	limit    time.Time // set by lib/pq for the time in which it connects
}

func (c *impatientConn) SetDeadline(t time.Time) error {
	c.limit = t
	return c.Conn.SetDeadline(t)
}

func (c *impatientConn) Read(b []byte) (int, error) {
	deadline := time.Now().Add(c.patience)
	if !c.limit.IsZero() && c.limit.Before(deadline) {
		deadline = c.limit
	}
	if err := c.SetReadDeadline(deadline); err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(b)
	// A server without TLS answers N. With sslmode=prefer, lib/pq 1.12 then connects anew, as it does when no answer
	// comes, but it does not close the first connection. PostgreSQL would wait on it for a minute.
	if err != nil || len(b) == 1 && b[0] == 'N' {
		_ = c.Conn.Close()
	}
	return n, err
}

// openDatabase returns a pool, which connects when it is used, and the DSN behind it. The DSN tells PostgreSQL to end by
// itself what takes longer than statementTimeout, for example because it waits for a lock.
func openDatabase(cfg config) (*sql.DB, string, error) {
	// The trigger in schema.sql knows the service's own writes by the application_name. With binary_parameters a query is
	// one round trip.
	dsn := fmt.Sprintf("application_name=desafio3 connect_timeout=1 statement_timeout=%d timezone=UTC binary_parameters=yes",
		statementTimeout.Milliseconds())
	quote := strings.NewReplacer(`\`, `\\`, `'`, `\'`)
	for name, value := range map[string]string{
		"host":     cfg.postgresHost,
		"port":     cfg.postgresPort,
		"user":     cfg.postgresUser,
		"password": cfg.postgresPassword,
		"dbname":   cfg.postgresDB,
		"sslmode":  cfg.postgresSSLMode,
	} {
		dsn += fmt.Sprintf(" %s='%s'", name, quote.Replace(value))
	}
	connector, err := pq.NewConnector(dsn)
	if err != nil {
		return nil, "", err
	}
	connector.Dialer(dialer{statementTimeout + 500*time.Millisecond}) // a little longer than the server's own patience
	// As many connections may be idle as may be open: to make a new one costs more than a statement.
	db := sql.OpenDB(preparer{connector})
	db.SetMaxOpenConns(poolSize())
	db.SetMaxIdleConns(poolSize())
	db.SetConnMaxIdleTime(5 * time.Minute)
	return db, dsn, nil
}

// applySchema tries until PostgreSQL has taken the schema, all of it in one transaction, or the context ends.
func applySchema(ctx context.Context, db *sql.DB) {
	repeat(ctx, "database not ready", func() (bool, error) {
		_, err := db.ExecContext(ctx, schema)
		return err == nil, err
	})
}

// repeat is for what must go on for as long as the process lives, whatever the servers do. It calls f at every heartbeat,
// until f says that it is done or the context ends, and logs an error that is not the one before it.
func repeat(ctx context.Context, what string, f func() (done bool, err error)) {
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for last := ""; ctx.Err() == nil; {
		done, err := f()
		if done || ctx.Err() != nil {
			return
		}
		reason := fmt.Sprint(err)
		if err != nil && reason != last {
			slog.Warn(what, "reason", reason)
		}
		last = reason
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
}
