//go:build linux

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/gomodule/redigo/redis"
)

// How fast the service is, as a client sees it. scripts/bench.sh runs this file.
//
// How one measures, and what this file does for it:
//   - What is measured is the real binary, in a process of its own. In the process of the load generator it would
//     share Go's scheduler and garbage collector with it.
//   - A number alone says little, since it depends on the machine. So there is always a reference beside it: a bare
//     handler, which writes the same bytes from memory. Nothing that is written with net/http can be faster.
//   - The programs are measured in turn, round by round, and the median of the rounds counts. Whatever else the
//     machine does then meets all of them, so their ratio is much steadier than the numbers.
//   - The processor time for a request is steadier still: it hardly depends on what else the machine does.
//   - The load runs for a moment before it counts, so that connections are open and the cache is filled.
//   - A wrong answer ends the measurement: errors are often faster than answers.

// The rounds are those of -benchtime (-benchtime 3x); the environment says the rest.
var (
	secondsEach = knob("SECONDS_EACH", 1)[0]      // how long a measurement takes
	clientCount = knob("CLIENTS", 1, 64, 256)     // how many connections send requests
	growth      = knob("GROWTH", 10_000, 100_000) // catalogues of so many products, beside those of 8 and 1,000
	base        = os.Getenv("BASE")               // the path of another build of the service, to compare with
	logLevel    = "LOG_LEVEL=" + cmp.Or(os.Getenv("LOG_LEVEL"), "warn")
)

// knob reads whole numbers from an environment variable.
func knob(name string, numbers ...int) []int {
	text, set := os.LookupEnv(name)
	if set {
		numbers = nil
	}
	for word := range strings.FieldsSeq(text) {
		numbers = append(numbers, must(strconv.Atoi(word)))
	}
	return numbers
}

// ---------------------------------------------------------------- the load

// A scenario is a line of the table, and what the clients send for it.
type scenario struct {
	name      string
	reference string
	clients   []int
	requests  [][]byte // whole and ready to send; a client takes one at random, again and again
	rate      int      // requests a second of all clients together; 0: each sends when it has its answer
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

// mixed makes nine reads to one update.
func mixed(reads, updates [][]byte) (all [][]byte) {
	for i, update := range updates {
		all = append(append(all, update), slices.Repeat(reads[i%len(reads):][:1], 9)...)
	}
	return all
}

// A measurement is what was found, by these names.
type measurement [5]float64

const (
	perSecond = iota // answers
	p50              // half of the requests had their answer within so many milliseconds
	p99              // and 99 of 100 within so many
	micros           // of processor time for a request
	peak             // the most memory that the program has had since its start, in MiB
)

// measure puts the load on a program and says what came of it.
func measure(p *process, s scenario, clients, seconds int) (m measurement) {
	begin := time.Now()
	start := begin.Add(300 * time.Millisecond)
	end := start.Add(time.Duration(seconds) * time.Second)
	var turns atomic.Int64
	latencies := make([][]time.Duration, clients)
	wait := concurrently(clients, func(client int) {
		conn := p.dial("")
		defer conn.Close()
		check(conn.SetDeadline(end.Add(time.Minute)))
		in := bufio.NewReaderSize(conn, 16<<10)
		var own []time.Duration
		for {
			sent := time.Now()
			if s.rate > 0 {
				// Latency counts from the moment at which the request should have been sent. If it counted from the
				// moment at which a client was free to send it, one slow answer would make the requests behind it
				// wait and nobody would see that.
				sent = begin.Add(time.Duration(turns.Add(1)) * time.Second / time.Duration(s.rate))
				sleepUntil(sent)
			}
			if sent.After(end) {
				latencies[client] = own
				return
			}
			exchange(conn, in, s.requests[rand.IntN(len(s.requests))])
			if sent.After(start) { // and before the end: a late answer counts, too
				own = append(own, time.Since(sent))
			}
		}
	})
	time.Sleep(time.Until(start))
	busy := processorTime(p.Process.Pid)
	time.Sleep(time.Until(end))
	busy = processorTime(p.Process.Pid) - busy
	wait()
	all := slices.Sorted(slices.Values(slices.Concat(latencies...)))
	n, ms := float64(len(all)), func(i int) float64 { return all[i].Seconds() * 1e3 }
	m[perSecond], m[p50], m[p99] = n/float64(seconds), ms(len(all)/2), ms(len(all)*99/100)
	m[micros], m[peak] = busy/n*1e6, peakMemory(p.Process.Pid)
	return m
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

// sleepUntil is time.Sleep, but exact: time.Sleep may be late by a millisecond.
func sleepUntil(t time.Time) {
	for left := time.Until(t); left > 0; left = time.Until(t) {
		duration := syscall.NsecToTimespec(int64(left))
		_ = syscall.Nanosleep(&duration, nil) // a signal may end it early
	}
}

// processorTime returns how many seconds a process has kept a processor busy so far, with what the kernel did for it.
func processorTime(pid int) float64 {
	stat := string(must(os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))))
	// The program's name, in brackets, is field 2. Fields 14 and 15 are utime and stime, in hundredths of a second.
	fields := strings.Fields(stat[strings.LastIndex(stat, ")"):])
	return float64(must(strconv.Atoi(fields[14-2]))+must(strconv.Atoi(fields[15-2]))) / 100
}

// peakMemory returns the most memory that a process has had so far, in MiB.
func peakMemory(pid int) float64 {
	status := string(must(os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))))
	_, after, _ := strings.Cut(status, "VmHWM:")
	return float64(must(strconv.Atoi(strings.Fields(after)[0]))) / 1024
}

// ---------------------------------------------------------------- the programs

// binaries returns the paths of what is compared: the service, built as the Dockerfile does, and BASE.
func binaries(b *testing.B) []string {
	path := filepath.Join(b.TempDir(), "service")
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "nethttpomithttp2", "-ldflags", "-s -w", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	check(cmd.Run())
	if base == "" {
		return []string{path}
	}
	return []string{path, base}
}

// catalogue makes a database with so many products.
func catalogue(b *testing.B, products int) config {
	_, cfg := ownServers(b)
	db := psql(b, cfg)
	must(db.Exec(schema))
	must(db.Exec(`INSERT INTO products (name, description, price, stock, category)
		SELECT 'Product ' || n, 'A product like any other, with a description of a usual length.',
		       n % 1000 + 0.99, n % 100, 'category ' || n % 10
		FROM generate_series(1, $1::int) n`, products))
	must(db.Exec("VACUUM ANALYZE products"))
	return cfg
}

// init makes this program a reference, where BenchmarkRequests has started it.
func init() {
	handler := map[string]func() http.Handler{"bare handler": bareHandler, "textbook": textbook}[os.Getenv("REFERENCE")]
	if handler != nil {
		check(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), handler()))
	}
}

// bareHandler asks the service once for each body, and from then on writes the same bytes from memory.
func bareHandler() http.Handler {
	service := &testServer{url: os.Getenv("SERVICE")}
	var bodies sync.Map
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path, status := r.URL.RequestURI(), http.StatusOK
		if r.Method == http.MethodPost {
			path, status = "/products/1", http.StatusCreated
		}
		_, _ = io.Copy(io.Discard, r.Body)
		body, known := bodies.Load(path)
		if !known {
			body, _ = bodies.LoadOrStore(path, []byte(must(service.trySend("GET", path, "")).body))
		}
		respond(w, status, "application/json", body.([]byte))
	})
}

// textbook updates a product as tutorials do: SELECT, BEGIN, UPDATE, COMMIT and then DEL for the cache, with pools like
// the service's. It takes more round trips than the service, and lets its cache lie.
func textbook() http.Handler {
	db := must(sql.Open("postgres", os.ExpandEnv("host=$POSTGRES_HOST port=$POSTGRES_PORT dbname=$POSTGRES_DB user=$POSTGRES_USER "+
		"password='$POSTGRES_PASSWORD' sslmode=disable binary_parameters=yes application_name=desafio3")))
	db.SetMaxOpenConns(poolSize())
	db.SetMaxIdleConns(poolSize())
	pool := &redis.Pool{MaxActive: poolSize(), MaxIdle: poolSize(), Wait: true, Dial: func() (redis.Conn, error) {
		return redis.Dial("tcp", os.ExpandEnv("$REDIS_HOST:$REDIS_PORT"))
	}}
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /products/{id}", func(w http.ResponseWriter, r *http.Request) {
		var p product
		check(p.scan(db.QueryRowContext(r.Context(), selectProduct, r.PathValue("id"))))
		check(json.NewDecoder(r.Body).Decode(&p))
		tx := must(db.BeginTx(r.Context(), nil))
		defer tx.Rollback()
		check(p.scan(tx.QueryRowContext(r.Context(), updateProduct, p.ID, p.Name, p.Description, p.Price, p.Stock, p.Category)))
		check(tx.Commit())
		conn := pool.Get()
		defer conn.Close()
		must(conn.Do("DEL", keyAll, productKey(p.ID)))
		check(respondJSON(w, http.StatusOK, p))
	})
	return mux
}

// ---------------------------------------------------------------- the benchmarks

const listCleared = "list, cleared 200 times a second"

// scenarios are what is measured with a catalogue of so many products.
func scenarios(products int) []scenario {
	ids, updates := requests("GET", "/products/ID", min(products, 1000)), requests("PUT", "/products/ID", min(products, 1000))
	list, page := requests("GET", "/products", 1), requests("GET", fmt.Sprintf("/products?limit=20&after=%d", products/2), 1)
	all := []scenario{
		{"cached product", "bare handler", clientCount, ids, 0},
		{"page of 20, not cached", "bare handler", clientCount, page, 0},
		{"cached list", "bare handler", clientCount, list, 0},
	}
	switch products {
	case 8:
		all = append(all,
			scenario{listCleared, "bare handler", []int{64}, list, 0},
			scenario{"list, a tenth updates, constant rate", "bare handler", []int{64}, mixed(list, updates), 3000})
	case 1000:
		all = append(all,
			scenario{"product, a tenth updates, constant rate", "bare handler", []int{64}, mixed(ids, updates), 3000},
			scenario{"update", "bare handler", clientCount, updates, 0},
			scenario{"update", "textbook", []int{64}, updates, 0},
			scenario{"creation", "bare handler", clientCount, requests("POST", "/products", 1), 0})
	}
	return all
}

// BenchmarkRequests prints the table: for each scenario its reference, the service and, where BASE names one, another
// build of it.
func BenchmarkRequests(b *testing.B) {
	paths := binaries(b)
	table := "products\t\tclients\treference" + strings.Repeat("\t|\ta second\tp50 ms\tp99 ms\tCPU µs\tpeak MiB\tratio", 1+len(paths)) + "\t\n"
	for _, products := range append([]int{8, 1000}, growth...) {
		b.Run(fmt.Sprintf("products=%d", products), func(b *testing.B) {
			cfg := catalogue(b, products)
			programs := []*process{nil} // for the reference
			for _, path := range paths {
				p := startProcess(b, path, cfg, logLevel)
				p.awaitHit("/products/1")
				programs = append(programs, p)
			}
			references := map[string]*process{}
			for _, name := range []string{"bare handler", "textbook"} {
				references[name] = startProcess(b, "/proc/self/exe", cfg, "REFERENCE="+name, "SERVICE="+programs[1].url)
			}
			for _, s := range scenarios(products) {
				programs[0] = references[s.reference]
				for _, clients := range s.clients {
					b.Run(fmt.Sprintf("%s/%s/clients=%d", s.name, s.reference, clients), func(b *testing.B) {
						if s.name == listCleared {
							go clearList(b.Context(), cfg)
						}
						seconds := max(secondsEach, products/10_000)
						if s.rate > 0 {
							seconds *= 3 // fewer requests a second
						}
						cells := compare(b, programs, s, clients, seconds)
						table += fmt.Sprintf("%d\t%s\t%d\t%s\t%s\n", products, s.name, clients, s.reference, cells)
					})
				}
			}
		})
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 1, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, table)
	check(w.Flush())
}

// compare measures programs in turn, round by round, and returns the cells with their medians.
func compare(b *testing.B, programs []*process, s scenario, clients, seconds int) (cells string) {
	rounds := make([][]measurement, len(programs))
	for round := 0; b.Loop(); round++ {
		for i := range programs {
			i = (i + round) % len(programs) // so that each is first in turn
			rounds[i] = append(rounds[i], measure(programs[i], s, clients, seconds))
		}
	}
	reference := medians(rounds[0])
	for i := range programs {
		m := medians(rounds[i])
		ratio := m[perSecond] / reference[perSecond]
		cells += fmt.Sprintf("|\t%.0f\t%.3f\t%.2f\t%.1f\t%.1f\t%.2f\t", m[perSecond], m[p50], m[p99], m[micros], m[peak], ratio)
		b.ReportMetric(m[perSecond], []string{"reference/s", "service/s", "base/s"}[i])
	}
	b.ReportMetric(0, "ns/op") // of a whole round: that says nothing
	return cells
}

// medians returns the median of each figure.
func medians(rounds []measurement) (median measurement) {
	for figure := range median {
		slices.SortFunc(rounds, func(a, b measurement) int { return cmp.Compare(a[figure], b[figure]) })
		median[figure] = rounds[len(rounds)/2][figure]
	}
	return median
}

// clearList takes the list out of Redis 200 times a second.
func clearList(ctx context.Context, cfg config) {
	conn := must(redis.Dial("tcp", net.JoinHostPort(cfg.redisHost, cfg.redisPort)))
	defer conn.Close()
	for ; ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
		must(conn.Do("DEL", keyAll))
	}
}

// BenchmarkStart measures how long it takes from the start of the process to the first answer from the database, both
// servers being up.
func BenchmarkStart(b *testing.B) {
	cfg := catalogue(b, 8)
	for _, path := range binaries(b) {
		b.Run(filepath.Base(path), func(b *testing.B) {
			for b.Loop() {
				p := startProcess(b, path, cfg, logLevel)
				eventually(b, "it is well", func() bool { return p.send("GET", "/health", "").status == 200 })
				b.StopTimer()
				p.kill()
				b.StartTimer()
			}
		})
	}
}
