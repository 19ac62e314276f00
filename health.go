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
	"sync"
	"time"
)

const healthTimeout = 1500 * time.Millisecond

// release is the image's version. The Dockerfile sets it, because git is not available in the image's build.
var release string

// version returns the version of this program: release, or else the version that "go build" read from git.
func version() string {
	info, _ := debug.ReadBuildInfo() // every binary from "go build" has it
	return cmp.Or(release, info.Main.Version)
}

// index answers GET /.
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

// A service is the state of one of the three services in GET /services. Only web has the last three fields. The
// hostname tells replicas apart: in a container, it is the container's id.
type service struct {
	Status   string  `json:"status"` // connected or disconnected; running for this service
	Address  string  `json:"address"`
	Version  string  `json:"version,omitempty"`
	Latency  float64 `json:"latency_ms"`
	Uptime   string  `json:"uptime,omitempty"`
	Hostname string  `json:"hostname,omitempty"`
	Go       string  `json:"go,omitempty"`
}

// probe asks a server for its version. It returns after healthTimeout even if ask does not, because a driver may notice
// late that a server is unresponsive.
func probe(host, port string, ask func() (string, error)) service {
	result := service{Status: "disconnected", Address: net.JoinHostPort(host, port)}
	answered := make(chan string, 1)
	began := time.Now()
	go func() {
		defer close(answered)
		if version, err := ask(); err == nil {
			answered <- version
		}
	}()
	select {
	case version, ok := <-answered:
		if ok {
			result.Status, result.Version, result.Latency = "connected", version, milliseconds(time.Since(began))
		}
	case <-time.After(healthTimeout):
	}
	return result
}

// milliseconds returns a duration in milliseconds, with three decimals.
func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// selectVersion returns a row only if the table exists: PostgreSQL is reported as connected only if it has the schema.
// It queries the system catalogue, because a locked table is no reason to replace a replica.
const selectVersion = `
SELECT current_setting('server_version')
WHERE to_regclass('products') IS NOT NULL`

// probes asks PostgreSQL and Redis at the same time.
func (s *server) probes() (postgres, redis service) {
	var asking sync.WaitGroup
	asking.Go(func() { redis = probe(s.cfg.redisHost, s.cfg.redisPort, s.cache.Version) })
	postgres = probe(s.cfg.postgresHost, s.cfg.postgresPort, func() (version string, err error) {
		ctx, cancel := context.WithTimeout(context.Background(), poolTimeout)
		defer cancel()
		err = s.healthDB.QueryRowContext(ctx, selectVersion).Scan(&version)
		return version, err
	})
	asking.Wait()
	return postgres, redis
}

// health answers GET /health. Without its cache the service is degraded but works: it answers from PostgreSQL, only
// slower. So the status is 200, and an orchestrator does not restart a service that a restart would not fix. Without
// PostgreSQL, and after SIGTERM, the status is 503, so that a load balancer sends requests elsewhere.
func (s *server) health(w http.ResponseWriter, r *http.Request) error {
	postgres, cache := s.probes()
	status, code := "healthy", http.StatusOK
	if cache.Status != "connected" || !s.cache.Trusted() {
		status = "degraded"
	}
	if postgres.Status != "connected" {
		status, code = "unhealthy", http.StatusServiceUnavailable
	}
	if s.stopping.Load() {
		status, code = "stopping", http.StatusServiceUnavailable
	}
	return respondJSON(w, code, struct {
		Status    string    `json:"status"`
		Database  string    `json:"database"`
		Cache     string    `json:"cache"`
		Timestamp time.Time `json:"timestamp"`
	}{status, postgres.Status, cache.Status, time.Now().UTC()})
}

// services answers GET /services.
func (s *server) services(w http.ResponseWriter, r *http.Request) error {
	postgres, cache := s.probes()
	hostname, _ := os.Hostname()
	uptime := time.Since(s.started).Round(time.Second).String()
	return respondJSON(w, http.StatusOK, struct {
		Web      service `json:"web"`
		Postgres service `json:"postgres"`
		Redis    service `json:"redis"`
	}{
		service{
			Status: "running", Address: r.Host, Version: version(), Uptime: uptime, Hostname: hostname, Go: runtime.Version(),
		},
		postgres, cache,
	})
}

// selectStats returns the catalogue's figures as JSON. It sums each category first, so that it reads the table only
// once. It lists the 1,000 largest categories.
const selectStats = `
SELECT json_build_object(
    'products',              coalesce(sum(products), 0),
    'total_stock',           coalesce(sum(stock), 0),
    'inventory_value',       coalesce(sum(value), 0),
    'products_per_category', coalesce(json_object_agg(category, products ORDER BY category) FILTER (WHERE place <= 1000), '{}'))
FROM (SELECT category, count(*) AS products, sum(stock) AS stock, sum(price * stock) AS value,
             row_number() OVER (ORDER BY count(*) DESC, category) AS place
      FROM products
      GROUP BY category) AS categories`

// A poolStats holds the number of a pool's connections, and how often and how long in total requests waited for one.
type poolStats struct {
	Open   int     `json:"open"`
	InUse  int     `json:"in_use"`
	Idle   int     `json:"idle"`
	Max    int     `json:"max"`
	Waits  int64   `json:"waits"`
	Waited float64 `json:"waited_ms"`
}

// stats answers GET /stats. The cache's and the pools' figures are this replica's own. The catalogue's are the same on
// every replica.
func (s *server) stats(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), poolTimeout)
	defer cancel()
	var catalogue []byte
	if err := s.db.QueryRowContext(ctx, selectStats).Scan(&catalogue); err != nil {
		return err
	}
	cache, c := s.cache.Stats()
	d := s.db.Stats()
	return respondJSON(w, http.StatusOK, map[string]any{
		"cache":    cache,
		"database": json.RawMessage(catalogue),
		"pools": map[string]poolStats{
			"postgres": {d.OpenConnections, d.InUse, d.Idle, d.MaxOpenConnections, d.WaitCount, milliseconds(d.WaitDuration)},
			"redis":    {c.ActiveCount, c.ActiveCount - c.IdleCount, c.IdleCount, 1, c.WaitCount, milliseconds(c.WaitDuration)},
		},
	})
}

// healthCommand is `web health`, a container's health check. It asks the service on this machine.
func healthCommand(cfg config) error {
	// The default transport would use a proxy from the environment. The service is on this machine.
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{}}
	// An empty or unspecified address (0.0.0.0) means this machine: see net.Dial.
	response, err := client.Get("http://" + net.JoinHostPort(cfg.bindAddress, cfg.port) + "/health")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	fmt.Println(response.Status) // for "docker inspect"
	return nil
}

// pingCommand is `web ping [-c N] HOST[:PORT]`. It resolves a name, in a container with Docker's own DNS, and connects
// to PORT, or else to the port that the service uses on that host. It tries N times, a second apart, and prints a line
// for each. It returns an error if no attempt succeeds. The real ping sends ICMP packets, which needs a permission that
// this container lacks. A connection also shows more: that a server listens.
func pingCommand(ctx context.Context, cfg config, args []string) error {
	flags := flag.NewFlagSet("ping", flag.ContinueOnError)
	flags.Usage = func() {} // run prints errUsage
	count := flags.Int("c", 4, "how many times")
	if flags.Parse(args) != nil || flags.NArg() != 1 || *count < 1 {
		return errUsage
	}
	address := flags.Arg(0)
	if _, _, err := net.SplitHostPort(address); err != nil {
		port := ""
		switch address {
		case "postgres", cfg.postgresHost:
			port = cfg.postgresPort
		case "redis", cfg.redisHost:
			port = cfg.redisPort
		default:
			return fmt.Errorf("ping: no port is known for %s: use HOST:PORT\n%w", address, errUsage)
		}
		address = net.JoinHostPort(address, port)
	}
	tries, reached := 0, 0
	for ; tries < *count && ctx.Err() == nil; tries++ {
		began := time.Now()
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", address)
		if err != nil && ctx.Err() != nil { // interrupted: this was no try
			break
		}
		if err == nil {
			fmt.Printf("connected to %s (%s): try=%d time=%.3f ms\n", address, conn.RemoteAddr(), tries+1, milliseconds(time.Since(began)))
			_ = conn.Close()
			reached++
		} else {
			fmt.Printf("no connection to %s: try=%d %v\n", address, tries+1, err)
		}
		if tries+1 < *count {
			select {
			case <-time.After(time.Second - time.Since(began)):
			case <-ctx.Done(): // interrupted
			}
		}
	}
	fmt.Printf("%d tries, %d connected\n", tries, reached)
	if reached == 0 {
		return errors.New("ping: no answer from " + address)
	}
	return nil
}
