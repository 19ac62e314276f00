package main

import (
	"cmp"
	"database/sql"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"
)

const (
	replicas  = 3
	readers   = 12
	allowance = 100 * time.Millisecond // by which the promise's two exceptions may be behind
)

// TestPromise is the sceptic: three replicas, one PostgreSQL and one Redis, faults in all of them, and every read
// held against everything that was acknowledged or read before it began. SEED repeats the choices of a run (not its
// timing), PROMISE is about how many reads to make. With -race the replicas have the race detector, too. A phase
// alone: go test -run TestPromise/silent.
func TestPromise(t *testing.T) {
	seed := must(strconv.ParseUint(cmp.Or(os.Getenv("SEED"), fmt.Sprint(time.Now().UnixNano()%1e9)), 10, 64))
	t.Logf("SEED=%d", seed)
	p := newPromise(t, seed)
	defer p.report(t)
	reads := must(strconv.Atoi(cmp.Or(os.Getenv("PROMISE"), "3000"))) / 7
	faults := min(max(reads/1000, 1), 25)

	p.phase(t, "calm", reads, 0, nil)
	p.phase(t, "snapshot", reads, faults, p.oldSnapshot)
	p.phase(t, "silent", reads, 2*faults, p.silence)
	p.phase(t, "cut", reads, faults, p.cutOff)
	p.phase(t, "postgres", reads, 2*faults, p.restartPostgres)
	p.phase(t, "psql", reads, faults, p.changeBehind)
	p.phase(t, "killed", reads, faults, p.kill) // the last: the marks of the dead keep keys empty for 12 s
	p.search(t)
}

// A promise is the service under test, what is known of its products, and the figures of each phase.
type promise struct {
	replicas []*replica
	items    []*item // by id, from 1; the first has no writer, so that it can always be a hit
	psql     *sql.DB // another session than the service's
	redis    *redisServer
	mu       sync.Mutex
	rnd      *rand.Rand

	writing  sync.RWMutex // held while no writer may be at work
	lateFrom atomic.Pointer[replica]
	stories  atomic.Int32 // of stale reads, told so far
	now      *figures
	all      []*figures
}

// A replica is a process that reaches PostgreSQL and Redis only through proxies of its own.
type replica struct {
	*process
	redis, postgres *proxy
}

// The figures of a phase, by column.
var columns = []string{"reads", "hits", "writes", "faults", "errors", "stale reads", "lost writes", "slowest, ms"}

type figures struct {
	name   string
	mu     sync.Mutex
	counts map[string]int
}

func (f *figures) get(column string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts[column]
}

// add counts, but keeps the largest of the slowest.
func (f *figures) add(column string, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if column == "slowest, ms" {
		n = max(n-f.counts[column], 0)
	}
	f.counts[column] += n
}

// An item is a product whose stock only rises: a stock is a version. A trigger of the test's own sees to it that a
// write which was never acknowledged, and may come at any time, cannot lower it.
type item struct {
	id      int64
	writing sync.Mutex // one writer at a time

	mu     sync.Mutex // guards what follows
	next   int
	acked  int
	late   map[int]bool // versions to which the allowance applies
	raises []raise      // of the floor, rising in both
	events []string     // the latest
}

type raise struct {
	version int
	at      time.Time
}

// note keeps a line for the story of a stale read, with mu held.
func (it *item) note(format string, args ...any) {
	if len(it.events) == 400 {
		it.events = slices.Delete(it.events, 0, 200)
	}
	it.events = append(it.events, time.Now().Format("15:04:05.000000 ")+fmt.Sprintf(format, args...))
}

// floor returns the version below which a read that begins at a time must not be.
func (it *item) floor(began time.Time) int {
	it.mu.Lock()
	defer it.mu.Unlock()
	for _, r := range slices.Backward(it.raises[1:]) {
		if it.late[r.version] {
			r.at = r.at.Add(allowance)
		}
		if !r.at.After(began) {
			return r.version
		}
	}
	return it.raises[0].version
}

// raise lifts the floor, with mu held.
func (it *item) raise(version int) {
	if len(it.raises) > 0 && version <= it.raises[len(it.raises)-1].version {
		return
	}
	it.raises = append(it.raises, raise{version, time.Now()})
}

// change gives f the version that is written next, and notes how it ends.
func (it *item) change(who string, late bool, f func(version int) error) error {
	it.writing.Lock()
	defer it.writing.Unlock()
	it.mu.Lock()
	version := it.next
	it.next++
	it.late[version] = late
	it.note("%s writes %d", who, version)
	it.mu.Unlock()
	err := f(version)
	it.mu.Lock()
	defer it.mu.Unlock()
	it.note("%s has written %d: %v", who, version, err)
	if err == nil {
		it.acked = version
		it.raise(version)
	}
	return err
}

// judge holds what a read returned against the floor at which it began.
func (p *promise) judge(t *testing.T, it *item, version, floor int, from string, began time.Time) {
	it.mu.Lock()
	defer it.mu.Unlock()
	took := time.Since(began)
	it.note("%s is %d, floor %d, asked %v ago", from, version, floor, took)
	it.raise(version)
	if version >= floor {
		return
	}
	p.now.add("stale reads", 1)
	t.Fail()
	if p.stories.Add(1) <= 3 {
		t.Errorf("STALE: product %d through %s is %d, at least %d was known %v ago when it was asked for\n%s",
			it.id, from, version, floor, took, strings.Join(it.events, "\n"))
	}
}

func newPromise(t *testing.T, seed uint64) *promise {
	p := &promise{rnd: rand.New(rand.NewPCG(seed, 0)), now: &figures{counts: map[string]int{}}}
	var cfg config
	p.redis, cfg = startRedis(t, testConfig(t))
	cfg = withDatabase(t, cfg)
	p.psql = psql(t, cfg)
	// Now and then something takes a while, so that what is a matter of microseconds elsewhere happens often here.
	delay := func() {
		if p.random(25) == 0 {
			p.sleep(20 * time.Millisecond)
		}
	}
	redis, postgres := "127.0.0.1:"+p.redis.port, net.JoinHostPort(cfg.postgresHost, cfg.postgresPort)
	for range replicas {
		r := &replica{redis: startProxy(t, redis, delay), postgres: startProxy(t, postgres, delay)}
		own := cfg
		own.redisPort, own.postgresHost, own.postgresPort = r.redis.port, "127.0.0.1", r.postgres.port
		r.process = startProcess(t, own, "LOG_LEVEL=warn")
		p.replicas = append(p.replicas, r)
	}
	p.replicas[0].wantHealth(200, "healthy", "connected", "connected") // so there is a table
	mustExec(t, p.psql, `CREATE FUNCTION only_rises() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
		IF NEW.stock < OLD.stock THEN RAISE EXCEPTION 'stock would fall from % to %', OLD.stock, NEW.stock; END IF;
		IF current_setting('application_name') LIKE 'desafio3%' THEN
			PERFORM pg_sleep(CASE WHEN random() < 0.02 THEN random() * 1.2 WHEN random() < 0.5 THEN random() * 0.01 ELSE 0 END);
		END IF;
		RETURN NEW; END $$`)
	mustExec(t, p.psql, `CREATE TRIGGER only_rises BEFORE UPDATE ON products FOR EACH ROW EXECUTE FUNCTION only_rises()`)
	for id := range int64(5) {
		it := &item{id: id + 1, next: 2, late: map[int]bool{}}
		it.raise(1)
		p.items = append(p.items, it)
	}
	mustExec(t, p.psql, `INSERT INTO products (id, name, price, stock) SELECT id, 'thing', 1, 1 FROM generate_series(1, 5) id`)
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

func (p *promise) anyReplica() *replica { return p.replicas[p.random(len(p.replicas))] }

// phase runs readers and writers, and faults with as many reads between them, and then looks for what was written.
func (p *promise) phase(t *testing.T, name string, n, times int, fault func(*testing.T, int)) {
	t.Run(name, func(t *testing.T) {
		p.now = &figures{name: name, counts: map[string]int{}}
		p.all = append(p.all, p.now)
		var stop atomic.Bool
		var group sync.WaitGroup
		for _, it := range p.items[1:] {
			group.Go(func() {
				for !stop.Load() {
					p.write(it)
					p.sleep(30 * time.Millisecond)
				}
			})
		}
		for range readers {
			group.Go(func() {
				for !stop.Load() {
					p.read(t)
					p.sleep(2 * time.Millisecond)
				}
			})
		}
		func() {
			defer group.Wait() // when the fault fails the test, too
			defer stop.Store(true)
			for k := range times {
				p.wait(t, n/(times+1))
				fault(t, k)
				p.settle(t)
				p.now.add("faults", 1)
			}
			p.wait(t, n/(times+1))
		}()
		p.settle(t)
		p.search(t)
		if n := p.now.get("errors"); times == 0 && n > 0 {
			t.Errorf("%d errors without a fault", n)
		}
		if ms := p.now.get("slowest, ms"); ms > 7000 {
			t.Errorf("a request took %d ms", ms)
		}
	})
}

// wait returns after some more reads.
func (p *promise) wait(t *testing.T, n int) {
	target := p.now.get("reads") + n
	for p.now.get("reads") < target {
		before := p.now.get("reads")
		eventually(t, "another read", func() bool { return p.now.get("reads") > before })
	}
}

// send sends a request through a replica and counts it.
func (p *promise) send(r *replica, method, path, body string) (answer, error) {
	a, err := r.trySend(method, path, body)
	p.now.add("slowest, ms", int(a.took.Milliseconds()))
	if err != nil || a.status != 200 {
		p.now.add("errors", 1)
		if err == nil {
			err = fmt.Errorf("%d %s", a.status, a.body)
		}
	}
	return a, err
}

func (p *promise) write(it *item) {
	p.writing.RLock()
	defer p.writing.RUnlock()
	r := p.anyReplica()
	if it.change(r.url, p.lateFrom.Load() == r, func(version int) error {
		_, err := p.send(r, "PUT", fmt.Sprintf("/products/%d", it.id), fmt.Sprintf(`{"stock":%d}`, version))
		return err
	}) == nil {
		p.now.add("writes", 1)
	}
}

func (p *promise) read(t *testing.T) {
	if it := p.items[p.random(len(p.items))]; p.random(5) > 0 {
		p.readFrom(t, p.anyReplica(), []*item{it}, fmt.Sprintf("/products/%d", it.id))
	} else {
		p.readFrom(t, p.anyReplica(), p.items, "/products")
	}
}

// readFrom reads one product or the list and judges what it says of the items.
func (p *promise) readFrom(t *testing.T, r *replica, items []*item, path string) {
	began := time.Now()
	floors := make([]int, len(items))
	for i, it := range items {
		floors[i] = it.floor(began)
	}
	a, err := p.send(r, "GET", path, "")
	if err != nil {
		if a.status != 0 && a.status != 503 {
			t.Errorf("GET %s: %v", path, err)
		}
		return
	}
	p.now.add("reads", 1)
	if a.source() == hit {
		p.now.add("hits", 1)
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
		for path, words := range map[string]string{"/health": `"healthy","database":"connected","cache":"connected"`, "/products/1": string(hit)} {
			eventually(t, r.url+path+" says "+words, func() bool {
				a, _ := r.trySend("GET", path, "")
				return strings.Contains(string(a.source())+a.body, words)
			})
		}
	}
}

// search looks for every acknowledged write in every replica and in PostgreSQL.
func (p *promise) search(t *testing.T) {
	time.Sleep(allowance)
	for _, r := range p.replicas {
		p.readFrom(t, r, p.items, "/products")
		for _, it := range p.items {
			p.readFrom(t, r, []*item{it}, fmt.Sprintf("/products/%d", it.id))
		}
	}
	for _, it := range p.items {
		var stock int
		err := p.psql.QueryRow("SELECT stock FROM products WHERE id = $1", it.id).Scan(&stock)
		if err != nil || stock < it.acked {
			p.now.add("lost writes", 1)
			t.Errorf("LOST: product %d in PostgreSQL is %d, %d was acknowledged, %v", it.id, stock, it.acked, err)
		}
	}
}

// oldSnapshot kills Redis and brings it back as it was before the latest writes. The connections of one replica, or of
// all, are not closed but fall silent, as when a host goes without a word.
func (p *promise) oldSnapshot(t *testing.T, k int) {
	p.redis.do("SAVE")
	snapshot := must(os.ReadFile(p.redis.dump()))
	target := p.now.get("writes") + 20
	eventually(t, "20 writes more", func() bool { return p.now.get("writes") >= target })
	for i, r := range p.replicas {
		if k%2 == 0 || i == k%replicas {
			r.redis.silence()
		}
	}
	p.redis.kill()
	check(os.WriteFile(p.redis.dump(), snapshot, 0o600))
	p.redis.start()
}

// silence stops Redis for a second, or makes it unreachable for a moment, in both of which it forgets nothing.
func (p *promise) silence(t *testing.T, k int) {
	if k%2 == 0 {
		p.redis.signal(syscall.SIGSTOP)
		time.Sleep(time.Second)
		p.redis.signal(syscall.SIGCONT)
		return
	}
	for _, r := range p.replicas {
		defer r.redis.cut()()
	}
	p.wait(t, 200)
}

// cutOff keeps one replica from Redis while the others reach it. What it writes may be late elsewhere.
func (p *promise) cutOff(t *testing.T, k int) {
	r := p.replicas[k%replicas]
	p.lateFrom.Store(r)
	mend := r.redis.cut()
	p.wait(t, 500)
	mend()
	p.settle(t)
	p.writing.Lock() // until its last write under the fault has ended
	p.lateFrom.Store(nil)
	p.writing.Unlock()
}

// restartPostgres crashes PostgreSQL, or makes it unreachable for a moment in which others change rows: of those
// nobody tells the service.
func (p *promise) restartPostgres(t *testing.T, k int) {
	if k%2 == 0 {
		p.sleep(50 * time.Millisecond)
		postgres(t, stopPostgres+startPostgres)
		return
	}
	for _, r := range p.replicas {
		defer r.postgres.cut()()
	}
	for range 10 {
		p.changeRow(t)
	}
	time.Sleep(3 * allowance)
}

// changeRow changes a row as somebody with psql would.
func (p *promise) changeRow(t *testing.T) {
	it := p.items[p.random(len(p.items))]
	if err := it.change("psql", true, func(version int) error {
		_, err := p.psql.Exec("UPDATE products SET stock = $1 WHERE id = $2", version, it.id)
		return err
	}); err != nil {
		t.Error(err)
	}
}

// changeBehind changes rows behind the API's back, and clears the cache now and then.
func (p *promise) changeBehind(t *testing.T, k int) {
	for range 10 {
		p.changeRow(t)
		p.wait(t, 30)
		p.anyReplica().want(200, "DELETE", "/cache/clear", "")
	}
}

// kill ends a replica without a warning, wherever it is, and starts it again.
func (p *promise) kill(t *testing.T, k int) {
	r := p.anyReplica()
	p.sleep(20 * time.Millisecond)
	r.kill()
	p.wait(t, 100)
	r.start()
}

// report logs the figures.
func (p *promise) report(t *testing.T) {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "phase\t"+strings.Join(columns, "\t")+"\t")
	total := &figures{name: "total", counts: map[string]int{}}
	for _, f := range append(p.all, total) {
		fmt.Fprintf(w, "%s\t", f.name)
		for _, column := range columns {
			fmt.Fprintf(w, "%d\t", f.get(column))
			total.add(column, f.get(column))
		}
		fmt.Fprintln(w)
	}
	_ = w.Flush()
	t.Log("what was found:\n" + text.String())
}
