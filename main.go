// Command web is a product catalogue API over PostgreSQL with a Redis cache that never lies.
package main

import (
	"bytes"
	"context"
	"database/sql"
	"database/sql/driver"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"github.com/lib/pq"
)

const (
	requestTimeout  = 5 * time.Second // for what a handler asks of PostgreSQL and Redis
	shutdownTimeout = 10 * time.Second
	maxBody         = 1 << 20
)

//go:embed schema.sql
var schema string

func main() { os.Exit(run(os.Args)) }

// run is the program: it serves, or is one of the subcommands, and returns the exit status.
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
	defer stop()
	switch {
	case len(args) == 1:
		slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.logLevel})))
		if err := serve(ctx, cfg); err != nil {
			slog.Error("stopped", "error", err)
			return 1
		}
		return 0
	case args[1] == "health" && len(args) == 2:
		return healthCommand(ctx, cfg)
	case args[1] == "ping":
		return pingCommand(ctx, cfg, args[2:])
	}
	fmt.Fprintln(os.Stderr, "usage: web [health | ping [-c N] HOST[:PORT]]")
	return 2
}

type config struct {
	bindAddress, port                                                      string
	postgresHost, postgresPort, postgresDB, postgresUser, postgresPassword string
	postgresSSLMode                                                        string
	redisHost, redisPort, redisPassword                                    string
	cacheTTL                                                               time.Duration
	logLevel                                                               slog.Level
}

// configure reads the environment. The error is one line that names the variable and what it accepts.
func configure(getenv func(string) string) (config, error) {
	var errs []error
	text := func(name, standard string) string {
		if value := getenv(name); value != "" {
			return value
		}
		return standard
	}
	number := func(name, standard string, most int) string {
		value := text(name, standard)
		if n, err := strconv.Atoi(value); err != nil || n < 1 || n > most {
			errs = append(errs, fmt.Errorf("%s must be a whole number from 1 to %d, not %q", name, most, value))
		}
		return value
	}
	cfg := config{
		bindAddress:      getenv("BIND_ADDRESS"), // empty: all of the machine's
		port:             number("PORT", "8000", 65535),
		postgresHost:     text("POSTGRES_HOST", "localhost"),
		postgresPort:     number("POSTGRES_PORT", "5432", 65535),
		postgresDB:       text("POSTGRES_DB", "products_db"),
		postgresUser:     text("POSTGRES_USER", "postgres"),
		postgresPassword: getenv("POSTGRES_PASSWORD"),
		postgresSSLMode:  text("POSTGRES_SSLMODE", "prefer"),
		redisHost:        text("REDIS_HOST", "localhost"),
		redisPort:        number("REDIS_PORT", "6379", 65535),
		redisPassword:    getenv("REDIS_PASSWORD"),
	}
	seconds, _ := strconv.Atoi(number("CACHE_TTL", "300", 86400))
	cfg.cacheTTL = time.Duration(seconds) * time.Second
	switch cfg.postgresSSLMode {
	case "disable", "allow", "prefer", "require", "verify-ca", "verify-full":
	default:
		errs = append(errs, fmt.Errorf("POSTGRES_SSLMODE must be disable, allow, prefer, require, verify-ca or verify-full, not %q", cfg.postgresSSLMode))
	}
	switch level := text("LOG_LEVEL", "info"); level {
	case "debug", "info", "warn", "error":
		_ = cfg.logLevel.UnmarshalText([]byte(level))
	default:
		errs = append(errs, fmt.Errorf("LOG_LEVEL must be debug, info, warn or error, not %q", level))
	}
	if len(errs) > 0 {
		return config{}, errs[0]
	}
	return cfg, nil
}

// A server answers the API's requests.
type server struct {
	cfg     config
	db      *sql.DB
	cache   *Cache
	started time.Time
}

// serve runs the service until the context ends, then lets the requests in flight finish.
func serve(ctx context.Context, cfg config) error {
	db, dsn, err := openDatabase(cfg)
	if err != nil {
		return err
	}
	defer db.Close()
	// Nearly all memory is the garbage of requests: to collect it half as often as usual costs a few MiB.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200)
	}
	s := &server{cfg: cfg, db: db, cache: newCache(cfg, db, dsn), started: time.Now()}
	listener, err := net.Listen("tcp", net.JoinHostPort(cfg.bindAddress, cfg.port))
	if err != nil {
		return err
	}
	// The requests in flight still need what runs in the background, so that stops after them.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	go applySchema(background, db)
	go s.cache.Run(background)

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

// A recorder notes what is sent, for the access log, and holds back the plain-text answers of the router itself
// (a request that no pattern matched), for respondError to say the same.
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
	if rec.status == 0 {
		rec.status = http.StatusOK
	}
	n, err := rec.ResponseWriter.Write(b)
	rec.bytes += n
	return n, err
}

// A problem is an error for the client (RFC 9457). Nothing but what is in it is ever said to a client.
type problem struct {
	Title  string            `json:"title"`
	Status int               `json:"status"`
	Detail string            `json:"detail"`
	Errors map[string]string `json:"errors,omitempty"` // by field
}

func (p *problem) Error() string { return p.Detail }

// respondError is where errors become responses. A problem is sent as it is; that PostgreSQL or Redis is
// unavailable is said without saying how; anything else is a bug, is logged, and remains hidden.
func respondError(w http.ResponseWriter, r *http.Request, err error) {
	p, ok := errors.AsType[*problem](err)
	switch {
	case ok:
	case r.Context().Err() != nil: // the client has gone: nobody reads this
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
	w.Header().Set("Content-Type", "application/problem+json")
	answer := *p // a copy, since the error of a shared lookup goes to several requests
	answer.Title = http.StatusText(p.Status)
	_ = respondJSON(w, p.Status, answer) // texts can always be encoded
}

// respond sends a whole body with its length.
func respond(w http.ResponseWriter, status int, body []byte) {
	header := w.Header()
	if header.Get("Content-Type") == "" {
		header.Set("Content-Type", "application/json")
	}
	header.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // an error means that the client has gone
}

// respondJSON sends v as JSON. The error is encode's, and then nothing was sent.
func respondJSON(w http.ResponseWriter, status int, v any) error {
	body, err := encode(v)
	if err == nil {
		respond(w, status, body)
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

// readBody returns the body of a request that must be JSON. The error is a problem.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		return nil, &problem{Status: http.StatusUnsupportedMediaType, Detail: "send Content-Type: application/json"}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return nil, &problem{Status: http.StatusRequestEntityTooLarge, Detail: "the body is larger than 1 MiB"}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, &problem{Status: http.StatusRequestTimeout, Detail: "the body took too long to arrive"}
	}
	if err != nil {
		return nil, badRequest("the body could not be read")
	}
	return body, nil
}

func badRequest(format string, args ...any) error {
	return &problem{Status: http.StatusBadRequest, Detail: fmt.Sprintf(format, args...)}
}

// poolSize is how many connections each pool may open: enough for what the processors can keep busy, few enough
// for several replicas at one PostgreSQL.
func poolSize() int { return 4 + 4*runtime.GOMAXPROCS(0) }

// A dialer makes connections on which PostgreSQL must answer within a time: a query's context cannot end a read
// from a server that has fallen silent.
type dialer struct{ patience time.Duration }

func (d dialer) Dial(network, address string) (net.Conn, error) {
	return d.DialTimeout(network, address, d.patience)
}

func (d dialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	conn, err := net.DialTimeout(network, address, timeout)
	return &impatientConn{Conn: conn, patience: d.patience}, err
}

type impatientConn struct {
	net.Conn
	patience time.Duration
	limit    time.Time // lib/pq's own, for the time in which it connects
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
	// With sslmode=prefer, lib/pq 1.12 begins anew, without closing what it had, when a server has no TLS, which it
	// says with this byte, or does not answer. PostgreSQL would wait a minute for what comes next.
	if err != nil || len(b) == 1 && b[0] == 'N' {
		_ = c.Conn.Close()
	}
	return n, err
}

// A preparer makes connections that prepare each query, all of which are constants, the first time they get it, so
// that PostgreSQL parses and plans it once and not for every request.
type preparer struct{ driver.Connector }

func (p preparer) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := p.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return &preparingConn{conn.(pqConn), map[string]driver.Stmt{}}, nil
}

// A pqConn is all that database/sql uses of a connection.
type pqConn interface {
	driver.Conn
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.NamedValueChecker
	driver.SessionResetter
	driver.Validator
}

type preparingConn struct {
	pqConn
	prepared map[string]driver.Stmt
}

func (c *preparingConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	stmt := c.prepared[query]
	if stmt == nil {
		var err error
		if stmt, err = c.PrepareContext(ctx, query); err != nil {
			return nil, err
		}
		c.prepared[query] = stmt
	}
	rows, err := stmt.(driver.StmtQueryContext).QueryContext(ctx, args)
	if e := pq.As(err); e != nil && e.Code == "0A000" { // the table was altered, and the statement not run
		return nil, driver.ErrBadConn
	}
	return rows, err
}

// openDatabase returns a pool, which connects when it is used, and the DSN behind it.
func openDatabase(cfg config) (*sql.DB, string, error) {
	dsn := (&url.URL{
		Scheme: "postgres",
		User:   url.UserPassword(cfg.postgresUser, cfg.postgresPassword),
		Host:   net.JoinHostPort(cfg.postgresHost, cfg.postgresPort),
		Path:   "/" + cfg.postgresDB,
		RawQuery: url.Values{
			"sslmode":           {cfg.postgresSSLMode},
			"application_name":  {"desafio3"}, // the trigger in schema.sql knows the service's own writes by it
			"connect_timeout":   {"2"},
			"timezone":          {"UTC"},
			"statement_timeout": {strconv.FormatInt(statementTimeout.Milliseconds(), 10)},
			"binary_parameters": {"yes"}, // one round trip a query
		}.Encode(),
	}).String()
	dbConfig, err := pq.NewConfig(dsn)
	if err != nil {
		return nil, "", err
	}
	connector, err := pq.NewConnectorConfig(dbConfig)
	if err != nil {
		return nil, "", err
	}
	connector.Dialer(dialer{statementTimeout + 500*time.Millisecond})
	db := sql.OpenDB(preparer{connector})
	db.SetMaxOpenConns(poolSize())
	db.SetMaxIdleConns(poolSize())
	db.SetConnMaxIdleTime(5 * time.Minute)
	return db, dsn, nil
}

// within returns what f returns, or the context's error when that ends first or requestTimeout is over: a driver that
// waits for a silent server may notice late. Then f goes on by itself.
func within[T any](ctx context.Context, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f(ctx)
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// applySchema tries until PostgreSQL has taken the schema, all of it in one transaction, or the context ends.
func applySchema(ctx context.Context, db *sql.DB) {
	repeat(ctx, "database not ready", func() (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		_, err := db.ExecContext(ctx, schema)
		return err == nil, err
	})
}

// repeat calls f with every heartbeat until it says that it is done or the context ends, and logs an error that is not
// the one before it.
func repeat(ctx context.Context, what string, f func() (done bool, err error)) {
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	for last := ""; ; {
		done, err := f()
		if done || ctx.Err() != nil {
			return
		}
		if reason := fmt.Sprint(err); err != nil && reason != last {
			slog.Warn(what, "reason", reason)
			last = reason
		} else if err == nil {
			last = ""
		}
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
		}
	}
}
