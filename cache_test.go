package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// A bench is two replicas, a and b, at one PostgreSQL and one Redis of the test's own, and a product whose stock
// the tests read and change at points that they choose.
type bench struct {
	t     *testing.T
	cfg   config
	redis *redisServer
	a, b  *testServer
	id    int64
	keys  []string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	r, cfg := startRedis(t, withDatabase(t, testConfig(t)))
	be := &bench{t: t, cfg: cfg, redis: r, a: startServer(t, cfg), b: startServer(t, cfg)}
	be.id = be.a.create(`{"name":"a","price":1,"stock":0}`).ID
	be.keys = []string{keyAll, productKey(be.id)}
	return be
}

// load reads the stock from PostgreSQL as a body.
func (be *bench) load(ctx context.Context) ([]byte, error) {
	var stock int
	err := be.a.db.QueryRowContext(ctx, `SELECT stock FROM products WHERE id = $1`, be.id).Scan(&stock)
	return fmt.Appendf(nil, `{"stock":%d}`, stock), err
}

// read reads the stock through a replica, and fails the test unless it is as given.
func (be *bench) read(s *testServer, want int) source {
	be.t.Helper()
	body, from, err := s.cache.Get(be.t.Context(), productKey(be.id), be.load)
	if text := fmt.Sprintf(`{"stock":%d}`, want); err != nil || string(body) != text {
		be.t.Errorf("read %s (%s, %v), want %s", body, from, err, text)
	}
	return from
}

// commit is a change that sets the stock.
func (be *bench) commit(stock int) func(context.Context, *sql.Conn) error {
	return func(ctx context.Context, conn *sql.Conn) error {
		_, err := conn.ExecContext(ctx, `UPDATE products SET stock = $2 WHERE id = $1`, be.id, stock)
		return err
	}
}

func (be *bench) write(s *testServer, stock int) {
	be.t.Helper()
	if err := s.cache.Write(be.t.Context(), be.keys, be.commit(stock)); err != nil {
		be.t.Error(err)
	}
}

// A hold stops somebody at a chosen point until the test releases him.
type hold struct{ reached, released chan struct{} }

func newHold() *hold { return &hold{make(chan struct{}), make(chan struct{})} }

func (h *hold) here() { close(h.reached); <-h.released }

// heldWrite begins a write that stops before and after its statement, and returns what ends it.
func (be *bench) heldWrite(s *testServer, stock int) (before, after *hold, wait func()) {
	before, after = newHold(), newHold()
	done := make(chan error, 1)
	go func() {
		done <- s.cache.Write(context.Background(), be.keys, func(ctx context.Context, conn *sql.Conn) error {
			before.here()
			err := be.commit(stock)(ctx, conn)
			after.here()
			return err
		})
	}()
	<-before.reached
	return before, after, func() {
		be.t.Helper()
		if err := <-done; err != nil {
			be.t.Error(err)
		}
	}
}

// heldRead begins a read that stops between its query and its fill.
func (be *bench) heldRead(s *testServer) (between *hold, wait func() string) {
	between = newHold()
	done := make(chan string, 1)
	go func() {
		body, from, err := s.cache.Get(context.Background(), productKey(be.id), func(ctx context.Context) ([]byte, error) {
			body, err := be.load(ctx)
			between.here()
			return body, err
		})
		done <- fmt.Sprint(string(body), from, err)
	}()
	select {
	case <-between.reached:
	case got := <-done:
		be.t.Fatalf("a read that should query PostgreSQL got %s", got)
	}
	return between, func() string { return <-done }
}

// A reader that read the old row fills only after the writer has come and gone.
func TestFillAfterCommit(t *testing.T) {
	be := newBench(t)
	between, wait := be.heldRead(be.a)
	be.write(be.b, 1)
	close(between.released)
	wait()
	be.read(be.a, 1)
	be.read(be.b, 1)
}

// A reader with a lease of its own reads the old row while a writer is at work, and fills after the commit: before the
// writer's clean-up, and after it.
func TestFillWhileWriting(t *testing.T) {
	for _, afterCleanUp := range []bool{false, true} {
		t.Run(fmt.Sprint(afterCleanUp), func(t *testing.T) {
			be := newBench(t)
			before, after, waitWrite := be.heldWrite(be.b, 1)
			between, wait := be.heldRead(be.a)
			close(before.released)
			<-after.reached
			if afterCleanUp {
				close(after.released)
				waitWrite()
			}
			close(between.released)
			wait()
			be.read(be.a, 1)
			if !afterCleanUp {
				close(after.released)
				waitWrite()
			}
			be.read(be.a, 1)
		})
	}
}

// Two writers overlap, in both orders; the one that ends first must not open the key for fills.
func TestOverlappingWriters(t *testing.T) {
	for _, firstBegunEndsFirst := range []bool{true, false} {
		t.Run(fmt.Sprint(firstBegunEndsFirst), func(t *testing.T) {
			be := newBench(t)
			before1, after1, wait1 := be.heldWrite(be.a, 1)
			before2, after2, wait2 := be.heldWrite(be.b, 1)
			if !firstBegunEndsFirst {
				before1, after1, wait1, before2, after2, wait2 = before2, after2, wait2, before1, after1, wait1
			}
			close(before1.released)
			close(after1.released)
			wait1()
			if from := be.read(be.a, 1); from != miss {
				t.Errorf("a read is a %s while a writer is at work", from)
			}
			mustExec(t, be.a.db, `UPDATE products SET stock = 0 WHERE id = $1`, be.id)
			be.read(be.b, 0) // must not be filled either: the other writer sets it to 1
			close(before2.released)
			<-after2.reached
			be.read(be.a, 1)
			be.read(be.b, 1)
			close(after2.released)
			wait2()
			be.read(be.a, 1)
			if from := be.read(be.b, 1); from != hit {
				t.Errorf("the cache is not in use after the writers: %s", from)
			}
		})
	}
}

// The old body was cached; between the commit and the writer's clean-up, whoever has seen the new row must not be
// followed by anybody who still hits the old one.
func TestNeverBackInTime(t *testing.T) {
	be := newBench(t)
	be.read(be.a, 0)
	if from := be.read(be.b, 0); from != hit {
		t.Fatalf("nothing was cached: %s", from)
	}
	before, after, wait := be.heldWrite(be.b, 1)
	close(before.released)
	<-after.reached
	be.read(be.a, 1)
	be.read(be.b, 1)
	close(after.released)
	wait()
}

// A replica that has just started, and does not know Redis yet, announces its first write like any other.
func TestFirstWrite(t *testing.T) {
	be := newBench(t)
	db, dsn, err := openDatabase(be.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	starting := newCache(be.cfg, db, dsn)
	defer starting.listener.Close()
	if err := starting.Write(t.Context(), be.keys, func(ctx context.Context, conn *sql.Conn) error {
		if n := be.redis.do("EXISTS", marks(keyAll), marks(productKey(be.id))); n != int64(2) {
			t.Errorf("%v marks", n)
		}
		return be.commit(1)(ctx, conn)
	}); err != nil {
		t.Fatal(err)
	}
	be.read(be.a, 1)
}

// A writer dies after its commit: it leaves empty keys and a mark that expires, never a stale body.
func TestWriterDies(t *testing.T) {
	be := newBench(t)
	be.read(be.a, 0)
	w := &write{token: "dead", keys: be.keys}
	if !be.b.cache.send(announceScript, w) {
		t.Fatal("not announced")
	}
	between, wait := be.heldRead(be.a) // reads the old row
	mustExec(t, be.b.db, `UPDATE products SET stock = 1 WHERE id = $1`, be.id)
	close(between.released)
	wait()
	be.read(be.a, 1)
	if from := be.read(be.b, 1); from != miss {
		t.Errorf("filled under a dead writer's mark: %s", from)
	}
	// The mark lasts markLife from when Redis took it, on Redis's own clock.
	key := marks(productKey(be.id))
	now, _ := redis.Int64s(be.redis.do("TIME"), nil)
	expires, err := redis.Int64(be.redis.do("ZSCORE", key, "dead"), nil)
	if left := expires - now[0]; err != nil || left < int64(markLife.Seconds())-5 || left > int64(markLife.Seconds()) {
		t.Errorf("the mark lasts for %d s more, %v", left, err)
	}
	be.redis.do("ZADD", key, now[0]-1, "dead")
	be.read(be.a, 1)
	if from := be.read(be.b, 1); from != hit {
		t.Errorf("an expired mark still keeps the key empty: %s", from)
	}
}

// The connection breaks under a writer: nobody knows whether its change will be committed, and later it is.
func TestOutcomeUnknown(t *testing.T) {
	be := newBench(t)
	lost := errors.New("the connection broke")
	err := be.a.cache.Write(t.Context(), be.keys, func(context.Context, *sql.Conn) error { return lost })
	if !errors.Is(err, lost) {
		t.Errorf("the writer got %v", err)
	}
	be.read(be.a, 0)
	if from := be.read(be.b, 0); from != miss {
		t.Errorf("filled although the change may yet be committed: %s", from)
	}
	mustExec(t, be.b.db, `UPDATE products SET stock = 1 WHERE id = $1`, be.id)
	be.read(be.b, 1)
}

// What PostgreSQL refused is known not to have happened: the cache is in use again at once.
func TestRefusedWrite(t *testing.T) {
	be := newBench(t)
	err := be.a.cache.Write(t.Context(), be.keys, be.commit(-1)) // the table's CHECK refuses it
	if err == nil || unavailable(err) || outcomeUnknown(err) {
		t.Errorf("the writer got %v", err)
	}
	be.read(be.a, 0)
	if from := be.read(be.b, 0); from != hit {
		t.Errorf("not cached after a refused write: %s", from)
	}
}

// A request that comes after a write must not join a lookup that has read the row before it.
func TestJoinOnlyLaterLookups(t *testing.T) {
	be := newBench(t)
	between, wait := be.heldRead(be.a)
	be.write(be.b, 1)
	var readers sync.WaitGroup
	for range 10 {
		readers.Go(func() { be.read(be.a, 1) })
	}
	eventually(t, "a lookup waits", func() bool {
		be.a.cache.mu.Lock()
		defer be.a.cache.mu.Unlock()
		running := be.a.cache.lookups[productKey(be.id)]
		return running != nil && running.next != nil
	})
	close(between.released)
	if got := wait(); got != `{"stock":0}redis; fwd=miss<nil>` {
		t.Errorf("the first reader got %s", got)
	}
	readers.Wait()
}

// An arrival is a context that counts the requests which have joined a lookup: Get asks it for its end only then.
type arrival struct {
	context.Context
	joined *atomic.Int64
}

func (a arrival) Done() <-chan struct{} {
	a.joined.Add(1)
	return a.Context.Done()
}

// A thousand requests for a cold key cost two lookups at most, and so do a thousand that cannot use the cache.
func TestHerd(t *testing.T) {
	be := newBench(t)
	herd := func(from source) {
		t.Helper()
		var queries, joined atomic.Int64
		release := make(chan struct{})
		var readers sync.WaitGroup
		for range 1000 {
			readers.Go(func() {
				_, got, err := be.a.cache.Get(arrival{t.Context(), &joined}, productKey(be.id), func(ctx context.Context) ([]byte, error) {
					queries.Add(1)
					<-release
					return be.load(ctx)
				})
				if err != nil || got != from && got != hit {
					t.Errorf("got %s, %v; want %s", got, err, from)
				}
			})
		}
		eventually(t, "all have joined a lookup", func() bool { return joined.Load() == 1000 })
		close(release)
		readers.Wait()
		if n := queries.Load(); n < 1 || n > 2 {
			t.Errorf("%d queries", n)
		}
	}
	herd(miss)
	be.redis.kill()
	eventually(t, "the cache is not trusted", func() bool { return !be.a.cache.trusted() })
	herd(bypass)
}

// A lookup belongs to nobody: the request that began it may give up, and the others still get their answer.
func TestLookupOutlivesRequest(t *testing.T) {
	be := newBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	between := newHold()
	gaveUp := make(chan error, 1)
	go func() {
		_, _, err := be.a.cache.Get(ctx, productKey(be.id), func(ctx context.Context) ([]byte, error) {
			between.here()
			return be.load(ctx)
		})
		gaveUp <- err
	}()
	<-between.reached
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Errorf("the request that gave up got %v", err)
	}
	close(between.released)
	be.read(be.a, 0)
	eventually(t, "the lookup has filled the key", func() bool { return be.read(be.b, 0) == hit })
}

// Redis comes back with a snapshot from before a write. Whoever has a connection notices that it breaks; whoever has
// to make a new one notices that another Redis answers.
func TestOldSnapshot(t *testing.T) {
	for _, unnoticed := range []bool{false, true} {
		t.Run(fmt.Sprint(unnoticed), func(t *testing.T) {
			be := newBench(t)
			be.read(be.a, 0)
			be.redis.do("SAVE")
			snapshot, err := os.ReadFile(filepath.Join(be.redis.dir, "dump.rdb"))
			if err != nil {
				t.Fatal(err)
			}
			be.write(be.b, 1)
			be.read(be.a, 1)
			for _, s := range []*testServer{be.a, be.b} {
				for unnoticed && s.cache.pool.IdleCount() > 0 {
					conn := s.cache.pool.Get()
					defer conn.Close()
				}
			}
			be.redis.kill()
			if err := os.WriteFile(filepath.Join(be.redis.dir, "dump.rdb"), snapshot, 0o600); err != nil {
				t.Fatal(err)
			}
			be.redis.start()
			if held, _ := redis.String(be.redis.do("GET", productKey(be.id)), nil); held != `{"stock":0}` {
				t.Fatalf("the snapshot holds %q", held)
			}
			back := time.Now()
			be.read(be.a, 1)
			be.read(be.b, 1)
			eventually(t, "the cache is in use again", func() bool { return be.read(be.a, 1) == hit && be.read(be.b, 1) == hit })
			if took := time.Since(back); took > 2*time.Second {
				t.Errorf("the cache was in use again only after %v", took)
			}
		})
	}
}

// Redis is restarted under a writer, whose mark is lost with it; another replica must not fill what it then changes.
func TestRestartUnderWriter(t *testing.T) {
	be := newBench(t)
	before, after, wait := be.heldWrite(be.a, 1)
	be.redis.kill()
	be.redis.start()
	eventually(t, "the other replica trusts the new Redis", func() bool { be.read(be.b, 0); return be.b.cache.trusted() })
	be.read(be.b, 0)
	close(before.released)
	<-after.reached
	be.read(be.b, 1)
	be.read(be.a, 1)
	close(after.released)
	wait()
	eventually(t, "the cache is in use again", func() bool { be.read(be.a, 1); return be.read(be.b, 1) == hit })
}

// One replica cannot reach Redis and writes; the other can, and holds the old body.
func TestWriteWithoutRedis(t *testing.T) {
	be := newBench(t)
	be.read(be.b, 0)
	away := be.cfg
	away.redisPort = "1"
	c := startReplica(t, away)
	for stock := 1; stock <= 20; stock++ {
		be.write(c, stock)
		// The notification was sent before the write returned; what is left is its way to the other replica.
		eventually(t, "the other replica has heard of it", func() bool {
			body, _, err := be.b.cache.Get(t.Context(), productKey(be.id), be.load)
			return err == nil && string(body) == fmt.Sprintf(`{"stock":%d}`, stock)
		})
		be.read(be.b, stock)
	}
	if from := be.read(c, 20); from != bypass {
		t.Errorf("a replica without Redis says %s", from)
	}
}

// Redis falls silent under a writer and later does what it was told meanwhile; the marks that nobody then took
// away must not keep the cache empty.
func TestSilentRedisUnderWriter(t *testing.T) {
	be := newBench(t)
	be.read(be.a, 0)
	be.redis.signal(syscall.SIGSTOP)
	be.write(be.a, 1)
	be.read(be.a, 1)
	be.redis.signal(syscall.SIGCONT)
	back := time.Now()
	eventually(t, "the cache is in use again", func() bool { return be.read(be.a, 1) == hit })
	if took := time.Since(back); took > 2*time.Second {
		t.Errorf("the cache was in use again only after %v", took)
	}
	be.read(be.b, 1)
}

// Another session changes a row: by a statement, by many rows at once, by TRUNCATE.
func TestOtherSessions(t *testing.T) {
	be := newBench(t)
	db := psql(t, be.cfg)
	read := func(s *testServer) string {
		body, _, err := s.cache.Get(t.Context(), productKey(be.id), be.load)
		return fmt.Sprint(string(body), err)
	}
	for i, change := range []string{
		`UPDATE products SET stock = 1`,
		`INSERT INTO products (name, price) SELECT 'p' || n, n FROM generate_series(1, 10000) n; UPDATE products SET stock = 2`,
		`TRUNCATE products; INSERT INTO products (id, name, price, stock) VALUES (` + fmt.Sprint(be.id) + `, 'a', 1, 3)`,
		`DELETE FROM products; INSERT INTO products (id, name, price, stock) VALUES (` + fmt.Sprint(be.id) + `, 'a', 1, 4)`,
	} {
		eventually(t, "the old body is cached", func() bool {
			return be.read(be.a, i) == hit && be.read(be.b, i) == hit
		})
		mustExec(t, db, change)
		want := fmt.Sprintf(`{"stock":%d}<nil>`, i+1)
		for _, s := range []*testServer{be.a, be.b} {
			eventually(t, "the change is seen: "+change, func() bool { return read(s) == want })
		}
	}
}

// Another session changes a row while no replica can hear of it.
func TestChangeWhileListenerIsCut(t *testing.T) {
	be := newBench(t)
	be.read(be.a, 0)
	db := psql(t, be.cfg)
	mustExec(t, db, `UPDATE pg_database SET datallowconn = false WHERE datname = current_database()`) // nobody reconnects
	mustExec(t, db, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND query IN ('', 'LISTEN "products"')`)
	eventually(t, "trust has ended", func() bool { return !be.a.cache.trusted() && !be.b.cache.trusted() })
	mustExec(t, db, `UPDATE products SET stock = 1 WHERE id = $1`, be.id)
	mustExec(t, db, `UPDATE pg_database SET datallowconn = true WHERE datname = current_database()`)
	for _, s := range []*testServer{be.a, be.b} {
		eventually(t, "the cache is in use again", func() bool {
			body, from, err := s.cache.Get(t.Context(), productKey(be.id), be.load)
			if err == nil && string(body) != `{"stock":1}` {
				t.Errorf("read %s (%s)", body, from)
			}
			return from == hit
		})
	}
}

// The listener's connection breaks and is back before anybody asks, but a notification was lost in between.
func TestChangeWhileListenerReconnects(t *testing.T) {
	be := newBench(t)
	db := psql(t, be.cfg)
	for stock := 1; stock <= 5; stock++ {
		eventually(t, "the old body is cached", func() bool { return be.read(be.a, stock-1) == hit && be.read(be.b, stock-1) == hit })
		mustExec(t, db, fmt.Sprintf(`
			SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND query IN ('', 'LISTEN "products"');
			UPDATE products SET stock = %d`, stock))
		for _, s := range []*testServer{be.a, be.b} {
			eventually(t, "the change is seen", func() bool {
				body, _, err := s.cache.Get(t.Context(), productKey(be.id), be.load)
				return err == nil && string(body) == fmt.Sprintf(`{"stock":%d}`, stock)
			})
		}
	}
}
