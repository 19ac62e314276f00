package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
)

const healthTimeout = 1500 * time.Millisecond

// version is the module's version, as the build has noted it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}

func (s *server) index(w http.ResponseWriter, r *http.Request) error {
	list := map[string]string{}
	for _, e := range s.endpoints() {
		list[strings.TrimSuffix(e.pattern, "{$}")] = e.about
	}
	return respondJSON(w, http.StatusOK, struct {
		Name      string            `json:"name"`
		Version   string            `json:"version"`
		Endpoints map[string]string `json:"endpoints"`
	}{"desafio3", version(), list})
}

// A service is the state of one of the three.
type service struct {
	Status  string  `json:"status"` // connected or disconnected
	Address string  `json:"address"`
	Version string  `json:"version,omitempty"`
	Latency float64 `json:"latency_ms"`
}

// probe asks a service for its version. It ends after healthTimeout even where ask does not.
func probe(ctx context.Context, address string, ask func(context.Context) (string, error)) service {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	began := time.Now()
	version, err := within(ctx, ask)
	if err != nil {
		return service{Status: "disconnected", Address: address}
	}
	return service{"connected", address, version, float64(time.Since(began).Microseconds()) / 1000}
}

// probes asks PostgreSQL and Redis at the same time. PostgreSQL counts as connected once it has the schema.
func (s *server) probes(ctx context.Context) (postgres, cache service) {
	found := make(chan service, 1)
	go func() {
		found <- probe(ctx, net.JoinHostPort(s.cfg.redisHost, s.cfg.redisPort), func(context.Context) (string, error) {
			info, err := s.cache.info()
			return info["redis_version"], err
		})
	}()
	postgres = probe(ctx, net.JoinHostPort(s.cfg.postgresHost, s.cfg.postgresPort), func(ctx context.Context) (version string, err error) {
		err = s.db.QueryRowContext(ctx, `SELECT current_setting('server_version') FROM (SELECT count(id) FROM (SELECT id FROM products LIMIT 1) one) ready`).Scan(&version)
		return version, err
	})
	return postgres, <-found
}

func (s *server) health(w http.ResponseWriter, r *http.Request) error {
	postgres, cache := s.probes(r.Context())
	status, code := "healthy", http.StatusOK
	if cache.Status != "connected" {
		status = "degraded"
	}
	if postgres.Status != "connected" {
		status, code = "unhealthy", http.StatusServiceUnavailable
	}
	return respondJSON(w, code, struct {
		Status    string    `json:"status"`
		Database  string    `json:"database"`
		Cache     string    `json:"cache"`
		Timestamp time.Time `json:"timestamp"`
	}{status, postgres.Status, cache.Status, time.Now().UTC()})
}

func (s *server) services(w http.ResponseWriter, r *http.Request) error {
	postgres, cache := s.probes(r.Context())
	hostname, _ := os.Hostname()
	type web struct {
		service
		Uptime   string `json:"uptime"`
		Hostname string `json:"hostname"`
		Go       string `json:"go"`
	}
	return respondJSON(w, http.StatusOK, struct {
		Web      web     `json:"web"`
		Postgres service `json:"postgres"`
		Redis    service `json:"redis"`
	}{
		web{service{"running", r.Host, version(), 0}, time.Since(s.started).Round(time.Second).String(), hostname, runtime.Version()},
		postgres, cache,
	})
}

const selectStats = `
SELECT coalesce(sum(products), 0), coalesce(sum(stock), 0), coalesce(sum(value), 0),
       coalesce(json_object_agg(category, products ORDER BY category), '{}')
FROM (SELECT category, count(*) AS products, sum(stock) AS stock, sum(price * stock) AS value
      FROM products
      GROUP BY category) AS categories`

type cacheStats struct {
	Status   string  `json:"status"`
	Trusted  bool    `json:"trusted"`
	Hits     int64   `json:"hits"`
	Misses   int64   `json:"misses"`
	Bypasses int64   `json:"bypasses"`
	HitRate  float64 `json:"hit_rate"` // hits among all, from 0 to 1
	Keys     int     `json:"keys"`
	TTL      int     `json:"ttl_seconds"`
	Memory   string  `json:"memory_used"`
}

type databaseStats struct {
	Products   int64           `json:"products"`
	Stock      json.Number     `json:"total_stock"`
	Value      json.Number     `json:"inventory_value"`
	Categories json.RawMessage `json:"products_per_category"`
}

// A poolStats is a pool's connections, and how often and how long in all somebody waited for one.
type poolStats struct {
	Open   int     `json:"open"`
	InUse  int     `json:"in_use"`
	Idle   int     `json:"idle"`
	Most   int     `json:"max"`
	Waits  int64   `json:"waits"`
	Waited float64 `json:"waited_ms"`
}

// stats counts requests since this process started, and everything else as it is now.
func (s *server) stats(w http.ResponseWriter, r *http.Request) error {
	db, err := within(r.Context(), func(ctx context.Context) (db databaseStats, err error) {
		var categories []byte
		err = s.db.QueryRowContext(ctx, selectStats).Scan(&db.Products, &db.Stock, &db.Value, &categories)
		db.Categories = categories
		return db, err
	})
	if err != nil {
		return err
	}
	d, c := s.db.Stats(), s.cache.pool.Stats()
	return respondJSON(w, http.StatusOK, struct {
		Cache    cacheStats           `json:"cache"`
		Database databaseStats        `json:"database"`
		Pools    map[string]poolStats `json:"pools"`
	}{
		s.cache.stats(), db, map[string]poolStats{
			"postgres": {d.OpenConnections, d.InUse, d.Idle, d.MaxOpenConnections, d.WaitCount, float64(d.WaitDuration.Microseconds()) / 1000},
			"redis":    {c.ActiveCount, c.ActiveCount - c.IdleCount, c.IdleCount, s.cache.pool.MaxActive, c.WaitCount, float64(c.WaitDuration.Microseconds()) / 1000},
		},
	})
}

// info asks Redis, if it was there a moment ago, for what INFO says of its server and its memory.
func (c *Cache) info() (info map[string]string, err error) {
	if !c.reachable.Load() {
		return nil, errors.New("redis does not answer")
	}
	err = c.command(func(conn redis.Conn) error {
		info, err = infoOf(conn, redisTimeout, "server", "memory")
		return err
	})
	return info, err
}

func (c *Cache) stats() cacheStats {
	st := cacheStats{
		Status: "disconnected", Trusted: c.trusted(), TTL: int(c.ttl.Seconds()),
		Hits: c.hits.Load(), Misses: c.misses.Load(), Bypasses: c.bypasses.Load(),
	}
	if all := st.Hits + st.Misses + st.Bypasses; all > 0 {
		st.HitRate = float64(st.Hits) / float64(all)
	}
	info, err := c.info()
	if err == nil {
		err = c.command(func(conn redis.Conn) error {
			return scan(conn, func(keys []any) error { st.Keys += len(keys); return nil })
		})
	}
	if err == nil {
		st.Status, st.Memory = "connected", info["used_memory_human"]
	}
	return st
}

// healthCommand is `web health`: it asks the service on this machine, for a container's health check.
func healthCommand(ctx context.Context, cfg config) int {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(cmp.Or(cfg.bindAddress, "127.0.0.1"), cfg.port)+"/health", nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer response.Body.Close()
	fmt.Println(response.Status)
	if response.StatusCode != http.StatusOK {
		return 1
	}
	return 0
}

// pingCommand is `web ping`: it resolves a name and connects to the port that the service would use there, a second
// apart, and returns 0 if any try succeeded. ICMP would need a privilege that the container does not have.
func pingCommand(ctx context.Context, cfg config, args []string) int {
	flags := flag.NewFlagSet("ping", flag.ContinueOnError)
	flags.Usage = func() { fmt.Fprintln(flags.Output(), "usage: ping [-c N] HOST[:PORT]") }
	count := flags.Int("c", 4, "how many times")
	if flags.Parse(args) != nil {
		return 2
	}
	if flags.NArg() != 1 || *count < 1 {
		flags.Usage()
		return 2
	}
	address := flags.Arg(0)
	if _, _, err := net.SplitHostPort(address); err != nil {
		ports := map[string]string{cfg.postgresHost: cfg.postgresPort, cfg.redisHost: cfg.redisPort, "postgres": cfg.postgresPort, "redis": cfg.redisPort}
		port, ok := ports[address]
		if !ok {
			fmt.Fprintf(os.Stderr, "ping: which port of %s? Say HOST:PORT\n", address)
			return 2
		}
		address = net.JoinHostPort(address, port)
	}
	reached := 0
	next := time.Tick(time.Second)
	for i := 1; i <= *count; i++ {
		began := time.Now()
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", address)
		if err == nil {
			fmt.Printf("connected to %s (%s): try=%d time=%.3f ms\n", address, conn.RemoteAddr(), i, float64(time.Since(began).Microseconds())/1000)
			_ = conn.Close()
			reached++
		} else {
			fmt.Printf("no connection to %s: try=%d %v\n", address, i, err)
		}
		if i == *count {
			break
		}
		select {
		case <-ctx.Done():
			return 1
		case <-next:
		}
	}
	fmt.Printf("%d tries, %d connected\n", *count, reached)
	if reached == 0 {
		return 1
	}
	return 0
}
