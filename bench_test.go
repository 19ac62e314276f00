//go:build linux

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"database/sql"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/gomodule/redigo/redis"
)

// How fast the service is, as a client sees it. scripts/bench.sh runs this file.
//
// How one measures, and what this file does for it:
//   - The real binary is measured, in a process of its own. In the process of the load generator it would share Go's
//     scheduler and garbage collector with it.
//   - A number says little without a reference, since it depends on the machine. So there are two beside it. A bare
//     handler writes the same bytes from memory: nothing that is written with net/http can be faster. And the textbook
//     is plain cache-aside with the same libraries: it shows what it costs that the cache is never stale.
//   - The programs are measured round by round, each time in another order, and all rounds count. Whatever else the
//     machine does then affects all of them, so their ratio is much steadier than the numbers.
//   - A process keeps its luck for life, such as where its memory lies: started anew, the same program may be 5 %
//     faster or slower. Only several runs show a smaller difference.
//   - The processor time for a request is steadier still: it hardly depends on what else the machine does.
//   - The load runs for a moment before it counts, so that connections are open and the cache is filled.
//   - A wrong answer ends the measurement: errors are often faster than answers.

// The rounds are those of -benchtime (-benchtime 3x). A part of the table: -bench Requests/products=8$/list.
var base = os.Getenv("BASE") // the path of another build of the service, to compare with

var logLevel = "LOG_LEVEL=" + cmp.Or(os.Getenv("LOG_LEVEL"), "warn")

// ---------------------------------------------------------------- the load

// A scenario is a line of the table, and what the clients send for it.
type scenario struct {
	name     string
	requests [][]byte // whole and ready to send; a client takes one at random, again and again
	textbook bool     // the textbook can do it, too
	emptied  bool     // Redis is emptied 200 times per second
}

// requests makes a request for each id from 1 on; it stands where the path says ID.
func requests(method, path string, ids int) (all [][]byte) {
	for id := 1; id <= ids; id++ {
		end := "\r\n"
		if method != http.MethodGet {
			body := fmt.Sprintf(`{"name":"Product %d","price":%d.%02d,"stock":%d}`, id, id, id%100, rand.IntN(1000))
			end = fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		}
		path := strings.Replace(path, "ID", strconv.Itoa(id), 1)
		all = append(all, fmt.Appendf(nil, "%s %s HTTP/1.1\r\nHost: localhost\r\n%s", method, path, end))
	}
	return all
}

// clients is how many connections send requests at the same time.
const clients = 64

// A result is what was measured of a program, in all rounds.
type result struct {
	latencies []time.Duration
	seconds   float64
	busy      float64 // seconds of processor time
}

// measure puts the load on a program and adds what it finds.
func (m *result) measure(p *process, s scenario, seconds int) {
	start := time.Now().Add(300 * time.Millisecond)
	end := start.Add(time.Duration(seconds) * time.Second)
	latencies := make([][]time.Duration, clients)
	wait := concurrently(clients, func(client int) {
		conn := p.dial("")
		defer conn.Close()
		check(conn.SetDeadline(end.Add(time.Minute)))
		in := bufio.NewReaderSize(conn, 16<<10)
		var own []time.Duration // not shared with other processors
		for sent := time.Now(); sent.Before(end); sent = time.Now() {
			exchange(conn, in, s.requests[rand.IntN(len(s.requests))])
			if sent.After(start) {
				own = append(own, time.Since(sent))
			}
		}
		latencies[client] = own
	})
	time.Sleep(time.Until(start))
	m.busy -= processorTime(p.Process.Pid)
	time.Sleep(time.Until(end))
	m.busy += processorTime(p.Process.Pid)
	wait()
	m.seconds += float64(seconds)
	m.latencies = slices.Concat(m.latencies, slices.Concat(latencies...))
}

func (m *result) perSecond() float64 { return float64(len(m.latencies)) / m.seconds }

// cells returns the result, if there is one, as a part of the table's line.
func (m *result) cells(bare float64) string {
	if m.latencies == nil {
		return "|\t\t\t\t\t"
	}
	slices.Sort(m.latencies)
	n := len(m.latencies)
	ms := func(i int) float64 { return m.latencies[i].Seconds() * 1e3 }
	cpu := m.busy / float64(n) * 1e6
	return fmt.Sprintf("| %.0f\t%.3f\t%.2f\t%.1f\t%.2f\t", m.perSecond(), ms(n/2), ms(n*99/100), cpu, m.perSecond()/bare)
}

// exchange sends a request and reads the answer, and does no more than it must: the load generator shares the
// processors with the service.
func exchange(conn net.Conn, in *bufio.Reader, request []byte) {
	must(conn.Write(request))
	for length := 0; ; {
		line := must(in.ReadSlice('\n'))
		if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			length = must(strconv.Atoi(string(bytes.TrimSpace(value))))
		} else if bytes.HasPrefix(line, []byte("HTTP/1.1 ")) && !bytes.HasPrefix(line, []byte("HTTP/1.1 2")) {
			panic(fmt.Sprintf("%q was the answer to %q", line, request))
		} else if string(line) == "\r\n" { // the body follows
			must(in.Discard(length))
			return
		}
	}
}

// processorTime returns how many seconds a process has kept a processor busy so far, with what the kernel did for it.
func processorTime(pid int) float64 {
	stat := string(must(os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))))
	// The program's name, in brackets, is field 2. Fields 14 and 15 are utime and stime, in hundredths of a second.
	fields := strings.Fields(stat[strings.LastIndex(stat, ")"):])
	return float64(must(strconv.Atoi(fields[14-2]))+must(strconv.Atoi(fields[15-2]))) / 100
}

// ---------------------------------------------------------------- the programs

// buildService builds the service as the Dockerfile does, and returns the path.
func buildService(b *testing.B) string {
	path := b.TempDir() + "/service"
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "nethttpomithttp2", "-ldflags", "-s -w", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	check(cmd.Run())
	return path
}

// catalogue makes a database with so many products, and a Redis.
func catalogue(b *testing.B, products int) servers {
	own := ownServers(b)
	must(own.psql.Exec(schema))
	must(own.psql.Exec(`INSERT INTO products (name, description, price, stock, category)
		SELECT 'Product ' || n, 'A product like any other, with a description of a usual length.',
		       n % 1000 + 0.99, n % 100, 'category ' || n % 10
		FROM generate_series(1, $1::int) n`, products))
	must(own.psql.Exec("VACUUM ANALYZE products"))
	return own
}

// init makes this program a reference, where BenchmarkRequests has started it.
func init() {
	handler := map[string]func() http.Handler{"bare handler": bareHandler, "textbook": textbook}[os.Getenv("REFERENCE")]
	if handler != nil {
		check(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), handler()))
	}
}

// bareHandler gets each body once, and from then on writes the same bytes from memory.
func bareHandler() http.Handler {
	service := newServer(must(configure(os.Getenv))).handler()
	var bodies sync.Map
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path, status := r.URL.RequestURI(), http.StatusOK
		if r.Method == http.MethodPost {
			path, status = "/products/1", http.StatusCreated
		}
		_, _ = io.Copy(io.Discard, r.Body)
		body, known := bodies.Load(path)
		if !known {
			answer := httptest.NewRecorder()
			service.ServeHTTP(answer, httptest.NewRequest("GET", path, nil))
			body, _ = bodies.LoadOrStore(path, answer.Body.Bytes())
		}
		respond(w, status, "application/json", body.([]byte))
	})
}

// textbook is cache-aside as tutorials have it: GET, on a miss a query and SETEX, and after a change DEL. Its pools are
// as large as the service's and its statements are the same. It has no leases, no marks and no pipelining.
func textbook() http.Handler {
	cfg := must(configure(os.Getenv))
	db := must(sql.Open("postgres", dataSource(cfg)+" connect_timeout=10"))
	db.SetMaxOpenConns(poolSize)
	db.SetMaxIdleConns(poolSize)
	pool := &redis.Pool{MaxActive: poolSize, MaxIdle: poolSize, Wait: true, Dial: func() (redis.Conn, error) {
		return redis.Dial("tcp", net.JoinHostPort(cfg.redisHost, cfg.redisPort))
	}}
	row := func(r *http.Request, statement string, args ...any) ([]byte, error) {
		var p product
		check(p.scan(db.QueryRowContext(r.Context(), statement, args...)))
		return encode(p)
	}
	get := func(query func(r *http.Request) ([]byte, error)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			conn := pool.Get()
			defer conn.Close()
			body, err := redis.Bytes(conn.Do("GET", "textbook:"+r.URL.Path))
			if err != nil {
				body = must(query(r))
				must(conn.Do("SETEX", "textbook:"+r.URL.Path, 300, body))
			}
			respond(w, http.StatusOK, "application/json", body)
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /products", get(func(r *http.Request) ([]byte, error) {
		return (&server{db: db}).encodePage(r.Context(), page{limit: maxRows})
	}))
	mux.Handle("GET /products/{id}", get(func(r *http.Request) ([]byte, error) {
		return row(r, selectProduct, r.PathValue("id"))
	}))
	mux.HandleFunc("PUT /products/{id}", func(w http.ResponseWriter, r *http.Request) {
		f := must(new(server).readFields(r, false))
		body := must(row(r, updateProduct, r.PathValue("id"), f.Name, f.Description, f.Price, f.Stock, f.Category))
		conn := pool.Get()
		defer conn.Close()
		must(conn.Do("DEL", "textbook:/products", "textbook:"+r.URL.Path))
		respond(w, http.StatusOK, "application/json", body)
	})
	return mux
}

// ---------------------------------------------------------------- the benchmark

// scenarios are what is measured with a catalogue of so many products.
func scenarios(products int) []scenario {
	count := min(products, 1000)
	ids, list := requests("GET", "/products/ID", count), requests("GET", "/products", 1)
	all := []scenario{
		{"cached product", ids, true, false},
		{"cached list", list, true, false},
		{"page of 20, not cached", requests("GET", fmt.Sprintf("/products?limit=20&after=%d", products/2), 1), false, false},
		{"product, Redis is emptied", ids, true, true},
		{"list, Redis is emptied", list, true, true},
		{"update", requests("PUT", "/products/ID", count), true, false},
		{"creation", requests("POST", "/products", 1), false, false},
	}
	if products > 1000 {
		return all[:3] // of the others, a measurement would have only a few lists
	}
	return all
}

// BenchmarkRequests prints the table: for each scenario the references, the service and, if BASE names one, another
// build of it.
func BenchmarkRequests(b *testing.B) {
	names := []string{"bare handler", "textbook", "desafio3", "base"}
	paths := []string{"/proc/self/exe", "/proc/self/exe", buildService(b), base}
	if base == "" {
		names, paths = names[:3], paths[:3]
	}
	table := "products\t\t"
	for _, name := range names {
		table += "| " + name + ", per second\tp50 ms\tp99 ms\tCPU µs\tratio\t"
	}
	for _, products := range []int{8, 1000, 10_000, 100_000} {
		b.Run(fmt.Sprintf("products=%d", products), func(b *testing.B) {
			own := catalogue(b, products)
			var programs []*process
			for i, path := range paths {
				programs = append(programs, startProcess(b, path, own.config, logLevel, "REFERENCE="+names[i]))
			}
			for _, service := range programs[2:] {
				service.awaitHit("/products/1", "")
			}
			for _, s := range scenarios(products) {
				b.Run(s.name, func(b *testing.B) {
					if s.emptied {
						go emptyRedis(b, own.redis)
					}
					cells := compare(b, programs, s, max(1, products/10_000))
					table += fmt.Sprintf("\n%d\t%s\t%s", products, s.name, cells)
				})
			}
		})
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 1, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, table)
	check(w.Flush())
}

// emptyRedis does so 200 times per second.
func emptyRedis(b *testing.B, r *redisServer) {
	for ; b.Context().Err() == nil; time.Sleep(5 * time.Millisecond) {
		_, _ = r.try("FLUSHALL") // fails at the end, when the Redis is gone
	}
}

// compare measures programs round by round, and returns their cells.
func compare(b *testing.B, programs []*process, s scenario, seconds int) (cells string) {
	results := make([]result, len(programs))
	for b.Loop() {
		// In a fixed order, one would always follow the bare handler, which leaves the processors hot and the caches cold.
		for _, i := range rand.Perm(len(programs)) {
			if i != 1 || s.textbook {
				results[i].measure(programs[i], s, seconds)
			}
		}
	}
	for _, m := range results {
		cells += m.cells(results[0].perSecond())
	}
	return cells
}
