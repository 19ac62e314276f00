package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestPromise is the sceptic. It has three replicas, one PostgreSQL and one Redis, and faults in all of them. Every
// read is checked against everything that was acknowledged or read before it began. PROMISE says about how many reads
// to make. With -race the replicas have the race detector, too. One phase only: go test -run TestPromise/silent.
//
// HISTORY=file writes down what the clients asked and received, for a judge that shares no code with this test, such as
// the linearizability checker Porcupine. Each line is a JSON object:
//
//	client, replica                the number of the client, which sends one request at a time, and the replica it asked
//	method, path, body             the request
//	status, answer, cache          the answer, its body and its Cache-Status; status 0: no answer, or half of one
//	begin, end                     when it was sent, and when the answer arrived: nanoseconds since the test began
//
// At first products 1 to 5 have a stock of 1. A PUT sets the stock of one product. Client -1 stands for a dump that was
// restored while no other client asked. If the status of a PUT is not 200, nobody knows whether it was done: it may
// take effect at any time after its begin, even after its end, or never.
func TestPromise(t *testing.T) {
	p := newPromise(t)
	defer func() { t.Logf("in total: %v", p.figures) }()
	reads := must(strconv.Atoi(cmp.Or(os.Getenv("PROMISE"), "2500"))) / 5
	faults := min(max(reads/1000, 1), 25)

	p.phase(t, "calm", reads, 0, nil)
	p.phase(t, "ordinary", reads, faults, p.ordinaryLife)
	p.phase(t, "snapshot", reads, faults, p.oldSnapshot)
	p.phase(t, "silent", reads, faults, p.silence)
	p.phase(t, "postgres", reads, faults, startPostgres) // crashes it, since it runs
	p.phase(t, "killed", reads, faults, p.kill)          // the last: the marks of the dead keep keys empty for 12 s
}

// products is how many products there are. Each has one writer, but for the first, which can always be a hit.
const products = 5

// A promise is the service under test, what is known of its products, and the figures.
//
// The stock of a product only rises, so that a stock is a version. A trigger sees to it that a write which was never
// acknowledged, and may come at any time, cannot lower it.
type promise struct {
	t        *testing.T // of the phase
	replicas []*process // each reaches PostgreSQL and Redis only through proxies of its own
	proxies  []*proxy   // these to Redis
	servers
	began   time.Time
	history *os.File
	quiet   sync.RWMutex      // each request holds it to read, a fault that must meet no request to write
	sent    [products + 1]int // by id, the version that its writer has sent

	mu      sync.Mutex // guards what follows
	known   []int      // by id, the version that was acknowledged or read: no read that begins later may return less
	figures map[string]int
}

// count adds to a figure and returns it.
func (p *promise) count(figure string, n int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.figures[figure] += n
	return p.figures[figure]
}

// more returns when a figure has grown.
func (p *promise) more(figure string, n int) {
	for range n { // each has its own 15 seconds
		before := p.count(figure, 0)
		eventually(p.t, "more "+figure, func() bool { return p.count(figure, 0) > before })
	}
}

// learn notes a version that was acknowledged or read.
func (p *promise) learn(id int64, version int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known[id] = max(p.known[id], version)
}

// stock returns what PostgreSQL has.
func (p *promise) stock(id int) int {
	return ask[int](p.psql, "SELECT stock FROM products WHERE id = $1", id)
}

func newPromise(t *testing.T) *promise {
	p := &promise{t: t, servers: ownServers(t), began: time.Now(), known: []int{0, 1, 1, 1, 1, 1},
		sent: [...]int{0, 1, 1, 1, 1, 1}, figures: map[string]int{"errors": 0, "stale": 0, "lost": 0}}
	p.history = must(os.Create(cmp.Or(os.Getenv("HISTORY"), t.TempDir()+"/history")))
	t.Cleanup(func() { check(p.history.Close()) })
	// Now and then something takes a while, so that what is a matter of microseconds elsewhere happens often here.
	delay := func([]byte) {
		if rand.IntN(25) == 0 {
			time.Sleep(rand.N(20 * time.Millisecond))
		}
	}
	for range 3 {
		own := p.config
		startProxy(t, &own.postgresPort, delay)
		p.proxies = append(p.proxies, startProxy(t, &own.redisPort, delay))
		p.replicas = append(p.replicas, startProcess(t, os.Args[0], own, "LOG_LEVEL=warn"))
	}
	p.replicas[0].wantHealth(200, "healthy", "connected", "connected") // so there is a table
	must(p.psql.Exec(`
		CREATE FUNCTION only_rises() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
		IF NEW.stock < OLD.stock THEN RAISE EXCEPTION 'stock would fall from % to %', OLD.stock, NEW.stock; END IF;
		IF current_setting('application_name') LIKE 'desafio3%' THEN
			PERFORM pg_sleep(CASE WHEN random() < 0.02 THEN random() * 1.2 WHEN random() < 0.5 THEN random() * 0.01 ELSE 0 END);
		END IF;
		RETURN NEW; END $$;
		CREATE TRIGGER only_rises BEFORE UPDATE ON products FOR EACH ROW EXECUTE FUNCTION only_rises();
		INSERT INTO products (id, name, price, stock) SELECT id, 'thing', 1, 1 FROM generate_series(1, 5) id`))
	p.settle()
	return p
}

func (p *promise) anyReplica() *process { return p.replicas[rand.IntN(len(p.replicas))] }

// phase runs writers and readers, and faults with as many reads between them, and then looks for what was written.
func (p *promise) phase(t *testing.T, name string, reads, faults int, fault func()) {
	t.Run(name, func(t *testing.T) {
		p.t = t
		t.Cleanup(func() { t.Logf("so far: %v", p.figures) })
		ctx, cancel := context.WithCancel(t.Context())
		wait := concurrently(products-1+12, func(i int) {
			client, request, pause := 2+i, p.readAny, 2*time.Millisecond
			if client <= products {
				request, pause = p.write, 30*time.Millisecond
			}
			for ctx.Err() == nil {
				p.quiet.RLock()
				request(client)
				p.quiet.RUnlock()
				time.Sleep(rand.N(pause))
			}
		})
		t.Cleanup(wait) // if the fault fails the test, which ends the context
		for range faults {
			p.more("reads", reads/(faults+1))
			fault()
			p.settle()
			p.count("faults", 1)
		}
		p.more("reads", reads/(faults+1))
		cancel()
		wait()
		p.settle()
		p.search()
		expect(t, faults > 0 || p.count("errors", 0) == 0, "%d errors without a fault", p.count("errors", 0))
	})
}

// record writes down a request that ends now.
func (p *promise) record(request map[string]any) {
	request["end"] = time.Since(p.began)
	check(json.NewEncoder(p.history).Encode(request))
}

// send sends a request through a replica, writes it down, and reports whether it succeeded.
func (p *promise) send(client int, r *process, method, path, body string) (a answer, ok bool) {
	begin := time.Since(p.began)
	a, err := r.send(method, path, body)
	if err != nil {
		a.status = 0
	}
	p.record(map[string]any{"client": client, "replica": r.url, "method": method, "path": path, "body": body,
		"status": a.status, "answer": a.body, "cache": a.source(), "begin": begin})
	within(p.t, a.took, 7*time.Second, method+" "+path)
	if a.status != 200 {
		p.count("errors", 1)
	}
	return a, a.status == 200
}

// write sends the next version of a product through a replica. Its writer has the product's id as its number.
func (p *promise) write(id int) {
	p.sent[id]++
	path, body := fmt.Sprintf("/products/%d", id), fmt.Sprintf(`{"stock":%d}`, p.sent[id])
	if _, ok := p.send(id, p.anyReplica(), "PUT", path, body); ok {
		p.learn(int64(id), p.sent[id])
		p.count("writes", 1)
	}
}

// readAny reads a product or the list, and now and then clears the cache before.
func (p *promise) readAny(client int) {
	if rand.IntN(100) == 0 {
		p.send(client, p.anyReplica(), "DELETE", "/cache/clear", "")
	}
	path := "/products"
	if rand.IntN(5) > 0 {
		path = fmt.Sprintf("/products/%d", 1+rand.IntN(products))
	}
	p.read(client, p.anyReplica(), path)
}

// read reads one product or the list, and checks each stock against what was known when the read began.
func (p *promise) read(client int, r *process, path string) {
	p.mu.Lock()
	known := slices.Clone(p.known)
	p.mu.Unlock()
	a, ok := p.send(client, r, "GET", path, "")
	if !ok {
		expect(p.t, a.status == 0 || a.status == 503, "GET %s: %d %s", path, a.status, a.body)
		return
	}
	p.count("reads", 1)
	var list struct{ Products []product }
	body, count := a.body, products
	if path != "/products" {
		body, count = `{"products":[`+a.body+`]}`, 1
	}
	err := json.Unmarshal([]byte(body), &list)
	expect(p.t, err == nil && len(list.Products) == count, "GET %s: %v %s", path, err, a.body)
	for _, one := range list.Products {
		version := int(one.Stock)
		p.learn(one.ID, version)
		if version < known[one.ID] && p.count("stale", 1) <= 3 { // more stories say no more
			story := must(os.ReadFile(p.history.Name()))
			p.t.Errorf("STALE: product %d is %d in %s%s (%s), at least %d was known %v before\n%s", one.ID, version,
				r.url, path, a.source(), known[one.ID], a.took, story[max(0, len(story)-100_000):])
		}
	}
}

// settle waits until every replica says that all is well, and the cache is in use again.
func (p *promise) settle() {
	for _, r := range p.replicas {
		r.awaitText("/health", `"healthy"`)
		r.awaitHit("/products/1", "")
	}
}

// search looks for every write that was acknowledged or read, in every replica and in PostgreSQL.
func (p *promise) search() {
	for _, r := range p.replicas {
		p.read(0, r, "/products")
		for id := range products {
			p.read(0, r, fmt.Sprintf("/products/%d", id+1))
		}
	}
	for id := 1; id <= products; id++ {
		if stock := p.stock(id); stock < p.known[id] {
			p.count("lost", 1)
			p.t.Errorf("LOST: product %d in PostgreSQL is %d, %d was acknowledged or read", id, stock, p.known[id])
		}
	}
}

// oldSnapshot kills Redis and brings it back as it was before the latest writes. The connections of one replica are not
// closed but fall silent, as if a host had lost its power.
func (p *promise) oldSnapshot() {
	p.redis.do("SAVE")
	p.more("writes", 20)
	p.proxies[rand.IntN(len(p.proxies))].silence()
	p.redis.restart()
}

// ordinaryLife restores a dump from before the latest writes and ends all idle connections: no request fails.
func (p *promise) ordinaryLife() {
	dump := psqlDump(p.config)
	p.more("writes", 20)
	errors := p.count("errors", 0)
	p.restore(dump)
	p.more("reads", 100)
	equal(p.t, "errors of requests", p.count("errors", 0), errors)
}

// restore restores a dump while no client asks. A second later every read shows what is in the database.
func (p *promise) restore(dump string) {
	p.quiet.Lock()
	defer p.quiet.Unlock()
	begin := time.Since(p.began)
	pgTool(p.config, dump, "psql", "-v", "ON_ERROR_STOP=1")
	time.Sleep(time.Second)
	for id := 1; id <= products; id++ {
		p.known[id] = p.stock(id)
		path, stock := fmt.Sprintf("/products/%d", id), fmt.Sprintf(`"stock":%d`, p.known[id])
		p.record(map[string]any{"client": -1, "method": "PUT", "path": path, "body": "{" + stock + "}", "status": 200,
			"begin": begin})
		for _, r := range p.replicas {
			r.read(path, stock+",")
		}
	}
	must(p.psql.Exec(`SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
		WHERE datname = current_database() AND application_name = 'desafio3'`))
}

// silence stops Redis for a second, in which it forgets nothing.
func (p *promise) silence() {
	p.redis.signal(syscall.SIGSTOP)
	time.Sleep(time.Second)
	p.redis.signal(syscall.SIGCONT)
}

// kill ends a replica without a warning, whatever it is doing, and starts it again.
func (p *promise) kill() {
	r := p.anyReplica()
	time.Sleep(rand.N(20 * time.Millisecond))
	r.kill()
	p.more("reads", 100)
	r.start()
}
