package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// A bench is two replicas, a and b, at one PostgreSQL and, behind a proxy, one Redis of the test's own, and a product
// whose stock the tests read and change at points that they choose.
type bench struct {
	t     *testing.T
	cfg   config
	redis *redisServer
	proxy *proxy
	a, b  *testServer
}

// stockKey is where the stock is cached, of what is the first product of its database. A writer names stockKeys.
const stockKey = "products:1"

var stockKeys = []string{keyAll, stockKey}

func newBench(t *testing.T) *bench {
	r, cfg := alone(t)
	proxy := startProxy(t, &cfg.redisPort, nil)
	be := &bench{t: t, cfg: cfg, redis: r, proxy: proxy, a: startServer(t, cfg), b: startServer(t, cfg)}
	equal(t, "the product", be.a.create(`{"name":"a","price":1,"stock":0}`), "/products/1")
	return be
}

// load reads the stock from PostgreSQL as a body.
func (be *bench) load(ctx context.Context) ([]byte, error) {
	var stock int
	err := be.a.db.QueryRowContext(ctx, `SELECT stock FROM products WHERE id = 1`).Scan(&stock)
	return body(stock), err
}

func body(stock int) []byte { return fmt.Appendf(nil, `{"stock":%d}`, stock) }

// readWith reads the stock through a replica that calls load on a miss. It fails the test unless the stock is as wanted
// and, if sources are named, comes from one of them.
func (be *bench) readWith(s *testServer, load func(context.Context) ([]byte, error), want int, sources ...source) (
	got []byte, from source) {
	be.t.Helper()
	got, from, err := s.cache.Get(be.t.Context(), stockKey, load)
	ok := err == nil && bytes.Equal(got, body(want)) && (len(sources) == 0 || slices.Contains(sources, from))
	expect(be.t, ok, "read %s (%s, %v), want %s %q", got, from, err, body(want), sources)
	return got, from
}

func (be *bench) read(s *testServer, want int, sources ...source) ([]byte, source) {
	be.t.Helper()
	return be.readWith(s, be.load, want, sources...)
}

// awaitHit reads the stock through a replica until it comes from the cache. It must be as wanted all the time.
func (be *bench) awaitHit(s *testServer, want int) (took time.Duration) {
	be.t.Helper()
	return eventually(be.t, "the cache is in use", func() bool {
		_, from := be.read(s, want)
		return from == hit || be.t.Failed()
	})
}

// awaitSeen waits until both replicas return a stock that another session has set.
func (be *bench) awaitSeen(stock int) {
	for _, s := range []*testServer{be.a, be.b} {
		eventually(be.t, fmt.Sprintf("the stock is %d", stock), func() bool {
			got, _, err := s.cache.Get(be.t.Context(), stockKey, be.load)
			return err == nil && bytes.Equal(got, body(stock))
		})
	}
}

// A change is what Write runs.
type change = func(context.Context, *sql.Conn) error

// setStock returns a change that sets the stock.
func setStock(stock int) change {
	return func(ctx context.Context, conn *sql.Conn) error {
		return classify(conn.QueryRowContext(ctx, stockSQL, stock).Scan(new(int64)))
	}
}

const stockSQL = `UPDATE products SET stock = $1 WHERE id = 1 RETURNING id`

// tryWrite makes a change through a replica.
func (be *bench) tryWrite(s *testServer, c change) error {
	return s.cache.Write(be.t.Context(), stockKeys, c)
}

// write makes a change that must succeed.
func (be *bench) write(s *testServer, c change) {
	be.t.Helper()
	equal(be.t, "the writer's error", be.tryWrite(s, c), nil)
}

// A hold stops a goroutine at a chosen point until the test releases it.
type hold chan struct{}

func (h hold) here() {
	h <- struct{}{}
	<-h
}

// await returns when the goroutine is there.
func (h hold) await(t *testing.T) {
	select {
	case <-h:
	case <-time.After(15 * time.Second):
		t.Fatal("a read or a write did not come to its statement")
	}
}

func (h hold) release() { h <- struct{}{} }

// heldWrite begins a write that stops before and after its statement. What it returns lets it commit and, then, end.
func (be *bench) heldWrite(s *testServer, stock int) (commit, end func()) {
	statement := make(hold)
	wait := concurrently(1, func(int) {
		be.write(s, func(ctx context.Context, conn *sql.Conn) error {
			statement.here()
			defer statement.here()
			return setStock(stock)(ctx, conn)
		})
	})
	statement.await(be.t)
	commit = func() {
		statement.release()
		statement.await(be.t)
	}
	end = func() {
		statement.release()
		wait()
	}
	return commit, end
}

// heldRead begins a read that stops between its query and its fill. What it returns lets it go on. The read must be a
// miss with the stock given.
func (be *bench) heldRead(s *testServer, stock int) (fill func() []byte) {
	query := make(hold)
	var got []byte
	wait := concurrently(1, func(int) {
		got, _ = be.readWith(s, func(ctx context.Context) ([]byte, error) {
			defer query.here()
			return be.load(ctx)
		}, stock, miss)
	})
	query.await(be.t)
	return func() []byte {
		query.release()
		wait()
		return got
	}
}

// A reader that read the old row fills only after the writer has come and gone.
func TestFillAfterCommit(t *testing.T) {
	be := newBench(t)
	fill := be.heldRead(be.a, 0)
	be.write(be.b, setStock(1))
	fill()
	be.read(be.a, 1)
	be.read(be.b, 1)
}

// A reader with a lease of its own reads the old row while a writer is at work, and fills after the commit: before the
// writer's clean-up, and after it.
func TestFillWhileWriting(t *testing.T) {
	twice(t, "after clean-up", func(t *testing.T, afterCleanUp bool) {
		be := newBench(t)
		commit, end := be.heldWrite(be.b, 1)
		fill := be.heldRead(be.a, 0)
		commit()
		if afterCleanUp {
			end()
		}
		fill()
		be.read(be.a, 1)
		if !afterCleanUp {
			end()
		}
		be.read(be.a, 1)
	})
}

// Two writers overlap, in both orders; the one that ends first must not open the key for fills.
func TestOverlappingWriters(t *testing.T) {
	twice(t, "last in, first out", func(t *testing.T, lastInFirstOut bool) {
		be := newBench(t)
		commit1, end1 := be.heldWrite(be.a, 1)
		commit2, end2 := be.heldWrite(be.b, 1)
		if lastInFirstOut {
			commit1, end1, commit2, end2 = commit2, end2, commit1, end1
		}
		commit1()
		end1()
		be.read(be.a, 1, miss)
		must(be.a.db.Exec(`UPDATE products SET stock = 0 WHERE id = 1`))
		be.read(be.a, 0) // must not be filled either: the other writer sets it to 1
		be.read(be.a, 0)
		commit2()
		be.read(be.a, 1)
		be.read(be.b, 1)
		end2()
		be.awaitHit(be.a, 1)
	})
}

// The old body was cached; between the commit and the writer's clean-up, a client that has seen the new row must not be
// followed by anybody who still hits the old one.
func TestNeverBackInTime(t *testing.T) {
	be := newBench(t)
	be.awaitHit(be.a, 0)
	commit, end := be.heldWrite(be.b, 1)
	commit()
	be.read(be.a, 1)
	be.read(be.b, 1)
	end()
}

// A replica that does not trust its cache announces its writes like any other: it may have lost no more than its
// listener, or have just started, as the one here, which has not even connected to Redis before its first write.
func TestWriteWithoutTrust(t *testing.T) {
	be := newBench(t)
	starting := &testServer{server: newServer(be.cfg)}
	defer starting.db.Close()
	for stock := 1; stock <= 2; stock++ {
		be.awaitHit(be.a, stock-1)
		be.write(starting, func(ctx context.Context, conn *sql.Conn) error {
			equal(t, "the number of marks", be.redis.do("EXISTS", writersKey(keyAll), writersKey(stockKey)), any(int64(2)))
			equal(t, "trust", starting.cache.Trusted(), false)
			return setStock(stock)(ctx, conn)
		})
		be.read(be.a, stock)
	}
}

// A writer dies after its commit: it leaves empty keys and a mark that expires, never a stale body.
func TestWriterDies(t *testing.T) {
	be := newBench(t)
	be.awaitHit(be.a, 0)
	check(be.b.cache.runWriterScript(announceScript, stockKeys, "dead"))
	fill := be.heldRead(be.a, 0) // reads the old row
	must(be.b.db.Exec(`UPDATE products SET stock = 1 WHERE id = 1`))
	fill()
	be.read(be.a, 1)
	be.read(be.a, 1, miss) // nothing is filled under a dead writer's mark
	// The mark lasts markLife from when Redis took it, on Redis's own clock.
	now := must(redis.Int64s(be.redis.try("TIME")))[0]
	left := must(redis.Int64(be.redis.try("ZSCORE", writersKey(stockKey), "dead"))) - now
	life := int64(markLife.Seconds())
	expect(t, left >= life-5 && left <= life, "the mark lasts for %d s more", left)
	be.redis.do("ZADD", writersKey(stockKey), now-1, "dead")
	be.read(be.a, 1)
	be.read(be.a, 1, hit)
}

// What PostgreSQL refused is known not to have happened: the cache is in use again at once. When the connection breaks
// under a writer, its change may yet be committed, and here it is.
func TestFailedWrites(t *testing.T) {
	be := newBench(t)
	err := be.tryWrite(be.a, setStock(-1)) // the table's CHECK refuses it
	expect(t, errors.Is(err, errUnchanged) && !unavailable(err), "the writer got %v", err)
	be.read(be.a, 0)
	be.read(be.a, 0, hit)
	lost := errors.New("the connection broke")
	err = be.tryWrite(be.a, func(context.Context, *sql.Conn) error { return lost })
	expect(t, errors.Is(err, lost) && errors.Is(err, errOutcomeUnknown), "the writer got %v", err)
	be.read(be.a, 0)
	be.read(be.a, 0, miss)
	must(be.b.db.Exec(`UPDATE products SET stock = 1 WHERE id = 1`))
	be.read(be.a, 1)
}

// A process is paused after its announcement for longer than its statement may wait: it announces itself again.
func TestPausedWriter(t *testing.T) {
	_, cfg := alone(t)
	var p *process
	var announcements atomic.Int64
	startProxy(t, &cfg.redisPort, func(chunk []byte) {
		if bytes.Contains(chunk, []byte("ZADD")) && announcements.Add(1) == 2 {
			p.signal(syscall.SIGSTOP)
			for state := ""; !strings.Contains(state, "T"); { // its threads do not all stop at once
				state = string(must(exec.Command("ps", "-o", "stat=", "-p", strconv.Itoa(p.Process.Pid)).Output()))
			}
			time.AfterFunc(sendTimeout+100*time.Millisecond, func() { p.signal(syscall.SIGCONT) })
		}
	})
	p = startProcess(t, os.Args[0], cfg)
	p.awaitHit("/products")
	path := p.create(`{"name":"a","price":1}`)
	p.want(200, "PUT", path, `{"stock":1}`)
	equal(t, "announcements of two changes", announcements.Load(), 3)
}

// A request that comes after a write must not join a lookup that has read the row before it.
func TestJoinOnlyLaterLookups(t *testing.T) {
	be := newBench(t)
	finish := be.heldRead(be.a, 0)
	be.write(be.b, setStock(1))
	wait := concurrently(10, func(int) { be.read(be.a, 1) })
	be.awaitWaiting()
	finish()
	wait()
}

// awaitWaiting waits until a lookup waits behind one that runs in replica a.
func (be *bench) awaitWaiting() {
	eventually(be.t, "a lookup waits", func() bool {
		lookups := &be.a.cache.lookups
		lookups.mu.Lock()
		defer lookups.mu.Unlock()
		last := lookups.newest[stockKey]
		return last != nil && !last.started
	})
}

// A lookup belongs to nobody: the request that began it may give up, and the others still get their answer.
func TestLookupOutlivesRequest(t *testing.T) {
	be := newBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	gaveUp := make(chan bool)
	_, _, err := be.a.cache.Get(ctx, stockKey, func(ctx context.Context) ([]byte, error) {
		cancel()
		<-gaveUp
		return be.load(ctx)
	})
	equal(t, "the error of the request that gave up", err, context.Canceled)
	close(gaveUp)
	be.read(be.a, 0, hit) // the lookup has filled the key
}

// A miss is answered before the key is filled, so that a Redis which is unresponsive just then delays nobody. The next
// lookup of the key begins after the fill. It finds the same bytes, and returns the copy of the first.
func TestAnsweredBeforeFill(t *testing.T) {
	be := newBench(t)
	answer := be.heldRead(be.a, 0)
	be.proxy.pause(true)
	began := time.Now()
	first := answer()
	within(t, time.Since(began), redisTimeout/2, "a miss that need not wait for its fill")
	var second []byte
	wait := concurrently(1, func(int) { second, _ = be.read(be.a, 0, hit) })
	be.awaitWaiting()
	be.proxy.pause(false)
	wait()
	equal(t, "the second body", &second[0], &first[0])
}

// A panic in the goroutine of a lookup is a 500 and does not end the process.
func TestPanicInLookup(t *testing.T) {
	s := startAlone(t)
	db := s.db
	s.db = nil
	s.want(500, "GET", "/products", "")
	s.db = db
	s.wantSource(miss, "/products")
}

// Redis comes back with a snapshot from before a write. Replica b notices that its connections break. Replica a has
// none at that time, and notices that another Redis answers.
func TestOldSnapshot(t *testing.T) {
	be := newBench(t)
	be.awaitHit(be.a, 0)
	be.redis.do("SAVE")
	be.write(be.b, setStock(1))
	be.awaitHit(be.a, 1) // no fill is under way any more, which would connect again
	be.a.stopCache()
	for pool := be.a.cache.redis.pool; pool.ActiveCount() > 0; {
		conn := pool.Get()
		_, _ = conn.Do("QUIT") // the second one finds the connection closed: the pool drops it
		_ = conn.Close()
	}
	be.redis.restart()
	equal(t, "the body in the snapshot", must(redis.String(be.redis.try("GET", stockKey))), string(body(0)))
	equal(t, "whether replica a trusts its cache still", be.a.cache.Trusted(), true)
	be.read(be.a, 1)
	be.read(be.b, 1)
	within(t, be.awaitHit(be.b, 1), settleTime+2*time.Second, "the return of the cache")
	be.read(be.a, 1)
}

// Redis is restarted under a writer, or another takes its place, and the writer's mark is lost with it. No replica uses
// the new one while the writer may still commit, and a replica that has just started does not either. Meanwhile all
// read from PostgreSQL.
func TestNewRedisSettles(t *testing.T) {
	twice(t, "restarted", func(t *testing.T, restarted bool) {
		be := newBench(t)
		others := []*testServer{be.b}
		commit, end := be.heldWrite(be.a, 1)
		began := time.Now()
		if restarted {
			be.redis.restart()
			others = append(others, startReplica(t, be.cfg))
		} else {
			r, _ := startRedis(t, be.cfg)
			be.proxy.lead("127.0.0.1:" + r.port)
		}
		for time.Since(began) < sendTimeout+statementTimeout-time.Second { // nearly as late as a writer may commit
			for _, s := range others {
				be.read(s, 0, miss, bypass)
			}
		}
		commit()
		for _, s := range append(others, be.a) {
			be.read(s, 1)
		}
		end()
		for _, s := range others {
			be.awaitHit(s, 1)
		}
		took := time.Since(began)
		expect(t, took >= settleTime && took <= settleTime+2*time.Second, "the cache was in use again after %v", took)
	})
}

// One replica cannot reach Redis and writes; the other can, and holds the old body.
func TestWriteWithoutRedis(t *testing.T) {
	be := newBench(t)
	be.read(be.b, 0)
	unreachable := be.cfg
	unreachable.redisPort = "1"
	c := startReplica(t, unreachable)
	for stock := 1; stock <= 20; stock++ {
		be.write(c, setStock(stock))
		// The notification was sent before the write returned; what is left is its way to the other replica.
		be.awaitSeen(stock)
		be.read(be.b, stock)
	}
	be.read(c, 20, bypass)
}

// Redis is out of reach for a while in which others write, and forgets nothing.
func TestUnreachableRedisUnderWriter(t *testing.T) {
	be := newBench(t)
	be.awaitHit(be.a, 0)
	be.proxy.lead("")
	be.write(be.b, setStock(1))
	be.awaitSeen(1)
	be.proxy.lead(be.proxy.target)
	be.awaitHit(be.a, 1)
	be.awaitHit(be.b, 1)
}

// Redis stops answering under a writer, and later executes the commands that it received meanwhile. The mark that was
// never removed keeps the writer's keys empty until it expires. Other keys are filled.
func TestSilentRedisUnderWriter(t *testing.T) {
	be := newBench(t)
	other := be.a.create(`{"name":"other","price":1}`)
	be.awaitHit(be.a, 0)
	be.redis.signal(syscall.SIGSTOP)
	be.write(be.a, setStock(1))
	be.read(be.a, 1)
	be.redis.signal(syscall.SIGCONT)
	within(t, be.a.awaitHit(other), 2*time.Second, "the return of the cache")
	be.read(be.b, 1)
	be.awaitHit(be.a, 1)
	be.read(be.b, 1)
}

// Redis holds very many keys of others: the cache is used nevertheless, and to clear it is bounded and uses
// no more connections.
func TestManyKeysOfOthers(t *testing.T) {
	be := newBench(t)
	for i := range 300 { // so that Redis is never busy for as long as redisTimeout
		be.redis.do("EVAL", `for i = 1, 1000 do redis.call('SET', 'other:' .. ARGV[1] .. ':' .. i, '') end`, 0, i)
	}
	be.a.cache.trust.distrust(errors.New("the test says so"))
	within(t, be.awaitHit(be.a, 0), 5*time.Second, "the return of the cache")
	concurrently(20, func(int) {
		a, err := be.a.send("DELETE", "/cache/clear", "")
		expect(t, err == nil && (a.status == 200 || a.status == 503), "clearing: %d %v", a.status, err)
		within(t, a.took, 6*time.Second, "clearing")
	})()
	clients := must(redis.String(be.redis.try("CLIENT LIST")))
	expect(t, strings.Count(clients, "\n") <= 3, "more connections than the replicas' and this one:\n%s", clients)
	size := be.redis.do("DBSIZE").(int64)
	expect(t, size >= 300_000, "%d keys are left", size)
}

// listeners is a query for the processes that serve the replicas' listeners.
const listeners = `FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'`

// Another session changes a row: by a statement, by many rows at once, by TRUNCATE, and while the listeners lose their
// connections, and the notification with them, and are back before anybody asks.
func TestOtherSessions(t *testing.T) {
	be := newBench(t)
	const anew = `INSERT INTO products (id, name, price, stock) VALUES (1, 'a', 1, `
	const cut = `SELECT pg_terminate_backend(pid) ` + listeners + `; UPDATE products SET stock = `
	for i, change := range []string{
		`UPDATE products SET stock = 1`,
		`INSERT INTO products (name, price) SELECT 'p' || n, n FROM generate_series(1, 10000) n;
			UPDATE products SET stock = 2`,
		`TRUNCATE products; ` + anew + `3)`,
		`DELETE FROM products; ` + anew + `4)`,
		cut + `5`, cut + `6`, cut + `7`,
	} {
		within(t, be.awaitHit(be.a, i)+be.awaitHit(be.b, i), 5*time.Second, "the return of the cache")
		must(psql(t, be.cfg).Exec(change))
		be.awaitSeen(i + 1)
	}
	var deletions int
	info := must(redis.String(be.redis.try("INFO commandstats")))
	must(fmt.Sscanf(infoField(info, "cmdstat_unlink"), "calls=%d", &deletions))
	expect(t, deletions <= 1000, "%d deletions: each replica must drop everything once for 10,000 changes", deletions)
}

// Another session changes a row while no replica can hear of it.
func TestChangeWhileListenerIsCut(t *testing.T) {
	be := newBench(t)
	be.awaitHit(be.a, 0)
	db := psql(t, be.cfg)
	must(db.Exec(`UPDATE pg_database SET datallowconn = false WHERE datname = current_database()`)) // nobody reconnects
	must(db.Exec(`SELECT pg_terminate_backend(pid) ` + listeners))
	eventually(t, "trust has ended", func() bool { return !be.a.cache.Trusted() && !be.b.cache.Trusted() })
	must(db.Exec(`UPDATE products SET stock = 1 WHERE id = 1`))
	must(db.Exec(`UPDATE pg_database SET datallowconn = true WHERE datname = current_database()`))
	be.awaitHit(be.a, 1)
	be.awaitHit(be.b, 1)
}

// A connection breaks in the middle of a batch of commands: those before were answered, and only the others fail.
func TestBrokenBatch(t *testing.T) {
	s := startAlone(t)
	epoch := s.cache.trust.epoch.Load()
	batch := []*command{{name: "PING"}, {name: "QUIT"}, {name: "PING"}} // Redis answers QUIT, and closes the connection
	s.cache.redis.exchange(batch)
	ok := batch[0].err == nil && batch[1].err == nil && batch[2].err != nil
	expect(t, ok, "the errors are %v, %v and %v", batch[0].err, batch[1].err, batch[2].err)
	expect(t, s.cache.trust.epoch.Load() != epoch, "the error of a command did not end trust")
}
