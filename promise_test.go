package main

import (
	"cmp"
	"database/sql"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestPromise is the sceptic: three replicas, one PostgreSQL and one Redis, faults in all of them, and every read
// held against everything that was acknowledged or read before it began. SEED repeats the choices of a run (not its
// timing), PROMISE is about how many reads to make. With -race the replicas have the race detector, too. A phase
// alone: go test -run TestPromise/silent.
//
// HISTORY=file writes down what the clients asked and received, for a judge that shares no code with this test, such as
// the linearizability checker Porcupine. Each line is a JSON object:
//
//	client, replica                the number of the client, which sends one request at a time, and whom it asked
//	method, path, body             the request
//	status, answer, cache          the answer, its body and its Cache-Status; status 0: no answer, or half of one
//	begin, end                     when it was sent, and when the answer was there: nanoseconds since the test began
//
// At first products 1 to 5 have a stock of 1. A PUT sets the stock of one product. Those of client -1 are what a dump
// brought back while no other client asked. If its status is not 200, nobody
// knows whether it was done: it may take effect at any time after its begin, even after its end, or never.
func TestPromise(t *testing.T) {
	seed := must(strconv.ParseUint(cmp.Or(os.Getenv("SEED"), fmt.Sprint(time.Now().UnixNano()%1e9)), 10, 64))
	t.Logf("SEED=%d", seed)
	p := newPromise(t, seed)
	defer func() { t.Logf("in total: %v", p.total) }()
	reads := must(strconv.Atoi(cmp.Or(os.Getenv("PROMISE"), "2500"))) / 5
	faults := min(max(reads/1000, 1), 25)

	p.phase(t, "calm", reads, 0, nil)
	p.phase(t, "ordinary", reads, faults, p.ordinaryLife)
	p.phase(t, "snapshot", reads, faults, p.oldSnapshot)
	p.phase(t, "silent", reads, faults, p.silence)
	p.phase(t, "postgres", reads, faults, p.restartPostgres)
	p.phase(t, "killed", reads, faults, p.kill) // the last: the marks of the dead keep keys empty for 12 s
}

// A promise is the service under test, what is known of its products, and the figures of each phase.
type promise struct {
	replicas []*process // each reaches PostgreSQL and Redis only through proxies of its own
	proxies  []*proxy   // these to Redis
	items    []*item    // by id, from 1; the first has no writer, so that it can always be a hit
	psql     *sql.DB
	redis    *redisServer
	cfg      config
	began    time.Time
	quiet    sync.RWMutex // clients hold it to read for a request; a fault that must meet no request holds it to write

	mu      sync.Mutex // guards what follows
	rnd     *rand.Rand
	figures map[string]int // of the phase
	total   map[string]int
	history *os.File // or nil
	latest  []string // lines of the history
}

// newFigures shows a zero, too, where nothing has happened.
func newFigures() map[string]int {
	return map[string]int{"reads": 0, "hits": 0, "writes": 0, "faults": 0, "errors": 0, "stale": 0, "lost": 0, "slowest_ms": 0}
}

// count adds to a figure, but keeps the largest of the slowest, and returns that of this phase.
func (p *promise) count(figure string, n int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, figures := range []map[string]int{p.figures, p.total} {
		if figure == "slowest_ms" {
			figures[figure] = max(figures[figure], n)
		} else {
			figures[figure] += n
		}
	}
	return p.figures[figure]
}

// An item is a product whose stock only rises: a stock is a version. A trigger of the test's own sees to it that a
// write which was never acknowledged, and may come at any time, cannot lower it.
type item struct {
	id      int64
	version int // that its one writer has sent

	mu    sync.Mutex // guards what follows
	floor int        // what was acknowledged or read: nobody may read less any more
}

// judge holds what a read returned against the floor at which it began.
func (p *promise) judge(t *testing.T, it *item, version, floor int, from string, began time.Time) {
	it.mu.Lock()
	defer it.mu.Unlock()
	took := time.Since(began)
	it.floor = max(it.floor, version)
	if version >= floor {
		return
	}
	t.Fail()
	if p.count("stale", 1) <= 3 { // more stories say no more
		t.Errorf("STALE: product %d through %s is %d, at least %d was known %v ago when it was asked for\n%s",
			it.id, from, version, floor, took, p.story())
	}
}

func newPromise(t *testing.T, seed uint64) *promise {
	r, cfg := ownServers(t)
	p := &promise{redis: r, cfg: cfg, psql: psql(t, cfg), rnd: rand.New(rand.NewPCG(seed, 0)), began: time.Now(), total: newFigures()}
	if file := os.Getenv("HISTORY"); file != "" {
		p.history = must(os.Create(file))
		t.Cleanup(func() { check(p.history.Close()) })
	}
	// Now and then something takes a while, so that what is a matter of microseconds elsewhere happens often here.
	delay := func([]byte) {
		if p.random(25) == 0 {
			p.sleep(20 * time.Millisecond)
		}
	}
	redis, postgres := "127.0.0.1:"+p.redis.port, net.JoinHostPort(cfg.postgresHost, cfg.postgresPort)
	for range 3 {
		own, proxy := cfg, startProxy(t, redis, delay)
		own.redisPort, own.postgresHost, own.postgresPort = proxy.port, "127.0.0.1", startProxy(t, postgres, delay).port
		p.replicas = append(p.replicas, startProcess(t, os.Args[0], own, "LOG_LEVEL=warn"))
		p.proxies = append(p.proxies, proxy)
	}
	p.replicas[0].wantHealth(200, "healthy", "connected", "connected") // so there is a table
	must(p.psql.Exec(`CREATE FUNCTION only_rises() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
		IF NEW.stock < OLD.stock THEN RAISE EXCEPTION 'stock would fall from % to %', OLD.stock, NEW.stock; END IF;
		IF current_setting('application_name') LIKE 'desafio3%' THEN
			PERFORM pg_sleep(CASE WHEN random() < 0.02 THEN random() * 1.2 WHEN random() < 0.5 THEN random() * 0.01 ELSE 0 END);
		END IF;
		RETURN NEW; END $$`))
	must(p.psql.Exec(`CREATE TRIGGER only_rises BEFORE UPDATE ON products FOR EACH ROW EXECUTE FUNCTION only_rises()`))
	for id := range int64(5) {
		p.items = append(p.items, &item{id: id + 1, version: 1, floor: 1})
	}
	must(p.psql.Exec(`INSERT INTO products (id, name, price, stock) SELECT id, 'thing', 1, 1 FROM generate_series(1, 5) id`))
	p.settle(t)
	return p
}

// random returns a number from 0 to n-1; all choices come from the one seed.
func (p *promise) random(n int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rnd.IntN(n)
}

func (p *promise) sleep(longest time.Duration) { time.Sleep(time.Duration(p.random(int(longest)))) }

func (p *promise) anyReplica() *process { return p.replicas[p.random(len(p.replicas))] }

// phase runs readers and writers, and faults with as many reads between them, and then looks for what was written.
func (p *promise) phase(t *testing.T, name string, n, times int, fault func(*testing.T)) {
	t.Run(name, func(t *testing.T) {
		p.figures = newFigures()
		defer func() { t.Log(name, p.figures) }()
		var stop atomic.Bool
		awaitWriters := concurrently(len(p.items)-1, func(i int) {
			for !stop.Load() {
				p.write(i, p.items[1+i])
				p.sleep(30 * time.Millisecond)
			}
		})
		awaitReaders := concurrently(12, func(i int) {
			for !stop.Load() {
				p.read(t, len(p.items)+i)
				p.sleep(2 * time.Millisecond)
			}
		})
		func() {
			defer awaitWriters() // when the fault fails the test, too
			defer awaitReaders()
			defer stop.Store(true)
			for range times {
				p.wait(t, n/(times+1))
				fault(t)
				p.settle(t)
				p.count("faults", 1)
			}
			p.wait(t, n/(times+1))
		}()
		p.settle(t)
		p.search(t)
		if n := p.count("errors", 0); times == 0 && n > 0 {
			t.Errorf("%d errors without a fault", n)
		}
		within(t, time.Duration(p.count("slowest_ms", 0))*time.Millisecond, 7*time.Second, "the slowest request")
	})
}

// wait returns after some more reads.
func (p *promise) wait(t *testing.T, n int) {
	for target := p.count("reads", 0) + n; p.count("reads", 0) < target; {
		before := p.count("reads", 0)
		eventually(t, "another read", func() bool { return p.count("reads", 0) > before })
	}
}

// send sends a request through a replica, counts it and writes it down.
func (p *promise) send(client int, r *process, method, path, body string) (answer, error) {
	begin := time.Since(p.began)
	a, err := r.trySend(method, path, body)
	end := time.Since(p.began)
	p.count("slowest_ms", int(a.took.Milliseconds()))
	if err != nil {
		a.status = 0
	}
	p.record(map[string]any{"client": client, "replica": r.url, "method": method, "path": path, "body": body,
		"status": a.status, "answer": a.body, "cache": a.source(), "begin": begin, "end": end})
	if a.status != 200 {
		p.count("errors", 1)
		if err == nil {
			err = fmt.Errorf("%d %s", a.status, a.body)
		}
	}
	return a, err
}

// record adds a line to the history.
func (p *promise) record(event map[string]any) {
	line := string(must(json.Marshal(event)))
	p.mu.Lock()
	defer p.mu.Unlock()
	p.latest = append(p.latest[max(0, len(p.latest)-400):], line)
	if p.history != nil {
		must(fmt.Fprintln(p.history, line))
	}
}

// story returns the latest lines of the history.
func (p *promise) story() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.latest, "\n")
}

// write sends the next version of an item through a replica.
func (p *promise) write(client int, it *item) {
	p.quiet.RLock()
	defer p.quiet.RUnlock()
	it.version++
	_, err := p.send(client, p.anyReplica(), "PUT", fmt.Sprintf("/products/%d", it.id), fmt.Sprintf(`{"stock":%d}`, it.version))
	if err == nil {
		it.mu.Lock()
		it.floor = max(it.floor, it.version)
		it.mu.Unlock()
		p.count("writes", 1)
	}
}

// read reads a product or the list, and now and then clears the cache.
func (p *promise) read(t *testing.T, client int) {
	p.quiet.RLock()
	defer p.quiet.RUnlock()
	it, choice := p.items[p.random(len(p.items))], p.random(100)
	switch {
	case choice == 0:
		_, _ = p.send(client, p.anyReplica(), "DELETE", "/cache/clear", "") // counts as an error where it fails
	case choice < 20:
		p.readFrom(t, client, p.anyReplica(), p.items, "/products")
	default:
		p.readFrom(t, client, p.anyReplica(), []*item{it}, fmt.Sprintf("/products/%d", it.id))
	}
}

// readFrom reads one product or the list and judges what it says of the items.
func (p *promise) readFrom(t *testing.T, client int, r *process, items []*item, path string) {
	began := time.Now()
	floors := make([]int, len(items))
	for i, it := range items {
		it.mu.Lock()
		floors[i] = it.floor
		it.mu.Unlock()
	}
	a, err := p.send(client, r, "GET", path, "")
	if err != nil {
		if a.status != 0 && a.status != 503 {
			t.Errorf("GET %s: %v", path, err)
		}
		return
	}
	p.count("reads", 1)
	if a.source() == hit {
		p.count("hits", 1)
	}
	var list struct{ Products []product }
	if path != "/products" {
		a.body = `{"products":[` + a.body + `]}`
	}
	if err := json.Unmarshal([]byte(a.body), &list); err != nil || len(list.Products) != len(items) {
		t.Errorf("GET %s: %v %s", path, err, a.body)
		return
	}
	for i, it := range items {
		p.judge(t, it, int(list.Products[i].Stock), floors[i], fmt.Sprintf("%s%s (%s)", r.url, path, a.source()), began)
	}
}

// settle waits until every replica says that all is well, and the cache is in use again.
func (p *promise) settle(t *testing.T) {
	t.Helper()
	for _, r := range p.replicas {
		const well = `"healthy","database":"connected","cache":"connected"`
		eventually(t, r.url+" is well", func() bool { return strings.Contains(r.send("GET", "/health", "").body, well) })
		r.awaitHit("/products/1")
	}
}

// search looks for every write that was acknowledged or seen, in every replica and in PostgreSQL.
func (p *promise) search(t *testing.T) {
	for _, r := range p.replicas {
		p.readFrom(t, 0, r, p.items, "/products")
		for _, it := range p.items {
			p.readFrom(t, 0, r, []*item{it}, fmt.Sprintf("/products/%d", it.id))
		}
	}
	for _, it := range p.items {
		if stock := ask[int](p.psql, "SELECT stock FROM products WHERE id = $1", it.id); stock < it.floor {
			p.count("lost", 1)
			t.Errorf("LOST: product %d in PostgreSQL is %d, %d was acknowledged or read", it.id, stock, it.floor)
		}
	}
}

// oldSnapshot kills Redis and brings it back as it was before the latest writes. The connections of one replica, or of
// all, are not closed but fall silent, as when a host goes without a word.
func (p *promise) oldSnapshot(t *testing.T) {
	bringBack := p.redis.save()
	target := p.count("writes", 0) + 20
	eventually(t, "20 writes more", func() bool { return p.count("writes", 0) >= target })
	all, one := p.random(2) == 0, p.random(len(p.proxies))
	for i, proxy := range p.proxies {
		if all || i == one {
			proxy.silence()
		}
	}
	bringBack()
}

// ordinaryLife restores a dump from before the latest writes, in a moment in which nobody asks, and then ends all idle
// connections. A second later every read shows what is in the database, and no request meets an error.
func (p *promise) ordinaryLife(t *testing.T) {
	dump := psqlDump(t, p.cfg)
	target := p.count("writes", 0) + 20
	eventually(t, "20 writes more", func() bool { return p.count("writes", 0) >= target })
	errors := p.count("errors", 0)
	func() {
		p.quiet.Lock()
		defer p.quiet.Unlock()
		begin := time.Since(p.began)
		pgTool(t, p.cfg, dump, "psql", "-v", "ON_ERROR_STOP=1")
		time.Sleep(time.Second)
		for _, it := range p.items {
			it.floor = ask[int](p.psql, "SELECT stock FROM products WHERE id = $1", it.id)
			path := fmt.Sprintf("/products/%d", it.id)
			p.record(map[string]any{"client": -1, "method": "PUT", "path": path, "body": fmt.Sprintf(`{"stock":%d}`, it.floor),
				"status": 200, "begin": begin, "end": time.Since(p.began)})
			for _, r := range p.replicas {
				if a := r.want(200, "GET", path, ""); !strings.Contains(a.body, fmt.Sprintf(`"stock":%d,`, it.floor)) {
					p.count("stale", 1)
					t.Errorf("STALE after a dump: %s%s (%s) is %s, and the database has %d", r.url, path, a.source(), a.body, it.floor)
				}
			}
		}
		must(p.psql.Exec(`SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'desafio3'`))
	}()
	p.wait(t, 100)
	equal(t, "errors of requests", p.count("errors", 0), errors)
}

// silence stops Redis for a second, in which it forgets nothing.
func (p *promise) silence(*testing.T) {
	p.redis.signal(syscall.SIGSTOP)
	time.Sleep(time.Second)
	p.redis.signal(syscall.SIGCONT)
}

// restartPostgres crashes PostgreSQL.
func (p *promise) restartPostgres(*testing.T) {
	p.sleep(50 * time.Millisecond)
	startPostgres()
}

// kill ends a replica without a warning, wherever it is, and starts it again.
func (p *promise) kill(t *testing.T) {
	r := p.anyReplica()
	p.sleep(20 * time.Millisecond)
	r.kill()
	p.wait(t, 100)
	r.start()
}
