package main

import (
	"bytes"
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
	patience  = 30 * time.Second       // for the service to be whole again after a fault
)

// TestPromise is the sceptic: three replicas, one PostgreSQL and one Redis, faults in all of them, and every read
// held against everything that was acknowledged or read before it began. SEED repeats the choices of a run (not its
// timing), PROMISE is about how many reads to make, RACE=1 builds the service with the race detector. A phase alone:
// go test -run TestPromise/silent.
func TestPromise(t *testing.T) {
	seed := uint64(number(t, "SEED", int(time.Now().UnixNano()%1e9)))
	t.Logf("SEED=%d", seed)
	p := newPromise(t, seed)
	defer p.report(t)
	reads := number(t, "PROMISE", 10_000) / 9
	faults := min(max(reads/1000, 2), 25)

	p.phase(t, "calm", reads, 0, nil)
	p.phase(t, "snapshot", reads, faults, p.oldSnapshot)
	p.phase(t, "silent", reads, faults, p.silence)
	p.phase(t, "cut", reads, faults, p.cutOff)
	p.phase(t, "postgres", reads, faults, p.restartPostgres)
	p.phase(t, "killed", reads, faults, p.kill) // the marks of the dead keep keys empty for 12 s: no later phase waits for those
	p.phase(t, "clear", reads, faults, p.clear)
	p.phase(t, "psql", reads, faults, p.changeBehind)
	p.phase(t, "bulk", reads, faults/2, p.changeEverything)
	p.finish(t)
}

func number(t *testing.T, name string, standard int) int {
	if os.Getenv(name) == "" {
		return standard
	}
	n, err := strconv.Atoi(os.Getenv(name))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// A promise is the service under test, what is known of its products, and the figures of each phase.
type promise struct {
	dir      string // for logs
	replicas []*replica
	items    []*item // by id, from 1; the first has no writer, so that it can always be a hit
	psql     *sql.DB // another session than the service's
	client   *http.Client
	redis    *redisServer
	mu       sync.Mutex
	rnd      *rand.Rand

	writing   sync.RWMutex // held while no writer may be at work
	reading   sync.RWMutex // the same for readers
	lateFrom  atomic.Pointer[replica]
	histories atomic.Int32
	now       *figures
	all       []*figures
}

type figures struct {
	name                                             string
	reads, hits, writes, faults, errors, lost, stale atomic.Int64
	slowest                                          atomic.Int64
}

// An item is a product whose stock only rises: a stock is a version. A trigger of the test's own sees to it that a
// write which was never acknowledged, and may come at any time, cannot lower it. A missing row is a version, too.
type item struct {
	id      int64
	writing sync.Mutex // one writer at a time

	mu     sync.Mutex // guards what follows
	next   int
	acked  int
	gone   int          // the version in which the row was last missing
	late   map[int]bool // versions to which the allowance applies
	raises []raise      // of the floor, rising in both
	events [200]event   // the latest, in a ring
	count  int
}

type raise struct {
	version int
	at      time.Time
}

type event struct {
	at   time.Time
	what string
}

func (it *item) note(format string, args ...any) {
	it.events[it.count%len(it.events)] = event{time.Now(), fmt.Sprintf(format, args...)}
	it.count++
}

// floor returns the version below which a read that begins at a time must not be.
func (it *item) floor(began time.Time) int {
	it.mu.Lock()
	defer it.mu.Unlock()
	for i := len(it.raises) - 1; i > 0; i-- {
		r := it.raises[i]
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
	if len(it.raises) == 2000 {
		it.raises = append(it.raises[:0], it.raises[1000:]...)
	}
	it.raises = append(it.raises, raise{version, time.Now()})
}

// begin gives out the version that is written next.
func (it *item) begin(who string, late bool) int {
	it.mu.Lock()
	defer it.mu.Unlock()
	version := it.next
	it.next++
	if late {
		it.late[version] = true
	}
	it.note("%s writes %d", who, version)
	return version
}

func (it *item) end(who string, version int, err error) {
	it.mu.Lock()
	defer it.mu.Unlock()
	if err != nil {
		it.note("%s has not acknowledged %d: %v", who, version, err)
		return
	}
	it.note("%s has written %d", who, version)
	it.acked = version
	it.raise(version)
}

// judge holds what a read returned, 0 for a missing row, against the floor at which it began.
func (p *promise) judge(t *testing.T, it *item, version, floor int, from string, began time.Time) {
	it.mu.Lock()
	defer it.mu.Unlock()
	if version == 0 {
		version = it.gone
	}
	it.note("%s is %d, floor %d, asked %.1f ms ago", from, version, floor, ms(time.Since(began)))
	it.raise(version)
	if version >= floor {
		return
	}
	p.now.stale.Add(1)
	if p.histories.Add(1) > 3 {
		t.Fail()
		return
	}
	var history strings.Builder
	for i := max(0, it.count-len(it.events)); i < it.count; i++ {
		e := it.events[i%len(it.events)]
		fmt.Fprintf(&history, "%s %s\n", e.at.Format("15:04:05.000000"), e.what)
	}
	t.Errorf("STALE: product %d through %s is %d, at least %d was known %.1f ms ago when it was asked for (%s)\n%s",
		it.id, from, version, floor, ms(time.Since(began)), began.Format("15:04:05.000000"), history.String())
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func newPromise(t *testing.T, seed uint64) *promise {
	p := &promise{dir: t.TempDir(), rnd: rand.New(rand.NewPCG(seed, 0))}
	p.client = &http.Client{Timeout: 8 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 2 * readers}}
	var flags []string
	if os.Getenv("RACE") != "" {
		flags = []string{"-race"}
	}
	program := binary(t, flags...)
	cfg := withDatabase(t, testConfig(t))
	p.psql = psql(t, cfg)
	p.redis, _ = startRedis(t, cfg)
	postgres := net.JoinHostPort(cfg.postgresHost, cfg.postgresPort)
	for i := range replicas {
		r := &replica{
			name: fmt.Sprintf("replica %d", i), port: freePort(t), binary: program, log: filepath.Join(p.dir, fmt.Sprintf("web%d.log", i)),
			redis: p.newRelay(t, "127.0.0.1:"+p.redis.port), postgres: p.newRelay(t, postgres),
		}
		r.env = append(os.Environ(), "LOG_LEVEL=warn", "PORT="+r.port, "POSTGRES_DB="+cfg.postgresDB, "POSTGRES_SSLMODE=disable",
			"POSTGRES_HOST=127.0.0.1", "POSTGRES_PORT="+r.postgres.port, "REDIS_HOST=127.0.0.1", "REDIS_PORT="+r.redis.port, "REDIS_PASSWORD=")
		p.replicas = append(p.replicas, r)
		r.start(t)
		t.Cleanup(r.kill)
	}
	t.Cleanup(func() {
		for _, r := range p.replicas {
			if log, err := os.ReadFile(r.log); t.Failed() && err == nil {
				t.Logf("the end of the log of %s:\n%s", r.name, log[max(0, len(log)-2000):])
			} else if bytes.Contains(log, []byte("DATA RACE")) || bytes.Contains(log, []byte("panic")) {
				t.Errorf("%s: %s", r.name, log)
			}
		}
	})
	p.await(t, "the schema", func() error {
		var there bool
		if err := p.psql.QueryRow("SELECT to_regclass('products') IS NOT NULL").Scan(&there); err != nil || !there {
			return fmt.Errorf("no table, %v", err)
		}
		return nil
	})
	// Statements that take a while, and now and then long, leave room between what the replicas do.
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
	p.createRows(t, 1)
	p.settle(t)
	return p
}

// createRows makes the items' rows anew.
func (p *promise) createRows(t *testing.T, stock int) {
	mustExec(t, p.psql, `INSERT INTO products (id, name, price, stock) SELECT id, 'thing', 1, $1 FROM generate_series(1, $2) id`, stock, len(p.items))
}

// random returns a number from 0 to n-1; all choices come from the one seed.
func (p *promise) random(n int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rnd.IntN(n)
}

func (p *promise) sleep(most time.Duration) { time.Sleep(time.Duration(p.random(int(most)))) }

// await tries until f succeeds.
func (p *promise) await(t *testing.T, what string, f func() error) {
	t.Helper()
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Since(began) > patience {
			t.Fatalf("%s: not within %v: %v", what, patience, err)
		}
	}
}

// A replica is one process of the service. It reaches PostgreSQL and Redis only through relays of its own.
type replica struct {
	name, port, binary, log string
	env                     []string
	redis, postgres         *relay
	cmd                     *exec.Cmd
}

func (r *replica) start(t *testing.T) {
	log, err := os.OpenFile(r.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	r.cmd = exec.Command(r.binary)
	r.cmd.Env, r.cmd.Stdout, r.cmd.Stderr = r.env, log, log
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

func (r *replica) kill() {
	_ = r.cmd.Process.Kill()
	_ = r.cmd.Wait()
}

// A relay stands between a replica and a server. It delays now and then what it carries, so that what is a matter of
// microseconds elsewhere happens often here, and can cut its connections or let them fall silent.
type relay struct {
	p            *promise
	port, target string
	closed       atomic.Bool // to new connections
	mu           sync.Mutex
	links        map[*link]bool
}

type link struct {
	client, server net.Conn
	silent         atomic.Bool
}

func (p *promise) newRelay(t *testing.T, target string) *relay {
	listener := listen(t)
	x := &relay{p: p, target: target, links: map[*link]bool{}}
	_, x.port, _ = net.SplitHostPort(listener.Addr().String())
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go x.serve(client)
		}
	}()
	return x
}

func (x *relay) serve(client net.Conn) {
	defer client.Close()
	if x.closed.Load() {
		return
	}
	server, err := net.Dial("tcp", x.target)
	if err != nil {
		return
	}
	defer server.Close()
	l := &link{client: client, server: server}
	x.mu.Lock()
	x.links[l] = true
	x.mu.Unlock()
	if x.closed.Load() { // since it was asked
		return
	}
	go func() {
		x.carry(l, client, server)
		if !l.silent.Load() {
			_ = client.Close()
		}
	}()
	x.carry(l, server, client) // until the client goes, or the other direction has closed it
	x.mu.Lock()
	delete(x.links, l)
	x.mu.Unlock()
}

func (x *relay) carry(l *link, to, from net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if x.p.random(25) == 0 {
			x.p.sleep(20 * time.Millisecond)
		}
		if l.silent.Load() {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// each does something to the connections there are.
func (x *relay) each(f func(*link)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for l := range x.links {
		f(l)
	}
}

func (x *relay) cut() {
	x.closed.Store(true)
	x.each(func(l *link) { _, _ = l.client.Close(), l.server.Close() })
}

func (x *relay) mend() { x.closed.Store(false) }

// phase runs readers and writers, and faults with as many reads between them, and then looks for what was written.
func (p *promise) phase(t *testing.T, name string, reads, faults int, fault func(*testing.T, int)) {
	t.Run(name, func(t *testing.T) {
		p.now = &figures{name: name}
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
					p.reading.RLock()
					p.read(t)
					p.reading.RUnlock()
					p.sleep(2 * time.Millisecond)
				}
			})
		}
		func() {
			defer group.Wait() // when the fault fails the test, too
			defer stop.Store(true)
			for k := range faults {
				p.wait(t, reads/(faults+1))
				fault(t, k)
				p.now.faults.Add(1)
			}
			p.wait(t, reads/(faults+1))
		}()
		p.settle(t)
		p.search(t)
		if n := p.now.errors.Load(); faults == 0 && n > 0 {
			t.Errorf("%d errors without a fault", n)
		}
		if slowest := time.Duration(p.now.slowest.Load()); slowest > 7*time.Second {
			t.Errorf("a request took %v", slowest)
		}
	})
}

// wait returns after some more reads.
func (p *promise) wait(t *testing.T, reads int) {
	target := p.now.reads.Load() + int64(reads)
	last, since := int64(-1), time.Now()
	for n := p.now.reads.Load(); n < target; n = p.now.reads.Load() {
		if n != last {
			last, since = n, time.Now()
		} else if time.Since(since) > patience {
			t.Fatalf("no read has succeeded for %v", patience)
		}
		time.Sleep(time.Millisecond)
	}
}

// do sends a request and returns its answer.
func (p *promise) do(r *replica, method, path, body string) (status int, answer []byte, source string, err error) {
	began := time.Now()
	req, err := http.NewRequestWithContext(context.Background(), method, "http://127.0.0.1:"+r.port+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := p.client.Do(req)
	if err == nil {
		defer resp.Body.Close()
		answer, err = io.ReadAll(resp.Body)
		status, source = resp.StatusCode, resp.Header.Get("Cache-Status")
	}
	if took := int64(time.Since(began)); p.now != nil {
		for old := p.now.slowest.Load(); took > old && !p.now.slowest.CompareAndSwap(old, took); old = p.now.slowest.Load() {
		}
	}
	return status, answer, source, err
}

func (p *promise) anyReplica() *replica { return p.replicas[p.random(len(p.replicas))] }

func (p *promise) write(it *item) {
	p.writing.RLock()
	defer p.writing.RUnlock()
	it.writing.Lock()
	defer it.writing.Unlock()
	r := p.anyReplica()
	version := it.begin(r.name, p.lateFrom.Load() == r)
	status, answer, _, err := p.do(r, "PUT", fmt.Sprintf("/products/%d", it.id), fmt.Sprintf(`{"stock":%d}`, version))
	if err == nil && status != 200 {
		err = fmt.Errorf("%d %s", status, bytes.TrimSpace(answer))
	}
	if err == nil {
		p.now.writes.Add(1)
	} else {
		p.now.errors.Add(1)
	}
	it.end(r.name, version, err)
}

func (p *promise) read(t *testing.T) {
	items, path := p.items, "/products"
	if p.random(5) > 0 {
		it := p.items[p.random(len(p.items))]
		items, path = []*item{it}, fmt.Sprintf("/products/%d", it.id)
	}
	p.readFrom(t, p.anyReplica(), items, path)
}

// readFrom reads one product or the list and judges what it says of the items.
func (p *promise) readFrom(t *testing.T, r *replica, items []*item, path string) {
	began := time.Now()
	floors := make([]int, len(items))
	for i, it := range items {
		floors[i] = it.floor(began)
	}
	status, answer, source, err := p.do(r, "GET", path, "")
	if err != nil || status != 200 && status != 404 {
		p.now.errors.Add(1)
		if err == nil && status != 503 {
			t.Errorf("GET %s: %d %s", path, status, answer)
		}
		return
	}
	p.now.reads.Add(1)
	if source == string(hit) {
		p.now.hits.Add(1)
	}
	type row struct {
		ID    int64
		Stock int
	}
	found := map[int64]int{}
	dec := json.NewDecoder(bytes.NewReader(answer))
	if path == "/products" {
		for token, err := dec.Token(); err == nil && token != json.Delim('['); token, err = dec.Token() {
		}
	}
	// The list is in the order of the ids, and the items have the lowest.
	for status == 200 && len(found) < len(items) && dec.More() {
		var x row
		if err := dec.Decode(&x); err != nil {
			t.Errorf("GET %s: %v", path, err)
			return
		}
		found[x.ID] = x.Stock
	}
	from := fmt.Sprintf("%s, GET %s (%s)", r.name, path, source)
	for i, it := range items {
		p.judge(t, it, found[it.id], floors[i], from, began)
	}
}

// settle waits until every replica says that all is well, and the cache is in use again.
func (p *promise) settle(t *testing.T) {
	t.Helper()
	for _, r := range p.replicas {
		p.await(t, r.name+" healthy", func() error {
			_, answer, _, err := p.do(r, "GET", "/health", "")
			if err != nil || !bytes.Contains(answer, []byte(`"healthy","database":"connected","cache":"connected"`)) {
				return fmt.Errorf("%s %v", answer, err)
			}
			return nil
		})
		p.awaitHit(t, r, "/products/1")
	}
}

func (p *promise) awaitHit(t *testing.T, r *replica, path string) {
	t.Helper()
	p.await(t, "a hit of "+path+" through "+r.name, func() error {
		status, _, source, err := p.do(r, "GET", path, "")
		if err != nil || status != 200 || source != string(hit) {
			return fmt.Errorf("%d %q %v", status, source, err)
		}
		return nil
	})
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
			p.now.lost.Add(1)
			t.Errorf("LOST: product %d in PostgreSQL is %d, %d was acknowledged, %v", it.id, stock, it.acked, err)
		}
	}
}

// warm fills every key. No writer may be at work.
func (p *promise) warm(t *testing.T) {
	for _, it := range p.items {
		p.awaitHit(t, p.replicas[0], fmt.Sprintf("/products/%d", it.id))
	}
	p.awaitHit(t, p.replicas[0], "/products")
}

// oldSnapshot kills Redis and brings it back as it was before the latest writes, while statements are under way whose
// writers announced themselves to the one that was killed. The connections of one replica, or of all, are not closed
// but fall silent, as when a host goes without a word. Of all: then only the run_id of a new connection tells.
func (p *promise) oldSnapshot(t *testing.T, k int) {
	silent := k%2 == 0
	p.writing.Lock()
	if silent { // nobody may wait for the silent ones yet, and they must be few
		p.reading.Lock()
		for _, r := range p.replicas {
			r.redis.cut()
			r.redis.mend()
		}
		p.settle(t)
	}
	p.warm(t)
	p.redis.do("SAVE")
	dump := filepath.Join(p.redis.dir, "dump.rdb")
	snapshot, err := os.ReadFile(dump)
	if err != nil {
		t.Error(err)
	}
	p.writing.Unlock()
	for target := p.now.writes.Load() + 20; p.now.writes.Load() < target; {
		time.Sleep(time.Millisecond)
	}
	// A lock of somebody else keeps statements under way until Redis is back, or longer.
	tx, err := p.psql.Begin()
	if err == nil {
		_, err = tx.Exec("SELECT FROM products WHERE id > 2 FOR UPDATE")
	}
	if err != nil {
		t.Error(err)
	}
	p.await(t, "three writers at the lock", func() error {
		var waiting int
		err := p.psql.QueryRow("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'").Scan(&waiting)
		if err == nil && waiting < 3 {
			err = fmt.Errorf("%d", waiting)
		}
		return err
	})
	time.AfterFunc(time.Duration(p.random(int(2*time.Second))), func() { _ = tx.Rollback() })
	for i, r := range p.replicas {
		if silent || i == k%len(p.replicas) {
			r.redis.each(func(l *link) { l.silent.Store(true) })
		}
	}
	p.redis.kill()
	if err := os.WriteFile(dump, snapshot, 0o600); err != nil {
		t.Error(err)
	}
	p.redis.start()
	if silent { // as many requests at a time as make new connections beside the silent ones
		var group sync.WaitGroup
		defer group.Wait()
		for i := range 10 * len(p.replicas) {
			group.Go(func() {
				_, _, _, _ = p.do(p.replicas[i%len(p.replicas)], "GET", fmt.Sprintf("/products/%d", 100+i), "")
			})
		}
		time.Sleep(30 * time.Millisecond)
		p.reading.Unlock()
	}
	p.settle(t)
}

// silence stops Redis for a second, or makes it unreachable for a moment, in both of which it forgets nothing.
func (p *promise) silence(t *testing.T, k int) {
	if k%2 == 0 {
		p.redis.signal(syscall.SIGSTOP)
		time.Sleep(time.Second)
		p.redis.signal(syscall.SIGCONT)
	} else {
		p.writing.Lock()
		p.warm(t)
		for _, r := range p.replicas {
			r.redis.cut()
		}
		p.writing.Unlock()
		p.wait(t, 500)
		for _, r := range p.replicas {
			r.redis.mend()
		}
	}
	p.settle(t)
}

// cutOff keeps one replica from Redis while the others reach it. What it writes may be late elsewhere.
func (p *promise) cutOff(t *testing.T, k int) {
	r := p.replicas[k%replicas]
	p.lateFrom.Store(r)
	r.redis.cut()
	p.wait(t, 500)
	r.redis.mend()
	p.settle(t)
	p.writing.Lock() // until its last write under the fault is over
	p.lateFrom.Store(nil)
	p.writing.Unlock()
}

// restartPostgres crashes PostgreSQL, or makes it unreachable for a moment in which others change rows: of those
// nobody tells the service.
func (p *promise) restartPostgres(t *testing.T, k int) {
	if k%2 == 1 {
		for _, r := range p.replicas {
			r.postgres.cut()
		}
		for range 10 {
			p.changeRow(t)
		}
		time.Sleep(3 * allowance)
		for _, r := range p.replicas {
			r.postgres.mend()
		}
		p.settle(t)
		return
	}
	log, err := os.Create(filepath.Join(p.dir, "postgres.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p.sleep(50 * time.Millisecond)
	restart := exec.Command("bash", "-c", `set -euo pipefail; source scripts/lib.sh
		stop_postgres "$TEST_DIR" immediate; start_postgres "$TEST_DIR" "$POSTGRES_PORT" -c fsync=off`)
	restart.Stdout, restart.Stderr = log, log // a file, since a pipe would be open as long as the server runs
	if err := restart.Run(); err != nil {
		out, _ := os.ReadFile(log.Name())
		t.Fatalf("restarting PostgreSQL: %v\n%s", err, out)
	}
	p.settle(t)
}

// changeRow changes a row as somebody with psql would.
func (p *promise) changeRow(t *testing.T) {
	it := p.items[p.random(len(p.items))]
	it.writing.Lock()
	defer it.writing.Unlock()
	version := it.begin("psql", true)
	_, err := p.psql.Exec("UPDATE products SET stock = $1 WHERE id = $2", version, it.id)
	it.end("psql", version, err)
	if err != nil {
		t.Error(err)
	}
}

func (p *promise) changeBehind(t *testing.T, k int) {
	for range 10 {
		p.changeRow(t)
		p.wait(t, 30)
	}
}

// changeEverything changes 10,000 rows in one statement, and then drops all there are and makes some anew.
func (p *promise) changeEverything(t *testing.T, k int) {
	change := func(f func(version int)) {
		version := 0
		for _, it := range p.items {
			version = max(version, it.next)
		}
		for _, it := range p.items {
			it.mu.Lock()
			it.next = version
			it.mu.Unlock()
			it.begin("psql", true)
		}
		f(version)
		for _, it := range p.items {
			it.end("psql", version, nil)
		}
	}
	mustExec(t, p.psql, "INSERT INTO products (id, name, price) SELECT id, 'filler', 1 FROM generate_series(1000001, 1010000) id")
	p.writing.Lock()
	change(func(version int) { mustExec(t, p.psql, "UPDATE products SET stock = $1", version) })
	p.writing.Unlock()
	p.wait(t, 200)
	p.writing.Lock()
	defer p.writing.Unlock()
	change(func(version int) {
		for _, it := range p.items {
			it.mu.Lock()
			it.gone = version
			it.mu.Unlock()
		}
		mustExec(t, p.psql, "TRUNCATE products")
	})
	p.wait(t, 200)
	time.Sleep(allowance)
	p.wait(t, 200)
	change(func(version int) { p.createRows(t, version) })
}

// clear empties the cache, again and again.
func (p *promise) clear(t *testing.T, k int) {
	for range 20 {
		if status, answer, _, err := p.do(p.anyReplica(), "DELETE", "/cache/clear", ""); status != 200 {
			t.Errorf("/cache/clear: %d %s %v", status, answer, err)
		}
		p.wait(t, 10)
	}
}

// kill ends a replica without a warning, wherever it is, and starts it again.
func (p *promise) kill(t *testing.T, k int) {
	r := p.anyReplica()
	p.sleep(20 * time.Millisecond)
	r.kill()
	p.wait(t, 100)
	r.start(t)
	p.settle(t)
}

// finish waits until every key is in use again, whoever died, and looks at all of them once more.
func (p *promise) finish(t *testing.T) {
	p.now = &figures{name: "end"}
	p.all = append(p.all, p.now)
	for _, r := range p.replicas {
		p.awaitHit(t, r, "/products")
		for _, it := range p.items {
			p.awaitHit(t, r, fmt.Sprintf("/products/%d", it.id))
		}
	}
	p.search(t)
}

// report logs the figures.
func (p *promise) report(t *testing.T) {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "phase\treads\thits\twrites\tfaults\terrors\tstale reads\tlost writes\tslowest\t")
	total := &figures{name: "total"}
	for _, f := range append(p.all, total) {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%v\t\n", f.name, f.reads.Load(), f.hits.Load(), f.writes.Load(), f.faults.Load(),
			f.errors.Load(), f.stale.Load(), f.lost.Load(), time.Duration(f.slowest.Load()).Round(time.Millisecond))
		total.reads.Add(f.reads.Load())
		total.hits.Add(f.hits.Load())
		total.writes.Add(f.writes.Load())
		total.faults.Add(f.faults.Load())
		total.errors.Add(f.errors.Load())
		total.stale.Add(f.stale.Load())
		total.lost.Add(f.lost.Load())
		total.slowest.Store(max(total.slowest.Load(), f.slowest.Load()))
	}
	_ = w.Flush()
	t.Log("what was found:\n" + text.String())
}
